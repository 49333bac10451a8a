"""The measure `sweep`: rows against the library's `neg` and `neurgrad`, its choices, its options, its cost."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

import neg_service
from neg_service import schema
from neg_service.cluster.ranking import ranking_of
from neg_service.config import NeuronsConfig, ScanConfig
from neg_service.errors import ConfigurationError
from neg_service.layer_neurons import NO_EXPERT
from neg_service.measures import measure_of
from neg_service.measures.builtin.aggregate_importance import total
from neg_service.models.batches import Budget
from neg_service.prompts.prompt import Prompt
from tests.refusals import ANY, refused
from tests.shards import INFO, measured_shard
from tests.sweeps import PROMPTS, SHIFTS, sweep_of, swept
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("family", ["Llama 2", "BERT"])
@pytest.mark.parametrize("shift", ["magnitude", "signed"])
def test_rows_are_what_the_library_gives_for_each_target_alone(family: str, shift: str) -> None:
    model = tiny_model(family, torch.float64)
    texts = {p.id: p.text if family == "Llama 2" else f"{p.text} w96" for p in PROMPTS}
    prompts = [Prompt(p.id, texts[p.id], p.targets, p.answer) for p in PROMPTS]
    table = swept(model, NeuronsConfig(choose="sample", count=4), prompts, shift=shift, keep_curves=True)["sweep"]
    assert table.num_rows == (3 + 2 + 1) * 12
    frame = table.to_pylist()
    for prompt in prompts:
        for k, target in enumerate(prompt.targets):
            rows = [r for r in frame if r["prompt_id"] == prompt.id and r["target_index"] == k]
            assert {(r["target"], r["is_answer"]) for r in rows} == {
                (target, None if prompt.answer is None else k == prompt.answer)
            }
            pairs = [(r["layer"], r["neuron"]) for r in rows]
            alone = neg_service.neg(model, prompt.text, target, pairs, SHIFTS, shift=shift)
            estimate = neg_service.neurgrad(model, [prompt.text], [[target]])
            neurgrad_n = np.array([estimate.neurgrad[0, 0, layer, n] for layer, n in pairs])
            for column, expected in (
                ("neg", alone.neg),
                ("r", alone.r),
                ("r2", alone.r2),
                ("activation", alone.activation),
                ("delta_p", alone.delta_p),
                ("max_abs_delta_p", np.abs(alone.delta_p).max(1)),
                ("probability", np.full(12, alone.probability)),
                ("gradient", np.where(alone.activation < 0, -1, 1) * neurgrad_n),
                ("neurgrad", neurgrad_n),
            ):
                np.testing.assert_allclose([r[column] for r in rows], expected, rtol=2e-5, atol=1e-12, err_msg=column)
            signs = np.sign(alone.neg) == np.sign(
                [r["neurgrad"] * (np.sign(r["activation"]) if shift == "signed" else 1) for r in rows]
            )
            assert [r["signs_agree"] for r in rows] == signs.tolist()
            assert {(r["basis"], r["shift"], r["dtype"]) for r in rows} == {("paper", shift, "float64")}


def test_each_prompts_strongest_neurons_are_swept() -> None:
    model = tiny_model("Llama 2")
    table = swept(model, NeuronsConfig(choose="top", count=5, layers=[0, 2]))["sweep"]
    for prompt in PROMPTS:
        estimate = np.abs(neg_service.neurgrad(model, [prompt.text], [prompt.targets], layers=[0, 2]).neurgrad[0])
        best = np.argsort(-estimate.max(0).ravel(), kind="stable")[:5]
        expected = {((0, 2)[i // 40], i % 40) for i in best.tolist()}
        rows = table.filter(pc.field("prompt_id") == prompt.id)
        assert set(zip(rows["layer"].to_pylist(), rows["neuron"].to_pylist(), strict=True)) == expected


@pytest.mark.parametrize(
    "asked",
    [
        {"readout": "log_odds", "against": "others"},
        {"readout": "logit", "against": 0},
        {"readout": "log_probability", "at": "each"},
    ],
)
def test_neurons_are_ranked_by_what_is_measured_of_them(asked: dict[str, Any]) -> None:
    model, prompts = tiny_model("Llama 2"), [own for own in PROMPTS if len(own.targets) > 1]
    sweep = measure_of({"name": "sweep", **asked})
    few = NeuronsConfig([0, 2], choose="top", count=5, over="dataset")
    ranking = ranking_of(ScanConfig(measure=sweep.configuration(), neurons=few))
    measure = measure_of(ranking.measure)
    assert measure.fingerprint_inputs() != measure_of({"name": "aggregate_importance"}).fingerprint_inputs()
    found = total([measured_shard(measure, model, prompts, ranking.neurons)["aggregate_importance"]])
    expected = sum(
        np.nanmax(np.abs(neg_service.neurgrad(model, [p.text], [p.targets], layers=[0, 2], **asked).neurgrad[0]), 0)
        for p in prompts
    )
    np.testing.assert_allclose(np.stack(list(found.values())), expected, rtol=1e-4)


def test_strength_over_a_data_set_is_the_sum_of_each_prompts_largest() -> None:
    model = tiny_model("Llama 2")
    strength = measure_of({"name": "aggregate_importance"})
    tables = [
        measured_shard(strength, model, part, NeuronsConfig([1, 2]))["aggregate_importance"]
        for part in (PROMPTS[:2], PROMPTS[2:])
    ]
    read: list[weakref.ref[pa.Table]] = []

    def parts() -> Iterator[pa.Table]:
        while tables:
            # However many shards there are, one part is held.
            assert [table() for table in read] == [None] * len(read)
            read.append(weakref.ref(tables[0]))
            yield tables.pop(0)

    found = total(parts())
    expected = sum(
        np.abs(neg_service.neurgrad(model, [p.text], [p.targets], layers=[1, 2]).neurgrad[0].astype(float)).max(0)
        for p in PROMPTS
    )
    assert list(found) == [(1, NO_EXPERT), (2, NO_EXPERT)]
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-4)


def test_neither_batches_nor_shards_nor_other_neurons_change_the_rows() -> None:
    model = tiny_model("Llama 2", torch.float64)
    neurons = NeuronsConfig(choose="list", list=[[0, 1], [1, 5], [1, 6], [2, 39]])
    whole = swept(model, neurons)["sweep"]
    each = [swept(model, neurons, [prompt])["sweep"] for prompt in PROMPTS]
    small = swept(model, neurons, budget=Budget(20_000))["sweep"]
    everything = swept(model, NeuronsConfig())["sweep"]
    listed = [tuple(pair) for pair in neurons.list]
    keep = [pair in listed for pair in zip(*(everything[c].to_pylist() for c in ("layer", "neuron")), strict=True)]
    for other in (pa.concat_tables(each), small, everything.filter(pa.array(keep))):
        assert other.select(["prompt_id", "target", "layer", "neuron"]) == whole.select(
            ["prompt_id", "target", "layer", "neuron"]
        )
        for column in ("neg", "r", "r2", "max_abs_delta_p", "neurgrad"):
            np.testing.assert_allclose(other[column], whole[column], rtol=1e-5, atol=1e-12, err_msg=column)


def test_the_identity_names_the_grid_by_its_shifts() -> None:
    by_range = sweep_of(max_shift=0.2, step=0.1).fingerprint_inputs()
    assert by_range["shifts"] == [-0.2, -0.1, 0.1, 0.2]
    assert by_range == sweep_of(shifts=[-0.2, -0.1, 0.1, 0.2]).fingerprint_inputs()
    # An old name, of what never was part of an identity.
    assert by_range == sweep_of(max_shift=0.2, batch_bytes=10**9).fingerprint_inputs()
    assert by_range != sweep_of(max_shift=0.2, shift="signed").fingerprint_inputs()
    assert sweep_of(grid="coarse").fingerprint_inputs()["max_shift"] == 2.0


@pytest.mark.parametrize(
    ("options", "neurons", "refusal"),
    [
        ({"shift": "up"}, {}, ("measure.shift", "up")),
        ({"grid": "fine"}, {}, ("measure.grid", "fine", "adaptive, full, coarse")),
        ({"grid": "coarse", "shifts": [1.0]}, {}, ("measure.grid", "coarse", "places its own shifts")),
        ({"shifts": [0.0]}, {}, ("measure.shifts", ANY, "0 is no shift")),
        ({"shifts": "1,2"}, {}, ("measure.shifts", "1,2", "a list")),
        ({"step": 3.0}, {}, ("measure.step", "3.0")),
        ({}, {"choose": "sample", "count": 1, "seed": -1}, ("neurons.seed", "-1", "0 or more")),
        ({}, {"choose": "top", "count": 121}, ("neurons.count", "121")),
    ],
)
def test_bad_requests_are_refused_before_anything_starts(
    options: dict[str, Any], neurons: dict[str, Any], refusal: tuple[Any, ...]
) -> None:
    with refused(ConfigurationError, *refusal):
        sweep_of(**options).validate(INFO, NeuronsConfig(**neurons), PROMPTS)


def test_measures_of_whole_layers_refuse_single_neurons() -> None:
    for name in ("neurgrad", "aggregate_importance"):
        with refused(
            ConfigurationError,
            "neurons.choose",
            "sample",
            says="is for measure=sweep; measure=[a-z_]+ takes neurons=all",
        ):
            measure_of({"name": name}).validate(INFO, NeuronsConfig(choose="sample", count=3), PROMPTS)


def test_the_cost_counts_interventions_and_curves() -> None:
    five = NeuronsConfig(choose="sample", count=5)
    cost = sweep_of(grid="full").cost(INFO, five, 4.0)
    assert cost.rows == 15 * 40
    # Of the adaptive grid about three and a half shifts a neuron.
    assert sweep_of().cost(INFO, five, 4.0).rows == 53
    with_curves = sweep_of(keep_curves=True).cost(INFO, five, 4.0)
    assert with_curves.bytes["sweep"] - cost.bytes["sweep"] == 4 * 40 * 15 * 4
    assert "delta_p" in sweep_of(keep_curves=True).tables(INFO)["sweep"].schema.names
    assert "delta_p" not in schema.sweep().names

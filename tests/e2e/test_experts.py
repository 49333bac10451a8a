"""Mixtures from the command line to Parquet and back: every measure on two of them, and one scan by Ray."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

import neg_service
from jobs.entry import composed
from jobs.scan import scan
from neg_service import LanguageModel
from neg_service.config import ScanConfig
from neg_service.errors import ConfigurationError
from neg_service.report.console import describe_tables
from neg_service.storage.reader import Run
from tests.e2e.commands import in_order, refused, scan_config
from tests.here import scan_here
from tests.mixtures import tiny_mixture
from tests.rare import one_of
from tests.refusals import refused as refused_with

FAMILIES = ["Mixtral", "DeepSeek 3"]
ROWS = [
    {"id": f"words/train/{i}", "prompt": text, "targets": [" w7", " w8"], "answer": [" w7", " w8"][i % 2]}
    for i, text in enumerate(["w3 w14 w9", "w5 w2", "w3 w14 w9 w20 w21 w3"])
]


@functools.cache
def model_of(family: str) -> LanguageModel:
    return tiny_mixture(family)


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A family, and the settings of a scan of its files."""
    return request.param, saved(request.param, tmp_path_factory.mktemp("mixture"))


def saved(family: str, place: Path) -> list[str]:
    """The settings of a scan of a family's files."""
    model = model_of(family)
    model.model.save_pretrained(place / "model")
    model.tokenizer.save_pretrained(place / "model")
    (place / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [
        f"model.source={place / 'model'}", f"dataset.source={place / 'words.jsonl'}", "job.shard_size=2",
        "cluster.replicas=1", "cluster.cpus_per_replica=1",
    ]  # fmt: skip


def scanned(source: tuple[str, list[str]], place: Path, *settings: str) -> Run:
    return scan_here(scan_config(*source[1], f"storage.uri={place}", *settings))


def columns(table: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def test_neurgrad_is_read_expert_by_expert(source: tuple[str, list[str]], tmp_path: Path) -> None:
    run, (found, prompts) = scanned(source, tmp_path), _library(source[0])
    for p, row in enumerate(prompts):
        routing = run.table("routing").to_table().to_pylist()
        used = {own["layer"]: own["experts"] for own in routing if own["prompt_id"] == row["id"]}
        for layer, experts in used.items():
            assert experts == sorted(set(found.expert[p, layer][found.expert[p, layer] >= 0].tolist()))
        for layer, slot in ((1, 0), (2, -1 if source[0] == "DeepSeek 3" else 5), (0, 3)):
            expert, neuron = int(found.expert[p, layer, slot]), int(found.neuron[p, layer, slot])
            if expert == -2:
                continue
            own = run.neuron(layer, neuron, expert).filter(pa.compute.field("prompt_id") == row["id"])
            expected = sorted(found.neurgrad[p, :, layer, slot].tolist())
            np.testing.assert_allclose(sorted(own["neurgrad"].to_pylist()), expected, rtol=1e-3, atol=1e-9)
            assert set(own["expert"].to_pylist()) == {None if not _has_experts(run, layer) else expert}
    assert "neurgrad" in str(describe_tables(run))


def _library(family: str) -> tuple[Any, list[dict[str, Any]]]:
    texts = [row["prompt"] for row in ROWS]
    return neg_service.neurgrad(model_of(family), texts, [row["targets"] for row in ROWS]), ROWS


def _has_experts(run: Run, layer: int) -> bool:
    return run.about["model"]["layer_neurons"][layer][1] > 0


def test_a_neuron_needs_its_expert(source: tuple[str, list[str]], tmp_path: Path) -> None:
    run = scanned(source, tmp_path, "job.limit=1")
    with refused_with(ConfigurationError, says=r"\(1, 3\) needs an expert"):
        run.neuron(1, 3)
    with refused_with(ConfigurationError, says=r"\(1, 3, 99\) does not exist"):
        run.neuron(1, 3, 99)
    refused("needs an expert", *source[1], "measure=sweep", "neurons=list", "neurons.list=[[1,3]]")


def test_a_sweep_says_what_was_used(source: tuple[str, list[str]], tmp_path: Path) -> None:
    settings = ["measure=sweep", "measure.shifts=[-2,-1,1,2]", "neurons=list", "neurons.list=[[1,3,0],[1,3,1],[2,3,4]]"]
    run = scanned(source, tmp_path, *settings)
    swept = run.table("sweep").to_table()
    routing = {(own["prompt_id"], own["layer"]): own["experts"] for own in run.table("routing").to_table().to_pylist()}
    texts = {own["id"]: str(own["prompt"]) for own in ROWS}
    for row in swept.to_pylist():
        assert row["is_routed"] == (row["expert"] in routing[row["prompt_id"], row["layer"]])
        if not row["is_routed"]:
            assert row["neg"] == row["neurgrad"] == row["routing_changed"] == 0
            assert not row["is_resolved"]
            continue
        asked, text = [(row["layer"], row["neuron"], row["expert"])], texts[row["prompt_id"]]
        found = neg_service.neg(model_of(source[0]), text, row["target"], asked, [-2, -1, 1, 2])
        assert row["neg"] == pytest.approx(found.neg[0], rel=1e-3, abs=1e-9)
        assert row["routing_changed"] == pytest.approx(found.routing_changed[0])
    assert not swept["is_routed"].to_numpy().all()
    neurons = run.listed_neurons()
    assert neurons is not None
    assert neurons.names() == [(1, 3, 0), (1, 3, 1), (2, 3, 4)]
    # A sample has rows of what was used alone; of two neurons of all experts a prompt may use none.
    few = scanned(source, tmp_path, "measure=sweep", "neurons=sample", "neurons.count=2", "neurons.per=model")
    assert few.table("prompts").to_table().num_rows == len(ROWS)
    sample = scanned(source, tmp_path, *settings[:2], "neurons=sample", "neurons.count=1").table("sweep").to_table()
    assert sample["is_routed"].to_numpy().all()
    assert all(
        expert is None or expert < 0 or expert in routing[prompt, layer]
        for prompt, layer, expert in columns(sample, "prompt_id", "layer", "expert")
    )


OTHERS = [
    ["measure=integrated_gradients", "measure.steps=2"],
    ["measure=gradient"],
    ["measure=random"],
    ["measure=neurgrad", "measure.keep=top_k", "measure.top_k=4"],
    ["measure=skill_scores"],
    ["measure=aggregate_importance"],
    ["measure=sweep", "neurons=top", "neurons.count=3", "measure.grid=coarse"],
    ["measure=intervene", "measure.edits=[{neurons: [[1,3,0],[2,3,4]], enhance: 0.5}]"],
]


def shown(settings: list[str]) -> str:
    return "-".join(own.split("=")[1] for own in settings)[:40]


@pytest.mark.parametrize("settings", one_of(2, OTHERS), ids=shown)
def test_every_other_measure_comes_back(source: tuple[str, list[str]], settings: list[str], tmp_path: Path) -> None:
    run = scanned(source, tmp_path, *settings)
    table = run.table(run.tables[-1]).to_table()
    assert len(table)
    if "expert" in table.column_names:
        layers = run.about["model"]["layer_neurons"]
        for layer, expert in columns(table, "layer", "expert"):
            assert (expert is None) == (layers[layer][1] == 0)
    values = run.described[run.tables[-1]].values
    if values is not None and "neuron" not in table.column_names:
        for layer, expert, own in columns(table, "layer", "expert", values):
            n_mlp, _, n_of_expert, _ = run.about["model"]["layer_neurons"][layer]
            assert len(own) == (n_of_expert if expert is not None and expert >= 0 else n_mlp)
            assert np.isfinite(own).all()


# Experts, one of them beside recurrent layers.
MEASURES = [
    ["measure=neurgrad"],
    ["measure=sweep", "measure.shifts=[-1,1]", "neurons=sample", "neurons.count=1"],
    *OTHERS,
    ["measure=activation"],
    ["measure=gradient_x_activation"],
    ["measure=positions"],
    ["measure=control", "measure.probability=0.05"],
    ["measure=neuron_predictions", "neurons=list", "neurons.list=[[1,3,0],[2,3,4]]"],
]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param(family, settings, marks=pytest.mark.faults)
        for family in (*FAMILIES, "Granite 4 MoE")
        for settings in MEASURES
    ],
    ids=lambda own: own if isinstance(own, str) else shown(own),
)
def test_a_scan_by_ray_gives_the_same(family: str, settings: list[str], tmp_path: Path) -> None:
    own = saved(family, tmp_path)
    # Ray of its own, as for the command.
    assert scan(composed("scan", [*own, *settings, f"storage.uri={tmp_path / 'ray'}"], ScanConfig)) == 0
    assert not ray.is_initialized()
    (place,) = (own for own in (tmp_path / "ray").iterdir() if "ranking" not in own.name)
    by_ray, here = neg_service.open_run(place), scanned((family, own), tmp_path / "here", *settings)
    assert by_ray.tables == here.tables
    for name in by_ray.tables:
        found, expected = (in_order(run.table(name).to_table()).to_pylist() for run in (by_ray, here))
        assert len(found) == len(expected) > 0
        for row, other in zip(found, expected, strict=True):
            assert row.keys() == other.keys()
            for key in row.keys() - {"seconds"}:
                np.testing.assert_equal(kind_of(row[key]), kind_of(other[key]))
                if kind_of(row[key]) == "numbers":
                    numbers = np.asarray(other[key], float)
                    np.testing.assert_allclose(
                        np.asarray(row[key], float), numbers, rtol=1e-3, atol=1e-4 * np.nanmax(abs(numbers), initial=0)
                    )
                else:
                    assert row[key] == other[key]


def kind_of(value: Any) -> str:
    is_number = isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float))
    return "numbers" if is_number else "other"

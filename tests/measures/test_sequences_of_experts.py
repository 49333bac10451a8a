"""Neurons of experts moved at every token that predicts one of a target's, against plain passes over prompt and target.

The oracle runs the experts token by token, on the whole sequence, in float64. A neuron is moved where its expert is
chosen, in the direction of its activation there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import neg_service
from neg_service import LanguageModel
from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError
from neg_service.measures import measure_of
from neg_service.measures.gradients import gradients
from neg_service.models.batches import Budget
from neg_service.models.precision import in_precision
from neg_service.prompts.prompt import Prompt
from tests import mixtures_oracle
from tests.mixture_families import by_key
from tests.mixtures import MIXTURES, tiny_mixture
from tests.refusals import refused
from tests.sequences import encoded
from tests.shards import measured_shard
from tests.tiny_models import tiny_model

Key = tuple[int, int]
Token = tuple[int, int, int]
IDS = ([20, 21, 22, 23, 24, 25, 26, 27, 28], [20, 21, 22, 23, 60])
TARGETS = (((3, 4, 5), (9,), (3, 6, 8)), ((7, 8), (1, 2, 3, 4)))
PROMPTS = [encoded(ids, own, str(i)) for i, (ids, own) in enumerate(zip(IDS, TARGETS, strict=True))]
# An MLP that is always on beside experts, and a layer without experts first; two MLPs a layer, and identities among the
# experts; then, with the faults, whole sequences, windows, recurrent states, and experts of attention, too.
FAMILIES = [
    "DeepSeek 3",
    "LongCat Flash",
    *(
        pytest.param(name, marks=pytest.mark.faults)
        for name in ("Qwen 2 MoE", "Phi-3.5 MoE", "Mixtral", "Granite 4 MoE", "JetMoE")
    ),
]
BASIS = "hidden"
EACH: dict[str, Any] = {"not_one_token": "sequence", "at": "each"}


@functools.cache
def model_of(family: str) -> LanguageModel:
    """Made once; who uses it leaves it as it was."""
    return tiny_mixture(family, torch.float64)


def plain(family: str, ids: Sequence[int], target: Sequence[int], touch: Callable[[Token, Tensor], Tensor]) -> Tensor:
    """A target's probability [], with neurons of experts and MLPs as `touch` makes them at each token that predicts."""
    model, places = model_of(family).model, range(len(ids) - 1, len(ids) - 1 + len(target))
    with mixtures_oracle.token_by_token(model, MIXTURES[family], BASIS, places, touch):
        logits = model(torch.tensor([[*ids, *target[:-1]]]), use_cache=False).logits[0, -len(target) :]
    return logits.double().log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)].sum().exp()


@functools.cache
def differentiated(family: str, i: int, k: int) -> tuple[float, dict[Token, np.ndarray], dict[Token, np.ndarray]]:
    """p of a target of a prompt; of each token and expert that it chose d p / d a and a [N]."""
    leaves: dict[Token, Tensor] = {}
    activations: dict[Token, np.ndarray] = {}

    def touch(key: Token, x: Tensor) -> Tensor:
        # Of several MLPs of a layer each in turn, among zeros.
        activations[key] = activations.get(key, 0) + x.detach().double().numpy()
        return x + leaves.setdefault(key, torch.zeros_like(x, requires_grad=True))

    with torch.enable_grad():
        p = plain(family, IDS[i], TARGETS[i][k], touch)
        slopes = torch.autograd.grad(p, list(leaves.values()))
    return float(p.detach()), {key: own.numpy() for key, own in zip(leaves, slopes, strict=True)}, activations


def summed(slopes: dict[Token, np.ndarray], activations: dict[Token, np.ndarray], by_sign: bool) -> dict[Key, Any]:
    found: dict[Key, Any] = {}
    for (layer, expert, token), slope in slopes.items():
        sign = np.where(activations[layer, expert, token] < 0, -1, 1) if by_sign else 1
        found[layer, expert] = found.get((layer, expert), 0.0) + slope * sign
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wanted", ["all", "first"])
def test_gradients_are_sums_over_the_tokens_that_chose_the_expert(family: str, wanted: str) -> None:
    model = model_of(family)
    layers = list(range(model.feed_forward.n_layers))
    own = [range(len(targets)) if wanted == "all" else range(1) for targets in TARGETS]
    found_of = dict(gradients(model, PROMPTS, own, BASIS, layers, Budget(2**28), each=True))
    n_silent = 0
    for i, found in found_of.items():
        oracle = [differentiated(family, i, k) for k in range(len(TARGETS[i]))]
        # Those of all targets, also where one alone is differentiated.
        used = {key[:2] for _, slopes, _ in oracle for key in slopes}
        readout = len(IDS[i]) - 1
        activation = by_key(found.slots, found.activation_m)
        assert activation.keys() == used
        order = list(zip(found.slots.layer.tolist(), found.slots.expert.tolist(), strict=True))
        assert order == sorted(order, key=lambda key: (key[0], key[1] < 0, key[1]))
        for k, of_target in zip(own[i], by_target(found.slots, found.neurgrad_km), strict=True):
            p, slopes, activations = oracle[k]
            assert found.probability_k[k] == pytest.approx(p, rel=1e-5)
            expected = summed(slopes, activations, by_sign=True)
            for key, values in of_target.items():
                if key not in expected:
                    n_silent += 1
                    assert not values.any()
                    continue
                np.testing.assert_allclose(values, expected[key], rtol=1e-4, atol=1e-5 * p)
                there = activations.get((*key, readout), 0 * values)
                np.testing.assert_allclose(activation[key], there, rtol=1e-4, atol=1e-6)
    assert n_silent


def by_target(slots: Any, values_km: np.ndarray) -> list[dict[Key, np.ndarray]]:
    return [by_key(slots, values_m) for values_m in values_km]


def _texts(i: int) -> tuple[str, list[str]]:
    ids, targets = IDS[i], TARGETS[i]
    return " ".join(f"w{token}" for token in ids), [" " + " ".join(f"w{t}" for t in own) for own in targets]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neuron_is_shifted_at_every_token_that_chose_its_expert(family: str) -> None:
    model, target = model_of(family), TARGETS[0][0]
    _, slopes, activations = differentiated(family, 0, 0)
    readout = len(IDS[0]) - 1
    asked = _some_of(sorted(slopes), readout)
    prompt, (text, *_) = _texts(0)
    neurons = [(layer, 1, expert) for layer, expert in asked]
    # Truly float64: of some neurons the effect is a thousandth of what casts of the models' own code make of p.
    with torch.no_grad(), in_precision(model.model, model.feed_forward.layers, torch.float64):
        model.forget_prefixes()
        p = float(plain(family, IDS[0], target, lambda _, x: x))
        for shift in ("magnitude", "signed"):
            swept = neg_service.neg(model, prompt, text, neurons, [0.5], BASIS, shift, **EACH)
            assert swept.is_routed.all()
            for i, own in enumerate(asked):

                def touch(key: Token, x: Tensor, own: Key = own, shift: str = shift) -> Tensor:
                    if key[:2] != own:
                        return x
                    sign = -1 if shift == "magnitude" and activations[key][1] < 0 else 1
                    return x + 0.5 * sign * (torch.arange(len(x)) == 1)

                expected = float(plain(family, IDS[0], target, touch)) - p
                # LongCat's router computes in float32 in any precision.
                assert swept.delta_p[i, 0] == pytest.approx(expected, rel=1e-4, abs=1e-6 * p)
                there = activations.get((*own, readout), np.zeros(2))[1]
                assert swept.activation[i] == pytest.approx(there, rel=1e-4, abs=1e-7)


def _some_of(keys: Sequence[Token], readout: int) -> list[Key]:
    """Experts by how many tokens chose them, and whether the readout token did: one of each kind and layer."""
    tokens: dict[Key, list[int]] = {}
    for layer, expert, token in keys:
        tokens.setdefault((layer, expert), []).append(token)
    kinds = {(layer, expert < 0, len(own), readout in own): (layer, expert) for (layer, expert), own in tokens.items()}
    assert any(not has_readout for *_, has_readout in kinds)
    return list(kinds.values())


def test_a_sweep_says_for_each_target_whether_a_neuron_was_there() -> None:
    model = model_of("Qwen 2 MoE")
    text, names = _texts(0)
    prompt = Prompt("a", text, tuple(names))
    neurons = NeuronsConfig(choose="list", list=[[layer, 1, expert] for layer in (0, 2) for expert in range(-1, 6)])
    oracle = [differentiated("Qwen 2 MoE", 0, k) for k in range(3)]
    for shift in ("magnitude", "signed"):
        options = {"name": "sweep", "at": "each", "basis": BASIS, "shift": shift}
        shard = (model, [prompt], neurons, {"noise": {"sigma": 0.0}})
        rows = measured_shard(measure_of(options), *shard, sequences=True)["sweep"].to_pylist()
        assert len(rows) == 14 * len(names)
        seen = set()
        for row in rows:
            p, slopes, activations = oracle[row["target_index"]]
            key = (row["layer"], row["expert"])
            gradient, neurgrad = (summed(slopes, activations, by_sign).get(key, np.zeros(2))[1] for by_sign in (0, 1))
            assert row["is_routed"] == any(own[:2] == key for own in slopes)
            np.testing.assert_allclose(
                [row["gradient"], row["neurgrad"]], [gradient, neurgrad], rtol=1e-4, atol=1e-6 * p
            )
            seen.add((row["target_index"], row["is_routed"]))
            if not row["is_routed"]:
                assert row["neg"] == row["max_abs_delta_p"] == row["r"] == row["activation"] == 0
            elif not row["routing_changed"]:
                estimate = gradient if shift == "signed" else neurgrad
                assert row["neg"] == pytest.approx(estimate, rel=0.5, abs=0.02 * p)
        # The second target's only token chose fewer experts than all tokens did.
        assert {(1, False), (1, True), (0, True)} <= seen


def test_edits_reach_every_token_that_chose_the_expert() -> None:
    family, target = "DeepSeek 3", TARGETS[0][0]
    model, (p, slopes, activations) = model_of(family), differentiated(family, 0, 0)
    prompt, (text, *_) = _texts(0)
    edited = {(layer, expert) for layer, expert, _ in slopes if layer == 2}
    absent = next((2, expert) for expert in range(8) if (2, expert) not in edited)
    triples = [(layer, 1, expert) for layer, expert in [*sorted(edited), absent]]
    edits = [
        {"name": "up", "neurons": triples, "shift": 0.4, "signed": True},
        {"name": "more", "neurons": triples, "shift": 0.4},
        {"name": "off", "neurons": triples, "scale": 0.0},
    ]
    found = neg_service.intervene(model, [prompt], [[text]], edits, basis=BASIS, **EACH)
    moved: list[Callable[[Token, Tensor], Tensor]] = [
        lambda _key, x: x + 0.4,
        lambda key, x: x + 0.4 * (-1 if activations[key][1] < 0 else 1),
        lambda _key, x: 0 * x,
    ]
    for e, move in enumerate(moved):

        def touch(key: Token, x: Tensor, move: Any = move) -> Tensor:
            return torch.where(torch.arange(len(x)) == 1, move(key, x), x) if key[:2] in edited else x

        with torch.no_grad():
            expected = float(plain(family, IDS[0], target, touch)) - p
        assert found.delta_p[0, e, 0] == pytest.approx(expected, rel=1e-4, abs=1e-9 * p)
    assert found.n_routed.tolist() == [[len(edited)] * 3]


def test_the_library_and_a_scan_give_prompts_of_unequal_numbers_of_experts() -> None:
    model = model_of("Qwen 2 MoE")
    texts, names = zip(*map(_texts, range(2)), strict=True)
    found = neg_service.neurgrad(model, texts, names, basis=BASIS, **EACH)
    assert found.neuron is not None
    assert found.expert is not None
    # Of the layer with the most experts in use every slot is taken, of some other not all are.
    assert (found.neuron >= 0).any((0, 1)).all()
    assert (found.neuron < 0).any()
    for p in range(2):
        for k in range(len(TARGETS[p])):
            _, slopes, activations = differentiated("Qwen 2 MoE", p, k)
            expected = summed(slopes, activations, by_sign=True)
            for layer in range(3):
                for expert, neuron, value in zip(
                    found.expert[p, layer], found.neuron[p, layer], found.neurgrad[p, k, layer], strict=True
                ):
                    if neuron == 1:
                        wanted = expected.get((layer, expert), np.zeros(2))[1]
                        assert value == pytest.approx(wanted, rel=1e-4, abs=1e-8)
    prompts = [Prompt(str(p), text, tuple(names[p]), 0) for p, text in enumerate(texts)]
    options = {"name": "neurgrad", "at": "each", "basis": BASIS}
    whole, answers, top = (
        measured_shard(measure_of({**options, **more}), model, prompts, sequences=True)
        for more in ({}, {"keep": "answer"}, {"keep": "top_k", "top_k": 5})
    )
    of_answer = [row for row in whole["neurgrad"].to_pylist() if row["target_index"] == 0]
    for row, own in zip(answers["neurgrad"].to_pylist(), of_answer, strict=True):
        assert (row["layer"], row["expert"]) == (own["layer"], own["expert"])
        np.testing.assert_allclose(row["neurgrad"], own["neurgrad"], rtol=1e-4, atol=1e-9)
    best = max(abs(value) for row in of_answer if row["prompt_id"] == "0" for value in row["neurgrad"])
    assert abs(top["top_neurons"]["neurgrad"][0].as_py()) == pytest.approx(best, rel=1e-5)


def test_contrasts_and_sums_over_a_data_set_take_the_same_neurons() -> None:
    model = model_of("Qwen 2 MoE")
    texts, names = zip(*map(_texts, range(2)), strict=True)
    found = neg_service.neurgrad(model, texts[:1], names[:1], basis=BASIS, readout="log_probability", **EACH)
    against = neg_service.neurgrad(
        model, texts[:1], names[:1], basis=BASIS, readout="log_odds", against=1, **EACH
    ).neurgrad[0]
    expected = found.neurgrad[0] - found.neurgrad[0, 1]
    np.testing.assert_allclose(against[[0, 2]], expected[[0, 2]], rtol=1e-3, atol=1e-6)
    assert np.isnan(against[1]).all()
    prompts = [Prompt(str(p), text, tuple(names[p])) for p, text in enumerate(texts)]
    options = {"name": "aggregate_importance", "at": "each", "basis": BASIS}
    sums = measured_shard(measure_of(options), model, prompts, sequences=True)["aggregate_importance"].to_pylist()
    both = neg_service.neurgrad(model, texts, names, basis=BASIS, **EACH)
    assert both.expert is not None
    for row in sums:
        own = both.expert[:, row["layer"]] == (-1 if row["expert"] is None else row["expert"])
        strongest = np.abs(np.nan_to_num(both.neurgrad[:, :, row["layer"]])).max(1)
        expected = sum(strongest[p][own[p]] for p in range(2) if own[p].any())
        np.testing.assert_allclose(row["aggregate_importance"], expected, rtol=1e-5)
    swept = neg_service.neg(
        model,
        texts[0],
        names[0][0],
        [(2, 1, 0)],
        [0.3],
        basis=BASIS,
        readout="log_odds",
        against=names[0][1],
        **EACH,
    )
    assert swept.probability == pytest.approx(found.probability[0, 0], rel=1e-5)


def test_other_places_than_these_are_refused() -> None:
    for model in (model_of("Qwen 2 MoE"), tiny_model("Llama 2")):
        with refused(ConfigurationError, setting="at", value="all"):
            neg_service.neurgrad(model, ["w1"], [[" w2 w3"]], not_one_token="sequence", at="all")

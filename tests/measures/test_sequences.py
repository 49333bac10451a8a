"""Targets of several tokens against plain passes over prompt and target, in float64: every engine that can run them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import neg_service
from neg_service import LanguageModel
from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError, TargetError
from neg_service.measures import measure_of
from neg_service.measures.gradients import gradients
from neg_service.measures.interventions import Interventions
from neg_service.models.batches import Budget
from neg_service.models.precision import in_precision
from neg_service.prompts.prompt import Prompt
from tests import mixtures_oracle, sequences
from tests.families import in_model, layers_with_mlps
from tests.mixture_families import by_key
from tests.mixtures import MIXTURES, tiny_mixture
from tests.oracle import relative
from tests.refusals import refused
from tests.sequences import TARGETS, encoded
from tests.shards import measured_shard
from tests.tiny_models import tiny_model

# The prompts begin alike, are of unequal length, and longer than their models' windows; the third has single tokens.
PROMPTS = [
    encoded([20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30], TARGETS, "a"),
    encoded([20, 21, 22, 23, 24, 60], [(7, 8), (1, 2, 3, 4)], "b"),
    encoded([20, 21, 22, 23, 50, 51], [(7,), (8,)], "c"),
    encoded([40], [(7, 8)], "d"),
]
# Results are float32, and some models round to it within.
TOLERANCE = 1e-6
FAMILIES = ["Llama 2", "Gemma 2", "Gemma 3", "GPT-2", "GPT-J", "Granite 4"]


def measured(model: LanguageModel, wanted: list[Any] | None = None, basis: str = "paper") -> dict[int, Any]:
    wanted = wanted or [range(len(prompt.target_ids)) for prompt in PROMPTS]
    return dict(gradients(model, PROMPTS, wanted, basis, layers_with_mlps(model), Budget(2**28)))


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_and_gradients_are_those_of_plain_passes(family: str) -> None:
    model = tiny_model(family, torch.float64)
    for i, found in measured(model).items():
        for k, target in enumerate(PROMPTS[i].target_tokens):
            p, slope_tln, activation_tln = sequences.gradients(model.model, PROMPTS[i].ids, target, "paper")
            np.testing.assert_allclose(found.probability_k[k], p, rtol=TOLERANCE)
            assert relative(found.gradient_kln[k], slope_tln[0]) <= TOLERANCE
            assert relative(found.activation_ln, activation_tln[0]) <= TOLERANCE


NEURONS = [(2, 39), (0, 5), (1, 17)]
SHIFTS = [-2.0, 0.1]


@pytest.mark.parametrize("family", ["Gemma 2", "GPT-2", pytest.param("GPT-J", marks=pytest.mark.faults)])
def test_interventions_are_those_of_plain_passes(family: str) -> None:
    model, prompt = tiny_model(family), PROMPTS[0]
    model.ensure_checked_for_trees()
    asked = in_model(model, NEURONS)
    # Truly float64 within, where modeling code casts to float32 on its own.
    with in_precision(model.model, model.feed_forward.layers, torch.float64):
        interventions = Interventions(model, prompt, "paper")
        for k, target in enumerate(prompt.target_tokens):
            before = sequences.shifted(model.model, prompt.ids, target, "paper", [], 0.0)
            np.testing.assert_allclose(float(interventions.probability_k[k]), before, rtol=1e-10)
        for (layer, neuron), (_, of_mlp) in zip(asked, NEURONS, strict=True):
            place = layers_with_mlps(model).index(layer)
            (site,) = interventions.sites([layer])
            found, _ = interventions.delta_log_p(
                site, torch.tensor([of_mlp] * 2), torch.tensor(SHIFTS, dtype=torch.float64), Budget(2**28)
            )
            for s, shift in enumerate(SHIFTS):
                for k, target in enumerate(prompt.target_tokens):
                    before = sequences.shifted(model.model, prompt.ids, target, "paper", [], 0.0)
                    after = sequences.shifted(model.model, prompt.ids, target, "paper", [(place, neuron)], shift)
                    expected = np.log(after) - np.log(before)
                    assert abs(float(found[s, k]) - expected) <= 1e-6 * abs(expected) + 1e-12


EDITS: list[dict[str, Any]] = [
    {"name": "each its own", "neurons": NEURONS, "shift": [0.7, -0.2, 0.3], "signed": True},
    {"name": "more", "neurons": NEURONS[1:], "shift": 0.5, "signed": True},
]


@pytest.mark.parametrize("family", ["Llama 2", "GPT-J"])
def test_joint_edits_are_those_of_plain_passes(family: str) -> None:
    model = tiny_model(family, torch.float64)
    edits = [{**edit, "neurons": in_model(model, edit["neurons"])} for edit in EDITS]
    # The second prompt has one-token targets, which run by themselves.
    ids, targets = [p.ids for p in PROMPTS[:3]], [p.target_tokens for p in PROMPTS[:3]]
    texts = [" ".join(f"w{token}" for token in own) for own in ids]
    names = [[" " + " ".join(f"w{token}" for token in target) for target in own] for own in targets]
    found = neg_service.intervene(model, texts, names, edits, not_one_token="sequence")
    for p, own in enumerate(targets):
        for k, target in enumerate(own):
            before = sequences.shifted(model.model, ids[p], target, "paper", [], 0.0)
            assert found.probability_before[p, k] == pytest.approx(before, rel=1e-5)
            for e, edit in enumerate(EDITS):
                after = sequences.shifted(model.model, ids[p], target, "paper", edit["neurons"], edit["shift"])
                assert found.probability[p, e, k] == pytest.approx(after, rel=1e-5)
                assert found.delta_p[p, e, k] == pytest.approx(after - before, rel=1e-3, abs=1e-12)


def test_the_library_reads_sequences_where_it_is_asked_to_and_single_tokens_the_same_way() -> None:
    model = tiny_model("Llama 2")
    prompts, single, several = ["w1 w2 w3", "w4 w5"], [[" w7", " w8"], [" w9"]], [[" w7 w8", " w8"], [" w9"]]
    plain = neg_service.neurgrad(model, prompts, single)
    same = neg_service.neurgrad(model, prompts, single, not_one_token="sequence")
    np.testing.assert_array_equal(plain.neurgrad, same.neurgrad)
    np.testing.assert_array_equal(plain.probability, same.probability)
    found = neg_service.neurgrad(model, prompts, several, not_one_token="sequence")
    assert found.probability[0, 0] < plain.probability[0, 0]
    assert found.probability[0, 1] == pytest.approx(plain.probability[0, 1], rel=1e-5)
    np.testing.assert_allclose(found.neurgrad[1], plain.neurgrad[1], rtol=1e-3, atol=1e-7)
    swept = neg_service.neg(model, prompts[0], " w7 w8", [(2, 39), (0, 5)], not_one_token="sequence")
    assert swept.probability == pytest.approx(found.probability[0, 0], rel=1e-5)
    np.testing.assert_allclose(swept.neg, found.neurgrad[0, 0, [2, 0], [39, 5]], rtol=0.2)
    with refused(TargetError, setting="prompts", says="is 2 tokens"):
        neg_service.neurgrad(model, prompts, several)
    with refused(ConfigurationError, setting="not_one_token", value="skip"):
        neg_service.neurgrad(model, prompts, several, not_one_token="skip")
    # What is left of the two for a masked model.
    with refused(ConfigurationError, setting="not_one_token", value="sequence", says="masked model", allowed="error"):
        neg_service.neurgrad(tiny_model("BERT"), ["w1 [MASK]"], [["w2 w3"]], not_one_token="sequence")


@pytest.mark.parametrize("family", ["Mixtral", "gpt-oss", "Phi-3.5 MoE"])
def test_neurons_of_experts_are_those_of_plain_passes(family: str) -> None:
    model, mixture, prompt, target = tiny_mixture(family, torch.float64), MIXTURES[family], PROMPTS[0], TARGETS[0]
    ids = [*prompt.ids, *target[:-1]]

    def plain(touch: Any) -> torch.Tensor:
        with mixtures_oracle.token_by_token(model.model, mixture, "hidden", len(prompt.ids) - 1, touch):
            logits = model.model(torch.tensor([ids]), use_cache=False).logits[0, -len(target) :]
        return logits.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)].sum().exp()

    leaves: dict[Any, torch.Tensor] = {}
    with torch.enable_grad():
        p = plain(lambda key, x: x + leaves.setdefault(key, torch.zeros_like(x, requires_grad=True)))
        slopes = dict(zip(leaves, torch.autograd.grad(p, list(leaves.values())), strict=True))
    wanted, layers = [range(len(TARGETS))], list(range(model.feed_forward.n_layers))
    ((_, found),) = gradients(model, [prompt], wanted, "hidden", layers, Budget(2**28))
    assert found.probability_k[0] == pytest.approx(float(p.detach()), rel=1e-5)
    of_key = by_key(found.slots, found.gradient_km[:1])
    assert of_key.keys() == slopes.keys()
    for key, slope in slopes.items():
        np.testing.assert_allclose(of_key[key][0], slope.numpy(), rtol=1e-3, atol=1e-5 * float(p.detach()))
    # One neuron of each layer moved, in the last expert.
    asked = {key[0]: key for key in sorted(slopes)}
    texts = (" ".join(f"w{token}" for token in prompt.ids), " " + " ".join(f"w{token}" for token in target))
    neurons = [(layer, 1, expert) for layer, expert in asked.values()]
    swept = neg_service.neg(model, *texts, neurons, [0.5], "hidden", "signed", not_one_token="sequence")
    with torch.no_grad():
        for i, key in enumerate(asked.values()):
            moved = plain(lambda own, x, key=key: x + 0.5 * (torch.arange(len(x)) == 1) if own == key else x)
            expected = float(moved - p)
            assert swept.delta_p[i, 0] == pytest.approx(expected, rel=1e-4, abs=1e-9 * float(p))


@pytest.mark.parametrize("family", ["Llama 2", "GPT-J"])
def test_neurons_may_move_at_every_token_that_predicts(family: str) -> None:
    model = tiny_model(family, torch.float64)
    ids, targets = [PROMPTS[0].ids, PROMPTS[1].ids], [PROMPTS[0].target_tokens, PROMPTS[1].target_tokens]
    texts = [" ".join(f"w{token}" for token in own) for own in ids]
    names = [[" " + " ".join(f"w{token}" for token in target) for target in own] for own in targets]
    each: dict[str, Any] = {"not_one_token": "sequence", "at": "each"}
    found = neg_service.neurgrad(model, texts, names, **each)
    up = {"name": "up", "neurons": NEURONS, "shift": [0.3, 0.2, -0.4], "signed": True}
    edited = neg_service.intervene(model, texts, names, [up], **each)
    for p, own in enumerate(targets):
        for k, target in enumerate(own):
            places = range(len(ids[p]) - 1, len(ids[p]) - 1 + len(target))
            _, slope_tln, a_tln = sequences.gradients(model.model, ids[p], target, "paper", places)
            expected = (slope_tln * np.where(a_tln < 0, -1, 1)).sum(0)
            assert relative(found.neurgrad[p, k].astype(float), expected) <= TOLERANCE
            assert relative(found.activation[p].astype(float), a_tln[0]) <= TOLERANCE
            before, after = (
                sequences.shifted(model.model, ids[p], target, "paper", moved, up["shift"][: len(moved)], places)
                for moved in ([], NEURONS)
            )
            assert edited.delta_p[p, 0, k] == pytest.approx(after - before, rel=1e-4, abs=1e-9 * before)
            # One neuron by its magnitude: in the direction of its activation at each token; and by itself.
            for shift in ("magnitude", "signed") if p == 0 else ():
                swept = neg_service.neg(model, texts[p], names[p][k], [(1, 17)], [0.2], shift=shift, **each)
                by = [0.2 * (-1 if shift == "magnitude" and a < 0 else 1) for a in a_tln[:, 1, 17]]
                after = sequences.shifted(model.model, ids[p], target, "paper", [(1, 17)] * len(by), by, places, "own")
                assert swept.delta_p[0, 0] == pytest.approx(after - before, rel=1e-3, abs=1e-9 * before)


def test_a_sweep_at_every_token_has_both_estimates_of_its_own() -> None:
    model = tiny_model("Llama 2", torch.float64)
    prompt = Prompt("a", "w20 w21 w22", (" w3 w4 w5",))
    neurons = NeuronsConfig(choose="list", list=[[0, n] for n in range(40)])
    options = {"name": "sweep", "at": "each"}
    rows, signed = (
        measured_shard(
            measure_of({**options, "shift": shift}), model, [prompt], neurons, {"noise": {"sigma": 0.0}}, sequences=True
        )["sweep"].to_pylist()
        for shift in ("magnitude", "signed")
    )
    _, slope_tln, a_tln = sequences.gradients(model.model, (20, 21, 22), (3, 4, 5), "paper", (2, 3, 4))
    neurgrad, gradient = (slope_tln * np.where(a_tln < 0, -1, 1)).sum(0)[0], slope_tln.sum(0)[0]
    for own in (rows, signed):
        np.testing.assert_allclose([row["neurgrad"] for row in own], neurgrad, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose([row["gradient"] for row in own], gradient, rtol=1e-4, atol=1e-9)
    # Signs of the activation differ between the tokens for some neurons, so that neither follows from the other.
    assert ((a_tln < 0).any(0) & (a_tln > 0).any(0))[0].any()
    assert np.corrcoef([row["neg"] for row in rows], neurgrad)[0, 1] > 0.9
    assert np.corrcoef([row["neg"] for row in signed], gradient)[0, 1] > 0.9

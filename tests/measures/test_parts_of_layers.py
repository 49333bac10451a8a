"""Layers with several MLPs one after another, identities among their experts, and experts that are always on, against
experts that run token by token.

Gradients, sweeps and joint edits of these families are compared in `tests/models/test_mixtures.py`, targets of several
tokens in `test_sequences_of_experts.py`; here is what every other measure makes of them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ConfigurationError
from neg_service.measures import measure_of
from neg_service.measures.control.export import export_shift
from neg_service.measures.control.exported import load_shift
from neg_service.measures.control.plain_passes import READOUT, adding, experts_for, moved_by
from neg_service.measures.positions import position_map
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tokens import encode
from tests import mixtures_oracle
from tests.mixtures import MIXTURES, tiny_mixture
from tests.refusals import refused
from tests.shards import measured_shard

FAMILIES = ["LongCat Flash", "Inkling"]
IDS = (3, 14, 9, 26, 35, 8)
TEXT = " ".join(f"w{token}" for token in IDS)
ALWAYS_ON = -1
Key = tuple[int, int]


@functools.cache
def model_of(family: str) -> LanguageModel:
    """Made once; who uses it leaves it as it was."""
    return tiny_mixture(family, torch.float64)


def test_an_identity_that_a_token_chooses_is_no_neuron() -> None:
    model, rng = model_of("LongCat Flash"), np.random.default_rng(0)
    texts = [" ".join(f"w{token}" for token in rng.integers(3, 90, 4)) for _ in range(12)]
    found = neg_service.neurgrad(model, texts, [[" w7"]] * len(texts))
    assert found.expert is not None
    assert found.neuron is not None
    # Three of five experts of 14 neurons at the most, and two MLPs of 20.
    assert found.neurgrad.shape == (len(texts), 1, 3, 3 * 14 + 40)
    used = [{expert for expert in own.tolist() if expert >= 0} for own in found.expert.reshape(-1, 3 * 14 + 40)]
    assert set().union(*used) == set(range(5))
    assert {len(own) for own in used} >= {0, 1, 2}
    for p, text in enumerate(texts):
        alone = neg_service.neurgrad(model, [text], [[" w7"]])
        assert alone.expert is not None
        assert alone.neuron is not None
        for layer in range(3):
            expert, neuron, values = found.expert[p, layer], found.neuron[p, layer], found.neurgrad[p, 0, layer]
            n = 14 * len(used[3 * p + layer]) + 40
            assert neuron[expert == ALWAYS_ON].tolist() == list(range(40))
            assert (expert[n:] == -2).all()
            assert np.isnan(values[n:]).all()
            assert np.isfinite(values[:n]).all()
            np.testing.assert_array_equal(alone.expert[0, layer, :n], expert[:n])
            np.testing.assert_allclose(alone.neurgrad[0, 0, layer, :n], values[:n], rtol=1e-9, atol=1e-15)


def test_a_shift_that_has_an_identity_chosen_above_counts_as_a_change() -> None:
    model = model_of("LongCat Flash")
    shifts = [-20.0, 20.0]
    found = neg_service.neg(model, TEXT, " w7", "all", shifts)
    exchanged = 0
    for i in range(0, len(found.neurons), 7):
        layer, neuron, expert = map(int, found.neurons[i])
        sign = -1 if found.activation[i] < 0 else 1
        runs = [_chosen(layer, expert, neuron, sign * shift) for shift in (0.0, *shifts)]
        assert found.routing_changed[i] == np.mean([own != runs[0] for own in runs[1:]])
        # How many identities, which are behind all experts, each layer's token chose.
        n_identities = [[sum(number >= 5 for number in own) for own in run.values()] for run in runs]
        exchanged += n_identities[1] != n_identities[0] or n_identities[2] != n_identities[0]
    assert exchanged


def _chosen(layer: int, expert: int, neuron: int, shift: float) -> dict[int, list[int]]:
    _, chosen = mixtures_oracle.shifted(
        model_of("LongCat Flash").model, MIXTURES["LongCat Flash"], IDS, "paper", (layer, expert), neuron, shift
    )
    return chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_at_every_token_the_map_has_its_own_neurons(family: str) -> None:
    model = model_of(family)
    (prompt,) = encode(model.tokenizer, [Prompt("0", TEXT, (" w7",))], None, None)
    found = position_map(model, prompt, "paper").targets[0]
    for t in range(len(IDS)):
        slopes, activations = _gradients(family, t, 7)
        for layer in range(3):
            own = {key: slopes[key] * np.where(activations[key] < 0, -1, 1) for key in slopes if key[0] == layer}
            assert found.total_tl[t, layer] == pytest.approx(sum(np.abs(v).sum() for v in own.values()), rel=1e-4)
            if not found.total_tl[t, layer]:
                continue
            best = max(own, key=lambda key: np.abs(own[key]).max())
            neuron = int(np.abs(own[best]).argmax())
            assert found.strongest_tl[t, layer] == pytest.approx(own[best][neuron], rel=1e-4)
            assert max(int(found.expert_tl[t, layer]), ALWAYS_ON) == best[1]
            assert found.neuron_tl[t, layer] == neuron


def _gradients(family: str, place: int, target: int) -> tuple[dict[Key, np.ndarray], dict[Key, np.ndarray]]:
    """By (layer, expert) d p / d a and a [N] at a place of the prompt, which is read at its end."""
    leaves: dict[Key, Tensor] = {}
    activations: dict[Key, Any] = {}

    def touch(key: Key, x: Tensor) -> Tensor:
        activations[key] = activations.get(key, 0) + x.detach().numpy()
        return x + leaves.setdefault(key, torch.zeros_like(x, requires_grad=True))

    model = model_of(family).model
    with torch.enable_grad(), mixtures_oracle.token_by_token(model, MIXTURES[family], "paper", place, touch):
        p = model(torch.tensor([IDS]), use_cache=False).logits[0, -1].softmax(-1)[target]
        slopes = torch.autograd.grad(p, list(leaves.values()), materialize_grads=True, allow_unused=True)
    return {key: own.numpy() for key, own in zip(leaves, slopes, strict=True)}, activations


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_scale_all_neurons_of_a_layer_together(family: str) -> None:
    model, m = model_of(family), 3
    _, _, activations = mixtures_oracle.gradients(model.model, MIXTURES[family], IDS, [7], "hidden")
    found = neg_service.integrated_gradients(model, [TEXT], [[" w7"]], m=m, basis="hidden")
    assert found.expert is not None
    for layer in range(3):
        keys = sorted((key for key in activations if key[0] == layer), key=lambda key: (key[1] < 0, key))
        total: dict[Key, Any] = dict.fromkeys(keys, 0.0)
        for j in range(1, m + 1):
            scaled = {key: torch.tensor(activations[key] * j / m, requires_grad=True) for key in keys}

            def touch(key: Key, x: Tensor, scaled: Any = scaled) -> Tensor:
                return scaled.get(key, x)

            with torch.enable_grad():
                p = mixtures_oracle.probabilities(model.model, MIXTURES[family], IDS, "hidden", touch)[7]
                for key, slope in zip(keys, torch.autograd.grad(p, list(scaled.values())), strict=True):
                    total[key] += slope.numpy() / m
        expected = np.concatenate([activations[key] * total[key] for key in keys])
        own = found.integrated_gradients[0, 0, layer, : len(expected)]
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
        assert list(dict.fromkeys(found.expert[0, layer, : len(expected)].tolist())) == [key[1] for key in keys]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_joint_shift_acts_the_same_in_a_plain_pass(family: str) -> None:
    model = model_of(family)
    result = neg_service.control(model, TEXT, " w7", probability=0.2, tolerance=1e-4)
    moved = moved_by(model, result, 0)
    assert {(site.is_experts, site.part) for site in moved} == {
        (site.is_experts, site.part) for site in model.feed_forward.sites("paper")
    }
    with torch.no_grad(), experts_for(model, [*moved.values()]), adding(model.model, [*moved.values()], READOUT):
        logits = model.model(torch.tensor([IDS]), use_cache=False).logits[0, -1]
    assert float(logits.softmax(-1)[7]) == pytest.approx(result.achieved[0], rel=1e-6)
    rows, added = result.neurons(0)
    shift = {tuple(row): value for row, value in zip(rows.tolist(), added.tolist(), strict=True)}

    def touch(key: Key, x: Tensor) -> Tensor:
        own = [shift.get((key[0], neuron, key[1]), 0.0) for neuron in range(len(x))]
        return x + torch.tensor(own, dtype=x.dtype)

    with torch.no_grad():
        p = mixtures_oracle.probabilities(model.model, MIXTURES[family], IDS, "paper", touch)
    assert float(p[7]) == pytest.approx(result.achieved[0], rel=1e-6)


@pytest.mark.parametrize("form", ["bias", "vector"])
def test_a_shift_of_several_mlps_of_a_layer_is_exported(form: str, tmp_path: Path) -> None:
    model = model_of("LongCat Flash")
    own = [(layer, neuron, ALWAYS_ON) for layer in range(3) for neuron in range(40)]
    result = neg_service.control(model, TEXT, " w7", probability=0.1, neurons=own, tolerance=1e-4)
    place = export_shift(model, result, 0, tmp_path / "shift", form=form, prompt=TEXT, target=" w7")
    shift = load_shift(place)
    part = "up_proj" if form == "bias" else "down_proj"
    assert [own.module for own in shift.parts] == [
        f"model.layers.{n}.mlps.{i}.{part}" for n in range(3) for i in (0, 1)
    ]
    with shift.applied(model.model), torch.no_grad():
        logits = model.model(torch.tensor([IDS]), use_cache=False).logits[0, -1]
    assert float(logits.softmax(-1)[7]) == pytest.approx(result.achieved[0], rel=1e-5)


def test_a_shift_of_experts_that_are_always_on_is_not_exported(tmp_path: Path) -> None:
    model = model_of("Inkling")
    result = neg_service.control(
        model, TEXT, " w7", probability=0.05, neurons=[(1, neuron, ALWAYS_ON) for neuron in range(28)]
    )
    with refused(ConfigurationError, "index", says="moves neurons of experts in layer 1"):
        export_shift(model, result, 0, tmp_path / "shift", form="vector", prompt=TEXT)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scan_has_a_row_for_each_expert_and_one_for_what_is_always_on(family: str) -> None:
    model = tiny_mixture(family)
    prompts = [Prompt(str(i), text, (" w7",)) for i, text in enumerate((TEXT, "w5 w2", "w61 w40 w17"))]
    found = measured_shard(measure_of({"name": "neurgrad"}), model, prompts)
    n_experts = max(own.n_experts for own in model.feed_forward.layer_neurons)
    chosen = {(row["prompt_id"], row["layer"]): row["experts"] for row in found["routing"].to_pylist()}
    assert all(expert < n_experts for own in chosen.values() for expert in own)
    of_layer: dict[Any, list[int]] = {}
    for row in found["neurgrad"].to_pylist():
        of_layer.setdefault((row["prompt_id"], row["layer"]), []).append(row["expert"])
        own = model.feed_forward.layer_neurons[row["layer"]]
        assert len(row["neurgrad"]) == (own.n_mlp if row["expert"] in (None, ALWAYS_ON) else own.n_of_expert)
    for key, experts in chosen.items():
        assert sorted(of_layer[key]) == [ALWAYS_ON, *experts]

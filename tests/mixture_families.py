"""Every family of mixtures against experts that run token by token: what tests assert, and what the table shows.

The same comparisons as those of dense families in `families.py`, by (layer, expert).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import neg_service
from neg_service import LanguageModel
from neg_service.measures.gradients import gradients
from neg_service.models.batches import Budget
from neg_service.models.precision import in_precision
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.slots import Slots
from tests import mixtures_oracle
from tests.families import random_ids
from tests.mixtures import MIXTURES, tiny_mixture
from tests.mixtures_oracle import ALWAYS_ON, Key
from tests.oracle import relative
from tests.tiny_models import VOCABULARY

SHIFTS = [-2.0, 0.1]


@functools.cache
def model_of(family: str) -> LanguageModel:
    """A family's tiny mixture, made once; who uses it leaves it as it was."""
    return tiny_mixture(family)


@functools.cache
def float64_of(family: str) -> Any:
    """The same weights in float64, for the oracle."""
    return copy.deepcopy(model_of(family).model).double()


def by_key(slots: Slots, values: np.ndarray) -> dict[Key, np.ndarray]:
    """Values [..., M] of a prompt by (layer, expert), -1 of an MLP that every token uses."""
    parts = np.split(values, slots.start[1:-1], axis=-1)
    keys = zip(slots.layer.tolist(), np.maximum(slots.expert, ALWAYS_ON).tolist(), strict=True)
    return dict(zip(keys, parts, strict=True))


def neurgrad_deviation(family: str, basis: str, lengths: Sequence[int], header: int = 0) -> float:
    """Of p, gradients and activations of a batch of unequal prompts, against one backward pass a target in float64.

    Which experts were used has to be the same. The largest of |found - expected| / |expected|, norms over a prompt's
    neurons.
    """
    model, mixture = model_of(family), MIXTURES[family]
    model.ensure_checked()
    prompts = random_ids(lengths, False, header)
    draw = np.random.default_rng(1)
    targets = [draw.choice(VOCABULARY, 1 + (i + 2) % 3, replace=False).tolist() for i in range(len(prompts))]
    encoded = [
        EncodedPrompt(Prompt(str(i), "-", tuple(map(str, own))), ids, tuple(own))
        for i, (ids, own) in enumerate(zip(prompts, targets, strict=True))
    ]
    layers = list(range(model.feed_forward.n_layers))
    found = dict(gradients(model, encoded, [range(len(own)) for own in targets], basis, layers, Budget(2**28)))
    worst = 0.0
    for i, (ids, own) in enumerate(zip(prompts, targets, strict=True)):
        p, slopes, activations = mixtures_oracle.gradients(float64_of(family), mixture, ids, own, basis)
        own_slopes = by_key(found[i].slots, found[i].gradient_km)
        own_activations = by_key(found[i].slots, found[i].activation_m)
        assert set(own_slopes) == set(slopes), (own_slopes.keys(), slopes.keys())
        pairs = [(found[i].probability_k, p), (_joined(own_activations), _joined(activations))]
        pairs += list(zip(_joined(own_slopes), _joined(slopes), strict=True))
        worst = max(worst, *(relative(*pair) for pair in pairs))
        chosen = mixtures_oracle.routing()
        for layer, expert, weight in zip(*_columns(found[i].routing), strict=True):
            order = np.argsort(chosen[layer][0])
            # Without identities.
            order = order[np.sort(chosen[layer][0]) < model.feed_forward.layer_neurons[layer].n_experts]
            assert expert.tolist() == np.array(chosen[layer][0])[order].tolist()
            worst = max(worst, relative(weight, np.array(chosen[layer][1])[order]))
    return worst


def sweep_deviation(family: str, basis: str, length: int = 9) -> float:
    """Of Δp of single interventions, against a full forward pass each, all in float64, relative to a neuron's curve.

    A neuron of each kind in each layer, of the last expert and of what is always on; whether layers above chose other
    experts has to be seen.
    """
    model, mixture = model_of(family), MIXTURES[family]
    model.ensure_checked()
    ids = random_ids([length], False)[0]
    text = " ".join(f"w{i}" for i in ids)
    _, _, activations = mixtures_oracle.gradients(float64_of(family), mixture, ids, [7], basis)
    last = {(layer, expert >= 0): (layer, expert) for layer, expert in sorted(activations)}
    swept = [(key, len(activations[key]) - 1) for key in last.values()]
    if " " in mixture.always_on:
        # Those are of the last MLP of a layer.
        swept += [(key, 0) for key in last.values() if key[1] == ALWAYS_ON]
    worst = 0.0
    # Truly float64, for the engine and for the oracle: many architectures cast to float32 on their own.
    with in_precision(model.model, model.feed_forward.layers, torch.float64):
        model.forget_prefixes()
        asked = [(layer, neuron, expert) for (layer, expert), neuron in swept]
        found = neg_service.neg(model, text, " w7", asked, SHIFTS, basis)
        plain, chosen = mixtures_oracle.shifted(model.model, mixture, ids, basis, (-1, -1), 0, 0.0)
        assert found.is_routed.all()
        for i, (key, neuron) in enumerate(swept):
            sign = -1 if activations[key][neuron] < 0 else 1
            after = [
                mixtures_oracle.shifted(model.model, mixture, ids, basis, key, neuron, sign * shift) for shift in SHIFTS
            ]
            expected = np.array([float(p[7] - plain[7]) for p, _ in after])
            worst = max(worst, relative(found.delta_p[i], expected))
            assert found.routing_changed[i] == np.mean([own != chosen for _, own in after])
    return worst


def joint_deviation(family: str, basis: str, lengths: Sequence[int] = (6, 3)) -> float:
    """Of probabilities with several neurons edited at once, against full forward passes, all in float64.

    The neurons are those that the first prompt uses; the second may not use all, also because of what is edited below.
    """
    model, mixture = model_of(family), MIXTURES[family]
    model.ensure_checked()
    prompts = random_ids(lengths, False)
    reference = float64_of(family)
    _, _, activations = mixtures_oracle.gradients(reference, mixture, prompts[0], [7], basis)
    edited = [(key, neuron) for key, values in activations.items() for neuron in (0, len(values) - 1)]
    triples = [(layer, neuron, expert) for (layer, expert), neuron in edited]
    edits: list[dict[str, Any]] = [
        {"name": "shift", "neurons": triples, "shift": 0.4},
        {"name": "off", "neurons": triples[1:], "scale": 0},
        {"name": "set", "neurons": triples, "set": 0.8},
    ]
    copied = LanguageModel(reference, model.tokenizer)
    copied.adopt(model.ensure_checked())
    texts = [" ".join(f"w{i}" for i in ids) for ids in prompts]
    found = neg_service.intervene(copied, texts, [[" w7", " w8"]] * len(texts), edits, basis=basis)
    worst = 0.0
    for p, ids in enumerate(prompts):
        _, _, before = mixtures_oracle.gradients(reference, mixture, ids, [7], basis)
        for e, edit in enumerate(edits):
            after, n_routed = _edited(reference, family, ids, basis, edit, before)
            worst = max(worst, relative(found.probability[p, e], after[[7, 8]].numpy()))
            assert found.n_routed[p, e] == n_routed
    return worst


def _edited(
    model: Any, family: str, ids: Sequence[int], basis: str, edit: dict[str, Any], before: dict[Key, np.ndarray]
) -> tuple[torch.Tensor, int]:
    """Probabilities with an edit, and how many of its neurons were there; `before`: activations without it."""
    routed: set[tuple[Key, int]] = set()

    def touch(key: Key, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for layer, neuron, expert in edit["neurons"]:
            if (layer, expert) == key:
                routed.add((key, neuron))
                was = before[key][neuron] if key in before else 0.0
                if "scale" in edit:
                    x[neuron] *= edit["scale"]
                elif "set" in edit:
                    x[neuron] = edit["set"]
                else:
                    x[neuron] += edit["shift"] * (-1 if was < 0 else 1)
        return x

    with torch.no_grad():
        p = mixtures_oracle.probabilities(model, MIXTURES[family], ids, basis, touch)
    return p, len(routed)


def _joined(values: dict[Key, np.ndarray]) -> np.ndarray:
    return np.concatenate([values[key] for key in sorted(values)], -1)


def _columns(routing: Any) -> tuple[Any, Any, Any]:
    return routing.layer, routing.expert, routing.weight

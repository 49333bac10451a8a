"""Targets of several tokens against plain passes over prompt and target, in float64: every engine that can run them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from neg_service import LanguageModel
from neg_service.measures.gradients import gradients
from neg_service.measures.interventions import Interventions
from neg_service.models.batches import Budget
from neg_service.models.precision import in_precision
from tests import sequences
from tests.families import in_model, layers_with_mlps
from tests.oracle import relative
from tests.sequences import TARGETS, encoded
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


@pytest.mark.parametrize("family", FAMILIES)
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

"""Targets of several tokens against plain passes over prompt and target, in float64: every engine that can run them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from neg_service import LanguageModel
from neg_service.measures.gradients import gradients
from neg_service.models.batches import Budget
from tests import sequences
from tests.families import layers_with_mlps
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

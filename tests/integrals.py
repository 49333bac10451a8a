"""Prompts of unequal lengths and their integrated gradients, measured without a cluster, for tests."""

from __future__ import annotations

import numpy as np

from neg_service import LanguageModel
from neg_service.measures.integrated_gradients import PromptIntegrals, integrals
from neg_service.models.batches import Budget
from neg_service.prompts.prompt import EncodedPrompt
from tests.encodings import encoded
from tests.families import random_ids

# Two of as many may run together.
TARGETS = [[7, 8, 11], [1, 4, 9], [2, 3]]


def random_prompts(is_masked: bool, header: int = 4) -> list[EncodedPrompt]:
    found = random_ids([9, 1, 4], is_masked, header)
    return [encoded(ids, own, f"p{i}") for i, (ids, own) in enumerate(zip(found, TARGETS, strict=True))]


def measured(
    model: LanguageModel, prompts: list[EncodedPrompt], basis: str, m: int, n_bytes: float = 2**28
) -> list[PromptIntegrals]:
    layers = list(range(model.feed_forward.n_layers))
    wanted = [range(len(prompt.target_ids)) for prompt in prompts]
    found = dict(integrals(model, prompts, wanted, basis, layers, m, Budget(n_bytes)))
    assert sorted(found) == list(range(len(prompts)))
    return [found[i] for i in range(len(prompts))]


def integral_kln(found: PromptIntegrals) -> np.ndarray:
    """By layer, all of which have the same number of neurons here."""
    return found.integral_km.reshape(len(found.targets), len(found.slots.size), -1)

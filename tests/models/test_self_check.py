"""What a self-check costs, which each replica pays before its first shard; what it finds: `test_language_model.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from jobs.benchmarks.tiny_models import tiny_model
from torch import Tensor

from neg_service.errors import ModelError
from neg_service.models import self_check


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of the prompt of each pass of the plain model."""
    found: list[int] = []
    real = self_check._plain_logits

    def counted(model: Any, ids: Sequence[int]) -> Tensor:
        found.append(len(ids))
        return real(model, ids)

    monkeypatch.setattr(self_check, "_plain_logits", counted)
    return found


def test_nothing_is_run_twice(passes: list[int]) -> None:
    tiny_model("Llama 2").ensure_checked()
    # At first; the two prompts of rows; of neurons, also at readout; the poke's target, and three layers up and down.
    assert len(passes) == 1 + 2 + 2 + 1 + 2 * 3
    passes.clear()
    model = tiny_model("Mistral")
    model.model.config.sliding_window = 4096
    model.ensure_checked()
    # Those of rows once more, with a short window.
    assert len(passes) == 1 + 2 * 2 + 2 + 1 + 2 * 3


def test_a_poke_that_does_not_agree_is_tried_in_all_steps(monkeypatch: pytest.MonkeyPatch, passes: list[int]) -> None:
    real = self_check.target_gradients

    def twice_as_steep(*arguments: Any) -> Any:
        found = real(*arguments)
        for gradient in found.gradient_lrn:
            gradient.mul_(2)
        return found

    monkeypatch.setattr(self_check, "target_gradients", twice_as_steep)
    with pytest.raises(ModelError, match="a small shift of a neuron moves the output"):
        tiny_model("Llama 2", torch.float64).ensure_checked()
    # Of each of the two engines: 5 steps up and down in 3 layers.
    assert len(passes) >= 2 * 3 * 5 * 2

"""Integrated gradients of prompts that run together, and what becomes of batches when memory ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neg_service.errors import OutOfMemory
from neg_service.measures.rows_together import RowsTogether
from tests.families import model_of
from tests.integrals import integral_kln, measured, random_prompts
from tests.oracle import relative
from tests.refusals import refused
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("family", ["Llama 2", "GPT-J", "BERT"])
def test_the_batch_size_does_not_change_results(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes, together = model_of(family), [], []
    real = RowsTogether.run_from

    def counted(self: Any, layer: int, n_rows: int, change: Any) -> Any:
        sizes.append(n_rows)
        together.append(len(self.members))
        return real(self, layer, n_rows, change)

    monkeypatch.setattr(RowsTogether, "run_from", counted)
    prompts = random_prompts(model.is_masked)
    whole = measured(model, prompts, "paper", 7)
    assert set(sizes) == {7}
    # Two prompts in one pass, where an engine has rows of one token.
    assert set(together) == ({1, 2} if family == "Llama 2" else {1})
    row = model.engine.row_sizes(13)
    # Nothing at all, and three points with the ways back of three targets.
    for n_bytes in (1, 3 * (row.graph + 3 * row.slope)):
        sizes.clear()
        together.clear()
        for one, other in zip(whole, measured(model, prompts, "paper", 7, n_bytes), strict=True):
            assert relative(integral_kln(other), integral_kln(one)) < 1e-5
        assert set(together) == {1}
        assert (set(sizes) == {1}) if n_bytes == 1 else (1 < min(sizes) < 7)


def test_memory_that_ends_shrinks_the_batches_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model("Llama 2"), random_prompts(False)
    whole = measured(model, prompts, "paper", 20)
    real, sizes = RowsTogether.run_from, []

    def small_memory(self: Any, layer: int, n_rows: int, change: Any) -> Any:
        sizes.append(n_rows)
        if n_rows > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, layer, n_rows, change)

    monkeypatch.setattr(RowsTogether, "run_from", small_memory)
    for one, other in zip(whole, measured(model, prompts, "paper", 20), strict=True):
        assert relative(integral_kln(other), integral_kln(one)) < 1e-5
    # Halved once at the first layer, and remembered; two batches of ten do not fit, four of five do.
    assert sizes[:6] == [20, 10, 5, 5, 5, 5]
    assert max(sizes[2:12]) == 5

    def no_memory(self: Any, layer: int, n_rows: int, change: Any) -> Any:
        raise MemoryError("no memory")

    monkeypatch.setattr(RowsTogether, "run_from", no_memory)
    with refused(OutOfMemory, setting=None, says="prompt 'p.' .* one scaled point of layer 0 does not fit"):
        measured(model, prompts, "paper", 20)


def test_when_several_prompts_do_not_fit_fewer_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model("Llama 2"), random_prompts(False)
    whole = measured(model, prompts, "paper", 4)
    real, together = RowsTogether.run_from, []

    def small_memory(self: Any, layer: int, n_rows: int, change: Any) -> Any:
        together.append(len(self.members))
        if together[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, layer, n_rows, change)

    monkeypatch.setattr(RowsTogether, "run_from", small_memory)
    for one, other in zip(whole, measured(model, prompts, "paper", 4), strict=True):
        assert relative(integral_kln(other), integral_kln(one)) < 1e-5
    # Down to one point each, then fewer prompts.
    assert together[:3] == [2, 2, 2]
    assert set(together[3:]) == {1}

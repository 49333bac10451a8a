"""What is left of a batch when it is done, and when it did not fit: neither keeps more than it should."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from neg_service.errors import DoesNotFit
from neg_service.measures.batching import in_batches, in_parts
from neg_service.measures.gradients import gradients
from neg_service.measures.integrated_gradients import integrals
from neg_service.models.batches import Budget
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from tests.families import random_ids
from tests.tiny_models import tiny_model

N_PROMPTS = 8


def prompts_of(is_masked: bool = False, n: int = N_PROMPTS) -> list[EncodedPrompt]:
    return [
        EncodedPrompt(Prompt(str(i), "-", (" w7", " w8"), 1), ids, (7, 8))
        for i, ids in enumerate(random_ids([5] * n, is_masked))
    ]


def held(array: Any) -> int:
    """Bytes of the memory that an array keeps alive, its own and what it is a view of."""
    if isinstance(array, torch.Tensor):
        return array.untyped_storage().nbytes()
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return held(array) if isinstance(array, torch.Tensor) else int(getattr(array, "nbytes", 0))


@pytest.mark.parametrize("family", ["Llama 2", "Phi-3 and 4", "BERT", "GPT-J"])
@pytest.mark.parametrize("basis", ["paper", "hidden"])
@pytest.mark.parametrize("measure", ["gradients", "integrals"])
def test_what_is_kept_of_a_prompt_keeps_nothing_of_its_batch(family: str, basis: str, measure: str) -> None:
    model = tiny_model(family)
    prompts, wanted = prompts_of(model.is_masked), [(0, 1)] * N_PROMPTS
    if measure == "gradients":
        found = dict(gradients(model, prompts, wanted, basis, [0, 1, 2], Budget(2**28)))
    else:
        found = dict(integrals(model, prompts, wanted, basis, [0, 1, 2], 2, Budget(2**28)))
    for result in found.values():
        for name, array in vars(result).items():
            if isinstance(array, np.ndarray):
                assert held(array) <= array.nbytes, name


_ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")]


def failing(most: int, alive: list[weakref.ref[Any]], error: Exception) -> Callable[[int], int]:
    """A batch that makes a tensor and fails when it is too large, and looks whether those before it are gone."""

    def run(size: int) -> int:
        assert [ref() for ref in alive] == [None] * len(alive)
        tensor = torch.zeros(size)
        alive.append(weakref.ref(tensor))
        if size > most:
            raise type(error)(*error.args)
        return size

    return run


@pytest.mark.parametrize("error", _ERRORS, ids=str)
def test_a_batch_that_failed_is_gone_before_the_next_is_tried(error: Exception) -> None:
    model, alive, budget = tiny_model("Llama 2"), [], Budget(2**28)
    model.ensure_checked()
    run = failing(2, alive, error)
    prompts = prompts_of()
    found = in_batches(model, prompts, [1] * N_PROMPTS, lambda part, _: [run(len(part))] * len(part), budget)
    assert [size for _, size in found] == [2] * N_PROMPTS
    assert budget.tokens == 1024
    alive.clear()
    assert sum(in_parts(8, lambda part: run(part.stop - part.start), Budget(2**28))) == 8
    alive.clear()
    none = failing(0, alive, error)
    with pytest.raises(DoesNotFit) as caught:
        list(in_batches(model, prompts[:1], [1], lambda part, _: [none(len(part))], budget))
    # Also while the error that names the prompt is kept.
    assert caught.value.__cause__ is not None
    assert [ref() for ref in alive] == [None]


def test_a_budget_recovers_when_what_took_the_memory_is_gone() -> None:
    model, budget, is_full, sizes = tiny_model("Llama 2"), Budget(4 * 21), True, []
    model.ensure_checked()

    def run(part: Sequence[int], _header: tuple[int, ...]) -> list[int]:
        sizes.append(len(part))
        if is_full and len(part) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [0] * len(part)

    prompts = prompts_of(n=64)
    list(in_batches(model, prompts[:8], [1] * 8, run, budget))
    assert budget.tokens == 21
    is_full = False
    sizes.clear()
    list(in_batches(model, prompts, [1] * 64, run, budget))
    assert (sizes[0], max(sizes), budget.tokens) == (1, 4, 84)


def test_under_a_real_limit_batches_shrink_and_recover_with_every_allocator() -> None:
    program = """
        import resource, sys
        import numpy as np, psutil, pyarrow as pa, torch
        from tests.tiny_models import tiny_model
        from neg_service.measures.batching import in_batches
        from neg_service.models.batches import Budget
        from tests.measures.test_batching import prompts_of

        MIB = 2**20
        model, prompts = tiny_model("Llama 2"), prompts_of()
        model.ensure_checked()
        for allocate in (
            lambda n: torch.ones(n * 64 * MIB, dtype=torch.uint8),
            lambda n: np.ones(n * 64 * MIB, dtype=np.uint8),
            lambda n: bytearray(n * 64 * MIB),
            lambda n: pa.allocate_buffer(n * 64 * MIB, memory_pool=pa.system_memory_pool()),
        ):
            sizes = []

            def run(part, header):
                held = allocate(len(part))
                sizes.append(len(part))
                return [len(held) if not isinstance(held, pa.Buffer) else held.size] * len(part)

            budget = Budget(2**28)
            now = psutil.Process().memory_info().vms
            resource.setrlimit(resource.RLIMIT_AS, (now + 200 * MIB, resource.RLIM_INFINITY))
            found = list(in_batches(model, prompts, [1] * 8, run, budget))
            assert sorted(i for i, _ in found) == list(range(8)) and max(sizes) <= 3, sizes
            assert budget.tokens < 4096
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            for _ in range(40):
                list(in_batches(model, prompts, [1] * 8, lambda part, header: [0] * len(part), budget))
            assert budget.tokens == 4096
        print("all recovered")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == "all recovered", done.stderr[-2000:]

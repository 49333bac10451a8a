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

import neg_service
from neg_service.errors import ConfigurationError, DoesNotFit
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
    # Eight were halved twice.
    assert budget.bytes == 2 * model.engine.cost(5, 0, 1)
    alive.clear()
    rows = Budget(900)
    found_parts = list(in_parts([100] * 8, lambda part: run(len(part)), rows, 50))
    assert [(part.start, part.stop, size) for part, size in found_parts] == [(i, i + 2, 2) for i in range(0, 8, 2)]
    assert rows.bytes == 250
    alive.clear()
    none = failing(0, alive, error)
    with pytest.raises(DoesNotFit) as caught:
        list(in_batches(model, prompts[:1], [1], lambda part, _: [none(len(part))], budget))
    # Also while the error that names the prompt is kept.
    assert caught.value.__cause__ is not None
    assert [ref() for ref in alive] == [None]


def test_a_budget_recovers_when_what_took_the_memory_is_gone() -> None:
    model, is_full, sizes = tiny_model("Llama 2"), True, []
    one = model.engine.cost(5, 0, 1)
    budget = Budget(4 * one)

    def run(part: Sequence[int], _header: tuple[int, ...]) -> list[int]:
        sizes.append(len(part))
        if is_full and len(part) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [0] * len(part)

    prompts = prompts_of(n=64)
    list(in_batches(model, prompts[:8], [1] * 8, run, budget))
    assert budget.bytes == one
    is_full = False
    sizes.clear()
    list(in_batches(model, prompts, [1] * 64, run, budget))
    assert (sizes[0], max(sizes), budget.bytes) == (1, 4, 4 * one)


@pytest.mark.faults
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
            assert budget.bytes < 2**28
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            for _ in range(1000):
                list(in_batches(model, prompts, [1] * 8, lambda part, header: [0] * len(part), budget))
                if budget.bytes == 2**28:
                    break
            assert budget.bytes == 2**28
        print("all recovered")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == "all recovered", done.stderr[-2000:]


@pytest.mark.parametrize("family", ["Llama 2", "GPT-J", "BERT"])
@pytest.mark.parametrize("measure", ["neurgrad", "integrated_gradients", "intervene"])
def test_the_old_name_of_the_librarys_parameter_is_told_and_changes_nothing(family: str, measure: str) -> None:
    model = tiny_model(family, torch.float64)
    text = "w3 w96" if model.is_masked else "w3 w4"
    others = [[{"neurons": [(1, 2)], "shift": 1.0}]] if measure == "intervene" else []
    steps = {"m": 3} if measure == "integrated_gradients" else {}

    def run(**given: int) -> Any:
        found = getattr(neg_service, measure)(model, [text, text], [[" w7", " w8"]] * 2, *others, **steps, **given)
        return getattr(found, "delta_p" if measure == "intervene" else measure)

    whole = run()
    np.testing.assert_allclose(run(batch_bytes=1), whole, rtol=1e-6)
    row = model.engine.row_sizes(1)
    in_bytes = 2 * (row.graph + row.slopes)
    with pytest.warns(FutureWarning, match=rf"^batch_tokens=32 is .* batch_bytes={in_bytes}$") as told:
        old = run(batch_tokens=32)
    # It points to the caller's line.
    assert told[0].filename == __file__
    np.testing.assert_allclose(old, whole, rtol=1e-6)
    with pytest.raises(ConfigurationError, match=r"^batch_tokens=32: is the old name of batch_bytes, which is given"):
        run(batch_tokens=32, batch_bytes=10**6)
    with pytest.raises(ConfigurationError, match=r"^batch_tokens=0: must be at least 1"):
        run(batch_tokens=0)

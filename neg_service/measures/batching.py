"""Running prompts together: in groups with a shared beginning, in batches that fit, halved when memory ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from neg_service.errors import DoesNotFit
from neg_service.memory import is_out_of_memory
from neg_service.models.batches import Budget, RowBudget, fill_batches, return_cached_memory, without_frames
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt

T = TypeVar("T")

# A prefix kept of earlier prompts serves unless it leaves more than this many shared tokens unshared.
PREFIX_SLACK = 16
# So many prompts are planned together; planning costs the square of it.
PLANNED_TOGETHER = 256


def default_batch_tokens(model: LanguageModel) -> int:
    """A batch that keeps the processor busy: more does not make it faster, and costs memory."""
    return 2048 if model.device.type == "cpu" else 16384


def in_batches(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    counts: Sequence[int],
    run: Callable[[Sequence[int], tuple[int, ...]], list[T]],
    budget: Budget,
) -> Iterator[tuple[int, T]]:
    """Run prompts in whatever order is cheapest; yields (index, result), each index once.

    `counts[i]` rows are run of prompt i; `run(indices, shared)` runs some prompts that all begin with the tokens
    `shared`, and gives their results in order.

    Raises:
        DoesNotFit: a prompt does not fit even alone.
    """
    engine = model.engine
    for start in range(0, len(prompts), PLANNED_TOGETHER):
        block = range(len(prompts))[start : start + PLANNED_TOGETHER]
        for group in engine.groups([prompts[i].ids for i in block]):
            members = [block[i] for i in group.members]
            first = prompts[members[0]].ids
            kept = engine.prefixes.longest([prompts[i].ids for i in members])
            shared = kept if kept and kept >= group.shared - PREFIX_SLACK else group.shared
            costs = [engine.cost(len(prompts[i].ids), shared) for i in members]
            once = [tokens for tokens, _ in costs]
            rows = [counts[i] * tokens for i, (_, tokens) in zip(members, costs, strict=True)]
            for batch in fill_batches(once, rows, budget):
                yield from _halving(model, prompts, counts, run, first[:shared], [members[i] for i in batch], budget)


def _halving(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    counts: Sequence[int],
    run: Callable[[Sequence[int], tuple[int, ...]], list[T]],
    shared: tuple[int, ...],
    indices: list[int],
    budget: Budget,
) -> Iterator[tuple[int, T]]:
    """Run a batch; when memory ends, halve the budget for all that follows and run the batch in two halves."""
    waiting, whole = [indices], budget.tokens
    while waiting:
        part = waiting.pop()
        try:
            results = run(part, shared)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                prompt = prompts[part[0]]
                raise DoesNotFit(
                    f"{named(prompt, model)}: its {counts[part[0]]} rows do not fit into the memory of {model.device} "
                    f"even alone: use a larger device, or fewer targets or edits"
                ) from without_frames(error)
            # By the part of the batch that is tried next: when both halves fail, that is one halving, not two.
            budget.lower_to(whole * -(-len(part) // 2) / len(indices))
            waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
            results = None
        if results is None:
            # Out of the handler, where the failed batch's tensors are no longer held by the traceback.
            return_cached_memory()
            continue
        budget.has_fitted()
        yield from zip(part, results, strict=True)


def in_parts(n_rows: int, run: Callable[[slice], T], budget: RowBudget) -> list[T]:
    """Run rows of one prompt beside its baseline, in parts of even size; when memory ends, in parts half as large.

    Gives what `run` gave of each part, in order; how many rows may run together from now on is left in the budget. A
    row that does not fit even alone raises what the allocator says.
    """
    done: list[T] = []
    start = 0
    while start < n_rows:
        left = n_rows - start
        n_parts = -(-left // (budget.rows - 1))
        end = start + -(-left // n_parts)
        try:
            done.append(run(slice(start, end)))
            start = end
            budget.has_fitted()
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or end - start == 1:
                raise
        # Out of the handler, where the failed part's tensors are no longer held by the traceback.
        budget.lower(1 + (end - start) // 2)
        return_cached_memory()
    return done


def named(prompt: EncodedPrompt, model: LanguageModel) -> str:
    """A prompt as messages name it, with what its errors mostly depend on."""
    return f"prompt {prompt.prompt.id!r} ({len(prompt.ids)} tokens) in {str(model.dtype).removeprefix('torch.')}"

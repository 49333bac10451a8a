"""Running prompts and rows in batches that fit: as many as a budget of bytes holds, fewer when memory ends.

One loop, `in_parts`, halves and recovers. Prompts go through it in groups with a shared beginning: rows of many
(`in_batches`), or prompts that are prepared together and then run in batches of their own (`in_joint_parts`), whose
rows go through it once more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TypeVar

import torch

from neg_service.errors import ConfigurationError, DoesNotFit
from neg_service.memory import OLD_TOKENS, is_out_of_memory
from neg_service.models.batches import Budget, end_of_part, return_cached_memory, without_frames
from neg_service.models.engines.base import Engine
from neg_service.models.engines.trees import target_chain, target_tree
from neg_service.models.language_model import LanguageModel
from neg_service.models.room import auto_batch_bytes
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.prompts.tokens import encode

T = TypeVar("T")

# A prefix kept of earlier prompts serves unless it leaves more than this many shared tokens unshared.
PREFIX_SLACK = 16
# By this factor lengths of prompts may differ that run together, beside a few tokens.
_LENGTHS = 1.5
# So many prompts are planned together; planning costs the square of it.
PLANNED_TOGETHER = 256


def budget_of(model: LanguageModel, batch_bytes: int | None = None, batch_tokens: int | None = None) -> Budget:
    """The budget of a call of the library; without a number, what keeps the device busy and fits it.

    `batch_tokens` is the old name, of the old unit: a token with a graph counted as 16.

    Raises:
        ConfigurationError: a number below 1, or both.
    """
    for name, value in (("batch_bytes", batch_bytes), ("batch_tokens", batch_tokens)):
        if value is not None and value < 1:
            raise ConfigurationError(setting=name, value=value, allowed="at least 1")
    if batch_tokens is None:
        return Budget(auto_batch_bytes(model) if batch_bytes is None else batch_bytes)
    if batch_bytes is not None:
        raise ConfigurationError(
            "is the old name of batch_bytes, which is given, too: leave it out", setting="batch_tokens",
            value=batch_tokens,
        )  # fmt: skip
    translated = bytes_of_tokens(model, batch_tokens)
    warnings.warn(
        f"batch_tokens={batch_tokens} is called batch_bytes by now, and is in bytes: batch_bytes={translated}",
        FutureWarning,
        # The caller of a function of the library, which `told_by_parameters` wraps.
        stacklevel=4,
    )
    return Budget(translated)


def bytes_of_tokens(model: LanguageModel, tokens: int) -> int:
    """What `batch_tokens`, the old setting, is in bytes."""
    row = model.engine.row_sizes(1)
    return max(1, tokens * (row.graph + row.slopes) // OLD_TOKENS)


def in_parts(
    costs: Sequence[int], run: Callable[[range], T], budget: Budget, beside: int = 0
) -> Iterator[tuple[range, T]]:
    """Run items in their order, as many together as fit, in parts of about the same size; yields (part, result).

    costs: what each item takes, in bytes. beside: what each part takes besides. When memory ends in a part, the budget
    is lowered to half of it, for all that follows. An item that does not fit even alone raises what the allocator says.
    """
    sums = [0, *accumulate(costs)]
    start = 0
    while start < len(costs):
        part = range(start, end_of_part(sums, start, max(0, budget.bytes - beside)))
        try:
            result = run(part)
        except (MemoryError, RuntimeError) as error:
            if len(part) == 1 or not is_out_of_memory(error):
                raise
        else:
            budget.has_fitted()
            start = part.stop
            yield part, result
            # Not to be held while the next part runs.
            del result
            continue
        # Out of the handler, where the failed part's tensors are no longer held by the traceback.
        budget.lower_to(beside + sums[start + len(part) // 2] - sums[start])
        return_cached_memory()


def in_batches(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    counts: Sequence[int],
    run: Callable[[Sequence[int], tuple[int, ...]], list[T]],
    budget: Budget,
    differentiated: Sequence[int] | None = None,
) -> Iterator[tuple[int, T]]:
    """Run prompts in whatever order is cheapest; yields (index, result), each index once.

    `counts[i]` rows are run of prompt i, `differentiated[i]` targets are differentiated, if any; `run(indices, shared)`
    runs some prompts that all begin with the tokens `shared`, and gives their results in order. A batch holds prompts
    of similar length, because the attention product (and it alone) is padded to the longest.

    Raises:
        DoesNotFit: a prompt does not fit even alone.
    """
    targets = differentiated or [0] * len(prompts)
    for block in _planned_together(prompts):
        engine = engine_of(model, prompts[block[0]])
        for group in engine.groups([prompts[i].until_shifted for i in block]):
            members = sorted((block[i] for i in group.members), key=lambda i: (len(prompts[i].ids), i))
            kept = engine.prefixes.longest([prompts[i].until_shifted for i in members])
            n_shared = kept if kept and kept >= group.shared - PREFIX_SLACK else group.shared
            shared = prompts[members[0]].ids[:n_shared]
            costs = [_cost(engine, prompts[i], n_shared, counts[i], targets[i]) for i in members]

            def run_part(part: range, members: list[int] = members, shared: tuple[int, ...] = shared) -> list[T]:
                own = [members[i] for i in part]
                try:
                    return run(own, shared)
                except (MemoryError, RuntimeError) as error:
                    if len(own) > 1 or not is_out_of_memory(error):
                        raise
                    raise DoesNotFit(
                        f"{named(prompts[own[0]], model)}: its {counts[own[0]]} rows do not fit into the memory of "
                        f"{model.device} even alone: use a larger device, or fewer targets or edits"
                    ) from without_frames(error)

            for part, results in in_parts(costs, run_part, budget):
                yield from zip([members[i] for i in part], results, strict=True)
                del results


def in_joint_parts(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    kind_of: Callable[[int], int | None],
    cost_of: Callable[[int, int, int], int],
    run: Callable[[list[int], tuple[int, ...]], list[T]],
    budget: Budget,
    most: int,
) -> Iterator[tuple[int, T]]:
    """Run prompts by index, as many together as fit, others alone; yields (index, result), each index once.

    kind_of: prompts of one kind may run together, up to `most`; of None each runs alone. cost_of: what a prompt takes,
    in bytes, beside others of up to so many tokens, behind so many that all have. run: gives the results of some
    prompts in their order, which all begin with the tokens that it is given.

    Raises:
        DoesNotFit: a prompt does not fit even alone; what else `run` raises.
    """
    for group in model.groups([prompt.until_shifted for prompt in prompts]):
        shared = prompts[group.members[0]].ids[: group.shared]
        alone: list[int] = []
        kinds: dict[int, list[int]] = {}
        for index in group.members:
            kind = kind_of(index)
            (alone if kind is None else kinds.setdefault(kind, [])).append(index)
        for members in kinds.values():
            for block in _of_similar_length(prompts, members, len(shared), most):
                longest = len(prompts[block[-1]].ids)
                costs = [cost_of(index, longest, len(shared)) for index in block]

                def run_part(part: range, block: list[int] = block, shared: tuple[int, ...] = shared) -> list[T]:
                    own = block[part.start : part.stop]
                    try:
                        return run(own, shared)
                    except DoesNotFit as error:
                        if len(own) == 1:
                            raise
                        # What does not fit beside others may do so alone.
                        raise MemoryError(str(error)) from without_frames(error)

                for part, results in in_parts(costs, run_part, budget):
                    yield from zip([block[i] for i in part], results, strict=True)
        for index in alone:
            (result,) = run([index], shared)
            yield index, result


def _of_similar_length(
    prompts: Sequence[EncodedPrompt], members: Sequence[int], n_shared: int, most: int
) -> Iterator[list[int]]:
    """Prompts whose own tokens differ by no more than a factor, for prefixes are padded to the longest."""
    block: list[int] = []
    for index in sorted(members, key=lambda i: (len(prompts[i].ids), i)):
        own, shortest = (len(prompts[i].ids) - n_shared for i in (index, block[0] if block else index))
        if block and (len(block) == most or own > _LENGTHS * shortest + PREFIX_SLACK):
            yield block
            block = []
        block.append(index)
    if block:
        yield block


def _planned_together(prompts: Sequence[EncodedPrompt]) -> Iterator[list[int]]:
    """Blocks of prompts that one engine runs: those whose rows are one token, then those of several."""
    for is_tree in (False, True):
        own = [i for i, prompt in enumerate(prompts) if prompt.is_tree == is_tree]
        for start in range(0, len(own), PLANNED_TOGETHER):
            yield own[start : start + PLANNED_TOGETHER]


def encoded_prompts(model: LanguageModel, prompts: Sequence[Prompt], not_one_token: str) -> list[EncodedPrompt]:
    """Prompts of a call of the library as tokens; `not_one_token` says what targets of several tokens are.

    Raises:
        PromptError: see `encode`. ConfigurationError: neither `error` nor `sequence`, or sequences of a masked model.
    """
    if not_one_token not in ("error", "sequence"):
        raise ConfigurationError(setting="not_one_token", value=not_one_token, allowed="error or sequence")
    if not_one_token == "sequence" and model.is_masked:
        # Leaving targets out is for data sets.
        raise ConfigurationError(
            "a masked model predicts one token in the place of its mask", setting="not_one_token", value="sequence",
            allowed="error",
        )  # fmt: skip
    return list(
        encode(
            model.tokenizer, prompts, model.context_length, model.mask_token, model=model,
            sequences=not_one_token == "sequence",
        )
    )  # fmt: skip


def engine_of(model: LanguageModel, prompt: EncodedPrompt) -> Engine:
    """The engine that runs a prompt's rows, which may be another one where a target is several tokens.

    Raises:
        ModelError: none can; see `LanguageModel.ensure_checked_for_trees`.
    """
    return model.ensure_checked_for_trees().engine if prompt.is_tree else model.engine


def _cost(engine: Engine, prompt: EncodedPrompt, n_shared: int, n_rows: int, n_targets: int) -> int:
    """What a prompt takes of a batch's memory; of rows of several tokens, as `Engine.cost` has it of one."""
    if not prompt.is_tree:
        return engine.cost(len(prompt.ids), n_shared, n_rows, n_targets)
    n, shifted, behind = len(prompt.ids), prompt.until_shifted[-1], prompt.behind_shifted
    frozen = engine.model.frozen_bytes(n - n_shared, n) if engine.shares_prefixes else 0
    if not n_targets:
        return frozen + n_rows * engine.tree_sizes(n, target_tree(shifted, prompt.target_tokens, behind).row).run
    longest = target_chain(shifted, max(prompt.target_tokens, key=len), behind)
    sizes = engine.tree_sizes(n, longest)
    return frozen + n_rows * sizes.graph + n_targets * sizes.slopes


def named(prompt: EncodedPrompt, model: LanguageModel) -> str:
    """A prompt as messages name it, with what its errors mostly depend on."""
    return f"prompt {prompt.prompt.id!r} ({len(prompt.ids)} tokens) in {str(model.dtype).removeprefix('torch.')}"


@contextmanager
def naming_memory(who: str, device: torch.device, what: str, advice: str) -> Iterator[None]:
    """Let an error that says that memory ended name the prompt, and what does not fit (`its tokens do not fit`).

    Raises:
        DoesNotFit: in the place of that error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(f"{who}: {what} into the memory of {device}: {advice}") from without_frames(error)

"""Which prompts run together: shared headers found, batches filled, and a budget that halves when memory ends.

Pure planning on token ids; nothing here touches a model. Batches never change what is measured, only its cost:
prompts with long common beginnings share a header, and a batch holds prompts of similar length, because the
attention product (and it alone) is padded to the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

# A branch keeps a graph through every layer, a prefix token only keys and values: about this many times the memory.
BRANCH_COST = 16
# A pass reads all weights whatever it carries: about so many tokens' time. A group costs one, a header another.
PASS_COST = 64


@dataclass
class Budget:
    """How much a batch may hold, in prefix tokens; a branch counts as `BRANCH_COST` of them.

    `scale` is what is left of any other budget after batches did not fit.
    """

    tokens: int
    scale: float = 1.0

    def halve(self) -> None:
        self.tokens = max(1, self.tokens // 2)
        self.scale /= 2


@dataclass
class RowBudget:
    """How many rows of one prompt a batch may hold, the unshifted one included: at least 2."""

    rows: int


@dataclass(frozen=True)
class Group:
    """Prompts, by index, whose first `header` tokens are the same and are worth running once."""

    members: tuple[int, ...]
    header: int


def group_by_header(prompts: Sequence[Sequence[int]]) -> list[Group]:
    """Split prompts into groups with a common header so that the fewest tokens run in all.

    Sorted, prompts with common beginnings stand together; of all cuttings of that order the cheapest is taken, by
    dynamic programming, O(P^2). A header leaves each prompt at least its last token.
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    lengths = [len(prompts[i]) for i in order]
    shared = [0, *(_common(prompts[a], prompts[b]) for a, b in pairwise(order))]
    # best[end]: least cost of the first `end` prompts, with the start and the header of their last group.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for end in range(1, len(order) + 1):
        common, own = 0, lengths[end - 1]
        options = [(best[end - 1][0] + PASS_COST + own, end - 1, 0)]
        for start in range(end - 2, -1, -1):
            own += lengths[start]
            common = shared[start + 1] if start == end - 2 else min(common, shared[start + 1])
            saved = common * (end - start - 1) - PASS_COST
            cost = best[start][0] + PASS_COST + own
            options.append((cost - saved, start, common) if saved > 0 else (cost, start, 0))
        best.append(min(options))
    groups = []
    end = len(order)
    while end:
        _, start, header = best[end]
        groups.append(Group(tuple(order[start:end]), header))
        end = start
    return groups[::-1]


def fill_batches(lengths: Sequence[int], branches: Sequence[int], budget: Budget) -> Iterator[tuple[int, ...]]:
    """Yield batches of indices, by length, each within the budget or a single prompt.

    The budget is read anew for each batch, so that halving it takes effect at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    start = 0
    while start < len(order):
        spent, end = 0, start
        while end < len(order):
            spent += lengths[order[end]] + BRANCH_COST * branches[order[end]]
            if spent > budget.tokens and end > start:
                break
            end += 1
        yield tuple(order[start:end])
        start = end


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ended."""
    # PyTorch has a class for it on accelerators; on the CPU the allocator raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with, leaving each its last one."""
    limit = min(len(a), len(b)) - 1
    return next((i for i in range(limit) if a[i] != b[i]), limit)

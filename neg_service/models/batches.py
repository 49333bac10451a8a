"""Which prompts run together: shared prefixes found, batches filled, and a budget that halves when memory ends.

Pure planning on token ids; nothing here touches a model. Batches never change what is measured, only its cost:
prompts with long common beginnings share a prefix, and a batch holds prompts of similar length, because the
attention product (and it alone) is padded to the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

# A row keeps a graph through every layer, a prefix token only keys and values: about this many times the memory.
ROW_COST = 16
# A pass reads all weights whatever it carries: about so many tokens' time. A group costs one, a shared prefix another.
PASS_COST = 64
# After so many batches that fitted a lowered limit doubles. A sweep has thousands of small ones.
PATIENCE, ROWS_PATIENCE, MOST_PATIENCE = 8, 64, 4096


@dataclass(frozen=True)
class Limit:
    """How much a batch may hold now, of what it may hold at most; lowered when memory ends, doubled after a while.

    What took the memory may be gone: other processes, or one long prompt. So after `patience` batches in a row that
    fitted the limit doubles. Where that turns out to be too much again, `backoff` doubles, by which the patience is
    multiplied: a size that does not fit is tried less and less often. When all is allowed again, and has been for as
    long as that, what has been is forgotten.
    """

    most: float
    now: float
    patience: int
    fitted: int = 0
    backoff: int = 1
    has_grown: bool = False

    def lowered(self, to: float) -> Limit:
        """After a batch that did not fit; the first one after a growth was the growth's fault."""
        backoff = self.backoff * 2 if self.has_grown and self.patience * self.backoff < MOST_PATIENCE else self.backoff
        return Limit(self.most, min(to, self.now), self.patience, backoff=backoff)

    def after_fitting(self) -> Limit:
        """After a batch that fitted."""
        unharmed = Limit(self.most, self.most, self.patience)
        if self == unharmed:
            return self
        if self.fitted + 1 < self.patience * self.backoff:
            return replace(self, fitted=self.fitted + 1)
        if self.now >= self.most:
            return unharmed
        return replace(self, now=min(self.most, 2 * self.now), fitted=0, has_grown=True)


class Budget:
    """How much a batch may hold, in prefix tokens; a token of a row counts as `ROW_COST` of them.

    `scale` is what is left of any other budget after batches did not fit.
    """

    def __init__(self, tokens: int, scale: float = 1.0) -> None:
        self._limit = Limit(tokens, tokens, PATIENCE)
        self._scale = scale

    @property
    def tokens(self) -> int:
        """At least one."""
        return max(1, int(self._limit.now))

    @property
    def scale(self) -> float:
        """Of the given one, as much as is left of the tokens."""
        return self._scale * self._limit.now / self._limit.most

    def halve(self) -> None:
        """After a batch that did not fit."""
        self.lower(0.5)

    def lower(self, factor: float) -> None:
        """The same, where it is known by how much."""
        self.lower_to(self._limit.now * factor)

    def lower_to(self, tokens: float) -> None:
        """The same, where it is known to what; what is lower already stays."""
        self._limit = self._limit.lowered(tokens)

    def has_fitted(self) -> None:
        """After a batch that fitted: what was lowered recovers in time."""
        self._limit = self._limit.after_fitting()


class RowBudget:
    """How many rows of one prompt a batch may hold, the unshifted one included: at least 2."""

    def __init__(self, rows: int) -> None:
        self._limit = Limit(rows, rows, ROWS_PATIENCE)

    @property
    def rows(self) -> int:
        """At least 2."""
        return max(2, int(self._limit.now))

    def lower(self, rows: int) -> None:
        """After a batch that did not fit."""
        self._limit = self._limit.lowered(rows)

    def has_fitted(self) -> None:
        """After a batch that fitted: what was lowered recovers in time."""
        self._limit = self._limit.after_fitting()


@dataclass(frozen=True)
class Group:
    """Prompts, by index, whose first `shared` tokens are the same and are worth running once."""

    members: tuple[int, ...]
    shared: int


def group_by_prefix(prompts: Sequence[Sequence[int]]) -> list[Group]:
    """Split prompts into groups with a common prefix so that the fewest tokens run in all.

    Sorted, prompts with common beginnings stand together; of all cuttings of that order the cheapest is taken, by
    dynamic programming, O(P^2). A shared prefix leaves each prompt at least its last token.
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    lengths = [len(prompts[i]) for i in order]
    common_to_next = [0, *(_common(prompts[a], prompts[b]) for a, b in pairwise(order))]
    # best[end]: least cost of the first `end` prompts, with the start and the shared tokens of their last group.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for end in range(1, len(order) + 1):
        common, own = 0, lengths[end - 1]
        options = [(best[end - 1][0] + PASS_COST + own, end - 1, 0)]
        for start in range(end - 2, -1, -1):
            own += lengths[start]
            following = common_to_next[start + 1]
            common = following if start == end - 2 else min(common, following)
            saved = common * (end - start - 1) - PASS_COST
            cost = best[start][0] + PASS_COST + own
            options.append((cost - saved, start, common) if saved > 0 else (cost, start, 0))
        best.append(min(options))
    groups = []
    end = len(order)
    while end:
        _, start, shared = best[end]
        groups.append(Group(tuple(order[start:end]), shared))
        end = start
    return groups[::-1]


def fill_batches(lengths: Sequence[int], row_tokens: Sequence[int], budget: Budget) -> Iterator[tuple[int, ...]]:
    """Yield batches of indices, by length, each within the budget or a single prompt.

    The budget is read anew for each batch, so that halving it takes effect at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    start = 0
    while start < len(order):
        spent, end = 0, start
        while end < len(order):
            spent += lengths[order[end]] + ROW_COST * row_tokens[order[end]]
            if spent > budget.tokens and end > start:
                break
            end += 1
        yield tuple(order[start:end])
        start = end


def return_cached_memory() -> None:
    """Give back to accelerators what their allocators keep, also for a batch that failed; on a CPU there is nothing."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    if torch.xpu.is_initialized():  # type: ignore[no-untyped-call]
        torch.xpu.empty_cache()


def without_frames(error: BaseException) -> BaseException:
    """An error, and those it came from, without the frames of their tracebacks, which hold a failed batch's tensors."""
    link: BaseException | None = error
    while link is not None and link.__traceback__ is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with, leaving each its last one."""
    limit = min(len(a), len(b)) - 1
    return next((i for i in range(limit) if a[i] != b[i]), limit)

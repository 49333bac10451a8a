"""Which prompts run together: shared prefixes found, parts filled, and a budget of bytes that halves when memory ends.

Pure planning on token ids and bytes; nothing here touches a model. Batches never change what is measured, only its
cost: prompts with long common beginnings share a prefix. What a prompt or a row takes says its engine.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

# A pass reads all weights whatever it carries: about so many tokens' time. A group costs one, a shared prefix another.
PASS_COST = 64
# After so many batches that fitted a lowered limit doubles.
PATIENCE, MOST_PATIENCE = 16, 4096


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
    """How many bytes of memory a batch may take: at most those given, fewer for a while after a batch did not fit.

    One of a replica, or of a call of the library, serves whatever runs there: what did not fit as gradients is not
    tried as interventions either.
    """

    def __init__(self, most: float) -> None:
        self._limit = Limit(most, most, PATIENCE)

    @property
    def bytes(self) -> int:
        """What a batch may take now, at least one byte; one that needs more even for a single row is run all the same.

        So that nothing is refused that would have fitted: what a row takes is an estimate, on the safe side.
        """
        return max(1, int(self._limit.now))

    def lower_to(self, n_bytes: float) -> None:
        """After a batch that did not fit; what is lower already stays."""
        self._limit = self._limit.lowered(n_bytes)

    def has_fitted(self) -> None:
        """After a batch that fitted: what was lowered recovers in time."""
        self._limit = self._limit.after_fitting()

    def scaled(self, scale: float) -> Budget:
        """One of its own with a part of what there is now."""
        return Budget(max(1, self._limit.now * scale))


def end_of_part(sums: Sequence[int], start: int, room: int) -> int:
    """Up to which item, of `sums[i]` bytes before item i, a part from `start` on goes: within the room, or one item.

    As few parts as can be, of about the same size.
    """
    left = sums[-1] - sums[start]
    even = -(-left // max(1, -(-left // max(1, room))))
    fitting = bisect_right(sums, sums[start] + room) - 1
    return max(start + 1, min(fitting, bisect_left(sums, sums[start] + even), len(sums) - 1))


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

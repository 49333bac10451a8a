"""How many replicas to have: a pure function of what there is capacity for, what is there, and what is left to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capacity:
    """What the cluster has for a run: a number of replicas that was asked for or, without one, `free` more of them.

    draining: ids of nodes that are about to go.
    """

    number: int | None
    free: int = 0
    draining: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Change:
    """How many replicas to launch, and how many of those to remove that have not started yet."""

    launch: int
    remove: int


def changes(capacity: Capacity, n_left: int | None, *, present: int, unplaced: int, starting: int) -> Change:
    """What is to change where `present` replicas stay, of which `unplaced` have no node and `starting` do not work yet.

    One replica at least, which then waits for capacity: an autoscaler sees it waiting. No more than the `n_left` shards
    that are left to do, where that is known; who works already is not removed for that.
    """
    # Those without a node yet will take what is free now.
    fitting = present + max(0, capacity.free - unplaced)
    wanted = max(1, fitting) if capacity.number is None else capacity.number
    if n_left is None:
        return Change(max(0, wanted - present), 0)
    return Change(max(0, min(wanted, n_left) - present), min(starting, max(0, present - n_left)))

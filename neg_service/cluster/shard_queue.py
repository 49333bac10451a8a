"""Which shard goes to which replica: plain data, no Ray.

Every replica has two shards in flight, so that it never waits for the driver and its storage never makes it wait. A
shard that has failed runs alone on its replica from then on, so that one that kills its replica takes no other down
with it a second time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from neg_service.cluster.failures import Attempt
from neg_service.cluster.messages import Shard
from neg_service.cluster.pool import ReplicaHandle

IN_FLIGHT = 2


class ShardQueue:
    """The shards that no replica has: fresh ones, made one at a time, those of lost nodes, and those that failed."""

    def __init__(self, shards: Iterator[Shard]) -> None:
        """The fresh ones, in order."""
        self._shards = shards
        self._fresh = self._draw()
        self._requeued: deque[Attempt] = deque()
        self._retries: deque[Attempt] = deque()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._fresh or self._requeued or self._retries)

    def put_back(self, attempt: Attempt) -> None:
        """A shard has to be done again."""
        (self._retries if attempt.is_retry else self._requeued).append(attempt)

    def assignments(self, replicas: Sequence[ReplicaHandle]) -> list[tuple[ReplicaHandle, Attempt]]:
        """The shards that these replicas are to be sent now; they are in the queue no more."""
        found: list[tuple[ReplicaHandle, Attempt]] = []
        reserved: set[int] = set()
        for attempt in list(self._retries):
            free = [one for one in replicas if one.number not in reserved and not one.runs_retry]
            if not free:
                break
            # A replica where it has not failed yet, and the one that is free soonest.
            replica = min(free, key=lambda one: (one.number in attempt.failures.on, len(one.in_flight)))
            reserved.add(replica.number)
            if not replica.in_flight:
                self._retries.remove(attempt)
                found.append((replica, attempt))
        for replica in replicas:
            n_more = IN_FLIGHT - len(replica.in_flight)
            if n_more <= 0 or replica.number in reserved or replica.runs_retry:
                continue
            for _ in range(n_more):
                next_one = self._take()
                if next_one is None:
                    return found
                found.append((replica, next_one))
        return found

    def _take(self) -> Attempt | None:
        if self._requeued:
            return self._requeued.popleft()
        taken, self._fresh = self._fresh, self._draw()
        return taken

    def _draw(self) -> Attempt | None:
        shard = next(self._shards, None)
        return None if shard is None else Attempt(shard)

"""Replicas of which nothing is heard: when to ask one what it is doing, and when to give it up.

A question goes out after half a minute without a shard: on a connection that is broken, which nobody notices while
nothing is sent, it makes the calls that wait on it fail at once. So it does where a replica loads its model or
calibrates the measure; these have a limit of their own, and what the answer says does not matter. For shards it matters
only after a silence that is long for those of this run.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from neg_service.cluster.pool import ReplicaHandle
from neg_service.errors import ReplicaLost

# Silence becomes suspicious after so many times the median of what a shard has taken, but not before this.
_STALL_FACTOR, _LEAST_STALL_SECONDS, _LEAST_SHARDS_KNOWN = 10, 120.0, 5
_ANSWER_SECONDS = 10.0
_PROBE_SECONDS = 30.0


class Silence:
    """Knows how long shards take, and so which silence is too long."""

    def __init__(self, stall_seconds: float | None) -> None:
        """`stall_seconds` is how long a replica may be silent; by default it follows from what shards have taken."""
        self._stall_seconds = stall_seconds
        self._seconds: deque[float] = deque(maxlen=200)

    def shard_ended(self, replica: ReplicaHandle, now: float) -> None:
        """A shard of it is done."""
        self._seconds.append(now - replica.progressed_at)
        replica.progressed_at, replica.probe = now, None

    def should_probe(self, replica: ReplicaHandle, now: float) -> bool:
        """Whether it is time for a question, which is asked again and again."""
        if replica.outage is not None or replica.probe is not None or not _is_busy(replica):
            return False
        calibrates_since = replica.calibrate_call.since if replica.calibrate_call else 0.0
        quiet_since = max(replica.placed_at or 0.0, calibrates_since, replica.progressed_at, replica.probe_answered_at)
        return now - quiet_since > min(_PROBE_SECONDS, self._longest_silence(replica))

    def answered(self, replica: ReplicaHandle, is_only_storing: bool, now: float) -> ReplicaLost | None:
        """What its answer means for it: nothing, or why it is given up."""
        replica.probe, replica.probe_answered_at = None, now
        if not replica.in_flight or now - replica.progressed_at <= self._longest_silence(replica):
            return None
        if is_only_storing:
            replica.progressed_at = now
            return None
        return ReplicaLost(f"{self._silent(replica, now)} and still computes")

    def unanswered(self, replica: ReplicaHandle, now: float) -> ReplicaLost | None:
        """What it means that it has not answered yet: nothing, or why it is given up."""
        if not replica.is_ready or not replica.in_flight or replica.probe is None:
            return None
        is_late = now - replica.probe.since > _ANSWER_SECONDS and now - replica.progressed_at > self._longest_silence(
            replica
        )
        return ReplicaLost(f"{self._silent(replica, now)} and does not answer") if is_late else None

    def _silent(self, replica: ReplicaHandle, now: float) -> str:
        return f"it has finished nothing for {now - replica.progressed_at:.0f} s"

    def _longest_silence(self, replica: ReplicaHandle) -> float:
        """Seconds; twice as many for each time that a shard of it has failed, which may simply be a long one."""
        failures = max((attempt.failures.count for attempt in replica.in_flight.values()), default=0)
        if self._stall_seconds is not None:
            return float(self._stall_seconds * 2**failures)
        if len(self._seconds) < _LEAST_SHARDS_KNOWN:
            return float("inf")
        return float(max(_LEAST_STALL_SECONDS, _STALL_FACTOR * median(self._seconds)) * 2**failures)


def _is_busy(replica: ReplicaHandle) -> bool:
    """Whether it is up and has something to do that it has yet to answer."""
    is_loading = replica.placed_at is not None and replica.start_call is not None
    return bool(replica.in_flight) or replica.calibrate_call is not None or is_loading

"""Replicas of which nothing is heard: when to ask one what it is doing, and when to give it up.

A question goes out after half a minute without a shard: on a connection that is broken, which nobody notices while
nothing is sent, it makes the calls that wait on it fail at once. So it does where a replica loads its model or
calibrates the measure; these have a limit of their own, and what the answer says does not matter. For shards it matters
only after a silence that is long for those of this run.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from neg_service.cluster.fleet import Member
from neg_service.errors import ReplicaLost

# Silence becomes suspicious after so many times the median of what a shard has taken, but not before this.
_STALL_FACTOR, _LEAST_STALL_SECONDS, _LEAST_SHARDS_KNOWN = 10, 120.0, 5
_ANSWER_SECONDS = 10.0
_ASK_SECONDS = 30.0


class Silence:
    """Knows how long shards take, and so which silence is too long."""

    def __init__(self, stall_seconds: float | None) -> None:
        """`stall_seconds` is how long a replica may be silent; by default it follows from what shards have taken."""
        self._stall_seconds = stall_seconds
        self._seconds: deque[float] = deque(maxlen=200)

    def ended(self, member: Member, now: float) -> None:
        """A shard of it is done."""
        self._seconds.append(now - member.heard)
        member.heard, member.asked = now, None

    def should_ask(self, member: Member, now: float) -> bool:
        """Whether it is time for a question, which is asked again and again."""
        if member.absence is not None or member.asked is not None or not _is_busy(member):
            return False
        calibrates_since = member.calibrating[1] if member.calibrating else 0.0
        quiet_since = max(member.placed_at or 0.0, calibrates_since, member.heard, member.answered)
        return now - quiet_since > min(_ASK_SECONDS, self._patience_with(member))

    def after_answer(self, member: Member, is_only_storing: bool, now: float) -> ReplicaLost | None:
        """What its answer means for it: nothing, or why it is given up."""
        member.asked, member.answered = None, now
        if not member.flying or now - member.heard <= self._patience_with(member):
            return None
        if is_only_storing:
            member.heard = now
            return None
        return ReplicaLost(f"{self._silent(member, now)} and still computes")

    def without_answer(self, member: Member, now: float) -> ReplicaLost | None:
        """What it means that it has not answered yet: nothing, or why it is given up."""
        if not member.is_ready or not member.flying or member.asked is None:
            return None
        is_late = now - member.asked[1] > _ANSWER_SECONDS and now - member.heard > self._patience_with(member)
        return ReplicaLost(f"{self._silent(member, now)} and does not answer") if is_late else None

    def _silent(self, member: Member, now: float) -> str:
        return f"it has finished nothing for {now - member.heard:.0f} s"

    def _patience_with(self, member: Member) -> float:
        """Seconds; twice as many for each time that a shard of it has failed, which may simply be a long one."""
        failures = max((attempt.failures for attempt in member.flying.values()), default=0)
        if self._stall_seconds is not None:
            return float(self._stall_seconds * 2**failures)
        if len(self._seconds) < _LEAST_SHARDS_KNOWN:
            return float("inf")
        return float(max(_LEAST_STALL_SECONDS, _STALL_FACTOR * median(self._seconds)) * 2**failures)


def _is_busy(member: Member) -> bool:
    """Whether it is up and has something to do that it has yet to answer."""
    is_loading = member.placed_at is not None and member.starting is not None
    return bool(member.flying) or member.calibrating is not None or is_loading

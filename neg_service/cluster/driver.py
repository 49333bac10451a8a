"""The driver: one loop that feeds replicas, collects receipts in finish order, and acts on failures.

Every replica has two shards in flight, so that it never waits for the driver and its storage never makes it wait. Ray
restarts nothing (`max_restarts=0`, `max_task_retries=0`): the driver starts another replica and gives the lost shards
to whoever is free. A shard that has failed runs alone on its replica from then on, so that one that kills its replica
takes no other down with it a second time.

A replica that is silent for much longer than a shard takes is asked what it is doing. One that waits for storage is let
be; one that does not answer, or still computes, is replaced, and what it may yet write is what its successor writes.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayError, RaySystemError, RayTaskError, RuntimeEnvSetupError

from neg_service.cluster.failures import Action, decide
from neg_service.cluster.plan import Shard
from neg_service.cluster.replica import Hello, Receipt
from neg_service.errors import ConfigurationError, NegServiceError, OutOfMemory, ReplicaLost, one_line

log = logging.getLogger(__name__)

IN_FLIGHT = 2
# So many shards given up without one done between them are no longer the shards' fault.
MOST_SET_ASIDE_IN_A_ROW = 20
_WAIT_SECONDS = 1.0
_REMIND_SECONDS = 30.0
# Silence becomes suspicious after so many times the median of what a shard has taken, but not before this.
_STALL_FACTOR, _LEAST_STALL_SECONDS, _LEAST_SHARDS_KNOWN = 10, 120.0, 5
_ANSWER_SECONDS = 10.0


@dataclass
class Attempt:
    """A shard on its way, and what has happened to it so far."""

    shard: Shard
    failures: int = 0
    batch_scale: float = 1.0
    failed_on: set[int] = field(default_factory=set)


@dataclass(eq=False)
class _Member:
    """A replica as the driver sees it."""

    number: int
    actor: Any
    starting: Any
    flying: dict[Any, Attempt] = field(default_factory=dict)
    # When a shard was last finished or, with none before it, sent.
    heard: float = 0.0
    # The question what it is doing, and when it was asked.
    asked: tuple[Any, float] | None = None

    @property
    def is_ready(self) -> bool:
        return self.starting is None

    @property
    def is_alone_with_suspect(self) -> bool:
        return any(attempt.failures for attempt in self.flying.values())


@dataclass
class Outcome:
    """How a run ended: the shards done now, and those set aside with their errors."""

    done: int = 0
    set_aside: dict[int, str] = field(default_factory=dict)


class Driver:
    """Runs shards on replicas until all are done or set aside."""

    def __init__(
        self,
        shards: Iterator[Shard],
        spawn: Callable[[], Any],
        n_replicas: int,
        attempts: int,
        on_receipt: Callable[[Receipt], None] = lambda receipt: None,
        on_first_ready: Callable[[Hello], None] = lambda hello: None,
        on_set_aside: Callable[[Shard, str, int], None] = lambda shard, error, failures: None,
        stall_seconds: float | None = None,
    ) -> None:
        """`spawn` starts a replica actor, which runs three calls at once: two shards, and a question what it is doing.

        `attempts` is how often a shard may fail; `stall_seconds` how long a replica may be silent, by default a
        multiple of what shards have taken so far.
        """
        self._fresh = shards
        self._next: Attempt | None = self._draw()
        self._suspects: deque[Attempt] = deque()
        self._spawn = spawn
        self._n_replicas = n_replicas
        self._attempts = attempts
        self._on_receipt = on_receipt
        self._on_first_ready: Callable[[Hello], None] | None = on_first_ready
        self._on_set_aside = on_set_aside
        self._stall_seconds = stall_seconds
        self._seconds: deque[float] = deque(maxlen=200)
        self._members: list[_Member] = []
        self._born = 0
        self._failed_starts = 0
        self._set_aside_in_a_row = 0
        self._idle_since = time.monotonic()
        self._outcome = Outcome()

    def run(self) -> Outcome:
        """Work until nothing is left; replicas are ended also when an error ends the run.

        Raises:
            NegServiceError: a failure that concerns every shard.
        """
        try:
            while self._next or self._suspects or any(member.flying for member in self._members):
                self._hire()
                self._feed()
                self._collect()
                self._replace_stalled()
        finally:
            for member in self._members:
                ray.kill(member.actor)
        return self._outcome

    def _draw(self) -> Attempt | None:
        shard = next(self._fresh, None)
        return None if shard is None else Attempt(shard)

    def _hire(self) -> None:
        while len(self._members) < self._n_replicas:
            actor = self._spawn()
            self._members.append(_Member(self._born, actor, actor.start.remote()))
            self._born += 1

    def _feed(self) -> None:
        ready = [member for member in self._members if member.is_ready]
        reserved: set[int] = set()
        for attempt in list(self._suspects):
            free = [m for m in ready if m.number not in reserved and not m.is_alone_with_suspect]
            if not free:
                break
            # A replica where it has not failed yet, and the one that is free soonest.
            member = min(free, key=lambda m: (m.number in attempt.failed_on, len(m.flying)))
            reserved.add(member.number)
            if not member.flying:
                self._suspects.remove(attempt)
                self._send(member, attempt)
        for member in ready:
            if member.number in reserved or member.is_alone_with_suspect:
                continue
            while self._next and len(member.flying) < IN_FLIGHT:
                self._send(member, self._next)
                self._next = self._draw()

    def _send(self, member: _Member, attempt: Attempt) -> None:
        if not member.flying:
            member.heard = time.monotonic()
        member.flying[member.actor.run.remote(attempt.shard, attempt.batch_scale)] = attempt

    def _collect(self) -> None:
        owner = {}
        for member in self._members:
            if member.starting is not None:
                owner[member.starting] = member
            owner.update(dict.fromkeys(member.flying, member))
        waiting = list(owner)
        finished, _ = ray.wait(waiting, num_returns=1, timeout=_WAIT_SECONDS)
        if finished:
            # All that have finished by now, in one go: with many replicas a wait for each would cost too much.
            finished, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > _REMIND_SECONDS and not any(
            member.is_ready for member in self._members
        ):
            log.warning("no replica is ready yet; waiting for the cluster to make room or for models to load")
            self._idle_since = time.monotonic()
        for reference in finished:
            member = owner[reference]
            # An earlier reference of this round may have shown that the replica is lost.
            if member in self._members:
                self._settle(member, reference)

    def _settle(self, member: _Member, reference: Any) -> None:
        try:
            result = ray.get(reference)
        except RayError as error:
            self._fail(member, reference, _translated(error))
            return
        if isinstance(result, Hello):
            member.starting = None
            self._failed_starts = 0
            if self._on_first_ready:
                self._on_first_ready(result)
                self._on_first_ready = None
            log.info(
                "replica %d is ready: pid %d on %s, %s",
                member.number,
                result.pid,
                result.node,
                result.ready.runs_on,
            )
            return
        del member.flying[reference]
        now = time.monotonic()
        self._seconds.append(now - member.heard)
        member.heard, member.asked = now, None
        self._outcome.done += 1
        self._set_aside_in_a_row = 0
        self._on_receipt(result)

    def _fail(self, member: _Member, reference: Any, error: Exception) -> None:
        if reference is member.starting:
            self._fail_start(member, error)
        elif isinstance(error, ReplicaLost):
            self._dismiss(member, error)
        else:
            attempt = member.flying.pop(reference)
            member.heard, member.asked = time.monotonic(), None
            if self._judge(member, attempt, error) is Action.REPLACE:
                self._dismiss(member, error)

    def _replace_stalled(self) -> None:
        now = time.monotonic()
        for member in list(self._members):
            if not member.is_ready or not member.flying or now - member.heard <= self._patience_with(member):
                continue
            if member.asked is None:
                member.asked = (member.actor.is_only_storing.remote(), now)
                continue
            question, when = member.asked
            silent = f"it has finished nothing for {now - member.heard:.0f} s"
            if ray.wait([question], timeout=0)[0]:
                try:
                    is_only_storing = ray.get(question)
                except RayError as error:
                    self._dismiss(member, _translated(error))
                    continue
                if is_only_storing:
                    member.heard, member.asked = now, None
                else:
                    self._dismiss(member, ReplicaLost(f"{silent} and still computes"))
            elif now - when > _ANSWER_SECONDS:
                self._dismiss(member, ReplicaLost(f"{silent} and does not answer"))

    def _patience_with(self, member: _Member) -> float:
        """Seconds; twice as many for each time that a shard of it has failed, which may simply be a long one."""
        failures = max(attempt.failures for attempt in member.flying.values())
        if self._stall_seconds is not None:
            return float(self._stall_seconds * 2**failures)
        if len(self._seconds) < _LEAST_SHARDS_KNOWN:
            return float("inf")
        return float(max(_LEAST_STALL_SECONDS, _STALL_FACTOR * median(self._seconds)) * 2**failures)

    def _fail_start(self, member: _Member, error: Exception) -> None:
        self._failed_starts += 1
        self._members.remove(member)
        ray.kill(member.actor)
        if decide(error, self._failed_starts, self._attempts) in (Action.STOP, Action.SET_ASIDE):
            if isinstance(error, NegServiceError) and not isinstance(error, ReplicaLost):
                raise error
            raise NegServiceError(f"no replica can be started, {self._failed_starts} tries failed: {error}") from error
        log.warning("replica %d could not be started, trying again: %s", member.number, error)

    def _dismiss(self, member: _Member, error: Exception) -> None:
        """Give up a replica; whatever it was doing has failed with it."""
        log.warning("replica %d is lost: %s", member.number, error)
        self._members.remove(member)
        ray.kill(member.actor)
        for attempt in member.flying.values():
            self._judge(member, attempt, ReplicaLost(f"its replica was lost: {error}"))

    def _judge(self, member: _Member, attempt: Attempt, error: Exception) -> Action:
        attempt.failures += 1
        attempt.failed_on.add(member.number)
        action = decide(error, attempt.failures, self._attempts)
        if action is Action.STOP:
            raise error
        log.warning(
            "shard %d failed on replica %d (%d of %d): %s: %s",
            attempt.shard.index, member.number, attempt.failures, self._attempts, action.value, error,
        )  # fmt: skip
        if action is Action.SET_ASIDE:
            self._outcome.set_aside[attempt.shard.index] = str(error)
            self._on_set_aside(attempt.shard, str(error), attempt.failures)
            self._set_aside_in_a_row += 1
            if self._set_aside_in_a_row >= MOST_SET_ASIDE_IN_A_ROW:
                raise NegServiceError(
                    f"{self._set_aside_in_a_row} shards in a row failed and none was done, the last with: {error}"
                ) from error
        else:
            attempt.batch_scale *= 0.5 if action is Action.SPLIT or isinstance(error, ReplicaLost) else 1.0
            self._suspects.append(attempt)
        return action


def _translated(error: Exception) -> Exception:
    """The error that happened in the replica, or what its loss means."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, MemoryError):
            return OutOfMemory(f"MemoryError {cause}".strip())
        if isinstance(cause, NegServiceError):
            return cause
        return RuntimeError(f"{type(cause).__name__}: {' '.join(str(cause).split())}")
    if isinstance(error, ActorUnschedulableError | RuntimeEnvSetupError | RaySystemError):
        return ConfigurationError(f"Ray cannot run a replica: {one_line(error)}")
    # An actor or a node that died, or was ended by Ray because memory ran out.
    return ReplicaLost(" ".join(str(error).split())[:300])

"""The driver: one loop that feeds replicas, collects receipts in finish order, and acts on failures.

Every replica has two shards in flight, so that it never waits for the driver and its storage never makes it wait. Ray
restarts nothing (`max_restarts=0`, `max_task_retries=0`): the driver starts another replica and gives the lost shards
to whoever is free. A shard that has failed runs alone on its replica from then on, so that one that kills its replica
takes no other down with it a second time.

A replica that is silent for much longer than a shard takes is asked what it is doing. One that waits for storage is let
be; one that does not answer, or still computes, is replaced, and what it may yet write is what its successor writes.

How many replicas there are follows the nodes of the cluster (`fleet.py`). What goes down with a node is given to others
and not held against a shard.
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
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    RayError,
    RaySystemError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from neg_service.cluster.failures import Action, Attempt, decide
from neg_service.cluster.fleet import Fleet, Member
from neg_service.cluster.metrics import Counts
from neg_service.cluster.plan import Shard
from neg_service.cluster.replica import Hello, Receipt
from neg_service.cluster.resources import Room
from neg_service.errors import ConfigurationError, NegServiceError, NodeLost, OutOfMemory, ReplicaLost, one_line
from neg_service.memory import is_out_of_memory

log = logging.getLogger(__name__)

IN_FLIGHT = 2
# So many shards given up without one done between them are no longer the shards' fault.
MOST_SET_ASIDE_IN_A_ROW = 20
_WAIT_SECONDS = 1.0
_REMIND_SECONDS = 30.0
# Silence becomes suspicious after so many times the median of what a shard has taken, but not before this.
_STALL_FACTOR, _LEAST_STALL_SECONDS, _LEAST_SHARDS_KNOWN = 10, 120.0, 5
_ANSWER_SECONDS = 10.0
_SHOW_SECONDS = 1.0
_LOOK_SECONDS = 5.0
# For each call in flight; a replica has another shard to do meanwhile.
_GATHER_SECONDS = 2e-5


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
        room: int | Callable[[], Room],
        attempts: int,
        on_receipt: Callable[[Receipt], None] = lambda receipt: None,
        on_first_ready: Callable[[Hello], None] = lambda hello: None,
        on_set_aside: Callable[[Shard, str, int], None] = lambda shard, error, failures: None,
        on_failure: Callable[[Action], None] = lambda action: None,
        on_counts: Callable[[Counts], None] = lambda counts: None,
        stall_seconds: float | None = None,
        n_shards: int | None = None,
        start_seconds: float = float("inf"),
        end: Callable[[Any], None] = ray.kill,
    ) -> None:
        """`spawn` starts a replica actor, which runs three calls at once: two shards, and a question what it is doing.

        `end` ends one. `room` is how many replicas to run, or looks how many there is room for now. `n_shards`, where
        it is known, keeps their number down to what is left to do. `attempts` is how often a shard may fail;
        `start_seconds` how long a replica may take to start; `stall_seconds` how long one may be silent, by default a
        multiple of what shards have taken so far.
        """
        self._fresh = shards
        self._moved: deque[Attempt] = deque()
        self._next: Attempt | None = self._draw()
        self._suspects: deque[Attempt] = deque()
        self._fleet = Fleet(spawn, end, room, attempts, start_seconds)
        self._n_shards = n_shards
        self._attempts = attempts
        self._on_receipt = on_receipt
        self._on_first_ready: Callable[[Hello], None] | None = on_first_ready
        self._on_set_aside = on_set_aside
        self._on_failure, self._on_counts = on_failure, on_counts
        self._shown = 0.0
        self._stall_seconds = stall_seconds
        self._seconds: deque[float] = deque(maxlen=200)
        self._set_aside_in_a_row = 0
        self._outcome = Outcome()

    def run(self) -> Outcome:
        """Work until nothing is left; replicas are ended also when an error ends the run.

        Raises:
            NegServiceError: a failure that concerns every shard.
        """
        try:
            while self._next or self._suspects or any(member.flying for member in self._fleet.members):
                done = self._outcome.done + len(self._outcome.set_aside)
                self._fleet.look_around(None if self._n_shards is None else self._n_shards - done)
                self._feed()
                self._collect()
                self._replace_stalled()
                self._show()
        finally:
            self._fleet.end_all()
            self._show(at_once=True)
        return self._outcome

    def _show(self, at_once: bool = False) -> None:
        """Not at every round: with many replicas there are hundreds a second."""
        if not at_once and time.monotonic() - self._shown < _SHOW_SECONDS:
            return
        self._shown = time.monotonic()
        n_ready = sum(member.is_ready for member in self._fleet.members)
        running = sum(len(member.flying) for member in self._fleet.members)
        outcome = self._outcome
        counts = Counts(outcome.done, running, len(outcome.set_aside), n_ready, len(self._fleet.members) - n_ready)
        self._on_counts(counts)

    def _draw(self) -> Attempt | None:
        if self._moved:
            return self._moved.popleft()
        shard = next(self._fresh, None)
        return None if shard is None else Attempt(shard)

    def _feed(self) -> None:
        ready = self._fleet.working
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

    def _send(self, member: Member, attempt: Attempt) -> None:
        if not member.flying:
            member.heard = time.monotonic()
        member.flying[member.actor.run.remote(attempt.shard, attempt.batch_scale)] = attempt

    def _collect(self) -> None:
        owner = {call: member for member in self._fleet.members for call in member.calls}
        waiting = list(owner)
        self._fleet.remind()
        if not waiting:
            time.sleep(_WAIT_SECONDS)
            return
        finished, _ = ray.wait(waiting, num_returns=1, timeout=_WAIT_SECONDS)
        if finished:
            # All that have finished by now, in one go, and with many replicas after a moment in which more do: what a
            # round costs grows with their number.
            time.sleep(len(waiting) * _GATHER_SECONDS)
            finished, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        for reference in finished:
            member = owner[reference]
            # An earlier reference of this round may have shown that the replica is lost.
            if member in self._fleet.members:
                self._settle(member, reference)

    def _settle(self, member: Member, reference: Any) -> None:
        try:
            result = ray.get(reference)
        except RayError as error:
            self._fail(member, reference, _translated(error))
            return
        if reference is member.asking_where:
            self._fleet.placed(member, result)
            return
        if isinstance(result, Hello):
            self._fleet.started(member)
            if self._on_first_ready:
                self._on_first_ready(result)
                self._on_first_ready = None
            log.info(
                "replica %d is ready: pid %d on %s, %s",
                member.number,
                result.pid,
                result.node,
                result.ready.runs_on,
                extra={"replica": member.number},
            )
            return
        del member.flying[reference]
        now = time.monotonic()
        self._seconds.append(now - member.heard)
        member.heard, member.asked = now, None
        self._outcome.done += 1
        self._set_aside_in_a_row = 0
        self._on_receipt(result)

    def _fail(self, member: Member, reference: Any, error: Exception) -> None:
        if not member.is_ready:
            self._fleet.start_failed(member, error)
        elif isinstance(error, ReplicaLost):
            if member.is_leaving:
                error = NodeLost(str(error))
            self._dismiss(member, error)
        else:
            attempt = member.flying.pop(reference)
            member.heard, member.asked = time.monotonic(), None
            if self._judge(member, attempt, error) is Action.REPLACE:
                self._dismiss(member, error)

    def _replace_stalled(self) -> None:
        now = time.monotonic()
        for member in list(self._fleet.members):
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

    def _patience_with(self, member: Member) -> float:
        """Seconds; twice as many for each time that a shard of it has failed, which may simply be a long one."""
        failures = max(attempt.failures for attempt in member.flying.values())
        if self._stall_seconds is not None:
            return float(self._stall_seconds * 2**failures)
        if len(self._seconds) < _LEAST_SHARDS_KNOWN:
            return float("inf")
        return float(max(_LEAST_STALL_SECONDS, _STALL_FACTOR * median(self._seconds)) * 2**failures)

    def _dismiss(self, member: Member, error: Exception) -> None:
        """Give up a replica; whatever it was doing has failed with it."""
        log.warning("replica %d is lost: %s", member.number, error, extra={"replica": member.number})
        self._fleet.end(member)
        lost = NodeLost if isinstance(error, NodeLost) else ReplicaLost
        for attempt in member.flying.values():
            self._judge(member, attempt, lost(f"its replica was lost: {error}"))

    def _judge(self, member: Member, attempt: Attempt, error: Exception) -> Action:
        attempt.moves += isinstance(error, NodeLost)
        if decide(error, attempt.failures, self._attempts, attempt.moves) is Action.MOVE:
            self._on_failure(Action.MOVE)
            about = {"replica": member.number, "shard": attempt.shard.index}
            log.warning("shard %d goes back to the queue: %s", attempt.shard.index, error, extra=about)
            if attempt.failures:
                self._suspects.append(attempt)
            else:
                self._moved.append(attempt)
                self._next = self._next or self._draw()
            return Action.MOVE
        attempt.failures += 1
        attempt.failed_on.add(member.number)
        action = decide(error, attempt.failures, self._attempts, attempt.moves)
        self._on_failure(action)
        if action is Action.STOP:
            raise error
        log.warning(
            "shard %d failed on replica %d (%d of %d): %s: %s",
            attempt.shard.index, member.number, attempt.failures, self._attempts, action.value, error,
            extra={"replica": member.number, "shard": attempt.shard.index},
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
        if isinstance(cause, NegServiceError):
            return cause
        if is_out_of_memory(cause):
            return OutOfMemory(f"{type(cause).__name__} {' '.join(str(cause).split())}".strip())
        # Nobody foresaw this one: whoever mends it needs to know where it happened.
        log.warning("an unexpected error in a replica:\n%s", error)
        return RuntimeError(f"{type(cause).__name__}: {' '.join(str(cause).split())}")
    if isinstance(error, ActorUnschedulableError | RuntimeEnvSetupError | RaySystemError):
        return ConfigurationError(f"Ray cannot run a replica: {one_line(error)}")
    says = " ".join(str(error).split())[:300]
    # When a process dies its node says so; when nobody answers, the node or the way to it is gone.
    if isinstance(error, ActorUnavailableError) or (
        isinstance(error, ActorDiedError) and (error.preempted or "node has died" in says)
    ):
        return NodeLost(says)
    # A process that died, or was ended by Ray because memory ran out.
    return ReplicaLost(says)

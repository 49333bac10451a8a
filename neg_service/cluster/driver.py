"""The driver: one loop that feeds replicas, collects receipts in finish order, and acts on failures.

Every replica has two shards in flight, so that it never waits for the driver and its storage never makes it wait. Ray
restarts nothing (`max_restarts=0`, `max_task_retries=0`): the driver starts another replica and gives the lost shards
to whoever is free. A shard that has failed runs alone on its replica from then on, so that one that kills its replica
takes no other down with it a second time.

A replica that is silent for much longer than a shard takes is asked what it is doing (`silence.py`). One that waits for
storage is let be; one that does not answer, or still computes, is replaced, and what it may yet write is what its
successor writes. One that cannot be reached is asked again for a while before that (`fleet.py`).

What a measure has to find out before its first shard is found out once a run, by the first replica that is ready, while
others load their models, and goes with each shard: no number depends on which replica took it.

How many replicas there are follows the nodes of the cluster (`fleet.py`). What goes down with a node is given to others
and not held against a shard.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from neg_service.cluster import gcs
from neg_service.cluster.failures import Action, Attempt, decide
from neg_service.cluster.fleet import Fleet, Member
from neg_service.cluster.metrics import Counts
from neg_service.cluster.plan import Shard
from neg_service.cluster.ray_errors import Meaning, Unexpected, meaning_of, translated
from neg_service.cluster.replica import Hello, Receipt
from neg_service.cluster.resources import Room
from neg_service.cluster.silence import Silence
from neg_service.errors import NegServiceError, NodeLost, ReplicaLost

log = logging.getLogger(__name__)

IN_FLIGHT = 2
# So many shards given up without one done between them are no longer the shards' fault.
MOST_SET_ASIDE_IN_A_ROW = 20
_WAIT_SECONDS = 1.0
_SHOW_SECONDS = 1.0
# For each call in flight; a replica has another shard to do meanwhile.
_GATHER_SECONDS = 2e-5


_NOTHING: dict[str, Any] = {}


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
        calibration: dict[str, Any] | None = _NOTHING,
        on_calibrated: Callable[[dict[str, Any]], dict[str, Any]] = lambda found: found,
        unreachable_seconds: float = 120.0,
        unreachable: gcs.Unreachable | None = None,
        is_node_lost: Callable[[Any, str], bool] = gcs.is_node_lost,
    ) -> None:
        """`spawn` starts a replica actor, which runs several calls at once: shards, and a question what it is doing.

        `end` ends one. `room` is how many replicas to run, or looks how many there is room for now. `n_shards`, where
        it is known, keeps their number down to what is left to do. `attempts` is how often a shard may fail;
        `start_seconds` how long a replica may take to start; `stall_seconds` how long one may be silent, by default a
        multiple of what shards have taken so far; `unreachable_seconds` for how long one that cannot be reached is
        asked again, and `unreachable` keeps their nodes. `calibration` goes with each shard; None: a replica finds it
        out, and what `on_calibrated` makes of that goes. `is_node_lost` looks whether a replica died with its node.
        """
        self._fresh = shards
        self._moved: deque[Attempt] = deque()
        self._next: Attempt | None = self._draw()
        self._suspects: deque[Attempt] = deque()
        self._fleet = Fleet(spawn, end, room, attempts, start_seconds, unreachable_seconds, unreachable)
        self._start_seconds, self._is_node_lost = start_seconds, is_node_lost
        self._calibration, self._on_calibrated = calibration, on_calibrated
        self._failed_calibrations: list[int] = []
        self._n_shards = n_shards
        self._attempts = attempts
        self._on_receipt = on_receipt
        self._on_first_ready: Callable[[Hello], None] | None = on_first_ready
        self._on_set_aside = on_set_aside
        self._on_failure, self._on_counts = on_failure, on_counts
        self._shown = 0.0
        self._silence = Silence(stall_seconds)
        self._set_aside_in_a_row = 0
        self._outcome = Outcome()

    def run(self) -> Outcome:
        """Work until nothing is left; replicas are ended also when an error ends the run.

        Raises:
            NegServiceError: a failure that concerns every shard.
        """
        try:
            while self._next or self._suspects or any(member.attempts for member in self._fleet.members):
                done = self._outcome.done + len(self._outcome.set_aside)
                self._fleet.look_around(None if self._n_shards is None else self._n_shards - done)
                if self._calibration is None:
                    self._calibrate()
                else:
                    self._feed()
                self._collect()
                self._replace_absent()
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
        running = sum(len(member.attempts) for member in self._fleet.members)
        outcome = self._outcome
        counts = Counts(outcome.done, running, len(outcome.set_aside), n_ready, len(self._fleet.members) - n_ready)
        self._on_counts(counts)

    def _draw(self) -> Attempt | None:
        if self._moved:
            return self._moved.popleft()
        shard = next(self._fresh, None)
        return None if shard is None else Attempt(shard)

    def _calibrate(self) -> None:
        """Have one replica find out what all have to know; another one, when that is lost or takes too long."""
        now = time.monotonic()
        for member in [member for member in self._fleet.members if member.calibrating]:
            if now - (member.calibrating or (None, now))[1] <= self._start_seconds:
                return
            error = ReplicaLost(f"it has not calibrated the measure within {self._start_seconds:.0f} s")
            self._calibration_failed(member, error)
        if ready := self._fleet.working:
            member = min(ready, key=lambda m: (self._failed_calibrations.count(m.number), m.number))
            member.calibrating = member.actor.calibrate.remote(), now

    def _calibration_failed(self, member: Member, error: Exception) -> None:
        """Try it again, on another replica where there is one.

        Raises:
            NegServiceError: nothing speaks for another try.
        """
        member.calibrating = None
        self._failed_calibrations += [] if isinstance(error, NodeLost) else [member.number]
        failures = len(self._failed_calibrations)
        action = decide(error, failures, self._attempts)
        if action in (Action.STOP, Action.SET_ASIDE):
            if isinstance(error, NegServiceError) and not isinstance(error, ReplicaLost):
                raise error
            raise NegServiceError(f"the measure cannot be calibrated, {failures} tries failed: {error}") from error
        if isinstance(error, ReplicaLost) or action is Action.REPLACE:
            self._dismiss(member, error)
        else:
            about = {"replica": member.number}
            log.warning("replica %d could not calibrate the measure: %s", member.number, error, extra=about)

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
        # Where there is nothing to calibrate nothing is sent.
        more = [self._calibration] if self._calibration else []
        member.flying[member.actor.run.remote(attempt.shard, attempt.batch_scale, *more)] = attempt

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
            self._fail(member, reference, error)
            return
        now = time.monotonic()
        if reference is member.asking_where:
            self._fleet.placed(member, result)
            for attempt in self._fleet.in_reach_again(member):
                self._send(member, attempt)
        elif reference is member.starting:
            self._started(member, result)
        elif member.calibrating and reference is member.calibrating[0]:
            member.calibrating = None
            # Another one may have been asked meanwhile.
            if self._calibration is None:
                self._calibration = self._on_calibrated(result)
        elif member.asked and reference is member.asked[0]:
            if hangs := self._silence.after_answer(member, result, now):
                self._dismiss(member, hangs)
        # Else it is the answer to a question that a shard has answered meanwhile.
        elif reference in member.flying:
            del member.flying[reference]
            self._silence.ended(member, now)
            self._outcome.done += 1
            self._set_aside_in_a_row = 0
            self._on_receipt(result)

    def _started(self, member: Member, hello: Hello) -> None:
        self._fleet.started(member)
        if self._on_first_ready:
            self._on_first_ready(hello)
            self._on_first_ready = None
        log.info(
            "replica %d is ready: pid %d on %s, %s",
            member.number,
            hello.pid,
            hello.node,
            hello.ready.runs_on,
            extra={"replica": member.number},
        )

    def _fail(self, member: Member, reference: Any, of_ray: RayError) -> None:
        meaning = meaning_of(of_ray)
        asks_whether_back = member.absence is not None and reference is member.asking_where
        if meaning is Meaning.UNREACHABLE or (asks_whether_back and meaning not in (Meaning.DEAD, Meaning.NODE_DEAD)):
            self._fleet.out_of_reach(member, reference, " ".join(str(of_ray).split())[:300])
            return
        error = translated(of_ray, lambda: self._is_node_lost(member.actor, member.node))
        if isinstance(error, Unexpected) and error.where:
            # Nobody foresaw this one: whoever mends it needs to know where it happened.
            log.warning("an unexpected error in a replica:\n%s", error.where)
        if isinstance(error, ReplicaLost) and member.is_leaving:
            error = NodeLost(str(error))
        if not member.has_started:
            self._fleet.start_failed(member, error)
        # Whichever of its calls says first that it is lost: it was lost while it calibrated, which counts.
        elif member.calibrating and (reference is member.calibrating[0] or isinstance(error, ReplicaLost)):
            self._calibration_failed(member, error)
        elif isinstance(error, ReplicaLost):
            self._dismiss(member, error)
        elif reference in member.flying:
            attempt = member.flying.pop(reference)
            member.heard, member.asked = time.monotonic(), None
            if self._judge(member, attempt, error) is Action.REPLACE:
                self._dismiss(member, error)
        elif member.asked and reference is member.asked[0]:
            # A question that came to nothing is asked anew.
            member.asked, member.answered = None, time.monotonic()

    def _replace_absent(self) -> None:
        """Ask those again that cannot be reached, and give up those that have not answered for long."""
        for member in self._fleet.ask_absent():
            assert member.absence is not None
            seconds = time.monotonic() - member.absence.since
            error = NodeLost(f"it could not be reached for {seconds:.0f} s: {member.absence.says}")
            if member.has_started:
                self._dismiss(member, error)
            else:
                self._fleet.start_failed(member, error)

    def _replace_stalled(self) -> None:
        now = time.monotonic()
        for member in list(self._fleet.members):
            if self._silence.should_ask(member, now):
                member.asked = (member.actor.is_only_storing.remote(), now)
            elif hangs := self._silence.without_answer(member, now):
                self._dismiss(member, hangs)

    def _dismiss(self, member: Member, error: Exception) -> None:
        """Give up a replica; whatever it was doing has failed with it."""
        log.warning("replica %d is lost: %s", member.number, error, extra={"replica": member.number})
        self._fleet.end(member)
        lost = NodeLost if isinstance(error, NodeLost) else ReplicaLost
        for attempt in member.attempts:
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

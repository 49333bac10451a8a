"""The driver: one loop that feeds replicas, collects their results in finish order, and acts on failures.

Ray restarts nothing (`max_restarts=0`, `max_task_retries=0`): the driver launches another replica and gives the lost
shards to those that are free. What is done about a failure is decided in `failures.py`, which shard goes where in
`shard_queue.py`, how many replicas there are in `scaling.py` and `pool.py`; here is what happens when.

A replica that is silent for much longer than a shard takes is asked what it is doing (`silence.py`). One that waits for
storage is left alone; one that does not answer, or still computes, is replaced, and what it may yet write is what its
successor writes. One that cannot be reached is asked again for a while before that.

What a measure has to find out before its first shard is found out once a run, by the first replica that is ready, while
others load their models, and goes with each shard: no number depends on which replica took it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from neg_service.cluster.failures import Action, Attempt, Failures, Limits, QuarantineStreak, final_error
from neg_service.cluster.messages import ReplicaInfo, Shard, ShardResult
from neg_service.cluster.metrics import Counts
from neg_service.cluster.observer import Observer
from neg_service.cluster.pool import Actors, ReplicaHandle, ReplicaPool, TimedCall
from neg_service.cluster.ray_errors import Meaning, Unexpected, meaning_of, translated
from neg_service.cluster.shard_queue import ShardQueue
from neg_service.cluster.silence import Silence
from neg_service.errors import NodeLost, ReplicaLost

log = logging.getLogger(__name__)

_WAIT_SECONDS = 1.0
_COUNT_SECONDS = 1.0
# For each call in flight; a replica has another shard to do meanwhile.
_GATHER_SECONDS = 2e-5


_NO_CALIBRATION: dict[str, Any] = {}


@dataclass
class Outcome:
    """How a run ended: how many shards were done now, and those that were given up, with their errors."""

    done: int = 0
    failed: dict[int, str] = field(default_factory=dict)


class Driver:
    """Runs shards on replicas until all are done or given up."""

    def __init__(
        self,
        shards: Iterator[Shard],
        actors: Actors,
        limits: Limits | None = None,
        observer: Observer | None = None,
        *,
        n_shards: int | None = None,
        calibration: dict[str, Any] | None = _NO_CALIBRATION,
    ) -> None:
        """`n_shards`, where it is known, keeps the number of replicas down to what is left to do.

        `calibration` goes with each shard; None: a replica finds it out, and what the observer makes of that goes.
        """
        self._limits = limits or Limits()
        self._queue = ShardQueue(shards)
        self._pool = ReplicaPool(actors, self._limits)
        self._silence = Silence(self._limits.stall_seconds)
        self._actors, self._observer = actors, observer or Observer()
        self._n_shards, self._calibration = n_shards, calibration
        self._failed_calibrations, self._streak = Failures(), QuarantineStreak()
        self._counted_at = 0.0
        self._outcome = Outcome()

    def run(self) -> Outcome:
        """Work until nothing is left; replicas are ended also when an error ends the run.

        Raises:
            NegServiceError: a failure that concerns every shard.
        """
        try:
            while self._queue or any(replica.attempts for replica in self._pool.replicas):
                settled = self._outcome.done + len(self._outcome.failed)
                self._pool.reconcile(None if self._n_shards is None else self._n_shards - settled)
                if self._calibration is None:
                    self._calibrate()
                else:
                    self._send_shards()
                self._collect()
                self._replace_unreachable()
                self._replace_stalled()
                self._count()
        finally:
            self._pool.remove_all()
            self._count(at_once=True)
        return self._outcome

    def _count(self, at_once: bool = False) -> None:
        """Not at every round: with many replicas there are hundreds a second."""
        if not at_once and time.monotonic() - self._counted_at < _COUNT_SECONDS:
            return
        self._counted_at = time.monotonic()
        replicas, outcome = self._pool.replicas, self._outcome
        n_ready = sum(replica.is_ready for replica in replicas)
        running = sum(len(replica.attempts) for replica in replicas)
        n_placed = sum(replica.placed_at is not None for replica in replicas)
        counts = Counts(outcome.done, running, len(outcome.failed), n_ready, len(replicas) - n_ready, n_placed)
        self._observer.counted(counts)

    # What is asked of replicas.

    def _calibrate(self) -> None:
        """Have one replica find out what all have to know; another one, when that is lost or takes too long."""
        now = time.monotonic()
        for replica in [replica for replica in self._pool.replicas if replica.calibrate_call]:
            if now - (replica.calibrate_call or TimedCall(None, now)).since <= self._limits.start_seconds:
                return
            error = ReplicaLost(f"it has not calibrated the measure within {self._limits.start_seconds:.0f} s")
            self._calibration_failed(replica, error)
        if ready := self._pool.working:
            failed_on = self._failed_calibrations.on
            replica = min(ready, key=lambda one: (failed_on.get(one.number, 0), one.number))
            replica.calibrate_call = TimedCall(replica.actor.calibrate.remote(), now)

    def _send_shards(self) -> None:
        for replica, attempt in self._queue.assignments(self._pool.working):
            self._send(replica, attempt)

    def _send(self, replica: ReplicaHandle, attempt: Attempt) -> None:
        if not replica.in_flight:
            replica.progressed_at = time.monotonic()
        # Where there is nothing to calibrate nothing is sent.
        more = [self._calibration] if self._calibration else []
        replica.in_flight[replica.actor.run.remote(attempt.shard, attempt.batch_scale, *more)] = attempt

    def _replace_unreachable(self) -> None:
        """Ask those again that cannot be reached, and give up those that have not answered for long."""
        for replica, error in self._pool.ask_unreachable():
            if replica.has_started:
                self._lose(replica, error)
            else:
                self._pool.start_failed(replica, error)

    def _replace_stalled(self) -> None:
        now = time.monotonic()
        for replica in list(self._pool.replicas):
            if self._silence.should_probe(replica, now):
                replica.probe = TimedCall(replica.actor.is_only_storing.remote(), now)
            elif hangs := self._silence.unanswered(replica, now):
                self._lose(replica, hangs)

    # What comes back.

    def _collect(self) -> None:
        owner = {call: replica for replica in self._pool.replicas for call in replica.calls}
        waiting = list(owner)
        self._pool.log_waiting()
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
            replica = owner[reference]
            # An earlier reference of this round may have shown that the replica is lost.
            if replica in self._pool.replicas:
                self._settle(replica, reference)

    def _settle(self, replica: ReplicaHandle, reference: Any) -> None:
        try:
            answer = ray.get(reference)
        except RayError as error:
            self._call_failed(replica, reference, error)
            return
        if reference is replica.where_call:
            self._pool.placed(replica, answer)
            for attempt in self._pool.reached_again(replica):
                self._send(replica, attempt)
        elif reference is replica.start_call:
            self._started(replica, answer)
        elif replica.waits_for(replica.calibrate_call, reference):
            replica.calibrate_call = None
            # Another one may have been asked meanwhile.
            if self._calibration is None:
                self._calibration = self._observer.calibrated(answer)
        elif replica.waits_for(replica.probe, reference):
            if hangs := self._silence.answered(replica, answer, time.monotonic()):
                self._lose(replica, hangs)
        # Else it is the answer to a question that a shard has answered meanwhile.
        elif reference in replica.in_flight:
            self._shard_done(replica, reference, answer)

    def _started(self, replica: ReplicaHandle, info: ReplicaInfo) -> None:
        self._pool.started(replica)
        self._observer.replica_ready(info)
        what, about = "replica %d is ready: pid %d on %s, %s", {"replica": replica.number}
        log.info(what, replica.number, info.pid, info.node, info.worker.runs_on, extra=about)

    def _shard_done(self, replica: ReplicaHandle, reference: Any, result: ShardResult) -> None:
        del replica.in_flight[reference]
        self._silence.shard_ended(replica, time.monotonic())
        self._outcome.done += 1
        self._streak.clear()
        self._observer.shard_done(result)

    # What fails.

    def _call_failed(self, replica: ReplicaHandle, reference: Any, of_ray: RayError) -> None:
        meaning = meaning_of(of_ray)
        asks_whether_back = replica.outage is not None and reference is replica.where_call
        if meaning is Meaning.UNREACHABLE or (asks_whether_back and meaning not in (Meaning.DEAD, Meaning.NODE_DEAD)):
            self._pool.call_lost(replica, reference, " ".join(str(of_ray).split())[:300])
            return
        error = translated(of_ray, lambda: self._actors.is_node_lost(replica.actor, replica.node))
        if isinstance(error, Unexpected) and error.where:
            # Nobody foresaw this one: to mend it, one needs to know where it happened.
            log.warning("an unexpected error in a replica:\n%s", error.where)
        is_lost = isinstance(error, ReplicaLost)
        if is_lost and replica.is_draining:
            error = NodeLost(str(error))
        if not replica.has_started:
            self._pool.start_failed(replica, error)
        # Whichever of its calls says first that it is lost: it was lost while it calibrated, which counts.
        elif replica.calibrate_call and (is_lost or replica.waits_for(replica.calibrate_call, reference)):
            self._calibration_failed(replica, error)
        elif is_lost:
            self._lose(replica, error)
        elif reference in replica.in_flight:
            attempt = replica.in_flight.pop(reference)
            replica.progressed_at, replica.probe = time.monotonic(), None
            if self._shard_failed(replica, attempt, error) is Action.REPLACE:
                self._lose(replica, error)
        elif replica.waits_for(replica.probe, reference):
            # A question that came to nothing is asked anew.
            replica.probe, replica.probe_answered_at = None, time.monotonic()

    def _calibration_failed(self, replica: ReplicaHandle, error: Exception) -> None:
        """Try it again, on another replica where there is one.

        Raises:
            NegServiceError: nothing speaks for another try.
        """
        replica.calibrate_call = None
        action = self._failed_calibrations.add(error, replica.number, self._limits.attempts)
        count = self._failed_calibrations.count
        if final := final_error(action, error, "the measure cannot be calibrated", count):
            raise final
        if isinstance(error, ReplicaLost) or action is Action.REPLACE:
            self._lose(replica, error)
        else:
            about = {"replica": replica.number}
            log.warning("replica %d could not calibrate the measure: %s", replica.number, error, extra=about)

    def _lose(self, replica: ReplicaHandle, error: Exception) -> None:
        """Give up a replica; whatever it was doing has failed with it."""
        log.warning("replica %d is lost: %s", replica.number, error, extra={"replica": replica.number})
        self._pool.remove(replica)
        lost = NodeLost if isinstance(error, NodeLost) else ReplicaLost
        for attempt in replica.attempts:
            self._shard_failed(replica, attempt, lost(f"its replica was lost: {error}"))

    def _shard_failed(self, replica: ReplicaHandle, attempt: Attempt, error: Exception) -> Action:
        """Do what is decided about it.

        Raises:
            NegServiceError: it concerns all shards, or too many in a row failed.
        """
        action = attempt.fail(error, replica.number, self._limits.attempts)
        self._observer.shard_undone(action)
        if action is Action.ABORT:
            raise error
        index, about = attempt.shard.index, {"replica": replica.number, "shard": attempt.shard.index}
        if action is Action.REQUEUE:
            log.warning("shard %d goes back to the queue: %s", index, error, extra=about)
        else:
            log.warning(
                "shard %d failed on replica %d (%d of %d): %s: %s",
                index, replica.number, attempt.failures.count, self._limits.attempts, action.value, error, extra=about,
            )  # fmt: skip
        if action is Action.QUARANTINE:
            self._quarantine(attempt, error)
        else:
            self._queue.put_back(attempt)
        return action

    def _quarantine(self, attempt: Attempt, error: Exception) -> None:
        self._outcome.failed[attempt.shard.index] = str(error)
        self._observer.shard_quarantined(attempt.shard, str(error), attempt.failures.count)
        if final := self._streak.add(error):
            raise final

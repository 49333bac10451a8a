"""The replicas of a run: how many there are, which nodes they are on, and which of them begin, drain, or are lost.

Every few seconds the pool is reconciled with the cluster's capacity (`scaling.py`). On a node that is being drained
nothing new begins, and its replicas end with the shards that they have. A replica is first asked where it is, which it
can say as soon as its process is up, and then told to start, which may take as long as a model takes to load.

One that cannot be reached keeps its place and its work for a while, and is asked again: its model is loaded. When it
answers, what it had is asked of it anew, which it knows. Nothing is placed on nodes that do not answer; once they do
again, a replica that was launched for any node but these and still waits for capacity makes way for one that may go
there.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from neg_service.cluster.failures import Action, Attempt, Failures, Limits, final_error
from neg_service.cluster.gcs import UnreachableNodes
from neg_service.cluster.scaling import Capacity, changes
from neg_service.errors import NodeLost, ReplicaLost

log = logging.getLogger(__name__)

_RECONCILE_SECONDS = 5.0
_LOG_WAITING_SECONDS = 30.0
# A start that fails while others work is tried again after a while: the reason may be its node's, and may pass.
_RETRY_SECONDS = 30.0
_ASK_AGAIN_SECONDS = 2.0
# Who has a node already has said so by then, or else still loads what its process needs for that.
_PLACED_SECONDS = 30.0


class Actors(Protocol):
    """What the cluster does for the pool."""

    @property
    def unreachable_nodes(self) -> UnreachableNodes:
        """Where nothing is placed; the pool says whose replicas cannot be reached."""
        ...

    def launch(self) -> Any:
        """An actor, which runs several calls at once: shards, and questions where it is and what it is doing."""
        ...

    def end(self, actor: Any) -> None:
        """End one at once."""
        ...

    def capacity(self) -> Capacity:
        """What there is now."""
        ...

    def is_node_lost(self, actor: Any, node: str) -> bool:
        """Whether one that is dead died with its node."""
        ...


class TimedCall(NamedTuple):
    """A call that has not been answered, and since when."""

    reference: Any
    since: float


@dataclass
class Outage:
    """Of a replica that cannot be reached: since when and why, when to ask it again, and what it had to do."""

    since: float
    reason: str
    ask_at: float
    attempts: list[Attempt] = field(default_factory=list)


@dataclass(eq=False)
class ReplicaHandle:
    """A replica as the driver sees it: the calls that it has yet to answer, and when things happened."""

    number: int
    actor: Any
    where_call: Any
    start_call: Any
    calibrate_call: TimedCall | None = None
    # The question what it is doing, and when the last one was answered.
    probe: TimedCall | None = None
    probe_answered_at: float = 0.0
    in_flight: dict[Any, Attempt] = field(default_factory=dict)
    has_started: bool = False
    node: str = ""
    # When it was launched, and the nodes that did not answer then: it may be placed on any but these, for good.
    launched_at: float = 0.0
    avoids: frozenset[str] = frozenset()
    # Since when its process is up.
    placed_at: float | None = None
    # When a shard was last finished or, with none before it, sent.
    progressed_at: float = 0.0
    is_draining: bool = False
    outage: Outage | None = None

    @property
    def is_ready(self) -> bool:
        return self.has_started and self.outage is None

    @property
    def runs_retry(self) -> bool:
        """Whether it has a shard that failed before, which runs alone."""
        return any(attempt.is_retry for attempt in self.in_flight.values())

    @property
    def attempts(self) -> list[Attempt]:
        """The shards that it has."""
        return [*self.in_flight.values(), *(self.outage.attempts if self.outage else ())]

    @property
    def calls(self) -> list[Any]:
        """All that it has yet to answer."""
        timed = [call.reference for call in (self.calibrate_call, self.probe) if call is not None]
        waiting = [call for call in (self.where_call, self.start_call) if call is not None]
        return [*waiting, *timed, *self.in_flight]

    def waits_for(self, call: TimedCall | None, reference: Any) -> bool:
        """Whether `reference` is that call of it."""
        return call is not None and call.reference is reference


class ReplicaPool:
    """Launches replicas and removes them."""

    def __init__(self, actors: Actors, limits: Limits) -> None:
        """None yet: `reconcile` launches them."""
        self.replicas: list[ReplicaHandle] = []
        self._actors, self._limits = actors, limits
        self._capacity, self._looked_at = Capacity(0), float("-inf")
        self._n_launched = 0
        # Since one last started.
        self._failed_starts = Failures()
        self._launch_after, self._ready_at = float("-inf"), time.monotonic()

    @property
    def working(self) -> list[ReplicaHandle]:
        """Those that take shards."""
        return [replica for replica in self.replicas if replica.is_ready and not replica.is_draining]

    def reconcile(self, n_left: int | None) -> None:
        """Remove what drains or hangs, and launch where there is capacity and are shards left for more."""
        now = time.monotonic()
        if now - self._looked_at >= _RECONCILE_SECONDS:
            self._look(now)
        for replica in [replica for replica in self.replicas if replica.is_draining and not replica.attempts]:
            self.remove(replica)
        for replica in [replica for replica in self.replicas if self._starts_too_long(replica, now)]:
            self.start_failed(replica, ReplicaLost(f"it has not started within {self._limits.start_seconds:.0f} s"))
        staying = [replica for replica in self.replicas if not replica.is_draining]
        starting = [replica for replica in staying if not replica.has_started]
        unplaced = sum(replica.placed_at is None for replica in staying)
        change = changes(self._capacity, n_left, present=len(staying), unplaced=unplaced, starting=len(starting))
        # The youngest first: they have waited for the least.
        for replica in starting[len(starting) - change.remove :]:
            self.remove(replica)
        if now >= self._launch_after:
            for _ in range(change.launch):
                self._launch()

    def placed(self, replica: ReplicaHandle, node: str) -> None:
        """A replica has said where it is."""
        replica.where_call, replica.node = None, node
        if replica.placed_at is None:
            replica.placed_at = time.monotonic()

    def started(self, replica: ReplicaHandle) -> None:
        """A replica is ready."""
        replica.start_call, replica.has_started = None, True
        self._failed_starts = Failures()

    def start_failed(self, replica: ReplicaHandle, error: Exception) -> None:
        """A replica could not be started: another one will be tried, unless nothing speaks for that.

        Raises:
            NegServiceError: no other replica works, and the error concerns all, or this was the last try.
        """
        self.remove(replica)
        about = {"replica": replica.number}
        action = self._failed_starts.add(error, replica.number, self._limits.attempts)
        if action is Action.REQUEUE:
            log.warning("replica %d was lost while it started: %s", replica.number, error, extra=about)
            return
        others_work = any(other.has_started and not other.is_draining for other in self.replicas)
        final = final_error(action, error, "no replica can be started", self._failed_starts.count)
        if final is not None and not others_work:
            raise final
        if others_work:
            self._launch_after = time.monotonic() + _RETRY_SECONDS
        log.warning("replica %d could not be started, trying again: %s", replica.number, error, extra=about)

    def call_lost(self, replica: ReplicaHandle, call: Any, reason: str) -> None:
        """A call was lost on the way: what it was for is kept, and the replica is asked where it is."""
        now = time.monotonic()
        if replica.outage is None:
            what = "replica %d cannot be reached, and is asked again for %.0f s: %s"
            about = {"replica": replica.number}
            log.warning(what, replica.number, self._limits.unreachable_seconds, reason, extra=about)
            replica.outage = Outage(now, reason, now)
            self._actors.unreachable_nodes.add(replica.node)
        if call in replica.in_flight:
            replica.outage.attempts.append(replica.in_flight.pop(call))
        elif call is replica.where_call:
            replica.where_call, replica.outage.ask_at = None, now + _ASK_AGAIN_SECONDS
        elif call is replica.start_call:
            replica.start_call = None
        elif replica.waits_for(replica.calibrate_call, call):
            replica.calibrate_call = None
        elif replica.waits_for(replica.probe, call):
            replica.probe = None

    def ask_unreachable(self) -> list[tuple[ReplicaHandle, NodeLost]]:
        """Ask those where they are that cannot be reached; gives those that have not answered for too long."""
        now = time.monotonic()
        out = [(replica, replica.outage) for replica in self.replicas if replica.outage is not None]
        for replica, outage in out:
            if replica.where_call is None and now >= outage.ask_at:
                replica.where_call = replica.actor.where.remote()
        gone = []
        for replica, outage in out:
            seconds = now - outage.since
            if seconds > self._limits.unreachable_seconds:
                self._actors.unreachable_nodes.add(replica.node)
                gone.append((replica, NodeLost(f"it could not be reached for {seconds:.0f} s: {outage.reason}")))
        return gone

    def reached_again(self, replica: ReplicaHandle) -> list[Attempt]:
        """A replica answers: the shards whose answers were lost; the order to start is given again where it was."""
        outage, replica.outage = replica.outage, None
        if outage is None:
            return []
        now = time.monotonic()
        about = {"replica": replica.number}
        log.info("replica %d answers again after %.0f s", replica.number, now - outage.since, extra=about)
        replica.progressed_at, replica.probe = now, None
        if not replica.has_started and replica.start_call is None:
            replica.start_call = replica.actor.start.remote()
        return outage.attempts

    def remove(self, replica: ReplicaHandle) -> None:
        """End a replica at once."""
        self.replicas.remove(replica)
        self._actors.end(replica.actor)

    def remove_all(self) -> None:
        """End all."""
        for replica in list(self.replicas):
            self.remove(replica)

    def log_waiting(self) -> None:
        """Say now and then that nothing happens because no replica is ready."""
        now = time.monotonic()
        if any(replica.is_ready for replica in self.replicas):
            self._ready_at = now
        elif now - self._ready_at > _LOG_WAITING_SECONDS:
            self._ready_at = now
            placed = [replica.placed_at for replica in self.replicas if replica.placed_at is not None]
            if placed:
                log.info(
                    "no replica is ready yet: %d of %d load and check the model, the first for %.0f s of %.0f "
                    "(cluster.start_seconds)",
                    len(placed), len(self.replicas), now - min(placed), self._limits.start_seconds,
                )  # fmt: skip
            else:
                log.warning("no replica is ready, and none has a place yet; waiting for room in the cluster")

    def _look(self, now: float) -> None:
        """See what there is capacity for, which nodes are being drained, and which answer again."""
        unreachable = self._actors.unreachable_nodes
        unreachable.look_again()
        for replica in self.replicas:
            if replica.outage is not None:
                unreachable.add(replica.node)
        self._capacity, self._looked_at = self._actors.capacity(), now
        for replica in self.replicas:
            if replica.node in self._capacity.draining and not replica.is_draining:
                what = "replica %d gets no more shards: its node is being drained"
                log.info(what, replica.number, extra={"replica": replica.number})
                replica.is_draining = True
        for replica in [replica for replica in self.replicas if self._avoids_too_much(replica, now)]:
            what = "replica %d still waits for room, and is launched anew: nodes that it may not go to answer again"
            log.info(what, replica.number, extra={"replica": replica.number})
            self.remove(replica)

    def _launch(self) -> None:
        avoids = self._actors.unreachable_nodes.nodes
        actor = self._actors.launch()
        where_call, start_call = actor.where.remote(), actor.start.remote()
        launched_at = time.monotonic()
        self.replicas.append(
            ReplicaHandle(self._n_launched, actor, where_call, start_call, launched_at=launched_at, avoids=avoids)
        )
        self._n_launched += 1

    def _avoids_too_much(self, replica: ReplicaHandle, now: float) -> bool:
        """Whether it waits for capacity and may not go to a node that answers again: the cluster never changes that."""
        waits = replica.placed_at is None and replica.outage is None and now - replica.launched_at > _PLACED_SECONDS
        return waits and not replica.avoids <= self._actors.unreachable_nodes.nodes

    def _starts_too_long(self, replica: ReplicaHandle, now: float) -> bool:
        is_up = replica.placed_at is not None and not replica.has_started
        return is_up and now - (replica.placed_at or now) > self._limits.start_seconds

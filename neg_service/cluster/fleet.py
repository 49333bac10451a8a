"""The replicas of a run: how many there are, which nodes they are on, and which of them begin, leave, or are lost.

Every few seconds the fleet looks around. Where there is room for more replicas it has more; on a node that is being
drained nothing new begins, and its replicas end with the shards that they have. A replica is first asked where it is,
which it can say as soon as its process is up, and then told to start, which may take as long as a model takes to load.

One that cannot be reached keeps its place and its work for a while, and is asked again: its model is loaded. When it
answers, what it had is asked of it anew, which it knows. Nothing is placed on nodes that do not answer; once they do
again, whoever was hired for any node but these and still waits for room makes way for one that may go there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from neg_service.cluster.failures import MOST_MOVES, Action, Attempt, decide
from neg_service.cluster.gcs import Unreachable
from neg_service.cluster.resources import Room
from neg_service.errors import NegServiceError, NodeLost, ReplicaLost

log = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0
_REMIND_SECONDS = 30.0
# A start that fails while others work is tried again after a while: the reason may be its node's, and may pass.
_RETRY_SECONDS = 30.0
_ASK_AGAIN_SECONDS = 2.0
# Who has a node already has said so by then, or else still loads what its process needs for that.
_PLACED_SECONDS = 30.0


@dataclass
class Absence:
    """Of a replica that cannot be reached: since when and why, when to ask it again, and what it had to do."""

    since: float
    says: str
    ask_at: float
    attempts: list[Attempt] = field(default_factory=list)


@dataclass(eq=False)
class Member:
    """A replica as the driver sees it."""

    number: int
    actor: Any
    # The question where it is, and the orders to start and to calibrate the measure, while they wait for an answer.
    asking_where: Any
    starting: Any
    calibrating: tuple[Any, float] | None = None
    has_started: bool = False
    node: str = ""
    # Since when its process is up.
    placed_at: float | None = None
    is_leaving: bool = False
    flying: dict[Any, Attempt] = field(default_factory=dict)
    # When a shard was last finished or, with none before it, sent.
    heard: float = 0.0
    # The question what it is doing, and when it was asked; when the last one was answered.
    asked: tuple[Any, float] | None = None
    answered: float = 0.0
    absence: Absence | None = None
    # When it was hired, and the nodes that did not answer then: it may be placed on any but these, for good.
    hired: float = 0.0
    avoids: frozenset[str] = frozenset()

    @property
    def is_ready(self) -> bool:
        return self.has_started and self.absence is None

    @property
    def is_alone_with_suspect(self) -> bool:
        return any(attempt.failures for attempt in self.flying.values())

    @property
    def attempts(self) -> list[Attempt]:
        """The shards that it has."""
        return [*self.flying.values(), *(self.absence.attempts if self.absence else ())]

    @property
    def calls(self) -> list[Any]:
        """All that it has yet to answer."""
        timed = [call[0] for call in (self.calibrating, self.asked) if call is not None]
        waiting = [call for call in (self.asking_where, self.starting) if call is not None]
        return [*waiting, *timed, *self.flying]


class Fleet:
    """Hires replicas and lets them go."""

    def __init__(
        self,
        spawn: Callable[[], Any],
        end: Callable[[Any], None],
        room: int | Callable[[], Room],
        attempts: int,
        start_seconds: float,
        unreachable_seconds: float = 120.0,
        unreachable: Unreachable | None = None,
    ) -> None:
        """`spawn` starts an actor and `end` ends one; `room` is how many to have, or looks how many there is room for.

        `attempts` is how often starting may fail in a row, `start_seconds` how long it may take once a process is up.
        `unreachable_seconds` is for how long one that cannot be reached is asked again; their nodes are kept in
        `unreachable`, for whoever places others.
        """
        self._unreachable_seconds = unreachable_seconds
        self._unreachable = unreachable or Unreachable()
        self.members: list[Member] = []
        self._spawn, self._end = spawn, end
        self._look: Callable[[], Room] = room if callable(room) else lambda: Room(room)
        self._room, self._looked = Room(0), float("-inf")
        self._attempts, self._start_seconds = attempts, start_seconds
        self._born = self._failed_starts = self._lost_starts = 0
        self._not_before, self._reminded = float("-inf"), time.monotonic()

    @property
    def working(self) -> list[Member]:
        """Those that take shards."""
        return [member for member in self.members if member.is_ready and not member.is_leaving]

    def look_around(self, n_left: int | None) -> None:
        """Let go who leaves, and hire while there is room and are shards left for more."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._unreachable.look_again()
            for member in self.members:
                if member.absence is not None:
                    self._unreachable.add(member.node)
            self._room, self._looked = self._look(), now
            for member in self.members:
                if member.node in self._room.leaving and not member.is_leaving:
                    what = "replica %d gets no more shards: its node is being drained"
                    log.info(what, member.number, extra={"replica": member.number})
                    member.is_leaving = True
            for member in [member for member in self.members if self._avoids_too_much(member, now)]:
                what = "replica %d still waits for room, and is hired anew: nodes that it may not go to answer again"
                log.info(what, member.number, extra={"replica": member.number})
                self.end(member)
        for member in [member for member in self.members if member.is_leaving and not member.attempts]:
            self.end(member)
        for member in [member for member in self.members if self._takes_too_long(member, now)]:
            self.start_failed(member, ReplicaLost(f"it has not started within {self._start_seconds:.0f} s"))
        staying = [member for member in self.members if not member.is_leaving]
        wanted = self._room.wanted(len(staying), sum(member.placed_at is None for member in staying))
        if n_left is not None:
            wanted = min(wanted, n_left)
            # Those that have not begun may go again, the youngest first: they have waited for the least.
            idle = [member for member in staying if not member.has_started]
            for member in idle[max(0, len(idle) - max(0, len(staying) - n_left)) :]:
                self.end(member)
        if now >= self._not_before:
            for _ in range(wanted - len(staying)):
                self._hire()

    def placed(self, member: Member, node: str) -> None:
        """A replica has said where it is."""
        member.asking_where, member.node = None, node
        if member.placed_at is None:
            member.placed_at = time.monotonic()

    def started(self, member: Member) -> None:
        """A replica is ready."""
        member.starting, member.has_started = None, True
        self._failed_starts = self._lost_starts = 0

    def out_of_reach(self, member: Member, call: Any, says: str) -> None:
        """A call of a replica was lost: what it was for is kept, and the replica is asked where it is."""
        now = time.monotonic()
        if member.absence is None:
            what = "replica %d cannot be reached, and is asked again for %.0f s: %s"
            log.warning(what, member.number, self._unreachable_seconds, says, extra={"replica": member.number})
            member.absence = Absence(now, says, now)
            self._unreachable.add(member.node)
        if call in member.flying:
            member.absence.attempts.append(member.flying.pop(call))
        elif call is member.asking_where:
            member.asking_where, member.absence.ask_at = None, now + _ASK_AGAIN_SECONDS
        elif call is member.starting:
            member.starting = None
        elif member.calibrating and call is member.calibrating[0]:
            member.calibrating = None
        elif member.asked and call is member.asked[0]:
            member.asked = None

    def ask_absent(self) -> list[Member]:
        """Ask those where they are that cannot be reached; the ones that have not answered for too long."""
        now = time.monotonic()
        absent = [(member, member.absence) for member in self.members if member.absence is not None]
        for member, absence in absent:
            if member.asking_where is None and now >= absence.ask_at:
                member.asking_where = member.actor.where.remote()
        gone = [member for member, absence in absent if now - absence.since > self._unreachable_seconds]
        for member in gone:
            self._unreachable.add(member.node)
        return gone

    def in_reach_again(self, member: Member) -> list[Attempt]:
        """A replica answers: the shards whose answers were lost; the order to start is given again where it was."""
        absence, member.absence = member.absence, None
        if absence is None:
            return []
        now = time.monotonic()
        about = {"replica": member.number}
        log.info("replica %d answers again after %.0f s", member.number, now - absence.since, extra=about)
        member.heard, member.asked = now, None
        if not member.has_started and member.starting is None:
            member.starting = member.actor.start.remote()
        return absence.attempts

    def start_failed(self, member: Member, error: Exception) -> None:
        """A replica could not be started: another one will be tried, unless nothing speaks for that.

        Raises:
            NegServiceError: no other replica works, and the error concerns all, or this was the last try.
        """
        self.end(member)
        about = {"replica": member.number}
        if isinstance(error, NodeLost):
            self._lost_starts += 1
            if self._lost_starts <= MOST_MOVES:
                log.warning("replica %d was lost while it started: %s", member.number, error, extra=about)
                return
        self._failed_starts += 1
        action = decide(error, self._failed_starts, self._attempts, self._lost_starts)
        others_work = any(one.has_started and not one.is_leaving for one in self.members)
        if action in (Action.STOP, Action.SET_ASIDE) and not others_work:
            if isinstance(error, NegServiceError) and not isinstance(error, ReplicaLost):
                raise error
            raise NegServiceError(f"no replica can be started, {self._failed_starts} tries failed: {error}") from error
        if others_work:
            self._not_before = time.monotonic() + _RETRY_SECONDS
        log.warning("replica %d could not be started, trying again: %s", member.number, error, extra=about)

    def end(self, member: Member) -> None:
        """Let a replica go at once."""
        self.members.remove(member)
        self._end(member.actor)

    def end_all(self) -> None:
        """Let all go."""
        for member in list(self.members):
            self.end(member)

    def remind(self) -> None:
        """Say now and then that nothing happens because no replica is ready."""
        now = time.monotonic()
        if any(member.is_ready for member in self.members):
            self._reminded = now
        elif now - self._reminded > _REMIND_SECONDS:
            log.warning("no replica is ready; waiting for the cluster to make room or for models to load")
            self._reminded = now

    def _hire(self) -> None:
        avoids = self._unreachable.nodes
        actor = self._spawn()
        asking_where, starting = actor.where.remote(), actor.start.remote()
        hired = time.monotonic()
        self.members.append(Member(self._born, actor, asking_where, starting, hired=hired, avoids=avoids))
        self._born += 1

    def _avoids_too_much(self, member: Member, now: float) -> bool:
        """Whether it waits for room and may not go to a node that answers again: the cluster does not change that."""
        waits = member.placed_at is None and member.absence is None and now - member.hired > _PLACED_SECONDS
        return waits and not member.avoids <= self._unreachable.nodes

    def _takes_too_long(self, member: Member, now: float) -> bool:
        is_up = member.placed_at is not None and not member.has_started
        return is_up and now - (member.placed_at or now) > self._start_seconds

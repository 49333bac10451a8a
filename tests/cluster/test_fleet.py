"""Who is hired and who is let go, without Ray: actors that only note what was asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from neg_service.cluster import fleet as module
from neg_service.cluster.failures import MOST_MOVES, Attempt
from neg_service.cluster.fleet import Fleet
from neg_service.cluster.gcs import Unreachable, labels_without
from neg_service.cluster.plan import Shard
from neg_service.cluster.resources import Room
from neg_service.errors import ConfigurationError, ModelError, NegServiceError, NodeLost, OutOfMemory, ReplicaLost


class Actor:
    """Something to hire."""

    def __init__(self) -> None:
        self.where = self.start = SimpleNamespace(remote=object)
        self.is_ended = False
        # The nodes that it may not be placed on, ever.
        self.avoids: frozenset[str] = frozenset()


def attempt(shard: int) -> Attempt:
    """A shard on its way."""
    return Attempt(Shard(shard, ()))


class Far(Unreachable):
    """Nodes that answer when a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.answer_again: frozenset[str] = frozenset()

    def look_again(self) -> None:
        self.nodes -= self.answer_again


class Hired(Fleet):
    """A fleet in a room that tests change, at a time that they set."""

    def __init__(self, room: Room, start_seconds: float = 100) -> None:
        self.actors: list[Actor] = []
        self.room = room
        self.far = Far()
        super().__init__(
            self._new, self._over, lambda: self.room, attempts=3, start_seconds=start_seconds, unreachable_seconds=120,
            unreachable=self.far,
        )  # fmt: skip

    def _new(self) -> Actor:
        self.actors.append(Actor())
        self.actors[-1].avoids = self.far.nodes
        return self.actors[-1]

    def _over(self, actor: Actor) -> None:
        assert not actor.is_ended
        actor.is_ended = True

    def ready(self, index: int, node: str = "a") -> None:
        """A member has said where it is and has started."""
        self.placed(self.members[index], node)
        self.started(self.members[index])

    @property
    def numbers(self) -> list[int]:
        """Of those that are there."""
        return [member.number for member in self.members]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A time that only tests move."""
    now = SimpleNamespace(value=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now.value))
    return now


def test_a_number_is_hired_at_once_and_kept(clock: SimpleNamespace) -> None:
    fleet = Hired(Room(3))
    fleet.look_around(100)
    assert fleet.numbers == [0, 1, 2]
    fleet.end(fleet.members[1])
    fleet.look_around(100)
    assert fleet.numbers == [0, 2, 3]


def test_no_more_than_shards_are_left_and_the_youngest_that_wait_go(clock: SimpleNamespace) -> None:
    fleet = Hired(Room(5))
    fleet.look_around(3)
    assert fleet.numbers == [0, 1, 2]
    fleet.ready(1)
    fleet.look_around(2)
    assert fleet.numbers == [0, 1]
    fleet.look_around(1)
    assert fleet.numbers == [1]
    # Who is ready stays, though there is nothing left for it.
    fleet.ready(0)
    fleet.look_around(0)
    assert fleet.numbers == [1]


def test_free_room_is_filled_once_and_what_waits_for_it_is_counted(clock: SimpleNamespace) -> None:
    fleet = Hired(Room(None, free=2))
    fleet.look_around(100)
    assert fleet.numbers == [0, 1]
    # Nothing has been placed yet, so the same room is still free: it is not filled twice.
    clock.value += 10
    fleet.look_around(100)
    assert fleet.numbers == [0, 1]
    fleet.ready(0)
    fleet.ready(1)
    fleet.room = Room(None, free=0)
    clock.value += 10
    fleet.look_around(100)
    assert fleet.numbers == [0, 1]
    # A node comes.
    fleet.room = Room(None, free=3)
    clock.value += 10
    fleet.look_around(100)
    assert fleet.numbers == [0, 1, 2, 3, 4]


def test_where_there_is_no_room_one_waits_for_it(clock: SimpleNamespace) -> None:
    fleet = Hired(Room(None, free=0))
    fleet.look_around(100)
    assert fleet.numbers == [0]


def test_who_is_on_a_drained_node_leaves_ready_or_not_and_others_are_hired(clock: SimpleNamespace) -> None:
    fleet = Hired(Room(3))
    fleet.look_around(100)
    fleet.ready(0, "going")
    fleet.placed(fleet.members[1], "going")
    fleet.placed(fleet.members[2], "staying")
    fleet.members[0].flying = {object(): object()}
    fleet.room = Room(3, leaving=frozenset({"going"}))
    clock.value += 10
    fleet.look_around(100)
    # The one that only starts goes at once; the one with a shard finishes it, and gets no other.
    assert fleet.numbers == [0, 2, 3, 4]
    assert fleet.working == []
    fleet.members[0].flying.clear()
    fleet.look_around(100)
    assert fleet.numbers == [2, 3, 4]


@pytest.mark.parametrize(
    ("error", "tries", "message"),
    [
        (ModelError("the wrong model"), 1, "the wrong model"),
        (ReplicaLost("dead"), 3, "no replica can be started, 3 tries failed: dead"),
        (OutOfMemory("full"), 3, "full"),
        (NodeLost("gone"), MOST_MOVES + 3, "no replica can be started, 3 tries failed: gone"),
    ],
)
def test_starts_that_fail_end_the_run_at_last(
    clock: SimpleNamespace, error: NegServiceError, tries: int, message: str
) -> None:
    fleet = Hired(Room(1))
    for _ in range(tries - 1):
        fleet.look_around(100)
        fleet.start_failed(fleet.members[0], error)
    fleet.look_around(100)
    with pytest.raises(NegServiceError, match=message):
        fleet.start_failed(fleet.members[0], error)


def test_a_late_start_that_fails_does_not_end_a_run_that_works(clock: SimpleNamespace) -> None:
    fleet = Hired(Room(2))
    fleet.look_around(100)
    fleet.ready(0)
    for _ in range(20):
        fleet.start_failed(fleet.members[1], ConfigurationError("other files on this node"))
        fleet.look_around(100)
        assert fleet.numbers == [0], "not at once again"
        clock.value += 31
        fleet.look_around(100)
        assert len(fleet.members) == 2


def test_a_start_that_takes_too_long_is_tried_elsewhere(clock: SimpleNamespace) -> None:
    fleet = Hired(Room(1), start_seconds=60)
    fleet.look_around(100)
    clock.value += 1000
    fleet.look_around(100)
    assert fleet.numbers == [0], "it waits for room, not for its model"
    fleet.placed(fleet.members[0], "a")
    clock.value += 61
    fleet.look_around(100)
    assert fleet.numbers == [1]


def test_who_cannot_be_reached_keeps_its_place_and_work_and_is_asked_until_it_answers(clock: SimpleNamespace) -> None:
    fleet = Hired(Room(1))
    fleet.look_around(100)
    fleet.ready(0, "there")
    (member,) = fleet.members
    calls = [object(), object()]
    member.flying = {call: attempt(number) for number, call in enumerate(calls)}
    for call in calls:
        fleet.out_of_reach(member, call, "no answer")
    assert not member.is_ready
    assert fleet.working == []
    assert [one.shard.index for one in member.attempts] == [0, 1]
    for _ in range(50):
        assert fleet.ask_absent() == []
        asked = member.asking_where
        assert asked is not None
        # No other is hired for it, nor is it let go when few shards are left.
        fleet.look_around(0)
        assert fleet.numbers == [0]
        assert fleet.far.nodes == {"there"}
        fleet.out_of_reach(member, asked, "no answer")
        assert fleet.ask_absent() == [], "not at once again"
        assert member.asking_where is None
        clock.value += 2
    fleet.ask_absent()
    fleet.placed(member, "there")
    assert [one.shard.index for one in fleet.in_reach_again(member)] == [0, 1]
    assert fleet.working == [member]
    assert member.starting is None, "its model is loaded"


def test_who_answers_in_time_is_not_asked_for_ever(clock: SimpleNamespace) -> None:
    fleet = Hired(Room(1))
    fleet.look_around(100)
    fleet.ready(0, "there")
    (member,) = fleet.members
    fleet.out_of_reach(member, object(), "no answer")
    clock.value += 119
    assert fleet.ask_absent() == []
    # The question itself may never come back.
    clock.value += 2
    assert fleet.ask_absent() == [member]
    assert fleet.far.nodes == {"there"}


def test_an_order_to_start_that_was_lost_is_given_again(clock: SimpleNamespace) -> None:
    fleet = Hired(Room(1), start_seconds=60)
    fleet.look_around(100)
    (member,) = fleet.members
    fleet.placed(member, "a")
    fleet.out_of_reach(member, member.starting, "no answer")
    assert member.calls == []
    fleet.ask_absent()
    clock.value += 50
    fleet.placed(member, "a")
    assert fleet.in_reach_again(member) == []
    assert member.starting is not None
    assert not member.has_started
    clock.value += 11
    fleet.look_around(100)
    assert fleet.numbers == [1], "its time to start runs from when it was up first"


def test_a_failed_start_does_not_end_a_run_whose_replicas_are_out_of_reach(clock: SimpleNamespace) -> None:
    fleet = Hired(Room(2))
    fleet.look_around(100)
    fleet.ready(0)
    fleet.out_of_reach(fleet.members[0], object(), "no answer")
    fleet.start_failed(fleet.members[1], ConfigurationError("other files on this node"))
    assert fleet.numbers == [0]


@pytest.mark.parametrize("room", [Room(2), Room(None, free=2)])
def test_who_waits_for_room_is_hired_anew_when_a_node_that_it_may_not_go_to_answers_again(
    clock: SimpleNamespace, room: Room
) -> None:
    fleet = Hired(room)
    fleet.look_around(100)
    for index, node in enumerate(("a", "b")):
        fleet.ready(index, node)
        fleet.out_of_reach(fleet.members[index], object(), "no answer")
    # One is replaced while neither node answers: its replacement may go to neither.
    fleet.end(fleet.members[0])
    fleet.room = room if room.number else Room(None, free=1)
    clock.value += 10
    fleet.look_around(100)
    assert fleet.numbers == [1, 2]
    assert fleet.members[1].actor.avoids == {"a", "b"}
    # While the nodes do not answer it waits, and nothing is gained by another.
    clock.value += 100
    fleet.look_around(100)
    assert fleet.numbers == [1, 2]
    # One of them answers.
    fleet.far.answer_again = frozenset({"a"})
    clock.value += 10
    fleet.look_around(100)
    assert fleet.numbers == [1, 3]
    assert fleet.actors[2].is_ended
    assert fleet.members[1].actor.avoids == {"b"}
    # The other one, with the replica there.
    fleet.in_reach_again(fleet.members[0])
    fleet.far.answer_again = frozenset({"a", "b"})
    for _ in range(10):
        clock.value += 10
        fleet.look_around(100)
    assert fleet.numbers == [1, 4]
    assert fleet.members[1].actor.avoids == frozenset()


def test_who_has_a_node_stays_there_when_others_answer_again(clock: SimpleNamespace) -> None:
    fleet = Hired(Room(2))
    fleet.far.add("away")
    fleet.look_around(100)
    # One has said where it is; the other one's process may just be coming up.
    fleet.placed(fleet.members[0], "here")
    fleet.far.answer_again = frozenset({"away"})
    clock.value += 10
    fleet.look_around(100)
    assert fleet.numbers == [0, 1]
    fleet.placed(fleet.members[1], "here")
    clock.value += 80
    fleet.look_around(100)
    assert fleet.numbers == [0, 1]


def test_nothing_is_placed_on_nodes_that_do_not_answer() -> None:
    assert labels_without(()) is None
    assert labels_without({"b", "a"}) == {"ray.io/node-id": "!in(a,b)"}

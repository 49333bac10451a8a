"""Which replicas are launched and removed, without Ray: actors that only note what was asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from neg_service.cluster import pool as module
from neg_service.cluster.failures import MOST_REQUEUES, Attempt, Limits
from neg_service.cluster.gcs import UnreachableNodes, labels_without
from neg_service.cluster.messages import Shard
from neg_service.cluster.pool import ReplicaPool
from neg_service.cluster.scaling import Capacity
from neg_service.errors import ConfigurationError, ModelError, NegServiceError, NodeLost, OutOfMemory, ReplicaLost
from tests.refusals import ANY, refused


class Actor:
    """Something to launch."""

    def __init__(self) -> None:
        self.where = self.start = SimpleNamespace(remote=object)
        self.is_ended = False
        # The nodes that it may not be placed on, ever.
        self.avoids: frozenset[str] = frozenset()


def attempt(shard: int) -> Attempt:
    """A shard on its way."""
    return Attempt(Shard(shard, ()))


class Far(UnreachableNodes):
    """Nodes that answer when a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.answer_again: frozenset[str] = frozenset()

    def look_again(self) -> None:
        self.nodes -= self.answer_again


class Cluster:
    """A cluster whose capacity tests change."""

    def __init__(self, capacity: Capacity) -> None:
        self.now, self.launched, self.unreachable_nodes = capacity, list[Actor](), Far()

    def launch(self) -> Actor:
        self.launched.append(Actor())
        self.launched[-1].avoids = self.unreachable_nodes.nodes
        return self.launched[-1]

    def end(self, actor: Actor) -> None:
        assert not actor.is_ended
        actor.is_ended = True

    def capacity(self) -> Capacity:
        return self.now

    def is_node_lost(self, actor: Actor, node: str) -> bool:
        raise AssertionError


class Pool(ReplicaPool):
    """A pool on such a cluster, at a time that tests set."""

    def __init__(self, capacity: Capacity, start_seconds: float = 100) -> None:
        self.cluster = Cluster(capacity)
        self.far = self.cluster.unreachable_nodes
        super().__init__(self.cluster, Limits(3, start_seconds, unreachable_seconds=120))

    def ready(self, index: int, node: str = "a") -> None:
        """A replica has said where it is and has started."""
        self.placed(self.replicas[index], node)
        self.started(self.replicas[index])

    @property
    def numbers(self) -> list[int]:
        """Of those that are there."""
        return [replica.number for replica in self.replicas]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A time that only tests move."""
    now = SimpleNamespace(value=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now.value))
    return now


def test_a_number_is_launched_at_once_and_kept(clock: SimpleNamespace) -> None:
    pool = Pool(Capacity(3))
    pool.reconcile(100)
    assert pool.numbers == [0, 1, 2]
    pool.remove(pool.replicas[1])
    pool.reconcile(100)
    assert pool.numbers == [0, 2, 3]


def test_no_more_than_shards_are_left_and_the_youngest_that_wait_go(clock: SimpleNamespace) -> None:
    pool = Pool(Capacity(5))
    pool.reconcile(3)
    assert pool.numbers == [0, 1, 2]
    pool.ready(1)
    pool.reconcile(2)
    assert pool.numbers == [0, 1]
    pool.reconcile(1)
    assert pool.numbers == [1]
    # Who is ready stays, though there is nothing left for it.
    pool.ready(0)
    pool.reconcile(0)
    assert pool.numbers == [1]


def test_free_room_is_filled_once_and_what_waits_for_it_is_counted(clock: SimpleNamespace) -> None:
    pool = Pool(Capacity(None, free=2))
    pool.reconcile(100)
    assert pool.numbers == [0, 1]
    # Nothing has been placed yet, so the same room is still free: it is not filled twice.
    clock.value += 10
    pool.reconcile(100)
    assert pool.numbers == [0, 1]
    pool.ready(0)
    pool.ready(1)
    pool.cluster.now = Capacity(None, free=0)
    clock.value += 10
    pool.reconcile(100)
    assert pool.numbers == [0, 1]
    # A node comes.
    pool.cluster.now = Capacity(None, free=3)
    clock.value += 10
    pool.reconcile(100)
    assert pool.numbers == [0, 1, 2, 3, 4]


def test_where_there_is_no_room_one_waits_for_it(clock: SimpleNamespace) -> None:
    pool = Pool(Capacity(None, free=0))
    pool.reconcile(100)
    assert pool.numbers == [0]


def test_waiting_for_room_is_a_warning_and_loading_a_model_is_none(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", module.__name__)
    pool = Pool(Capacity(2))
    pool.reconcile(100)

    def told() -> list[tuple[str, str]]:
        caplog.clear()
        clock.value += 31
        pool.log_waiting()
        pool.log_waiting()
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    ((level, message),) = told()
    assert level == "WARNING"
    assert "none has a place" in message
    pool.placed(pool.replicas[1], "a")
    ((level, message),) = told()
    assert level == "INFO"
    assert "1 of 2 load and check the model, the first for 31 s of 100 (cluster.start_seconds)" in message
    pool.ready(0)
    assert told() == []


def test_who_is_on_a_drained_node_drains_ready_or_not_and_others_are_launched(clock: SimpleNamespace) -> None:
    pool = Pool(Capacity(3))
    pool.reconcile(100)
    pool.ready(0, "going")
    pool.placed(pool.replicas[1], "going")
    pool.placed(pool.replicas[2], "staying")
    pool.replicas[0].in_flight = {object(): object()}
    pool.cluster.now = Capacity(3, draining=frozenset({"going"}))
    clock.value += 10
    pool.reconcile(100)
    # The one that only starts goes at once; the one with a shard finishes it, and gets no other.
    assert pool.numbers == [0, 2, 3, 4]
    assert pool.working == []
    pool.replicas[0].in_flight.clear()
    pool.reconcile(100)
    assert pool.numbers == [2, 3, 4]


@pytest.mark.parametrize(
    ("error", "tries", "refusal"),
    [
        (ModelError("the wrong model"), 1, (None, ANY, "the wrong model")),
        (ReplicaLost("dead"), 3, (None, ANY, "no replica can be started, 3 tries failed: dead")),
        (OutOfMemory("full"), 3, (None, ANY, "full")),
        (NodeLost("gone"), MOST_REQUEUES + 3, (None, ANY, "no replica can be started, 3 tries failed: gone")),
    ],
)
def test_starts_that_fail_end_the_run_at_last(
    clock: SimpleNamespace, error: NegServiceError, tries: int, refusal: tuple[Any, ...]
) -> None:
    pool = Pool(Capacity(1))
    for _ in range(tries - 1):
        pool.reconcile(100)
        pool.start_failed(pool.replicas[0], error)
    pool.reconcile(100)
    with refused(NegServiceError, *refusal):
        pool.start_failed(pool.replicas[0], error)


def test_a_late_start_that_fails_does_not_end_a_run_that_works(clock: SimpleNamespace) -> None:
    pool = Pool(Capacity(2))
    pool.reconcile(100)
    pool.ready(0)
    for _ in range(20):
        pool.start_failed(pool.replicas[1], ConfigurationError("other files on this node"))
        pool.reconcile(100)
        assert pool.numbers == [0], "not at once again"
        clock.value += 31
        pool.reconcile(100)
        assert len(pool.replicas) == 2


def test_a_start_that_takes_too_long_is_tried_elsewhere(clock: SimpleNamespace) -> None:
    pool = Pool(Capacity(1), start_seconds=60)
    pool.reconcile(100)
    clock.value += 1000
    pool.reconcile(100)
    assert pool.numbers == [0], "it waits for room, not for its model"
    pool.placed(pool.replicas[0], "a")
    clock.value += 61
    pool.reconcile(100)
    assert pool.numbers == [1]


def test_who_cannot_be_reached_keeps_its_place_and_work_and_is_asked_until_it_answers(clock: SimpleNamespace) -> None:
    pool = Pool(Capacity(1))
    pool.reconcile(100)
    pool.ready(0, "there")
    (replica,) = pool.replicas
    calls = [object(), object()]
    replica.in_flight = {call: attempt(number) for number, call in enumerate(calls)}
    for call in calls:
        pool.call_lost(replica, call, "no answer")
    assert not replica.is_ready
    assert pool.working == []
    assert [one.shard.index for one in replica.attempts] == [0, 1]
    for _ in range(50):
        assert pool.ask_unreachable() == []
        asked = replica.where_call
        assert asked is not None
        # No other is launched for it, nor is it removed when few shards are left.
        pool.reconcile(0)
        assert pool.numbers == [0]
        assert pool.far.nodes == {"there"}
        pool.call_lost(replica, asked, "no answer")
        assert pool.ask_unreachable() == [], "not at once again"
        assert replica.where_call is None
        clock.value += 2
    pool.ask_unreachable()
    pool.placed(replica, "there")
    assert [one.shard.index for one in pool.reached_again(replica)] == [0, 1]
    assert pool.working == [replica]
    assert replica.start_call is None, "its model is loaded"


def test_who_answers_in_time_is_not_asked_for_ever(clock: SimpleNamespace) -> None:
    pool = Pool(Capacity(1))
    pool.reconcile(100)
    pool.ready(0, "there")
    (replica,) = pool.replicas
    pool.call_lost(replica, object(), "no answer")
    clock.value += 119
    assert pool.ask_unreachable() == []
    # The question itself may never come back.
    clock.value += 2
    ((gone, error),) = pool.ask_unreachable()
    assert gone is replica
    assert str(error) == "it could not be reached for 121 s: no answer"
    assert pool.far.nodes == {"there"}


def test_an_order_to_start_that_was_lost_is_given_again(clock: SimpleNamespace) -> None:
    pool = Pool(Capacity(1), start_seconds=60)
    pool.reconcile(100)
    (replica,) = pool.replicas
    pool.placed(replica, "a")
    pool.call_lost(replica, replica.start_call, "no answer")
    assert replica.calls == []
    pool.ask_unreachable()
    clock.value += 50
    pool.placed(replica, "a")
    assert pool.reached_again(replica) == []
    assert replica.start_call is not None
    assert not replica.has_started
    clock.value += 11
    pool.reconcile(100)
    assert pool.numbers == [1], "its time to start runs from when it was up first"


def test_a_failed_start_does_not_end_a_run_whose_replicas_are_out_of_reach(clock: SimpleNamespace) -> None:
    pool = Pool(Capacity(2))
    pool.reconcile(100)
    pool.ready(0)
    pool.call_lost(pool.replicas[0], object(), "no answer")
    pool.start_failed(pool.replicas[1], ConfigurationError("other files on this node"))
    assert pool.numbers == [0]


@pytest.mark.parametrize("capacity", [Capacity(2), Capacity(None, free=2)])
def test_who_waits_for_room_is_launched_anew_when_a_node_that_it_may_not_go_to_answers_again(
    clock: SimpleNamespace, capacity: Capacity
) -> None:
    pool = Pool(capacity)
    pool.reconcile(100)
    for index, node in enumerate(("a", "b")):
        pool.ready(index, node)
        pool.call_lost(pool.replicas[index], object(), "no answer")
    # One is replaced while neither node answers: its replacement may go to neither.
    pool.remove(pool.replicas[0])
    pool.cluster.now = capacity if capacity.number else Capacity(None, free=1)
    clock.value += 10
    pool.reconcile(100)
    assert pool.numbers == [1, 2]
    assert pool.replicas[1].actor.avoids == {"a", "b"}
    # While the nodes do not answer it waits, and nothing is gained by another.
    clock.value += 100
    pool.reconcile(100)
    assert pool.numbers == [1, 2]
    # One of them answers.
    pool.far.answer_again = frozenset({"a"})
    clock.value += 10
    pool.reconcile(100)
    assert pool.numbers == [1, 3]
    assert pool.cluster.launched[2].is_ended
    assert pool.replicas[1].actor.avoids == {"b"}
    # The other one, with the replica there.
    pool.reached_again(pool.replicas[0])
    pool.far.answer_again = frozenset({"a", "b"})
    for _ in range(10):
        clock.value += 10
        pool.reconcile(100)
    assert pool.numbers == [1, 4]
    assert pool.replicas[1].actor.avoids == frozenset()


def test_who_has_a_node_stays_there_when_others_answer_again(clock: SimpleNamespace) -> None:
    pool = Pool(Capacity(2))
    pool.far.add("away")
    pool.reconcile(100)
    # One has said where it is; the other one's process may just be coming up.
    pool.placed(pool.replicas[0], "here")
    pool.far.answer_again = frozenset({"away"})
    clock.value += 10
    pool.reconcile(100)
    assert pool.numbers == [0, 1]
    pool.placed(pool.replicas[1], "here")
    clock.value += 80
    pool.reconcile(100)
    assert pool.numbers == [0, 1]


def test_nothing_is_placed_on_nodes_that_do_not_answer() -> None:
    assert labels_without(()) is None
    assert labels_without({"b", "a"}) == {"ray.io/node-id": "!in(a,b)"}

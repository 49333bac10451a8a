"""Which shard goes to which replica, without Ray."""

from __future__ import annotations

from neg_service.cluster.failures import Attempt
from neg_service.cluster.messages import Shard
from neg_service.cluster.pool import ReplicaHandle
from neg_service.cluster.shard_queue import ShardQueue
from neg_service.errors import NodeLost


def queue_of(n_shards: int) -> ShardQueue:
    return ShardQueue(Shard(index, ()) for index in range(n_shards))


def replica(number: int) -> ReplicaHandle:
    return ReplicaHandle(number, None, None, None, has_started=True)


def send(queue: ShardQueue, *replicas: ReplicaHandle) -> list[tuple[int, int]]:
    """As the driver does; pairs of replica and shard."""
    sent = queue.assignments(replicas)
    for to, attempt in sent:
        to.in_flight[object()] = attempt
    return [(to.number, attempt.shard.index) for to, attempt in sent]


def failed(shard: int, *on: int) -> Attempt:
    attempt = Attempt(Shard(shard, ()))
    for number in on:
        attempt.fail(RuntimeError("odd"), number, 9)
    return attempt


def test_each_replica_has_two_shards_and_all_are_given_in_order() -> None:
    queue, one, other = queue_of(5), replica(0), replica(1)
    assert send(queue, one, other) == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert send(queue, one, other) == []
    assert queue
    one.in_flight.popitem()
    assert send(queue, one, other) == [(0, 4)]
    assert not queue


def test_only_one_fresh_shard_is_made_ahead() -> None:
    made: list[int] = []

    def shards() -> object:
        for index in range(9):
            made.append(index)
            yield Shard(index, ())

    queue = ShardQueue(shards())  # type: ignore[arg-type]
    send(queue, replica(0))
    assert made == [0, 1, 2]


def test_what_was_lost_with_a_node_goes_first_and_is_not_suspected() -> None:
    queue, lost = queue_of(1), Attempt(Shard(7, ()))
    lost.fail(NodeLost("gone"), 0, 3)
    queue.put_back(lost)
    assert send(queue, replica(1)) == [(1, 7), (1, 0)]


def test_what_failed_runs_alone_where_it_has_not_failed_yet() -> None:
    queue, one, other = queue_of(9), replica(0), replica(1)
    queue.put_back(failed(7, 0))
    assert send(queue, one, other) == [(1, 7), (0, 0), (0, 1)]
    # Nothing else while it runs, and nothing more for the replica that another failed shard waits for.
    assert send(queue, one, other) == []
    queue.put_back(failed(8, 1))
    one.in_flight.popitem()
    assert send(queue, one, other) == []
    one.in_flight.clear()
    assert send(queue, one, other) == [(0, 8)]
    other.in_flight.clear()
    assert send(queue, one, other) == [(1, 2), (1, 3)]


def test_what_failed_waits_for_the_replica_that_is_free_soonest() -> None:
    queue, one, other = queue_of(4), replica(0), replica(1)
    send(queue, one, other)
    other.in_flight.popitem()
    queue.put_back(failed(9, 2))
    assert send(queue, one, other) == []
    other.in_flight.clear()
    assert send(queue, one, other) == [(1, 9)]


def test_failed_shards_alone_are_work() -> None:
    queue = queue_of(0)
    assert not queue
    queue.put_back(failed(0, 0))
    assert queue
    assert send(queue, replica(0)) == [(0, 0)]
    assert not queue

"""A replica as a plain object, and how it finds out that nobody wants it any more."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from neg_service.cluster import replica as replica_module
from neg_service.cluster.gcs import end_with_the_driver
from neg_service.cluster.messages import Destination, Shard, WorkerInfo
from neg_service.cluster.ray_errors import Unexpected
from neg_service.cluster.replica import ACTOR_OPTIONS, Replica
from neg_service.errors import ConfigurationError
from tests.refusals import refused


class Counting:
    """A worker that counts, and waits until it may go on."""

    def __init__(self) -> None:
        self.computed: list[int] = []
        self.told: list[Mapping[str, Any]] = []
        self.starts = self.calibrations = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.fails = 0
        self.calibration: dict[str, Any] = {"noise": {"sigma": 0.1}}

    def start(self) -> WorkerInfo:
        self.starts += 1
        return WorkerInfo("nothing")

    def calibrate(self) -> dict[str, Any]:
        self.calibrations += 1
        return self.calibration

    def compute(self, shard: Shard, batch_scale: float, *calibration: Mapping[str, Any]) -> dict[str, pa.Table]:
        self.computed.append(shard.index)
        self.told.extend(calibration)
        self.may_go_on.wait(20)
        if self.fails:
            self.fails -= 1
            raise KeyError("odd")
        return {"rows": pa.table({"shard": [shard.index]})}


@pytest.fixture
def worker() -> Counting:
    """What the replica runs."""
    return Counting()


@pytest.fixture
def replica(worker: Counting, tmp_path: Path) -> Replica:
    """Ready."""
    made = Replica(lambda: worker, Destination(str(tmp_path), None, "f" * 12))
    made.start()
    return made


def test_what_is_asked_again_is_not_done_again(replica: Replica, worker: Counting) -> None:
    worker.may_go_on.clear()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(replica.run, Shard(3, ()))
        while not worker.computed:
            time.sleep(0.01)
        # The first call's answer is lost; the driver asks for both of its shards again.
        again = [pool.submit(replica.run, Shard(index, ())) for index in (3, 4)]
        worker.may_go_on.set()
        assert first.result(20) == again[0].result(20)
        assert again[1].result(20).shard == 4
    assert replica.run(Shard(3, ())).shard == 3
    assert worker.computed == [3, 4]
    # In smaller batches it is something else.
    replica.run(Shard(3, ()), 0.5)
    assert worker.computed == [3, 4, 3]
    assert replica.start() == replica.start()
    assert worker.starts == 1


def test_a_connection_that_breaks_often_within_a_shard_leaves_threads_for_questions(
    replica: Replica, worker: Counting
) -> None:
    worker.may_go_on.clear()
    shards = [Shard(index, ()) for index in (3, 4)]
    # As many threads as the actor has.
    with ThreadPoolExecutor(ACTOR_OPTIONS["max_concurrency"]) as pool:
        calls: list[Future[Any]] = []
        try:
            for _ in range(10):
                calls.extend(pool.submit(replica.run, shard) for shard in shards)
                assert pool.submit(replica.is_only_storing).result(20) is False
                time.sleep(0.05)
        finally:
            worker.may_go_on.set()
        # What the driver waits for are the last two; the first two did the work.
        assert [call.result(20).shard for call in calls[-2:]] == [3, 4]
        assert calls[-1].result(20) == calls[1].result(20)
    assert sorted(worker.computed) == [3, 4]


def test_who_waits_for_what_fails_gets_its_error(replica: Replica, worker: Counting) -> None:
    worker.may_go_on.clear()
    worker.fails = 1
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(replica.run, Shard(3, ()))
        while not worker.computed:
            time.sleep(0.01)
        again = pool.submit(replica.run, Shard(3, ()))
        time.sleep(0.1)
        worker.may_go_on.set()
        for call in (first, again):
            with pytest.raises(Unexpected, match="KeyError: 'odd'"):
                call.result(20)
    assert replica.run(Shard(3, ())).shard == 3


def test_what_failed_is_done_again_and_few_answers_are_kept(replica: Replica, worker: Counting) -> None:
    worker.fails = 1
    with pytest.raises(Unexpected, match="KeyError: 'odd'"):
        replica.run(Shard(0, ()))
    for index in range(9):
        replica.run(Shard(index, ()))
    assert worker.computed == [0, *range(9)]
    replica.run(Shard(8, ()))
    replica.run(Shard(0, ()))
    assert worker.computed == [0, *range(9), 0]


def test_parts_are_encoded_while_the_next_shard_is_computed(
    replica: Replica, worker: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding, encode = threading.Event(), replica_module.encode_part

    def waiting(name: str, table: pa.Table, fingerprint: str, shard: int) -> bytes:
        if shard == 0:
            encoding.set()
            # Until the next one is computed, which the thread that computes could not be while it is here.
            for _ in range(2000):
                if 1 in worker.computed:
                    break
                time.sleep(0.01)
            assert 1 in worker.computed
            raise ValueError("not to be encoded")
        return encode(name, table, fingerprint, shard)

    monkeypatch.setattr(replica_module, "encode_part", waiting)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(replica.run, Shard(0, ()))
        assert encoding.wait(20)
        second = pool.submit(replica.run, Shard(1, ()))
        # What goes wrong there is a failure of that shard alone.
        with pytest.raises(Unexpected, match="not to be encoded"):
            first.result(30)
        assert second.result(30).bytes["rows"] > 0
    assert worker.computed == [0, 1]


def test_the_calibration_goes_with_each_shard_and_is_what_json_gives_back(replica: Replica, worker: Counting) -> None:
    worker.calibration = {"noise": {"sigma": 0.1, "of": (1, 2)}}
    found = replica.calibrate()
    assert found == replica.calibrate() == {"noise": {"sigma": 0.1, "of": [1, 2]}}
    assert worker.calibrations == 1
    replica.run(Shard(0, ()), 1.0, found)
    replica.run(Shard(1, ()))
    assert worker.told == [found]


@pytest.mark.parametrize("found", [{"sigma": object()}, {"sigma": b"1"}, {(1, 2): 3}, {"sigma": math.nan}])
def test_a_calibration_that_run_json_cannot_keep_is_refused(replica: Replica, worker: Counting, found: Any) -> None:
    worker.calibration = found
    with refused(ConfigurationError, says="cannot keep"):
        replica.calibrate()


@pytest.mark.parametrize("found", [None, [1, 2], "noise"])
def test_a_calibration_that_is_no_dictionary_is_refused_and_not_asked_for_again(
    replica: Replica, worker: Counting, found: Any
) -> None:
    worker.calibration = found
    with refused(ConfigurationError, says="in the place of a dictionary"):
        replica.calibrate()


def test_a_replica_ends_itself_when_the_cluster_says_that_it_is_dead_and_at_nothing_else() -> None:
    says = iter(["ALIVE", RuntimeError("no answer"), None, OSError("no route"), "ALIVE", "PENDING_CREATION", "DEAD"])
    asked: list[object] = []
    ended = threading.Event()

    def state() -> str | None:
        said = next(says)
        asked.append(said)
        assert not ended.is_set()
        if isinstance(said, Exception):
            raise said
        return said

    end_with_the_driver(state, ended.set, every_seconds=0.01)
    assert ended.wait(20)
    assert asked[-1] == "DEAD"
    assert len(asked) == 7

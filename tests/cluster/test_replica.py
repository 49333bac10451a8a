"""A replica as a plain object, and how it finds out that nobody wants it any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from neg_service.cluster.fleet import Absence, Member
from neg_service.cluster.gcs import end_with_the_driver
from neg_service.cluster.plan import Shard
from neg_service.cluster.ray_errors import Unexpected
from neg_service.cluster.replica import ACTOR_OPTIONS, Destination, Ready, Replica
from neg_service.cluster.silence import Silence
from neg_service.errors import ConfigurationError


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

    def start(self) -> Ready:
        self.starts += 1
        return Ready("nothing")

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


def test_the_calibration_goes_with_each_shard_and_is_what_json_gives_back(replica: Replica, worker: Counting) -> None:
    worker.calibration = {"noise": {"sigma": 0.1, "of": (1, 2)}}
    found = replica.calibrate()
    assert found == replica.calibrate() == {"noise": {"sigma": 0.1, "of": [1, 2]}}
    assert worker.calibrations == 1
    replica.run(Shard(0, ()), 1.0, found)
    replica.run(Shard(1, ()))
    assert worker.told == [found]


@pytest.mark.parametrize("found", [{"sigma": object()}, {"sigma": b"1"}, {(1, 2): 3}])
def test_a_calibration_that_run_json_cannot_keep_is_refused(replica: Replica, worker: Counting, found: Any) -> None:
    worker.calibration = found
    with pytest.raises(ConfigurationError, match="cannot keep"):
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


def member(heard: float) -> Member:
    """A replica that has a shard since then."""
    return Member(0, None, None, None, has_started=True, node="a", flying={object(): _Attempt()}, heard=heard)


class _Attempt:
    failures = 0


def test_a_question_goes_out_every_half_minute_and_its_answer_counts_only_after_a_long_silence() -> None:
    silence = Silence(stall_seconds=100)
    one = member(heard=1000)
    assert not silence.should_ask(one, 1029)
    assert silence.should_ask(one, 1031)
    one.asked = (object(), 1031)
    assert not silence.should_ask(one, 1090)
    assert silence.without_answer(one, 1090) is None
    assert silence.after_answer(one, False, 1090) is None
    assert not silence.should_ask(one, 1119)
    assert silence.should_ask(one, 1121)
    one.asked = (object(), 1121)
    assert "does not answer" in str(silence.without_answer(one, 1132))
    assert silence.after_answer(one, True, 1122) is None
    assert one.heard == 1122, "one that only stores is let be"
    one.heard = 1000
    assert "122 s and still computes" in str(silence.after_answer(one, False, 1122))


def test_before_anything_is_known_of_shards_no_silence_is_too_long() -> None:
    silence = Silence(None)
    one = member(heard=0)
    one.asked = (object(), 31)
    assert silence.without_answer(one, 10**6) is None
    assert silence.after_answer(one, False, 10**6) is None


@pytest.mark.parametrize(
    "busy",
    [
        {"has_started": True, "placed_at": 1.0, "calibrating": (object(), 1000.0)},
        {"starting": object(), "placed_at": 1000.0},
    ],
    ids=["calibrates", "loads"],
)
@pytest.mark.parametrize("stall_seconds", [None, 50.0])
def test_one_that_calibrates_or_loads_is_asked_for_the_sake_of_its_connection_alone(
    busy: dict[str, Any], stall_seconds: float | None
) -> None:
    silence = Silence(stall_seconds)
    one = Member(0, None, None, **{"starting": None, **busy})
    assert not silence.should_ask(one, 1029)
    assert silence.should_ask(one, 1031)
    one.asked = (object(), 1031)
    assert not silence.should_ask(one, 5000)
    # For how long that may take is not asked here.
    assert silence.without_answer(one, 5000) is None
    assert silence.after_answer(one, False, 5000) is None
    assert not silence.should_ask(one, 5029)
    assert silence.should_ask(one, 5031)
    one.absence = Absence(5031, "no answer", 5031)
    assert not silence.should_ask(one, 6000)


def test_who_has_nothing_to_do_or_no_node_is_not_asked() -> None:
    assert not Silence(None).should_ask(Member(0, None, None, None, has_started=True, placed_at=1.0), 5000)
    assert not Silence(None).should_ask(Member(0, None, object(), object()), 5000)

"""The driver on real Ray actors that fail, die, and recover."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from neg_service.cluster.actors import RayActors
from neg_service.cluster.driver import Driver, Outcome
from neg_service.cluster.failures import Attempt, Limits
from neg_service.cluster.gcs import UnreachableNodes
from neg_service.cluster.messages import Destination, LogStyle, Shard, ShardResult, WorkerInfo
from neg_service.cluster.observer import Observer
from neg_service.cluster.pool import ReplicaHandle, TimedCall
from neg_service.cluster.replica import ACTOR_OPTIONS, Replica
from neg_service.cluster.resources import ReplicaSize
from neg_service.cluster.scaling import Capacity
from neg_service.errors import ModelError, NegServiceError
from tests.faulty import FaultyWorker
from tests.refusals import refused

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
N_SHARDS = 12


class Counting(Observer):
    """Counts what is done, and keeps a calibration, or what another driver is said to have kept before."""

    def __init__(self, kept: dict[str, Any] | None = None, parts_in: Path | None = None) -> None:
        """No part may be in `parts_in` when the calibration is kept."""
        self.done: Counter[int] = Counter()
        self.found: list[dict[str, Any]] = []
        self._kept, self._parts_in = kept, parts_in

    def calibrated(self, found: dict[str, Any]) -> dict[str, Any]:
        assert self._parts_in is None or parts(self._parts_in) == []
        self.found.append(found)
        return self._kept or found

    def shard_done(self, result: ShardResult) -> None:
        self.done[result.shard] += 1


def run(
    worker: FaultyWorker,
    tmp_path: Path,
    replicas: int = 1,
    stall_seconds: float | None = None,
    observer: Counting | None = None,
    **more: Any,
) -> tuple[Outcome, Counter[int]]:
    observer = observer or Counting()
    actors = RayActors(worker, Destination(str(tmp_path), None, "f" * 12), ReplicaSize(0.5, 0, 0), replicas)
    shards = (Shard(index, ()) for index in range(N_SHARDS))
    return Driver(shards, actors, Limits(stall_seconds=stall_seconds), observer, **more).run(), observer.done


def parts(tmp_path: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in tmp_path.glob("rows/*.parquet"))


def rows(tmp_path: Path, column: str) -> list[Any]:
    return [row for path in tmp_path.glob("rows/*.parquet") for row in pq.read_table(path)[column].to_pylist()]


def test_a_quiet_run_does_each_shard_once(tmp_path: Path) -> None:
    outcome, done = run(FaultyWorker(), tmp_path, replicas=2)
    assert outcome == Outcome(N_SHARDS, {})
    assert done == Counter(range(N_SHARDS))
    assert parts(tmp_path) == list(range(N_SHARDS))


def test_what_fails_once_is_tried_again(tmp_path: Path) -> None:
    outcome, done = run(FaultyWorker(fails=frozenset({0, 5, 11}), once=str(tmp_path)), tmp_path)
    assert outcome == Outcome(N_SHARDS, {})
    assert done == Counter(range(N_SHARDS))


def test_what_no_driver_can_read_fails_its_shard_and_no_replica(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    outcome, done = run(FaultyWorker(odd=True, once=str(marks)), tmp_path)
    assert outcome == Outcome(N_SHARDS, {})
    assert done == Counter(range(N_SHARDS))
    for says in (
        "NeedsMore: 1 and 2",
        "Local: from nowhere",
        "TaskCancelledError",
        "SystemExit: 3",
        "ValueError: xxx",
    ):
        assert f"retry: {says}" in caplog.text
    assert "is lost" not in caplog.text
    # One process did it all.
    assert len(set(rows(tmp_path, "by"))) == 1


def test_a_run_is_calibrated_once_also_for_replicas_that_come_late(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    worker = FaultyWorker(kills=frozenset({2}), once=str(marks))
    observer = Counting(parts_in=tmp_path)
    outcome, _ = run(worker, tmp_path, calibration=None, observer=observer)
    assert outcome == Outcome(N_SHARDS, {})
    assert len(observer.found) == 1
    assert set(rows(tmp_path, "calibrated")) == {observer.found[0]["by"]}
    # The first replica calibrated and was lost; most was done by another.
    assert len(set(rows(tmp_path, "by"))) == 2


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_replica_that_fails_to_calibrate_leaves_it_to_another_and_what_was_noted_counts(
    tmp_path: Path, how: str
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    worker = FaultyWorker(calibrates=how, once=str(marks))
    # Another driver of the same run noted its own before.
    outcome, _ = run(worker, tmp_path, replicas=2, calibration=None, observer=Counting(kept={"by": 7}))
    assert outcome == Outcome(N_SHARDS, {})
    assert set(rows(tmp_path, "calibrated")) == {7}


def test_a_calibration_that_never_works_ends_the_run(tmp_path: Path) -> None:
    worker = FaultyWorker(calibrates="fail")
    with refused(NegServiceError, says="cannot be calibrated, 3 tries failed: NeedsMore: 1 and 2"):
        run(worker, tmp_path, calibration=None)
    assert parts(tmp_path) == []


def test_what_fails_always_is_quarantined_with_its_error_and_the_rest_is_done(tmp_path: Path) -> None:
    outcome, _ = run(FaultyWorker(fails=frozenset({3})), tmp_path)
    assert outcome.done == N_SHARDS - 1
    assert outcome.failed == {3: "OSError: shard 3 fails"}
    assert parts(tmp_path) == [index for index in range(N_SHARDS) if index != 3]


def test_a_non_finite_value_is_quarantined_at_once(tmp_path: Path) -> None:
    outcome, _ = run(FaultyWorker(not_finite=frozenset({2})), tmp_path)
    assert outcome.failed == {2: "prompt of shard 2: NaN"}
    assert outcome.done == N_SHARDS - 1


@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.faults), 2])
def test_a_killed_replica_is_replaced_and_nothing_is_lost(tmp_path: Path, replicas: int) -> None:
    outcome, done = run(FaultyWorker(kills=frozenset({1, 6}), once=str(tmp_path)), tmp_path, replicas)
    assert outcome == Outcome(N_SHARDS, {})
    assert done == Counter(range(N_SHARDS))
    # A shard that was lost with its replica is tried again with half the batch: memory may have been the reason.
    table = pq.read_table(tmp_path / "rows" / "shard-000001.parquet")
    assert table["batch_scale"].to_pylist() == [0.5]


@pytest.mark.faults
@pytest.mark.slow
def test_a_shard_that_kills_every_replica_takes_no_other_shard_with_it(tmp_path: Path) -> None:
    outcome, _ = run(FaultyWorker(kills=frozenset({4})), tmp_path, replicas=2)
    assert list(outcome.failed) == [4]
    assert "lost" in outcome.failed[4]
    assert outcome.done == N_SHARDS - 1
    assert parts(tmp_path) == [index for index in range(N_SHARDS) if index != 4]


def test_a_wrong_configuration_stops_at_once_as_itself(tmp_path: Path) -> None:
    with refused(ModelError, says="the wrong model"):
        run(FaultyWorker(start_error="the wrong model"), tmp_path)
    assert parts(tmp_path) == []


def test_replicas_that_die_at_the_start_end_the_run_instead_of_going_on_for_ever(tmp_path: Path) -> None:
    with refused(NegServiceError, says="no replica can be started, 3 tries failed"):
        run(FaultyWorker(start_error="kill"), tmp_path)


def test_a_destination_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("a file where the folder should be")
    with refused(NegServiceError, says=r"storage\.uri"):
        run(FaultyWorker(), tmp_path)


def test_a_run_in_which_everything_fails_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neg_service.cluster.failures.MOST_QUARANTINED_IN_A_ROW", 4)
    with refused(NegServiceError, says="4 shards in a row failed and none was done, the last with: prompt of"):
        run(FaultyWorker(not_finite=frozenset(range(N_SHARDS))), tmp_path)


def test_the_worker_is_made_in_the_replica_and_factories_travel(tmp_path: Path) -> None:
    outcome, _ = run(partial(FaultyWorker, seconds=0.0), tmp_path)  # type: ignore[arg-type]
    assert outcome.done == N_SHARDS
    assert rows(tmp_path, "made_by") == rows(tmp_path, "by")


def test_a_replica_that_computes_for_ever_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    worker = FaultyWorker(hangs=frozenset({3}), once=str(marks))
    outcome, done = run(worker, tmp_path, replicas=2, stall_seconds=2)
    assert outcome.done == N_SHARDS
    assert "and still computes" in caplog.text
    assert all(count == 1 for count in done.values())


@pytest.mark.faults
def test_what_takes_long_is_not_taken_for_a_stall(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Each shard takes a small part of the silence that is borne, all of them together longer.
    outcome, _ = run(FaultyWorker(seconds=1.0), tmp_path, stall_seconds=10)
    assert outcome.done == N_SHARDS
    assert "is lost" not in caplog.text


class NoActors:
    """A cluster that has none to launch."""

    unreachable_nodes = UnreachableNodes()

    def launch(self) -> Any:
        raise AssertionError

    def end(self, actor: Any) -> None:
        """Nothing is there."""

    def capacity(self) -> Capacity:
        return Capacity(0)

    def is_node_lost(self, actor: Any, node: str) -> bool:
        return False


def test_an_answer_that_comes_with_the_shard_it_asked_for_is_no_shard() -> None:
    driver = Driver(iter(()), NoActors())
    probe, ended = ray.put(False), ray.put(ShardResult(0, 1))
    in_flight = {ended: Attempt(Shard(0, ()))}
    replica = ReplicaHandle(0, None, None, None, has_started=True, in_flight=in_flight, probe=TimedCall(probe, 0.0))
    # Both had arrived when the driver looked.
    driver._settle(replica, ended)
    driver._settle(replica, probe)
    assert driver.run() == Outcome(1, {})


@pytest.mark.parametrize("call", ["calibrate_call", "probe"])
def test_a_replica_that_dies_as_it_calibrates_counts_whichever_call_tells_it(call: str) -> None:
    driver = Driver(iter(()), NoActors(), calibration=None)

    def die(number: int) -> None:
        timed: dict[str, Any] = {name: TimedCall(object(), 0.0) for name in ("calibrate_call", "probe")}
        replica = ReplicaHandle(number, None, None, None, has_started=True, node="a", **timed)
        driver._pool.replicas.append(replica)
        driver._call_failed(replica, timed[call].reference, ray.exceptions.ActorDiedError())
        assert driver._pool.replicas == []

    die(0)
    die(1)
    with refused(NegServiceError, says="cannot be calibrated, 3 tries failed"):
        die(2)


def test_answers_that_are_lost_on_the_way_cost_no_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = iter(range(10**6))

    def get(reference: Any) -> Any:
        """As over a network that loses every other answer of the first twenty."""
        answer = ray.get(reference)
        if next(answers) in range(0, 20, 2):
            raise ray.exceptions.ActorUnavailableError("connection reset by peer", None)
        return answer

    monkeypatch.setattr("neg_service.cluster.driver.ray", SimpleNamespace(get=get, wait=ray.wait))
    outcome, done = run(FaultyWorker(), tmp_path, calibration=None)
    assert outcome == Outcome(N_SHARDS, {})
    assert done == Counter(range(N_SHARDS))
    assert caplog.text.count("cannot be reached") > 3
    assert "is lost" not in caplog.text
    assert len(set(rows(tmp_path, "by"))) == 1
    assert set(rows(tmp_path, "calibrated")) == set(rows(tmp_path, "by"))


def test_the_module_of_the_actor_imports_no_torch() -> None:
    """Ray imports it in two threads at once, which torch does not survive."""
    code = "import sys, neg_service.cluster.replica; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Talking:
    """A worker that says something of every shard."""

    def start(self) -> WorkerInfo:
        return WorkerInfo("cpu")

    def compute(self, shard: Shard, batch_scale: float) -> dict[str, pa.Table]:
        logging.getLogger("neg_service.talking").info("at work")
        return {"words": pa.table({"number": [shard.index]})}


def test_a_replicas_own_log_says_run_replica_and_shard(tmp_path: Path) -> None:
    store = Destination(str(tmp_path), None, "a")
    actor = (
        ray.remote(Replica).options(num_cpus=1, **ACTOR_OPTIONS).remote(Talking, store, LogStyle("json", "a-run", 4))
    )
    pid = ray.get(actor.start.remote()).pid
    for index in (0, 7):
        ray.get(actor.run.remote(Shard(index, ())))
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    # What a process writes reaches its file at once; Ray names the file after the process.
    (file,) = folder.glob(f"worker-*-{pid}.err")
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]
    said = [line for line in lines if line["message"] == "at work"]
    assert [(line["run"], line["replica"], line["shard"]) for line in said] == [("a-run", 4, 0), ("a-run", 4, 7)]
    ray.kill(actor)

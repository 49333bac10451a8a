"""What a run tells a person, an operator and itself: here, what stands in its run.json."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from neg_service.cluster.failures import Action
from neg_service.cluster.messages import ReplicaInfo, Shard, ShardResult, WorkerInfo
from neg_service.cluster.metrics import Counts, RunMetrics
from neg_service.cluster.observer import Observer, RunNotes, RunObserver
from neg_service.cluster.progress import Progress
from neg_service.storage.run import RUN_FILE, RunDirectory, note, write_or_match
from neg_service.storage.stores import open_store

IDENTITY = {"plan": {"shards": 2}}


class Run:
    """A run directory and who watches the run."""

    def __init__(self, place: Path, calibration: dict[str, Any] | None) -> None:
        self.place = place
        self.store = open_store(str(place))
        self.directory: RunDirectory = self.begin()
        self.notes = RunNotes(self.directory, self.begin)
        self.progress = Progress(8, 0, 0.0, io.StringIO())
        self.observer = RunObserver(
            self.directory, self.notes, self.progress, RunMetrics("run", 2, 1, 1.0), calibration
        )

    def begin(self) -> RunDirectory:
        return write_or_match(self.store, IDENTITY, {"rows": pa.schema([("shard", pa.int64())])}, {"began": "now"})

    @property
    def about(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.place / RUN_FILE).read_text())["about"]
        return found


READY = ReplicaInfo(1, "here", WorkerInfo("a CPU", "shared prefix"))
OTHER = ReplicaInfo(2, "there", WorkerInfo("a GPU", "full sequence"))


def test_who_only_listens_changes_no_calibration() -> None:
    heard = Observer()
    heard.replica_ready(READY)
    heard.shard_done(ShardResult(0, 1))
    heard.shard_undone(Action.RETRY)
    heard.shard_quarantined(Shard(0, ()), "odd", 3)
    heard.counted(Counts(0, 0, 0, 0, 0, 0))
    assert heard.calibrated({"sigma": 0.1}) == {"sigma": 0.1}


def test_the_first_replica_says_what_the_run_runs_on(tmp_path: Path) -> None:
    run = Run(tmp_path, calibration={})
    run.observer.replica_ready(READY)
    run.observer.replica_ready(OTHER)
    assert run.about == {"began": "now", "engine": "shared prefix", "runs_on": "a CPU", "calibration": {}}


def test_what_multiplies_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, calibration={})
    run.observer.replica_ready(ReplicaInfo(1, "here", WorkerInfo("a CPU", "kv_cache", {"name": "onednn", "gain": 2.0})))
    assert run.about["cpu_product"] == {"name": "onednn", "gain": 2.0}


def test_what_weights_were_made_from_is_kept(tmp_path: Path) -> None:
    run, made = Run(tmp_path, calibration={}), {"method": "fp8", "tensors": 14, "activations": "not quantised"}
    run.observer.replica_ready(ReplicaInfo(1, "here", WorkerInfo("a CPU", "kv_cache", None, made)))
    assert run.about["dequantised"] == made


def test_what_is_to_be_calibrated_is_kept_with_what_was_found_before(tmp_path: Path) -> None:
    run = Run(tmp_path, calibration=None)
    run.observer.replica_ready(READY)
    assert run.about == {"began": "now"}
    # Another driver of the same run was refused, and has taken run.json with it.
    for file in tmp_path.glob("run*.json"):
        file.unlink()
    assert run.observer.calibrated({"sigma": 0.1}) == {"sigma": 0.1}
    assert run.about == {"began": "now", "engine": "shared prefix", "runs_on": "a CPU", "calibration": {"sigma": 0.1}}


def test_the_calibration_that_another_driver_kept_first_is_the_runs(tmp_path: Path) -> None:
    run = Run(tmp_path, calibration=None)
    note(run.store, {"calibration": {"sigma": 7}})
    assert run.observer.calibrated({"sigma": 0.1}) == {"sigma": 7}
    assert run.notes.found["calibration"] == {"sigma": 7}


def test_a_shard_that_is_given_up_leaves_why_and_what_is_done_counts(tmp_path: Path) -> None:
    run = Run(tmp_path, calibration={})
    run.observer.shard_quarantined(Shard(1, ()), "NaN", 3)
    assert run.directory.failed() == {1: {"shard": 1, "error": "NaN", "attempts": 3}}
    with run.observer.until_end():
        run.observer.shard_done(ShardResult(0, 4, {"rows": 10}, computed_seconds=2.0))
    assert (run.progress.n_now, run.progress.bytes, run.progress.computed_seconds) == (4, 10, 2.0)


def test_the_clock_stops_when_the_driver_ends_also_with_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path, calibration={})
    with pytest.raises(RuntimeError), run.observer.until_end():
        raise RuntimeError("odd")
    assert run.progress.seconds == run.progress.seconds

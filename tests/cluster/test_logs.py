"""Logs as JSON objects, in processes of their own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from neg_service.cluster.messages import Destination, LogStyle, Shard, WorkerInfo
from neg_service.cluster.replica import ACTOR_OPTIONS, Replica

CODE = """
import logging
from neg_service.cluster.logs import add_to_logs, log_to_stderr, logging_shard
log_to_stderr("json", replica=3)
log = logging.getLogger("neg_service.test")
log.info("before")
add_to_logs(run="a-run")
with logging_shard(7):
    log.warning("with %s", "two\\nlines")
log.info("driver", extra={"replica": 5})
"""


def test_each_line_is_an_object_that_says_what_it_is_about() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, during, after = map(json.loads, done.stderr.splitlines())
    assert (before["message"], before["level"], before["logger"]) == ("before", "INFO", "neg_service.test")
    assert before["replica"] == 3
    assert "run" not in before
    assert "shard" not in before
    assert (during["run"], during["shard"], during["message"]) == ("a-run", 7, "with two\nlines")
    assert (after["run"], after["replica"]) == ("a-run", 5)
    assert "shard" not in after
    assert before["time"].startswith("20")


class Talking:
    """A worker that says something of every shard."""

    def start(self) -> WorkerInfo:
        return WorkerInfo("cpu")

    def compute(self, shard: Shard, batch_scale: float) -> dict[str, pa.Table]:
        logging.getLogger("neg_service.talking").info("at work")
        return {"words": pa.table({"number": [shard.index]})}


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
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

"""What Ray exports while a scan runs, read over HTTP as Prometheus does, against what the scan really did."""

from __future__ import annotations

import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import ray

from neg_service.cluster import metrics
from neg_service.cluster.failures import Action
from neg_service.cluster.messages import Destination, LogStyle, Shard
from neg_service.cluster.metrics import Counts, RunMetrics
from neg_service.cluster.prepare import prepare
from neg_service.cluster.replica import ACTOR_OPTIONS, Replica
from neg_service.cluster.scan import run
from neg_service.config import ClusterConfig, DatasetConfig, JobConfig, ModelConfig, ScanConfig, StorageConfig
from neg_service.errors import StorageError
from tests.faulty import OftenHeardOf

PROMPTS, SHARD = 12, 3
# Ray's agents collect every three seconds here, and every ten by default; a gauge stays for twice as long.
REPORT = {"metrics_report_interval_ms": 3000}


@pytest.fixture(scope="module")
def reporting_ray() -> Iterator[str]:
    """A Ray of one CPU, and where its node exports metrics."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        _metrics_export_port=port,
        address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False,
        _system_config=REPORT,
    )  # fmt: skip
    yield f"http://127.0.0.1:{port}/metrics"
    ray.shutdown()


def scraped(address: str, run_name: str) -> dict[str, float]:
    """The metrics of a run: the name, with a state or the like, and the value; none until Ray's agent is up."""
    try:
        with urllib.request.urlopen(address, timeout=10) as reply:
            lines = reply.read().decode().splitlines()
    except urllib.error.URLError:
        return {}
    found = {}
    for line in lines:
        name, _, rest = line.partition("{")
        if name.startswith("ray_neg_") and f'run="{run_name}"' in rest:
            state = re.search(r'(?:state|action|le)="([^"]+)"', rest)
            found[name.removeprefix("ray_neg_") + (f"/{state[1]}" if state else "")] = float(rest.rsplit(" ", 1)[1])
    return found


def test_metrics_count_what_was_done(reporting_ray: str, tiny_directory: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.jsonl"
    rows = [f'{{"prompt": "w{i} w9", "targets": [" w7", " w8"], "answer": " w7"}}' for i in range(10, 10 + PROMPTS)]
    words.write_text("\n".join(rows))
    prepared = prepare(
        ScanConfig(
            model=ModelConfig(source=str(tiny_directory)),
            dataset=DatasetConfig(source=str(words)),
            cluster=ClusterConfig(replicas=1, cpus_per_replica=1),
            storage=StorageConfig(uri=str(tmp_path / "results")),
            job=JobConfig(shard_size=SHARD),
        )
    )
    began = time.time()
    summary = run(prepared, stay_connected=True)
    name = prepared.uri.rsplit("/", 1)[1]
    until = time.monotonic() + 300
    found = scraped(reporting_ray, name)
    # A gauge goes soon after nobody sets it any more: what comes last is looked at as soon as it is there.
    while "ended_timestamp_seconds_total" not in found and time.monotonic() < until:
        time.sleep(0.3)
        found |= scraped(reporting_ray, name)
    neurons = prepared.info.n_layers * prepared.info.n_neurons
    assert found["prompts_total"] == PROMPTS == summary.n_prompts_now
    assert found["neurons_total"] == PROMPTS * neurons
    assert found["rows_total"] == 2 * PROMPTS
    assert found["stored_bytes_total"] == summary.bytes_now
    assert found["shard_seconds_count"] == PROMPTS / SHARD
    assert {state: found[f"shards/{state}"] for state in ("done", "running", "failed", "waiting")} == {
        "done": PROMPTS / SHARD, "running": 0, "failed": 0, "waiting": 0,
    }  # fmt: skip
    assert (found["replicas/ready"], found["replicas/starting"]) == (0, 0)
    # The driver was at work until it ended, and says when.
    assert found["seconds_left"] == 0
    assert began <= found["heartbeat_timestamp_seconds"] <= found["ended_timestamp_seconds_total"] <= time.time()
    assert {found[f"shard_failures_total/{action.value}"] for action in Action} == {0}
    # Of a shard whose seconds are in one bucket all larger ones tell, too.
    counted = [found[f"shard_seconds_bucket/{bound}"] for bound in ("0.1", "1", "1000", "+Inf")]
    assert counted == sorted(counted)
    assert counted[2:] == [PROMPTS / SHARD] * 2
    assert began <= found["last_shard_timestamp_seconds"] <= found["heartbeat_timestamp_seconds"]
    # One replica of one CPU held it from its start on, and computed for a part of that.
    assert 0 < found["computed_cpu_seconds_total"] < found["cpu_seconds_total"] < time.time() - began
    assert found["gpu_seconds_total"] == 0
    assert found["build_info"] == 1


def test_what_replicas_hold_is_counted_as_time_passes_whatever_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    shown = RunMetrics("cost", 9, 1, 1.0, cpus_a_replica=2.0, gpus_a_replica=0.25)

    def after(seconds: float, *, ready: int, starting: int, placed: int) -> None:
        now[0] += seconds
        shown.show(Counts(0, 0, 0, ready, starting, placed))

    # Nothing is known before the first time; one loads its model, and one waits for room and holds nothing.
    after(50, ready=0, starting=2, placed=1)
    after(10, ready=1, starting=1, placed=2)
    after(5, ready=0, starting=0, placed=0)
    after(100, ready=0, starting=0, placed=0)
    # 10 s of one replica and 5 s of two.
    assert shown._totals["neg_cpu_seconds_total"] == 2.0 * 20
    assert shown._totals["neg_gpu_seconds_total"] == 0.25 * 20


@pytest.mark.infra
def test_of_an_ended_run_one_number_stays(reporting_ray: str) -> None:
    shown = RunMetrics("leaves", 9, 1, 1.0)
    shown.show(Counts(0, 0, 0, 0, 0, 0))
    shown.end()
    awaited(reporting_ray, "leaves", lambda found: {"prompts_total", "ended_timestamp_seconds_total"} <= found.keys())
    left = awaited(reporting_ray, "leaves", lambda found: found.keys() == {"ended_timestamp_seconds_total"}, 60)
    assert left.keys() == {"ended_timestamp_seconds_total"}


def test_a_run_that_ends_twice_in_one_process_says_when_it_ended_last(reporting_ray: str) -> None:
    ends = []
    for _ in range(2):
        RunMetrics("twice", 1, 1, 1.0).end()
        ends.append(time.time())
    found = awaited(reporting_ray, "twice", lambda found: found.get("ended_timestamp_seconds_total", 0) > ends[0])
    assert ends[0] <= found["ended_timestamp_seconds_total"] <= ends[1]


ENDS: dict[str, tuple[BaseException | None, bool]] = {
    "all done": (None, True),
    "error that is told": (StorageError("storage.uri=s3://b: no answer"), True),
    "Ctrl-C": (KeyboardInterrupt(), True),
    "stopped by a signal": (SystemExit(15), False),
    "fault of its own": (RuntimeError("how?"), False),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_driver_says_that_it_ended_only_where_somebody_knows_why(name: str) -> None:
    error, is_told = ENDS[name]
    with suppress(BaseException), metrics.RunMetrics(name, 1, 1, 1.0).until_end():
        if error is not None:
            raise error
    assert (name in metrics._ENDED) == is_told


def test_a_driver_is_heard_of_while_it_waits_for_storage_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []
    monkeypatch.setattr(metrics, "_REPEAT_SECONDS", 0.01)
    shown = RunMetrics("waits", 9, 1, 1.0)
    monkeypatch.setattr(shown._heard, "set", heard.append)
    with shown.waits():
        time.sleep(0.1)
        assert not heard, "nothing is known yet"
        counts = Counts(done=2, running=1, failed=0, ready_replicas=1, starting_replicas=0, placed_replicas=1)
        shown.show(counts)
        until = time.monotonic() + 60
        while len(heard) < 3 and time.monotonic() < until:
            time.sleep(0.01)
    n_heard = len(heard)
    assert n_heard >= 3
    time.sleep(0.1)
    assert len(heard) == n_heard


def test_waiting_for_storage_shows_while_the_store_is_away(reporting_ray: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        to = Destination("s3://runs/x", f"http://127.0.0.1:{mute.getsockname()[1]}", "f", retry_timeout=600)
        environment = {"env_vars": {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}}
        actor = ray.remote(Replica).options(num_cpus=1, runtime_env=environment, **ACTOR_OPTIONS)
        replica = actor.remote(OftenHeardOf(), to, LogStyle(run="away"))
        try:
            ray.get(replica.start.remote())
            stored = replica.run.remote(Shard(0, ()))
            first = awaited(reporting_ray, "away", lambda found: found.get("storage_wait_seconds_total", 0) > 0)
            before = first["storage_wait_seconds_total"]
            found = awaited(reporting_ray, "away", lambda found: found["storage_wait_seconds_total"] > before + 1)
            # It goes on while nothing has been stored, and nobody has had a word of it.
            assert found["storage_wait_seconds_total"] > before + 1
            assert not ray.wait([stored], timeout=0)[0]
        finally:
            ray.kill(replica)


def awaited(
    address: str, run_name: str, is_there: Callable[[dict[str, float]], bool], seconds: float = 300
) -> dict[str, float]:
    """The metrics of a run as soon as they are as expected."""
    until = time.monotonic() + seconds
    while not is_there(found := scraped(address, run_name)) and time.monotonic() < until:
        time.sleep(0.3)
    return found

"""What Ray exports while a scan runs, read over HTTP as Prometheus does, against what the scan really did."""

from __future__ import annotations

import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from neg_service.cluster.prepare import prepare
from neg_service.cluster.scan import run
from neg_service.config import ClusterConfig, DatasetConfig, JobConfig, ModelConfig, ScanConfig, StorageConfig

PROMPTS, SHARD = 12, 3
# Ray's agents collect every second here, and every ten by default.
REPORT = {"metrics_report_interval_ms": 1000}


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
    """The metrics of a run: the name, with the state if there is one, and the value; none until Ray's agent is up."""
    try:
        with urllib.request.urlopen(address, timeout=10) as reply:
            lines = reply.read().decode().splitlines()
    except urllib.error.URLError:
        return {}
    found = {}
    for line in lines:
        name, _, rest = line.partition("{")
        if name.startswith("ray_neg_") and f'run="{run_name}"' in rest:
            state = re.search(r'state="(\w+)"', rest)
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
    summary = run(prepared, stay_connected=True)
    name = prepared.uri.rsplit("/", 1)[1]
    until = time.monotonic() + 60
    found = scraped(reporting_ray, name)
    while found.get("shards/done") != PROMPTS / SHARD and time.monotonic() < until:
        time.sleep(1)
        found = scraped(reporting_ray, name)
    neurons = prepared.info.n_layers * prepared.info.n_neurons
    assert found["prompts_total"] == PROMPTS == summary.n_prompts_now
    assert found["neurons_total"] == PROMPTS * neurons
    assert found["rows_total"] == 2 * PROMPTS
    assert found["stored_bytes_total"] == summary.bytes_now
    assert found["shard_seconds_count"] == PROMPTS / SHARD
    assert {state: found[f"shards/{state}"] for state in ("done", "running", "set_aside", "waiting")} == {
        "done": PROMPTS / SHARD, "running": 0, "set_aside": 0, "waiting": 0,
    }  # fmt: skip
    assert (found["replicas/ready"], found["replicas/starting"]) == (0, 0)
    assert "shard_failures_total" not in found

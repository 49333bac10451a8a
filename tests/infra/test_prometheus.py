"""Prometheus reads a scan on two nodes: each panel has data, and each alert is made to fire by what it is there for."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import neg_service
from infra.s3.server import BUCKET, Server, server_on
from tests.clusters import OwnCluster, eventually, own_cluster
from tests.e2e.commands import Running
from tests.infra.prometheus import INFRA, Prometheus, prometheus, shortened
from tests.s3 import acting_as

pytestmark = [
    pytest.mark.infra,
    pytest.mark.ray,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]
N_PROMPTS = 1000
# Panels that have nothing to show here, and why.
NO_DATA = {"GPUs in use": "Ray exports it of nodes with a GPU alone"}
ENDED = "ray_neg_ended_timestamp_seconds_total"


@dataclass
class Watched:
    """A cluster, its store, who watches it, and what a scan on it is asked for with."""

    cluster: OwnCluster
    store: Server
    seen: Prometheus
    arguments: list[str]
    nodes: list[dict[str, str]]

    def scan(self, *more: str) -> Running:
        """`python -m jobs.scan`."""
        environment = {**self.cluster.environment, "RAY_ADDRESS": self.cluster.address}
        return Running("scan", *self.arguments, *more, env=environment)

    def fires(self, alert: str, run: str, seconds: float = 240) -> str:
        """What an alert says as soon as it fires for a run; shown, since it stands in the runbook."""
        began = time.monotonic()
        summary: str = eventually(lambda: self.seen.firing().get((alert, run)), seconds)
        sys.stdout.write(f"\n{alert} after {time.monotonic() - began:.0f} s: {summary}\n")
        return summary

    def falls_silent(self, alert: str, run: str, seconds: float = 120) -> None:
        """Wait until it fires no more."""
        eventually(lambda: (alert, run) not in self.seen.firing(), seconds)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, tiny_directory: Path) -> Iterator[Watched]:
    """Two nodes of one CPU beside a head without any, an S3 server, and Prometheus."""
    place = tmp_path_factory.mktemp("watched")
    words = place / "words.jsonl"
    rows = (
        {"prompt": f"w{10 + i % 60} w{10 + i // 60} w9", "targets": [" w7"], "answer": " w7"} for i in range(N_PROMPTS)
    )
    words.write_text("\n".join(map(json.dumps, rows)))
    store = server_on(place / "s3")
    store.start()
    try:
        with acting_as(store.writer), own_cluster() as cluster:
            nodes = [cluster.add(num_cpus=1) for _ in range(2)]
            (place / "prometheus").mkdir()
            eventually(cluster.discovery.exists, 60)
            with prometheus(place / "prometheus", cluster.discovery) as seen:
                arguments = [
                    f"model.source={tiny_directory}", f"dataset.source={words}", f"storage.uri=s3://{BUCKET}/watched",
                    f"storage.endpoint_url={store.endpoint_url}", "job.shard_size=1", "job.progress_seconds=1",
                    "cluster.cpus_per_replica=1", "cluster.replicas.max=2", "measure.name=tests.slow_neurgrad",
                ]  # fmt: skip
                yield Watched(cluster, store, seen, arguments, nodes)
    finally:
        store.stop()


def test_panels_show_and_alerts_fire_for_a_scan_that_meets_with_everything(watched: Watched) -> None:
    cluster, seen = watched.cluster, watched.seen
    scan = watched.scan()
    uri = scan.wait_for(r"results: (\S+)")[1]
    run = uri.rsplit("/", 1)[1]
    eventually(lambda: value(seen, f'ray_neg_shards{{run="{run}",state="done"}}') > 100)
    assert_jobs_find_the_nodes(seen)
    assert {panel["ip"] for panel in (one["metric"] for one in seen.ask("ray_node_mem_used"))}
    eventually(lambda: not silent_panels(seen, run), 60)
    assert value(seen, f'sum(ray_neg_replicas{{run="{run}",state="ready"}})') == 2
    assert not {name for name, of in seen.firing() if of == run}

    # Shards that are under way and do not end.
    cluster.gate.touch()
    assert watched.fires("NegPaceCollapsed", run).startswith(f"{run} goes at ")
    watched.fires("NegNoProgress", run)
    cluster.gate.unlink()
    watched.falls_silent("NegNoProgress", run)

    # A store that is away.
    watched.store.stop()
    assert "of their time on storage alone" in watched.fires("NegWaitsForStorage", run)
    watched.store.start()

    # Nodes that are gone, and others that come.
    for node in watched.nodes:
        cluster.kill(node)
    watched.fires("NegNoReplica", run)
    for _ in range(2):
        cluster.add(num_cpus=1)
    watched.falls_silent("NegNoReplica", run)

    # Shards that fail, of which some are given up.
    fail = Path(f"{cluster.gate}.fail")
    fail.touch()
    eventually(lambda: scan.output.count("failed on replica") > 12, 300)
    fail.unlink()
    watched.fires("NegShardsFail", run)
    watched.fires("NegShardsSetAside", run)
    watched.falls_silent("NegWaitsForStorage", run)

    # A driver that is killed; what it exported goes, and what is left to do is told on.
    scan.kill()
    left = value(seen, f'neg:shards_left{{run="{run}"}}')
    watched.fires("NegDriverGone", run)
    # Nothing of it stays: all that is told from here on is what Prometheus remembers.
    eventually(lambda: not exported(cluster, run), 120)
    summary = watched.fires("NegRunUnfinished", run)
    assert abs(int(re.findall(r"with (\d+) shards", summary)[0]) - left) < 60
    watched.falls_silent("NegDriverGone", run)

    # The same command goes on, to the end.
    again = watched.scan()
    watched.falls_silent("NegRunUnfinished", run)
    assert again.finish() == 0, again.output
    with acting_as(watched.store.writer):
        assert len(neg_service.open_run(uri, endpoint_url=watched.store.endpoint_url).done()) == N_PROMPTS
    assert_an_ended_run_leaves(watched, run)
    assert_rules_ask_for_what_there_was(seen)


def assert_an_ended_run_leaves(watched: Watched, run: str) -> None:
    """Its numbers go, nothing fires for it, and what its drivers told adds up."""
    seen, cluster = watched.seen, watched.cluster
    eventually(lambda: seen.ask(f'{ENDED}{{run="{run}"}}'), 120)
    began = time.monotonic()
    eventually(lambda: exported(cluster, run) == {ENDED}, 120)
    sys.stdout.write(f"\nall but one number of the ended run is gone after {time.monotonic() - began:.0f} s\n")
    time.sleep(60)
    assert not {name for name, of in seen.firing() if of == run}
    # Each driver's numbers count from 0: over both they give what the whole run took.
    prompts = f'sum(max_over_time(ray_neg_prompts_total{{run="{run}"}}[1h]))'
    assert N_PROMPTS * 0.97 <= value(seen, prompts) <= N_PROMPTS + 20
    assert value(seen, f'sum(max_over_time(ray_neg_cpu_seconds_total{{run="{run}"}}[1h]))') > N_PROMPTS * 0.25


def assert_jobs_find_the_nodes(seen: Prometheus) -> None:
    """The head and two nodes by Ray's file; of two pods the one whose port is that of metrics."""
    eventually(lambda: sum(one["labels"]["job"] == "ray" and one["health"] == "up" for one in seen.targets()) >= 3, 30)
    (pod,) = (one["labels"] for one in seen.targets() if one["labels"]["job"] == "ray-pods")
    assert (pod["cluster"], pod["pod"]) == ("neg", "pod-metrics")
    assert seen.dropped() == 1


def silent_panels(seen: Prometheus, run: str) -> set[str]:
    """Panels of which a question has no answer, or none about the run."""
    silent = set()
    for panel in json.loads((INFRA / "grafana" / "dashboard.json").read_text())["panels"]:
        for target in panel.get("targets", []):
            asked = target["expr"].replace("[$__range]", "[1h]").replace("$run", re.escape(run).replace("\\", "\\\\"))
            found = [one for one in seen.ask(shortened(asked)) if one["value"][1] != "NaN"]
            if not found:
                silent.add(panel["title"])
    return silent - set(NO_DATA)


def assert_rules_ask_for_what_there_was(seen: Prometheus) -> None:
    """Each rule is evaluated without an error, and each metric in it was exported in the last hour."""
    for rule in seen.rules():
        assert rule["health"] == "ok", rule
        for name in set(re.findall(r"\b(?:ray_neg|neg:)\w+", rule["query"])):
            assert seen.ask(f"last_over_time({name}[1h])"), f"{name}, of {rule['name']}"


def exported(cluster: OwnCluster, run: str) -> set[str]:
    """The metrics of a run that any node exports now."""
    (of_ray,) = json.loads(cluster.discovery.read_text())
    found = set()
    for target in of_ray["targets"]:
        try:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as reply:
                lines = reply.read().decode().splitlines()
        except OSError:
            # A node that is gone, of which the file does not know yet.
            continue
        found |= {line.partition("{")[0] for line in lines if line.startswith("ray_neg") and f'run="{run}"' in line}
    return found


def value(seen: Prometheus, expression: str) -> float:
    """The one value of an expression; 0 where there is none."""
    found: list[dict[str, Any]] = seen.ask(expression)
    return float(found[0]["value"][1]) if found else 0.0

"""Jobs on clusters of several nodes: submitted through the job server, with nodes that come, go, and are taken away.

Every cluster has token authentication on. Shards take a quarter of a second each, so that there is time for things to
happen. What takes longest of it is run by `make test-faults`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

import neg_service
from neg_service.storage.reader import Run
from tests.clusters import TOKEN, OwnCluster, eventually, own_cluster
from tests.e2e.commands import Running

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[OwnCluster]:
    """A head without CPUs, and a node of one."""
    with own_cluster() as own:
        own.add(num_cpus=1)
        yield own


@pytest.fixture(scope="module")
def two_nodes(cluster: OwnCluster) -> None:
    """From here on, a second node of one CPU."""
    cluster.add(num_cpus=1)


def arguments(model: Path, place: Path, n_prompts: int, name: str) -> list[str]:
    """A scan of so many prompts, one in each shard."""
    words = place / f"{name}.jsonl"
    words.write_text(
        "\n".join(
            json.dumps({"prompt": f"w{10 + i % 40} w{10 + i // 40} w9", "targets": [" w7", " w8"], "answer": " w7"})
            for i in range(n_prompts)
        )
    )
    return [
        f"model.source={model}", f"dataset.source={words}", f"storage.uri={place / 'results'}", f"job.name={name}",
        "job.shard_size=1", "job.progress_seconds=1", "cluster.cpus_per_replica=1", "measure.name=tests.slow_neurgrad",
    ]  # fmt: skip


def submitted(cluster: OwnCluster, *arguments: str) -> Running:
    """`python -m jobs.submit` as a person runs it."""
    return Running("submit", "--address", cluster.jobs, *arguments, env=cluster.environment)


def ray_job(cluster: OwnCluster, *arguments: str) -> str:
    """A command of Ray's own about jobs."""
    command = ["ray", "job", *arguments[:1], "--address", cluster.jobs, *arguments[1:]]
    return subprocess.run(command, env=cluster.environment, check=True, capture_output=True, text=True).stdout


def told(cluster: OwnCluster, path: str = "") -> Any:
    """What the job server answers, without the seconds that a command takes to ask it."""
    asked = urllib.request.Request(f"{cluster.jobs}/api/jobs/{path}", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(asked, timeout=60) as reply:
        return json.load(reply)


def stop(cluster: OwnCluster, name: str) -> None:
    """What `ray job stop` asks, without the seconds that the command takes."""
    url = f"{cluster.jobs}/api/jobs/{name}/stop"
    asked = urllib.request.Request(url, method="POST", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(asked, timeout=60) as reply:
        assert json.load(reply)["stopped"]


def running(cluster: OwnCluster, what: str) -> list[psutil.Process]:
    """Processes of the cluster with `what` in their command."""
    found = []
    for process in cluster.processes():
        try:
            found += [process] if what in " ".join(process.cmdline()) else []
        except psutil.Error:
            continue
    return found


def results_of(running: Running) -> Run:
    """The run that a scan says it made."""
    return neg_service.open_run(running.wait_for(r"results\s+(\S+)")[1])


@pytest.mark.faults
def test_a_job_submitted_twice_goes_on_once_as_its_metrics_say(
    cluster: OwnCluster, tiny_directory: Path, tmp_path: Path
) -> None:
    asked = [*arguments(tiny_directory, tmp_path, 40, "once"), "cluster.replicas.max=1"]
    first = submitted(cluster, *asked, "--no-wait")
    # And a third time when it is done.
    command = ["submit", "--address", cluster.jobs, *asked]
    second = Running("", *command, env=cluster.environment, module="tests.twice")
    assert first.finish() == 0
    name = first.output.strip().splitlines()[-1]
    assert name.startswith("neg-once-")
    uri = second.wait_for(r"I results: (\S+)")[1]

    def stored() -> int:
        return len(list(Path(uri).glob("neurgrad/*.parquet")))

    seen = []
    while second.process.poll() is None:
        earlier = stored()
        try:
            shards, prompts = cluster.metrics_for(Path(uri).name, "neg_shards", "neg_prompts_total")
        except OSError:
            continue
        if shards.get("done") and prompts:
            seen.append((earlier, shards["done"], prompts[""], stored(), sum(shards.values())))
        time.sleep(0.5)
    assert second.finish() == 0, second.output
    assert f"job {name} is" in second.output
    assert re.findall(r"(\d+) of 40 shards to do", second.output) == ["40"]
    run = neg_service.open_run(uri)
    assert len(run.done()) == run.n_shards == 40
    # A metric is some seconds old when it is read, never ahead of what is stored, and the states add up to all shards.
    assert seen
    assert all(done <= after for _, done, _, after, _ in seen), seen
    assert all(total == 40 for *_, total in seen), seen
    assert all(prompts <= after for _, _, prompts, after, _ in seen), seen
    assert all(later[1] >= earlier[1] for earlier, later in pairwise(seen))
    # Exported every second, collected every second: what was stored four samples ago is known by now.
    assert all(now[1] >= before[0] for before, now in zip(seen, seen[6:], strict=False))
    assert len({done for _, done, *_ in seen}) > 3
    assert f"job {name} has done this already" in second.output
    assert {own["submission_id"] for own in told(cluster)} == {name}


@pytest.mark.faults
def test_a_stopped_job_leaves_nothing_and_the_same_command_goes_on(
    cluster: OwnCluster, tiny_directory: Path, tmp_path: Path
) -> None:
    asked = [*arguments(tiny_directory, tmp_path, 50, "twice"), "cluster.replicas.max=1"]
    cluster.gate.touch()
    # With one replica, it waits at the gate when it has done some.
    stopped = submitted(cluster, *asked)
    uri = stopped.wait_for(r"I results: (\S+)")[1]
    stopped.wait_for(r"(?m)^(?:[6-9]|1\d|20)/50 prompts")
    (mine,) = running(cluster, "ray::Replica")
    (job,) = (job["submission_id"] for job in told(cluster) if job["submission_id"].startswith("neg-twice-"))
    stop(cluster, job)
    assert stopped.finish() != 0
    eventually(lambda: not mine.is_running() and not running(cluster, "job.name=twice"))
    assert "interrupted; the same command continues from here" in told(cluster, f"{job}/logs")["logs"]
    cluster.gate.unlink()
    before = len(list(Path(uri).glob("neurgrad/*.parquet")))
    assert 5 < before < 50
    again = submitted(cluster, *asked)
    assert again.finish() == 0, again.output
    assert re.findall(r"(\d+) of 50 shards to do", again.output) == [str(50 - before)]
    # A job of its own.
    assert {own["submission_id"] for own in told(cluster)} >= {job, f"{job}-2"}
    assert len(neg_service.open_run(uri).done()) == 50


@pytest.mark.faults
def test_what_a_cluster_refuses_is_told_in_one_line(cluster: OwnCluster, tiny_directory: Path, tmp_path: Path) -> None:
    asked = arguments(tiny_directory, tmp_path, 4, "refused")

    def refusal(*command: str, **extra: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], env=cluster.environment | extra, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in done.stderr
        return line

    submit = ("-m", "jobs.submit", "--address", cluster.jobs, *asked)
    assert "the cluster wants a token, or another one" in refusal(*submit, RAY_AUTH_TOKEN="not-the-token" * 4)
    assert "cluster.gpus_per_replica=1: no node has any" in refusal(*submit, "cluster.gpus_per_replica=1")
    # Another version of Ray, as far as Ray itself can tell.
    older = "import ray, runpy, sys; ray.__version__ = '2.59.0'; sys.argv = sys.argv[1:]; "
    module = "runpy.run_module(sys.argv[0], run_name='__main__')"
    assert "the cluster runs Ray 2." in refusal("-c", older + module, *submit[1:])
    scan = ("jobs.scan", *asked, f"cluster.address={cluster.address}")
    assert "the cluster runs other versions than this program" in refusal("-c", older + module, *scan)
    assert "no Ray cluster answers there, or it wants another token" in refusal(
        "-m", *scan, RAY_AUTH_TOKEN="not-the-token" * 4
    )


@pytest.mark.faults
@pytest.mark.usefixtures("two_nodes")
def test_rays_own_command_submits_and_a_stopped_job_leaves_nothing_and_continues(
    cluster: OwnCluster, tiny_directory: Path, tmp_path: Path
) -> None:
    asked = arguments(tiny_directory, tmp_path, 30, "stopped")
    place = tmp_path / "results"

    def stored(name: str) -> int:
        return len(list(place.glob(f"{name}-*/neurgrad/*.parquet")))

    # Two jobs at once, each with room for one replica.
    cluster.gate.touch()
    other = submitted(cluster, *arguments(tiny_directory, tmp_path, 25, "other"), "cluster.replicas.max=1")
    root = Path(__file__).parent.parent.parent
    ray_job(
        cluster, "submit", "--no-wait", "--submission-id", "by-hand", "--working-dir", str(root), "--",
        "python", "-m", "jobs.scan", *asked, "cluster.replicas.max=1",
    )  # fmt: skip
    eventually(lambda: stored("stopped") > 5 and stored("other") > 5 and len(running(cluster, "ray::Replica")) == 2)
    logs = told(cluster, "by-hand/logs")["logs"]
    mine = [process for process in running(cluster, "ray::Replica") if f"pid {process.pid} on" in logs]
    assert len(mine) == 1
    ray_job(cluster, "stop", "by-hand")
    eventually(lambda: not mine[0].is_running() and not running(cluster, "job.name=stopped"))
    assert "interrupted; the same command continues from here" in told(cluster, "by-hand/logs")["logs"]
    cluster.gate.unlink()
    assert other.finish() == 0, other.output
    assert len(results_of(other).done()) == 25
    eventually(lambda: not running(cluster, "ray::Replica"))
    done = stored("stopped")
    assert 5 < done < 30
    again = submitted(cluster, *asked)
    assert again.finish() == 0, again.output
    assert int(again.wait_for(r"(\d+) of 30 shards to do")[1]) == 30 - done
    assert len(results_of(again).done()) == 30


@pytest.mark.faults
@pytest.mark.usefixtures("two_nodes")
def test_small_replicas_share_a_gpu_and_get_as_many_threads_as_cpus(
    cluster: OwnCluster, tiny_directory: Path, tmp_path: Path
) -> None:
    cluster.add(num_cpus=2, num_gpus=1)
    asked = arguments(tiny_directory, tmp_path, 40, "shared")
    # The GPU is pretended; the model itself stays on the CPU.
    halves = ["cluster.gpus_per_replica=0.5", "model.device=cpu", f"cluster.address={cluster.address}"]
    scan = Running("scan", *asked, *halves, env=cluster.environment)
    assert scan.finish() == 0, scan.output
    assert "on up to 2 replicas of 1 CPUs and 0.5 GPUs" in scan.output
    assert re.search(r"replica 1 is ready: .*, cpu \(.+\), 1 threads", scan.output)
    assert len(results_of(scan).done()) == 40


@pytest.mark.faults
@pytest.mark.usefixtures("two_nodes")
def test_the_node_of_the_driver_is_lost_and_the_same_command_continues(
    cluster: OwnCluster, tiny_directory: Path, tmp_path: Path
) -> None:
    asked = [*arguments(tiny_directory, tmp_path, 160, "orphan"), "cluster.replicas.max=1"]
    driving = cluster.add(num_cpus=1, resources={"driver": 1})
    first = submitted(cluster, *asked, "--driver", "driver=1")
    first.wait_for(r"[1-9]\d*/160 prompts")
    # Replicas elsewhere go on for some seconds, until Ray notices that their driver is gone.
    cluster.kill(driving)
    assert first.finish() == 1
    assert "error: job neg-orphan-" in first.output
    stored = len(list((tmp_path / "results").glob("orphan-*/neurgrad/*.parquet")))
    assert 0 < stored < 160
    second = submitted(cluster, *asked)
    assert second.finish() == 0, second.output
    assert int(second.wait_for(r"(\d+) of 160 shards to do")[1]) <= 160 - stored
    assert len(results_of(second).done()) == 160

"""Scans on hosts of their own whose network fails: two workers, a head node and a store, each with an address.

Whatever happens to a link, a scan ends with the table of a quiet one and a run that `jobs.verify` finds clean. How
often shards were computed is counted and printed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.s3.server import BUCKET, server_on
from tests.e2e.commands import ROOT, in_order
from tests.infra.hosts import Host, Network, missing
from tests.s3 import credentials

pytestmark = [pytest.mark.infra, pytest.mark.ray]
N_PROMPTS = 40
SECONDS_A_SHARD = 0.5
# A fault begins when so many shards are stored.
BEGIN_AFTER = 6


class Place:
    """The hosts, with a Ray cluster and a store on them."""

    def __init__(self, network: Network, directory: Path, model: Path) -> None:
        """All are up, and `directory` keeps what they leave."""
        self.head, self.store = network.host("head"), network.host("store")
        self.workers = [network.host("left"), network.host("right")]
        self.directory, self.counted = directory, directory / "counted"
        server = server_on(directory / "s3", address=self.store.address)
        self.endpoint = server.endpoint_url
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))},
            **credentials(server.writer),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "for-this-test-alone-0123456789",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_prestart_worker_first_driver": "0", "RAY_worker_niceness": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "NEG_TEST_SECONDS": str(SECONDS_A_SHARD), "NEG_TEST_COUNTED": str(self.counted),
            "NEG_TEST_HOSTS": "2",
        }  # fmt: skip
        done = self.store.run(sys.executable, "-m", "infra.s3.server", "up", server.directory, env=self.environment)
        assert done.returncode == 0, done.stderr
        words = directory / "words.jsonl"
        rows = [{"prompt": f"w{10 + i} w9", "targets": [" w7", " w8"], "answer": " w7"} for i in range(N_PROMPTS)]
        words.write_text("\n".join(map(json.dumps, rows)))
        self.arguments = [
            f"model.source={model}", f"dataset.source={words}", f"storage.endpoint_url={self.endpoint}",
            "measure.name=tests.infra.counted_neurgrad", "job.shard_size=1", "job.progress_seconds=1",
            "cluster=ray", f"cluster.address={self.head.address}:6379", "cluster.cpus_per_replica=1",
            "cluster.replicas.max=2", "cluster.wait_seconds=60",
        ]  # fmt: skip
        self.nodes: dict[Host, subprocess.Popen[bytes]] = {}
        self.ray(self.head, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false")
        for worker in self.workers:
            self.join(worker)
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def close(self) -> None:
        """No node is started again from now on."""
        self._ended.set()
        self._keeper.join()

    def _keep(self) -> None:
        """Start a worker again that was given up, as Kubernetes does a pod: a node may end long after its link's fault.

        The head misses its signs of life, and once they meet again tells it that it counts as dead.
        """
        while not self._ended.wait(0.3):
            for host in [host for host, node in self.nodes.items() if node.poll() is not None]:
                self.join(host)

    def ray(self, host: Host, *arguments: str) -> subprocess.Popen[bytes]:
        """Ray on a host; ends when its node is given up."""
        command = ["ray", "start", *arguments, f"--node-ip-address={host.address}", "--object-store-memory=80000000"]
        with (self.directory / f"ray-{host.name}.log").open("ab") as log:
            return host.start(*command, "--block", env=self.environment, stdout=log, stderr=log)

    def join(self, host: Host) -> None:
        """A worker of one CPU."""
        self.nodes[host] = self.ray(host, f"--address={self.head.address}:6379", "--num-cpus=1")

    def await_nodes(self) -> None:
        """Until both workers belong to the cluster."""
        asked = (
            "import ray, sys, time\n"
            "while not ray.is_initialized():\n"
            "    try: ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')\n"
            "    except ConnectionError: time.sleep(0.5)\n"
            "while ray.cluster_resources().get('CPU', 0) != 2: time.sleep(0.3)"
        )
        address = f"{self.head.address}:6379"
        asking = self.head.start(sys.executable, "-c", asked, address, env=self.environment)
        until = time.monotonic() + 200
        while asking.poll() is None:
            assert time.monotonic() < until, "the workers do not join"
            time.sleep(0.3)
        assert asking.returncode == 0

    def command(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command on the head node."""
        return self.head.run(
            sys.executable, "-m", f"jobs.{name}", *arguments, env=self.environment, cwd=ROOT, timeout=400
        )

    def table(self, run: str) -> pa.Table:
        """What a run has stored, as a person reads it who is there."""
        path = self.directory / "table.parquet"
        program = (
            "import sys, neg_service, pyarrow.parquet as pq\n"
            "run = neg_service.open_run(sys.argv[1], endpoint_url=sys.argv[2])\n"
            "pq.write_table(run.table('neurgrad').to_table(), sys.argv[3])"
        )
        done = self.head.run(
            sys.executable, "-c", program, run, self.endpoint, str(path), env=self.environment, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        return in_order(pq.read_table(path))

    def n_counted(self) -> int:
        """Shards computed so far, each time anew."""
        return len(self.counted.read_text().splitlines()) if self.counted.exists() else 0

    def count(self, name: str, seconds: float) -> Counter[str]:
        """How often each shard was computed; a line for a person."""
        lines = [line.split() for line in self.counted.read_text().splitlines()]
        times, by_host = Counter(shard for shard, _ in lines), Counter(host for _, host in lines)
        again = sum(times.values()) - len(times)
        sys.stdout.write(f"{name}: {seconds:.0f} s, {again} of {len(times)} shards computed again, {dict(by_host)}\n")
        return times

    def scan(self, name: str, fault: Callable[[], None] | None = None) -> tuple[str, float]:
        """The run of a scan, and its seconds from the first shard on; `fault` happens in its middle."""
        for left in self.counted.parent.glob(f"{self.counted.name}*"):
            left.unlink()
        happens = threading.Thread(target=self._in_the_middle, args=(fault,), daemon=True)
        happens.start()
        done = self.command("scan", *self.arguments, f"storage.uri=s3://{BUCKET}/{name}")
        assert done.returncode == 0, done.stdout + done.stderr
        happens.join(60)
        assert not happens.is_alive()
        (self.directory / f"{name}.log").write_text(done.stdout + done.stderr)
        rate = re.search(r"rate +\S+ prompts/s in (\d+:)?([\d.]+)", done.stdout)
        assert rate, done.stdout
        seconds = 60 * int((rate[1] or "0:")[:-1]) + float(rate[2])
        found = re.search(r'open_run\("([^"]+)"', done.stdout)
        assert found, done.stdout
        return found[1], seconds

    def _in_the_middle(self, fault: Callable[[], None] | None) -> None:
        until = time.monotonic() + 200
        while fault is not None and time.monotonic() < until:
            if self.n_counted() >= BEGIN_AFTER:
                fault()
                return
            time.sleep(0.05)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_directory: Path) -> Iterator[Place]:
    """Hosts with all that runs on them."""
    if reason := missing():
        pytest.skip(reason)
    with Network() as network:
        made = Place(network, tmp_path_factory.mktemp("network"), tiny_directory)
        made.await_nodes()
        yield made
        made.close()


@pytest.fixture(scope="module")
def quiet(place: Place) -> pa.Table:
    """The table of a scan that nothing happened to."""
    run, seconds = place.scan("quiet")
    place.count("quiet", seconds)
    return place.table(run)


def _for(seconds: float, fault: Callable[[], AbstractContextManager[None]]) -> Callable[[], None]:
    def happens() -> None:
        with fault():
            time.sleep(seconds)

    return happens


def _left(place: Place) -> Host:
    return place.workers[0]


# How it fails, and how many shards may be computed again for it: none where the replicas are still there afterwards.
# Those of which Ray may give a node up, perhaps half a minute later, come last.
FAULTS: dict[str, tuple[Callable[[Place], Callable[[], None]], int]] = {
    "a worker away for 10 s": (lambda place: _for(10, _left(place).cut), 0),
    "packets to the store dropped for 20 s": (lambda place: _for(20, lambda: _left(place).deaf_to(place.store)), 0),
    "10 % of packets lost for 30 s": (lambda place: _for(30, lambda: _left(place).losing(10)), 0),
    "a slow link for 30 s": (lambda place: _for(30, lambda: _left(place).slow(8)), 0),
    "the head away for 25 s": (lambda place: _for(25, place.head.cut), 4),
    "a worker away for 30 s": (lambda place: _for(30, _left(place).cut), 4),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_link_that_fails_and_comes_back_changes_nothing(name: str, place: Place, quiet: pa.Table) -> None:
    fault, at_most_again = FAULTS[name]
    place.await_nodes()
    lost = _left(place).lost
    run, seconds = place.scan(re.sub(r"\W+", "-", name), fault(place))
    times = place.count(name, seconds)
    _same(place, run, quiet)
    # It was felt.
    assert "away" in name or _left(place).lost > lost
    assert sum(times.values()) - N_PROMPTS <= at_most_again


def test_a_worker_that_is_cut_off_for_good_costs_its_shards_a_second_time(place: Place, quiet: pa.Table) -> None:
    place.await_nodes()
    cut = _left(place).cut()
    run, seconds = place.scan("for-good", cut.__enter__)
    times = place.count("a worker cut off for good", seconds)
    try:
        _same(place, run, quiet)
        assert sum(times.values()) - N_PROMPTS <= 4
    finally:
        cut.__exit__(None, None, None)


def _same(place: Place, run: str, quiet: pa.Table) -> None:
    found = place.table(run)
    assert found.schema == quiet.schema
    assert found.equals(quiet)
    checked = place.command("verify", f"run={run}", f"storage.endpoint_url={place.endpoint}")
    assert checked.returncode == 0, checked.stdout + checked.stderr

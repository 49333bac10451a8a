"""Ray clusters of several nodes on this machine, each in a process of its own, with token authentication on.

The nodes are real Ray processes that share one machine. `python -m tests.clusters` is the process that owns them: it
reads commands as JSON lines, so that a test has no Ray of its own, as a person at a terminal has none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

TOKEN = "a-token-that-only-this-test-knows-0123456789"
STORE_BYTES = 80 * 2**20


class OwnCluster:
    """A cluster that a test owns: its head has the job server, and no CPUs unless told otherwise."""

    def __init__(self, **head: Any) -> None:
        """Start the head node; `head` goes to Ray's `add_node`."""
        self.dashboard, self.metrics = _free_port(), _free_port()
        # While it is there, scans with the tests' slow measure stay in their middle.
        self.gate = Path(tempfile.gettempdir()) / f"neg_service-test-gate-{uuid.uuid4().hex}"
        # A place of its own, in which it says below which cluster this is: Ray's job server has a job join whatever
        # cluster it finds on the machine, and other tests start some.
        self._place = tempfile.mkdtemp(prefix="neg-", dir="/tmp")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": self._place, "RAY_prestart_worker_first_driver": "0",
            # Jobs find the tests' own measure.
            "PYTHONPATH": str(Path(__file__).parent.parent), "NEG_TEST_GATE": str(self.gate),
            "RAY_memory_monitor_refresh_ms": "0", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.clusters"], env=self.environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        settings = {"num_cpus": 0, "metrics_export_port": self.metrics} | head
        try:
            self.head = self.add(
                include_dashboard=True, dashboard_port=self.dashboard,
                _system_config={"metrics_report_interval_ms": 1000, "health_check_period_ms": 500}, **settings,
            )  # fmt: skip
        except AssertionError:
            self.close()
            raise
        self.address = self.head["address"]
        (Path(self._place) / "ray" / "ray_current_cluster").write_text(self.address)
        self.jobs = f"http://127.0.0.1:{self.dashboard}"
        # Where the head node tells Prometheus which nodes there are.
        self.discovery = Path(self._place) / "ray" / "prom_metrics_service_discovery.json"

    def add(self, **node: Any) -> dict[str, str]:
        """Start a node; its `id` and the cluster's `address`."""
        # Ray gives the agents of all nodes one port, and here they share a machine.
        own = {"object_store_memory": STORE_BYTES, "dashboard_agent_listen_port": _free_port()}
        return self._ask({"add": own | node})

    def kill(self, node: dict[str, str]) -> None:
        """End a node's processes with SIGKILL, as a machine that is gone."""
        self._ask({"kill": node["id"]})

    def processes(self) -> list[psutil.Process]:
        """All processes of the cluster that are alive."""
        return psutil.Process(self._process.pid).children(recursive=True)

    def metrics_for(self, run: str, *names: str) -> list[dict[str, float]]:
        """What Prometheus would read at once of metrics: their values for a run, by the label `state` if they have it.

        Each time that it is asked, Ray's agent makes the text of all that it has.
        """
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return [self._values(lines, name, run) for name in names]

    @staticmethod
    def _values(lines: list[str], name: str, run: str) -> dict[str, float]:
        mine = [line for line in lines if line.startswith(f"ray_{name}{{") and f'run="{run}"' in line]
        states = [re.search(r'state="(\w+)"', line) for line in mine]
        return {
            state[1] if state else "": float(line.rsplit(" ", 1)[1]) for state, line in zip(states, mine, strict=True)
        }

    def close(self) -> None:
        """End everything that this cluster started."""
        self.gate.unlink(missing_ok=True)
        owned = self.processes()
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.stdout:
            self._process.stdout.close()
        for process in owned:
            if process.is_running():
                process.kill()
        psutil.wait_procs(owned, timeout=20)
        shutil.rmtree(self._place, ignore_errors=True)

    def _ask(self, command: dict[str, Any]) -> dict[str, str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, str] = json.loads(line)
                return answer
        raise AssertionError(f"the cluster ended at {command}")


@contextmanager
def own_cluster(**head: Any) -> Iterator[OwnCluster]:
    """A cluster for the duration of a test."""
    cluster = _started(head)
    try:
        yield cluster
    finally:
        cluster.close()


def _started(head: dict[str, Any]) -> OwnCluster:
    """Ray gives a head node thirty seconds to start in, too few beside much else: all of it is tried twice more."""
    for _ in range(2):
        with suppress(AssertionError):
            return OwnCluster(**head)
    return OwnCluster(**head)


def eventually(condition: Any, seconds: float = 300) -> Any:
    """What `condition` gives as soon as it is true."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.2)
    return value


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _node_of(cluster: Any, settings: dict[str, Any], tries: int = 3) -> Any:
    """A node that joins a cluster. Beside much else Ray's time for that is too short: what it began ends, and anew."""
    before = psutil.Process().children(recursive=True)
    for _ in range(tries - 1):
        with suppress(Exception):
            return cluster.add_node(**settings)
        half_started = [one for one in psutil.Process().children(recursive=True) if one not in before]
        for process in half_started:
            process.kill()
        psutil.wait_procs(half_started, timeout=20)
    return cluster.add_node(**settings)


def _serve() -> None:
    from ray.cluster_utils import Cluster

    cluster, nodes = Cluster(), {}
    for line in sys.stdin:
        command = json.loads(line)
        answer = {}
        if "add" in command:
            node = _node_of(cluster, command["add"], tries=3 if nodes else 1)
            nodes[node.node_id] = node
            answer = {"id": node.node_id, "address": cluster.address}
        elif "kill" in command:
            cluster.remove_node(nodes.pop(command["kill"]), allow_graceful=False)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    cluster.shutdown()


if __name__ == "__main__":
    _serve()

"""A scan that is disturbed, and the invariant in which every disturbance has to end.

Scans are driven by this process on a Ray cluster of real processes that a module shares, with the real S3 server.
Moments are random: the seed is in each test's name, FAULT_SEED repeats it, and FAULT_ROUNDS says how often each test
runs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from ray.cluster_utils import Cluster

import neg_service
from infra.s3.server import BUCKET, Server, server_on
from jobs.entry import CONF
from neg_service.cluster.prepare import prepare
from neg_service.cluster.scan import Summary, run
from neg_service.config import ScanConfig, typed
from neg_service.storage.reader import Run
from neg_service.storage.stores import open_store
from neg_service.storage.verify import verify
from tests.e2e.commands import Running, in_order
from tests.faults.saboteur import PROMPTS_A_SHARD, VARIABLE
from tests.here import scan_here
from tests.s3 import acting_as

N_PROMPTS = 24
N_SHARDS = N_PROMPTS // PROMPTS_A_SHARD
# Processes that share the tests have to draw the same.
_DRAWN = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).randrange(10**6)
SEED = int(os.environ.get("FAULT_SEED", _DRAWN))
ROUNDS = int(os.environ.get("FAULT_ROUNDS", "1"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every round of a test draws its own moments."""
    if "moments" in metafunc.fixturenames:
        metafunc.parametrize("moments", range(ROUNDS), indirect=True, ids=[f"seed{SEED}-{i}" for i in range(ROUNDS)])


@pytest.fixture
def moments(request: pytest.FixtureRequest) -> random.Random:
    """Where a random moment comes from."""
    return random.Random(f"{SEED}-{request.param}-{request.function.__name__}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server, and this process as one who may write."""
    started = server_on(tmp_path_factory.mktemp("s3"))
    started.start()
    with acting_as(started.writer):
        yield started
    started.stop()


@pytest.fixture(scope="session")
def faults_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the saboteur in a replica looks for orders."""
    return tmp_path_factory.mktemp("faults") / "orders"


@pytest.fixture(scope="module")
def cluster(server: Server, faults_file: Path) -> Iterator[Cluster]:
    """One node that stays; its processes have the keys and know where orders are."""
    os.environ[VARIABLE] = str(faults_file)
    started = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 * 2**20},
    )
    os.environ["RAY_ADDRESS"] = started.address
    yield started
    del os.environ["RAY_ADDRESS"], os.environ[VARIABLE]
    started.shutdown()


@dataclass
class Orders:
    """What happens to replicas, for the duration of a test."""

    file: Path
    given: list[dict[str, Any]] = field(default_factory=list)

    def give(self, **order: Any) -> int:
        """Add an order; its number."""
        self.given.append(order)
        scratch = self.file.with_suffix(".new")
        scratch.write_text(json.dumps(self.given))
        scratch.rename(self.file)
        return len(self.given) - 1

    def was_carried_out(self, number: int) -> bool:
        """Whether somebody did as ordered."""
        return (self.file.parent / f"{self.file.name}.{number}.done").exists()

    def await_pid(self, number: int, seconds: float = 300) -> int:
        """The process that carries out an order to hold."""
        told = self.file.parent / f"{self.file.name}.{number}.pid"
        until = time.monotonic() + seconds
        while not told.exists():
            assert time.monotonic() < until, f"nobody carried out order {number}"
            time.sleep(0.02)
        return int(told.read_text())

    def clear(self) -> None:
        """No orders."""
        self.given = []
        for file in self.file.parent.glob(f"{self.file.name}*"):
            file.unlink()


@pytest.fixture
def orders(faults_file: Path) -> Iterator[Orders]:
    """No orders before, none after."""
    given = Orders(faults_file)
    given.clear()
    yield given
    given.clear()


@pytest.fixture(scope="session")
def arguments(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A scan of a tiny model by the saboteur: 12 shards of two prompts."""
    path = tmp_path_factory.mktemp("data") / "words.jsonl"
    rows = [
        {
            "prompt": " ".join(f"w{(i * 7 + j) % 90 + 1}" for j in range(i % 5 + 1)),
            "targets": [" w3", " w4", " w5"][: i % 2 + 2],
            "id": str(i),
        }
        for i in range(N_PROMPTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"model.source={tiny_directory}", f"dataset.source={path}", "measure.name=tests.faults.saboteur",
        f"job.shard_size={PROMPTS_A_SHARD}", "cluster.cpus_per_replica=1", "cluster.replicas=1",
    ]  # fmt: skip


@pytest.fixture
def own_server(server: Server, tmp_path: Path) -> Iterator[Server]:
    """A server that a test may do anything to; the keys are those that the cluster has."""
    started = server_on(tmp_path / "s3", server.writer)
    started.start()
    yield started
    started.stop()


@pytest.fixture
def drive(disturbed: Disturbed) -> Iterator[Callable[[], Running]]:
    """Start the scan as a command of its own process group, which does not outlive the test."""
    started: list[Running] = []

    def start() -> Running:
        started.append(Running("scan", *disturbed.settings, "job.progress_seconds=0", env=dict(os.environ)))
        return started[-1]

    yield start
    for one in started:
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()


@dataclass
class Disturbed:
    """A scan into a place of its own, and what became of it."""

    arguments: list[str]
    uri: str
    endpoint_url: str | None

    @property
    def settings(self) -> list[str]:
        """Of the command line."""
        endpoint = [f"storage.endpoint_url={self.endpoint_url}"] if self.endpoint_url else []
        return [*self.arguments, f"storage.uri={self.uri}", *endpoint]

    def config(self, *more: str) -> ScanConfig:
        """As the command would have it."""
        with initialize_config_dir(CONF, version_base="1.3"):
            return typed(ScanConfig, compose("scan", overrides=[*self.settings, *more]))

    def scan(self, *more: str) -> Summary:
        """Run or continue it."""
        return run(prepare(self.config(*more)))

    @property
    def run_uri(self) -> str:
        """Of the run directory."""
        return prepare(self.config()).uri

    def open(self) -> Run:
        """The run as a reader sees it."""
        return neg_service.open_run(self.run_uri, self.endpoint_url)


@pytest.fixture
def disturbed(arguments: list[str], server: Server, request: pytest.FixtureRequest) -> Disturbed:
    """A scan into a prefix of its own."""
    return Disturbed(arguments, f"s3://{BUCKET}/{abs(hash(request.node.nodeid))}", server.endpoint_url)


@pytest.fixture(scope="session")
def quiet(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same scan with nothing happening to it, in this process, on a local disk."""
    return scan_here(Disturbed(arguments, f"file://{tmp_path_factory.mktemp('quiet')}", None).config())


@pytest.fixture
def invariant(quiet: Run) -> Callable[[Disturbed], None]:
    """What every disturbance has to end in."""

    def check(disturbed: Disturbed) -> None:
        run = disturbed.open()
        assert run.fingerprint == quiet.fingerprint
        assert run.done() == set(range(N_SHARDS))
        assert run.directory.failed() == {}
        for name in quiet.tables:
            expected, found = (in_order(one.table(name).to_table()) for one in (quiet, run))
            numbers = [n for n in ("probabilities", "activation", "probability", "neurgrad") if n in found.column_names]
            # Each shard once: the same keys, in the same number.
            assert found.drop_columns(numbers).equals(expected.drop_columns(numbers))
            for number in numbers:
                a, b = (np.hstack(table[number].to_pylist()) for table in (found, expected))
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(), err_msg=f"{name}.{number}")
        store = open_store(disturbed.run_uri, disturbed.endpoint_url)
        assert verify(store).is_clean, verify(store).findings
        before = store.list("")
        again = disturbed.scan()
        assert again.shards_before == N_SHARDS
        assert store.list("") == before

    return check


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Do something beside what the block does; its error is the test's."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    yield
    thread.join(120)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def signalled(pid: int, which: signal.Signals) -> None:
    """Send a signal to a process that a test knows by its own word."""
    with suppress(ProcessLookupError):
        os.kill(pid, which)

"""The other faults: `make test-faults`. Each ends in the same invariant, or in one line and nothing lost."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

import neg_service
from infra.s3.server import BUCKET, Server
from neg_service.cluster.messages import Destination, WorkerSpec
from neg_service.cluster.plan import shards_of
from neg_service.cluster.prepare import prepare
from neg_service.cluster.replica import Replica, scan_worker
from neg_service.errors import DestinationError, StorageError
from neg_service.storage.parts import part_key
from neg_service.storage.reader import Run
from neg_service.storage.stores import open_store
from neg_service.storage.verify import verify
from tests.e2e.commands import Running, in_order, job
from tests.faults.conftest import N_PROMPTS, N_SHARDS, Disturbed, Orders, meanwhile, signalled
from tests.refusals import refused

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.usefixtures("cluster")]
Invariant = Callable[[Disturbed], None]
TABLES = ("prompts", "activations", "neurgrad")


@pytest.mark.parametrize("when", ["before put", "after put"])
@pytest.mark.parametrize("table", TABLES)
def test_death_at_each_step_of_a_put(
    when: str, table: str, disturbed: Disturbed, orders: Orders, invariant: Invariant, moments: random.Random
) -> None:
    order = orders.give(when=when, shard=moments.randrange(N_SHARDS), table=table, do="exit")
    summary = disturbed.scan()
    assert not summary.failed
    assert orders.was_carried_out(order)
    invariant(disturbed)


def test_a_driver_that_dies_while_its_replica_is_putting(
    disturbed: Disturbed,
    drive: Callable[[], Running],
    orders: Orders,
    invariant: Invariant,
    moments: random.Random,
) -> None:
    # Between two tables of a shard; the replica goes with its driver.
    order = orders.give(when="after put", shard=moments.randrange(N_SHARDS), table="prompts", do="hold")
    driver = drive()
    replica = orders.await_pid(order)
    os.killpg(driver.process.pid, signal.SIGKILL)
    driver.process.wait()
    if psutil.pid_exists(replica):
        psutil.Process(replica).wait(60)
    store = open_store(disturbed.run_uri, disturbed.endpoint_url)
    assert len(store.list("prompts")) > len(store.list("neurgrad"))
    disturbed.scan()
    invariant(disturbed)


def test_a_node_is_lost(
    disturbed: Disturbed,
    orders: Orders,
    invariant: Invariant,
    moments: random.Random,
    cluster: Cluster,
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    orders.give(when="compute", do="sleep", seconds=2)
    # Three replicas of a CPU each need both nodes.
    on_node: list[psutil.Process] = []

    def remove() -> None:
        until = time.monotonic() + 300
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        while not on_node:
            assert time.monotonic() < until
            on_node.extend(p for p in raylet.children(recursive=True) if "Replica" in " ".join(p.cmdline()))
            time.sleep(0.05)
        store = open_store(disturbed.run_uri, disturbed.endpoint_url)
        while not store.list("neurgrad"):
            time.sleep(0.1)
        time.sleep(moments.uniform(0, 3))
        cluster.remove_node(node, allow_graceful=False)

    with meanwhile(remove):
        summary = disturbed.scan("cluster.replicas=3")
    assert not summary.failed
    assert not any(process.is_running() for process in on_node)
    assert "is lost" in caplog.text or "could not be started" in caplog.text
    invariant(disturbed)


def test_two_drivers_at_once(
    disturbed: Disturbed, drive: Callable[[], Running], orders: Orders, invariant: Invariant
) -> None:
    orders.give(when="compute", do="sleep", seconds=0.5)
    drivers = [drive(), drive()]
    assert [driver.finish() for driver in drivers] == [0, 0], "\n\n".join(driver.output for driver in drivers)
    # Each did all there was to do, beside the other.
    assert all(f"{N_SHARDS} of {N_SHARDS} shards to do" in driver.output for driver in drivers)
    assert all(f"{N_PROMPTS}/{N_PROMPTS} prompts" in driver.output for driver in drivers)
    invariant(disturbed)


def test_an_extension_whose_driver_is_killed_beside_another_one(
    disturbed: Disturbed, drive: Callable[[], Running], orders: Orders, moments: random.Random, quiet: Run
) -> None:
    # Four shards of two prompts, of which the last has one.
    base = neg_service.open_run(disturbed.scan("job.limit=7").uri, disturbed.endpoint_url)
    before = base.directory.store.list("")
    disturbed.arguments = [*disturbed.arguments, f"job.extend={base.uri}"]
    orders.give(when="compute", do="sleep", seconds=0.5)
    drivers = [drive(), drive()]
    drivers[0].wait_for(r"9 of 9 shards to do")
    time.sleep(moments.uniform(0, 6))
    os.killpg(drivers[0].process.pid, signal.SIGKILL)
    drivers[0].process.wait()
    assert disturbed.open().done() >= {0, 1, 2, 3}
    assert drivers[1].finish() == 0, drivers[1].output
    assert disturbed.scan().shards_before == 9
    run = disturbed.open()
    assert run.done() == set(range(13))
    for one in run.lineage:
        found = verify(open_store(one.uri, disturbed.endpoint_url), endpoint_url=disturbed.endpoint_url)
        assert found.is_clean, found.findings
    for name in quiet.tables:
        expected, added = (in_order(one.table(name).to_table()) for one in (quiet, run))
        numbers = [n for n in ("probabilities", "activation", "probability", "neurgrad") if n in added.column_names]
        assert added.drop_columns(numbers).equals(expected.drop_columns(numbers))
        for number in numbers:
            a, b = (np.hstack(table[number].to_pylist()) for table in (added, expected))
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(), err_msg=f"{name}.{number}")
    assert base.directory.store.list("") == before


@pytest.mark.parametrize("when", ["compute", "before put"])
def test_a_replica_that_is_stopped_and_revived_when_its_shard_was_given_away(
    when: str,
    disturbed: Disturbed,
    orders: Orders,
    invariant: Invariant,
    moments: random.Random,
    caplog: pytest.LogCaptureFixture,
) -> None:
    order = orders.give(when=when, shard=moments.randrange(N_SHARDS), do="hold", seconds=1)
    stopped: list[int] = []

    def stop() -> None:
        pid = orders.await_pid(order)
        stopped.append(pid)
        signalled(pid, signal.SIGSTOP)

    with meanwhile(stop):
        summary = disturbed.scan("cluster.replicas=2", "cluster.stall_seconds=3")
    assert summary.shards_done == N_SHARDS
    assert "and does not answer" in caplog.text
    invariant(disturbed)
    signalled(stopped[0], signal.SIGCONT)
    time.sleep(3)
    invariant(disturbed)
    assert not psutil.pid_exists(stopped[0])


def test_what_is_written_late_is_what_is_there(
    disturbed: Disturbed, invariant: Invariant, moments: random.Random
) -> None:
    disturbed.scan()
    prepared = prepare(disturbed.config())
    destination = Destination(disturbed.run_uri, disturbed.endpoint_url, prepared.fingerprint)
    # As a replica does that was given up and comes to itself when all is done.
    late = Replica(partial(scan_worker, WorkerSpec(prepared.config, prepared.info.identity, 1)), destination)
    late.start()
    shard = moments.choice(list(shards_of(prepared.encoding, prepared.plan)))
    store = open_store(disturbed.run_uri, disturbed.endpoint_url)
    before = {entry.key: entry.modified for entry in store.list("")}
    late.run(shard, 0.5)
    written = {entry.key for entry in store.list("") if entry.modified != before[entry.key]}
    assert written == {part_key(table, shard.index) for table in TABLES}
    invariant(disturbed)


def test_a_sweep_of_ranked_neurons_is_repaired_from_its_uri_alone(disturbed: Disturbed) -> None:
    sweep = ["measure=sweep", "measure.name=sweep", "measure.grid=coarse", "neurons=top", "neurons.over=dataset"]
    few = [*sweep, "neurons.count=3", "job.limit=4", "job.shard_size=2"]
    uri = prepare(disturbed.config(*few)).uri
    disturbed.scan(*few)
    store = open_store(uri, disturbed.endpoint_url)
    whole = store.get(part_key("sweep", 1)) or b""
    expected = pq.read_table(pa.BufferReader(whole))
    store.put(part_key("sweep", 1), whole[:-9])
    where = [f"run={uri}", f"storage.endpoint_url={disturbed.endpoint_url}", "cluster.cpus_per_replica=1"]
    repaired = job("verify", *where, "repair=true", env=dict(os.environ))
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    found = pq.read_table(pa.BufferReader(store.get(part_key("sweep", 1)) or b""))
    assert found.select(["prompt_id", "layer", "neuron"]) == expected.select(["prompt_id", "layer", "neuron"])
    np.testing.assert_allclose(found["neg"], expected["neg"], rtol=1e-4, atol=1e-9)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 600 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs more rights than this user has")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_one_line_and_what_was_done_stays(
    disturbed: Disturbed, invariant: Invariant, small_disk: Path
) -> None:
    local = Disturbed(disturbed.arguments, str(small_disk / "results"), None)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * 500_000)
    with refused(DestinationError, says=os.strerror(errno.ENOSPC)):
        local.scan()
    assert not list(small_disk.rglob(".unfinished*"))
    kept = local.open().done()
    assert 0 < len(kept) < N_SHARDS
    ballast.unlink()
    assert local.scan().shards_before == len(kept)
    invariant(local)


def test_a_replica_that_runs_out_of_memory_does_its_shard_in_smaller_batches(
    disturbed: Disturbed,
    orders: Orders,
    invariant: Invariant,
    moments: random.Random,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shard = moments.randrange(N_SHARDS)
    orders.give(when="compute", shard=shard, do="exhaust")
    summary = disturbed.scan()
    assert not summary.failed
    assert f"shard {shard} failed on replica 0 (1 of 3): split: MemoryError" in caplog.text
    invariant(disturbed)


def test_a_server_that_stays_away_ends_the_run_and_nothing_is_quarantined(
    arguments: list[str],
    orders: Orders,
    invariant: Invariant,
    moments: random.Random,
    own_server: Server,
    caplog: pytest.LogCaptureFixture,
) -> None:
    disturbed = Disturbed(arguments, f"s3://{BUCKET}/r", own_server.endpoint_url)
    order = orders.give(when="before put", shard=moments.randrange(N_SHARDS), do="hold", seconds=1)

    def stop() -> None:
        orders.await_pid(order)
        own_server.stop(signal.SIGKILL)

    with meanwhile(stop), refused(StorageError, says=own_server.endpoint_url):
        disturbed.scan("storage.retry_timeout_seconds=1", "cluster.attempts=2", "cluster.stall_seconds=2")
    # It waited for storage for longer than it may be silent, and was left alone until it gave up by itself.
    assert "finished nothing" not in caplog.text
    assert "replace the replica: storage.uri=" in caplog.text
    own_server.start()
    before = disturbed.open().done()
    summary = disturbed.scan()
    assert summary.shards_before == len(before)
    invariant(disturbed)

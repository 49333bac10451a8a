"""Replicas, drivers, the server and the network between that fail, and damaged objects.

`make test` runs all but what fails on the way to storage, which `tests/storage` has there without Ray.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable

import pytest

from infra.s3.server import BUCKET, Server
from jobs.entry import composed
from jobs.verify import VerifyConfig, verify
from neg_service.errors import ConfigurationError
from neg_service.storage.parts import part_key
from neg_service.storage.stores import open_store
from tests.e2e.commands import Running
from tests.faults.conftest import N_SHARDS, Disturbed, Orders, meanwhile, signalled
from tests.faults.proxy import FAULTS, Proxy, Seen
from tests.faults.saboteur import SHORT_PAUSE
from tests.here import scan_here
from tests.refusals import refused

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
Invariant = Callable[[Disturbed], None]


@pytest.mark.faults
def test_replicas_killed_in_a_shard_and_between_computing_and_putting(
    disturbed: Disturbed, orders: Orders, invariant: Invariant, moments: random.Random
) -> None:
    # So far apart that no replica has both at once.
    shards = [moments.randrange(N_SHARDS // 3), moments.randrange(2 * N_SHARDS // 3, N_SHARDS)]
    moments.shuffle(shards)
    held = [
        orders.give(when=when, shard=shard, do="hold")
        for when, shard in zip(("compute", "before put"), shards, strict=True)
    ]

    def kill(order: int) -> None:
        pid = orders.await_pid(order)
        time.sleep(moments.uniform(0, 0.5))
        signalled(pid, signal.SIGKILL)

    with meanwhile(lambda: kill(held[0])), meanwhile(lambda: kill(held[1])):
        summary = disturbed.scan()
    assert summary.shards_done == N_SHARDS
    assert all(orders.was_carried_out(order) for order in held)
    invariant(disturbed)


# `e2e/test_kill.py` kills one in the middle.
@pytest.mark.faults
def test_a_driver_killed_at_any_time_and_resumed_with_another_number_of_replicas(
    disturbed: Disturbed,
    drive: Callable[[], Running],
    orders: Orders,
    invariant: Invariant,
    moments: random.Random,
) -> None:
    orders.give(when="compute", do="sleep", seconds=0.5)
    driver = drive()
    # From when run.json is written, over the start of the first replica, to the last shard.
    driver.wait_for(r"shards to do")
    time.sleep(moments.uniform(0, 6 + 0.5 * N_SHARDS))
    os.killpg(driver.process.pid, signal.SIGKILL)
    driver.process.wait()
    done = disturbed.open().done()
    orders.clear()
    summary = disturbed.scan("cluster.replicas=2")
    # Its last replica may still have put what it was doing when its driver was gone already.
    assert summary.shards_before >= len(done)
    invariant(disturbed)


@pytest.mark.faults
def test_the_server_killed_and_started_again_under_load(
    arguments: list[str], orders: Orders, invariant: Invariant, moments: random.Random, own_server: Server
) -> None:
    disturbed = Disturbed(arguments, f"s3://{BUCKET}/r", own_server.endpoint_url)
    order = orders.give(when="before put", shard=moments.randrange(N_SHARDS), do="hold", seconds=1)

    def restart() -> None:
        orders.await_pid(order)
        own_server.stop(signal.SIGKILL)
        time.sleep(moments.uniform(1, 4))
        own_server.start()

    with meanwhile(restart):
        summary = disturbed.scan()
    assert summary.shards_done == N_SHARDS
    invariant(disturbed)


@pytest.mark.faults
def test_connections_reset_delayed_refused_cut_and_replies_lost(
    disturbed: Disturbed, invariant: Invariant, moments: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neg_service.storage.retries._PAUSE", SHORT_PAUSE)
    direct = disturbed.endpoint_url
    assert direct is not None

    first = iter(FAULTS)

    def decide(request: Seen) -> str | None:
        # The first parts meet each fault once; of all other requests a third goes wrong in one way or another.
        if request.method == "PUT" and request.path.endswith(".parquet") and (fault := next(first, None)):
            return fault
        return moments.choice(FAULTS) if moments.random() < 1 / 3 else None

    with Proxy(direct, decide) as proxy:
        through = Disturbed(disturbed.arguments, disturbed.uri, proxy.url)
        summary = through.scan()
        assert summary.shards_done == N_SHARDS
        assert not summary.failed
    assert set(proxy.injected) == set(FAULTS)
    assert sum(proxy.injected.values()) >= 10, proxy.injected
    invariant(disturbed)


@pytest.mark.faults
def test_damage_is_named_and_repaired(
    disturbed: Disturbed, invariant: Invariant, moments: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    scan_here(disturbed.config())
    store = open_store(disturbed.run_uri, disturbed.endpoint_url)
    # What is exchanged, cut, lost and flipped is drawn; no shard suffers twice, so that each is named for what it is.
    flipped, cut, lost, one, other = moments.sample(range(N_SHARDS), 5)
    content = bytearray(store.get(part_key("neurgrad", flipped)) or b"")
    content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
    store.put(part_key("neurgrad", flipped), bytes(content))
    whole = store.get(part_key("activations", cut)) or b""
    store.put(part_key("activations", cut), whole[: moments.randrange(len(whole))])
    store.delete(part_key("prompts", lost))
    first, second = (store.get(part_key("neurgrad", shard)) or b"" for shard in (one, other))
    store.put(part_key("neurgrad", one), second)
    store.put(part_key("neurgrad", other), first)
    store.put("neurgrad/shard-000099.parquet", first)
    store.put("run.json", (store.get("run.json") or b"").replace(b'"float32"', b'"float16"'))

    with refused(ConfigurationError, says=r'model\.dtype: "float16" there, "float32" asked'):
        disturbed.scan()

    where = [f"run={disturbed.run_uri}", f"storage.endpoint_url={disturbed.endpoint_url}"]
    capsys.readouterr()
    code = verify(composed("verify", where, VerifyConfig))
    found = capsys.readouterr()
    assert code == 3, found.err
    for expected in (
        f"{part_key('neurgrad', flipped)}: damaged: ",
        f"{part_key('activations', cut)}: damaged: ",
        f"{part_key('prompts', lost)}: missing",
        f"{part_key('neurgrad', one)}: foreign: shard {other} in the place of {one}",
        f"{part_key('neurgrad', other)}: foreign: shard {one} in the place of {other}",
        f"neurgrad/shard-000099.parquet: foreign: the plan has {N_SHARDS} shards",
        "run.json: damaged: it was changed after it was written",
    ):
        assert expected in found.out, found.out
    assert found.out.count(": damaged: ") + found.out.count(": foreign: ") + found.out.count(": missing") == 7

    with refused(ConfigurationError, "repair", "no", allowed="true or false"):
        verify(composed("verify", [*where, "repair=no"], VerifyConfig))
    one_replica = ["cluster.replicas=1", "cluster.cpus_per_replica=1"]
    code = verify(composed("verify", [*where, "repair=true", *one_replica], VerifyConfig))
    repaired = capsys.readouterr()
    assert code == 0, repaired.out + repaired.err
    assert re.search(r"computing again: shards .*\(5\)", repaired.out)
    assert "clean: every part is there and as it was written" in repaired.out
    assert store.get("foreign/neurgrad/shard-000099.parquet") == first
    invariant(disturbed)
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert all(secret not in text for text in (*found, *repaired))

"""Requests to servers that say nothing, or little, in all the ways in which they do: given up in time, not before."""

from __future__ import annotations

import logging
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from infra.s3.server import BUCKET, Keys, Server
from neg_service.errors import DestinationError, StorageError
from neg_service.storage import s3, waiting
from neg_service.storage.objects import ObjectStore
from neg_service.storage.requests import within
from neg_service.storage.stores import open_store
from neg_service.storage.waiting import NoAnswer
from tests.faults.proxy import Link
from tests.s3 import acting_as

PATIENCE = 2.0
# The client's own time-outs, with all their repetitions, are minutes.
AT_ONCE = 60.0


@pytest.fixture(scope="module")
def server(server: Server) -> Iterator[Server]:
    """The same for all tests of this file, as the one who may write."""
    with acting_as(server.writer):
        yield server


@pytest.fixture
def as_somebody() -> Iterator[None]:
    with acting_as(Keys("somebody", "hush")):
        yield


@contextmanager
def mute(answer: Callable[[socket.socket], None] = lambda client: None, backlog: int = 100) -> Iterator[int]:
    """The port of a server that takes connections, and does with them what it is told."""
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as listener, ExitStack() as kept:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client = kept.enter_context(listener.accept()[0])
                    threading.Thread(target=answer, args=(client,), daemon=True).start()

        serving = threading.Thread(target=serve, daemon=True)
        if backlog:
            serving.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        if backlog:
            # Whoever it takes last is to be kept, too, before all are closed.
            serving.join()


def drip(client: socket.socket) -> None:
    """A reply of a byte a second."""
    with suppress(OSError):
        for letter in b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000:
            client.sendall(bytes([letter]))
            time.sleep(1)


def drip_body(client: socket.socket) -> None:
    """A reply that begins well, and goes on at a byte a second."""
    with suppress(OSError):
        client.recv(2**16)
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            client.sendall(b"x")
            time.sleep(1)


def requests_of(client: socket.socket) -> Iterator[bytes]:
    """The head of each request that comes whole, in lower case."""
    with suppress(OSError), client.makefile("rb") as lines:
        while head := b"".join(iter(lines.readline, b"\r\n")).lower():
            if b"100-continue" in head:
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head)
            lines.read(int(length[1]) if length else 0)
            yield head


def too_busy(client: socket.socket) -> None:
    """Everything is taken, and refused for now."""
    said = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>"
    for head in requests_of(client):
        body = b"" if head.startswith(b"head") else said
        client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


def resetting(client: socket.socket) -> None:
    """Everything is taken, and the connection reset."""
    for _ in requests_of(client):
        # To linger for no time is to say so to the other side.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        break
    client.close()


@contextmanager
def unreachable() -> Iterator[int]:
    """A port where packets vanish: Linux drops what comes when a listener's queue is full."""
    with mute(backlog=0) as port, ExitStack() as full:
        for _ in range(3):
            caller = full.enter_context(socket.socket())
            caller.setblocking(False)
            with suppress(BlockingIOError):
                caller.connect(("127.0.0.1", port))
        yield port


def refusing() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


SILENT = {
    "http-mute": mute,
    "https-mute": mute,
    "http-drip": lambda: mute(drip),
    "http-drip_body": lambda: mute(drip_body),
    "http-unreachable": unreachable,
    "https-unreachable": unreachable,
    "http-refusing": contextmanager(refusing),
}
OPERATIONS: dict[str, Callable[[ObjectStore], object]] = {
    "put": lambda store: store.put("t/a", b"1"),
    "put of megabytes": lambda store: store.put("t/a", bytes(2**23)),
    "put in parts": lambda store: store.put("t/a", bytes(101 * 2**20)),
    "get": lambda store: store.get("t/a"),
    "list": lambda store: store.list("t"),
    "delete": lambda store: store.delete("t/a"),
    "clear": lambda store: store.clear_unfinished(),
}


def timed_failure(act: Callable[[], object]) -> tuple[float, str]:
    """How long something took to fail, and what it said."""
    began = time.monotonic()
    with pytest.raises((StorageError, DestinationError, OSError)) as error:
        act()
    return time.monotonic() - began, str(error.value)


def timed_failures(acts: dict[str, Callable[[], object]]) -> dict[str, tuple[float, str]]:
    """The same of several things at once."""
    with ThreadPoolExecutor(len(acts)) as pool:
        return dict(zip(acts, pool.map(timed_failure, acts.values()), strict=True))


@pytest.mark.usefixtures("as_somebody")
def test_a_silent_server_is_waited_for_as_long_as_it_was_told() -> None:
    with ExitStack() as open_:
        ports = {form: open_.enter_context(serve()) for form, serve in SILENT.items()}
        stores = {
            form: open_store(f"s3://{BUCKET}/x", f"{form.partition('-')[0]}://127.0.0.1:{port}", PATIENCE)
            for form, port in ports.items()
        }
        failures = timed_failures({form: partial(store.get, "t/a") for form, store in stores.items()})
    for form, (seconds, said) in failures.items():
        assert PATIENCE * 0.9 <= seconds < AT_ONCE, form
        assert f"127.0.0.1:{ports[form]}" in said, form
        assert "(storage.retry_timeout_seconds=2)" in said, form
        assert "\n" not in said, form


@pytest.mark.usefixtures("as_somebody")
def test_every_operation_ends_when_a_server_is_silent() -> None:
    with mute() as port:
        store = open_store(f"s3://{BUCKET}/x", f"http://127.0.0.1:{port}", PATIENCE)
        failures = timed_failures({name: partial(operation, store) for name, operation in OPERATIONS.items()})
    for name, (seconds, said) in failures.items():
        assert PATIENCE * 0.9 <= seconds < AT_ONCE, name
        assert "no answer for" in said, name


@pytest.mark.usefixtures("as_somebody")
def test_who_is_hasty_is_told_soon_also_when_a_server_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SECONDS_WITHOUT_RETRIES", PATIENCE)
    monkeypatch.setattr(s3, "_CONNECT_SECONDS", PATIENCE)
    with ExitStack() as open_:
        acts: dict[str, Callable[[], object]] = {}
        for form, serve in SILENT.items():
            if form != "http-refusing":
                endpoint_url = f"{form.partition('-')[0]}://127.0.0.1:{open_.enter_context(serve())}"
                store = open_store(f"s3://{BUCKET}/x", endpoint_url)
                acts |= {f"{form} check": store.check, f"{form} get": partial(store.get, "t/a")}
        failures = timed_failures(acts)
    for name, (seconds, said) in failures.items():
        assert seconds < AT_ONCE, name
        # A new question on a connection that still drips the last answer is told as the library tells it.
        assert re.search(r"no answer for|timed out|; tried for \d+ s", said), f"{name}: {said}"


@pytest.mark.usefixtures("as_somebody")
def test_what_a_server_says_that_refuses_everything_is_told(caplog: pytest.LogCaptureFixture) -> None:
    patience, acts = 12.0, dict[str, Callable[[], object]]()
    caplog.set_level(logging.INFO)
    with mute(too_busy) as busy, mute(resetting) as resets:
        for name, port in (("busy", busy), ("resets", resets)):
            store = open_store(f"s3://{BUCKET}/x", f"http://127.0.0.1:{port}", patience)
            # Megabytes arrive each time, and that is no reason to wait for longer.
            acts[f"{name} put"] = partial(store.put, "t/a", bytes(3 * 2**20))
            acts[f"{name} get"] = partial(store.get, "t/a")
        failures = timed_failures(acts)
    # A get begins with a look, to which a reply has no body.
    expected = {"busy put": "503 SlowDown Please reduce your rate", "busy get": "503 Service Unavailable"}
    expected |= dict.fromkeys(["resets put", "resets get"], "reset by peer")
    for name, (seconds, said) in failures.items():
        assert seconds < AT_ONCE, name
        assert expected[name] in said, name
        assert "(storage.retry_timeout_seconds=12)" in said, name
        assert "\n" not in said, name
    assert "waiting for up to" in caplog.text
    assert "never retrieved" not in caplog.text


@pytest.mark.faults
def test_a_link_that_is_slow_is_no_outage(server: Server) -> None:
    data = os.urandom(900_000)
    with Link(server.endpoint_url, bytes_a_second=200_000) as link:
        store = open_store(f"s3://{BUCKET}/slow", link.url, 2 * PATIENCE)
        began = time.monotonic()
        store.put("t/a", data)
        assert time.monotonic() - began > 2 * PATIENCE, "it is to take longer than the patience"
        assert store.get("t/a") == data
        filesystem, root = store.arrow()
        with filesystem.open_input_file(f"{root}/t/a") as file:
            assert file.read_at(1000, 5) == data[5:1005]
    assert link.passed > 2 * len(data)


def test_an_outage_is_told_within_ten_seconds_and_costs_waiting_alone(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neg_service")
    with Link(server.endpoint_url) as link:
        store = open_store(f"s3://{BUCKET}/healed", link.url, retry_timeout_seconds=20)
        store.put("t/a", b"before")
        link.is_cut = True
        # What was swallowed meanwhile never comes: only another attempt helps.
        healing = threading.Timer(1, setattr, (link, "is_cut", False))
        healing.start()
        store.put("t/a", b"after")
        healing.join()
        assert store.get("t/a") == b"after"
    said = [message for message in caplog.messages if "storage.uri=" in message or "answers" in message]
    assert f"(storage.endpoint_url={link.url}): no answer for " in said[0]
    assert "waiting for up to" in said[0]
    assert "trying again for" in said[1]
    assert "answers again, after" in said[2]


def test_reading_rows_ends_when_the_server_falls_silent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with Link(server.endpoint_url) as link:
        store = open_store(f"s3://{BUCKET}/rows", link.url)
        store.put("t/a", os.urandom(10_000))
        filesystem, root = store.arrow()
        with filesystem.open_input_file(f"{root}/t/a") as file:
            assert file.size() == 10_000
            link.is_cut = True
            monkeypatch.setattr(waiting, "SECONDS_WITHOUT_RETRIES", PATIENCE)
            seconds, said = timed_failure(lambda: file.read_at(100, 0))
    assert seconds < AT_ONCE
    assert "no answer for" in said


def test_an_object_is_read_in_ranges(server: Server) -> None:
    store = open_store(f"s3://{BUCKET}/ranges", server.endpoint_url)
    store.put("t/a", bytes(range(100)))
    filesystem, root = store.arrow()
    with filesystem.open_input_file(f"{root}/t/a") as file:
        assert file.size() == 100
        assert (file.read_at(3, 10), file.read_at(10, 95), file.read_at(5, 100)) == (
            bytes([10, 11, 12]), bytes(range(95, 100)), b"",
        )  # fmt: skip
        file.seek(-2, 2)
        assert file.read() == bytes([98, 99])
    with filesystem.open_input_stream(f"{root}/t/a") as stream:
        assert stream.read() == bytes(range(100))
    with pytest.raises(FileNotFoundError):
        filesystem.open_input_file(f"{root}/t/none")
    assert filesystem.get_file_info(f"{root}/t/a").size == 100
    assert filesystem.get_file_info(f"{root}/t/none").type is pafs.FileType.NotFound


def test_what_has_no_time_out_of_its_own_is_given_one(tmp_path: Path) -> None:
    assert within(60, lambda: 3) == 3
    with pytest.raises(FileNotFoundError):
        within(60, (tmp_path / "none").read_bytes)
    with pytest.raises(NoAnswer, match="no answer for 0 s"):
        within(0.1, threading.Event().wait)

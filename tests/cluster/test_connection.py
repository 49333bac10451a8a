"""What is no Ray cluster, and what does not answer, is told in one line and in time: real sockets on this machine."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from jobs.drain import main as leave
from neg_service.cluster import submission
from neg_service.cluster.connection import connect, require_place_for_sockets
from neg_service.cluster.submission import connect_to_job_server
from neg_service.config import ClusterConfig
from neg_service.errors import ConfigurationError
from tests.refusals import refused


@contextmanager
def listening(kind: str) -> Iterator[str]:
    """A port of this machine where something listens: silent, closing (as a forwarded one), resetting, http, or web."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                    if kind == "silent":
                        taken.append(connection)
                        continue
                    if kind != "closing":
                        connection.recv(4096)
                    if kind == "http":
                        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    if kind == "web":
                        body = b'{"version": "another kind of server"}'
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                    if kind == "words":
                        connection.sendall(b"220 mail.example.com ESMTP\r\n")
                    connection.close()
                except OSError:
                    if server.fileno() < 0:
                        return

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            # A thread that waits to accept is woken by this, and not by a close.
            server.shutdown(socket.SHUT_RDWR)
            for connection in taken:
                connection.close()


@contextmanager
def another_grpc_server() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


@pytest.fixture(autouse=True)
def _no_address_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")


def refusal(address: str | None, **more: float) -> str:
    began = time.monotonic()
    with pytest.raises(ConfigurationError) as caught:
        connect(ClusterConfig(address=address, connect_seconds=more.get("connect_seconds", 3.0)))
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("silent", r"has answered there within 1 s (cluster.connect_seconds)"), ("closing", "a port that is forwarded"),
        ("http", "an HTTP server, such as Ray's job server"), ("words", "no Ray cluster answers there"),
    ],
)  # fmt: skip
def test_what_listens_and_is_no_cluster(kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(kind) as address:
        said = refusal(address, connect_seconds=1.0)
        assert said.startswith(f"cluster.address={address}: ")
        assert words in said
        assert "such as HEAD:6379" in said
        # Where the environment says it, the environment is named; `auto` is as good as nothing.
        monkeypatch.setenv("RAY_ADDRESS", address)
        for given in (None, "auto"):
            assert refusal(given, connect_seconds=0.5).startswith(f"RAY_ADDRESS={address}: ")


def test_a_long_silence_is_told_while_it_lasts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neg_service.cluster.connection._SILENT_SECONDS", 0.3)
    with listening("silent") as address, caplog.at_level("INFO"):
        assert "within 1.5 s" in refusal(address, connect_seconds=1.5)
    assert "takes connections and does not answer; waiting for 1 s more" in caplog.text


def test_another_grpc_server_is_no_head_node() -> None:
    with another_grpc_server() as address:
        assert "what answers there is no head node of Ray" in refusal(address)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "is the address of a job server, to which python -m jobs.submit --address http://127"),
        ("https://head/ray", "is the address of a job server"), ("HTTP://head:8265", "is the address of a job server"),
        ("ray://head:10001", "such as HEAD:6379"),
        ("head", "is no address of a cluster: give HOST:PORT"), ("head:", "is no address"), (":6379", "is no address"),
        ("head:0", "is no address"), ("head:65536", "is no address"), ("me:secret@head:1", "is no address"),
        ("127.0.0.1:9", "no Ray cluster answers there: Connection refused"),
        ("[::1]:9", "no Ray cluster answers there: "),
        ("no-such-host.invalid:6379", "no Ray cluster answers there: "),
        ("a..b:6379", "no Ray cluster answers there: "),
    ],
)  # fmt: skip
def test_what_is_no_address_of_a_cluster(address: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said, shown = refusal(address), address.replace("me:secret@", "***@")
    assert said.startswith(f"cluster.address={shown}: ")
    assert words in said
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert refusal(None).startswith(f"RAY_ADDRESS={shown}: ")


def test_auto_without_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Ray looks for processes of any cluster on this machine, and for the note that `ray start` leaves.
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: set())
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    said = refusal("auto")
    assert said.startswith(
        "cluster.address=auto: no Ray cluster runs on this machine: start one with `ray start --head`"
    )
    # A note of a cluster that is gone.
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    assert re.fullmatch(r"cluster.address=auto \(\S+:9\): no Ray cluster answers there: .*", refusal("auto"))


def test_the_command_of_a_node_that_leaves_names_its_own_options() -> None:
    with (
        listening("silent") as address,
        refused(ConfigurationError, "--address", address, says=r" within 1 s \(--seconds\)"),
    ):
        leave(["--address", address, "--seconds", "1"])
    with refused(ConfigurationError, "--address", "http://head:8265", says="is the address of a job server"):
        leave(["--address", "http://head:8265"])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("silent", "no job server has answered there within 1 s"), ("closing", "no job server answers there"),
        ("http", "is no Ray job server"), ("web", "is no Ray job server"), ("words", "no job server answers there"),
    ],
)  # fmt: skip
def test_what_listens_and_is_no_job_server(kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "_ANSWER_SECONDS", 1.0)
    began = time.monotonic()
    with listening(kind) as address, refused(ConfigurationError, "--address", f"http://{address}", says=words):
        connect_to_job_server(f"http://{address}")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("address", ["head:6379", "ray://head:10001", "auto", "http://"])
def test_a_clusters_address_is_no_job_servers(address: str) -> None:
    with refused(ConfigurationError, "--address", address, says="the job server's, such as http://127.0.0.1:8265"):
        connect_to_job_server(address)


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_place_in_which_ray_cannot_start_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(other, raising=False)
    # The longest that fits and a byte more, of letters with two bytes; a file, below a file, what cannot be written.
    room = 107 - len(f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store")
    fits = f"/tmp/{'é' * ((room - 5) // 2)}{'x' * ((room - 5) % 2)}"
    assert len(os.fsencode(fits)) == room
    for place, words in (
        (f"{fits}x", rf"has {room + 1} bytes, and Ray's sockets below it leave room for {room}: set RAY_TMPDIR to a"),
        (f"/tmp/{'d' * 300}", "has 305 bytes"), ("/etc/hostname", "(Not a directory|File exists)"),
        ("/dev/null/x", "Not a directory"), ("/proc/x", "No such file"), ("/sys", "Ray cannot write its files"),
        ("tmp", "must be an absolute path"),
    ):  # fmt: skip
        monkeypatch.setenv(name, place)
        with refused(ConfigurationError, name, says=words):
            require_place_for_sockets()
    # It is asked before Ray starts.
    monkeypatch.setenv(name, f"{fits}x")
    with refused(ConfigurationError, name):
        connect(ClusterConfig())
    for good in ("", "/tmp"):
        monkeypatch.setenv(name, good)
        require_place_for_sockets()

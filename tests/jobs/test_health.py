"""What `jobs.health` makes of a node's answers; that Ray gives these is shown on the image (`infra/test_image.py`)."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from jobs.health import main


@contextmanager
def agent(status: int, text: str) -> Iterator[list[str]]:
    """A server that answers one thing to all that ask for a node's health; its port, as arguments."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/api/healthz" else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield ["--port", str(server.server_port)]
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_node_that_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    with agent(200, "raylet: success\ngcs: success") as port:
        assert main(port) == 0
    assert capsys.readouterr().out == "raylet: success; gcs: success\n"


def test_a_node_that_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with agent(503, "raylet: success\ngcs: GCS health check failed.") as port:
        assert main(port) == 1
    assert "not well: raylet: success; gcs: GCS health check failed." in capsys.readouterr().err


def test_no_node_and_one_that_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert main(["--port", str(port), "--seconds", "0.2"]) == 1
    assert main(["--port", str(port)]) == 1
    timed_out, refused = capsys.readouterr().err.splitlines()
    assert f"error: no Ray node answers on port {port}: timed out" in timed_out
    assert "refused" in refused


def test_an_answer_that_drips_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    over = threading.Event()

    def drip(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while not over.wait(0.1):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip, args=(listening,))
        thread.start()
        began = time.monotonic()
        assert main(["--port", str(listening.getsockname()[1]), "--seconds", "0.4"]) == 1
        assert time.monotonic() - began < 2
        over.set()
        thread.join()
    assert "not whole after 0.4 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mistake",
    [
        ["--port", "0"],
        ["--port", "x"],
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--seconds", "inf"],
        ["--seconds", "1e10"],
        ["x"],
    ],
)
def test_mistakes_are_told_in_one_line(mistake: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(mistake)
    assert ended.value.code == 1
    assert len(capsys.readouterr().err.splitlines()) == 1

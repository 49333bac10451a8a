"""A proxy on the loopback address through which S3 is as bad as a network can make it.

Each request gets a connection of its own on both sides, so that no pool of connections hides a fault. A client that
asks first whether it may send (`Expect: 100-continue`) is told so by the proxy, or it would wait for a reply that the
fault never gives.
"""

from __future__ import annotations

import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_UNAVAILABLE = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
FAULTS = ("reset before", "reset midway", "delay", "503", "lost reply", "cut reply")


@dataclass
class Seen:
    """A request as the proxy read it."""

    method: str
    path: str
    head: bytes
    body: bytes


@dataclass
class Proxy:
    """Stands in front of `endpoint_url`; `decide` names the fault of each request, or None."""

    endpoint_url: str
    decide: Callable[[Seen], str | None] = lambda request: None
    injected: Counter[str] = field(default_factory=Counter)
    # Bytes of replies to GET, by path without the query.
    sent: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Proxy:
        """Listen on a free port."""
        proxy = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                # A client that goes away in the middle is none of our business.
                with suppress(ConnectionError, TimeoutError):
                    proxy._serve(self)

        socketserver.ThreadingTCPServer.allow_reuse_address = True
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def _serve(self, client: socketserver.StreamRequestHandler) -> None:
        head = _head_of(client)
        if not head:
            return None
        lines = head.decode("latin-1").split("\r\n")
        method, path, _ = lines[0].split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if headers.get("expect"):
            client.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(headers.get("content-length", 0))
        fault = self.decide(Seen(method, path, head, b""))
        if fault == "reset midway" and length < 2:
            fault = "reset before"
        if fault is not None:
            self.injected[fault] += 1
        if fault == "reset before":
            return _reset(client)
        body = client.rfile.read(length // 2 if fault == "reset midway" else length)
        if fault == "reset midway":
            return _reset(client)
        if fault == "delay":
            time.sleep(1.5)
        if fault == "503":
            reply = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
            client.wfile.write(reply + b"Content-Length: %d\r\n\r\n" % len(_UNAVAILABLE) + _UNAVAILABLE)
            return None
        reply = self._forward(Seen(method, path, head, body))
        if fault == "lost reply":
            return _reset(client)
        if fault == "cut reply":
            client.wfile.write(reply[: len(reply) - max(1, len(reply) // 4)])
            return _reset(client)
        if method == "GET":
            self.sent[path.partition("?")[0]] += len(reply)
        client.wfile.write(reply)
        return None

    def _forward(self, request: Seen) -> bytes:
        parts = urlsplit(self.endpoint_url)
        kept = [line for line in request.head.split(b"\r\n") if line and not line.lower().startswith(_NOT_FORWARDED)]
        try:
            with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=60) as server:
                server.sendall(b"\r\n".join([*kept, b"Connection: close", b"", b""]) + request.body)
                pieces = []
                while piece := server.recv(2**16):
                    pieces.append(piece)
        except OSError:
            return b""
        return b"".join(pieces)


# Of the hop, not of the request; neither is signed.
_NOT_FORWARDED = (b"connection:", b"expect:")


def _head_of(client: socketserver.StreamRequestHandler) -> bytes:
    lines = []
    while (line := client.rfile.readline()) not in (b"\r\n", b""):
        lines.append(line)
    return b"".join(lines)


def _reset(client: socketserver.StreamRequestHandler) -> None:
    """Close so that the other side gets a reset and not an orderly end."""
    client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.connection.close()
    # What the handler would still flush has nowhere to go.
    client.wfile = open("/dev/null", "wb")  # noqa: SIM115, PTH123


@dataclass
class Link:
    """A TCP connection to `endpoint_url` that may be slow, or swallow all that is sent without a word."""

    endpoint_url: str
    bytes_a_second: float = float("inf")
    is_cut: bool = False
    passed: int = 0

    def __enter__(self) -> Link:
        """Listen on a free port."""
        self._open = [socket.socket()]
        self._listener = self._open[0]
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening, and end what is open."""
        self._listener.shutdown(socket.SHUT_RDWR)
        for one in self._open:
            one.close()

    def _accept(self) -> None:
        parts = urlsplit(self.endpoint_url)
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((parts.hostname or "", parts.port or 80))
                self._open += [client, server]
                for a, b in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**13):
                if not self.is_cut:
                    time.sleep(len(data) / self.bytes_a_second)
                    sink.sendall(data)
                    self.passed += len(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

"""Requests to a server by s3fs, which are given up when nothing moves, however long its own time-outs are.

botocore has time-outs for connecting and for a read, each of them once an attempt; names that nobody resolves, a body
that is sent into the void, a handshake that stalls and a reply of a byte a second have none. The kernel knows what the
other side has acknowledged, whatever the client is at.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from aiohttp import AddrInfoType
from fsspec.asyn import sync

from neg_service.storage.waiting import NoAnswer, waiting

T = TypeVar("T")

# Of Linux' struct tcp_info: tcpi_bytes_acked and tcpi_bytes_received.
_TCP_INFO, _TCP_INFO_SIZE, _COUNTS_AT = getattr(socket, "TCP_INFO", None), 136, 120


class Traffic:
    """Bytes that went over connections and arrived, on either side; aiohttp makes its sockets here."""

    def __init__(self) -> None:
        """Nothing so far."""
        self._seen: WeakKeyDictionary[socket.socket, int] = WeakKeyDictionary()
        self._total = 0

    def __call__(self, address: AddrInfoType) -> socket.socket:
        """A socket for a connection that is about to be made."""
        family, kind, protocol = address[:3]
        made = socket.socket(family, kind, protocol)
        self._seen[made] = 0
        return made

    def moved(self) -> int | None:
        """Bytes so far; None where the system does not say."""
        if _TCP_INFO is None:
            return None
        for connection, before in list(self._seen.items()):
            try:
                told = connection.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_SIZE)
            except OSError:
                # Closed.
                del self._seen[connection]
                continue
            if len(told) < _TCP_INFO_SIZE:
                return None
            now = sum(struct.unpack_from("=QQ", told, _COUNTS_AT))
            self._seen[connection] = now
            self._total += now - before
        return self._total


@cache
def traffic_with(endpoint_url: str | None) -> Traffic:
    """One for each server: s3fs keeps a client for each configuration that it is given, and this is part of it."""
    return Traffic()


class Requests:
    """What an s3fs file system does, each time for as long as something moves."""

    def __init__(self, files: Any, traffic: Traffic, where: str) -> None:
        """`traffic` makes the sockets of `files`; `where` says whose silence it is that a person is told of."""
        self._files, self._traffic, self._where = files, traffic, where
        self.protocol = "s3"

    def pipe_file(self, path: str, data: bytes) -> None:
        """Put an object."""
        self._ask(self._files._pipe_file, path, data)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """An object, or some of it."""
        data: bytes = self._ask(self._files._cat_file, path, start=start, end=end)
        return data

    def info(self, path: str) -> Any:
        """What is known of an object, FileNotFoundError if there is none."""
        return self._ask(self._files._info, path)

    def find(self, path: str, detail: bool) -> Any:
        """What is below a path."""
        return self._ask(self._files._find, path, detail=detail)

    def rm_file(self, path: str) -> None:
        """Remove an object."""
        self._ask(self._files._rm_file, path)

    def call_s3(self, method: str, **what: Any) -> Any:
        """A request as S3 has it."""
        return self._ask(self._files._call_s3, method, **what)

    def _ask(self, ask: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        answer: T = sync(self._files.loop, self._watched, ask, *args, **kwargs)
        return answer

    async def _watched(self, ask: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        with waiting() as now:
            task = asyncio.ensure_future(ask(*args, **kwargs))
            try:
                while not (await asyncio.wait({task}, timeout=now.look_seconds))[0]:
                    moved = self._traffic.moved()
                    if moved is not None:
                        now.look(moved, self._where)
                answer = task.result()
                now.get_on()
                return answer
            finally:
                # Of a task that is cancelled aiohttp closes the connection, and the next one has its own.
                task.cancel()


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` gives, which has no time-out of its own (resolving a name, say).

    Raises:
        OSError: by itself, or for want of an answer in time; then it is left to itself.
        ValueError: by itself.
    """
    given: Future[T] = Future()

    def answer() -> None:
        try:
            given.set_result(work())
        except (OSError, ValueError) as error:
            given.set_exception(error)

    # Of a pool's threads the interpreter would wait for the end.
    threading.Thread(target=answer, daemon=True).start()
    try:
        return given.result(seconds)
    except FutureTimeout as error:
        if given.done():
            raise
        raise NoAnswer(f"timed out: no answer for {seconds:.0f} s") from error

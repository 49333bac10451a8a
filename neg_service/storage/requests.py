"""Requests to a server by s3fs, which are given up when nothing moves, however long its own time-outs are.

botocore has time-outs for connecting and for a read, each of them once an attempt; names that nobody resolves, a body
that is sent into the void, a handshake that stalls and a reply of a byte a second have none. The kernel knows what the
other side has acknowledged, whatever the client is at.

botocore repeats what a server refuses, with pauses, and tells of the last refusal alone; it may be given up before
that. So each is heard when it comes.
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
from http import HTTPStatus
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from aiohttp import AddrInfoType, ClientConnectionResetError
from fsspec.asyn import sync

from neg_service.errors import one_line
from neg_service.storage.waiting import NoAnswer, waiting, waiting_now

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

    async def _heard(self, ask: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        """The same, with each request of the client told to what waits for it."""
        events = (await self._files.set_session()).meta.events
        # By their names they are there but once, since a client is shared and kept.
        events.register("before-send.s3", _on_request, unique_id="neg-service-asks")
        events.register("response-received.s3", _on_reply, unique_id="neg-service-hears")
        return await ask(*args, **kwargs)

    async def _watched(self, ask: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        loop = asyncio.get_running_loop()
        if loop.get_exception_handler() is None:
            loop.set_exception_handler(_without_lost_writers)
        with waiting() as now:
            task = asyncio.ensure_future(self._heard(ask, *args, **kwargs))
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


def _without_lost_writers(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """aiohttp forgets who writes a request whose connection is closed; the request fails by itself, and says so."""
    if not isinstance(context.get("exception"), ClientConnectionResetError):
        loop.default_exception_handler(context)


def _on_request(**_: Any) -> None:
    if now := waiting_now():
        now.ask()


def _on_reply(parsed_response: dict[str, Any] | None = None, exception: Exception | None = None, **_: Any) -> None:
    if now := waiting_now():
        if exception is not None:
            now.refuse(reason_of(exception))
        elif said := _refusal(parsed_response or {}):
            now.refuse(said)
        else:
            # Also "there is no such object" is an answer.
            now.get_on()


def _refusal(reply: dict[str, Any]) -> str | None:
    """What a server says that cannot do now what it is asked for."""
    status = reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status < HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.TOO_MANY_REQUESTS:
        return None
    error = reply.get("Error", {})
    said = [
        str(status),
        *(str(error[key]) for key in ("Code", "Message") if error.get(key) not in (None, "", str(status))),
    ]
    return " ".join(" ".join(said).split())


def reason_of(error: BaseException) -> str:
    """What an error says, with what botocore had it from, which it does not always say."""
    said, cause = one_line(error), getattr(error, "kwargs", {}).get("error")
    why = one_line(cause) if isinstance(cause, BaseException) else ""
    return said if why in said else f"{said}: {why}"


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

"""How long an operation on a store is waited for, and when a person is told.

Packets that vanish tell nobody, and a transfer that is slow is no outage. So what counts is whether anything moves: an
operation may take as long as it likes while it gets on, and is given up when it got nowhere for too long. A store says
what it sees (`s3.py`: the bytes that the other side has acknowledged), the caller says how long is too long
(`retries.py`), and the two meet here. A local disk that hangs says nothing, and is waited for.

A request that is refused (a server that is too busy, a connection that is reset) got nowhere, whatever moved for it:
from the first that is, until one succeeds, time counts as if nothing had moved; a transfer under way is left alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger(__name__)

# Without retries: a server that is merely slow to answer has done so by then.
SECONDS_WITHOUT_RETRIES = 30.0
# An attempt is given up after half of what is left, so that another one on connections of its own may follow. Below the
# second of these a server that is away cannot be told from a slow one, and no attempt is worth less than the third.
_LONGEST_STALL_SECONDS, _SHORTEST_STALL_SECONDS, _LEAST_STALL_SECONDS = 60.0, 10.0, 1.0
_SPEAK_SECONDS = 8.0
# Less than this is a trickle, as of a server that sends a byte a second, and not a slow link.
_BYTES_A_SECOND = 1024


class NoAnswer(OSError):
    """An attempt that got nowhere for as long as it was given."""


class Waiting:
    """Of one operation, with all its attempts: how long it may still take, and how long it has got nowhere.

    Until its first attempt has failed, the operation may take as long as it gets on; then it ends, with what attempt
    comes after, `seconds` after it was last seen to get on. One that gets nowhere at all has `seconds` from its start.
    A client that repeats requests by itself tells of each: `ask`, and then `refuse` or `get_on`.
    """

    def __init__(self, seconds: float, is_repeated: bool = False) -> None:
        """`is_repeated`: another attempt follows on one that fails, so that a single one need not wait that long."""
        self.seconds = seconds
        self.has_spoken = False
        self.began = self._moved = self._seen = time.monotonic()
        self._bytes: int | None = None
        self._until: float | None = None
        self._is_repeated = is_repeated
        self._refused: str | None = None
        self.begin_attempt()

    @property
    def left(self) -> float:
        """Seconds until no other attempt is made."""
        return max(0.0, (self._last_move + self.seconds if self._until is None else self._until) - time.monotonic())

    @property
    def _last_move(self) -> float:
        return self._moved if self._refused_from is None else self._refused_from

    @property
    def look_seconds(self) -> float:
        """How often to look whether anything moves."""
        return min(1.0, self.stall_seconds / 4)

    def begin_attempt(self) -> None:
        """From here on nothing has moved yet."""
        # When things last moved before requests began to be refused, in this attempt; requests that are under way.
        self._refused_from: float | None = None
        self._asked = 0
        stall = self.left
        if self._is_repeated:
            stall = min(stall, max(stall / 2, _SHORTEST_STALL_SECONDS), _LONGEST_STALL_SECONDS)
        self.stall_seconds = max(_LEAST_STALL_SECONDS, stall)
        self._seen = time.monotonic()
        self._bytes = None

    def fail(self) -> float:
        """An attempt has failed; the seconds that are left for others."""
        if self._until is None:
            self._until = self._last_move + self.seconds
        return self.left

    def ask(self) -> None:
        """A request goes out."""
        self._asked += 1

    def refuse(self, said: str) -> None:
        """A request came back undone, which the client may repeat; `said`: what the server said."""
        self._refused = said
        self._asked = max(0, self._asked - 1)
        if self._refused_from is None:
            self._refused_from = self._seen
        if not self._asked:
            # What it moved was for nothing.
            self._seen, self._bytes = self._refused_from, None

    def get_on(self) -> None:
        """A part of the operation is done."""
        self._asked = max(0, self._asked - 1)
        self._moved = self._seen = time.monotonic()
        self._bytes = self._refused = self._refused_from = None

    def look(self, moved: int, where: str) -> None:
        """`moved`: bytes so far, of this operation and those beside it on the same connections.

        Raises:
            NoAnswer: next to nothing has moved for too long.
        """
        now = time.monotonic()
        is_pausing = self._refused_from is not None and not self._asked
        if self._bytes is None or is_pausing:
            self._bytes = moved
        if moved - self._bytes >= max(1.0, (now - self._seen) * _BYTES_A_SECOND):
            self._moved = self._seen = now
            self._bytes = moved
        stalled = now - self._seen
        if stalled >= self.stall_seconds:
            raise NoAnswer(self._trouble("timed out: no answer", stalled))
        nowhere = stalled if self._refused_from is None else now - self._refused_from
        if nowhere >= _SPEAK_SECONDS and not self.has_spoken:
            self.has_spoken = True
            what = self._trouble("no answer", nowhere)
            log.warning("%s: %s; waiting for up to %.0f s more", where, what, self.left)

    def _trouble(self, silence: str, seconds: float) -> str:
        """What goes wrong: what was said, or `silence`, and for how long."""
        if self._refused_from is not None:
            return f"{self._refused}; tried for {seconds:.0f} s"
        before = "" if self._refused is None else f"; before that: {self._refused}"
        return f"{silence} for {seconds:.0f} s{before}"


_NOW: ContextVar[Waiting | None] = ContextVar("waiting", default=None)


def waiting_now() -> Waiting | None:
    """The operation that what asks is part of."""
    return _NOW.get()


@contextmanager
def waiting(asked: Waiting | None = None) -> Iterator[Waiting]:
    """What is waited for inside counts as `asked`, or as what is around it, or, with neither, as without retries."""
    now = asked or _NOW.get() or Waiting(SECONDS_WITHOUT_RETRIES)
    token = _NOW.set(now)
    try:
        yield now
    finally:
        _NOW.reset(token)

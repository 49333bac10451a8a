"""Progress for a person: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

from tqdm import tqdm

from neg_service.cluster.messages import ShardResult

log = logging.getLogger(__name__)


class Progress:
    """Counts prompts; `done` of `total` were there before this start and do not count into the rate."""

    def __init__(
        self, total: int, done: int, every_seconds: float, stream: TextIO | None = None, is_logged: bool = False
    ) -> None:
        """Shows itself on `stream`, stderr if not given, or logs its lines among all others."""
        self._stream = stream or sys.stderr
        self._total, self._done, self._before = total, done, done
        self._every = every_seconds
        self._is_logged = is_logged
        self._began = self._spoke = time.monotonic()
        self._ended: float | None = None
        self.bytes = 0
        self.computed_seconds = 0.0
        self._bar = (
            tqdm(total=total, initial=done, unit="prompt", file=self._stream, dynamic_ncols=True, smoothing=0.1)
            if self._stream.isatty() and not is_logged
            else None
        )

    def start(self) -> None:
        """The first replica is ready: the rate counts from here, not from while models were loading."""
        self._began = self._spoke = time.monotonic()

    def add(self, result: ShardResult) -> None:
        """A shard is done."""
        self._done += result.n_prompts
        self.bytes += sum(result.bytes.values())
        self.computed_seconds += result.computed_seconds
        if self._bar is not None:
            self._bar.update(result.n_prompts)
        elif time.monotonic() - self._spoke >= self._every or self._done >= self._total:
            self._spoke = time.monotonic()
            if self._is_logged:
                log.info(self.line())
            else:
                self._stream.write(f"{self.line()}\n")
                self._stream.flush()

    def line(self) -> str:
        """For example `128/316 prompts (41 %), 24.1 prompts/s, 0:08 left`."""
        rate = (self._done - self._before) / max(1e-9, time.monotonic() - self._began)
        left = "time left unknown" if self.seconds_left is None else f"{clock(self.seconds_left)} left"
        return (
            f"{self._done}/{self._total} prompts ({100 * self._done / self._total:.0f} %), {rate:.3g} prompts/s, {left}"
        )

    @property
    def seconds_left(self) -> float | None:
        """At the pace since the first replica was ready; None while nothing is known of it."""
        if self._done == self._before:
            return None
        return (self._total - self._done) * self.seconds / (self._done - self._before)

    @property
    def n_now(self) -> int:
        """Prompts done since this start."""
        return self._done - self._before

    @property
    def seconds(self) -> float:
        """Since the first replica was ready."""
        return (self._ended or time.monotonic()) - self._began

    def close(self) -> None:
        """Stop the clock, and leave the terminal as it was."""
        self._ended = time.monotonic()
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """For example `0:08` or `2:05:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

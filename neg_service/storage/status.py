"""How far a run is, from listings alone: also while it runs, and from any machine."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from neg_service.errors import StorageError
from neg_service.storage.reader import Run, reading

# The rate is that of the last minutes without a longer break; a run is taken for running while its newest part is not
# much older than the pauses between parts were, or, with no more than one part, than this.
_WINDOW_SECONDS = 600.0
_PAUSES, _LEAST_SECONDS = 5, 60.0
_FIRST_SECONDS = 1800.0


@dataclass(frozen=True)
class TableStatus:
    """Of the shards that are done: a table's parts, their bytes as stored, their rows (None if not counted)."""

    name: str
    n_parts: int
    n_bytes: int
    n_rows: int | None


@dataclass(frozen=True)
class Status:
    """How far a run is.

    missing: shards neither done nor given up. failed: those given up, with their records (error, attempts). rate:
    shards a second over the last minutes in which parts came; None with fewer than two. silent_seconds: since the
    newest part, by the clock of this machine; is_running is guessed from it, None before the first part. seconds_left:
    at that rate, while it runs. unreadable: why rows of a table could not be counted. extends: the URI of the run that
    it extends, whose shards and prompts (n_prompts_before) count into all but the pace.
    """

    uri: str
    n_shards: int
    shard_size: int
    n_prompts: int
    done: frozenset[int]
    missing: frozenset[int]
    failed: dict[int, dict[str, Any]]
    tables: tuple[TableStatus, ...]
    rate: float | None
    silent_seconds: float | None
    is_running: bool | None
    seconds_left: float | None
    unreadable: str = ""
    extends: str | None = None
    n_prompts_before: int = 0


def status_of(run: Run, *, count_rows: bool = True, now: float | None = None) -> Status:
    """How far `run` is; counting rows reads the footer of each part, which takes a while where there are many."""
    now = time.time() if now is None else now
    at = run.snapshot()
    done = run.done(at)
    tables, finished, unreadable = [], [], ""
    for name, folder in zip(run.tables, run.directory.tables, strict=True):
        parts = [part for shard, part in at.parts[folder].items() if shard in done]
        rows = None
        try:
            with reading(run):
                rows = run.table(name, at=at).count_rows() if count_rows else None
        except StorageError as error:
            unreadable = str(error)
        tables.append(TableStatus(name, len(parts), sum(part.size for part in parts), rows))
        # Whether it runs, and how fast, says nothing that another run has put.
        own = [part for shard, part in at.parts[folder].items() if shard in done and shard in run.own_shards]
        finished = sorted(part.modified for part in own)
    failed = {shard: record for shard, record in run.directory.failed().items() if shard not in done}
    missing = frozenset(range(run.n_shards)) - done - set(failed)
    recent = _without_breaks([when for when in finished if when > finished[-1] - _WINDOW_SECONDS])
    spread = recent[-1] - recent[0] if recent else 0.0
    rate = (len(recent) - 1) / spread if spread > 0 else None
    # The server's clock may be ahead of ours.
    silent = max(0.0, now - finished[-1]) if finished else None
    # Before the first part nobody can know: replicas may be starting.
    is_running = False if not missing else None if silent is None else silent <= _longest_pause(recent)
    return Status(
        uri=run.uri,
        n_shards=run.n_shards,
        shard_size=int(run.config["plan"]["shard_size"]),
        n_prompts=run.n_prompts,
        done=frozenset(done),
        missing=missing,
        failed=failed,
        tables=tuple(tables),
        rate=rate,
        silent_seconds=silent,
        is_running=is_running,
        seconds_left=len(missing) / rate if is_running and rate else None,
        unreadable=unreadable,
        extends=run.base.uri if run.base else None,
        n_prompts_before=run.base.n_prompts if run.base else 0,
    )


def _longest_pause(times: list[float]) -> float:
    """How long a pause after these times is none to speak of."""
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    return max(_LEAST_SECONDS, _PAUSES * median(pauses)) if pauses else _FIRST_SECONDS


def _without_breaks(times: list[float]) -> list[float]:
    """The last of them, back to where the run stood still."""
    longest = _longest_pause(times)
    start = max((i for i in range(1, len(times)) if times[i] - times[i - 1] > longest), default=0)
    return times[start:]

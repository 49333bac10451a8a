"""python -m jobs.status: how far a run is, also while it runs. `--help` says what can be set."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from jobs.entry import flag_of, start, value_of
from neg_service.config import JobConfig, StorageConfig

if TYPE_CHECKING:
    from neg_service.storage.status import Status


@dataclass
class StatusConfig:
    """Everything that `python -m jobs.status` is told."""

    run: str = ""
    rows: bool = True
    json: bool = False
    storage: StorageConfig = field(default_factory=StorageConfig)
    job: JobConfig = field(default_factory=JobConfig)


def status(config: DictConfig) -> int:
    """Print the status of a run."""
    # Slow to load: see `entry.py`.
    from neg_service.storage.reader import open_run
    from neg_service.storage.status import status_of

    run = open_run(value_of(config, "run"), config.storage.endpoint_url)
    found = status_of(run, count_rows=flag_of(config, "rows"))
    print(_as_json(found) if flag_of(config, "json") else describe(found))
    return 0


def describe(status: Status) -> str:
    """For a person."""
    # Slow to load: see `entry.py`.
    from neg_service.cluster.progress import clock
    from neg_service.report.console import aligned, bytes_text, columns, ranges

    share = 100 * len(status.done) / status.n_shards
    rows = [
        ("state", _state(status)),
        ("prompts", f"{status.n_prompts}, in shards of up to {status.shard_size}"),
        ("shards", f"{len(status.done)} of {status.n_shards} done ({share:.0f} %)"),
        ("missing", ranges(status.missing)),
        ("failed", "\n".join(f"shard {i}: {one['error']}" for i, one in sorted(status.failed.items())) or "none"),
    ]
    if status.extends is not None:
        added = status.n_prompts - status.n_prompts_before
        rows.insert(1, ("extends", f"{status.extends}: {added} prompts beside its {status.n_prompts_before}"))
    if status.rate is not None and status.is_running:
        rate = f"{status.rate * status.shard_size:.3g} prompts/s, {status.rate:.3g} shards/s in the last minutes"
        rows.append(("rate", rate))
    if status.seconds_left is not None:
        rows.append(("time left", f"about {clock(status.seconds_left)}"))
    if status.unreadable:
        rows.append(("unreadable", status.unreadable))
    tables = [
        (one.name, f"{one.n_parts}", "-" if one.n_rows is None else f"{one.n_rows}", bytes_text(one.n_bytes))
        for one in status.tables
    ]
    return f"{status.uri}\n{aligned(rows)}\n\n{columns(('table', 'parts', 'rows', 'stored'), tables)}"


def _state(status: Status) -> str:
    from neg_service.cluster.progress import clock

    if not status.missing:
        return "incomplete: the rest failed" if status.failed else "complete"
    if status.silent_seconds is None:
        return "begun; no shard is done yet"
    newest = f"the newest part came {clock(status.silent_seconds)} ago"
    return f"probably running: {newest}" if status.is_running else f"stopped, or starting: {newest}"


def _as_json(status: Status) -> str:
    found = asdict(status)
    return json.dumps({key: sorted(value) if isinstance(value, frozenset) else value for key, value in found.items()})


if __name__ == "__main__":
    start("status", status, StatusConfig)

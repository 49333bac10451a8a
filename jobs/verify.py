"""python -m jobs.verify: check every part of a run, and repair it on request. `--help` says what can be set."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from jobs.entry import EXIT_INCOMPLETE, flag_of, start, value_of
from neg_service.config import ClusterConfig, JobConfig, ScanConfig, StorageConfig, plain, typed
from neg_service.settings import holds

if TYPE_CHECKING:
    from neg_service.storage.objects import ObjectStore
    from neg_service.storage.verify import Verdict

_PROGRESS_SECONDS = 10.0
_SHOWN = 100


@dataclass
class Moved:
    """Where a model or a data set is now, if it has moved; `device` is of a model."""

    source: str | None = None
    device: Any = field(default="auto", metadata=holds(str | list[str]))


@dataclass
class VerifyConfig:
    """Everything that `python -m jobs.verify` is told."""

    run: str = ""
    repair: bool = False
    model: Moved = field(default_factory=Moved)
    dataset: Moved = field(default_factory=Moved)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    job: JobConfig = field(default_factory=JobConfig)


def verify(config: DictConfig) -> int:
    """Check a run; with `repair`, mend it and check it once more."""
    # Slow to load: see `entry.py`.
    from neg_service.storage.stores import open_store
    from neg_service.storage.verify import lineage_of

    uri, endpoint_url = value_of(config, "run"), config.storage.endpoint_url
    open_store(uri, endpoint_url, key="run").check()
    # What was extended first: what extends it can be computed again only beside all of it.
    store = open_store(uri, endpoint_url, config.storage.retry_timeout_seconds, key="run")
    return max(_verify_one(one, config) for one in lineage_of(store, endpoint_url))


def _verify_one(uri: str, config: DictConfig) -> int:
    """Check the shards that a run has itself, and mend them where that is asked for."""
    from neg_service.storage.stores import open_store

    endpoint_url = config.storage.endpoint_url
    store = open_store(uri, endpoint_url, config.storage.retry_timeout_seconds, key="run")
    verdict = _check(store, endpoint_url)
    print(describe(verdict))
    if flag_of(config, "repair") and not verdict.is_clean:
        _repair(store, verdict, config)
        verdict = _check(store, endpoint_url)
        print(f"\nafter the repair\n{describe(verdict)}")
    return 0 if verdict.is_clean else EXIT_INCOMPLETE


def _repair(store: ObjectStore, verdict: Verdict, config: DictConfig) -> None:
    # Slow to load: see `entry.py`.
    from neg_service.cluster.prepare import prepare_again
    from neg_service.cluster.scan import run
    from neg_service.report.console import ranges
    from neg_service.storage.verify import clear_wrong, restore_run_file

    for done in restore_run_file(store, verdict):
        print(done)
    given = plain(config)
    told = {key: {k: v for k, v in given[key].items() if v is not None} for key in ("model", "dataset")}
    how = typed(ScanConfig, {"cluster": given["cluster"], "storage": given["storage"], **told})
    shards = verdict.shards_to_repair
    # Planned before anything is touched: a model or data set that is not there any more is told here.
    prepared = prepare_again(verdict.run, how) if shards or verdict.is_without_neurons else None
    for done in clear_wrong(store, verdict):
        print(done)
    if prepared is None:
        return
    if shards:
        print(f"computing again: shards {ranges(shards)}", flush=True)
    summary = run(prepared)
    for shard, error in sorted(summary.failed.items()):
        print(f"failed: shard {shard}: {error}")


def _check(store: ObjectStore, endpoint_url: str | None) -> Verdict:
    from neg_service.cluster.progress import clock
    from neg_service.storage.verify import verify as check

    began = spoke = time.monotonic()

    def on_part(done: int, of: int) -> None:
        nonlocal spoke
        now = time.monotonic()
        if now - spoke >= _PROGRESS_SECONDS:
            spoke = now
            left = clock((now - began) / done * (of - done))
            sys.stderr.write(f"{done}/{of} parts checked ({100 * done / of:.0f} %), {left} left\n")

    return check(store, on_part, endpoint_url)


def describe(verdict: Verdict) -> str:
    """For a person: what was read, and what is wrong."""
    from neg_service.report.console import aligned, bytes_text, ranges

    found = [str(finding) for finding in verdict.findings]
    if len(found) > _SHOWN:
        found = [*found[:_SHOWN], f"... and {len(found) - _SHOWN} more"]
    rows = [
        ("checked", f"{verdict.n_parts} parts, {bytes_text(verdict.n_bytes)}"),
        ("wrong", "\n".join(found) or "nothing"),
        ("not done", ranges(verdict.not_done)),
    ]
    if verdict.is_clean:
        heading = "clean: every part is there and as it was written"
    elif verdict.findings:
        heading = f"not clean: {len(verdict.findings)} missing, foreign or damaged; repair=true mends that"
    else:
        heading = f"incomplete: {len(verdict.not_done)} shards are not done; what is there is as it was written"
    return f"{verdict.run.uri}\n{heading}\n{aligned(rows)}"


if __name__ == "__main__":
    start("verify", verify, VerifyConfig)

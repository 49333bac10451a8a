"""What the commands of studies share: scans that have to be whole, and where their results are put and shown."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from jobs.entry import EXIT_INCOMPLETE, say
from neg_service.config import ScanConfig
from neg_service.errors import NegServiceError
from neg_service.places import below
from neg_service.storage.reader import Run, open_run
from neg_service.storage.stores import open_store
from neg_service.storage.studies import put_study, study_fingerprint
from neg_service.studies.scans import StudyScans
from neg_service.studies.tables import StudyTables

log = logging.getLogger(__name__)


class IncompleteError(NegServiceError):
    """Shards of a scan failed, so that what is made of it would be of other prompts than asked for."""


@dataclass(frozen=True)
class StudyOutput:
    """What is made of the tables of a study.

    about: its settings, and the runs that it comes from. text: its tables for a person, kept with them. heading: what
    stands above the text on the screen. files: what else is kept, by name.
    """

    about: Mapping[str, Any]
    text: str
    heading: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)


def run_study(
    settings: ScanConfig,
    kind: str,
    pipeline: Callable[[StudyScans], StudyTables],
    describe: Callable[[StudyScans, Mapping[str, pa.Table]], StudyOutput],
) -> int:
    """Run or continue the scans of a study, store its tables beside them, and print them; the exit code."""
    # Slow to load: see `entry.py`.
    from neg_service.cluster.connection import disconnect
    from neg_service.cluster.prepare import prepare

    scans = StudyScans(settings, finished, prepare)
    try:
        tables = pipeline(scans).arrow()
    except IncompleteError as error:
        log.error("%s", error)
        return EXIT_INCOMPLETE
    finally:
        disconnect()
    output = describe(scans, tables)
    uri = put_results(settings, kind, output.about, tables, {**output.files, "tables.txt": output.text.encode()})
    heading = f"{output.heading}\n\n" if output.heading else ""
    say(f"\n{heading}{output.text}\n\nresults: {uri}", settings.job.log)
    return 0


def finished(settings: ScanConfig) -> Run:
    """Run or continue a scan, and open it; Ray is left to the next one.

    Raises:
        IncompleteError: shards failed.
    """
    # Slow to load: see `entry.py`.
    from neg_service.cluster.prepare import prepare
    from neg_service.cluster.scan import run

    summary = run(prepare(settings), stay_connected=True)
    if summary.failed:
        shard, error = next(iter(summary.failed.items()))
        raise IncompleteError(
            f"{len(summary.failed)} shards of {summary.uri} failed, shard {shard} with: {error}; the "
            f"same command tries them again"
        )
    return open_run(summary.uri, settings.storage.endpoint_url)


def put_results(
    settings: ScanConfig,
    kind: str,
    about: Mapping[str, Any],
    tables: Mapping[str, pa.Table],
    files: Mapping[str, bytes],
) -> str:
    """Store a study in a folder whose name ends in a fingerprint of its settings and runs; the folder's URI."""
    # Slow to load: see `entry.py`.
    from neg_service.cluster.plan import fit_for_a_name
    from neg_service.models.source import fetch

    model, storage = settings.model, settings.storage
    local = fetch(model.source, model.revision, with_weights=False)
    about = {"model": {"source": model.source, "identity": local.identity, "dtype": model.dtype}, **about}
    name = fit_for_a_name(settings.job.name or f"{local.name}-{kind}")
    place = open_store(storage.uri, storage.endpoint_url).uri
    uri = below(place, f"{name}-{study_fingerprint(about)}")
    store = open_store(uri, storage.endpoint_url, storage.retry_timeout_seconds)
    put_study(store, kind, about, tables, files)
    return store.uri

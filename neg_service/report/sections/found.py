"""What lies at the URIs that a report is asked for: runs, and the findings of studies and probes with their tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from neg_service.contents import json_of, parquet_batches, parquet_of
from neg_service.errors import DestinationError, shortened
from neg_service.places import below, name_of, parent_of
from neg_service.storage.objects import ObjectStore
from neg_service.storage.reader import Run, open_run
from neg_service.storage.run import RUN_FILE
from neg_service.storage.stores import open_store

_KINDS = ("study", "probe")


@dataclass(frozen=True)
class Finding:
    """A study or a probe. about: its settings. runs: those that it comes from and that are there, by what for."""

    kind: str
    uri: str
    about: dict[str, Any]
    tables: dict[str, pa.Table]
    runs: dict[str, Run]

    @property
    def name(self) -> str:
        """The last part of its URI."""
        return name_of(self.uri)


@dataclass(frozen=True)
class Found:
    """runs: those that were asked for, and those of studies that have sections of their own."""

    runs: list[Run] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def find(uris: Sequence[str], endpoint_url: str | None) -> Found:
    """Open runs, and studies and probes with the runs that they name.

    Raises:
        DestinationError: neither a run nor findings, or a study whose runs are gone.
    """
    found = Found()
    opened = {store.uri: (uri, store) for uri in uris for store in [open_store(uri, endpoint_url, key="runs")]}
    for uri, store in opened.values():
        finding = _finding(uri, store, endpoint_url)
        if finding is not None:
            found.findings.append(finding)
            # A study's ranges reach further than its NEG; they are in its tables, and not to be taken for it. Of a
            # probe there can be dozens of runs; what they say is in its tables.
            shown = [run for what, run in finding.runs.items() if what != "ranges"] if finding.kind == "study" else []
        elif store.get(RUN_FILE) is not None:
            shown = [open_run(uri, endpoint_url)]
        else:
            raise DestinationError(f"runs={uri}: there is no run, no study and no probe")
        known = {run.uri for run in found.runs}
        found.runs.extend(run for run in shown if run.uri not in known)
    return found


def _finding(uri: str, store: ObjectStore, endpoint_url: str | None) -> Finding | None:
    for kind in _KINDS:
        content = store.get(f"{kind}.json")
        if content is None:
            continue
        about = _said(f"runs={uri}: {kind}.json", content)
        named = about.get("runs", {})
        if kind == "probe":
            # One of them says with what software and on what machine.
            named = {"first": named[0]} if named else {}
        runs = {what: run for what, own in named.items() if (run := _run(own, store.uri, endpoint_url)) is not None}
        if kind == "study" and (gone := sorted(set(named) - set(runs))):
            raise DestinationError(
                f"runs={uri}: its run {named[gone[0]]} ({gone[0]}) is neither there nor beside the study"
            )
        return Finding(kind, store.uri, about, _tables(store), runs)
    return None


def _run(named: str, finding: str, endpoint_url: str | None) -> Run | None:
    """A run of a finding: beside it, for both may have been copied or moved, or where it was."""
    folder = parent_of(finding)
    beside = [below(folder, name_of(named))] if folder is not None else []
    for uri in dict.fromkeys((*beside, named)):
        if open_store(uri, endpoint_url).get(RUN_FILE) is not None:
            return open_run(uri, endpoint_url)
    return None


def _tables(store: ObjectStore) -> dict[str, pa.Table]:
    keys = [entry.key for entry in store.list("")]
    names = [key for key in keys if key.endswith(".parquet") and "/" not in key]
    return {name.removesuffix(".parquet"): _table(store, name) for name in names}


def _table(store: ObjectStore, name: str) -> pa.Table:
    where = f"runs={store.uri}: {name}"
    file = parquet_of(where, store.get(name) or b"", DestinationError)
    batches = list(parquet_batches(where, file, file.schema_arrow.names, DestinationError))
    return pa.Table.from_batches(batches, file.schema_arrow)


def _said(where: str, content: bytes) -> dict[str, Any]:
    about = json_of(where, content, DestinationError)
    if not isinstance(about, dict):
        raise DestinationError(f"{where}: must be a JSON object, not {shortened(about)}")
    return about

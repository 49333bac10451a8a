"""What a study leaves beside its runs: tables as Parquet, its settings as <kind>.json, and files for people.

A study's runs are looked for beside it first, because both may have been copied or moved.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from neg_service.contents import json_of, parquet_batches, parquet_of
from neg_service.errors import DestinationError, shortened
from neg_service.places import below, name_of, parent_of
from neg_service.storage.objects import ObjectStore
from neg_service.storage.reader import Run, open_run
from neg_service.storage.run import RUN_FILE
from neg_service.storage.stores import open_store


@dataclass(frozen=True)
class StudyResults:
    """A stored study.

    kind: its settings are in <kind>.json. about: those settings. runs: those that it comes from, by what they were for.
    """

    kind: str
    uri: str
    about: dict[str, Any]
    tables: dict[str, pa.Table]
    runs: dict[str, Run]

    @property
    def name(self) -> str:
        """The last part of its URI."""
        return name_of(self.uri)

    @property
    def names_runs(self) -> bool:
        """Whether its settings say what each run was for; otherwise they are a list, and `runs` has its first."""
        return isinstance(self.about.get("runs", {}), dict)


def put_study(
    place: ObjectStore, kind: str, about: Mapping[str, Any], tables: Mapping[str, pa.Table], files: Mapping[str, bytes]
) -> None:
    """Store tables, files, and at the end `about` as <kind>.json."""
    for name, table in tables.items():
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        place.put(f"{name}.parquet", buffer.getvalue())
    for name, content in files.items():
        place.put(name, content)
    place.put(f"{kind}.json", json.dumps(about, indent=2).encode())


def study_fingerprint(about: Mapping[str, Any]) -> str:
    """Of a study's settings and runs, so that the same study is stored at the same place again."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def read_study(store: ObjectStore, shown: str, kinds: Sequence[str], endpoint_url: str | None) -> StudyResults | None:
    """The study in a store, or None if there is none of these kinds; `shown` is how a person named the place.

    Where settings name each run by what it was for, all have to be there. Of a list of runs, of which there can be
    dozens, the first says with what software and on what machine.

    Raises:
        DestinationError: damaged, or one of its runs is gone.
    """
    for kind in kinds:
        content = store.get(f"{kind}.json")
        if content is None:
            continue
        about = _settings_in(f"runs={shown}: {kind}.json", content)
        named = about.get("runs", {})
        needs_all = isinstance(named, dict)
        if not needs_all:
            named = {"first": named[0]} if named else {}
        runs = {what: run for what, own in named.items() if (run := _run(own, store.uri, endpoint_url)) is not None}
        if needs_all and (gone := sorted(set(named) - set(runs))):
            raise DestinationError(
                f"its run {named[gone[0]]} ({gone[0]}) is neither there nor beside the study",
                setting="runs",
                value=shown,
            )
        return StudyResults(kind, store.uri, about, _tables(store), runs)
    return None


def _run(named: str, study: str, endpoint_url: str | None) -> Run | None:
    """A run of a study: beside it, or where it was."""
    folder = parent_of(study)
    beside = [below(folder, name_of(named))] if folder is not None else []
    for uri in dict.fromkeys((*beside, named)):
        if open_store(uri, endpoint_url, key="runs").get(RUN_FILE) is not None:
            return open_run(uri, endpoint_url, key="runs")
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


def _settings_in(where: str, content: bytes) -> dict[str, Any]:
    about = json_of(where, content, DestinationError)
    if not isinstance(about, dict):
        raise DestinationError(given=where, allowed=f"a JSON object, not {shortened(about)}")
    return about

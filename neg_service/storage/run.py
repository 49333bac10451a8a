"""A run directory: what one configuration produces, under one URI, found again by its content.

    <storage.uri>/<name>-<fingerprint>/
      run.json                      what was asked, the plan, the tables' schemas, versions; with a checksum
      run.copy.json                 the same again, from which run.json is restored
      neurons.parquet               the neurons of a list, or that were ranked over the data set; see `neurons.py`
      <table>/shard-000042.parquet  one part for each shard and table; its existence is the commit
      failed/shard-000042.json      why a shard was given up; gone when the shard is done after all

The fingerprint is a hash of what decides the numbers (`identity`), never of how it is run. So the same command
continues the same run, and another configuration gets another place. A shard is done when its parts of all tables are
there; they are put in the order of the tables, so that the last one is the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from neg_service.errors import DestinationError, one_line
from neg_service.former_names import FAILED_FOLDER
from neg_service.neurons import NeuronSet
from neg_service.schema import Table
from neg_service.storage.neurons import NEURONS_FILE, described, neurons_problem, put_neurons, require_same_neurons
from neg_service.storage.objects import Entry, ObjectStore
from neg_service.storage.parts import footer_of, shard_of

RUN_FILE = "run.json"
RUN_COPY = "run.copy.json"
FAILED = "failed"
# So often a run.json that nobody changed may not be replaced before the server is taken for one without conditions.
_NOTE_ATTEMPTS = 20
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5


def fingerprint_of(identity: dict[str, Any]) -> str:
    """Twelve hexadecimal digits of a SHA-256 over what decides the numbers."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Snapshot:
    """The parts of a run as they were listed, once for each table: by table and shard."""

    parts: dict[str, dict[int, Entry]]

    @property
    def done(self) -> set[int]:
        """The shards whose parts of all tables are there."""
        return set.intersection(*map(set, self.parts.values())) if self.parts else set()


@dataclass(frozen=True)
class RunDirectory:
    """A run's place in a store, and the names of its tables in the order of their parts."""

    store: ObjectStore
    fingerprint: str
    tables: tuple[str, ...]
    # Where it is kept why shards failed.
    failed_folder: str = FAILED

    def snapshot(self) -> Snapshot:
        """The parts that are there now, by one listing a table."""
        # The last table first: a shard that is finished while we look has all its earlier parts by then.
        listed = {
            name: {shard: entry for entry in self.store.list(name) if (shard := shard_of(entry.key)) is not None}
            for name in reversed(self.tables)
        }
        return Snapshot({name: listed[name] for name in self.tables})

    def done(self) -> set[int]:
        """The shards that are done, by one listing a table."""
        return self.snapshot().done

    def failed(self) -> dict[int, dict[str, Any]]:
        """The shards that were given up, with what was said of each."""
        found: dict[int, dict[str, Any]] = {}
        for entry in self.store.list(self.failed_folder):
            content = self.store.get(entry.key)
            if content is not None:
                found |= _record(self.store, entry.key, content)
        return found

    def record_failure(self, shard: int, error: str, attempts: int) -> None:
        """Keep why a shard was given up."""
        record = {"shard": shard, "error": error, "attempts": attempts}
        self.store.put(self._failure_key(shard), json.dumps(record, indent=1).encode())

    def clear_resolved(self) -> None:
        """Forget why shards failed that are done after all, by whomever."""
        failed = self.failed()
        for shard in set(failed) & self.done() if failed else ():
            self.store.delete(self._failure_key(shard))

    def _failure_key(self, shard: int) -> str:
        return f"{self.failed_folder}/shard-{shard:06d}.json"


def write_or_match(
    store: ObjectStore,
    identity: dict[str, Any],
    tables: dict[str, pa.Schema],
    about: dict[str, Any],
    request: dict[str, Any] | None = None,
    neurons: NeuronSet | None = None,
) -> RunDirectory:
    """Begin a run, or find that it was begun with the same identity.

    `about` is kept beside the identity for people: versions, sizes, when it began. `request` is what has to be asked
    for to compute any of its shards again. `neurons` are those of a list, kept in a file of their own.

    Raises:
        DestinationError: the place holds a run with another identity (field by field) or neurons, or something else.
    """
    fingerprint = fingerprint_of(identity)
    found = store.get(RUN_FILE)
    copy = store.get(RUN_COPY) if found is None else None
    if found is None and copy is None:
        _require_nothing_foreign(store, fingerprint, tables, neurons)
        content = {
            "fingerprint": fingerprint,
            "identity": identity,
            "tables": {name: _schema_to_json(name, schema) for name, schema in tables.items()},
            "about": about,
            "request": request or {},
        }
        if neurons is not None:
            content["neurons"] = described(neurons)
            # First: a run that has a run.json is whole.
            put_neurons(store, neurons)
        put_run_file(store, content)
    else:
        stored = parse_run_file(store, found or copy or b"")
        require_same(store, stored, identity)
        if not is_as_written(stored):
            raise DestinationError(_edited(store))
        if neurons is not None and "neurons" in stored:
            require_same_neurons(store, stored["neurons"], neurons)
        if copy is not None:
            put_run_file(store, stored)
    return RunDirectory(store, fingerprint, tuple(tables))


def require_same(
    store: ObjectStore,
    stored: dict[str, Any],
    identity: dict[str, Any],
    advice: str = "ask for the same, or use another storage.uri or job.name",
) -> None:
    """Refuse to go on with a run that was begun with another identity; `advice`: what to do.

    Raises:
        DestinationError: naming each field that differs, with both values.
    """
    differences = _differences(stored.get("identity", {}), identity)
    if not differences and stored.get("fingerprint") != fingerprint_of(identity):
        differences = [f"fingerprint: {stored.get('fingerprint')} there, {fingerprint_of(identity)} asked"]
    if differences:
        was_edited = "sha256" in stored and not is_as_written(stored)
        restore = (
            f"; it was edited: python -m jobs.verify {store.settings} repair=true restores it" if was_edited else ""
        )
        raise DestinationError(
            f"{store.uri}/{RUN_FILE} belongs to another configuration: {'; '.join(differences)}; {advice}{restore}"
        )


def note(store: ObjectStore, found: dict[str, Any]) -> None:
    """Keep beside a run's identity what its first replica found out; what is there already stays.

    Several drivers of one run may do so at the same moment: run.json is written only where nobody has changed it since
    it was read, and read again otherwise, after a moment that differs between them, so that nobody's word is lost.
    """
    before, attempt, unchanged = None, 0, 0
    while unchanged < _NOTE_ATTEMPTS:
        content = store.get(RUN_FILE)
        unchanged = unchanged + 1 if content == before else 0
        if content is None:
            return
        parsed = parse_run_file(store, content)
        about = {**found, **parsed.get("about", {})}
        # What was changed by somebody else must not get a right checksum from us.
        if about == parsed.get("about", {}) or not is_as_written(parsed):
            if attempt:
                # Ours was put before another one's word came first.
                store.put(RUN_COPY, content)
            return
        data = _as_bytes({**parsed, "about": about})
        store.put(RUN_COPY, data)
        if store.replace(RUN_FILE, content, data):
            return
        before, attempt = content, attempt + 1
        time.sleep(random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(attempt, 10))))
    # Nobody writes, and yet it cannot be replaced: it is a server on which no condition holds.
    store.put(RUN_FILE, data)


def put_run_file(store: ObjectStore, content: dict[str, Any]) -> None:
    """Write run.json with its checksum, and its copy; at each moment at least one of the two is whole and right."""
    data = _as_bytes(content)
    store.put(RUN_COPY, data)
    store.put(RUN_FILE, data)


def _as_bytes(content: dict[str, Any]) -> bytes:
    return json.dumps({**content, "sha256": _sum_of(content)}, indent=1, ensure_ascii=False).encode()


def rewrite_copy(store: ObjectStore) -> None:
    """Put the copy of run.json once more: a run that goes on finds out whether its place can still be written.

    Raises:
        DestinationError: it cannot.
    """
    content = store.get(RUN_FILE)
    # Another driver, which was refused, may just have taken it away; it is written again at the end.
    if content is not None:
        store.put(RUN_COPY, content)


def is_as_written(parsed: dict[str, Any]) -> bool:
    """Whether nobody has changed a run.json since this package wrote it."""
    return parsed.get("sha256") == _sum_of(parsed)


def read_run_file(store: ObjectStore) -> dict[str, Any]:
    """run.json as it was written.

    Raises:
        DestinationError: there is none, it is damaged, or it was edited.
    """
    content = store.get(RUN_FILE)
    if content is None:
        if store.get(RUN_COPY) is not None:
            raise DestinationError(
                f"{store.uri}: there is no {RUN_FILE}, but {RUN_COPY} is; "
                f"python -m jobs.verify {store.settings} repair=true restores it"
            )
        raise DestinationError(f"{store.uri}: there is no {RUN_FILE}; give the URI of a run directory")
    parsed = parse_run_file(store, content)
    if not is_as_written(parsed):
        raise DestinationError(_edited(store))
    return parsed


def calibration_of(store: ObjectStore) -> dict[str, Any] | None:
    """What an earlier start of this run found out about its precision: the same numbers serve all of a run."""
    content = store.get(RUN_FILE)
    found = parse_run_file(store, content).get("about", {}).get("calibration") if content is not None else None
    return dict(found) if found is not None else None


def parse_run_file(store: ObjectStore, content: bytes) -> dict[str, Any]:
    """run.json as a dictionary.

    Raises:
        DestinationError: it is not what this package writes.
    """
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DestinationError(
            f"{store.uri}/{RUN_FILE} is damaged: {one_line(error)}; "
            f"python -m jobs.verify {store.settings} repair=true restores it"
        ) from error
    if not isinstance(parsed, dict) or not {"fingerprint", "identity", "tables"} <= set(parsed):
        raise DestinationError(f"{store.uri}/{RUN_FILE} is not a run's: it has no fingerprint, identity and tables")
    return parsed


def _edited(store: ObjectStore) -> str:
    return (
        f"{store.uri}/{RUN_FILE} was changed after it was written: its checksum is wrong; "
        f"restore it with python -m jobs.verify {store.settings} repair=true"
    )


def _sum_of(content: dict[str, Any]) -> str:
    own = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _require_nothing_foreign(
    store: ObjectStore, fingerprint: str, tables: dict[str, pa.Schema], neurons: NeuronSet | None
) -> None:
    """A place without run.json is empty, or has parts or neurons of this very run, whose run.json was lost or is to be.

    An earlier start may have been killed after it had put the neurons.
    """
    others = [entry.key for entry in store.list("") if not entry.key.startswith((f"{FAILED}/", f"{FAILED_FOLDER}/"))]
    if neurons is not None and others == [NEURONS_FILE] and neurons_problem(store, described(neurons)) is None:
        return
    for key in others:
        if key.partition("/")[0] in tables and shard_of(key) is not None:
            try:
                if footer_of(store.get(key) or b"").get("fingerprint") == fingerprint:
                    return
            except (pa.ArrowException, OSError, ValueError):
                # Damaged; another part may tell.
                continue
    if others:
        raise DestinationError(f"{store.uri}: holds {others[0]} but no {RUN_FILE}; it is not a run directory")


def is_without_neurons(store: ObjectStore) -> bool:
    """Whether the neurons that run.json speaks of are lost or damaged."""
    content = store.get(RUN_FILE)
    said = parse_run_file(store, content).get("neurons") if content is not None else None
    return said is not None and neurons_problem(store, said) is not None


def schema_from_json(described: dict[str, Any]) -> pa.Schema:
    """The Arrow schema that run.json keeps of a table."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(described["arrow_schema"])))


def _schema_to_json(name: str, schema: pa.Schema) -> dict[str, Any]:
    # All but the serialised schema is for people; that is for the reader of a run that has no part yet.
    table = Table.of(name, schema)
    return {
        "title": table.title,
        "unit": table.unit,
        "values": table.values,
        "columns": {field.name: str(field.type) for field in schema},
        "arrow_schema": base64.b64encode(schema.serialize().to_pybytes()).decode(),
    }


def _differences(stored: Any, asked: Any, path: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(asked, dict):
        keys = sorted(set(stored) | set(asked))
        nested = (_differences(stored.get(key), asked.get(key), f"{path}.{key}" if path else key) for key in keys)
        return [difference for differences in nested for difference in differences]
    return [] if stored == asked else [f"{path}: {json.dumps(stored)} there, {json.dumps(asked)} asked"]


def _record(store: ObjectStore, key: str, content: bytes) -> dict[int, dict[str, Any]]:
    try:
        record = json.loads(content)
        return {int(record["shard"]): record}
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise DestinationError(f"{store.uri}/{key} is damaged: {one_line(error)}; delete it") from error

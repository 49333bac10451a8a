"""Runs as tables of an Iceberg catalogue, by adding their parts as they lie; none is copied or rewritten.

    neg_service.register_run("s3://runs/results/RUN", uri="https://catalogue.example.com", namespace="neg")

Each table of a run is a table of the catalogue, `<namespace>.<run>_<table>`, with the rows of `run.table(...)`: the
shards that are done, of a run that extends another one with those of the other. Registered again, a table gets what is
new; what was written anew since, under its old key, takes the place of what was known of it, and what is gone is taken
out. Which catalogue it is, and the keys to it, pyiceberg knows from its own configuration (`.pyiceberg.yaml`,
`PYICEBERG_CATALOG__...`); what is given here goes before that.

Left out: several runs in one table. A part has no column that names its run, and pyiceberg takes the value of a
partition from a column of the file, so that parts would have to be rewritten.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import ClientError
from botocore.exceptions import BotoCoreError
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random

from neg_service.errors import ConfigurationError, DestinationError, StorageError, one_line
from neg_service.places import split_scheme
from neg_service.storage.catalogue_access import Access, make_if_missing
from neg_service.storage.objects import Entry
from neg_service.storage.parts import footer_in, foreign_of
from neg_service.storage.reader import Run, open_run
from neg_service.storage.run import Snapshot
from neg_service.storage.verify import verify

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table as IcebergTable

_READERS = 8
# Registrations of one run at the same moment; each loses to at most every other one.
_ATTEMPTS = 20
_OF_RUN, _OF_TABLE, _NEWEST = "neg_service.fingerprint", "neg_service.table", "neg_service.newest-part"
_PLACE = "neg_service.run"
# Engines that heed it neither purge the table nor delete its files when they clean up: they are the run's own.
_KEEP = {"gc.enabled": "false"}
_ADVICE = "drop it, without purging, which deletes the run's parts, or give another catalogue.namespace"
# A Parquet file ends with its footer's length in four bytes, and PAR1; so much is read at first.
_END, _TAIL = 8, 1 << 16
_NAMESPACE = re.compile(r"\w+(\.\w+)*", re.ASCII)
# What stands in a URI as it is, for every reader.
_PLAIN_PATH = re.compile(r"[\w./~+=@,:-]+", re.ASCII)


@dataclass(frozen=True)
class RegisteredTable:
    """A table of a run in the catalogue, and how many of its parts were added, put anew and taken out just now."""

    name: str
    identifier: str
    added: int
    replaced: int
    removed: int
    n_parts: int
    n_rows: int


@dataclass(frozen=True)
class Registration:
    """What a registration did. left_out: shards that are done and not whole, each with what is wrong."""

    uri: str
    tables: tuple[RegisteredTable, ...]
    left_out: dict[int, str]
    # Where the tables said that the run lies, if that was another place: this one is a copy of it, or it was moved.
    former_places: Sequence[str] = ()


@dataclass(frozen=True)
class _Part:
    """A part of a shard that is done, where readers of the catalogue find it; `owner` is the run that has it."""

    location: str
    shard: int
    entry: Entry
    owner: Run


def register_run(
    run: Run | str | os.PathLike[str],
    endpoint_url: str | None = None,
    *,
    name: str | None = None,
    uri: str | None = None,
    warehouse: str | None = None,
    namespace: str = "neg",
    check: bool = False,
) -> Registration:
    """Register the shards of a run that are done, or those that are new since it was registered last.

    run: an open run, or its URI, on S3 at `endpoint_url`. name, uri, warehouse: which catalogue, and where it keeps
    its own files; by default what pyiceberg's configuration says. check: read every byte first, as `jobs.verify` does,
    and leave out shards that are damaged; otherwise footers alone are read, of parts that are new.

    Raises:
        ConfigurationError: pyiceberg is not installed, the catalogue is not known or cannot be reached, or Iceberg has
            no type for a column.
        DestinationError: there is no run, a place that no reader of Iceberg would find, or a table of that name that
            holds something else.
    """
    if not isinstance(namespace, str) or _NAMESPACE.fullmatch(namespace) is None:
        raise ConfigurationError(
            setting="catalogue.namespace", value=namespace, allowed="letters, digits and _, such as neg or team.neg"
        )
    access = Access.checked(name, uri, warehouse, endpoint_url)
    opened = run if isinstance(run, Run) else open_run(run, endpoint_url)
    roots = {one.uri: location_of(one.uri) for one in opened.lineage}
    with access.told():
        catalogue = access.open()
        known = {table: _existing(catalogue, opened, table, namespace) for table in opened.tables}
        moved = sorted({str(one.properties.get(_PLACE)) for one in known.values() if one is not None} - {opened.uri})
        looked = {table: {} if one is None else _files(one) for table, one in known.items()}
    at = opened.snapshot()
    left_out = _damaged(opened, at, endpoint_url) if check else {}
    for table in opened.tables:
        own = [part for part in _parts(opened, table, at, roots) if part.shard not in left_out]
        left_out |= _not_whole(opened, table, _fresh(own, known[table], looked[table]))
    shards = opened.done(at) - set(left_out)
    with access.told():
        make_if_missing(lambda: catalogue.create_namespace_if_not_exists(namespace))
        tables = tuple(
            _register(catalogue, opened, table, namespace, shards, set(left_out), roots, at) for table in opened.tables
        )
    return Registration(opened.uri, tables, {shard: left_out[shard] for shard in sorted(left_out)}, moved)


def identifier_of(run: Run, table: str, namespace: str = "neg") -> str:
    """What the table of a run is called in a catalogue; small letters, digits and `_`, which every catalogue takes."""
    return f"{namespace}.{re.sub('[^a-z0-9_]+', '_', f'{run.name}_{table}'.lower())}"


def location_of(uri: str) -> str:
    """The place of a run as Iceberg's readers take it: a URI, or a path that is none where a URI would change it.

    Raises:
        DestinationError: on S3, a key that they would read up to a # or ? alone.
    """
    if split_scheme(uri)[0] == "s3":
        if odd := next((one for one in "#?" if one in uri), None):
            raise DestinationError(
                f"has a {odd!r}, at which readers of Iceberg end a key; copy the run to a place without",
                setting="run",
                value=uri,
            )
        return uri
    return f"file://{uri}" if _PLAIN_PATH.fullmatch(uri) else uri


def _parts(run: Run, table: str, at: Snapshot, roots: dict[str, str]) -> list[_Part]:
    stored = run.stored_name(table)
    done, found = run.done(at), []
    for owner in run.lineage:
        for shard in sorted(done & set(owner.own_shards)):
            entry = at.parts[stored][shard]
            found.append(_Part(f"{roots[owner.uri]}/{entry.key}", shard, entry, owner))
    return found


def _stored_schema(run: Run, table: str) -> pa.Schema:
    return run.stored_schemas[run.stored_name(table)]


def _existing(catalogue: Catalog, run: Run, table: str, namespace: str) -> IcebergTable | None:
    """The table of that name, if there is one.

    Raises:
        DestinationError: it is not of this run and table, or lacks a column.
    """
    from pyiceberg.exceptions import NoSuchTableError

    identifier = identifier_of(run, table, namespace)
    try:
        found = catalogue.load_table(identifier)
    except NoSuchTableError:
        return None
    if (found.properties.get(_OF_RUN), found.properties.get(_OF_TABLE)) != (run.fingerprint, table):
        raise DestinationError(f"the catalogue has a table {identifier} that is not of {run.uri}; {_ADVICE}")
    if missing := [one for one in _stored_schema(run, table).names if one not in found.schema().column_names]:
        raise DestinationError(
            f"the table {identifier} of the catalogue has no column {', '.join(missing)} by now; {_ADVICE}"
        )
    return found


def _files(table: IcebergTable) -> dict[str, list[DataFile]]:
    """The files of a table by their places; several where somebody has added one more than once."""
    found: dict[str, list[DataFile]] = {}
    for task in table.scan().plan_files():
        found.setdefault(task.file.file_path, []).append(task.file)
    return found


def _fresh(parts: list[_Part], table: IcebergTable | None, files: dict[str, list[DataFile]]) -> list[_Part]:
    """The parts that a table does not know, or knew as other ones, or has more than once.

    Other ones are told by their size, which readers rely on, and by the store's own clock.
    """
    newest = float("-inf" if table is None else table.properties.get(_NEWEST, "-inf"))

    def is_known(part: _Part) -> bool:
        own = files.get(part.location, [])
        return len(own) == 1 and own[0].file_size_in_bytes == part.entry.size and part.entry.modified <= newest

    return [part for part in parts if not is_known(part)]


def _register(
    catalogue: Catalog,
    run: Run,
    table: str,
    namespace: str,
    shards: set[int],
    left_out: set[int],
    roots: dict[str, str],
    at: Snapshot,
) -> RegisteredTable:
    """Make a table hold the parts of these shards; looked at anew whenever somebody else has changed it meanwhile.

    left_out: shards that are not whole, as they were in the snapshot `at`.
    """
    from pyiceberg.exceptions import CommitFailedException, TableAlreadyExistsError

    def attempt() -> RegisteredTable:
        found = _existing(catalogue, run, table, namespace) or _create(catalogue, run, table, namespace)
        files = _files(found)
        # Listed behind the table: another registration may have added shards that were not done when this one began,
        # and those are not gone.
        now = run.snapshot()
        known = {part.shard for part in _parts(run, table, now, roots) if part.location in files}
        later = known - {shard for shard in left_out if _is_as_it_was(run, shard, at, now)}
        parts = [part for part in _parts(run, table, now, roots) if part.shard in shards | later]
        return _change(found, files, run, table, identifier_of(run, table, namespace), parts)

    again = retry_if_exception_type((CommitFailedException, TableAlreadyExistsError))
    attempts = Retrying(retry=again, stop=stop_after_attempt(_ATTEMPTS), wait=wait_random(0, 0.5), reraise=True)
    return attempts(attempt)


def _create(catalogue: Catalog, run: Run, table: str, namespace: str) -> IcebergTable:
    from pyiceberg.io.pyarrow import UnsupportedPyArrowTypeException

    properties = {
        _OF_RUN: run.fingerprint,
        _OF_TABLE: table,
        _PLACE: run.uri,
        **_KEEP,
        "comment": run.described[table].label,
        # pyiceberg would add the same parts once more on top of what another registration has added.
        "commit.retry.num-retries": "0",
    }
    try:
        return catalogue.create_table(
            identifier_of(run, table, namespace), _stored_schema(run, table), properties=properties
        )
    except UnsupportedPyArrowTypeException as error:
        raise ConfigurationError(f"table {table!r} cannot be registered: Iceberg: {one_line(error)}") from error


def _change(
    found: IcebergTable, files: dict[str, list[DataFile]], run: Run, table: str, identifier: str, parts: list[_Part]
) -> RegisteredTable:
    wanted = {part.location for part in parts}
    fresh = _fresh(parts, found, files)
    replaced = [files[part.location] for part in fresh if part.location in files]
    removed = [own for location, own in files.items() if location not in wanted]
    if fresh or removed:
        with found.transaction() as change:
            if replaced or removed:
                with change.update_snapshot().overwrite() as overwrite:
                    for file in chain.from_iterable((*replaced, *removed)):
                        overwrite.delete_data_file(file)
            try:
                # What was taken out just now is looked at above; all others are not in it.
                change.add_files([part.location for part in fresh], check_duplicate_files=False)
            except (ValueError, KeyError) as error:
                raise DestinationError(
                    f"the table {identifier} of the catalogue does not take the parts of table {table!r} of {run.uri}: "
                    f"{one_line(error)}; where it has other columns, {_ADVICE}"
                ) from error
            newest = max((part.entry.modified for part in parts), default=0.0)
            change.set_properties({_NEWEST: repr(newest), _PLACE: run.uri, **_KEEP})
    n_rows = sum(file.record_count for own in _files(found).values() for file in own)
    added = len(fresh) - len(replaced)
    return RegisteredTable(table, identifier, added, len(replaced), len(removed), len(parts), n_rows)


def _is_as_it_was(run: Run, shard: int, at: Snapshot, now: Snapshot) -> bool:
    """Whether nothing of a shard was put since, so that what was found of it holds."""
    stored = {run.stored_name(table) for table in run.tables}
    return all(at.parts[name].get(shard) == now.parts[name].get(shard) for name in stored)


def _damaged(run: Run, at: Snapshot, endpoint_url: str | None) -> dict[int, str]:
    """The shards that are done of which something is wrong, as a check of every byte finds."""
    found: dict[int, str] = {}
    done = run.done(at)
    for owner in run.lineage:
        for finding in verify(owner.directory.store, endpoint_url=endpoint_url).findings:
            if finding.shard is not None and finding.shard in done:
                found.setdefault(finding.shard, str(finding))
    return found


def _not_whole(run: Run, table: str, parts: list[_Part]) -> dict[int, str]:
    """The shards whose part has no footer, or one of another run, table or shard, other columns, or other rows.

    Raises:
        StorageError: the store does not answer.
    """
    schema, stored = _stored_schema(run, table), run.stored_name(table)

    def problem(part: _Part) -> str | None:
        try:
            tail = _tail_of(part)
        except FileNotFoundError:
            return "missing: it was there a moment ago"
        except (OSError, BotoCoreError, ClientError) as error:
            raise StorageError(f"{part.entry.key} cannot be read: {one_line(error)}", given=part.owner.uri) from error
        try:
            with pq.ParquetFile(pa.BufferReader(tail)) as file:
                found, said = file.metadata, footer_in(file.metadata.metadata or {})
                groups = [found.row_group(i) for i in range(found.num_row_groups)]
                n_rows = sum(group.num_rows for group in groups)
                leaves = [found.schema.column(i).path for i in range(found.num_columns)]
                has_leaves = all(
                    group.column(i).path_in_schema == leaf for group in groups for i, leaf in enumerate(leaves)
                )
                has_columns = has_leaves and file.schema_arrow.equals(schema)
        # Damage may look like anything to what reads a footer.
        except (pa.ArrowException, OSError, ValueError, TypeError) as error:
            return f"damaged: {one_line(error)}"
        if (foreign := foreign_of(said, stored, part.shard, part.owner.fingerprint)) is not None:
            return foreign
        if not has_columns:
            return "damaged: its columns are not those of the table"
        if not found.num_rows == n_rows == said.get("rows"):
            return f"damaged: its footer says {found.num_rows}, {n_rows} and {said.get('rows')} rows"
        return None

    with ThreadPoolExecutor(_READERS, thread_name_prefix="register") as pool:
        found = zip(parts, pool.map(problem, parts), strict=True)
        return {part.shard: f"{part.entry.key}: {wrong}" for part, wrong in found if wrong is not None}


def _tail_of(part: _Part) -> bytes:
    """The end of a part, with its footer, so that what cannot be read is told from what is damaged."""
    filesystem, root = part.owner.directory.store.arrow()
    with filesystem.open_input_file(f"{root}/{part.entry.key}") as file:
        size = file.size()
        tail = bytes(file.read_at(min(size, _TAIL), size - min(size, _TAIL)))
        needed = min(size, int.from_bytes(tail[-_END:-4], "little") + _END)
        return tail if needed <= len(tail) else bytes(file.read_at(needed, size - needed))

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random

from neg_service.errors import ConfigurationError, DestinationError, one_line
from neg_service.places import local_path, require_place, split_scheme
from neg_service.redaction import without_secrets
from neg_service.storage.objects import Entry
from neg_service.storage.parts import footer_in, foreign_of
from neg_service.storage.reader import Run, open_run
from neg_service.storage.run import Snapshot
from neg_service.storage.verify import verify

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import Table as IcebergTable

_READERS = 8
# Registrations of one run at the same moment; each loses to at most every other one.
_ATTEMPTS = 20
_OF_RUN, _OF_TABLE, _NEWEST = "neg_service.fingerprint", "neg_service.table", "neg_service.newest-part"
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
    if _NAMESPACE.fullmatch(namespace) is None:
        raise ConfigurationError(
            setting="catalogue.namespace", value=namespace, allowed="letters, digits and _, such as neg or team.neg"
        )
    given = {"catalogue.uri": uri, "catalogue.warehouse": warehouse}
    for key, value in given.items():
        if value is not None:
            require_place(value, key, ConfigurationError)
    opened = run if isinstance(run, Run) else open_run(run, endpoint_url)
    if warehouse is not None and not split_scheme(warehouse)[0] and split_scheme(uri or "")[0] not in ("http", "https"):
        # Tables keep it as it is, and are read from other folders.
        path = local_path(warehouse, "catalogue.warehouse", ConfigurationError)
        warehouse = warehouse if path is None else str(path.absolute())
    roots = {one.uri: location_of(one.uri) for one in opened.lineage}
    properties = {"uri": uri, "warehouse": warehouse, **_properties_of_s3(endpoint_url)}
    with _told(name, uri):
        catalogue = _open(name, {key: value for key, value in properties.items() if value is not None})
        at = opened.snapshot()
        left_out = _damaged(opened, endpoint_url) if check else {}
        parts = {table: _parts(opened, table, at, roots) for table in opened.tables}
        known = {table: _existing(catalogue, opened, table, namespace) for table in opened.tables}
        for table, own in parts.items():
            fresh = _fresh([part for part in own if part.shard not in left_out], known[table])
            left_out |= _not_whole(opened, table, fresh)
        catalogue.create_namespace_if_not_exists(namespace)
        whole = {table: [part for part in own if part.shard not in left_out] for table, own in parts.items()}
        tables = tuple(_register(catalogue, opened, table, namespace, whole[table]) for table in opened.tables)
    return Registration(opened.uri, tables, {shard: left_out[shard] for shard in sorted(left_out)})


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


def _open(name: str | None, properties: dict[str, str]) -> Catalog:
    from pyiceberg.catalog import load_catalog

    return load_catalog(name, **properties)


def _properties_of_s3(endpoint_url: str | None) -> dict[str, str]:
    """The server and the region for pyiceberg, which takes keys from the environment and the AWS chain, as we do."""
    if endpoint_url is None:
        return {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"s3.endpoint": endpoint_url, "s3.region": region}


def _parts(run: Run, table: str, at: Snapshot, roots: dict[str, str]) -> list[_Part]:
    stored = dict(zip(run.tables, run.directory.tables, strict=True))[table]
    done, found = run.done(at), []
    for owner in run.lineage:
        for shard in sorted(done & set(owner.own_shards)):
            entry = at.parts[stored][shard]
            found.append(_Part(f"{roots[owner.uri]}/{entry.key}", shard, entry, owner))
    return found


def _stored_schema(run: Run, table: str) -> pa.Schema:
    return run.stored_schemas[dict(zip(run.tables, run.directory.tables, strict=True))[table]]


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
    advice = "drop it, or give another catalogue.namespace"
    if (found.properties.get(_OF_RUN), found.properties.get(_OF_TABLE)) != (run.fingerprint, table):
        raise DestinationError(f"the catalogue has a table {identifier} that is not of {run.uri}; {advice}")
    if missing := [one for one in _stored_schema(run, table).names if one not in found.schema().column_names]:
        raise DestinationError(
            f"the table {identifier} of the catalogue has no column {', '.join(missing)} by now; {advice}"
        )
    return found


def _files(table: IcebergTable) -> dict[str, Any]:
    return {task.file.file_path: task.file for task in table.scan().plan_files()}


def _fresh(parts: list[_Part], table: IcebergTable | None) -> list[_Part]:
    """The parts that a table does not know, or knew as other ones.

    The latter are told by their size, which readers rely on, and by the store's own clock.
    """
    if table is None:
        return parts
    files, newest = _files(table), float(table.properties.get(_NEWEST, "-inf"))

    def is_known(part: _Part) -> bool:
        file = files.get(part.location)
        return file is not None and file.file_size_in_bytes == part.entry.size and part.entry.modified <= newest

    return [part for part in parts if not is_known(part)]


def _register(catalogue: Catalog, run: Run, table: str, namespace: str, parts: list[_Part]) -> RegisteredTable:
    """Make a table hold just these parts; looked at anew whenever somebody else has changed it meanwhile."""
    from pyiceberg.exceptions import CommitFailedException, TableAlreadyExistsError

    again = retry_if_exception_type((CommitFailedException, TableAlreadyExistsError))
    for attempt in Retrying(retry=again, stop=stop_after_attempt(_ATTEMPTS), wait=wait_random(0, 0.5), reraise=True):
        with attempt:
            found = _existing(catalogue, run, table, namespace) or _create(catalogue, run, table, namespace)
            return _change(found, run, table, identifier_of(run, table, namespace), parts)
    raise AssertionError


def _create(catalogue: Catalog, run: Run, table: str, namespace: str) -> IcebergTable:
    from pyiceberg.io.pyarrow import UnsupportedPyArrowTypeException

    properties = {
        _OF_RUN: run.fingerprint,
        _OF_TABLE: table,
        "neg_service.run": run.uri,
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


def _change(found: IcebergTable, run: Run, table: str, identifier: str, parts: list[_Part]) -> RegisteredTable:
    files, wanted = _files(found), {part.location for part in parts}
    fresh = _fresh(parts, found)
    replaced = [files[part.location] for part in fresh if part.location in files]
    removed = [file for location, file in files.items() if location not in wanted]
    if fresh or removed:
        try:
            with found.transaction() as change:
                if replaced or removed:
                    with change.update_snapshot().overwrite() as overwrite:
                        for file in (*replaced, *removed):
                            overwrite.delete_data_file(file)
                # What was taken out just now is looked at above; all others are not in it.
                change.add_files([part.location for part in fresh], check_duplicate_files=False)
                newest = max((part.entry.modified for part in parts), default=0.0)
                change.set_properties({_NEWEST: repr(newest), "neg_service.run": run.uri})
        except ValueError as error:
            raise DestinationError(
                f"the table {identifier} of the catalogue has other columns than table {table!r} of {run.uri}: "
                f"{one_line(error)}; drop it, or give another catalogue.namespace"
            ) from error
    n_rows = sum(file.record_count for file in _files(found).values())
    added = len(fresh) - len(replaced)
    return RegisteredTable(table, identifier, added, len(replaced), len(removed), len(parts), n_rows)


def _damaged(run: Run, endpoint_url: str | None) -> dict[int, str]:
    """The shards of which something is wrong, as a check of every byte finds."""
    found: dict[int, str] = {}
    for owner in run.lineage:
        for finding in verify(owner.directory.store, endpoint_url=endpoint_url).findings:
            if finding.shard is not None:
                found.setdefault(finding.shard, str(finding))
    return found


def _not_whole(run: Run, table: str, parts: list[_Part]) -> dict[int, str]:
    """The shards whose part has no footer, or one of another run, table or shard, or other columns."""
    schema = _stored_schema(run, table)
    stored = dict(zip(run.tables, run.directory.tables, strict=True))[table]

    def problem(part: _Part) -> str | None:
        filesystem, root = part.owner.directory.store.arrow()
        try:
            with pq.ParquetFile(f"{root}/{part.entry.key}", filesystem=filesystem) as file:
                if not file.schema_arrow.equals(schema):
                    return "damaged: its columns are not those of the table"
                footer = footer_in(file.metadata.metadata or {})
        except pa.ArrowException as error:
            return f"damaged: {one_line(error)}"
        return foreign_of(footer, stored, part.shard, part.owner.fingerprint)

    with ThreadPoolExecutor(_READERS, thread_name_prefix="register") as pool:
        found = zip(parts, pool.map(problem, parts), strict=True)
        return {part.shard: f"{part.entry.key}: {wrong}" for part, wrong in found if wrong is not None}


@contextmanager
def _told(name: str | None, uri: str | None) -> Iterator[None]:
    """What pyiceberg and the libraries below it raise, told in one line in which no key stands."""
    try:
        from pyiceberg import exceptions
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise ConfigurationError(
            f"a catalogue needs the extra `catalogue`: pip install 'neg-service[catalogue]' ({one_line(error)})"
        ) from error
    wrong = (exceptions.NoSuchPropertyException, exceptions.NotInstalledError, exceptions.SignError)
    lost = (exceptions.RESTError, exceptions.CommitFailedException, exceptions.NoSuchNamespaceError)
    where = {"setting": "catalogue.uri", "value": uri} if uri is not None else {"setting": "catalogue.name"}
    if uri is None and name is not None:
        where["value"] = name
    try:
        yield
    except (OSError, ValueError, ImportError, SQLAlchemyError, *wrong, *lost) as error:
        said = without_secrets(one_line(error)).rstrip(".")
        if "URI missing" in said or "infer" in said:
            said = (
                "names no catalogue: give catalogue.uri, such as sqlite:///catalogue.db or https://HOST, or configure "
                "one in .pyiceberg.yaml or PYICEBERG_CATALOG__DEFAULT__URI"
            )
            raise ConfigurationError(said, **where) from error
        if "No default path" in said:
            said = "it has no place for new tables: give catalogue.warehouse, a path or s3://bucket/prefix"
        raise ConfigurationError(f"the catalogue cannot be used: {said}", **where) from error

"""Rows of a JSONL, Parquet or CSV file at any fsspec URI, of a folder of them, or of a data set of the hub.

Each comes with its place, for messages. A row is a mapping of columns; what a file calls them says `dataset.columns`.
In CSV, `targets` and `wordings` are JSON lists in their cells, and there are no messages. What rows say: `sources.py`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from neg_service.config import DatasetConfig
from neg_service.contents import csv_of, json_lines, json_value, parquet_batches, parquet_of, repeated, text_of
from neg_service.errors import PromptError, one_line, shortened
from neg_service.inputs import opened_input, suffix_of
from neg_service.places import is_here
from neg_service.prompts.facts import BUILT_IN
from neg_service.prompts.folders import Folder, open_folder
from neg_service.prompts.hub import HubTable, is_data_set, open_by_library, open_listed

Rows = Iterator[tuple[str, dict[str, Any]]]
COLUMNS = ("prompt", "messages", "targets", "answer", "id", "group", "at", "wanted", "wordings")
# A token's place, or a range of characters, and no text.
_AT_OF_CSV = re.compile(r"-?\d+|\[\s*\d+\s*,\s*\d+\s*\]")
# What runs before there were splits of files say of them.
_SPLIT_OF_TASKS = "valid"


@contextmanager
def opened_rows(source: str, shown: str, how: DatasetConfig) -> Iterator[tuple[Callable[..., Rows], Any, Any]]:
    """What reads the rows of a source, and the source opened twice, to be read once more from its beginning."""
    rows_of = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}
    suffix = suffix_of(source)
    is_table = is_data_set(source) and (suffix not in rows_of or is_here(source))
    if not is_table and suffix not in rows_of:
        raise PromptError(
            f"neither a built-in data set ({', '.join(BUILT_IN)}) nor a file that ends in {', '.join(rows_of)}, nor a "
            "folder or OWNER/NAME of the hub",
            setting="dataset.source",
            value=shown,
        )
    if is_table:
        open_files = open_folder if is_here(source) else open_listed
        if (folder := open_files(source, how.subset, how.split)) is not None:
            yield _folder_rows, folder, folder
            return
        table = open_by_library(source, how.subset, how.split)
        yield _hub_rows, table, table
        return
    for key, value in (("subset", how.subset), ("split", None if how.split == _SPLIT_OF_TASKS else how.split)):
        if value is not None:
            raise PromptError(
                f"{shown} is a file, which has none; data sets OWNER/NAME of the hub have, and folders",
                setting=f"dataset.{key}",
                value=value,
            )
    with opened_input("dataset.source", source, PromptError) as file, _once_more(file) as again:
        yield rows_of[suffix], file, again


@contextmanager
def _once_more(file: BinaryIO) -> Iterator[BinaryIO]:
    """The same file, to be read from its beginning beside the other; its content is not copied."""
    with io.BytesIO(file.getvalue()) if isinstance(file, io.BytesIO) else Path(file.name).open("rb") as again:
        yield again


def columns_of(given: Any) -> dict[str, str]:
    """What the file calls each column."""
    if given is not None and not (
        isinstance(given, Mapping)
        and all(isinstance(name, str) for name in given.values())
        and any(given.get(column, column) for column in ("prompt", "messages"))
        and set(given) <= set(COLUMNS)
    ):
        raise PromptError(
            f"must say what a file calls some of {', '.join(COLUMNS)}, such as {{id: uuid}}",
            setting="dataset.columns",
            value=given,
        )
    names = {column: (given or {}).get(column, column) for column in COLUMNS}
    # Whoever says so may take ids and groups from where something else comes from.
    alone = [
        column
        for column in COLUMNS
        if names[column] and (column in ("prompt", "messages", "targets", "answer") or column not in (given or {}))
    ]
    if (name := repeated(names[column] for column in alone)) is not None:
        both = " and ".join(column for column in alone if names[column] == name)
        raise PromptError(
            f"{both} would both be the column {name!r}; give each its own", setting="dataset.columns", value=given
        )
    return names


def _jsonl_rows(where: str, file: BinaryIO, names: Mapping[str, str], named: Mapping[str, str]) -> Rows:
    present: dict[str, None] = {}
    for number, row in json_lines(where, file, PromptError, as_written=True):
        if not isinstance(row, dict):
            raise PromptError(f"line {number} is not a JSON object", given=where)
        present |= dict.fromkeys(row)
        yield f"line {number}", row
    # A row may leave out what it has nothing to say of; a file without rows says nothing at all.
    if present:
        _require_named(where, list(present), named)


def _csv_rows(where: str, file: BinaryIO, names: Mapping[str, str], named: Mapping[str, str]) -> Rows:
    header, rows = csv_of(where, file, PromptError)
    if "messages" in named or (names["messages"] in header and names["prompt"] not in header):
        raise PromptError("is CSV, whose cells hold no lists of messages: use JSONL or Parquet", given=where)
    _require_columns(f"{where}: its header", header, names)
    _require_named(where, header, named)
    for number, row in rows:
        # A cell has no way to say nothing but to be empty; an empty prompt is told as one.
        given: dict[str, Any] = {
            name: cell or (cell if name == names["prompt"] else None) for name, cell in zip(header, row, strict=True)
        }
        for column in ("targets", "wordings"):
            if given.get(names[column]) is not None:
                given[names[column]] = _json_list(f"{where}: line {number}", column, given[names[column]])
        if _AT_OF_CSV.fullmatch(given.get(names["at"]) or ""):
            given[names["at"]] = json_value(given[names["at"]])
        yield f"line {number}", given


def _json_list(where: str, column: str, cell: str) -> Any:
    try:
        return json_value(cell)
    except ValueError as error:
        raise PromptError(
            f'{column} must be a JSON list such as [" a", " b"], not {shortened(cell)}, which {one_line(error)}',
            given=where,
        ) from error


def _parquet_rows(where: str, file: BinaryIO, names: Mapping[str, str], named: Mapping[str, str]) -> Rows:
    parquet = parquet_of(where, file, PromptError)
    present = parquet.schema_arrow.names
    _require_columns(f"{where}: the file", present, names)
    _require_named(where, present, named)
    number = 0
    wanted = dict.fromkeys(name for name in names.values() if name in present)
    for batch in parquet_batches(where, parquet, list(wanted), PromptError):
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError) as error:
            # Times that Python has no value for.
            raise PromptError(f"rows from {number} on cannot be read: {one_line(error)}", given=where) from error
        for row in rows:
            yield f"row {number}", row
            number += 1


def _json_rows(where: str, file: BinaryIO, names: Mapping[str, str], named: Mapping[str, str]) -> Rows:
    """Of a list of objects; files of this name may also hold an object a line."""
    text = text_of(where, file.read(), PromptError)
    file.seek(0)
    if not text.lstrip().startswith("["):
        yield from _jsonl_rows(where, file, names, named)
        return
    try:
        rows = json_value(text, as_written=True)
    except ValueError as error:
        raise PromptError(str(error), given=where) from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise PromptError(f"row {number} is not a JSON object", given=where)
        yield f"row {number}", row
    if rows:
        _require_named(where, list(dict.fromkeys(name for row in rows for name in row)), named)


def _folder_rows(where: str, folder: Folder, names: Mapping[str, str], named: Mapping[str, str]) -> Rows:
    for cut in folder.cuts:
        rows = partial(_rows_of_files, where, folder.place, cut.files, names, named)
        start, end = cut.range(partial(_count, rows))
        count = 0
        # Also behind the last: what is wrong with a file is wrong with all of it.
        for count, row in enumerate(rows(), 1):
            if start < count <= end:
                yield row
        if cut.is_beyond(count):
            raise PromptError(
                f"{where}: there are {count} rows to cut", setting="dataset.split", value=f"...[{cut.says}]"
            )


def _count(rows: Callable[[], Rows]) -> int:
    return sum(1 for _ in rows())


def _rows_of_files(
    where: str, folder: Path, files: Sequence[str], names: Mapping[str, str], named: Mapping[str, str]
) -> Rows:
    """The rows of several files, each read as if it were given alone."""
    rows_of = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}
    for name in files:
        own = f"{where}: {name}"
        try:
            opened = (folder / name).open("rb")
        except OSError as error:
            raise PromptError(f"cannot be read: {one_line(error)}", given=own) from error
        with opened as file:
            for place, row in rows_of[Path(name).suffix.lower()](own, file, names, named):
                yield f"{name}: {place}", row


def _hub_rows(where: str, table: HubTable, names: Mapping[str, str], named: Mapping[str, str]) -> Rows:
    _require_columns(f"{where}: the data set", table.columns, names)
    _require_named(where, table.columns, named)
    wanted = dict.fromkeys(name for name in names.values() if name in table.columns)
    for number, row in enumerate(table.rows(list(wanted))):
        yield f"row {number}", row


def _require_columns(where: str, present: Sequence[str], names: Mapping[str, str]) -> None:
    if names["prompt"] not in present and names["messages"] not in present:
        raise missing_column(where, names["prompt"] or names["messages"])
    if names["targets"] not in present and names["answer"] not in present:
        raise missing_column(where, names["targets"])


def _require_named(where: str, present: Sequence[str], named: Mapping[str, str]) -> None:
    """Refuse a column that a person named and no row has: it was mistyped, and would be left out without a word."""
    # Of the prompt itself a row says so, with its line.
    for column, name in named.items():
        if column not in ("prompt", "messages") and name not in present:
            raise PromptError(
                f"has no column {name!r}, which dataset.columns={{{column}: {name}}} names; its columns are "
                f"{shortened(', '.join(present))[1:-1]}",
                given=where,
            )


def missing_column(where: str, column: str) -> PromptError:
    return PromptError(
        f"has no {column!r}; prompt or messages are needed, and targets or answer; id is optional; "
        "dataset.columns={prompt: NAME} says what a file calls them",
        given=where,
    )

"""What the content of a file that a user gives says: text, JSON, CSV and Parquet, read strictly.

Nothing is guessed. Text is UTF-8, with or without a byte-order mark; a name stands once among columns and once among
the keys of an object; a row has as many cells as the header; checksums of Parquet's pages are verified where a file has
them. `where` begins every message: the setting and its file. How content is fetched: `inputs.py`.
"""

from __future__ import annotations

import csv
import io
import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, BinaryIO, Self

import pyarrow as pa
import pyarrow.parquet as pq

from neg_service.errors import ConfigurationError, one_line

Refusal = type[ConfigurationError]

# The longer mark of two that begin alike comes first.
_ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_OTHER_FILES = {
    b"\x1f\x8b": "data compressed with gzip: unpack it",
    b"\x28\xb5\x2f\xfd": "data compressed with zstd: unpack it",
    b"PK\x03\x04": "a zip archive: zip://NAME::FILE names a file in it",
    b"version https://git-lfs": "a Git LFS pointer in the place of the file: git lfs pull fetches the file",
    b"<!doctype html": "a page of HTML: the address is of a page about the file, perhaps",
    b"<html": "a page of HTML: the address is of a page about the file, perhaps",
}
_PARQUET = b"PAR1"
# So many bytes tell what a file is.
_BEGINNING = 64

# The csv module has one limit for all cells of a process; so many rows are read while it is another.
_CSV_LIMIT = threading.Lock()
_MOST_CSV_LIMIT = 2**31 - 1
_CSV_ROWS = 1000


def text_of(where: str, content: bytes, refusal: Refusal = ConfigurationError) -> str:
    """The text of a file, without its byte-order mark.

    Raises:
        ConfigurationError: it is not UTF-8, or no text at all; of the class `refusal`, as in all of this file.
    """
    _refuse_no_text(where, content, refusal)
    if (at := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, at) + 1
        raise refusal(
            f"line {line} holds a NUL byte, as UTF-16 without a byte-order mark does: save it as UTF-8", given=where
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise refusal(
            f"line {line} is not UTF-8 (byte 0x{content[problem.start]:02x}; the file is Latin-1 or of a "
            f"Windows code page, or damaged): save it as UTF-8",
            given=where,
        ) from problem


def text_lines(where: str, file: BinaryIO, refusal: Refusal, newline: str | None = None) -> Iterator[str]:
    """The lines of a file's text, one after the other, so that no more than a piece is in memory; see `text_of`.

    `newline` as of `io.TextIOWrapper`.
    """
    _refuse_no_text(where, file.read(_BEGINNING), refusal)
    file.seek(0)
    lines = io.TextIOWrapper(file, "utf-8-sig", newline=newline)
    try:
        for line in lines:
            if "\0" in line:
                break
            yield line
        else:
            return
    except UnicodeDecodeError:
        pass
    finally:
        with suppress(ValueError):
            lines.detach()
    # Only who reads all of it can say where what is wrong stands.
    file.seek(0)
    text_of(where, file.read(), refusal)


def _refuse_no_text(where: str, beginning: bytes, refusal: Refusal) -> None:
    for mark, name in _ENCODINGS.items():
        if beginning.startswith(mark):
            raise refusal(f"is {name}, not UTF-8: save it as UTF-8", given=where)
    if beginning.startswith(_PARQUET):
        raise refusal("is Parquet, not text: its name must end in .parquet", given=where)
    if other := _other_file(beginning):
        raise refusal(f"is {other}", given=where)


def json_of(where: str, content: bytes, refusal: Refusal = ConfigurationError, *, as_written: bool = False) -> Any:
    """What a file of JSON says; `as_written` as of `json_lines`.

    Raises:
        ConfigurationError: it is not JSON, an object has a key twice, or it is nested too deep.
    """
    text = text_of(where, content, refusal)
    try:
        return json_value(text, as_written=as_written)
    except ValueError as problem:
        raise refusal(str(problem), given=where) from problem


def json_lines(
    where: str, content: bytes | BinaryIO, refusal: Refusal = ConfigurationError, *, as_written: bool = False
) -> Iterator[tuple[int, Any]]:
    """What the lines of a JSONL file say, with their numbers from 1; empty lines are left out.

    Of an open file no more than a piece is in memory.

    `as_written`: the text of a number is that in the file, as of 1.10 and 1e5.

    Only line feeds and carriage returns end a line: texts may hold U+2028 and whatever else ends one elsewhere.

    Raises:
        ConfigurationError: see `json_of`; naming the line.
    """
    lines: Iterable[str]
    if isinstance(content, bytes):
        lines = io.StringIO(text_of(where, content, refusal), newline=None)
    else:
        lines = text_lines(where, content, refusal)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json_value(line.rstrip(), as_written=as_written)
        except ValueError as problem:
            raise refusal(f"line {number} {problem}", given=where) from problem


def json_value(text: str, *, as_written: bool = False) -> Any:
    """What a text of JSON says; `as_written` as of `json_lines`.

    Raises:
        ValueError: what is wrong, as the end of a sentence.
    """
    try:
        return (_AS_WRITTEN if as_written else _DECODER).decode(text)
    except json.JSONDecodeError as problem:
        line = f"line {problem.lineno}, " if "\n" in text else ""
        raise ValueError(f"is not JSON: {problem.msg} at {line}column {problem.colno}") from problem
    except RecursionError as problem:
        raise ValueError("is JSON with lists or objects nested too deep") from problem
    except _RepeatedKey:
        raise
    except ValueError as problem:
        # Whole numbers of thousands of digits.
        raise ValueError(f"is not JSON that can be read: {one_line(problem).split(';')[0]}") from problem


class _RepeatedKey(ValueError):
    """Two values, of which a dictionary would keep the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKey(f"has an object with the key {repeated(name for name, _ in pairs)!r} twice")
    return found


class _AsWritten:
    """A number with the text that it was written as: `1.10` is no `1.1` where it is a name, and -0 no 0."""

    text: str

    def __new__(cls, text: str) -> Self:
        number = super().__new__(cls, text)  # type: ignore[call-arg]
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


class _WrittenFloat(_AsWritten, float):
    pass


class _WrittenInt(_AsWritten, int):
    pass


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_AS_WRITTEN = json.JSONDecoder(object_pairs_hook=_object, parse_float=_WrittenFloat, parse_int=_WrittenInt)


def repeated(names: Iterable[str]) -> str | None:
    """The first of the names that stand twice, if any."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper than `levels`; it recurses into nothing itself."""
    inner = [value]
    for _ in range(levels + 1):
        inner = [
            one
            for outer in inner
            if isinstance(outer, dict | list)
            for one in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not inner:
            return False
    return True


def csv_of(
    where: str, content: bytes | BinaryIO, refusal: Refusal = ConfigurationError
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The header of a CSV file, and its rows with the numbers of their lines; empty lines are left out.

    Raises:
        ConfigurationError: it is not CSV in UTF-8, two columns have one name, or a row has not as many cells as the
            header; the latter as rows are read.
    """
    if isinstance(content, bytes):
        text = text_of(where, content, refusal)
        rows = _csv_rows(where, io.StringIO(text, newline=""), len(text), refusal)
    else:
        size = content.seek(0, io.SEEK_END)
        content.seek(0)
        rows = _csv_rows(where, text_lines(where, content, refusal, newline=""), size, refusal)
    _, header = next(rows, (0, []))
    # Spreadsheets write columns without a name, any number of them; of a space beside a name nobody knows.
    if (name := repeated(name.strip() for name in header if name.strip())) is not None:
        raise refusal(f"its header has two columns {name!r}; names must differ", given=where)
    return header, _of_length(where, rows, len(header), refusal)


def _of_length(
    where: str, rows: Iterator[tuple[int, list[str]]], length: int, refusal: Refusal
) -> Iterator[tuple[int, list[str]]]:
    for number, row in rows:
        if len(row) != length:
            raise refusal(f"line {number} has not as many cells as the header: {len(row)} and {length}", given=where)
        yield number, row


def _csv_rows(where: str, lines: Iterable[str], size: int, refusal: Refusal) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, strict=True)
    last = 0
    while True:
        rows = []
        with _CSV_LIMIT:
            limit = csv.field_size_limit()
            # No cell is longer than the file; and nobody's limit is lowered, not for a moment.
            csv.field_size_limit(max(limit, min(size, _MOST_CSV_LIMIT)))
            try:
                for row in islice(reader, _CSV_ROWS):
                    last = reader.line_num
                    rows.append((last, row))
            except csv.Error as problem:
                after = f"after line {last}: " if last else ""
                raise refusal(f"{after}is not CSV: {one_line(problem)}", given=where) from problem
            finally:
                csv.field_size_limit(limit)
        if not rows:
            return
        yield from (row for row in rows if row[1])


def parquet_of(where: str, content: bytes | BinaryIO, refusal: Refusal = ConfigurationError) -> pq.ParquetFile:
    """A Parquet file whose checksums are verified as it is read.

    Raises:
        ConfigurationError: it is not Parquet, or two columns have one name.
    """
    try:
        source = pa.BufferReader(content) if isinstance(content, bytes) else content
        file = pq.ParquetFile(source, page_checksum_verification=True)
        names = file.schema_arrow.names
    except (pa.ArrowException, OSError, ValueError) as problem:
        if not isinstance(content, bytes):
            content.seek(0)
            content = content.read(_BEGINNING)
        reason = f"but {other}" if (other := _other_file(content)) else one_line(problem)
        raise refusal(f"is not Parquet, or damaged: {reason}", given=where) from problem
    if (name := repeated(names)) is not None:
        raise refusal(f"has two columns {name!r}; names must differ", given=where)
    return file


def parquet_batches(
    where: str, file: pq.ParquetFile, columns: Sequence[str], refusal: Refusal = ConfigurationError
) -> Iterator[pa.RecordBatch]:
    """Some columns of a Parquet file, a batch of rows after the other.

    Raises:
        ConfigurationError: a checksum is wrong, or it is damaged in another way.
    """
    count = 0
    try:
        for batch in file.iter_batches(columns=list(columns)):
            # Texts that are not UTF-8, too, which a file without checksums can come to hold.
            batch.validate(full=True)
            count += batch.num_rows
            yield batch
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise refusal(f"is damaged: {one_line(problem)}", given=where) from problem
    # A page whose kind is changed is passed over.
    if count != file.metadata.num_rows:
        raise refusal(f"is damaged: {count} rows can be read of {file.metadata.num_rows}", given=where)


def _other_file(content: bytes) -> str | None:
    """What a file is whose content is neither text nor Parquet, if it can be told from its beginning."""
    beginning = content[:_BEGINNING].lstrip() if content[:1].isspace() else content[:_BEGINNING]
    return next((what for mark, what in _OTHER_FILES.items() if beginning[: len(mark)].lower() == mark.lower()), None)

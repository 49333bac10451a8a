"""Lists of neurons in files: the columns `layer` and `neuron` of CSV, JSONL or Parquet, or of a table of results.

A table of results names a neuron once for each prompt and target; what comes out has it once. A cell that is no whole
number is refused with its line or row: left out, it would be a neuron fewer without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service.contents import csv_of, json_lines, parquet_batches, parquet_of
from neg_service.errors import ConfigurationError, one_line, shortened
from neg_service.inputs import parts_of_input, suffix_of
from neg_service.places import without_credentials
from neg_service.storage.parts import damage_of

_COLUMNS = ("layer", "neuron")
_WHOLE = re.compile(r"\s*[+-]?[0-9]+\s*", re.ASCII)
_DIGITS = 18

_Pairs = NDArray[np.int64]


def pairs_in(source: str) -> list[list[int]]:
    """The (layer, index) pairs in a file, or in a folder that is a table of results; each once, in order.

    Raises:
        ConfigurationError: a file that cannot be read or is damaged, that has not both columns, or no rows, or a cell
            that is no whole number.
    """
    where = f"neurons.list={without_credentials(source)}"
    found: set[tuple[int, ...]] = set()
    read = None
    for name, content in parts_of_input("neurons.list", source):
        read = _READERS.get(suffix_of(name))
        if read is None:
            break
        part = name.rpartition("/")[2]
        place = where if where.endswith(part) else f"{where.rstrip('/')}/{part}"
        for pairs in read(place, part, content):
            found.update(map(tuple, np.unique(pairs, axis=0).tolist()))
    if read is None:
        raise ConfigurationError(
            f"must end in {', '.join(_READERS)}, be a folder of .parquet files, or a list of pairs such as [[29,864]]",
            given=where,
        )
    if not found:
        raise ConfigurationError("has no rows; at least one neuron is needed", given=where)
    return [list(pair) for pair in sorted(found)]


def _csv_pairs(where: str, name: str, content: bytes) -> Iterator[_Pairs]:
    header, rows = csv_of(where, content)
    places = [_index(where, column, header) for column in _COLUMNS]
    yield _as_pairs(
        [
            _whole(f"{where}: line {number}", column, _number(row[place]))
            for column, place in zip(_COLUMNS, places, strict=True)
        ]
        for number, row in rows
    )


def _jsonl_pairs(where: str, name: str, content: bytes) -> Iterator[_Pairs]:
    def pair(number: int, row: Any) -> list[int]:
        place = f"{where}: line {number}"
        if not isinstance(row, dict):
            raise ConfigurationError('is not a JSON object such as {"layer": 29, "neuron": 864}', given=place)
        for column in _COLUMNS:
            _index(place, column, list(row))
        return [_whole(place, column, row[column]) for column in _COLUMNS]

    yield _as_pairs(pair(number, row) for number, row in json_lines(where, content))


def _parquet_pairs(where: str, name: str, content: bytes) -> Iterator[_Pairs]:
    file = parquet_of(where, content)
    schema = file.schema_arrow
    for column in _COLUMNS:
        if not pa.types.is_integer(schema.field(_index(where, column, schema.names)).type):
            raise _no_column(where, column, schema.names)
    if (damage := damage_of(name, content)) is not None:
        raise ConfigurationError(f"is {damage}", given=where)
    first = 0
    for batch in parquet_batches(where, file, _COLUMNS):
        for column in _COLUMNS:
            if batch[column].null_count:
                row = first + batch[column].is_valid().to_pylist().index(False)
                raise ConfigurationError(f"row {row}: {column} must be a whole number, and is empty", given=where)
        try:
            yield np.stack([batch[column].cast(pa.int64()).to_numpy() for column in _COLUMNS], 1)
        except pa.ArrowInvalid as error:
            raise ConfigurationError(f"rows from {first} on: {one_line(error)}", given=where) from error
        first += batch.num_rows


_READERS = {".csv": _csv_pairs, ".jsonl": _jsonl_pairs, ".parquet": _parquet_pairs}


def _as_pairs(pairs: Iterator[list[int]]) -> _Pairs:
    return np.array(list(pairs), dtype=np.int64).reshape(-1, 2)


def _number(cell: str) -> Any:
    """The whole number in a cell of text, or the cell."""
    return int(cell) if _WHOLE.fullmatch(cell) and len(cell.strip()) <= _DIGITS else cell


def _whole(where: str, column: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 10**_DIGITS:
        raise ConfigurationError(
            f"{column} must be a whole number, of at most {_DIGITS} digits, not {shortened(value)}", given=where
        )
    return value


def _index(where: str, column: str, present: Sequence[str]) -> int:
    if column not in present:
        raise _no_column(where, column, present)
    return present.index(column)


def _no_column(where: str, column: str, present: Sequence[str]) -> ConfigurationError:
    return ConfigurationError(
        f"needs whole numbers in a column {column!r}; its columns are {shortened(', '.join(present))[1:-1]}",
        given=where,
    )

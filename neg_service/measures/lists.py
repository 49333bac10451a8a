"""Lists of neurons in files: the columns `layer` and `neuron` of CSV, JSONL or Parquet, or of a table of results.

A column `expert` is read where there is one; empty or null means that the neuron is of no expert.

A table of results names a neuron once for each prompt and target; what comes out has it once. A cell that is no whole
number is refused with its line or row: left out, it would be a neuron fewer without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from neg_service.contents import csv_of, json_lines, parquet_batches, parquet_of
from neg_service.errors import ConfigurationError, one_line, shortened
from neg_service.inputs import parts_of_input, suffix_of
from neg_service.layer_neurons import NO_EXPERT
from neg_service.neurons import Neurons, NeuronSet
from neg_service.places import absolute, without_credentials
from neg_service.storage.parts import damage_of

# A neuron has no expert where there is no such column.
_COLUMNS = ("layer", "neuron")
_EXPERT = "expert"
_WHOLE = re.compile(r"\s*[+-]?[0-9]+\s*", re.ASCII)
_DIGITS = 18


def neurons_in(source: str) -> NeuronSet:
    """The neurons in a file, or in a folder that is a table of results; each once.

    Raises:
        ConfigurationError: a file that cannot be read or is damaged, that has not both columns, or no rows, or a cell
            that is no whole number.
    """
    where = f"neurons.list={without_credentials(source)}"
    found: list[Neurons] = []
    read = None
    for name, content in parts_of_input("neurons.list", source):
        read = _READERS.get(suffix_of(name))
        if read is None:
            break
        part = name.rpartition("/")[2]
        place = where if where.endswith(part) else f"{where.rstrip('/')}/{part}"
        found += [np.unique(rows, axis=0) for rows in read(place, part, content) if len(rows)]
    if read is None:
        raise ConfigurationError(
            f"must end in {', '.join(_READERS)}, be a folder of .parquet files, or a list of pairs such as [[29,864]]",
            given=where,
        )
    if not found:
        raise ConfigurationError("has no rows; at least one neuron is needed", given=where)
    neurons, _ = NeuronSet.distinct(np.concatenate(found))
    return replace(neurons, source=without_credentials(absolute(source)))


def _csv_rows(where: str, name: str, content: bytes) -> Iterator[Neurons]:
    header, rows = csv_of(where, content)
    places = {column: _index(where, column, header) for column in _COLUMNS}
    if _EXPERT in header:
        places[_EXPERT] = header.index(_EXPERT)
    yield _as_rows(
        _row(f"{where}: line {number}", {column: _number(row[place]) for column, place in places.items()})
        for number, row in rows
    )


def _jsonl_rows(where: str, name: str, content: bytes) -> Iterator[Neurons]:
    def neuron(number: int, row: Any) -> list[int]:
        place = f"{where}: line {number}"
        if not isinstance(row, dict):
            raise ConfigurationError('is not a JSON object such as {"layer": 29, "neuron": 864}', given=place)
        for column in _COLUMNS:
            _index(place, column, list(row))
        return _row(place, row)

    yield _as_rows(neuron(number, row) for number, row in json_lines(where, content))


def _parquet_rows(where: str, name: str, content: bytes) -> Iterator[Neurons]:
    file = parquet_of(where, content)
    schema = file.schema_arrow
    columns = [*_COLUMNS, *([_EXPERT] if _EXPERT in schema.names else [])]
    for column in columns:
        kind = schema.field(_index(where, column, schema.names)).type
        if not (pa.types.is_integer(kind) or (column == _EXPERT and pa.types.is_null(kind))):
            raise _no_column(where, column, schema.names)
    if (damage := damage_of(name, content)) is not None:
        raise ConfigurationError(f"is {damage}", given=where)
    first = 0
    for batch in parquet_batches(where, file, columns):
        for column in _COLUMNS:
            if batch[column].null_count:
                row = first + batch[column].is_valid().to_pylist().index(False)
                raise ConfigurationError(f"row {row}: {column} must be a whole number, and is empty", given=where)
        experts = batch[_EXPERT] if _EXPERT in columns else pa.nulls(batch.num_rows)
        try:
            numbers = [own.cast(pa.int64()) for own in (batch["layer"], experts, batch["neuron"])]
        except pa.ArrowInvalid as error:
            raise ConfigurationError(f"rows from {first} on: {one_line(error)}", given=where) from error
        yield np.stack([own.fill_null(NO_EXPERT).to_numpy(zero_copy_only=False) for own in numbers], 1)
        first += batch.num_rows


_READERS = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


def _as_rows(rows: Iterator[list[int]]) -> Neurons:
    return np.array(list(rows), dtype=np.int64).reshape(-1, 3)


def _row(where: str, cells: Mapping[str, Any]) -> list[int]:
    """(layer, expert, neuron) of the cells of a line."""
    layer, neuron = (_whole(where, column, cells[column]) for column in _COLUMNS)
    expert = cells.get(_EXPERT)
    is_none = expert is None or (isinstance(expert, str) and not expert.strip())
    return [layer, NO_EXPERT if is_none else _whole(where, _EXPERT, expert), neuron]


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

"""Where prompts come from: the built-in facts, tasks of MCEval8K, or a JSONL, Parquet or CSV file at any fsspec URI.

A file has the columns `prompt` and `targets`, and optionally `answer` (the right target itself) and `id`. In CSV,
`targets` is a JSON list in one cell. Every row is checked, and an error names its line or row.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from neg_service.config import DatasetConfig
from neg_service.errors import PromptError, nearest, one_line
from neg_service.inputs import read_input, suffix_of, without_credentials
from neg_service.prompts import facts
from neg_service.prompts.mceval8k import chosen_splits, chosen_tasks, load_tasks
from neg_service.prompts.prompt import Prompt

BUILT_IN = {"facts": facts.load, "facts-masked": facts.load_masked}
COLUMNS = ("prompt", "targets", "answer", "id")


def load_dataset(dataset: DatasetConfig, limit: int | None = None) -> list[Prompt]:
    """All prompts of a data set, or its first `limit`, or those with the ids that it names.

    Raises:
        PromptError: see `load_prompts` and `load_tasks`, or an id that there is not.
    """
    most = None if dataset.ids is not None else limit
    prompts = load_prompts(dataset.source, most) if dataset.task is None else load_tasks(dataset)
    if dataset.ids is not None:
        wanted = {str(one) for one in (dataset.ids if isinstance(dataset.ids, list) else [dataset.ids])}
        known = [prompt.id for prompt in prompts]
        if missing := sorted(wanted - set(known)):
            raise PromptError(
                f"dataset.ids: no prompt has the id {missing[0]!r}; {nearest(missing[0], known)}".rstrip("; ")
            )
        prompts = [prompt for prompt in prompts if prompt.id in wanted]
    return prompts[:limit]


def dataset_name(dataset: DatasetConfig) -> str:
    """A data set in a few words, fit for the name of a run."""
    if dataset.task is None:
        return re.sub(r"\.[a-z]+$", "", without_credentials(dataset.source).rsplit("/", 1)[-1])
    tasks, splits = chosen_tasks(dataset.task), chosen_splits(dataset.split)
    return "-".join([*(tasks if len(tasks) < 3 else [f"{len(tasks)}-tasks"]), *splits])


def load_prompts(source: str, limit: int | None = None) -> list[Prompt]:
    """All prompts of `source`, or its first `limit`: a built-in name or a file's path or URI.

    Raises:
        PromptError: unknown source, missing column, or a broken row (with its line or row number).
    """
    if source in BUILT_IN:
        return BUILT_IN[source]()[:limit]
    shown = without_credentials(source)
    suffix = suffix_of(source)
    rows_of = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}
    if suffix not in rows_of:
        raise PromptError(
            f"dataset.source={shown}: neither a built-in data set ({', '.join(BUILT_IN)}) nor a file that "
            f"ends in {', '.join(rows_of)}"
        )
    content = read_input("dataset.source", source, PromptError)
    rows = rows_of[suffix](shown, content)
    return [_prompt(shown, place, index, row) for index, (place, row) in enumerate(islice(rows, limit))]


def _jsonl_rows(source: str, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PromptError(f"dataset.source={source}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise PromptError(f"dataset.source={source}: line {number} is not a JSON object")
        yield f"line {number}", row


def _csv_rows(source: str, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = None
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        missing = [column for column in COLUMNS[:2] if column not in (reader.fieldnames or [])]
        if missing:
            raise _missing_column(source, "its header", missing[0])
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row or None in row.values():
                raise PromptError(f"dataset.source={source}: {place} has not as many cells as the header")
            try:
                targets = json.loads(row["targets"])
            except ValueError as error:
                raise PromptError(
                    f'dataset.source={source}: {place}: targets must be a JSON list such as [" a", " b"], '
                    f"not {row['targets']!r}"
                ) from error
            yield place, {**row, "targets": targets, "answer": row.get("answer") or None, "id": row.get("id") or None}
    except (csv.Error, UnicodeDecodeError) as error:
        at = f"after line {reader.line_num}: " if reader is not None else ""
        raise PromptError(f"dataset.source={source}: {at}is not CSV in UTF-8: {one_line(error)}") from error


def _parquet_rows(source: str, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(io.BytesIO(content))
        columns = [column for column in COLUMNS if column in file.schema_arrow.names]
        missing = [column for column in COLUMNS[:2] if column not in columns]
        if missing:
            raise _missing_column(source, "the file", missing[0])
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise PromptError(f"dataset.source={source}: is not Parquet: {one_line(error)}") from error


def _prompt(source: str, place: str, index: int, row: dict[str, Any]) -> Prompt:
    for column in COLUMNS[:2]:
        if row.get(column) is None:
            raise _missing_column(source, place, column)
    text, targets, answer, id_ = (row.get(column) for column in COLUMNS)
    where = f"dataset.source={source}: {place}"
    if not isinstance(text, str):
        raise PromptError(f"{where}: prompt must be a text, not {text!r}")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise PromptError(f"{where}: targets must be a list of texts, not {targets!r}")
    if answer is not None and answer not in targets:
        raise PromptError(f"{where}: answer {answer!r} is not one of the targets {targets!r}")
    id_ = f"{index:06d}" if id_ is None else str(id_)
    return Prompt(id_, text, tuple(targets), None if answer is None else targets.index(answer))


def _missing_column(source: str, place: str, column: str) -> PromptError:
    return PromptError(
        f"dataset.source={source}: {place} has no {column!r}; prompt and targets are needed, answer and id are optional"
    )

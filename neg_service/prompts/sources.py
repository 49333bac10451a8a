"""Where prompts come from: the built-in facts, tasks of MCEval8K, or a JSONL, Parquet or CSV file at any fsspec URI.

A file has the columns `prompt` and `targets`, and optionally `answer` (the right target itself) and `id`. In CSV,
`targets` is a JSON list in one cell. A row without `targets` needs an `answer`, which becomes its first target, after a
space; the others are answers of other rows, of those with the same `group` where they are enough. Every row is checked,
and an error names its line or row.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from neg_service.config import DatasetConfig
from neg_service.errors import PromptError, nearest, one_line
from neg_service.inputs import read_input, suffix_of
from neg_service.places import file_name_of, refuse_credentials, without_credentials
from neg_service.prompts import facts
from neg_service.prompts.mceval8k import chosen_splits, chosen_tasks, load_tasks
from neg_service.prompts.prompt import Prompt

BUILT_IN = {"facts": facts.load, "facts-masked": facts.load_masked}
COLUMNS = ("prompt", "targets", "answer", "id", "group")


def load_dataset(dataset: DatasetConfig, limit: int | None = None) -> list[Prompt]:
    """All prompts of a data set, or its first `limit`, or those with the ids that it names.

    Raises:
        PromptError: see `load_prompts` and `load_tasks`, or an id that there is not.
    """
    most = None if dataset.ids is not None else limit
    prompts = load_prompts(dataset.source, most, dataset) if dataset.task is None else load_tasks(dataset)
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
        return re.sub(r"\.[a-z]+$", "", file_name_of(dataset.source))
    tasks, splits = chosen_tasks(dataset.task), chosen_splits(dataset.split)
    return "-".join([*(tasks if len(tasks) < 3 else [f"{len(tasks)}-tasks"]), *splits])


def load_prompts(
    source: str | os.PathLike[str], limit: int | None = None, how: DatasetConfig | None = None
) -> list[Prompt]:
    """All prompts of `source`, or its first `limit`: a built-in name or a file's path or URI.

    `how` says how a file's rows become prompts. A row's targets do not depend on `limit`.

    Raises:
        PromptError: unknown source, missing column, or a broken row (with its line or row number).
    """
    source = os.fspath(source)
    if source in BUILT_IN:
        return BUILT_IN[source]()[:limit]
    refuse_credentials("dataset.source", source, PromptError)
    shown = without_credentials(source)
    suffix = suffix_of(source)
    rows_of = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}
    if suffix not in rows_of:
        raise PromptError(
            f"dataset.source={shown}: neither a built-in data set ({', '.join(BUILT_IN)}) nor a file that "
            f"ends in {', '.join(rows_of)}"
        )
    how = how or DatasetConfig(source)
    names = _columns(how.columns)
    if how.choices < 2:
        raise PromptError(f"dataset.choices={how.choices}: must be at least 2, the answer and another one")
    content = read_input("dataset.source", source, PromptError)
    rows = [
        (place, {column: row.get(name) for column, name in names.items()})
        for place, row in rows_of[suffix](shown, content, names)
    ]
    _give_targets([row for _, row in rows], how)
    return [_prompt(shown, place, index, row, names) for index, (place, row) in enumerate(rows[:limit])]


def _columns(given: Any) -> dict[str, str]:
    """What the file calls each column."""
    if given is not None and not (
        isinstance(given, Mapping)
        and all(isinstance(name, str) for name in given.values())
        and set(given) <= set(COLUMNS)
    ):
        raise PromptError(
            f"dataset.columns={given}: must say what a file calls some of {', '.join(COLUMNS)}, such as {{id: uuid}}"
        )
    return {column: (given or {}).get(column, column) for column in COLUMNS}


def _give_targets(rows: Sequence[dict[str, Any]], how: DatasetConfig) -> None:
    """Targets for rows that have an answer alone: other rows' answers beside it."""
    waiting = [
        row for row in rows if row["targets"] is None and isinstance(row["answer"], str) and row["answer"].strip()
    ]
    for row in waiting:
        group = "" if row["group"] is None else str(row["group"])
        row["group"] = group.split(how.group_until)[0] if how.group_until else group
    of_group: dict[str, set[str]] = {}
    for row in waiting:
        of_group.setdefault(row["group"], set()).add(row["answer"].lstrip())
    pools = {group: sorted(answers) for group, answers in of_group.items()}
    everywhere = sorted(set().union(*of_group.values()))
    for row in waiting:
        # Of the row alone, so that neither the order of rows nor their number decides what is drawn from a group.
        digest = hashlib.sha256(f"{how.seed}\0{row['prompt']}\0{row['answer']}".encode()).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        texts = [row["answer"].lstrip()]
        for pool in (pools[row["group"]], everywhere):
            # Of a large pool so many are drawn that enough of them differ.
            is_small = len(pool) <= 16 * how.choices
            places = draw.permutation(len(pool)) if is_small else draw.integers(len(pool), size=16 * how.choices)
            for text in (pool[place] for place in places):
                if len(texts) < how.choices and text not in texts:
                    texts.append(text)
        space = "" if str(row["prompt"])[-1:].isspace() else how.answer_prefix
        texts = [space + text for text in texts]
        row["answer"] = texts[0]
        # The right one's place says nothing.
        row["targets"] = [texts[place] for place in draw.permutation(len(texts))]


def _jsonl_rows(source: str, content: bytes, names: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _csv_rows(source: str, content: bytes, names: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = None
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        _require_columns(source, "its header", reader.fieldnames or [], names)
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row or None in row.values():
                raise PromptError(f"dataset.source={source}: {place} has not as many cells as the header")
            # A cell has no way to say nothing but to be empty; an empty prompt is told as one.
            given: dict[str, Any] = {
                name: cell or (cell if name == names["prompt"] else None) for name, cell in row.items()
            }
            if given.get(names["targets"]) is not None:
                given[names["targets"]] = _json_list(source, place, given[names["targets"]])
            yield place, given
    except (csv.Error, UnicodeDecodeError) as error:
        at = f"after line {reader.line_num}: " if reader is not None else ""
        raise PromptError(f"dataset.source={source}: {at}is not CSV in UTF-8: {one_line(error)}") from error


def _json_list(source: str, place: str, cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError as error:
        raise PromptError(
            f'dataset.source={source}: {place}: targets must be a JSON list such as [" a", " b"], not {cell!r}'
        ) from error


def _parquet_rows(source: str, content: bytes, names: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(io.BytesIO(content))
        _require_columns(source, "the file", file.schema_arrow.names, names)
        columns = [name for name in names.values() if name in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise PromptError(f"dataset.source={source}: is not Parquet: {one_line(error)}") from error


def _require_columns(source: str, where: str, present: Sequence[str], names: Mapping[str, str]) -> None:
    if names["prompt"] not in present:
        raise _missing_column(source, where, names["prompt"])
    if names["targets"] not in present and names["answer"] not in present:
        raise _missing_column(source, where, names["targets"])


def _prompt(source: str, place: str, index: int, row: dict[str, Any], names: Mapping[str, str]) -> Prompt:
    if row["targets"] is None and row["answer"] is not None:
        raise PromptError(
            f"dataset.source={source}: {place}: answer must be a text where there are no targets, not {row['answer']!r}"
        )
    for column in COLUMNS[:2]:
        if row[column] is None:
            raise _missing_column(source, place, names[column])
    text, targets, answer, id_ = (row[column] for column in COLUMNS[:4])
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
        f"dataset.source={source}: {place} has no {column!r}; prompt is needed, and targets or answer; id is optional; "
        f"dataset.columns={{prompt: NAME}} says what a file calls them"
    )

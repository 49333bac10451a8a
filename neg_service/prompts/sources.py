"""Where prompts come from: the built-in facts, tasks of MCEval8K, or a JSONL, Parquet or CSV file at any fsspec URI.

A file has the columns `prompt` and `targets`, and optionally `answer` (the right target itself) and `id`. In CSV,
`targets` is a JSON list in one cell. A row without `targets` needs an `answer`, which becomes its first target, after a
space; the others are answers of other rows, of those with the same `group` where they are enough. Every row is checked,
and an error names its line or row.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from neg_service.config import DatasetConfig
from neg_service.contents import csv_of, json_lines, json_value, parquet_batches, parquet_of, repeated
from neg_service.errors import PromptError, nearest, one_line, shortened
from neg_service.inputs import opened_input, suffix_of
from neg_service.places import file_name_of, refuse_credentials, without_credentials
from neg_service.prompts import facts
from neg_service.prompts.mceval8k import chosen_splits, chosen_tasks, load_tasks
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.store import PromptFile

BUILT_IN = {"facts": facts.load, "facts-masked": facts.load_masked}
COLUMNS = ("prompt", "targets", "answer", "id", "group")


def load_dataset(dataset: DatasetConfig, limit: int | None = None) -> Sequence[Prompt]:
    """All prompts of a data set, or its first `limit`, or those with the ids that it names.

    Those of a file stay on disk: see `PromptFile`.

    Raises:
        PromptError: see `load_prompts` and `load_tasks`, or an id that there is not.
    """
    require_source(dataset.source)
    most = None if dataset.ids is not None else limit
    prompts: Sequence[Prompt]
    if dataset.task is not None:
        prompts = load_tasks(dataset)
    elif dataset.source in BUILT_IN:
        prompts = BUILT_IN[dataset.source]()
    else:
        prompts = PromptFile(read_prompts(dataset.source, most, dataset))
    if dataset.ids is not None:
        wanted = {str(one) for one in (dataset.ids if isinstance(dataset.ids, list) else [dataset.ids])}
        found = [prompt for prompt in prompts if prompt.id in wanted]
        if missing := sorted(wanted - {prompt.id for prompt in found}):
            known = [prompt.id for prompt in prompts]
            raise PromptError(
                f"no prompt has the id {missing[0]!r}; {nearest(missing[0], known)}".rstrip("; "), setting="dataset.ids"
            )
        prompts = found
    return prompts if limit is None or len(prompts) <= limit else prompts[:limit]


def require_source(source: str) -> None:
    """Refuse what is no name of a data set at all.

    Raises:
        PromptError: it is empty.
    """
    if not source.strip():
        raise PromptError(
            f"has no value; give a file, a folder or {' or '.join(BUILT_IN)}", setting="dataset.source", value=source
        )


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
    require_source(source)
    return BUILT_IN[source]()[:limit] if source in BUILT_IN else list(read_prompts(source, limit, how))


def read_prompts(source: str, limit: int | None = None, how: DatasetConfig | None = None) -> Iterator[Prompt]:
    """The prompts of a file, one after the other; see `load_prompts`. All rows are checked, also beyond `limit`."""
    refuse_credentials("dataset.source", source, PromptError)
    shown = without_credentials(source)
    suffix = suffix_of(source)
    rows_of = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}
    if suffix not in rows_of:
        raise PromptError(
            f"neither a built-in data set ({', '.join(BUILT_IN)}) nor a file that ends in {', '.join(rows_of)}",
            setting="dataset.source",
            value=shown,
        )
    how = how or DatasetConfig(source)
    names = _columns(how.columns)
    if how.choices < 2:
        raise PromptError(
            setting="dataset.choices", value=how.choices, allowed="at least 2, the answer and another one"
        )
    where, named = f"dataset.source={shown}", dict(how.columns or {})

    def rows(file: BinaryIO) -> _Rows:
        for place, row in rows_of[suffix](where, file, names, named):
            yield f"{where}: {place}", {column: row.get(name) for column, name in names.items()}

    with opened_input("dataset.source", source, PromptError) as file, _once_more(file) as again:
        yield from _prompts(rows(file), partial(rows, again), limit, how, names)


@contextmanager
def _once_more(file: BinaryIO) -> Iterator[BinaryIO]:
    """The same file, to be read from its beginning beside the other; its content is not copied."""
    with io.BytesIO(file.getvalue()) if isinstance(file, io.BytesIO) else Path(file.name).open("rb") as again:
        yield again


def _prompts(
    rows: _Rows, again: Callable[[], _Rows], limit: int | None, how: DatasetConfig, names: Mapping[str, str]
) -> Iterator[Prompt]:
    """What rows say; `again` reads them all once more, where some have no targets."""
    others: _Answers | None = None
    wrong: PromptError | None = None
    for index, (place, row) in enumerate(rows):
        # What is wrong with the file itself says more than what is wrong with a row of it.
        if wrong is not None or (limit is not None and index >= limit):
            continue
        try:
            _read_targets(place, row, how)
            if _has_answer_alone(row):
                others = others or _Answers(again(), how)
                others.give_targets(place, row)
            prompt = _prompt(place, index, row, names)
        except PromptError as problem:
            wrong = problem
            continue
        yield prompt
    if wrong is not None:
        raise wrong


def _columns(given: Any) -> dict[str, str]:
    """What the file calls each column."""
    if given is not None and not (
        isinstance(given, Mapping)
        and all(isinstance(name, str) for name in given.values())
        and set(given) <= set(COLUMNS)
    ):
        raise PromptError(
            f"must say what a file calls some of {', '.join(COLUMNS)}, such as {{id: uuid}}",
            setting="dataset.columns",
            value=given,
        )
    names = {column: (given or {}).get(column, column) for column in COLUMNS}
    # Whoever says so may take ids and groups from where something else comes from.
    alone = [column for column in COLUMNS if column in ("prompt", "targets", "answer") or column not in (given or {})]
    if (name := repeated(names[column] for column in alone)) is not None:
        both = " and ".join(column for column in alone if names[column] == name)
        raise PromptError(
            f"{both} would both be the column {name!r}; give each its own", setting="dataset.columns", value=given
        )
    return names


def _has_answer_alone(row: Mapping[str, Any]) -> bool:
    """Whether a row has an answer, and its targets are to be found."""
    return row["targets"] is None and isinstance(row["answer"], str) and bool(row["answer"].strip())


def _read_targets(place: str, row: dict[str, Any], how: DatasetConfig) -> None:
    """Bring a row's targets and its answer to the form that rows have: texts that follow the prompt, and one of them.

    What is no list of texts stays as it is, and is refused later.
    """
    targets, answer = row["targets"], row["answer"]
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        return
    row["targets"] = prefixed = [how.target_prefix + target for target in targets]
    if how.answer_is == "text":
        row["answer"] = how.target_prefix + answer if isinstance(answer, str) else answer
    elif answer is None or answer == "":
        # Splits for tests say nothing of the right one.
        row["answer"] = None
    else:
        text = str(answer)
        if isinstance(answer, bool) or not text.isdecimal() or int(text) >= len(prefixed):
            raise PromptError(
                f"answer must be an index of the {len(prefixed)} targets from 0 (dataset.answer_is=index), not "
                f"{shortened(answer)}",
                given=place,
            )
        row["answer"] = prefixed[int(text)]


class _Answers:
    """The answers of all rows that have no targets, from which each of these rows gets its other ones.

    What memory they take grows with how many different ones there are.
    """

    def __init__(self, rows: _Rows, how: DatasetConfig) -> None:
        """Of all rows."""
        self._how = how
        of_group: dict[str, set[str]] = {}
        for place, row in rows:
            if _has_answer_alone(row):
                of_group.setdefault(self._group(place, row), set()).add(row["answer"].lstrip())
        self._pools = {group: sorted(answers) for group, answers in of_group.items()}
        self._everywhere = sorted(set().union(*of_group.values()))

    def _group(self, place: str, row: Mapping[str, Any]) -> str:
        group = "" if row["group"] is None else _name(place, "group", row["group"])
        return group.split(self._how.group_until)[0] if self._how.group_until else group

    def give_targets(self, place: str, row: dict[str, Any]) -> None:
        """The answer and others, in an order that is drawn; what is no prompt gets none."""
        if not isinstance(row["prompt"], str):
            return
        choices = self._how.choices
        # Of the row alone, so that neither the order of rows nor their number decides what is drawn from a group.
        # Lone surrogates are refused later, with the prompt's id.
        own = f"{self._how.seed}\0{row['prompt']}\0{row['answer']}".encode(errors="surrogatepass")
        digest = hashlib.sha256(own).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        texts = [row["answer"].lstrip()]
        for pool in (self._pools[self._group(place, row)], self._everywhere):
            # Of a large pool so many are drawn that enough of them differ.
            is_small = len(pool) <= 16 * choices
            places = draw.permutation(len(pool)) if is_small else draw.integers(len(pool), size=16 * choices)
            for text in (pool[index] for index in places):
                if len(texts) == choices:
                    break
                if text not in texts:
                    texts.append(text)
        space = "" if row["prompt"][-1:].isspace() else self._how.answer_prefix
        texts = [space + text for text in texts]
        row["answer"] = texts[0]
        # The right one's place says nothing.
        row["targets"] = [texts[index] for index in draw.permutation(len(texts))]


_Rows = Iterator[tuple[str, dict[str, Any]]]


def _jsonl_rows(where: str, file: BinaryIO, names: Mapping[str, str], named: Mapping[str, str]) -> _Rows:
    present: dict[str, None] = {}
    for number, row in json_lines(where, file, PromptError, as_written=True):
        if not isinstance(row, dict):
            raise PromptError(f"line {number} is not a JSON object", given=where)
        present |= dict.fromkeys(row)
        yield f"line {number}", row
    # A row may leave out what it has nothing to say of; a file without rows says nothing at all.
    if present:
        _require_named(where, list(present), named)


def _csv_rows(where: str, file: BinaryIO, names: Mapping[str, str], named: Mapping[str, str]) -> _Rows:
    header, rows = csv_of(where, file, PromptError)
    _require_columns(f"{where}: its header", header, names)
    _require_named(where, header, named)
    for number, row in rows:
        # A cell has no way to say nothing but to be empty; an empty prompt is told as one.
        given: dict[str, Any] = {
            name: cell or (cell if name == names["prompt"] else None) for name, cell in zip(header, row, strict=True)
        }
        if given.get(names["targets"]) is not None:
            given[names["targets"]] = _json_list(f"{where}: line {number}", given[names["targets"]])
        yield f"line {number}", given


def _json_list(where: str, cell: str) -> Any:
    try:
        return json_value(cell)
    except ValueError as error:
        raise PromptError(
            f'targets must be a JSON list such as [" a", " b"], not {shortened(cell)}, which {one_line(error)}',
            given=where,
        ) from error


def _parquet_rows(where: str, file: BinaryIO, names: Mapping[str, str], named: Mapping[str, str]) -> _Rows:
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


def _require_columns(where: str, present: Sequence[str], names: Mapping[str, str]) -> None:
    if names["prompt"] not in present:
        raise _missing_column(where, names["prompt"])
    if names["targets"] not in present and names["answer"] not in present:
        raise _missing_column(where, names["targets"])


def _require_named(where: str, present: Sequence[str], named: Mapping[str, str]) -> None:
    """Refuse a column that a person named and no row has: it was mistyped, and would be left out without a word."""
    # Of the prompt itself a row says so, with its line.
    for column, name in named.items():
        if column != "prompt" and name not in present:
            raise PromptError(
                f"has no column {name!r}, which dataset.columns={{{column}: {name}}} names; its columns are "
                f"{shortened(', '.join(present))[1:-1]}",
                given=where,
            )


def _prompt(where: str, index: int, row: dict[str, Any], names: Mapping[str, str]) -> Prompt:
    text, targets, answer, id_ = (row[column] for column in COLUMNS[:4])
    if text is None:
        raise _missing_column(where, names["prompt"])
    if not isinstance(text, str):
        raise PromptError(f"prompt must be a text, not {shortened(text)}", given=where)
    if targets is None and answer is not None:
        raise PromptError(f"answer must be a text where there are no targets, not {shortened(answer)}", given=where)
    if targets is None:
        raise _missing_column(where, names["targets"])
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise PromptError(f"targets must be a list of texts, not {shortened(targets)}", given=where)
    if answer is not None and answer not in targets:
        raise PromptError(f"answer {shortened(answer)} is not one of the targets {shortened(targets)}", given=where)
    id_ = f"{index:06d}" if id_ is None else _name(where, "id", id_)
    return Prompt(id_, text, tuple(targets), None if answer is None else targets.index(answer))


def _name(where: str, column: str, value: Any) -> str:
    """An id or a group as a text."""
    if isinstance(value, list | dict | bytes) or (isinstance(value, float) and not math.isfinite(value)):
        raise PromptError(f"{column} must be a text or a number, not {shortened(value)}", given=where)
    return str(value)


def _missing_column(where: str, column: str) -> PromptError:
    return PromptError(
        f"has no {column!r}; prompt is needed, and targets or answer; id is optional; "
        "dataset.columns={prompt: NAME} says what a file calls them",
        given=where,
    )

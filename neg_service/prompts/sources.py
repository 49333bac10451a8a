"""Where prompts come from: the built-in facts, tasks of MCEval8K, a file at any fsspec URI, or the hub's data sets.

A row has the columns `prompt` (or `messages`, which a model's chat template makes a text of) and `targets`, and
optionally `answer` (the right target itself) and `id`. A row without `targets` needs an `answer`, which becomes its
first target, after a space; the others are answers of other rows, of those with the same `group` where they are enough.
Every row is checked, and an error names its line or row. How rows are read: `rows.py`.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from neg_service.config import DatasetConfig
from neg_service.errors import PromptError, nearest, shortened
from neg_service.places import file_name_of, refuse_credentials, require_utf8, without_credentials
from neg_service.prompts.chat import USER, MakeChat, in_json, messages_of
from neg_service.prompts.facts import BUILT_IN
from neg_service.prompts.hub import is_data_set
from neg_service.prompts.mceval8k import chosen_splits, chosen_tasks, load_tasks
from neg_service.prompts.prompt import Messages, Prompt, Wording
from neg_service.prompts.rows import Rows, columns_of, missing_column, opened_rows
from neg_service.prompts.spans import at_of
from neg_service.prompts.store import PromptFile
from neg_service.prompts.wanted import wanted_of
from neg_service.prompts.wordings import wordings_of


def load_dataset(dataset: DatasetConfig, limit: int | None = None, chat: MakeChat | None = None) -> Sequence[Prompt]:
    """All prompts of a data set, or its first `limit`, or those with the ids that it names.

    Those of a file stay on disk: see `PromptFile`. `chat` is asked for a model's chat template if any prompt needs it.

    Raises:
        PromptError: see `load_prompts` and `load_tasks`, or an id that there is not.
        ModelError: see `chat_of`.
    """
    require_source(dataset.source)
    most = None if dataset.ids is not None else limit
    prompts: Sequence[Prompt]
    if dataset.task is not None:
        prompts = _in_chat(load_tasks(dataset), dataset, chat)
    elif dataset.source in BUILT_IN:
        prompts = _in_chat(BUILT_IN[dataset.source](), dataset, chat)
    else:
        prompts = PromptFile(read_prompts(dataset.source, most, dataset, chat))
    _require_use(dataset, prompts)
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


def _in_chat(prompts: list[Prompt], dataset: DatasetConfig, chat: MakeChat | None) -> list[Prompt]:
    """Plain prompts, each as one message where that was asked for."""
    if not dataset.chat:
        return prompts
    own = (chat or _no_chat)()
    return [own.as_one_message(prompt) for prompt in prompts]


def _no_chat() -> Any:
    raise PromptError(
        "messages become a text by the chat template of a model, which is not given here", change="dataset.source"
    )


def _require_use(dataset: DatasetConfig, prompts: Sequence[Prompt]) -> None:
    """Refuse a template that nothing is put into."""
    given = next((key for key in ("chat_template", "chat_arguments") if getattr(dataset, key) is not None), None)
    if given is not None and prompts and prompts[0].messages is None:
        raise PromptError(
            "is given, but the prompts are no messages: dataset.chat=true makes one message of each",
            setting=f"dataset.{given}",
        )


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
        name = re.sub(r"\.[a-z]+$", "", file_name_of(dataset.source))
        return f"{name}-{dataset.split}" if dataset.split is not None and is_data_set(dataset.source) else name
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


def read_prompts(
    source: str, limit: int | None = None, how: DatasetConfig | None = None, chat: MakeChat | None = None
) -> Iterator[Prompt]:
    """The prompts of a file or a data set of the hub, one after the other; see `load_prompts`.

    All rows are checked, also beyond `limit`.
    """
    refuse_credentials("dataset.source", source, PromptError)
    require_utf8("dataset.source", source, PromptError)
    shown = without_credentials(source)
    how = how or DatasetConfig(source)
    names = columns_of(how.columns)
    if how.choices < 2:
        raise PromptError(
            setting="dataset.choices", value=how.choices, allowed="at least 2, the answer and another one"
        )
    where, named = f"dataset.source={shown}", {column: name for column, name in (how.columns or {}).items() if name}

    with opened_rows(source, shown, how) as (rows_of, first, again):

        def rows(opened: Any) -> Rows:
            for place, row in rows_of(where, opened, names, named):
                yield f"{where}: {place}", {column: row.get(name) if name else None for column, name in names.items()}

        yield from _prompts(rows(first), partial(rows, again), limit, how, names, chat or _no_chat)


def _prompts(
    rows: Rows,
    again: Callable[[], Rows],
    limit: int | None,
    how: DatasetConfig,
    names: Mapping[str, str],
    chat: MakeChat,
) -> Iterator[Prompt]:
    """What rows say; `again` reads them all once more, where some have no targets."""
    others: _Answers | None = None
    wrong: PromptError | None = None
    is_chat: bool | None = None
    for index, (place, row) in enumerate(rows):
        # What is wrong with the file itself says more than what is wrong with a row of it.
        if wrong is not None or (limit is not None and index >= limit):
            continue
        try:
            _read_targets(place, row, how)
            asked = _asked(place, index, row, names, how, chat)
            if is_chat is None:
                is_chat = asked.messages is not None
            elif is_chat != (asked.messages is not None):
                raise PromptError(
                    f"prompt {asked.id!r}: has {'no messages, but a prompt' if is_chat else 'messages'}, unlike the "
                    "rows before: dataset.chat=true makes one message of each prompt",
                    given=place,
                )
            if _has_answer_alone(row):
                others = others or _Answers(again(), how)
                others.give_targets(row, asked, others.group_of(place, row))
            prompt = _prompt(place, asked, row, names)
        except PromptError as problem:
            wrong = problem
            continue
        yield prompt
    if wrong is not None:
        raise wrong


def _has_answer_alone(row: Mapping[str, Any]) -> bool:
    """Whether a row has an answer, and its targets are to be found."""
    return row["targets"] is None and isinstance(row["answer"], str) and bool(row["answer"].strip())


def _read_targets(place: str, row: dict[str, Any], how: DatasetConfig) -> None:
    """Bring a row's targets and its answer to the form that rows have: texts that follow the prompt, and one of them.

    What is no list of texts stays as it is, and is refused later.
    """
    targets, answer = row["targets"], row["answer"]
    if how.answer_is == "index" and targets is None:
        # Its number would be taken for an answer whose targets are to be found.
        raise PromptError("there are no targets, of which answer is the index (dataset.answer_is=index)", given=place)
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

    def __init__(self, rows: Rows, how: DatasetConfig) -> None:
        """Of all rows."""
        self._how = how
        of_group: dict[str, set[str]] = {}
        for place, row in rows:
            if _has_answer_alone(row):
                of_group.setdefault(self.group_of(place, row), set()).add(row["answer"].lstrip())
        self._pools = {group: sorted(answers) for group, answers in of_group.items()}
        self._everywhere = sorted(set().union(*of_group.values()))

    def group_of(self, place: str, row: Mapping[str, Any]) -> str:
        """The group that a row's other answers come from."""
        group = "" if row["group"] is None else _name(place, "group", row["group"])
        return group.split(self._how.group_until)[0] if self._how.group_until else group

    def give_targets(self, row: dict[str, Any], asked: _Asked, group: str) -> None:
        """The answer and others, in an order that is drawn."""
        choices = self._how.choices
        # Of the row alone, so that neither the order of rows nor their number decides what is drawn from a group, nor
        # the chat template. Lone surrogates are refused later, with the prompt's id.
        says = row["prompt"] if row["prompt"] is not None else in_json(asked.messages or ())
        own = f"{self._how.seed}\0{says}\0{row['answer']}".encode(errors="surrogatepass")
        digest = hashlib.sha256(own).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        texts = [row["answer"].lstrip()]
        for pool in (self._pools[group], self._everywhere):
            # Of a large pool so many are drawn that enough of them differ.
            is_small = len(pool) <= 16 * choices
            places = draw.permutation(len(pool)) if is_small else draw.integers(len(pool), size=16 * choices)
            for text in (pool[index] for index in places):
                if len(texts) == choices:
                    break
                if text not in texts:
                    texts.append(text)
        space = "" if asked.text[-1:].isspace() else self._how.answer_prefix
        texts = [space + text for text in texts]
        row["answer"] = texts[0]
        # The right one's place says nothing.
        row["targets"] = [texts[index] for index in draw.permutation(len(texts))]


class _Asked(NamedTuple):
    """What a row asks, without its targets."""

    id: str
    text: str
    messages: Messages | None = None
    wordings: tuple[Wording, ...] | None = None


def _asked(
    where: str, index: int, row: Mapping[str, Any], names: Mapping[str, str], how: DatasetConfig, chat: MakeChat
) -> _Asked:
    """The text of a row: its prompt, or what the chat template makes of its messages."""
    text, messages = row["prompt"], row["messages"]
    if text is None and messages is None:
        raise missing_column(where, names["prompt"] or names["messages"])
    if text is not None and messages is None and not isinstance(text, str):
        raise PromptError(f"prompt must be a text, not {shortened(text)}", given=where)
    who = f"{index:06d}" if row["id"] is None else _name(where, "id", row["id"])
    if messages is None and not (how.chat and text):
        return _Asked(who, text, None, wordings_of(who, where, row["wordings"], (text, None), how.chat, chat))
    if text is not None and messages is not None:
        raise PromptError(
            f"prompt {who!r}: has a prompt and messages, of which a row has one; dataset.columns={{prompt: ''}} leaves "
            "the column of prompts out",
            given=where,
        )
    conversation = ((USER, text),) if messages is None else messages_of(who, messages, where)
    own = (chat().text(who, conversation), conversation)
    return _Asked(who, *own, wordings_of(who, where, row["wordings"], own, how.chat, chat))


def _prompt(where: str, asked: _Asked, row: Mapping[str, Any], names: Mapping[str, str]) -> Prompt:
    targets, answer = row["targets"], row["answer"]
    if targets is None and answer is not None:
        raise PromptError(f"answer must be a text where there are no targets, not {shortened(answer)}", given=where)
    if targets is None:
        raise missing_column(where, names["targets"])
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise PromptError(f"targets must be a list of texts, not {shortened(targets)}", given=where)
    if answer is not None and answer not in targets:
        raise PromptError(f"answer {shortened(answer)} is not one of the targets {shortened(targets)}", given=where)
    place = None if answer is None else targets.index(answer)
    return Prompt(asked.id, asked.text, tuple(targets), place, asked.messages, at_of(asked.id, row["at"]),
                  wanted_of(asked.id, row["wanted"]), asked.wordings)  # fmt: skip


def _name(where: str, column: str, value: Any) -> str:
    """An id or a group as a text."""
    if isinstance(value, list | dict | bytes) or (isinstance(value, float) and not math.isfinite(value)):
        raise PromptError(f"{column} must be a text or a number, not {shortened(value)}", given=where)
    return str(value)

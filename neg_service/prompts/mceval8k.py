"""MCEval8K as prompts: which rows are used for what, and what stands around them.

A prompt is an instruction, demonstrations (rows with their right labels), a question and a cue. Rows are published in
the order of their labels, so they are always drawn with a seed. Demonstrations come from the train split, or where
there is none from the first split that there is; they are the same for all rows of a language, so that prompts share
their beginning, which a scan runs once.

The published splits overlap: many questions of train are in valid and test too, and of some tasks valid *is* test. Here
a question belongs to the last split that has it, in the order train, valid, test, and is left out of the others. Where
nothing is left of valid, a seventh of what is left of train is held out in its place.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from neg_service.config import DatasetConfig
from neg_service.contents import json_of
from neg_service.errors import PromptError, nearest, one_line, shortened
from neg_service.inputs import read_if_there
from neg_service.places import absolute, below, is_chain, split_scheme, without_credentials
from neg_service.prompts.prompt import MASK, Prompt
from neg_service.prompts.tasks import LANGUAGES, TASKS, Example, Row, Task
from neg_service.prompts.templates import PromptTemplate, templates_of

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
BALANCED = ("down", "up")
# Of train, where valid has no question of its own: as valid is to train in size.
_HELD_OUT = 7


def load_tasks(config: DatasetConfig) -> list[Prompt]:
    """The prompts of the tasks and splits that `config` names, task after task; ids are `task/split/row`.

    Raises:
        ConfigurationError: an unknown task, template or split, with the nearest names; a file or field that is missing
            or wrong, with its row; more demonstrations asked for than there are rows.
    """
    return [
        prompt
        for name in chosen_tasks(config.task)
        for prompt in _Loader(TASKS[name], config).prompts(chosen_splits(config.split))
    ]


def chosen_tasks(task: Any) -> list[str]:
    """The names of the tasks of `dataset.task`: `all`, one, or a list."""
    names = list(TASKS) if task == "all" else _as_list(task)
    if not names or len(set(names)) < len(names):
        raise PromptError("give at least one task, and each once", setting="dataset.task", value=task)
    for name in names:
        _require_known("dataset.task", str(name), TASKS)
    return names


def chosen_splits(split: Any) -> list[str]:
    """The splits of `dataset.split`: one, or a list; valid where none is given."""
    names = ["valid"] if split is None else _as_list(split)
    if not names or len(set(names)) < len(names):
        raise PromptError("give at least one split, and each once", setting="dataset.split", value=split)
    for name in names:
        _require_known("dataset.split", str(name), SPLITS)
    return names


def as_masked(prompt: Prompt) -> Prompt:
    """The same question for a masked model: a mask after the cue, which labels take the place of."""
    labels = tuple(target.strip() for target in prompt.targets)
    return Prompt(prompt.id, f"{prompt.text} {MASK}.", labels, prompt.answer)


class _Loader:
    """Loads one task as a configuration asks for it."""

    def __init__(self, task: Task, config: DatasetConfig) -> None:
        if config.balanced is not None:
            _require_known("dataset.balanced", config.balanced, BALANCED)
        for language in _as_list(config.languages):
            _require_known("dataset.languages", str(language), LANGUAGES)
        for key, value, least in (("shots", config.shots, 0), ("limit", config.limit, 1)):
            if value is not None and value < least:
                raise PromptError(setting=f"dataset.{key}", value=value, allowed=f"at least {least}")
        self._task, self._config = task, config
        self._templates = templates_of(task, config.templates)
        _require_known("dataset.template", config.template, self._templates, f" of {task.name}")
        self._examples = {split: own for split in SPLITS if (own := self._published(split)) is not None}
        self._order = {split: self._shuffled(split) for split in self._examples}
        self._own = self._without_overlap()

    def prompts(self, splits: Iterable[str]) -> list[Prompt]:
        """All splits' prompts."""
        return [prompt for split in splits for prompt in self._split(split)]

    def _split(self, split: str) -> list[Prompt]:
        if split not in self._own:
            shown = without_credentials(self._config.source)
            raise PromptError(
                f"{self._task.name} has no split {split} ({self._task.path(split)}); "
                + (f"there is {', '.join(self._examples)}" if self._examples else "there is none of its splits"),
                setting="dataset.source",
                value=shown,
            )
        beginnings: dict[str, tuple[str, list[tuple[str, int]]]] = {}
        for source, number in self._own[split]:
            group = self._group(self._examples[source][number])
            if group not in beginnings:
                beginnings[group] = self._demonstrations(group)
        shown_rows = {place for _, own in beginnings.values() for place in own}
        prompts = []
        for (source, number), repeat in self._drawn(split, shown_rows):
            example = self._examples[source][number]
            template = self._template(self._group(example))
            mark = f"+{repeat}" if repeat else ""
            id_ = f"{self._task.name}/{source}/{number:06d}{mark}"
            text = beginnings[self._group(example)][0] + template.render(example)
            prompts.append(Prompt(id_, text, template.labels, example.answer))
        if not prompts:
            raise PromptError(
                f"no row of {self._task.name}, {split}, is left to be asked; check dataset.languages and "
                "dataset.balanced",
                setting="dataset.source",
                value=without_credentials(self._config.source),
            )
        return prompts

    def _drawn(self, split: str, shown_rows: set[tuple[str, int]]) -> list[tuple[tuple[str, int], int]]:
        """Rows in the order in which they are used, each with how often it was used before."""
        config, wanted = self._config, _as_list(self._config.languages)
        # The same order whatever the template and the demonstrations, so that studies compare the same rows.
        free = [
            (source, i)
            for source, i in self._own[split]
            if (source, i) not in shown_rows and (not wanted or self._examples[source][i].language in wanted)
        ]
        if config.limit is not None and config.limit > len(free) and config.balanced is None:
            _say(f"{self._task.name}: {config.limit} rows of {split} were asked for, there are {len(free)}")
        if config.balanced is None:
            return [(place, 0) for place in free[: config.limit]]
        by_label: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for source, i in free:
            by_label[self._examples[source][i].answer].append((source, i))
        sizes = [len(own) for own in by_label.values()]
        each = min(sizes, default=0) if config.balanced == "down" else max(sizes, default=0)
        # Label after label, so that the first rows are balanced too.
        rounds = [(own[turn % len(own)], turn // len(own)) for turn in range(each) for own in by_label.values()]
        return rounds[: config.limit]

    def _demonstrations(self, group: str) -> tuple[str, list[tuple[str, int]]]:
        """What every prompt of a group begins with, and the rows shown there."""
        template, shots = self._template(group), self._config.shots
        if not shots:
            return f"{template.instruction}\n\n", []
        split = next((split for split, rows in self._own.items() if rows), next(iter(self._own)))
        draw = random.Random(f"{self._config.demonstration_seed}/{self._task.name}/{group}")
        # In the order of the rows, so that the seed of demonstrations alone decides.
        rows = sorted(place for place in self._own[split])
        chosen: list[tuple[str, int]] = []
        for label in range(self._task.n_labels):
            own = []
            for source, i in rows:
                example = self._examples[source][i]
                if example.answer == label and self._group(example) == group:
                    own.append((source, i))
            if len(own) < shots:
                of = f" in {group}" if self._task.is_multilingual else ""
                raise PromptError(
                    f"{self._task.name} has {len(own)} rows for label {template.labels[label]!r}{of} in its "
                    f"{split} split; use at most {len(own)}",
                    setting="dataset.shots",
                    value=shots,
                )
            chosen += draw.sample(own, shots)
        draw.shuffle(chosen)
        examples = [self._examples[source][i] for source, i in chosen]
        shown = [template.render(example) + template.labels[example.answer] for example in examples]
        return "\n\n".join([template.instruction, *shown, ""]), chosen

    def _without_overlap(self) -> dict[str, list[tuple[str, int]]]:
        """Of each split its own rows, shuffled, as (published split, number)."""
        own: dict[str, list[tuple[str, int]]] = {}
        seen: set[str] = set()
        for split in reversed(self._examples):
            questions = [example.question for example in self._examples[split]]
            own[split] = [(split, i) for i in self._order[split] if questions[i] not in seen]
            if left_out := len(questions) - len(own[split]):
                left = f"{left_out} of {len(questions)} rows of {split} are in a later split too, and left out"
                _say(f"{self._task.name}: {left}")
            seen.update(questions)
        if "valid" in own and not own["valid"] and own.get("train"):
            held_out = len(own["train"]) // _HELD_OUT
            own["valid"], own["train"] = own["train"][:held_out], own["train"][held_out:]
            _say(f"{self._task.name}: {held_out} rows of train are held out as valid")
        return {split: own[split] for split in SPLITS if split in own}

    def _shuffled(self, split: str) -> list[int]:
        order = list(range(len(self._examples[split])))
        random.Random(f"{self._config.seed}/{self._task.name}/{split}").shuffle(order)
        return order

    def _group(self, example: Example) -> str:
        """Rows of one language share their beginning; where the language is asked for, all rows do."""
        return "en" if self._task.language_is_label else example.language

    def _template(self, group: str) -> PromptTemplate:
        """The words around the rows of a group, in their language or in the one that was asked for."""
        language = group if self._config.language == "auto" else self._config.language
        own = self._templates[self._config.template]
        _require_known("dataset.language", language, own, f" of {self._task.name}, template {self._config.template}")
        return own[language]

    def _published(self, split: str) -> list[Example] | None:
        """The examples of a split, or None where there is none."""
        content = _read(self._config.source, self._task.path(split))
        if content is None:
            return None
        where = f"dataset.source={without_credentials(self._config.source)}: {self._task.path(split)}"
        return [self._task.read(Row(f"{where}: row {i}", row)) for i, row in enumerate(_parsed(where, content))]


@cache
def _say(message: str) -> None:
    """Once, however often a split is loaded."""
    log.info("%s", message)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _read(source: str, path: str) -> bytes | None:
    """A published file from a directory, a URI, or the hub; None if it is not there."""
    is_elsewhere = is_chain(source) or split_scheme(source)[0] or source.lower().startswith("file:")
    if is_elsewhere or Path(absolute(source)).is_dir():
        return read_if_there("dataset.source", below(source, path), PromptError)
    if source.startswith(("/", ".", "~")) or source.count("/") != 1:
        raise PromptError("no such directory", setting="dataset.source", value=source)
    # Each retry would be announced over two lines, twice; what came of it is told below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return Path(hf_hub_download(source, path, repo_type="dataset")).read_bytes()
    except LocalEntryNotFoundError as error:
        raise _hub_error(source, path, error) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _hub_error(source, path, error) from error


def _hub_error(source: str, path: str, error: Exception) -> PromptError:
    return PromptError(
        f"no such directory here, and the hub gave no {path}: {one_line(error).rstrip('.')}; check the network, "
        "or give a directory with the layout of MCEval8K",
        setting="dataset.source",
        value=source,
    )


def _parsed(where: str, content: bytes) -> list[dict[str, Any]]:
    rows = json_of(where, content, PromptError)
    if not isinstance(rows, list):
        raise PromptError(given=where, allowed="a list of rows")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise PromptError(f"row {number} must be an object with fields, not {shortened(row)}", given=where)
    return rows


def _require_known(key: str, name: str, known: Iterable[str], of: str = "") -> None:
    known = list(known)
    if name not in known:
        raise PromptError(
            f"is unknown; {nearest(name, known)}known{of} are {', '.join(known)}", setting=key, value=name
        )

"""MCEval8K: 22 multiple-choice tasks as prompts whose labels are single tokens.

A prompt is an instruction, demonstrations (rows with their right labels), a question and a cue. The words are ours and
lie in `wordings/<task>.toml`, several wordings a task where robustness is studied, and one for each language of the
multilingual tasks; a file of the same form elsewhere may be named instead. What a published row means is said here, a
function a task: the right label is an index, a truth value, a number of stars, a language or one of three fields.

Rows are published in the order of their labels, so they are always drawn with a seed. Demonstrations come from the
train split, or where there is none from the first split that there is, and are never among the evaluated rows. They
are the same for all rows of a language: prompts share their beginning, which a scan runs once.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053); the data set
iszhaoxin/MCEval8K on the Hugging Face hub.
"""

from __future__ import annotations

import difflib
import html
import json
import random
import string
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from neg_service.config import DatasetConfig
from neg_service.errors import PromptError, one_line
from neg_service.inputs import exists, read_input, without_credentials
from neg_service.prompts.prompt import MASK, Prompt

SPLITS = ("train", "valid", "test")
LANGUAGES = ("en", "de", "es", "fr", "zh")
GENRES = ("linguistic", "classification", "fact", "nli", "self-reflection", "multilingual")
BALANCED = ("down", "up")
_LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Row:
    """A published row, whose fields are checked as they are read; `where` names its file and number."""

    where: str
    values: Mapping[str, Any]

    def text(self, field: str) -> str:
        """A text, without markup, on one line."""
        return _clean(self.raw_text(field))

    def raw_text(self, field: str) -> str:
        """A text as it is published."""
        text: str = self._of(field, str, "a text")
        return text

    def texts(self, field: str, count: int | None = None) -> list[str]:
        """A list of texts, `count` of them if given."""
        found = self._of(field, list, "a list of texts")
        if not all(isinstance(one, str) for one in found) or count not in (None, len(found)):
            raise PromptError(f"{self.where}: {field} must be a list of {count or ''} texts, not {found!r}")
        return [_clean(one) for one in found]

    def index(self, field: str, count: int, first: int = 0) -> int:
        """A whole number (also as 3.0) from `first` on, as an index from 0 below `count`."""
        value = self._of(field, (int, float), "a whole number")
        if value != int(value) or not first <= value < first + count:
            raise PromptError(f"{self.where}: {field} must be from {first} to {first + count - 1}, not {value!r}")
        return int(value) - first

    def language(self) -> str:
        """The code of its language."""
        code = self.text("lang")
        if code not in LANGUAGES:
            raise PromptError(f"{self.where}: lang must be one of {', '.join(LANGUAGES)}, not {code!r}")
        return code

    def _of(self, field: str, kind: Any, wanted: str) -> Any:
        if field not in self.values:
            raise PromptError(f"{self.where} has no field {field!r}; it has {', '.join(map(repr, self.values))}")
        value = self.values[field]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is str):
            raise PromptError(f"{self.where}: {field} must be {wanted}, not {value!r}")
        return value


@dataclass(frozen=True)
class Example:
    """What a row says: the fields that a wording may use, the index of the right label, and the language."""

    fields: dict[str, str]
    answer: int
    language: str = "en"


@dataclass(frozen=True)
class Task:
    """A task: where it is published, its number of labels, and what a row of it means."""

    name: str
    genre: str
    n_labels: int
    read: Callable[[Row], Example]
    folder: str = ""
    # Whether rows are of several languages, and whether the language is what is asked for.
    is_multilingual: bool = False
    language_is_label: bool = False

    def path(self, split: str) -> str:
        """The published file of a split."""
        return f"{self.genre}/{self.folder or self.name}/{split}.json"


@dataclass(frozen=True)
class Wording:
    """How a task is put into words; `labels` follow the question verbatim."""

    instruction: str
    question: str
    labels: tuple[str, ...]

    def ask(self, example: Example) -> str:
        """The question of an example."""
        return self.question.format_map(example.fields)


def _lettered(options: Sequence[str]) -> dict[str, str]:
    return {"options": "\n".join(f"{_LETTERS[i]}. {option}" for i, option in enumerate(options))}


def _of_text(field: str, label: str, n_labels: int, first: int = 0) -> Callable[[Row], Example]:
    return lambda row: Example({"text": row.text(field)}, row.index(label, n_labels, first))


def _of_options(n_labels: int) -> Callable[[Row], Example]:
    def read(row: Row) -> Example:
        fields = {"text": row.text("text"), **_lettered(row.texts("options", n_labels))}
        return Example(fields, row.index("label", n_labels))

    return read


def _pair_of_sentences(row: Row) -> Example:
    return Example({"first": row.text("sentence1"), "second": row.text("sentence2")}, row.index("label", 2))


def _inference(row: Row) -> Example:
    return Example({name: row.text(name) for name in ("premise", "hypothesis")}, row.index("label", 3))


def _of_target(row: Row) -> Example:
    target = " ".join(row.texts("target_chunk")) if "target_chunk" in row.values else row.text("target_token")
    asked = _of_options(4)(row)
    return Example({**asked.fields, "target": target}, asked.answer)


def _of_language(read: Callable[[Row], Example]) -> Callable[[Row], Example]:
    def with_language(row: Row) -> Example:
        found = read(row)
        return Example(found.fields, found.answer, row.language())

    return with_language


def _clang8(row: Row) -> Example:
    names = ("sentence1", "sentence2")
    empty = next((name for name in names if row.values.get(name, "") is None), None)
    if empty is None:
        first, second = (row.text(name) for name in names)
    else:
        # Of some rows both sentences are in one field, with a tab between them.
        other = next(name for name in names if name != empty)
        both = row.raw_text(other).split("\t")
        if len(both) != 2:
            raise PromptError(f"{row.where}: {empty} is empty, and {other} is not two sentences: {both!r}")
        first, second = map(_clean, both)
    return Example({"first": first, "second": second}, row.index("acceptable", 2))


def _halueval(row: Row) -> Example:
    fields = {name: row.text(name) for name in ("knowledge", "dialogue", "response")}
    return Example(fields, row.index("hallucination", 2))


def _stereoset(row: Row) -> Example:
    # Three fields give the index of a sentence each; the task is to find the stereotype.
    places = [row.index(field, 3) for field in ("stereotype", "anti-stereotype", "non-stereotype")]
    if sorted(places) != [0, 1, 2]:
        raise PromptError(f"{row.where}: its three kinds of sentence must be 0, 1 and 2 in some order, not {places}")
    return Example({"context": row.text("context"), **_lettered(row.texts("sentences", 3))}, places[0])


def _lti(row: Row) -> Example:
    return Example({"text": row.text("text")}, LANGUAGES.index(row.language()), row.language())


TASKS = {
    task.name: task
    for task in (
        Task("clang8", "linguistic", 2, _clang8),
        Task("postag", "linguistic", 4, _of_target),
        Task("chunking", "linguistic", 4, _of_target),
        Task("ner", "linguistic", 4, _of_target),
        Task("agnews", "classification", 4, _of_text("text", "label", 4)),
        Task("amazon-reviews", "classification", 5, _of_text("text", "label", 5, first=1)),
        Task("imdb", "classification", 2, _of_text("text", "label", 2)),
        Task("myriadlama", "fact", 4, _of_options(4)),
        Task("fever", "fact", 2, _of_text("claim", "label", 2)),
        Task("commonsenseqa", "fact", 5, _of_options(5), folder="commensenseqa"),
        Task("templama", "fact", 4, _of_options(4)),
        Task("paws", "nli", 2, _pair_of_sentences),
        Task("mnli", "nli", 3, _inference),
        Task("swag", "nli", 4, _of_options(4)),
        Task("halueval", "self-reflection", 2, _halueval),
        Task("toxicity", "self-reflection", 2, _of_text("text", "toxic", 2)),
        Task("stereoset", "self-reflection", 3, _stereoset),
        Task("lti", "multilingual", 5, _lti, is_multilingual=True, language_is_label=True),
        Task("mlama", "multilingual", 4, _of_language(_of_options(4)), is_multilingual=True),
        Task(
            "amazon-review-multi", "multilingual", 5, _of_language(_of_text("review", "label", 5, first=1)),
            is_multilingual=True,
        ),
        Task("xnli", "multilingual", 3, _of_language(_inference), is_multilingual=True),
        Task("mpostag", "multilingual", 4, _of_language(_of_target), is_multilingual=True),
    )
}  # fmt: skip


def load_tasks(config: DatasetConfig) -> list[Prompt]:
    """The prompts of the tasks and splits that `config` names, task after task; ids are `task/split/row`.

    Raises:
        ConfigurationError: an unknown task, wording or split, with the nearest names; a file or field that is missing
            or wrong, with its row; more demonstrations asked for than there are rows.
    """
    return [
        prompt
        for name in chosen_tasks(config.task)
        for prompt in _Loader(TASKS[name], config).prompts(chosen_splits(config.split))
    ]


def chosen_tasks(task: Any) -> list[str]:
    """The names of the tasks of `dataset.task`: `all`, one, or a list."""
    names = list(TASKS) if task == "all" else [task] if isinstance(task, str) else list(task)
    if not names or len(set(names)) < len(names):
        raise PromptError(f"dataset.task={task}: give at least one task, and each once")
    for name in names:
        _require_known("dataset.task", str(name), TASKS)
    return names


def chosen_splits(split: Any) -> list[str]:
    """The splits of `dataset.split`: one, or a list."""
    names = [split] if isinstance(split, str) else list(split)
    if not names or len(set(names)) < len(names):
        raise PromptError(f"dataset.split={split}: give at least one split, and each once")
    for name in names:
        _require_known("dataset.split", str(name), SPLITS)
    return names


def task_of(prompt_id: str) -> str:
    """The task that a prompt is of, or an empty text where it is of none."""
    return prompt_id.split("/", 1)[0] if prompt_id.count("/") == 2 else ""


def split_of(prompt_id: str) -> str:
    """The split that a task's prompt is of."""
    return prompt_id.split("/")[1]


def as_masked(prompt: Prompt) -> Prompt:
    """The same question for a masked model: a mask after the cue, which labels take the place of."""
    labels = tuple(target.strip() for target in prompt.targets)
    return Prompt(prompt.id, f"{prompt.text} {MASK}.", labels, prompt.answer)


class _Loader:
    """Loads one task as a configuration asks for it."""

    def __init__(self, task: Task, config: DatasetConfig) -> None:
        if config.balanced is not None:
            _require_known("dataset.balanced", config.balanced, BALANCED)
        for key, value, least in (("shots", config.shots, 0), ("limit", config.limit, 1)):
            if value is not None and value < least:
                raise PromptError(f"dataset.{key}={value}: must be at least {least}")
        self._task, self._config = task, config
        self._wordings = wordings_of(task, config.wordings)
        _require_known("dataset.wording", config.wording, self._wordings, f" of {task.name}")
        self._cache: dict[str, list[Example]] = {}

    def prompts(self, splits: Iterable[str]) -> list[Prompt]:
        """All splits' prompts."""
        return [prompt for split in splits for prompt in self._split(split)]

    def _split(self, split: str) -> list[Prompt]:
        examples = self._rows(split)
        if examples is None:
            there = [other for other in SPLITS if self._rows(other) is not None]
            shown = without_credentials(self._config.source)
            raise PromptError(
                f"dataset.source={shown}: {self._task.name} has no split {split} ({self._task.path(split)}); "
                + (f"there is {', '.join(there)}" if there else "there is none of its splits")
            )
        demonstrations_of: dict[str, tuple[str, set[tuple[str, int]]]] = {}
        for language in sorted({self._language(example) for example in examples}):
            demonstrations_of[language] = self._demonstrations(language)
        used = {place for _, own in demonstrations_of.values() for place in own}
        prompts = []
        for number, repeat in self._drawn(split, examples, used):
            example = examples[number]
            language = self._language(example)
            wording = self._wording(language)
            text = demonstrations_of[language][0] + wording.ask(example)
            mark = f"+{repeat}" if repeat else ""
            id_ = f"{self._task.name}/{split}/{number:06d}{mark}"
            prompts.append(Prompt(id_, text, wording.labels, example.answer))
        return prompts

    def _drawn(self, split: str, examples: Sequence[Example], used: set[tuple[str, int]]) -> list[tuple[int, int]]:
        """Rows in the order in which they are used, each with how often it was used before."""
        config = self._config
        wanted = config.languages
        free = [
            i
            for i, example in enumerate(examples)
            if (split, i) not in used and (wanted is None or example.language in wanted)
        ]
        # The same order whatever the wording and the demonstrations, so that studies compare the same rows.
        random.Random(f"{config.seed}/{self._task.name}/{split}").shuffle(free)
        if config.balanced is None:
            return [(i, 0) for i in free[: config.limit]]
        by_label: dict[int, list[int]] = defaultdict(list)
        for i in free:
            by_label[examples[i].answer].append(i)
        sizes = [len(own) for own in by_label.values()]
        each = min(sizes) if config.balanced == "down" else max(sizes)
        # Label after label, so that the first rows are balanced too.
        rounds = [(own[turn % len(own)], turn // len(own)) for turn in range(each) for own in by_label.values()]
        return rounds[: config.limit]

    def _demonstrations(self, language: str) -> tuple[str, set[tuple[str, int]]]:
        """What every prompt of a language begins with, and the rows used for it."""
        wording, shots = self._wording(language), self._config.shots
        if not shots:
            return f"{wording.instruction}\n\n", set()
        split = next(split for split in SPLITS if self._rows(split) is not None)
        examples = self._rows(split) or []
        draw = random.Random(f"{self._config.demonstration_seed}/{self._task.name}/{language}")
        chosen: list[int] = []
        for label in range(self._task.n_labels):
            own = [i for i, one in enumerate(examples) if one.answer == label and self._language(one) == language]
            if len(own) < shots:
                of = f" in {language}" if self._task.is_multilingual else ""
                raise PromptError(
                    f"dataset.shots={shots}: {self._task.name} has {len(own)} rows for label {wording.labels[label]!r}"
                    f"{of} in its {split} split; use at most {len(own)}"
                )
            chosen += draw.sample(own, shots)
        draw.shuffle(chosen)
        shown = [wording.ask(examples[i]) + wording.labels[examples[i].answer] for i in chosen]
        return "\n\n".join([wording.instruction, *shown, ""]), {(split, i) for i in chosen}

    def _language(self, example: Example) -> str:
        """In which language an example is put into words."""
        if self._config.language != "auto":
            return self._config.language
        return "en" if self._task.language_is_label else example.language

    def _wording(self, language: str) -> Wording:
        own = self._wordings[self._config.wording]
        _require_known("dataset.language", language, own, f" of {self._task.name}, wording {self._config.wording}")
        return own[language]

    def _rows(self, split: str) -> list[Example] | None:
        """The examples of a split, or None where there is none."""
        if split not in self._cache:
            content = _read(self._config.source, self._task.path(split))
            if content is None:
                return None
            where = f"dataset.source={without_credentials(self._config.source)}: {self._task.path(split)}"
            self._cache[split] = [
                self._task.read(Row(f"{where}: row {number}", row))
                for number, row in enumerate(_parsed(where, content))
            ]
        return self._cache[split]


def wordings_of(task: Task, place: str | None = None) -> dict[str, dict[str, Wording]]:
    """The wordings of a task by name and language: ours, or those of the .toml file at `place`.

    Raises:
        PromptError: a file that cannot be read, or a wording that is not whole or uses a field that there is not.
    """
    if place is None:
        return _own_wordings(task)
    return _wordings(task, place, read_input("dataset.wordings", place, PromptError))


@cache
def _own_wordings(task: Task) -> dict[str, dict[str, Wording]]:
    file = resources.files(__package__) / "wordings" / f"{task.name}.toml"
    return _wordings(task, file.name, file.read_bytes())


def _wordings(task: Task, where: str, content: bytes) -> dict[str, dict[str, Wording]]:
    try:
        read = tomllib.loads(content.decode())
    except ValueError as error:
        raise PromptError(f"dataset.wordings={where}: is not TOML: {one_line(error)}") from error
    found: dict[str, dict[str, Wording]] = {}
    for name, by_language in read.items():
        for language, own in by_language.items():
            place = f"dataset.wordings={where}: [{name}.{language}]"
            if not isinstance(own, dict) or set(own) != {"instruction", "question", "labels"}:
                raise PromptError(f"{place} must have instruction, question and labels")
            if len(own["labels"]) != task.n_labels:
                raise PromptError(
                    f"{place} has {len(own['labels'])} labels; {task.name} needs {task.n_labels}, in the order of its "
                    f"answers"
                )
            found.setdefault(name, {})[language] = Wording(own["instruction"], own["question"], tuple(own["labels"]))
            _require_fields(place, task, found[name][language])
    return found


def _require_fields(place: str, task: Task, wording: Wording) -> None:
    known = _fields_of(task)
    try:
        used = {name for _, name, _, _ in string.Formatter().parse(wording.question) if name is not None}
    except ValueError as error:
        raise PromptError(f"{place}: question: {one_line(error)}") from error
    if not used or used - known:
        raise PromptError(
            f"{place}: question uses {', '.join(sorted(used)) or 'no field'}; the fields are {', '.join(sorted(known))}"
        )


def _fields_of(task: Task) -> set[str]:
    """What a wording of the task may use, from a row made up for the purpose."""
    n = task.n_labels
    row = {
        "text": "-", "claim": "-", "review": "-", "premise": "-", "hypothesis": "-", "context": "-", "knowledge": "-",
        "dialogue": "-", "response": "-", "sentence1": "-", "sentence2": "-", "target_token": "-", "lang": "en",
        "target_chunk": ["-"], "options": ["-"] * n, "sentences": ["-"] * n, "label": 1, "acceptable": 1, "toxic": 1,
        "hallucination": 1, "stereotype": 0, "anti-stereotype": 1, "non-stereotype": 2,
    }  # fmt: skip
    return set(task.read(Row(task.name, row)).fields)


def _read(source: str, path: str) -> bytes | None:
    """A published file from a directory, a URI, or the hub; None if it is not there."""
    if "://" in source or Path(source).is_dir():
        place = f"{source.rstrip('/')}/{path}"
        if not exists("dataset.source", place, PromptError):
            return None
        return read_input("dataset.source", place, PromptError)
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
        f"dataset.source={source}: no such directory here, and the hub gave no {path}: {one_line(error)}: check the "
        f"network, or give a directory with the layout of MCEval8K"
    )


def _parsed(where: str, content: bytes) -> list[dict[str, Any]]:
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise PromptError(f"{where}: is not JSON: {one_line(error)}") from error
    if not isinstance(rows, list):
        raise PromptError(f"{where}: must be a list of rows")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise PromptError(f"{where}: row {number} must be an object with fields, not {row!r}")
    return rows


def _clean(text: str) -> str:
    """Reviews and articles come with remains of HTML and line breaks, which would tear a prompt's form."""
    return " ".join(html.unescape(text).replace("<br />", " ").split())


def _require_known(key: str, name: str, known: Iterable[str], of: str = "") -> None:
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise PromptError(f"{key}={name} is unknown; {hint}known{of} are {', '.join(known)}")

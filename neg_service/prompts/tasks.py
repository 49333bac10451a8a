"""The 22 tasks of MCEval8K: where each is published, and what a row of it means.

The right label of a row is an index, a truth value, a number of stars, a language or one of three fields. Each task
has a function that makes an `Example` of a row: fields that a template may use, and the index of the right label.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053); the data set
iszhaoxin/MCEval8K on the Hugging Face hub.
"""

from __future__ import annotations

import html
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neg_service.errors import PromptError, shortened

LANGUAGES = ("en", "de", "es", "fr", "zh")
GENRES = ("linguistic", "classification", "fact", "nli", "self-reflection", "multilingual")
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
            raise PromptError(
                f"{field} must be a list of {count or ''} texts, not {shortened(found)}", given=self.where
            )
        return [_clean(one) for one in found]

    def index(self, field: str, count: int, first: int = 0) -> int:
        """A whole number (also as 3.0) from `first` on, as an index from 0 below `count`."""
        value = self._of(field, (int, float), "a whole number")
        # A truth value is an index of two; of more it is another field's.
        is_index = (count, first) == (2, 0) or not isinstance(value, bool)
        if not is_index or value not in range(first, first + count):
            raise PromptError(
                f"{field} must be from {first} to {first + count - 1}, not {shortened(value)}", given=self.where
            )
        return int(value) - first

    def language(self) -> str:
        """The code of its language."""
        code = self.text("lang")
        if code not in LANGUAGES:
            raise PromptError(f"lang must be one of {', '.join(LANGUAGES)}, not {shortened(code)}", given=self.where)
        return code

    def _of(self, field: str, kind: Any, wanted: str) -> Any:
        if field not in self.values:
            raise PromptError(f"has no field {field!r}; it has {', '.join(map(repr, self.values))}", given=self.where)
        value = self.values[field]
        if not isinstance(value, kind):
            raise PromptError(f"{field} must be {wanted}, not {shortened(value)}", given=self.where)
        return value


@dataclass(frozen=True)
class Example:
    """What a row says: the fields that a template may use, the index of the right label, and the language."""

    fields: dict[str, str]
    answer: int
    language: str = "en"

    @property
    def question(self) -> str:
        """What tells it from other questions: its fields, options in any order."""
        options = sorted(line.split(". ", 1)[-1] for line in self.fields.get("options", "").splitlines())
        return repr(sorted({**self.fields, "options": options}.items(), key=lambda item: item[0]))


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
            raise PromptError(f"{empty} is empty, and {other} is not two sentences: {shortened(both)}", given=row.where)
        first, second = map(_clean, both)
    return Example({"first": first, "second": second}, row.index("acceptable", 2))


def _halueval(row: Row) -> Example:
    fields = {name: row.text(name) for name in ("knowledge", "dialogue", "response")}
    return Example(fields, row.index("hallucination", 2))


def _stereoset(row: Row) -> Example:
    # Three fields give the index of a sentence each; the right one is the first.
    places = [row.index(field, 3) for field in ("stereotype", "anti-stereotype", "non-stereotype")]
    if sorted(places) != [0, 1, 2]:
        raise PromptError(
            f"its three kinds of sentence must be 0, 1 and 2 in some order, not {places}", given=row.where
        )
    # What is published as `stereotype` mostly goes against one ("Football players are usually weak"); templates ask so.
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


def _clean(text: str) -> str:
    """Reviews and articles come with remains of HTML and of line breaks, which would tear a prompt's form."""
    for broken, meant in (("<br />", " "), (" #39;", "'"), (" quot;", '"'), ("\\", " ")):
        text = text.replace(broken, meant)
    return " ".join(html.unescape(text).split())


def task_of(prompt_id: str) -> str:
    """The task that a prompt is of, or an empty text where it is of none."""
    return prompt_id.split("/", 1)[0] if prompt_id.count("/") == 2 else ""

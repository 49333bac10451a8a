"""Prompt templates of tasks: files `templates_of_tasks/<task>.toml`, or one of a user's own.

A file has a table [NAME.LANGUAGE] for each template and language, with an instruction, a question with fields in
braces, and the labels, which follow the question verbatim.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from neg_service.contents import text_of
from neg_service.errors import PromptError, one_line
from neg_service.inputs import read_if_there, read_input, suffix_of
from neg_service.places import below, without_credentials
from neg_service.prompts.tasks import Example, Row, Task


@dataclass(frozen=True)
class PromptTemplate:
    """How a task is put into words; `labels` follow the question verbatim."""

    instruction: str
    question: str
    labels: tuple[str, ...]

    def render(self, example: Example) -> str:
        """The question of an example."""
        return self.question.format_map(example.fields)


def templates_of(task: Task, place: str | None = None) -> dict[str, dict[str, PromptTemplate]]:
    """The templates of a task by name and language: ours, and those at `place`, which come first where names agree.

    `place` is a .toml file for one task, or a folder of them, TASK.toml.

    Raises:
        PromptError: a file that cannot be read, or a template that is not whole or uses a field that there is not.
    """
    if place is None:
        return _own_templates(task)
    if suffix_of(place) == ".toml":
        content: bytes | None = read_input("dataset.templates", place, PromptError)
    else:
        place = below(place, f"{task.name}.toml")
        content = read_if_there("dataset.templates", place, PromptError)
    if content is None:
        return _own_templates(task)
    return _own_templates(task) | _templates(task, without_credentials(place), content)


@cache
def _own_templates(task: Task) -> dict[str, dict[str, PromptTemplate]]:
    file = resources.files(__package__) / "templates_of_tasks" / f"{task.name}.toml"
    return _templates(task, file.name, file.read_bytes())


def _templates(task: Task, where: str, content: bytes) -> dict[str, dict[str, PromptTemplate]]:
    text = text_of(f"dataset.templates={where}", content, PromptError)
    try:
        read = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"is not TOML: {one_line(error)}", setting="dataset.templates", value=where) from error
    templates: dict[str, dict[str, PromptTemplate]] = {}
    for name, by_language in read.items():
        if not isinstance(by_language, dict):
            raise PromptError(
                f"{name} must be a table for each language, [{name}.en]", setting="dataset.templates", value=where
            )
        for language, own in by_language.items():
            place = f"dataset.templates={where}: [{name}.{language}]"
            if not isinstance(own, dict) or set(own) != {"instruction", "question", "labels"}:
                raise PromptError("must have instruction, question and labels, and nothing else", given=place)
            labels = own["labels"]
            is_list = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
            if not is_list or not all(isinstance(own[key], str) for key in ("instruction", "question")):
                raise PromptError("instruction and question must be texts, labels a list of texts", given=place)
            if len(labels) != task.n_labels:
                raise PromptError(
                    f"has {len(labels)} labels; {task.name} needs {task.n_labels}, in the order of its answers",
                    given=place,
                )
            templates.setdefault(name, {})[language] = PromptTemplate(
                own["instruction"], own["question"], tuple(labels)
            )
            _require_fields(place, task, templates[name][language])
    return templates


def _require_fields(place: str, task: Task, template: PromptTemplate) -> None:
    example = _made_up(task)
    known = ", ".join(sorted(example.fields))
    try:
        question = template.render(example)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise PromptError(f"question: {one_line(error)} is no field; the fields are {known}", given=place) from error
    if question == template.question:
        raise PromptError(f"question uses no field; the fields are {known}", given=place)


def _made_up(task: Task) -> Example:
    """An example of a task from a row made up for the purpose, to try templates on."""
    n = task.n_labels
    row = {
        "text": "-", "claim": "-", "review": "-", "premise": "-", "hypothesis": "-", "context": "-", "knowledge": "-",
        "dialogue": "-", "response": "-", "sentence1": "-", "sentence2": "-", "target_token": "-", "lang": "en",
        "target_chunk": ["-"], "options": ["-"] * n, "sentences": ["-"] * n, "label": 1, "acceptable": 1, "toxic": 1,
        "hallucination": 1, "stereotype": 0, "anti-stereotype": 1, "non-stereotype": 2,
    }  # fmt: skip
    return task.read(Row(task.name, row))

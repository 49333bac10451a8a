"""Errors: how their fields are told, that they survive processes, and by which name a person hears of a setting."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import neg_service
from neg_service.cluster.prepare import prepare
from neg_service.config import ScanConfig, typed
from neg_service.errors import (
    NOT_GIVEN,
    ConfigurationError,
    DoesNotFit,
    ModelError,
    NegServiceError,
    PromptError,
    StorageError,
    told_by_parameters,
)
from tests.refusals import refused
from tests.tiny_models import tiny_model

# --- how they are told


@pytest.mark.parametrize(
    ("reason", "fields", "told"),
    [
        ("it broke", {}, "it broke"),
        ("", {"setting": "a.b", "value": 0, "allowed": "at least 1"}, "a.b=0: must be at least 1"),
        ("or use c", {"setting": "a.b", "value": 0, "allowed": "at least 1"}, "a.b=0: must be at least 1; or use c"),
        ("is unknown", {"setting": "a.b", "value": "x"}, "a.b=x: is unknown"),
        # A value that is nothing is one that was given.
        ("is nothing", {"setting": "a.b", "value": None}, "a.b=None: is nothing"),
        ("is empty", {"setting": "a.b", "value": ""}, "a.b=: is empty"),
        ("has no value", {"setting": "a.b"}, "a.b: has no value"),
        ("", {"setting": "a.b", "value": 1}, "a.b=1"),
        ("", {"allowed": "two texts"}, "must be two texts"),
        # Both in one text, whose value may have = itself.
        ("is empty", {"given": "a.b=x=y: line 3"}, "a.b=x=y: line 3: is empty"),
        ("has no value", {"given": "a.b"}, "a.b: has no value"),
        # A setting that is named behind the words, unless these name it.
        ("prompt 'p' is empty", {"change": "dataset.source"}, "prompt 'p' is empty (dataset.source)"),
        ("choose another model.source", {"change": "model.source"}, "choose another model.source"),
    ],
)
def test_fields_are_told_in_one_line(reason: str, fields: dict[str, Any], told: str) -> None:
    assert str(ConfigurationError(reason, **fields)) == told


def test_what_was_given_in_one_text_is_taken_apart() -> None:
    error = PromptError("is empty", given="dataset.source=a=b.jsonl: line 3")
    assert (error.setting, error.value) == ("dataset.source", "a=b.jsonl: line 3")
    error = PromptError("has no value", given="dataset.source")
    assert (error.setting, error.value) == ("dataset.source", NOT_GIVEN)
    error = PromptError("is empty", change="dataset.source")
    assert (error.setting, error.value) == ("dataset.source", NOT_GIVEN)


# --- between processes


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("never")

    def __str__(self) -> str:
        return "something"


@pytest.mark.parametrize(
    "error",
    [
        DoesNotFit("too large", setting="a.b", value=0, allowed="at least 1"),
        ModelError("no such file", given="model.source=/x"),
        PromptError("prompt 'p' is empty", change="dataset.source"),
        StorageError("is nothing", setting="a.b", value=None),
        NegServiceError("it broke"),
    ],
)
def test_an_error_crosses_processes_with_its_fields_and_notes(error: NegServiceError) -> None:
    error.add_note("on node 3")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    for name in ("reason", "setting", "value", "allowed", "__notes__"):
        assert getattr(arrived, name) == getattr(error, name)
    # As told there, it can be told by another name here.
    assert str(arrived.renamed({"a.b": "study.b"})) == str(error.renamed({"a.b": "study.b"}))


def test_a_value_that_was_not_given_is_none_there_too() -> None:
    assert pickle.loads(pickle.dumps(ConfigurationError("is missing", setting="a.b"))).value is NOT_GIVEN


def test_a_value_that_cannot_cross_is_shown_there() -> None:
    for value in (Unpicklable(), Path("/x"), [1, 2]):
        error = ConfigurationError("is wrong", setting="a.b", value=value)
        arrived = pickle.loads(pickle.dumps(error))
        assert arrived.value == str(value)
        assert str(arrived) == str(error)


# --- other names


def test_an_error_is_told_by_another_name_in_its_field_and_where_it_mentions_it() -> None:
    error = ConfigurationError(
        "or use measure.keep=all, not measure.keep_curves or own.measure.keep",
        setting="measure.keep",
        value="best",
        allowed="measure.keep or less",
    )
    error.add_note("on node 3")
    told = error.renamed({"measure.keep": "study.keep", "measure": "study"})
    assert (told.setting, told.value, told.allowed) == ("study.keep", "best", "study.keep or less")
    assert told.reason == "or use study.keep=all, not measure.keep_curves or own.measure.keep"
    assert told.__notes__ == ["on node 3"]
    assert type(told) is ConfigurationError
    # The other one stays.
    assert error.setting == "measure.keep"


def test_the_longest_name_is_told() -> None:
    error = ConfigurationError("use measure.keep=all or top_k", setting="measure.keep", value="x")
    told = error.renamed({"measure.keep": "study.keep", "measure.keep=all or top_k": "study.keep=all"})
    assert str(told) == "study.keep=x: use study.keep=all"


def test_a_key_without_a_dot_is_told_by_another_name_in_its_field_alone() -> None:
    error = ConfigurationError("the neurons are none", setting="neurons", allowed="a list of neurons")
    told = error.renamed({"neurons": "measure.edits[0].neurons"})
    assert str(told) == "measure.edits[0].neurons: must be a list of neurons; the neurons are none"


def test_a_setting_behind_the_words_is_told_by_another_name_there() -> None:
    names = {"dataset.source": "prompts", "model.source": "model"}
    assert str(PromptError("prompt 'p' is empty", change="dataset.source").renamed(names)) == (
        "prompt 'p' is empty (prompts)"
    )
    assert str(ModelError("choose another model.source", change="model.source").renamed(names)) == (
        "choose another model"
    )


# --- parameters of the library, settings of commands


def test_a_function_of_the_library_tells_parameters() -> None:
    cause = ValueError("why")

    @told_by_parameters(dataset__source="texts")
    def measured(basis: str, keep: str = "all") -> str:
        if basis == "bad":
            raise ConfigurationError("not with measure.keep or neurons.layers", setting="measure.basis") from cause
        if basis == "empty":
            raise PromptError("prompt 'p' is empty", change="dataset.source")
        return basis + keep

    assert measured("a") == "aall"
    with refused(ConfigurationError, "basis", NOT_GIVEN, says="not with keep or neurons.layers$") as caught:
        measured("bad")
    assert caught.value.__cause__ is cause
    with refused(PromptError, "texts"):
        measured("empty")


TEXTS, TARGETS = ["w1 w2"], [[" w7"]]


@pytest.mark.parametrize(
    ("call", "refusal"),
    [
        (lambda model: neg_service.neg(model, "w1", " w7", [(0, 1)], [1.0], shift="up"), ("shift", "up")),
        (lambda model: neg_service.neg(model, "w1", " w7", [(9, 1)], [1.0]), ("neurons",)),
        (lambda model: neg_service.neurgrad(model, TEXTS, TARGETS, basis="up"), ("basis", "up")),
        (lambda model: neg_service.neurgrad(model, TEXTS, TARGETS, layers=[9]), ("layers", [9])),
        (lambda model: neg_service.neurgrad(model, [""], TARGETS), ("prompts",)),
        (lambda model: neg_service.intervene(model, TEXTS, TARGETS, [], basis="paper"), ("edits", [])),
        (
            lambda model: neg_service.intervene(model, TEXTS, TARGETS, [{"neurons": [[0, 1]], "shift": "up"}]),
            ("edits[0].shift", "'up'"),
        ),
        (lambda model: neg_service.integrated_gradients(model, TEXTS, TARGETS, m=0), ("m", 0)),
        (lambda _: neg_service.load_model("smollm2", dtype="int4"), ("dtype", "int4")),
        (lambda _: neg_service.load_model("/nowhere/at-all"), ("source", "/nowhere/at-all")),
    ],
)
def test_a_notebook_hears_the_parameter_that_it_gave(
    call: Callable[[neg_service.LanguageModel], Any], refusal: tuple[Any, ...]
) -> None:
    with refused(ConfigurationError, *refusal):
        call(tiny_model("Llama 2"))


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"measure": {"name": "sweep", "shift": "up"}}, ("measure.shift", "up")),
        ({"measure": {"name": "neurgrad", "basis": "up"}}, ("measure.basis", "up")),
        ({"neurons": {"layers": [9]}}, ("neurons.layers", [9])),
        ({"measure": {"name": "integrated_gradients", "steps": 0}}, ("measure.steps", 0)),
        ({"measure": {"name": "intervene", "edits": []}}, ("measure.edits", [])),
        ({"model": {"dtype": "int4"}}, ("model.dtype", "int4")),
        ({"model": {"source": "/nowhere/at-all"}}, ("model.source", "/nowhere/at-all")),
        ({"dataset": {"source": "/nowhere/a.jsonl"}}, ("dataset.source", "/nowhere/a.jsonl")),
    ],
)
def test_a_command_hears_the_setting(
    changes: dict[str, Any], refusal: tuple[Any, ...], tmp_path: Path, tiny_directory: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "w1 w2", "targets": [" w7"]}))
    asked = {
        "model": {"source": str(tiny_directory)},
        "dataset": {"source": str(tmp_path / "a.jsonl")},
        "measure": {"name": "neurgrad"},
        "storage": {"uri": str(tmp_path / "results")},
    }
    for group, own in changes.items():
        asked[group] = asked.get(group, {}) | own
    with refused(ConfigurationError, *refusal):
        prepare(typed(ScanConfig, asked))

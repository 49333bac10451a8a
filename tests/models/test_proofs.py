"""A self-check that a machine has passed counts there until something changes that it depends on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neg_service import LanguageModel, load_model
from neg_service.cluster.messages import WorkerSpec
from neg_service.cluster.worker import ScanWorker
from neg_service.config import ModelConfig, ScanConfig
from neg_service.errors import ModelError
from neg_service.models import language_model
from neg_service.models.engines.select import Selection
from tests.folders import change_tensors, saved


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, with a cache of its own."""
    monkeypatch.setenv("NEG_SERVICE_CACHE", str(tmp_path / "cache"))
    return saved("Llama 2", tmp_path / "model")


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The self-checks that are really run, by the name of what runs them."""
    run: list[str] = []

    def watch(name: str) -> None:
        select: Callable[..., Selection] = getattr(language_model, name)

        def watched(*args: Any) -> Selection:
            run.append(name)
            return select(*args)

        watched.__name__ = name
        monkeypatch.setattr(language_model, name, watched)

    watch("select_engine")
    watch("select_for_trees")
    return run


def remembering(folder: Path, **options: Any) -> LanguageModel:
    model = load_model(str(folder), device="cpu", **options)
    model.remember_checks()
    return model


def test_what_was_found_is_found_again_without_a_check(folder: Path, checks: list[str]) -> None:
    first, again = remembering(folder), remembering(folder)
    found, known = first.ensure_checked(), again.ensure_checked()
    assert checks == ["select_engine"]
    assert (known.check, known.rejected, type(known.engine)) == (found.check, found.rejected, type(found.engine))
    # It runs this model's rows, and not the other's.
    assert known.engine.model.module is again.model
    assert torch.equal(again.rows([[1, 2, 3]]).run([2]), first.rows([[1, 2, 3]]).run([2]))
    of_trees, known_of_trees = first.ensure_checked_for_trees(), again.ensure_checked_for_trees()
    assert checks == ["select_engine", "select_for_trees"]
    assert (known_of_trees.check, known_of_trees.rejected) == (of_trees.check, of_trees.rejected)
    assert of_trees.check != found.check


def test_the_library_has_every_model_checked(folder: Path, checks: list[str]) -> None:
    remembering(folder).ensure_checked()
    load_model(str(folder), device="cpu").ensure_checked()
    in_memory = LanguageModel(load_model(str(folder), device="cpu").model)
    in_memory.remember_checks()
    in_memory.ensure_checked()
    assert checks == ["select_engine"] * 3


@pytest.mark.parametrize("change", ["weights", "dtype", "engine", "threads", "environment", "code", "attention"])
def test_whatever_it_depends_on_has_it_run_again(
    folder: Path, checks: list[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    threads = torch.get_num_threads()
    remembering(folder).ensure_checked()
    options: dict[str, Any] = {}
    if change == "weights":
        change_tensors(folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
    elif change in ("dtype", "engine"):
        options = {"dtype": "float64"} if change == "dtype" else {"engine": "full_sequence"}
    elif change == "threads":
        torch.set_num_threads(threads + 1)
    elif change == "environment":
        monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    elif change == "code":
        # As a modeling file that somebody has written to.
        own = folder.parent / "own.py"
        own.write_text("changed\n")
        monkeypatch.setattr("neg_service.models.proofs._source_files", lambda _model: [own])
    model = remembering(folder, **options)
    if change == "attention":
        model.model.config._attn_implementation = "eager"
    try:
        model.ensure_checked()
    finally:
        torch.set_num_threads(threads)
    assert checks == ["select_engine"] * 2


@pytest.mark.parametrize("damage", ["", "{", '{"about": 1}', "swapped", "engine"])
def test_a_damaged_file_counts_as_none(folder: Path, checks: list[str], damage: str) -> None:
    remembering(folder).ensure_checked()
    (file,) = (folder.parent / "cache" / "self-checks").iterdir()
    kept = file.read_text()
    content = json.loads(kept)
    if damage == "swapped":
        damage = json.dumps(content | {"about": content["about"] | {"dtype": "torch.float64"}})
    elif damage == "engine":
        damage = json.dumps(content | {"engine": "of another version"})
    file.write_text(damage)
    remembering(folder).ensure_checked()
    assert len(checks) == 2
    remembering(folder).ensure_checked()
    assert len(checks) == 2
    assert json.loads(file.read_text()) | {"at": 0} == json.loads(kept) | {"at": 0}


def test_a_cache_that_cannot_be_written_costs_time_alone(folder: Path, checks: list[str]) -> None:
    models = [remembering(folder), remembering(folder)]
    (folder.parent / "cache" / "self-checks").write_text("in the way")
    for model in models:
        model.ensure_checked()
    assert len(checks) == 2


def test_a_refusal_is_not_remembered(folder: Path, checks: list[str]) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"].fill_(float("inf"))

    change_tensors(folder, damage)
    for _ in range(2):
        with pytest.raises(ModelError, match="not finite"):
            remembering(folder).ensure_checked()
    assert len(checks) == 2


def test_without_onednn_is_kept_as_such(folder: Path, checks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model fails with one product and passes with the other, the first is not taken for right."""
    select = language_model.select_engine

    def refusing(model: Any, wanted: str) -> Selection:
        if refusing.model.cpu_product.name == "onednn":  # type: ignore[attr-defined]
            checks.append("refused")
            raise ModelError("off by 1")
        return select(model, wanted)

    monkeypatch.setattr(language_model, "select_engine", refusing)
    for _ in range(2):
        model = remembering(folder, cpu_product="onednn")
        if model.cpu_product is None or model.cpu_product.name != "onednn":
            pytest.skip("oneDNN cannot be used here")
        refusing.model = model  # type: ignore[attr-defined]
        model.ensure_checked()
        assert model.cpu_product.name == "torch"
    assert checks == ["refused", "select_engine", "refused"]


@pytest.mark.parametrize(("self_check", "runs"), [("remembered", 1), ("always", 2)])
def test_replicas_remember_unless_told_otherwise(
    folder: Path, checks: list[str], caplog: pytest.LogCaptureFixture, self_check: str, runs: int
) -> None:
    config = ScanConfig(model=ModelConfig(str(folder), device="cpu", self_check=self_check))
    identity = load_model(str(folder), device="cpu").identity
    caplog.set_level(logging.INFO, "neg_service")
    for _ in range(2):
        ScanWorker(WorkerSpec(config, identity, 1)).start()
    assert len(checks) == runs
    assert ("passed on this machine before" in caplog.text) == (runs == 1)

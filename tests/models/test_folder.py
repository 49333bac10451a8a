"""What lies in a model's folder: what is not used is refused or logged, what is no such file is told by its name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import neg_service
from jobs.check import CheckConfig, check
from jobs.entry import composed
from neg_service.errors import ModelError, NegServiceError
from neg_service.models.folder import require_real_file
from neg_service.models.inspection import inspect_model
from neg_service.models.source import fetch
from tests.fakes import save_family
from tests.families import model_of
from tests.tiny_models import FAMILIES, tiny_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 269060552\n".format("0" * 64)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def saved(family: str, directory: Path, **config: Any) -> Path:
    """A family's tiny model as a folder, with values of its configuration exchanged."""
    save_family(family, directory)
    change_config(directory, **config)
    return directory


def change_config(directory: Path, **config: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def refused(directory: Path) -> str:
    """The one line that says why a folder is not loaded; planning says the same before anything is loaded."""
    with pytest.raises(NegServiceError) as loading:
        neg_service.load_model(str(directory))
    with pytest.raises(NegServiceError) as planning:
        inspect_model(fetch(str(directory)), check_files=True)
    assert str(loading.value) == str(planning.value)
    assert "\n" not in str(loading.value)
    return str(loading.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_is_refused_as_transformers_saves_it(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    directory = saved(family, tmp_path)
    loaded, made = neg_service.load_model(directory).model, model_of(family).model
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, made.state_dict()[name])
    assert "not used" not in caplog.text


# A tensor that no parameter takes, what the refusal says of it, and the family.
UNUSED: list[tuple[str, str, tuple[int, ...]]] = [
    ("Llama 2", "model.layers.0.self_attn.q_proj.bias", (24,)),
    ("Llama 2", "model.layers.2.mlp.down_proj.bias", (24,)),
    ("Llama 2", "model.layers.1.self_attn.q_norm.weight", (4,)),
    ("Llama 2", "model.layers.1.post_feedforward_layernorm.weight", (24,)),
    ("Llama 2", "model.norm.bias", (24,)),
    ("Llama 2", "model.embed_tokens_extra.weight", (97, 24)),
    ("Llama 2", "lm_head.bias", (97,)),
    # A configuration that leaves layers out.
    ("Llama 2", "model.layers.3.self_attn.q_proj.weight", (24, 24)),
    ("Llama 2", "model.layers.0.self_attn.q_proj.lora_A.default.weight", (2, 24)),
    # Named as GPT-2's masks, but biases by their shape.
    ("GPT-2", "transformer.h.0.attn.bias", (24,)),
    ("GPT-2", "transformer.h.1.attn.masked_bias", (24,)),
    ("GPT-NeoX (Pythia)", "gpt_neox.layers.0.attention.bias", (24,)),
    ("GPT-2", "transformer.h.0.attn.q_norm.weight", (6,)),
    ("BERT", "bert.encoder.layer.0.attention.gate.weight", (24, 24)),
    ("BERT", "cls.predictions.scale.weight", (24,)),
    ("ModernBERT", "model.layers.0.attn.Wqkv.bias", (72,)),
    ("Falcon", "transformer.h.0.mlp.dense_h_to_4h.bias", (40,)),
    # Inside the layers, whatever a name reminds of.
    ("Llama 2", "model.layers.0.mlp.image_gate.weight", (24,)),
    ("Llama 2", "model.layers.0.mlp.visual.weight", (24,)),
    ("Llama 2", "model.layers.1.mm_scale", (24,)),
    ("Llama 2", "model.layers.0.mtp.fc.weight", (4, 24)),
    ("Llama 2", "model.layers.0.audio_adapter.down.weight", (4, 24)),
    ("GPT-2", "transformer.h.0.attn.vision.weight", (24,)),
    # Of no known kind, inside the body and beside it.
    ("Llama 2", "embed_layernorm.weight", (24,)),
    ("Llama 2", "embed_positions.weight", (64, 24)),
    ("Llama 2", "norm2.weight", (24,)),
    ("Llama 2", "output.bias", (97,)),
    ("Llama 2", "final_logits_bias", (1, 97)),
    ("Llama 2", "logit_scale", ()),
    ("Llama 2", "lm_head_bias", (97,)),
    ("Llama 2", "model.head_norm.weight", (24,)),
    ("Llama 2", "model.final_head_scale", (24,)),
    ("Llama 2", "h.0.attn.c_attn.bias", (72,)),
    ("BERT", "lm_head.weight", (97, 24)),
    # By their values no masks.
    ("GPT-2", "transformer.h.0.attn.bias", (1, 1, 64, 64)),
    ("GPT-2", "transformer.h.0.attn.masked_bias", ()),
    ("CodeGen", "transformer.h.0.attn.causal_mask", (1, 1, 64, 64)),
]


@pytest.mark.parametrize(("family", "name", "shape"), UNUSED)
def test_tensors_that_no_parameter_takes_are_refused_by_name(
    family: str, name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    directory = saved(family, tmp_path)
    change_tensors(directory, lambda tensors: tensors.update({name: torch.ones(shape)}))
    text = refused(directory)
    assert f"model.source={tmp_path}: 1 tensors would not be used: {name} (model.safetensors)" in text


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.lora_A.vision.weight",
        "model.layers.0.self_attn.q_proj.lora_A.mtp.weight",
        "model.layers.0.mlp.adapter.audio.weight",
        "model.layers.0.mlp.up_proj.lokr_w1",
        "lora_A.q.weight",
        "vision_lora.weight",
        "vision_adapter.lora_A.weight",
        "adapters.0.down.weight",
        "adapter.weight",
        "model.adapter_head.weight",
        "prompt_encoder.default.embedding.weight",
        "prompt_embeddings",
        "soft_prompt.weight",
        "prefix_encoder.embedding.weight",
        "control_vector.1",
    ],
)
def test_an_adapter_among_the_weights_is_refused(name: str, tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    change_tensors(directory, lambda tensors: tensors.update({name: torch.ones(2, 24)}))
    text = refused(directory)
    assert f"1 tensors would not be used: {name} (model.safetensors)" in text
    assert "they are an adapter's: merge it into the model" in text


# A second name of a parameter.
TWICE = [
    ("Llama 2", "model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
    ("Llama 2", "model.norm.weight", "norm.weight"),
    ("Llama 2", "model.embed_tokens.weight", "embed_tokens.weight"),
    ("GPT-2", "transformer.ln_f.bias", "ln_f.bias"),
    ("BERT", "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.gamma"),
    ("BERT", "bert.encoder.layer.1.output.LayerNorm.bias", "encoder.layer.1.output.LayerNorm.beta"),
]


@pytest.mark.parametrize(
    ("family", "name", "other", "is_in_shards"), [*[(*own, False) for own in TWICE], (*TWICE[0], True)]
)
def test_two_tensors_for_one_parameter_are_refused(
    family: str, name: str, other: str, is_in_shards: bool, tmp_path: Path
) -> None:
    directory = saved(family, tmp_path)
    second = load_file(directory / WEIGHTS)[name]

    def store(tensor: torch.Tensor) -> None:
        if not is_in_shards:
            change_tensors(directory, lambda tensors: tensors.update({other: tensor}))
            return
        save_file({other: tensor}, directory / "b.safetensors", metadata={"format": "pt"})
        places = dict.fromkeys(load_file(directory / WEIGHTS), WEIGHTS) | {other: "b.safetensors"}
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        change_config(directory, transformers_weights=INDEX)

    store(second.clone())
    inspect_model(fetch(str(directory)), check_files=True)
    for wrong in (second + 1, torch.ones(3, *second.shape)):
        store(wrong)
        text = refused(directory)
        assert "are different tensors for one parameter" in text
        assert name in text
        assert other in text


def test_biases_that_the_configuration_switches_off_are_refused(tmp_path: Path) -> None:
    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, own in model.named_parameters():
            if name.endswith("bias"):
                own.fill_(0.5)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    neg_service.load_model(str(tmp_path))
    change_config(tmp_path, attention_bias=False, mlp_bias=False)
    text = refused(tmp_path)
    assert "14 tensors would not be used: model.layers.0.mlp.down_proj.bias" in text
    # As the command that checks a model has it.
    with pytest.raises(ModelError) as error:
        check(composed("check", [f"model.source={tmp_path}"], CheckConfig))
    assert str(error.value) == text
    # What adds nothing may be left out.
    change_tensors(tmp_path, lambda own: [own[name].zero_() for name in own if name.endswith("bias")])
    neg_service.load_model(str(tmp_path))


def causal() -> torch.Tensor:
    return torch.ones(64, 64).tril()[None, None]


# What may be left out: with the words of the log.
LEFT_OUT: list[tuple[str, dict[str, torch.Tensor], dict[str, Any], str]] = [
    ("Llama 2", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, {}, "tables that are made anew"),
    ("Llama 2", {"model.rotary_emb.inv_freq": torch.ones(2)}, {}, "tables that are made anew"),
    ("BERT", {"bert.embeddings.position_ids": torch.arange(64)[None]}, {}, "tables that are made anew"),
    ("GPT-2", {"transformer.h.0.attn.bias": causal()}, {}, "causal masks"),
    ("GPT-2", {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}, {}, "causal masks"),
    (
        "GPT-NeoX (Pythia)",
        {"gpt_neox.layers.0.attention.bias": causal().bool()},
        {},
        "causal masks",
    ),
    (
        "GPT-2",
        {"h.0.attn.bias": causal().to(torch.uint8), "h.1.attn.masked_bias": torch.tensor(-1e9)},
        {},
        "causal masks",
    ),
    ("GPT-2", {"transformer.h.0.attn.bias": (1 - causal()) * -1e4}, {}, "causal masks"),
    ("GPT-Neo", {"transformer.h.1.attn.attention.bias": causal().triu(-4).byte()}, {}, "causal masks"),
    ("CodeGen", {"transformer.h.1.attn.causal_mask": causal().bool()}, {}, "causal masks"),
    ("Llama 2", {"score.weight": torch.ones(2, 24)}, {}, "other heads"),
    ("Llama 2", {"v_head.summary.weight": torch.ones(1, 24), "v_head.summary.bias": torch.ones(1)}, {}, "other heads"),
    ("Llama 2", {"medusa_head.0.0.linear.weight": torch.ones(24, 24)}, {}, "other heads"),
    ("BERT", {"bert.pooler.dense.weight": torch.ones(24, 24)}, {}, "other heads"),
    ("BERT", {"cls.seq_relationship.weight": torch.ones(2, 24)}, {}, "other heads"),
    ("Llama 2", {"mtp.layers.0.mlp.up_proj.weight": torch.ones(40, 24)}, {}, "layers that predict further tokens"),
    ("Llama 2", {"model.mtp_layers.0.enorm.weight": torch.ones(24)}, {}, "layers that predict further tokens"),
    (
        "Llama 2",
        {"model.layers.3.eh_proj.weight": torch.ones(24, 48), "model.layers.3.mlp.up_proj.weight": torch.ones(40, 24)},
        {},
        "layers that predict further tokens",
    ),
    (
        "Llama 2",
        {"vision_tower.encoder.layers.0.mlp.fc1.weight": torch.ones(8, 8)},
        {},
        "parts for other input than text",
    ),
    ("Llama 2", {"vision_language_adapter.w_in.weight": torch.ones(8, 8)}, {}, "parts for other input than text"),
    (
        "Llama 2",
        {"resampler.query": torch.ones(8), "vpm.x.layers.0.y": torch.ones(8)},
        {},
        "parts for other input than text",
    ),
    ("GPT-2", {"multiple_choice_head.summary.weight": torch.ones(1, 24)}, {}, "other heads"),
    ("DistilBERT", {"pre_classifier.weight": torch.ones(24, 24), "qa_outputs.bias": torch.ones(2)}, {}, "other heads"),
    ("ELECTRA generator", {"discriminator_predictions.dense.weight": torch.ones(24, 24)}, {}, "other heads"),
    (
        "DeBERTa 2 and 3",
        {"lm_predictions.lm_head.bias": torch.ones(97)},
        {},
        "other heads",
    ),
]


@pytest.mark.parametrize(("family", "tensors", "config", "words"), LEFT_OUT)
def test_what_may_be_left_out_is_logged(
    family: str,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    words: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    directory = saved(family, tmp_path, **config)
    change_tensors(directory, lambda own: own.update(tensors))
    neg_service.load_model(str(directory))
    assert f"not used: {len(tensors)} tensors, {words}: {sorted(tensors)[0]}" in caplog.text


@pytest.mark.parametrize(("n_layers", "announced"), [(2, 1), (2, 3), (1, 2)])
def test_a_plain_layer_behind_the_last_one_is_no_layer_for_further_tokens(
    n_layers: int, announced: int, tmp_path: Path
) -> None:
    directory = saved("Llama 2", tmp_path, num_hidden_layers=n_layers, num_nextn_predict_layers=announced)
    words = f"tensors would not be used: model.layers.{n_layers}.input_layernorm.weight"
    assert words in refused(directory)


@pytest.mark.parametrize("family", ["Llama 2", "GPT-2", "BLOOM", "OPT"])
def test_names_without_the_prefix_are_no_strangers(family: str, tmp_path: Path) -> None:
    directory = saved(family, tmp_path)
    prefix = f"{model_of(family).model.base_model_prefix}."

    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    change_tensors(directory, renamed)
    loaded, made = neg_service.load_model(directory).model, model_of(family).model
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, made.state_dict()[name])
    change_tensors(directory, lambda tensors: tensors.update({"embed_layernorm.weight": torch.ones(24)}))
    assert "1 tensors would not be used: embed_layernorm.weight" in refused(directory)


def test_old_names_of_parameters_are_no_strangers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    saved("BERT", tmp_path)
    before = neg_service.load_model(str(tmp_path)).model(torch.tensor([[5, 96, 7]])).logits

    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
                if name.endswith(new):
                    tensors[name.replace(new, old)] = tensors.pop(name)
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()

    change_tensors(tmp_path, renamed)
    after = neg_service.load_model(str(tmp_path)).model(torch.tensor([[5, 96, 7]])).logits
    torch.testing.assert_close(before, after)
    assert "not used" not in caplog.text


@pytest.mark.parametrize(
    "file",
    ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors"],
)
def test_an_adapter_beside_full_weights_is_refused(file: str, tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    (directory / file).write_text("{}")
    assert f"{file}: an adapter beside full weights, which would not be applied: merge it" in refused(directory)


def test_an_adapter_under_any_name_is_refused(tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(2, 24)}, directory / "finetuned.safetensors")
    assert f"finetuned.safetensors: an adapter ({name}) beside full weights" in refused(directory)


def test_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter_config\.json, adapter_model\.safetensors: an adapter"):
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


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    shards = in_shards(tmp_path)
    shards[1].unlink()
    assert f"{INDEX} names {len(shards)} files, of which 1 are missing: {shards[1].name}" in refused(tmp_path)


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
    found = refused(tmp_path)
    assert INDEX in found
    assert any(own in found for own in words.split("|"))


def test_shards_that_disagree_are_refused(tmp_path: Path) -> None:
    first, second, *_ = in_shards(tmp_path)
    own, other = load_file(first), load_file(second)
    name = next(iter(own))
    save_file(other | {name: own[name]}, second, metadata={"format": "pt"})
    neg_service.load_model(str(tmp_path))
    save_file(other | {name: own[name] + 1}, second, metadata={"format": "pt"})
    assert f"{first.name} and {second.name} have different tensors of the name {name}" in refused(tmp_path)


def test_weights_without_a_known_name_are_refused(tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    (directory / WEIGHTS).rename(directory / "consolidated.safetensors")
    assert f"neither {WEIGHTS} nor {INDEX} is there" in refused(directory)


def test_weights_in_eight_bits_without_scales_are_refused(tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(directory, lambda own: own.update({name: own[name].to(torch.int8)}))
    assert f"{name} (model.safetensors) is stored as I8, which are quantised weights" in refused(directory)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("vocab_size", 100, "2 tensors are mismatched: lm_head.weight is [97, 24] in the files, [100, 24] by config"),
        ("intermediate_size", 80, "9 tensors are mismatched: model.layers.0.mlp.down_proj.weight is [24, 40]"),
        ("vocab_size", 10**12, "2 tensors are mismatched: lm_head.weight is [97, 24] in the files"),
        ("attention_bias", True, "12 tensors are missing: model.layers.0.self_attn.k_proj.bias"),
        ("num_hidden_layers", 2, "9 tensors would not be used: model.layers.2.input_layernorm.weight"),
        ("num_hidden_layers", 4, "9 tensors are missing: model.layers.3.input_layernorm.weight"),
    ],
)
def test_weights_that_do_not_match_the_configuration_are_refused(
    key: str, value: Any, words: str, tmp_path: Path
) -> None:
    assert words in refused(saved("Llama 2", tmp_path, **{key: value}))


@pytest.mark.parametrize("file", [WEIGHTS, "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_pointer_in_the_place_of_a_file_is_told(file: str, tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    (directory / file).write_text(POINTER)
    text = refused(directory)
    assert f"{file} is a Git LFS pointer, which stands for 269060552 bytes, not the file itself" in text


@pytest.mark.parametrize("file", ["tokenizer.model", "merges.txt", "vocab.json", "special_tokens_map.json"])
def test_a_pointer_among_the_files_of_a_tokenizer_is_told(file: str, tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    (directory / file).write_text(POINTER)
    assert f"{file} is a Git LFS pointer" in refused(directory)


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
    with pytest.raises(ModelError, match=r"tiny\.gguf is a Git LFS pointer"):
        neg_service.load_model(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("file", [WEIGHTS, "tokenizer.json", "config.json"])
def test_a_link_to_nothing_is_told(file: str, tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    (directory / file).unlink()
    (directory / file).symlink_to("../blobs/gone")
    assert f"{file} is a link to ../blobs/gone, where nothing is" in refused(directory)


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
    text = refused(tmp_path)
    assert f"cannot be loaded: {WEIGHTS}: " in text
    assert words in text


@pytest.mark.parametrize("content", [b"", b"{", b"not JSON", b"[]", '{"a": 1}'.encode("utf-16"), b"{}"])
def test_a_damaged_tokenizer_is_told(content: bytes, tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer.*cannot be loaded") as error:
        neg_service.load_model(str(directory))
    assert "\n" not in str(error.value)
    assert ("tokenizer.json has no model" if content == b"{}" else "tokenizer.json is no JSON") in str(error.value)

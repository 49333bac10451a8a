"""Weights against the model: a tensor without a parameter is refused, or logged where it is known."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import neg_service
from jobs.check import CheckConfig, check
from jobs.entry import composed
from neg_service.errors import ModelError
from neg_service.models.inspection import inspect_model
from neg_service.models.source import fetch
from tests.families import model_of
from tests.folders import INDEX, WEIGHTS, change_config, change_tensors, refusal_of, saved
from tests.rare import one_of
from tests.tiny_models import FAMILIES, tiny_tokenizer


@pytest.mark.parametrize("family", one_of(3, FAMILIES))
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
    text = refusal_of(directory)
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
    text = refusal_of(directory)
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
        text = refusal_of(directory)
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
    text = refusal_of(tmp_path)
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
    assert words in refusal_of(directory)


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
    assert "1 tensors would not be used: embed_layernorm.weight" in refusal_of(directory)


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


def test_weights_in_eight_bits_without_scales_are_refused(tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(directory, lambda own: own.update({name: own[name].to(torch.int8)}))
    assert f"{name} (model.safetensors) is stored as I8, which are quantised weights" in refusal_of(directory)


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
    assert words in refusal_of(saved("Llama 2", tmp_path, **{key: value}))

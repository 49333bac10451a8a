"""What a .gguf file says of a model is what is measured, or the file is refused: no default takes its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf

import neg_service
from neg_service.errors import ModelError
from neg_service.models.gguf_metadata import apply_metadata
from tests.refusals import refused
from tests.tiny_gguf import closed, writer_of
from tests.tiny_models import VOCABULARY

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
FILE = Path("tiny.gguf")


def written(file: Path, model: hf.PreTrainedModel, architecture: str, **metadata: Any) -> Path:
    """A model as a .gguf file, by the names of tensors of the gguf package; keys have `__` for the dot."""
    config = model.config
    writer = writer_of(file, architecture, config)
    writer.add_pad_token_id(0)
    for key, value in metadata.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key.replace('__', '.')}", value)
    (kind,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(own, weight.numpy().astype(np.float32))
    closed(writer)
    return file


def random_model(config: hf.PreTrainedConfig) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model: hf.PreTrainedModel = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


# Keys that transformers has no place for: of StarCoder 2 base and window, of Phi-3 the window.
@pytest.mark.parametrize(
    ("config", "architecture", "metadata"),
    [
        (
            hf.Starcoder2Config(
                **SIZES,
                norm_epsilon=1e-5,
                sliding_window=3,
                rope_parameters={"rope_type": "default", "rope_theta": 70.0},
            ),
            "starcoder2",
            {"attention__layer_norm_epsilon": 1e-5, "rope__freq_base": 70.0, "attention__sliding_window": 3},
        ),
        (
            hf.Phi3Config(**SIZES, rms_norm_eps=1e-5, sliding_window=3),
            "phi3",
            {"attention__layer_norm_rms_epsilon": 1e-5, "rope__freq_base": 1e4, "attention__sliding_window": 3},
        ),
    ],
)
def test_what_transformers_drops_is_measured(
    config: hf.PreTrainedConfig,
    architecture: str,
    metadata: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NEG_SERVICE_CACHE", str(tmp_path / "cache"))
    model = random_model(config)
    read = neg_service.load_model(written(tmp_path / "tiny.gguf", model, architecture, **metadata)).model
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def applied(architecture: str, config: hf.PreTrainedConfig, **metadata: Any) -> hf.PreTrainedConfig:
    own = {f"{architecture}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    apply_metadata(FILE, config, {"general.architecture": architecture, "general.name": "x", **own})
    return config


def test_numbers_of_a_pass_are_put_into_the_configuration() -> None:
    gemma = applied(
        "gemma2", hf.Gemma2Config(), attn_logit_softcapping=20.0, final_logit_softcapping=0.0, rope__freq_base=5e5
    )
    assert (gemma.attn_logit_softcapping, gemma.final_logit_softcapping) == (20.0, None)
    assert gemma.rope_parameters["rope_theta"] == 5e5
    assert applied("falcon", hf.FalconConfig(), attention__layer_norm_epsilon=1e-6).layer_norm_epsilon == 1e-6
    assert applied("nemotron", hf.NemotronConfig(), attention__layer_norm_epsilon=1e-6).norm_eps == 1e-6
    mixed = applied("gemma3", hf.Gemma3TextConfig(), rope__freq_base=5e5, rope__freq_base_swa=2e4)
    assert mixed.rope_parameters["full_attention"]["rope_theta"] == 5e5
    assert mixed.rope_parameters["sliding_attention"]["rope_theta"] == 2e4


def test_attention_of_the_largest_gemma_2_has_its_scale() -> None:
    # Of its published configuration: query_pre_attn_scalar 144, where heads have 128 dimensions.
    sizes = {"hidden_size": 4608, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128}
    assert applied("gemma2", hf.Gemma2Config(num_hidden_layers=46, **sizes)).query_pre_attn_scalar == 144
    assert applied("gemma2", hf.Gemma2Config(num_hidden_layers=42)).query_pre_attn_scalar == 256


@pytest.mark.parametrize(
    ("architecture", "config", "key", "value", "words"),
    [
        ("stablelm", hf.StableLmConfig(), "rope__dimension_count", 40, r"stablelm\.rope\.dimension_count=40"),
        ("llama", hf.LlamaConfig(), "attention__sliding_window", 4096, r"llama\.attention\.sliding_window=4096"),
        ("llama", hf.LlamaConfig(), "rope__scaling__factor", 4.0, r"llama\.rope\.scaling\.factor=4\.0"),
        ("llama", hf.LlamaConfig(), "rope__scale_linear", 4.0, r"llama\.rope\.scale_linear=4\.0"),
        ("llama", hf.LlamaConfig(), "attention__causal", False, r"llama\.attention\.causal=False"),
        ("llama", hf.LlamaConfig(), "logit_scale", 0.25, r"llama\.logit_scale=0\.25"),
        ("llama", hf.LlamaConfig(), "attention__scale", 0.1, r"llama\.attention\.scale=0\.1"),
        ("llama", hf.LlamaConfig(), "of_tomorrow", "x", r"llama\.of_tomorrow='x'"),
        ("bloom", hf.BloomConfig(), "rope__freq_base", 1e4, r"bloom\.rope\.freq_base=10000\.0"),
        (
            "gemma3", hf.Gemma3TextConfig(num_hidden_layers=3), "attention__sliding_window_pattern", 2,
            r"gemma3\.attention\.sliding_window_pattern=2",
        ),
        (
            "gpt-oss", hf.GptOssConfig(), "attention__sliding_window", 64,
            r"sliding_window=64 would be lost .* \(the configuration has sliding_window=128\)",
        ),
        ("gpt-oss", hf.GptOssConfig(), "rope__scaling__factor", 8.0, r"gpt-oss\.rope\.scaling\.factor=8\.0"),
    ],
)  # fmt: skip
def test_what_no_configuration_takes_is_refused(
    architecture: str, config: hf.PreTrainedConfig, key: str, value: Any, words: str
) -> None:
    with refused(ModelError, "model.source", FILE, says=words):
        applied(architecture, config, **{key: value})


@pytest.mark.parametrize(
    ("architecture", "config", "metadata"),
    [
        ("llama", hf.LlamaConfig(), {
            "context_length": 2048, "rope__scaling__type": "none", "rope__dimension_count": 128, "expert_count": 0,
            "attention__causal": True, "attention__value_length": 128, "tensor_data_layout": "Meta AI original pth",
            "rope__scaling__finetuned": False, "rope__freq_base": 1e4, "attention__layer_norm_rms_epsilon": 1e-6,
        }),
        ("phi3", hf.Phi3Config(), {
            "rope__scaling__original_context_length": 4096, "rope__dimension_count": 96, "attention__sliding_window": 0,
        }),
        ("stablelm", hf.StableLmConfig(), {"rope__dimension_count": 20, "use_parallel_residual": False}),
        ("nemotron", hf.NemotronConfig(), {"rope__dimension_count": 64, "rope__scaling__type": "none"}),
        ("gemma3", hf.Gemma3TextConfig(num_hidden_layers=3), {
            "attention__sliding_window_pattern": [True, True, True], "rope__freq_base": 1e6,
            "attention__sliding_window": 4096, "attention__key_length": 256, "mm__tokens_per_image": 256,
        }),
        ("qwen2moe", hf.Qwen2MoeConfig(), {
            "expert_used_count": 4, "expert_feed_forward_length": 1408, "expert_gating_func": 1,
        }),
        ("gpt-oss", hf.GptOssConfig(), {
            "rope__scaling__type": "yarn", "rope__scaling__factor": 32.0, "attention__sliding_window": 128,
            "rope__scaling__original_context_length": 4096, "rope__freq_base": 150000.0,
        }),
        ("bloom", hf.BloomConfig(), {"attention__head_count": 8, "attention__head_count_kv": 8}),
    ],
)  # fmt: skip
def test_what_files_say_of_what_is_so_anyway_is_no_reason(
    architecture: str, config: hf.PreTrainedConfig, metadata: dict[str, Any]
) -> None:
    before = config.to_dict()
    assert applied(architecture, config, **metadata).to_dict() == before

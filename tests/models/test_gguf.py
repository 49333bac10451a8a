"""A .gguf file is unpacked as it is, or refused: what transformers would leave out without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import neg_service
from neg_service.errors import ModelError
from tests.refusals import refused
from tests.tiny_gguf import closed, writer_of
from tests.tiny_models import tiny_model

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEG_SERVICE_CACHE", str(tmp_path / "cache"))


def written(file: Path, more: dict[str, np.ndarray] | None = None, **metadata: Any) -> Path:
    """The tiny Llama as a .gguf file, with further tensors and metadata."""
    model = tiny_model("Llama 2").model
    config = model.config
    writer = writer_of(file, "llama", config)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in metadata.items():
        name = key.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)
    for name, weight in model.state_dict().items():
        for own, other in NAMES.items():
            name = name.replace(own, other)
        writer.add_tensor(name, weight.numpy())
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    closed(writer)
    return file


@pytest.mark.parametrize("name", ["tiny.gguf", "tiny.GGUF", "Tiny.Gguf"])
def test_the_suffix_may_be_in_capitals(name: str, tmp_path: Path) -> None:
    model = neg_service.load_model(written(tmp_path / name))
    assert model.feed_forward.n_layers == 3
    # The order of rotary dimensions differs, the MLPs do not.
    read, expected = (own.feed_forward.mlps[1][0].module.up_proj.weight for own in (model, tiny_model("Llama 2")))
    torch.testing.assert_close(read, expected)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "blk.2.ffn_down.bias", "blk.1.attn_q_norm.weight", "output.bias"]
)
def test_tensors_that_no_parameter_takes_are_refused(name: str, tmp_path: Path) -> None:
    file = written(tmp_path / "tiny.gguf", {name: np.ones(24, np.float32)})
    with refused(ModelError, "source", says=rf"1 tensors would not be used: {name}: no parameter of LlamaForCausalLM"):
        neg_service.load_model(file)
    assert not list((tmp_path / "cache" / "models").glob("*/config.json"))


def test_scaled_rotary_embeddings_are_not_lost(tmp_path: Path) -> None:
    neg_service.load_model(written(tmp_path / "a.gguf", {"rope_freqs.weight": np.ones(2, np.float32)}))
    with refused(ModelError, "source", says=r"has scaled rotary embeddings \(rope_freqs\.weight\)"):
        neg_service.load_model(written(tmp_path / "b.gguf", {"rope_freqs.weight": np.full(2, 8, np.float32)}))
    with refused(ModelError, "source", says=r"scaled rotary embeddings \(llama\.rope\.scaling\.type=linear\)"):
        neg_service.load_model(written(tmp_path / "c.gguf", llama__rope__scaling__type="linear"))


def test_what_is_no_whole_model_is_refused(tmp_path: Path) -> None:
    with refused(ModelError, "source", says=r"is one of 3 files of a model \(split\.count\)"):
        neg_service.load_model(written(tmp_path / "tiny-00001-of-00003.gguf", split__count=3))
    with refused(ModelError, "source", says="holds no model but adapter"):
        neg_service.load_model(written(tmp_path / "b.gguf", general__type="adapter"))


@pytest.mark.parametrize("length", [0, 3, 30, 3000, -100])
def test_a_file_that_is_cut_off_is_told(length: int, tmp_path: Path) -> None:
    file = written(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:length])
    with refused(ModelError, "source", says=r"tiny\.gguf: cannot be read as GGUF: "):
        neg_service.load_model(file)

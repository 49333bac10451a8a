"""A tiny random model of every configuration of transformers, made from its own defaults by general rules.

Numbers are made small by their names (`_SIZES`), lists of layers' kinds are cut so that every kind of layer stays, ids
of tokens are brought into the vocabulary. What the rules get wrong for a family is in `_OVERRIDES`, by model type.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import transformers as hf
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from tests.tiny_models import VOCABULARY

# The first rule that fits a number's whole name; None leaves it, "least" takes the smaller of it and the number.
_HIDDEN, _HEADS, _HEAD, _NEURONS, _RANK = 32, 4, 8, 48, 8
_SIZES: tuple[tuple[str, int], ...] = (
    (r".*(vocab_size\w*|_group_vocab)", VOCABULARY),
    (
        r"(hidden_size|hidden_size_global|d_model|n_embd|dim|emb_dim|embed_dim|embedding_size|embedding_dim|word_embed_proj_dim)",
        _HIDDEN,
    ),
    (
        r"(adapter_in_dim|adapter_out_dim|adapter_input_size|attention_hidden_size|lru_width|input_embedding_size|output_embedding_size)",
        _HIDDEN,
    ),
    (r"moe_(shared_expert_)?intermediate_size|shared_experts?_intermediate_size|expert_ffn_hidden_size", 24),
    (r"intermediate_size\w*|shared_intermediate_size|dense_intermediate_size", _NEURONS),
    (r"(ffn_dim|\w+_ffn_dim|dff|dim_ff|ffn_hidden_size|hidden_dim|n_inner|feed_forward_size|d_inner|d_ff)", _NEURONS),
    (r"(head_dim|d_head|d_kv|dim_head|kv_channels|attention_head_size|swa_head_dim|global_head_dim)", _HEAD),
    (r"(linear_key_head_dim|linear_value_head_dim|linear_head_dim|index_head_dim)", _HEAD),
    (r"(qk_nope_head_dim|qk_rope_head_dim|v_head_dim|rotary_dim)", _HEAD),
    (r"qk_head_dim", 2 * _HEAD),
    (r"(n_head|n_heads|num_heads|\w*num_attention_heads|\w+_attention_heads|linear_num_heads)", _HEADS),
    (r"linear_num_value_heads", _HEADS),
    # So many that none of the scores is zero in all of them, which would be a tie.
    (r"(index_n_heads|indexer_n_heads)", 16),
    (r"linear_num_key_heads", 2),
    (r"(\w+_lora_rank|\w+_rank|time_step_rank|router_hidden_size|hidden_size_per_layer_input|d_rel)", _RANK),
    (r"(mamba_d_head|mamba_head_dim|mamba_headdim|mamba_num_heads|mamba_n_heads|n_mamba_heads)", 8),
    (r"(\w*state_size|mamba_d_state)", 8),
    (r"mamba_d_ssm", 2 * _HIDDEN),
)
_AT_MOST: tuple[tuple[str, int], ...] = (
    (r"(n_groups|mamba_n_groups|mamba_ngroups|n_group|num_expert_group|topk_group)", 2),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|zero_expert_num)", 4),
    (r"(num_experts_per_tok|num_experts_per_token|moe_topk|moe_top_k|moe_k|top_k_experts)", 2),
    (r"(n_shared_experts|num_shared_experts|moe_num_shared_experts)", 1),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index|prompt_length)", 1),
    (r"(attn_layer_period|expert_layer_period|interleave_moe_layer_step|no_rope_layer_interval|mamba_expand)", 2),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length|mem_len)", 256),
    (r"(max_source_positions|max_target_positions|max_2d_position_embeddings|position_bias_max_distance)", 256),
    (r"(\w*chunk_size|max_inference_chunksize|block_size|index_block_size|attention_window)", 8),
    (r"(num_kv_shared_layers|num_nextn_predict_layers|num_residual_layers)", 1),
    # Shorter than the prompts.
    (r"(sliding_window\w*|\w*window_size|keep_window_size|local_attention|index_topk|index_topk_blocks)", 6),
    (r"(image_size|patch_size|max_num_tiles|num_mel_bins|num_channels)", 16),
)
_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "depth",
    "encoder_layers", "num_encoder_layers", "num_global_layers", "num_layers_per_stack", "num_blocks",
)  # fmt: skip
_MIXED = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_CONVOLUTIONS = ["conv", "full_attention", "conv", "full_attention"]
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": _HEAD,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    # Patches of one to several bytes, by a threshold in the middle of such a patcher's entropies.
    "blt": {"patching_threshold": 4.13, "local_attention_window_len": 6},
    "blt_local_encoder": {"num_hidden_layers": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note_text": {"head_dim": 20},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": VOCABULARY - 1},
    "granitemoehybrid": {"layer_types": _MIXED},
    # By default it is 50, for embeddings as they are before training; here a shift would move next to nothing.
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None, "embedding_scale": 5.0},
    "hunyuan_v1_dense": {"head_dim": _HEAD},
    "hunyuan_v1_moe": {"head_dim": _HEAD, "num_experts": 4, "moe_topk": 2},
    "inkling_text": {"n_shared_experts": 2},
    "jamba": {"attn_layer_offset": 1},
    "lfm2": {"num_hidden_layers": 4, "layer_types": _CONVOLUTIONS, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": _CONVOLUTIONS, "num_dense_layers": 1},
    "lfm3": {"layer_types": _CONVOLUTIONS},
    # So many that a token chooses experts and identities.
    "longcat_flash": {"moe_topk": 4},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": _HEAD},
    "nemotron": {"num_key_value_heads": 2},
    "neomme": {"head_dim": 2 * _HEAD},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (16, 16)},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 16, "max_inference_chunksize": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * _HIDDEN, "attention_head_dim": 4 * _HEAD, "layers_block_type": _HYBRID},
    "zamba2": {
        "layers_block_type": _HYBRID,
        "attention_hidden_size": 2 * _HIDDEN,
        "attention_head_dim": 2 * _HEAD,
        "hybrid_layer_ids": [1, 3],
    },
}

# What is no language model of text by itself, or is one under another name.
NOT_TEXT = {
    "gemma3n": "needs the library timm for its images; its text part is `gemma3n_text`",
    "gemma4_assistant": "drafts tokens from another model's hidden states",
    "gemma4_unified_assistant": "drafts tokens from another model's hidden states",
    "musicgen": "predicts codes of sound",
    "musicgen_melody": "predicts codes of sound",
}


def model_types() -> dict[str, tuple[str, ...]]:
    """Every model type, with the kinds of language model that there are of it: `causal`, `masked`."""
    causal, masked = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return {
        kind: tuple(name for name, own in (("causal", causal), ("masked", masked)) if kind in own)
        for kind in sorted({*causal, *masked})
    }


def small_config(model_type: str, *, is_masked: bool = False) -> hf.PreTrainedConfig:
    """A family's configuration with its own defaults, made small."""
    cls = CONFIG_MAPPING[model_type]
    overrides = _OVERRIDES.get(model_type, {})
    values = cls().to_dict()
    small = _small(values) | overrides
    if not is_masked and "is_decoder" in values:
        small |= {"is_decoder": True}
    if not is_masked and values.get("is_encoder_decoder"):
        small |= {"is_encoder_decoder": False}
    return cls(**small)


def tiny(model_type: str, *, is_masked: bool, seed: int = 0) -> hf.PreTrainedModel:
    """A model of it in float32 with random weights, so large that neurons matter."""
    torch.manual_seed(seed)
    auto = hf.AutoModelForMaskedLM if is_masked else hf.AutoModelForCausalLM
    config = small_config(model_type, is_masked=is_masked)
    model: hf.PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    fill(model)
    return model


@torch.no_grad()
def fill(model: hf.PreTrainedModel) -> None:
    """Random weights under which hidden states stay as large from layer to layer."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            is_convolution = "conv" in name and parameter.ndim == 3
            parameter.normal_(0, 0.5 if is_convolution else 1 / math.sqrt(parameter.shape[-1]))
        elif name.endswith("bias") and "dt" not in name:
            parameter.normal_(0, 0.1)
        elif name.endswith("self_attn.A"):
            # Doge's keys would all be worth the same.
            parameter.normal_(0, 0.5)
    for name, buffer in model.named_buffers():
        # Routers add it before they choose.
        if "correction_bias" in name:
            buffer.normal_(0, 0.1)
        elif name.endswith("tid2eid"):
            # Which experts DeepSeek 4 gives a token to: different ones.
            order = torch.rand(len(buffer), model.config.num_local_experts).argsort(1)
            buffer.copy_(order[:, : buffer.shape[1]])


def _small(values: dict[str, Any]) -> dict[str, Any]:
    kept = _kept_layers(values)
    n_layers = next((values[name] for name in _LAYERS if type(values.get(name)) is int), 0)
    small = {}
    for name, own in values.items():
        if name == "per_layer_config" and own:
            by_number = {int(place): part for place, part in own.items()}
            small[name] = {
                place: _as_the_rest(by_number[was], values) for place, was in enumerate(kept) if was in by_number
            }
        elif isinstance(own, dict) and "model_type" in own:
            small[name] = _small(own) | _OVERRIDES.get(own["model_type"], {})
        elif type(own) is int:
            small[name] = _small_number(name, own, values, len(kept))
        elif isinstance(own, (list, tuple)) and len(own) == n_layers and n_layers > 1:
            small[name] = list(range(len(kept))) if _is_numbering(own) else [own[place] for place in kept]
            if all(type(one) is int for one in own) and "layer_idx" not in name:
                small[name] = [_small_number(name, one, values, len(kept)) for one in small[name]]
        else:
            small[name] = own
    return small


def _is_numbering(own: Any) -> bool:
    """Whether a list names layers by their numbers, all of them."""
    return list(own) == list(range(len(own)))


def _as_the_rest(part: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What layers have for themselves, as many times as large as what the others have."""
    small = {}
    for name, own in part.items():
        small[name] = own
        if type(own) is int and type(values.get(name)) is int:
            small[name] = max(1, _small_number(name, values[name], values, 0) * own // values[name])
    return small


def _small_number(name: str, own: int, values: dict[str, Any], n_layers: int) -> int:
    if name in _LAYERS:
        return min(own, n_layers)
    if name.endswith(("token_id", "token_index", "_index", "lang_id")):
        return own if 0 <= own < VOCABULARY or own < 0 else 3
    if re.fullmatch(r"(\w*num_key_value_heads|num_kv_heads|num_query_groups|kv_n_heads)", name):
        heads = next((values[key] for key in ("num_attention_heads", "n_heads", "n_head") if key in values), None)
        return 1 if own == 1 else _HEADS if own == heads else 2
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name) and own > 0:
            return size
    for pattern, most in _AT_MOST:
        if re.fullmatch(pattern, name):
            return min(own, most)
    return own


def _kept_layers(values: dict[str, Any]) -> list[int]:
    """Which layers stay: the first of each kind, and others until there are four."""
    n_layers = next((values[name] for name in _LAYERS if type(values.get(name)) is int), 0)
    lists = [
        own
        for own in values.values()
        if isinstance(own, (list, tuple)) and len(own) == n_layers and not _is_numbering(own)
    ]
    own = {int(place): part for place, part in (values.get("per_layer_config") or {}).items()}
    kinds = [(*(str(one[place]) for one in lists), str(own.get(place))) for place in range(n_layers)]
    kept = {kinds.index(kind) for kind in dict.fromkeys(kinds)}
    for place in range(n_layers):
        if len(kept) < min(4, n_layers):
            kept.add(place)
    return sorted(kept)

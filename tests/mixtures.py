"""A tiny mixture of experts of every family, made from its configuration with random weights.

As in `tiny_models.py` all sizes differ, windows and chunks are shorter than prompts, and whatever a family does
otherwise is switched on: groups of experts, biases of routers, dense first layers, MLPs that are always on.

paths: where, by hand, MLPs are in a layer, of those that are always on and of layers without experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

from neg_service.models.engines.base import Engine
from neg_service.models.engines.full_sequence import FullSequenceEngine
from neg_service.models.engines.kv_cache import KeyValueCacheEngine
from neg_service.models.engines.recurrent_state import RecurrentStateEngine
from neg_service.models.engines.shared_prefix import SharedPrefixEngine
from neg_service.models.language_model import LanguageModel
from tests.tiny_models import CHUNK, DELTA, LINEAR, STATE_SPACE, VOCABULARY, WINDOW, tiny_tokenizer

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    **_BASE,
    "num_key_value_heads": 6,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
}
# As DeepSeek has them: experts in groups, an MLP that is always on, a dense first layer.
_GROUPS = {
    "moe_intermediate_size": 14,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_SIX = {"num_local_experts": 6, "num_experts_per_tok": 3}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_SHARED = {
    "moe_intermediate_size": 14,
    "shared_expert_intermediate_size": 18,
    "num_experts": 6,
    "num_experts_per_tok": 3,
}
_SPARSE = ["dense", "sparse", "sparse"]


@dataclass(frozen=True)
class Mixture:
    """How a family's tiny mixture is made.

    engine: what is known to fit it. always_on: the path of the MLP beside the experts in a layer, or the paths of
    several, in the order in which they run; dense: of a layer without experts. attention: the family's own attention
    that is right for it.
    """

    config: Any
    options: dict[str, Any]
    always_on: str = ""
    dense: str = "mlp"
    engine: type[Engine] = SharedPrefixEngine
    attention: str = "eager"


MIXTURES: dict[str, Mixture] = {
    "Mixtral": Mixture(
        hf.MixtralConfig, {**_BASE, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW}
    ),
    "Qwen 2 MoE": Mixture(
        hf.Qwen2MoeConfig,
        {
            **_BASE,
            **_SHARED,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
        },
        "mlp.shared_expert",
    ),
    "Qwen 3 MoE": Mixture(
        hf.Qwen3MoeConfig,
        {**_BASE, "head_dim": 8, "moe_intermediate_size": 14, "num_experts": 6, "num_experts_per_tok": 3},
    ),
    "OLMoE": Mixture(hf.OlmoeConfig, {**_BASE, "num_experts": 6, "num_experts_per_tok": 3}),
    "FlexOlmo": Mixture(hf.FlexOlmoConfig, {**_BASE, "num_experts": 6, "num_experts_per_tok": 3}),
    "gpt-oss": Mixture(
        hf.GptOssConfig,
        {
            **_BASE,
            **_SIX,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "swiglu_limit": 0.7,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "DeepSeek 2": Mixture(
        hf.DeepseekV2Config,
        {**_LATENT, **_GROUPS, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
        "mlp.shared_experts",
    ),
    "DeepSeek 3": Mixture(
        hf.DeepseekV3Config,
        {**_LATENT, **_GROUPS, "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        "mlp.shared_experts",
    ),
    "GLM-4 MoE": Mixture(hf.Glm4MoeConfig, {**_BASE, **_GROUPS, "head_dim": 8}, "mlp.shared_experts"),
    "GLM-4.7 Flash": Mixture(
        hf.Glm4MoeLiteConfig, {**_LATENT, **_GROUPS, "mlp_layer_types": _SPARSE}, "mlp.shared_experts"
    ),
    "Granite MoE": Mixture(
        hf.GraniteMoeConfig,
        {
            **_BASE,
            **_SIX,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.4,
        },
    ),
    "Granite MoE, shared": Mixture(
        hf.GraniteMoeSharedConfig, {**_BASE, **_SIX, "shared_intermediate_size": 18}, "shared_mlp"
    ),
    "Granite MoE, sliding": Mixture(
        hf.GraniteMoeSWAConfig, {**_BASE, **_SIX, "sliding_window": WINDOW, "layer_types": _MIXED}
    ),
    "Phi-3.5 MoE": Mixture(
        hf.PhimoeConfig,
        {**_BASE, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": WINDOW},
        engine=KeyValueCacheEngine,
    ),
    "Llama 4": Mixture(
        hf.Llama4TextConfig,
        {
            **_BASE,
            "intermediate_size_mlp": 28,
            "head_dim": 8,
            "num_local_experts": 5,
            "num_experts_per_tok": 1,
            "moe_layers": [0, 2],
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0, 1],
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "attn_temperature_tuning": True,
            "floor_scale": 40,
            "attn_scale": 0.1,
        },
        "feed_forward.shared_expert",
        "feed_forward",
    ),
    "DBRX": Mixture(
        hf.DbrxConfig,
        {
            "vocab_size": VOCABULARY,
            "d_model": 24,
            "n_heads": 6,
            "n_layers": 3,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 4.0, "rope_theta": 1e4},
            "ffn_config": {"hidden_size": 24, "ffn_hidden_size": 14, "moe_num_experts": 6, "moe_top_k": 3},
            "pad_token_id": 0,
        },
    ),
    "JetMoE": Mixture(hf.JetMoeConfig, {**_BASE, **_SIX, "kv_channels": 8}),
    "Gemma 4 MoE": Mixture(
        hf.Gemma4TextConfig,
        {
            **_BASE,
            "head_dim": 8,
            "global_head_dim": 8,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 3,
            "moe_intermediate_size": 14,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        "mlp",
    ),
    "ERNIE 4.5 MoE": Mixture(
        hf.Ernie4_5_MoeConfig,
        {
            **_BASE,
            "moe_num_experts": 6,
            "moe_k": 3,
            "moe_intermediate_size": 14,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
        "mlp.shared_experts",
    ),
    "Hunyuan MoE": Mixture(
        hf.HunYuanMoEV1Config, {**_BASE, "head_dim": 8, "num_experts": 6, "moe_topk": [2, 2, 2]}, "mlp.shared_mlp"
    ),
    "Hunyuan 3": Mixture(
        hf.HYV3Config,
        {**_BASE, **_SIX, "head_dim": 8, "moe_intermediate_size": 14, "num_shared_experts": 1, "num_experts": 6},
        "mlp.shared_experts",
    ),
    "MiniMax-M2": Mixture(hf.MiniMaxM2Config, {**_BASE, **_SIX, "head_dim": 8}),
    "dots.llm1": Mixture(hf.Dots1Config, {**_BASE, **_GROUPS, "head_dim": 8}, "mlp.shared_experts"),
    "EXAONE MoE": Mixture(
        hf.ExaoneMoeConfig,
        {
            **_BASE,
            "moe_intermediate_size": 14,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "sliding_window": WINDOW,
            "sliding_window_pattern": "LLG",
            "layer_types": _MIXED,
        },
        "mlp.shared_experts",
    ),
    "AFMoE": Mixture(
        hf.AfmoeConfig,
        {
            **_BASE,
            "head_dim": 8,
            "moe_intermediate_size": 14,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
        },
        "mlp.shared_experts",
    ),
    "Solar Open": Mixture(hf.SolarOpenConfig, {**_BASE, **_GROUPS, "head_dim": 8}, "mlp.shared_experts"),
    "Cohere 2 MoE": Mixture(
        hf.Cohere2MoeConfig,
        {
            **_BASE,
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "num_shared_experts": 1,
            "shared_expert_combination_strategy": "average",
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
        },
        "mlp.shared_experts",
    ),
    "Flint": Mixture(
        hf.FlintConfig,
        {
            **_BASE,
            **_SHARED,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
        },
        "mlp.shared_expert",
    ),
    "Laguna": Mixture(
        hf.LagunaConfig,
        {
            **_BASE,
            **_SHARED,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
        },
        "mlp.shared_experts",
    ),
    "MiMo-V2 Flash": Mixture(
        hf.MiMoV2FlashConfig,
        {
            **_BASE,
            "num_key_value_heads": 3,
            "head_dim": 8,
            "v_head_dim": 6,
            "moe_intermediate_size": 14,
            "n_routed_experts": 6,
            "num_experts_per_tok": 3,
            "n_group": 1,
            "topk_group": 1,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": _SPARSE,
        },
    ),
    # Two attentions and MLPs a layer, and identities among the experts.
    "LongCat Flash": Mixture(
        hf.LongcatFlashConfig,
        {
            **_LATENT,
            "num_hidden_layers": 6,
            "head_dim": 4,
            "expert_ffn_hidden_size": 14,
            "n_routed_experts": 5,
            "zero_expert_num": 4,
            "moe_topk": 3,
            "routed_scaling_factor": 2.0,
        },
        "mlps.0 mlps.1",
    ),
    # What has recurrent layers, or attention that chooses what it looks at, beside experts.
    "Qwen 3 Next": Mixture(
        hf.Qwen3NextConfig,
        {**_BASE, **DELTA, **_SHARED, "layer_types": LINEAR, "head_dim": 8, "mlp_only_layers": [1]},
        "mlp.shared_expert",
        engine=RecurrentStateEngine,
    ),
    "Qwen 3.5 MoE": Mixture(
        hf.Qwen3_5MoeTextConfig,
        {**_BASE, **DELTA, **_SHARED, "layer_types": LINEAR, "head_dim": 8},
        "mlp.shared_expert",
        engine=RecurrentStateEngine,
    ),
    "Granite 4 MoE": Mixture(
        hf.GraniteMoeHybridConfig,
        {
            **_BASE,
            **_SIX,
            **STATE_SPACE,
            "layer_types": LINEAR,
            "shared_intermediate_size": 18,
            "residual_multiplier": 0.7,
            "logits_scaling": 3.0,
        },
        "shared_mlp",
        engine=RecurrentStateEngine,
    ),
    # Experts that are always on, and weighed.
    "Inkling": Mixture(
        hf.InklingTextConfig,
        {
            **{**_BASE, "head_dim": 8, "d_rel": 4, "rel_extent": 6, "conv_kernel_size": 3, "num_experts_per_tok": 3},
            **{"swa_num_attention_heads": 6, "swa_num_key_value_heads": 3, "swa_head_dim": 8},
            **{"moe_intermediate_size": 14, "n_routed_experts": 6, "n_shared_experts": 2, "mlp_layer_types": _SPARSE},
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
            "sliding_window_size": WINDOW,
            # Shorter than prompts: further tokens scale their attention.
            "log_scaling_n_floor": 6,
            "logits_mup_width_multiplier": 2.0,
            "route_scale": 2.0,
        },
        engine=RecurrentStateEngine,
    ),
    "MiniMax": Mixture(
        hf.MiniMaxConfig,
        {**_BASE, **_SIX, "layer_types": LINEAR, "block_size": CHUNK},
        engine=FullSequenceEngine,
    ),
    "DeepSeek 3.2 MoE": Mixture(
        hf.DeepseekV32Config,
        {**_LATENT, **_GROUPS, "head_dim": 4, "index_head_dim": 8, "index_n_heads": 16, "index_topk": 3},
        "mlp.shared_experts",
        engine=KeyValueCacheEngine,
    ),
}


def tiny_mixture(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """A family's tiny mixture, with weights so large that neurons matter, and a tokenizer of one word a token."""
    torch.manual_seed(seed)
    family = MIXTURES[name]
    model = hf.AutoModelForCausalLM.from_config(
        family.config(**family.options), attn_implementation=family.attention, experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            elif "norm" not in parameter_name:
                parameter.normal_(0, 0.1)
        for buffer_name, buffer in model.named_buffers():
            # Routers add it before they choose.
            if "correction_bias" in buffer_name:
                buffer.normal_(0, 0.05)
    return LanguageModel(model.to(dtype), tiny_tokenizer(), name=name)

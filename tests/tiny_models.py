"""A tiny model of every family, made from its configuration with random weights: nothing is downloaded.

All sizes differ, so that a mixed-up axis shows; windows are shorter than prompts; whatever a family does otherwise than
others (soft caps, parallel MLPs, position biases, multipliers) is switched on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from neg_service.models.engines.base import Engine
from neg_service.models.engines.differences import DifferencesEngine
from neg_service.models.engines.full_sequence import FullSequenceEngine
from neg_service.models.engines.kv_cache import KeyValueCacheEngine
from neg_service.models.engines.recurrent_state import RecurrentStateEngine
from neg_service.models.language_model import LanguageModel

VOCABULARY = 97
MASK = VOCABULARY - 1
WINDOW = 5

_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_PLAIN = {**_BASE, "intermediate_size": 40, "num_attention_heads": 4}
_GROUPED = {**_BASE, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2}
_OLD = {"vocab_size": VOCABULARY, "n_layer": 3, "n_embd": 24, "n_inner": 40, "n_head": 4, "n_positions": 64, **_TOKENS}
_FALCON = {**_BASE, "num_attention_heads": 4, "ffn_hidden_size": 40}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Family:
    """How a family's tiny model is made.

    engine: what is known to fit it; another one is a family that fell off the fast path.
    attention: the family's own attention that is right for it; with soft caps it is not `sdpa`.
    is_masked: it is read at its mask token.
    """

    config: Callable[[], hf.PreTrainedConfig]
    engine: type[Engine]
    attention: str
    is_masked: bool = False


def _shared_prefix(config: type[hf.PreTrainedConfig], attention: str = "sdpa", **options: Any) -> Family:
    return Family(lambda: config(**options), DifferencesEngine, attention)


def _kv_cache(config: type[hf.PreTrainedConfig], attention: str = "sdpa", **options: Any) -> Family:
    return Family(lambda: config(**options), KeyValueCacheEngine, attention)


def _full_sequence(config: type[hf.PreTrainedConfig], attention: str = "sdpa", **options: Any) -> Family:
    return Family(lambda: config(**options), FullSequenceEngine, attention, is_masked=True)


def _causal_sequence(config: type[hf.PreTrainedConfig], attention: str = "sdpa", **options: Any) -> Family:
    return Family(lambda: config(**options), FullSequenceEngine, attention)


def _recurrent(config: type[hf.PreTrainedConfig], attention: str = "sdpa", **options: Any) -> Family:
    return Family(lambda: config(**options), RecurrentStateEngine, attention)


def _longrope() -> dict[str, Any]:
    factors = {"short_factor": [1.0, 1.5], "long_factor": [4.0, 8.0]}
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        **factors,
    }


FAMILIES: dict[str, Family] = {
    "Llama 2": _shared_prefix(hf.LlamaConfig, **_GROUPED),
    "Llama 3": _shared_prefix(
        hf.LlamaConfig,
        **_GROUPED,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "Mistral": _shared_prefix(hf.MistralConfig, **_GROUPED, sliding_window=WINDOW),
    "Qwen 2 and 2.5": _shared_prefix(
        hf.Qwen2Config, **_GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "Qwen 3": _shared_prefix(hf.Qwen3Config, **_GROUPED, head_dim=8),
    "Gemma": _shared_prefix(hf.GemmaConfig, **_GROUPED, head_dim=8),
    "Gemma 2": _shared_prefix(
        hf.Gemma2Config,
        "eager",
        **_GROUPED,
        head_dim=8,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=8,
    ),
    "Gemma 3": _shared_prefix(hf.Gemma3TextConfig, **_GROUPED, head_dim=8, sliding_window=WINDOW, layer_types=_MIXED),
    "Gemma 3, images and text": Family(
        lambda: hf.Gemma3Config(
            text_config={**_GROUPED, "head_dim": 8, "sliding_window": WINDOW, "layer_types": _MIXED},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
            image_token_index=90,
            boi_token_index=91,
            eoi_token_index=92,
        ),
        DifferencesEngine,
        "sdpa",
    ),
    "Phi": _shared_prefix(hf.PhiConfig, **{**_PLAIN, "num_attention_heads": 3}, partial_rotary_factor=0.5),
    "Phi-3 and 4": _shared_prefix(hf.Phi3Config, **_GROUPED, sliding_window=WINDOW),
    "Phi-4-mini": _shared_prefix(
        hf.Phi3Config, **_GROUPED, original_max_position_embeddings=32, rope_parameters=_longrope()
    ),
    "OLMo": _shared_prefix(hf.OlmoConfig, **_GROUPED, clip_qkv=0.5),
    "OLMo 2": _shared_prefix(hf.Olmo2Config, **_GROUPED),
    "OLMo 3": _shared_prefix(hf.Olmo3Config, **_GROUPED, sliding_window=WINDOW, layer_types=_MIXED),
    "SmolLM 3": _shared_prefix(hf.SmolLM3Config, **_GROUPED, no_rope_layer_interval=2),
    "StableLM": _shared_prefix(hf.StableLmConfig, **_GROUPED, partial_rotary_factor=0.5, use_parallel_residual=True),
    "GPT-2": _shared_prefix(hf.GPT2Config, **_OLD, scale_attn_by_inverse_layer_idx=True),
    "GPT-NeoX (Pythia)": _shared_prefix(hf.GPTNeoXConfig, **{**_PLAIN, "num_attention_heads": 3}, rotary_pct=0.5),
    "GPT-Neo": _kv_cache(
        hf.GPTNeoConfig,
        "eager",
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_layers=4,
        num_heads=4,
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 2]],
        window_size=WINDOW,
        **_TOKENS,
    ),
    "GPT-J": _kv_cache(hf.GPTJConfig, "eager", **_OLD, rotary_dim=4),
    "CodeGen": _kv_cache(hf.CodeGenConfig, "eager", **_OLD, rotary_dim=4),
    "OPT": _shared_prefix(hf.OPTConfig, **_BASE, ffn_dim=40, num_attention_heads=4, word_embed_proj_dim=24),
    "OPT, norm after": _shared_prefix(
        hf.OPTConfig, **_BASE, ffn_dim=40, num_attention_heads=4, word_embed_proj_dim=20, do_layer_norm_before=False
    ),
    "Falcon": _kv_cache(hf.FalconConfig, **_FALCON, multi_query=True),
    "Falcon, new decoder": _kv_cache(hf.FalconConfig, **_FALCON, num_kv_heads=2, new_decoder_architecture=True),
    "Falcon, ALiBi": _kv_cache(
        hf.FalconConfig, "eager", **_FALCON, multi_query=False, alibi=True, parallel_attn=False, bias=True
    ),
    "BLOOM": _kv_cache(hf.BloomConfig, "eager", vocab_size=VOCABULARY, hidden_size=24, n_layer=3, n_head=4, **_TOKENS),
    "MPT": _kv_cache(
        hf.MptConfig,
        "eager",
        vocab_size=VOCABULARY,
        d_model=24,
        n_layers=3,
        n_heads=4,
        expansion_ratio=2,
        max_seq_len=64,
        **_TOKENS,
    ),
    "StarCoder": _shared_prefix(hf.GPTBigCodeConfig, **_OLD),
    "StarCoder 2": _shared_prefix(hf.Starcoder2Config, **_GROUPED, sliding_window=WINDOW),
    "Cohere": _shared_prefix(hf.CohereConfig, **_GROUPED, use_qk_norm=True),
    "Cohere 2": _shared_prefix(hf.Cohere2Config, **_GROUPED, sliding_window=WINDOW, layer_types=_MIXED),
    "Granite": _shared_prefix(
        hf.GraniteConfig,
        **_GROUPED,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
        logits_scaling=2.0,
    ),
    "GLM": _shared_prefix(hf.GlmConfig, **_GROUPED, head_dim=8),
    "GLM-4": _shared_prefix(hf.Glm4Config, **_GROUPED, head_dim=8),
    "EXAONE 4": _shared_prefix(
        hf.Exaone4Config, **_GROUPED, sliding_window=WINDOW, sliding_window_pattern="LLG", layer_types=_MIXED
    ),
    "Nemotron": _shared_prefix(hf.NemotronConfig, **_GROUPED, head_dim=4),
    "Helium": _shared_prefix(hf.HeliumConfig, **_GROUPED, head_dim=4),
    "Seed-OSS": _shared_prefix(hf.SeedOssConfig, **_GROUPED, head_dim=8),
    # One low layer that runs twice, then one high layer, and that twice.
    "HRM": _shared_prefix(
        hf.HrmTextConfig,
        **{**_PLAIN, "num_hidden_layers": 1},
        head_dim=8,
        H_cycles=2,
        L_cycles=2,
        embedding_scale=2.0,
    ),
    "BERT": _full_sequence(hf.BertConfig, **_PLAIN),
    "RoBERTa": _full_sequence(hf.RobertaConfig, **_PLAIN),
    "XLM-R": _full_sequence(hf.XLMRobertaConfig, **_PLAIN),
    "ELECTRA generator": _full_sequence(hf.ElectraConfig, **_PLAIN, embedding_size=20),
    # The first of its groups runs twice, the second once.
    "ALBERT": _full_sequence(hf.AlbertConfig, **_PLAIN, embedding_size=20, num_hidden_groups=2),
    "DistilBERT": _full_sequence(
        hf.DistilBertConfig,
        vocab_size=VOCABULARY,
        dim=24,
        hidden_dim=40,
        n_layers=3,
        n_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    ),
    "ModernBERT": _full_sequence(
        hf.ModernBertConfig, **_PLAIN, local_attention=6, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    ),
    "DeBERTa": _full_sequence(
        hf.DebertaConfig,
        "eager",
        **_PLAIN,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=64,
        type_vocab_size=0,
    ),
    "DeBERTa 2 and 3": _full_sequence(
        hf.DebertaV2Config,
        "eager",
        **_PLAIN,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        type_vocab_size=0,
        # Between the first two layers, as the largest of them have it.
        conv_kernel_size=3,
        conv_act="gelu",
    ),
    "EuroBERT": _full_sequence(hf.EuroBertConfig, **_GROUPED, mask_token_id=MASK),
    "MPNet": _full_sequence(hf.MPNetConfig, "eager", **_PLAIN),
}


# Prompts of the tests are longer than a chunk, and than what an index chooses.
CHUNK = 4
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
}
STATE_SPACE = {"mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 5, "mamba_chunk_size": CHUNK}
_INDEXED = {
    **_PLAIN,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "head_dim": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "mlp_layer_types": ["dense"] * 3,
    "index_head_dim": 8,
    # With few of them all scores of many keys are zero, and which ones are chosen is anyone's guess.
    "index_n_heads": 16,
}

# What has more in its layers than attention, or attention that chooses what it looks at.
HYBRIDS: dict[str, Family] = {
    "Qwen 3.5": _recurrent(
        hf.Qwen3_5TextConfig,
        **{**_GROUPED, **DELTA, "max_position_embeddings": 256},
        layer_types=LINEAR,
        head_dim=8,
    ),
    "Kimi Linear": _recurrent(
        hf.KimiLinearConfig,
        **{**_INDEXED, "num_local_experts": 4, "num_experts_per_tok": 2},
        layer_types=LINEAR,
        linear_head_dim=8,
        linear_num_heads=3,
    ),
    "OLMo Hybrid": _recurrent(
        hf.OlmoHybridConfig, **_GROUPED, **{**DELTA, "linear_num_key_heads": 4}, layer_types=LINEAR
    ),
    "Granite 4": _recurrent(
        hf.GraniteMoeHybridConfig,
        **{**_GROUPED, **STATE_SPACE, "num_local_experts": 0, "num_experts_per_tok": 0},
        layer_types=LINEAR,
        shared_intermediate_size=40,
        residual_multiplier=0.7,
        embedding_multiplier=2.0,
        logits_scaling=3.0,
    ),
    "Bamba": _recurrent(hf.BambaConfig, **_GROUPED, **STATE_SPACE, attn_layer_indices=[1]),
    "Falcon-H1": _recurrent(
        hf.FalconH1Config, **_GROUPED, **STATE_SPACE, mamba_d_ssm=48, mlp_multipliers=[0.8, 1.3], lm_head_multiplier=0.6
    ),
    "Jamba": _recurrent(
        hf.JambaConfig,
        **_GROUPED,
        num_experts=1,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=5,
        mamba_dt_rank=4,
    ),
    "LFM2": _recurrent(
        hf.Lfm2Config,
        **_GROUPED,
        layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
        conv_L_cache=3,
    ),
    "Nemotron-H": _recurrent(
        hf.NemotronHConfig,
        **_GROUPED,
        layers_block_type=["linear_attention", "mlp", "full_attention", "mlp", "linear_attention", "mlp"],
        head_dim=4,
        ssm_state_size=5,
        mamba_num_heads=6,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=CHUNK,
    ),
    "RecurrentGemma": _causal_sequence(
        hf.RecurrentGemmaConfig,
        **{
            key: value for key, value in _GROUPED.items() if key not in ("max_position_embeddings", "intermediate_size")
        },
        intermediate_size=80,
        lru_width=24,
        attention_window_size=WINDOW,
        head_dim=4,
    ),
    "DeepSeek 3.2, below its limit": _kv_cache(hf.DeepseekV32Config, "eager", **_INDEXED, index_topk=32),
    "DeepSeek 3.2, above its limit": _kv_cache(hf.DeepseekV32Config, "eager", **_INDEXED, index_topk=3),
    "GLM-MoE-DSA": _kv_cache(hf.GlmMoeDsaConfig, "eager", **_INDEXED, index_topk=3),
    "Doge": _kv_cache(hf.DogeConfig, "eager", **_GROUPED, keep_window_size=3),
}


def tiny_model(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, engine: str = "auto", products: str = "exact"
) -> LanguageModel:
    """A family's tiny model, with weights so large that neurons matter, and a tokenizer of one word a token."""
    torch.manual_seed(seed)
    family = {**FAMILIES, **HYBRIDS}[name]
    build = hf.AutoModelForMaskedLM if family.is_masked else hf.AutoModelForCausalLM
    model = build.from_config(family.config(), attn_implementation=family.attention)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            elif "bias" in parameter_name:
                parameter.normal_(0, 0.1)
            elif parameter_name.endswith("self_attn.A"):
                # Doge's keys would all be worth the same.
                parameter.normal_(0, 0.5)
    return LanguageModel(model.to(dtype), tiny_tokenizer(), name=name, engine=engine, products=products)


def tiny_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Words `w0` to `w96`, one token each; the last is the mask token of masked models."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token=f"w{MASK}")

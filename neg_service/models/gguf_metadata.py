"""What the metadata of a .gguf file says of a model, against the configuration that transformers makes of it.

transformers has a table of keys for each architecture; what is not in it is left at the default of the class, without a
word. Here every key of the architecture (`llama.…`) is read: as what the configuration has already, as a number that
can be put there, as one that shapes of tensors decide, or else as a reason to refuse the file. The one number that
llama.cpp derives from the number of layers, and no file says, is derived here too.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from neg_service.errors import ModelError, shortened
from neg_service.models.text_config import text_config

log = logging.getLogger(__name__)

# Sizes, which the shapes and names of tensors repeat, so that a wrong one is found there; numbers that no pass uses;
# parts for other input than text.
_HARMLESS = re.compile(
    r"context_length|block_count|vocab_size|embedding_length(_out|_per_layer_input)?|features_length|"
    r"(expert_|expert_shared_)?feed_forward_length|leading_dense_block_count|full_attention_interval|"
    r"attention\.(head_count_kv|(key|value)_length(_swa)?|relative_buckets_count)|ssm\.\w+|shortconv\.l_cache|"
    r"tensor_data_layout|nextn_predict_layers|decoder_start_token_id|decoder_block_count|pooling_type|"
    r"rope\.scaling\.finetuned|(vision|audio|mm)\..*"
)
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
# Keys, and the fields of a configuration that may take them: those that are there.
_FIELDS: dict[str, tuple[str, ...]] = {
    "attention.layer_norm_epsilon": _EPSILONS,
    "attention.layer_norm_rms_epsilon": _EPSILONS,
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.head_count": ("num_attention_heads",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok", "top_k_experts"),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "logit_scale": ("logit_scale",),
}
# Of those, what may be put into a configuration that is made already: nothing else is derived from it.
_SETTABLE = {
    "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "attn_logit_softcapping", "final_logit_softcapping",
}  # fmt: skip
# Values that change nothing, where a configuration has no field for them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "expert_gating_func": (0, 1),
    "expert_weights_scale": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attention.output_scale": (0, 1),
}
# What says how rotary embeddings are scaled says nothing where they are not.
_SCALING = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}


# Gemma 2 of 27 billion parameters: llama.cpp scales its attention by the width of the model over its heads.
_LAYERS_OF_GEMMA_2_27B = 46


def apply_metadata(file: Path, config: PreTrainedConfig, metadata: Mapping[str, Any]) -> None:
    """Put into a configuration what transformers left out of it, in place.

    Raises:
        ModelError: a key that neither the configuration has as it is, nor can take; by its name and value.
    """
    architecture = metadata["general.architecture"]
    text = text_config(config)
    _require_rotary_scaling(file, text, metadata)
    if architecture == "gemma2" and text.num_hidden_layers == _LAYERS_OF_GEMMA_2_27B:
        text.query_pre_attn_scalar = text.hidden_size // text.num_attention_heads
    for full, value in metadata.items():
        key = full.removeprefix(f"{architecture}.")
        if key == full or _is_known(text, key, value, _mapped(architecture)):
            continue
        if not _put(text, key, value):
            raise ModelError(
                f"{full}={shortened(value)} would be lost where GGUF is unpacked{_what_there_is(text, key)}: give "
                "the model's directory with safetensors",
                setting="model.source",
                value=file,
            )
        log.info("%s: %s=%s is taken from the file's metadata", file.name, full, shortened(value))


def is_rotary_scaled(config: PreTrainedConfig) -> bool:
    """Whether a configuration scales rotary embeddings, in layers of any type; those of a part of a head are not."""
    return any(rope.get("rope_type", "default") not in ("default", "proportional") for rope in _ropes(config))


def _require_rotary_scaling(file: Path, config: PreTrainedConfig, metadata: Mapping[str, Any]) -> None:
    name = f"{metadata['general.architecture']}.rope.scaling.type"
    scaling = metadata.get(name, "none")
    if scaling != "none" and not is_rotary_scaled(config):
        raise ModelError(
            f"has scaled rotary embeddings ({name}={scaling}), which are lost where GGUF is unpacked: give the "
            "model's directory with safetensors",
            setting="model.source",
            value=file,
        )


def _mapped(architecture: str) -> Mapping[str, str | None]:
    # transformers writes the names of some architectures with a line below: qwen2_moe, gpt_oss.
    names: dict[str, Mapping[str, str | None]] = {
        re.sub("[-_]", "", name): keys for name, keys in GGUF_CONFIG_MAPPING.items()
    }
    return names.get(re.sub("[-_]", "", architecture), {})


def _is_known(config: PreTrainedConfig, key: str, value: Any, mapped: Mapping[str, str | None]) -> bool:
    """Whether the configuration says the same, or nothing depends on what it says."""
    if _HARMLESS.fullmatch(key):
        return True
    if key.startswith("rope."):
        return _is_known_rope(config, key, value)
    if key == "attention.sliding_window_pattern":
        return _is_pattern(config, value)
    found = [own for own in _FIELDS.get(key, (key,)) if hasattr(config, own)]
    if found:
        return all(_is_same(getattr(config, own), value) for own in found)
    return mapped.get(key) is not None or value in _NEUTRAL.get(key, ()) or _is_none(key, value)


def _is_known_rope(config: PreTrainedConfig, key: str, value: Any) -> bool:
    ropes = list(_ropes(config))
    if key in ("rope.freq_base", "rope.freq_base_swa"):
        own = _rope_of(config, key)
        return own is not None and _is_same(own.get("rope_theta"), value)
    if key in ("rope.dimension_count", "rope.dimension_count_swa"):
        return not ropes or any(_is_same(own, value) for own in _rotary_dimensions(config))
    if key == "rope.dimension_sections":
        sections = [own for own in value if own] if isinstance(value, list) else [value]
        return not any(sections) or any(list(rope.get("mrope_section") or ()) == sections for rope in ropes)
    if key == "rope.scaling.type" and value != "none":
        return any(rope.get("rope_type") == value for rope in ropes)
    if key in _SCALING and is_rotary_scaled(config):
        return any(_is_same(rope.get(_SCALING[key]), value) for rope in ropes)
    if key in _SCALING and key != "rope.scaling.factor":
        return True
    return value in _NEUTRAL.get(key, ())


def _put(config: PreTrainedConfig, key: str, value: Any) -> bool:
    """Whether the configuration could take the value, and has it now."""
    if key in ("rope.freq_base", "rope.freq_base_swa"):
        rope = _rope_of(config, key)
        # Of scaled angles the base is one of several numbers, which belong together.
        if rope is None or rope.get("rope_type", "default") != "default":
            return False
        rope["rope_theta"] = float(value)
        return True
    fields = [own for own in _FIELDS.get(key, ()) if hasattr(config, own)]
    # Which layers have a window was decided when the configuration was made.
    has_types = getattr(config, "layer_types", None) or hasattr(config, "use_sliding_window")
    if key not in _SETTABLE or len(fields) != 1 or (key == "attention.sliding_window" and has_types):
        return False
    setattr(config, fields[0], None if _is_none(key, value) else value)
    return True


def _what_there_is(config: PreTrainedConfig, key: str) -> str:
    """What would be used in the place of a value, for a message."""
    rope = _rope_of(config, key) if key.startswith("rope.freq_base") else None
    if rope is not None:
        return f" (the configuration has rope_theta={rope.get('rope_theta')})"
    shown = [f"{own}={shortened(getattr(config, own))}" for own in _FIELDS.get(key, (key,)) if hasattr(config, own)]
    return f" (the configuration has {', '.join(shown)})" if shown else ""


def _ropes(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The parameters of rotary embeddings: one set, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [own for own in rope.values() if isinstance(own, dict)]
    yield from nested or ([rope] if rope else [])


def _rope_of(config: PreTrainedConfig, key: str) -> dict[str, Any] | None:
    """The set that a key's base belongs to, if there is one."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(own, dict) for own in rope.values()):
        return rope.get("sliding_attention" if key.endswith("_swa") else "full_attention")
    return None if key.endswith("_swa") else rope or None


def _rotary_dimensions(config: PreTrainedConfig) -> Iterator[float]:
    """Of a head, those that are rotated, in each kind of layer."""
    usual = config.hidden_size // config.num_attention_heads
    heads = {getattr(config, "head_dim", None) or usual, getattr(config, "global_head_dim", None)} - {None}
    for rope in _ropes(config):
        factor = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
        yield from (int(head * factor) for head in heads)
        if rope.get("rope_type") == "proportional":
            # The others of a head are rotated by an angle of zero.
            yield from heads


def _is_pattern(config: PreTrainedConfig, value: Any) -> bool:
    """Whether layers have a window where the file says: in a list, or all but every n-th."""
    types = getattr(config, "layer_types", None)
    if not types:
        return False
    slides = [own == "sliding_attention" for own in types]
    expected = value if isinstance(value, list) else [bool((layer + 1) % value) for layer in range(len(types))]
    return slides == [bool(own) for own in expected]


def _is_same(own: Any, value: Any) -> bool:
    if isinstance(value, list):
        # Of one number a layer the configuration has the largest, where other layers have none.
        return own == value or (isinstance(own, int) and {*value} - {0} == {own})
    if own is None or isinstance(own, str) or isinstance(value, str):
        return own == value or (own is None and value in (0, False))
    # The file has 32 bits.
    return isinstance(own, int | float) and math.isclose(own, value, rel_tol=1e-6)


def _is_none(key: str, value: Any) -> bool:
    """Whether a window, a cap, or a number of experts is none."""
    return value == 0 and ("window" in key or "softcapping" in key or key.startswith("expert_"))

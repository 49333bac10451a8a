"""A model's configuration as its folder has it: read, checked, and built into a model without weights.

transformers checks the types of most values, and builds whatever passes. What it does not notice is refused here:
numbers that are none, sizes below one, names of activations and rotary embeddings that it does not know. Whatever else
fails is one line too, which names the key that is to blame where one can be found: the one without which it would not
fail.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from neg_service.contents import json_of
from neg_service.errors import ModelError, NegServiceError, nearest, one_line
from neg_service.models.folder import CONFIG, LocalModel

T = TypeVar("T")

_LAYERS = re.compile(r"(num_hidden_layers|num_layers|n_layers?)")
# The deepest models have a few hundred; a mistyped number would be built for hours.
_MOST_LAYERS = 10_000
_SIZES = re.compile(
    r"vocab_size|hidden_size|n_embd|d_model|dim|(moe_)?intermediate_size|n_inner|ffn_dim|ffn_hidden_size|hidden_dim|"
    r"embedding_size|word_embed_proj_dim|head_dim|(num_attention|num_key_value|num_kv|num|n)_heads?|"
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|original_max_position_embeddings|sliding_window"
)
_EPSILONS = re.compile(r"(.*_)?eps(ilon)?")
_POSITIVE = re.compile(r"rope_theta|rotary_emb_base|rope_local_base_freq|partial_rotary_factor|rotary_pct")
# What rotary embeddings have that are not scaled, and need no type for.
_UNSCALED = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}
_ACTIVATIONS = re.compile(r"hidden_act|hidden_activation|activation_function|activation|conv_act")
# Its infinity is meant, in models that other checks refuse by name.
_MAY_BE_INFINITE = "time_step_limit"


def read_config(local: LocalModel, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, as transformers understands it.

    Raises:
        ModelError: no JSON, or a value that cannot be; the message names the key.
    """
    raw = _json_of(local)
    _check(local, raw)
    try:
        config = AutoConfig.from_pretrained(local.directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # Any class of configuration may run, also one that comes with the model.
        raise ModelError(
            f"cannot be loaded: {CONFIG}: {_said(error, raw)}", setting="model.source", value=local.directory
        ) from error
    if "auto_map" not in raw and (reason := _unused_parameters(raw, config)):
        raise ModelError(f"cannot be loaded: {CONFIG}: {reason}", setting="model.source", value=local.directory)
    return config


def without_weights(
    auto_class: Any, config: Any, local: LocalModel, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a configuration, on the meta device.

    Raises:
        ModelError: it cannot be built, naming the key that is to blame; its buffers do not fit the machine's memory.
    """

    def build(own: Any) -> PreTrainedModel:
        with torch.device("meta"):
            built: PreTrainedModel = auto_class.from_config(own, trust_remote_code=trust_remote_code)
            return built

    try:
        model = build(config)
    except Exception as error:  # Any architecture's code may run.
        raw = _json_of(local)
        key = _to_blame(raw, type(config), build)
        reason = f"{key}={_shown(raw[key])}: {one_line(error)}" if key else _said(error, raw)
        raise ModelError(
            f"cannot be loaded: {CONFIG}: {reason}", setting="model.source", value=local.directory
        ) from error
    _require_room_for_buffers(model, local)
    return model


def guarded(load: Callable[[], T], source: str | Path, what: str = "") -> T:
    """What `load` gives; whatever goes wrong in other people's code is one line.

    Raises:
        ModelError: with the error's own words.
    """
    try:
        return load()
    except NegServiceError:
        raise
    except Exception as error:  # tokenizers raises Exception itself, and a model's own code anything.
        words = str(error) if isinstance(error, OSError) and error.filename is None else one_line(error)
        raise ModelError(
            f"{what}cannot be loaded: {' '.join(words.split())}", setting="model.source", value=source
        ) from error


def auto_class_of(config: Any, name: str) -> Any:
    """What a checkpoint says it is, or else what its kind is; many families (BERT) can be built as either.

    Raises:
        ModelError: an encoder-decoder, or neither a causal nor a masked language model.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ModelError(
            f"{name} ({kind}) is an encoder-decoder; a causal or masked language model is needed", change="model.source"
        )
    if any(map(is_masked_architecture, config.architectures or [])):
        return AutoModelForMaskedLM
    is_causal, is_masked = (
        type(config) in known for known in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING)
    )
    # Whatever head it was saved with: unless it is a decoder, every position sees all others.
    if is_masked and not (is_causal and getattr(config, "is_decoder", False)):
        return AutoModelForMaskedLM
    # Code that comes with a model is in no list of transformers'.
    if not is_causal and not getattr(config, "auto_map", None):
        raise ModelError(
            f"{name} ({kind}) is neither a causal nor a masked language model: choose another model.source",
            change="model.source",
        )
    return AutoModelForCausalLM


def is_masked_architecture(architecture: str) -> bool:
    """Whether a class of transformers is a masked language model, by its name."""
    return architecture.endswith("ForMaskedLM")


def _json_of(local: LocalModel) -> dict[str, Any]:
    file = local.directory / CONFIG
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"cannot be loaded: {CONFIG} is no JSON: {one_line(error)}", setting="model.source", value=local.directory
        ) from error
    if not isinstance(raw, dict):
        raise ModelError(f"cannot be loaded: {CONFIG} is no JSON object", setting="model.source", value=local.directory)
    # Of a key that stands twice, the last would be taken without a word.
    json_of(f"model.source={local.directory}: cannot be loaded: {CONFIG}", file.read_bytes(), ModelError)
    return raw


def _check(local: LocalModel, raw: dict[str, Any]) -> None:
    """Refuse what transformers would build without a word, or take apart in a way that says nothing to a person."""
    for path, key, value in _values(raw):
        if key == "factor" and path.startswith("rope_") and isinstance(value, int | float) and value <= 0:
            raise ModelError(
                f"cannot be loaded: {CONFIG}: {path}={_shown(value)}: must be more than 0",
                setting="model.source",
                value=local.directory,
            )
        if key == "sliding_window" and raw.get("use_sliding_window") is False:
            continue
        reason = _objection(key, value) or (_objection_to_name(path, key, value) if "auto_map" not in raw else None)
        if reason:
            raise ModelError(
                f"cannot be loaded: {CONFIG}: {path}={_shown(value)}: {reason}",
                setting="model.source",
                value=local.directory,
            )
    # A model that comes with its own code may have keys of its own.
    reason = None if "auto_map" in raw else _objection_to_scaling(raw)
    if reason:
        raise ModelError(f"cannot be loaded: {CONFIG}: {reason}", setting="model.source", value=local.directory)


def _objection_to_scaling(config: dict[str, Any], above: str = "") -> str | None:
    """Numbers of rotary embeddings that transformers would leave unused without a word."""
    for key in ("rope_scaling", "rope_parameters"):
        rope, theta = config.get(key), config.get("rope_theta")
        if isinstance(rope, dict):
            reason = _unused_scaling(f"{above}{key}", rope) or _unused_theta(f"{above}{key}", rope, above, theta)
            if reason:
                return reason
    text = config.get("text_config")
    return _objection_to_scaling(text, f"{above}text_config.") if isinstance(text, dict) else None


def _unused_scaling(place: str, rope: dict[str, Any]) -> str | None:
    """What is wrong with the parameters of one kind of layers, or of each."""
    nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
    if nested:
        return next(filter(None, (_unused_scaling(f"{place}.{key}", value) for key, value in nested.items())), None)
    kind = rope.get("rope_type", rope.get("type"))
    given = {key: value for key, value in rope.items() if value is not None and key not in _UNSCALED}
    if kind is None:
        # A factor of 1 scales nothing.
        key = next((key for key, value in given.items() if (key, value) != ("factor", 1)), None)
    else:
        key = "factor" if kind == "default" and given.get("factor", 1) != 1 else None
    if key is None:
        return None
    has = "has no rope_type" if kind is None else f"has rope_type={_shown(kind)}"
    return (
        f"{place}.{key}={_shown(rope[key])}: would not be used, for {place} {has}: give the kind of scaling as "
        "rope_type (such as linear), or leave it out"
    )


def _unused_theta(place: str, rope: dict[str, Any], above: str, theta: Any) -> str | None:
    full = rope.get("full_attention")
    own = (full if isinstance(full, dict) else rope).get("rope_theta")
    if own is None or theta is None or own == theta:
        return None
    return (
        f"{above}rope_theta={_shown(theta)}: would not be used, for {place} has rope_theta={_shown(own)}: leave out "
        "the one that is not meant"
    )


def _unused_parameters(raw: dict[str, Any], config: Any, above: str = "") -> str | None:
    """What of `rope_parameters` is not in the configuration that was made: a `rope_scaling` beside it hid it."""
    given, made = raw.get("rope_parameters"), getattr(config, "rope_parameters", None)
    if raw.get("rope_scaling") and isinstance(given, dict) and isinstance(made, dict):
        for key, value in given.items():
            if value is not None and not _is_in("rope_type" if key == "type" else key, value, made):
                return (
                    f"{above}rope_parameters.{key}={_shown(value)}: would not be used, for there is a rope_scaling "
                    "beside it that does not say the same: leave out the one that is not meant"
                )
    text = raw.get("text_config")
    return (
        _unused_parameters(text, config.get_text_config(), f"{above}text_config.") if isinstance(text, dict) else None
    )


def _is_in(key: str, value: Any, made: dict[str, Any]) -> bool:
    """Whether parameters of rotary embeddings say so; those that are made may be of each kind of layers."""
    if isinstance(value, dict):
        own = made.get(key)
        return isinstance(own, dict) and all(_is_in(inner, one, own) for inner, one in value.items() if one is not None)
    kinds = [own for own in made.values() if isinstance(own, dict)]
    return all(own.get(key) == value for own in kinds) if kinds else made.get(key) == value


def _values(raw: dict[str, Any], above: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every value with its path and its key; those of lists have their list's."""
    for key, value in raw.items():
        path = f"{above}{key}"
        yield path, key, value
        if isinstance(value, dict):
            yield from _values(value, f"{path}.")
        elif isinstance(value, list):
            yield from ((path, key, own) for own in value if isinstance(own, float))


def _objection(key: str, value: Any) -> str | None:
    """What is wrong with a number, if anything is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not math.isfinite(value) and key != _MAY_BE_INFINITE:
        return "must be a finite number"
    if is_number and _LAYERS.fullmatch(key) and not 1 <= value <= _MOST_LAYERS:
        return f"must be from 1 to {_MOST_LAYERS}"
    if is_number and _SIZES.fullmatch(key) and value < 1:
        return "must be at least 1"
    if is_number and _EPSILONS.fullmatch(key) and value < 0:
        return "must be 0 or more"
    if is_number and _POSITIVE.fullmatch(key) and value <= 0:
        return "must be more than 0"
    return None


def _objection_to_name(path: str, key: str, value: Any) -> str | None:
    """What is wrong with a name, if anything is; a model that comes with its own code may have names of its own."""
    parts = path.split(".")
    # The parts that read images or sound are not measured.
    if any(part.endswith("_config") and part != "text_config" for part in parts[:-1]):
        return None
    if _ACTIVATIONS.fullmatch(key) and isinstance(value, str) and value not in ACT2FN:
        return f"is no activation that is known; {nearest(value, list(ACT2FN))}known are {', '.join(sorted(ACT2FN))}"
    if key in ("rope_type", "type") and any(part.startswith("rope_") for part in parts[:-1]):
        return _objection_to_rope(value)
    if key in ("dtype", "torch_dtype") and not _is_dtype(value):
        return "must be the name of a torch dtype, such as float32"
    if path == "architectures" and value is not None:
        is_list = isinstance(value, list) and all(isinstance(own, str) for own in value)
        return None if is_list else "must be a list of names"
    if path == "model_type" and not isinstance(value, str):
        return "must be a name"
    return None


def _objection_to_rope(value: Any) -> str | None:
    # `mrope` and `default` are no functions of their own.
    known = {"default", "mrope", "su", *ROPE_INIT_FUNCTIONS}
    if value is None or (isinstance(value, str) and value in known):
        return None
    near = nearest(value, sorted(known)) if isinstance(value, str) else ""
    return f"is no kind of rotary embedding that is known; {near}known are {', '.join(sorted(known))}"


def _is_dtype(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_dtype, value.values()))
    is_named = isinstance(value, str) and isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)
    return value in (None, "auto") or is_named


def _said(error: BaseException, raw: dict[str, Any]) -> str:
    """An error's words, with the key that it is about where it tells."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, StrictDataclassError) and len(lines) > 1:
        words = lines[1].split(": ", 1)[-1]
        named = re.search(r"for field '(\w+)'", lines[0])
        if named is None:
            return words
        field = named.group(1)
        # A field may be known to the file by an older name.
        words = words.split(". Errors:")[0].replace(f"Field '{field}' ", "").replace("<class '", "").replace("'>", "")
        return f"{field}={_shown(raw[field])}: {words}" if field in raw else f"{field}: {words}"
    if isinstance(error, KeyError) and error.args:
        paths = [path for path, _, value in _values(raw) if value == error.args[0]]
        return f"{paths[0]}={_shown(error.args[0])} is not known" if paths else f"has no {error.args[0]}"
    return one_line(error)


def _to_blame(raw: dict[str, Any], config_class: Any, build: Callable[[Any], Any]) -> str | None:
    """The key without which a configuration can be built: the default in its place mends it."""
    for key in sorted(raw, key=lambda own: _is_usual(raw[own])):
        without = {own: value for own, value in raw.items() if own not in (key, "architectures", "auto_map")}
        try:
            build(config_class.from_dict(without))
        except Exception:  # noqa: BLE001 - the same code that has failed already
            continue
        return key
    return None


def _is_usual(value: Any) -> bool:
    """Numbers above 0 and names are seldom what breaks a configuration."""
    return isinstance(value, str | bool) or (isinstance(value, int | float) and 0 < value < 1e6)


def _require_room_for_buffers(model: PreTrainedModel, local: LocalModel) -> None:
    """Tables of positions grow with what the configuration promises, and are made whatever is used of them."""
    sizes = {name: own.nbytes for name, own in model.named_buffers()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sum(sizes.values()) > memory:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ModelError(
            f"cannot be loaded: {CONFIG}: {largest} would be {sizes[largest] / 2**30:.0f} GiB, and this machine "
            f"has {memory / 2**30:.0f}: check the numbers of positions (max_position_embeddings, n_positions)",
            setting="model.source",
            value=local.directory,
        )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"

"""Loading a model: weights and tokenizer from wherever they are, onto the devices asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel

from neg_service.config import ModelConfig
from neg_service.errors import ConfigurationError, ModelError, told_by_parameters
from neg_service.models.configuration import auto_class_of, guarded, read_config, without_weights
from neg_service.models.cpu_product import choose_product, require_known_product
from neg_service.models.engines.difference_products import EXACT
from neg_service.models.feed_forward import find_feed_forward
from neg_service.models.folder import LocalModel, damaged_json
from neg_service.models.inspection import require_measurable
from neg_service.models.language_model import LanguageModel
from neg_service.models.library_log import hear_libraries
from neg_service.models.placement import checked_devices, device_map, require_room
from neg_service.models.quantized import state_of, take_quantization
from neg_service.models.source import fetch
from neg_service.models.weights import rehearse, with_weights
from neg_service.settings import check_fields

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "tekken.json")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@told_by_parameters()
def load_model(
    source: str | os.PathLike[str] = "smollm2",
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | Sequence[str] = "auto",
    trust_remote_code: bool = False,
    cpu_product: str = "auto",
    engine: str = "auto",
    products: str = "exact",
) -> LanguageModel:
    """Load a causal or masked language model for measuring.

    Args:
        source: `smollm2` (the default model), a hub id, a directory with safetensors, or a .gguf file; a text or path.
        revision: branch, tag or commit, for a hub id.
        dtype: float64, float32, bfloat16 or float16; float32 computes without TF32.
        device: a torch device, or `auto`: a GPU if there is one. Several, `["cuda:0", "cuda:1"]`, share the layers of
            a model that is too large for one.
        trust_remote_code: run Python code that comes with the model; off unless asked for.
        cpu_product: what multiplies matrices in float32 on a CPU: `torch`, `onednn`, or `auto`: what is
            measured to be faster (`cpu_product.py`).
        engine: how rows of prompts are run: `auto`, the best that passes the self-check, or the name of one; one that
            does not fit is refused when the model is first measured.
        products: how differences are multiplied with weights in bfloat16, in sweeps: `exact` or `fast`.

    Raises:
        ModelError: nothing usable at `source`, files that the model would not take as they are, or an architecture
            whose neurons are not known.
        ConfigurationError: an unknown dtype, product, engine or kind of products, or a device that is not there.
    """
    # Whatever is no text or path is refused where it is looked for.
    return loaded(
        ModelConfig(cast(str, source), revision, dtype, device, trust_remote_code, cpu_product, engine, products)
    )


def loaded(settings: ModelConfig) -> LanguageModel:
    """`load_model` for those who have settings, under whose keys it refuses what cannot be."""
    chosen_dtype = checked_dtype(settings.dtype)
    check_engine_settings(settings)
    devices = checked_devices(settings.device)
    require_known_product(settings.cpu_product)
    trust_remote_code = settings.trust_remote_code
    local = fetch(settings.source, settings.revision, trust_remote_code=trust_remote_code)
    source = os.fsdecode(settings.source)
    if chosen_dtype == torch.float32:
        torch.set_float32_matmul_precision("highest")
    config = read_config(local, trust_remote_code)
    quantization = take_quantization(config, local.name)
    auto_class = auto_class_of(config, local.name)
    empty = without_weights(auto_class, config, local, trust_remote_code)
    require_measurable(empty)
    find_feed_forward(empty)
    tensors = rehearse(local, auto_class, empty, trust_remote_code, source, quantization)
    places: dict[str, Any] = {}
    if devices[0].type == "cuda":
        placed = device_map(empty, devices) if len(devices) > 1 else {"": devices[0]}
        require_room(empty, chosen_dtype, placed, source)
    if len(devices) > 1:
        # Read straight to where they belong: all of the weights may not fit this machine's memory.
        places["device_map"] = device_map(empty, devices)
    state = state_of(tensors, chosen_dtype) if quantization else None
    model: PreTrainedModel = guarded(
        lambda: with_weights(local, auto_class, empty, trust_remote_code, state, dtype=chosen_dtype, **places),
        source,
    )
    if not places:
        model = model.to(devices[0])
    return LanguageModel(
        model,
        load_tokenizer(local, trust_remote_code),
        name=local.name,
        identity=local.identity,
        dequantised=quantization.dequantised(tensors) if quantization else None,
        cpu_product=choose_product(model, settings.cpu_product) if devices[0].type == "cpu" else None,
        engine=settings.engine,
        products=settings.products,
    )


def load_tokenizer(local: LocalModel, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model's weights.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    hear_libraries()
    if not any(list(local.directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise ModelError(
            f"has no tokenizer ({', '.join(_TOKENIZER_FILES)})", setting="model.source", value=local.directory
        )
    damaged = damaged_json(local.directory)
    return guarded(
        lambda: AutoTokenizer.from_pretrained(local.directory, trust_remote_code=trust_remote_code),
        local.directory,
        f"the tokenizer{f' ({damaged})' if damaged else ''} ",
    )


def checked_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a name in the configuration."""
    if dtype not in DTYPES:
        raise ConfigurationError(setting="model.dtype", value=dtype, allowed=f"one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_engine_settings(settings: ModelConfig) -> None:
    """Refuse an unknown engine or way to check it, and products that do not exist for weights of the model's precision.

    Raises:
        ConfigurationError: naming what there is.
    """
    check_fields("model", settings, ("engine", "products", "self_check"))
    if settings.products != EXACT and settings.dtype != "bfloat16":
        raise ConfigurationError(
            f"there are others of weights in bfloat16 only, not in model.dtype={settings.dtype}",
            setting="model.products",
            value=settings.products,
            allowed=EXACT,
        )


def set_threads(threads: int) -> None:
    """How many CPU threads torch uses in this process."""
    torch.set_num_threads(max(1, threads))

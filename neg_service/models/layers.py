"""The list of a model's layers, found in one place for all that asks for it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from neg_service.errors import ModelError
from neg_service.models.byte_patches import layers_on_bytes
from neg_service.models.folder import OTHER_INPUT
from neg_service.models.repeated_layers import stored_layers
from neg_service.models.text_config import text_config


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Where the layers that read text are in a model, and the list of them, as they are stored.

    Raises:
        ModelError: there is no list of as many as the configuration says.
    """
    if (stored := stored_layers(model)) is not None:
        return stored
    if (on_bytes := layers_on_bytes(model)) is not None:
        return on_bytes
    name, config = type(model).__name__, text_config(model.config)
    n_layers = _number(config)
    if n_layers is None:
        raise ModelError(
            f"the configuration of {name} says of no one stack of layers how many there are, so it is not known what "
            "its layers are: choose another model.source",
            change="model.source",
        )
    # Of a model of images and text, the part that reads text.
    text = model.base_model.get_decoder() or model.base_model
    path = next((path for path, own in model.named_modules() if own is text), "")
    lists = [
        (f"{path}.{own_path}".lstrip("."), own)
        for own_path, own in text.named_modules()
        if isinstance(own, nn.ModuleList) and len(own) == n_layers
    ]
    # Some name no part that reads text (GIT): there the names of the others have to do.
    found = next((own for own in lists if not OTHER_INPUT.search(own[0])), None)
    if found is None:
        raise ModelError(
            f"{name} has no list of {n_layers} layers; its neurons are not known: choose another model.source",
            change="model.source",
        )
    return found


def _number(config: Any) -> int | None:
    """How many layers; a decoder of an encoder-decoder, used alone, has a number beside the encoder's."""
    if config.model_type == "longcat_flash":
        # It counts layers' two attentions under the usual name.
        return int(config.num_layers)
    names = ("num_hidden_layers",) if config.is_encoder_decoder else ("decoder_layers", "num_decoder_layers")
    found = next((getattr(config, own, None) for own in (*names, "num_hidden_layers") if hasattr(config, own)), None)
    return found if type(found) is int else None

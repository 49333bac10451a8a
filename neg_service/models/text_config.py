"""Which part of a model's configuration is about the layers that read its tokens: one function for all that asks."""

from __future__ import annotations

from typing import Any

# Where transformers' own answer is the whole configuration, which says of no one stack of layers what it is like.
_PARTS = {"blt": "decoder_config"}


def text_config(config: Any) -> Any:
    """The part with the numbers of layers, of heads and of features; most configurations are that themselves."""
    own = config.get_text_config()
    part = _PARTS.get(own.model_type)
    return own if part is None else getattr(own, part)

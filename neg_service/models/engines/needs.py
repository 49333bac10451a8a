"""What engines need of a model that its configuration tells: each gives why a model lacks it, or None.

The self-check cannot tell these: on its few tokens a wrong engine would look right.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from neg_service.models.byte_patches import runs_on_bytes
from neg_service.models.text_config import text_config

_PLAIN_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
# Which keys are looked at is chosen anew for each token, from all that are kept.
_INDEXED_ATTENTION = "indexed_attention"
_STATES = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "recurrent", "mamba"}
_SPARSE = ("keep_window_size", "index_topk", "attention_window")


def has_states(model: PreTrainedModel) -> bool:
    """Whether layers are recurrent, wholly or beside attention."""
    return bool(model._is_stateful or kinds_of_layers(model) & _STATES)


def lacks_dense_attention(model: PreTrainedModel) -> str | None:
    """Attention that looks at other tokens when a prompt is longer."""
    config = _text(model)
    if (blocks := _lacks_tokens(model)) is not None:
        return blocks
    own = next((key for key in _SPARSE if getattr(config, key, None)), None)
    if own is None and _INDEXED_ATTENTION in kinds_of_layers(model):
        own = "layer_types"
    if own is None:
        return None
    return f"sparse attention ({own}={getattr(config, own)}), which depends on a prompt's length"


def lacks_keys_and_values(model: PreTrainedModel) -> str | None:
    """Layers of which tokens leave something else than keys and values that every later token may look at."""
    if (blocks := _lacks_tokens(model)) is not None:
        return blocks
    kinds = kinds_of_layers(model) - _PLAIN_ATTENTION - {_INDEXED_ATTENTION}
    if not (model._is_stateful or kinds):
        return None
    what = f"layers of the kinds {', '.join(sorted(kinds))}" if kinds else "a recurrent state"
    return f"{what}, which keep no keys and values that rows could share"


def _lacks_tokens(model: PreTrainedModel) -> str | None:
    """Layers that run on blocks of tokens, which a single one is not."""
    if runs_on_bytes(model):
        return "layers that run on patches of several bytes, which a single one is not"
    if getattr(_text(model), "attention_type", None) == "block_sparse":
        return "sparse attention (attention_type=block_sparse), which depends on a prompt's length"
    return None


def _text(model: PreTrainedModel) -> Any:
    return text_config(model.config)


def kinds_of_layers(model: PreTrainedModel) -> set[str]:
    """What kinds of layers a configuration names, if it does."""
    return set(getattr(_text(model), "layer_types", None) or ())

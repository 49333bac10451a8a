"""What engines need of a model that its configuration tells: each gives why a model lacks it, or None.

The self-check cannot tell these: on its few tokens a wrong engine would look right.
"""

from __future__ import annotations

from transformers import PreTrainedModel

_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
_SPARSE = ("keep_window_size", "index_topk", "attention_window")


def lacks_dense_attention(model: PreTrainedModel) -> str | None:
    """Attention that looks at other tokens when a prompt is longer."""
    config = model.config.get_text_config()
    own = next((key for key in _SPARSE if getattr(config, key, None)), None)
    if own is None and getattr(config, "attention_type", None) == "block_sparse":
        own = "attention_type"
    if own is None:
        return None
    return (
        f"{type(model).__name__} has sparse attention ({own}={getattr(config, own)}), which depends on a prompt's "
        f"length: choose a model with dense or sliding attention as model.source"
    )


def lacks_keys_and_values(model: PreTrainedModel) -> str | None:
    """Layers that are no attention, so that tokens leave something else than keys and values, or a mixture of both."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _ATTENTION_KINDS
    if not (model._is_stateful or kinds):
        return None
    what = f"layers of the kinds {', '.join(sorted(kinds))}" if kinds else "a recurrent state"
    return (
        f"{type(model).__name__} has {what}, which keep no keys and values that rows could share: choose a model with "
        f"attention alone as model.source"
    )

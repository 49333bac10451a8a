"""The slow way that fits every causal architecture: rows of a batch over a repeated key/value cache.

Some architectures (GPT-J, Falcon, BLOOM, MPT, GPT-Neo) compute attention in code of their own, with position biases
that the branch function knows nothing of. They know transformers' cache, though: the tokens before the last run once
into one, and the last token runs in a batch of rows, over the same keys and values in every row. One prompt at a time,
so that nothing is padded; a header that prompts share still runs once for all of them.

A transformers cache changes in place. Here its layers are frozen: they hand out the prefix with the new token behind
it, a layer at a time, and keep nothing.

Axes: R rows, G key/value heads, C header tokens, T prefix tokens, D head size, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from neg_service.models.branches import Header
from neg_service.models.head import exact_head_gradient


class CachedRows:
    """Rows of one prompt of a causal model: its last token over a frozen cache of the tokens before; see `Rows`."""

    targets_share_rows = False

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], header: Header) -> None:
        (ids,) = prompts
        self.tokens, self.attended = 1, len(ids)
        config = model.config.get_text_config()
        # Each row's keys and values are copied, and some architectures repeat them for each query head.
        self.copied = 4 * len(ids) * int(config.hidden_size)
        self._model, self._last = model, ids[-1]
        cache = _run(model, ids[len(header.ids) : -1], header)
        self._frozen = None if cache is None else Cache(layers=[_FrozenLayer(layer) for layer in cache.layers])

    def run(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`."""
        last_r1 = torch.tensor([[self._last]] * sum(counts), device=self._model.device)
        options: dict[str, Any] = {"use_cache": False}
        if self._frozen is not None:
            options = {"use_cache": True, "past_key_values": self._frozen}
        with exact_head_gradient(self._model):
            logits: Tensor = self._model(last_r1, **options).logits
        return logits[:, -1]

    def positions(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`; a row is one token."""
        return torch.arange(sum(counts))

    def widened(self, x: Tensor, n_rows: int) -> Tensor:
        """See `Rows`; some architectures run their layers' parts on two axes."""
        return x.expand(n_rows, *x.shape[1:])


@torch.no_grad()
def run_cached_header(model: PreTrainedModel, ids: Sequence[int]) -> Header:
    """Run shared tokens once, for `CachedRows`."""
    cache = _run(model, ids, Header())
    assert cache is not None
    keys = {i: layer.keys[0] for i, layer in enumerate(cache.layers)}
    values = {i: layer.values[0] for i, layer in enumerate(cache.layers)}
    return Header(tuple(ids), keys, values)


@torch.no_grad()
def _run(model: PreTrainedModel, own: Sequence[int], header: Header) -> Any:
    """The cache of a header and the tokens after it; None if there are none at all."""
    if not own and not header.ids:
        return None
    # Without the model's configuration no layer forgets what lies beyond its window: masks decide what is seen.
    cache = DynamicCache()
    for layer in range(len(header.keys_gcd)):
        cache.update(header.keys_gcd[layer][None], header.values_gcd[layer][None], layer)
    if own:
        model.base_model(torch.tensor([list(own)], device=model.device), past_key_values=cache, use_cache=True)
    return cache


class _FrozenLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values [1, G, T, D], the same for every row of any batch."""

    def __init__(self, filled: Any) -> None:
        super().__init__()
        self.keys, self.values = filled.keys, filled.values
        self.dtype, self.device = filled.keys.dtype, filled.keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        rows = len(key_states)
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], -2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], -2),
        )

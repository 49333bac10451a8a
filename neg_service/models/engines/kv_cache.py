"""The slow engine that fits every causal attention: rows of a batch over a repeated key/value cache.

Some architectures (GPT-J, Falcon, BLOOM, MPT, GPT-Neo) compute attention in code of their own, with position biases
that `prefix_attention.py` knows nothing of. They know transformers' cache, though: the tokens before the last run once
into one, and the last token runs in a batch of rows, over the same keys and values in every row. One prompt at a time,
so that nothing is padded; a prefix that prompts share still runs once for all of them.

A transformers cache changes in place. Here its layers are frozen: they hand out the prefix with the new token behind
it, a layer at a time, and keep nothing.

Axes: R rows, G key/value heads, C shared tokens, T prefix tokens, D head size, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from neg_service.models.engines.base import (
    LAST_TOKEN,
    Engine,
    Ids,
    LoadedModel,
    RowSizes,
    SplitPrompt,
    last_token_behind_the_rest,
    require_single_tokens,
)
from neg_service.models.engines.needs import lacks_dense_attention, lacks_keys_and_values
from neg_service.models.engines.prefix_attention import SharedPrefix
from neg_service.models.head import exact_head_gradient


class KeyValueCacheEngine(Engine):
    """Rows of one prompt's last token, each over its own copy of the keys and values."""

    name = "kv_cache"
    reads_at = (LAST_TOKEN,)
    shares_prefixes = True
    runs_prompts_together = False
    targets_share_rows = False

    @classmethod
    def refusal(cls, model: PreTrainedModel) -> str | None:
        """See `Engine`."""
        return lacks_dense_attention(model) or lacks_keys_and_values(model)

    def split(self, prompt: Ids) -> SplitPrompt:
        """See `Engine`."""
        return last_token_behind_the_rest(prompt)

    def prepare(self, prompts: Sequence[SplitPrompt], shared: Ids = ()) -> KeyValueCacheRows:
        """See `Engine`; of one prompt."""
        require_single_tokens(self, prompts)
        (prompt,) = prompts
        return KeyValueCacheRows(self.model, prompt, self.shared_prefix(shared))

    def row_sizes(self, n_tokens: int) -> RowSizes:
        """See `Engine`."""
        return _row_sizes(self.model, n_tokens)

    def run_shared(self, ids: tuple[int, ...]) -> SharedPrefix:
        """See `Engine`."""
        return run_shared_prefix(self.model, ids)


class KeyValueCacheRows:
    """Rows of one prompt's last token over a frozen cache of the tokens before; see `Rows`."""

    tokens = 1
    targets_share_rows = False

    def __init__(self, model: LoadedModel, prompt: SplitPrompt, shared: SharedPrefix) -> None:
        self._model, self._last, self.sizes = model, prompt.row.ids[0], _row_sizes(model, len(prompt.ids))
        cache = _run(model, prompt.prefix[len(shared.ids) :], shared)
        self._frozen = None if cache is None else Cache(layers=[_FrozenLayer(layer) for layer in cache.layers])

    def run(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`."""
        module = self._model.module
        last_r1 = torch.tensor([[self._last]] * sum(counts), device=module.device)
        options: dict[str, Any] = {"use_cache": False}
        if self._frozen is not None:
            options = {"use_cache": True, "past_key_values": self._frozen}
        with self._model.own_experts(), exact_head_gradient(module):
            logits: Tensor = module(last_r1, **options).logits
        return logits[:, -1]

    def positions(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`; a row is one token."""
        return torch.arange(sum(counts))

    def expand_rows(self, x: Tensor, n_rows: int) -> Tensor:
        """See `Rows`; some architectures run their layers' parts on two axes."""
        return x.expand(n_rows, *x.shape[1:])


def _row_sizes(model: LoadedModel, n_tokens: int) -> RowSizes:
    """Keys and values are copied, and some architectures repeat them for each query head."""
    return model.row_sizes(1, n_tokens, 4 * n_tokens * int(model.module.config.get_text_config().hidden_size))


@torch.no_grad()
def run_shared_prefix(model: LoadedModel, ids: Ids) -> SharedPrefix:
    """Run shared tokens once, for `KeyValueCacheRows`; none leave nothing."""
    cache = _run(model, ids, SharedPrefix())
    if cache is None:
        return SharedPrefix()
    keys = {i: layer.keys[0] for i, layer in enumerate(cache.layers)}
    values = {i: layer.values[0] for i, layer in enumerate(cache.layers)}
    return SharedPrefix(tuple(ids), keys, values)


@torch.no_grad()
def _run(model: LoadedModel, own: Ids, shared: SharedPrefix) -> Any:
    """The cache of shared tokens and those after them; None if there are none at all."""
    if not own and not shared.ids:
        return None
    # Without the model's configuration no layer forgets what lies beyond its window: masks decide what is seen.
    cache = DynamicCache()
    for layer in range(len(shared.keys_gcd)):
        cache.update(shared.keys_gcd[layer][None], shared.values_gcd[layer][None], layer)
    if own:
        with model.own_experts():
            ids = torch.tensor([list(own)], device=model.device)
            model.module.base_model(ids, past_key_values=cache, use_cache=True)
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

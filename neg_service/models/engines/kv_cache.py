"""The engine for attention of its own kind: rows of a batch over a repeated key/value cache.

Some architectures (GPT-J, Falcon, BLOOM, MPT, GPT-Neo) compute attention in code of their own, with position biases
that `prefix_attention.py` knows nothing of. They know transformers' cache, though: the tokens before the last run once
into one, and the last token runs in a batch of rows, over the same keys and values in every row. One prompt at a time,
so that nothing is padded; a prefix that prompts share still runs once for all of them.

What is kept is frozen (`frozen_cache.py`).

Axes: R rows, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

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
from neg_service.models.engines.frozen_cache import FrozenCache, filled, positions
from neg_service.models.engines.needs import lacks_keys_and_values
from neg_service.models.head import exact_head_gradient
from neg_service.models.text_config import text_config


class KeyValueCacheEngine(Engine):
    """Rows of one prompt's last token, each over its own copy of the keys and values."""

    name = "kv_cache"
    row_is = "the last token, over keys and values that each row repeats"
    reads_at = (LAST_TOKEN,)
    shares_prefixes = True
    runs_prompts_together = False
    targets_share_rows = False

    @classmethod
    def refusal(cls, model: PreTrainedModel) -> str | None:
        """See `Engine`."""
        return lacks_keys_and_values(model)

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

    def run_shared(self, ids: tuple[int, ...]) -> Cache | None:
        """See `Engine`; none leave nothing."""
        return filled(self.model, ids)


class KeyValueCacheRows:
    """Rows of one prompt's last token over a frozen cache of the tokens before; see `Rows`."""

    tokens = 1
    targets_share_rows = False

    def __init__(self, model: LoadedModel, prompt: SplitPrompt, shared: Cache | None) -> None:
        self._model, self._last, self.sizes = model, prompt.row.ids[0], _row_sizes(model, len(prompt.ids))
        n_shared = 0 if shared is None else shared.get_seq_length()
        cache = filled(model, prompt.prefix[n_shared:], shared)
        self._frozen, self._past = None if cache is None else FrozenCache(cache), len(prompt.prefix)

    def run(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`."""
        module = self._model.module
        last_r1 = torch.tensor([[self._last]] * sum(counts), device=module.device)
        options: dict[str, Any] = {"use_cache": False}
        if self._frozen is not None:
            options = {"use_cache": True, "past_key_values": self._frozen, **positions(module, self._past, 1)}
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
    """Keys and values are copied, and some architectures repeat them for each query head; so are an index's keys."""
    config = text_config(model.module.config)
    index = int(getattr(config, "index_head_dim", 0) or 0) + 3 * int(getattr(config, "index_n_heads", 0) or 0)
    return model.row_sizes(1, n_tokens, n_tokens * (4 * int(config.hidden_size) + index))

"""The engine for causal attention through transformers' interface: the last token in rows over a prefix that all share.

How its attention works: `prefix_attention.py`; of rows of several tokens, `prefix_trees.py`.

Axes: B prompts, R rows in all, F features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from neg_service.models.engines.base import (
    LAST_TOKEN,
    Engine,
    Ids,
    LoadedModel,
    MismatchError,
    Row,
    RowSizes,
    SplitPrompt,
    last_token_behind_the_rest,
    require_single_tokens,
)
from neg_service.models.engines.needs import lacks_dense_attention, lacks_keys_and_values
from neg_service.models.engines.prefix_attention import (
    FrozenPrefix,
    PrefixPass,
    RowPass,
    SharedPrefix,
    packed,
    running,
)
from neg_service.models.engines.prefix_trees import SharedPrefixTrees, tree_sizes
from neg_service.models.head import exact_head_gradient


class SharedPrefixEngine(Engine):
    """Rows of the last token over frozen keys and values, which no row copies; prompts run together."""

    name = "shared_prefix"
    row_is = "the last token, over a prefix that all rows share"
    reads_at = (LAST_TOKEN,)
    shares_prefixes = True
    runs_prompts_together = True
    targets_share_rows = False
    expands_together = True
    runs_trees = True

    @classmethod
    def refusal(cls, model: PreTrainedModel) -> str | None:
        """See `Engine`. Whether layers use the interface shows when they run."""
        return lacks_dense_attention(model) or lacks_keys_and_values(model)

    def split(self, prompt: Ids) -> SplitPrompt:
        """See `Engine`."""
        return last_token_behind_the_rest(prompt)

    def prepare(self, prompts: Sequence[SplitPrompt], shared: Ids = ()) -> SharedPrefixRows:
        """See `Engine`."""
        require_single_tokens(self, prompts)
        prefix = run_prefix(self.model, [prompt.ids for prompt in prompts], self.shared_prefix(shared))
        n_layers = len(self.model.feed_forward.layers)
        # Some have two attentions a layer (LongCat).
        if any(prefix.own_lengths) and len(prefix.keys_bgtd) < n_layers:
            raise MismatchError(
                f"{n_layers - len(prefix.keys_bgtd)} of the {n_layers} layers do not go through transformers' "
                f"attention interface"
            )
        return SharedPrefixRows(self.model, prefix)

    def trees(self, prompts: Sequence[Ids], rows: Sequence[Sequence[Row]], shared: Ids = ()) -> SharedPrefixTrees:
        """See `Engine`."""
        return SharedPrefixTrees(self.model, run_prefix(self.model, prompts, self.shared_prefix(shared)), rows)

    def row_sizes(self, n_tokens: int) -> RowSizes:
        """See `Engine`."""
        return self.model.row_sizes(1, n_tokens)

    def tree_sizes(self, n_tokens: int, row: Row) -> RowSizes:
        """See `Engine`."""
        return tree_sizes(self.model, n_tokens, len(row.ids))

    def run_shared(self, ids: tuple[int, ...]) -> SharedPrefix:
        """See `Engine`."""
        return run_shared_prefix(self.model, ids)


class SharedPrefixRows:
    """Rows of the last token of each prompt; see `Rows`. prefix: what they attend to."""

    tokens = 1
    targets_share_rows = False

    def __init__(self, model: LoadedModel, prefix: FrozenPrefix) -> None:
        self._model = model
        self.prefix = prefix
        self.sizes = model.row_sizes(1, 1 + len(prefix.shared.ids) + max(prefix.own_lengths))

    def run(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`."""
        return run_last_tokens(self._model, self.prefix, counts)

    def positions(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`; rows travel packed, and nothing else with them."""
        return torch.arange(sum(counts))

    def expand_rows(self, x: Tensor, n_rows: int) -> Tensor:
        """See `Rows`; some architectures (OPT) run their layers' parts on two axes."""
        if len(self.prefix.last_ids) > 1:
            return x.repeat_interleave(n_rows, -2)
        return x.expand(1, n_rows, -1) if x.ndim == 3 else x.expand(n_rows, -1)


@torch.no_grad()
def run_shared_prefix(model: LoadedModel, ids: Ids) -> SharedPrefix:
    """Run shared tokens once; their keys and values serve every prompt that begins with them."""
    prefix = run_prefix(model, [(*ids, 0)], SharedPrefix())
    keys, values = prefix.keys_bgtd, prefix.values_bgtd
    return SharedPrefix(tuple(ids), {i: k[0] for i, k in keys.items()}, {i: v[0] for i, v in values.items()})


@torch.no_grad()
def run_prefix(model: LoadedModel, prompts: Sequence[Ids], shared: SharedPrefix) -> FrozenPrefix:
    """Run all tokens of `prompts` but the last; each must begin with the shared ones and go on by at least a token.

    The vocabulary head is not run: nothing but keys and values is wanted.
    """
    c = len(shared.ids)
    own = [ids[c:-1] for ids in prompts]
    prefix = FrozenPrefix(shared, tuple(map(len, own)), tuple(ids[-1] for ids in prompts))
    if any(own):
        with running(model.module, PrefixPass(prefix)), model.own_experts():
            model.module.base_model(**packed(model.module, own, [range(c, c + len(ids)) for ids in own]))
    return prefix


def run_last_tokens(model: LoadedModel, prefix: FrozenPrefix, counts: Sequence[int]) -> Tensor:
    """Run `counts[b]` rows of the last token of each prompt b; logits [R, V], prompt by prompt.

    With gradients enabled the graph covers the rows alone: the prefix is frozen.
    """
    ids = [[last] * n for last, n in zip(prefix.last_ids, counts, strict=True)]
    positions = [[len(prefix.shared.ids) + own] * n for own, n in zip(prefix.own_lengths, counts, strict=True)]
    module = model.module
    with running(module, RowPass(prefix, counts)), model.own_experts(), exact_head_gradient(module):
        logits: Tensor = module(**packed(module, ids, positions)).logits
    # Some architectures (GPT-2) bring rows that became more on the way to another axis in the end.
    return logits.flatten(0, -2)

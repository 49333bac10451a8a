"""The engine for masked models: whole prompts as rows.

A change at the mask token changes every token in the layers above, so a row is the whole prompt. What is saved is the
layers below an intervention (`start_at_layer.py`), and the vocabulary head at all positions that are not read.

Axes: B prompts, R rows in all, T tokens of the longest prompt, F features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neg_service.errors import ModelError
from neg_service.models.engines.base import MASK_TOKEN, Engine, Ids, LoadedModel, Row, RowSizes, SplitPrompt
from neg_service.models.engines.needs import lacks_dense_attention, lacks_keys_and_values
from neg_service.models.head import exact_head_gradient


class FullSequenceEngine(Engine):
    """Rows of whole prompts, padded to the longest; a prompt's targets are read from one row."""

    name = "full_sequence"
    reads_at = (MASK_TOKEN,)
    shares_prefixes = False
    runs_prompts_together = True
    targets_share_rows = True

    @classmethod
    def refusal(cls, model: PreTrainedModel) -> str | None:
        """See `Engine`."""
        return lacks_dense_attention(model) or lacks_keys_and_values(model)

    def split(self, prompt: Ids) -> SplitPrompt:
        """See `Engine`."""
        mask_token = self.model.mask_token
        assert mask_token is not None
        return SplitPrompt((), Row.chain(prompt, list(prompt).index(mask_token)))

    def prepare(self, prompts: Sequence[SplitPrompt], shared: Ids = ()) -> FullSequenceRows:
        """See `Engine`; nothing is run yet, and nothing shared."""
        for prompt in prompts:
            row = prompt.row
            if prompt.prefix or not row.is_chain or row.read != (row.shifted,):
                raise ModelError(
                    f"{self.model.name}: its engine ({self.name}) runs whole prompts as rows, which are shifted and "
                    f"read at one token: ask for targets of one token, at the prompt's mask token"
                )
        return FullSequenceRows(self.model, [prompt.row for prompt in prompts])

    def row_sizes(self, n_tokens: int) -> RowSizes:
        """See `Engine`."""
        return self.model.row_sizes(n_tokens, n_tokens)


class FullSequenceRows:
    """Rows of whole prompts; see `Rows`."""

    targets_share_rows = True

    def __init__(self, model: LoadedModel, rows: Sequence[Row]) -> None:
        longest = max(len(row.ids) for row in rows)
        self.tokens, self.sizes = longest, model.row_sizes(longest, longest)
        self._model = model
        ids = [[*row.ids, *[0] * (longest - len(row.ids))] for row in rows]
        self._ids_bt = torch.tensor(ids, device=model.device)
        length_b1 = torch.tensor([[len(row.ids)] for row in rows], device=model.device)
        self._visible_bt = (torch.arange(longest, device=model.device) < length_b1).long()
        self._read_b = torch.tensor([row.shifted for row in rows])

    def run(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`; the vocabulary head sees the tokens that are read and no others."""
        module = self._model.module
        of_row = self._prompt_of_row(counts)
        read_r = self._read_b[of_row]

        def read(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = output["last_hidden_state"]
            output["last_hidden_state"] = hidden[torch.arange(len(hidden)), read_r, None]
            return output

        handle = module.base_model.register_forward_hook(read)
        try:
            of_row = of_row.to(self._ids_bt.device)
            with self._model.own_experts(), exact_head_gradient(module):
                logits: Tensor = module(self._ids_bt[of_row], attention_mask=self._visible_bt[of_row]).logits
        finally:
            handle.remove()
        return logits[:, 0]

    def positions(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`."""
        return torch.arange(sum(counts)) * self.tokens + self._read_b[self._prompt_of_row(counts)]

    def expand_rows(self, x: Tensor, n_rows: int) -> Tensor:
        """See `Rows`."""
        return x.expand(n_rows, -1, -1)

    def _prompt_of_row(self, counts: Sequence[int]) -> Tensor:
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts)))

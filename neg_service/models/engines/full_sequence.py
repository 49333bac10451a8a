"""The engine that fits every model: whole prompts as rows.

For masked models there is no other: a change at the mask token changes every token in the layers above. For causal
models it is the slow one that is right whatever the layers are made of, because it asks the model for nothing but a
plain pass: no cache, no padding, no positions. What is saved is the layers below an intervention (`start_at_layer.py`),
and the vocabulary head at all positions that are not read.

Axes: B prompts, R rows in all, T tokens of the longest prompt, F features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neg_service.errors import ModelError
from neg_service.models.byte_patches import lacks_steady_bytes
from neg_service.models.engines.base import (
    LAST_TOKEN,
    MASK_TOKEN,
    Engine,
    Ids,
    LoadedModel,
    MismatchError,
    Row,
    RowSizes,
    SplitPrompt,
)
from neg_service.models.engines.full_sequence_trees import FullSequenceTrees, sequence_sizes
from neg_service.models.head import exact_head_gradient


class FullSequenceEngine(Engine):
    """Rows of whole prompts; a prompt's targets are read from one row.

    Prompts of masked models run together, padded to the longest, which their attention masks are made for. Causal ones
    run one by one and without a mask, for states of recurrent layers go on through padding.
    """

    name = "full_sequence"
    row_is = "a whole prompt"
    rows_are_prompts = True
    reads_at: ClassVar[tuple[str, ...]] = (MASK_TOKEN, LAST_TOKEN)
    shares_prefixes = False
    targets_share_rows = True
    runs_trees = True

    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model)
        self.runs_prompts_together = model.mask_token is not None

    @classmethod
    def refusal(cls, model: PreTrainedModel) -> str | None:
        """See `Engine`: it needs nothing."""
        return None

    def split(self, prompt: Ids) -> SplitPrompt:
        """See `Engine`."""
        mask_token = self.model.mask_token
        at = len(prompt) - 1 if mask_token is None else list(prompt).index(mask_token)
        return SplitPrompt((), Row.chain(prompt, at))

    def prepare(self, prompts: Sequence[SplitPrompt], shared: Ids = ()) -> FullSequenceRows:
        """See `Engine`; nothing is run yet, and nothing shared."""
        for prompt in prompts:
            row = prompt.row
            if prompt.prefix or not row.is_chain or row.read != (row.shifted,):
                raise ModelError(
                    f"{self.model.name}: its engine ({self.name}) runs whole prompts as rows, which are shifted and "
                    f"read at one token: ask for targets of one token, at the prompt's {self.model.read_at}"
                )
        return FullSequenceRows(self.model, [prompt.row for prompt in prompts], is_padded=self.runs_prompts_together)

    def trees(self, prompts: Sequence[Ids], rows: Sequence[Sequence[Row]], shared: Ids = ()) -> FullSequenceTrees:
        """See `Engine`; of one prompt, and nothing is shared.

        Raises:
            MismatchError: what is behind a token changes it, so that targets could not be read from one sequence.
        """
        if (reason := lacks_steady_bytes(self.model.module)) is not None:
            raise MismatchError(reason)
        (prompt,), (own,) = prompts, rows
        return FullSequenceTrees(self.model, prompt, own)

    def row_sizes(self, n_tokens: int) -> RowSizes:
        """See `Engine`."""
        return self.model.row_sizes(n_tokens, n_tokens)

    def tree_sizes(self, n_tokens: int, row: Row) -> RowSizes:
        """See `Engine`."""
        return sequence_sizes(self.model, n_tokens, row)


class UnpaddedEngine(FullSequenceEngine):
    """The same for masked models in which padding changes what is computed (convolutions, Fourier transforms)."""

    name = "full_sequence_unpadded"
    row_is = "a whole prompt, one prompt at a time"
    reads_at = (MASK_TOKEN,)

    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model)
        self.runs_prompts_together = False


class FullSequenceRows:
    """Rows of whole prompts; see `Rows`."""

    targets_share_rows = True

    def __init__(self, model: LoadedModel, rows: Sequence[Row], *, is_padded: bool) -> None:
        longest = max(len(row.ids) for row in rows)
        self.tokens, self.sizes = longest, model.row_sizes(longest, longest)
        self._model, self._is_padded = model, is_padded
        ids = [[*row.ids, *[0] * (longest - len(row.ids))] for row in rows]
        self._ids_bt = torch.tensor(ids, device=model.device)
        length_b1 = torch.tensor([[len(row.ids)] for row in rows], device=model.device)
        self._visible_bt = (torch.arange(longest, device=model.device) < length_b1).long()
        self._read_b = torch.tensor([row.shifted for row in rows])

    def run(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`; the vocabulary head sees the tokens that are read and no others."""
        module = self._model.module
        of_row = self._prompt_of_row(counts)
        of_row_there = of_row.to(self._ids_bt.device)
        is_masked = self._model.mask_token is not None
        options: dict[str, Any] = {} if is_masked else {"use_cache": False}
        # With a mask of its own an implementation of attention may take another way than without.
        if self._is_padded:
            options["attention_mask"] = self._visible_bt[of_row_there]
        reading = _reading_in_body if is_masked else _reading_at_head
        with reading(module, self._read_b[of_row]), self._model.own_experts(), exact_head_gradient(module):
            logits: Tensor = module(self._ids_bt[of_row_there], **options).logits
        return logits[:, 0]

    def positions(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`."""
        return torch.arange(sum(counts)) * self.tokens + self._read_b[self._prompt_of_row(counts)]

    def expand_rows(self, x: Tensor, n_rows: int) -> Tensor:
        """See `Rows`."""
        return x.expand(n_rows, *x.shape[1:])

    def _prompt_of_row(self, counts: Sequence[int]) -> Tensor:
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts)))


@contextmanager
def _reading_in_body(module: PreTrainedModel, read_r: Tensor) -> Iterator[None]:
    """Let what comes after the layers, which may be more than the head, see one token of each row."""

    def read(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output["last_hidden_state"]
        output["last_hidden_state"] = hidden[torch.arange(len(hidden)), read_r, None]
        return output

    handle = module.base_model.register_forward_hook(read)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _reading_at_head(module: PreTrainedModel, read_r: Tensor) -> Iterator[None]:
    """Let the head see one token of each row, before anything else that looks at what it is given."""

    def read(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # One row may have become several on the way: its place is theirs.
        return (inputs[0][torch.arange(len(inputs[0])), read_r, None], *inputs[1:])

    handle = module.get_output_embeddings().register_forward_pre_hook(read, prepend=True)
    try:
        yield
    finally:
        handle.remove()

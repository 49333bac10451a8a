"""Rows of several tokens for the engine that runs whole prompts: a tree is as many sequences as it has leaves.

A row of a tree becomes sequences, the prompt and the tokens from the tree's first to each leaf, one below the other in
the batch; what several sequences have in common is shifted in each, and read in the first of them. Shorter sequences
are filled up behind their last token: in a causal model nothing before it sees that.

Axes: R rows, Q sequences of a row, T tokens of the longest, S tokens of a row that are read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neg_service.models.engines.base import Ids, LoadedModel, Row, RowSizes
from neg_service.models.engines.trees import chain_to, leaves, rows_of
from neg_service.models.head import exact_head_gradient


class FullSequenceTrees:
    """Rows of one prompt, each as whole sequences; see `TreeRows`."""

    targets_share_rows = False

    def __init__(self, model: LoadedModel, prompt: Ids, rows: Sequence[Row]) -> None:
        self._model, self._prompt, self._rows = model, tuple(prompt), list(rows)
        sequences = [[chain_to(row, leaf) for leaf in leaves(row)] for row in rows]
        self.tokens = len(prompt) - 1 + max(len(chain) for own in sequences for chain in own)
        # Of all rows, or of the only one: sequences [Q, T], and in which of them, and where, each token is read.
        found, self._n_sequences, self._read_of_row = [], [len(own) for own in sequences], []
        for row, own in zip(rows, sequences, strict=True):
            for chain in own:
                ids = [*prompt, *(row.ids[place] for place in chain[1:])]
                # Filled up with a token that is there anyway: some models look for one that means padding.
                found.append(ids + ids[-1:] * (self.tokens - len(ids)))
            depths, of_place = row.depths, {place: q for q, chain in reversed([*enumerate(own)]) for place in chain}
            self._read_of_row.append([(of_place[place], len(prompt) - 1 + depths[place]) for place in row.read])
        self._ids_qt = torch.tensor(found, device=model.device)
        self._n_behind = torch.tensor([len(chain) for own in sequences for chain in own])
        self.sizes = _sizes(model, self.tokens, max(self._n_sequences), max(len(row.ids) for row in rows))

    def with_rows(self, rows: Sequence[Sequence[Row]]) -> FullSequenceTrees:
        """See `TreeRows`."""
        (own,) = rows
        return FullSequenceTrees(self._model, self._prompt, own)

    def run(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`; the vocabulary head sees the tokens that are read and no others."""
        module = self._model.module
        rows_of([self._rows], counts)
        ids = self._ids_qt.repeat(counts[0], 1) if len(self._rows) == 1 else self._ids_qt
        read = self._read(counts)
        # One row may become several on the way: each is read as the first.
        is_one = len(self._rows) == 1
        with (
            _reading_at_head(module, read[: len(self._read_of_row[0])] if is_one else read, self._ids_qt, is_one),
            self._model.own_experts(),
            exact_head_gradient(module),
        ):
            logits: Tensor = module(ids, use_cache=False).logits
        return logits[:, 0]

    def positions(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`."""
        return self.copies(counts)[:, 0]

    def copies(self, counts: Sequence[int]) -> Tensor:
        """See `TreeRows`; rows of a prompt that has several are one sequence each."""
        rows_of([self._rows], counts)
        n = sum(self._n_sequences) if len(self._rows) > 1 else self._n_sequences[0] * counts[0]
        places = torch.arange(n) * self.tokens + len(self._prompt) - 1
        return places.view(counts[0], -1)

    def each_positions(self, counts: Sequence[int]) -> Tensor:
        """See `TreeRows`: of each sequence the tokens from the prompt's last one on, not what fills it up."""
        behind, places_rq = torch.arange(self.tokens - len(self._prompt) + 1), self.copies(counts)
        is_own = behind < self._n_behind.view(-1, places_rq.shape[1], 1)
        return torch.where(is_own, places_rq[..., None] + behind, -1).flatten(1)

    def read_positions(self, counts: Sequence[int]) -> Tensor:
        """See `TreeRows`."""
        return torch.tensor([q * self.tokens + t for q, t in self._read(counts)])

    def _read(self, counts: Sequence[int]) -> list[tuple[int, int]]:
        """The sequence of the batch, and the place in it, of each token that is read."""
        rows = self._read_of_row * counts[0] if len(self._rows) == 1 else self._read_of_row
        n_sequences = self._n_sequences * counts[0] if len(self._rows) == 1 else self._n_sequences
        found, start = [], 0
        for own, n in zip(rows, n_sequences, strict=True):
            found += [(start + q, t) for q, t in own]
            start += n
        return found

    def expand_rows(self, x: Tensor, n_rows: int) -> Tensor:
        """See `Rows`."""
        if len(x) == 1:
            return x.expand(n_rows, *x.shape[1:])
        return x.repeat(n_rows, *[1] * (x.ndim - 1))


def sequence_sizes(model: LoadedModel, n_tokens: int, row: Row) -> RowSizes:
    """What a row takes of a prompt of so many tokens."""
    return _sizes(model, n_tokens + max(row.depths), len(leaves(row)), len(row.ids))


def _sizes(model: LoadedModel, tokens: int, n_sequences: int, n_read: int) -> RowSizes:
    """Whole sequences, and beside them what more tokens take that are read, at the most as rows of one token."""
    whole, one, more = model.row_sizes(tokens, tokens), model.row_sizes(1, 1), max(0, n_read - n_sequences)
    return RowSizes(
        *(
            getattr(whole, name) * n_sequences + getattr(one, name) * more
            for name in ("run", "graph", "slopes", "slope")
        )
    )


@contextmanager
def _reading_at_head(
    module: PreTrainedModel, read: Sequence[tuple[int, int]], ids_qt: Tensor, repeats: bool
) -> Iterator[None]:
    """Let the head see the tokens that are read, as rows of one token each.

    repeats: they are those of the sequences `ids_qt`, of which there may be several times as many on arriving.
    """
    sequence_s, place_s = (torch.tensor(own) for own in zip(*read, strict=True))

    def at_head(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        n = len(hidden) // len(ids_qt) if repeats else 1
        sequence_r = (torch.arange(n)[:, None] * len(ids_qt) + sequence_s).flatten().to(hidden.device)
        return (hidden[sequence_r, place_s.repeat(n).to(hidden.device), None], *inputs[1:])

    handle = module.get_output_embeddings().register_forward_pre_hook(at_head, prepend=True)
    try:
        yield
    finally:
        handle.remove()

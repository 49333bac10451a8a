"""Very many variants of one prompt: rows of a batch that differ at the readout position, and may begin at any layer.

A measure that intervenes asks for rows and does not care how they are run. In a causal model a row is a branch of the
last token over the prompt's frozen prefix. In a masked model a change at the mask token changes every token above
it, so a row is the whole prompt; what is saved there is the layers below the intervention, and the vocabulary head
at all other positions.

Axes: R rows, T tokens of the prompt, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neg_service.models.branches import Header, run_branches, run_prefix


class Rows(Protocol):
    """One prompt, ready to be run in rows."""

    # How many tokens each row carries through the layers, and how many it attends to.
    tokens: int
    attended: int

    def run(self, n_rows: int) -> Tensor:
        """Logits at the readout position [R, V], in the model's precision."""
        ...

    def at_readout(self, x: Tensor) -> Tensor:
        """A tensor of a pass over rows, seen as [R, ...] at the readout position; a view."""
        ...

    def widened(self, stored: Tensor, n_rows: int) -> Tensor:
        """A layer's input, stored from a pass of one row, as the input of `n_rows` equal rows."""
        ...


class BranchRows:
    """Rows of a causal model: branches of the last token over the prefix, which runs once, here."""

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], header: Header) -> None:
        self.tokens, self.attended = 1, len(ids)
        self._model = model
        self._prefix = run_prefix(model, [ids], header)

    def run(self, n_rows: int) -> Tensor:
        """See `Rows`."""
        return run_branches(self._model, self._prefix, [n_rows])

    def at_readout(self, x: Tensor) -> Tensor:
        """See `Rows`; some architectures (OPT) run their MLP on two axes."""
        return x.view(-1, x.shape[-1])

    def widened(self, stored: Tensor, n_rows: int) -> Tensor:
        """See `Rows`; branches travel packed, as the tokens of one sequence."""
        return stored.expand(1, n_rows, -1) if stored.ndim == 3 else stored.expand(n_rows, -1)


class SequenceRows:
    """Rows of a masked model: whole prompts, read at their mask token."""

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], readout: int) -> None:
        self.tokens = self.attended = len(ids)
        self._model = model
        self._readout = readout
        self._ids = torch.tensor([list(ids)], device=model.device)

    def run(self, n_rows: int) -> Tensor:
        """See `Rows`; the vocabulary head sees the mask token only."""

        def read(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            output["last_hidden_state"] = output["last_hidden_state"][:, self._readout, None]
            return output

        handle = self._model.base_model.register_forward_hook(read)
        try:
            logits: Tensor = self._model(self._ids.expand(n_rows, -1)).logits
        finally:
            handle.remove()
        return logits[:, 0]

    def at_readout(self, x: Tensor) -> Tensor:
        """See `Rows`."""
        return x[:, self._readout]

    def widened(self, stored: Tensor, n_rows: int) -> Tensor:
        """See `Rows`."""
        return stored.expand(n_rows, -1, -1)


@contextmanager
def resuming_at(layers: nn.ModuleList, first: int, hidden: Tensor, gives_tuple: Sequence[bool]) -> Iterator[None]:
    """Let passes begin at layer `first` with the input `hidden`, as `Rows.widened` gives it.

    The layers below are replaced, for as long as this lasts, by stand-ins that give that input; the model's own
    forward runs otherwise unchanged, whatever its architecture.
    """
    own = list(layers[:first])
    try:
        for index in range(first):
            layers[index] = _StandIn(hidden, gives_tuple[index])
        yield
    finally:
        for index, layer in enumerate(own):
            layers[index] = layer


class _StandIn(nn.Module):
    """In the place of a layer that need not run again: gives a stored tensor in the layer's own form."""

    def __init__(self, stored: Tensor, gives_tuple: bool) -> None:
        super().__init__()
        self._stored = (stored,) if gives_tuple else stored

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._stored

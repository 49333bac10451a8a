"""Variants of prompts: rows of a batch that differ at their prompt's readout position, and may begin at any layer.

A measure asks for rows and does not care how they are run. In a causal model a row is a branch of the last token over
the prompt's frozen prefix. In a masked model a change at the mask token changes every token in the layers above, so a
row is the whole prompt; what is saved there is the layers below an intervention, and the vocabulary head at all other
positions.

Axes: B prompts, R rows in all, T tokens of the longest prompt, F features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neg_service.models.branches import Header, run_branches, run_prefix
from neg_service.models.head import exact_head_gradient


class Rows(Protocol):
    """Prompts, ready to be run in rows: `counts[b]` rows of prompt b, prompt by prompt."""

    # How many tokens a row carries through the layers, how many each of them attends to, and how many values a row
    # copies that others do not share.
    tokens: int
    attended: int
    copied: int
    # Whether a prompt's targets are read, and differentiated, from one row.
    targets_share_rows: bool

    def run(self, counts: Sequence[int]) -> Tensor:
        """Logits at the readout position of each row [R, V], in the model's precision."""
        ...

    def positions(self, counts: Sequence[int]) -> Tensor:
        """Where each row's readout position is [R], in any tensor of the pass seen as [tokens, F]."""
        ...

    def widened(self, x: Tensor, n_rows: int) -> Tensor:
        """A tensor from a pass of one row of one prompt, as that of `n_rows` equal rows; not to be written to."""
        ...


class BranchRows:
    """Rows of a causal model: branches of the last token over the prefix, which runs once, here."""

    targets_share_rows = False

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], header: Header) -> None:
        self.tokens, self.attended, self.copied = 1, max(map(len, prompts)), 0
        self._model = model
        self._prefix = run_prefix(model, prompts, header)

    @property
    def n_layers(self) -> int:
        """How many layers left keys and values: those that go through transformers' attention interface."""
        return len(self._prefix.keys_bgtd)

    def run(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`."""
        return run_branches(self._model, self._prefix, counts)

    def positions(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`; branches travel packed, and nothing else with them."""
        return torch.arange(sum(counts))

    def widened(self, x: Tensor, n_rows: int) -> Tensor:
        """See `Rows`; some architectures (OPT) run their layers' parts on two axes."""
        return x.expand(1, n_rows, -1) if x.ndim == 3 else x.expand(n_rows, -1)


class SequenceRows:
    """Rows of a masked model: whole prompts, padded to the longest and read at their mask token."""

    targets_share_rows = True

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], mask_token: int) -> None:
        longest = max(map(len, prompts))
        self.tokens, self.attended, self.copied = longest, longest, 0
        self._model = model
        ids = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        self._ids_bt = torch.tensor(ids, device=model.device)
        length_b1 = torch.tensor([[len(prompt)] for prompt in prompts], device=model.device)
        self._visible_bt = (torch.arange(longest, device=model.device) < length_b1).long()
        self._readout_b = torch.tensor([list(prompt).index(mask_token) for prompt in prompts])

    def run(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`; the vocabulary head sees the mask tokens only."""
        of_row = self._prompt_of_row(counts)
        readout_r = self._readout_b[of_row]

        def read(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = output["last_hidden_state"]
            output["last_hidden_state"] = hidden[torch.arange(len(hidden)), readout_r, None]
            return output

        handle = self._model.base_model.register_forward_hook(read)
        try:
            of_row = of_row.to(self._ids_bt.device)
            with exact_head_gradient(self._model):
                logits: Tensor = self._model(self._ids_bt[of_row], attention_mask=self._visible_bt[of_row]).logits
        finally:
            handle.remove()
        return logits[:, 0]

    def positions(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`."""
        return torch.arange(sum(counts)) * self.tokens + self._readout_b[self._prompt_of_row(counts)]

    def widened(self, x: Tensor, n_rows: int) -> Tensor:
        """See `Rows`."""
        return x.expand(n_rows, -1, -1)

    def _prompt_of_row(self, counts: Sequence[int]) -> Tensor:
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts)))


def flat(x: Tensor) -> Tensor:
    """A tensor of a pass as [tokens, F]: a view, to read or write at `Rows.positions`."""
    return x.view(-1, x.shape[-1])


@contextmanager
def resuming_at(layers: nn.ModuleList, first: int, hidden: Tensor, forms: Sequence[Any]) -> Iterator[None]:
    """Let passes begin at layer `first` with the input `hidden`, of one row or as `Rows.widened` gives it.

    The layers below are replaced, for as long as this lasts, by stand-ins that give that input, in the form that
    `keeping_inputs` kept; the model's own forward runs otherwise unchanged, whatever its architecture.
    """
    own = list(layers[:first])
    try:
        for index, layer in enumerate(own):
            layers[index] = _StandIn(layer, hidden, forms[index])
        yield
    finally:
        for index, layer in enumerate(own):
            layers[index] = layer


@contextmanager
def keeping_inputs(layers: nn.ModuleList) -> Iterator[tuple[list[Tensor], list[Any]]]:
    """The input of each layer that runs, and the form of its output, for `resuming_at`."""
    inputs: list[Tensor] = []
    forms: list[Any] = []

    def keep(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        # What else a layer's tuple holds has to be in that of its stand-in too.
        forms.append(output[1:] if isinstance(output, tuple) else None)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep, with_kwargs=True).remove)
        yield inputs, forms


class _StandIn(nn.Module):
    """In the place of a layer that need not run again: gives a stored tensor in the layer's own form."""

    def __init__(self, layer: nn.Module, stored: Tensor, form: Any) -> None:
        super().__init__()
        # Not as a submodule: what goes through the model's modules must not meet the layer here.
        object.__setattr__(self, "_layer", layer)
        self._stored = stored if form is None else (stored, *form)

    def __getattr__(self, name: str) -> Any:
        # Some models ask their layers for a kind of attention before they call them.
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._stored

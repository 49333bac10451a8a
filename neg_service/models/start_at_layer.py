"""Passes that begin at a layer: the layers below an intervention give stored inputs instead of running again.

Their inputs are kept when a prompt runs first (`keep_inputs`); later passes start with one of them (`start_at_layer`).

Axes: F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


def flat(x: Tensor) -> Tensor:
    """A tensor of a pass as [tokens, F]: a view, to read or write at `Rows.positions` (`engines/base.py`)."""
    return x.view(-1, x.shape[-1])


@contextmanager
def start_at_layer(
    layers: nn.ModuleList, first: int, hidden: Tensor, output_structures: Sequence[Any]
) -> Iterator[None]:
    """Let passes begin at layer `first` with the input `hidden`, of one row or as `Rows.expand_rows` gives it.

    The layers below are replaced, for as long as this lasts, by `CachedLayer`s that give that input, in the
    structure that `keep_inputs` kept; the model's own forward runs otherwise unchanged, whatever its architecture.
    """
    own = list(layers[:first])
    try:
        for index, layer in enumerate(own):
            layers[index] = CachedLayer(layer, hidden, output_structures[index])
        yield
    finally:
        for index, layer in enumerate(own):
            layers[index] = layer


@contextmanager
def keep_inputs(layers: nn.ModuleList) -> Iterator[tuple[list[Tensor], list[Any]]]:
    """The input of each layer that runs, and what else its output holds, for `start_at_layer`."""
    inputs: list[Tensor] = []
    output_structures: list[Any] = []

    def keep(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        # What else a layer's tuple holds has to be in that of its `CachedLayer` too.
        output_structures.append(output[1:] if isinstance(output, tuple) else None)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep, with_kwargs=True).remove)
        yield inputs, output_structures


class CachedLayer(nn.Module):
    """In the place of a layer that need not run again: gives a stored tensor in the layer's own structure."""

    def __init__(self, layer: nn.Module, stored: Tensor, structure: Any) -> None:
        super().__init__()
        # Not as a submodule: what goes through the model's modules must not meet the layer here.
        object.__setattr__(self, "_layer", layer)
        self._stored = stored if structure is None else (stored, *structure)

    def __getattr__(self, name: str) -> Any:
        # Some models ask their layers for a kind of attention before they call them.
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._stored

"""What the self-check finds out of passes of a part of the model: where they may begin, and where rows may become many.

Interventions at a layer need not run the layers below it, and need no rows of their own below the neurons they move;
what of that holds for a model is tried here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from neg_service.memory import is_out_of_memory
from neg_service.models.engines.base import Engine
from neg_service.models.engines.comparisons import deviation_of
from neg_service.models.feed_forward import Site, hooks
from neg_service.models.start_at_layer import keep_inputs, start_at_layer


@torch.no_grad()
def starts_and_expansion(engine: Engine, ids: Sequence[int], tolerance: float) -> tuple[bool, frozenset[Site]]:
    """Whether passes may begin at any layer, and the sites at which one row may become many.

    Passes of several rows begin at each layer with that layer's stored input, and have to end as whole ones. Not where
    something else happens between two layers (a convolution in DeBERTa 2), where layers use keys and values of others
    (Gemma 3n), or hand on what one row chose (HY 4); there every intervention runs all layers.

    A layer may run as one row up to its neurons and as several from there, by broadcasting, in most MLPs. One that
    reshapes its output as its input was (OPT, most blocks of experts) cannot; there every row runs the whole layer.

    Where each layer gives what it gives in whole passes from its own input alone, nothing else is handed on, and a pass
    need not go on behind it to show that: all layers together then cost a few passes, and not half a pass each. Behind
    a site where rows become more every layer is given more rows than its pass began with, too.
    """
    layers, points = engine.model.feed_forward.layers, engine.model.feed_forward.sites("paper")
    rows = engine.rows([ids])
    with keep_inputs(layers) as (inputs, structures):
        rows.run([1])
    with keep_inputs(layers) as (before, _), _keep_outputs(layers) as outputs:
        plain = rows.run([2])

    def agrees(first: int | None, n_begun: int, n_given: int, site: Site | None = None, is_whole: bool = False) -> bool:
        """A pass that began with so many rows, of which layer `first` is given so many, to the layer's end or whole."""
        visited = {site: points[site]} if site else {}
        ends: list[Any] = []
        try:
            with ExitStack() as stack:
                if first is not None:
                    hidden = inputs[first] if n_given == 1 else rows.expand_rows(inputs[first], n_given)
                    stack.enter_context(start_at_layer(layers, first, hidden, structures))
                    stack.enter_context(nullcontext() if is_whole else _stop_behind(layers[first], ends))
                stack.enter_context(hooks(visited, lambda _site, x: rows.expand_rows(x, 2).clone()))
                found = rows.run([n_begun])
        except _StoppedError:
            assert first is not None
            return _is_same_step(ends[0], outputs[first], before[first], tolerance)
        except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return False
        return found.shape == plain.shape and deviation_of(found, plain) <= tolerance

    def has_to_be_whole(layer: int) -> bool:
        # In low precision rounding takes up so much of a residual that a layer's own step would not be seen beside it.
        is_low = engine.model.dtype.itemsize < 4
        return is_low or layer == len(layers) - 1 or _has_tensors(structures[layer])

    def may_begin(layer: int) -> bool:
        # What the layers below hand on beside their output is that of one row.
        return agrees(layer, 2, 2, is_whole=has_to_be_whole(layer) or _has_tensors(structures[layer - 1]))

    starts = len(inputs) == len(outputs) == len(layers)
    if starts:
        # What ends right layer by layer has to do so as a whole, too; what a layer kept of the last pass is then of
        # other tokens.
        engine.rows([ids[::-1]]).run([2])
        starts = agrees(len(layers) - 1, 2, 2, is_whole=True) and agrees(len(layers) // 2, 2, 2, is_whole=True)
    if not starts or not all(map(may_begin, range(1, len(layers)))):
        return False, frozenset(site for site in points if agrees(None, 1, 1, site, is_whole=True))
    takes_more = [agrees(layer, 1, 2, is_whole=has_to_be_whole(layer)) for layer in range(len(layers))]
    return True, frozenset(
        site for site in points
        if all(takes_more[site.layer + 1 :]) and agrees(site.layer, 1, 1, site, is_whole=has_to_be_whole(site.layer))
    )  # fmt: skip


class _StoppedError(Exception):
    """A pass has run as far as it was to run."""


@contextmanager
def _stop_behind(layer: nn.Module, ends: list[Any]) -> Iterator[None]:
    """Passes end behind a layer, whose output goes to `ends`."""

    def stop(_layer: nn.Module, _args: Any, output: Any) -> None:
        ends.append(_hidden_of(output))
        raise _StoppedError

    handle = layer.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _keep_outputs(layers: nn.ModuleList) -> Iterator[list[Any]]:
    """What each layer that runs gives."""
    outputs: list[Any] = []
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_hook(lambda _layer, _args, output: outputs.append(_hidden_of(output)))
            stack.callback(handle.remove)
        yield outputs


def _hidden_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _is_same_step(found: Any, after: Any, before: Tensor, tolerance: float) -> bool:
    """Whether a layer did to each token what it does in a whole pass; the residual, often far larger, says nothing."""
    if not (isinstance(found, Tensor) and isinstance(after, Tensor)) or found.shape != after.shape:
        return False
    # A layer that reads what lies on another device gives what lies on its own.
    found, after, before = (own.to(after.device).double() for own in (found, after, before))
    step = after - before if before.shape == after.shape else after
    off_t, step_t, largest_t = (own.abs().amax(-1) for own in (found - after, step, after))
    # What a layer adds may be the small difference of large parts, and what is wrong is off by all of it. Written so
    # that NaN is no.
    return bool((off_t <= 10 * tolerance * step_t + 4 * torch.finfo(torch.float32).eps * largest_t).all())


def _has_tensors(structure: Any) -> bool:
    return isinstance(structure, tuple) and any(own is not None for own in structure)

"""Targets of several tokens the textbook way: plain passes over prompt and target, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neg_service.prompts.prompt import EncodedPrompt, Prompt
from tests import oracle

# One of one token, one of several, one that is all that others begin with, and one that begins as another.
TARGETS = ((3, 4, 5), (9,), (3, 4), (3, 6, 8))


def encoded(ids: Sequence[int], targets: Sequence[Sequence[int]], name: str = "p") -> EncodedPrompt:
    """A prompt whose tokens and targets are given, whatever its text."""
    following = tuple(tuple(own[1:]) for own in targets)
    texts = tuple(" ".join(f"w{token}" for token in own) for own in targets)
    first = tuple(own[0] for own in targets)
    return EncodedPrompt(Prompt(name, "-", texts), tuple(ids), first, following if any(following) else ())


def log_p(model: nn.Module, ids: Sequence[int], target: Sequence[int]) -> Tensor:
    """log p of each token of a target [S], by one plain pass over the prompt and all of the target but its last."""
    logits = model(torch.tensor([[*ids, *target[:-1]]]), use_cache=False).logits[0]
    at = torch.arange(len(ids) - 1, len(ids) - 1 + len(target))
    return logits[at].log_softmax(-1)[torch.arange(len(target)), torch.tensor(list(target))]


def probability(model: nn.Module, ids: Sequence[int], target: Sequence[int]) -> Tensor:
    """The product of its tokens' []."""
    return log_p(model, ids, target).double().sum().exp()


def gradients(
    model: nn.Module, ids: Sequence[int], target: Sequence[int], basis: str, places: Sequence[int] | None = None
) -> tuple[float, np.ndarray, np.ndarray]:
    """p, d p / d a [T, L, N] and a [T, L, N] at some places of the sequence, the prompt's last token if not given."""
    places = [len(ids) - 1] if places is None else list(places)
    leaves: dict[int, Tensor] = {}
    handles = [oracle.capture(mlp, basis, layer, leaves) for layer, mlp in enumerate(oracle.layers_of(model))]
    try:
        with torch.enable_grad():
            p = probability(model, ids, target)
    finally:
        for handle in handles:
            handle.remove()
    neurons = [leaves[layer] for layer in range(len(leaves))]
    slopes = torch.autograd.grad(p, neurons)
    found = [
        np.stack([np.stack([oracle.at(own, place, basis, model) for own in values]) for place in places])
        for values in (slopes, neurons)
    ]
    return float(p.detach()), found[0], found[1]


def shifted(
    model: nn.Module, ids: Sequence[int], target: Sequence[int], basis: str,
    neurons: Sequence[tuple[int, int]], shift: float | Sequence[float], places: Sequence[int] | None = None,
    way: str = "all",
) -> float:  # fmt: skip
    """The probability with neurons (layer, neuron) moved by shifts at some places, or each at its `own`."""
    places = [len(ids) - 1] if places is None else list(places)
    shifts = [shift] * len(neurons) if isinstance(shift, float | int) else list(shift)
    own = [[place] for place in places] if way == "own" else [places] * len(neurons)
    handles = [
        _moving(model, basis, layer, neuron, by, at)
        for (layer, neuron), by, at in zip(neurons, shifts, own, strict=True)
    ]
    try:
        with torch.no_grad():
            return float(probability(model, ids, target))
    finally:
        for handle in handles:
            handle.remove()


def _moving(model: nn.Module, basis: str, layer: int, neuron: int, by: float, places: Sequence[int]) -> Any:
    module, side = oracle.neuron_module(oracle.layers_of(model)[layer], basis)

    def move(x: Tensor) -> Tensor:
        x = x.clone()
        offset = x.shape[-1] // 2 if side.startswith("second") else 0
        x.view(-1, x.shape[-1])[list(places), offset + neuron] += by
        return x

    if side == "input":
        return module.register_forward_pre_hook(lambda _m, inputs: (move(inputs[0]), *inputs[1:]))
    return module.register_forward_hook(lambda _m, _i, output: move(output))

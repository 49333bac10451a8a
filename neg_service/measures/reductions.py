"""What measures keep of a prompt's gradients when they do not keep them all, computed where the model runs.

Each is a `Reduction` of `gradients.py`, which fetches what it gives. The values are those that NumPy would give of the
same gradients.

Axes: K targets of a prompt, M neurons that act on it, T strongest neurons of a target, S chosen neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from neg_service.measures.gradients import Reduction
from neg_service.measures.signs import signed_by
from neg_service.models.transfer import sent
from neg_service.neurons import Ints
from neg_service.slots import Slots


def all_neurons(_index: int, _slots: Slots, gradient_km: Tensor, activation_m: Tensor) -> tuple[Tensor, Tensor]:
    """NeurGrad [K, M], probability per unit of |activation|, and activations [M]."""
    return signed_by(activation_m, gradient_km), activation_m


def largest_size(_index: int, _slots: Slots, gradient_km: Tensor, _activation_m: Tensor) -> tuple[Tensor]:
    """Each neuron's largest size over the targets [M]; the sign that makes a gradient a NeurGrad does not change it."""
    return (gradient_km.abs().amax(0),)


def strongest(top_k: int) -> Reduction:
    """The neurons with the largest sizes of NeurGrad for each target: place along M, NeurGrad, activation; [K, T] each.

    Among equals the one that comes first along M does.
    """

    def reduce(_index: int, _slots: Slots, gradient_km: Tensor, activation_m: Tensor) -> tuple[Tensor, ...]:
        # Stable: `torch.topk` takes any of equals.
        best_kt = gradient_km.abs().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        neurgrad_km = signed_by(activation_m, gradient_km)
        return best_kt, neurgrad_km.gather(1, best_kt), activation_m[best_kt]

    return reduce


def scores(answers: Sequence[int]) -> Reduction:
    """`polarity`, `magnitude` (whole numbers) and the activation [M] of the prompt i with right label `answers[i]`.

    What they are says `builtin/skill_scores.py`.
    """

    def reduce(index: int, _slots: Slots, gradient_km: Tensor, activation_m: Tensor) -> tuple[Tensor, ...]:
        neurgrad_km = signed_by(activation_m, gradient_km)
        sign_km = neurgrad_km.sign().to(torch.int32)
        right_m = neurgrad_km[answers[index]]
        polarity_m = 2 * sign_km[answers[index]] - sign_km.sum(0, dtype=torch.int32)
        ahead_m = (right_m > neurgrad_km).sum(0, dtype=torch.int32) - (right_m < neurgrad_km).sum(0, dtype=torch.int32)
        return polarity_m, ahead_m, activation_m

    return reduce


def at_places(places: Callable[[int, Slots], Ints]) -> Reduction:
    """NeurGrad [K, S] and activations [S] at `places(index, slots)` along M; at those below 0 they mean nothing."""

    def reduce(index: int, slots: Slots, gradient_km: Tensor, activation_m: Tensor) -> tuple[Tensor, Tensor]:
        place_s = sent(torch.from_numpy(np.maximum(places(index, slots), 0)), gradient_km.device)
        activation_s = activation_m[place_s]
        return signed_by(activation_s, gradient_km[:, place_s]), activation_s

    return reduce

"""Gradients of all targets of a batch of prompts at all neurons of chosen layers, by one backward pass.

For target k of a prompt, at the readout position:  d log p[k] / d a[l, n],  in log probability per activation unit.

Where a row is one token, each target is a row of its own, and a sum over independent rows is differentiated. Where a
row is a whole prompt (masked models), a prompt's targets share one row, and the backward pass alone is run for all of
them, vectorised. Nothing is averaged in either.

Axes: B prompts, K targets of a prompt (the most), R rows: one a (prompt, target), N neurons, F features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neg_service.models.engines.base import Rows
from neg_service.models.feed_forward import HookPoint, hooks
from neg_service.models.head import log_softmax
from neg_service.models.precision import at_least_float32
from neg_service.models.start_at_layer import flat


@dataclass(frozen=True)
class TargetGradients:
    """For each (prompt, target), prompt by prompt: log p of the vocabulary [R, V], and by layer d log p / d a and a.

    Each layer's [R, N] lies where the layer does.
    """

    log_p_rv: Tensor
    gradient_lrn: list[Tensor]
    activation_lrn: list[Tensor]


def target_gradients(
    rows: Rows, target_ids: Sequence[Sequence[int]], points: Mapping[int, HookPoint]
) -> TargetGradients:
    """Differentiate log p of `target_ids[b]`, the targets of prompt b, at the neurons of `points`, by layer."""
    counts = [1 if rows.targets_share_rows else len(own) for own in target_ids]
    place_r = rows.positions(counts)
    leaves: dict[int, Tensor] = {}
    activations: dict[int, Tensor] = {}

    def capture(layer: int, x: Tensor) -> Tensor:
        place = place_r.to(x.device)
        activations[layer] = points[layer].neurons(flat(x.detach().contiguous())[place])
        if len(place) * x.shape[-1] == x.numel():
            # Nothing frozen requires a gradient; the lowest chosen layer's neurons are where the graph begins.
            leaves[layer] = x if x.requires_grad else x.detach().requires_grad_()
            return leaves[layer]
        # A shift by zero at the readout positions alone: the gradients at all others are not kept.
        leaves[layer] = x.new_zeros(len(place), x.shape[-1], requires_grad=True)
        return x.reshape(-1, x.shape[-1]).index_add(0, place, leaves[layer]).view_as(x)

    with torch.enable_grad(), hooks(points, capture):
        log_p = log_softmax(at_least_float32(rows.run(counts)))
        if rows.targets_share_rows:
            prompt_r = torch.tensor([b for b, own in enumerate(target_ids) for _ in own])
            target_r = torch.tensor([k for own in target_ids for k in range(len(own))])
            slopes_lkrf = _for_each_target(log_p, target_ids, [leaves[layer] for layer in points])
            slopes = [slope_krf[target_r, prompt_r] for slope_krf in slopes_lkrf]
            log_p = log_p[prompt_r]
            activations = {layer: own[prompt_r] for layer, own in activations.items()}
        else:
            ids_r1 = torch.tensor([token for own in target_ids for token in own], device=log_p.device)[:, None]
            slopes_lrf = torch.autograd.grad(log_p.gather(1, ids_r1).sum(), [leaves[layer] for layer in points])
            slopes = [flat(slope.contiguous()) for slope in slopes_lrf]
    return TargetGradients(
        log_p_rv=log_p.detach(),
        gradient_lrn=[point.neurons(slope) for point, slope in zip(points.values(), slopes, strict=True)],
        activation_lrn=[activations[layer] for layer in points],
    )


def _for_each_target(
    log_p_bv: Tensor, target_ids: Sequence[Sequence[int]], leaves: Sequence[Tensor]
) -> Sequence[Tensor]:
    """d log p[k] / d leaf [K, B, F] of each leaf [B, F], or [B, 1, F] where prompts are their mask tokens alone.

    For a prompt with fewer targets the rest is zero.
    """
    device = log_p_bv.device
    summed_k = torch.stack(
        [
            log_p_bv[
                torch.tensor([b for b, own in enumerate(target_ids) if k < len(own)], device=device),
                torch.tensor([own[k] for own in target_ids if k < len(own)], device=device),
            ].sum()
            for k in range(max(map(len, target_ids)))
        ]
    )
    one_each = torch.eye(len(summed_k), dtype=summed_k.dtype, device=device)
    slopes = torch.autograd.grad(summed_k, leaves, grad_outputs=one_each, is_grads_batched=True)
    return [slope.flatten(1, -2) for slope in slopes]

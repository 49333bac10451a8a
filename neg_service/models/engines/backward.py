"""Gradients of all targets of a batch of prompts at all neurons of chosen sites, by one backward pass.

For target k of a prompt, at the readout position:  d log p[k] / d a[l, n],  in log probability per activation unit.

Where a row is one token, each target is a row of its own, and a sum over independent rows is differentiated. Where a
row is a whole prompt, a prompt's targets share one row, and the backward pass alone is run for all of
them, vectorised. Nothing is averaged in either.

Axes: B prompts, K targets of a prompt (the most), R rows: one a (prompt, target), N neurons of a site, F features, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neg_service.models.engines.base import Rows
from neg_service.models.experts_function import Routing, watching_routing
from neg_service.models.feed_forward import Point, Site, hooks
from neg_service.models.head import log_softmax
from neg_service.models.precision import at_least_float32
from neg_service.models.start_at_layer import flat
from neg_service.models.transfer import indices, sent


@dataclass(frozen=True)
class TargetGradients:
    """For each (prompt, target), prompt by prompt: log p of the vocabulary [R, V], and by site d log p / d a and a
    (of logits where these are differentiated).

    Each site's [R, N] lies where its layer does. routing: of the pass, by module; place_r: where in it rows are read.
    """

    log_p_rv: Tensor
    gradient_srn: list[Tensor]
    activation_srn: list[Tensor]
    routing: dict[nn.Module, Routing]
    place_r: Tensor


def target_gradients(
    rows: Rows, target_ids: Sequence[Sequence[int]], points: Mapping[Site, Point], *, of_logits: bool = False
) -> TargetGradients:
    """Differentiate log p of `target_ids[b]`, the targets of prompt b, at the neurons of `points`, by site.

    of_logits: differentiate their logits in its place.
    """
    counts = [1 if rows.targets_share_rows else len(own) for own in target_ids]
    place_r = rows.positions(counts)
    places: dict[torch.device, Tensor] = {}
    leaves: dict[Site, Tensor] = {}
    activations: dict[Site, Tensor] = {}

    def capture(site: Site, x: Tensor) -> Tensor:
        if x.device not in places:
            places[x.device] = sent(place_r, x.device)
        place = places[x.device]
        activations[site] = points[site].neurons(flat(x.detach().contiguous())[place])
        if len(place) * x.shape[-1] == x.numel():
            # Nothing frozen requires a gradient; the lowest chosen layer's neurons are where the graph begins.
            leaves[site] = x if x.requires_grad else x.detach().requires_grad_()
            return leaves[site]
        # A shift by zero at the readout positions alone: the gradients at all others are not kept.
        leaves[site] = x.new_zeros(len(place), x.shape[-1], requires_grad=True)
        return x.reshape(-1, x.shape[-1]).index_add(0, place, leaves[site]).view_as(x)

    with torch.enable_grad(), watching_routing() as routing, hooks(points, capture):
        logits = at_least_float32(rows.run(counts))
        log_p = log_softmax(logits)
        differentiated = logits if of_logits else log_p
        if rows.targets_share_rows:
            prompt_r = torch.tensor([b for b, own in enumerate(target_ids) for _ in own])
            target_r = torch.tensor([k for own in target_ids for k in range(len(own))])
            prompt_of = {device: sent(prompt_r, device) for device in {log_p.device, *places}}
            target_of = {device: sent(target_r, device) for device in places}
            slopes_skrf = _for_each_target(differentiated, target_ids, [leaves[site] for site in points])
            slopes = [own_krf[target_of[own_krf.device], prompt_of[own_krf.device]] for own_krf in slopes_skrf]
            log_p, place_r = log_p[prompt_of[log_p.device]], place_r[prompt_r]
            activations = {site: own[prompt_of[own.device]] for site, own in activations.items()}
        else:
            ids_r1 = indices([token for own in target_ids for token in own], log_p.device)[:, None]
            # What the output does not depend on has a gradient too: zero.
            summed = differentiated.gather(1, ids_r1).sum()
            slopes_srf = torch.autograd.grad(summed, [leaves[site] for site in points], materialize_grads=True)
            slopes = [flat(slope.contiguous()) for slope in slopes_srf]
    return TargetGradients(
        log_p_rv=log_p.detach(),
        gradient_srn=[point.neurons(slope) for point, slope in zip(points.values(), slopes, strict=True)],
        activation_srn=[activations[site] for site in points],
        routing=routing,
        place_r=place_r,
    )


def _for_each_target(
    value_bv: Tensor, target_ids: Sequence[Sequence[int]], leaves: Sequence[Tensor]
) -> Sequence[Tensor]:
    """d value[k] / d leaf [K, B, F] of each leaf [B, F], or [B, 1, F] where prompts are their mask tokens alone.

    For a prompt with fewer targets the rest is zero.
    """
    device = value_bv.device
    summed_k = torch.stack(
        [
            value_bv[
                indices([b for b, own in enumerate(target_ids) if k < len(own)], device),
                indices([own[k] for own in target_ids if k < len(own)], device),
            ].sum()
            for k in range(max(map(len, target_ids)))
        ]
    )
    one_each = torch.eye(len(summed_k), dtype=summed_k.dtype, device=device)
    slopes = torch.autograd.grad(summed_k, leaves, grad_outputs=one_each, is_grads_batched=True, materialize_grads=True)
    return [slope.flatten(1, -2) for slope in slopes]

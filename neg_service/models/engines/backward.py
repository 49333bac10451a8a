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
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from neg_service.models.engines.base import Rows, TreeRows
from neg_service.models.engines.token_sums import UsedExperts, expert_row_sums, row_sums, united, used_experts
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
    rest_r: of targets of several tokens, if it was asked for, what probability leaves to all else [R], float64.
    Of gradients that are sums over tokens: place_a, where these are, row by row; used: see `token_sums.py`, where N is
    U·N of a site of experts.
    """

    log_p_rv: Tensor
    gradient_srn: list[Tensor]
    activation_srn: list[Tensor]
    routing: dict[nn.Module, Routing]
    place_r: Tensor
    rest_r: Tensor | None = None
    place_a: Tensor | None = None
    used: UsedExperts = field(default_factory=dict)


def target_gradients(
    rows: Rows, target_ids: Sequence[Sequence[int]], points: Mapping[Site, Point], *,
    of_logits: bool = False, least_rows: int = 1,
) -> TargetGradients:  # fmt: skip
    """Differentiate log p of `target_ids[b]`, the targets of prompt b, at the neurons of `points`, by site.

    of_logits: differentiate their logits in its place. least_rows: where targets have rows of their own, run so many at
    least.
    """
    counts = [1 if rows.targets_share_rows else len(own) for own in target_ids]
    n_read = sum(counts)
    if not rows.targets_share_rows:
        counts[-1] += max(0, least_rows - n_read)
    place_r = rows.positions(counts)
    leaves = _Leaves(points, place_r)
    with torch.enable_grad(), watching_routing() as routing, hooks(points, leaves.capture):
        logits = at_least_float32(rows.run(counts))
        log_p = log_softmax(logits)
        differentiated = logits if of_logits else log_p
        activations = leaves.activations
        if rows.targets_share_rows:
            prompt_r = torch.tensor([b for b, own in enumerate(target_ids) for _ in own])
            target_r = torch.tensor([k for own in target_ids for k in range(len(own))])
            prompt_of = {device: sent(prompt_r, device) for device in {log_p.device, *leaves.places}}
            target_of = {device: sent(target_r, device) for device in leaves.places}
            slopes_skrf = _for_each_target(differentiated, target_ids, [leaves.of_site[site] for site in points])
            slopes = [own_krf[target_of[own_krf.device], prompt_of[own_krf.device]] for own_krf in slopes_skrf]
            log_p, place_r = log_p[prompt_of[log_p.device]], place_r[prompt_r]
            activations = {site: own[prompt_of[own.device]] for site, own in activations.items()}
        else:
            ids_r1 = indices([token for own in target_ids for token in own], log_p.device)[:, None]
            log_p, place_r = log_p[:n_read], place_r[:n_read]
            slopes = [own[:n_read] for own in leaves.slopes(differentiated[:n_read].gather(1, ids_r1).sum())]
            activations = {site: own[:n_read] for site, own in activations.items()}
    return TargetGradients(
        log_p_rv=log_p.detach(),
        gradient_srn=[point.neurons(slope) for point, slope in zip(points.values(), slopes, strict=True)],
        activation_srn=[activations[site] for site in points],
        routing=routing,
        place_r=place_r,
    )


def sequence_gradients(
    rows: TreeRows, targets: Sequence[Sequence[Sequence[int]]], points: Mapping[Site, Point], each: str | None = None,
    behind: Sequence[int] | None = None, used: UsedExperts | None = None, *, of_logits: bool = False,
    with_rest: bool = False,
) -> TargetGradients:  # fmt: skip
    """The same of targets of several tokens: log p of `targets[b][k]`, the sum over its tokens, is differentiated.

    behind: how many of a prompt's tokens stand behind the shifted one; none where it is not given. of_logits: the sum
    of the tokens' logits in its place. with_rest: give `rest_r`, too. `rows` are those targets' chains (`trees.py`).
    `log_p_rv` holds what each target's own tokens have, in their order, zero behind the last [R, S].

    each: differentiate at every token of a chain, and not at the first alone: `signed` sums these gradients, with the
    neuron moved alike at all of them, `magnitude` their products with the activations' signs there, with +1 at zero.
    used: experts whose neurons have a place, too, whether or not these tokens choose them.
    """
    tokens_r = [tokens for own in targets for tokens in own]
    counts = [len(own) for own in targets]
    place_r = rows.positions(counts)
    at_rq = place_r[:, None] if each is None else rows.each_positions(counts)
    leaves = _Leaves(points, at_rq[at_rq >= 0])
    with torch.enable_grad(), watching_routing() as routing, hooks(points, leaves.capture):
        logits_mv = at_least_float32(rows.run(counts))
        log_p_mv = log_softmax(logits_mv)
        ids_m1 = indices([token for tokens in tokens_r for token in tokens], log_p_mv.device)[:, None]
        read_m = _read(targets, behind, log_p_mv.device)
        log_p_m = log_p_mv[read_m].gather(1, ids_m1)[:, 0]
        slopes = leaves.slopes((logits_mv[read_m].gather(1, ids_m1) if of_logits else log_p_m).sum())
    row_m = indices([r for r, tokens in enumerate(tokens_r) for _ in tokens], log_p_m.device)
    place_m = indices([s for tokens in tokens_r for s in range(len(tokens))], log_p_m.device)
    log_p_rs = log_p_m.new_zeros(len(tokens_r), max(map(len, tokens_r)))
    log_p_rs[row_m, place_m] = log_p_m.detach()
    rest_r = _rest(log_p_mv.detach()[read_m], log_p_m.detach(), row_m, len(tokens_r)) if with_rest else None
    own = [point.neurons(slope) for point, slope in zip(points.values(), slopes, strict=True)]
    activations = [leaves.activations[site] for site in points]
    if each is not None:
        used, own, activations = _summed(points, own, activations, routing, at_rq, counts, each, used or {})
    return TargetGradients(
        log_p_rv=log_p_rs,
        gradient_srn=own,
        activation_srn=activations,
        routing=routing,
        place_r=place_r,
        rest_r=rest_r,
        place_a=None if each is None else at_rq[at_rq >= 0],
        used=used or {},
    )


def _rest(log_p_mv: Tensor, log_p_m: Tensor, row_m: Tensor, n_rows: int) -> Tensor:
    """1 - p of each row's target [R], float64, as exact as p is where it is nearly 1."""
    rest_m = log_p_mv.exp().sum(1, dtype=torch.float64) - log_p_m.exp().double()
    # Of an improbable token the rest may be above 1 by rounding, and its own logarithm is exact.
    exact_m = torch.where(rest_m < 0.5, torch.log1p(-rest_m.clamp(max=0.5)), log_p_m.double())
    return -torch.expm1(rest_m.new_zeros(n_rows).index_add(0, row_m, exact_m))


def _read(
    targets: Sequence[Sequence[Sequence[int]]], behind: Sequence[int] | None, device: torch.device
) -> Tensor | slice:
    """Which tokens of all rows predict those of a target."""
    if behind is None or not any(behind):
        return slice(None)
    start = 0
    found: list[int] = []
    for own, n in zip(targets, behind, strict=True):
        for tokens in own:
            found += range(start + n, start + n + len(tokens))
            start += n + len(tokens)
    return indices(found, device)


def _summed(
    points: Mapping[Site, Point], slopes: Sequence[Tensor], activations: Sequence[Tensor],
    routing: Mapping[nn.Module, Routing], at_rq: Tensor, counts: Sequence[int], each: str, used: UsedExperts,
) -> tuple[UsedExperts, list[Tensor], list[Tensor]]:  # fmt: skip
    """Gradients [R, N] over the tokens of each row, activations at its first, and the experts of which these are."""
    is_there_rq = at_rq >= 0
    row_a, place_a = is_there_rq.nonzero()[:, 0], at_rq[is_there_rq]
    prompt_r = torch.tensor([b for b, n in enumerate(counts) for _ in range(n)])
    used = united(used, used_experts(routing, place_a, prompt_r[row_a], len(counts)))
    by_sign, sums = each == "magnitude", []
    for point, slope_an, activation_an in zip(points.values(), slopes, activations, strict=True):
        if point.module not in used:
            sums.append(row_sums(row_a, slope_an, activation_an, len(at_rq), by_sign=by_sign))
            continue
        chosen_tk, is_used_bx = routing[point.module].expert_tk, used[point.module]
        expert_ak = chosen_tk[sent(place_a, chosen_tk.device)]
        sums.append(expert_row_sums(row_a, slope_an, activation_an, prompt_r, expert_ak, is_used_bx, by_sign=by_sign))
    return used, [summed for summed, _ in sums], [first for _, first in sums]


class _Leaves:
    """Where the graph of a pass begins: the neurons of some sites, at each row's shifted token.

    activations: what they are there [R, N], by site. places: the tokens' places, by device.
    """

    def __init__(self, points: Mapping[Site, Point], place_r: Tensor) -> None:
        self._points, self._place_r = points, place_r
        self.places: dict[torch.device, Tensor] = {}
        self.of_site: dict[Site, Tensor] = {}
        self.activations: dict[Site, Tensor] = {}

    def capture(self, site: Site, x: Tensor) -> Tensor:
        """Let what passes by at a site require a gradient; for `hooks`."""
        if x.device not in self.places:
            self.places[x.device] = sent(self._place_r, x.device)
        place = self.places[x.device]
        self.activations[site] = self._points[site].neurons(flat(x.detach().contiguous())[place])
        if len(place) * x.shape[-1] == x.numel():
            # Nothing frozen requires a gradient; the lowest chosen layer's neurons are where the graph begins.
            self.of_site[site] = x if x.requires_grad else x.detach().requires_grad_()
            return self.of_site[site]
        # A shift by zero at the readout positions alone: the gradients at all others are not kept.
        self.of_site[site] = x.new_zeros(len(place), x.shape[-1], requires_grad=True)
        return x.reshape(-1, x.shape[-1]).index_add(0, place, self.of_site[site]).view_as(x)

    def slopes(self, summed: Tensor) -> list[Tensor]:
        """The gradients [R, F] of a sum over independent rows, in the order of the points."""
        leaves = [self.of_site[site] for site in self._points]
        # What the output does not depend on has a gradient too: zero.
        found = torch.autograd.grad(summed, leaves, materialize_grads=True)
        return [flat(slope.contiguous()) for slope in found]


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

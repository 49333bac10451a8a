"""Gradients at several tokens of each row, added up by neuron: of experts, over the tokens that chose their expert.

What passes by at a layer's experts are the neurons of those that each token chose, side by side, so that one neuron
stands elsewhere from token to token. Summed up, a prompt's neurons are those of all experts that any of its tokens
uses, which stand in ascending order; of a batch each prompt has as many columns as the one with the most.

Axes: B prompts, R rows, A tokens of all rows, k chosen experts of a token, X experts of a layer, U used ones of a
prompt (the most), N neurons of an MLP or expert.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from neg_service.models.experts_classes import n_choices_of, n_experts_of
from neg_service.models.experts_function import Routing
from neg_service.models.transfer import sent

# By module of experts, which of them some tokens of each prompt use [B, X].
UsedExperts = dict[nn.Module, Tensor]


def used_experts(
    routing: Mapping[nn.Module, Routing], place_a: Tensor, prompt_a: Tensor, n_prompts: int
) -> UsedExperts:
    """Of the tokens at some places of a pass, each of which belongs to a prompt."""
    found = {}
    for module, own in routing.items():
        if own.is_attention:
            continue
        device = own.expert_tk.device
        is_used_bx = torch.zeros(n_prompts, n_choices_of(module), dtype=torch.bool, device=device)
        is_used_bx[sent(prompt_a, device)[:, None], own.expert_tk[sent(place_a, device)]] = True
        # Identities have no neurons.
        found[module] = is_used_bx[:, : n_experts_of(module)]
    return found


def united(one: UsedExperts, other: UsedExperts) -> UsedExperts:
    """Those of either; `one` may be of none."""
    return {module: own_bx | one[module] if one else own_bx for module, own_bx in other.items()}


def row_sums(
    row_a: Tensor, slope_an: Tensor, activation_an: Tensor, n_rows: int, *, by_sign: bool
) -> tuple[Tensor, Tensor]:
    """Gradients [R, N] of an MLP's neurons added up by row, and activations at each row's first token.

    row_a: each token's row, ascending. by_sign: add up products with the activations' signs, with +1 at zero.
    """
    row_a = sent(row_a, slope_an.device)
    if by_sign:
        slope_an = torch.where(activation_an < 0, -slope_an, slope_an)
    summed_rn = slope_an.new_zeros(n_rows, slope_an.shape[1]).index_add(0, row_a, slope_an)
    return summed_rn, activation_an[torch.searchsorted(row_a, torch.arange(n_rows, device=row_a.device))]


def expert_row_sums(
    row_a: Tensor, slope_an: Tensor, activation_an: Tensor, prompt_r: Tensor, expert_ak: Tensor, is_used_bx: Tensor,
    *, by_sign: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same of experts' neurons, of which each token has those that it chose [A, k·N]; [R, U·N] both.

    The activation of an expert that a row's first token did not choose is 0 there.
    """
    n_rows, device = len(prompt_r), slope_an.device
    row_a, prompt_r, is_used_bx = (sent(own, device) for own in (row_a, prompt_r, is_used_bx))
    n_used = int(is_used_bx.sum(1).max())
    expert_ak, n_experts = sent(expert_ak, device), is_used_bx.shape[1]
    # Identities have no neurons, and no place.
    is_there_s = (expert_ak < n_experts).flatten()
    slot_ak = (is_used_bx.cumsum(1) - 1)[prompt_r[row_a][:, None], expert_ak.clamp(max=n_experts - 1)]
    if by_sign:
        slope_an = torch.where(activation_an < 0, -slope_an, slope_an)
    place_s = (row_a[:, None] * n_used + slot_ak).flatten()[is_there_s]
    is_first_a = torch.cat([row_a.new_ones(1, dtype=torch.bool), row_a[1:] != row_a[:-1]])
    found = []
    for own_an in (slope_an, activation_an * is_first_a[:, None]):
        own_sn = own_an.reshape(len(is_there_s), -1)[is_there_s]
        summed = own_sn.new_zeros(n_rows * n_used, own_sn.shape[1]).index_add(0, place_s, own_sn)
        found.append(summed.view(n_rows, -1))
    return found[0], found[1]

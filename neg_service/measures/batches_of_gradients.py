"""Gradients of a batch of prompts, where the model computed them, and how they are fetched.

All prompts of a batch share two arrays. Where neurons are those of all experts that any of several tokens uses, or
where a token chose identities in the place of experts, prompts have unequal numbers of them, and each has columns of
its own.

Axes: B prompts, K targets of a prompt, M neurons that act on one in the chosen layers, R rows: (prompt, target), S
tokens of a target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.errors import NonFiniteError
from neg_service.measures.routing import PromptRouting
from neg_service.measures.sequences import TokenLogP
from neg_service.measures.signs import Floats
from neg_service.models.feed_forward import Site
from neg_service.models.transfer import fetched, sent
from neg_service.slots import Slots


@dataclass(frozen=True)
class FetchedGradients:
    """What was asked for of a batch, and of each prompt its probabilities and its tokens' log p, on the CPU."""

    tensors: list[Tensor]
    probability_bk: list[Floats]
    log_p_b: list[TokenLogP]


@dataclass(frozen=True)
class BatchGradients:
    """Of a batch of prompts, on the model's device.

    who: names the prompts in messages. rows: where along R a prompt's targets are. gradient_rm: probability per
    activation unit, or the readout's unit. activation_bm: of each prompt's readout position. finite_r: whether logits
    and gradients are. probability_bk: of all targets of each prompt, of which `n_tokens` has as many; what is behind
    them means nothing. log_p_bks: of their tokens, where targets are several, zero behind the last of a target.
    columns: which of M are each prompt's neurons, where it has fewer than others; None where all are everyone's.
    """

    who: list[str]
    targets: list[tuple[int, ...]]
    rows: list[slice]
    n_tokens: list[list[int]]
    gradient_rm: Tensor
    activation_bm: Tensor
    finite_r: Tensor
    probability_bk: Tensor
    slots: list[Slots]
    routings: list[PromptRouting]
    log_p_bks: Tensor | None = None
    columns: list[NDArray[np.int64]] | None = None

    def columns_of(self, b: int) -> NDArray[np.int64] | slice:
        """Along M those of a prompt."""
        return slice(None) if self.columns is None else self.columns[b]

    def of_prompt(self, b: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Gradients [K, M] and activations [M] of a prompt, whose targets are at `rows`."""
        gradient_km, activation_m = self.gradient_rm[rows], self.activation_bm[b]
        if self.columns is None:
            return gradient_km, activation_m
        columns = sent(torch.from_numpy(self.columns[b]), gradient_km.device)
        return gradient_km[:, columns], activation_m[columns]

    def fetched(self, tensors: Sequence[Tensor]) -> FetchedGradients:
        """Tensors on the CPU, with the prompts' probabilities, by one wait.

        Raises:
            NonFiniteError: NaN or infinity in logits or gradients of a prompt.
        """
        beside = [] if self.log_p_bks is None else [self.log_p_bks]
        finite_r, probability_bk, *found = fetched([self.finite_r, self.probability_bk, *tensors, *beside])
        log_p_b: list[TokenLogP] = [None] * len(self.who)
        if beside:
            log_p_bks = found.pop().numpy()
            log_p_b = [
                tuple(log_p_bks[b, k, :n].copy() for k, n in enumerate(own)) for b, own in enumerate(self.n_tokens)
            ]
        for who, rows in zip(self.who, self.rows, strict=True):
            if not finite_r[rows].all():
                raise NonFiniteError(f"{who}: NaN or infinity in logits or gradients; try another model.dtype")
        p_bk = probability_bk.numpy()
        return FetchedGradients(found, [p_bk[b, : len(own)].copy() for b, own in enumerate(self.n_tokens)], log_p_b)


def columns_of_prompts(
    points: Iterable[Site], widths: Sequence[int], slots: Sequence[Slots]
) -> list[NDArray[np.int64]] | None:
    """Where each prompt's neurons stand, of which a site has as many columns as the prompt with the most needs.

    None where every prompt needs all of them.
    """
    if all(own.m == sum(widths) for own in slots):
        return None
    starts, sites = np.cumsum([0, *widths[:-1]]), list(points)
    found = []
    for own in slots:
        of_site = [
            int(own.size[(own.layer == site.layer) & (own.expert >= 0)].sum()) if site.is_experts else width
            for site, width in zip(sites, widths, strict=True)
        ]
        found.append(np.concatenate([start + np.arange(n) for start, n in zip(starts, of_site, strict=True)]))
    return found

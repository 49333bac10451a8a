"""Gradients of target probabilities at every feed-forward neuron, for batches of prompts of unequal length.

For target k, layer l and neuron n at the readout position (the prompt's last token):

    gradient[k, l, n] = d p[k] / d a[l, n] = p[k] * d log p[k] / d a[l, n]

in probability per activation unit. log p is what is differentiated, in float32: the tail of a low-precision
softmax is zero. Each target is a branch of its own over the prompt's frozen prefix, so one backward over a *sum* of
independent rows gives every gradient; nothing is averaged.

Left out on purpose: a backward pass per target over one shared forward row. It would save half of the branches'
forward work, a few per cent of the whole, and needs vectorised autograd, which not every operation supports.

Axes: K targets of a prompt, L chosen layers, N neurons of a layer, R branches of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.errors import NonFiniteError
from neg_service.measures.batching import in_batches, named
from neg_service.models.batches import Budget
from neg_service.models.branches import at_least_float32
from neg_service.models.feed_forward import Site, visiting
from neg_service.models.language_model import LanguageModel
from neg_service.models.rows import Rows, flat
from neg_service.prompts.prompt import EncodedPrompt

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PromptGradients:
    """One prompt's gradients.

    targets: indices of the differentiated targets, along the first axis of `gradient_kln`.
    probability_k: of *all* targets of the prompt, 0..1.
    gradient_kln: probability per activation unit.
    activation_ln: the neurons' activations at the readout position.
    """

    targets: tuple[int, ...]
    probability_k: Floats
    gradient_kln: Floats
    activation_ln: Floats


def gradients(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    wanted: Sequence[Sequence[int]],
    basis: str,
    layers: Sequence[int],
    budget: Budget,
) -> Iterator[tuple[int, PromptGradients]]:
    """Measure prompts in whatever order is cheapest; yields (index, result), each index once.

    `wanted[i]` are the indices of the targets of prompt i to differentiate; probabilities cover all targets.
    """
    all_sites = model.feed_forward.sites(basis)
    sites = {layer: all_sites[layer] for layer in layers}

    def run(indices: Sequence[int], header: tuple[int, ...]) -> list[PromptGradients]:
        return _run_batch(model, [prompts[i] for i in indices], [wanted[i] for i in indices], sites, header)

    return in_batches(model, prompts, [len(own) for own in wanted], run, budget)


def _run_batch(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    wanted: Sequence[Sequence[int]],
    sites: dict[int, Site],
    header: tuple[int, ...],
) -> list[PromptGradients]:
    counts = [len(own) for own in wanted]
    target_ids = [prompt.target_ids[k] for prompt, own in zip(prompts, wanted, strict=True) for k in own]
    found = row_gradients(model.rows([prompt.ids for prompt in prompts], header), counts, sites, target_ids)
    log_p_rv = found.log_p_rv
    finite_r = log_p_rv.isfinite().all(-1).cpu()
    p_r = log_p_rv[range(len(target_ids)), target_ids].exp().cpu().numpy()
    # Layer by layer to the CPU: all of them on an accelerator would take the room of the next batch.
    gradient_rln: Floats = torch.stack([slopes.float().cpu() for slopes in found.gradient_lrn], 1).numpy()
    activation_rln: Floats = torch.stack([values.float().cpu() for values in found.activation_lrn], 1).numpy()
    results, row = [], 0
    for prompt, own in zip(prompts, wanted, strict=True):
        ours = slice(row, row + len(own))
        gradient_kln = gradient_rln[ours] * p_r[ours, None, None]
        activation_ln = activation_rln[row]
        if not (finite_r[ours].all() and np.isfinite(gradient_kln).all()):
            raise NonFiniteError(
                f"{named(prompt, model)}: NaN or infinity in logits or gradients; try another model.dtype"
            )
        targets = torch.tensor(prompt.target_ids, device=log_p_rv.device)
        results.append(
            PromptGradients(
                targets=tuple(own),
                probability_k=log_p_rv[row, targets].detach().exp().cpu().numpy(),
                gradient_kln=gradient_kln,
                activation_ln=activation_ln,
            )
        )
        row += len(own)
    return results


@dataclass(frozen=True)
class RowGradients:
    """Of a pass over rows: log p of the vocabulary [R, V]; for each layer, d log p[target of the row] / d a, and a.

    Each layer's [R, N] lies where the layer does.
    """

    log_p_rv: Tensor
    gradient_lrn: list[Tensor]
    activation_lrn: list[Tensor]


def signed_by(activation: Tensor, values: Tensor) -> Tensor:
    """`values` times the sign of `activation`, where the sign of zero is plus one: a silent neuron can only grow."""
    return torch.where(activation < 0, -values, values)


def row_gradients(
    rows: Rows, counts: Sequence[int], sites: Mapping[int, Site], target_ids: Sequence[int]
) -> RowGradients:
    """One backward over a sum of independent rows, `counts[b]` of prompt b, each with a target of its own."""
    captured: dict[int, Tensor] = {}

    def capture(layer: int, x: Tensor) -> Tensor:
        # Nothing frozen requires a gradient; the lowest chosen layer's neurons are where the graph begins.
        captured[layer] = x if x.requires_grad else x.detach().requires_grad_()
        return captured[layer]

    with torch.enable_grad(), visiting(sites, capture):
        log_p_rv = at_least_float32(rows.run(counts)).log_softmax(-1)
        target_r1 = torch.tensor(target_ids, device=log_p_rv.device)[:, None]
        slopes = torch.autograd.grad(log_p_rv.gather(1, target_r1).sum(), [captured[layer] for layer in sites])

    positions_r = rows.positions(counts)

    def own(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [
            site.neurons(flat(x.detach().contiguous())[positions_r.to(x.device)])
            for site, x in zip(sites.values(), tensors, strict=True)
        ]

    return RowGradients(log_p_rv.detach(), own(slopes), own([captured[layer] for layer in sites]))

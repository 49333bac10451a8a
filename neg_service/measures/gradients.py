"""Gradients of target probabilities at every feed-forward neuron, for batches of prompts of unequal length.

For target k and neuron m at the readout position (the prompt's last token):

    gradient[k, m] = d p[k] / d a[m] = p[k] * d log p[k] / d a[m]

in probability per activation unit. log p is what is differentiated, in float32: the tail of a low-precision
softmax is zero. How one backward pass gives all of it: `models/engines/backward.py`.

NeurGrad is the gradient times the sign of the activation, +1 at zero: a silent neuron can only grow.

Axes: K targets of a prompt, M neurons that act on it in the chosen layers, R rows: (prompt, target), V vocabulary;
where all layers have the same number of neurons and no experts, L layers of N neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.errors import ModelError, NonFiniteError
from neg_service.layer_neurons import NO_EXPERT
from neg_service.measures.batching import in_batches, named
from neg_service.measures.routing import PromptRouting, routing_of_rows, slots_of
from neg_service.models.batches import Budget
from neg_service.models.engines.backward import target_gradients
from neg_service.models.feed_forward import Point, Site
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.slots import Slots

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PromptGradients:
    """One prompt's gradients.

    targets: indices of the differentiated targets, along the first axis of `gradient_km`.
    probability_k: of *all* targets of the prompt, 0..1.
    gradient_km: probability per activation unit.
    activation_m: the neurons' activations at the readout position.
    slots: which neurons stand along M. routing: the experts that were chosen, of all layers.
    """

    targets: tuple[int, ...]
    probability_k: Floats
    gradient_km: Floats
    activation_m: Floats
    slots: Slots
    routing: PromptRouting

    @property
    def neurgrad_km(self) -> Floats:
        """NeurGrad, probability per unit of |activation|."""
        return self.gradient_km * sign(self.activation_m)

    @property
    def gradient_kln(self) -> Floats:
        """Of layers of equal size without experts, the gradients by layer."""
        self._require_layers()
        return self.gradient_km.reshape(len(self.gradient_km), len(self.slots.size), -1)

    @property
    def activation_ln(self) -> Floats:
        """Of layers of equal size without experts, the activations by layer."""
        self._require_layers()
        return self.activation_m.reshape(len(self.slots.size), -1)

    def _require_layers(self) -> None:
        if (self.slots.expert != NO_EXPERT).any() or len(set(self.slots.size.tolist())) > 1:
            raise ModelError(
                "its layers have experts, or unequal numbers of neurons: a measure finds each neuron by `slots`, along "
                "`gradient_km` and `activation_m`"
            )


def sign(activation: Floats) -> Floats:
    """The sign of an activation, +1 at zero."""
    return np.where(activation < 0, np.float32(-1), np.float32(1))


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
    points = model.feed_forward.sites(basis, layers)

    def run(indices: Sequence[int], shared: tuple[int, ...]) -> list[PromptGradients]:
        return _run_batch(model, [prompts[i] for i in indices], [wanted[i] for i in indices], points, shared)

    n_targets = [len(own) for own in wanted]
    counts = [1] * len(prompts) if model.engine.targets_share_rows else n_targets
    return in_batches(model, prompts, counts, run, budget, n_targets)


def _run_batch(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    wanted: Sequence[Sequence[int]],
    points: dict[Site, Point],
    shared: tuple[int, ...],
) -> list[PromptGradients]:
    target_ids = [[prompt.target_ids[k] for k in own] for prompt, own in zip(prompts, wanted, strict=True)]
    found = target_gradients(model.rows([prompt.ids for prompt in prompts], shared), target_ids, points)
    log_p_rv = found.log_p_rv
    finite_r = log_p_rv.isfinite().all(-1).cpu()
    token_r = [token for own in target_ids for token in own]
    p_r = log_p_rv[range(len(token_r)), token_r].exp().cpu().numpy()
    # Layer by layer to the CPU: all of them on an accelerator would take the room of the next batch.
    gradient_rm: Floats = torch.cat([slopes.float().cpu() for slopes in found.gradient_srn], 1).numpy()
    activation_rm: Floats = torch.cat([values.float().cpu() for values in found.activation_srn], 1).numpy()
    first_rows = np.cumsum([0, *map(len, target_ids[:-1])])
    routings = routing_of_rows(model.feed_forward, found.routing, found.place_r[first_rows])
    slots = None if model.feed_forward.has_experts else slots_of(model.feed_forward, PromptRouting(), points)
    results, row = [], 0
    for prompt, own, routing in zip(prompts, wanted, routings, strict=True):
        ours = slice(row, row + len(own))
        gradient_km = gradient_rm[ours] * p_r[ours, None]
        # A copy: a view would keep the whole batch's array for as long as this prompt's result.
        activation_m = activation_rm[row].copy()
        if not (finite_r[ours].all() and np.isfinite(gradient_km).all()):
            raise NonFiniteError(
                f"{named(prompt, model)}: NaN or infinity in logits or gradients; try another model.dtype"
            )
        targets = torch.tensor(prompt.target_ids, device=log_p_rv.device)
        results.append(
            PromptGradients(
                targets=tuple(own),
                probability_k=log_p_rv[row, targets].detach().exp().cpu().numpy(),
                gradient_km=gradient_km,
                activation_m=activation_m,
                slots=slots or slots_of(model.feed_forward, routing, points),
                routing=routing,
            )
        )
        row += len(own)
    return results


def signed_by(activation: Tensor, values: Tensor) -> Tensor:
    """`values` times the sign of `activation`, where the sign of zero is plus one: a silent neuron can only grow."""
    return torch.where(activation < 0, -values, values)

"""NEG, the neuron empirical gradient, measured: shift one neuron at a time and see what the output does.

The shift moves the neuron's magnitude, a -> a + δ·sgn(a) with sgn(0) = +1: a silent neuron can only grow. With
`shift="signed"` the neuron moves by δ itself, and NEG compares with the plain gradient. What is made of a curve:
`linearity.py`. How a shift's effect is had at the price of the remaining layers: `interventions.py`.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053).

Axes: n neurons asked for, S shifts, K targets, L layers, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from neg_service.config import check_batch_bytes
from neg_service.errors import ConfigurationError, PromptError, told_by_parameters
from neg_service.measures.batching import budget_of
from neg_service.measures.choice import checked_neurons
from neg_service.measures.gradients import signed_by
from neg_service.measures.interventions import Interventions
from neg_service.measures.linearity import Linearity, linearity
from neg_service.measures.shifts import Doubles, Sweep, check_shift, chosen_grid
from neg_service.models.batches import Budget
from neg_service.models.language_model import LanguageModel
from neg_service.neurons import Ints, NeuronSet
from neg_service.prompts.prompt import Prompt, check_prompts
from neg_service.prompts.tokens import encode


@dataclass(frozen=True)
class NegResult:
    """NEG of neurons for one target of one prompt.

    neurons: [n, 2] layer and index, as they were asked for. shifts: [S] activation units.
    delta_p: [n, S] probability.
    neg, r, r2: [n]. activation: [n] at the readout position. probability: without a shift, 0..1.
    """

    neurons: Ints
    shifts: Doubles
    delta_p: Doubles
    neg: Doubles
    r: Doubles
    r2: Doubles
    activation: Doubles
    probability: float


@told_by_parameters(model__source="model", dataset__source="prompt", neurons__list="neurons")
def neg(
    model: LanguageModel,
    prompt: str,
    target: str,
    neurons: Sequence[Sequence[int | None]] | Literal["all"] = "all",
    shifts: Sequence[float] | None = None,
    basis: str = "paper",
    shift: str = "magnitude",
    batch_bytes: int | None = None,
    grid: str = "full",
) -> NegResult:
    """Measure NEG by intervention at the prompt's readout position; formulas, units and source in the module's header.

    Args:
        model: from `load_model`.
        prompt: a text.
        target: what follows it verbatim; one token there.
        neurons: (layer, index) pairs or (layer, expert, index) triples, or `all`, which takes as many milliseconds as
            neurons times shifts, and more.
        shifts: the grid; +-0.1, +-0.2, ... +-2.0 if not given.
        basis: which tensor is "the neuron": `paper`, `hidden` or `gate`.
        shift: `magnitude` or `signed`.
        batch_bytes: memory that a batch may take; if not given, what keeps the device busy and fits it. Halved by
            itself when memory ends, and recovers; never changes the results.
        grid: `full`, or `coarse`: 4 shifts, from which NEG, r and R² of the full grid are interpolated.

    Raises:
        PromptError: the prompt or the target is unusable.
        ConfigurationError: a neuron that does not exist, none at all, a bad grid, or no memory for two rows.
        ModelError: the model fails its self-check, which runs once, before the first measurement.
        NonFiniteError: NaN or infinity in the prompt's logits.
    """
    if not isinstance(prompt, str) or not isinstance(target, str):
        raise PromptError("neg takes one prompt and one target, each a text; neurgrad and intervene take lists")
    asked = [Prompt("0", prompt, (target,))]
    check_prompts(asked)
    check_shift(shift)
    sweep = Sweep(chosen_grid(grid, shifts), basis, shift)
    chosen, place_n = _asked_neurons(neurons, model.feed_forward.neurons_by_layer)
    (encoded,) = encode(model.tokenizer, asked, model.context_length, model.mask_token, model=model)
    model.ensure_checked()
    if batch_bytes is not None:
        check_batch_bytes("batch_bytes", batch_bytes, 2 * 4 * model.row_values)
    budget = budget_of(model, batch_bytes)
    interventions = Interventions(model, encoded, basis)
    found = sweep_prompt(interventions, chosen, sweep, budget, keep_curves=True)
    assert found.delta_p_nsk is not None
    return NegResult(
        neurons=np.stack([chosen.layer, chosen.neuron], 1)[place_n],
        shifts=sweep.grid.shifts,
        delta_p=found.delta_p_nsk[..., 0].cpu().numpy()[place_n],
        neg=found.linearity_nk.neg[:, 0].cpu().numpy()[place_n],
        r=found.linearity_nk.r[:, 0].cpu().numpy()[place_n],
        r2=found.linearity_nk.r2[:, 0].cpu().numpy()[place_n],
        activation=found.activation_n.cpu().numpy()[place_n],
        probability=float(interventions.probability_k[0]),
    )


@dataclass(frozen=True)
class SweepResult:
    """What a sweep of one prompt found, float64 on the model's device, in the order of the set.

    delta_p_nsk: the curves, None where they were not to be kept.
    """

    linearity_nk: Linearity
    activation_n: Tensor
    delta_p_nsk: Tensor | None


def sweep_prompt(
    interventions: Interventions,
    neurons: NeuronSet,
    sweep: Sweep,
    budget: Budget,
    keep_curves: bool,
    on_done: Callable[[int], None] = lambda n: None,
) -> SweepResult:
    """Sweep neurons for all targets, layer by layer; curves never leave the device.

    `on_done` is told how many neurons each layer brought.

    Raises:
        DoesNotFit: one intervention does not fit.
        NonFiniteError: NaN or infinity after an intervention.
    """
    device, probability_k = interventions.device, interventions.probability_k.double()
    evaluated: list[Linearity] = []
    kept: list[Tensor] = []
    activations: list[Tensor] = []
    for layer in neurons.layers:
        own_n = torch.from_numpy(neurons.of_layer(layer)).to(device)
        log_p_nsk = curves(interventions, layer, own_n, sweep, budget).to(device)
        delta_p_nsk = probability_k * log_p_nsk.double().expm1()
        evaluated.append(linearity(sweep.grid, delta_p_nsk.mT))
        activations.append(interventions.activation_ln[layer].to(device)[own_n].double())
        if keep_curves:
            kept.append(delta_p_nsk)
        on_done(len(own_n))
    return SweepResult(
        linearity_nk=Linearity(
            neg=torch.cat([own.neg for own in evaluated]),
            r=torch.cat([own.r for own in evaluated]),
            r2=torch.cat([own.r2 for own in evaluated]),
            max_abs_delta_p=torch.cat([own.max_abs_delta_p for own in evaluated]),
        ),
        activation_n=torch.cat(activations),
        delta_p_nsk=torch.cat(kept) if keep_curves else None,
    )


def curves(interventions: Interventions, layer: int, neurons_n: Tensor, sweep: Sweep, budget: Budget) -> Tensor:
    """Δ log p [n, S, K] of neurons of one layer; batches are filled across neurons."""
    activations = interventions.activation_ln[layer]
    activation_n = activations[neurons_n.to(activations.device)]
    shifts_s = torch.from_numpy(sweep.grid.shifts).to(activations.device)
    moved_ns = shifts_s.expand(len(neurons_n), -1)
    if sweep.shift == "magnitude":
        moved_ns = signed_by(activation_n[:, None], moved_ns)
    delta_ik = interventions.delta_log_p(layer, neurons_n.repeat_interleave(len(shifts_s)), moved_ns.flatten(), budget)
    return delta_ik.view(len(neurons_n), len(shifts_s), -1)


def _asked_neurons(neurons: Any, neurons_by_layer: Sequence[int]) -> tuple[NeuronSet, Ints]:
    """The neurons, and the place among them of each that was asked for."""
    if not isinstance(neurons, str):
        return NeuronSet.distinct(checked_neurons(neurons, neurons_by_layer))
    if neurons != "all":
        raise ConfigurationError(setting="neurons", value=repr(neurons), allowed="'all' or a list of (layer, index)")
    found = NeuronSet.all_of(range(len(neurons_by_layer)), neurons_by_layer)
    return found, np.arange(len(found))

"""NEG, the neuron empirical gradient, measured: shift one neuron at a time and see what the output does.

The shift moves the neuron's magnitude, a -> a + δ·sgn(a) with sgn(0) = +1: a silent neuron can only grow. With
`shift="signed"` the neuron moves by δ itself, and NEG compares with the plain gradient. What is made of a curve:
`linearity.py`. How a shift's effect is had at the price of the remaining layers: `interventions.py`.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053).

Where a layer has experts, its neurons exist for a prompt whose readout token the router gave to their expert; others do
nothing, so that their NEG is 0. A shift may have layers above choose other experts: `routing_changed` says for which
share of a neuron's shifts, and a coarse grid, whose interpolation would not see where the curve breaks, is then run in
full.

Axes: n neurons asked for, S shifts, K targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.config import check_batch_bytes
from neg_service.errors import ConfigurationError, PromptError, told_by_parameters
from neg_service.layer_neurons import ALWAYS_ON, LayerNeurons
from neg_service.measures.batching import budget_of
from neg_service.measures.choice import checked_neurons
from neg_service.measures.gradients import signed_by
from neg_service.measures.interventions import Interventions
from neg_service.measures.linearity import Linearity, linearity
from neg_service.measures.shifts import Doubles, Grid, Sweep, check_shift, chosen_grid, given_grid
from neg_service.models.batches import Budget
from neg_service.models.feed_forward import Site
from neg_service.models.language_model import LanguageModel
from neg_service.neurons import Ints, Neurons, NeuronSet
from neg_service.prompts.prompt import Prompt, check_prompts
from neg_service.prompts.tokens import encode


@dataclass(frozen=True)
class NegResult:
    """NEG of neurons for one target of one prompt.

    neurons: [n, 2] layer and index, as they were asked for; of a model with experts [n, 3], with the expert behind, -1
    of an MLP that every token uses. shifts: [S] activation units. delta_p: [n, S] probability.
    neg, r, r2: [n]. activation: [n] at the readout position. probability: without a shift, 0..1.
    is_routed: [n], whether the readout token used the neuron's expert. routing_changed: [n], the share of its shifts
    for which a layer above chose other experts, 0..1.
    """

    neurons: Ints
    shifts: Doubles
    delta_p: Doubles
    neg: Doubles
    r: Doubles
    r2: Doubles
    activation: Doubles
    probability: float
    is_routed: NDArray[np.bool_]
    routing_changed: Doubles


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
        neurons: (layer, index) pairs, or (layer, index, expert) triples where a layer has experts, -1 for its MLP that
            is always on; or `all` that act on the prompt, which takes as many milliseconds as neurons times shifts,
            and more.
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
    asked_rows = _asked_rows(neurons, model.feed_forward.layer_neurons)
    (encoded,) = encode(model.tokenizer, asked, model.context_length, model.mask_token, model=model)
    model.ensure_checked()
    if batch_bytes is not None:
        check_batch_bytes("batch_bytes", batch_bytes, 2 * 4 * model.row_values)
    budget = budget_of(model, batch_bytes)
    interventions = Interventions(model, encoded, basis)
    if asked_rows is None:
        slots = interventions.slots(list(interventions.points))
        asked_rows = slots.rows_at(np.arange(slots.m))
    chosen, place_n = NeuronSet.distinct(asked_rows)
    found = sweep_prompt(interventions, chosen, sweep, budget, keep_curves=True)
    assert found.delta_p_nsk is not None
    names_n3 = np.stack([chosen.layer, chosen.neuron, np.maximum(chosen.expert, ALWAYS_ON)], 1)
    return NegResult(
        neurons=(names_n3 if model.feed_forward.has_experts else names_n3[:, :2])[place_n],
        shifts=sweep.grid.shifts,
        delta_p=found.delta_p_nsk[..., 0].cpu().numpy()[place_n],
        neg=found.linearity_nk.neg[:, 0].cpu().numpy()[place_n],
        r=found.linearity_nk.r[:, 0].cpu().numpy()[place_n],
        r2=found.linearity_nk.r2[:, 0].cpu().numpy()[place_n],
        activation=found.activation_n.cpu().numpy()[place_n],
        probability=float(interventions.probability_k[0]),
        is_routed=found.is_routed_n[place_n],
        routing_changed=found.routing_changed_n.cpu().numpy()[place_n],
    )


@dataclass(frozen=True)
class SweepResult:
    """What a sweep of one prompt found, float64 on the model's device, in the order of the set.

    delta_p_nsk: the curves, None where they were not to be kept. is_routed_n, routing_changed_n: see `NegResult`.
    is_full_n: whether a curve was run in full in the place of being interpolated. row_gain_n: where errors are a share
    of each row's own effect, what that share is multiplied with; see `noise.py`.
    """

    linearity_nk: Linearity
    activation_n: Tensor
    delta_p_nsk: Tensor | None
    is_routed_n: NDArray[np.bool_]
    routing_changed_n: Tensor
    is_full_n: Tensor
    row_gain_n: Tensor | None = None


def sweep_prompt(
    interventions: Interventions,
    neurons: NeuronSet,
    sweep: Sweep,
    budget: Budget,
    keep_curves: bool,
    on_done: Callable[[int], None] = lambda n: None,
) -> SweepResult:
    """Sweep neurons for all targets, site by site; curves never leave the device.

    `on_done` is told how many neurons each site brought.

    Raises:
        DoesNotFit: one intervention does not fit.
        NonFiniteError: NaN or infinity after an intervention.
    """
    device, probability_k = interventions.device, interventions.probability_k.double()
    sites = interventions.sites(neurons.layers)
    place_n = interventions.slots(sites).places_of(neurons)
    n, k, s = len(neurons), len(probability_k), len(sweep.grid.shifts)
    # Neurons of experts that were not chosen keep their zeros.
    values = {name: torch.zeros(n, k, dtype=torch.float64, device=device) for name in _VALUES}
    activation_n, changed_n = (torch.zeros(n, dtype=torch.float64, device=device) for _ in range(2))
    delta_p_nsk = torch.zeros(n, s, k, dtype=torch.float64, device=device) if keep_curves else None
    row_gain_n: Tensor | None = None
    start = 0
    for site in sites:
        activation_m = interventions.activation[site]
        stop = start + len(activation_m)
        of_set = np.flatnonzero((place_n >= start) & (place_n < stop))
        if len(of_set):
            own_n = torch.from_numpy(place_n[of_set] - start).to(device)
            found = swept(interventions, site, own_n, sweep, budget)
            of_set_n = torch.from_numpy(of_set).to(device)
            for name, own_nk in values.items():
                own_nk[of_set_n] = getattr(found.linearity_nk, name)
            activation_n[of_set_n] = activation_m.to(device)[own_n].double()
            changed_n[of_set_n] = found.routing_changed_n
            if found.row_gain_n is not None:
                row_gain_n = torch.zeros_like(activation_n) if row_gain_n is None else row_gain_n
                row_gain_n[of_set_n] = found.row_gain_n
            if delta_p_nsk is not None:
                delta_p_nsk[of_set_n] = found.delta_p_nsk
            on_done(len(of_set))
        start = stop
    is_full_n = (changed_n > 0) & (sweep.grid.interpolation is not None)
    return SweepResult(Linearity(**values), activation_n, delta_p_nsk, place_n >= 0, changed_n, is_full_n, row_gain_n)


_VALUES = tuple(own.name for own in fields(Linearity))


@dataclass(frozen=True)
class SweptSite:
    """Of neurons of one site: what their curves say, their curves, and for which share of shifts routing changed.

    row_gain_n: see `SweepResult`.
    """

    linearity_nk: Linearity
    delta_p_nsk: Tensor
    routing_changed_n: Tensor
    row_gain_n: Tensor | None


def swept(interventions: Interventions, site: Site, neurons_n: Tensor, sweep: Sweep, budget: Budget) -> SweptSite:
    """Sweep neurons of one site; a curve that an interpolation cannot be trusted with is run in full."""
    device, probability_k = interventions.device, interventions.probability_k.double()

    def run(grid: Grid, own_n: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        log_p_nsk, changed_ns, spread_ns = curves(interventions, site, own_n, replace(sweep, grid=grid), budget)
        if changed_ns is None:
            changed_ns = torch.zeros(log_p_nsk.shape[:2], dtype=torch.bool)
        row_gain_n = None if spread_ns is None else row_gain(sweep.grid, spread_ns.to(device))
        changed_n = changed_ns.to(device).double().mean(1)
        return probability_k * log_p_nsk.to(device).double().expm1(), changed_n, row_gain_n

    grid = sweep.grid
    is_interpolated = grid.interpolation is not None
    if is_interpolated and interventions.has_experts:
        # Layers above choose other experts at large shifts first, of which some lie beyond those that are run.
        ends = np.setdiff1d([grid.evaluated.min(), grid.evaluated.max()], grid.shifts)
        grid = given_grid(np.concatenate([grid.shifts, ends]))
    delta_p_nsk, changed_n, row_gain_n = run(grid, neurons_n)
    delta_p_nsk = delta_p_nsk[:, : len(sweep.grid.shifts)]
    found = linearity(sweep.grid, delta_p_nsk.mT)
    again = changed_n.nonzero()[:, 0]
    if is_interpolated and len(again):
        full = given_grid(sweep.grid.evaluated)
        curve_nsk, changed_n[again], _ = run(full, neurons_n[again])
        in_full = linearity(full, curve_nsk.mT)
        for name in _VALUES:
            getattr(found, name)[again] = getattr(in_full, name)
    return SweptSite(found, delta_p_nsk, changed_n, row_gain_n)


def curves(
    interventions: Interventions, site: Site, neurons_n: Tensor, sweep: Sweep, budget: Budget
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Δ log p [n, S, K] of neurons of one site, where routing changed, and how far logits spread, [n, S] both.

    The latter two are None where there is nothing of the kind (`Changes`). Batches are filled across neurons.
    """
    activations = interventions.activation[site]
    activation_n = activations[neurons_n.to(activations.device)]
    shifts_s = torch.from_numpy(sweep.grid.shifts).to(activations.device)
    moved_ns = shifts_s.expand(len(neurons_n), -1)
    if sweep.shift == "magnitude":
        moved_ns = signed_by(activation_n[:, None], moved_ns)
    numbers_i = neurons_n.repeat_interleave(len(shifts_s))
    delta_ik, changed_i, spread_i = interventions.changes(site, numbers_i, moved_ns.flatten(), budget)
    n, s = moved_ns.shape
    changed_ns, spread_ns = (None if own is None else own.view(n, s) for own in (changed_i, spread_i))
    return delta_ik.view(n, s, -1), changed_ns, spread_ns


def row_gain(grid: Grid, spread_ns: Tensor) -> Tensor:
    """What errors that are a share of each row's spread are multiplied with in a NEG [n]: Σ_s |w_s|·spread_s.

    As if all errors of a curve had one sign: they come from what the rows of a neuron have in common.
    """
    weights_s = torch.from_numpy(np.abs(grid.weights)).to(spread_ns.device)
    return spread_ns[:, : len(weights_s)].double() @ weights_s


def _asked_rows(neurons: Any, layer_neurons: Sequence[LayerNeurons]) -> Neurons | None:
    """The neurons that were asked for as rows (layer, expert, neuron); None for all."""
    if not isinstance(neurons, str):
        return checked_neurons(neurons, layer_neurons)
    if neurons != "all":
        raise ConfigurationError(setting="neurons", value=repr(neurons), allowed="'all' or a list of (layer, index)")
    return None

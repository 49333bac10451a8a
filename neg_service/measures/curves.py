"""Curves of Δp over shifts, measured: neurons swept site by site, and what their curves say.

A grid's shifts are all run, or, of the adaptive grid, as many as a neuron needs (`adaptive.py`). What is made of a
curve: `linearity.py`. How a shift's effect is had at the price of the remaining layers: `interventions.py`.

A shift may have layers above choose other experts, and its curve is then broken: what would be interpolated is run in
full where any of the shifts that were run did so. For that the ends of a grid are always run.

Axes: n neurons asked for, S shifts that are run, G shifts of the curve that is evaluated, K targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.measures.adaptive import NO_NOISE, Evaluated, RowNoise, Swept, evaluate_in_stages
from neg_service.measures.gradients import signed_by
from neg_service.measures.interventions import Interventions
from neg_service.measures.shifts import Doubles, Sweep, given_grid
from neg_service.models.batches import Budget
from neg_service.models.feed_forward import Site
from neg_service.neurons import NeuronSet

# Two shifts that tell a slope, as a share of the largest: what the curve bends there is a ten-thousandth of what it
# bends at the largest, and differences of float32 have digits enough.
_SMALL = 0.01


@dataclass(frozen=True)
class SweepResult:
    """What a sweep of one prompt found, float64 on the model's device, in the order of the set.

    activation_n: at the readout position. is_routed_n: whether the readout token used the neuron's expert.
    """

    evaluated: Evaluated
    activation_n: Tensor
    is_routed_n: NDArray[np.bool_]


def sweep_prompt(
    interventions: Interventions,
    neurons: NeuronSet,
    sweep: Sweep,
    budget: Budget,
    keep_curves: bool,
    neurgrad_km: Tensor | None = None,
    noise: RowNoise = NO_NOISE,
    on_done: Callable[[int], None] = lambda n: None,
) -> SweepResult:
    """Sweep neurons for all targets, site by site; curves never leave the device.

    neurgrad_km: of the layers of these neurons, as `Interventions.neurgrad` gives it; computed if it is needed and not
    given. noise: of the engine's rows, which the adaptive grid does not refine beyond. `on_done` is told how many
    neurons each site brought.

    Raises:
        ModelError: the noise is of difference arithmetic, and the engine is not.
        DoesNotFit: one intervention does not fit.
        NonFiniteError: NaN or infinity after an intervention.
    """
    interventions.require_kind_of_noise(noise)
    device, probability_k = interventions.device, interventions.probability_k.double()
    sites = interventions.sites(neurons.layers)
    place_n = interventions.slots(sites).places_of(neurons)
    n, k = len(neurons), len(probability_k)
    # Neurons of experts that were not chosen keep their zeros.
    found = Evaluated.of_nothing(n, k, len(sweep.grid.shifts) if keep_curves else None, device)
    activation_n = torch.zeros(n, dtype=torch.float64, device=device)
    if neurgrad_km is None and sweep.uses_slope:
        neurgrad_km = interventions.neurgrad(neurons.layers, budget)
    start = 0
    for site in sites:
        activation_m = interventions.activation[site].to(device)
        stop = start + len(activation_m)
        of_set = np.flatnonzero((place_n >= start) & (place_n < stop))
        if len(of_set):
            own_n = torch.from_numpy(place_n[of_set] - start).to(device)
            of_set_n = torch.from_numpy(of_set).to(device)
            activation_n[of_set_n] = activation_m[own_n].double()
            slope_nk = torch.full((len(of_set), k), torch.nan, dtype=torch.float64, device=device)
            if neurgrad_km is not None:
                slope_nk = neurgrad_km[:, start:stop][:, own_n].T.double()
                if sweep.shift == "signed":
                    slope_nk = signed_by(activation_m[own_n, None], slope_nk)
            found.put(of_set_n, swept(interventions, site, own_n, slope_nk, sweep, noise, budget, keep_curves))
            on_done(len(of_set))
        start = stop
    return SweepResult(found, activation_n, place_n >= 0)


def swept(
    interventions: Interventions, site: Site, neurons_n: Tensor, slope_nk: Tensor, sweep: Sweep, noise: RowNoise,
    budget: Budget, keep_curves: bool,
) -> Evaluated:  # fmt: skip
    """Sweep neurons of one site."""
    device, probability_k = interventions.device, interventions.probability_k.double()

    def run(shifts: Doubles, own_m: Tensor) -> Swept:
        some = replace(sweep, grid=given_grid(shifts))
        log_p_msk, changed_ms, spread_ms = curves(interventions, site, neurons_n[own_m], some, budget)
        if changed_ms is None:
            changed_ms = torch.zeros(log_p_msk.shape[:2], dtype=torch.bool)
        return Swept(
            probability_k * log_p_msk.to(device).double().expm1(),
            changed_ms.to(device),
            None if spread_ms is None else spread_ms.to(device),
        )

    n_slope = 0
    if sweep.uses_slope and not interventions.gradients_are_exact:
        slope_nk, n_slope = _measured_slopes(run, sweep.grid.evaluated.max(), len(neurons_n)), 2
    found = evaluate_in_stages(
        sweep.grid, run, slope_nk, noise.sigma * probability_k, keep_curves, interventions.has_experts,
        noise.is_per_row and interventions.errors_are_shares,
    )  # fmt: skip
    return replace(found, n_shifts_n=found.n_shifts_n + n_slope)


def _measured_slopes(run: Callable[[Doubles, Tensor], Swept], largest: float, n: int) -> Tensor:
    """Slopes at zero [n, K] by two small shifts, where gradients are of lower precision than differences."""
    small = _SMALL * largest
    found = run(np.array([-small, small]), torch.arange(n))
    return (found.delta_p_msk[:, 1] - found.delta_p_msk[:, 0]) / (2 * small)


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
    delta_ik, changed_i, spread_i, _ = interventions.changes(site, numbers_i, moved_ns.flatten(), budget)
    n, s = moved_ns.shape
    changed_ns, spread_ns = (None if own is None else own.view(n, s) for own in (changed_i, spread_i))
    return delta_ik.view(n, s, -1), changed_ns, spread_ns

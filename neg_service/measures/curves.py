"""Curves of Δp over shifts, measured: neurons swept in groups of sites, and what their curves say.

A grid's shifts are all run, or, of the adaptive grid, as many as a neuron needs (`adaptive.py`). What is made of a
curve: `linearity.py`. How a shift's effect is had at the price of the remaining layers: `interventions.py`.

A shift may have layers above choose other experts, and its curve is then broken: what would be interpolated is run in
full where any of the shifts that were run did so. For that the ends of a grid are always run.

Axes: n neurons asked for, M neurons of several sites one behind the other, S shifts that are run, G shifts of the curve
that is evaluated, K targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.measures.adaptive import NO_NOISE, Evaluated, RowNoise, Run, Swept, evaluate_in_stages
from neg_service.measures.changes import Changes, Moved, Steps, taken
from neg_service.measures.interventions import Interventions
from neg_service.measures.outputs import Output
from neg_service.measures.readouts import PLAIN
from neg_service.measures.shifts import Doubles, Sweep, given_grid
from neg_service.measures.signs import signed_by
from neg_service.models.batches import Budget
from neg_service.models.feed_forward import Site
from neg_service.models.transfer import fetched, sent
from neg_service.neurons import NeuronSet

# So many neurons, from whichever sites, are swept together: batches are full, and what is done is still told in time.
_TOGETHER = 2048
# Two shifts that tell a slope, as a share of the largest: what the curve bends there is a ten-thousandth of what it
# bends at the largest, and differences of float32 have digits enough.
_SMALL = 0.01


@dataclass(frozen=True)
class SweepResult:
    """What a sweep of one prompt found, float64 on the model's device, in the order of the set.

    activation_n: at the readout position. is_routed_nc: whether, for each value, a token at which the neuron is shifted
    used its expert: the readout token, or any that predicts one of the target's.
    """

    evaluated: Evaluated
    activation_n: Tensor
    is_routed_nc: NDArray[np.bool_]


def sweep_prompt(
    interventions: Interventions, neurons: NeuronSet, sweep: Sweep, budget: Budget, keep_curves: bool,
    noise: RowNoise = NO_NOISE, output: Output | None = None,
) -> SweepResult:  # fmt: skip
    """Sweep neurons of a prompt alone; see `sweep_steps`."""
    steps = sweep_steps(interventions, neurons, sweep, budget, keep_curves, noise=noise, output=output)
    return taken(steps, lambda moved: interventions.changes(moved, budget))


def sweep_steps(
    interventions: Interventions,
    neurons: NeuronSet,
    sweep: Sweep,
    budget: Budget,
    keep_curves: bool,
    neurgrad_km: Tensor | None = None,
    noise: RowNoise = NO_NOISE,
    on_done: Callable[[int], None] = lambda n: None,
    gradient_km: Tensor | None = None,
    output: Output | None = None,
) -> Steps[SweepResult]:
    """Sweep neurons for all targets, as the steps that this takes; curves never leave the device.

    output: what is measured of the targets; their probabilities where it is not given. neurgrad_km, gradient_km: of the
    layers of these neurons, as `Interventions` gives them; computed if needed and not given. noise: of the engine's
    rows, which the adaptive grid does not refine beyond. `on_done` is told how many neurons each group of sites
    brought.

    Raises:
        ModelError: the noise is of difference arithmetic, and the engine is not.
        DoesNotFit: one intervention does not fit.
        NonFiniteError: NaN or infinity after an intervention.
    """
    interventions.require_kind_of_noise(noise)
    device = interventions.device
    output = output or Output(PLAIN, len(interventions.probability_k))
    interventions.require_values(output)
    sites = Sites.of(interventions, neurons.layers)
    place_n = interventions.slots(sites.sites).places_of(neurons)
    n, k = len(neurons), len(output.kept)
    # Neurons of experts that were not chosen keep their zeros.
    found = Evaluated.of_nothing(n, k, len(sweep.grid.shifts) if keep_curves else None, device)
    activation_n = torch.zeros(n, dtype=torch.float64, device=device)
    if neurgrad_km is None and sweep.uses_slope:
        neurgrad_km = interventions.neurgrad(neurons.layers, budget, output)
    if gradient_km is None and sweep.uses_slope and sweep.shift == "signed":
        gradient_km = interventions.gradient(neurons.layers, budget, output)
    # Of a sample a prompt may use none.
    activation_m = torch.cat([interventions.activation[site].to(device) for site in sites.sites] or [activation_n])
    is_routed_nk = interventions.are_routed(neurons)
    in_order = np.argsort(place_n, kind="stable")
    for own in _groups(in_order[place_n[in_order] >= 0], place_n, sites):
        own_n, of_set_n = (sent(torch.from_numpy(at), device) for at in (place_n[own], own))
        activation_n[of_set_n] = activation_m[own_n].double()
        slope_nk = torch.full((len(own), k), torch.nan, dtype=torch.float64, device=device)
        if neurgrad_km is not None:
            slope_nk = neurgrad_km[:, own_n].T.double()
            if sweep.shift == "signed" and gradient_km is not None:
                slope_nk = gradient_km[:, own_n].T.double()
            elif sweep.shift == "signed":
                slope_nk = signed_by(activation_m[own_n, None], slope_nk)
        values = yield from _swept(
            interventions, sites, place_n[own], slope_nk, sweep, noise, keep_curves, output, is_routed_nk[own]
        )
        found.put(of_set_n, values)
        on_done(len(own))
    return SweepResult(found, activation_n, output.depends(is_routed_nk))


@dataclass(frozen=True)
class Sites:
    """The sites of some layers, whose neurons stand one behind the other: those of site s from `starts[s]` on [S+1]."""

    sites: list[Site]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, interventions: Interventions, layers: Sequence[int]) -> Sites:
        """Those of some layers."""
        sites = interventions.sites(layers)
        return cls(sites, np.cumsum([0, *(len(interventions.activation[site]) for site in sites)]))

    def split(self, place_n: NDArray[np.int64]) -> Iterator[tuple[Site, NDArray[np.int64]]]:
        """Each site that has some of the neurons at ascending places, and their numbers there."""
        ends = np.searchsorted(place_n, self.starts)
        for site, start, first, end in zip(self.sites, self.starts, ends, ends[1:], strict=False):
            if end > first:
                yield site, place_n[first:end] - start


def _groups(in_order: NDArray[np.int64], place_n: NDArray[np.int64], sites: Sites) -> Iterator[NDArray[np.int64]]:
    """Neurons that are swept together: of so many whole sites that batches are full."""
    ends = np.searchsorted(place_n[in_order], sites.starts[1:])
    start = 0
    for end in ends:
        if end - start >= _TOGETHER or (end == len(in_order) > start):
            yield in_order[start:end]
            start = int(end)


def _swept(
    interventions: Interventions, sites: Sites, place_n: NDArray[np.int64], slope_nk: Tensor, sweep: Sweep,
    noise: RowNoise, keep_curves: bool, output: Output, is_routed_nk: NDArray[np.bool_],
) -> Steps[Evaluated]:  # fmt: skip
    """Sweep the neurons at some places, which ascend; of targets for which they are not there, nothing changes."""
    device, p_k, rest_k = interventions.device, interventions.probabilities_for(output), interventions.rest_k
    is_silent_nk = None if is_routed_nk.all() else torch.from_numpy(~is_routed_nk).to(device)

    def run(shifts: Doubles, own_m: Tensor) -> Steps[Swept]:
        some = replace(sweep, grid=given_grid(shifts))
        (own_m,) = fetched([own_m])
        changes = yield _moved(interventions, sites, place_n[own_m.numpy()], some)
        log_p_msk, logit_msk, changed_ms, spread_ms = _curves(changes, len(own_m), len(shifts))
        if is_silent_nk is not None:
            # Exactly, where rounding differs from row to row.
            is_silent_m1k = is_silent_nk[sent(own_m, device), None]
            log_p_msk, logit_msk = (own.to(device).masked_fill(is_silent_m1k, 0.0) for own in (log_p_msk, logit_msk))
        if changed_ms is None:
            changed_ms = torch.zeros(log_p_msk.shape[:2], dtype=torch.bool, device=device)
        return Swept(
            output.change(log_p_msk.to(device), logit_msk.to(device), p_k, rest_k),
            changed_ms.to(device),
            None if spread_ms is None else spread_ms.to(device),
        )

    n_slope = 0
    if sweep.uses_slope and not interventions.gradients_are_exact:
        slope_nk, n_slope = (yield from _measured_slopes(run, sweep.grid.evaluated.max(), len(place_n))), 2
    found = yield from evaluate_in_stages(
        sweep.grid, run, slope_nk, noise.sigma * interventions.noise_of(output), keep_curves,
        interventions.has_experts, noise.is_per_row and interventions.errors_are_shares,
    )  # fmt: skip
    return replace(found, n_shifts_n=found.n_shifts_n + n_slope)


def _measured_slopes(run: Run, largest: float, n: int) -> Steps[Tensor]:
    """Slopes at zero [n, K] by two small shifts, where gradients are of lower precision than differences."""
    small = _SMALL * largest
    found = yield from run(np.array([-small, small]), torch.arange(n))
    return (found.delta_p_msk[:, 1] - found.delta_p_msk[:, 0]) / (2 * small)


def curves(
    interventions: Interventions, sites: Sites, place_n: NDArray[np.int64], sweep: Sweep, budget: Budget
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Δ log p and Δz [n, S, K] of neurons at ascending places.

    Then where routing changed, and how far logits spread, [n, S] both; None where there is nothing of the kind
    (`Changes`). Batches are filled across neurons.
    """
    changes = interventions.changes(_moved(interventions, sites, place_n, sweep), budget)
    return _curves(changes, len(place_n), len(sweep.grid.shifts))


def _moved(interventions: Interventions, sites: Sites, place_n: NDArray[np.int64], sweep: Sweep) -> list[Moved]:
    """All shifts of the grid of each neuron, at ascending places."""
    s, moved = len(sweep.grid.shifts), []
    for site, own_n in sites.split(place_n):
        activations = interventions.activation[site]
        neurons_n = sent(torch.from_numpy(own_n), activations.device)
        moved_ns = sent(torch.from_numpy(sweep.grid.shifts), activations.device).expand(len(own_n), -1)
        if sweep.shift == "magnitude":
            moved_ns = signed_by(activations[neurons_n][:, None], moved_ns)
        moved.append(Moved(site, neurons_n.repeat_interleave(s), moved_ns.flatten()))
    return moved


def _curves(changes: Changes, n: int, s: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What `curves` gives."""
    log_p_ik, logit_ik, changed_i, spread_i, _ = changes
    changed_ns, spread_ns = (None if own is None else own.view(n, s) for own in (changed_i, spread_i))
    return log_p_ik.view(n, s, -1), logit_ik.view(n, s, -1), changed_ns, spread_ns

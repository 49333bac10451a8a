"""The adaptive grid: few shifts of a full grid for most neurons, more where a curve needs them, and how far NEG is off.

A sweep computes gradients anyway, and so knows the slope g of every curve at zero. With it, a polynomial through few
shifts gives the curve on the full grid:

    Δp(δ) = g·δ + c₂δ² + c₃δ³ + ...          g the slope, c from the shifts that were run

NEG over a symmetric grid depends on the odd part of a curve alone, so shifts come in pairs. A neuron goes through
stages, each with the shifts of those before it, until its NEG is known well enough for every target:

    stage   shifts, in units of the largest   degree   how far NEG is off (`_truncation`), each c in units of NEG
    1       ±1                                3        (|c₃| + c₂²/|g|)·max(|c₂|, |c₃|)/|g|
    2       and ±3/4                          5        |NEG₂ - NEG₁|
    3       and ±2/5                          7        3·|NEG₃ - NEG₂|, or |NEG₂ - NEG₁|/20, whichever is larger
    4       all of the full grid                       0

With ±1 and ±3/4 the term of degree 7 nearly cancels in the NEG of 40 even shifts, and with ±2/5 that of degree 9. A
polynomial says nothing of a kink between its shifts, so these are estimates and no bounds, and never less than three
tenths of the tolerance; what was tried, and how often they hold: the README beside this file.

What a row states as its error is that, or three standard deviations of its noise (`noise.py`), or what rounding does to
the largest changes, whichever is largest.

Axes: n neurons, m of them that are not done yet, K targets, S shifts that are run, G shifts of the full grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neg_service.measures.changes import Steps
from neg_service.measures.linearity import Linearity, evaluated_curves, linearity
from neg_service.measures.shifts import AdaptiveGrid, Doubles, Grid, given_grid, with_slope
from neg_service.models.transfer import fetched, indices, sent

# How many standard deviations of a NEG's noise are stated as its error.
_NOISES = 3.0
# Large changes are off by a share of themselves, beside the noise that all have: by so many roundings at the most.
_ROUNDINGS = 200
# Below this share of the tolerance no estimate is trusted: where the terms that few shifts show cancel by chance, those
# behind them are up to 0.8 of it (`tests/adaptive_errors.py`, one neuron in three hundred).
_TRUSTED = 0.3


@dataclass(frozen=True)
class RowNoise:
    """How far the Δ log p of a row is off: the standard deviation of its error; see `noise.py`.

    is_per_row: `sigma` is a share of what the row's logits moved by.
    """

    sigma: float = 0.0
    is_per_row: bool = False


NO_NOISE = RowNoise()


@dataclass(frozen=True)
class Evaluated:
    """What curves say, float64.

    linearity_nk: NEG and how straight the curve is. truncation_nk: how far NEG may be off, beside noise; NaN where that
    is not known. n_shifts_n: how many were run. noise_gain_n: see `Grid.noise_gain` and `row_gain`.
    routing_changed_n: the share of shifts for which a layer above chose other experts. curve_nsk: Δp at the grid's
    shifts, None if it was not wanted.
    """

    linearity_nk: Linearity
    truncation_nk: Tensor
    n_shifts_n: Tensor
    noise_gain_n: Tensor
    routing_changed_n: Tensor
    curve_nsk: Tensor | None

    @classmethod
    def of_nothing(cls, n: int, k: int, n_shifts: int | None, device: torch.device) -> Evaluated:
        """Zeros, of neurons that do nothing."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        values = {own.name: zeros(n, k) for own in fields(Linearity)}
        n_run = torch.zeros(n, dtype=torch.int64, device=device)
        curve = None if n_shifts is None else zeros(n, n_shifts, k)
        return cls(Linearity(**values), zeros(n, k), n_run, zeros(n), zeros(n), curve)

    def resolution(self, noise_k: Tensor) -> Tensor:
        """The smallest |NEG| whose sign is known [n, K]; see `noise.py`. noise_k: σ of a `RowNoise` in units of p."""
        return 2 * self.noise_gain_n[:, None] * noise_k

    def error(self, noise_k: Tensor, dtype: torch.dtype) -> Tensor:
        """How far NEG may be off that of the full grid without rounding [n, K]; NaN where it is not known.

        dtype: that rows are worked out in.
        """
        noise_nk = _NOISES * self.noise_gain_n[:, None] * noise_k
        rounding_nk = _ROUNDINGS * torch.finfo(dtype).eps * self.linearity_nk.neg.abs()
        return torch.stack([self.truncation_nk, noise_nk, rounding_nk]).amax(0)

    def put(self, place_m: Tensor, found: Evaluated) -> None:
        """Take over what was found for some neurons."""
        for own in fields(Linearity):
            getattr(self.linearity_nk, own.name)[place_m] = getattr(found.linearity_nk, own.name)
        for name in ("truncation_nk", "n_shifts_n", "noise_gain_n", "routing_changed_n", "curve_nsk"):
            ours, theirs = getattr(self, name), getattr(found, name)
            if ours is not None:
                ours[place_m] = theirs


@dataclass(frozen=True)
class Swept:
    """Of neurons and shifts: Δp [m, s, K], float64; where a layer above chose other experts [m, s]; and what a row's
    logits moved by [m, s], where errors are a share of it."""

    delta_p_msk: Tensor
    changed_ms: Tensor
    spread_ms: Tensor | None = None

    def beside(self, other: Swept) -> Swept:
        """The same with more shifts."""
        spread = None
        if self.spread_ms is not None and other.spread_ms is not None:
            spread = torch.cat([self.spread_ms, other.spread_ms], 1)
        return Swept(
            torch.cat([self.delta_p_msk, other.delta_p_msk], 1),
            torch.cat([self.changed_ms, other.changed_ms], 1),
            spread,
        )

    def take(self, neurons: Any, shifts: Any) -> Swept:
        """Some neurons, some shifts."""
        spread = None if self.spread_ms is None else self.spread_ms[neurons][:, shifts]
        return Swept(self.delta_p_msk[neurons][:, shifts], self.changed_ms[neurons][:, shifts], spread)


# Runs shifts [s] of some neurons [m].
Run = Callable[[Doubles, Tensor], Steps[Swept]]


def evaluate_in_stages(
    grid: Grid | AdaptiveGrid, run: Run, slope_nk: Tensor, noise_k: Tensor, keep_curves: bool, has_experts: bool,
    is_per_row: bool = False,
) -> Steps[Evaluated]:  # fmt: skip
    """Run the curves of neurons, each in as many stages as it needs, and say what they are.

    slope_nk: of the curves at zero, in the direction of the shifts; NaN where it is not known. noise_k: σ of a
    `RowNoise` in units of each target's probability; is_per_row: see there. has_experts: whether shifts may have layers
    above choose other experts; what is not run in full is then watched at both ends of the grid, and run in full where
    any shift did so.
    """
    n, k = slope_nk.shape
    kept = Evaluated.of_nothing(n, k, len(grid.shifts) if keep_curves else None, slope_nk.device)
    left_m = torch.arange(n, device=slope_nk.device)
    ran: _Ran | None = None
    # NEG of the last stage, and its difference to the stage before.
    before_mk, step_mk = None, None
    stages = _stages(grid)
    for stage in stages:
        is_last = stage is stages[-1]
        wanted = stage.shifts
        if has_experts and not is_last:
            wanted = np.union1d(wanted, [stage.evaluated.min(), stage.evaluated.max()])
        ran = yield from _with_those(ran, wanted, left_m, run)
        of_stage = ran.at(stage.shifts)
        slope_mk, delta_p_mks = slope_nk[left_m], of_stage.delta_p_msk.mT
        found = linearity(stage, delta_p_mks, slope_mk)
        gain_m = _gain(stage, of_stage, is_per_row)
        if is_last:
            truncation_mk, is_done_m = torch.zeros_like(slope_mk), None
        else:
            truncation_mk = _truncation(grid, stage, delta_p_mks, slope_mk, found.neg, before_mk, step_mk)
            is_done_m = _suffices(grid, truncation_mk, found.neg, 2 * gain_m[:, None] * noise_k)
            is_done_m &= ~ran.swept.changed_ms.any(1)
        changed_m = ran.swept.changed_ms.double().mean(1)
        results = Evaluated(
            found,
            truncation_mk,
            torch.full_like(left_m, len(ran.shifts)),
            gain_m,
            changed_m,
            _curve(grid, stage, ran, slope_mk) if keep_curves else None,
        )
        # What is not done yet is overwritten by the stages that follow.
        kept.put(left_m, results)
        if is_done_m is None:
            break
        # What a device is asked for, once a stage.
        (is_done_m,) = fetched([is_done_m])
        if is_done_m.all():
            break
        open_m = sent((~is_done_m).nonzero()[:, 0], slope_nk.device)
        step_mk = None if before_mk is None else (found.neg - before_mk).abs()[open_m]
        left_m, ran, before_mk = left_m[open_m], ran.of(open_m), found.neg[open_m]
    return kept


def row_gain(grid: Grid, spread_ms: Tensor) -> Tensor:
    """What errors that are a share of each row's spread are multiplied with in a NEG [m]: Σ_s |w_s|·spread_s.

    As if all errors of a curve had one sign: they come from what the rows of a neuron have in common.
    """
    weights_s = torch.from_numpy(np.abs(grid.weights)).to(spread_ms.device)
    return spread_ms.double() @ weights_s


def _gain(stage: Grid, swept: Swept, is_per_row: bool) -> Tensor:
    """With what a row's noise is multiplied in a NEG [m]."""
    if not is_per_row:
        return torch.full_like(swept.delta_p_msk[:, 0, 0], stage.noise_gain)
    assert swept.spread_ms is not None
    return row_gain(stage, swept.spread_ms)


def _stages(grid: Grid | AdaptiveGrid) -> tuple[Grid, ...]:
    if isinstance(grid, AdaptiveGrid):
        return (*grid.stages, grid.full)
    return (grid,) if grid.interpolation is None else (grid, given_grid(grid.evaluated))


def _curve(grid: Grid | AdaptiveGrid, stage: Grid, ran: _Ran, slope_mk: Tensor) -> Tensor:
    """Δp at the grid's shifts [m, S, K]: as it was run, and between these shifts as it is evaluated."""
    if isinstance(grid, AdaptiveGrid):
        return evaluated_curves(stage, ran.at(stage.shifts).delta_p_msk.mT, slope_mk).mT
    return ran.at(grid.shifts).delta_p_msk


def _suffices(grid: Grid | AdaptiveGrid, truncation_mk: Tensor, neg_mk: Tensor, resolution_k: Tensor) -> Tensor:
    """Whether NEG of all targets is known as well as is asked for [m]; the coarse grid asks for nothing."""
    if not isinstance(grid, AdaptiveGrid):
        return torch.ones(len(neg_mk), dtype=torch.bool, device=neg_mk.device)
    # A comparison with NaN is false: what is not known does not suffice.
    return (truncation_mk <= torch.maximum(grid.tolerance * neg_mk.abs(), resolution_k)).all(1)


def _truncation(
    grid: Grid | AdaptiveGrid, stage: Grid, delta_p_mks: Tensor, slope_mk: Tensor, neg_mk: Tensor,
    before_mk: Tensor | None, step_mk: Tensor | None,
) -> Tensor:  # fmt: skip
    """About how far NEG is off because shifts are left out [m, K]; formulas in the module's header."""
    if not isinstance(grid, AdaptiveGrid):
        # The coarse grid does not use the slope; what NEG would be with it says how far it is off.
        with_it = with_slope(stage.shifts, stage.evaluated)
        return (linearity(with_it, delta_p_mks, slope_mk).neg - neg_mk).abs()
    # What is far below the tolerance is not told from nothing by so few shifts.
    least_mk = _TRUSTED * grid.tolerance * neg_mk.abs()
    if before_mk is not None and step_mk is not None:
        return torch.stack([3 * (neg_mk - before_mk).abs(), step_mk / 20, least_mk]).amax(0)
    if before_mk is not None:
        return torch.maximum((neg_mk - before_mk).abs(), least_mk)
    c2, c3 = _coefficients(stage, delta_p_mks, slope_mk).abs().unbind(-1)
    # A slope of zero makes it infinite, and NaN where all is zero: the neuron does nothing at all.
    g = slope_mk.abs()
    guessed_mk = torch.where(c2 + c3 == 0, 0.0, (c3 + c2 * c2 / g) * torch.maximum(c2, c3) / g)
    return torch.maximum(guessed_mk, least_mk)


def _coefficients(stage: Grid, delta_p_mks: Tensor, slope_mk: Tensor) -> Tensor:
    """c₂, c₃, ... [m, K, S] of the polynomial, as what each adds to Δp at the largest shift, over that shift."""
    largest = stage.shifts.max()
    scaled = stage.shifts / largest
    powers = np.stack([scaled**degree for degree in range(2, len(scaled) + 2)], 1)
    solve = torch.from_numpy(np.linalg.inv(powers)).to(slope_mk.device)
    shifts_s = torch.from_numpy(stage.shifts).to(slope_mk.device)
    left_mks: Tensor = (delta_p_mks - slope_mk[..., None] * shifts_s) @ solve.T
    return left_mks / float(largest)


@dataclass(frozen=True)
class _Ran:
    """What was run of some neurons so far, and at which shifts [s]."""

    shifts: Doubles
    swept: Swept

    def at(self, shifts: Doubles) -> Swept:
        """Some of the shifts, in their order."""
        if np.array_equal(self.shifts, shifts):
            return self.swept
        places = [int(np.flatnonzero(self.shifts == shift)[0]) for shift in shifts]
        return self.swept.take(slice(None), indices(places, self.swept.delta_p_msk.device))

    def of(self, places_m: Tensor) -> _Ran:
        """Those of some neurons."""
        return _Ran(self.shifts, self.swept.take(places_m, slice(None)))


def _with_those(ran: _Ran | None, wanted: Doubles, own_m: Tensor, run: Run) -> Steps[_Ran]:
    """What was run of some neurons, with those of the shifts that are wanted that were not run yet."""
    if ran is None:
        return _Ran(wanted, (yield from run(wanted, own_m)))
    new = wanted[~np.isin(wanted, ran.shifts)]
    if not len(new):
        return ran
    return _Ran(np.concatenate([ran.shifts, new]), ran.swept.beside((yield from run(new, own_m))))

"""What a curve of Δp over shifts says: NEG, and how straight the curve is. And the grids of shifts.

For shifts δ_1..δ_S of a neuron, and Δp(δ) a target's probability with the shift minus without it:

    NEG = Σ_s δ_s·Δp_s / Σ_s δ_s²          least squares through the origin, probability per activation unit
    r   = Pearson correlation of (δ_s, Δp_s); 0 where all Δp are equal; |r| >= 0.95 counts as linear
    R²  = 1 - Σ_s (Δp_s - NEG·δ_s)² / Σ_s Δp_s²     of that fit; 0 where all Δp are 0

All of it is linear algebra in float64 on whatever device the curves are on.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053).

Axes: S shifts that are run, G shifts of the curve that is judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.errors import ConfigurationError

Doubles = NDArray[np.float64]

GRIDS = ("full", "coarse")
# Where the coarse grid runs a curve, in units of the largest shift.
COARSE_NODES = (-0.9, -0.5, 0.5, 0.9)


@dataclass(frozen=True)
class Grid:
    """Shifts to run.

    shifts: [S] those that are run. judged: [G] those of the curve that NEG, r and R² are of. interpolation: [G, S]
    from a curve that was run to the curve that is judged; None where they are the same.
    """

    shifts: Doubles
    judged: Doubles
    interpolation: Doubles | None = None

    @property
    def weights(self) -> Doubles:
        """[S], with which a curve that was run is summed up to its NEG."""
        fit_g = self.judged / (self.judged @ self.judged)
        return fit_g if self.interpolation is None else fit_g @ self.interpolation

    @property
    def noise_gain(self) -> float:
        """How much larger the error of a NEG is than that of a single Δp: √(Σ_s w_s² + (Σ_s w_s)²).

        All Δp of a curve are differences from one unshifted row, whose error they share: it cancels where the weights
        sum up to zero, as they do over a symmetric grid, and adds up where all shifts have one sign.
        """
        weights = self.weights
        return float(np.sqrt((weights**2).sum() + weights.sum() ** 2))


@dataclass(frozen=True)
class Linearity:
    """Of each curve; formulas in the module's header. `largest` is the largest |Δp|."""

    neg: Tensor
    r: Tensor
    r2: Tensor
    largest: Tensor


def linearity(grid: Grid, delta_p: Tensor) -> Linearity:
    """Judge curves Δp [..., S]; results [...], float64."""
    curve = delta_p.double()
    if grid.interpolation is not None:
        curve = curve @ torch.from_numpy(grid.interpolation).to(curve.device).T
    shifts_g = torch.from_numpy(grid.judged).to(curve.device)
    neg = curve @ shifts_g / (shifts_g @ shifts_g)
    centred_g = shifts_g - shifts_g.mean()
    centred = curve - curve.mean(-1, keepdim=True)
    spread = ((centred**2).sum(-1) * (centred_g @ centred_g)).sqrt()
    largest = curve.abs().amax(-1)
    # Rounding leaves equal values a hair apart; what is that small against the values is no correlation.
    is_flat = (curve.amax(-1) - curve.amin(-1) <= 1e-14 * largest) | (spread == 0)
    r = torch.where(is_flat, 0.0, (centred @ centred_g) / spread.where(~is_flat, 1.0))
    total = (curve**2).sum(-1)
    left = ((curve - neg[..., None] * shifts_g) ** 2).sum(-1)
    r2 = torch.where(total > 0, 1 - left / total.where(total > 0, 1.0), 0.0)
    return Linearity(neg, r.clamp(-1, 1), r2, largest)


def judged(grid: Grid, curves: Doubles) -> dict[str, Doubles]:
    """`linearity` of curves [I, S] in NumPy: `neg`, `r`, `r2` and `largest`, each [I]."""
    found = linearity(grid, torch.from_numpy(np.ascontiguousarray(curves)))
    return {name: getattr(found, name).numpy() for name in ("neg", "r", "r2", "largest")}


def full_grid(max_shift: float = 2.0, step: float = 0.1) -> Grid:
    """Shifts from -max_shift to max_shift without zero; the default has the paper's 40.

    Raises:
        ConfigurationError: a step or a range that is not positive and finite, or a step larger than the range.
    """
    if not (math.isfinite(max_shift) and math.isfinite(step) and 0 < step <= max_shift):
        raise ConfigurationError(
            f"measure.step={step}, measure.max_shift={max_shift}: both must be finite, and 0 < step <= max_shift"
        )
    # To twelve digits, so that three steps of 0.1 are written 0.3.
    up = np.array([float(f"{step * k:.12g}") for k in range(1, math.floor(max_shift / step + 1e-9) + 1)])
    return given_grid(np.concatenate([-up[::-1], up]))


def coarse_grid(max_shift: float = 2.0, step: float = 0.1) -> Grid:
    """The fewest shifts from which NEG and r of the full grid are had by interpolation.

    The polynomial through the curve's points at `COARSE_NODES` and through the origin, where Δp is 0 by definition,
    gives the curve on the full grid.

    Raises:
        ConfigurationError: as `full_grid`, and for a full grid that is no larger than the coarse one.
    """
    full = full_grid(max_shift, step)
    if len(full.shifts) <= len(COARSE_NODES):
        raise ConfigurationError(
            f"measure.grid=coarse: runs {len(COARSE_NODES)} shifts, and measure.step={step} up to "
            f"measure.max_shift={max_shift} has only {len(full.shifts)}: use measure.grid=full"
        )
    return _interpolated(max_shift * np.array(COARSE_NODES), full.judged)


def range_grid(largest: float) -> Grid:
    """40 shifts up to ±`largest`, judged from curves that are run at half and at the whole of it.

    Ranges that double share shifts: 1, 2 and 4 take eight in all.
    """
    return _interpolated(largest * np.array([-1.0, -0.5, 0.5, 1.0]), full_grid(largest, largest / 20).judged)


def _interpolated(nodes: Doubles, judged: Doubles) -> Grid:
    points = np.array([0.0, *nodes])
    # Lagrange's polynomials, the origin's left out: its value is 0.
    basis = [math.prod((judged - other) / (node - other) for other in points if other != node) for node in nodes]
    return Grid(nodes, judged, np.stack(basis, 1))


def given_grid(shifts: Sequence[float] | Doubles) -> Grid:
    """A grid of given shifts.

    Raises:
        ConfigurationError: none, what is no number, one that is zero or not finite, or one given twice.
    """
    try:
        grid = np.asarray(shifts, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"measure.shifts={shifts}: must be numbers") from error
    if grid.ndim != 1 or not len(grid):
        raise ConfigurationError("measure.shifts: at least one shift is needed")
    for value in grid:
        if not math.isfinite(value) or value == 0:
            raise ConfigurationError(f"measure.shifts: {value:g} is no shift; shifts must be finite and not 0")
    values, counts = np.unique(grid, return_counts=True)
    if counts.max() > 1:
        raise ConfigurationError(f"measure.shifts: {values[counts.argmax()]:g} is given {counts.max()} times")
    return Grid(grid, grid)


def chosen_grid(name: str, shifts: Sequence[float] | None = None, max_shift: float = 2.0, step: float = 0.1) -> Grid:
    """The grid `full` or `coarse` over a range, or given shifts in the place of both.

    Raises:
        ConfigurationError: an unknown name, shifts together with `coarse`, or what the grids themselves refuse.
    """
    if name not in GRIDS:
        raise ConfigurationError(f"measure.grid={name} is unknown; known are {', '.join(GRIDS)}")
    if shifts is None:
        return full_grid(max_shift, step) if name == "full" else coarse_grid(max_shift, step)
    if name != "full":
        raise ConfigurationError(
            f"measure.grid={name}: places its own shifts; use measure.grid=full with measure.shifts"
        )
    return given_grid(shifts)

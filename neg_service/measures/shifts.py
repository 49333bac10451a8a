"""Shifts: which ones a neuron is swept over, and whether its magnitude or it itself moves.

A grid is full (every step up to a range), adaptive (few of these shifts, more where a curve needs them:
`adaptive.py`), coarse (four shifts, from which the full grid's curve is interpolated) or given. What is made of the
curve over it: `linearity.py`.

Axes: S shifts that are run, G shifts of the curve that is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neg_service.errors import ConfigurationError

Doubles = NDArray[np.float64]

GRIDS = ("adaptive", "full", "coarse")
SHIFTS = ("magnitude", "signed")
# Where the coarse grid runs a curve, in units of the largest shift.
COARSE_NODES = (-0.9, -0.5, 0.5, 0.9)
# Where each stage runs a curve beside the stages before it, in units of the largest shift.
NODES = (1.0, 0.75, 0.4)
TOLERANCE = 1e-3
# A grid that is hardly larger than the last stage before it is run as it is.
_LEAST_SHIFTS = 10
# Beyond these, the square of a shift is no number any more, or so many shifts are no sweep.
_SMALLEST, _LARGEST, _MOST = 1e-100, 1e100, 100_000


@dataclass(frozen=True)
class Grid:
    """Shifts to run.

    shifts: [S] those that are run. evaluated: [G] those of the curve that NEG, r and R² are of. interpolation: [G, S]
    from a curve that was run to the curve that is evaluated; None where they are the same. slope: [G] what a curve's
    slope at zero adds to that, for each unit of it; None where the slope is not used.
    """

    shifts: Doubles
    evaluated: Doubles
    interpolation: Doubles | None = None
    slope: Doubles | None = None

    @property
    def weights(self) -> Doubles:
        """[S], with which a curve that was run is summed up to its NEG."""
        fit_g = self.evaluated / (self.evaluated @ self.evaluated)
        return fit_g if self.interpolation is None else fit_g @ self.interpolation

    @property
    def noise_gain(self) -> float:
        """How much larger the error of a NEG is than that of a single Δp: √(Σ_s w_s² + (Σ_s w_s)²).

        All Δp of a curve are differences from one baseline row, whose error they share: it cancels where the weights
        sum up to zero, as they do over a symmetric grid, and adds up where all shifts have one sign.
        """
        weights = self.weights
        return float(np.sqrt((weights**2).sum() + weights.sum() ** 2))

    @property
    def share_of_largest(self) -> float:
        """The error of a NEG over that of the largest Δp, where errors are a share of effects, as large as shifts."""
        return float((np.abs(self.weights) @ np.abs(self.shifts)) / np.abs(self.evaluated).max())

    def stage_of(self, n_shifts: int) -> Grid:
        """What a curve was evaluated by of which so many shifts were run: in the place of an interpolation all."""
        return self if n_shifts < len(self.evaluated) else Grid(self.evaluated, self.evaluated)


@dataclass(frozen=True)
class AdaptiveGrid:
    """A full grid of which each neuron runs as many shifts as it needs.

    full: all of them. stages: which are run first, each a polynomial for the full grid. tolerance: the share of |NEG|
    that it may be off; what noise leaves unknown anyway is allowed as well.
    """

    full: Grid
    stages: tuple[Grid, ...]
    tolerance: float

    @property
    def shifts(self) -> Doubles:
        """[G], those that may be run."""
        return self.full.shifts

    @property
    def evaluated(self) -> Doubles:
        """[G], those that NEG, r and R² are of."""
        return self.full.shifts

    @property
    def calibration(self) -> Grid:
        """The shifts of the first two stages without slopes: enough to say what rounding does to a curve."""
        return _interpolated(self.stages[1].shifts, self.evaluated)

    def stage_of(self, n_shifts: int) -> Grid:
        """What a curve was evaluated by of which so many shifts were run, two of them perhaps for its slope."""
        stages = [stage for stage in (*self.stages, self.full) if len(stage.shifts) <= n_shifts]
        return stages[-1]


@dataclass(frozen=True)
class Sweep:
    """How a neuron is swept: over which shifts, of which tensor, and whether its magnitude or it itself moves.

    each: at every token that predicts one of a target's, and not at the readout position alone.
    """

    grid: Grid | AdaptiveGrid
    basis: str = "paper"
    shift: str = "magnitude"
    each: bool = False

    @property
    def uses_slope(self) -> bool:
        """Whether curves that are not run in full are evaluated, or their errors estimated, with their slopes."""
        return isinstance(self.grid, AdaptiveGrid) or self.grid.interpolation is not None


def check_shift(shift: str) -> None:
    """Refuse an unknown kind of shift."""
    if shift not in SHIFTS:
        raise ConfigurationError(setting="measure.shift", value=shift, allowed=f"one of {', '.join(SHIFTS)}")


def full_grid(max_shift: float = 2.0, step: float = 0.1) -> Grid:
    """Shifts from -max_shift to max_shift without zero; the default has the paper's 40.

    Raises:
        ConfigurationError: a step or a range that is not from 1e-100 to 1e100, a step larger than the range or so small
            that more than 100,000 make up the range.
    """
    if not _SMALLEST <= step <= max_shift <= _LARGEST:
        raise ConfigurationError(
            setting="measure.step",
            value=step,
            allowed=f"from {_SMALLEST:g} to measure.max_shift={max_shift}, which may be {_LARGEST:g}",
        )
    if max_shift / step > _MOST:
        raise ConfigurationError(
            f"there would be {2 * max_shift / step:.3g} shifts",
            setting="measure.step",
            value=step,
            allowed=f"at least {max_shift / _MOST:g}, of measure.max_shift={max_shift}",
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
            f"runs {len(COARSE_NODES)} shifts, and measure.step={step} up to measure.max_shift={max_shift} has "
            f"only {len(full.shifts)}: use measure.grid=full",
            setting="measure.grid",
            value="coarse",
        )
    return _interpolated(max_shift * np.array(COARSE_NODES), full.evaluated)


def adaptive_grid(max_shift: float = 2.0, step: float = 0.1, tolerance: float = TOLERANCE) -> Grid | AdaptiveGrid:
    """Of the full grid as many shifts as a neuron needs; of a grid with fewer than ten, all.

    Raises:
        ConfigurationError: as `full_grid`, and for a tolerance that is not from 0 to 1.
    """
    if not 0 <= tolerance <= 1:
        raise ConfigurationError(setting="measure.tolerance", value=tolerance, allowed="a share of |NEG| from 0 to 1")
    return adapted(full_grid(max_shift, step), tolerance)


def adapted(full: Grid, tolerance: float = TOLERANCE) -> Grid | AdaptiveGrid:
    """The same of a grid that is symmetric, in ascending order."""
    half = len(full.shifts) // 2
    if 2 * half < _LEAST_SHIFTS:
        return full
    places = [max(1, round(node * half)) for node in NODES]
    stages = []
    for n in range(1, len(places) + 1):
        up = full.shifts[half:][np.array(sorted(places[:n])) - 1]
        stages.append(with_slope(np.concatenate([-up[::-1], up]), full.shifts))
    return AdaptiveGrid(full, tuple(stages), tolerance)


def _interpolated(nodes: Doubles, evaluated: Doubles) -> Grid:
    points = np.array([0.0, *nodes])
    # Lagrange's polynomials, the origin's left out: its value is 0.
    basis = [math.prod((evaluated - other) / (node - other) for other in points if other != node) for node in nodes]
    return Grid(nodes, evaluated, np.stack(basis, 1))


def with_slope(nodes: Doubles, evaluated: Doubles) -> Grid:
    """The polynomial through a curve's points at `nodes`, through the origin, and with the curve's slope there."""
    # Hermite's polynomials: Lagrange's times the shift once more, which has them leave the slope alone.
    lagrange = _interpolated(nodes, evaluated).interpolation
    assert lagrange is not None
    basis = lagrange * (evaluated[:, None] / nodes)
    return Grid(nodes, evaluated, basis, evaluated - basis @ nodes)


def given_grid(shifts: Sequence[float] | Doubles) -> Grid:
    """A grid of given shifts.

    Raises:
        ConfigurationError: none, what is no number, one that is zero, not finite, below 1e-100 or above 1e100, or one
            given twice.
    """
    try:
        grid = np.asarray(shifts, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(setting="measure.shifts", value=shifts, allowed="numbers") from error
    if grid.ndim != 1 or not len(grid):
        raise ConfigurationError("at least one shift is needed", setting="measure.shifts")
    for value in grid:
        if not math.isfinite(value) or value == 0:
            raise ConfigurationError(
                f"{value:g} is no shift; shifts must be finite and not 0", setting="measure.shifts"
            )
        if not _SMALLEST <= abs(value) <= _LARGEST:
            raise ConfigurationError(
                f"{value:g} is no shift; shifts must be between {_SMALLEST:g} and {_LARGEST:g}, up or down",
                setting="measure.shifts",
            )
    values, counts = np.unique(grid, return_counts=True)
    if counts.max() > 1:
        raise ConfigurationError(f"{values[counts.argmax()]:g} is given {counts.max()} times", setting="measure.shifts")
    return Grid(grid, grid)


def chosen_grid(
    name: str, shifts: Sequence[float] | None = None, max_shift: float = 2.0, step: float = 0.1,
    tolerance: float = TOLERANCE,
) -> Grid | AdaptiveGrid:  # fmt: skip
    """The grid `adaptive`, `full` or `coarse` over a range, or given shifts, all of which are run.

    Raises:
        ConfigurationError: an unknown name, shifts together with `coarse`, or what the grids themselves refuse.
    """
    if name not in GRIDS:
        raise ConfigurationError(setting="measure.grid", value=name, allowed=f"one of {', '.join(GRIDS)}")
    adaptive = adaptive_grid(max_shift, step, tolerance) if name == "adaptive" else None
    if shifts is not None:
        if name == "coarse":
            raise ConfigurationError(
                "places its own shifts; leave it out, and measure.shifts are all run",
                setting="measure.grid",
                value=name,
            )
        return given_grid(shifts)
    if adaptive is not None:
        return adaptive
    return full_grid(max_shift, step) if name == "full" else coarse_grid(max_shift, step)

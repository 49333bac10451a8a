"""What is made of curves: cases computed by hand, the coarse grid's promise, and the resolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neg_service.measures.linearity import linearity
from neg_service.measures.noise import resolution
from neg_service.measures.shifts import Grid, coarse_grid, full_grid, given_grid


def test_neg_r_and_r2_of_curves_computed_by_hand() -> None:
    shifts = np.array([-1.0, 1.0, 2.0])
    curves = torch.tensor(
        [
            [-0.1, 0.1, 0.2],  # a line of slope 0.1
            [0.3, 0.3, 0.3],  # flat: r is 0 by definition
            [0.0, 0.0, 0.0],
            [0.0, 0.0, 0.6],  # neg = 2·0.6 / (1 + 1 + 4) = 0.2
        ],
        dtype=torch.float64,
    )
    found = linearity(Grid(shifts, shifts), curves)
    np.testing.assert_allclose(found.neg, [0.1, 0.3 * 2 / 6, 0, 0.2], rtol=1e-14)
    # Row 3: mean shift 2/3, mean Δp 0.2; Σ(δ-2/3)(Δp-0.2) = 0.8, Σ(δ-2/3)² = 14/3, Σ(Δp-0.2)² = 0.24.
    np.testing.assert_allclose(found.r, [1, 0, 0, 0.8 / np.sqrt(14 / 3 * 0.24)], rtol=1e-14)
    # Row 1: residuals 0.4, 0.2, 0.1 of 3·0.09; row 3: residuals 0.2, -0.2, 0.2 of 0.36.
    np.testing.assert_allclose(found.r2, [1, 1 - 0.21 / 0.27, 0, 1 - 0.12 / 0.36], rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(found.max_abs_delta_p, [0.2, 0.3, 0, 0.6])


def test_a_single_shift_has_a_slope_and_no_correlation() -> None:
    grid = given_grid([0.5])
    found = linearity(grid, torch.tensor([[0.2]]))
    assert float(found.neg) == pytest.approx(0.4)
    assert float(found.r) == 0


def test_curves_far_below_float32_are_evaluated_as_any_other() -> None:
    grid = full_grid()
    found = linearity(grid, torch.from_numpy(grid.shifts * 1e-30)[None])
    assert float(found.neg) == pytest.approx(1e-30)
    assert float(found.r) == pytest.approx(1)


def test_the_coarse_grid_is_exact_for_curves_of_the_fourth_degree() -> None:
    full, coarse = full_grid(), coarse_grid()
    assert len(coarse.shifts) == 4

    def curve(d: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(3e-4 * d - 2e-4 * d**2 + 5e-5 * d**3 + 7e-5 * d**4)[None]

    exact, found = linearity(full, curve(full.shifts)), linearity(coarse, curve(coarse.shifts))
    for name in ("neg", "r", "r2", "max_abs_delta_p"):
        assert float(getattr(found, name)) == pytest.approx(float(getattr(exact, name)), rel=1e-12)
    # NEG is a weighted sum of the curve that was run.
    assert float(curve(coarse.shifts)[0] @ torch.from_numpy(coarse.weights)) == pytest.approx(float(found.neg))


def test_the_resolution_of_one_sided_grids_has_the_baseline_rows_error() -> None:
    # One shift of 2: NEG is Δp/2, and its weight 1/2 counts for the shifted row and for the baseline.
    assert resolution(given_grid([2.0]), 0.1) == pytest.approx(2 * 0.1 * np.sqrt(1 / 4 + 1 / 4))
    # Shifts 1 and 2: weights 1/5 and 2/5, squares 1/25 + 4/25, sum 3/5.
    assert resolution(given_grid([1.0, 2.0]), 0.1) == pytest.approx(2 * 0.1 * np.sqrt(5 / 25 + 9 / 25))
    # Symmetric: the sum is 0.
    assert resolution(given_grid([-1.0, 1.0]), 0.1) == pytest.approx(2 * 0.1 * np.sqrt(1 / 2))


@pytest.mark.parametrize(
    "grid",
    [
        full_grid(),
        coarse_grid(),
        given_grid(np.arange(1, 21) / 10),
        given_grid(-np.arange(1, 21) / 10),
        given_grid([1.0]),
        given_grid([-0.2, 0.5, 1.0, 1.5, 2.0]),
    ],
    ids=["full", "coarse", "up", "down", "one", "skewed"],
)
def test_nearly_all_negs_of_rounding_errors_alone_are_below_the_resolution(grid: Grid) -> None:
    draw = np.random.default_rng(0)
    # Rows of equal error; a difference of two has sigma 1.
    rows = draw.normal(scale=np.sqrt(0.5), size=(4000, 1 + len(grid.shifts)))
    errors = torch.from_numpy(rows[:, 1:] - rows[:, :1])
    assert 0.95 < float((linearity(grid, errors).neg.abs() < resolution(grid, 1.0)).double().mean()) <= 1

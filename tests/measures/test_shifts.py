"""Grids of shifts: full, coarse, given, and refused."""

from __future__ import annotations

import numpy as np
import pytest

from neg_service.errors import ConfigurationError
from neg_service.measures.shifts import coarse_grid, full_grid, given_grid


def test_the_default_grid_is_the_papers() -> None:
    assert full_grid().shifts.tolist() == [s / 10 for s in range(-20, 21) if s]
    assert full_grid(0.5, 0.2).shifts.tolist() == [-0.4, -0.2, 0.2, 0.4]


def test_the_coarse_grid_follows_the_range() -> None:
    np.testing.assert_allclose(coarse_grid(0.5, 0.1).shifts, coarse_grid().shifts / 4)
    with pytest.raises(ConfigurationError, match=r"measure\.grid=coarse: runs 4 shifts"):
        coarse_grid(0.2, 0.1)


def test_a_tiny_grid_is_a_grid_and_one_that_rounds_away_is_refused() -> None:
    assert full_grid(3e-13, 1e-13).shifts.tolist() == [-3e-13, -2e-13, -1e-13, 1e-13, 2e-13, 3e-13]


@pytest.mark.parametrize(("max_shift", "step"), [(2.0, 0.0), (2.0, -0.1), (1.0, 2.0), (float("inf"), 0.1)])
def test_bad_grids_are_refused(max_shift: float, step: float) -> None:
    with pytest.raises(ConfigurationError, match=r"measure\.step="):
        full_grid(max_shift, step)


@pytest.mark.parametrize(
    ("shifts", "message"),
    [
        ([], "at least one shift"),
        ([1.0, "much"], "must be numbers"),
        ([[1.0], [1.0, 2.0]], "must be numbers"),
        ([[1.0]], "at least one shift"),
        ([1.0, 0.0], "0 is no shift"),
        ([float("nan")], "nan is no shift"),
        ([float("-inf")], "-inf is no shift"),
        ([1.0, 2.0, 1.0], "1 is given 2 times"),
    ],
)
def test_bad_shifts_are_refused(shifts: list[float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        given_grid(shifts)

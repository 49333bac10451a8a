"""Grids of shifts: full, coarse, given, and refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from neg_service.errors import ConfigurationError
from neg_service.measures.shifts import coarse_grid, full_grid, given_grid
from tests.refusals import ANY, refused


def test_the_default_grid_is_the_papers() -> None:
    assert full_grid().shifts.tolist() == [s / 10 for s in range(-20, 21) if s]
    assert full_grid(0.5, 0.2).shifts.tolist() == [-0.4, -0.2, 0.2, 0.4]


def test_the_coarse_grid_follows_the_range() -> None:
    np.testing.assert_allclose(coarse_grid(0.5, 0.1).shifts, coarse_grid().shifts / 4)
    with refused(ConfigurationError, "measure.grid", "coarse", says="runs 4 shifts"):
        coarse_grid(0.2, 0.1)


def test_a_tiny_grid_is_a_grid_and_one_that_rounds_away_is_refused() -> None:
    assert full_grid(3e-13, 1e-13).shifts.tolist() == [-3e-13, -2e-13, -1e-13, 1e-13, 2e-13, 3e-13]


@pytest.mark.parametrize(
    ("max_shift", "step"),
    [(2.0, 0.0), (2.0, -0.1), (1.0, 2.0), (float("inf"), 0.1), (1e-200, 1e-201), (1e200, 1e199), (2.0, 1e-9)],
)
def test_bad_grids_are_refused(max_shift: float, step: float) -> None:
    with refused(ConfigurationError, "measure.step", step, says=re.escape(f"measure.max_shift={max_shift}")):
        full_grid(max_shift, step)


@pytest.mark.parametrize(
    ("shifts", "refusal"),
    [
        ([], ("measure.shifts", ANY, "at least one shift")),
        ([1.0, 1e-200], ("measure.shifts", ANY, "1e-200 is no shift; .* between 1e-100 and 1e\\+100")),
        ([-1e200], ("measure.shifts", ANY, "-1e\\+200 is no shift")),
        ([1.0, "much"], ("measure.shifts", "[1.0, 'much']", "numbers")),
        ([[1.0], [1.0, 2.0]], ("measure.shifts", "[[1.0], [1.0, 2.0]]", "numbers")),
        ([[1.0]], ("measure.shifts", ANY, "at least one shift")),
        ([1.0, 0.0], ("measure.shifts", ANY, "0 is no shift")),
        ([float("nan")], ("measure.shifts", ANY, "nan is no shift")),
        ([float("-inf")], ("measure.shifts", ANY, "-inf is no shift")),
        ([1.0, 2.0, 1.0], ("measure.shifts", ANY, "1 is given 2 times")),
    ],
)
def test_bad_shifts_are_refused(shifts: list[float], refusal: tuple[Any, ...]) -> None:
    with refused(ConfigurationError, *refusal):
        given_grid(shifts)

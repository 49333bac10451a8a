"""Linearity of curves that are known exactly."""

from __future__ import annotations

import numpy as np
import pytest

from neg_service.measures.shifts import range_grid
from neg_service.studies.linearity.curves import by_layer, by_range, histogram, shifts_of_ranges

RANGES = [0.5, 1.0, 2.0, 4.0, 10.0]


def test_ranges_share_their_shifts() -> None:
    shifts = shifts_of_ranges(RANGES)
    assert shifts == sorted({sign * s for s in (0.25, 0.5, 1, 2, 4, 5, 10) for sign in (-1, 1)})


def test_a_line_is_linear_everywhere_and_a_parabola_nowhere_and_a_bend_only_near_zero() -> None:
    shifts = np.array(shifts_of_ranges(RANGES))
    # s + s^3/8 is a line near 0 and a cubic far out; four shifts and the origin hold a cubic exactly.
    curves = np.stack([0.1 * shifts, shifts**2, shifts + shifts**3 / 8, 0 * shifts])
    rows = by_range(list(shifts), curves, np.array([0, 1, 2, 2]), RANGES, np.zeros(4))
    found = {(row["range"], row["layer"]): row for row in rows}
    for largest in RANGES:
        assert found[largest, 0]["share_linear"] == 1
        assert found[largest, 0]["r2_q50"] == pytest.approx(1)
        assert found[largest, 1]["share_linear"] == 0
        judged = range_grid(largest).evaluated
        expected = np.corrcoef(judged, judged + judged**3 / 8)[0, 1]
        assert found[largest, 2]["r_q50"] == pytest.approx(expected)
        assert (found[largest, 2]["n"], found[largest, 2]["n_without_effect"]) == (1, 1)
        assert found[largest, None]["n"] == 3
    assert found[0.5, 2]["share_linear"] == 1
    assert found[10.0, 2]["share_linear"] == 0


def test_layers_say_how_strong_and_how_positive_their_neurons_are() -> None:
    neg = np.array([1.0, -2.0, 3.0, 1e-9])
    rows = by_layer(
        np.array([1, 0.96, 0.5, 1.0]), np.ones(4), neg, np.array([1, 1, 1, 0], bool), np.array([0, 0, 0, 5])
    )
    everything, first, last = rows
    assert (everything["layer"], first["layer"], last["layer"]) == (None, 0, 5)
    assert first["share_linear"] == pytest.approx(2 / 3)
    assert first["neg_q50"] == 2
    assert first["share_positive"] == pytest.approx(2 / 3)
    assert (last["share_positive"], last["n_resolved"]) == (None, 0)


def test_a_histogram_counts_every_value() -> None:
    bins = histogram(np.array([-3.0, 0.0, 0.01, 0.5, 1.0]), 10)
    assert [one["n"] for one in bins] == [3, 0, 0, 0, 0, 1, 0, 0, 0, 1]


def test_what_is_below_the_noise_of_a_range_is_left_out_there_alone() -> None:
    shifts = np.array(shifts_of_ranges(RANGES))
    rows = by_range(list(shifts), 0.1 * shifts[None], np.array([0]), RANGES, np.array([0.15]))
    kept = {row["range"]: row["n"] for row in rows if row["layer"] is None}
    assert kept == {0.5: 0, 1.0: 0, 2.0: 1, 4.0: 1, 10.0: 1}

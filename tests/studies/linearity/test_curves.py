"""Linearity of curves that are known exactly."""

from __future__ import annotations

import numpy as np
import pytest

from neg_service.measures.shifts import chosen_grid
from neg_service.studies.linearity.curves import by_layer, by_range, histogram, r_in_log_odds, sweep_of_range


def test_the_straight_are_counted_by_layer_and_what_does_nothing_is_left_out() -> None:
    r, r2 = np.array([1.0, 0.2, -0.96, 0.0]), np.array([1.0, 0.1, 0.9, 0.0])
    log_odds_r = np.array([0.99, 0.96, np.nan, 1.0])
    layer, moved = np.array([0, 1, 2, 2]), np.array([0.2, 4.0, 3.0, 0.1])
    rows = by_range(2.0, r, r2, moved, layer, np.full(4, 0.15), log_odds_r)
    found = {row["layer"]: row for row in rows}
    assert {row["range"] for row in rows} == {2.0}
    assert [found[layer]["share_linear"] for layer in range(3)] == [1, 0, 1]
    assert (found[2]["n"], found[2]["n_without_effect"]) == (1, 1)
    assert (found[2]["r_q50"], found[2]["r2_q50"]) == (0.96, 0.9)
    assert (found[None]["n"], found[None]["n_without_effect"]) == (3, 1)
    assert [found[layer]["share_linear_log_odds"] for layer in (0, 1, 2, None)] == [1, 1, 0, pytest.approx(2 / 3)]
    assert [found[layer]["share_straighter_log_odds"] for layer in (0, 1, 2, None)] == [0, 1, 0, pytest.approx(1 / 3)]


def test_a_logistic_curve_is_straight_in_log_odds_alone() -> None:
    shifts = np.array([-3.0, -1.0, 1.0, 3.0])
    p = 1 / (1 + np.exp(-np.outer([2.0, -1.0, 0.0], shifts) - np.array([[0.5], [-4.0], [1.0]])))
    before = 1 / (1 + np.exp(-np.array([0.5, -4.0, 1.0])))
    np.testing.assert_allclose(r_in_log_odds(shifts, p - before[:, None], before), [1, -1, 0], atol=1e-9)
    # What a fitted curve has below zero has no log-odds.
    assert np.isnan(r_in_log_odds(shifts, np.array([[-0.2, 0.0, 0.1, 0.2]]), np.array([0.1])))


def test_a_range_has_forty_shifts() -> None:
    settings = sweep_of_range(10.0)
    assert chosen_grid(settings["grid"], None, settings["max_shift"], settings["step"]).shifts.tolist() == [
        s / 2 for s in range(-20, 21) if s
    ]


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

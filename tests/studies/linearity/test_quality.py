"""Estimators against NEG: hand-computed cases, scipy's own correlations, and what an interval means."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from neg_service.studies.linearity.quality import quality

ALL = np.ones(6, dtype=bool)


def test_by_hand() -> None:
    neg = np.array([1.0, 2.0, -1.0, 4.0])
    estimate = np.array([1.5, 1.0, 1.0, 4.0])
    found = quality(neg, estimate, np.array([0, 0, 1, 1]), np.ones(4, bool), draws=10)
    # Relative errors 0.5, 0.5, 2, 0: the two in the middle are 0.5. Three of four signs are equal.
    assert found.median_relative_error.value == 0.5
    assert found.signs.value == 0.75
    # Means 1.5 and 1.875; products of differences -0.5*-0.375 + 0.5*-0.875 + -2.5*-0.875 + 2.5*2.125 = 7.25, squares
    # 0.25+0.25+6.25+6.25 = 13 and 0.140625+0.765625+0.765625+4.515625 = 6.1875.
    assert found.pearson.value == pytest.approx(7.25 / np.sqrt(13 * 6.1875))


def test_a_median_of_an_even_number_is_between_the_two_in_the_middle() -> None:
    neg, error = np.ones(4), np.array([0.1, 0.2, 0.6, 0.9])
    found = quality(neg, neg + error, np.array([0, 0, 1, 1]), np.ones(4, bool), draws=10)
    assert found.median_relative_error.value == pytest.approx(0.4)
    three = quality(neg[:3], neg[:3] + error[:3], np.array([0, 1, 1]), np.ones(3, bool), draws=10)
    assert three.median_relative_error.value == pytest.approx(0.2)


def test_what_is_not_resolved_has_no_sign_and_no_relative_error() -> None:
    neg, estimate = np.array([1.0, 1e-9, 2.0]), np.array([1.0, -1.0, 2.0])
    found = quality(neg, estimate, np.array([0, 1, 1]), np.array([True, False, True]), draws=10)
    assert (found.signs.value, found.median_relative_error.value, found.n, found.n_resolved) == (1.0, 0.0, 3, 2)


def test_correlations_are_scipys_ties_included() -> None:
    draw = np.random.default_rng(0)
    neg = draw.integers(-5, 5, 300).astype(float)
    estimate = neg + draw.normal(size=300).round()
    found = quality(neg, estimate, draw.integers(0, 20, 300), neg != 0, draws=50)
    assert found.pearson.value == pytest.approx(stats.pearsonr(neg, estimate).statistic)
    assert found.spearman.value == pytest.approx(stats.spearmanr(neg, estimate).statistic)
    for one in (found.pearson, found.spearman, found.signs, found.median_relative_error):
        assert one.low <= one.value <= one.high


def test_intervals_are_of_whole_prompts() -> None:
    """Ten prompts whose triples are all alike say no more than ten triples: the interval stays as wide."""
    draw = np.random.default_rng(1)
    neg, noise, prompt = draw.normal(size=10), draw.normal(size=10), np.arange(10)
    few = quality(neg, neg + noise, prompt, np.ones(10, bool))
    many = quality(np.repeat(neg, 100), np.repeat(neg + noise, 100), np.repeat(prompt, 100), np.ones(1000, bool))
    assert many.pearson.high - many.pearson.low == pytest.approx(few.pearson.high - few.pearson.low, rel=1e-6)
    # Drawn one by one they would pretend to know ten times as much.
    alone = quality(np.repeat(neg, 100), np.repeat(neg + noise, 100), np.arange(1000), np.ones(1000, bool))
    assert alone.pearson.high - alone.pearson.low < 0.3 * (few.pearson.high - few.pearson.low)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    draw = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        true = draw.normal(size=80)
        found = quality(true, 0.8 * true + 0.6 * draw.normal(size=80), np.arange(80), np.ones(80, bool), 200, seed)
        covered += found.pearson.low <= 0.8 <= found.pearson.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_constant_estimate_correlates_with_nothing() -> None:
    found = quality(np.arange(6.0), np.zeros(6), np.arange(6), ALL, draws=20)
    assert np.isnan(found.pearson.value)
    assert np.isnan(found.spearman.value)

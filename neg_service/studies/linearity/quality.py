"""How well an estimator meets NEG, over sampled (prompt, target, neuron) triples, with bootstrap intervals.

    pearson                correlation of estimate and NEG
    spearman               correlation of their ranks, ties sharing their mean rank
    signs                  share of equal signs, of triples whose NEG the run can tell from zero
    median_relative_error  median of |estimate - NEG| / |NEG|, of the same triples

Triples of one prompt are not independent, so the bootstrap draws whole prompts, with replacement. Correlations of a
draw follow from sums that are made once for each prompt; ranks and the order of errors stay those of all triples.

Axes: I triples, P prompts, B draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

LEVEL = 0.95
STATISTICS = ("pearson", "spearman", "signs", "median_relative_error")


@dataclass(frozen=True)
class Estimated:
    """A statistic with its interval, which holds 95 % of the bootstrap's draws; NaN where it has no meaning."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """Of one estimator; see the module's header. n: triples; n_resolved: those with a NEG that differs from zero."""

    pearson: Estimated
    spearman: Estimated
    signs: Estimated
    median_relative_error: Estimated
    n: int
    n_resolved: int


def quality(
    neg_i: Doubles,
    estimate_i: Doubles,
    prompt_i: Integers,
    is_resolved_i: Booleans,
    draws: int = 1000,
    seed: int = 0,
    *,
    has_errors: bool = True,
) -> Quality:
    """Evaluate one estimator.

    neg_i, estimate_i: [I] probability per activation unit, or whatever the estimator has for a unit. prompt_i: [I]
    which prompt, from 0. is_resolved_i: [I] whether NEG differs from zero by more than the run's noise. has_errors:
    whether estimates have the unit of NEG, so that their relative error means something; it is NaN if not. Of a single
    prompt, intervals are NaN.
    """
    # Takes a second to load, and the console and the report need only the names of this package.
    from scipy.stats import rankdata

    n_prompts = int(prompt_i.max(initial=-1)) + 1
    drawn = np.random.default_rng(seed).multinomial(n_prompts, np.full(n_prompts, 1 / max(1, n_prompts)), size=draws)
    weights_bp = np.vstack([np.ones(n_prompts), drawn])[: None if n_prompts > 1 else 1]
    resolved = np.flatnonzero(is_resolved_i)
    neg, estimate, prompt = neg_i[resolved], estimate_i[resolved], prompt_i[resolved]
    equal = np.sign(neg) == np.sign(estimate)
    per_prompt = np.bincount(prompt, minlength=n_prompts).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        signs_b = (weights_bp @ np.bincount(prompt, weights=equal, minlength=n_prompts)) / (weights_bp @ per_prompt)
        error = np.abs(estimate - neg) / np.abs(neg)
    return Quality(
        pearson=_interval(_correlations(neg_i, estimate_i, prompt_i, weights_bp)),
        spearman=_interval(_correlations(rankdata(neg_i), rankdata(estimate_i), prompt_i, weights_bp)),
        signs=_interval(signs_b),
        median_relative_error=_interval(_medians(error if has_errors else error[:0], prompt, weights_bp)),
        n=len(neg_i),
        n_resolved=len(resolved),
    )


def _correlations(x_i: Doubles, y_i: Doubles, prompt_i: Integers, weights_bp: Doubles) -> Doubles:
    """Pearson's r of each draw; the first is of all triples once."""
    n_prompts = weights_bp.shape[1]
    if not len(x_i):
        return np.full(len(weights_bp), np.nan)
    # Centred, or the sums would cancel.
    x, y = x_i - x_i.mean(), y_i - y_i.mean()
    sums_p = np.stack(
        [np.bincount(prompt_i, weights=w, minlength=n_prompts) for w in (np.ones_like(x), x, y, x * x, y * y, x * y)], 1
    )
    n, sx, sy, sxx, syy, sxy = (weights_bp @ sums_p).T
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (sxx - sx**2 / n) * (syy - sy**2 / n)
        return np.where(spread > 0, (sxy - sx * sy / n) / np.sqrt(np.maximum(spread, 0)), np.nan)


def _medians(values_i: Doubles, prompt_i: Integers, weights_bp: Doubles) -> Doubles:
    """The weighted median of each draw: between the two middle values, where the half of the weight is between them."""
    if not len(values_i):
        return np.full(len(weights_bp), np.nan)
    order = np.argsort(values_i, kind="stable")
    values, prompts = values_i[order], prompt_i[order]
    medians = []
    for weights_p in weights_bp:
        running = np.cumsum(weights_p[prompts])
        middle = [np.searchsorted(running, running[-1] / 2, side) for side in ("left", "right")]
        medians.append(values[middle].mean() if running[-1] else np.nan)
    return np.array(medians)


def _interval(values_b: Doubles) -> Estimated:
    drawn = values_b[1:][np.isfinite(values_b[1:])]
    if not len(drawn):
        return Estimated(float(values_b[0]), float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimated(float(values_b[0]), float(low), float(high))

"""`control` on facts: how much of what is asked for is reached, in how many passes, and is what is not foretold?

Prompts, targets and what is wanted of them are drawn, right and wrong targets in equal numbers. What few neurons cannot
reach is foretold before any shift is tried, in two ways: by the distance, from one plain pass, and by the first step,
from one gradient: the least shift that would do it if log-odds were linear in it, over the activations.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.benchmarks.figures import bar, figure
from neg_service import control, load_model, neurgrad
from neg_service.errors import ConfigurationError
from neg_service.measures.control.control import ControlResult
from neg_service.models.language_model import LanguageModel
from neg_service.models.loading import set_threads
from neg_service.prompts.facts import load

Doubles = NDArray[np.float64]

# The bars: what share has to be how near, in how many passes.
_WITHIN, _LEAST_SHARE, _MOST_PASSES = 0.02, 0.95, 5
_LOWEST, _HIGHEST = 0.1, 0.9
# How far a wish is from where the target is, in nats of log-odds.
_DISTANCES = (0.0, 1.0, 3.0, 6.0, float("inf"))


@dataclass
class Settings:
    """See `conf/benchmark/control.yaml`."""

    name: str
    model: str
    threads: int
    pairs: int
    seed: int
    neurons: int
    tolerance: float
    beyond_nats: float
    beyond_norms: float


@dataclass(frozen=True)
class Wish:
    """A prompt, one of its targets, and the probability that it shall have."""

    prompt: str
    target: str
    is_right: bool
    wanted: float


def run(settings: Settings) -> dict[str, Any]:
    """Measure; the result's `bars` say what was reached."""
    if settings.pairs < 2:
        raise ConfigurationError(setting="benchmark.pairs", value=settings.pairs, allowed="at least 2")
    set_threads(settings.threads)
    model = load_model(settings.model, device="cpu")
    wishes = drawn(settings.pairs, settings.seed)
    few = f"{settings.neurons} neurons"
    distance_p, step_p = before_any_shift(model, wishes, settings.neurons)
    found, seconds = {}, {}
    choices: dict[str, Any] = {"all neurons": "all", few: settings.neurons}
    for name, neurons in choices.items():
        began = time.perf_counter()
        found[name] = control(
            model, [own.prompt for own in wishes], [own.target for own in wishes],
            probability=[own.wanted for own in wishes], neurons=neurons, tolerance=settings.tolerance,
        )  # fmt: skip
        seconds[name] = (time.perf_counter() - began) / len(wishes)
        sys.stderr.write(f"{name}: {np.mean(_is_near(found[name])):.3f} within {_WITHIN}\n")
    share, passes = float(np.mean(_is_near(found["all neurons"]))), float(np.median(found["all neurons"].passes))
    return {
        **{name: _told(own, wishes, seconds[name]) for name, own in found.items()},
        f"not reached with {few}, as foretold": {
            "by nats to go": foretold(distance_p, _is_near(found[few]), settings.beyond_nats),
            "by the first step over activations": foretold(step_p, _is_near(found[few]), settings.beyond_norms),
        },
        "bars": [
            bar(f"share within {_WITHIN}, all neurons", round(share, 4), _LEAST_SHARE, at_most=False),
            bar("median of passes, all neurons", passes, _MOST_PASSES, at_most=True),
        ],
    }


def drawn(pairs: int, seed: int) -> list[Wish]:
    """Wishes for the built-in facts, right and wrong targets in turn."""
    draw, facts = random.Random(seed), load()
    found = []
    for index in range(pairs):
        fact, is_right = draw.choice(facts), index % 2 == 0
        assert fact.answer is not None
        wrong = [own for k, own in enumerate(fact.targets) if k != fact.answer]
        target = fact.targets[fact.answer] if is_right else draw.choice(wrong)
        found.append(Wish(fact.text, target, is_right, draw.uniform(_LOWEST, _HIGHEST)))
    return found


def before_any_shift(model: LanguageModel, wishes: Sequence[Wish], neurons: int) -> tuple[Doubles, Doubles]:
    """What is known of wishes beforehand [P] each: |Δ log-odds| in nats, and the norm of the first step over ‖a‖.

    The first step of `control` is |Δ log-odds| / ‖g‖ long, with the gradient g over the strongest neurons alone.
    """
    found = neurgrad(model, [own.prompt for own in wishes], [[own.target] for own in wishes], readout="log_odds")
    gradient_pm = np.abs(found.neurgrad[:, 0].reshape(len(wishes), -1).astype(np.float64))
    activation_pm = found.activation.reshape(len(wishes), -1).astype(np.float64)
    strongest_pn = np.sort(gradient_pm, axis=1)[:, -neurons:]
    distance_p = np.abs(_distances(wishes, found.probability[:, 0].astype(np.float64)))
    step_p: Doubles = distance_p / np.linalg.norm(strongest_pn, axis=1)
    return distance_p, step_p / np.linalg.norm(activation_pm, axis=1)


def foretold(size_p: Doubles, is_reached_p: NDArray[np.bool_], beyond: float) -> dict[str, Any]:
    """How right it is to say of wishes of a size `beyond` that they will not be reached.

    precision: of those of which it is said the share that was not reached; recall: of those that were not reached the
    share of which it was said; right: of all. auc: how often, of one that was and one that was not reached, the latter
    is the larger, which no threshold decides. None where there are none of a kind.
    """
    is_said_p, is_missed_p = size_p > beyond, ~is_reached_p
    is_larger_rm = size_p[is_missed_p] > size_p[is_reached_p][:, None]
    return {
        "beyond": beyond,
        "not reached": int(is_missed_p.sum()),
        "said not to be": int(is_said_p.sum()),
        "right": _share(is_said_p == is_missed_p),
        "precision": _share(is_missed_p[is_said_p]),
        "recall": _share(is_said_p[is_missed_p]),
        "auc": _share(is_larger_rm.ravel()),
    }


def _told(found: ControlResult, wishes: Sequence[Wish], seconds: float) -> dict[str, Any]:
    """What was achieved: of all, of right and wrong targets, and by how far the wishes were."""
    is_right_p = np.array([own.is_right for own in wishes])
    distance_p = np.abs(_distances(wishes, found.probability_before))
    by_distance = {
        f"{low:g} to {high:g} nats": _figures(found, (distance_p >= low) & (distance_p < high))
        for low, high in pairwise(_DISTANCES)
    }
    return {
        **_figures(found, np.ones(len(wishes), bool)),
        "seconds a wish": round(seconds, 3),
        "reasons": dict(Counter(own for own in found.reason if own)),
        "right targets": _figures(found, is_right_p),
        "wrong targets": _figures(found, ~is_right_p),
        **{name: own for name, own in by_distance.items() if own["wishes"]},
    }


def _figures(found: ControlResult, is_own_p: NDArray[np.bool_]) -> dict[str, Any]:
    if not is_own_p.any():
        return {"wishes": 0}
    off = {
        "first shot": found.first_shot - found.wanted,
        "achieved": found.achieved - found.wanted,
        "NEG's prediction": found.predicted.by_neg - found.probability,
        "log-odds' prediction": found.predicted.by_log_odds - found.probability,
    }
    return {
        "wishes": int(is_own_p.sum()),
        f"within {_WITHIN}": _share(_is_near(found)[is_own_p]),
        "passes": figure(found.passes[is_own_p].tolist(), "passes"),
        "norm over that of activations": figure(found.relative_norm[is_own_p].tolist(), "ratio"),
        "median off": {name: round(float(np.median(np.abs(own[is_own_p]))), 5) for name, own in off.items()},
    }


def _is_near(found: ControlResult) -> NDArray[np.bool_]:
    is_near_p: NDArray[np.bool_] = np.abs(found.achieved - found.wanted) <= _WITHIN
    return is_near_p


def _distances(wishes: Sequence[Wish], probability_p: Doubles) -> Doubles:
    """From where the targets are to what is wanted of them, in nats of log-odds [P]."""
    wanted_p = np.array([own.wanted for own in wishes])
    distance_p: Doubles = np.log(wanted_p / (1 - wanted_p)) - np.log(probability_p / (1 - probability_p))
    return distance_p


def _share(is_so: NDArray[np.bool_]) -> float | None:
    return round(float(is_so.mean()), 4) if len(is_so) else None

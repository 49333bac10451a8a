"""The search on functions that are known: linear ones in one step, ones that turn, ones that end."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from neg_service.measures.control.least_shift import LeastShift, strongest
from neg_service.measures.control.search import Search

SLOPE = np.array([3.0, 0.0, -4.0, 12.0])


def searched(
    value: Callable[[np.ndarray], float], gradient: Callable[[np.ndarray], np.ndarray], goal: float, *,
    tolerance: float = 1e-6, passes: int = 15, least: LeastShift | None = None, size: float = 100.0,
) -> Search:  # fmt: skip
    """A search that is told what it asks for."""
    nothing = np.zeros(len(SLOPE))
    found = Search(
        value=value(nothing), goal=goal, is_met=lambda own: abs(own - goal) <= tolerance,
        least=least or LeastShift.of(np.ones(len(SLOPE))), gradient_cm=gradient(nothing)[None],
        lacks_c=np.array([goal - value(nothing)]), most_passes=passes, activation_norm=size,
        is_met_before=abs(value(nothing) - goal) <= tolerance,
    )  # fmt: skip
    while not found.is_over:
        if found.wants == "value":
            found.take_value(value(found.shift))
        else:
            found.take_gradient(gradient(found.shift)[None], np.array([goal - value(found.shift)]))
    return found


def test_a_linear_value_takes_one_pass_and_the_closed_form() -> None:
    found = searched(lambda d: 1.0 + SLOPE @ d, lambda _: SLOPE, goal=-25.0)
    # d = c·g / ‖g‖² with c = -26 and ‖g‖² = 9 + 16 + 144 = 169.
    np.testing.assert_allclose(found.best[1], -26 / 169 * SLOPE, rtol=1e-12)
    assert (found.passes, found.reason) == (1, "")
    assert found.first == pytest.approx(-25.0)


def test_the_chosen_shift_is_the_least_squares_solution() -> None:
    found = searched(lambda d: SLOPE @ d, lambda _: SLOPE, goal=5.0)
    dense = np.linalg.lstsq(SLOPE[None], np.array([5.0]), rcond=None)[0]
    np.testing.assert_allclose(found.best[1], dense, rtol=1e-12)


def test_a_scaled_norm_moves_neurons_by_shares_of_what_counts() -> None:
    scale = np.array([2.0, 1.0, 0.0, 0.5])
    found = searched(lambda d: SLOPE @ d, lambda _: SLOPE, goal=5.0, least=LeastShift.of(scale))
    # In units of the scale: least squares for slopes 6, 0, 0, 6, which are 5/72 of each; one of scale 0 stays.
    np.testing.assert_allclose(found.best[1], [2 * 30 / 72, 0, 0, 0.5 * 30 / 72], rtol=1e-12)


def test_what_is_there_already_takes_no_pass_and_no_shift() -> None:
    found = searched(lambda d: 5.0 + SLOPE @ d, lambda _: SLOPE, goal=5.0)
    assert (found.passes, found.reason) == (0, "already there")
    assert not found.best[1].any()


def test_a_bent_value_is_met_by_a_secant_without_another_gradient() -> None:
    asked = []

    def gradient(d: np.ndarray) -> np.ndarray:
        asked.append(d)
        return SLOPE / (1 + (SLOPE @ d / 20) ** 2)

    found = searched(lambda d: 20 * math.atan(SLOPE @ d / 20), gradient, goal=5.0)
    assert found.reason == ""
    assert abs(found.best[0] - 5) <= 1e-6
    assert len(asked) == 1
    assert found.passes <= 6


def test_where_the_first_ray_leads_nowhere_a_new_gradient_does() -> None:
    # Up to 1 along the first axis; further along the second, whose slope shows behind the first step alone.
    def value(d: np.ndarray) -> float:
        return math.tanh(3 * d[0]) + max(0.0, d[0] - 0.2) * d[1] + 0.01 * d[1]

    def gradient(d: np.ndarray) -> np.ndarray:
        own = np.zeros(4)
        own[0] = 3 / math.cosh(3 * d[0]) ** 2 + (d[1] if d[0] > 0.2 else 0)
        own[1] = max(0.0, d[0] - 0.2) + 0.01
        return own

    found = searched(value, gradient, goal=3.0, passes=40)
    assert found.reason == ""
    assert abs(found.best[0] - 3) <= 1e-6
    # The first ray alone ends below 1.1.
    assert found.best[1][1] > 1


def test_what_saturates_says_so_and_how_near_it_came() -> None:
    found = searched(lambda d: math.tanh(SLOPE @ d), lambda d: SLOPE / math.cosh(min(SLOPE @ d, 300)) ** 2, goal=2.0)
    assert found.reason == "saturates"
    assert 0.7 < found.best[0] <= 1
    assert found.passes < 15


def test_passes_and_norms_end() -> None:
    found = searched(
        lambda d: 3 * math.atan(SLOPE @ d / 3), lambda d: SLOPE / (1 + (SLOPE @ d / 3) ** 2), 4.0, passes=2
    )
    assert (found.passes, found.reason) == (2, "max_passes")
    small = searched(lambda d: SLOPE @ d, lambda _: SLOPE, goal=5.0, size=0.01)
    assert small.reason == "the shift would be more than 3 times as large as the activations"
    # Three times 0.01, along the unit vector g / 13.
    np.testing.assert_allclose(small.best[1], 0.03 * SLOPE / 13, rtol=1e-9)


def test_a_value_that_nothing_moves() -> None:
    found = searched(lambda d: 0.0, lambda _: np.zeros(4), goal=1.0)
    assert (found.passes, found.reason) == (0, "no neuron that may move changes it")


def test_a_target_is_brought_above_several_others_by_the_least_shift() -> None:
    rng = np.random.default_rng(0)
    gradient_cm, lacks_c = rng.standard_normal((3, 6)), np.array([1.0, 0.9, -5.0])
    found = LeastShift.of(np.ones(6)).step(gradient_cm, lacks_c)
    assert found is not None
    met = gradient_cm @ found
    assert (met >= lacks_c - 1e-9).all()
    # Of many others that meet all, none is smaller.
    for _ in range(2000):
        other = found + 0.1 * rng.standard_normal(6)
        if (gradient_cm @ other >= lacks_c).all():
            assert np.linalg.norm(other) >= np.linalg.norm(found)


def test_the_strongest_are_those_that_the_least_shift_would_move_most() -> None:
    np.testing.assert_array_equal(strongest(SLOPE, np.ones(4), 2), [0, 0, 1, 1])
    np.testing.assert_array_equal(strongest(SLOPE, np.array([9.0, 1, 1, 1]), 1), [9, 0, 0, 0])


def test_a_jump_past_what_is_wanted_is_told_as_one() -> None:
    # Linear, and from 3 on 10 higher.
    found = searched(lambda d: SLOPE @ d + (10 if SLOPE @ d > 3 else 0), lambda _: SLOPE, goal=7.0)
    assert found.reason == "jumps past it, where other experts are chosen"
    assert found.passes < 15
    # As near as there is, on either side.
    assert min(abs(found.best[0] - 3), abs(found.best[0] - 13)) < 0.3

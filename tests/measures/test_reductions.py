"""What is kept of gradients where the model runs, against NumPy on the same gradients."""

from __future__ import annotations

import numpy as np
import torch

from neg_service.measures.builtin.skill_scores import gradient_scores
from neg_service.measures.reductions import all_neurons, at_places, largest_size, scores, strongest
from neg_service.slots import Slots

K, M = 3, 40
SLOTS = Slots.of_layers({0: M})
_draw = np.random.default_rng(0)
# Small whole numbers: many sizes are equal, some are zero.
GRADIENT = _draw.integers(-3, 4, (K, M)).astype(np.float32)
ACTIVATION = _draw.integers(-2, 3, M).astype(np.float32)
NEURGRAD = GRADIENT * np.where(ACTIVATION < 0, np.float32(-1), np.float32(1))
GIVEN = (SLOTS, torch.from_numpy(GRADIENT), torch.from_numpy(ACTIVATION))


def test_all_values_and_the_largest() -> None:
    neurgrad_km, activation_m = all_neurons(0, *GIVEN)
    np.testing.assert_array_equal(neurgrad_km, NEURGRAD)
    np.testing.assert_array_equal(activation_m, ACTIVATION)
    np.testing.assert_array_equal(largest_size(0, *GIVEN)[0], np.abs(NEURGRAD).max(0))


def test_of_equally_strong_neurons_the_first_come_first() -> None:
    best_kt, neurgrad_kt, activation_kt = strongest(15)(0, *GIVEN)
    expected = np.argsort(-np.abs(NEURGRAD), axis=1, kind="stable")[:, :15]
    np.testing.assert_array_equal(best_kt, expected)
    np.testing.assert_array_equal(neurgrad_kt, np.take_along_axis(NEURGRAD, expected, 1))
    np.testing.assert_array_equal(activation_kt, ACTIVATION[expected])


def test_scores_of_each_prompt() -> None:
    answers = [2, 0]
    for index, answer in enumerate(answers):
        polarity_m, magnitude_m, activation_m = scores(answers)(index, *GIVEN)
        expected = gradient_scores(NEURGRAD[None], np.array([answer]))
        np.testing.assert_array_equal(polarity_m, expected["polarity"])
        np.testing.assert_array_equal(magnitude_m, expected["magnitude"])
        np.testing.assert_array_equal(activation_m, ACTIVATION)


def test_values_at_places() -> None:
    place_s = np.array([7, -1, 0])
    reduce = at_places(lambda index, slots: place_s if (index, slots) == (4, SLOTS) else place_s[:0])
    neurgrad_ks, activation_s = reduce(4, *GIVEN)
    np.testing.assert_array_equal(neurgrad_ks[:, ::2], NEURGRAD[:, [7, 0]])
    np.testing.assert_array_equal(activation_s[::2], ACTIVATION[[7, 0]])

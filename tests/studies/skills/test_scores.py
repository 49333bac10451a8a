"""Scores and rankings against dense loops over every number, ties included; and both ways of having them."""

from __future__ import annotations

import numpy as np

from neg_service.measures.builtin.skill_scores import activation_scores, gradient_scores, n_bits
from neg_service.studies.skills.scores import SkillScores

P, K, M = 40, 4, 300


def sgn(value: float) -> int:
    """Written out, so that the comparison shares nothing with what is tested."""
    return 1 if value > 0 else -1 if value < 0 else 0


def test_scores_equal_the_formulas_written_out(gradients: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    g, a, y = gradients
    found = gradient_scores(g, y) | activation_scores(a, y, K)
    mean = a.astype(np.float64).mean(0)
    for n in range(M):
        polarity = sum(2 * sgn(g[i, y[i], n]) - sum(sgn(g[i, k, n]) for k in range(K)) for i in range(P))
        magnitude = sum(sgn(g[i, y[i], n] - g[i, k, n]) for i in range(P) for k in range(K))
        assert (found["polarity"][n], found["magnitude"][n]) == (polarity, magnitude)
        for bit in (0, 1):
            agree = [(a[i, n] > mean[n]) == bool(y[i] >> bit & 1) for i in range(P)]
            assert found[f"fires/{bit}"][n] == sum(1 if one else -1 for one in agree)
    assert set(found) == {"polarity", "magnitude", "activation", "fires/0", "fires/1"}
    np.testing.assert_allclose(found["activation"] / P, mean)


def test_scores_add_up_over_prompts(gradients: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    g, _, y = gradients
    whole = gradient_scores(g, y)
    halves = [gradient_scores(g[part], y[part]) for part in (slice(0, 13), slice(13, P))]
    for name, values in whole.items():
        np.testing.assert_array_equal(values, halves[0][name] + halves[1][name])


def test_a_ranking_takes_the_lower_number_of_equals() -> None:
    scores = SkillScores(np.arange(100, 106), {8: {"polarity": np.array([1.0, -5, 5, 0, -1, 5])}})
    ranking = scores.ranked("polarity")
    assert ranking.neurons.tolist() == [101, 102, 105, 100, 104, 103]
    assert ranking.polarity.tolist() == [-1, 1, 1, 1, -1, 0]
    assert ranking.first(2).neurons.tolist() == [101, 102]
    assert ranking.block(2, 4).neurons.tolist() == [105, 100]


def test_random_neurons_are_drawn_and_have_the_polarity_of_their_score() -> None:
    values = np.where(np.arange(M) % 3 == 0, -2.0, 5.0)
    scores = SkillScores(np.arange(M), {8: {"polarity": values, "activation": 8.0 * np.arange(M)}})
    drawn = scores.of_random("polarity", 50, seed=4)
    assert drawn.neurons.tolist() == scores.of_random("polarity", 50, seed=4).neurons.tolist()
    assert drawn.neurons.tolist() != scores.of_random("polarity", 50, seed=5).neurons.tolist()
    assert len(np.intersect1d(drawn.neurons, np.arange(50))) < 25
    np.testing.assert_array_equal(drawn.polarity, np.sign(values[drawn.neurons]))
    assert scores.means_of([drawn.first(3), drawn.first(5)]) == {int(n): float(n) for n in drawn.neurons[:5]}


def test_labels_are_written_in_as_many_bits_as_they_need() -> None:
    assert [n_bits(k) for k in (2, 3, 4, 5)] == [1, 2, 2, 3]

"""Probes against their formulas written out, ties included; the forest; baselines; and the interval of an accuracy."""

from __future__ import annotations

import numpy as np
import pytest

from neg_service.measures.builtin.neuron_predictions import predictions_of
from neg_service.studies.skills import probes
from neg_service.studies.skills.predictions import NeuronPredictions
from neg_service.studies.skills.scores import Ranking

P, K, M = 40, 4, 300


def sgn(value: float) -> int:
    """Written out, so that the comparison shares nothing with what is tested."""
    return 1 if value > 0 else -1 if value < 0 else 0


def dense_predictions(g: np.ndarray, a: np.ndarray, y: np.ndarray) -> NeuronPredictions:
    own = [predictions_of(g[i], a[i]) for i in range(len(g))]
    return NeuronPredictions(
        neurons=np.arange(M),
        prompt_ids=tuple(f"t/test/{i}" for i in range(len(g))),
        answer_p=y,
        probability_pk=np.full((len(g), K), 0.25, np.float32),
        sign_pks=np.stack([one.sign_ks for one in own]),
        largest_ps=np.stack([one.largest_s for one in own]),
        smallest_ps=np.stack([one.smallest_s for one in own]),
        activation_ps=np.stack([one.activation_s for one in own]),
    )


def first_largest(values: list[float]) -> int:
    """The lowest index of the largest value."""
    return max(range(len(values)), key=lambda k: (values[k], -k))


def test_probes_answer_as_the_formulas_written_out(gradients: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    g, a, y = gradients
    predictions = dense_predictions(g, a, y)
    draw = np.random.default_rng(5)
    order = draw.permutation(M)
    π = draw.integers(-1, 2, M).astype(np.int8)
    ranking = Ranking(order, π[order], π[order].astype(float))
    sizes = [1, 7, 200]
    by_polarity = probes.polarity(predictions, ranking, sizes)
    by_magnitude = probes.magnitude(predictions, ranking, sizes)
    means = {n: float(a[:, n].mean()) for n in range(M)}
    by_firing = probes.activation(predictions, [ranking, ranking.block(5, M)], means, sizes)
    for size in sizes:
        for i in range(P):
            kept = order[:size]
            sums = [sum(int(π[n]) * sgn(g[i, k, n]) for n in kept) for k in range(K)]
            assert by_polarity[size][i] == first_largest(sums)
            own = [first_largest([float(π[n] * g[i, k, n]) for k in range(K)]) for n in kept]
            assert by_magnitude[size][i] == first_largest([own.count(k) for k in range(K)])
            agreement = [0] * K
            for bit, chosen in enumerate((order[:size], order[5 : 5 + size])):
                fires = sum(int(π[n]) * (1 if a[i, n] > means[n] else -1) for n in chosen)
                agreement = [sum_k + fires * (1 if k >> bit & 1 else -1) for k, sum_k in enumerate(agreement)]
            assert by_firing[size][i] == first_largest(agreement)


def test_a_forest_learns_from_train_alone() -> None:
    draw = np.random.default_rng(1)
    largest = draw.integers(0, 2, (60, 1)).repeat(3, 1)

    def predictions(rows: np.ndarray, answers: np.ndarray) -> NeuronPredictions:
        g = np.zeros((len(rows), 2, 3), np.float32)
        np.put_along_axis(g, rows[:, None, :], 1.0, 1)
        own = [predictions_of(one, np.zeros(3, np.float32)) for one in g]
        stacked = {name: np.stack([getattr(one, name) for one in own]) for name in ("largest_s", "smallest_s")}
        return NeuronPredictions(
            np.arange(3), (), answers, np.zeros((len(rows), 2), np.float32), np.stack([one.sign_ks for one in own]),
            stacked["largest_s"], stacked["smallest_s"], np.zeros((len(rows), 3), np.float32),
        )  # fmt: skip

    # In train neurons say the wrong label, in test the right one.
    train, test = predictions(largest[:40], 1 - largest[:40, 0]), predictions(largest[40:], largest[40:, 0])
    ranking = Ranking(np.arange(3), np.ones(3, np.int8), np.ones(3))
    (answers,) = probes.forest(train, [test], ranking, 2, seed=0)
    np.testing.assert_array_equal(answers, 1 - test.answer_p)


def test_baselines() -> None:
    predictions = dense_predictions(np.zeros((3, K, M), np.float32), np.zeros((3, M), np.float32), np.array([0, 1, 1]))
    assert probes.probability(predictions).tolist() == [0, 0, 0]
    assert probes.majority(np.array([2, 1, 1, 2]), predictions).tolist() == [1, 1, 1]


def test_accuracy_has_the_interval_of_a_bootstrap_over_prompts() -> None:
    draw = np.random.default_rng(0)
    right = np.zeros(200, np.int64)
    answers = (draw.random(200) > 0.7).astype(np.int64)
    found = probes.accuracy(answers, right)
    resampled = [(draw.choice(answers, 200) == 0).mean() for _ in range(4000)]
    assert found.value == pytest.approx((answers == 0).mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.011)

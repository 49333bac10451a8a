"""Scores and rankings against dense loops over every number, ties included; and both ways of having them."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

from neg_service.measures.builtin.neuron_predictions import predictions_of
from neg_service.measures.builtin.skill_scores import activation_scores, gradient_scores, n_bits
from neg_service.probing import probes
from neg_service.probing.probes import Votes
from neg_service.probing.ranking import Ranking, TaskScores, in_order, most_in_flight

P, K, M = 40, 4, 300


def sgn(value: float) -> int:
    """Written out, so that the comparison shares nothing with what is tested."""
    return 1 if value > 0 else -1 if value < 0 else 0


@pytest.fixture(params=["ties", "reals"])
def gradients(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """g [P, K, M], activations [P, M] and answers [P]; with ties, g has few different values, zero among them."""
    draw = np.random.default_rng(3)
    g = draw.integers(-1, 2, (P, K, M)) if request.param == "ties" else draw.normal(size=(P, K, M))
    return g.astype(np.float32), draw.normal(size=(P, M)).astype(np.float32), draw.integers(0, K, P)


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
    scores = TaskScores(np.arange(100, 106), {8: {"polarity": np.array([1.0, -5, 5, 0, -1, 5])}})
    ranking = scores.ranked("polarity")
    assert ranking.neurons.tolist() == [101, 102, 105, 100, 104, 103]
    assert ranking.polarity.tolist() == [-1, 1, 1, 1, -1, 0]
    assert ranking.first(2).neurons.tolist() == [101, 102]
    assert ranking.block(2, 4).neurons.tolist() == [105, 100]


def dense_votes(g: np.ndarray, a: np.ndarray, y: np.ndarray) -> Votes:
    own = [predictions_of(g[i], a[i]) for i in range(len(g))]
    return Votes(
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
    votes = dense_votes(g, a, y)
    draw = np.random.default_rng(5)
    order = draw.permutation(M)
    π = draw.integers(-1, 2, M).astype(np.int8)
    ranking = Ranking(order, π[order], π[order].astype(float))
    sizes = [1, 7, 200]
    by_polarity = probes.polarity(votes, ranking, sizes)
    by_magnitude = probes.magnitude(votes, ranking, sizes)
    means = {n: float(a[:, n].mean()) for n in range(M)}
    by_firing = probes.activation(votes, [ranking, ranking.block(5, M)], means, sizes)
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

    def votes(rows: np.ndarray, answers: np.ndarray) -> Votes:
        g = np.zeros((len(rows), 2, 3), np.float32)
        np.put_along_axis(g, rows[:, None, :], 1.0, 1)
        own = [predictions_of(one, np.zeros(3, np.float32)) for one in g]
        stacked = {name: np.stack([getattr(one, name) for one in own]) for name in ("largest_s", "smallest_s")}
        return Votes(
            np.arange(3), (), answers, np.zeros((len(rows), 2), np.float32), np.stack([one.sign_ks for one in own]),
            stacked["largest_s"], stacked["smallest_s"], np.zeros((len(rows), 3), np.float32),
        )  # fmt: skip

    # In train neurons say the wrong label, in test the right one.
    train, test = votes(largest[:40], 1 - largest[:40, 0]), votes(largest[40:], largest[40:, 0])
    ranking = Ranking(np.arange(3), np.ones(3, np.int8), np.ones(3))
    (answers,) = probes.forest(train, [test], ranking, 2, seed=0)
    np.testing.assert_array_equal(answers, 1 - test.answer_p)


def test_random_neurons_are_drawn_and_have_the_polarity_of_their_score() -> None:
    values = np.where(np.arange(M) % 3 == 0, -2.0, 5.0)
    scores = TaskScores(np.arange(M), {8: {"polarity": values, "activation": 8.0 * np.arange(M)}})
    drawn = scores.of_random("polarity", 50, seed=4)
    assert drawn.neurons.tolist() == scores.of_random("polarity", 50, seed=4).neurons.tolist()
    assert drawn.neurons.tolist() != scores.of_random("polarity", 50, seed=5).neurons.tolist()
    assert len(np.intersect1d(drawn.neurons, np.arange(50))) < 25
    np.testing.assert_array_equal(drawn.polarity, np.sign(values[drawn.neurons]))
    assert scores.means_of([drawn.first(3), drawn.first(5)]) == {int(n): float(n) for n in drawn.neurons[:5]}


def test_baselines() -> None:
    votes = dense_votes(np.zeros((3, K, M), np.float32), np.zeros((3, M), np.float32), np.array([0, 1, 1]))
    assert probes.probability(votes).tolist() == [0, 0, 0]
    assert probes.majority(np.array([2, 1, 1, 2]), votes).tolist() == [1, 1, 1]
    assert [n_bits(k) for k in (2, 3, 4, 5)] == [1, 2, 2, 3]


def test_accuracy_has_the_interval_of_a_bootstrap_over_prompts() -> None:
    draw = np.random.default_rng(0)
    right = np.zeros(200, np.int64)
    answers = (draw.random(200) > 0.7).astype(np.int64)
    found = probes.accuracy(answers, right)
    resampled = [(draw.choice(answers, 200) == 0).mean() for _ in range(4000)]
    assert found.value == pytest.approx((answers == 0).mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.011)


@pytest.mark.parametrize(
    ("sizes", "together"), [([1] * 8, 2), ([40] * 6, 1), ([200, 1, 1, 200, 1], 1), ([50, 50] * 3, 2)]
)
def test_parts_in_work_are_bounded_by_their_bytes_and_results_keep_their_order(
    sizes: list[int], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More cores than this machine may have; 100 bytes may be in work, or one part.
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    most = 60 if together == 1 else 100
    lock, meeting = threading.Lock(), threading.Barrier(together)
    in_work: list[int] = []
    seen: list[list[int]] = []

    def work(item: int) -> int:
        with lock:
            in_work.append(sizes[item])
            seen.append(list(in_work))
        # Nobody gets on unless so many are in work at once.
        meeting.wait(timeout=20)
        with lock:
            in_work.remove(sizes[item])
        return item

    assert list(in_order(work, range(len(sizes)), lambda item: sizes[item], most)) == list(range(len(sizes)))
    assert all(sum(now) <= most or len(now) == 1 for now in seen)


def test_results_that_wait_to_be_taken_count_as_in_work() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item

    results = in_order(work, range(10), lambda item: 50, most=100)
    assert next(results) == 0
    time.sleep(0.1)
    assert sorted(begun) == [0, 1]
    assert list(results) == list(range(1, 10))


def test_what_may_be_in_work_follows_from_the_memory() -> None:
    assert 2**20 < most_in_flight() <= 2**30
    assert 8 * most_in_flight() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

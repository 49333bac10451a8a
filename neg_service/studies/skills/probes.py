"""Probes: what chosen neurons alone answer, without the model's head; and the baselines they are compared with.

| probe         | answers                                                                             |
|---------------|-------------------------------------------------------------------------------------|
| `polarity`    | argmax_k Σ_n π_n·sgn g[k, n], neurons by |polarity score|, π its sign                 |
| `magnitude`   | each neuron predicts argmax_k π_n·g[k, n], neurons by |magnitude score|               |
| `forest`      | a random forest on each neuron's argmax_k g[k, n], neurons as of `magnitude`          |
| `probability` | the model itself: argmax_k p[k]                                                      |
| `activation`  | the labels in whose bits neurons fire; neurons by |fires score|, as many for each bit |
| `random`      | as `polarity`, with neurons drawn at random                                          |
| `majority`    | the label that is most frequent in train                                             |

Each function gives, for each number of neurons, the label of each prompt [P]. Ties go to the lower label.

A neuron of an expert that a prompt does not use abstains: it adds nothing to `polarity` and `magnitude`, is silent to
`activation`, as it was when it was ranked, and a value of its own to the forest.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053).

Axes: P prompts, K labels, S neurons that predictions are known of, m neurons of a probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier

from neg_service.studies.skills.parts import Ints
from neg_service.studies.skills.predictions import NeuronPredictions
from neg_service.studies.skills.scores import Ranking

_TREES = 100


def polarity(predictions: NeuronPredictions, ranking: Ranking, sizes: Sequence[int]) -> dict[int, Ints]:
    """Σ_n π_n·sgn g[k, n] of the first m neurons, for each m."""
    columns = predictions.columns(ranking.neurons[: max(sizes)])
    signed_pks = predictions.sign_pks[:, :, columns] * ranking.polarity[: len(columns)]
    return _at_sizes(signed_pks, sizes)


def magnitude(predictions: NeuronPredictions, ranking: Ranking, sizes: Sequence[int]) -> dict[int, Ints]:
    """The label that most of the first m neurons predict, for each m."""
    columns = predictions.columns(ranking.neurons[: max(sizes)])
    π = ranking.polarity[: len(columns)]
    predicted_ps = np.where(π > 0, predictions.largest_ps[:, columns], predictions.smallest_ps[:, columns])
    # A neuron without a polarity gives 0 to all labels, of which the lowest wins; one that abstains has no label.
    predicted_ps = np.where((π == 0) & (predicted_ps >= 0), 0, predicted_ps)
    one_hot_pks = np.stack([predicted_ps == k for k in range(predictions.n_labels)], 1)
    return _at_sizes(one_hot_pks, sizes)


def activation(
    predictions: NeuronPredictions, rankings: Sequence[Ranking], means: Mapping[int, float], sizes: Sequence[int]
) -> dict[int, Ints]:
    """The label whose bits agree most with what neurons do: fire beyond their mean or not; m neurons of each bit."""
    shape = (len(predictions.answer_p), predictions.n_labels)
    total: dict[int, NDArray[np.float64]] = {size: np.zeros(shape) for size in sizes}
    for bit, ranking in enumerate(rankings):
        columns = predictions.columns(ranking.neurons[: max(sizes)])
        mean_s = np.array([means[int(neuron)] for neuron in ranking.neurons[: len(columns)]])
        fires_ps = np.where(predictions.activation_ps[:, columns] > mean_s, 1, -1) * ranking.polarity[: len(columns)]
        is_set_k = np.where(np.arange(predictions.n_labels) >> bit & 1, 1, -1)
        cumulated_ps = np.cumsum(fires_ps, 1)
        for size in sizes:
            total[size] += cumulated_ps[:, min(size, len(columns)) - 1, None] * is_set_k
    return {size: own.argmax(1) for size, own in total.items()}


def forest(
    train: NeuronPredictions, asked: Sequence[NeuronPredictions], ranking: Ranking, m: int, seed: int
) -> list[Ints]:
    """A random forest on the labels of the largest NeurGrad of the first m neurons."""
    neurons = ranking.neurons[:m]
    # One after the other: in threads their votes are summed in any order, and each swaps the process's filters of
    # warnings, which another one then finds empty.
    trees = RandomForestClassifier(_TREES, random_state=seed)
    trees.fit(train.largest_ps[:, train.columns(neurons)], train.answer_p)
    return [trees.predict(own.largest_ps[:, own.columns(neurons)]).astype(np.int64) for own in asked]


def probability(predictions: NeuronPredictions) -> Ints:
    """The model's own answers."""
    answers: Ints = predictions.probability_pk.argmax(1)
    return answers


def majority(train_answer_p: Ints, predictions: NeuronPredictions) -> Ints:
    """The most frequent label of train, for every prompt."""
    return np.full(len(predictions.answer_p), np.bincount(train_answer_p, minlength=predictions.n_labels).argmax())


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers, 0..1, with a 95 % interval from the bootstrap over prompts."""

    value: float
    low: float
    high: float


def accuracy(answers_p: Ints, right_p: Ints, resamples: int = 2000) -> Accuracy:
    """How many of the answers are right.

    Drawing P prompts with replacement, of which a share is right, draws a binomial number of right ones: that is the
    bootstrap's distribution itself.
    """
    value = float((answers_p == right_p).mean())
    drawn = np.random.default_rng(0).binomial(len(answers_p), value, resamples) / len(answers_p)
    return Accuracy(value, *np.quantile(drawn, [0.025, 0.975]).tolist())


def _at_sizes(values_pks: NDArray[np.generic], sizes: Sequence[int]) -> dict[int, Ints]:
    """The label of the largest sum over the first m along S, for each m; the lower label of equals."""
    total_pk = np.zeros(values_pks.shape[:2], np.int64)
    answers: dict[int, Ints] = {}
    start = 0
    for size in sorted(sizes):
        total_pk = total_pk + values_pks[:, :, start:size].sum(2, dtype=np.int64)
        answers[size] = total_pk.argmax(1)
        start = size
    return answers

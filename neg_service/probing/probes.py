"""Probes: what chosen neurons alone answer, without the model's head; and the baselines they are compared with.

| probe         | answers                                                                             |
|---------------|-------------------------------------------------------------------------------------|
| `polarity`    | argmax_k Σ_n π_n·sgn g[k, n], neurons by |polarity score|, π its sign                 |
| `magnitude`   | each neuron votes for argmax_k π_n·g[k, n], neurons by |magnitude score|              |
| `forest`      | a random forest on each neuron's argmax_k g[k, n], neurons as of `magnitude`          |
| `probability` | the model itself: argmax_k p[k]                                                      |
| `activation`  | the labels in whose bits neurons fire; neurons by |fires score|, as many for each bit |
| `random`      | as `polarity`, with neurons drawn at random                                          |
| `majority`    | the label that is most frequent in train                                             |

Ties go to the lower label. Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053).

Axes: P prompts, K labels, S neurons that votes are known of, m neurons of a probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier

from neg_service.errors import ConfigurationError
from neg_service.measures.builtin.neuron_predictions import PromptPredictions, from_text, predictions_of
from neg_service.measures.builtin.skill_scores import n_bits
from neg_service.probing.ranking import (
    ActivationPart,
    GradientPart,
    Ints,
    Ranking,
    ShardParts,
    in_order,
    parts_of_shards,
)
from neg_service.prompts.tasks import task_of
from neg_service.storage.reader import Run, reading

_TREES = 100


@dataclass(frozen=True)
class Votes:
    """What S neurons say about P prompts of one task; see `measures/neuron_predictions.py`.

    neurons: [S] numbers through all layers. probability_pk: of the labels, by the model.
    """

    neurons: Ints
    prompt_ids: tuple[str, ...]
    answer_p: Ints
    probability_pk: NDArray[np.float32]
    sign_pks: NDArray[np.int8]
    largest_ps: NDArray[np.int8]
    smallest_ps: NDArray[np.int8]
    activation_ps: NDArray[np.float32]

    @property
    def n_labels(self) -> int:
        """K."""
        return int(self.probability_pk.shape[1])

    def columns(self, neurons: Ints) -> Ints:
        """Where neurons are along S.

        Raises:
            ConfigurationError: votes of one of them are not known.
        """
        order = np.argsort(self.neurons)
        places = np.searchsorted(self.neurons, neurons, sorter=order)
        found: Ints = order[np.minimum(places, len(order) - 1)]
        if not np.array_equal(self.neurons[found], neurons):
            raise ConfigurationError(f"votes are known of {len(self.neurons)} neurons, not of all that were asked for")
        return found


def read_votes(run: Run, task: str, neurons: Ints) -> Votes:
    """The votes of `neurons` on a task's prompts, from a run of `measure=votes`, or of `measure=neurgrad`.

    Raises:
        ConfigurationError: the run does not know them.
        StorageError: its parts cannot be read.
    """
    with reading(run):
        asked = run.table("prompts", ["prompt_id", "answer", "probabilities"]).to_table()
        mine = asked.filter(pa.array([task_of(own) == task for own in asked["prompt_id"].to_pylist()]))
        rows = dict(_summed(run, task, neurons) if "votes" in run.tables else _computed(run, task, neurons))
    ids = mine["prompt_id"].to_pylist()
    if missing := next((own for own in ids if own not in rows), None):
        raise ConfigurationError(f"{run.uri} has no votes of {missing!r}; run it again, parts are missing")
    votes = [rows[own] for own in ids]
    return Votes(
        neurons=neurons,
        prompt_ids=tuple(ids),
        answer_p=mine["answer"].to_numpy().astype(np.int64),
        probability_pk=np.array(mine["probabilities"].to_pylist(), np.float32),
        sign_pks=np.stack([own.sign_ks for own in votes]),
        largest_ps=np.stack([own.largest_s for own in votes]),
        smallest_ps=np.stack([own.smallest_s for own in votes]),
        activation_ps=np.stack([own.activation_s for own in votes]),
    )


def _summed(run: Run, task: str, neurons: Ints) -> Iterator[tuple[str, PromptPredictions]]:
    stored = from_text(run.config["measure"]["chosen"][task])
    places = np.searchsorted(stored, neurons)
    if not np.array_equal(stored[np.minimum(places, len(stored) - 1)], neurons):
        raise ConfigurationError(f"{run.uri} has votes of other neurons than those asked for")
    # Parts are in the order of tasks, so that most are told from their statistics to hold none of this one's rows.
    begin = pc.field("prompt_id")
    for batch in run.table("votes", filter=(begin >= f"{task}/") & (begin < f"{task}0")).to_batches():
        for i in range(batch.num_rows):
            sign, largest, smallest, activation = (batch.column(c)[i].values.to_numpy() for c in range(1, 5))
            own = sign.reshape(-1, len(stored))[:, places]
            votes = PromptPredictions(own, largest[places], smallest[places], activation[places])
            yield batch.column(0)[i].as_py(), votes


def _computed(run: Run, task: str, neurons: Ints) -> Iterator[tuple[str, PromptPredictions]]:
    within = (pc.field("prompt_id") >= f"{task}/") & (pc.field("prompt_id") < f"{task}0")

    def of_shard(parts: ShardParts) -> list[tuple[str, PromptPredictions]]:
        gradients, activations = parts.fragments
        table = gradients.to_table(columns=GradientPart.COLUMNS, filter=within)
        if not table.num_rows:
            return []
        part = GradientPart(table)
        ids, n = part.prompt_ids(task), part.n_neurons
        activation_part = ActivationPart(activations.to_table(columns=ActivationPart.COLUMNS, filter=within))
        shape = (len(ids), part.n_labels(task), len(neurons))
        neurgrad_pks, activation_ps = np.empty(shape, np.float32), np.empty((len(ids), len(neurons)), np.float32)
        for layer in np.unique(neurons // n):
            own = neurons // n == layer
            neurgrad_pks[:, :, own] = part.values(task, int(layer))[:, :, neurons[own] % n]
            activation_ps[:, own] = activation_part.values(ids, int(layer))[:, neurons[own] % n]
        return [(id_, predictions_of(neurgrad_pks[i], activation_ps[i])) for i, id_ in enumerate(ids)]

    parts = parts_of_shards(run, "neurgrad", "activations")
    for own in in_order(of_shard, parts, lambda own: own.size):
        yield from own


# --- what probes answer: for each number of neurons the label of each prompt [P]


def polarity(votes: Votes, ranking: Ranking, sizes: Sequence[int]) -> dict[int, Ints]:
    """Σ_n π_n·sgn g[k, n] of the first m neurons, for each m."""
    columns = votes.columns(ranking.neurons[: max(sizes)])
    signed_pks = votes.sign_pks[:, :, columns] * ranking.polarity[: len(columns)]
    return _at_sizes(signed_pks, sizes)


def magnitude(votes: Votes, ranking: Ranking, sizes: Sequence[int]) -> dict[int, Ints]:
    """The label for which most of the first m neurons vote, for each m."""
    columns = votes.columns(ranking.neurons[: max(sizes)])
    π = ranking.polarity[: len(columns)]
    # A neuron without a polarity gives 0 to all labels, of which the lowest wins.
    vote_ps = np.where(π > 0, votes.largest_ps[:, columns], votes.smallest_ps[:, columns]) * (π != 0)
    one_hot_pks = np.stack([vote_ps == k for k in range(votes.n_labels)], 1)
    return _at_sizes(one_hot_pks, sizes)


def activation(
    votes: Votes, rankings: Sequence[Ranking], means: Mapping[int, float], sizes: Sequence[int]
) -> dict[int, Ints]:
    """The label whose bits agree most with what neurons do: fire beyond their mean or not; m neurons of each bit."""
    total: dict[int, NDArray[np.float64]] = {size: np.zeros((len(votes.answer_p), votes.n_labels)) for size in sizes}
    for bit, ranking in enumerate(rankings):
        columns = votes.columns(ranking.neurons[: max(sizes)])
        mean_s = np.array([means[int(neuron)] for neuron in ranking.neurons[: len(columns)]])
        fires_ps = np.where(votes.activation_ps[:, columns] > mean_s, 1, -1) * ranking.polarity[: len(columns)]
        is_set_k = np.where(np.arange(votes.n_labels) >> bit & 1, 1, -1)
        cumulated_ps = np.cumsum(fires_ps, 1)
        for size in sizes:
            total[size] += cumulated_ps[:, min(size, len(columns)) - 1, None] * is_set_k
    return {size: own.argmax(1) for size, own in total.items()}


def forest(train: Votes, asked: Sequence[Votes], ranking: Ranking, m: int, seed: int) -> list[Ints]:
    """A random forest on the labels of the largest NeurGrad of the first m neurons."""
    neurons = ranking.neurons[:m]
    trees = RandomForestClassifier(_TREES, random_state=seed, n_jobs=-1)
    trees.fit(train.largest_ps[:, train.columns(neurons)], train.answer_p)
    return [trees.predict(own.largest_ps[:, own.columns(neurons)]).astype(np.int64) for own in asked]


def probability(votes: Votes) -> Ints:
    """The model's own answers."""
    answers: Ints = votes.probability_pk.argmax(1)
    return answers


def majority(train_answer_p: Ints, votes: Votes) -> Ints:
    """The most frequent label of train, for every prompt."""
    return np.full(len(votes.answer_p), np.bincount(train_answer_p, minlength=votes.n_labels).argmax())


def bits_of(n_labels: int) -> range:
    """The bits of labels' numbers."""
    return range(n_bits(n_labels))


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

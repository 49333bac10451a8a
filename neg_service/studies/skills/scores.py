"""Which neurons tell the labels of a task apart: skill scores added up over the shards of a run, and rankings by them.

Scores come from a run of `measure=skill_scores`, whose shards added them up when they were computed, or from a run of
`measure=neurgrad`, whose parts are read once, as a stream, on all cores. Both give the same sums shard by shard
(`measures/builtin/skill_scores.py`), and so the same neurons. No memory grows with the number of prompts.

Neurons are numbered through all layers: layer·N + index. Axes: P prompts, K labels, N neurons of a layer, M of all
chosen layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from numpy.typing import NDArray

from neg_service.errors import ConfigurationError
from neg_service.measures.builtin.skill_scores import Scores, activation_scores, gradient_scores
from neg_service.storage.reader import Run, reading
from neg_service.studies.skills.parts import (
    ActivationPart,
    GradientPart,
    Ints,
    in_order,
    matrix,
    parts_of_shards,
)

# Whole numbers, and so exact in float32 too.
SNAPSHOT = ("polarity", "magnitude")


@dataclass(frozen=True)
class Ranking:
    """Neurons by |score|, the largest first and the lower number first among equals.

    neurons: [m] numbers through all layers. polarity: [m], the sign of the score, 0 where it is 0. score: [m].
    """

    neurons: Ints
    polarity: NDArray[np.int8]
    score: NDArray[np.floating[Any]]

    def first(self, m: int) -> Ranking:
        """The best m."""
        return Ranking(self.neurons[:m], self.polarity[:m], self.score[:m])

    def block(self, start: int, stop: int) -> Ranking:
        """Those of ranks start to stop."""
        return Ranking(self.neurons[start:stop], self.polarity[start:stop], self.score[start:stop])


@dataclass(frozen=True)
class SkillScores:
    """The scores of one task, [M] each: all of them over all prompts, and `SNAPSHOT` over the first so many prompts."""

    neurons: Ints
    at: dict[int, Scores]

    @property
    def n_prompts(self) -> int:
        """How many prompts there are in all."""
        return max(self.at)

    def all(self) -> Scores:
        """Over all prompts."""
        return self.at[self.n_prompts]

    def ranked(self, score: str, n_prompts: int | None = None) -> Ranking:
        """All neurons by the magnitude of a score, over the first so many prompts or all."""
        values = self.at[n_prompts or self.n_prompts][score]
        order = np.argsort(-np.abs(values), kind="stable")
        return Ranking(self.neurons[order], np.sign(values[order]).astype(np.int8), values[order])

    def of_random(self, score: str, m: int, seed: int) -> Ranking:
        """Neurons drawn at random, with the polarity that a score gives them."""
        values = self.all()[score]
        drawn = np.random.default_rng(seed).permutation(len(values))[:m]
        return Ranking(self.neurons[drawn], np.sign(values[drawn]).astype(np.int8), values[drawn])

    def means_of(self, rankings: Sequence[Ranking]) -> dict[int, float]:
        """The mean activation of each neuron of the rankings."""
        wanted = np.unique(np.concatenate([ranking.neurons for ranking in rankings]))
        # Neurons are in ascending order.
        means = self.all()["activation"][np.searchsorted(self.neurons, wanted)] / self.n_prompts
        return dict(zip(wanted.tolist(), means.tolist(), strict=True))


@dataclass(frozen=True)
class ShardScores:
    """What one shard adds to the scores of one task."""

    task: str
    n_prompts: int
    neurons: Ints
    scores: Scores


def read_scores(run: Run, snapshots: Sequence[int] = ()) -> dict[str, SkillScores]:
    """The scores of each task of a run, over all prompts and over the first so many, to the end of their shard.

    Raises:
        ConfigurationError: the run has neither scores nor NeurGrad of all labels and activations.
        StorageError: its parts cannot be read.
    """
    totals: dict[str, Scores] = {}
    counts: dict[str, int] = {}
    scores: dict[str, SkillScores] = {}
    with reading(run):
        for one in _shards(run):
            if one.task not in totals:
                totals[one.task] = {name: np.zeros(len(one.neurons)) for name in one.scores}
                counts[one.task] = 0
                scores[one.task] = SkillScores(one.neurons, {})
            before = counts[one.task]
            counts[one.task] += one.n_prompts
            for name, values in one.scores.items():
                totals[one.task][name] += values
            if any(before < size <= counts[one.task] for size in snapshots):
                # Of large models even these are gigabytes; only the scores of gradients are asked for again.
                snapshot = {name: totals[one.task][name].astype(np.float32) for name in SNAPSHOT}
                scores[one.task].at[counts[one.task]] = snapshot
    for task, total in totals.items():
        scores[task].at[counts[task]] = total
    return scores


def _shards(run: Run) -> Iterator[ShardScores]:
    if "skill_scores" in run.tables:
        for _, part in run.parts("skill_scores"):
            yield from _summed(part.to_table())
    elif "neurgrad" in run.tables and run.config["measure"]["keep"] == "all":
        parts = parts_of_shards(run, "neurgrad", "activations")
        for own in in_order(lambda own: _computed(*own.fragments), parts, lambda own: own.size):
            yield from own
    else:
        raise ConfigurationError(
            f"{run.uri} has no scores: use a run of measure=skill_scores, or of measure=neurgrad with measure.keep=all"
        )


def _summed(table: pa.Table) -> list[ShardScores]:
    """A part of the table `skill_scores`."""
    tasks, names = np.array(table["task"].to_pylist()), np.array(table["score"].to_pylist())
    layer_r, n_prompts_r = table["layer"].to_numpy(), table["n_prompts"].to_numpy()
    values_rn = matrix(table["values"])
    shards = []
    for task in dict.fromkeys(tasks.tolist()):
        own: Scores = {}
        for name in dict.fromkeys(names[tasks == task].tolist()):
            rows = np.flatnonzero((tasks == task) & (names == name))
            rows = rows[np.argsort(layer_r[rows], kind="stable")]
            own[name] = values_rn[rows].ravel()
            neurons = numbered(layer_r[rows], values_rn.shape[1])
        shards.append(ShardScores(task, int(n_prompts_r[tasks == task][0]), neurons, own))
    return shards


def _computed(neurgrad: pads.Fragment, activations: pads.Fragment) -> list[ShardScores]:
    """A shard of the tables `neurgrad` and `activations`."""
    shards = []
    gradients = GradientPart(neurgrad.to_table(columns=GradientPart.COLUMNS))
    active = ActivationPart(activations.to_table(columns=ActivationPart.COLUMNS))
    for task in gradients.tasks:
        n_labels, layers = gradients.n_labels(task), gradients.layers
        by_layer = []
        for layer in layers:
            answer_p = gradients.answers(task)
            own = gradient_scores(gradients.values(task, layer), answer_p)
            own |= activation_scores(active.values(gradients.prompt_ids(task), layer), answer_p, n_labels)
            by_layer.append(own)
        scores = {name: np.concatenate([own[name] for own in by_layer]) for name in by_layer[0]}
        neurons = numbered(np.array(layers), gradients.n_neurons)
        shards.append(ShardScores(task, len(gradients.prompt_ids(task)), neurons, scores))
    return shards


def numbered(layers: NDArray[Any], n_neurons: int) -> Ints:
    """The numbers of all neurons of layers."""
    numbers: Ints = (layers.astype(np.int64)[:, None] * n_neurons + np.arange(n_neurons)).ravel()
    return numbers

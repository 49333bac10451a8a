"""Which neurons tell the labels of a task apart: skill scores added up over the shards of a run, and rankings by them.

Scores come from a run of `measure=skill_scores`, whose shards added them up when they were computed, or from a run of
`measure=neurgrad`, whose parts are read once, as a stream, on all cores. Both give the same sums shard by shard
(`measures/builtin/skill_scores.py`), and so the same neurons. No memory grows with the number of prompts.

Neurons are numbered through all layers (`numbering.py`); those of an expert are ranked if any prompt used it. Axes: P
prompts, K labels, N neurons of an MLP or expert, M of all of these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from neg_service.errors import ConfigurationError
from neg_service.measures.builtin.skill_scores import Scores, activation_scores, gradient_scores
from neg_service.measures.sums import Sums
from neg_service.slots import Slots
from neg_service.storage.reader import Run, reading
from neg_service.studies.skills.numbering import Numbering
from neg_service.studies.skills.parts import (
    ActivationPart,
    GradientPart,
    Ints,
    in_order,
    parts_of_shards,
    read_part,
)
from neg_service.studies.tables import mlp_of_rows

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
    slots: Slots
    scores: Scores


@dataclass
class _Totals:
    """What is known of a task while shards are read; at: the first so many prompts' scores, with what they are of."""

    n_prompts: int = 0
    sums: dict[str, Sums] = field(default_factory=lambda: defaultdict(Sums))
    at: dict[int, tuple[Slots, Scores]] = field(default_factory=dict)

    def add(self, shard: ShardScores) -> None:
        self.n_prompts += shard.n_prompts
        for name, values in shard.scores.items():
            self.sums[name].add(shard.slots, values)

    def take_snapshot(self) -> None:
        # Of large models even these are gigabytes; only the scores of gradients are asked for again.
        scores: Scores = {name: self.sums[name].values().astype(np.float32) for name in SNAPSHOT}
        self.at[self.n_prompts] = self.sums[SNAPSHOT[0]].slots(), scores

    def skill_scores(self, numbering: Numbering) -> SkillScores:
        slots = self.sums[SNAPSHOT[0]].slots()
        neurons = numbering.of_slots(slots)
        at = {
            n: {name: _spread(values, numbering.of_slots(own), neurons) for name, values in scores.items()}
            for n, (own, scores) in self.at.items()
        }
        at[self.n_prompts] = {name: own.values() for name, own in self.sums.items()}
        return SkillScores(neurons, at)


def _spread(values_m: NDArray[Any], numbers_m: Ints, neurons: Ints) -> NDArray[Any]:
    """Values of some of the neurons, and 0 of the others: of experts that no prompt had used by then."""
    if len(numbers_m) == len(neurons):
        return values_m
    spread = np.zeros(len(neurons), values_m.dtype)
    spread[np.searchsorted(neurons, numbers_m)] = values_m
    return spread


def read_scores(run: Run, snapshots: Sequence[int] = ()) -> dict[str, SkillScores]:
    """The scores of each task of a run, over all prompts and over the first so many, to the end of their shard.

    Raises:
        ConfigurationError: the run has neither scores nor NeurGrad of all labels and activations.
        StorageError: its parts cannot be read.
    """
    totals: dict[str, _Totals] = defaultdict(_Totals)
    with reading(run):
        for one in _shards(run):
            own = totals[one.task]
            before = own.n_prompts
            own.add(one)
            if any(before < size <= own.n_prompts for size in snapshots):
                own.take_snapshot()
    numbering = Numbering.of_run(run)
    return {task: own.skill_scores(numbering) for task, own in totals.items()}


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
    (layer_r, expert_r), n_prompts_r = mlp_of_rows(table), table["n_prompts"].to_numpy()
    lists = table["values"].combine_chunks()
    shards = []
    for task in dict.fromkeys(tasks.tolist()):
        own: Scores = {}
        for name in dict.fromkeys(names[tasks == task].tolist()):
            rows = np.flatnonzero((tasks == task) & (names == name))
            rows = rows[np.lexsort((expert_r[rows], layer_r[rows]))]
            mine = lists.take(pa.array(rows))
            own[name] = mine.flatten().to_numpy()
            slots = Slots(layer_r[rows], expert_r[rows], pc.list_value_length(mine).to_numpy().astype(np.int64))
        shards.append(ShardScores(task, int(n_prompts_r[tasks == task][0]), slots, own))
    return shards


def _computed(neurgrad: pads.Fragment, activations: pads.Fragment) -> list[ShardScores]:
    """A shard of the tables `neurgrad` and `activations`."""
    shards = []
    gradients = GradientPart(read_part(neurgrad, GradientPart.COLUMNS))
    active = ActivationPart(read_part(activations, ActivationPart.COLUMNS))
    for task in gradients.tasks:
        n_labels, answer_p, ids = gradients.n_labels(task), gradients.answers(task), gradients.prompt_ids(task)
        mlps, by_mlp = gradients.mlps(task), []
        for mlp in mlps:
            used, neurgrad_pkn = gradients.values(task, mlp)
            own = gradient_scores(neurgrad_pkn, answer_p[used])
            own |= activation_scores(active.values(ids, mlp)[used], answer_p[used], n_labels)
            by_mlp.append(own)
        scores = {name: np.concatenate([own[name] for own in by_mlp]) for name in by_mlp[0]}
        layer, expert = np.array(mlps, np.int64).T
        slots = Slots(layer, expert, np.array([len(own[SNAPSHOT[0]]) for own in by_mlp], np.int64))
        shards.append(ShardScores(task, len(ids), slots, scores))
    return shards

"""Which neurons tell the labels of a task apart: scores added up over the shards of a run, and neurons ranked by them.

Scores come from a run of `measure=scores`, whose shards added them up when they were computed, or from a run of
`measure=neurgrad`, whose parts are read once, as a stream, on all cores. Both give the same sums shard by shard
(`measures/scores.py`), and so the same neurons. No memory grows with the number of prompts.

Neurons are numbered through all layers: layer·N + index. Axes: P prompts, K labels, N neurons of a layer, M of all
chosen layers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from numpy.typing import NDArray

from neg_service.errors import ConfigurationError
from neg_service.measures.builtin.skill_scores import Scores, activation_scores, gradient_scores
from neg_service.prompts.tasks import task_of
from neg_service.storage.reader import Run, reading

T = TypeVar("T")
R = TypeVar("R")
Ints = NDArray[np.int64]
# Of the memory, for parts as they are stored: read, with what is computed of them, they are about three times that.
_SHARE, _MOST_BYTES = 1 / 8, 2**30
_LIMIT_OF_CONTAINER = Path("/sys/fs/cgroup/memory.max")
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
class TaskScores:
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


def scores_of(run: Run, snapshots: Sequence[int] = ()) -> dict[str, TaskScores]:
    """The scores of each task of a run, over all prompts and over the first so many, to the end of their shard.

    Raises:
        ConfigurationError: the run has neither scores nor NeurGrad of all labels and activations.
        StorageError: its parts cannot be read.
    """
    totals: dict[str, Scores] = {}
    counts: dict[str, int] = {}
    found: dict[str, TaskScores] = {}
    with reading(run):
        for one in _shards(run):
            if one.task not in totals:
                totals[one.task] = {name: np.zeros(len(one.neurons)) for name in one.scores}
                counts[one.task] = 0
                found[one.task] = TaskScores(one.neurons, {})
            before = counts[one.task]
            counts[one.task] += one.n_prompts
            for name, values in one.scores.items():
                totals[one.task][name] += values
            if any(before < size <= counts[one.task] for size in snapshots):
                # Of large models even these are gigabytes; only the scores of gradients are asked for again.
                kept = {name: totals[one.task][name].astype(np.float32) for name in SNAPSHOT}
                found[one.task].at[counts[one.task]] = kept
    for task, total in totals.items():
        found[task].at[counts[task]] = total
    return found


def layers_and_size(run: Run) -> tuple[list[int], int]:
    """The layers that a run measured, and the neurons of each."""
    return list(run.config["neurons"]["layers"]), int(run.about["model"]["neurons_a_layer"])


def _shards(run: Run) -> Iterator[ShardScores]:
    if "scores" in run.tables:
        for _, part in run.parts("scores"):
            yield from _summed(part.to_table())
    elif "neurgrad" in run.tables and run.config["measure"]["keep"] == "all":
        parts = parts_of_shards(run, "neurgrad", "activations")
        for own in in_order(lambda own: _computed(*own.fragments), parts, lambda own: own.size):
            yield from own
    else:
        raise ConfigurationError(
            f"{run.uri} has no scores: use a run of measure=scores, or of measure=neurgrad with measure.keep=all"
        )


def _summed(table: pa.Table) -> list[ShardScores]:
    """A part of the table `scores`."""
    tasks, names = np.array(table["task"].to_pylist()), np.array(table["score"].to_pylist())
    layer_r, n_prompts_r = table["layer"].to_numpy(), table["n_prompts"].to_numpy()
    values_rn = matrix(table["values"])
    found = []
    for task in dict.fromkeys(tasks.tolist()):
        own: Scores = {}
        for name in dict.fromkeys(names[tasks == task].tolist()):
            rows = np.flatnonzero((tasks == task) & (names == name))
            rows = rows[np.argsort(layer_r[rows], kind="stable")]
            own[name] = values_rn[rows].ravel()
            neurons = numbered(layer_r[rows], values_rn.shape[1])
        found.append(ShardScores(task, int(n_prompts_r[tasks == task][0]), neurons, own))
    return found


def _computed(neurgrad: pads.Fragment, activations: pads.Fragment) -> list[ShardScores]:
    """A shard of the tables `neurgrad` and `activations`."""
    found = []
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
        found.append(ShardScores(task, len(gradients.prompt_ids(task)), neurons, scores))
    return found


class GradientPart:
    """A part of the table `neurgrad`, by task and layer, with prompts in their order and labels in theirs."""

    COLUMNS: ClassVar = ["prompt_id", "target_index", "is_answer", "layer", "neurgrad"]

    def __init__(self, table: pa.Table) -> None:
        encoded = table["prompt_id"].combine_chunks().dictionary_encode()
        self._ids: list[str] = encoded.dictionary.to_pylist()
        prompt_r, target_r = encoded.indices.to_numpy(), table["target_index"].to_numpy()
        layer_r = table["layer"].to_numpy()
        values_rn = matrix(table["neurgrad"])
        order = np.lexsort((target_r, prompt_r, layer_r))
        if not np.array_equal(order, np.arange(len(order))):
            values_rn = values_rn[order]
            prompt_r, target_r, layer_r = prompt_r[order], target_r[order], layer_r[order]
        self.layers: list[int] = np.unique(layer_r).tolist()
        self.n_neurons: int = values_rn.shape[1]
        # The same rows in each layer.
        rows = len(layer_r) // len(self.layers)
        self._values_lrn = values_rn.reshape(len(self.layers), rows, -1)
        self._prompt_r, self._target_r = prompt_r[:rows], target_r[:rows]
        self._is_answer_r = table["is_answer"].to_numpy(zero_copy_only=False)[order][:rows].astype(bool)
        self._task_r = np.array([task_of(self._ids[i]) for i in self._prompt_r])
        self.tasks: list[str] = list(dict.fromkeys(self._task_r.tolist()))

    def prompt_ids(self, task: str) -> list[str]:
        """Of a task's P prompts."""
        return [self._ids[i] for i in dict.fromkeys(self._prompt_r[self._task_r == task].tolist())]

    def n_labels(self, task: str) -> int:
        """K of a task."""
        return int(self._target_r[self._task_r == task].max()) + 1

    def answers(self, task: str) -> Ints:
        """The right label [P] of each prompt."""
        answers: Ints = self._target_r[(self._task_r == task) & self._is_answer_r].astype(np.int64)
        return answers

    def values(self, task: str, layer: int) -> NDArray[np.float32]:
        """NeurGrad [P, K, N]."""
        mine: NDArray[np.float32] = self._values_lrn[self.layers.index(layer)]
        if len(self.tasks) > 1:
            mine = mine[self._task_r == task]
        return mine.reshape(-1, self.n_labels(task), self.n_neurons)


class ActivationPart:
    """A part of the table `activations`, by prompt and layer."""

    COLUMNS: ClassVar = ["prompt_id", "layer", "activation"]

    def __init__(self, table: pa.Table) -> None:
        ids, layer_r = table["prompt_id"].to_pylist(), table["layer"].to_numpy().tolist()
        self._row = {key: row for row, key in enumerate(zip(ids, layer_r, strict=True))}
        self._values_rn = matrix(table["activation"])

    def values(self, prompt_ids: Sequence[str], layer: int) -> NDArray[np.float32]:
        """Activations [P, N]."""
        values: NDArray[np.float32] = self._values_rn[[self._row[own, layer] for own in prompt_ids]]
        return values


def matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column of lists of one size, as rows [R, N]."""
    lists = column.combine_chunks()
    values: NDArray[Any] = lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), -1)
    return values


def numbered(layers: NDArray[Any], n_neurons: int) -> Ints:
    """The numbers of all neurons of layers."""
    numbers: Ints = (layers.astype(np.int64)[:, None] * n_neurons + np.arange(n_neurons)).ravel()
    return numbers


@dataclass(frozen=True)
class ShardParts:
    """The parts of a shard in some tables, and their size as stored, in bytes."""

    shard: int
    fragments: tuple[pads.Fragment, ...]
    size: int


def parts_of_shards(run: Run, *tables: str) -> list[ShardParts]:
    """The parts of the shards that are done at one moment, in their order."""
    at = run.snapshot()
    fragments = {table: dict(run.parts(table, at=at)) for table in tables}
    return [
        ShardParts(
            shard,
            tuple(fragments[table][shard] for table in tables),
            sum(at.parts[table][shard].size for table in tables),
        )
        for shard in fragments[tables[0]]
    ]


def most_in_flight() -> int:
    """How many bytes of parts may be in work at once."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):
        # A word, `max`, where the container has no limit of its own.
        memory = min(memory, int(_LIMIT_OF_CONTAINER.read_text()))
    return min(int(_SHARE * memory), _MOST_BYTES)


def in_order(
    function: Callable[[T], R], items: Iterable[T], size: Callable[[T], int], most: int | None = None
) -> Iterator[R]:
    """Results in the order of the items, computed on all cores, few ahead of what is taken.

    Items that are being computed, or whose results were not taken yet, have at most `most` bytes together, or are one;
    if it is not given, an eighth of the memory, and at most a gibibyte.
    """
    most = most_in_flight() if most is None else most
    workers = os.cpu_count() or 1
    waiting: deque[tuple[Future[R], int]] = deque()
    held = 0
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            own = size(item)
            while waiting and (len(waiting) > workers or held + own > most):
                result, freed = waiting.popleft()
                yield result.result()
                held -= freed
            waiting.append((pool.submit(function, item), own))
            held += own
        while waiting:
            yield waiting.popleft()[0].result()

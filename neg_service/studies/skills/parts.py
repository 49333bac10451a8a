"""Stored gradients and activations of a run, shard by shard, read as a stream on all cores.

No memory grows with the number of prompts. Axes: P prompts, K labels, L layers, N neurons of a layer, R rows of a part.
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

from neg_service.prompts.tasks import task_of
from neg_service.storage.reader import Run

T = TypeVar("T")
R = TypeVar("R")
Ints = NDArray[np.int64]
# Of the memory, for parts as they are stored: read, with what is computed of them, they are about three times that.
_SHARE, _MOST_BYTES = 1 / 8, 2**30
_LIMIT_OF_CONTAINER = Path("/sys/fs/cgroup/memory.max")


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

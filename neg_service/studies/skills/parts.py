"""Stored gradients and activations of a run, shard by shard, read as a stream on all cores.

No memory grows with the number of prompts. Axes: P prompts, p those that use an expert, K labels, N neurons of
an MLP or expert, R rows of a part.
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
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from neg_service.prompts.tasks import task_of
from neg_service.storage.reader import Run
from neg_service.studies.tables import mlp_of_rows

T = TypeVar("T")
R = TypeVar("R")
Ints = NDArray[np.int64]
# Of the memory, for parts as they are stored: read, with what is computed of them, they are about three times that.
_SHARE, _MOST_BYTES = 1 / 8, 2**30
_LIMIT_OF_CONTAINER = Path("/sys/fs/cgroup/memory.max")


# A layer, and an expert of it or its MLP (`layer_neurons.py`).
Mlp = tuple[int, int]


class Lists:
    """A column of lists, whose rows may differ in size."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        lists = column.combine_chunks()
        self._values: NDArray[Any] = lists.flatten().to_numpy(zero_copy_only=False)
        self._start_r = np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_numpy(), dtype=np.int64)])

    def at(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The lists of some rows, all of one size N, as [R, N]; of rows one behind the other without a copy."""
        first = int(rows[0])
        size = int(self._start_r[first + 1] - self._start_r[first])
        if np.array_equal(rows, np.arange(first, first + len(rows))):
            return self._values[self._start_r[first] : self._start_r[first + len(rows)]].reshape(-1, size)
        values: NDArray[Any] = self._values[self._start_r[rows][:, None] + np.arange(size)]
        return values


class GradientPart:
    """A part of the table `neurgrad`, by task and MLP or expert, with prompts in their order and labels in theirs."""

    COLUMNS: ClassVar = ["prompt_id", "target_index", "is_answer", "layer", "expert", "neurgrad"]

    def __init__(self, table: pa.Table) -> None:
        encoded = table["prompt_id"].combine_chunks().dictionary_encode()
        self._ids: list[str] = encoded.dictionary.to_pylist()
        prompt_r, target_r = encoded.indices.to_numpy().astype(np.int64), table["target_index"].to_numpy()
        layer_r, expert_r = mlp_of_rows(table)
        self._lists = Lists(table["neurgrad"])
        order = np.lexsort((target_r, prompt_r, expert_r, layer_r))
        self._rows = _by_mlp(layer_r, expert_r, order)
        self._prompt_r = prompt_r
        self._task_p = np.array([task_of(own) for own in self._ids])
        is_answer_r = table["is_answer"].to_numpy(zero_copy_only=False).astype(bool)
        self._answer_p = np.zeros(len(self._ids), np.int64)
        self._answer_p[prompt_r[is_answer_r]] = target_r[is_answer_r]
        self._n_labels_p = np.zeros(len(self._ids), np.int64)
        np.maximum.at(self._n_labels_p, prompt_r, target_r.astype(np.int64) + 1)
        self.tasks: list[str] = list(dict.fromkeys(self._task_p.tolist()))

    def prompt_ids(self, task: str) -> list[str]:
        """Of a task's P prompts."""
        return [self._ids[p] for p in np.flatnonzero(self._task_p == task)]

    def n_labels(self, task: str) -> int:
        """K of a task."""
        return int(self._n_labels_p[self._task_p == task].max())

    def answers(self, task: str) -> Ints:
        """The right label [P] of each prompt."""
        answers: Ints = self._answer_p[self._task_p == task]
        return answers

    def mlps(self, task: str) -> list[Mlp]:
        """The MLPs and experts that any prompt of a task uses, ascending."""
        if len(self.tasks) == 1:
            return list(self._rows)
        is_mine_r = (self._task_p == task)[self._prompt_r]
        return [mlp for mlp, rows in self._rows.items() if is_mine_r[rows].any()]

    def values(self, task: str, mlp: Mlp) -> tuple[Ints, NDArray[np.float32]]:
        """Which of a task's prompts use an MLP or expert [p], and the NeurGrad of its neurons there [p, K, N]."""
        rows, is_mine_p = self._rows[mlp], self._task_p == task
        if len(self.tasks) > 1:
            rows = rows[is_mine_p[self._prompt_r[rows]]]
        n_labels = self.n_labels(task)
        place_p = np.cumsum(is_mine_p) - 1
        used: Ints = place_p[self._prompt_r[rows[::n_labels]]]
        return used, self._lists.at(rows).reshape(len(used), n_labels, -1)


class ActivationPart:
    """A part of the table `activations`, by prompt and MLP or expert."""

    COLUMNS: ClassVar = ["prompt_id", "layer", "expert", "activation"]

    def __init__(self, table: pa.Table) -> None:
        keys = zip(table["prompt_id"].to_pylist(), *(own.tolist() for own in mlp_of_rows(table)), strict=True)
        self._row = {key: row for row, key in enumerate(keys)}
        self._lists = Lists(table["activation"])

    def values(self, prompt_ids: Sequence[str], mlp: Mlp) -> NDArray[np.float32]:
        """Activations [P, N]; 0 of prompts that do not use the expert."""
        row_p = np.array([self._row.get((own, *mlp), -1) for own in prompt_ids])
        is_used_p = row_p >= 0
        used: NDArray[np.float32] = self._lists.at(row_p[is_used_p])
        if is_used_p.all():
            return used
        values = np.zeros((len(row_p), used.shape[1]), np.float32)
        values[is_used_p] = used
        return values


def _by_mlp(layer_r: Ints, expert_r: Ints, order: NDArray[np.int64]) -> dict[Mlp, NDArray[np.int64]]:
    """The rows of each layer and expert, of rows in that order."""
    layer, expert = layer_r[order], expert_r[order]
    starts = np.flatnonzero(np.r_[True, (np.diff(layer) != 0) | (np.diff(expert) != 0)])
    keys = zip(layer[starts].tolist(), expert[starts].tolist(), strict=True)
    return dict(zip(keys, np.split(order, starts[1:]), strict=True))


def read_part(fragment: pads.Fragment, columns: Sequence[str], filter: pc.Expression | None = None) -> pa.Table:
    """Those of the columns that a part has."""
    there = fragment.physical_schema.names
    return fragment.to_table(columns=[name for name in columns if name in there], filter=filter)


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

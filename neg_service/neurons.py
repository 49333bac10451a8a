"""Which neurons: layers, experts and numbers as columns, each neuron once, in the order (layer, expert, neuron).

A neuron is (layer, expert, neuron). No model that is measured today has experts: the expert is none, -1 in memory and
null in Arrow, and people write (layer, neuron). Layers may have unequal numbers of neurons: what a set has to exist in
is given by layer. A column `task` says for which task a neuron was chosen, of sets that differ from task to task.

A set is resolved once, when a run is planned; it goes to replicas and into `neurons.parquet` of the run as what it is,
because thousands of neurons as text in a configuration are slow and unreadable. Apart from the measures, which choose
neurons, because results are read with it where no measure is installed: it needs numpy and pyarrow alone.

Axes: n neurons.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from neg_service.errors import ConfigurationError, shortened

Ints = NDArray[np.int64]
# Neurons as rows (layer, expert, neuron) in the order in which somebody gave them, also several times: [n, 3].
Neurons = NDArray[np.int64]
NO_EXPERT = -1
SCHEMA = pa.schema(
    [
        # Null in sets that are the same for all tasks.
        pa.field("task", pa.string()),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("expert", pa.int32()),
        pa.field("neuron", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, eq=False)
class NeuronSet:
    """Neurons [n], each once, ordered by task, layer, expert and neuron; two sets of the same neurons are equal.

    expert: -1 where there is none. task: a text each, None of a set for all tasks. source: where a person had them
    from, which is no part of what they are.
    """

    layer: Ints
    expert: Ints
    neuron: Ints
    task: NDArray[Any] | None = None
    source: str = ""

    @classmethod
    def from_pairs(cls, neurons: Any, *, setting: str = "neurons.list", source: str = "") -> NeuronSet:
        """The set of (layer, neuron) pairs, or (layer, expert, neuron) triples whose expert may be None.

        Raises:
            ConfigurationError: none, one given twice, or what is no such list.
        """
        rows_n3 = rows_of(neurons, setting)
        if rows_n3.dtype == object:
            raise ConfigurationError(f"{_beyond(rows_n3)} does not exist: no number is so large", setting=setting)
        found, place_n = cls.distinct(rows_n3)
        if len(found) < len(rows_n3):
            twice = found.rows[np.bincount(place_n).argmax()]
            raise ConfigurationError(f"{name_of(twice)} is given twice", setting=setting)
        return replace(found, source=source)

    @classmethod
    def distinct(cls, rows_n3: Neurons) -> tuple[NeuronSet, Ints]:
        """The set of rows (layer, expert, neuron), and the place in it of each row."""
        found, place_n = np.unique(rows_n3, axis=0, return_inverse=True)
        return cls(*np.ascontiguousarray(found.T)), place_n.reshape(-1)

    @classmethod
    def all_of(cls, layers: Iterable[int], neurons_by_layer: Sequence[int]) -> NeuronSet:
        """All neurons of some layers of a model with so many in each."""
        return cls.of_layers({layer: np.arange(neurons_by_layer[layer]) for layer in layers})

    @classmethod
    def of_layers(cls, neurons: Mapping[int, NDArray[Any]]) -> NeuronSet:
        """The set of these neurons of each layer."""
        own = {layer: np.sort(neurons[layer]).astype(np.int64) for layer in sorted(neurons)}
        layer_n = np.repeat(np.array(list(own), np.int64), [len(numbers) for numbers in own.values()])
        neuron_n = np.concatenate([np.empty(0, np.int64), *own.values()])
        return cls(layer_n, np.full(len(layer_n), NO_EXPERT, np.int64), neuron_n)

    @classmethod
    def by_task(cls, sets: Mapping[str, NeuronSet]) -> NeuronSet:
        """One set of the neurons of each task."""
        ordered = [(task, sets[task]) for task in sorted(sets)]
        layer, expert, neuron = np.ascontiguousarray(np.concatenate([own.rows for _, own in ordered]).T)
        task_n = np.repeat([task for task, _ in ordered], [len(own) for _, own in ordered])
        return cls(layer, expert, neuron, task_n)

    def __len__(self) -> int:
        """n."""
        return len(self.layer)

    def __eq__(self, other: object) -> bool:
        """Whether the other has the same neurons."""
        return isinstance(other, NeuronSet) and len(self) == len(other) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        """Of the digest."""
        return hash(self.sha256)

    def __repr__(self) -> str:
        """For example `NeuronSet(20000 in 30 layers)`."""
        return f"NeuronSet({len(self)} in {len(self.layers)} layers)"

    @cached_property
    def layers(self) -> list[int]:
        """The layers that neurons are of, ascending."""
        found: list[int] = np.unique(self.layer).tolist()
        return found

    @property
    def tasks(self) -> list[str]:
        """The tasks that neurons are of; none of a set that is for all."""
        return [] if self.task is None else np.unique(self.task).tolist()

    @property
    def has_experts(self) -> bool:
        """Whether any neuron is an expert's."""
        return bool((self.expert != NO_EXPERT).any())

    @cached_property
    def sha256(self) -> str:
        """The digest of the neurons: of [layer, neuron] pairs as JSON, with experts and tasks where there are some."""
        return hashlib.sha256(json.dumps(self.tolist()).encode()).hexdigest()

    def tolist(self) -> list[list[Any]]:
        """A list for each neuron: layer and neuron, with the expert between where any has one, and the task before."""
        columns: list[list[Any]] = [self.layer.tolist(), self.neuron.tolist()]
        if self.has_experts:
            columns.insert(1, [None if expert == NO_EXPERT else expert for expert in self.expert.tolist()])
        if self.task is not None:
            columns.insert(0, self.task.tolist())
        return [list(row) for row in zip(*columns, strict=True)]

    def names(self) -> list[tuple[int, ...]]:
        """What people call each neuron: (layer, neuron) or (layer, expert, neuron)."""
        return [name_of(row) for row in self.rows.tolist()]

    @property
    def rows(self) -> Neurons:
        """Rows (layer, expert, neuron) [n, 3]."""
        return np.stack([self.layer, self.expert, self.neuron], 1)

    def of_layer(self, layer: int) -> Ints:
        """The numbers of a layer's neurons, ascending."""
        own: Ints = self.neuron[self.layer == layer]
        return own

    def of_task(self, task: str) -> NeuronSet:
        """The neurons of one task; a set that is for all tasks is that of each."""
        return self if self.task is None else self._at(self.task == task)

    def take(self, places: NDArray[Any]) -> NeuronSet:
        """The neurons at ascending places."""
        return self._at(places)

    def require_existing(self, neurons_by_layer: Sequence[int], setting: str = "neurons") -> None:
        """Refuse neurons that a model with so many neurons in each layer does not have.

        Raises:
            ConfigurationError: naming the first of them.
        """
        require_existing(self.rows, neurons_by_layer, setting)

    def to_arrow(self) -> pa.Table:
        """A row for each neuron, see `SCHEMA`."""
        expert = pa.array(self.expert, mask=self.expert == NO_EXPERT).cast(pa.int32())
        task = pa.nulls(len(self), pa.string()) if self.task is None else pa.array(self.task.tolist(), pa.string())
        return pa.table([task, pa.array(self.layer, pa.int32()), expert, pa.array(self.neuron)], schema=SCHEMA)

    @classmethod
    def from_arrow(cls, table: pa.Table, source: str = "") -> NeuronSet:
        """The set of a table with the columns `layer`, `neuron` and, if there are some, `expert` and `task`.

        Rows that name the same neuron, as of several prompts, are one neuron of the set.

        Raises:
            KeyError, pyarrow.ArrowInvalid: columns are missing, or hold something else.
        """
        layer, neuron = (table[name].cast(pa.int64()).to_numpy() for name in ("layer", "neuron"))
        expert = np.full(len(layer), NO_EXPERT, np.int64)
        if "expert" in table.column_names:
            expert = table["expert"].cast(pa.int64()).fill_null(NO_EXPERT).to_numpy()
        task = None
        if "task" in table.column_names and table["task"].null_count < len(layer):
            task = np.array(table["task"].to_pylist())
        order = np.lexsort((neuron, expert, layer) if task is None else (neuron, expert, layer, task))
        found = cls(layer, expert, neuron, task, source)._at(order)
        is_new = np.ones(len(found), bool)
        is_new[1:] = (np.diff(found.rows, axis=0) != 0).any(1)
        if found.task is not None:
            is_new[1:] |= found.task[1:] != found.task[:-1]
        return found._at(is_new)

    def to_parquet(self) -> bytes:
        """The bytes of a Parquet file of `to_arrow`; each page carries a checksum."""
        sink = io.BytesIO()
        pq.write_table(self.to_arrow(), sink, compression="zstd", write_page_checksum=True)
        return sink.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes) -> NeuronSet:
        """The set in such a file.

        Raises:
            KeyError, ValueError, OSError, pyarrow.ArrowException: it is none, or damaged.
        """
        return cls.from_arrow(pq.read_table(pa.BufferReader(data), page_checksum_verification=True))

    def _at(self, places: NDArray[Any]) -> NeuronSet:
        task = None if self.task is None else self.task[places]
        return NeuronSet(self.layer[places], self.expert[places], self.neuron[places], task, self.source)


def name_of(row: Any) -> tuple[int, ...]:
    """What people call a neuron, from its row: (layer, neuron), or (layer, expert, neuron)."""
    layer, expert, neuron = map(int, row)
    return (layer, neuron) if expert == NO_EXPERT else (layer, expert, neuron)


def rows_of(neurons: Any, setting: str = "neurons") -> Neurons:
    """Rows (layer, expert, neuron) of pairs or triples; of objects where one is beyond 64 bits, and exists nowhere.

    Raises:
        ConfigurationError: none, or what is no list of pairs or triples of whole numbers.
    """
    try:
        given = np.asarray(neurons)
    except (ValueError, RecursionError):
        given = np.empty(1)
    if given.size == 0:
        raise ConfigurationError("the choice is empty; at least one neuron is needed", setting=setting)
    if given.dtype == object and given.ndim == 2 and given.shape[1] == 3:
        given = given.copy()
        given[[value is None for value in given[:, 1]], 1] = NO_EXPERT
    # Beyond 64 bits numbers are objects; true and false would become 1 and 0.
    is_whole = np.issubdtype(given.dtype, np.integer) or all(type(value) is int for value in given.flat)
    if given.ndim != 2 or given.shape[1] not in (2, 3) or not is_whole or _has_truth_value(neurons):
        raise ConfigurationError(
            setting=setting, value=shortened(neurons), allowed="a list of (layer, index) pairs of whole numbers"
        )
    is_beyond = given.dtype in (np.uint64, object) and any(abs(value) >= 2**63 for value in given.ravel().tolist())
    given = given.astype(object if is_beyond else np.int64)
    return given if given.shape[1] == 3 else np.insert(given, 1, NO_EXPERT, 1)


def require_existing(rows_n3: Neurons, neurons_by_layer: Sequence[int], setting: str = "neurons") -> None:
    """Refuse rows (layer, expert, neuron) beyond a model of so many neurons in each layer, and without experts.

    Raises:
        ConfigurationError: naming the first of them, and what there is.
    """
    n_layers, (layer_n, expert_n, neuron_n) = len(neurons_by_layer), rows_n3.T
    is_layer_n = (layer_n >= 0) & (layer_n < n_layers)
    count_n = np.array(neurons_by_layer)[np.where(is_layer_n, layer_n, 0).astype(np.int64)]
    exists_n = is_layer_n & (neuron_n >= 0) & (neuron_n < count_n)
    for place in np.flatnonzero(~exists_n | (expert_n != NO_EXPERT))[:1]:
        name, layer = shortened(name_of(rows_n3[place])), int(layer_n[place])
        if exists_n[place]:
            raise ConfigurationError(f"{name} does not exist; layer {layer} has no experts", setting=setting)
        is_equal, of = len(set(neurons_by_layer)) == 1, int(count_n[place])
        whose = "neurons" if is_equal else f"layer {layer} neurons"
        there = f"layers 0 to {n_layers - 1}" + (f" and {whose} 0 to {of - 1}" if is_equal or is_layer_n[place] else "")
        raise ConfigurationError(f"{name} does not exist; the model has {there}", setting=setting)


def _beyond(rows_n3: Neurons) -> str:
    """The first row with a number beyond 64 bits."""
    return shortened(next(name_of(row) for row in rows_n3 if any(abs(value) >= 2**63 for value in row)))


def _has_truth_value(neurons: Any) -> bool:
    return not isinstance(neurons, np.ndarray) and any(
        isinstance(value, bool | np.bool_) for pair in neurons if isinstance(pair, list | tuple) for value in pair
    )

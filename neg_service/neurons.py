"""Which neurons: layers, experts and numbers as columns, each neuron once, in the order (layer, expert, neuron).

People write a neuron as (layer, neuron), or (layer, neuron, expert) where the layer has experts; -1 is the MLP that is
always on beside them. In Arrow the expert of a layer's only MLP is null. Layers may have unequal numbers of neurons:
what a set has to exist in is given by layer. A column `task` says for which task a neuron was chosen, of sets that
differ from task to task.

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
from neg_service.layer_neurons import ALWAYS_ON, NO_EXPERT, LayerNeurons, LayerSize, layers_of_sizes

Ints = NDArray[np.int64]
# Neurons as rows (layer, expert, neuron) in the order in which somebody gave them, also several times: [n, 3].
Neurons = NDArray[np.int64]
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

    expert: -2 of a layer's only MLP, -1 of one that is always on beside experts. task: a text each, None of a set for
    all tasks. source: where a person had them from, which is no part of what they are.
    """

    layer: Ints
    expert: Ints
    neuron: Ints
    task: NDArray[Any] | None = None
    source: str = ""

    @classmethod
    def from_pairs(cls, neurons: Any, *, setting: str = "neurons.list", source: str = "") -> NeuronSet:
        """The set of (layer, neuron) pairs, or (layer, neuron, expert) triples whose expert may be None.

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
    def all_of(cls, layers: Iterable[int], neurons_by_layer: Sequence[LayerSize]) -> NeuronSet:
        """All neurons of some layers of a model with so many in each."""
        sizes = layers_of_sizes(neurons_by_layer)
        return cls.of_mlps({(layer, expert): np.arange(size) for layer in layers for expert, size in sizes[layer].mlps})

    @classmethod
    def of_layers(cls, neurons: Mapping[int, NDArray[Any]]) -> NeuronSet:
        """The set of these neurons of each layer, none of which has experts."""
        return cls.of_mlps({(layer, NO_EXPERT): own for layer, own in neurons.items()})

    @classmethod
    def of_mlps(cls, neurons: Mapping[tuple[int, int], NDArray[Any]]) -> NeuronSet:
        """The set of these neurons of each (layer, expert)."""
        own = {key: np.sort(neurons[key]).astype(np.int64) for key in sorted(neurons)}
        key_g2 = np.array(list(own), np.int64).reshape(-1, 2)
        layer_n, expert_n = np.repeat(key_g2, [len(numbers) for numbers in own.values()], 0).T
        neuron_n = np.concatenate([np.empty(0, np.int64), *own.values()])
        return cls(np.ascontiguousarray(layer_n), np.ascontiguousarray(expert_n), neuron_n)

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
        """The digest of the neurons: of `tolist` as JSON."""
        return hashlib.sha256(json.dumps(self.tolist()).encode()).hexdigest()

    def tolist(self) -> list[list[Any]]:
        """A list for each neuron: layer and neuron, with the expert behind where any has one, and the task before."""
        columns: list[list[Any]] = [self.layer.tolist(), self.neuron.tolist()]
        if self.has_experts:
            columns.append([None if expert == NO_EXPERT else expert for expert in self.expert.tolist()])
        if self.task is not None:
            columns.insert(0, self.task.tolist())
        return [list(row) for row in zip(*columns, strict=True)]

    def names(self) -> list[tuple[int, ...]]:
        """What people call each neuron: (layer, neuron) or (layer, neuron, expert)."""
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

    def in_model(self, neurons_by_layer: Sequence[LayerSize], setting: str = "neurons") -> NeuronSet:
        """The same neurons as those of a model with so many neurons in each layer.

        Raises:
            ConfigurationError: naming the first that it does not have.
        """
        rows_n3 = require_existing(self.rows, neurons_by_layer, setting)
        if np.array_equal(rows_n3[:, 1], self.expert):
            return self
        # What had two names may stand elsewhere now, or be given twice.
        found = replace(self, expert=np.ascontiguousarray(rows_n3[:, 1]))
        keys = (found.neuron, found.expert, found.layer)
        found = found._at(np.lexsort(keys if self.task is None else (*keys, self.task)))
        is_same = (np.diff(found.rows, axis=0) == 0).all(1)
        if found.task is not None:
            is_same &= found.task[1:] == found.task[:-1]
        for place in np.flatnonzero(is_same)[:1]:
            raise ConfigurationError(f"{name_of(found.rows[place])} is given twice", setting=setting)
        return found

    @property
    def keys(self) -> list[tuple[int, int]]:
        """The (layer, expert) that neurons are of, ascending."""
        return [(layer, expert) for layer, expert in np.unique(self.rows[:, :2], axis=0).tolist()]

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
    """What people call a neuron, from its row: (layer, neuron), or (layer, neuron, expert)."""
    layer, expert, neuron = map(int, row)
    return (layer, neuron) if expert == NO_EXPERT else (layer, neuron, expert)


def rows_of(neurons: Any, setting: str = "neurons") -> Neurons:
    """Rows (layer, expert, neuron) of pairs (layer, neuron) or triples (layer, neuron, expert).

    They are of objects where one is beyond 64 bits, and exists nowhere. A triple (layer, None, neuron), which runs of
    before experts were measured may have, is understood as well.

    Raises:
        ConfigurationError: none, or what is no list of pairs or triples of whole numbers.
    """
    is_mixed = isinstance(neurons, list | tuple) and {
        len(own) if isinstance(own, list | tuple) else 0 for own in neurons
    } == {2, 3}
    try:
        # Of layers with experts and of others.
        given = np.asarray([(*own, None)[:3] for own in neurons] if is_mixed else neurons)
    except (ValueError, RecursionError):
        given = np.empty(1)
    if given.size == 0:
        raise ConfigurationError("the choice is empty; at least one neuron is needed", setting=setting)
    if given.ndim == 2 and given.shape[1] == 3:
        given = _with_expert_between(given, setting)
    # Beyond 64 bits numbers are objects; true and false would become 1 and 0.
    is_whole = np.issubdtype(given.dtype, np.integer) or all(type(value) is int for value in given.flat)
    if given.ndim != 2 or given.shape[1] not in (2, 3) or not is_whole or _has_truth_value(neurons):
        raise ConfigurationError(
            setting=setting,
            value=shortened(neurons),
            allowed="a list of (layer, index) pairs or (layer, index, expert) triples of whole numbers",
        )
    is_beyond = given.dtype in (np.uint64, object) and any(abs(value) >= 2**63 for value in given.ravel().tolist())
    given = given.astype(object if is_beyond else np.int64)
    return given if given.shape[1] == 3 else np.insert(given, 1, NO_EXPERT, 1)


def _with_expert_between(given_n3: NDArray[Any], setting: str) -> NDArray[Any]:
    """Triples (layer, neuron, expert) as (layer, expert, neuron); an expert of None is no expert.

    Raises:
        ConfigurationError: the number that stands for none in memory.
    """
    found = given_n3[:, [0, 2, 1]]
    if found.dtype == object:
        is_old_n = np.array([value is None for value in found[:, 2]])
        found[is_old_n, 1:] = found[is_old_n, :0:-1]
        is_none_n = np.array([value is None for value in found[:, 1]])
    else:
        is_none_n = np.zeros(len(found), bool)
    for place in np.flatnonzero((found[:, 1] == NO_EXPERT) & ~is_none_n)[:1]:
        # It stands for none in memory, and is nobody's to give.
        name = tuple(given_n3[place].tolist())
        raise ConfigurationError(f"{shortened(name)} does not exist: experts are from 0, or -1", setting=setting)
    found[is_none_n, 1] = NO_EXPERT
    return found


def require_existing(rows_n3: Neurons, neurons_by_layer: Sequence[LayerSize], setting: str = "neurons") -> Neurons:
    """Rows (layer, expert, neuron) of a model with so many neurons in each layer.

    The MLP of a layer without experts is always on too, and may be named so.

    Raises:
        ConfigurationError: naming the first that does not exist, and what there is.
    """
    sizes = layers_of_sizes(neurons_by_layer)
    n_layers, (layer_n, expert_n, neuron_n) = len(sizes), rows_n3.T
    is_layer_n = (layer_n >= 0) & (layer_n < n_layers)
    own_n = np.where(is_layer_n, layer_n, 0).astype(np.int64)
    n_mlp, n_experts, n_of_expert = (
        np.array([getattr(size, name) for size in sizes])[own_n] for name in ("n_mlp", "n_experts", "n_of_expert")
    )
    expert_n = np.where((expert_n == ALWAYS_ON) & (n_experts == 0), NO_EXPERT, expert_n)
    is_mlp_n = expert_n == np.where(n_experts > 0, ALWAYS_ON, NO_EXPERT)
    count_n = np.where(is_mlp_n, n_mlp, np.where((expert_n >= 0) & (expert_n < n_experts), n_of_expert, 0))
    exists_n = is_layer_n & (neuron_n >= 0) & (neuron_n < count_n)
    for place in np.flatnonzero(~exists_n)[:1]:
        row = (layer_n[place], expert_n[place], neuron_n[place])
        raise ConfigurationError(_why_not(row, sizes), setting=setting)
    found = rows_n3.copy()
    found[:, 1] = expert_n
    return found


def _why_not(row: tuple[Any, Any, Any], sizes: Sequence[LayerNeurons]) -> str:
    """Why a neuron does not exist, and what there is."""
    layer, expert = int(row[0]), int(row[1])
    name = shortened(name_of(row))
    if not 0 <= layer < len(sizes):
        is_equal = len(set(sizes)) == 1 and not sizes[0].n_experts
        neurons = f" and neurons 0 to {sizes[0].n_mlp - 1}" if is_equal else ""
        return f"{name} does not exist; the model has layers 0 to {len(sizes) - 1}{neurons}"
    own = sizes[layer]
    if not own.n_experts and expert != NO_EXPERT:
        return f"{name} does not exist; layer {layer} has no experts"
    if own.n_experts:
        mlp = f", or -1 for its MLP that is always on ({own.n_mlp} neurons)" if own.n_mlp else ""
        there = f"experts 0 to {own.n_experts - 1} of {own.n_of_expert} neurons{mlp}"
        if expert == NO_EXPERT:
            return f"{name} needs an expert, (layer, neuron, expert): layer {layer} has {there}"
        return f"{name} does not exist; layer {layer} has {there}"
    if not own.n_mlp:
        return f"{name} does not exist; layer {layer} has no feed-forward neurons"
    is_equal = len(set(sizes)) == 1
    whose = "neurons" if is_equal else f"layer {layer} neurons"
    return f"{name} does not exist; the model has layers 0 to {len(sizes) - 1} and {whose} 0 to {own.n_mlp - 1}"


def _beyond(rows_n3: Neurons) -> str:
    """The first row with a number beyond 64 bits."""
    return shortened(next(name_of(row) for row in rows_n3 if any(abs(value) >= 2**63 for value in row)))


def _has_truth_value(neurons: Any) -> bool:
    return not isinstance(neurons, np.ndarray) and any(
        isinstance(value, bool | np.bool_) for pair in neurons if isinstance(pair, list | tuple) for value in pair
    )

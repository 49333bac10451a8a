"""Reading runs from anywhere: needs pyarrow, numpy and s3fs, and nothing of what computed them.

    run = neg_service.open_run("s3://runs/results/smollm2-facts-neurgrad-0123456789ab")
    run.table("neurgrad", columns=["prompt_id", "neurgrad"], filter=pc.field("layer") == 29).to_table()
    run.neuron(29, 864)                       # one neuron over all prompts; reads nothing of the other layers
    neg_service.open_runs([uri, other]).table("sweep").to_table()      # side by side, with a column `run`

A run that is still being computed gives what is done. Page checksums are verified on every read. A run that extends
another one (`job.extend`) is read with it as one: the other's shards are its first ones, and stay where they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from neg_service.errors import ConfigurationError, StorageError, one_line
from neg_service.former_names import COLUMNS, FAILED_FOLDER, MEASURES, current_about, current_config
from neg_service.layer_neurons import ALWAYS_ON, NO_EXPERT, LayerNeurons
from neg_service.neurons import NeuronSet, require_existing
from neg_service.places import name_of
from neg_service.schema import Table, known_schema_version, under_present_names
from neg_service.storage.extension import extended_run
from neg_service.storage.neurons import read_neurons
from neg_service.storage.objects import Entry, ObjectStore
from neg_service.storage.run import FAILED, RunDirectory, Snapshot, read_run_file, schema_from_json
from neg_service.storage.stores import open_store

# pyarrow's datasets load pandas where there is one, which takes a second: not before a row is read.
if TYPE_CHECKING:
    import pyarrow.dataset as pads

RUN_COLUMN = "run"
_OF_NEURON = ("layer", "expert", "neuron")


@dataclass(frozen=True)
class Run:
    """An existing run, done or not.

    config: what was asked for and decides the numbers (model, prompts, measure, neurons, plan).
    about: what else is known: versions, sizes, when it began.
    request: what has to be asked for to compute it again.
    base: the run that it extends, whose shards are its first ones.
    """

    uri: str
    fingerprint: str
    config: dict[str, Any]
    about: dict[str, Any]
    request: dict[str, Any]
    directory: RunDirectory = field(repr=False)
    schemas: dict[str, pa.Schema] = field(repr=False)
    # What run.json says of neurons that are kept in a file of their own.
    said_of_neurons: dict[str, Any] | None = field(default=None, repr=False)
    # The same schemas by the names of the tables' folders, with the columns as they are stored.
    stored_schemas: dict[str, pa.Schema] = field(default_factory=dict, repr=False)
    # Whether tables and columns are stored under the names that they had before schema 4.
    is_of_former_names: bool = field(default=False, repr=False)
    base: Run | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The last part of its URI: what people see, and the fingerprint."""
        return name_of(self.uri)

    @property
    def tables(self) -> list[str]:
        """The names of the tables."""
        return list(self.schemas)

    @cached_property
    def described(self) -> dict[str, Table]:
        """What is known of each table: its schema, its title, its unit, and the column that holds values of neurons."""
        return {name: Table.of(name, own) for name, own in self.schemas.items()}

    @property
    def values_of_neurons(self) -> list[str]:
        """The tables that hold values of neurons, first the one that the run is about."""
        return [name for name in reversed(self.tables) if self.described[name].values is not None]

    @property
    def n_shards(self) -> int:
        """How many shards there are, with those of the run that it extends."""
        return int(self.config["plan"]["shards"])

    @property
    def n_prompts(self) -> int:
        """How many prompts there are, with those of the run that it extends."""
        return int(self.config["prompts"]["count"])

    @property
    def own_shards(self) -> range:
        """The shards whose parts are in the run's own directory."""
        return range(0 if self.base is None else self.base.n_shards, self.n_shards)

    @property
    def lineage(self) -> list[Run]:
        """The runs that make it up, each with its own shards: first what was extended, this one last."""
        return [*(self.base.lineage if self.base is not None else ()), self]

    @property
    def seconds_a_prompt(self) -> float | None:
        """How long replicas computed for a prompt; None of a run that was interrupted and went on."""
        cost = self.about.get("cost")
        if not cost:
            return None
        # Runs of earlier versions say the whole time and the number of replicas.
        seconds = cost["computed_seconds"] if "computed_seconds" in cost else cost["seconds"] * cost["replicas"]
        return float(seconds / cost["prompts"])

    def snapshot(self) -> Snapshot:
        """The parts that are there now, by one listing a table: for looking at several tables at one moment.

        Keys are those in the directory of the run of `lineage` that has the shard.
        """
        found: dict[str, dict[int, Entry]] = {name: {} for name in self.directory.tables}
        for run in self.lineage:
            for name, parts in run.directory.snapshot().parts.items():
                found[name] |= {shard: part for shard, part in parts.items() if shard in run.own_shards}
        return Snapshot(found)

    def done(self, at: Snapshot | None = None) -> set[int]:
        """The shards of the plan that are done, now or in a snapshot."""
        return (at or self.snapshot()).done & set(range(self.n_shards))

    def table(
        self,
        name: str,
        columns: Sequence[str] | None = None,
        filter: pc.Expression | None = None,
        *,
        at: Snapshot | None = None,
    ) -> pads.Dataset:
        """A pyarrow Dataset over the parts of all shards that are done now, in the order of the shards.

        `filter` may name columns that are not among `columns`. Within a shard rows are ordered by layer, and a filter
        on `layer` reads those layers alone. `at` takes the shards of a snapshot, and lists nothing.

        Raises:
            ConfigurationError: the run has no such table or column.
        """
        from neg_service.storage.selection import Selection

        parts = [part for _, part in self.parts(name, at=at)]
        return Selection.of(parts, self.schemas[name], columns, filter, self.stored_columns(name))

    def listed_neurons(self) -> NeuronSet | None:
        """The neurons of a list, or that were ranked over the data set, by task where they differ; None of other runs.

        Raises:
            DestinationError: they are lost or damaged.
        """
        if self.said_of_neurons is not None:
            return read_neurons(self.directory.store, self.said_of_neurons)
        # As runs were written before neurons had a file.
        pairs = self.request.get("neurons", {}).get("list") or self.about.get("neurons")
        return NeuronSet.from_pairs(pairs) if isinstance(pairs, list) else None

    def neuron(self, layer: int, index: int, expert: int | None = None) -> pa.Table:
        """All that is known of one neuron: a row for each prompt and target, or prompt where targets play no part.

        From the table that the run is about; where its rows are of a layer, with the neuron's own value in the place of
        the list. Beside it what other tables know of the neuron on the same prompt, as `activations` beside `neurgrad`.
        Reads one layer of each part, as a stream.

        Raises:
            ConfigurationError: the run has no such layer, expert or neuron.
        """
        if not self.values_of_neurons:
            raise ConfigurationError(f"{self.uri} has no table of neurons; it has {', '.join(self.tables)}")
        main, *others = self.values_of_neurons
        self._require_neuron(layer, index, expert, main)
        at = self.snapshot()
        table = self._of_neuron(main, layer, index, expert, at)
        keys = {name: self._keys_beside(name, main) for name in others}
        for name, own in keys.items():
            if own:
                value = self._of_neuron(name, layer, index, expert, at).select([*own, self.described[name].values])
                table = table.join(value, own, join_type="left outer")
        if not any(keys.values()):
            return table
        order = [key for key in ("prompt_id", "target_index") if key in table.column_names]
        return table.sort_by([(key, "ascending") for key in order])

    def _keys_beside(self, name: str, main: str) -> list[str]:
        """The columns by which a table's values stand beside those of another; none if they cannot."""
        own, of = self.described[name], self.schemas[main].names
        keys = [key for key in own.schema.names if key not in (own.values, *_OF_NEURON, "basis")]
        is_beside = keys and own.values not in of and set(keys) <= set(of)
        return keys if is_beside else []

    def stored_name(self, name: str) -> str:
        """The name of a table's folder, which runs of earlier versions have under a former name."""
        return dict(zip(self.schemas, self.directory.tables, strict=True))[name]

    def stored_columns(self, name: str) -> dict[str, str]:
        """Columns that are stored under a former name: present names, with the stored ones."""
        former = COLUMNS.get(name, {}) if self.is_of_former_names else {}
        return {now: before for before, now in former.items() if now in self.schemas[name].names}

    def _of_neuron(self, name: str, layer: int, index: int, expert: int | None, at: Snapshot) -> pa.Table:
        of_layer = pc.field("layer") == layer
        # Tables that were written before there were experts have no such column.
        if "expert" in self.schemas[name].names:
            is_only = expert is None or (expert == ALWAYS_ON and not self._has_experts(layer))
            of_layer &= pc.field("expert").is_null() if is_only else pc.field("expert") == expert
        if self.described[name].is_by_neuron:
            return self.table(name, filter=of_layer & (pc.field("neuron") == index), at=at).to_table()
        chosen: dict[str, pc.Expression] = {}
        stored = self.stored_columns(name)
        for column in self.schemas[name]:
            own = pc.field(stored.get(column.name, column.name))
            is_value = column.name == self.described[name].values
            is_by_neuron = is_value or pa.types.is_fixed_size_list(column.type)
            chosen[column.name] = pc.list_element(own, index) if is_by_neuron else own
        return self.table(name, at=at).to_table(columns=chosen, filter=of_layer)

    def _has_experts(self, layer: int) -> bool:
        layers = self.about.get("model", {}).get("layer_neurons")
        return layers is not None and LayerNeurons(*layers[layer]).n_experts > 0

    def _require_neuron(self, layer: int, index: int, expert: int | None, table: str) -> None:
        measured = self.config.get("neurons", {}).get("layers")
        if measured is not None and layer not in measured:
            raise ConfigurationError(f"{self.uri} has no layer {layer}; it has {', '.join(map(str, measured))}")
        model = self.about.get("model", {})
        if (layers := model.get("layer_neurons")) is not None:
            row = np.array([[layer, NO_EXPERT if expert is None else expert, index]])
            require_existing(row, [LayerNeurons(*own) for own in layers], self.uri)
            return
        if expert is not None and ("expert" not in self.schemas[table].names or model.get("experts_a_layer") == 0):
            raise ConfigurationError(f"{self.uri} has no neuron {(layer, index, expert)}; layer {layer} has no experts")
        count = model.get("neurons_a_layer")
        if index < 0 or (count is not None and index >= count):
            raise ConfigurationError(f"{self.uri} has no neuron {index}; a layer has {count}, from 0")

    def parts(
        self, name: str, expression: pc.Expression | None = None, *, at: Snapshot | None = None
    ) -> Iterator[tuple[int, pads.Fragment]]:
        """The shards that are done now, in order, each with its part of a table, for reading one after the other.

        `expression` is true of all rows; `at` takes the shards of a snapshot.

        Raises:
            ConfigurationError: the run has no such table.
        """
        from neg_service.storage.selection import CHECKED

        if name not in self.schemas:
            raise ConfigurationError(f"{self.uri} has no table {name!r}; it has {', '.join(self.tables)}")
        at = at or self.snapshot()
        stored = self.stored_name(name)
        done = self.done(at)
        for run in self.lineage:
            filesystem, root = run.directory.store.arrow()
            for shard in sorted(done & set(run.own_shards)):
                part = at.parts[stored][shard]
                yield shard, CHECKED.make_fragment(f"{root}/{part.key}", filesystem, expression, file_size=part.size)


@dataclass(frozen=True)
class Runs:
    """Several runs side by side, of any models and data sets; each table has a column `run` with the run's name."""

    runs: tuple[Run, ...]

    @property
    def tables(self) -> list[str]:
        """The names of the tables that all of them have."""
        return [name for name in self.runs[0].tables if all(name in run.tables for run in self.runs)]

    def table(
        self, name: str, columns: Sequence[str] | None = None, filter: pc.Expression | None = None
    ) -> pads.Dataset:
        """As of a single run; a filter on `run` opens the parts of those runs alone.

        Raises:
            ConfigurationError: a run has no such table, or it has other columns than in the first run, as lists of
                neurons have when models differ in size.
        """
        from neg_service.storage.selection import Selection

        # Runs of earlier versions have no experts, and null in their place beside one that has the column.
        with_experts = (run for run in self.runs if name in run.tables and "expert" in run.schemas[name].names)
        first = next(with_experts, self.runs[0])
        fragments: list[pads.Fragment] = []
        for run in self.runs:
            if former := run.stored_columns(name):
                raise ConfigurationError(
                    f"table {name!r} cannot be shown side by side: {run.name} was stored with the column "
                    f"{', '.join(former.values())}, which is called {', '.join(former)} by now; read them one by one"
                )
            fragments += [part for _, part in run.parts(name, pc.field(RUN_COLUMN) == run.name)]
            own, schema = run.schemas[name], first.schemas[name]
            for column in schema:
                if column.name == "expert" and column.name not in own.names:
                    continue
                if column.name not in own.names or own.field(column.name).type != column.type:
                    found = own.field(column.name).type if column.name in own.names else "missing"
                    raise ConfigurationError(
                        f"table {name!r} cannot be shown side by side: column {column.name} is {column.type} in "
                        f"{first.name} and {found} in {run.name}; read them one by one"
                    )
        schema = first.schemas[name].insert(0, pa.field(RUN_COLUMN, pa.string(), nullable=False))
        return Selection.of(fragments, schema, columns, filter)

    def neuron(self, layer: int, index: int, expert: int | None = None) -> pa.Table:
        """The tables of `Run.neuron` one below the other, with the column `run`."""
        tables = [
            table.add_column(0, RUN_COLUMN, pa.array([run.name] * table.num_rows, pa.string()))
            for run in self.runs
            for table in [run.neuron(layer, index, expert)]
        ]
        return pa.concat_tables(tables, promote_options="default")


def open_run(uri: str | os.PathLike[str], endpoint_url: str | None = None, *, key: str = "run") -> Run:
    """Open a run directory, local or s3://, with credentials from the environment or the usual AWS chain.

    `key` is the setting that names it, for messages.

    Raises:
        DestinationError: there is no run at `uri`, or its run.json was changed, or nobody lets us in.
    """
    store = open_store(uri, endpoint_url, key=key)
    store.check()
    return run_from(store, read_run_file(store), endpoint_url)


@contextmanager
def reading(run: Run) -> Iterator[None]:
    """Damage and failures that show when rows are read, told in one line.

    Raises:
        StorageError: in the place of pyarrow's errors.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise StorageError(
            f"{run.uri}: its parts cannot be read: {one_line(error)}; "
            f"python -m jobs.verify {run.directory.store.settings} names what is damaged"
        ) from error


def run_from(store: ObjectStore, parsed: dict[str, Any], endpoint_url: str | None = None) -> Run:
    """The run at a store, whose run.json was read and parsed already.

    Raises:
        DestinationError: it extends a run that is not to be found, or was stored by a later version.
    """
    version, extended = known_schema_version(store.uri, parsed["identity"]), extended_run(store, parsed, endpoint_url)
    stored = {name: schema_from_json(described) for name, described in parsed["tables"].items()}
    is_of_former_names = version < 4
    schemas = stored
    if is_of_former_names:
        present = {name: MEASURES.get(name, name) for name in stored}
        schemas = {present[name]: under_present_names(present[name], own) for name, own in stored.items()}
    return Run(
        uri=store.uri,
        fingerprint=parsed["fingerprint"],
        config=current_config(parsed["identity"]),
        about=current_about(parsed.get("about", {})),
        request=parsed.get("request", {}),
        directory=RunDirectory(
            store, parsed["fingerprint"], tuple(stored), FAILED_FOLDER if is_of_former_names else FAILED
        ),
        schemas=schemas,
        stored_schemas=stored,
        is_of_former_names=is_of_former_names,
        said_of_neurons=parsed.get("neurons"),
        base=None if extended is None else run_from(*extended, endpoint_url),
    )


def open_runs(uris: Sequence[str | os.PathLike[str]], endpoint_url: str | None = None) -> Runs:
    """Open several runs, to read them side by side.

    Raises:
        ConfigurationError: none are given, or one twice.
        DestinationError: there is no run at one of them.
    """
    uris = [uris] if isinstance(uris, str | os.PathLike) or not isinstance(uris, Iterable) else uris
    runs = tuple(open_run(uri, endpoint_url) for uri in uris)
    names = [run.name for run in runs]
    if not runs or len(set(names)) < len(names):
        raise ConfigurationError("give at least one run, and each once", setting="runs", value=names)
    return Runs(runs)

"""What a table says of itself beside its Arrow schema: title, unit, and which column holds values of neurons.

It stands in the metadata of the schema, so that reader, console and report know a table that no file of theirs names.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from neg_service.errors import ConfigurationError
from neg_service.former_names import former_columns

# What tables say of themselves, in the metadata of their schema: run.json and each part carry it.
_TABLE_KEY = b"neg_service.table"


@dataclass(frozen=True)
class Table:
    """A table, and what its reader, the console and the report know of it.

    title: what people call its values. unit: of them, empty where they have none. values: the column that holds values
    of neurons, None of a table without; in rows that name a `layer` and a `neuron` it is a number, in rows that name a
    `layer` alone a list with a number for each of the layer's neurons. note: what a value says, in a sentence.
    """

    schema: pa.Schema
    title: str = ""
    unit: str = ""
    values: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse a description that no reader could follow."""
        if self.values is None:
            return
        names = self.schema.names
        if self.values not in names or "layer" not in names:
            raise ConfigurationError(f"table {self.title!r}: has no column {self.values!r}, or no column 'layer'")
        if not (self.is_by_neuron or is_list(self.schema.field(self.values).type)):
            raise ConfigurationError(
                f"table {self.title!r}: column {self.values!r} must be a list, a number for each neuron of a "
                f"layer; or there must be a column 'neuron'"
            )

    @property
    def is_by_neuron(self) -> bool:
        """Whether a row is of one neuron; otherwise of all of a layer."""
        return "neuron" in self.schema.names

    @property
    def label(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def described(self) -> pa.Schema:
        """The schema, which says all of this in its metadata."""
        said = {name: value for name, value in asdict(self).items() if name != "schema" and value}
        metadata = {**(self.schema.metadata or {}), _TABLE_KEY: json.dumps(said, ensure_ascii=False).encode()}
        return self.schema.with_metadata(metadata)

    @classmethod
    def of(cls, name: str, schema: pa.Schema) -> Table:
        """What a schema says of table `name`; of runs that were written before tables said it, what is known here."""
        said: dict[str, Any]
        if _TABLE_KEY in (schema.metadata or {}):
            said = json.loads(schema.metadata[_TABLE_KEY])
        else:
            title, unit, values = _WRITTEN_BEFORE.get(name, (name, "", None))
            said = {"title": title, "unit": unit, "values": values if {values, "layer"} <= set(schema.names) else None}
        return cls(schema, **{key: said[key] for key in ("title", "unit", "values", "note") if key in said})


def is_list(kind: pa.DataType) -> bool:
    """Whether a column's values are lists, of one size or of several."""
    return bool(pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind))


# Units of values of neurons.
PER_MAGNITUDE = "probability a unit of |activation|"
PER_ACTIVATION = "probability a unit of activation"
PROBABILITY = "probability"
NO_UNIT = "no unit"
# Columns that estimate NEG: what people call them, and their unit.
ESTIMATES = {
    "neurgrad": ("NeurGrad", PER_MAGNITUDE),
    "integrated_gradients": ("integrated gradients", PROBABILITY),
    "gradient": ("gradient", PER_ACTIVATION),
    "gradient_x_activation": ("gradient × activation", PROBABILITY),
    "activation": ("activation", NO_UNIT),
    "random": ("random draw", NO_UNIT),
}
# Tables of runs that say nothing of their tables: title, unit, values.
_WRITTEN_BEFORE: dict[str, tuple[str, str, str | None]] = {
    **{name: (title, unit, name) for name, (title, unit) in ESTIMATES.items()},
    "activations": ("activation", NO_UNIT, "activation"),
    "top_neurons": ("NeurGrad", PER_MAGNITUDE, "neurgrad"),
    "sweep": ("NEG", PER_MAGNITUDE, "neg"),
    "aggregate_importance": ("aggregate importance", PER_MAGNITUDE, "aggregate_importance"),
    "skill_scores": ("score", NO_UNIT, "values"),
}


def under_present_names(table: str, schema: pa.Schema) -> pa.Schema:
    """A stored schema with the present names of its columns."""
    names = {before: now for now, before in former_columns(table, schema.names).items()}
    if not names:
        return schema
    metadata = dict(schema.metadata or {})
    if _TABLE_KEY in metadata:
        said = json.loads(metadata[_TABLE_KEY])
        said["values"] = names.get(said.get("values"), said.get("values"))
        metadata[_TABLE_KEY] = json.dumps(said, ensure_ascii=False).encode()
    return pa.schema([own.with_name(names.get(own.name, own.name)) for own in schema], metadata)

"""The tables of a study while they are made: rows, which become Arrow tables where they are stored.

And what rows of stored tables are of, layer and expert, as numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from neg_service.layer_neurons import NO_EXPERT
from neg_service.neurons import Ints

Row = dict[str, Any]
Rows = list[Row]


@dataclass
class StudyTables:
    """Rows by the name of their table."""

    rows: dict[str, Rows] = field(default_factory=dict)

    def extend(self, table: str, rows: Iterable[Row]) -> None:
        """Further rows of a table."""
        self.rows.setdefault(table, []).extend(rows)

    def arrow(self) -> dict[str, pa.Table]:
        """Arrow tables; those without rows are left out."""
        return {name: _table(rows) for name, rows in self.rows.items() if rows}


def _table(rows: Rows) -> pa.Table:
    table = pa.Table.from_pylist(rows)
    if "expert" not in table.column_names:
        return table
    # Of whole numbers, also where none of the neurons is an expert's.
    place = table.column_names.index("expert")
    return table.set_column(place, "expert", table["expert"].cast(pa.int16()))


def mlp_of_rows(table: pa.Table | pa.RecordBatch) -> tuple[Ints, Ints]:
    """Layer and expert of each row [R]; tables of before there were experts have no such column."""
    layer_r: Ints = table["layer"].to_numpy().astype(np.int64)
    if "expert" not in table.schema.names:
        return layer_r, np.full(len(layer_r), NO_EXPERT, np.int64)
    return layer_r, pc.fill_null(table["expert"].cast(pa.int64()), NO_EXPERT).to_numpy()


def expert_or_none(expert: int) -> int | None:
    """An expert as tables have it."""
    return None if expert == NO_EXPERT else expert

"""The tables of a study while they are made: rows, which become Arrow tables where they are stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

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
        return {name: pa.Table.from_pylist(rows) for name, rows in self.rows.items() if rows}

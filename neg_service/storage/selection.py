"""What a reader gets of a table: a pyarrow Dataset over chosen parts and columns, with every page checked.

Apart from `reader.py`, because pyarrow's datasets take long to load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from neg_service.errors import ConfigurationError, one_line

CHECKED = pads.ParquetFileFormat(
    default_fragment_scan_options=pads.ParquetFragmentScanOptions(page_checksum_verification=True, pre_buffer=True)
)


class Selection(pads.FileSystemDataset):  # type: ignore[misc]
    """A Dataset of which some columns are shown; pyarrow keeps a filter in a Dataset, but no choice of columns.

    It scans as one. To sort or join, rows are read first, because pyarrow does both below the choice of columns.
    """

    shown: list[str] | None = None
    # Columns that the parts call otherwise: present names, with the stored ones.
    stored: Mapping[str, str] = MappingProxyType({})

    @classmethod
    def of(
        cls,
        fragments: list[pads.Fragment],
        schema: pa.Schema,
        columns: Sequence[str] | None,
        filter: pc.Expression | None,
        stored: Mapping[str, str] = MappingProxyType({}),
    ) -> pads.Dataset:
        """All rows of the fragments that pass the filter; `stored`: columns that the fragments call otherwise."""
        for column in columns or ():
            if column not in schema.names:
                raise ConfigurationError(f"there is no column {column!r}; there are {', '.join(schema.names)}")
        as_stored = pa.schema([own.with_name(stored.get(own.name, own.name)) for own in schema], schema.metadata)
        dataset = cls(fragments, as_stored, CHECKED)
        dataset.shown, dataset.stored = list(columns) if columns is not None else None, dict(stored)
        if filter is None:
            return dataset
        filtered = dataset.filter(filter)
        try:
            # Nothing is read, but the filter's columns are looked for.
            filtered.scanner()
            return filtered
        except pa.ArrowInvalid as error:
            if any(name in str(filter) for name in stored):
                raise ConfigurationError(
                    f"this run was stored with other names of columns, by which it is filtered: {dict(stored)}",
                    setting="filter",
                    value=filter,
                ) from error
            raise ConfigurationError(one_line(error), setting="filter", value=filter) from error

    @property
    def schema(self) -> pa.Schema:
        """Of the columns that are shown."""
        own, present = super().schema, {before: now for now, before in self.stored.items()}
        own = pa.schema([column.with_name(present.get(column.name, column.name)) for column in own], own.metadata)
        return own if self.shown is None else pa.schema([own.field(name) for name in self.shown], own.metadata)

    def filter(self, expression: pc.Expression) -> pads.Dataset:
        """As pyarrow's; the choice of columns stays."""
        filtered = super().filter(expression)
        filtered.shown, filtered.stored = self.shown, self.stored
        return filtered

    def sort_by(self, sorting: Any, **options: Any) -> pads.Dataset:
        """As pyarrow's."""
        return pads.InMemoryDataset(self.to_table()).sort_by(sorting, **options)

    def join(self, right_dataset: pads.Dataset, *arguments: Any, **options: Any) -> pads.Dataset:
        """As pyarrow's."""
        return pads.InMemoryDataset(self.to_table()).join(right_dataset, *arguments, **options)

    def scanner(self, columns: Any = None, **options: Any) -> pads.Scanner:
        """As pyarrow's; no columns are those that are shown."""
        asked = self.shown if columns is None else columns
        if self.stored and not isinstance(asked, dict):
            asked = {name: pc.field(self.stored.get(name, name)) for name in asked or self.schema.names}
        return super().scanner(columns=asked, **options)

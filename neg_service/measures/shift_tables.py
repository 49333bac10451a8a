"""Edits in a table of shifts, as a scan with the measure `control` leaves it: one for each prompt, target and wish.

An edit is named by these three, and adds to each neuron what the table says. A run that kept the strongest shifts alone
has edits of these alone.
"""

from __future__ import annotations

from typing import Any

from neg_service.contents import parquet_batches, parquet_of
from neg_service.errors import ConfigurationError
from neg_service.inputs import parts_of_input, suffix_of
from neg_service.places import without_credentials
from neg_service.storage.parts import damage_of

_COLUMNS = ("prompt_id", "target", "wish", "layer", "expert", "neuron", "shift")


def edits_in(source: str) -> list[dict[str, Any]] | None:
    """The edits of a folder of `.parquet` files with the columns of `control_shift`, in their order; None of a file.

    Raises:
        ConfigurationError: it cannot be read or is damaged, has other columns, or no rows.
    """
    where = f"measure.edits={without_credentials(source)}"
    edits: dict[tuple[str, str, int], dict[str, Any]] = {}
    for name, content in parts_of_input("measure.edits", source):
        part = name.rpartition("/")[2]
        place = where if where.endswith(part) else f"{where.rstrip('/')}/{part}"
        if suffix_of(name) != ".parquet":
            return None
        file = parquet_of(place, content)
        missing = [column for column in _COLUMNS if column not in file.schema_arrow.names]
        if missing:
            raise ConfigurationError(f"has no column {missing[0]!r}, as a table control_shift has", given=place)
        if (damage := damage_of(part, content)) is not None:
            raise ConfigurationError(f"is {damage}", given=place)
        for batch in parquet_batches(place, file, list(_COLUMNS)):
            for row in batch.to_pylist():
                key = (row["prompt_id"], row["target"], row["wish"])
                edit = edits.setdefault(key, {"name": " ".join(map(str, key)), "neurons": [], "add": []})
                neuron = [row["layer"], row["neuron"]]
                edit["neurons"].append(neuron if row["expert"] is None else [*neuron, row["expert"]])
                edit["add"].append(row["shift"])
    if not edits:
        raise ConfigurationError(
            "has no rows of shifts; it must be a table control_shift, or a .json or .jsonl file", given=where
        )
    return list(edits.values())

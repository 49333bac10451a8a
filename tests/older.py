"""Runs as an earlier version left them: neurons as text in run.json, and tables without a column `expert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from neg_service.storage.neurons import NEURONS_FILE
from neg_service.storage.objects import LocalStore
from neg_service.storage.parts import encode_part, shard_of
from neg_service.storage.run import _schema_to_json, put_run_file, read_run_file, schema_from_json


def made_older(place: Path) -> dict[str, Any]:
    """Turn a run into one of before; its run.json."""
    store = LocalStore(place)
    content = read_run_file(store)
    if "neurons" in content:
        pairs = pq.read_table(place / NEURONS_FILE).select(["layer", "neuron"]).to_pydict()
        content["request"]["neurons"]["list"] = [list(pair) for pair in zip(*pairs.values(), strict=True)]
        del content["neurons"]
        store.delete(NEURONS_FILE)
    content["about"].get("model", {}).pop("experts_a_layer", None)
    for name, told in content["tables"].items():
        content["tables"][name] = _schema_to_json(name, without_expert(schema_from_json(told)))
    for entry in store.list(""):
        if (shard := shard_of(entry.key)) is not None:
            table = pq.read_table(place / entry.key)
            table = table.select(without_expert(table.schema).names)
            store.put(entry.key, encode_part(entry.key.partition("/")[0], table, content["fingerprint"], shard))
    put_run_file(store, {key: value for key, value in content.items() if key != "sha256"})
    return read_run_file(store)


def without_expert(schema: pa.Schema) -> pa.Schema:
    """The schema as it was."""
    return pa.schema([field for field in schema if field.name != "expert"], schema.metadata)

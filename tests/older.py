"""Runs as earlier versions left them: neurons as text, tables without a column `expert`, former names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from neg_service.former_names import COLUMNS, ENGINES, FAILED_FOLDER, MEASURES
from neg_service.storage.neurons import NEURONS_FILE
from neg_service.storage.objects import LocalStore
from neg_service.storage.parts import encode_part, part_key, shard_of
from neg_service.storage.run import (
    FAILED,
    _schema_to_json,
    fingerprint_of,
    put_run_file,
    read_run_file,
    schema_from_json,
)


def made_older(place: Path) -> dict[str, Any]:
    """Turn a run into one of before; its run.json."""
    store = LocalStore(place)
    content = read_run_file(store)
    if "neurons" in content:
        pairs = pq.read_table(place / NEURONS_FILE).select(["layer", "neuron"]).to_pydict()
        content["request"]["neurons"]["list"] = [list(pair) for pair in zip(*pairs.values(), strict=True)]
        del content["neurons"]
        store.delete(NEURONS_FILE)
    for name in ("experts_a_layer", "layer_neurons"):
        content["about"].get("model", {}).pop(name, None)
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


def under_former_names(place: Path) -> dict[str, Any]:
    """Turn a run into one of before schema 4: an older one, with the names that things had then; its run.json."""
    made_older(place)
    store = LocalStore(place)
    content = read_run_file(store)
    before = {now: former for former, now in MEASURES.items()}
    content["identity"]["schema_version"] = 3
    content["identity"]["measure"]["name"] = before.get(*2 * (content["identity"]["measure"]["name"],))
    engines = {now: former for former, now in ENGINES.items()}
    content["about"]["engine"] = engines[content["about"]["engine"]]
    content["fingerprint"] = fingerprint_of(content["identity"])
    tables = {}
    for name, told in content["tables"].items():
        columns = {now: former for former, now in COLUMNS.get(name, {}).items()}
        own = schema_from_json(told)
        metadata = {key: _replaced(value, columns) for key, value in (own.metadata or {}).items()}
        own = pa.schema([field.with_name(columns.get(field.name, field.name)) for field in own], metadata)
        stored = before.get(name, name)
        tables[stored] = _schema_to_json(stored, own)
        for entry in store.list(name):
            shard = shard_of(entry.key)
            assert shard is not None
            table = pq.read_table(place / entry.key).rename_columns(own.names)
            store.delete(entry.key)
            store.put(part_key(stored, shard), encode_part(stored, table, content["fingerprint"], shard))
    content["tables"] = tables
    for entry in store.list(FAILED):
        store.put(entry.key.replace(FAILED, FAILED_FOLDER, 1), store.get(entry.key) or b"")
        store.delete(entry.key)
    put_run_file(store, {key: value for key, value in content.items() if key != "sha256"})
    return read_run_file(store)


def _replaced(value: bytes, names: dict[str, str]) -> bytes:
    for now, former in names.items():
        value = value.replace(f'"values": "{now}"'.encode(), f'"values": "{former}"'.encode())
    return value

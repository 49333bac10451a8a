"""Runs as tables of a real Iceberg catalogue, in SQLite, on a disk; on an S3 server: `tests/infra`."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyiceberg.catalog.sql import SqlCatalog, SqlCatalogBaseTable

import neg_service
from jobs.catalogue import CatalogueConfig, catalogue
from jobs.entry import composed
from neg_service import schema
from neg_service.errors import ConfigurationError, DestinationError
from neg_service.measures.control.tables import CONTROL, CONTROL_SHIFT, CONTROL_SIDE_EFFECTS
from neg_service.storage.catalogue import identifier_of, register_run
from neg_service.storage.objects import LocalStore
from neg_service.storage.parts import encode_part, part_key
from neg_service.storage.run import write_or_match
from tests.catalogues import Place, counts, require_same_rows, run_recipe
from tests.refusals import refused
from tests.storage.conftest import TABLES, begin, identity, put, tables_of


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_run_that_grows_adds_what_is_new_and_every_reader_has_its_rows(tmp_path: Path, place: Place) -> None:
    run = begin(tmp_path / "Tiny run-1")
    put(run, 0)
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "Tiny run-1").rglob("*"))
    assert counts(place.register(run.store.uri)) == {(1, 0, 0, 1)}
    # Nothing was written there.
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "Tiny run-1").rglob("*")) == before
    put(run, 1, 2)
    grown = place.register(run.store.uri)
    assert counts(grown) == {(2, 0, 0, 3)}
    assert [one.identifier for one in grown.tables] == [f"neg.tiny_run_1_{name}" for name in TABLES]
    n_snapshots = len(place.open().load_table("neg.tiny_run_1_neurgrad").snapshots())
    assert counts(place.register(run.store.uri)) == {(0, 0, 0, 3)}
    assert len(place.open().load_table("neg.tiny_run_1_neurgrad").snapshots()) == n_snapshots == 2
    require_same_rows(place.open(), run.store.uri, grown)


def test_a_part_that_was_written_anew_takes_the_place_of_what_was_known_of_it(tmp_path: Path, place: Place) -> None:
    run = begin(tmp_path / "run")
    put(run, 0, 1)
    place.register(run.store.uri)
    key, other = part_key("neurgrad", 1), tables_of(1)["neurgrad"]
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.full(4 * 8, 7, np.float32)), 4)
    other = other.set_column(other.schema.get_field_index("neurgrad"), other.schema.field("neurgrad"), values)
    run.store.put(key, encode_part("neurgrad", other, run.fingerprint, 1))
    done = place.register(run.store.uri)
    assert [(one.added, one.replaced, one.removed) for one in done.tables] == [(0, 0, 0), (0, 0, 0), (0, 1, 0)]
    require_same_rows(place.open(), run.store.uri, done)


def test_a_shard_that_is_not_whole_is_left_out_and_taken_out(tmp_path: Path, place: Place) -> None:
    run = begin(tmp_path / "run")
    put(run, 0, 1, 2)
    place.register(run.store.uri)
    run.store.delete(part_key("activations", 0))
    assert counts(place.register(run.store.uri)) == {(0, 0, 1, 2)}
    # Another shard's part, which is whole; and one that breaks off.
    run.store.put(part_key("neurgrad", 1), run.store.get(part_key("neurgrad", 2)) or b"")
    run.store.put(part_key("prompts", 2), b"PAR1 and no more")
    put(run, 0)
    done = place.register(run.store.uri)
    assert set(done.left_out) == {1, 2}
    assert "shard 2 in the place of 1" in done.left_out[1]
    assert counts(done) == {(1, 0, 2, 1)}
    put(run, 1, 2)
    assert counts(place.register(run.store.uri)) == {(2, 0, 0, 3)}


def test_what_is_damaged_within_is_left_out_if_every_byte_is_read(tmp_path: Path, place: Place) -> None:
    run = begin(tmp_path / "run")
    put(run, 0, 1)
    file = tmp_path / "run" / part_key("neurgrad", 1)
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    arguments = [f"run={tmp_path}/run", *(f"catalogue.{key}={value}" for key, value in place.given.items())]
    assert catalogue(composed("catalogue", arguments, CatalogueConfig)) == 0
    assert catalogue(composed("catalogue", [*arguments, "check=true"], CatalogueConfig)) == 3
    assert place.open().load_table("neg.run_neurgrad").scan().count() == 8


def test_keys_with_odd_characters_are_found_on_a_disk(tmp_path: Path, place: Place) -> None:
    run = begin(tmp_path / "a b#c%20d;e?f=g")
    put(run, 0)
    require_same_rows(place.open(), run.store.uri, place.register(run.store.uri))


def test_two_registrations_at_once_add_each_part_once(tmp_path: Path, place: Place) -> None:
    run = begin(tmp_path / "run")
    put(run, 0, 1, 2)
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: place.register(run.store.uri), range(3)))
    for name in range(len(TABLES)):
        assert sum(one.tables[name].added for one in done) == 3
        assert {one.tables[name].n_rows for one in done} == {done[0].tables[name].n_rows}
    require_same_rows(place.open(), run.store.uri, done[0])


@pytest.mark.parametrize("made", ["tables of the data base", "namespace"])
def test_what_another_registration_makes_first_is_used(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    """Between a look and what it decides, another one makes the same: the data base refuses the second in earnest."""
    run, seen = begin(tmp_path / "run"), []
    put(run, 0)
    create_tables, namespace_exists = SqlCatalog.create_tables, SqlCatalog.namespace_exists

    def make_twice(catalogue: SqlCatalog) -> None:
        create_tables(catalogue)
        if not seen:
            seen.append(made)
            SqlCatalogBaseTable.metadata.create_all(catalogue.engine, checkfirst=False)

    def look_too_early(catalogue: SqlCatalog, identifier: str) -> bool:
        if seen:
            return namespace_exists(catalogue, identifier)
        seen.append(made)
        catalogue.create_namespace(identifier)
        return False

    if made == "namespace":
        monkeypatch.setattr(SqlCatalog, "namespace_exists", look_too_early)
    else:
        monkeypatch.setattr(SqlCatalog, "create_tables", make_twice)
    done = place.register(run.store.uri)
    assert seen == [made]
    require_same_rows(place.open(), run.store.uri, done)


def test_a_table_that_holds_something_else_stays_as_it_is(tmp_path: Path, place: Place) -> None:
    run = begin(tmp_path / "run")
    put(run, 0)
    name = "neg.run_prompts"
    place.open().create_namespace("neg")
    place.open().create_table(name, pa.schema([("x", pa.int32())]))
    with refused(DestinationError, None, says=f"{name} that is not of .*/run; drop it"):
        place.register(run.store.uri)
    place.open().drop_table(name)
    place.register(run.store.uri)
    table = place.open().load_table(name)
    with table.update_schema() as change:
        change.add_column("added", table.schema().find_type("prompt"))
    put(run, 1)
    # A column that parts lack is null in them.
    assert counts(place.register(run.store.uri)) == {(1, 0, 0, 2)}
    with place.open().load_table(name).update_schema(allow_incompatible_changes=True) as change:
        change.delete_column("answer")
    put(run, 2)
    with refused(DestinationError, None, says="no column answer"):
        place.register(run.store.uri)
    other = begin(tmp_path / "elsewhere" / "run", dtype="float64")
    put(other, 0)
    with refused(DestinationError, None, says="not of .*elsewhere/run"):
        place.register(other.store.uri)


def test_what_cannot_be_used_is_told_in_one_line(tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path / "run")
    put(run, 0)
    uri = run.store.uri
    monkeypatch.setenv("MY_TOKEN", "abcdefgh1234")
    with refused(ConfigurationError, "catalogue.uri", says="Connection refused"):
        register_run(uri, uri="http://127.0.0.1:9/abcdefgh1234")
    with refused(ConfigurationError, "catalogue.uri", says="no folder .*nowhere; a full path follows four slashes"):
        register_run(uri, uri=f"sqlite:///{tmp_path}/nowhere/x.db", warehouse=str(tmp_path))
    with refused(ConfigurationError, "catalogue.uri", "ftp://x", says="sqlite:////PATH.db"):
        register_run(uri, uri="ftp://x")
    with refused(ConfigurationError, "catalogue.uri", says="give catalogue.warehouse"):
        register_run(uri, uri=place.given["uri"])
    with refused(ConfigurationError, "catalogue.uri", says="holds credentials") as caught:
        register_run(uri, uri="postgresql://me:hidden@host/db")
    assert "hidden" not in str(caught.value)
    with refused(ConfigurationError, "catalogue.namespace", "a b"):
        place.register(uri, namespace="a b")
    with refused(DestinationError, says="no run.json"):
        place.register(tmp_path / "nowhere")


def test_who_lacks_the_extra_is_told_its_name(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    code = (
        f"import sys; sys.modules['pyiceberg'] = None; import neg_service; neg_service.register_run({run.store.uri!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ConfigurationError: a catalogue needs the extra `catalogue`" in done.stderr


N = 4
EVERY = {
    **schema.with_messages({"prompts": schema.PROMPTS}),
    "routing": schema.ROUTING,
    "neurgrad": schema.neurgrad(N),
    # Layers of several sizes, and another readout.
    "neurgrad_of_readout": schema.neurgrad([3, 4], is_of_probability=False),
    "integrated_gradients": schema.integrated_gradients(N),
    "gradient": schema.baseline("gradient", N),
    "activations": schema.activations(N),
    "top_neurons": schema.top_neurons(),
    "positions": schema.POSITIONS,
    "sweep": schema.sweep(5, has_experts=True),
    "sweep_of_readout": schema.sweep(None, is_of_probability=False),
    "aggregate_importance": schema.aggregate_importance(N),
    "intervene": schema.intervene(has_experts=True),
    "skill_scores": schema.skill_scores(N),
    "neuron_predictions": schema.NEURON_PREDICTIONS,
    "control": CONTROL,
    "control_shift": CONTROL_SHIFT,
    "control_side_effects": CONTROL_SIDE_EFFECTS,
}


def value_of(kind: pa.DataType, row: int) -> Any:
    """Some value of a type."""
    if pa.types.is_struct(kind):
        return {own.name: value_of(own.type, row) for own in kind}
    if pa.types.is_fixed_size_list(kind):
        return [value_of(kind.value_type, row + i) for i in range(kind.list_size)]
    if pa.types.is_list(kind):
        return [value_of(kind.value_type, row + i) for i in range(row % 3)]
    if pa.types.is_string(kind):
        return f"s{row}"
    return bool(row % 2) if pa.types.is_boolean(kind) else row / 4 if pa.types.is_floating(kind) else row


def rows_of(own: pa.Schema, shard: int) -> pa.Table:
    """Three rows; the last has no value wherever there need be none."""
    rows = [
        {one.name: None if one.nullable and i == 2 else value_of(one.type, 3 * shard + i) for one in own}
        for i in range(3)
    ]
    return pa.Table.from_pylist(rows, own)


def made_of(folder: Path, tables: dict[str, pa.Schema]) -> str:
    """A run with these tables."""
    run = write_or_match(LocalStore(folder), identity(), tables, {})
    for shard in range(2):
        for name, own in tables.items():
            run.store.put(part_key(name, shard), encode_part(name, rows_of(own, shard), run.fingerprint, shard))
    return run.store.uri


def test_every_table_that_there_is_can_be_registered_and_read(tmp_path: Path, place: Place) -> None:
    uri = made_of(tmp_path / "run", EVERY)
    done = place.register(uri)
    assert {one.name: one.n_rows for one in done.tables} == dict.fromkeys(EVERY, 6)
    run, opened = neg_service.open_run(uri), place.open()
    for name, own in EVERY.items():
        found = opened.load_table(identifier_of(run, name)).scan().to_arrow().cast(own.remove_metadata()).to_pylist()
        expected = run.table(name).to_table().to_pylist()
        assert sorted(map(str, found)) == sorted(map(str, expected)), name


def test_a_type_that_iceberg_lacks_is_named(tmp_path: Path, place: Place) -> None:
    run = write_or_match(LocalStore(tmp_path / "run"), identity(), {"own": pa.schema([("x", pa.duration("s"))])}, {})
    with refused(ConfigurationError, None, says="table 'own' cannot be registered: .*unsupported type: duration"):
        place.register(run.store.uri)


def test_what_has_many_equal_texts_is_read_as_texts(tmp_path: Path, place: Place) -> None:
    own = pa.schema([("x", pa.dictionary(pa.int8(), pa.string()))])
    run = write_or_match(LocalStore(tmp_path / "run"), identity(), {"own": own}, {})
    table = pa.table({"x": pa.array(["a", "b", "a"]).dictionary_encode().cast(own.field("x").type)}, own)
    run.store.put(part_key("own", 0), encode_part("own", table, run.fingerprint, 0))
    place.register(run.store.uri)
    assert place.open().load_table("neg.run_own").scan().to_arrow()["x"].to_pylist() == ["a", "b", "a"]


def test_half_precision_is_widened(tmp_path: Path, place: Place) -> None:
    uri = made_of(tmp_path / "run", {"own": pa.schema([("x", pa.list_(pa.float16(), 2))])})
    place.register(uri)
    assert place.open().load_table("neg.run_own").scan().to_arrow().schema.field("x").type.value_type == pa.float32()


def test_the_recipe_runs_as_it_stands(tmp_path: Path, place: Place) -> None:
    run = begin(tmp_path / "run")
    put(run, 0, 1, 2)
    names = run_recipe(run.store.uri, None, place)
    assert counts(names["done"]) == {(3, 0, 0, 3)}
    assert names["frame"].height == names["rows"][0][0] == names["table"].num_rows == 12

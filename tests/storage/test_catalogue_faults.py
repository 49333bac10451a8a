"""Registrations in a catalogue where something is damaged, late, secret or mistyped."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import neg_service
from jobs.catalogue import CatalogueConfig, catalogue, describe
from jobs.entry import composed
from neg_service.errors import ConfigurationError
from neg_service.redaction import without_secrets
from neg_service.storage import catalogue as storage_catalogue
from neg_service.storage import catalogue_access
from neg_service.storage.catalogue import register_run
from neg_service.storage.objects import LocalStore
from neg_service.storage.parts import part_key
from neg_service.storage.reader import Run
from tests.catalogues import Place, counts
from tests.refusals import refused
from tests.storage.conftest import TABLES, begin, put

KEY = part_key("neurgrad", 1)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def footers_of(file: Path, n: int) -> list[bytes]:
    """The file with one bit of its footer turned, at n places over all of it."""
    good = file.read_bytes()
    length = int.from_bytes(good[-8:-4], "little")
    start, found = len(good) - 8 - length, []
    for at in range(start, start + length, length // n):
        data = bytearray(good)
        data[at] ^= 4
        found.append(bytes(data))
    return found


def test_a_damaged_footer_never_stops_a_registration(tmp_path: Path, place: Place) -> None:
    run = begin(tmp_path / "run")
    put(run, 0, 1)
    file = tmp_path / "run" / KEY
    problems = set()
    for index, data in enumerate(footers_of(file, 8)):
        file.write_bytes(data)
        done = Place(tmp_path / "1").register if index == 0 else place.register
        (tmp_path / "1").mkdir(exist_ok=True)
        problems |= {problem.partition("damaged: ")[2][:20] for problem in done(run.store.uri).left_out.values()}
    assert len(problems) > 2


def test_a_number_of_rows_that_was_damaged_is_not_taken(tmp_path: Path, place: Place) -> None:
    run = begin(tmp_path / "run")
    put(run, 0, 1)
    file = tmp_path / "run" / KEY
    good, flipped = file.read_bytes(), 0
    start = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    true = pq.read_metadata(file).num_rows
    for at in range(start, len(good) - 8):
        data = bytearray(good)
        data[at] ^= 4
        file.write_bytes(data)
        try:
            if pq.read_metadata(file).num_rows != true:
                flipped += 1
                break
        except (OSError, ValueError):
            continue
    assert flipped == 1
    done = place.register(run.store.uri)
    assert set(done.left_out) == {1}
    assert "rows" in done.left_out[1]


def test_what_was_registered_meanwhile_is_not_taken_out(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(tmp_path / "run")
    put(run, 0)
    early, real = neg_service.open_run(run.store.uri), Run.snapshot
    looks: list[Any] = []

    def snapshot(self: Run) -> Any:
        found = real(self)
        looks.append(found)
        if self is early and len([one for one in looks if one is not None]) == 1:
            put(run, 1, 2)
            place.register(run.store.uri)
        return found

    monkeypatch.setattr(Run, "snapshot", snapshot)
    assert counts(place.register(early)) == {(0, 0, 0, 3)}


def test_a_check_judges_what_is_done_as_it_was_when_it_was_read(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(tmp_path / "run")
    put(run, 0, 1, 2)
    tables = list(TABLES)
    run.store.delete(part_key(tables[-1], 2))
    # A shard under way is not damaged.
    assert not place.register(run.store.uri, check=True).left_out
    whole, key = run.store.get(part_key(tables[0], 1)) or b"", part_key(tables[0], 1)
    run.store.put(key, whole[:40] + b"xxxx" + whole[44:])
    checked = storage_catalogue.verify

    def mended_meanwhile(*given: Any, **more: Any) -> Any:
        found = checked(*given, **more)
        run.store.put(key, whole)
        monkeypatch.setattr(storage_catalogue, "verify", checked)
        place.register(run.store.uri)
        return found

    monkeypatch.setattr(storage_catalogue, "verify", mended_meanwhile)
    done = place.register(run.store.uri, check=True)
    assert set(done.left_out) == {1}
    assert {one.removed for one in done.tables} == {0}
    assert place.open().load_table(done.tables[0].identifier).scan().count() == done.tables[0].n_rows > 0


def test_a_part_that_stands_in_a_table_twice_is_put_anew(tmp_path: Path, place: Place) -> None:
    run = begin(tmp_path / "run")
    put(run, 0, 1)
    n_rows = place.register(run.store.uri).tables[-1].n_rows
    table = place.open().load_table("neg.run_neurgrad")
    table.add_files([next(iter(table.scan().plan_files())).file.file_path], check_duplicate_files=False)
    assert place.open().load_table("neg.run_neurgrad").scan().count() > n_rows
    done = place.register(run.store.uri).tables[-1]
    assert (done.added, done.replaced, done.n_rows) == (0, 1, n_rows)
    assert place.open().load_table("neg.run_neurgrad").scan().count() == n_rows


def test_engines_are_told_to_keep_the_files_and_a_copy_tells_that_the_place_changed(
    tmp_path: Path, place: Place
) -> None:
    run = begin(tmp_path / "run")
    put(run, 0)
    assert not place.register(run.store.uri).former_places
    assert place.open().load_table("neg.run_prompts").properties["gc.enabled"] == "false"
    shutil.copytree(tmp_path / "run", tmp_path / "copy" / "run")
    done = place.register(LocalStore(tmp_path / "copy" / "run").uri)
    assert done.former_places == [run.store.uri]
    assert f"before, the tables read from {run.store.uri}" in describe(done)


def test_secrets_do_not_stand_in_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2\n")
    assert without_secrets("Invalid header 'Bearer hunter2hunter2\\n' hunter2hunter2") == (
        "Invalid header 'Bearer ***\\n' ***"
    )
    monkeypatch.delenv("MY_TOKEN")
    run = begin(tmp_path / "run")
    for uri in (
        "https://127.0.0.1:9?token=hidden1234",
        "http://127.0.0.1:9/x#token=hidden1234",
        "http://[::1?api_key=hidden1234",
        "http://h:99999/x#hidden1234",
        "mysql://h/db?passwd=hidden1234",
        "postgresql:///db?sslpassword=hidden1234&nosuch=1",
        "postgresql://me:hidden1234@h/db",
    ):
        with refused(ConfigurationError, "catalogue.uri") as caught:
            register_run(run.store.uri, uri=uri, warehouse=str(tmp_path))
        assert "hidden1234" not in str(caught.value)
        assert "AWS" not in str(caught.value)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_access, "_SECONDS", (0.3, 0.3))
    run = begin(tmp_path / "run")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with refused(ConfigurationError, "catalogue.uri", says="timed out"):
            register_run(run.store.uri, uri=uri)


def test_what_is_mistyped_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place
) -> None:
    run = begin(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for uri, says in [
        ("foo", "must be a URI"),
        ("mysql://h/db", "its type is not known"),
        ("sqlite:///nodir/x.db", "no folder nodir; .*four slashes"),
    ]:
        with (
            refused(ConfigurationError, "catalogue.uri", uri, says=says)
            if uri != "foo"
            else pytest.raises(ConfigurationError, match=says)
        ):
            register_run(run.store.uri, uri=uri, warehouse="w")
    with refused(ConfigurationError, "catalogue.name", "prod", says="PYICEBERG_CATALOG__PROD__URI"):
        register_run(run.store.uri, name="prod")
    with refused(ConfigurationError, "catalogue.uri", says=r"give catalogue\.warehouse"):
        register_run(run.store.uri, uri="sqlite:///new.db")
    assert not (tmp_path / "new.db").exists()
    for argument, key in [("catalogue.namespace=null", "namespace"), ("catalogue=null", "catalogue")]:
        with pytest.raises(ConfigurationError, match=key):
            catalogue(composed("catalogue", [f"run={run.store.uri}", argument], CatalogueConfig))


def test_a_warehouse_of_a_catalogue_that_is_configured_stays_a_name(tmp_path: Path) -> None:
    def warehouse(uri: str | None) -> str | None:
        return catalogue_access.Access.checked(None, uri, "name", None).warehouse

    assert warehouse(None) == warehouse("https://host") == "name"
    assert warehouse(f"sqlite:///{tmp_path}/x.db") == str(Path("name").absolute())


def test_a_configuration_that_is_no_yaml_is_told_in_one_line(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    (tmp_path / ".pyiceberg.yaml").write_text("catalog:\n\tdefault: x\n")
    code = f"import neg_service; neg_service.register_run({run.store.uri!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "ConfigurationError: pyiceberg's configuration, .pyiceberg.yaml, cannot be read" in done.stderr


def test_a_manifest_that_is_damaged_is_told_in_one_line(tmp_path: Path, place: Place) -> None:
    run = begin(tmp_path / "run")
    put(run, 0)
    place.register(run.store.uri)
    for file in (tmp_path / "warehouse").rglob("*.avro"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
        file.write_bytes(data)
    with refused(ConfigurationError, "catalogue.uri", says="cannot be used"):
        place.register(run.store.uri)

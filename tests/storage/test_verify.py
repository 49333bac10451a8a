"""Verify and status: what is wrong is named for what it is, and what is right is called clean."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import neg_service
from jobs.status import describe
from neg_service.errors import DestinationError, StorageError
from neg_service.storage.objects import LocalStore
from neg_service.storage.parts import encode_part, part_key, problem_of
from neg_service.storage.retries import RetryingStore
from neg_service.storage.run import RUN_COPY, RUN_FILE, RunDirectory, note, put_run_file, rewrite_copy
from neg_service.storage.status import status_of
from neg_service.storage.stores import open_store
from neg_service.storage.verify import clear_wrong, restore_run_file, verify
from tests.refusals import refused
from tests.storage.conftest import N_SHARDS, TABLES, begin, put, tables_of


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A finished run."""
    begun = begin(tmp_path / "run")
    put(begun, *range(N_SHARDS))
    return begun


def found(run: RunDirectory) -> list[str]:
    """All that is wrong."""
    return [str(finding) for finding in verify(run.store).findings]


def test_a_quiet_run_is_clean_and_every_part_is_read(run: RunDirectory) -> None:
    heard: list[tuple[int, int]] = []
    verdict = verify(run.store, lambda done, of: heard.append((done, of)))
    assert verdict.is_clean
    assert heard == [(i, 9) for i in range(1, 10)]
    assert verdict.n_bytes == sum(entry.size for entry in run.store.list("") if entry.key.endswith(".parquet"))


def test_every_flipped_bit_of_a_part_is_noticed() -> None:
    data = encode_part("neurgrad", tables_of(0)["neurgrad"], "f", 0)
    assert problem_of(data, "neurgrad", 0, "f", TABLES["neurgrad"]) is None
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        assert problem_of(bytes(flipped), "neurgrad", 0, "f", TABLES["neurgrad"]) is not None, at
    for length in range(0, len(data), 7):
        assert "damaged" in (problem_of(data[:length], "neurgrad", 0, "f", TABLES["neurgrad"]) or ""), length
    assert "damaged" in (problem_of(data + b"x", "neurgrad", 0, "f", TABLES["neurgrad"]) or "")


def test_a_part_of_something_else_is_foreign_however_whole_it_is(run: RunDirectory) -> None:
    table = tables_of(1)["neurgrad"]
    for name, fingerprint, shard, expected in (
        ("neurgrad", "another", 1, f"fingerprint another in the place of {run.fingerprint}"),
        ("activations", run.fingerprint, 1, "table activations in the place of neurgrad"),
        ("neurgrad", run.fingerprint, 2, "shard 2 in the place of 1"),
    ):
        run.store.put(part_key("neurgrad", 1), encode_part(name, table, fingerprint, shard))
        assert found(run) == [f"neurgrad/shard-000001.parquet: foreign: {expected}"]
        assert verify(run.store).shards_to_repair == {1}


def test_other_columns_than_the_tables_are_damage(run: RunDirectory) -> None:
    table = tables_of(0)["neurgrad"].drop_columns(["probability"])
    run.store.put(part_key("neurgrad", 0), encode_part("neurgrad", table, run.fingerprint, 0))
    assert found(run) == ["neurgrad/shard-000000.parquet: damaged: its columns are not those of the table"]


def test_a_file_that_another_tool_wrote_is_foreign(run: RunDirectory, tmp_path: Path) -> None:

    pq.write_table(tables_of(0)["prompts"], tmp_path / "run" / part_key("prompts", 0))
    assert found(run) == ["prompts/shard-000000.parquet: foreign: it says nothing of a run"]


def test_parts_that_are_missing_are_named_and_shards_of_which_nothing_is_there_are_not_done(run: RunDirectory) -> None:
    for name in TABLES:
        run.store.delete(part_key(name, 2))
    run.store.delete(part_key("activations", 0))
    verdict = verify(run.store)
    assert [str(finding) for finding in verdict.findings] == ["activations/shard-000000.parquet: missing"]
    assert verdict.not_done == [2]
    assert verdict.shards_to_repair == {0, 2}
    # Whoever continues the run sees the same.
    assert run.done() == {1}


@pytest.mark.parametrize("key", ["tables", "about", "request", "identity", "fingerprint"])
def test_run_json_edited_anywhere_is_named_refused_and_restored(key: str, run: RunDirectory) -> None:
    before = run.store.get(RUN_FILE)
    assert before is not None
    edited = json.loads(before)
    edited[key] = "another" if key == "fingerprint" else {**edited[key], "more": 1}
    run.store.put(RUN_FILE, json.dumps(edited).encode())
    with refused(DestinationError, setting=None, says=r"run\.json was changed after it was written"):
        neg_service.open_run(run.store.uri)
    verdict = verify(run.store)
    assert [str(finding) for finding in verdict.findings] == ["run.json: damaged: it was changed after it was written"]
    restore_run_file(run.store, verdict)
    assert run.store.get(RUN_FILE) == before
    assert verify(run.store).is_clean


@pytest.mark.parametrize("key", [RUN_FILE, RUN_COPY])
def test_run_json_or_its_copy_lost_is_named_and_restored(key: str, run: RunDirectory, tmp_path: Path) -> None:
    before = run.store.get(key)
    run.store.delete(key)
    if key == RUN_FILE:
        with refused(
            DestinationError, setting=None, says=r"no run\.json, but run\.copy\.json is; python -m jobs\.verify"
        ):
            neg_service.open_run(run.store.uri)
    assert found(run) == [f"{key}: missing"]
    restore_run_file(run.store, verify(run.store))
    assert run.store.get(key) == before
    # The same command restores run.json too.
    run.store.delete(RUN_FILE)
    begin(tmp_path / "run")
    assert verify(run.store).is_clean


def test_both_lost_and_the_same_command_takes_the_parts_for_its_own(run: RunDirectory, tmp_path: Path) -> None:
    # What other commands leave there does not matter, nor that a part is damaged.
    run.store.put("plots/a.png", b"plot")
    run.store.put("foreign/neurgrad/mine.parquet", b"mine")
    data = run.store.get(part_key("activations", 0)) or b""
    run.store.put(part_key("activations", 0), data[:100])
    run.store.delete(RUN_FILE)
    run.store.delete(RUN_COPY)
    with refused(DestinationError, setting=None, says=r"there is no run\.json"):
        verify(run.store)
    with refused(DestinationError, setting=None, says=r"holds activations/shard-000000\.parquet but no run\.json"):
        begin(tmp_path / "run", "bfloat16")
    begin(tmp_path / "run")
    assert [finding.key for finding in verify(run.store).findings] == [part_key("activations", 0)]


def test_both_edited_leave_nothing_to_go_by(run: RunDirectory) -> None:
    for key in (RUN_FILE, RUN_COPY):
        run.store.put(key, (run.store.get(key) or b"").replace(b"float32", b"float16"))
    with refused(DestinationError, setting=None, says=r"neither run\.json nor run\.copy\.json is as it was written"):
        verify(run.store)


def test_what_is_noted_later_is_summed_again(run: RunDirectory) -> None:
    note(run.store, {"calibration": {"noise": 1}})
    assert verify(run.store).is_clean
    assert neg_service.open_run(run.store.uri).about["calibration"] == {"noise": 1}


def test_strangers_in_the_folders_of_tables_are_moved_away(run: RunDirectory) -> None:
    run.store.put("neurgrad/mine.parquet", b"mine")
    run.store.put("neurgrad/shard-7.parquet", b"short")
    run.store.put("prompts/shard-000003.parquet", b"beyond")
    run.store.put("plots/mine.png", b"no table's")
    assert found(run) == [
        "neurgrad/mine.parquet: foreign: no part has this name",
        "neurgrad/shard-7.parquet: foreign: no part has this name",
        "prompts/shard-000003.parquet: foreign: the plan has 3 shards",
    ]
    assert clear_wrong(run.store, verify(run.store)) == [
        f"moved {key} to foreign/{key}"
        for key in ("neurgrad/mine.parquet", "neurgrad/shard-7.parquet", "prompts/shard-000003.parquet")
    ]
    assert run.store.get("foreign/neurgrad/mine.parquet") == b"mine"
    assert verify(run.store).is_clean


def test_what_is_damaged_is_deleted_so_that_any_command_computes_it_again(run: RunDirectory) -> None:
    whole = run.store.get(part_key("neurgrad", 1)) or b""
    run.store.put(part_key("neurgrad", 1), whole[:-1])
    run.store.put(part_key("neurgrad", 2), whole)
    assert clear_wrong(run.store, verify(run.store)) == [
        "deleted neurgrad/shard-000001.parquet",
        "moved neurgrad/shard-000002.parquet to foreign/neurgrad/shard-000002.parquet",
    ]
    assert run.done() == {0}
    assert run.store.get("foreign/neurgrad/shard-000002.parquet") == whole


def test_run_json_of_another_run_is_foreign_and_no_part_is_touched(tmp_path: Path) -> None:
    other = begin(tmp_path / "other", "bfloat16")
    mine = begin(tmp_path / f"mine-{begin(tmp_path / 'x').fingerprint}")
    put(mine, *range(N_SHARDS))
    before = mine.store.get(RUN_FILE)
    mine.store.put(RUN_FILE, other.store.get(RUN_FILE) or b"")
    verdict = verify(mine.store)
    expected = f"run.json: foreign: fingerprint {other.fingerprint} in the place of {mine.fingerprint}"
    assert [str(finding) for finding in verdict.findings] == [expected]
    restore_run_file(mine.store, verdict)
    assert mine.store.get(RUN_FILE) == before
    # In a directory of another name nothing tells which of the two it is.
    put(renamed := begin(tmp_path / "renamed"), 0)
    renamed.store.put(RUN_FILE, other.store.get(RUN_FILE) or b"")
    with refused(DestinationError, setting=None, says="delete the one that does not belong"):
        verify(renamed.store)


def test_a_part_that_cannot_be_read_is_told_in_one_line(run: RunDirectory) -> None:
    run.store.put(part_key("neurgrad", 1), b"short")
    found = status_of(neg_service.open_run(run.store.uri))
    assert re.search(r"parts cannot be read: .*python -m jobs\.verify run=", describe(found))
    assert {table.name: table.n_rows for table in found.tables} == {"prompts": 6, "activations": 12, "neurgrad": None}


def test_a_place_that_cannot_be_written_any_more_is_found_out_before_going_on(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(key: str, data: bytes) -> None:
        raise DestinationError("read-only")

    monkeypatch.setattr(run.store, "put", refuse)
    with refused(DestinationError, setting=None, says="read-only"):
        rewrite_copy(run.store)


def test_the_status_of_a_run_that_is_running_stopped_or_done(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    begun = describe(status_of(neg_service.open_run(run.store.uri)))
    assert "begun; no shard is done yet" in begun
    assert "0 of 3 done (0 %)" in begun
    put(run, 0, 1)
    run.record_failure(2, "prompt 'p4': NaN", 3)
    now = time.time()
    # Shard 0 came 20 s ago, shard 1 ten seconds ago: a shard in ten seconds.
    for shard, ago in ((0, 20), (1, 10)):
        for name in TABLES:
            os.utime(tmp_path / "run" / part_key(name, shard), (now - ago, now - ago))
    aside = status_of(neg_service.open_run(run.store.uri), now=now)
    assert (aside.done, aside.missing, aside.is_running) == ({0, 1}, set(), False)
    assert "incomplete: the rest failed" in describe(aside)
    assert "shard 2: prompt 'p4': NaN" in describe(aside)
    run.store.delete("failed/shard-000002.json")
    running = status_of(neg_service.open_run(run.store.uri), now=now)
    assert running.is_running is True
    assert running.rate == pytest.approx(0.1, rel=1e-3)
    assert running.seconds_left == pytest.approx(10, rel=1e-3)
    text = describe(running)
    assert "probably running: the newest part came 0:10 ago" in text
    assert "0.2 prompts/s, 0.1 shards/s" in text
    assert "about 0:10" in text
    sizes = {table.name: (table.n_parts, table.n_rows) for table in running.tables}
    assert sizes == {"prompts": (2, 4), "activations": (2, 8), "neurgrad": (2, 16)}
    later = status_of(neg_service.open_run(run.store.uri), now=now + 3600)
    assert "stopped, or starting: the newest part came 1:00:10 ago" in describe(later)
    assert later.seconds_left is None
    put(run, 2)
    assert "complete" in describe(status_of(neg_service.open_run(run.store.uri), count_rows=False))


def test_a_store_is_tried_again_for_as_long_as_it_was_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = LocalStore(tmp_path)
    real, failures = store.put, 2

    def put(key: str, data: bytes) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError(5, "Input/output error")
        real(key, data)

    def flaky(key: str, data: bytes) -> None:
        with store._translated():
            put(key, data)

    store.put = flaky  # type: ignore[method-assign]
    RetryingStore(store, 30).put("a", b"1")
    assert store.get("a") == b"1"
    assert caplog.text.count("Input/output error; trying again for") == 2
    failures = 10**6
    began = time.monotonic()
    with refused(StorageError, "storage.uri", says="Input/output error"):
        RetryingStore(store, 1).put("a", b"2")
    assert 1 <= time.monotonic() - began < 60
    assert isinstance(open_store(str(tmp_path), None, 5), RetryingStore)


def test_what_killed_writers_left_on_a_disk_is_swept_up_when_it_is_old(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("t/a", b"whole")
    (tmp_path / "t" / ".unfinished.b.0123").write_bytes(b"half")
    assert store.clear_unfinished() == 0
    assert store.clear_unfinished(older_than_seconds=0) == 1
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["a"]


def test_put_run_file_keeps_one_that_is_right_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path / "run")
    store = run.store
    parsed = json.loads(store.get(RUN_FILE) or b"")
    real = store.put
    done: list[str] = []

    def dies(key: str, data: bytes) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(key)
        real(key, data[: len(data) // 2])

    # Killed while the first of the two is half written, which no store here does, but a copy by hand may.
    monkeypatch.setattr(store, "put", dies)
    with pytest.raises(KeyboardInterrupt):
        put_run_file(store, {**parsed, "about": {"new": 1}})
    monkeypatch.undo()
    assert found(run) == ["run.copy.json: damaged: it was changed after it was written"]

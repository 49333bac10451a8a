"""What several drivers and readers do at one moment: notes that are all kept, and one listing for all tables."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

import pytest

from neg_service.storage.objects import Entry, LocalStore
from neg_service.storage.parts import encode_part, part_key
from neg_service.storage.reader import open_run, run_from
from neg_service.storage.run import RUN_COPY, RUN_FILE, RunDirectory, is_as_written, note, read_run_file
from neg_service.storage.status import status_of
from tests.storage.conftest import TABLES, begin, put, tables_of


class Interrupted(LocalStore):
    """A store on which another driver says its word in the middle of the first, before the n-th operation."""

    def __init__(self, root: Path, before: int) -> None:
        super().__init__(root)
        self.left = before

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            note(LocalStore(self.root), {"engine": "theirs", "cost": 1})

    def get(self, key: str) -> bytes | None:
        self._count()
        found = super().get(key)
        self._count()
        return found

    def put(self, key: str, data: bytes) -> None:
        self._count()
        super().put(key, data)
        self._count()

    def replace(self, key: str, old: bytes, new: bytes) -> bool:
        self._count()
        return super().replace(key, old, new)


@pytest.mark.parametrize("before", range(1, 7))
def test_notes_of_two_drivers_are_both_kept_whenever_the_other_speaks(before: int, tmp_path: Path) -> None:
    store = begin(tmp_path / "run").store
    interrupted = Interrupted(tmp_path / "run", before)
    note(interrupted, {"calibration": {"noise": 1}, "engine": "ours"})
    if interrupted.left > 0:
        note(store, {"engine": "theirs", "cost": 1})
    about = read_run_file(store)["about"]
    assert about["calibration"] == {"noise": 1}
    assert about["cost"] == 1
    assert store.get(RUN_COPY) == store.get(RUN_FILE)
    # Who comes first is believed: all of the run is told the same.
    assert about["engine"] == ("theirs" if before < 6 else "ours")


def test_notes_of_many_drivers_are_all_kept(tmp_path: Path) -> None:
    root = begin(tmp_path / "run").store.root  # type: ignore[attr-defined]
    drivers = [threading.Thread(target=note, args=(LocalStore(root), {f"driver {i}": i})) for i in range(12)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    content = json.loads((root / RUN_FILE).read_text())
    assert is_as_written(content)
    assert {f"driver {i}": i for i in range(12)}.items() <= content["about"].items()


class Contended(LocalStore):
    """Others say their words whenever run.json is to be replaced, so many times; or nobody does, and it never can."""

    def __init__(self, root: Path, others: int) -> None:
        super().__init__(root)
        self.left = others

    def replace(self, key: str, old: bytes, new: bytes) -> bool:
        if self.left:
            self.left -= 1
            note(LocalStore(self.root), {f"other {self.left}": 1})
            return super().replace(key, old, new)
        return False


def test_a_note_waits_for_as_many_others_as_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neg_service.storage.run._LONGEST_PAUSE", 0.001)
    store = begin(tmp_path / "run").store
    # When all others have spoken no condition holds, as on a server that has none.
    note(Contended(tmp_path / "run", 40), {"engine": "ours"})
    about = read_run_file(store)["about"]
    assert {"engine": "ours", **{f"other {i}": 1 for i in range(40)}}.items() <= about.items()
    assert store.get(RUN_COPY) == store.get(RUN_FILE)


def test_an_object_is_replaced_only_where_it_is_the_one_that_was_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert not store.replace("t/a", b"one", b"two")
    store.put("t/a", b"one")
    assert not store.replace("t/a", b"other", b"two")
    assert store.replace("t/a", b"one", b"two")
    assert store.get("t/a") == b"two"
    assert [entry.key for entry in store.list("")] == ["t/a"]


class Counting(LocalStore):
    """A store that counts what is listed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.listed: Counter[str] = Counter()

    def list(self, prefix: str) -> list[Entry]:
        self.listed[prefix] += 1
        return super().list(prefix)


def test_each_table_is_listed_once_whatever_is_asked(tmp_path: Path) -> None:
    begun = begin(tmp_path / "run")
    put(begun, 0)
    begun.store.put(part_key("prompts", 1), encode_part("prompts", tables_of(1)["prompts"], begun.fingerprint, 1))
    store = Counting(tmp_path / "run")
    run = run_from(store, read_run_file(store))
    each = Counter(dict.fromkeys(TABLES, 1))

    def once(expected: object, found: object, also: tuple[str, ...] = ()) -> None:
        assert found == expected
        assert store.listed == each + Counter(also)
        store.listed.clear()

    once({0}, run.directory.done())
    once({0}, run.done())
    once([0], [shard for shard, _ in run.parts("activations")])
    once(4, run.table("activations").count_rows())
    once(4, run.neuron(0, 0).num_rows)
    once([2, 4, 8], [table.n_rows for table in status_of(run).tables], ("failed",))
    at = run.snapshot()
    store.listed.clear()
    assert run.done(at) == {0}
    assert [run.table(name, at=at).count_rows() for name in TABLES] == [2, 4, 8]
    assert not store.listed


def test_a_snapshot_stays_as_it_was_while_the_run_goes_on(tmp_path: Path) -> None:
    begun = begin(tmp_path / "run")
    put(begun, 0)
    run = open_run(tmp_path / "run")
    at = run.snapshot()
    put(begun, 1)
    assert run.done(at) == {0}
    assert [shard for shard, _ in run.parts("prompts", at=at)] == [0]
    assert run.done() == RunDirectory(begun.store, begun.fingerprint, tuple(TABLES)).done() == {0, 1}

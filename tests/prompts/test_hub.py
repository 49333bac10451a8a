"""Data sets of the hub: files by their place, whole ones as folders; other formats by the `datasets` library."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neg_service.cluster.prepare import prepare
from neg_service.config import DatasetConfig, ModelConfig, ScanConfig, StorageConfig
from neg_service.errors import PromptError
from neg_service.prompts.chat import chat_of
from neg_service.prompts.hub import is_data_set, revision_of
from neg_service.prompts.sources import dataset_name, load_dataset
from tests.chat_templates import CHATML
from tests.hub import COMMIT, NAME, hub
from tests.refusals import NOT_GIVEN, refused
from tests.tiny_tokenizers import byte_level

ROWS = [{"prompt": f"w{i}", "targets": [" w3", " w4"], "answer": " w4", "id": f"r{i}"} for i in range(3)]
# What a fresh process reads, and how long it takes; HF_ENDPOINT is read when the hub's client is imported.
READ = """
import json, sys, time
from neg_service.config import DatasetConfig
from neg_service.errors import PromptError
from neg_service.prompts.sources import load_dataset
for asked in json.loads(sys.argv[1]):
    began = time.monotonic()
    try:
        found = [prompt.id for prompt in load_dataset(DatasetConfig(**asked))]
    except PromptError as error:
        found = str(error)
    print(json.dumps([found, time.monotonic() - began]))
"""
SECRET = "hf_" + "s3cret" * 6


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_by_others(
    endpoint: str, tmp_path: Path, *asked: dict[str, Any], is_offline: bool = False
) -> list[tuple[Any, float]]:
    """What each of the data sets is read as by a process that asks the hub at `endpoint`, and in how many seconds."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": SECRET}
    environment["HF_HUB_OFFLINE"] = str(int(is_offline))
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(asked)], env=environment, capture_output=True, text=True, check=True
    )
    assert SECRET not in done.stdout + done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_a_file_of_the_hub_is_read_at_its_revision(tmp_path: Path) -> None:
    other = f"hf://datasets/{NAME}@v2/data/train.jsonl"
    asked = [{"source": f"hf://datasets/{NAME}{of}/data/train.jsonl"} for of in ("@main", "@v2", "")]
    with hub({"data/train.jsonl": lines(ROWS)}) as address:
        read = read_by_others(address, tmp_path, *asked)
    assert [found for found, _ in read] == [
        ["r0", "r1", "r2"],
        f"dataset.source={other}: cannot be read: no such file",
        ["r0", "r1", "r2"],
    ]


def test_without_a_network_both_forms_are_refused_within_seconds(tmp_path: Path) -> None:
    with socket.socket() as bound:
        # Bound and not listening.
        bound.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        asked = [{"source": f"hf://datasets/{NAME}@main/a.jsonl"}, {"source": NAME}]
        (file, of_file), (whole, of_whole) = read_by_others(address, tmp_path, *asked)
    assert file == f"dataset.source=hf://datasets/{NAME}@main/a.jsonl: cannot be read: nothing answers there"
    assert whole.startswith(f"dataset.source={NAME}: ")
    assert "the hub gave no data set: it does not answer" in whole
    # Importing takes most of it.
    assert max(of_file, of_whole) < 20


def test_the_extra_is_named_where_the_library_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "data.arrow").write_bytes(b"")
    with refused(
        PromptError, "dataset.source", str(tmp_path), says=r"not installed: pip install 'neg-service\[datasets\]'"
    ):
        load_dataset(DatasetConfig(str(tmp_path)))


@pytest.mark.parametrize(
    ("source", "is_one", "revision"),
    [
        ("owner/name", True, None),
        ("owner/name-1.v2_x@main", True, "main"),
        ("owner/name@refs/convert/parquet", True, "refs/convert/parquet"),
        ("hf://datasets/owner/name@v1/data/a.jsonl", False, "v1"),
        ("hf://datasets/owner/name@refs/pr/2/data/a.jsonl", False, "refs/pr/2"),
        ("hf://datasets/owner/name/data/a@b.jsonl", False, None),
        ("s3://bucket/name@v1", False, None),
        ("/owner/name", False, None),
        ("./name", False, None),
        ("a/b/c", False, None),
        ("name", False, None),
    ],
)
def test_what_is_a_data_set_of_the_hub(source: str, is_one: bool, revision: str | None) -> None:
    assert (is_data_set(source), revision_of(source)) == (is_one, revision)


def test_a_revision_is_part_of_what_a_run_is(
    monkeypatch: pytest.MonkeyPatch, tiny_directory: Path, tmp_path: Path
) -> None:
    rows = lines(ROWS)
    monkeypatch.setattr("neg_service.inputs._content", lambda *_: rows)

    def of(revision: str) -> dict[str, Any]:
        asked = DatasetConfig(f"hf://datasets/{NAME}@{revision}/a.jsonl")
        storage = StorageConfig(str(tmp_path))
        prompts: dict[str, Any] = prepare(
            ScanConfig(model=ModelConfig(str(tiny_directory)), dataset=asked, storage=storage)
        ).identity["prompts"]
        return prompts

    first, second = of("v1"), of("v2")
    assert (first["revision"], second["revision"]) == ("v1", "v2")
    assert first["sha256"] == second["sha256"]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The `datasets` library, with a cache of its own."""
    found = pytest.importorskip("datasets", reason="the extra [datasets] is not installed")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of two splits."""
    place = tmp_path / "facts"
    place.mkdir()
    (place / "train.jsonl").write_bytes(lines(ROWS))
    (place / "test.jsonl").write_bytes(lines(ROWS[:1]))
    return place


def test_a_folder_is_read_split_by_split(folder: Path) -> None:
    source = str(folder)
    assert list(load_dataset(DatasetConfig(source, split="train"))) == list(
        load_dataset(DatasetConfig(str(folder / "train.jsonl")))
    )
    assert [one.id for one in load_dataset(DatasetConfig(source, split="train[1:]+test"))] == ["r1", "r2", "r0"]
    assert [one.id for one in load_dataset(DatasetConfig(source, split="test"))] == ["r0"]
    assert dataset_name(DatasetConfig(source, split="test")) == "facts-test"
    with refused(PromptError, "dataset.split", NOT_GIVEN, allowed="one split", says="has train, test"):
        load_dataset(DatasetConfig(source))
    with refused(PromptError, "dataset.split", "tset", says="has no split 'tset'; did you mean test"):
        load_dataset(DatasetConfig(source, split="tset"))
    with refused(PromptError, "dataset.subset", "no", says="default"):
        load_dataset(DatasetConfig(source, split="train", subset="no"))
    with refused(PromptError, "dataset.source", says="has no column 'uuid'"):
        load_dataset(DatasetConfig(source, split="train", columns={"id": "uuid"}))
    # What is cached is not taken for what is there.
    (folder / "train.jsonl").write_bytes(lines(ROWS).replace(b"r0", b"x0"))
    assert load_dataset(DatasetConfig(source, split="train"))[0].id == "x0"


def test_a_folder_of_parquet_has_messages_and_answers_alone(tmp_path: Path) -> None:
    place = tmp_path / "chats"
    place.mkdir()
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}], "answer": f"A{i}", "key": i} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), place / "train.parquet")
    own = byte_level()
    own.chat_template = CHATML
    found = load_dataset(DatasetConfig(str(place), columns={"id": "key"}), None, lambda: chat_of(own, "m"))
    assert [one.id for one in found] == ["0", "1", "2", "3"]
    assert found[1].messages == (("user", "1?"),)
    assert all(one.answer is not None and len(set(one.targets)) == 4 for one in found)


def _write_arrow(place: Path, first: str) -> None:
    with pa.OSFile(str(place), "wb") as file:
        table = pa.Table.from_pylist([{**ROWS[0], "id": first}])
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.usefixtures("library")
def test_arrow_is_left_to_the_library_and_not_to_its_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "arrows"
    place.mkdir()
    for first in ("a0", "b0"):
        _write_arrow(place / "train.arrow", first)
        os.utime(place / "train.arrow", (10**9, 10**9))
        assert [one.id for one in load_dataset(DatasetConfig(str(place)))] == [first]
    assert "train.arrow are read by the datasets library, not strictly" in caplog.text
    place.rename(tmp_path / "arrow[s]")
    with refused(PromptError, "dataset.source", says=r"has '\[' in its path"):
        load_dataset(DatasetConfig(str(tmp_path / "arrow[s]")))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.arrow").write_text("no Arrow")
    with refused(PromptError, "dataset.source", says="cannot be read by the datasets library: "):
        load_dataset(DatasetConfig(str(tmp_path / "broken")))


def test_a_data_set_of_the_hub_is_read_and_stays_readable_without_it(tmp_path: Path) -> None:
    files = {"data/train.jsonl": lines(ROWS), "data/test.jsonl": lines(ROWS[:1]), ".gitattributes": b""}
    asked = [{"source": f"{NAME}{of}", "split": "train"} for of in ("", "@main", f"@{COMMIT}", "@v2")]
    with hub(files) as address:
        *read, wrong, none = read_by_others(address, tmp_path, *asked, {"source": "owner/other"})
    assert [found for found, _ in read] == [["r0", "r1", "r2"]] * 3
    offline = [{**one, "split": "train[1:]"} for one in asked] + [{**asked[0], "split": "train+test"}]
    *again, other, more = (found for found, _ in read_by_others(address, tmp_path, *offline, is_offline=True))
    assert again == [["r1", "r2"]] * 3
    assert "HF_HUB_OFFLINE is set, and it was not downloaded before" in other
    assert "the hub did not give its file 'data/test.jsonl': HF_HUB_OFFLINE is set, and it was not" in more
    assert "it has no revision 'v2'" in wrong[0]
    assert "it has none of this name, or one that needs HF_TOKEN" in none[0]


def test_what_a_person_downloaded_whole_is_read_without_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "hub" / f"datasets--{NAME.replace('/', '--')}"
    for name, content in {f"snapshots/{COMMIT}/train.jsonl": lines(ROWS), "refs/main": COMMIT.encode()}.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
    # What the hub lists cannot be kept, and was not.
    (tmp_path / "cache" / "assets").write_bytes(b"")
    asked = [{"source": f"{NAME}{of}"} for of in ("", f"@{COMMIT}", "@v2")]
    *read, none = (found for found, _ in read_by_others("http://127.0.0.1:9", tmp_path, *asked, is_offline=True))
    assert read == [["r0", "r1", "r2"]] * 2
    with hub({"train.jsonl": lines(ROWS[:1])}) as address:
        ((found, _),) = read_by_others(address, tmp_path, {"source": f"{NAME}@{COMMIT}"})
    assert found == ["r0", "r1", "r2"]
    assert "HF_HUB_OFFLINE is set, and it was not downloaded before" in none


def test_files_of_the_hub_are_read_as_strictly_as_single_ones(tmp_path: Path) -> None:
    flipped = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), flipped, compression="none", write_page_checksum=True)
    files = {
        # Numbers would lose their zeros, and a column that is there twice its first values.
        "numbers/train.csv": b'id,prompt,targets\n007,of one,"["" a"", "" b""]"\n',
        "twice/train.csv": b'id,prompt,prompt,targets\n1,one,two,"["" a"", "" b""]"\n',
        "dates/train.jsonl": lines([{**ROWS[0], "id": "2026-11-25"}]),
        "flipped/train.parquet": flipped.getvalue().replace(b"w2", b"w7", 1),
        "README.md": b"---\nconfigs:\n"
        + b"".join(
            f"- config_name: {name}\n  data_files: {name}/*\n".encode()
            for name in ("numbers", "twice", "dates", "flipped")
        )
        + b"---\n",
    }
    asked = [{"source": NAME, "subset": name} for name in ("numbers", "dates", "twice", "flipped", None)]
    with hub(files) as address:
        numbers, dates, twice, broken, which = (found for found, _ in read_by_others(address, tmp_path, *asked))
    assert (numbers, dates) == (["007"], ["2026-11-25"])
    assert "twice/train.csv: " in twice
    assert "two columns 'prompt'" in twice
    assert "flipped/train.parquet: " in broken
    assert "checksum" in broken
    assert which.startswith("dataset.subset=None: must be one of them; ")


def test_a_program_that_makes_rows_is_not_passed_over(tmp_path: Path) -> None:
    with hub({"facts.py": b"", "en/train.jsonl": lines(ROWS), "de/train.jsonl": lines(ROWS)}) as address:
        ((found, _),) = read_by_others(address, tmp_path, {"source": NAME})
    assert "which rows it has says a program of its own (facts.py), which is not run" in found


def test_a_later_download_counts_without_the_hub(tmp_path: Path) -> None:
    asked = [{"source": f"{NAME}{of}", "split": "train"} for of in ("", f"@{COMMIT}")]
    with hub({"train.jsonl": lines(ROWS), "test.jsonl": lines(ROWS)}) as address:
        read_by_others(address, tmp_path, asked[0])
    # Of the commit itself the list is known as well, of which one file is here.
    whole = {"source": f"{NAME}@{COMMIT}"}
    ((found, _),) = read_by_others(address, tmp_path, whole, is_offline=True)
    assert "has train, test" in found
    folder = tmp_path / "cache" / "hub" / f"datasets--{NAME.replace('/', '--')}"
    later = "f" * 40
    (folder / "snapshots" / later).mkdir()
    (folder / "snapshots" / later / "train.jsonl").write_bytes(lines(ROWS[1:]))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(later)
    found, pinned = (ids for ids, _ in read_by_others(address, tmp_path, *asked, is_offline=True))
    assert (found, pinned) == (["r1", "r2"], ["r0", "r1", "r2"])


def test_arrow_of_the_hub_is_left_to_the_library(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra [datasets] is not installed")
    _write_arrow(tmp_path / "train.arrow", "a0")
    with hub({"train.arrow": (tmp_path / "train.arrow").read_bytes()}) as address:
        ((found, _),) = read_by_others(address, tmp_path, {"source": NAME})
    assert found == ["a0"]


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    for key in ("split", "subset"):
        with refused(PromptError, f"dataset.{key}", "train", says="is a file, which has none"):
            load_dataset(DatasetConfig(str(tmp_path / "a.jsonl"), **{key: "train"}))
    # What runs say that were planned when files had a split by default.
    assert len(load_dataset(DatasetConfig(str(tmp_path / "a.jsonl"), split="valid"))) == 3

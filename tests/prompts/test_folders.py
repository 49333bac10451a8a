"""Folders as data sets: which files are of which split, and that each is read as strictly as if it were given alone."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neg_service.config import DatasetConfig
from neg_service.errors import PromptError
from neg_service.prompts.folders import open_folder
from neg_service.prompts.sources import load_dataset
from tests.refusals import refused


def row(name: str) -> dict[str, Any]:
    return {"prompt": f"of {name}", "targets": [" a", " b"], "id": name}


def make(place: Path, *names: str, **contents: str) -> Path:
    """A folder with files; each has one row, whose id is the file's name, where no content is given."""
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist([row(name)]), place / name)
        else:
            (place / name).write_text(contents.get(name, json.dumps(row(name)) + "\n"))
    return place


def ids(place: Path, split: str | None = "train", subset: str | None = None) -> list[str]:
    return [one.id for one in load_dataset(DatasetConfig(str(place), split=split, subset=subset))]


LAYOUTS = [
    ["facts.jsonl"],
    ["b.json", "a.jsonl", "sub/c.jsonl"],
    ["train.jsonl", "test.jsonl", "valid.jsonl"],
    ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "dev.parquet"],
    ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/odd-00000-of-00001.parquet",
     "test.parquet"],
    ["data/train-a.parquet", "data/train-b.parquet", "data/test-a.parquet"],
    ["train/a.jsonl", "train/b/c.jsonl", "test/a.jsonl", "train.jsonl"],
    ["my_train_1.jsonl", "my_train_10.jsonl", "my_train_2.jsonl", "my.eval.jsonl"],
    ["training.jsonl", "train-x.jsonl", ".train.jsonl", "__x/train.jsonl", ".x/train.jsonl"],
    ["latrain.jsonl", "contest.jsonl"],
]  # fmt: skip


@pytest.mark.parametrize("names", LAYOUTS, ids=lambda names: names[0])
def test_files_are_found_as_the_library_finds_them(tmp_path: Path, names: list[str]) -> None:
    pytest.importorskip("datasets", reason="the extra [datasets] is not installed")
    found = importlib.import_module("datasets.data_files")
    place = make(tmp_path / "set", *names)
    theirs = found.DataFilesDict.from_patterns(found.get_data_patterns(str(place)), base_path=str(place))
    for split, files in theirs.items():
        folder = open_folder(str(place), None, str(split))
        assert folder is not None
        (cut,) = folder.cuts
        assert [str(place / name) for name in cut.files] == list(files)
        assert ids(place, str(split)) == list(cut.files)
    with refused(
        PromptError, "dataset.split", "none", says="has no split 'none'; .*it has " + ", ".join(map(str, theirs))
    ):
        ids(place, "none")


def test_splits_are_cut_and_added(tmp_path: Path) -> None:
    place = make(tmp_path, *(f"train-{i}.jsonl" for i in range(5)), "test.jsonl")
    own = [f"train-{i}.jsonl" for i in range(5)]
    for cut, wanted in {
        "[1:3]": own[1:3], "[:2]": own[:2], "[-2:]": own[-2:], "[:-4]": own[:1], "[-5:1]": own[:1], "[4:5]": own[4:],
        "[:40%]": own[:2], "[-20%:]": own[4:], "[:]": own, "": own,
    }.items():  # fmt: skip
        assert ids(place, f"train{cut}") == wanted
    assert ids(place, "test + train[4:]") == ["test.jsonl", "train-4.jsonl"]
    for wrong in ("[:6]", "[6:]", "[-6:]", "[2:99]"):
        with refused(PromptError, "dataset.split", f"...{wrong}", says="there are 5 rows to cut"):
            ids(place, f"train{wrong}")
    for wrong in ("train[1]", "train[:5%](closest)", "train[1:50%]", "train[:200%]", "train[%:]"):
        with refused(PromptError, "dataset.split", wrong, says="a cut is NAME"):
            ids(place, wrong)


def test_what_a_readme_says_of_how_files_are_read_is_for_the_library(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("datasets", reason="the extra [datasets] is not installed")
    (tmp_path / "a.csv").write_text('id;prompt;targets\n7;w1;"["" a"", "" b""]"\n')
    (tmp_path / "README.md").write_text("---\nconfigs: [{config_name: a, data_files: a.csv, sep: ';'}]\n---\n")
    assert open_folder(str(tmp_path), None, None) is None
    assert "its README.md says sep of its files: the datasets library reads them, not strictly" in caplog.text


def test_a_readme_says_which_files(tmp_path: Path) -> None:
    place = make(tmp_path, "one/a.jsonl", "one/b.jsonl", "two/c.jsonl", "two/test.jsonl")

    def says(text: str) -> None:
        (place / "README.md").write_text(f"---\nlicense: mit\n{text}\n---\n# Facts\n")

    says(
        "configs:\n- config_name: first\n  data_files:\n  - split: all_of_it\n    path: [one/b.jsonl, 'one/*']\n"
        "- config_name: second\n  default: true\n  data_dir: two"
    )
    assert ids(place, "all_of_it", "first") == ["one/b.jsonl", "one/a.jsonl"]
    assert ids(place, None) == ["two/test.jsonl"]
    with refused(PromptError, "dataset.subset", "frist", says="did you mean first"):
        ids(place, None, "frist")
    for text, reason in {
        "configs: [{config_name: a, data_files: ../x.jsonl}]": "which is not in the folder",
        "configs: [{config_name: a, data_files: no.jsonl}]": "'no.jsonl', which it does not have; it has .*one/a",
        "configs: [{config_name: a, data_files: 'no*.jsonl'}]": "split train has no files; it has README.md, one/a",
        "configs: [{config_name: a, data_files: [{split: x}]}]": "not split and path",
        "configs: [": "README.md cannot be read",
        "configs: [{config_name: a}, {config_name: a}]": "a config_name twice",
    }.items():
        says(text)
        with refused(PromptError, "dataset.source", str(place), says=reason):
            ids(place, None)


def test_nothing_in_the_name_of_a_folder_is_a_pattern(tmp_path: Path) -> None:
    for name in ("run1x", "run[1]x", "starx", "star*x", "q?x", "qax", "a::b", "a[1"):
        make(tmp_path / name, "train.jsonl", **{"train.jsonl": json.dumps(row(f"in {name}"))})
        assert ids(tmp_path / name) == [f"in {name}"]


def test_a_flipped_bit_is_found_by_its_checksum(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    table = pa.Table.from_pylist([row("a0"), row("a1")])
    pq.write_table(
        table, file, write_page_checksum=True, write_statistics=False, compression="none", use_dictionary=False
    )
    content = file.read_bytes()
    file.write_bytes(content.replace(b"of a1", b"of a0", 1))
    with refused(PromptError, "dataset.source", says="train.parquet: is damaged"):
        ids(tmp_path)


def test_ids_and_answers_are_texts_as_they_are_written(tmp_path: Path) -> None:
    written = ["007", "1.10", "1e5", "123456789012345678901234567890", "2026-11-25", "None", "NaN", "true"]
    lines = "".join(f'p,"["" {one}"", "" b""]", {one},{one}\n' for one in written)
    make(tmp_path / "csv", "train.csv", **{"train.csv": f"prompt,targets,answer,id\n{lines}"})
    found = load_dataset(DatasetConfig(str(tmp_path / "csv")))
    assert [one.id for one in found] == written
    assert all(one.answer == 0 for one in found)
    numbers = ["1.10", "1e5", "123456789012345678901234567890", "-0"]
    objects = [f'{{"prompt": "p", "targets": [" a", " b"], "id": {one}}}' for one in numbers]
    make(tmp_path / "jsonl", "a.jsonl", **{"a.jsonl": "\n".join(objects)})
    make(tmp_path / "json", "a.json", **{"a.json": f"[{', '.join(objects)}]"})
    assert ids(tmp_path / "jsonl") == ids(tmp_path / "json") == numbers
    make(tmp_path / "dates", "a.jsonl", **{"a.jsonl": json.dumps(row("2026-11-25"))})
    assert ids(tmp_path / "dates") == ["2026-11-25"]


def test_a_file_that_two_patterns_find_is_read_once(tmp_path: Path) -> None:
    assert ids(make(tmp_path, "train-train.jsonl", "train-a.jsonl")) == ["train-a.jsonl", "train-train.jsonl"]


def test_rows_without_an_id_are_numbered_through_all_files(tmp_path: Path) -> None:
    plain = json.dumps({"prompt": "p", "targets": [" a", " b"]}) + "\n"
    make(tmp_path, "a.jsonl", "b.jsonl", **{"a.jsonl": plain * 2, "b.jsonl": plain})
    assert ids(tmp_path, "train") == ["000000", "000001", "000002"]
    assert ids(tmp_path, "train[1:]") == ["000000", "000001"]


def test_what_is_wrong_names_file_and_line(tmp_path: Path) -> None:
    good = json.dumps(row("x"))
    pair = pa.table([pa.array(["p"]), pa.array(["q"])], ["prompt", "prompt"])
    for name, content, reason in [
        ("b.jsonl", f'{good}\n{{"prompt": "p", "prompt": "q"}}'.encode(), "b.jsonl: line 2 has an object .* twice"),
        ("b.csv", b"prompt,targets,prompt\n", "b.csv: its header has two columns 'prompt'"),
        ("b.parquet", pair, "b.parquet: has two columns 'prompt'"),
        ("b.jsonl", good.encode("utf-16"), "b.jsonl: is UTF-16, not UTF-8"),
        ("b.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "b.jsonl: is a Git LFS pointer"),
        ("b.parquet", b"version https://git-lfs.github.com/spec/v1\n", "b.parquet: .*a Git LFS pointer"),
        ("b.jsonl", b'{"prompt": "p"}', "b.jsonl: line 1: "),
        ("b.json", b'[{"prompt": "p", "targets": [" a"]}, 3]', "b.json: row 1 is not a JSON object"),
        ("b.json", b"[{]", "b.json: is not JSON"),
    ]:
        (tmp_path / "set").mkdir()
        if isinstance(content, bytes):
            (tmp_path / "set" / name).write_bytes(content)
        else:
            pq.write_table(content, tmp_path / "set" / name)
        # Also behind what is read of it.
        for split in ("train", "train[:1]") if name == "b.jsonl" and content.startswith(good.encode()) else ("train",):
            with refused(PromptError, "dataset.source", says=reason):
                ids(tmp_path / "set", split)
        (tmp_path / "set" / name).unlink()
        (tmp_path / "set").rmdir()


def test_a_file_is_read_again_whatever_its_time_says(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / "train.jsonl").write_text(json.dumps(row(name)))
        os.utime(tmp_path / "train.jsonl", (10**9, 10**9))
        assert ids(tmp_path) == [name]


def test_a_folder_that_says_too_little_is_refused_with_what_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "both", "a.csv", "b.jsonl", "state.json", "notes.txt")
    with refused(
        PromptError, "dataset.source", says=r"split train has files of several formats; it has a\.csv, b\.jsonl"
    ):
        ids(tmp_path / "both")
    make(tmp_path / "none", "notes.txt", "train.jsonl.bak")
    with refused(PromptError, "dataset.source", says=r"no file in it ends in .*; it has notes\.txt, train\.jsonl\.bak"):
        ids(tmp_path / "none")
    make(tmp_path / "odd", "data/my-set-00000-of-00001.jsonl")
    with refused(PromptError, "dataset.source", says="'my-set' cannot be the name of a split"):
        ids(tmp_path / "odd")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "train-2.jsonl").symlink_to("not-fetched")
    with refused(PromptError, "dataset.source", says=r"train-2\.jsonl: cannot be read: .*No such file"):
        ids(tmp_path / "link")
    make(tmp_path / "part", "train-00001-of-00003.jsonl")
    assert ids(tmp_path / "part") == ["train-00001-of-00003.jsonl"]
    assert "of the 3 files train-... there are 1" in caplog.text

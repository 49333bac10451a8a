"""What files say: each form that is wrong is one project error that names file, place and cause; nothing is guessed."""

from __future__ import annotations

import csv
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neg_service.contents import csv_of, is_deeper, json_lines, json_of, text_of
from neg_service.errors import ConfigurationError, PromptError
from neg_service.measures.edits import checked_edits
from neg_service.prompts.sources import load_prompts
from tests.readers import TEXTS, WORDING, edits_in, list_in, prompts_in, rows_in, wordings_in
from tests.refusals import refused

MARK = b"\xef\xbb\xbf"
EACH = pytest.mark.parametrize(("name", "text", "read"), TEXTS, ids=[name for name, _, _ in TEXTS])


@EACH
def test_a_mark_at_the_beginning_and_separators_of_unicode_change_nothing(
    tmp_path: Path, name: str, text: str, read: Callable[[Path], Any]
) -> None:
    found = []
    for i, content in enumerate((text.encode(), MARK + text.encode(), MARK + text.replace("\n", "\r\n").encode())):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / name).write_bytes(content)
        found.append(read(tmp_path / str(i) / name))
    assert found[0]
    assert found[0] == found[1] == found[2]


@EACH
@pytest.mark.parametrize(
    ("encoded", "cause"),
    [
        (lambda text: text.encode("utf-16"), "is UTF-16, not UTF-8"),
        (lambda text: b"\xfe\xff" + text.encode("utf-16-be"), "is UTF-16, not UTF-8"),
        (lambda text: text.encode("utf-32"), "is UTF-32, not UTF-8"),
        (lambda text: text.replace("é", "e").replace("\u2028", " ").encode("utf-16-le"), "holds a NUL byte, as UTF-16"),
        (lambda text: text.replace("\u2028", " ").encode("latin-1"), "is not UTF-8 (byte 0xe9; the file is Latin-1"),
        (lambda text: text.replace("é", "\0").encode(), "holds a NUL byte"),
        (lambda text: b"\x1f\x8b\x08\x00" + text.encode(), "is data compressed with gzip"),
        (lambda text: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (lambda text: b"\n<!DOCTYPE html><html>", "is a page of HTML"),
        (lambda text: b"PAR1" + text.encode(), "is Parquet, not text"),
    ],
)
def test_what_is_no_text_in_utf_8_is_named(
    tmp_path: Path, name: str, text: str, read: Callable[[Path], Any], encoded: Callable[[str], bytes], cause: str
) -> None:
    (tmp_path / name).write_bytes(encoded(text))
    with refused(ConfigurationError, says=re.escape(cause)) as caught:
        read(tmp_path / name)
    assert str(tmp_path) in str(caught.value.value)


def test_the_line_of_a_letter_that_is_none_is_named(tmp_path: Path) -> None:
    with refused(ConfigurationError, "x", says=r"line 3 is not UTF-8 \(byte 0xfc"):
        text_of("x", b"a\nb\n\xfcber\n")
    with refused(PromptError, "x", says="is Parquet, not text"):
        text_of("x", b"PAR1", PromptError)


@pytest.mark.parametrize(
    ("name", "text", "read", "key"),
    [
        ("a.jsonl", '{"prompt": "a", "targets": ["b"], "prompt": "c"}', prompts_in, "prompt"),
        ("a.jsonl", '{"prompt": "a", "targets": ["b"], "about": [{"x": 1, "x": 2}]}', prompts_in, "x"),
        ("a.jsonl", '{"prompt": "a", "targets": ["b"], "p\\u0072ompt": "c"}', prompts_in, "prompt"),
        ("a.csv", "prompt,answer,prompt\na,b,c\nd,e,f\n", prompts_in, "prompt"),
        ("a.csv", "prompt,answer,id, id\na,b,c,d\ne,f,g,h\n", prompts_in, "id"),
        ("a.csv", '\ufeffprompt,answer,"prompt"\na,b,c\nd,e,f\n', prompts_in, "prompt"),
        ("n.csv", "layer,neuron,layer\n0,1,2\n", list_in, "layer"),
        ("n.csv", "layer,neuron,note,note\n0,1,2,3\n", list_in, "note"),
        ("n.jsonl", '{"layer": 0, "neuron": 1, "layer": 2}\n', list_in, "layer"),
        ("e.json", '[{"neurons": [[0, 1]], "shift": 1, "shift": 2}]', edits_in, "shift"),
        ("e.jsonl", '{"neurons": [[0, 1]], "shift": 1, "neurons": [[0, 2]]}', edits_in, "neurons"),
        ("t.json", '[{"text": "a", "label": 0, "label": 1}]', rows_in, "label"),
    ],
)
def test_two_of_one_name_are_refused(
    tmp_path: Path, name: str, text: str, read: Callable[[Path], Any], key: str
) -> None:
    (tmp_path / name).write_text(text)
    with refused(ConfigurationError, says=f"two columns '{key}'|the key '{key}' twice"):
        read(tmp_path / name)


@pytest.mark.parametrize("twice", ["prompt", "targets", "id", "other"])
def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path: Path, twice: str) -> None:
    columns = {"prompt": ["a"], "targets": [[" b"]], "id": ["c"], "other": [1]}
    table = pa.table([*columns.values(), columns[twice]], [*columns, twice])
    pq.write_table(table, tmp_path / "a.parquet")
    with refused(PromptError, "dataset.source", tmp_path / "a.parquet", says=f"two columns '{twice}'"):
        load_prompts(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table([[0], [1], [2]], ["layer", "neuron", "neuron"]), tmp_path / "n.parquet")
    with refused(ConfigurationError, "neurons.list", says="n.parquet: has two columns 'neuron'; names must differ"):
        list_in(tmp_path / "n.parquet")


def test_columns_without_a_name_are_a_spreadsheets_and_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,targets,,\na,"["" b""]",,\n')
    assert [prompt.text for prompt in prompts_in(tmp_path / "a.csv")] == ["a"]


DEEP = 100_000


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("a.jsonl", '{"prompt": "a", "targets": ["b"], "more": DEEP}', prompts_in),
        ("a.jsonl", '{"prompt": DEEP, "answer": "b"}', prompts_in),
        ("a.csv", "prompt,targets\na,DEEP\n", prompts_in),
        ("n.jsonl", '{"layer": 0, "neuron": DEEP}', list_in),
        ("e.json", '[{"neurons": DEEP, "shift": 1}]', edits_in),
        ("e.json", "DEEP", edits_in),
        ("e.jsonl", '{"neurons": [[0, 1]], "shift": DEEP}', edits_in),
        ("t.json", '[{"text": DEEP, "label": 0}]', rows_in),
        ("w.toml", f"{WORDING}more = DEEP", wordings_in),
    ],
)
# So deep that the parser gives up, and as deep as it just bears, where what walks through the result might not.
@pytest.mark.parametrize("levels", [DEEP, 600, 200, 30, 5])
def test_what_is_nested_without_end_is_one_line(
    tmp_path: Path, name: str, text: str, read: Callable[[Path], Any], levels: int
) -> None:
    (tmp_path / name).write_text(text.replace("DEEP", "[" * levels + "]" * levels))
    if '"more": DEEP' in text and levels < DEEP:
        assert read(tmp_path / name)
        return
    with refused(ConfigurationError, says=f"{name.split('.')[0]}|valid.json") as caught:
        read(tmp_path / name)
    assert len(str(caught.value)) < 1000


def test_depth_is_counted() -> None:
    assert not is_deeper([[1]], 2)
    assert is_deeper([[1]], 1)
    assert is_deeper({"a": [{"b": 1}]}, 2)
    assert not is_deeper(5, 0)


def test_a_cell_may_be_long_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = "x " * 100_000
    (tmp_path / "a.csv").write_text(f'prompt,targets\n"{long}","["" b""]"\n')
    assert prompts_in(tmp_path / "a.csv")[0].text == long
    (tmp_path / "n.csv").write_text(f'layer,neuron,prompt\n0,1,"{long * 10}\nand more"\n1,2,short\n')
    assert list_in(tmp_path / "n.csv") == [[0, 1], [1, 2]]
    assert csv.field_size_limit() == limit


def test_long_cells_are_read_by_several_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sets the limit of the whole process to what it needs itself, for some rows at a time."""
    monkeypatch.setattr("neg_service.contents._CSV_ROWS", 60)
    found: list[int] = []

    def read(size: int) -> None:
        _, rows = csv_of("x", ("a\n" + ("y" * size + "\n") * 100).encode())
        found.append(sum(len(row[0]) == size for _, row in rows))

    threads = [threading.Thread(target=read, args=(size,)) for size in (5, 140_000, 7, 150_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [100] * 4
    assert csv.field_size_limit() == 131072


def test_what_a_message_quotes_is_short() -> None:
    with refused(ConfigurationError, "measure.edits[0].shift") as caught:
        checked_edits([{"neurons": [[0, 1]], "shift": "a" * 10_000}], [40] * 3)
    assert len(str(caught.value)) < 1000


def test_lines_are_ended_by_line_feeds_and_carriage_returns_alone() -> None:
    texts = ["a\u2028b", "a\u2029b", "a\x85b"]
    content = b"\r\n".join(json.dumps(text, ensure_ascii=False).encode() for text in texts) + b'\r"c"\n\n"d"'
    assert list(json_lines("x", content)) == [*enumerate(texts, 1), (4, "c"), (6, "d")]
    with refused(ConfigurationError, "x", says="is not JSON: Expecting value at line 2, column 1"):
        json_of("x", b"[\n")

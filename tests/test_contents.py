"""What files say: each form that is wrong is one project error that names file, place and cause; nothing is guessed."""

from __future__ import annotations

import csv
import io
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neg_service.config import DatasetConfig, NeuronsConfig
from neg_service.contents import csv_of, is_deeper, json_lines, json_of, parquet_batches, parquet_of, text_of
from neg_service.errors import ConfigurationError, NegServiceError, PromptError
from neg_service.measures.choice import with_list_read
from neg_service.measures.edits import checked_edits, read_edits
from neg_service.prompts.mceval8k import load_tasks
from neg_service.prompts.prompt import Prompt, check_prompts
from neg_service.prompts.sources import load_prompts
from neg_service.prompts.tasks import TASKS
from neg_service.prompts.templates import templates_of
from tests.skills import published_row

MARK = b"\xef\xbb\xbf"


def prompts_in(place: Path) -> list[Prompt]:
    prompts = load_prompts(str(place))
    check_prompts(prompts)
    return prompts


def list_in(place: Path) -> Any:
    return with_list_read(NeuronsConfig(choose="list", list=str(place))).list


def edits_in(place: Path) -> Any:
    edits = read_edits(str(place))
    checked_edits(edits, 3, 40)
    return edits


def rows_in(place: Path) -> list[Prompt]:
    """Of the task whose published file this is."""
    (place.parent / "classification/agnews").mkdir(parents=True)
    place.rename(place.parent / "classification/agnews/valid.json")
    return load_tasks(DatasetConfig(source=str(place.parent), task="agnews", shots=0))


def wordings_in(place: Path) -> Any:
    return templates_of(TASKS["agnews"], str(place)).get("mine")


def outcome(read: Callable[..., Any], *given: Any) -> Any:
    """What is read, or the project's own error; any other goes on."""
    try:
        return read(*given)
    except NegServiceError as error:
        return error


WORDING = '[mine.en]\ninstruction = "é\u2028"\nquestion = "{text}?"\nlabels = [" a", " b", " c", " d"]\n'
TASK_ROWS = json.dumps([published_row("agnews", n) for n in range(4)])
# A whole file of every kind that a person writes by hand, by what reads it.
TEXTS: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("a.jsonl", '{"prompt": "a\u2028é", "targets": [" b"]}\n{"prompt": "c\x85", "targets": [" d"]}\n', prompts_in),
    ("a.csv", 'prompt,targets\na\u2028é,"["" b""]"\n', prompts_in),
    ("n.csv", "layer,neuron,what\n1,2,é\u2028x\n", list_in),
    ("n.jsonl", '{"layer": 1, "neuron": 2, "what": "é\u2028\x85"}\n{"layer": 1, "neuron": 3}\n', list_in),
    ("e.json", '[{"neurons": [[0, 1]], "scale": 0, "name": "é\u2028"}]', edits_in),
    ("e.jsonl", '{"neurons": [[0, 1]], "scale": 0, "name": "é\u2028x\x85y"}\n', edits_in),
    ("t.json", TASK_ROWS[:-1] + ', {"text": "é\u2028", "label": 0}]', rows_in),
    ("w.toml", WORDING, wordings_in),
]
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
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path / name)
    assert cause in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_line_of_a_letter_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^x: line 3 is not UTF-8 \(byte 0xfc"):
        text_of("x", b"a\nb\n\xfcber\n")
    with pytest.raises(PromptError, match=r"^x: is Parquet, not text"):
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
    with pytest.raises(ConfigurationError, match=f"two columns '{key}'|the key '{key}' twice"):
        read(tmp_path / name)


@pytest.mark.parametrize("twice", ["prompt", "targets", "id", "other"])
def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path: Path, twice: str) -> None:
    columns = {"prompt": ["a"], "targets": [[" b"]], "id": ["c"], "other": [1]}
    table = pa.table([*columns.values(), columns[twice]], [*columns, twice])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(PromptError, match=f"a.parquet: has two columns '{twice}'; names must differ"):
        load_prompts(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table([[0], [1], [2]], ["layer", "neuron", "neuron"]), tmp_path / "n.parquet")
    with pytest.raises(ConfigurationError, match=r"n.parquet: has two columns 'neuron'; names must differ"):
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
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path / name)
    assert name.split(".")[0] in str(caught.value) or "valid.json" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


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


def test_long_cells_are_read_by_several_threads_at_once() -> None:
    """Each sets the limit of the whole process to what it needs itself."""
    found: list[int] = []

    def read(size: int) -> None:
        _, rows = csv_of("x", ("a\n" + ("y" * size + "\n") * 1500).encode())
        found.append(sum(len(row[0]) == size for _, row in rows))

    threads = [threading.Thread(target=read, args=(size,)) for size in (5, 140_000, 7, 150_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1500] * 4
    assert csv.field_size_limit() == 131072


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("n.csv", "layer,neuron\n0,1\n2,\n", "line 3: neuron must be a whole number, of at most 18 digits, not ''"),
        ("n.csv", "layer,neuron\n,1\n", "line 2: layer must be a whole number"),
        ("n.csv", "layer,neuron\n0,3.7\n", "line 2: neuron must be a whole number, of at most 18 digits, not '3.7'"),
        ("n.csv", "layer,neuron\n0,true\n", "not 'true'"),
        ("n.csv", "layer,neuron\n0,1_0\n", "not '1_0'"),
        ("n.csv", "layer,neuron\n0,٣\n", "not '٣'"),
        ("n.csv", f"layer,neuron\n0,{'9' * 30}\n", "not '9999"),
        ("n.csv", "layer,neuron\n0,1,2\n", "line 2 has not as many cells as the header"),
        ("n.csv", "layer,neuron\n0\n", "line 2 has not as many cells as the header"),
        ("n.csv", "layer;neuron\n0;1\n", "needs whole numbers in a column 'layer'; its columns are layer;neuron"),
        ("n.csv", "", "needs whole numbers in a column 'layer'"),
        ("n.csv", "layer,neuron\n", "has no rows"),
        ("n.jsonl", "", "has no rows"),
        ("n.jsonl", '{"layer": 0}', "line 1: needs whole numbers in a column 'neuron'; its columns are layer"),
        (
            "n.jsonl",
            '{"layer": 0, "neuron": null}',
            "line 1: neuron must be a whole number, of at most 18 digits, not None",
        ),
        (
            "n.jsonl",
            '{"layer": true, "neuron": 1}',
            "line 1: layer must be a whole number, of at most 18 digits, not True",
        ),
        ("n.jsonl", '{"layer": 0, "neuron": 1}\n{"layer": 0, "neuron": 3.7}', "line 2: neuron must be a whole number"),
        ("n.jsonl", '{"layer": 0, "neuron": "1"}', "not '1'"),
        ("n.jsonl", '{"layer": 0, "neuron": 1e999}', "not inf"),
        ("n.jsonl", '{"layer": 0, "neuron": NaN}', "not nan"),
        ("n.jsonl", '{"layer": 0, "neuron": ' + "9" * 5000 + "}", "line 1 is not JSON that can be read: Exceeds"),
        ("n.jsonl", '{"layer": 0, "neuron": ' + "9" * 500 + "}", "line 1: neuron must be a whole number"),
        ("n.jsonl", "[0, 1]", "line 1 is not a JSON object"),
        ("n.jsonl", '{"layer": 0, "neuron": 1}{"layer": 0}', "line 1 is not JSON: Extra data at column 26"),
    ],
)
def test_a_list_says_whole_numbers_in_every_cell(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        list_in(tmp_path / name)
    assert f"{tmp_path}/{name}" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        (pa.array([1, None]), "row 1: neuron must be a whole number, and is empty"),
        (pa.array([1.0, 3.7]), "needs whole numbers in a column 'neuron'"),
        (pa.array([True, False]), "needs whole numbers in a column 'neuron'"),
        (pa.array([1, 2**63], pa.uint64()), "rows from 0 on: Integer value"),
    ],
)
def test_a_list_in_parquet_says_whole_numbers_in_every_cell(tmp_path: Path, neurons: pa.Array, message: str) -> None:
    pq.write_table(pa.table({"layer": [0, 0], "neuron": neurons}), tmp_path / "n.parquet")
    with pytest.raises(ConfigurationError, match=message):
        list_in(tmp_path / "n.parquet")


def _parquet(**how: Any) -> tuple[bytes, list[dict[str, Any]]]:
    rows = [
        {"prompt": f"w{i}", "targets": [" b", f" c{i}"], "id": f"i{i}", "layer": i % 3, "neuron": 7 * i % 40}
        for i in range(30)
    ]
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), content, **how)
    return content.getvalue(), rows


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_bit_that_flips_in_a_page_is_noticed_wherever_it_is(compression: str) -> None:
    content, rows = _parquet(write_page_checksum=True, compression=compression)
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    draw = random.Random(0)
    noticed = 0
    for at in range(4, end):
        broken = bytearray(content)
        broken[at] ^= 1 << draw.randrange(8)
        found = outcome(_rows_of, bytes(broken))
        if isinstance(found, NegServiceError):
            assert "damaged" in str(found)
            noticed += 1
        else:
            # In a page's header there are things of no weight.
            assert found == rows
    assert noticed > 0.8 * (end - 4)


def _rows_of(content: bytes) -> list[dict[str, Any]]:
    file = parquet_of("x", content, PromptError)
    batches = parquet_batches("x", file, file.schema_arrow.names, PromptError)
    return [row for batch in batches for row in batch.to_pylist()]


def _with_a_flipped_value(content: bytes, column: str) -> bytes:
    chunk = next(
        chunk
        for i in range(pq.read_metadata(io.BytesIO(content)).num_columns)
        if (chunk := pq.read_metadata(io.BytesIO(content)).row_group(0).column(i)).path_in_schema.startswith(column)
    )
    start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
    broken = bytearray(content)
    # The end of a chunk is in the values of its last page.
    broken[start + chunk.total_compressed_size - 1] ^= 4
    return bytes(broken)


@pytest.mark.parametrize("column", ["prompt", "targets", "id", "layer", "neuron"])
def test_every_reader_of_parquet_verifies_checksums_and_reads_files_without(tmp_path: Path, column: str) -> None:
    read = list_in if column in ("layer", "neuron") else prompts_in
    for how in ({"write_page_checksum": True}, {"write_page_checksum": True, "data_page_version": "2.0"}, {}):
        content, _ = _parquet(compression="none", use_dictionary=False, **how)
        (tmp_path / "a.parquet").write_bytes(content)
        whole = read(tmp_path / "a.parquet")
        assert len(whole) == 30
        if how:
            (tmp_path / "a.parquet").write_bytes(_with_a_flipped_value(content, column))
            with pytest.raises(ConfigurationError, match=r"a\.parquet: is damaged: .*CRC checksum verification failed"):
                read(tmp_path / "a.parquet")


def test_letters_that_are_none_in_a_file_without_checksums_are_damage(tmp_path: Path) -> None:
    content, _ = _parquet(compression="none", use_dictionary=False)
    (tmp_path / "a.parquet").write_bytes(content.replace(b"w29", b"w2\xff"))
    with pytest.raises(PromptError, match=r"a\.parquet: is damaged: "):
        load_prompts(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "Parquet file size is 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "but a Git LFS pointer"),
        (b"<html>", "but a page of HTML"),
        (b"prompt,targets\n", "Parquet magic bytes not found"),
    ],
)
def test_what_is_no_parquet_is_named(tmp_path: Path, content: bytes, cause: str) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    for read in (prompts_in, list_in):
        with pytest.raises(ConfigurationError, match=rf"a\.parquet: is not Parquet, or damaged: {cause}"):
            read(tmp_path / "a.parquet")


def test_what_a_message_quotes_is_short() -> None:
    with pytest.raises(ConfigurationError) as caught:
        checked_edits([{"neurons": [[0, 1]] * 10_000, "shift": "a" * 10_000}], 3, 40)
    assert len(str(caught.value)) < 1000


def test_lines_are_ended_by_line_feeds_and_carriage_returns_alone() -> None:
    texts = ["a\u2028b", "a\u2029b", "a\x85b"]
    content = b"\r\n".join(json.dumps(text, ensure_ascii=False).encode() for text in texts) + b'\r"c"\n\n"d"'
    assert list(json_lines("x", content)) == [*enumerate(texts, 1), (4, "c"), (6, "d")]
    with pytest.raises(ConfigurationError, match=r"^x: is not JSON: Expecting value at line 2, column 1"):
        json_of("x", b"[\n")


def _broken(content: bytes, draw: random.Random) -> bytes:
    """A file to which one or several of the things happened that happen to files."""
    broken = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(broken) + 1)
        how = draw.randrange(6)
        if how == 0:
            del broken[at:]
        elif how == 1:
            del broken[at : at + draw.randrange(1, 9)]
        elif how == 2:
            broken[at:at] = draw.choice([b"\xff", b"\0", b'"', b"[", b"{", b",", b"\n", b"\r", b"-", b"1e999", b"true"])
        elif how == 3:
            broken[at:at] = bytes(broken[draw.randrange(len(broken) + 1) :][:20])
        elif at < len(broken):
            broken[at] ^= 1 << draw.randrange(8)
        if not broken:
            break
    return bytes(broken)


def _all_kinds() -> list[tuple[str, bytes, Callable[[Path], Any]]]:
    plain = [(name, text.encode(), read) for name, text, read in TEXTS if read is not rows_in]
    content, _ = _parquet()
    return [*plain, ("p.parquet", content, prompts_in), ("n.parquet", content, list_in)]


@pytest.mark.parametrize(("name", "content", "read"), _all_kinds(), ids=[name for name, _, _ in _all_kinds()])
def test_whatever_happens_to_a_file_is_one_line_or_read(
    tmp_path: Path, name: str, content: bytes, read: Callable[[Path], Any]
) -> None:
    draw = random.Random(name)
    refused = 0
    for _ in range(150):
        (tmp_path / name).write_bytes(_broken(content, draw))
        found = outcome(read, tmp_path / name)
        if isinstance(found, NegServiceError):
            refused += 1
            assert "\n" not in str(found)
            assert len(str(found)) < 2000
    assert refused > 30

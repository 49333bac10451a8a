"""Files of prompts: every kind gives the same, answers alone get targets, and every refusal names its place."""

from __future__ import annotations

import json
import re
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir

from neg_service.cluster.prepare import prepare
from neg_service.config import DatasetConfig, ScanConfig, plain, typed
from neg_service.errors import PromptError
from neg_service.inputs import without_credentials
from neg_service.models.loading import load_tokenizer
from neg_service.prompts.prompt import Prompt, check_prompts
from neg_service.prompts.sources import load_dataset, load_prompts
from neg_service.prompts.tokens import encode
from tests.refusals import refused

ROWS = [
    {"prompt": "w1 w2", "targets": [" w3", " w4"], "answer": " w4", "id": "first"},
    {"prompt": "w5, w6", "targets": [" w7"], "answer": None, "id": "second"},
]
EXPECTED = [Prompt("first", "w1 w2", (" w3", " w4"), 1), Prompt("second", "w5, w6", (" w7",), None)]


def test_files_of_every_kind_give_the_same_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    csv = ["prompt,targets,answer,id", 'w1 w2,"["" w3"", "" w4""]", w4,first', '"w5, w6","["" w7""]",,second']
    (tmp_path / "a.csv").write_text("\n".join(csv) + "\n")
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        assert load_prompts(str(tmp_path / name)) == EXPECTED
        assert load_prompts(f"file://{tmp_path}/{name}", limit=1) == EXPECTED[:1]


def test_ids_are_row_numbers_when_not_given(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "targets": ["b"]}\n{"prompt": "c", "targets": ["d"]}\n')
    assert [prompt.id for prompt in load_prompts(str(tmp_path / "a.jsonl"))] == ["000000", "000001"]


# Answers alone, of two relations; the file has names of its own for its columns.
ANSWERS = [
    *({"text": f"The capital of {i} is", "word": f"C{i % 5}", "uuid": f"c{i}", "kind": f"P36-{i}"} for i in range(10)),
    *({"text": f"The colour of {i} is ", "word": f"R{i % 2}", "uuid": f"r{i}", "kind": "P462-a"} for i in range(4)),
]
COLUMNS = {"prompt": "text", "answer": "word", "id": "uuid", "group": "kind"}


def test_rows_with_answers_alone_get_others_of_their_group_as_targets(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ANSWERS))
    asked = DatasetConfig(columns=COLUMNS, group_until="-")
    prompts = load_prompts(str(tmp_path / "a.jsonl"), None, asked)
    assert [prompt.id for prompt in prompts] == [row["uuid"] for row in ANSWERS]
    for prompt, row in zip(prompts, ANSWERS, strict=True):
        # A space stands between prompt and target, once.
        own = row["word"] if row["text"].endswith(" ") else f" {row['word']}"
        assert prompt.answer is not None
        assert prompt.targets[prompt.answer] == own
        assert len(set(prompt.targets)) == 4
    for prompt in prompts[:10]:
        assert all(target.startswith(" C") for target in prompt.targets)
    # Of the second group there are two answers only: all of them, and others besides.
    for prompt in prompts[10:]:
        assert sum(target.startswith("R") for target in prompt.targets) == 2
    assert len({prompt.answer for prompt in prompts}) > 1
    assert load_prompts(str(tmp_path / "a.jsonl"), 3, asked) == prompts[:3]
    assert load_prompts(str(tmp_path / "a.jsonl"), None, replace(asked, seed=1)) != prompts
    two = load_prompts(str(tmp_path / "a.jsonl"), None, replace(asked, choices=2, answer_prefix=""))
    assert {len(prompt.targets) for prompt in two} == {2}
    assert {target[0] for prompt in two for target in prompt.targets} == {"C", "R"}
    pq.write_table(pa.Table.from_pylist(ANSWERS), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(pa_csv(ANSWERS))
    for name in ("a.parquet", "a.csv"):
        assert load_prompts(str(tmp_path / name), None, asked) == prompts


def test_many_answers_are_drawn_from_in_no_time_and_spellings_of_one_are_one(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "answer": f"a{i}"} for i in range(5_000)] + [{"prompt": "x", "answer": " a7"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    began = time.process_time()
    prompts = load_prompts(str(tmp_path / "a.jsonl"))
    # A second; drawing from all others for each row would take many minutes.
    assert time.process_time() - began < 30
    assert all(len(set(prompt.targets)) == 4 for prompt in prompts)
    assert len({target for prompt in prompts for target in prompt.targets}) == 5_000


def pa_csv(rows: list[dict[str, str]]) -> str:
    return "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)])


@pytest.mark.parametrize(
    ("asked", "setting", "message"),
    [
        ({"columns": {"question": "text"}}, "dataset.columns", "what a file calls some of"),
        ({"columns": ["text"]}, "dataset.columns", "['text']"),
        (
            {"columns": {"prompt": "text", "answer": "text"}},
            "dataset.columns",
            "prompt and answer would both be the column 'text'",
        ),
        (
            {"columns": {"prompt": "answer"}},
            "dataset.columns",
            "prompt and answer would both be the column 'answer'; give each its own",
        ),
        (
            {"columns": {"answer": "targets"}},
            "dataset.columns",
            "targets and answer would both be the column 'targets'",
        ),
        ({"columns": {"prompt": "id"}}, "dataset.columns", "prompt and id would both be the column 'id'"),
        ({"columns": {"prompt": "words", "answer": "word"}}, "dataset.source", "line 1: has no 'words'"),
        ({"columns": COLUMNS, "choices": 1}, "dataset.choices", "at least 2"),
    ],
)
def test_wrong_columns_are_refused(tmp_path: Path, asked: dict[str, Any], setting: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ANSWERS))
    with refused(PromptError, setting, says=re.escape(message)):
        load_prompts(str(tmp_path / "a.jsonl"), None, DatasetConfig(**asked))


@pytest.mark.parametrize("column", ["id", "answer", "group", "targets"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_column_that_is_named_and_is_not_there_is_refused(tmp_path: Path, name: str, column: str) -> None:
    row = {"prompt": "a", "targets": '["b"]', "answer": "b"}
    (tmp_path / "a.csv").write_text('prompt,targets,answer\na,"[""b""]",b\n')
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"targets": ["b"]}))
    pq.write_table(pa.Table.from_pylist([row | {"targets": ["b"]}]), tmp_path / "a.parquet")
    with refused(
        PromptError, "dataset.source", says=rf"no column 'nope', .*{column}: nope.*its columns are prompt, targets, an"
    ):
        load_prompts(str(tmp_path / name), None, DatasetConfig(columns={column: "nope"}))
    assert load_prompts(
        str(tmp_path / name), None, DatasetConfig(columns={column: "answer"} if column == "id" else None)
    )


def test_ids_that_are_numbers_stay_as_they_are_written(tmp_path: Path) -> None:
    numbers = ["1e5", "1.10", "-0", "12345678901234567890123", "0.1000000000000000055511151231257827", "7"]
    rows = [f'{{"prompt": "a", "targets": ["b"], "id": {number}}}' for number in numbers]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert [prompt.id for prompt in load_prompts(str(tmp_path / "a.jsonl"))] == numbers
    asked = DatasetConfig(source=str(tmp_path / "a.jsonl"), ids=["1e5"])
    assert [prompt.id for prompt in load_dataset(asked)] == ["1e5"]


@pytest.mark.parametrize("task", [None, "agnews"])
@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_source_is_refused(source: str, task: str | None) -> None:
    with refused(PromptError, "dataset.source", says="has no value"):
        load_dataset(DatasetConfig(source=source, task=task))


MYRIADLAMA = Path(__file__).parents[3] / "shared" / "data" / "myriadlama" / "prompts.jsonl"


@pytest.mark.model
@pytest.mark.skipif(not MYRIADLAMA.exists(), reason="MyriadLAMA's prompts are not here")
def test_myriadlama_is_read_by_the_general_loader(tmp_path: Path) -> None:
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        composed = compose("scan", ["dataset=myriadlama", f"dataset.source={MYRIADLAMA}", f"storage.uri={tmp_path}"])
    prompts = load_dataset(typed(ScanConfig, plain(composed)).dataset)
    assert len(prompts) == 1000
    rows = [json.loads(line) for line in MYRIADLAMA.read_text().splitlines()]
    answers_of: dict[str, set[str]] = {}
    for row in rows:
        answers_of.setdefault(row["tpl"].split("-")[0], set()).add(f" {row['answer']}")
    for prompt, row in zip(prompts, rows, strict=True):
        assert prompt.answer is not None
        assert (prompt.id, prompt.targets[prompt.answer]) == (row["uuid"], f" {row['answer']}")
        near = answers_of[row["tpl"].split("-")[0]]
        assert len(near & set(prompt.targets)) == min(4, len(near))
    prepared = prepare(typed(ScanConfig, plain(composed)))
    assert prepared.about["skipped_not_one_token"] == 1000 - len(prepared.prompts) > 0
    list(encode(load_tokenizer(prepared.local, False), prepared.prompts, prepared.info.context_length))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "targets": ["b"]}\n{"prompt": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"prompt": "a", "targets": ["b"]}\n[1]\n', "line 2 is not a JSON object"),
        ("a.jsonl", '{"prompt": "a"}\n', "line 1: has no 'targets'"),
        ("a.jsonl", '{"targets": ["a"]}\n', "line 1: has no 'prompt'"),
        ("a.jsonl", '{"prompt": 5, "targets": ["a"]}\n', "line 1: prompt must be a text, not 5"),
        ("a.jsonl", '{"prompt": "a", "targets": "b"}\n', "line 1: targets must be a list of texts, not 'b'"),
        ("a.jsonl", '{"prompt": "a", "targets": ["b"], "answer": "c"}\n', "line 1: answer 'c' is not one of"),
        ("a.csv", "prompt,id\na,b\n", "its header: has no 'targets'"),
        ("a.csv", "prompt,answer\na,\n", "line 2: has no 'targets'"),
        (
            "a.jsonl",
            '{"prompt": "a", "answer": 5}\n',
            "line 1: answer must be a text where there are no targets, not 5",
        ),
        ("a.jsonl", '{"prompt": "a", "targets": ["b"], "id": [1]}\n', "line 1: id must be a text or a number, not [1]"),
        ("a.jsonl", '{"prompt": "a", "targets": ["b"], "id": NaN}\n', "line 1: id must be a text or a number, not nan"),
        (
            "a.jsonl",
            '{"prompt": "a", "answer": "b", "group": {}}\n',
            "line 1: group must be a text or a number, not {}",
        ),
        ("a.jsonl", '{"prompt": "a", "targets": ["b", 5]}\n', "line 1: targets must be a list of texts, not ['b', 5]"),
        ("a.jsonl", '{"prompt": true, "targets": ["b"]}\n', "line 1: prompt must be a text, not True"),
        ("a.jsonl", '{"prompt": "a", "id": ' + "9" * 5000 + "}\n", "line 1 is not JSON that can be read: Exceeds"),
        ("a.csv", 'prompt,targets\na,"[""b"""\n', "line 2: targets must be a JSON list"),
        ("a.jsonl", '{"prompt": "a", "answer": " "}\n', "line 1: answer must be a text where there are no targets"),
        ("a.csv", 'prompt,targets\na,"[""b""]"\nc\n', "line 3 has not as many cells as the header"),
        ("a.csv", 'prompt,targets\na,"[""b""]"\n"x"y,z\n', "after line 2: is not CSV"),
        ("a.csv", "prompt,targets\na,b|c\n", "line 2: targets must be a JSON list"),
        ("a.parquet", "not parquet", "is not Parquet"),
        (
            "a.txt",
            "",
            "neither a built-in data set (facts, facts-masked) nor a file that ends in .jsonl, .parquet, .csv",
        ),
    ],
)
def test_a_broken_file_is_refused_with_the_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with refused(PromptError, "dataset.source", says=re.escape(str(tmp_path / name))) as caught:
        load_prompts(str(tmp_path / name))
    assert message in str(caught.value)


def test_a_lone_surrogate_is_refused_by_its_prompt_also_where_targets_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\\ud800", "answer": "b"}\n{"prompt": "c", "answer": "d\\udfff"}\n')
    with refused(PromptError, "dataset.source", says="prompt '000000' holds a lone surrogate"):
        check_prompts(load_prompts(str(tmp_path / "a.jsonl")))


def test_an_index_without_targets_is_no_answer(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "a", "targets": ["b", "c"], "answer": "1"}\n{"prompt": "d", "targets": null, "answer": "0"}\n'
    )
    with refused(PromptError, says="a.jsonl: line 2: there are no targets, of which answer is the index"):
        load_prompts(str(tmp_path / "a.jsonl"), None, DatasetConfig(answer_is="index"))


def test_ids_and_groups_may_be_what_something_else_is_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n')
    found = load_prompts(str(tmp_path / "a.jsonl"), None, DatasetConfig(columns={"id": "prompt", "group": "answer"}))
    assert [prompt.id for prompt in found] == ["a", "c"]


def test_a_file_that_is_not_there_is_one_line() -> None:
    with refused(PromptError, "dataset.source", "/nowhere/a.jsonl", says="cannot be read: no such file"):
        load_prompts("/nowhere/a.jsonl")
    # Bound and not listening.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with refused(PromptError, "dataset.source", says=r"/a\.jsonl: cannot be read: nothing answers there"):
            load_prompts(f"http://127.0.0.1:{bound.getsockname()[1]}/a.jsonl")


def test_an_address_is_printed_without_what_it_hides() -> None:
    assert without_credentials("https://me:secret@host/a.csv?token=secret") == "https://host/a.csv"
    assert without_credentials("/data/a.csv") == "/data/a.csv"
    with refused(PromptError, "dataset.source", says="cannot be read: .*AWS_ENDPOINT_URL"):
        load_prompts("s3://bucket/a.jsonl")
    with refused(PromptError, "dataset.source") as caught:
        load_prompts("memory://me:secret@host/a.jsonl")
    assert "secret" not in str(caught.value)


def test_a_name_that_is_no_utf8_is_refused() -> None:
    with refused(PromptError, "dataset.source", says="has bytes that are no UTF-8"):
        load_prompts("e\udce8.jsonl")

"""Lists of neurons in files: every cell is a whole number, or a refusal names its line, its column and the value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neg_service.errors import ConfigurationError
from neg_service.measures.lists import neurons_in
from tests.readers import list_in
from tests.refusals import ANY, refused


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
        ("n.jsonl", "[0, 1]", "line 1: is not a JSON object"),
        ("n.jsonl", '{"layer": 0, "neuron": 1}{"layer": 0}', "line 1 is not JSON: Extra data at column 26"),
    ],
)
def test_a_list_says_whole_numbers_in_every_cell(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with refused(ConfigurationError, "neurons.list", says=re.escape(f"{tmp_path}/{name}")) as caught:
        list_in(tmp_path / name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("neurons", "refusal"),
    [
        (pa.array([1, None]), ("neurons.list", ANY, "row 1: neuron must be a whole number, and is empty")),
        (pa.array([1.0, 3.7]), ("neurons.list", ANY, "needs whole numbers in a column 'neuron'")),
        (pa.array([True, False]), ("neurons.list", ANY, "needs whole numbers in a column 'neuron'")),
        (pa.array([1, 2**63], pa.uint64()), ("neurons.list", ANY, "rows from 0 on: Integer value")),
    ],
)
def test_a_list_in_parquet_says_whole_numbers_in_every_cell(
    tmp_path: Path, neurons: pa.Array, refusal: tuple[Any, ...]
) -> None:
    pq.write_table(pa.table({"layer": [0, 0], "neuron": neurons}), tmp_path / "n.parquet")
    with refused(ConfigurationError, *refusal):
        list_in(tmp_path / "n.parquet")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("n.csv", "layer,expert,neuron\n1,3,0\n1,,7\n0, ,2\n1,3,0\n"),
        ("n.jsonl", '{"layer": 1, "expert": 3, "neuron": 0}\n{"layer": 1, "neuron": 7}\n'
         '{"layer": 0, "expert": null, "neuron": 2}\n'),
    ],
)  # fmt: skip
def test_experts_are_read_where_there_are_some(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert list_in(tmp_path / name) == [[0, 2, None], [1, 7, None], [1, 0, 3]]


def test_experts_are_read_from_parquet(tmp_path: Path) -> None:
    for expert, expected in (
        (pa.array([3, None]), [[0, 2, None], [1, 0, 3]]),
        (pa.array([None, None]), [[0, 2], [1, 0]]),
        (pa.array([None, None], pa.int16()), [[0, 2], [1, 0]]),
    ):
        pq.write_table(pa.table({"layer": [1, 0], "expert": expert, "neuron": [0, 2]}), tmp_path / "n.parquet")
        assert list_in(tmp_path / "n.parquet") == expected
    pq.write_table(pa.table({"layer": [1], "expert": ["x"], "neuron": [0]}), tmp_path / "n.parquet")
    with pytest.raises(ConfigurationError, match="needs whole numbers in a column 'expert'"):
        list_in(tmp_path / "n.parquet")


def test_an_expert_that_is_no_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text("layer,neuron,expert\n0,1,\n0,1,x\n")
    with pytest.raises(
        ConfigurationError, match="line 3: expert must be a whole number, of at most 18 digits, not 'x'"
    ):
        list_in(tmp_path / "n.csv")


def test_where_a_list_is_from_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "n.csv").write_text("layer,neuron\n0,1\n")
    monkeypatch.chdir(tmp_path)
    assert neurons_in("n.csv").source == str(tmp_path / "n.csv")

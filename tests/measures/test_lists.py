"""Lists of neurons in files: every cell is a whole number, or a refusal names its line, its column and the value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neg_service.errors import ConfigurationError
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

"""The column `wanted` of a data set, in all formats that have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neg_service.errors import PromptError
from neg_service.prompts.prompt import digest
from neg_service.prompts.sources import load_prompts
from neg_service.prompts.wanted import wanted_of

ROWS: list[tuple[Any, Any]] = [
    (None, None),
    (0.8, ("probability", 0.8, None)),
    ({"probability": 0.3}, ("probability", 0.3, None)),
    ("top", ("top", 0.0, None)),
    ({"top": True}, ("top", 0.0, None)),
    ({"margin": 2}, ("margin", 2.0, None)),
    ({"margin": -1.5, "against": " London"}, ("margin", -1.5, " London")),
]


def test_rows_of_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{i}", "targets": [" a"], "wanted": given} for i, (given, _) in enumerate(ROWS)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert [prompt.wanted for prompt in load_prompts(str(file))] == [expected for _, expected in ROWS]


def test_rows_of_parquet_and_csv(tmp_path: Path) -> None:
    structs = [
        {"probability": None, "margin": 2.0, "against": " b"},
        {"probability": 0.5, "margin": None, "against": None},
    ]
    table = pa.table({"prompt": ["p", "q"], "targets": [[" a"], [" a"]], "wanted": structs})
    pq.write_table(table, tmp_path / "rows.parquet")
    found = load_prompts(str(tmp_path / "rows.parquet"))
    assert [prompt.wanted for prompt in found] == [("margin", 2.0, " b"), ("probability", 0.5, None)]
    (tmp_path / "rows.csv").write_text('prompt,targets,wanted\np,"["" a""]",0.25\nq,"["" a""]",top\nr,"["" a""]",\n')
    found = load_prompts(str(tmp_path / "rows.csv"))
    assert [prompt.wanted for prompt in found] == [("probability", 0.25, None), ("top", 0.0, None), None]


@pytest.mark.parametrize(
    "given",
    [0, 1, -0.5, True, "most", "1e999", {"probability": 2}, {"margin": "x"}, {"against": " b"}, {"top": False}, []],
)
def test_what_is_no_wish(given: Any) -> None:
    with pytest.raises(PromptError, match="'p7': wanted must be a probability above 0 and below 1, top, or"):
        wanted_of("p7", given)


def test_wishes_are_part_of_what_a_data_set_is(tmp_path: Path) -> None:
    digests = set()
    for wanted in (None, 0.8, 0.9):
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps({"prompt": "p", "targets": [" a"], "wanted": wanted}))
        digests.add(digest(load_prompts(str(file))))
    assert len(digests) == 3

"""Studies that a report is made of, as they are loaded: what is damaged, or lies nowhere, is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neg_service.errors import DestinationError
from neg_service.report.sections.loading import load
from neg_service.studies.kinds import STUDY_VIEWS
from tests.refusals import ANY, refused


def test_a_run_that_a_study_names_at_an_impossible_place_is_told_of_the_setting_that_was_given(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(json.dumps({"runs": {"sweep": "gs://bucket/run"}}))
    with refused(DestinationError, "runs", says="scheme 'gs' is unknown"):
        load([str(tmp_path)], None, STUDY_VIEWS)


def test_a_study_that_nobody_shows_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    with refused(DestinationError, "runs", says="there is no run, no study and no probe"):
        load([str(tmp_path)], None, [view for view in STUDY_VIEWS if view.kind != "study"])


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        (b"{", ("runs", ANY, "study.json: is not JSON")),
        (b"[" * 100_000, ("runs", ANY, "study.json: is JSON with lists or objects nested too deep")),
        (b"[]", ("runs", ANY, r"study.json: must be a JSON object, not \[\]")),
        (b"{}", ("runs", ANY, "found.parquet: is damaged: .*CRC checksum")),
    ],
)
def test_studies_that_are_damaged_are_one_line(tmp_path: Path, said: bytes, refusal: tuple[Any, ...]) -> None:
    table = tmp_path / "found.parquet"
    pq.write_table(pa.table({"a": range(100)}), table, write_page_checksum=True, use_dictionary=False)
    content = bytearray(table.read_bytes())
    column = pq.read_metadata(table).row_group(0).column(0)
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    table.write_bytes(content)
    (tmp_path / "study.json").write_bytes(said)
    with refused(DestinationError, *refusal):
        load([str(tmp_path)], None, STUDY_VIEWS)

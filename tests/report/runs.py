"""Runs of a tiny model that reports are made of, and what stands in a section."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neg_service.config import DatasetConfig, JobConfig, ModelConfig, NeuronsConfig, ScanConfig, StorageConfig
from neg_service.report.page import Section
from neg_service.report.sections import sections_of
from neg_service.report.sections.loading import Loaded
from neg_service.storage.reader import Run
from tests.here import scan_here

ROWS = [
    {"prompt": f"w{i} <b>w{i + 1}</b>", "targets": [" w7", " w8", " w11"], "answer": " w8", "id": f"p{i}"}
    for i in range(20, 25)
]
REFERENCES = [["w50 w51", " w1"], ["w53 w54 w55", " w2"], ["w56 w57", " w9"]]


def run_of(
    place: Path, model: Path, measure: dict[str, Any], neurons: NeuronsConfig | None = None, *, answered: bool = True,
    shards: int | None = None,
) -> Run:  # fmt: skip
    """A run of a tiny model on `ROWS`, with answers or without, of some of its shards if not all."""
    file = place / f"prompts{answered}.jsonl"
    rows = ROWS if answered else [{key: row[key] for key in ("prompt", "targets", "id")} for row in ROWS]
    file.write_text("\n".join(map(json.dumps, rows)))
    config = ScanConfig(
        model=ModelConfig(source=str(model)),
        dataset=DatasetConfig(source=str(file)),
        measure=measure,
        neurons=neurons or NeuronsConfig(),
        storage=StorageConfig(uri=str(place / "runs")),
        job=JobConfig(shard_size=2),
    )
    return scan_here(config, shards)


def only_section(run: Run) -> Section:
    """What a report says of a run, beside how it was made."""
    overview, section = sections_of(Loaded([run]))
    assert overview.title == "What was run"
    return section


def grid_of(section: Section, name: str) -> list[dict[str, str]]:
    """The rows of a table that people sort and filter."""
    (grid,) = [grid for grid in section.grids if grid.name.startswith(name)]
    assert grid.is_interactive
    return [dict(zip(grid.head, row, strict=True)) for row in grid.rows]


def titled(section: Section, title: str) -> list[dict[str, str]]:
    """The rows of the table with this title."""
    (grid,) = [grid for grid in section.grids if grid.title == title]
    return [dict(zip(grid.head, row, strict=True)) for row in grid.rows]

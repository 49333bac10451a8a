"""A study and its report on a real S3 server, and once more after the whole was moved to another prefix."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import s3fs

from infra.s3.server import BUCKET, Server, server_on
from jobs.report import write_report
from jobs.studies import put_results
from neg_service.config import DatasetConfig, ModelConfig, ScanConfig, StorageConfig
from neg_service.errors import DestinationError
from neg_service.studies.linearity.options import LinearityOptions
from neg_service.studies.linearity.pipeline import run_linearity
from neg_service.studies.scans import StudyScans
from tests.here import scan_here
from tests.refusals import refused
from tests.s3 import acting_as


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = server_on(tmp_path / "s3")
    started.start()
    with acting_as(started.writer):
        yield started
    started.stop()


@pytest.mark.faults
def test_a_study_and_its_report_lie_on_s3_and_can_be_moved(
    server: Server, tmp_path: Path, tiny_directory: Path
) -> None:
    rows = [{"prompt": f"w{i} w9", "targets": [" w7", " w8"], "answer": " w7"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = ScanConfig(
        model=ModelConfig(source=str(tiny_directory)),
        dataset=DatasetConfig(source=str(tmp_path / "rows.jsonl")),
        storage=StorageConfig(uri=f"s3://{BUCKET}/first", endpoint_url=server.endpoint_url),
    )
    options = LinearityOptions(
        answered="all", neurons=5, grid="coarse", steps=2, ranges=[1.0, 2.0], range_prompts=1, sets=[2], draws=20
    )

    scans = StudyScans(config, scan_here)
    tables = run_linearity(options, scans).arrow()
    runs = dict(scans.runs)
    about = {"study": asdict(options), "dataset": asdict(config.dataset), "runs": runs}
    uri = put_results(config, "study", about, tables, {})
    assert uri.startswith(f"s3://{BUCKET}/first/")
    filesystem = s3fs.S3FileSystem(endpoint_url=server.endpoint_url)

    def report(of: str, out: str) -> str:
        assert write_report([of], out, server.endpoint_url) == f"{out}/report.html"
        page = filesystem.cat(f"{out}/report.html".removeprefix("s3://")).decode()
        for name in re.findall(r'id="figure-([^"]+)"', page):
            assert filesystem.exists(f"{out}/figures/{name}-dark.png".removeprefix("s3://"))
        return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", page)

    first = report(uri, f"s3://{BUCKET}/reports/1")
    assert first.count("<figure") >= 9
    for key in filesystem.find(f"{BUCKET}/first"):
        filesystem.copy(key, key.replace("/first/", "/second/"))
        filesystem.rm_file(key)
    moved = uri.replace("/first/", "/second/")
    assert report(moved, f"s3://{BUCKET}/reports/2") == first
    # With a run gone it is said which.
    filesystem.rm(f"{BUCKET}/second/{runs['sweep'].rsplit('/', 1)[-1]}", recursive=True)
    with refused(DestinationError, says=r"its run s3://.*sweep.* \(sweep\) is neither there nor beside"):
        write_report([moved], str(tmp_path), server.endpoint_url)

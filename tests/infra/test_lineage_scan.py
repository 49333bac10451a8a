"""What a lineage server hears of a scan on Ray."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import UUID

import pytest

from neg_service.cluster.scan import run
from tests.lineage import Server, planned, require_valid, words_of

pytestmark = pytest.mark.infra


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_scan_says_that_it_starts_and_completes(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = words_of(tiny_directory, tmp_path)
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "a-key-of-mine")
    with Server() as server:
        prepared = planned(asked, server.url)
        summary = run(prepared, stay_connected=True)
    start, end = server.events
    for event in (start, end):
        require_valid(event)
    assert (start["eventType"], end["eventType"]) == ("START", "COMPLETE")
    assert server.asked == [("/api/v1/lineage", "Bearer a-key-of-mine")] * 2
    assert start["run"]["runId"] == end["run"]["runId"]
    assert UUID(start["run"]["runId"]).version == 7
    assert (end["job"]["namespace"], end["job"]["name"]) == ("neg_service", "mine")
    ours = end["run"]["facets"]["neg_service"]
    assert (ours["fingerprint"], ours["uri"]) == (prepared.fingerprint, prepared.uri)
    assert (ours["prompts"], ours["shards_done"], ours["prompts_now"]) == (3, 2, 3)
    assert ours["bytes_now"] == summary.bytes_now
    model, data = end["inputs"]
    assert (data["namespace"], data["name"]) == ("file", str(tmp_path / "words.jsonl"))
    assert data["facets"]["version"]["datasetVersion"] == prepared.identity["prompts"]["sha256"]
    assert model["facets"]["version"]["datasetVersion"] == prepared.info.identity
    assert [one["name"] for one in end["outputs"]] == [f"{prepared.uri}/{name}" for name in prepared.tables]
    stored = [one["outputFacets"]["outputStatistics"] for one in end["outputs"]]
    assert {one["fileCount"] for one in stored} == {2}
    assert sum(one["size"] for one in stored) == summary.bytes_now
    # The same again is another run of the same job, in which nothing was done.
    again = planned(asked, f"file://{tmp_path}/events.jsonl")
    run(again, stay_connected=True)
    run(again, stay_connected=True)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"] * 2
    assert len({event["run"]["runId"] for event in (start, *events)}) == 3
    assert events[-1]["run"]["facets"]["neg_service"]["prompts_now"] == 0
    assert "a-key-of-mine" not in json.dumps([start, end, *events])

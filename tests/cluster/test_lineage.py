"""OpenLineage events of real scans, at a real server on loopback and in a file."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import jsonschema
import pytest
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.facet_v2 import (
    dataset_version_dataset,
    error_message_run,
    job_type_job,
    output_statistics_output_dataset,
    processing_engine_run,
    schema_dataset,
)

import neg_service
from neg_service.cluster.lineage import Lineage
from neg_service.cluster.prepare import Prepared, prepare
from neg_service.cluster.scan import run
from neg_service.config import ScanConfig, typed
from neg_service.errors import ConfigurationError, NegServiceError, StorageError
from neg_service.storage.run import Snapshot
from tests.refusals import refused

FACETS = {
    "processing_engine": processing_engine_run.ProcessingEngineRunFacet,
    "errorMessage": error_message_run.ErrorMessageRunFacet,
    "jobType": job_type_job.JobTypeJobFacet,
    "version": dataset_version_dataset.DatasetVersionDatasetFacet,
    "schema": schema_dataset.SchemaDatasetFacet,
    "outputStatistics": output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet,
}
OUR_FACET = json.loads(
    (Path(neg_service.__file__).parent.parent / "infra" / "openlineage" / "NegServiceRunFacet.json").read_text()
)


class Server:
    """A lineage server: keeps what is posted, with the path and the key."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.asked.append((self.path, self.headers["Authorization"]))
                outer.events.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(201)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


@pytest.fixture
def asked(tiny_directory: Path, tmp_path: Path) -> dict[str, Any]:
    words = tmp_path / "words.jsonl"
    words.write_text("".join(f'{{"prompt": "w{i} w2", "targets": [" w3", " w4"]}}\n' for i in range(3)))
    return {
        "model": {"source": str(tiny_directory)},
        "dataset": {"source": str(words)},
        "job": {"shard_size": 2, "name": "mine"},
        "cluster": {"replicas": 1, "cpus_per_replica": 1},
        "storage": {"uri": str(tmp_path / "results")},
    }


def planned(asked: dict[str, Any], lineage: str) -> Prepared:
    return prepare(typed(ScanConfig, {**asked, "job": {**asked["job"], "lineage": lineage}}))


def require_valid(event: dict[str, Any]) -> None:
    """An event as the client's own classes have it: they take each of its fields, and check times, ids and URIs."""

    def facets(found: dict[str, Any]) -> None:
        # The client says its own version among tags.
        for name, facet in ((name, one) for name, one in found.items() if name != "tags"):
            own = {key: value for key, value in facet.items() if not key.startswith("_")}
            assert facet["_producer"].startswith("urn:neg-service:")
            if name == "neg_service":
                jsonschema.validate({name: facet}, OUR_FACET)
                assert facet["_schemaURL"].partition("#")[0] == OUR_FACET["$id"]
                assert facet["_schemaURL"].partition("#")[2].removeprefix("/$defs/") in OUR_FACET["$defs"]
            else:
                assert FACETS[name](**own)._schemaURL == facet["_schemaURL"]

    for part in (event["run"], event["job"], *event["inputs"], *event["outputs"]):
        facets(part["facets"])
    for output in event["outputs"]:
        facets(output.get("outputFacets", {}))
    made = RunEvent(
        eventType=RunState[event["eventType"]],
        eventTime=event["eventTime"],
        producer=event["producer"],
        run=Run(**event["run"]),
        job=Job(**event["job"]),
        inputs=[InputDataset(**own) for own in event["inputs"]],
        outputs=[OutputDataset(**own) for own in event["outputs"]],
    )
    assert made.schemaURL == event["schemaURL"]
    assert datetime.fromisoformat(event["eventTime"]).tzinfo is not None


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_scan_says_that_it_starts_and_completes(
    asked: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "a-key-of-mine")
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


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (StorageError("no answer from http://me:abcdefgh1@host"), "FAIL", "no answer from http://***@host"),
        (RuntimeError("odd\nmore"), "FAIL", "RuntimeError: odd"),
        (KeyboardInterrupt(), "ABORT", "interrupted or stopped"),
        (SystemExit(15), "ABORT", "interrupted or stopped"),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, BaseException) else None,
)
def test_a_scan_says_how_it_failed(
    asked: dict[str, Any], server: Server, error: BaseException, state: str, said: str
) -> None:
    with pytest.raises(type(error)), Lineage(planned(asked, server.url)):
        raise error
    start, end = server.events
    assert (start["eventType"], end["eventType"]) == ("START", state)
    require_valid(end)
    assert end["run"]["facets"]["errorMessage"]["message"] == said


def test_a_scan_whose_shards_failed_has_failed(asked: dict[str, Any], server: Server) -> None:
    with Lineage(planned(asked, f"{server.url}/own/path")) as lineage:
        lineage.done(shards=1, prompts=2, n_bytes=9, failed={1: "NaN"}, at=_away)
    end = server.events[-1]
    require_valid(end)
    assert (end["eventType"], server.asked[-1][0]) == ("FAIL", "/own/path")
    assert end["run"]["facets"]["errorMessage"]["message"] == "1 shards failed, shard 1 with: NaN"
    assert end["run"]["facets"]["neg_service"]["shards_done"] == 1


def _away() -> Snapshot:
    raise StorageError("away")


@contextmanager
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def closed() -> Iterator[str]:
    """A port on which nobody listens."""
    yield "http://127.0.0.1:9"


@pytest.mark.parametrize("server_that_is", [closed, silent])
def test_a_server_that_is_away_costs_a_warning(
    asked: dict[str, Any], server_that_is: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with server_that_is() as url, caplog.at_level(logging.WARNING, "neg_service"):
        lineage = Lineage(planned(asked, url))
        began = time.monotonic()
        with lineage:
            assert time.monotonic() - began < 1
            lineage.done(shards=2, prompts=3, n_bytes=9, failed={}, at=_away)
        assert time.monotonic() - began < 7
    told = [one.getMessage() for one in caplog.records if one.name == "neg_service.cluster.lineage"]
    assert len(told) == 1
    assert told[0].startswith(f"job.lineage={url}: lineage is not told, the scan goes on")


def test_what_is_no_place_for_events_is_refused_before_anything_is_done(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, says in [
        (f"{tmp_path}/nowhere/events.jsonl", "No such file"),
        (f"{tmp_path}/file/events.jsonl", "Not a directory"),
        (str(tmp_path), "Is a directory"),
        ("kafka://host/topic", "must be an http"),
        ("http://", "give http"),
        ("https://host/x?api_key=hidden", "OPENLINEAGE_API_KEY"),
        ("http://me:hidden@host", "holds credentials"),
        ("http://host:port", "no URL of a server"),
    ]:
        with refused(ConfigurationError, "job.lineage", says=says) as caught:
            run(planned(asked, place))
        assert "hidden" not in str(caught.value)
    assert not (tmp_path / "results").exists()


def test_who_lacks_the_extra_is_told_its_name(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openlineage.client", None)
    with refused(ConfigurationError, "job.lineage", says="the extra `lineage`"):
        Lineage(planned(asked, f"{tmp_path}/events.jsonl"))


def test_without_a_place_nothing_is_sent(asked: dict[str, Any]) -> None:
    with pytest.raises(NegServiceError), Lineage(prepare(typed(ScanConfig, asked))):
        raise NegServiceError("odd")

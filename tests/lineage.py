"""A lineage server on loopback, and what events must be."""

from __future__ import annotations

import json
import threading
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jsonschema
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
from neg_service.cluster.prepare import Prepared, prepare
from neg_service.config import ScanConfig, typed

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


def words_of(tiny_directory: Path, tmp_path: Path) -> dict[str, Any]:
    """The settings of a scan of three prompts in two shards."""
    words = tmp_path / "words.jsonl"
    words.write_text("".join(f'{{"prompt": "w{i} w2", "targets": [" w3", " w4"]}}\n' for i in range(3)))
    return {
        "model": {"source": str(tiny_directory)},
        "dataset": {"source": str(words)},
        "job": {"shard_size": 2, "name": "mine"},
        "cluster": {"replicas": 1, "cpus_per_replica": 1},
        "storage": {"uri": str(tmp_path / "results")},
    }

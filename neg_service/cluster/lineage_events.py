"""Events of a scan as OpenLineage has them: job and run, what goes in, what comes out, and our own facet of the run.

Apart from `lineage.py`, because OpenLineage's client is an extra and need not be there.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import attr
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.facet_v2 import (
    RunFacet,
    dataset_version_dataset,
    error_message_run,
    job_type_job,
    output_statistics_output_dataset,
    processing_engine_run,
    schema_dataset,
)
from openlineage.client.uuid import generate_static_uuid

import neg_service
from neg_service.cluster.prepare import Prepared
from neg_service.models.source import DEFAULT
from neg_service.places import is_chain, name_of, split_scheme, without_credentials
from neg_service.prompts.facts import BUILT_IN
from neg_service.storage.run import Snapshot

PRODUCER = f"urn:neg-service:{neg_service.__version__}"
NAMESPACE = "neg_service"
# Its text: infra/openlineage/NegServiceRunFacet.json.
SCHEMA = "urn:neg-service:openlineage:1-0-0:NegServiceRunFacet.json#/$defs/NegServiceRunFacet"


@attr.define
class NegServiceRunFacet(RunFacet):
    """What decides the numbers of a scan, and how far it is."""

    fingerprint: str
    uri: str
    measure: str
    prompts: int
    shards: int
    shards_done: int | None = attr.field(default=None)
    prompts_now: int | None = attr.field(default=None)
    bytes_now: int | None = attr.field(default=None)

    @staticmethod
    def _get_schema() -> str:
        return SCHEMA


def event_of(
    prepared: Prepared,
    state: str,
    began: datetime,
    problem: str | None,
    counts: dict[str, int],
    at: Snapshot | None,
) -> RunEvent:
    """An event of the start at `began`; problem: why it failed; counts and `at`: of the end, as far as it is known."""
    facets: dict[str, Any] = {
        "neg_service": NegServiceRunFacet(
            fingerprint=prepared.fingerprint,
            uri=prepared.uri,
            measure=str(prepared.config.measure["name"]),
            prompts=prepared.plan.n_prompts,
            shards=prepared.plan.n_shards,
            producer=PRODUCER,
            **counts,
        ),
        "processing_engine": processing_engine_run.ProcessingEngineRunFacet(
            version=neg_service.__version__, name="neg_service", producer=PRODUCER
        ),
    }
    if problem is not None:
        facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(
            message=problem, programmingLanguage="Python", producer=PRODUCER
        )
    kind = job_type_job.JobTypeJobFacet(
        processingType="BATCH", integration="NEG_SERVICE", jobType="SCAN", producer=PRODUCER
    )
    return RunEvent(
        eventType=RunState[state],
        eventTime=datetime.now(UTC).isoformat(),
        # The same for all events of this start, and of no other.
        run=Run(runId=str(generate_static_uuid(began, prepared.uri.encode())), facets=facets),
        job=Job(namespace=NAMESPACE, name=job_name(prepared), facets={"jobType": kind}),
        producer=PRODUCER,
        inputs=[_input("model", prepared), _input("dataset", prepared)],
        outputs=[_output(prepared, table, at) for table in prepared.tables],
    )


def job_name(prepared: Prepared) -> str:
    """What all starts of a run are called: the run's name without its fingerprint."""
    return name_of(prepared.uri).removesuffix(f"-{prepared.fingerprint}")


def _input(kind: str, prepared: Prepared) -> InputDataset:
    asked = prepared.request[kind]
    namespace, name = dataset_name(str(asked["source"]))
    known = prepared.identity.get("prompts", {}) if kind == "dataset" else {}
    version = asked.get("revision") or known.get("revision") or known.get("sha256") or prepared.info.identity
    facet = dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=str(version), producer=PRODUCER)
    return InputDataset(namespace=namespace, name=name, facets={"version": facet})


def _output(prepared: Prepared, table: str, at: Snapshot | None) -> OutputDataset:
    namespace, name = dataset_name(f"{prepared.uri}/{table}")
    columns = [
        schema_dataset.SchemaDatasetFacetFields(name=own.name, type=str(own.type)) for own in prepared.tables[table]
    ]
    found = OutputDataset(
        namespace=namespace,
        name=name,
        facets={"schema": schema_dataset.SchemaDatasetFacet(fields=columns, producer=PRODUCER)},
    )
    if at is not None:
        parts = at.parts[table].values()
        found.outputFacets = {
            "outputStatistics": output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
                size=sum(part.size for part in parts), fileCount=len(parts), producer=PRODUCER
            )
        }
    return found


def dataset_name(place: str) -> tuple[str, str]:
    """Namespace and name as OpenLineage has them: of a bucket and a key, a disk and a path, the hub and an id.

    Of what is read out of an archive or by way of a copy it is the place of the archive, or of what is copied.
    """
    if place == DEFAULT or place in BUILT_IN:
        return NAMESPACE, place
    if is_chain(place):
        return dataset_name(place.rpartition("::")[2])
    scheme, path = split_scheme(without_credentials(place))
    if scheme == "file":
        return "file", path.removeprefix("localhost")
    if not scheme:
        return ("file", path) if path.startswith("/") else ("hub", path)
    host, _, below = path.partition("/")
    return f"{scheme}://{host}", below or name_of(place)

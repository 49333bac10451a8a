"""What probes and studies share: scans that have to be whole, and a place for what was found beside their runs."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from neg_service.cluster.plan import fit_for_a_name
from neg_service.config import ScanConfig
from neg_service.errors import NegServiceError
from neg_service.places import below
from neg_service.storage.reader import Run, open_run
from neg_service.storage.stores import open_store


class IncompleteError(NegServiceError):
    """A scan left shards aside, so that what is made of it would be of other prompts than asked for."""


def finished(config: ScanConfig) -> Run:
    """Run or continue a scan, and open it; Ray is left to the next one.

    Raises:
        IncompleteError: shards were set aside.
    """
    # Slow to load: see `entry.py`.
    from neg_service.cluster.prepare import prepare
    from neg_service.cluster.scan import run

    summary = run(prepare(config), stay_connected=True)
    if summary.failed:
        shard, error = next(iter(summary.failed.items()))
        raise IncompleteError(
            f"{len(summary.failed)} shards of {summary.uri} were set aside, shard {shard} with: {error}; the "
            f"same command tries them again"
        )
    return open_run(summary.uri, config.storage.endpoint_url)


def put_findings(
    config: ScanConfig, kind: str, about: Mapping[str, Any], tables: Mapping[str, pa.Table], files: Mapping[str, bytes]
) -> str:
    """Store tables, `about` as <kind>.json, and files, under a name that follows from `about`; the place's URI."""
    # Slow to load: see `entry.py`.
    from neg_service.models.source import fetch

    model = fetch(config.model.source, config.model.revision, with_weights=False)
    said = {
        "model": {"source": config.model.source, "identity": model.identity, "dtype": config.model.dtype},
        **about,
    }
    fingerprint = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]
    name = fit_for_a_name(config.job.name or f"{model.name}-{kind}")
    uri = below(open_store(config.storage.uri, config.storage.endpoint_url).uri, f"{name}-{fingerprint}")
    store = open_store(uri, config.storage.endpoint_url, config.storage.patience_seconds)
    for name, table in tables.items():
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        store.put(f"{name}.parquet", buffer.getvalue())
    for name, content in files.items():
        store.put(name, content)
    store.put(f"{kind}.json", json.dumps(said, indent=2).encode())
    return store.uri

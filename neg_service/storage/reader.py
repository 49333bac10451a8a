"""Reading a run from anywhere: needs pyarrow, numpy and s3fs, and nothing of what computed it.

    run = neg_service.open_run("results/smollm2-facts-neurgrad-0123456789ab")
    run.table("neurgrad").to_table(columns=["prompt_id", "layer", "neurgrad"])

A run that is still being computed gives what is done. Page checksums are verified on every read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow.dataset as pads

from neg_service.errors import ConfigurationError, DestinationError
from neg_service.storage.objects import ObjectStore, open_store
from neg_service.storage.parts import part_key
from neg_service.storage.run import RUN_FILE, RunDirectory, parse_run_file, schema_from_json


@dataclass(frozen=True)
class Run:
    """An existing run, done or not.

    config: what was asked for and decides the numbers (model, prompts, measure, neurons, plan).
    about: what else is known: versions, sizes, when it began.
    """

    uri: str
    fingerprint: str
    config: dict[str, Any]
    about: dict[str, Any]
    directory: RunDirectory
    schemas: dict[str, Any]

    @property
    def tables(self) -> list[str]:
        """The names of the tables."""
        return list(self.directory.tables)

    @property
    def n_shards(self) -> int:
        """How many shards the plan has."""
        return int(self.config["plan"]["shards"])

    def done(self) -> set[int]:
        """The shards that are done now."""
        return self.directory.done()

    def table(self, name: str) -> pads.Dataset:
        """A pyarrow Dataset over the parts of all shards that are done now, in the order of the prompts.

        Raises:
            ConfigurationError: the run has no such table.
        """
        if name not in self.schemas:
            raise ConfigurationError(f"{self.uri} has no table {name!r}; it has {', '.join(self.tables)}")
        filesystem, root = self.directory.store.arrow()
        checked = pads.ParquetFileFormat(
            default_fragment_scan_options=pads.ParquetFragmentScanOptions(page_checksum_verification=True)
        )
        return pads.dataset(
            [f"{root}/{part_key(name, shard)}" for shard in sorted(self.done())],
            schema=self.schemas[name],
            format=checked,
            filesystem=filesystem,
        )


def open_run(uri: str, endpoint_url: str | None = None) -> Run:
    """Open a run directory, local or s3://.

    Raises:
        DestinationError: there is no run at `uri`.
    """
    store: ObjectStore = open_store(uri, endpoint_url)
    content = store.get(RUN_FILE)
    if content is None:
        raise DestinationError(f"{uri}: there is no {RUN_FILE}; give the URI of a run directory")
    parsed = parse_run_file(uri, content)
    schemas = {name: schema_from_json(described) for name, described in parsed["tables"].items()}
    return Run(
        uri=store.uri,
        fingerprint=parsed["fingerprint"],
        config=parsed["identity"],
        about=parsed.get("about", {}),
        directory=RunDirectory(store, parsed["fingerprint"], tuple(schemas)),
        schemas=schemas,
    )

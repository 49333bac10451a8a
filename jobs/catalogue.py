"""python -m jobs.catalogue: register a run as tables of an Iceberg catalogue. `--help` says what can be set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from jobs.entry import EXIT_INCOMPLETE, flag_of, start, value_of
from neg_service.config import JobConfig, StorageConfig
from neg_service.errors import ConfigurationError
from neg_service.settings import setting

if TYPE_CHECKING:
    from neg_service.storage.catalogue import Registration


@dataclass
class CatalogueSettings:
    """Which catalogue; what is not given is what pyiceberg's own configuration says, where keys belong, too."""

    name: str | None = setting(None, "the catalogue's name in pyiceberg's configuration; its default if not given")
    uri: str | None = setting(
        None, "`https://HOST` of a REST catalogue, `sqlite:////PATH.db`, or another that pyiceberg knows"
    )
    warehouse: str | None = setting(None, "where new tables keep their metadata: a path, `s3://bucket/prefix`, a name")
    namespace: str = setting("neg", "of the tables; made where there is none")


@dataclass
class CatalogueConfig:
    """Everything that `python -m jobs.catalogue` is told."""

    run: str = ""
    check: bool = False
    catalogue: CatalogueSettings = field(default_factory=CatalogueSettings)
    storage: StorageConfig = field(default_factory=StorageConfig)
    job: JobConfig = field(default_factory=JobConfig)


def catalogue(config: DictConfig) -> int:
    """Register a run and print what was done."""
    # Slow to load: see `entry.py`.
    from neg_service.storage.catalogue import register_run

    own = config.catalogue
    if own is None:
        raise ConfigurationError(setting="catalogue", value="null", allowed="settings, such as catalogue.uri=URI")
    done = register_run(
        value_of(config, "run"),
        config.storage.endpoint_url,
        name=own.name,
        uri=own.uri,
        warehouse=own.warehouse,
        namespace=own.namespace,
        check=flag_of(config, "check"),
    )
    print(describe(done))
    return EXIT_INCOMPLETE if done.left_out else 0


def describe(done: Registration) -> str:
    """For a person."""
    from neg_service.report.console import aligned, columns

    rows = [
        (one.identifier, *map(str, (one.added, one.replaced, one.removed, one.n_parts, one.n_rows)))
        for one in done.tables
    ]
    left_out = [f"shard {shard}: {problem}" for shard, problem in done.left_out.items()]
    told = aligned([("left out", "\n".join(left_out) or "nothing")])
    if done.former_places:
        told += f"\n{aligned([('place', 'changed: before, the tables read from ' + ', '.join(done.former_places))])}"
    return f"{done.uri}\n{told}\n\n{columns(('table', 'added', 'replaced', 'removed', 'parts', 'rows'), rows)}"


if __name__ == "__main__":
    start("catalogue", catalogue, CatalogueConfig)

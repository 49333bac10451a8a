"""python -m jobs.report: one self-contained page of runs, studies and probes. `--help` says what can be set."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from omegaconf import DictConfig, ListConfig

from jobs.entry import start, value_of
from neg_service.config import JobConfig, StorageConfig
from neg_service.errors import ConfigurationError
from neg_service.places import below
from neg_service.settings import holds


@dataclass
class ReportConfig:
    """Everything that `python -m jobs.report` is told."""

    runs: Any = field(default=None, metadata=holds(str | list[str]))
    out: str = "report"
    title: str | None = None
    storage: StorageConfig = field(default_factory=StorageConfig)
    job: JobConfig = field(default_factory=JobConfig)


def report(config: DictConfig) -> int:
    """Write the page and its figures; prints where."""
    value_of(config, "runs")
    runs = list(config.runs) if isinstance(config.runs, ListConfig) else [config.runs]
    if not runs:
        raise ConfigurationError("name at least one run, study or probe", setting="runs", value="[]")
    print(write_report([str(uri) for uri in runs], str(config.out), config.storage.endpoint_url, config.title))
    return 0


def write_report(uris: list[str], out: str, endpoint_url: str | None, title: str | None = None) -> str:
    """Write report.html and figures/*.png to a directory or prefix; the page's path."""
    # Slow to load: see `entry.py`.
    from neg_service.report.page import render
    from neg_service.report.sections import sections_of
    from neg_service.report.sections.loading import load
    from neg_service.storage.stores import open_store
    from neg_service.studies.kinds import STUDY_VIEWS

    store = open_store(out, endpoint_url, key="out")
    # What is wrong with the place is told before anything is read.
    store.check()
    loaded = load(uris, endpoint_url, STUDY_VIEWS)
    sections = sections_of(loaded, STUDY_VIEWS)
    runs = [*loaded.runs, *(run for study in loaded.studies for run in study.runs.values())]
    about = [run.about for run in runs] or [study.about for study in loaded.studies]
    models = sorted({str(own["model"]["source"]) for own in about if "source" in own.get("model", {})})
    named = title or f"Neurons of {', '.join(models) or 'a model'}"
    made = datetime.now(UTC).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00")
    subtitle = f"neg_service {version('neg-service')}, {made} UTC"
    for section in sections:
        for picture in section.pictures:
            for theme, image in picture.images.items():
                store.put(f"figures/{picture.name}{'' if theme == 'light' else '-dark'}.png", image)
    store.put("report.html", render(named, subtitle, sections).encode())
    return below(store.uri, "report.html")


if __name__ == "__main__":
    start("report", report, ReportConfig)

"""The scans of a study: each is a run of its own, which resumes and is stored as any other.

A study describes a scan by its settings. What runs it is handed in: commands run it on a cluster, tests in their own
process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from neg_service.config import NeuronsConfig, ScanConfig
from neg_service.errors import ConfigurationError
from neg_service.storage.reader import Run

log = logging.getLogger(__name__)


def _allow(settings: ScanConfig) -> None:
    """Refuse nothing."""


@dataclass
class StudyScans:
    """Runs the scans of a study one after the other, and keeps which they were.

    settings: those that all scans share, as a person gave them. run_scan: runs or continues a scan to its end, and
    gives its run. check_scan: refuses settings that cannot be scanned, before anything is. runs: what each run was for,
    and its URI, in their order.
    """

    settings: ScanConfig
    run_scan: Callable[[ScanConfig], Run]
    check_scan: Callable[[ScanConfig], object] = _allow
    runs: list[tuple[str, str]] = field(default_factory=list)

    def settings_of(
        self,
        measure: Mapping[str, Any],
        neurons: NeuronsConfig | None = None,
        dataset: Mapping[str, Any] | None = None,
        shard_size: int | str | None = None,
    ) -> ScanConfig:
        """The settings of a scan: the shared ones with a measure, and with neurons, data and shards of its own.

        It is named by itself, and has no run to resume that was named.

        Raises:
            ConfigurationError: a run is named that is to be extended.
        """
        shared = self.settings
        if shared.job.extend is not None:
            raise ConfigurationError(
                "is of one scan, and a study has many: extend the scan with jobs.scan",
                setting="job.extend",
                value=shared.job.extend,
            )
        job = replace(shared.job, name=None, resume=None)
        return ScanConfig(
            model=shared.model,
            dataset=replace(shared.dataset, **(dataset or {})),
            measure=dict(measure),
            neurons=shared.neurons if neurons is None else neurons,
            cluster=shared.cluster,
            storage=shared.storage,
            job=job if shard_size is None else replace(job, shard_size=shard_size),
        )

    def run(self, purpose: str, settings: ScanConfig, expected: int | None = None) -> Run:
        """The finished run of a scan; `expected` is how many there will be in all, where that is known."""
        of = "" if expected is None else f" of {expected}"
        log.info("scan %d%s: %s", len(self.runs) + 1, of, purpose)
        run = self.run_scan(settings)
        self.runs.append((purpose, run.uri))
        return run

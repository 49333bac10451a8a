"""python -m jobs.study: how linear neurons are, and how well each estimator meets NEG. See `--help`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from jobs.entry import start
from neg_service.config import ScanConfig, plain, typed
from neg_service.studies.linearity.options import LinearityOptions, check_options

if TYPE_CHECKING:
    import pyarrow as pa

    from jobs.studies import StudyOutput
    from neg_service.studies.scans import StudyScans


@dataclass
class StudyConfig(ScanConfig):
    """Everything that `python -m jobs.study` is told: a scan's settings without its measure, and the study's."""

    study: LinearityOptions = field(default_factory=LinearityOptions)


def study(config: DictConfig) -> int:
    """Scan, compare, store tables, and print them."""
    # Slow to load: see `entry.py`.
    from jobs.studies import StudyOutput, run_study
    from neg_service.cluster.prepare import to_be_stored
    from neg_service.studies.linearity.pipeline import run_linearity
    from neg_service.studies.linearity.report import tables_text

    asked = typed(StudyConfig, {key: value for key, value in plain(config).items() if key != "measure"})
    check_options(asked.study)

    def describe(scans: StudyScans, tables: Mapping[str, pa.Table]) -> StudyOutput:
        about = {
            "study": asdict(asked.study),
            "dataset": to_be_stored(asked.dataset),
            "neurons": asdict(asked.neurons),
            "runs": dict(scans.runs),
        }
        return StudyOutput(about, tables_text(tables))

    return run_study(asked, "study", lambda scans: run_linearity(asked.study, scans), describe)


if __name__ == "__main__":
    start("study", study, StudyConfig)

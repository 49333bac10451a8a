"""python -m jobs.probe: skill neurons of tasks, and how well they do them without the model's head. See `--help`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from jobs.entry import start
from neg_service.config import ScanConfig, plain, typed
from neg_service.studies.skills.options import SkillOptions, check_options

if TYPE_CHECKING:
    import pyarrow as pa

    from jobs.studies import StudyOutput
    from neg_service.studies.scans import StudyScans

_HEADING = "accuracy on test, in percent; in brackets how many neurons, chosen on valid"


@dataclass
class ProbeConfig(ScanConfig):
    """Everything that `python -m jobs.probe` is told: a scan's settings without its measure, and the probe's."""

    probe: SkillOptions = field(default_factory=SkillOptions)


def probe(config: DictConfig) -> int:
    """Scan, rank, probe, analyse; store tables and plots, and print them."""
    # Slow to load: see `entry.py`.
    from jobs.studies import StudyOutput, run_study
    from neg_service.cluster.prepare import to_be_stored
    from neg_service.studies.skills.pipeline import run_skills
    from neg_service.studies.skills.plots import plots
    from neg_service.studies.skills.report import tables_text

    asked = typed(ProbeConfig, {key: value for key, value in plain(config).items() if key != "measure"})
    check_options(asked.probe)

    def describe(scans: StudyScans, tables: Mapping[str, pa.Table]) -> StudyOutput:
        dataset = to_be_stored(asked.dataset)
        about = {
            "probe": asdict(asked.probe),
            # Each scan has a split, a number of rows and prompts of its own.
            "dataset": {key: value for key, value in dataset.items() if key not in ("split", "limit", "ids")},
            "runs": list(dict.fromkeys(uri for _, uri in scans.runs)),
        }
        files = {f"plots/{name}": image for name, image in plots(tables).items()}
        return StudyOutput(about, tables_text(tables), _HEADING, files)

    return run_study(asked, "probe", lambda scans: run_skills(asked.probe, scans), describe)


if __name__ == "__main__":
    start("probe", probe, ProbeConfig)

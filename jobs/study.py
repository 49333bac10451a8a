"""python -m jobs.study: how linear neurons are, and how well each estimator meets NEG. See `--help`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from omegaconf import DictConfig

from jobs.entry import EXIT_INCOMPLETE, say, start
from jobs.findings import IncompleteError, finished, put_findings
from neg_service.config import NeuronsConfig, ScanConfig, plain, typed
from neg_service.estimation.options import Options
from neg_service.report.study import study_text
from neg_service.storage.reader import Run

log = logging.getLogger(__name__)


@dataclass
class StudyConfig(ScanConfig):
    """Everything that `python -m jobs.study` is told: a scan's settings without its measure, and the study's."""

    study: Options = field(default_factory=Options)


def study(config: DictConfig) -> int:
    """Scan, compare, store tables, and print them."""
    # Slow to load: see `entry.py`.
    from neg_service.cluster.connection import disconnect
    from neg_service.cluster.prepare import prepare, to_be_stored
    from neg_service.estimation.study import check_options, run_study

    asked = typed(StudyConfig, {key: value for key, value in plain(config).items() if key != "measure"})
    check_options(asked.study)

    def of(measure: Mapping[str, Any], neurons: NeuronsConfig, ids: Sequence[str] | None = None) -> ScanConfig:
        dataset = asked.dataset if ids is None else replace(asked.dataset, ids=list(ids))
        job = replace(asked.job, name=None, resume=None, limit=asked.job.limit if ids is None else None)
        return ScanConfig(
            model=asked.model, dataset=dataset, measure=dict(measure), neurons=neurons, cluster=asked.cluster,
            storage=asked.storage, job=job,
        )  # fmt: skip

    def scan(measure: Mapping[str, Any], neurons: NeuronsConfig, ids: Sequence[str] | None) -> Run:
        return finished(of(measure, neurons, ids))

    def check(measure: Mapping[str, Any], neurons: NeuronsConfig) -> None:
        prepare(of(measure, neurons))

    try:
        found = run_study(asked.study, asked.neurons, scan, check)
    except IncompleteError as error:
        log.error("%s", error)
        return EXIT_INCOMPLETE
    finally:
        disconnect()
    tables = found.tables()
    about = {
        "study": asdict(asked.study),
        "dataset": to_be_stored(asked.dataset),
        "neurons": asdict(asked.neurons),
        "runs": found.runs,
    }
    text = study_text(tables)
    uri = put_findings(asked, "study", about, tables, {"tables.txt": text.encode()})
    say(f"\n{text}\n\nresults: {uri}", asked.job.log)
    return 0


if __name__ == "__main__":
    start("study", study, StudyConfig)

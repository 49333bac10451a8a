"""python -m jobs.control: give targets the probability that is asked for, and say what it took. See `--help`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace

from omegaconf import DictConfig

from jobs.entry import EXIT_INCOMPLETE, say, start
from neg_service.config import ScanConfig, plain, typed
from neg_service.errors import NegServiceError
from neg_service.measures.builtin.control import ControlOptions


@dataclass
class ControlConfig(ScanConfig):
    """Everything that `python -m jobs.control` is told: a scan's settings, with those of the measure as `control`."""

    control: ControlOptions = field(default_factory=ControlOptions)


def control(config: DictConfig) -> int:
    """Run or continue a scan with the measure `control`, and show what it found."""
    # Slow to load: see `entry.py`.
    from jobs.descriptions import describe_plan, describe_summary
    from neg_service.cluster.prepare import prepare
    from neg_service.cluster.scan import run
    from neg_service.report.control import results_text
    from neg_service.storage.reader import open_run

    asked = typed(ControlConfig, {key: value for key, value in plain(config).items() if key != "measure"})
    settings = {own.name: getattr(asked, own.name) for own in fields(ScanConfig)}
    try:
        prepared = prepare(replace(ScanConfig(**settings), measure=asdict(asked.control)))
        summary = None if prepared.config.job.dry_run else run(prepared)
    except NegServiceError as error:
        # By the name under which it was given.
        raise error.renamed({f"measure.{own.name}": f"control.{own.name}" for own in fields(ControlOptions)}) from error
    if summary is None:
        print(describe_plan(prepared))
        return 0
    found = open_run(summary.uri, prepared.config.storage.endpoint_url)
    say(f"\n{results_text(found)}\n{describe_summary(prepared, summary)}", prepared.config.job.log)
    return EXIT_INCOMPLETE if summary.failed else 0


if __name__ == "__main__":
    start("control", control, ControlConfig)

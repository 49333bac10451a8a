"""python -m jobs.scan: measure the neurons of a model on a data set. `--help` says what can be set."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from jobs.entry import EXIT_INCOMPLETE, say, start
from neg_service.config import ScanConfig, typed
from neg_service.errors import ConfigurationError

if TYPE_CHECKING:
    from neg_service.cluster.prepare import Prepared


def scan(config: DictConfig) -> int:
    """Run or continue the scan that the configuration describes."""
    began = time.monotonic()
    # Slow to load: see `entry.py`.
    from jobs.descriptions import describe_plan, describe_summary
    from neg_service.cluster.prepare import prepare
    from neg_service.cluster.scan import run

    asked = typed(ScanConfig, config)
    if asked.job.dry_run and asked.job.forecast:
        raise ConfigurationError(
            "job.dry_run does nothing, and a forecast measures a sample: ask for one of them",
            setting="job.forecast",
            value="true",
        )
    prepared = prepare(asked)
    if prepared.config.job.dry_run:
        print(describe_plan(prepared))
        return 0
    if prepared.config.job.forecast:
        _print_forecast(prepared, began)
        return 0
    summary = run(prepared)
    say(describe_summary(prepared, summary), prepared.config.job.log)
    return EXIT_INCOMPLETE if summary.failed else 0


def _print_forecast(prepared: Prepared, began: float) -> None:
    # Slow to load: see `entry.py`.
    from jobs import forecasts
    from neg_service.cluster.forecast import forecast

    job = prepared.config.job
    found = forecasts.as_json(forecast(prepared, began), job.price_per_hour, prepared.plan.total_bytes)
    print(json.dumps(found) if job.log == "json" else forecasts.describe(found))


if __name__ == "__main__":
    start("scan", scan, ScanConfig)

"""python -m jobs.bench: measure this software against its bars. `--help` lists the benchmarks."""

from __future__ import annotations

import importlib
import json
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from omegaconf import DictConfig

from jobs.benchmarks.figures import all_reached
from jobs.command_line import require_text
from jobs.entry import start
from jobs.guard import EXIT_ERROR
from neg_service.config import JobConfig, plain, typed
from neg_service.errors import ConfigurationError


@dataclass
class BenchConfig:
    """Everything that `python -m jobs.bench` is told; what a benchmark is told are the settings of its module."""

    benchmark: dict[str, Any] = field(default_factory=dict)
    check: bool = False
    job: JobConfig = field(default_factory=JobConfig)


def bench(config: DictConfig) -> int:
    """Run one benchmark; prints its JSON."""
    settings = plain(config.benchmark)
    try:
        module = importlib.import_module(f"jobs.benchmarks.{settings['name']}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "infra":
            raise
        raise ConfigurationError(
            "starts the S3 server of infra/s3/server.py, which is not installed: run it in the project's folder",
            setting="benchmark",
            value=settings["name"],
        ) from error
    require_text(config.benchmark, module.Settings, "benchmark")
    result = module.run(typed(module.Settings, settings, "benchmark"))
    machine = {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "ray")},
    }
    print(json.dumps({"benchmark": settings, "machine": machine, **result}, indent=1))
    return EXIT_ERROR if config.check and not all_reached(result["bars"]) else 0


if __name__ == "__main__":
    start("bench", bench, BenchConfig)

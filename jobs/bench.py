"""python -m jobs.bench: measure this software against its bars. `--help` lists the benchmarks."""

from __future__ import annotations

import importlib
import json
import os
import platform
from importlib.metadata import version

from omegaconf import DictConfig

from jobs.benchmarks.figures import all_reached
from jobs.entry import EXIT_ERROR, start
from neg_service.config import plain, typed


def bench(config: DictConfig) -> int:
    """Run one benchmark; prints its JSON."""
    settings = plain(config.benchmark)
    module = importlib.import_module(f"jobs.benchmarks.{settings['name']}")
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
    start("bench", bench)

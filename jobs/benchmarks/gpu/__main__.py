"""python -m jobs.benchmarks.gpu KEY=VALUE: `python -m jobs.bench benchmark=gpu` without Hydra, Ray and their settings.

For machines that have torch, transformers, numpy and pyarrow and nothing else, and no network to fetch it. Values are
YAML: `shapes=[tiny]`; defaults are those of `conf/benchmark/gpu.yaml`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from jobs.benchmarks.gpu import Settings, run
from jobs.conf_folder import CONF
from jobs.guard import EXIT_ERROR, tell
from neg_service.errors import ConfigurationError


def settings_of(arguments: list[str]) -> Settings:
    """The settings, with `KEY=VALUE` in the place of defaults.

    Raises:
        ConfigurationError: an unknown key, or what is no `KEY=VALUE`.
    """
    values: dict[str, Any] = yaml.safe_load((Path(CONF) / "benchmark" / "gpu.yaml").read_text())
    known = [own.name for own in fields(Settings)]
    for argument in arguments:
        key, is_given, value = argument.partition("=")
        if not is_given or key not in known:
            raise ConfigurationError(setting="arguments", value=argument, allowed=f"KEY=VALUE, of {', '.join(known)}")
        given, kind = yaml.safe_load(value), type(values[key])
        if kind is float and type(given) is int:
            given = float(given)
        if type(given) is not kind:
            raise ConfigurationError(setting=key, value=value, allowed=f"a {kind.__name__}, such as {values[key]}")
        values[key] = given
    return Settings(**values)


def main() -> int:
    """Print the JSON."""
    try:
        settings = settings_of(sys.argv[1:])
        result = run(settings)
    except ConfigurationError as error:
        tell(str(error))
        return EXIT_ERROR
    machine = {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }
    print(json.dumps({"benchmark": vars(settings), "machine": machine, **result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The commands that an installation has: `neg-scan` is `python -m jobs.scan` by a shorter name, and so on.

One function serves them all, so that a command is started in one way only, whatever it was called by.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from jobs.guard import guard_imports


def main() -> None:
    """Run the module that the name of this command stands for, as `python -m` would."""
    module = f"jobs.{Path(sys.argv[0]).stem.removeprefix('neg-')}"
    guard_imports(module)
    runpy.run_module(module, run_name="__main__", alter_sys=True)

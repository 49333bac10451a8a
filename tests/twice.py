"""`python -m tests.twice NAME ARGUMENTS`: jobs.NAME, and once more when it ended well, without loading it again."""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    for _ in range(2):
        sys.argv = [name, *arguments]
        try:
            runpy.run_module(f"jobs.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            if ended.code:
                raise

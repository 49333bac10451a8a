"""Running the commands as a person does, and ending only what was started here."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from jobs.entry import composed
from neg_service.cluster.prepare import prepare
from neg_service.config import ScanConfig, typed
from neg_service.errors import ConfigurationError

ROOT = Path(__file__).resolve().parent.parent.parent


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without a cluster address that somebody may have set."""
    return {**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, **extra}


def job(name: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m jobs.<name>` to its end."""
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *arguments],
        cwd=ROOT,
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def scan_config(*arguments: str) -> ScanConfig:
    """What `python -m jobs.scan` makes of these settings."""
    return typed(ScanConfig, composed("scan", list(arguments), ScanConfig))


def refused(message: str, *arguments: str) -> None:
    """The scan that these settings describe is refused with one line, before anything is begun."""
    with pytest.raises(ConfigurationError) as error:
        prepare(scan_config(*arguments))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def in_order(table: pa.Table) -> pa.Table:
    """Rows in an order that does not depend on shards."""
    keys = ("prompt_id", "target_index", "rank", "layer", "neuron", "edit")
    return table.sort_by([(key, "ascending") for key in keys if key in table.column_names])


class Running:
    """A job in the background, in a process group of its own, whose output is read as it comes."""

    def __init__(self, name: str, *arguments: str, env: dict[str, str] | None = None, module: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module or f"jobs.{name}", *arguments],
            cwd=ROOT,
            env=env or environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self.output += line

    def wait_for(self, pattern: str, seconds: float = 400) -> re.Match[str]:
        """Wait until the output matches, and give the last match."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = list(re.finditer(pattern, self.output))
            if found:
                return found[-1]
            assert self.process.poll() is None, f"ended before {pattern!r}:\n{self.output}"
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} within {seconds} s:\n{self.output}")

    def finish(self, seconds: float = 400) -> int:
        """Wait for the end; the exit code."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    def kill(self) -> None:
        """End the driver with SIGKILL, and then whatever of its own processes is left."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for child in children:
            if child.is_running():
                child.kill()
        psutil.wait_procs(children, timeout=20)
        self._reader.join(10)

"""Programs of commands without the start of a process: one that has loaded what commands load forks for each of them.

A fork has its own streams, environment, working directory and end, so that exit codes, and what is flushed last, are
those of a process of its own. What Python reads when it starts, such as PYTHONIOENCODING, and streams that are closed
or full need a process that is started.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.commands import ROOT, environment

# The program runs at the top of this one, as a script does, and to the end of the interpreter.
_SERVER = """
import json, os, sys
from jobs.entry import composed
from jobs.status import StatusConfig
# What parsers keep of the first time, too.
composed("status", ["run='1e5'", "+job.log=text", "rows=true"], StatusConfig)
del composed, StatusConfig
for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if pid == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
os.environ.clear()
os.environ.update(asked["env"])
os.chdir(asked["cwd"])
for stream, file in enumerate(asked["files"]):
    os.dup2(os.open(file, os.O_RDWR), stream)
sys.argv = ["-c", *asked["arguments"]]
exec(compile(asked["program"], "<string>", "exec"))
"""


class Forks:
    """The process that forks, which ends with the block."""

    def __enter__(self) -> Forks:
        """Start it; it loads while nobody waits."""
        self._scratch = tempfile.TemporaryDirectory()
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        with self._server:
            assert self._server.stdin is not None
            self._server.stdin.close()
        self._scratch.cleanup()

    def run(
        self, program: str, arguments: Sequence[str], env: dict[str, str], cwd: Path
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run([python, "-c", program, *arguments], ...)`, with what it printed."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        printed = [Path(self._scratch.name, name) for name in ("stdout", "stderr")]
        for file in printed:
            file.write_bytes(b"")
        files = ["/dev/null", *map(str, printed)]
        asked = {"program": program, "arguments": [*arguments], "env": env, "cwd": str(cwd), "files": files}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(asked["arguments"], code, *(file.read_text("utf-8") for file in printed))

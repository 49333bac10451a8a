"""Commands start fast: what takes seconds to load is loaded by those that work with it, and not for help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neg_service.config import DatasetConfig, JobConfig, ModelConfig, ScanConfig, StorageConfig
from neg_service.measures import types_of_options
from neg_service.settings import types_of
from tests.e2e.commands import ROOT, environment
from tests.here import scan_here

COMMANDS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if 'if __name__ == "__main__"' in path.read_text())
# What takes from half a second to several; sklearn, matplotlib and s3fs are only for some commands and places.
SLOW = ("torch", "transformers", "ray", "scipy", "sklearn", "matplotlib", "s3fs")

# Runs commands one after the other in one process; what they print, their exit codes, and what is loaded by then.
PROGRAM = """
import io, json, runpy, sys
from contextlib import redirect_stdout
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments]
    code, printed = 0, io.StringIO()
    with redirect_stdout(printed):
        try:
            runpy.run_module(f"jobs.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([name, code, printed.getvalue(), list(sys.modules)]))
"""


def ran(*commands: list[str]) -> list[tuple[str, int, str, set[str]]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)], cwd=ROOT, text=True, capture_output=True, check=False,
        env=environment(PYTHONPATH=str(ROOT)), timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines: list[list[Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    return [(name, code or 0, printed, set(modules)) for name, code, printed, modules in lines]


@pytest.fixture(scope="module")
def run_uri(tmp_path_factory: pytest.TempPathFactory, tiny_directory: Path) -> str:
    place = tmp_path_factory.mktemp("starts")
    rows = [{"prompt": f"w{i} w{i + 1}", "targets": [" w7", " w8"], "id": f"p{i}"} for i in (20, 21)]
    (place / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = ScanConfig(
        model=ModelConfig(source=str(tiny_directory)),
        dataset=DatasetConfig(source=str(place / "prompts.jsonl")),
        storage=StorageConfig(uri=str(place / "runs")),
        job=JobConfig(shard_size=1),
    )
    return scan_here(config).uri


Found = tuple[str, int, str, set[str]]
MISTAKES = (["scan", "job.nam=x"], ["check", "model.sourc=x"], ["verify", "run=a,b"])
READERS = ("status", "verify")


@pytest.fixture(scope="module")
def page(run_uri: str) -> Path:
    """Where the report of the run is written."""
    return Path(run_uri).parent.parent / "report"


@pytest.fixture(scope="module")
def turns(run_uri: str, page: Path) -> list[Found]:
    """What came of help, mistakes and readers, in turn in one process: what is not loaded by then no one loads."""
    asked = [[name, "--help"] for name in COMMANDS]
    asked += [*MISTAKES, *([name, f"run={run_uri}"] for name in READERS)]
    # The last, because it loads what draws.
    return ran(*asked, ["report", f"runs=[{run_uri}]", f"out={page}"])


def test_help_loads_nothing_slow(turns: list[Found]) -> None:
    assert {"scan", "status", "verify", "report", "submit", "drain"} <= set(COMMANDS)
    found = turns[: len(COMMANDS)]
    assert [name for name, *_ in found] == COMMANDS
    for name, code, printed, modules in found:
        assert code == 0
        # A former name shows the help of the present one.
        assert f"python -m jobs.{'drain' if name == 'leave' else name}" in printed
        assert not modules & set(SLOW), name


def test_the_help_of_a_scan_says_what_each_setting_is(turns: list[Found]) -> None:
    printed = turns[COMMANDS.index("scan")][2]
    explained = set(re.findall(r"\b[a-z]+\.[a-z_]+\b", printed[: printed.index("Groups (GROUP=OPTION)")]))
    groups = {group: kind for group, kind in types_of(ScanConfig).items() if group != "measure"}
    settings = {f"{group}.{name}" for group, kind in groups.items() for name in types_of(kind)}
    # `neurons=top` chooses; which neurons vote is what jobs.probe finds out.
    asked = (settings - {"neurons.choose"}) | {f"measure.{name}" for name in types_of_options() if name != "chosen"}
    assert len(asked) > 50
    assert asked - explained == set()


def test_mistakes_on_the_command_line_are_told_before_anything_slow_is_loaded(turns: list[Found]) -> None:
    found = turns[len(COMMANDS) :][: len(MISTAKES)]
    assert [name for name, *_ in found] == [name for name, *_ in MISTAKES]
    for name, code, _, modules in found:
        assert code == 1
        assert not modules & set(SLOW), name


def test_the_state_of_a_run_is_told_without_what_computed_it(turns: list[Found], run_uri: str) -> None:
    found = turns[-1 - len(READERS) : -1]
    assert [name for name, *_ in found] == list(READERS)
    for name, code, printed, modules in found:
        assert code == 0
        assert run_uri in printed
        assert not modules & set(SLOW), name


def test_a_report_is_made_without_what_computed_the_run(turns: list[Found], page: Path) -> None:
    name, code, printed, modules = turns[-1]
    assert (name, code, printed.strip()) == ("report", 0, f"{page}/report.html")
    assert page.joinpath("report.html").is_file()
    assert not modules & {"torch", "transformers", "ray", "scipy", "sklearn", "s3fs"}

"""A wheel of the project, installed outside of it: the commands run there, with the configuration that it brought."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Installation:
    """An environment with the wheel in it, and a folder outside of the project in which commands are called."""

    environment: Path
    folder: Path

    def run(self, command: str, *arguments: str) -> str:
        """What a command of the environment says on stdout."""
        found = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
        done = subprocess.run(
            [self.environment / "bin" / command, *arguments],
            cwd=self.folder, env=found, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel alone in an environment of its own; what it depends on is borrowed from this one."""
    base = tmp_path_factory.mktemp("installed")
    source, environment, folder = base / "source", base / "environment", base / "elsewhere"
    folder.mkdir()
    # A copy, because a build leaves files of which the next one would make its wheel.
    for part in ("neg_service", "jobs", "conf"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", base, source], check=True)
    (wheel,) = base.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    subprocess.run([*pip, "--python", environment / "bin" / "python", "install", *offline, wheel], check=True)
    (own,) = environment.glob("lib/python*/site-packages")
    # A folder that a .pth file adds is searched; its own .pth files, of which one leads to this project, are not read.
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(source)
    return Installation(environment, folder)


def test_what_is_imported_is_the_wheel(installation: Installation) -> None:
    code = (
        "import sys, jobs, neg_service, numpy\n"
        "assert not [one for one in sys.meta_path if 'editable' in repr(one)]\n"
        "print(jobs.__file__, neg_service.__file__, sep='\\n')"
    )
    for path in installation.run("python", "-c", code).split():
        assert Path(path).is_relative_to(installation.environment)


def test_each_job_is_a_command() -> None:
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    assert commands == {f"neg-{name}": "jobs.console:main" for name in jobs}


def test_a_scan_is_planned_from_the_wheel(installation: Installation, tiny_directory: Path) -> None:
    (installation.folder / "words.jsonl").write_text('{"prompt": "w1 w2", "targets": [" w3", " w4"]}\n')
    settings = [f"model.source={tiny_directory}", "dataset.source=words.jsonl", "measure=sweep", "neurons=sample"]
    said = installation.run("neg-scan", *settings, "job.dry_run=true")
    # 20 neurons of each of 3 layers, of about three and a half shifts, which both targets share.
    assert "1 with 2 targets" in said
    assert "20 of each layer" in said
    assert re.search(r"interventions +210\n", said)


def test_what_is_sent_to_a_cluster_runs_there(installation: Installation) -> None:
    target = installation.folder / "sent"
    target.mkdir()
    code = (
        "import sys\nfrom pathlib import Path\nfrom jobs.conf_folder import CONF, PROJECT\n"
        "from neg_service.cluster.submission import Request, pack\n"
        "pack(Request('scan', 'x', []), Path(PROJECT), Path(CONF).relative_to(PROJECT), Path(sys.argv[1]))"
    )
    installation.run("python", "-c", code, str(target))
    shown = "import jobs.conf_folder as it; print(it.CONF)"
    done = subprocess.run(
        [sys.executable, "-c", shown], cwd=target, env={**os.environ, "PYTHONPATH": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    conf = Path(done.stdout.strip())
    assert conf.is_relative_to(target)
    assert sorted(path.relative_to(conf) for path in conf.rglob("*.yaml")) == sorted(
        path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")
    )

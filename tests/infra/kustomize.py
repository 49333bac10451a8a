"""The manifests as kustomize renders them: with the kubectl of this environment, else with that of this machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
KUBERAY = ROOT / "infra" / "kuberay"
OVERLAYS = ["one-scan", "standing-cluster"]
# What an overlay's commented components add, and which of them exclude each other.
COMPONENTS = {"one-scan": ["shared-cache", "keep-failed", "kueue"], "standing-cluster": ["shared-cache", "kueue"]}
# Older ones do not know what the manifests use.
OLDEST = (1, 27)


def version(program: str) -> tuple[int, int]:
    """Of a kubectl; (0, 0) of what does not say so."""
    done = subprocess.run([program, "version", "--client"], check=False, capture_output=True, text=True)
    found = re.search(r"Client Version: v(\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@cache
def kubectl() -> str:
    """A kubectl that is new enough; else the test is skipped."""
    for program in (str(Path(sys.executable).with_name("kubectl")), shutil.which("kubectl")):
        if program and Path(program).exists() and version(program) >= OLDEST:
            return program
    pytest.skip(f"no kubectl {OLDEST[0]}.{OLDEST[1]} or newer renders the manifests")


def rendered(overlay: str, *add: str) -> list[dict[str, Any]]:
    """All objects of an overlay, with some of its commented components switched on."""
    return [one for one in yaml.safe_load_all(_once(overlay, add)) if one]


@cache
def _once(overlay: str, add: tuple[str, ...]) -> str:
    # Half a second each.
    with tempfile.TemporaryDirectory() as folder:
        return yaml.safe_dump_all(render(copied(Path(folder), overlay, add=add)))


def render(overlay: Path, program: str | None = None) -> list[dict[str, Any]]:
    """All objects of an overlay's folder. Raises `CalledProcessError` for what kustomize refuses."""
    done = subprocess.run(
        [program or kubectl(), "kustomize", str(overlay)], check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def copied(tmp_path: Path, overlay: str, *, add: tuple[str, ...] = ()) -> Path:
    """A copy of an overlay that may be changed, with some of its commented components switched on."""
    root = shutil.copytree(KUBERAY, tmp_path / "kuberay")
    file = root / "overlays" / overlay / "kustomization.yaml"
    text = file.read_text()
    for name in add:
        line = f"# - ../../components/{name}\n"
        assert line in text
        text = text.replace(line, line[2:])
    file.write_text(text)
    return file.parent


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Each value of nested objects, by where it stands."""
    if isinstance(value, dict):
        return {where: leaf for key, own in value.items() for where, leaf in leaves(own, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {where: leaf for i, own in enumerate(value) for where, leaf in leaves(own, f"{path}/{i}").items()}
    return {path: value}

"""Writes what the image installs, with hashes, from requirements.lock: `make lock-image`.

Four lists, because each is installed by itself: PyTorch for either variant, which is a layer of its own; all other
packages; and what builds those that have no wheel. Versions are those of requirements.lock; CUDA's libraries, which are
not in it because its PyTorch is the one for CPUs, are those that PyTorch names. uv does the work; of PyTorch for CPUs,
whose wheels may lie in a folder of which uv keeps no hashes, pip does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# What nodes and drivers need; not what only tests do.
EXTRAS = ("catalogue", "compute", "datasets", "lineage", "probe", "report")
_HEADER = "# This file was written by: make lock-image\n"
_OPTIONS = (
    "--quiet", "--generate-hashes", "--no-annotate", "--custom-compile-command", "make lock-image",
    "--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28", "--constraint", "requirements.lock",
)  # fmt: skip


def pins(name: str) -> dict[str, str]:
    """The versions in one of the lists, by package."""
    lines = [line for line in (HERE / name).read_text().splitlines() if "==" in line and not line.startswith("#")]
    return {package: version.split()[0] for package, version in (line.split("==") for line in lines)}


def write(uv: str, torch_wheels: str) -> None:
    """Write all four lists with the program `uv`; `torch_wheels` is a page or a folder with PyTorch's CPU wheels."""
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    cpu = ("--find-links", torch_wheels)
    _compile(uv, "requirements.txt", "pyproject.toml", *extras, *cpu, "--no-emit-package", "torch")
    _compile(uv, "build.txt", "-", needed="setuptools")
    (HERE / "torch.cpu.txt").write_text(_cpu_torch(cpu))
    others = [word for package in pins("requirements.txt") for word in ("--no-emit-package", package)]
    _compile(uv, "torch.cuda.txt", "-", *others, needed="torch")


def _cpu_torch(where: tuple[str, str]) -> str:
    options = [
        "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", *where,
        "--constraint", "requirements.lock",
        "--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--only-binary", ":all:",
        "--target", "nothing", "--dry-run", "--report", "-", "torch",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    (found,) = json.loads(done.stdout)["install"]
    digest = found["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{_HEADER}torch=={found['metadata']['version']} \\\n    --hash=sha256:{digest}\n"


def _compile(uv: str, name: str, source: str, *options: str, needed: str = "") -> None:
    command = [uv, "pip", "compile", *_OPTIONS, *options, "--output-file", str(HERE / name), source]
    # An earlier list would be taken for wishes.
    (HERE / name).unlink(missing_ok=True)
    subprocess.run(command, cwd=ROOT, input=needed, text=True, check=True)


if __name__ == "__main__":
    write(*sys.argv[1:])

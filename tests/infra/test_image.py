"""The image, built and run: by buildah, which needs no container engine, over a base made of Debian's packages.

The base stands in for the Dockerfile's own, python:3.11-slim-bookworm, which only a registry has: Debian bookworm with
its Python 3.11. Everything else is what the Dockerfile says, with hashes. pip gets the certificates and the additional
places of packages that it has on this machine, lent while the image is built. Containers run in a network namespace of
their own, so that Ray's ports are theirs.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import neg_service
from infra.docker import lock
from neg_service.models.source import cache_directory
from neg_service.storage.reader import open_run
from tests.e2e.commands import ROOT, in_order, job

pytestmark = [pytest.mark.infra, pytest.mark.model]

NEEDED = ("buildah", "mmdebstrap", "ip")
LABELS = {"VERSION": neg_service.__version__, "REVISION": "0123abc", "SOURCE": "https://example.com/neg-service"}
HEAD = "127.0.0.1:6379"


@dataclass(frozen=True)
class Buildah:
    """buildah with its images in a folder, and a network namespace for what it runs."""

    store: Path
    network: str

    def __call__(self, *arguments: str | Path, timeout: float = 900) -> str:
        """What a command of buildah says on stdout."""
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout.strip()

    def command(self, *arguments: str | Path) -> list[str]:
        """The words of a command of buildah."""
        return [
            "buildah", "--root", str(self.store / "images"), "--runroot", str(self.store / "run"), *map(str, arguments),
        ]  # fmt: skip


@dataclass(frozen=True)
class Container:
    """A container of the image, and where its files are seen from here."""

    buildah: Buildah
    name: str
    root: Path

    def command(self, *words: str, options: tuple[str, ...] = ()) -> list[str]:
        """What runs a command in it, as the image's own user."""
        run = self.buildah.command("run", "--isolation", "chroot", *options, self.name, "--", *words)
        return ["ip", "netns", "exec", self.buildah.network, *run]

    def run(self, *words: str, options: tuple[str, ...] = (), timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command in it to its end."""
        command = self.command(*words, options=options)
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    def said(self, *words: str, options: tuple[str, ...] = ()) -> str:
        """What a command that succeeds says on stdout."""
        done = self.run(*words, options=options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def pip_of_this_machine(folder: Path) -> list[str]:
    """Options of a build that lend it what pip is configured with here: certificates, and other places of packages."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, str] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = ast.literal_eval(value)
    options, settings = [], ["[global]"]
    if index := found.get("index-url"):
        options += ["--build-arg", f"PIP_INDEX_URL={index}"]
    if certificates := found.get("cert"):
        options += ["--volume", f"{certificates}:/mnt/certificates.crt:ro"]
        settings.append("cert = /mnt/certificates.crt")
    if others := found.get("extra-index-url"):
        settings.append(f"extra-index-url = {others}")
        local = {Path(one.removeprefix("file://")).parent for one in others.split() if one.startswith("file://")}
        options += [word for place in sorted(local) for word in ("--volume", f"{place}:{place}:ro")]
    for place in map(Path, found.get("find-links", "").split()):
        if list(place.glob("torch-*+cpu-*.whl")):
            options += ["--volume", f"{place}:{place}:ro", "--build-arg", f"TORCH_WHEELS={place}"]
    (folder / "pip.conf").write_text("\n".join(settings) + "\n")
    return [*options, "--volume", f"{folder / 'pip.conf'}:/etc/pip.conf:ro"]


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """It, with an empty store that is removed at the end."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"an image is built by root, with {', '.join(NEEDED)}; missing: {', '.join(missing) or 'root'}")
    store, network = tmp_path_factory.mktemp("image"), f"image-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", network], check=True)
    subprocess.run(["ip", "-n", network, "link", "set", "lo", "up"], check=True)
    made = Buildah(store, network)
    yield made
    subprocess.run(["ip", "netns", "delete", network], check=True)
    made("rm", "--all")
    made("rmi", "--all", "--force")
    shutil.rmtree(store)


@pytest.fixture(scope="module")
def container(buildah: Buildah) -> Container:
    """A container of the image, which is built here; it has the default model, for there is no network."""
    base = buildah.store / "base.tar"
    packages = "python3,python3-venv,ca-certificates"
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", "bookworm", str(base)], check=True
    )
    scratch = buildah("from", "scratch")
    buildah("add", scratch, base, "/")
    buildah("commit", "--rm", scratch, "localhost/base")
    base.unlink()
    arguments = {"BASE": "localhost/base", **LABELS}
    buildah(
        "build", "--isolation", "chroot", "--format", "docker", "--layers=false", "--timestamp", "1700000000",
        *(word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")),
        *pip_of_this_machine(buildah.store), "--file", ROOT / "infra" / "docker" / "Dockerfile",
        "--tag", "localhost/neg-service", ROOT,
        timeout=1500,
    )  # fmt: skip
    name = buildah("from", "localhost/neg-service")
    root = Path(buildah("mount", name))
    shutil.copytree(cache_directory(), root / "cache" / "neg_service")
    subprocess.run(["chown", "--recursive", "1000:1000", str(root / "cache")], check=True)
    return Container(buildah, name, root)


def test_it_runs_as_a_user_without_rights_and_shows_the_help(container: Container) -> None:
    assert container.said("id", "--user").strip() == "1000"
    assert "python -m jobs.scan" in container.said("python", "-m", "jobs.scan", "--help")
    assert "python -m jobs.scan" in container.said("neg-scan", "--help")


def test_labels_say_where_it_comes_from(container: Container) -> None:
    found = json.loads(container.buildah("inspect", "--type", "image", "localhost/neg-service"))
    labels = found["Docker"]["config"]["Labels"]
    for name, value in {**LABELS, "TITLE": "neg-service", "LICENSES": "MIT"}.items():
        assert labels[f"org.opencontainers.image.{name.lower()}"] == value


def test_it_is_as_large_as_operators_are_told(container: Container) -> None:
    (image,) = json.loads(container.buildah("images", "--json", "localhost/neg-service"))
    told = re.search(r"`cpu` is ([\d.]+) GB", (ROOT / "infra" / "README.md").read_text())
    assert told
    size, unit = image["size"].split()
    assert unit == "GB"
    np.testing.assert_allclose(float(size), float(told[1]), rtol=0.05)


def test_what_is_installed_is_what_is_locked_and_no_more(container: Container) -> None:
    program = (
        "import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"
    )
    found = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in json.loads(_python(container, program))}
    expected = {**lock.pins("requirements.txt"), **lock.pins("torch.cpu.txt"), "neg-service": neg_service.__version__}
    assert found == expected


def test_bytecode_is_there_once_and_lasts(container: Container) -> None:
    packages = container.root / "opt" / "venv" / "lib" / "python3.11" / "site-packages"
    compiled = list(packages.rglob("*.pyc"))
    assert len(compiled) > 10_000
    assert {path.suffixes[-2] for path in compiled} == {".cpython-311"}, "no second level of optimisation"
    for path in compiled[::50]:
        # The second word of the header, as PEP 552 has it: 1 is a hash of the source that nobody compares.
        assert path.read_bytes()[4:8] == b"\x01\0\0\0", path
    assert not [path for path in compiled if "/tests/" in str(path)]


def test_a_scan_writes_where_the_user_may_and_what_a_scan_outside_writes(container: Container, tmp_path: Path) -> None:
    settings = ["job.limit=3", "neurons.layers=[0,29]", "cluster.cpus_per_replica=1"]
    done = container.run("python", "-m", "jobs.scan", *settings)
    assert done.returncode == 0, done.stderr
    (inside,) = (container.root / "work" / "results").iterdir()
    there = job("scan", *settings, f"storage.uri={tmp_path}")
    assert there.returncode == 0, there.stderr
    (outside,) = tmp_path.iterdir()
    assert inside.name == outside.name, "the same fingerprint"
    found, expected = (in_order(open_run(str(one)).table("neurgrad").to_table()) for one in (inside, outside))
    assert found.num_rows == expected.num_rows > 0
    assert found.drop_columns("neurgrad").equals(expected.drop_columns("neurgrad"))
    values, wanted = (np.stack(table["neurgrad"].to_pylist()) for table in (found, expected))
    np.testing.assert_allclose(values, wanted, atol=1e-6)


def test_a_head_node_wants_its_token_and_says_whether_it_is_alive(container: Container) -> None:
    health = ("python", "-m", "jobs.health", "--seconds", "2")
    assert container.run(*health).returncode == 1, "there is no Ray yet"
    token = container.root / "home" / "ray" / "token"
    token.write_text("0123456789abcdef" * 4)
    knows = ("--env", "RAY_AUTH_TOKEN_PATH=/home/ray/token")
    start = ["ray", "start", "--head", "--block", "--num-cpus=1", "--object-store-memory=100000000"]
    log = container.buildah.store / "head.log"
    with log.open("w") as said:
        head = subprocess.Popen(container.command(*start, options=knows), stdout=said, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 90
        while (asked := container.run(*health)).returncode != 0:
            assert time.monotonic() < until, log.read_text() + asked.stderr
            assert head.poll() is None, log.read_text()
            time.sleep(1)
        assert asked.stdout.strip() == "raylet: success; gcs: success"
        drain = ("python", "-m", "jobs.drain", "--address", HEAD, "--seconds", "20")
        refused = container.run(*drain)
        assert refused.returncode == 1
        assert "token" in refused.stderr
        wrong = container.run(*drain, options=("--env", f"RAY_AUTH_TOKEN={'f' * 64}"))
        assert wrong.returncode == 1
        assert container.run(*drain, options=knows).returncode == 0
    finally:
        container.run("ray", "stop", "--grace-period", "20")
        head.terminate()
        head.wait(60)
    assert container.run(*health).returncode == 1


def _python(container: Container, program: str) -> str:
    return container.said("python", "-c", program)

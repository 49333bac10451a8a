"""The lists that the image is installed from name all that the service needs, as it is locked, and hashes of all."""

from __future__ import annotations

import re
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.docker import lock
from tests.e2e.commands import ROOT


def locked() -> dict[str, str]:
    pairs = [line.split("==") for line in (ROOT / "requirements.lock").read_text().split()]
    return {canonicalize_name(name): version for name, version in pairs}


def needed(name: str, extras: tuple[str, ...], seen: set[tuple[str, tuple[str, ...]]]) -> set[str]:
    """All packages that a package needs with its extras, on this machine, also those that it needs through others."""
    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    found = {name}
    for text in metadata.requires(name) or []:
        wish = Requirement(text)
        if wish.marker is None or any(wish.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            found |= needed(canonicalize_name(wish.name), tuple(sorted(wish.extras)), seen)
    return found


def test_they_have_what_the_service_needs_in_the_locked_versions() -> None:
    packages = {**lock.pins("requirements.txt"), **lock.pins("torch.cpu.txt")}
    versions = {name: version.removesuffix("+cpu") for name, version in packages.items()}
    assert versions.keys() == needed("neg-service", lock.EXTRAS, set()) - {"neg-service"}, "make lock-image writes them"
    assert versions == {name: version for name, version in locked().items() if name in versions}
    assert lock.pins("build.txt").items() <= versions.items()


def test_both_variants_have_the_same_torch_and_cuda_adds_only_its_own() -> None:
    cuda = lock.pins("torch.cuda.txt")
    assert cuda["torch"] == locked()["torch"]
    assert not cuda.keys() & lock.pins("requirements.txt").keys()
    assert any(name.startswith("nvidia-") for name in cuda)
    assert lock.pins("torch.cpu.txt").keys() == {"torch"}


def test_everything_has_a_hash() -> None:
    for name in ("build.txt", "requirements.txt", "torch.cpu.txt", "torch.cuda.txt"):
        text = re.sub(r"^#.*\n", "", (lock.HERE / name).read_text(), flags=re.MULTILINE)
        wishes = text.replace("\\\n", " ").splitlines()
        assert len(wishes) == len(lock.pins(name)) > 0
        assert [wish for wish in wishes if not re.search(r" --hash=sha256:[0-9a-f]{64}", wish)] == []

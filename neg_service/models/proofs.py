"""Self-checks that this machine has passed before: a model is not proved anew at each start of a replica.

A self-check runs passes that depend on the weights, on the code that runs them, and on what computes them. Where all
of that is the same, byte for byte, it would find the same once more. So what it found is kept in the cache, under a
digest of all that it depends on: the model's identity and precision, the source of its modeling code and of this
package, the versions of the libraries, the processor with its threads, and what the environment tells these libraries.
Whatever of these is another one has the check run; what is refused is never remembered.

For processes that are this package's own: who uses the library may have changed modules that no file shows, and has
every model checked.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import neg_service
from neg_service.models.engines.base import LoadedModel
from neg_service.models.engines.select import ENGINES, Selection
from neg_service.models.engines.self_check import SelfCheck
from neg_service.models.feed_forward import Site
from neg_service.models.placement import processor_name
from neg_service.models.source import cache_directory

log = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "accelerate", "numpy", "safetensors")
# What tells the libraries below how to compute; which of several equal devices it is says nothing.
_TELLING = ("ATEN_", "CUBLAS", "CUDA", "DNNL_", "KMP_", "MKL_", "NVIDIA_", "OMP_", "ONEDNN_", "PYTORCH_", "TORCH")
_VISIBLE = "VISIBLE_DEVICES"


def remembered(model: LoadedModel, about: dict[str, Any], select: Callable[[], Selection]) -> Selection:
    """What a self-check found of this very model here, or what `select` finds, which is then kept.

    about: what decides the selection beside the model, its identity among it.

    Raises:
        ModelError: see `select_engine`.
    """
    key = {**about, **_of_model(model), **_of_process()}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = cache_directory() / "self-checks" / f"{digest}.json"
    found = _read(file, key, model)
    if found is None:
        found = select()
        _write(file, {"about": key, "at": datetime.now(UTC).isoformat(timespec="seconds"), **_as_dict(found)})
    return found


def _of_model(model: LoadedModel) -> dict[str, Any]:
    """What a check depends on of the model as it was loaded, beside its weights."""
    config = model.module.config
    return {
        "architecture": type(model.module).__name__,
        "modeling_code": _digest(_source_files(model)),
        "dtype": str(model.dtype),
        "attention": str(config._attn_implementation),
        "devices": [
            f"{device.type}: {processor_name(device)}"
            for device in dict.fromkeys(weight.device for weight in model.module.parameters())
        ],
        "layers_on": [str(next(layer.parameters()).device) for layer in model.feed_forward.layers],
    }


def _of_process() -> dict[str, Any]:
    """What it depends on of the process."""
    return {
        "neg_service": _digest(sorted(Path(inspect.getfile(neg_service)).parent.rglob("*.py"))),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "torch_build": [torch.version.git_version, torch.backends.cpu.get_cpu_capability()],
        "threads": torch.get_num_threads(),
        "float32_products": torch.get_float32_matmul_precision(),
        "is_deterministic": torch.are_deterministic_algorithms_enabled(),
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(_TELLING) and _VISIBLE not in name
        },
    }


def _source_files(model: LoadedModel) -> Iterable[Path]:
    """Where the classes of its modules are written, PyTorch's own apart: these have a version."""
    kinds = {kind for module in model.module.modules() for kind in type(module).__mro__}
    own = {kind for kind in kinds if kind.__module__.split(".")[0] not in ("torch", "builtins")}
    return sorted(Path(inspect.getfile(kind)) for kind in own)


def _digest(files: Iterable[Path]) -> str:
    return _digest_of(tuple(dict.fromkeys(files)))


@cache
def _digest_of(files: tuple[Path, ...]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.name}\n".encode())
        found.update(file.read_bytes())
    return found.hexdigest()


def _read(file: Path, key: dict[str, Any], model: LoadedModel) -> Selection | None:
    """What is kept in a file, if it is there and whole."""
    try:
        kept = json.loads(file.read_text())
        if kept["about"] != key:
            return None
        kind = next(kind for kind in ENGINES if kind.name == kept["engine"])
        values = kept["check"]
        sites = frozenset(Site(*site) for site in values.pop("late_expansion"))
        check = SelfCheck(**values, late_expansion=sites)
        check = replace(check, tried=tuple(check.tried))
        rejected = {str(name): str(reason) for name, reason in kept["rejected"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return None
    log.info("self-check passed on this machine before, at %s, with the same weights and software", kept["at"])
    return Selection(kind(model), check, rejected)


def _as_dict(found: Selection) -> dict[str, Any]:
    values = asdict(found.check) | {"late_expansion": sorted(found.check.late_expansion)}
    return {"engine": found.engine.name, "check": values, "rejected": found.rejected}


def _write(file: Path, content: dict[str, Any]) -> None:
    """Keep it, whole or not at all; a cache that cannot be written only costs the next start its time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as scratch:
            json.dump(content, scratch)
        Path(scratch.name).replace(file)
    except OSError as error:
        log.info("what the self-check found is not kept: %s", error)

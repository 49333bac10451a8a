"""Self-checks that a model has passed here before: replicas need not run them anew at each start.

A self-check depends on the weights, on the code that runs them, and on what computes them. Where all of that is the
same it would find the same once more. So what it found is kept in the cache, in a file whose name is a digest of all
that it depends on: the model's identity, precision and devices; the source of this package and of all of transformers
and of remote code that is loaded; which packages are installed; the processor and its threads; and what the environment
tells the libraries. Whatever of it is another one has the check run. So do code that was written to while this process
began, and a find that may pass, such as an engine for which something was missing. That the plain model runs, and gives
finite numbers, is seen each time.

For processes that run this package's own code: who uses the library, or a measure of their own, may have exchanged
functions that no file shows, and has every model checked.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from neg_service.models.engines.base import LoadedModel
from neg_service.models.engines.select import DOES_NOT_RUN, ENGINES, Selection
from neg_service.models.engines.self_check import SelfCheck, check_plain
from neg_service.models.feed_forward import Site
from neg_service.models.source import cache_directory

log = logging.getLogger(__name__)

# What tells libraries how to compute; where files are, and which of several equal devices it is, say nothing.
_ENVIRONMENT_PREFIXES = (
    "ATEN_", "CUBLAS", "CUDA", "CUDNN", "DNNL_", "GOMP_", "KMP_", "LD_", "MKL_", "NVIDIA_TF32", "OMP_", "ONEDNN_",
    "OPENBLAS_", "PYTORCH_", "TORCH_", "TRANSFORMERS_", "TRITON_", "USE_",
)  # fmt: skip
_SAYS_NOTHING = ("VISIBLE_DEVICES", "CACHE", "HOME", "DIR")
# Of what Linux says of a processor: what changes while it runs, or tells one core from another.
_OF_ONE_CORE = ("processor", "cpu MHz", "core id", "apicid", "initial apicid", "physical id", "bogomips", "BogoMIPS")
_PACKAGE = Path(__file__).resolve().parent.parent
# Code is loaded about now: what is written to later, or was just before, need not be what runs.
_LOADED_AT = time.time() - 60


def selected_before(model: LoadedModel, settings: dict[str, Any], select: Callable[[], Selection]) -> Selection:
    """What a self-check found of this very model here, or what `select` finds, which is then kept.

    settings: what decides the selection beside the model, whose identity is among them.

    Raises:
        ModelError: see `select_engine`.
    """
    key = _key(model, settings)
    if key is None:
        return select()
    file = cache_directory() / "self-checks" / f"{key}.json"
    found = _read(file, key, model)
    if found is None:
        found = select()
        if not any(DOES_NOT_RUN in reason for reason in found.rejected.values()):
            _write(file, {"key": key, "at": datetime.now(UTC).isoformat(timespec="seconds"), **_as_dict(found)})
        return found
    # Files may have been damaged since, and what runs a pass may be broken.
    check_plain(model)
    return found


def _key(model: LoadedModel, settings: dict[str, Any]) -> str | None:
    """A digest of all that a check depends on; None where that cannot be known."""
    try:
        code = _code_of(model)
        if any(max(file.stat().st_mtime, file.stat().st_ctime) > _LOADED_AT for file in code):
            return None
        found = hashlib.sha256(json.dumps({**settings, **_of_model(model), **_of_process()}, sort_keys=True).encode())
        for file in code:
            found.update(f"{file.name}\n".encode())
            found.update(file.read_bytes())
    except (OSError, TypeError, ValueError, AttributeError) as error:
        log.info("whether the self-check was passed before cannot be known: %s", error)
        return None
    return found.hexdigest()


def _of_model(model: LoadedModel) -> dict[str, Any]:
    """Of the model as it was loaded, beside its weights."""
    return {
        "architecture": type(model.module).__name__,
        "dtype": str(model.dtype),
        "attention": str(getattr(model.module.config, "_attn_implementation", None)),
        "layers_on": [sorted({str(own.device) for own in layer.parameters()}) for layer in model.feed_forward.layers],
    }


def _of_process() -> dict[str, Any]:
    """Of what computes it."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "packages": sorted(
            {entry.name for path in sys.path if Path(path).is_dir() for entry in Path(path).glob("*.dist-info")}
        ),
        "torch": [torch.__config__.show(), str(torch.version.git_version), torch.backends.cpu.get_cpu_capability()],
        "processor": _processor(),
        "accelerators": [
            [torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i)]
            for i in range(torch.cuda.device_count())
        ],
        "cudnn": torch.backends.cudnn.version() if cuda else None,  # type: ignore[no-untyped-call]
        "threads": torch.get_num_threads(),
        "float32_products": torch.get_float32_matmul_precision(),
        "is_deterministic": torch.are_deterministic_algorithms_enabled(),
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_ENVIRONMENT_PREFIXES) and not any(own in name for own in _SAYS_NOTHING)
        },
    }


def _processor() -> list[str]:
    """What says which instructions it has, and so which kernels libraries choose."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    own = {line for line in lines if ":" in line and line.split(":")[0].strip() not in _OF_ONE_CORE}
    return [platform.machine(), platform.processor(), *sorted(own)]


def _code_of(model: LoadedModel) -> list[Path]:
    """The files of this package, of the model's classes, and of what is loaded of transformers and of remote code."""
    found = set(_PACKAGE.rglob("*.py"))
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("transformers", "transformers_modules") and getattr(module, "__file__", None):
            found.add(Path(str(module.__file__)))
    kinds = {kind for module in model.module.modules() for kind in type(module).__mro__}
    found |= {
        Path(inspect.getfile(kind)) for kind in kinds if kind.__module__.split(".")[0] not in ("torch", "builtins")
    }
    return sorted(found)


def _read(file: Path, key: str, model: LoadedModel) -> Selection | None:
    """What is kept in a file, if it is there and whole."""
    try:
        kept = json.loads(file.read_text())
        if kept["key"] != key:
            return None
        kind = next(kind for kind in ENGINES if kind.name == kept["engine"])
        values = kept["check"]
        sites = frozenset(Site(*site) for site in values.pop("late_expansion"))
        check = SelfCheck(**values, late_expansion=sites)
        check = replace(check, tried=tuple(check.tried))
        rejected = {str(name): str(reason) for name, reason in kept["rejected"].items()}
        passed_at = str(kept["at"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return None
    log.info("the self-check was passed before, at %s, with the same weights, software and processor", passed_at)
    return Selection(kind(model), check, rejected)


def _as_dict(found: Selection) -> dict[str, Any]:
    values = asdict(found.check) | {"late_expansion": sorted(found.check.late_expansion)}
    return {"engine": found.engine.name, "check": values, "rejected": found.rejected}


def _write(file: Path, content: dict[str, Any]) -> None:
    """Keep it, whole or not at all; a cache that cannot be written only costs the next start its time."""
    scratch: Path | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as opened:
            scratch = Path(opened.name)
            json.dump(content, opened)
        scratch.replace(file)
    except OSError as error:
        log.info("what the self-check found is not kept: %s", error)
        if scratch is not None:
            with suppress(OSError):
                scratch.unlink()

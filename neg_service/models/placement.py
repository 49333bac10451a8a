"""One model over several devices: which parts of it lie where.

accelerate moves hidden states from device to device as layers are called; the rest follows a simple rule: what belongs
to a layer (its prefix's keys and values, its neurons, their gradients) stays where the layer is, and logits come back
to where token ids went in. No layer is ever split. accelerate could also choose the places; it fills one device after
the other, and does not spread a model whose largest part are its embeddings.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from neg_service.config import device_names
from neg_service.errors import ConfigurationError, OutOfMemory
from neg_service.models.byte_patches import layers_on_bytes
from neg_service.models.feed_forward import find_feed_forward
from neg_service.models.repeated_layers import layers_as_run

_KINDS = ("cpu", "cuda")


def checked_devices(device: Any) -> list[torch.device]:
    """The torch devices of `model.device`, if they are there: `auto`, one, or several.

    Raises:
        ConfigurationError: not a device, one that is not there, or one named twice.
    """
    names = device_names(device)
    if names == ["auto"]:
        return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    device = ",".join(names)
    chosen = []
    for name in names:
        try:
            chosen.append(torch.device(name))
        except RuntimeError as error:
            raise _not_a_device(device, name) from error
    for one in chosen:
        if one.type not in _KINDS:
            raise _not_a_device(device, str(one))
        if one.type == "cuda" and (one.index or 0) >= torch.cuda.device_count():
            raise ConfigurationError(
                f"this machine has {torch.cuda.device_count()} GPUs; use auto or cpu",
                setting="model.device",
                value=device,
            )
    if len(set(chosen)) < len(chosen):
        raise ConfigurationError("a device is named twice", setting="model.device", value=device)
    return chosen


def _not_a_device(device: str, name: str) -> ConfigurationError:
    return ConfigurationError(
        f"{name} is no device that can be used; use auto, cpu, cuda, or several in a list, [cuda:0,cuda:1]",
        setting="model.device",
        value=device,
    )


def device_map(model: PreTrainedModel, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """For each part of a model its device: equal shares of the bytes, in the order of the layers.

    What comes before the layers, and what shares its weights, is on the first device, what comes after them on the
    last. `model` may be one without weights.

    Raises:
        ConfigurationError: fewer layers than devices, or a model whose layers run again, or are in several lists.
    """
    if layers_as_run(model) is not None:
        raise ConfigurationError(
            f"{type(model).__name__} runs one layer's weights as several layers, which all need them: use one device",
            setting="model.device",
        )
    if layers_on_bytes(model) is not None:
        raise ConfigurationError(
            f"{type(model).__name__} has layers in several lists, others between them: use one device",
            setting="model.device",
        )
    layers = find_feed_forward(model).layers
    if len(layers) < len(devices):
        raise ConfigurationError(
            f"{len(devices)} devices, but {type(model).__name__} has {len(layers)} layers: use fewer devices, or "
            "a smaller cluster.gpus_per_replica",
            setting="model.device",
        )
    before, path, after = _around(model, layers)
    # By identity: a head that shares its weights with the embeddings has to lie with them.
    known = {id(weight) for name in before for weight in model.get_submodule(name).parameters()}
    for name in list(after):
        weights = {id(weight) for weight in model.get_submodule(name).parameters()}
        if not weights or weights & known:
            after.remove(name)
            before.append(name)
    names = [f"{path}.{index}" for index in range(len(layers))]
    sizes = [_bytes_of(model, [name]) for name in names]
    start = _bytes_of(model, before)
    total = start + sum(sizes) + _bytes_of(model, after)
    placed = dict.fromkeys(before, devices[0]) | dict.fromkeys(after, devices[-1])
    for name, size in zip(names, sizes, strict=True):
        # By its middle, so that no device gets more than its share and half a layer.
        placed[name] = devices[min(len(devices) - 1, int((start + size / 2) * len(devices) / total))]
        start += size
    return placed


def require_room(
    model: PreTrainedModel,
    dtype: torch.dtype,
    placed: Mapping[str, torch.device],
    source: str,
    memory: Callable[[torch.device], tuple[int, int]] = torch.cuda.mem_get_info,
) -> None:
    """Refuse, before weights are read, what does not fit GPUs; `memory` is what a GPU has free and in all, in bytes.

    `model` may be one without weights; `placed` as `device_map` gives it, with "" for the whole model.

    Raises:
        ConfigurationError: it will never fit, with the arithmetic.
        OutOfMemory: it does not fit beside what others have there, which may pass.
    """
    weights: dict[torch.device, dict[int, int]] = {device: {} for device in placed.values()}
    for name, device in placed.items():
        # By identity: shared weights lie there once.
        weights[device] |= {id(own): own.numel() for own in model.get_submodule(name).parameters()}
    needed = {device: sum(own.values()) * dtype.itemsize for device, own in weights.items()}
    for device, size in needed.items():
        if device.type != "cuda":
            continue
        free, room = memory(device)
        if size <= free:
            continue
        if size <= room:
            raise OutOfMemory(
                f"{size / 2**30:.1f} GiB of weights belong on {device}, where "
                f"{free / 2**30:.1f} GiB of {room / 2**30:.1f} are free: use fewer replicas a GPU "
                f"(cluster.gpus_per_replica)",
                setting="model.source",
                value=source,
            )
        billions, whole = sum(own.numel() for own in model.parameters()) / 1e9, sum(needed.values())
        # A tenth for what a pass needs beside the weights.
        enough = math.ceil(1.1 * whole / max(1, room))
        raise ConfigurationError(
            f"{billions:.2f} billion parameters of {dtype.itemsize} bytes are {whole / 2**30:.1f} GiB, "
            f"{size / 2**30:.1f} of them on {device}, which has {room / 2**30:.1f} GiB: use "
            f"cluster.gpus_per_replica={enough}, or a smaller model.dtype",
            setting="model.source",
            value=source,
        )


def _around(model: PreTrainedModel, layers: nn.ModuleList) -> tuple[list[str], str, list[str]]:
    """The path of the layers, and of the largest parts before and after them that do not hold them."""
    path = next(name for name, module in model.named_modules() if module is layers)
    before: list[str] = []
    after: list[str] = []
    found: list[str] = before
    for name, _ in model.named_modules():
        if name == path:
            found = after
        elif f"{path}.".startswith(f"{name}.") or not name or name.startswith(f"{path}."):
            continue
        elif not any(name.startswith(f"{part}.") for part in (*before, *after)):
            found.append(name)
    return before, path, after


def _bytes_of(model: PreTrainedModel, names: Sequence[str]) -> int:
    """Shared weights count once."""
    weights = {id(own): own for name in names for own in model.get_submodule(name).parameters()}
    return sum(weight.nbytes for weight in weights.values())


def processor_name(device: torch.device) -> str:
    """What people call a device's processor; of a CPU Linux alone says its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()

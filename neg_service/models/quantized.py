"""Quantised checkpoints, read as what they dequantise to: plain tensors, for the plain model.

A quantised layer's own kernels drop gradients, or give staircases in their place, and some repack weights in a pass; so
none is ever used. Weights become plain tensors one by one, as the plain model's loader asks for them, by arithmetic of
our own (`dequantize.py`): libraries that could do it need GPUs, or are no longer kept, or fail on some shapes, and the
formats are simple. Left out is whatever rounds activations where such a model is served.

What is quantised is told by what lies in the files, not by the lists of modules in a configuration, which names layers
otherwise than files do. Whatever belongs to a quantised weight has to be there; what belongs to none is a tensor
without a parameter, which `weights.py` refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from neg_service.errors import ModelError, one_line
from neg_service.models import quantized_formats as formats
from neg_service.models.folder import StoredTensor
from neg_service.models.quantized_formats import Compute, Format, Settings, Unfit
from neg_service.models.text_config import text_config

# What settings of other types than they should be of come to.
_MISREAD = (AttributeError, TypeError, ValueError, LookupError, ArithmeticError)
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
# Scales of what is multiplied with a weight, and of what is kept in a cache.
_OF_ACTIVATIONS = re.compile(
    r".*\.(activation_scale|(input|output)_(scale|zero_point|global_scale)|qscale_act|[qkv]_(scale|zero_point))|"
    r".*_activation_scale"
)
_ONLY_QUANTISED = re.compile(r".*(\.weight|\.qweight|_packed|_blocks|\.(gate_up|down|gate|up)_proj)")


@dataclass(frozen=True)
class Dequantised:
    """What a model's weights were made from.

    tensors: how many were dequantised; None where the files were not looked at. activations: whether a server would
    quantise them, which is left out here.
    """

    method: str
    tensors: int | None
    activations: str


@dataclass(frozen=True)
class Method:
    """A quantisation method: its formats, why some settings are refused, and how a server rounds activations."""

    formats: Sequence[Format]
    activations: Callable[[Settings], str | None] = lambda _settings: None
    objection: Callable[[Settings], str | None] = lambda _settings: None


@dataclass(frozen=True)
class Quantization:
    """What a configuration says of quantised weights, of a method that is known here."""

    name: str
    settings: Settings
    method: Method

    def dequantised(self, tensors: Mapping[str, StoredTensor] | None) -> Dequantised | None:
        """What is to be told, with the tensors of its files; None where these have no quantised ones."""
        n = None if tensors is None else sum(isinstance(own, QuantizedTensor) for own in tensors.values())
        how = self.method.activations(self.settings)
        activations = f"quantised where it is served ({how}), not here" if how else "not quantised"
        return None if n == 0 else Dequantised(self.name, n, activations)


@dataclass(frozen=True)
class QuantizedTensor(StoredTensor):
    """A weight as the plain model knows it, `shape` included, with the tensors that it is made from."""

    parts: Mapping[str, StoredTensor]
    compute: Compute

    def read(self) -> Tensor:
        """Its plain values, in float32."""
        return self._computed({key: own.read() for key, own in self.parts.items()}, torch.float32)

    def read_from(self, files: Mapping[Path, Any], dtype: torch.dtype) -> Tensor:
        """Its plain values from files that are open."""
        return self._computed({key: files[own.file].get_tensor(own.name) for key, own in self.parts.items()}, dtype)

    def _computed(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        try:
            return self.compute(tensors, dtype)
        except ModelError as error:
            raise ModelError(f"{self.name} ({self.file.name}) {error.reason}", change="model.source") from error


def take_quantization(config: Any, name: str) -> Quantization | None:
    """What a configuration says of quantised weights; the configuration is then a plain model's.

    Raises:
        ModelError: a method, or a kind of it, that is not known here.
    """
    settings: dict[str, Any] | None = None
    for own in (config, text_config(config)):
        found = getattr(own, "quantization_config", None)
        if found:
            settings = settings or (found if isinstance(found, dict) else found.to_dict())
        if hasattr(own, "quantization_config"):
            del own.quantization_config
    if settings is None:
        return None
    method = settings.get("quant_method") or ("bitsandbytes" if _is_bitsandbytes(settings) else None)
    method = str(getattr(method, "value", method))
    known = _METHODS.get(method)
    reason: str | None = "this method is not known here"
    if known is not None:
        try:
            reason = known.objection(settings)
            known.activations(settings)
        except _MISREAD as error:
            reason = f"quantization_config cannot be read ({one_line(error)})"
    if known is None or reason:
        raise ModelError(
            f"{name} has quantised weights ({method}), which cannot be dequantised: {reason}: choose the full weights "
            f"as model.source, in model.dtype=bfloat16 if memory is short, or those of a method that can be "
            f"({', '.join(sorted(_METHODS))})",
            change="model.source",
        )
    return Quantization(method, settings, known)


def plain_tensors(
    source: str, model: PreTrainedModel, stored: Mapping[str, StoredTensor], quantization: Quantization | None
) -> dict[str, StoredTensor]:
    """The tensors of files as a plain model knows them: quantised weights under their names and shapes.

    Raises:
        ModelError: a weight of which a part is missing, or whose parts do not belong together.
    """
    if quantization is None:
        return dict(stored)
    found: dict[str, QuantizedTensor] = {}
    used: set[str] = set()
    for name, tensor in stored.items():
        own = _quantised(source, name, tensor, stored, quantization)
        if own is None:
            continue
        if own.name in found or (own.name in stored and stored[own.name] not in own.parts.values()):
            raise _refusal(source, own, "is there twice, quantised in two ways or also plain: take out one of the two")
        found[own.name] = own
        used.update(part.name for part in own.parts.values())
    if found and any(isinstance(module, Conv1D) for module in model.modules()):
        first = next(iter(found.values()))
        reason = f"is quantised in {type(model).__name__}, whose weights some programs turn round first"
        raise _refusal(source, first, f"{reason}: choose the full weights")
    left = {name: own for name, own in stored.items() if name not in used}
    known = set(model.state_dict())
    for name, tensor in left.items():
        if tensor.dtype not in PLAIN_DTYPES and _ONLY_QUANTISED.fullmatch(name):
            reason = (
                f"is stored as {tensor.dtype}, and nothing is there that {quantization.name} would dequantise it with"
            )
            raise _refusal(source, tensor, f"{reason}: fetch the whole model")
    return {name: own for name, own in left.items() if name in known or not _OF_ACTIVATIONS.fullmatch(name)} | found


def state_of(tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> dict[str, Any]:
    """What a plain model is loaded from, in the place of its folder: tensors by the names of a plain checkpoint.

    Quantised weights are made in `dtype`, each when it is asked for. Without a dtype: tensors without data.
    """
    if dtype is None:
        return {name: torch.empty(own.shape, device="meta") for name, own in tensors.items()}
    files: dict[Path, Any] = {}
    for own in tensors.values():
        for part in own.parts.values() if isinstance(own, QuantizedTensor) else (own,):
            if part.file not in files:
                files[part.file] = safe_open(part.file, "pt")
    return {
        name: _AsSlice(own, files, dtype) if isinstance(own, QuantizedTensor) else files[own.file].get_slice(own.name)
        for name, own in tensors.items()
    }


class _AsSlice:
    """Acts as a tensor of a file does to transformers' loader, which asks for all of it when its turn comes."""

    def __init__(self, tensor: QuantizedTensor, files: Mapping[Path, Any], dtype: torch.dtype) -> None:
        self._tensor, self._files, self._dtype = tensor, files, dtype

    def __getitem__(self, _all: Any) -> Tensor:
        return self._tensor.read_from(self._files, self._dtype)


def _quantised(
    source: str, name: str, tensor: StoredTensor, stored: Mapping[str, StoredTensor], quantization: Quantization
) -> QuantizedTensor | None:
    """The weight that a tensor tells of, if it does."""
    for one in quantization.method.formats:
        told = one.is_of(name, tensor.dtype)
        if told is None:
            continue
        stem = told["stem"]
        names = {"stem": stem, "module": stem.rpartition(".")[0]}
        parts = {}
        for key, templates in (*one.needs.items(), *one.may_have.items()):
            choice = [template.format(**names) for template in templates]
            there = next((own for own in choice if own in stored), None)
            if there is not None:
                parts[key] = stored[there]
            elif key in one.needs:
                reason = f"is quantised ({quantization.name}, {tensor.dtype}), and {' or '.join(choice)} is not there"
                raise _refusal(source, tensor, f"{reason}: fetch the whole model")
        try:
            shape, compute = one.arrange(parts, quantization.settings)
        except (Unfit, *_MISREAD) as error:
            reason = f"cannot be dequantised ({quantization.name}): {one_line(error)}"
            raise _refusal(source, tensor, f"{reason}: files and config.json are not of one model") from error
        return QuantizedTensor(one.plain.format(**names), tensor.file, PLAIN_DTYPES[1], tuple(shape), parts, compute)
    return None


def _refusal(source: str, tensor: StoredTensor, reason: str) -> ModelError:
    return ModelError(f"{tensor.name} ({tensor.file.name}) {reason}", setting="model.source", value=source)


def _is_bitsandbytes(settings: Settings) -> bool:
    # Older checkpoints do not name their method.
    return bool(settings.get("load_in_4bit") or settings.get("load_in_8bit"))


def _of_groups(settings: Settings) -> str | None:
    for group in (settings.get("config_groups") or {}).values():
        if own := group.get("input_activations"):
            how = "dynamic" if own.get("dynamic") else "static"
            return f"{how}, {own.get('num_bits', '?')} bits, {own.get('type', '?')}"
    return None


def _objection_to_compressed(settings: Settings) -> str | None:
    known = {"dense", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision",
             "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"}  # fmt: skip
    groups = (settings.get("config_groups") or {}).values()
    asked = {settings.get("format"), *(own.get("format") for own in groups)} - {None}
    if unknown := sorted(asked - known):
        return f"its format {unknown[0]} is not known here"
    if ((settings.get("sparsity_config") or {}).get("format") or "dense") != "dense":
        return f"its sparse format {settings['sparsity_config']['format']} is not known here"
    if (settings.get("transform_config") or {}).get("config_groups"):
        return "it transforms activations (transform_config)"
    return None


def _objection_to_gptq(settings: Settings) -> str | None:
    format_name = str(settings.get("checkpoint_format", settings.get("format", "gptq")))
    if format_name not in ("gptq", "gptq_v2"):
        return f"its format {format_name} is not known here (gptq, gptq_v2 are)"
    return (
        None
        if settings.get("bits") in (2, 4, 8)
        else f"its {settings.get('bits')} bits are packed otherwise (2, 4, 8 are known)"
    )


def _objection_to_awq(settings: Settings) -> str | None:
    version = str(settings.get("version", settings.get("format", "gemm"))).lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm":
        return f"its version {version} is packed otherwise (gemm is known)"
    return None if bits == 4 else f"its {bits} bits are packed otherwise (4 are known)"


def _scheme(settings: Settings) -> str:
    return f"{settings.get('activation_scheme', 'dynamic')}, 8 bits, float"


_METHODS = {
    "fp8": Method(formats.FP8, _scheme),
    "fbgemm_fp8": Method(formats.FBGEMM, _scheme),
    "mxfp4": Method(formats.MXFP4),
    "compressed-tensors": Method(formats.COMPRESSED_TENSORS, _of_groups, _objection_to_compressed),
    "modelopt": Method(formats.MODELOPT, lambda settings: f"static, {settings.get('quant_algo', '?')}"),
    "bitsandbytes": Method(
        formats.BITSANDBYTES, lambda settings: "dynamic, 8 bits, int" if settings.get("load_in_8bit") else None
    ),
    "gptq": Method(formats.GPTQ, objection=_objection_to_gptq),
    "awq": Method(formats.AWQ, objection=_objection_to_awq),
}

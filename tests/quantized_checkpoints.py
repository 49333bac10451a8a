"""Quantised checkpoints made small: tensors as the programs that make them store them, and what they stand for.

Codes, scales and zero points are drawn at random and written in each format's layout; what a weight stands for is
reckoned from the same numbers in float64, value by value, before anything is packed. Nothing of the package is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.tiny_models import VOCABULARY, tiny_tokenizer

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
# Any sixteen numbers will do, for the table is stored.
TABLE = [-1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **_TOKENS,
}
_MODELS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**_BASE, intermediate_size=96),
    "mixture": lambda: hf.Qwen3MoeConfig(
        **_BASE, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[]
    ),
    "gpt-oss": lambda: hf.GptOssConfig(
        **_BASE, head_dim=16, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=5
    ),
}

Stored = dict[str, torch.Tensor]
# Of a weight's name, its rows and columns, and a source of numbers: what is stored, and what that stands for [R, C].
Write = Callable[[str, int, int, np.random.Generator], tuple[Stored, np.ndarray]]


@dataclass(frozen=True)
class Kind:
    """A kind of quantised checkpoint: how a weight is written, and what config.json says."""

    write: Write
    config: Mapping[str, Any]
    model: str = "llama"
    # What stands in the names of weights that are quantised: projections, as most programs do it.
    of: str = "_proj"


def make(kind: Kind, place: Path, model: str = "") -> tuple[Path, Path]:
    """The folder of a quantised checkpoint, and that of a dense one in float64 with what it stands for."""
    quantised, dense = place / "quantised", place / "dense"
    torch.manual_seed(0)
    build = hf.AutoModelForCausalLM.from_config(_MODELS[model or kind.model]())
    with torch.no_grad():
        for weight in build.parameters():
            weight.normal_(0, 0.3) if weight.ndim > 1 else weight.normal_(1, 0.1)
    rng = np.random.default_rng(0)
    for directory in (quantised, dense):
        build.save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
    tensors = load_file(dense / "model.safetensors")
    stored, plain = {}, {}
    for name, weight in tensors.items():
        if kind.of in name and "bias" not in name:
            parts, values = _write(kind.write, name, weight.shape, rng)
            stored |= parts
            plain[name] = torch.tensor(values)
        else:
            stored[name], plain[name] = weight, weight.double()
    save(stored, quantised)
    save(plain, dense)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": kind.config}))
    return quantised, dense


def save(tensors: Stored, directory: Path) -> None:
    """Tensors as a model's only file."""
    save_file(
        {name: own.contiguous() for name, own in tensors.items()}, directory / "model.safetensors", {"format": "pt"}
    )


def _write(write: Write, name: str, shape: torch.Size, rng: np.random.Generator) -> tuple[Stored, np.ndarray]:
    if len(shape) == 2:
        return write(name, *shape, rng)
    # gpt-oss has its experts in one tensor, and them turned round.
    parts, values = zip(*(write(name, shape[2], shape[1], rng) for _ in range(shape[0])), strict=True)
    return {key: torch.stack([own[key] for own in parts]) for key in parts[0]}, np.stack([own.T for own in values])


def _scales(rng: np.random.Generator, *shape: int, largest: float = 1.0) -> np.ndarray:
    """Scales with which codes up to `largest` become weights of about 0.3, in as many bits as float16 has."""
    return (rng.uniform(0.5, 1.5, shape) * 0.6 / largest).astype(np.float16).astype(np.float64)


def _spread(grid: np.ndarray, rows: int, columns: int, a: int, b: int) -> np.ndarray:
    return np.array([[grid[r // a, c // b] for c in range(columns)] for r in range(rows)])


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Codes along the last axis in 32-bit integers, the first in the lowest bits; what is left over is 0."""
    per = 32 // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)])
    each = codes.reshape(*codes.shape[:-1], -1, per).astype(np.uint64)
    packed = sum(each[..., i] << np.uint64(bits * i) for i in range(per))
    return torch.tensor(packed.astype(np.uint32).view(np.int32))


def nibbles(codes: np.ndarray, is_low_first: bool = True) -> torch.Tensor:
    """Two codes in a byte."""
    first, second = codes[..., 0::2], codes[..., 1::2]
    return torch.tensor((first | second << 4 if is_low_first else first << 4 | second).astype(np.uint8))


def float8(
    block: tuple[int, int] | None,
    suffix: str = "_scale_inv",
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
    more: tuple[str, ...] = (),
    one: tuple[int, ...] = (),
) -> Write:
    """8-bit floats with scales of blocks, 0 being all rows or columns; None: one scale, of the shape `one`."""

    def write(name: str, rows: int, columns: int, rng: np.random.Generator) -> tuple[Stored, np.ndarray]:
        codes = torch.tensor(rng.normal(0, 0.3, (rows, columns)) * 100).to(dtype)
        a, b = (block[0] or rows, block[1] or columns) if block else (rows, columns)
        scales = _scales(rng, math.ceil(rows / a), math.ceil(columns / b), largest=60)
        stored = torch.tensor(scales).to(scale_dtype) if block else torch.tensor(scales).to(scale_dtype).reshape(one)
        if scale_dtype in (torch.uint8, torch.float8_e8m0fnu):
            exponents = rng.integers(117, 123, scales.shape)
            scales, stored = 2.0 ** (exponents - 127), torch.tensor(exponents.astype(np.uint8))
            stored = stored if scale_dtype == torch.uint8 else stored.view(torch.float8_e8m0fnu)
        else:
            scales = stored.double().numpy().reshape(scales.shape)
        parts = {name: codes, f"{name}{suffix}": stored}
        parts |= {f"{name.removesuffix('weight')}{own}": torch.ones(1) for own in more}
        return parts, codes.double().numpy() * _spread(scales, rows, columns, a, b)

    return write


def int8(group: int, has_zero: bool) -> Write:
    """8-bit integers as compressed-tensors stores them, with a scale a row or a group."""

    def write(name: str, rows: int, columns: int, rng: np.random.Generator) -> tuple[Stored, np.ndarray]:
        width = group or columns
        codes, scales = rng.integers(-128, 128, (rows, columns)), _scales(rng, rows, columns // width, largest=127)
        zeros = rng.integers(-20, 20, scales.shape) if has_zero else np.zeros(scales.shape, int)
        parts = {
            name: torch.tensor(codes, dtype=torch.int8),
            f"{name}_scale": torch.tensor(scales, dtype=torch.float32),
        }
        if has_zero:
            parts[f"{name}_zero_point"] = torch.tensor(zeros, dtype=torch.int8)
        shape = (rows, columns, 1, width)
        return parts, (codes - _spread(zeros, *shape)) * _spread(scales, *shape)

    return write


def packed(bits: int, group: int, has_zero: bool = False, in_order: bool = True) -> Write:
    """compressed-tensors' packed integers; out of order, a column's group is named."""

    def write(name: str, rows: int, columns: int, rng: np.random.Generator) -> tuple[Stored, np.ndarray]:
        half = 2 ** (bits - 1)
        n_groups = math.ceil(columns / group)
        codes, scales = rng.integers(-half, half, (rows, columns)), _scales(rng, rows, n_groups, largest=half)
        zeros = rng.integers(-half, half, scales.shape) if has_zero else np.zeros(scales.shape, int)
        of_column = np.arange(columns) // group if in_order else rng.permutation(np.arange(columns) // group)
        parts = {
            f"{name}_packed": words(codes + half, bits),
            f"{name}_scale": torch.tensor(scales, dtype=torch.bfloat16),
            f"{name}_shape": torch.tensor([rows, columns]),
        }
        if has_zero:
            parts[f"{name}_zero_point"] = words((zeros + half).T, bits).T
        if not in_order:
            parts[f"{name}_g_idx"] = torch.tensor(of_column, dtype=torch.int32)
        numbers = parts[f"{name}_scale"].double().numpy()
        return parts, (codes - zeros[:, of_column]) * numbers[:, of_column]

    return write


def nvfp4(divides: bool) -> Write:
    """4-bit floats in groups of 16, whose 8-bit scales have a scale of their own: a divisor, or a factor."""

    def write(name: str, rows: int, columns: int, rng: np.random.Generator) -> tuple[Stored, np.ndarray]:
        codes = rng.integers(0, 16, (rows, columns))
        scales = torch.tensor(rng.uniform(50, 300, (rows, columns // 16))).to(torch.float8_e4m3fn)
        factor = np.float64(np.float32(rng.uniform(1000, 2000)))
        own = torch.tensor(factor if divides else 1 / factor, dtype=torch.float32)
        numbers = scales.double().numpy() * (1 / own.double().numpy() if divides else own.double().numpy())
        names = (f"{name}_packed", f"{name}_global_scale") if divides else (name, f"{name}_scale_2")
        parts = {names[0]: nibbles(codes), f"{name}_scale": scales, names[1]: own.reshape(1) if divides else own}
        return parts, np.array(FP4)[codes] * _spread(numbers, rows, columns, 1, 16)

    return write


def mxfp4(suffixes: tuple[str, str], is_in_blocks: bool) -> Write:
    """4-bit floats in groups of 32 with exponents; gpt-oss has an axis for groups."""

    def write(name: str, rows: int, columns: int, rng: np.random.Generator) -> tuple[Stored, np.ndarray]:
        codes, exponents = rng.integers(0, 16, (rows, columns)), rng.integers(122, 126, (rows, columns // 32))
        values = nibbles(codes)
        values = values.reshape(rows, columns // 32, 16) if is_in_blocks else values
        parts = {f"{name}{suffixes[0]}": values, f"{name}{suffixes[1]}": torch.tensor(exponents.astype(np.uint8))}
        return parts, np.array(FP4)[codes] * _spread(2.0 ** (exponents - 127), rows, columns, 1, 32)

    return write


def table(block: int, is_nested: bool, kind: str = "nf4", storage: torch.dtype = torch.uint8) -> Write:
    """bitsandbytes' 4 bits, over the flattened weight; nested, what is largest of a block is a code itself."""

    def write(name: str, rows: int, columns: int, rng: np.random.Generator) -> tuple[Stored, np.ndarray]:
        n = rows * columns
        codes, n_blocks = rng.integers(0, 16, n), math.ceil(n / block)
        absmax = _scales(rng, n_blocks, largest=1)
        state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [rows, columns]}
        parts = {f"{name}.quant_map": torch.tensor(TABLE), f"{name}.absmax": torch.tensor(absmax, dtype=torch.float32)}
        if is_nested:
            inner, own = rng.integers(0, 256, n_blocks), np.linspace(-1, 1, 256).astype(np.float32)
            sizes = _scales(rng, math.ceil(n_blocks / 8), largest=2).astype(np.float32)
            absmax = np.array([own[code] * np.float64(sizes[i // 8]) for i, code in enumerate(inner)]) + 0.7
            state |= {"nested_blocksize": 8, "nested_dtype": "float32", "nested_offset": 0.7}
            parts |= {f"{name}.nested_absmax": torch.tensor(sizes), f"{name}.nested_quant_map": torch.tensor(own)}
            parts[f"{name}.absmax"] = torch.tensor(inner.astype(np.uint8))
        parts[f"{name}.quant_state.bitsandbytes__{kind}"] = torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        )
        parts[name] = nibbles(codes, is_low_first=False).view(storage).reshape(-1, 1)
        values = [np.float64(np.float32(TABLE[code])) * absmax[i // block] for i, code in enumerate(codes)]
        return parts, np.array(values).reshape(rows, columns)

    return write


def rows_of_8_bits(name: str, rows: int, columns: int, rng: np.random.Generator) -> tuple[Stored, np.ndarray]:
    """bitsandbytes' 8 bits: the largest of each row, whose code is 127."""
    codes, largest = rng.integers(-127, 128, (rows, columns)), _scales(rng, rows, largest=1)
    module = name.removesuffix(".weight")
    parts = {
        name: torch.tensor(codes, dtype=torch.int8),
        f"{module}.SCB": torch.tensor(largest, dtype=torch.float32),
        f"{name}_format": torch.tensor(0, dtype=torch.uint8),
    }
    return parts, codes * largest[:, None] / 127


def gptq(bits: int, group: int, is_one_less: bool, in_order: bool = True, names_groups: bool = True) -> Write:
    """GPTQ, packed along inputs; in its first version zero points are stored less one."""

    def write(name: str, rows: int, columns: int, rng: np.random.Generator) -> tuple[Stored, np.ndarray]:
        n_groups = math.ceil(columns / group)
        codes = rng.integers(0, 2**bits, (columns, rows))
        zeros = rng.integers(1, 2**bits, (n_groups, rows))
        scales = _scales(rng, n_groups, rows, largest=2 ** (bits - 1))
        of_input = np.arange(columns) // group if in_order else rng.permutation(np.arange(columns) // group)
        module = name.removesuffix(".weight")
        parts = {
            f"{module}.qweight": words(codes.T, bits).T,
            f"{module}.qzeros": words(zeros - is_one_less, bits),
            f"{module}.scales": torch.tensor(scales, dtype=torch.float16),
        }
        if names_groups:
            parts[f"{module}.g_idx"] = torch.tensor(of_input, dtype=torch.int32)
        return parts, ((codes - zeros[of_input]) * scales[of_input]).T

    return write


def awq(group: int) -> Write:
    """AWQ (gemm): packed along outputs, of eight the even ones first."""

    def write(name: str, rows: int, columns: int, rng: np.random.Generator) -> tuple[Stored, np.ndarray]:
        n_groups = columns // group
        codes, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(0, 16, (n_groups, rows))
        scales = _scales(rng, n_groups, rows, largest=8)
        module = name.removesuffix(".weight")

        def mixed(own: np.ndarray) -> torch.Tensor:
            return words(own.reshape(len(own), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(own.shape), 4)

        parts = {
            f"{module}.qweight": mixed(codes),
            f"{module}.qzeros": mixed(zeros),
            f"{module}.scales": torch.tensor(scales, dtype=torch.float16),
        }
        of_input = np.arange(columns) // group
        return parts, ((codes - zeros[of_input]) * scales[of_input]).T

    return write


def _compressed(format_name: str, activations: Mapping[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": format_name}
    return {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def _fp8(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic"} | settings


_DYNAMIC = {"num_bits": 8, "type": "float", "dynamic": True}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
_E8M0 = torch.float8_e8m0fnu

KINDS: dict[str, Kind] = {
    "fp8 blocks": Kind(float8((16, 32)), _fp8(weight_block_size=[16, 32])),
    "fp8 ragged blocks": Kind(float8((40, 28), scale_dtype=torch.bfloat16), _fp8(weight_block_size=[40, 28])),
    "fp8 exponents": Kind(float8((16, 32), scale_dtype=_E8M0), _fp8(weight_block_size=[16, 32], scale_fmt="ue8m0")),
    "fp8 bytes": Kind(float8((1, 32), scale_dtype=torch.uint8), _fp8(weight_block_size=[1, 32])),
    "fp8 e5m2 one scale": Kind(
        float8(None, dtype=torch.float8_e5m2, more=("activation_scale",)),
        _fp8(activation_scheme="static", weight_block_size=None),
    ),
    "fp8 fnuz one scale": Kind(float8(None, dtype=torch.float8_e4m3fnuz, one=(1,)), _fp8(weight_block_size=None)),
    "fbgemm_fp8": Kind(float8((1, 0), "_scale"), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "mxfp4": Kind(mxfp4(("_blocks", "_scales"), True), {"quant_method": "mxfp4"}, "gpt-oss", ".experts."),
    "compressed-tensors float rows": Kind(
        float8((1, 0), "_scale", more=("input_scale",)), _compressed("float-quantized", _DYNAMIC, num_bits=8)
    ),
    "compressed-tensors float blocks": Kind(
        float8((40, 28), "_scale"), _compressed("float-quantized", _DYNAMIC, num_bits=8, block_structure=[40, 28])
    ),
    "compressed-tensors int8": Kind(int8(0, False), _compressed("int-quantized", num_bits=8)),
    "compressed-tensors int8 zero points": Kind(
        int8(16, True), _compressed("naive-quantized", num_bits=8, group_size=16)
    ),
    "compressed-tensors int4": Kind(packed(4, 16), _compressed("pack-quantized", num_bits=4, group_size=16)),
    "compressed-tensors int4 ragged, zero points": Kind(
        packed(4, 28, has_zero=True), _compressed("pack-quantized", num_bits=4, group_size=28)
    ),
    "compressed-tensors int4 in another order": Kind(
        packed(4, 16, True, in_order=False), _compressed("pack-quantized", num_bits=4, group_size=16, actorder="group")
    ),
    "compressed-tensors int8 packed": Kind(packed(8, 32), _compressed("pack-quantized", num_bits=8, group_size=32)),
    "compressed-tensors nvfp4": Kind(nvfp4(True), _compressed("nvfp4-pack-quantized", num_bits=4, group_size=16)),
    "compressed-tensors mxfp4": Kind(
        mxfp4(("_packed", "_scale"), False), _compressed("mxfp4-pack-quantized", num_bits=4, group_size=32)
    ),
    "modelopt fp8": Kind(
        float8(None, "_scale", more=("input_scale",)), {"quant_method": "modelopt", "quant_algo": "FP8"}
    ),
    "modelopt nvfp4": Kind(nvfp4(False), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "bitsandbytes nf4": Kind(table(64, False), _NF4),
    "bitsandbytes nf4 nested": Kind(table(64, True), _NF4 | {"bnb_4bit_use_double_quant": True}),
    "bitsandbytes fp4 in bfloat16": Kind(
        table(100, False, "fp4", torch.bfloat16), _NF4 | {"bnb_4bit_quant_type": "fp4"}
    ),
    "bitsandbytes 8 bits": Kind(rows_of_8_bits, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "gptq": Kind(gptq(4, 16, True), _GPTQ),
    "gptq v2 in another order": Kind(
        gptq(4, 16, False, in_order=False), _GPTQ | {"checkpoint_format": "gptq_v2", "desc_act": True}
    ),
    "gptq 2 bits": Kind(gptq(2, 32, False), _GPTQ | {"bits": 2, "group_size": 32, "checkpoint_format": "gptq_v2"}),
    "gptq 8 bits without groups": Kind(gptq(8, 96, True, names_groups=False), _GPTQ | {"bits": 8, "group_size": -1}),
    "awq": Kind(awq(16), {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}),
}

"""Quantised checkpoints against dense ones with the same weights, and what is refused of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ModelError
from neg_service.models import dequantize
from neg_service.models.folder import stored_tensors
from neg_service.models.inspection import inspect_model
from neg_service.models.quantized import Dequantised, plain_tensors, state_of, take_quantization
from neg_service.models.source import fetch
from tests.folders import change_config, change_tensors, refusal_of, saved
from tests.oracle import relative
from tests.quantized_checkpoints import KINDS, make
from tests.refusals import refused

# Experts one by one in files, and all of a layer in one tensor.
MIXTURES = ("fp8 ragged blocks", "mxfp4", "compressed-tensors int4 in another order", "bitsandbytes nf4 nested", "awq")
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A kind's quantised and dense folders, made once; who changes them takes a copy."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def of(kind: str, model: str = "") -> tuple[Path, Path]:
        if (kind, model) not in made:
            made[kind, model] = make(KINDS[kind], tmp_path_factory.mktemp("checkpoint"), model)
        return made[kind, model]

    return of


@pytest.fixture
def changed(checkpoint: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a kind's quantised folder, with its tensors changed."""

    def of(kind: str, change: Callable[[dict[str, torch.Tensor]], Any] = lambda _own: None) -> Path:
        directory = shutil.copytree(checkpoint(kind)[0], tmp_path / "changed")
        change_tensors(directory, change)
        return directory

    return of


def loaded(directory: Path, dtype: str = "float64") -> LanguageModel:
    return neg_service.load_model(str(directory), dtype=dtype, device="cpu")


def logits(model: LanguageModel) -> torch.Tensor:
    if model.feed_forward.has_experts:
        model.model.set_experts_implementation("eager")
    with torch.no_grad():
        found: torch.Tensor = model.model(torch.tensor([[5, 9, 7, 11, 30]])).logits
    return found


def assert_same_weights(found: LanguageModel, expected: LanguageModel, tolerance: float = 1e-12) -> None:
    weights = dict(found.model.named_parameters())
    assert weights.keys() == dict(expected.model.named_parameters()).keys()
    assert type(found.model) is type(expected.model)
    assert not hasattr(found.model.config, "quantization_config")
    for name, weight in expected.model.named_parameters():
        assert weights[name].dtype == weight.dtype
        assert float((weights[name] - weight).abs().max()) <= tolerance * float(weight.abs().max()), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_what_it_dequantises_to(kind: str, checkpoint: Any) -> None:
    quantised, dense = map(loaded, checkpoint(kind))
    assert_same_weights(quantised, dense)
    assert relative(logits(quantised).numpy(), logits(dense).numpy()) < 1e-6
    said = quantised.dequantised
    assert said is not None
    assert said.method == KINDS[kind].config["quant_method"]
    assert said.tensors == (4 if kind == "mxfp4" else 14)
    assert dense.dequantised is None


@pytest.mark.parametrize("kind", ["fp8 blocks", "fbgemm_fp8", "compressed-tensors nvfp4", "modelopt fp8", "gptq"])
def test_other_mixtures_have_the_weights_of_the_dense_model(kind: str, checkpoint: Any) -> None:
    assert_same_weights(*map(loaded, checkpoint(kind, "mixture")))


@pytest.mark.parametrize("kind", MIXTURES)
def test_gradients_of_a_mixture_are_those_of_the_dense_model(kind: str, checkpoint: Any) -> None:
    quantised, dense = map(loaded, checkpoint(kind, "gpt-oss" if kind == "mxfp4" else "mixture"))
    assert_same_weights(quantised, dense)
    asked: Any = (["w5 w9 w7", "w30 w2 w8 w4"], [[" w3", " w4"], [" w8", " w9"]])
    found, expected = neg_service.neurgrad(quantised, *asked), neg_service.neurgrad(dense, *asked)
    assert np.array_equal(found.expert, expected.expert)
    assert np.abs(expected.neurgrad).max() > 0
    assert relative(found.neurgrad, expected.neurgrad) < 1e-6
    assert relative(found.probability, expected.probability) < 1e-6


@pytest.mark.parametrize("kind", ["fp8 ragged blocks", "compressed-tensors int4", "bitsandbytes nf4", "gptq"])
def test_gradients_of_a_dense_model_too(kind: str, checkpoint: Any) -> None:
    asked: Any = (["w5 w9 w7"], [[" w3", " w4"]])
    found, expected = (neg_service.neurgrad(loaded(directory), *asked) for directory in checkpoint(kind))
    assert np.abs(expected.neurgrad).max() > 0
    assert relative(found.neurgrad, expected.neurgrad) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-7), ("bfloat16", 2**-8)])
def test_weights_come_in_the_precision_asked_for(dtype: str, tolerance: float, checkpoint: Any) -> None:
    for kind in ("mxfp4", "bitsandbytes nf4 nested"):
        quantised, dense = (loaded(directory, dtype) for directory in checkpoint(kind))
        assert_same_weights(quantised, dense, tolerance)


def test_a_model_on_several_devices_is_loaded_straight_to_them(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both are this machine's memory; a part without a place would be refused all the same.
    quantised, dense = checkpoint("fp8 ragged blocks", "mixture")
    expected = loaded(dense)
    monkeypatch.setattr("neg_service.models.loading.checked_devices", lambda _: [torch.device("cpu")] * 2)
    assert_same_weights(loaded(quantised), expected)


def test_planning_knows_it_without_weights(checkpoint: Any) -> None:
    quantised, dense = checkpoint("fp8 blocks")
    info = inspect_model(fetch(str(quantised)), check_files=True)
    how = "quantised where it is served (dynamic, 8 bits, float), not here"
    assert info.dequantised == Dequantised("fp8", 14, how)
    # Memory is planned from these.
    assert info.n_parameters == inspect_model(fetch(str(dense))).n_parameters
    assert inspect_model(fetch(str(quantised))).dequantised == Dequantised("fp8", None, how)
    assert inspect_model(fetch(str(checkpoint("awq")[0]))).dequantised == Dequantised("awq", None, "not quantised")


def test_weights_are_made_one_by_one_as_they_are_asked_for(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised, dense = checkpoint("awq")
    config = hf.AutoConfig.from_pretrained(quantised)
    quantization = take_quantization(config, "tiny")
    file = quantised / "model.safetensors"
    tensors = plain_tensors("tiny", loaded(dense).model, stored_tensors("tiny", [file]), quantization)
    made: list[torch.Size] = []
    real = dequantize.awq

    def counted(*args: Any) -> torch.Tensor:
        made.append(args[0].shape)
        return real(*args)

    monkeypatch.setattr(dequantize, "awq", counted)
    state = state_of(tensors, torch.float64)
    assert made == []
    assert torch.equal(state[UP][...], load_file(dense / "model.safetensors")[UP])
    assert made == [(64, 12)]


def test_what_lies_in_files_decides_and_not_lists_of_modules(checkpoint: Any, changed: Any) -> None:
    kept = load_file(checkpoint("fp8 blocks")[1] / "model.safetensors")
    directory = changed(
        "fp8 blocks", lambda own: (own.update({UP: kept[UP].to(torch.float32)}), own.pop(f"{UP}_scale_inv"))
    )
    listed = KINDS["fp8 blocks"].config | {"modules_to_not_convert": ["model.layers.0.self_attn.q_proj"]}
    change_config(directory, quantization_config=listed)
    model = loaded(directory)
    assert model.dequantised is not None
    assert model.dequantised.tensors == 13
    assert_same_weights(model, loaded(checkpoint("fp8 blocks")[1]), 1e-6)


def fp8_tensors(file: Path, block: list[int]) -> dict[str, Any]:
    config = hf.LlamaConfig(quantization_config={"quant_method": "fp8", "weight_block_size": block})
    stored = stored_tensors("tiny", [file])
    return plain_tensors("tiny", hf.PreTrainedModel(config), stored, take_quantization(config, "tiny"))


@pytest.mark.parametrize("shape", [(3, 2, 2), (3,), (3, 1, 1), (), (1,)])
def test_experts_in_one_tensor_have_scales_of_their_own(shape: tuple[int, ...], tmp_path: Path) -> None:
    name, file = "mlp.experts.gate_up_proj", tmp_path / "model.safetensors"
    codes = torch.arange(3 * 5 * 7).reshape(3, 5, 7).to(torch.float8_e4m3fn)
    scales = torch.arange(1.0, 13.0)[: int(torch.Size(shape).numel())].reshape(shape)
    save_file({name: codes, f"{name}_scale_inv": scales}, file)
    tensors = fp8_tensors(file, [4, 6])
    found = tensors[name].read()
    assert found.shape == tensors[name].shape == codes.shape
    for x, r, c in np.ndindex(3, 5, 7):
        scale = scales if scales.numel() == 1 else scales[x, r // 4, c // 6] if scales.numel() == 12 else scales[x]
        assert float(found[x, r, c]) == float(codes[x, r, c].float() * scale)


def test_4_bit_experts_beside_8_bit_weights(tmp_path: Path) -> None:
    # As DeepSeek V4 has them; 0x2A is 2·-1 below, as -1 (code 10) in the lower and 1 (code 2) in the upper four bits.
    file = tmp_path / "model.safetensors"
    exponents = torch.tensor([[128, 126]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    save_file({"a.weight": torch.full((1, 32), 0x2A, dtype=torch.int8), "a.scale": exponents}, file)
    tensors = fp8_tensors(file, [128, 128])
    # Exponents 1 and -1: factors 2 and 0.5 of 32 columns each.
    assert tensors["a.weight"].read().tolist() == [[-2.0, 2.0] * 16 + [-0.5, 0.5] * 16]


def test_a_scale_may_lie_in_another_file(checkpoint: Any, changed: Any) -> None:
    directory = changed("fp8 blocks")
    tensors = load_file(directory / "model.safetensors")
    parts: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        parts["b.safetensors" if name.endswith("_inv") else "a.safetensors"][name] = tensor
    for file, own in parts.items():
        save_file(own, directory / file, {"format": "pt"})
    places = {name: file for file, own in parts.items() for name in own}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (directory / "model.safetensors").unlink()
    assert_same_weights(loaded(directory), loaded(checkpoint("fp8 blocks")[1]))


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_quantised_head_does_what_a_plain_one_does(is_tied: bool, checkpoint: Any, tmp_path: Path) -> None:
    found = []
    for name, directory in zip(("quantised", "dense"), checkpoint("fp8 blocks"), strict=True):
        place = shutil.copytree(directory, tmp_path / name)
        tensors = load_file(place / "model.safetensors")
        codes = (tensors["lm_head.weight"].float() * 128).to(torch.float8_e4m3fn)
        if name == "quantised":
            tensors |= {"lm_head.weight": codes, "lm_head.weight_scale_inv": torch.full((7, 2), 2.0**-7)}
        else:
            tensors["lm_head.weight"] = codes.double() * 2.0**-7
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        change_config(place, tie_word_embeddings=is_tied)
        found.append(loaded(place))
    assert_same_weights(*found)
    assert relative(logits(found[0]).numpy(), logits(found[1]).numpy()) < 1e-6


def test_plain_weights_under_a_quantised_configuration_are_plain(checkpoint: Any, tmp_path: Path) -> None:
    dense = checkpoint("gptq")[1]
    directory = shutil.copytree(dense, tmp_path / "plain")
    change_config(directory, quantization_config=KINDS["gptq"].config)
    model = loaded(directory)
    assert model.dequantised is None
    assert inspect_model(fetch(str(directory)), check_files=True).dequantised is None
    assert_same_weights(model, loaded(dense))


def test_quantised_weights_without_a_word_in_the_configuration_are_refused(changed: Any) -> None:
    directory = changed("compressed-tensors int8")
    change_config(directory, quantization_config=None)
    assert "stored as I8, which are quantised weights that config.json does not tell of" in refusal_of(directory)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "quanto"}, r"\(quanto\), which cannot be dequantised: this method is not known here"),
        ({"quant_method": "hqq"}, r"\(hqq\).*choose the full weights as model\.source"),
        ({"quant_method": "auto-round"}, r"\(auto-round\)"),
        ({"bits": 4}, r"\(None\)"),
        ({"quant_method": "compressed-tensors", "config_groups": ["Linear"]}, "quantization_config cannot be read"),
        ({"quant_method": "gptq", "bits": 3}, r"\(gptq\).*: its 3 bits are packed otherwise"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "its format marlin is not known here"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "its version gemv is packed otherwise"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "its format marlin-24 is not known here"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}},
            "it transforms activations",
        ),
    ],
)
def test_what_cannot_be_dequantised_is_refused_by_name(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    directory = saved("Llama 2", tmp_path, quantization_config=settings)
    with refused(ModelError, "model.source", says=f"has quantised weights.*{says}"):
        inspect_model(fetch(str(directory)))


def transposed(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda own: own.update({name: own[name].T.contiguous()})


def without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda own: own.pop(name)


def with_values(name: str, value: Any) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda own: own[name].fill_(value)


MODULE = UP.removesuffix(".weight")
INVERSE, EXPERTS = f"{UP}_scale_inv", "model.layers.1.mlp.experts.down_proj"
CT = "compressed-tensors"


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("fp8 blocks", transposed(INVERSE), "scales [2, 6] of a weight [96, 64] are not those of blocks of 16 × 32"),
        ("fp8 blocks", without(INVERSE), f"{UP} (model.safetensors) is quantised (fp8, F8_E4M3), and {INVERSE} or"),
        ("fp8 blocks", lambda own: own.update({UP: own[UP].float()}), f"1 tensors would not be used: {INVERSE}"),
        ("mxfp4", without(f"{EXPERTS}_scales"), f"{EXPERTS}_scales is not there"),
        (f"{CT} int4", without(f"{UP}_shape"), f"{UP}_shape is not there: fetch the whole model"),
        (f"{CT} int4", transposed(f"{UP}_scale"), "scales [4, 96] of a weight [96, 64]"),
        (f"{CT} int8 zero points", transposed(f"{UP}_zero_point"), "zero points [4, 96], but scales [96, 4]"),
        (f"{CT} nvfp4", without(f"{UP}_global_scale"), "scales of 8 bits without the scale of these scales"),
        ("modelopt nvfp4", without(f"{UP}_scale"), f"{UP}_scale is not there"),
        ("bitsandbytes nf4", without(f"{UP}.quant_state.bitsandbytes__nf4"), "stored as U8, and nothing is there that"),
        ("bitsandbytes nf4", without(f"{UP}.absmax"), f"{UP}.absmax is not there"),
        ("bitsandbytes nf4 nested", without(f"{UP}.nested_absmax"), "which needs nested_absmax and nested_quant_map"),
        ("bitsandbytes 8 bits", without(f"{MODULE}.SCB"), "is stored as I8, and nothing is there that"),
        ("bitsandbytes 8 bits", with_values(f"{UP}_format", 1), "weight_format is 1: only rows (0) are known"),
        ("gptq", without(f"{MODULE}.qzeros"), f"{MODULE}.qzeros is not there"),
        ("gptq", transposed(f"{MODULE}.scales"), "are not of 2, 4 or 8 bits"),
        ("gptq", lambda own: own.update({UP: torch.zeros(96, 64)}), f"{UP} (model.safetensors) is there twice"),
        ("awq", without(f"{MODULE}.scales"), f"{MODULE}.scales is not there"),
    ],
)
def test_parts_that_are_missing_or_do_not_fit_are_refused_by_name(
    kind: str, change: Callable[[dict[str, torch.Tensor]], Any], says: str, changed: Any
) -> None:
    assert says in refusal_of(changed(kind, change))


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("gptq", with_values(f"{MODULE}.qzeros", -1), "has a zero point of 16, which does not fit its 4 bits"),
        ("gptq", with_values(f"{MODULE}.g_idx", 9), "g_idx names groups from 9 to 9, but there are 4"),
        ("gptq", with_values(f"{MODULE}.g_idx", -1), "g_idx names groups from -1 to -1, but there are 4"),
    ],
)
def test_values_that_cannot_be_are_refused_while_they_are_read(
    kind: str, change: Callable[[dict[str, torch.Tensor]], Any], says: str, changed: Any
) -> None:
    directory = changed(kind, change)
    with refused(ModelError, says=f"{UP} .model.safetensors. {says}"):
        loaded(directory)


def test_group_sizes_of_which_two_would_fit_are_refused(changed: Any) -> None:
    directory = changed("compressed-tensors int4 ragged, zero points")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    # 64 columns in three groups: 28, 28 and 8, or 30, 30 and 4.
    config["config_groups"]["group_1"] = group | {"weights": group["weights"] | {"group_size": 30}}
    change_config(directory, quantization_config=config)
    assert "are not those of blocks of 1 × 28 or 1 × 30 alone" in refusal_of(directory)


def test_weights_that_may_be_turned_round_are_refused(tmp_path: Path) -> None:
    directory = saved("GPT-2", tmp_path, quantization_config=KINDS["bitsandbytes 8 bits"].config)

    def quantised(own: dict[str, torch.Tensor]) -> None:
        name = "transformer.h.0.attn.c_proj"
        own[f"{name}.weight"] = own[f"{name}.weight"].to(torch.int8)
        own[f"{name}.SCB"] = torch.ones(24)

    change_tensors(directory, quantised)
    assert "is quantised in GPT2LMHeadModel, whose weights some programs turn round first" in refusal_of(directory)

"""What multiplies matrices on a CPU: oneDNN's numbers, how it is chosen, and what happens where it is wrong."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import neg_service
from neg_service.errors import ConfigurationError
from neg_service.models import cpu_product, onednn
from neg_service.models.cpu_product import CpuProduct, choose_product, measure
from neg_service.models.language_model import LanguageModel
from neg_service.models.precision import in_precision
from tests.mixtures import MIXTURES, tiny_mixture
from tests.tiny_models import tiny_model

AMD, INTEL = "AuthenticAMD", "GenuineIntel"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all weights that oneDNN multiplied by."""
    seen: list[tuple[int, ...]] = []
    raw = onednn.raw_linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(tuple(weight.shape))
        return raw(x, weight, bias)

    monkeypatch.setattr(onednn, "raw_linear", counted)
    return seen


def _with_onednn(family: str) -> LanguageModel:
    model = tiny_model(family)
    use(model)
    return model


def use(model: LanguageModel) -> None:
    model.cpu_product = choose_product(model.model, "onednn")
    assert model.cpu_product is not None
    assert model.cpu_product.name == "onednn"


# --- its numbers


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_product_and_gradient(has_bias: bool, is_transposed: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 48, generator=draw, requires_grad=True)
    weight = torch.randn(48, 72, generator=draw).T if is_transposed else torch.randn(72, 48, generator=draw)
    bias = torch.randn(72, generator=draw) if has_bias else None
    slope = torch.randn(3, 2, 5, 72, generator=draw)
    y = onednn.linear(x, weight, bias)
    assert isinstance(y.grad_fn, onednn._Linear._backward_cls)  # type: ignore[attr-defined]
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-5)
    (gradient,) = torch.autograd.grad(y, x, slope[0], retain_graph=True)
    torch.testing.assert_close(gradient.double(), slope[0].double() @ weight.double(), rtol=0, atol=5e-5)
    # All targets of a masked model go back at once.
    (batched,) = torch.autograd.grad(y, x, slope, is_grads_batched=True)
    torch.testing.assert_close(batched.double(), slope.double() @ weight.double(), rtol=0, atol=5e-5)


def test_what_is_not_for_onednn_goes_the_plain_way(calls: list[tuple[int, ...]]) -> None:
    layer = nn.Linear(6, 4)
    onednn.use_onednn(layer)
    x = torch.randn(3, 6)
    # The gradient of a weight: a user's own training of the model.
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    layer.requires_grad_(False)
    assert layer(x[0]).shape == (4,)
    assert layer(x[:0]).shape == (0, 4)
    with onednn.plain_products():
        layer(x)
    with in_precision(nn.Sequential(layer), [layer], torch.float64):  # type: ignore[arg-type]
        assert layer(x.double()).dtype == torch.float64
    assert not calls
    layer(x)
    assert calls == [(4, 6)]


@pytest.mark.parametrize("family", ["GPT-2", "BERT", "Qwen 3 MoE"])
def test_measures_are_the_same(family: str, calls: list[tuple[int, ...]]) -> None:
    """Tied heads and weights the other way round, vectorised backward passes, experts."""
    found = []
    for is_fast in (False, True):
        model = tiny_mixture(family) if family in MIXTURES else tiny_model(family)
        if is_fast:
            use(model)
            model.ensure_checked()
            calls.clear()
        prompt = "w3 w4 w96 w5" if model.is_masked else "w3 w4 w5 w6"
        result = neg_service.neurgrad(model, [prompt], [[" w7", " w8", " w9"]])
        neurons = [(0, 1, 0), (2, 3, 5)] if family in MIXTURES else [(0, 1), (2, 3)]
        neg = neg_service.neg(model, prompt, " w7", neurons, shifts=[-1, 1])
        found.append((result.neurgrad, np.asarray(neg.neg)))
        assert bool(calls) is is_fast
    widths = {shape[::-1] for shape in calls}
    # Weights are met both ways round: forward, and backward.
    assert any(shape in widths for shape in calls if shape[0] != shape[1])
    # The chosen neurons of these small models move the target by 1e-6, of which float32 knows fewer digits.
    for plain, own, allowed in zip(*found, (2e-5, 2e-3), strict=True):
        assert np.abs(plain - own).max() <= allowed * np.abs(plain).max()


def test_back_to_the_plain_way_and_copies(calls: list[tuple[int, ...]]) -> None:
    model = _with_onednn("GPT-2").model
    ids = torch.tensor([[3, 4, 5]])
    other = copy.deepcopy(model)
    onednn.use_onednn(model, False)
    assert not any("forward" in own.__dict__ for own in model.modules())
    with torch.no_grad():
        plain = model(ids).logits
        assert not calls
        for weight in model.parameters():
            weight.zero_()
        # A copy has weights of its own, and multiplies as its original did when it was copied.
        torch.testing.assert_close(other(ids).logits, plain, rtol=1e-4, atol=1e-5)
    assert calls


# --- the choice


@pytest.mark.parametrize(
    ("asked", "vendor", "measured", "name", "reason"),
    [
        ("auto", AMD, (2.0, 5e-7, 2e-7), "onednn", "measured to be faster"),
        ("auto", AMD, (1.2, 5e-7, 2e-7), "torch", "oneDNN is less than 1.3 times as fast"),
        ("auto", AMD, (2.0, 9e-7, 2e-7), "torch", "oneDNN's error is more than 4 times PyTorch's"),
        ("auto", AMD, (2.0, float("nan"), 2e-7), "torch", "oneDNN's error is more than 4 times PyTorch's"),
        ("auto", INTEL, None, "torch", "no processor of AMD (GenuineIntel)"),
        ("auto", "", None, "torch", "no processor of AMD (its maker is not known)"),
        ("torch", AMD, None, "torch", "asked for"),
        ("onednn", INTEL, (0.9, 5e-7, 2e-7), "onednn", "asked for"),
        ("onednn", INTEL, (2.0, 9e-7, 2e-7), "torch", "oneDNN's error is more than 4 times PyTorch's"),
    ],
)
def test_choice(
    asked: str,
    vendor: str,
    measured: tuple[float, float, float] | None,
    name: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def pretended(_weights: object) -> tuple[float, float, float]:
        assert measured is not None, "nothing was to be measured"
        return measured

    monkeypatch.setattr(cpu_product, "processor_vendor", lambda: vendor)
    monkeypatch.setattr(cpu_product, "measure", pretended)
    layer = nn.Linear(6, 4)
    with caplog.at_level(logging.INFO):
        found = choose_product(layer, asked)
    assert found is not None
    assert (found.name, found.reason) == (name, reason)
    assert found.gain == (measured and measured[0])
    assert ("forward" in layer.__dict__) is (name == "onednn")
    (record,) = caplog.records
    assert record.levelno == (logging.WARNING if asked == "onednn" and name == "torch" else logging.INFO)
    assert f"matrix products on the CPU: {name}, {reason}" in record.message


def test_nothing_to_choose_in_other_precisions() -> None:
    assert choose_product(nn.Linear(6, 4, dtype=torch.float64), "onednn") is None
    assert choose_product(nn.Linear(6, 4, device="meta"), "onednn") is None


def test_a_wrong_product_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        # As if factors were rounded to bfloat16 on the way back alone.
        return nn.functional.linear(x, weight.bfloat16().float() if weight.shape[0] < weight.shape[1] else weight, bias)

    monkeypatch.setattr(cpu_product, "raw_linear", wrong)
    found = choose_product(nn.Linear(48, 96), "onednn")
    assert found is not None
    assert found.name == "torch"
    assert found.error is not None
    assert found.error > 1e-4


@pytest.mark.parametrize("lacks", ["built without", "no operator", "other arguments"])
def test_where_it_is_missing(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacks == "built without":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif lacks == "no operator":
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    else:
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda x, weight: x)
    found = choose_product(nn.Linear(6, 4), "onednn")
    assert found is not None
    assert found.name == "torch"
    assert found.reason.startswith("oneDNN cannot be used: ")


def test_the_measurement() -> None:
    threads = torch.get_num_threads()
    gain, error, torch_error = measure([torch.randn(300, 200), torch.randn(200, 300).T])
    assert torch.get_num_threads() == threads
    # The bounds say only that something was measured.
    assert 0.01 < gain < 100
    assert 0 < torch_error < 2e-6
    assert 0 < error < 2e-6


def test_a_model_that_fails_its_check_with_it_runs_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The measurement sees a few shapes; the self-check compares all layers with the plain pass."""
    model = _with_onednn("Llama 3")
    raw = onednn.raw_linear
    monkeypatch.setattr(
        onednn, "raw_linear", lambda x, w, b=None: raw(x, w, b) * (1.01 if tuple(w.shape) == (24, 40) else 1)
    )
    with caplog.at_level(logging.WARNING):
        model.ensure_checked()
    assert model.cpu_product == CpuProduct("torch", "with oneDNN the model fails its self-check")
    assert "checked again without oneDNN" in caplog.text
    assert not any("forward" in own.__dict__ for own in model.model.modules())


def test_settings(tiny_directory: Path) -> None:
    for name in ("torch", "onednn"):
        own = neg_service.load_model(tiny_directory, device="cpu", cpu_product=name).cpu_product
        assert own is not None
        assert own.name == name
        assert ("gain" in own.as_dict()) is (name == "onednn")
    assert neg_service.load_model(tiny_directory, device="cpu", dtype="float64").cpu_product is None
    with pytest.raises(ConfigurationError, match="cpu_product") as refusal:
        neg_service.load_model(tiny_directory, cpu_product="mkl")
    assert "auto, torch, onednn" in str(refusal.value)


def test_use_product_only_where_it_is_right() -> None:
    model = _with_onednn("Llama 3")
    model.use_product("torch")
    assert model.cpu_product is not None
    assert model.cpu_product.name == "torch"
    assert not any("forward" in own.__dict__ for own in model.model.modules())
    model.use_product("onednn")
    assert model.cpu_product.name == "onednn"
    # Where nothing is known of oneDNN, a run that began with it goes on without.
    model.use_product("torch")
    model.cpu_product = CpuProduct("torch", "not measured")
    model.use_product("onednn")
    assert model.cpu_product.name == "torch"

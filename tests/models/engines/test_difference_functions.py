"""Differences of functions and products: float32 against the plain difference in float64, digit by digit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neg_service.models.engines import difference_functions as functions
from neg_service.models.engines.difference_products import product_of

NEW_GELU = partial(nn.functional.gelu, approximate="tanh")
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Any]]] = {
    "silu": (nn.functional.silu, functions.silu),
    "gelu": (nn.functional.gelu, functions.gelu),
    "gelu by tanh": (NEW_GELU, partial(functions.gelu, approximate="tanh")),
    "tanh": (torch.tanh, functions.tanh),
    "sigmoid": (torch.sigmoid, functions.sigmoid),
    "relu": (torch.relu, functions.relu),
    "clamp": (lambda x: x.clamp(-1, 2), lambda a, t: functions.clamp(a, t, -1, 2)),
    "clamp from above": (lambda x: x.clamp(max=0.5), lambda a, t: functions.clamp(a, t, None, 0.5)),
    "cube": (lambda x: x**3, lambda a, t: functions.power(a, t, 3)),
    "square": (torch.square, functions.square),
    "exp": (torch.exp, functions.exp),
    "softmax": (lambda x: x.softmax(-1), lambda a, t: functions.softmax(a.softmax(-1), t)),
    "layer norm": (
        lambda x: nn.functional.layer_norm(x, x.shape[-1:]),
        lambda a, t: functions.layer_norm(a, t, None, 1e-5),
    ),
    "rms norm": (
        lambda x: nn.functional.rms_norm(x, x.shape[-1:], None, 1e-6),
        lambda a, t: functions.rms_norm(a, t, None, 1e-6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [1e-8, 1e-5, 1e-2, 0.24, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_difference_of_any_size_has_all_digits(name: str, size: float) -> None:
    plain, difference = FUNCTIONS[name]
    draw = torch.Generator().manual_seed(0)
    a = 3 * torch.randn(1, 400, generator=draw, dtype=torch.float64)
    # Of exponentials float32 holds no larger ones.
    d = (min(size, 3.0) if name == "exp" else size) * torch.randn(50, 400, generator=draw)
    # The plain difference in float64 has lost less than ten of its sixteen digits.
    expected = plain(a + d.double()) - plain(a)
    found = difference(a, torch.float32)(d).double()
    # Of all features of a row: a product with weights adds them up.
    allowed = 2e-6 if size < 10 or name not in ("softmax", "exp") else 2e-5
    deviation = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(deviation.max()) < allowed


@pytest.mark.parametrize(("name", "kept"), [("sqrt", functions.sqrt), ("rsqrt", functions.rsqrt)])
def test_a_difference_of_roots_has_all_digits(name: str, kept: Callable[..., functions.Difference]) -> None:
    a = torch.linspace(0.01, 100, 500, dtype=torch.float64)[None]
    for size in (1e-8, 1e-4, 0.5, 50.0):
        d = (size * a.expand(3, -1)).float()
        expected = getattr(a.double() + d.double(), name)() - getattr(a.double(), name)()
        torch.testing.assert_close(kept(a, torch.float32)(d).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "far"), [("silu", 300.0), ("gelu by tanh", 30.0), ("gelu", 300.0)])
def test_activations_far_from_zero_are_right(name: str, far: float) -> None:
    plain, difference = FUNCTIONS[name]
    a = torch.tensor([[-far, -50.0, 0.0, 50.0, far]], dtype=torch.float64)
    d = torch.tensor([[-2 * far], [-50.0], [-1e-3], [1e-3], [50.0], [2 * far]]).expand(-1, 5).contiguous()
    expected = plain(a.double() + d.double()) - plain(a.double())
    torch.testing.assert_close(difference(a, torch.float32)(d).double(), expected, rtol=1e-5, atol=1e-9)


def test_rows_in_blocks_are_what_they_are_together(monkeypatch: pytest.MonkeyPatch) -> None:
    a, d = torch.randn(1, 1, 3, 8).double(), torch.randn(1, 50, 3, 8)

    def both(a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return (
            functions.silu(a, torch.float32)(d),
            functions.rms_norm(a, torch.float32, torch.ones(a.shape[-1]), 1e-6)(d),
        )

    whole = both(a, d)
    monkeypatch.setattr(functions, "_BLOCK", 60)
    torch.testing.assert_close(both(a, d), whole)
    # Also where rows are not the first axis, and not next to each other in memory.
    strided = both(a.transpose(1, 2), d.transpose(1, 2))[0]
    torch.testing.assert_close(strided.transpose(1, 2), whole[0])


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("mode", "least", "most"), [("exact", 0, 1e-6), ("fast", 1e-4, 1e-2)])
def test_products_of_bfloat16_weights_are_as_exact_as_they_say(
    mode: str, least: float, most: float, is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neg_service.models.engines.difference_products._TILE", 1000)
    weight = torch.randn(70, 300).bfloat16()
    # Far below what bfloat16 could add to a hidden state of 1.
    d = 1e-7 * torch.randn(9, 300)
    given = weight.T.contiguous() if is_transposed else weight
    found = product_of(mode)(d, given, is_transposed)
    assert found.dtype == torch.float32
    expected = d.double() @ weight.double().T
    assert least <= float((found - expected).norm() / expected.norm()) <= most
    # The reference is float64, whatever the mode.
    torch.testing.assert_close(product_of(mode)(d.double(), given, is_transposed), expected, rtol=1e-12, atol=1e-20)

"""Integrated gradients of neurons at an earlier token, and of targets of several tokens, against plain passes.

Each scaled point is one plain pass over prompt and target in float64, with a layer's neurons at one token multiplied,
and one backward pass for each target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import neg_service
from neg_service.measures import measure_of
from neg_service.prompts.prompt import Prompt
from tests import mixtures_oracle, oracle, sequences
from tests.families import layers_with_mlps
from tests.mixtures import MIXTURES, tiny_mixture
from tests.oracle import relative
from tests.shards import measured_shard
from tests.tiny_models import tiny_model

IDS = (20, 21, 22, 23, 24, 25, 26, 27, 28)
TEXT = " ".join(f"w{token}" for token in IDS)
M = 3
# One token; several; two that begin alike, so that a tree is two sequences.
ONE, SEVERAL = ((7,), (8,)), ((3, 4, 5), (9,), (3, 6, 8))
# Windows, a recurrent state (whole sequences), plain attention whose rows are whole sequences.
FAMILIES = ["Gemma 2", "Qwen 3.5", "GPT-J"]


def names(targets: Sequence[Sequence[int]]) -> list[str]:
    return [" " + " ".join(f"w{token}" for token in own) for own in targets]


def integrated(run: Callable[[float], tuple[Tensor, Sequence[Tensor]]]) -> list[np.ndarray]:
    """a · (1/M) · Σ ∂p/∂a of some tensors, from p and these at a factor."""
    sums: Any = 0
    for j in range(1, M + 1):
        with torch.enable_grad():
            p, scaled = run(j / M)
            slopes = torch.autograd.grad(p, list(scaled))
        sums = [own.numpy() + before for own, before in zip(slopes, sums or [0.0] * len(slopes), strict=True)]
    # The last point is the activations themselves.
    return [own.detach().numpy() * total / M for own, total in zip(scaled, sums, strict=True)]


def _agrees(found: np.ndarray, expected: np.ndarray) -> bool:
    """Of the last layer all are zero, where nothing that is read depends on an earlier token."""
    return not found.any() if not expected.any() else relative(found.astype(float), expected) < 1e-5


@pytest.mark.parametrize(
    ("family", "at", "place", "targets"),
    [
        pytest.param(family, *asked, marks=() if i == j else pytest.mark.faults)
        for i, family in enumerate(FAMILIES)
        for j, asked in enumerate([("w22", 2, ONE), (-3, 6, SEVERAL), (None, 8, SEVERAL)])
    ],
)
def test_they_are_those_of_plain_passes(family: str, at: Any, place: int, targets: Any) -> None:
    model = tiny_model(family, torch.float64)
    found = neg_service.integrated_gradients(
        model, [TEXT], [names(targets)], m=M, not_one_token="sequence", neurons_at=[at]
    )
    layers = layers_with_mlps(model)
    for k, target in enumerate(targets):
        p = sequences.probability(model.model, IDS, target)
        assert found.probability[0, k] == pytest.approx(float(p), rel=1e-5)
        for i, layer in enumerate(layers):

            def run(factor: float, i: int = i, target: Any = target) -> tuple[Tensor, list[Tensor]]:
                with oracle.scaled_layer(model.model, "paper", i, factor, place) as scaled:
                    return sequences.probability(model.model, IDS, target), scaled

            (expected,) = integrated(run)
            assert _agrees(found.integrated_gradients[0, k, layer], expected)


@pytest.mark.parametrize("at", ["w22", None])
def test_of_a_mixture_the_experts_of_that_token_are_scaled(at: str | None) -> None:
    model, place = tiny_mixture("Qwen 2 MoE", torch.float64), 8 if at is None else 2
    found = neg_service.integrated_gradients(
        model, [TEXT], [names(SEVERAL)], m=M, basis="hidden", not_one_token="sequence", neurons_at=[at]
    )
    assert found.expert is not None
    for k, target in enumerate(SEVERAL):
        for layer in range(3):
            keys: list[tuple[int, int]] = []

            def run(factor: float, layer: int = layer, target: Any = target, keys: Any = keys) -> Any:
                scaled: dict[tuple[int, int], Tensor] = {}

                def touch(key: tuple[int, int], x: Tensor) -> Tensor:
                    if key[0] != layer:
                        return x
                    scaled[key] = (x * factor).detach().requires_grad_()
                    return scaled[key]

                with mixtures_oracle.token_by_token(model.model, MIXTURES["Qwen 2 MoE"], "hidden", place, touch):
                    p = sequences.probability(model.model, IDS, target)
                keys[:] = sorted(scaled, key=lambda key: (key[1] < 0, key))
                return p, [scaled[key] for key in keys]

            expected = np.concatenate(integrated(run))
            own = found.integrated_gradients[0, k, layer, : len(expected)]
            assert _agrees(own, expected)
            assert list(dict.fromkeys(found.expert[0, layer, : len(expected)].tolist())) == [key[1] for key in keys]


def test_a_scan_has_rows_with_places_and_targets_of_several_tokens() -> None:
    model = tiny_model("Llama 2")
    prompts = [Prompt("a", TEXT, tuple(names(SEVERAL)), 0, at="w22"), Prompt("b", TEXT, tuple(names(ONE)), 1)]
    tables = measured_shard(measure_of({"name": "integrated_gradients", "steps": M}), model, prompts, sequences=True)
    assert tables["prompts"]["position"].to_pylist() == [2, None]
    assert tables["prompts"]["target_sequences"].to_pylist()[0] == [[3, 4, 5], [9], [3, 6, 8]]
    rows = tables["integrated_gradients"].to_pylist()
    alone = neg_service.integrated_gradients(
        model, [TEXT], [names(SEVERAL)], m=M, not_one_token="sequence", neurons_at=[2]
    ).integrated_gradients[0]
    np.testing.assert_allclose(
        np.stack([row["integrated_gradients"] for row in rows if row["prompt_id"] == "a"]),
        alone.reshape(-1, alone.shape[-1]),
        rtol=1e-4,
        atol=1e-9,
    )

"""Where passes may begin, and where rows may become many: what layers hand on past each other is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neg_service.models.engines.partial_passes import starts_and_expansion
from tests.tiny_models import tiny_model

IDS = (3, 14, 9, 26, 35)
TOLERANCE = 1e-4


def found(model: Any) -> tuple[bool, set[int]]:
    """Whether passes may begin anywhere, and in which layers rows may become many."""
    model.ensure_checked()
    starts, sites = starts_and_expansion(model.engine, IDS, TOLERANCE)
    return starts, {site.layer for site in sites}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_plain_model_every_layer_may_begin_and_expand(dtype: torch.dtype) -> None:
    model = tiny_model("Llama 2", dtype)
    assert found(model) == (True, set(range(model.feed_forward.n_layers)))


@pytest.mark.parametrize(("by", "is_taken"), [(0, True), (1, True), (1, False)])
def test_what_a_late_layer_hands_to_the_head_alone_is_seen(by: int, is_taken: bool) -> None:
    model = tiny_model("Llama 2")
    inner: Any = model.model.model
    kept: dict[str, Tensor] = {}
    last = len(inner.layers) - 1
    inner.layers[last - by].register_forward_hook(lambda _layer, _args, output: kept.update(x=output))
    # What was not taken is still there in the next pass, of which it is not.
    take: Any = kept.pop if is_taken else kept.get
    inner.norm.register_forward_pre_hook(lambda _norm, args: (args[0] + 0.5 * take("x"),))
    # What the last layer itself hands on is there in every pass.
    assert found(model)[0] is (by == 0)


def test_a_layer_that_adds_little_to_a_large_residual_is_seen_to_be_wrong() -> None:
    model = tiny_model("Llama 2")
    inner: Any = model.model.model
    kept: dict[str, Tensor] = {}
    # The residual is a million times what layers add, and the last but one adds what it read in a layer before.
    with torch.no_grad():
        inner.embed_tokens.weight.mul_(1e3)
    inner.layers[0].register_forward_hook(lambda _layer, _args, output: kept.update(x=output - output.mean(-1, True)))

    def add(_layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + 0.3 * (output - args[0]) * torch.sign(kept.pop("x"))

    inner.layers[-2].register_forward_hook(add)
    assert not found(model)[0]


def test_rows_do_not_become_many_where_a_layer_above_takes_only_as_many_as_a_pass_began_with() -> None:
    model = tiny_model("Llama 2")
    layers: Any = model.model.model.layers
    begun: list[int] = []
    model.model.model.embed_tokens.register_forward_hook(lambda _m, _a, output: begun.append(output.shape[1]))

    def refuse(_layer: Any, args: tuple[Any, ...]) -> None:
        if args[0].shape[1] != begun[-1]:
            raise ValueError("another number of rows")

    layers[-1].register_forward_pre_hook(refuse)
    starts, expanding = found(model)
    assert starts
    assert expanding == {len(layers) - 1}

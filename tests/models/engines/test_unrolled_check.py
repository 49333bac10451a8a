"""What the self-check sees of a model whose layers were unrolled otherwise than its code runs them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from neg_service import LanguageModel
from neg_service.errors import ModelError
from tests.refusals import refused
from tests.tiny_models import tiny_model


def test_a_right_one_passes_and_says_so() -> None:
    tried = tiny_model("ALBERT").ensure_checked().check.tried
    assert "logits with 3 layers of their own against the model as it was loaded" in tried


def _one_run_less(model: Any) -> None:
    model.albert.encoder.config.num_hidden_layers -= 1


def _others_weights(model: Any) -> None:
    # Of the other group, and once more than it runs.
    layers = model.albert.encoder.albert_layer_groups
    _copy_weights(layers[1], layers[2])


def _copy_weights(layer: nn.Module, other: nn.Module) -> None:
    for part, own in zip(layer.modules(), other.modules(), strict=True):
        part.__dict__["_parameters"] = own._parameters


def _in_another_order(model: Any) -> None:
    stacks = model.model.L_module.stacks
    stacks["0"], stacks["1"] = stacks["1"], stacks["0"]


def _one_that_runs_twice(model: Any) -> None:
    stacks = model.model.L_module.stacks
    stacks["1"] = stacks["0"]


@pytest.mark.parametrize(
    ("family", "spoil", "says"),
    [
        ("ALBERT", _one_run_less, "does not run 3 layers one behind the other"),
        ("ALBERT", _others_weights, r"with a layer for each run its logits are .* off"),
        # Their weights are the same, and so are all logits.
        ("HRM", _in_another_order, "does not run 6 layers one behind the other"),
        ("HRM", _one_that_runs_twice, "does not run 6 layers one behind the other"),
    ],
)
def test_what_runs_otherwise_is_refused(family: str, spoil: Any, says: str) -> None:
    model: LanguageModel = tiny_model(family)
    spoil(model.model)
    with refused(ModelError, "model.source", says=says):
        model.ensure_checked()


def test_a_run_that_is_not_known_is_refused() -> None:
    model = tiny_model("HRM")
    del model.model.model.L_module.stacks["3"]
    with refused(ModelError, "model.source", says="the plain model does not run"):
        model.ensure_checked()

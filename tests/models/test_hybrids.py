"""Recurrent layers beside attention, and attention that chooses what it looks at, against the textbook way.

Mixtures among them are compared with the others, in `test_mixtures.py`.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.bamba import modeling_bamba

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ConfigurationError
from neg_service.models.engines import frozen_cache, recurrent_state
from neg_service.models.engines.full_sequence import FullSequenceEngine
from neg_service.models.engines.recurrent_state import RecurrentStateEngine
from tests import families, oracle
from tests.families import (
    HYBRID_NEURGRAD_TOLERANCE,
    JOINT_TOLERANCE,
    SWEEP_TOLERANCE,
    joint_deviation,
    model_of,
    neurgrad_deviation,
)
from tests.refusals import refused
from tests.tiny_models import CHUNK, HYBRIDS, tiny_model

RECURRENT = [family for family, own in HYBRIDS.items() if own.engine is RecurrentStateEngine]
BASES = [
    *((family, "paper") for family in HYBRIDS),
    *((own, b) for own in ("Qwen 3.5", "DeepSeek 3.2, above its limit") for b in ("hidden", "gate")),
]
# One token, as long as a chunk and one more, longer than windows and two chunks.
LENGTHS = (1, CHUNK, CHUNK + 1, 2 * CHUNK + 1)
# A sprung trap moves results by this at least; right ones agree to 2e-5.
SEEN = 1e-3


@pytest.mark.parametrize("family", HYBRIDS)
def test_the_self_check_passes_and_chooses_the_engine(family: str) -> None:
    chosen = model_of(family).ensure_checked()
    assert type(chosen.engine) is HYBRIDS[family].engine
    assert chosen.check.logits < 1e-5
    assert chosen.check.neurons < 1e-5
    assert chosen.check.finite_difference is not None
    assert chosen.check.finite_difference < 0.02


@pytest.mark.parametrize(("family", "basis"), BASES)
def test_neurgrad_equals_a_backward_pass_a_target(family: str, basis: str) -> None:
    assert neurgrad_deviation(family, basis, LENGTHS) <= HYBRID_NEURGRAD_TOLERANCE


@pytest.mark.parametrize(("family", "basis"), BASES)
def test_a_sweep_equals_a_full_forward_pass_an_intervention(family: str, basis: str) -> None:
    assert families.sweep_deviation(family, basis) <= SWEEP_TOLERANCE


@pytest.mark.parametrize(("family", "basis"), BASES)
def test_joint_interventions_equal_full_forward_passes(family: str, basis: str) -> None:
    assert joint_deviation(family, basis) <= JOINT_TOLERANCE


def test_layers_without_neurons_are_left_out_by_every_measure() -> None:
    model, prompt, layers = model_of("Nemotron-H"), "w3 w14 w9", [1, 3, 5]
    shape = (1, 1, 6, 40)
    for found in (
        neg_service.neurgrad(model, [prompt], [[" w7"]]).neurgrad,
        neg_service.integrated_gradients(model, [prompt], [[" w7"]], m=3).integrated_gradients,
    ):
        assert found.shape == shape
        assert np.isfinite(found[0, 0, layers]).all()
        assert np.isnan(np.delete(found[0, 0], layers, 0)).all()
    _, slopes, activation = oracle.gradients(families.float64_of("Nemotron-H"), (3, 14, 9), [7], "paper")
    found = neg_service.neurgrad(model, [prompt], [[" w7"]]).neurgrad[0, 0, layers]
    expected = slopes[0] * np.where(activation < 0, -1, 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())
    with refused(ConfigurationError, "layers", says="no layer with feed-forward neurons"):
        neg_service.neurgrad(model, [prompt], [[" w7"]], layers=[0, 2])


@pytest.mark.parametrize("length", [64, 65, 66, 130])
def test_prefixes_that_end_at_and_behind_the_blocks_of_a_delta_rule(length: int) -> None:
    # Whose code cuts prompts into 64 tokens, without a name for it: the last token is not of the prefix.
    assert families.sweep_deviation("Qwen 3.5", "paper", length) <= SWEEP_TOLERANCE


# --- traps


@pytest.mark.parametrize("family", RECURRENT)
def test_rows_leave_states_as_they_were(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family)
    with torch.no_grad():
        rows = model.rows([(3, 14, 15, 92, 65, 35)])
        assert torch.equal(rows.run([3]), rows.run([3]))
        monkeypatch.setattr(frozen_cache._ReadOnly, "copy_", torch.Tensor.copy_)
        # One row: the expanded states of several are refused by torch itself.
        written = model.rows([(3, 14, 15, 92, 65, 35)])
        assert not torch.equal(written.run([1]), written.run([1]))


def _bamba(**options: Any) -> LanguageModel:
    family = HYBRIDS["Bamba"]
    config = family.config()
    for name, value in options.items():
        setattr(config, name, value)
    model = tiny_model("Bamba")
    torch.manual_seed(0)
    build = type(model.model)(config)
    build.load_state_dict(model.model.state_dict())
    return LanguageModel(build, model.tokenizer)


def test_time_steps_are_limited_in_single_steps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"time_step_limit": (0.4, 0.9)}
    assert type(_bamba(**limits).engine) is RecurrentStateEngine
    monkeypatch.setattr(recurrent_state, "_limited_time_steps", lambda _module: nullcontext())
    assert type(_bamba(**limits).engine) is FullSequenceEngine


def test_a_fused_step_without_a_way_back_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.wraps(modeling_bamba.mamba2_selective_state_update)
    def fused(state: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        plain = inspect.unwrap(fused)
        return plain(state, *(own.detach() if isinstance(own, torch.Tensor) else own for own in args), **kwargs)

    monkeypatch.setattr(modeling_bamba, "mamba2_selective_state_update", fused)
    # As if the package that it comes from were there.
    monkeypatch.setattr(recurrent_state, "_FUSED", ("torch",))
    model = tiny_model("Bamba")
    assert type(model.engine) is RecurrentStateEngine
    assert modeling_bamba.mamba2_selective_state_update is fused
    monkeypatch.setattr(recurrent_state, "_FUSED", ())
    assert type(tiny_model("Bamba").engine) is FullSequenceEngine


def test_a_state_in_a_module_is_no_cache() -> None:
    rejected = model_of("RecurrentGemma").ensure_checked().rejected
    assert rejected["recurrent_state"] == "its layers keep their states elsewhere than in a cache"

"""Which engine runs a model: the fastest that fits, or none."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import transformers as hf

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ModelError
from neg_service.models.engines import frozen_cache, full_sequence, shared_prefix
from neg_service.models.engines.base import LAST_TOKEN, MASK_TOKEN, Engine
from neg_service.models.engines.differences import DifferencesEngine
from neg_service.models.engines.full_sequence import FullSequenceEngine, UnpaddedEngine
from neg_service.models.engines.kv_cache import KeyValueCacheEngine
from neg_service.models.engines.select import candidates
from neg_service.models.engines.shared_prefix import SharedPrefixEngine
from tests.families import model_of
from tests.refusals import refused
from tests.tiny_models import tiny_model, tiny_tokenizer


def _with_a_wrong_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    real = shared_prefix.run_prefix

    def off_by_one(model, prompts, header):
        prefix = real(model, prompts, header)
        for keys in prefix.keys_bgtd.values():
            keys.copy_(keys.roll(1, 2))
        return prefix

    monkeypatch.setattr("neg_service.models.engines.shared_prefix.run_prefix", off_by_one)


def _with_a_wrong_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    real = frozen_cache._FrozenAttention.update

    def rolled(self, keys, values, *more):
        keys, values = real(self, keys, values, *more)
        return keys.roll(1, 2), values

    monkeypatch.setattr(frozen_cache._FrozenAttention, "update", rolled)


def _with_wrong_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    real = full_sequence.FullSequenceRows.run
    monkeypatch.setattr(full_sequence.FullSequenceRows, "run", lambda self, counts: real(self, counts).roll(1, 1))


def test_an_engine_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    right = neg_service.neurgrad(tiny_model("Llama 2"), ["w1 w2 w5 w9"], [[" w3"]])
    _with_a_wrong_prefix(monkeypatch)
    caplog.set_level(logging.INFO)
    model = tiny_model("Llama 2")
    found = neg_service.neurgrad(model, ["w1 w2 w5 w9"], [[" w3"]])
    assert type(model.engine) is KeyValueCacheEngine
    assert "runs as kv_cache, not as shared_prefix: row logits are" in caplog.text
    np.testing.assert_allclose(found.neurgrad, right.neurgrad, rtol=1e-3, atol=1e-6 * np.abs(right.neurgrad).max())


def test_what_no_faster_engine_fits_runs_as_whole_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    right = neg_service.neurgrad(tiny_model("Llama 2"), ["w1 w2 w5 w9", "w8"], [[" w3"], [" w4", " w5"]])
    _with_a_wrong_prefix(monkeypatch)
    _with_a_wrong_cache(monkeypatch)
    model = tiny_model("Llama 2")
    found = neg_service.neurgrad(model, ["w1 w2 w5 w9", "w8"], [[" w3"], [" w4", " w5"]])
    assert type(model.engine) is FullSequenceEngine
    np.testing.assert_allclose(found.neurgrad, right.neurgrad, rtol=1e-3, atol=1e-6 * np.nanmax(abs(right.neurgrad)))


def test_a_model_that_no_engine_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_a_wrong_prefix(monkeypatch)
    _with_a_wrong_cache(monkeypatch)
    _with_wrong_sequences(monkeypatch)
    model = tiny_model("Llama 2")
    for _ in range(2):
        with refused(
            ModelError, "model", says="shared_prefix: row logits are .* off the plain forward pass.*; kv_cache: "
        ):
            neg_service.neurgrad(model, ["w1 w2"], [[" w3"]])
    with refused(ModelError, "model.source", says="shared_prefix: row logits are"):
        _ = model.engine


@pytest.mark.parametrize(
    ("name", "setting", "engine"),
    [
        ("BigBird", "attention_type=block_sparse", FullSequenceEngine),
        ("Doge", "keep_window_size=16", KeyValueCacheEngine),
    ],
)
def test_attention_that_depends_on_the_length_of_a_prompt_needs_an_engine_that_asks_it(
    name: str, setting: str, engine: type[Engine]
) -> None:
    config = getattr(hf, f"{name}Config")(
        vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **{"BigBird": {"is_decoder": True, "block_size": 4}, "Doge": {"keep_window_size": 16}}[name],
    )  # fmt: skip
    torch.manual_seed(0)
    chosen = LanguageModel(hf.AutoModelForCausalLM.from_config(config), tiny_tokenizer()).ensure_checked()
    assert type(chosen.engine) is engine
    assert f"sparse attention ({setting})" in chosen.rejected["shared_prefix"]


def test_what_is_read_at_a_kind_of_token_has_the_engines_that_read_there() -> None:
    fitting = {kind for kind, refusal in candidates(model_of("Llama 2").model, LAST_TOKEN).items() if not refusal}
    assert fitting == {DifferencesEngine, SharedPrefixEngine, KeyValueCacheEngine, FullSequenceEngine}
    assert candidates(model_of("BERT").model, MASK_TOKEN) == {FullSequenceEngine: None, UnpaddedEngine: None}


def test_another_copy_of_a_model_runs_by_the_engine_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = model_of("GPT-J").ensure_checked()
    copied = tiny_model("GPT-J")
    copied.adopt(chosen)
    assert type(copied.engine) is KeyValueCacheEngine
    assert copied.engine.model.module is copied.model
    assert copied.ensure_checked().check is chosen.check

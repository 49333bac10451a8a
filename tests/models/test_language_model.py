"""The wrapper: ids that a model does not have are refused before anything is run, and what is dropped is freed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import transformers as hf
from torch import nn

import neg_service
from neg_service import LanguageModel
from neg_service.errors import PromptError
from neg_service.measures.integrated_gradients import integrated_gradients
from tests.refusals import refused
from tests.tiny_models import tiny_model, tiny_tokenizer


def _with_a_head_of(rows: int) -> LanguageModel:
    own = tiny_model("Llama 2").model
    own.lm_head = nn.Linear(24, rows, bias=False)
    return LanguageModel(own, tiny_tokenizer(), name="small")


def test_the_library_refuses_ids_that_a_model_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    short = LanguageModel(hf.LlamaForCausalLM(_llama_of(50)), tiny_tokenizer(), name="small")
    edit = {"neurons": [(0, 0)], "shift": 1.0}
    # Nothing is run before.
    monkeypatch.setattr(LanguageModel, "ensure_checked", lambda _self: pytest.fail("runs"))
    for model, text, target, message in (
        (short, "w3 w70", " w4", "prompt '0': its token 'w70' has the id 70, but small embeds only the ids below 50"),
        (short, "w3 w4", " w70", "prompt '0': target ' w70' is the token 'w70' with the id 70, but small predicts"),
        (_with_a_head_of(60), "w3 w70", " w60", r"'w60' with the id 60, but small predicts only the ids below 60: .*"),
    ):
        for measure in (
            lambda m, x, t: neg_service.neurgrad(m, [x], [[t]]),
            lambda m, x, t: neg_service.neg(m, x, t, [(0, 0)], [1.0]),
            lambda m, x, t: neg_service.intervene(m, [x], [[t]], [edit]),
            lambda m, x, t: integrated_gradients(m, [x], [[t]]),
        ):
            with refused(PromptError, "model", says=message):
                measure(model, text, target)


def _llama_of(vocabulary: int) -> Any:
    config = tiny_model("Llama 2").model.config
    return type(config)(**{**config.to_dict(), "vocab_size": vocabulary})


def test_rows_of_the_vocabulary_without_a_token_are_no_fault() -> None:
    padded = LanguageModel(hf.LlamaForCausalLM(_llama_of(128)), tiny_tokenizer())
    assert neg_service.neurgrad(padded, ["w3 w96"], [[" w95"]]).neurgrad.shape == (1, 1, 3, 40)


def test_a_model_that_is_dropped_is_freed_at_once() -> None:
    model = tiny_model("Llama 2")
    neg_service.neurgrad(model, ["w1 w2 w3"], [[" w7"]])
    weight = weakref.ref(model.model.lm_head)
    gc.disable()
    try:
        # No cycle keeps it until a collection, for which an accelerator's memory would have to wait.
        del model
        assert weight() is None
    finally:
        gc.enable()

"""Sizes of a model: its vocabulary, how long a prompt may be, and what a token is multiplied with."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as hf

import neg_service
from neg_service import LanguageModel
from neg_service.errors import PromptError
from neg_service.layer_neurons import LayerNeurons
from neg_service.models.dimensions import frozen_values, token_values, token_weights
from neg_service.models.engines.shared_prefix import SharedPrefixEngine
from neg_service.models.inspection import inspect_model
from neg_service.models.source import fetch
from tests.mixtures import tiny_mixture
from tests.refusals import refused
from tests.tiny_models import tiny_model, tiny_tokenizer

TINY = {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_positions_behind_the_padding_are_not_counted_as_context() -> None:
    # RoBERTa's first position is the one behind its padding token's.
    config = hf.RobertaConfig(**TINY, intermediate_size=40, max_position_embeddings=20, pad_token_id=1)
    model = LanguageModel(hf.AutoModelForMaskedLM.from_config(config), tiny_tokenizer())
    assert model.context_length == 18
    text = " ".join(["w5"] * 17)
    neg_service.neurgrad(model, [f"{text} w96"], [["w7"]])
    with refused(PromptError, "model", says="prompt '0' has 19 tokens, the model's context holds 18"):
        neg_service.neurgrad(model, [f"{text} w5 w96"], [["w7"]])


def test_prompts_that_change_the_rotary_angles_of_a_pass_are_refused() -> None:
    model = tiny_model("Phi-4-mini")
    # Of 64 positions, the angles of all change beyond the first 32.
    assert model.context_length == 32
    with refused(PromptError, "model", says="prompt '1' has 33 tokens, the model's context holds 32"):
        neg_service.neurgrad(model, ["w5 " * 32, "w5 " * 33], [[" w7"]] * 2)


@pytest.mark.parametrize("family", ["Llama 2", "BLOOM", "Gemma 3", "BERT", "DeBERTa", "MPNet", "ModernBERT"])
def test_the_ids_of_a_model_are_known_with_and_without_its_weights(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    info = inspect_model(fetch(str(tmp_path)))
    assert (model.n_input_ids, model.n_output_ids) == (info.n_input_ids, info.n_output_ids) == (97, 97)


def test_the_ids_of_a_model_are_those_of_its_shortest_table() -> None:
    config = hf.Gemma3nTextConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=90, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"], altup_num_inputs=2, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 2,
    )  # fmt: skip
    model = LanguageModel(hf.Gemma3nForCausalLM(config), tiny_tokenizer())
    assert (model.n_input_ids, model.n_output_ids) == (90, 97)
    with refused(PromptError, "model", says="its token 'w92' has the id 92, but model embeds only the ids below 90"):
        neg_service.neurgrad(model, ["w92 w3"], [[" w4"]])


def test_of_embeddings_a_token_meets_nothing_and_of_experts_those_that_it_uses(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 40, "num_key_value_heads": 4, "tie_word_embeddings": False}
    made = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, **sizes))
    # Four square matrices of attention, three of the MLP, two norms; the last norm; the head.
    layer = 4 * 24 * 24 + 3 * 24 * 40 + 2 * 24
    assert token_weights(made, [LayerNeurons(40)] * 2, is_gated=True) == (2 * layer + 24, 97 * 24)
    tied = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, **{**sizes, "tie_word_embeddings": True}))
    assert token_weights(tied, [LayerNeurons(40)] * 2, is_gated=True) == (2 * layer + 24, 97 * 24)
    # Eight experts of which two are used, and their router.
    mixture = hf.MixtralForCausalLM(hf.MixtralConfig(**TINY, **sizes, num_local_experts=8, num_experts_per_tok=2))
    layer = 4 * 24 * 24 + 2 * 3 * 24 * 40 + 8 * 24 + 2 * 24
    assert token_weights(mixture, [LayerNeurons(0, 8, 40, 2)] * 2, is_gated=True) == (2 * layer + 24, 97 * 24)
    made.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    info = inspect_model(fetch(str(tmp_path)))
    assert (info.token_weights, info.head_weights) == token_weights(made, [LayerNeurons(40)] * 2, is_gated=True)


@pytest.mark.parametrize("family", ["Mixtral", "JetMoE"])
def test_keys_and_values_of_a_prefix_are_as_many_as_is_said(family: str) -> None:
    model = tiny_mixture(family)
    engine = model.engine
    assert isinstance(engine, SharedPrefixEngine)
    kept = engine.shared_prefix((3, 14, 15, 9))
    found = sum(own.numel() for own in (*kept.keys_gcd.values(), *kept.values_gcd.values())) / 4
    assert found == frozen_values(model.model.config, 3, 20) - token_values(model.model.config, 20)

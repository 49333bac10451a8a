"""The self-check finds a wrong engine, wrong neurons and wrong gradients, and what a model supports."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ModelError
from neg_service.models.engines import comparisons, prefix_attention, self_check, shared_prefix
from tests.configurations import tiny
from tests.refusals import refused
from tests.tiny_models import tiny_model, tiny_tokenizer


def test_the_self_check_in_bfloat16_has_no_poke() -> None:
    checked = tiny_model("Llama 2", torch.bfloat16).ensure_checked().check
    assert checked.finite_difference is None


def test_windows_that_a_short_prompt_never_meets_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    # As of a checkpoint whose window is longer than any prompt of the self-check.
    model = tiny_model("Mistral")
    model.model.config.sliding_window = 4096
    assert model.engine.name == "differences"
    assert model.model.config.sliding_window == 4096
    real = prefix_attention.View
    monkeypatch.setattr(prefix_attention, "View", lambda scaling, window, softcap: real(scaling, None, softcap))
    blind = tiny_model("Mistral")
    blind.model.config.sliding_window = 4096
    assert blind.engine.name == "kv_cache"


def test_the_self_check_finds_neurons_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Phi-3 and 4")
    # As if the fused projection gave up before gate.
    for (own,) in model.feed_forward.mlps:
        mlp: Any = own.module
        up = mlp.gate_up_proj.weight
        up.copy_(torch.cat(up.chunk(2)[::-1]))
        mlp.forward = _swapped_forward.__get__(mlp)
    with refused(ModelError, says="captured neurons are"):
        model.ensure_checked()


def _swapped_forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    up, gate = self.gate_up_proj(x).chunk(2, -1)
    return self.down_proj(up * self.activation_fn(gate))


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = tiny_model("Llama 2")
    with torch.no_grad():
        model.model.lm_head.weight.fill_(float("nan"))
    with refused(ModelError, says=r"logits on 13 tokens are not finite"):
        model.ensure_checked()


def _not_fitting(family: str) -> str:
    """What the self-check says against the fast engine of a tiny model."""
    return tiny_model(family).ensure_checked().rejected.get("shared_prefix", "")


def test_the_self_check_sees_neurons_of_another_token(monkeypatch: pytest.MonkeyPatch) -> None:
    real = shared_prefix.SharedPrefixRows.positions
    monkeypatch.setattr(shared_prefix.SharedPrefixRows, "positions", lambda self, counts: real(self, counts).roll(-1))
    assert "neurons at the readout position are" in _not_fitting("Llama 2")


def test_the_self_check_sees_gradients_that_are_a_tenth_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    real = comparisons.target_gradients

    def larger(*arguments: Any) -> Any:
        found = real(*arguments)
        return dataclasses.replace(found, gradient_srn=[1.1 * own for own in found.gradient_srn])

    monkeypatch.setattr(comparisons, "target_gradients", larger)
    with refused(ModelError, says="away from what gradients say"):
        tiny_model("Llama 2").ensure_checked()


def test_the_self_check_sees_a_shared_prefix_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    real = shared_prefix.run_shared_prefix

    def rolled(*arguments: Any) -> Any:
        found = real(*arguments)
        keys = {layer: own.roll(1, 1) for layer, own in found.keys_gcd.items()}
        return dataclasses.replace(found, keys_gcd=keys)

    monkeypatch.setattr(shared_prefix, "run_shared_prefix", rolled)
    assert "row logits are" in _not_fitting("Llama 2")


def test_the_self_check_sees_padding_that_is_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_attention.RowPass, "hidden_keys", lambda self, window, device: (None, None))
    assert "row logits are" in _not_fitting("Llama 2")


@pytest.mark.parametrize(("family", "starts"), [("DeBERTa 2 and 3", False), ("DeBERTa", True), ("Llama 2", True)])
def test_where_more_than_its_output_leaves_a_layer_no_pass_begins_at_it(family: str, starts: bool) -> None:
    assert tiny_model(family).ensure_checked().check.starts_at_layers is starts


def test_a_model_whose_layers_share_keys_and_values_is_swept_by_whole_passes() -> None:
    config = hf.Gemma3nTextConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8,
        altup_num_inputs=2, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LanguageModel(hf.Gemma3nForCausalLM(config), tiny_tokenizer())
    assert not model.ensure_checked().check.starts_at_layers
    neurons = [(layer, 5) for layer in range(4)]
    swept = neg_service.neg(model, "w1 w2 w3", " w7", neurons, [-0.5, 0.5])
    for i, neuron in enumerate(neurons):
        edits = [{"neurons": [neuron], "shift": 0.5}]
        edited = neg_service.intervene(model, ["w1 w2 w3"], [[" w7"]], edits)
        np.testing.assert_allclose(swept.delta_p[i, 1], edited.delta_p.ravel()[0], rtol=1e-3)


def test_neurons_that_hardly_act_and_soon_bend_are_no_false_alarm() -> None:
    # Of layer 0's neurons the gradient is a thousandth of that of others.
    check = LanguageModel(tiny("gemma3n_text", is_masked=False).eval(), tiny_tokenizer()).ensure_checked().check
    assert check.finite_difference is not None
    assert check.finite_difference < 0.05


def test_layers_that_hand_on_what_one_row_chose_are_swept_by_whole_passes() -> None:
    # HY 4 chooses keys in some layers, for those above too: for one row a pass may begin above, for two it may not.
    config = hf.HYV4Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
        head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8,
        mlp_layer_types=["dense"] * 4, index_head_dim=16, index_n_heads=16, index_topk=3, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    chosen = LanguageModel(model, tiny_tokenizer()).ensure_checked()
    assert chosen.engine.name == "kv_cache"
    assert not chosen.check.starts_at_layers
    assert len(chosen.check.late_expansion) < 4


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of the prompt of each pass of the plain model."""
    found: list[int] = []
    real = comparisons.plain_logits

    def counted(model: Any, ids: Sequence[int], **options: Any) -> Tensor:
        found.append(len(ids))
        return real(model, ids, **options)

    for where in (comparisons, self_check):
        monkeypatch.setattr(where, "plain_logits", counted)
    return found


def test_nothing_is_run_twice(passes: list[int]) -> None:
    tiny_model("Llama 2").ensure_checked()
    # At first; the two prompts of rows; of neurons, also at readout; the targets of gradients and of small shifts.
    assert len(passes) == 1 + 2 + 2 + 2
    passes.clear()
    model = tiny_model("Mistral")
    model.model.config.sliding_window = 4096
    model.ensure_checked()
    # Those of rows once more, with a short window.
    assert len(passes) == 1 + 2 * 2 + 2 + 2


def test_a_finite_difference_that_does_not_agree_is_tried_in_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    real, real_shifts, tried = comparisons.target_gradients, comparisons._log_p_of_shifts, []

    def twice_as_steep(*arguments: Any) -> Any:
        found = real(*arguments)
        for gradient in found.gradient_srn:
            gradient.mul_(2)
        return found

    def counted(plain: Any, points: Any, shift: Any, target: int) -> Any:
        tried.append(len(shift))
        return real_shifts(plain, points, shift, target)

    monkeypatch.setattr(comparisons, "target_gradients", twice_as_steep)
    monkeypatch.setattr(comparisons, "_log_p_of_shifts", counted)
    with refused(ModelError, says="small shifts of neurons move the output"):
        tiny_model("Llama 2", torch.float64).ensure_checked()
    # Of each of the three engines: four steps, the last in float64, in three layers.
    assert tried == [3] * 12

"""Digits of gradients where the vocabulary is large and rows are few: a sum over all tokens has to be had in parts."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from neg_service import LanguageModel
from neg_service.measures.gradients import gradients
from neg_service.models.batches import Budget
from neg_service.models.head import exact_head_gradient, product_in_parts
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from tests import oracle
from tests.families import model_of, readout
from tests.oracle import relative
from tests.tiny_models import FAMILIES, tiny_tokenizer

VOCABULARY = 131_072
_TOWNS = ("Arles", "Bergen", "Cuzco", "Delft", "Essen")
_WARES = ("wool", "salt fish", "copper pots", "candles", "blue glass", "barley", "old books")


def large_vocabulary(family: str) -> LanguageModel:
    """A tiny model with as many tokens as large ones have; as in trained ones, their vectors have a part in common."""
    torch.manual_seed(0)
    config = FAMILIES[family].config()
    config.vocab_size = VOCABULARY
    build = hf.AutoModelForMaskedLM if FAMILIES[family].is_masked else hf.AutoModelForCausalLM
    model = build.from_config(config, attn_implementation=FAMILIES[family].attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
        weight = model.get_output_embeddings().weight
        weight += torch.randn(weight.shape[1])
    return LanguageModel(model, tiny_tokenizer(), name=family)


def encoded(ids: tuple[int, ...], targets: tuple[int, ...]) -> EncodedPrompt:
    return EncodedPrompt(Prompt("p", "-", tuple(map(str, targets))), ids, targets)


@pytest.mark.parametrize("n_rows", [1, 2, 5, 9])
@pytest.mark.parametrize("n_tokens", [1, 511, 512, 513, 262_144])
def test_a_product_in_parts_has_float32s_digits_for_any_vocabulary(n_rows: int, n_tokens: int) -> None:
    torch.manual_seed(0)
    weight_vf = 0.04 * torch.randn(n_tokens, 24) + 0.02 * torch.randn(24)
    slope_rv = torch.randn(n_rows, n_tokens).mul(3).softmax(-1)
    exact = (slope_rv.double() @ weight_vf.double()).numpy()
    found = product_in_parts(slope_rv, weight_vf)
    assert found.dtype == torch.float32
    assert relative(found.numpy(), exact) < 3e-6


# Each engine; a factor after the head, a head with a bias.
@pytest.mark.parametrize("family", ["Llama 2", "Granite", "Phi", "GPT-J", "BERT"])
def test_a_large_vocabulary_costs_gradients_no_digits(family: str) -> None:
    model = large_vocabulary(family)
    model.adopt(model_of(family).ensure_checked())
    ids = (3, 14, 15, 92, 65, 35, 89)
    if model.mask_token is not None:
        ids = (*ids, model.mask_token, 7)
    targets, layers = (5, 70_000), [0, 1, 2]
    ((_, found),) = gradients(model, [encoded(ids, targets)], [(0, 1)], "paper", layers, Budget(2**28))
    reference = copy.deepcopy(model.model).double()
    position = readout(ids, model.is_masked)
    _, expected, _ = oracle.gradients(reference, ids, targets, "paper", position)
    assert relative(found.gradient_kln, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_heads_output_stays_bit_for_bit_and_its_hooks_are_undone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = FAMILIES["Llama 2"].config()
    model = hf.AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False)
    head = model.get_output_embeddings()
    hidden = torch.randn(2, config.hidden_size, dtype=dtype, requires_grad=True)
    plain = head(hidden)

    def fail() -> Tensor:
        with exact_head_gradient(model):
            raise RuntimeError("in the pass")

    with exact_head_gradient(model):
        ours = head(hidden)
    with pytest.raises(RuntimeError, match="in the pass"):
        fail()
    assert torch.equal(ours, plain)
    assert not head._forward_hooks
    assert not head._forward_pre_hooks
    slope = torch.randn_like(plain)
    (one,), (other,) = (torch.autograd.grad(output, hidden, slope) for output in (ours, plain))
    assert one.dtype == dtype
    torch.testing.assert_close(one, other)
    with torch.no_grad(), exact_head_gradient(model):
        assert not head._forward_hooks


@pytest.mark.model
def test_float32_keeps_its_digits_on_a_long_prompt(smollm2: LanguageModel, smollm2_float64: nn.Module) -> None:
    text = " ".join(
        f"In the year {1000 + 7 * i} the town of {_TOWNS[i % 5]} had {3 * i + 2} mills, and its people sold "
        f"{_WARES[i % 7]} by the river."
        for i in range(60)
    )
    ids, targets = tuple(smollm2.tokenizer(text)["input_ids"][:1000]), (260, 4200)
    assert len(ids) == 1000
    expected = oracle.gradients_over_cache(smollm2_float64, ids, targets, "paper")
    layers = list(range(smollm2.feed_forward.n_layers))
    ((_, found),) = gradients(smollm2, [encoded(ids, targets)], [(0, 1)], "paper", layers, Budget(2**28))
    # 4e-5 for both; with the vocabulary summed one token after the other 0.8e-4 and 1.3e-4.
    for k in range(len(targets)):
        assert relative(found.gradient_kln[k], expected[k]) < 6e-5

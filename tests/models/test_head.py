"""Digits of gradients where the vocabulary is large and rows are few: a sum over all tokens has to be had in parts."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from neg_service import LanguageModel
from neg_service.measures.gradients import gradients
from neg_service.measures.readout import Readout
from neg_service.models.batches import Budget
from neg_service.models.head import exact_head_gradient, log_softmax, product_in_parts
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


@pytest.mark.parametrize("spread", [2.5, 3.5])
def test_the_softmax_over_a_large_vocabulary_loses_no_small_terms(spread: float) -> None:
    torch.manual_seed(0)
    logits = spread * torch.randn(3, 262_144)
    # One sure token beside very many unlikely ones, which together still count.
    logits[:, 5] = logits.amax(-1) + 3
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    ours, expected = log_softmax(logits), exact.log_softmax(-1)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=2e-6)
    assert (ours.detach().double().exp().sum(-1) - 1).abs().max() < 1e-6
    # torch's own is off by 1e-5 to 1e-4 here.
    slope = torch.zeros(2, *logits.shape)
    slope[0, :, 5], slope[1, 1, 7], slope[1, 2, 9] = 1, -2, 1
    for own in slope:
        (found,) = torch.autograd.grad(ours, logits, own, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, exact, own.double(), retain_graph=True)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)
    (batched,) = torch.autograd.grad(ours, logits, slope, is_grads_batched=True)
    assert torch.equal(batched[1], found)


def test_the_probabilities_that_differences_refer_to_sum_up_to_one() -> None:
    torch.manual_seed(0)
    logits = 3.5 * torch.randn(VOCABULARY)
    logits[5] = logits.max() + 3
    p_v = Readout(large_vocabulary("Llama 2")).baseline(logits, logits, "a prompt").p_v
    assert p_v.dtype == torch.float32
    assert float(p_v.double().sum()) == pytest.approx(1, abs=1e-6)


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


_PROSE = " ".join(
    f"In the year {1000 + 7 * i} the town of {_TOWNS[i % 5]} had {3 * i + 2} mills, and its people sold "
    f"{_WARES[i % 7]} by the river."
    for i in range(60)
)


@pytest.mark.faults
@pytest.mark.model
@pytest.mark.parametrize(
    ("text", "n_tokens", "tolerance"),
    [
        # 5e-6 and 9e-6; with the vocabulary summed one token after the other 0.9e-4 and 1.3e-4.
        (_PROSE, 500, 6e-5),
        # 1.7e-5 and 0.3e-5; with the last token in fewer rows than four 1.8e-4 and 0.4e-4.
        ("a " * 1300, 1201, 1e-4),
    ],
    ids=["prose", "one word"],
)
def test_float32_keeps_its_digits_on_a_long_prompt(
    text: str, n_tokens: int, tolerance: float, smollm2: LanguageModel, smollm2_float64: nn.Module
) -> None:
    ids, targets = tuple(smollm2.tokenizer(text)["input_ids"][:n_tokens]), (260, 4200)
    assert len(ids) == n_tokens
    expected = oracle.gradients_over_cache(smollm2_float64, ids, targets, "paper")
    layers = list(range(smollm2.feed_forward.n_layers))
    ((_, found),) = gradients(smollm2, [encoded(ids, targets)], [(0, 1)], "paper", layers, Budget(2**28))
    for k in range(len(targets)):
        assert relative(found.gradient_kln[k], expected[k]) < tolerance

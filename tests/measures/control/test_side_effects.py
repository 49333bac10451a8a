"""What shifts do to other prompts, against plain hooked passes in float64, with divergences and constants by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import neg_service
from neg_service import ControlResult, LanguageModel, SideEffects
from neg_service.errors import ConfigurationError, PromptError
from neg_service.measures.control.other_prompts import METHODS, Laid, Read
from tests import mixtures_oracle
from tests.measures.control.by_hand import ids_of, logits_with_shifts
from tests.mixtures import MIXTURES, tiny_mixture
from tests.refusals import refused
from tests.side_effects_table import Split, divergences
from tests.tiny_models import tiny_model

TEXTS, TARGETS = ["w3 w14 w15 w9 w26 w5", "w3 w14 w2"], [" w7", " w8"]
REFERENCES = [("w50 w51 w52 w53 w54", " w1"), ("w3 w20 w21 w22", " w7"), ("w60 w61", " w9"), ("w3 w14 w40", " w12")]
WORDINGS = [["w3 w14 w15 w9"], ["w41 w42", "w3 w2"]]
SHIFT, CONSTANT, RANDOM = METHODS


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return tiny_model("Llama 2", torch.float64)


@pytest.fixture(scope="module")
def result(llama: LanguageModel) -> ControlResult:
    return neg_service.control(llama, TEXTS, TARGETS, probability=0.05)


@pytest.fixture(scope="module")
def effects(llama: LanguageModel, result: ControlResult) -> SideEffects:
    return neg_service.side_effects(llama, result, TEXTS, TARGETS, REFERENCES, wordings=WORDINGS, seed=3)


def _divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    p, q = before.softmax(-1).numpy(), after.softmax(-1).numpy()
    return float(sum(own * math.log(own / other) for own, other in zip(p, q, strict=True)))


def test_shifts_at_references_are_as_plain_hooked_passes_have_them(
    llama: LanguageModel, result: ControlResult, effects: SideEffects
) -> None:
    assert result.reached.all()
    for p, own in enumerate(effects.references):
        target = int(TARGETS[p].strip()[1:])
        laid = Laid.of(llama, result, p, target, seed=3)
        random_ln = laid.random.shift_m.reshape(3, 40)
        for method, shift_ln in ((0, result.shift[p]), (2, random_ln)):
            for r, (text, answer) in enumerate(REFERENCES):
                before, after = (logits_with_shifts(llama, text, one) for one in (None, shift_ln))
                token = int(answer.strip()[1:])
                found = (own.answer_before[r], own.answer[method, r], own.target_before[r], own.target[method, r])
                p_v, q_v = before.softmax(-1), after.softmax(-1)
                np.testing.assert_allclose(found, [p_v[token], q_v[token], p_v[target], q_v[target]], rtol=1e-5)
                assert own.kl[method, r] == pytest.approx(_divergence(before, after), rel=1e-4, abs=1e-9)
                assert own.is_same_top[method, r] == (int(before.argmax()) == int(after.argmax()))
            after = logits_with_shifts(llama, TEXTS[p], shift_ln)
            assert effects.probability[p, method] == pytest.approx(float(after.softmax(-1)[target]), rel=1e-5)
            assert effects.size[p, method] == pytest.approx(np.linalg.norm(shift_ln))
        assert effects.probability_before[p] == pytest.approx(result.probability_before[p], rel=1e-6)
    # Otherwise most of this would hold of anything.
    assert effects.references[0].kl[0].min() > 1e-4
    assert not effects.references[0].is_same_top[0].all()


def test_random_neurons_have_the_values_of_the_shift_elsewhere(llama: LanguageModel) -> None:
    found = neg_service.control(llama, TEXTS, TARGETS, probability=0.05, neurons=12)
    laid = [Laid.of(llama, found, p, 7, seed) for seed in (0, 1) for p in (0, 1)]
    for own in laid:
        np.testing.assert_array_equal(np.sort(own.random.shift_m), np.sort(own.shift.shift_m))
        assert (own.random.shift_m != own.shift.shift_m).sum() > 12
    assert len({tuple(own.random.shift_m.nonzero()[0]) for own in laid}) == len(laid)


def test_the_logit_constant_is_arithmetic_by_hand(result: ControlResult, effects: SideEffects, llama: Any) -> None:
    for p, own in enumerate(effects.references):
        target = int(TARGETS[p].strip()[1:])
        before_p, after_p = effects.probability_before[p], result.probability[p]
        constant = math.log(after_p / (1 - after_p)) - math.log(before_p / (1 - before_p))
        assert effects.size[p, 1] == pytest.approx(constant, rel=1e-6)
        assert effects.probability[p, 1] == pytest.approx(after_p, rel=1e-6)
        for r, (text, answer) in enumerate(REFERENCES):
            p_v = logits_with_shifts(llama, text, None).softmax(-1)
            own_p, token = float(p_v[target]), int(answer.strip()[1:])
            # All weights add up to 1 + p·(e^b - 1): KL = log of that less p·b.
            total = 1 + own_p * math.expm1(constant)
            assert own.target[1, r] == pytest.approx(own_p * math.exp(constant) / total, rel=1e-5)
            assert own.kl[1, r] == pytest.approx(math.log(total) - own_p * constant, rel=1e-4, abs=1e-10)
            if token != target:
                assert own.answer[1, r] == pytest.approx(float(p_v[token]) / total, rel=1e-5)
            top = int(p_v.argmax())
            stays = top == target or float(p_v[top]) > own_p * math.exp(constant)
            assert own.is_same_top[1, r] == stays


def test_a_constant_and_a_divergence_of_three_tokens() -> None:
    before = Read(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log())
    # Twice the weight of the last: 2/5, 1/5, 2/5.
    after = before.with_constant(2, math.log(2))
    assert [after.probability(token) for token in range(3)] == pytest.approx([0.4, 0.2, 0.4])
    expected = 0.5 * math.log(0.5 / 0.4) + 0.25 * math.log(0.25 / 0.2) + 0.25 * math.log(0.25 / 0.4)
    assert before.divergence(after) == pytest.approx(expected)
    assert after.log_odds(2) - before.log_odds(2) == pytest.approx(math.log(2))
    # A token that was impossible counts for nothing.
    impossible = Read(torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64))
    assert impossible.divergence(Read(torch.zeros(3, dtype=torch.float64))) == pytest.approx(math.log(3 / 2))


def test_wordings_meet_their_own_shift_alone(llama: LanguageModel, result: ControlResult, effects: SideEffects) -> None:
    for p, own in enumerate(effects.wordings):
        target = int(TARGETS[p].strip()[1:])
        expected = [[float(logits_with_shifts(llama, text, one).softmax(-1)[target]) for text in WORDINGS[p]]
                    for one in (None, result.shift[p])]  # fmt: skip
        np.testing.assert_allclose(own.target_before, expected[0], rtol=1e-5)
        np.testing.assert_allclose(own.target[0], expected[1], rtol=1e-5)
        assert np.isnan(own.answer).all()


def test_the_table_has_means_and_intervals(effects: SideEffects) -> None:
    table = effects.table()
    rows = table.to_pylist()
    assert [(row["prompt_id"], row["kind"], row["method"], row["n"]) for row in rows] == [
        (str(p), kind, method, n)
        for p in (0, 1)
        for kind, n in (("references", 4), ("wordings", len(WORDINGS[p])))
        for method in METHODS
    ]
    for row in rows:
        p, m = int(row["prompt_id"]), METHODS.index(row["method"])
        assert (row["prompt"], row["target"]) == (TEXTS[p], TARGETS[p])
        assert row["steered_probability"] == effects.probability[p, m]
        own = (effects.references if row["kind"] == "references" else effects.wordings)[p]
        assert row["target_probability"] == pytest.approx(own.target[m].mean())
        assert row["target_probability_before"] == pytest.approx(own.target_before.mean())
        if row["n"] == 1:
            assert row["target_probability_low"] is None
        else:
            assert own.target[m].min() <= row["target_probability_low"] < row["target_probability"]
            assert row["target_probability"] < row["target_probability_high"] <= own.target[m].max()
        if row["kind"] == "wordings":
            assert row["kl"] is row["same_top"] is row["answer_probability"] is None
        else:
            assert row["kl"] == pytest.approx(own.kl[m].mean())
            assert row["same_top"] == own.is_same_top[m].mean()
            assert row["answer_probability"] == pytest.approx(own.answer[m].mean())
            assert effects.means(p, row["method"])["kl"] == (row["kl"], row["kl_low"], row["kl_high"])


def test_intervals_hold_the_mean_of_a_known_spread_and_are_seeded(effects: SideEffects) -> None:
    # The standard error of the mean of 0, 0, ..., 1, 1 of 400 is 0.5 / 20; 95 % is 1.96 of them to each side.
    own = effects.references[0]
    many = replace(
        own, answer_before=np.tile([0.0, 1.0], 200), answer=np.zeros((3, 400)), target_before=np.zeros(400),
        target=np.zeros((3, 400)), is_same_top=np.zeros((3, 400), bool), kl=np.zeros((3, 400)),
    )  # fmt: skip
    found = replace(effects, references=(many,)).means(0, SHIFT)["answer_probability_before"]
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx((0.5 - 0.049, 0.5 + 0.049), abs=0.006)
    again, other = (replace(effects, references=(many,), seed=seed).means(0, SHIFT) for seed in (3, 4))
    assert again["answer_probability_before"] == found
    assert other["answer_probability_before"] != found


def test_batches_do_not_change_results(llama: LanguageModel, result: ControlResult, effects: SideEffects) -> None:
    alone = neg_service.side_effects(
        llama, result, TEXTS, TARGETS, REFERENCES, wordings=WORDINGS, seed=3, batch_bytes=1
    )
    for own, whole in zip(alone.references, effects.references, strict=True):
        np.testing.assert_allclose(own.kl, whole.kl, rtol=1e-4)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen 2 MoE", "LongCat Flash", "Inkling"])
def test_a_mixture_has_shifts_where_a_reference_uses_the_same_experts(family: str) -> None:
    model = tiny_mixture(family, torch.float64)
    result = neg_service.control(model, TEXTS[:1], TARGETS[0], probability=0.02, holding=REFERENCES[3:])
    assert result.expert is not None
    assert result.neuron is not None
    found = neg_service.side_effects(model, result, TEXTS[:1], TARGETS[0], REFERENCES[:3])
    added = {
        (layer, expert, neuron): value
        for place, layer in enumerate(result.layers)
        for expert, neuron, value in zip(
            result.expert[0, place].tolist(), result.neuron[0, place].tolist(), result.shift[0, place], strict=True
        )
    }

    def touch(key: tuple[int, int], x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor([added.get((*key, neuron), 0.0) for neuron in range(len(x))], dtype=x.dtype)

    for r, (text, _) in enumerate(REFERENCES[:3]):
        with torch.no_grad():
            before = mixtures_oracle.probabilities(model.model, MIXTURES[family], ids_of(text), "paper")
            after = mixtures_oracle.probabilities(model.model, MIXTURES[family], ids_of(text), "paper", touch)
        own = found.references[0]
        assert own.target_before[r] == pytest.approx(float(before[7]), rel=1e-5)
        assert own.target[0, r] == pytest.approx(float(after[7]), rel=1e-5)
        assert own.kl[0, r] == pytest.approx(_divergence(before.log(), after.log()), rel=1e-4, abs=1e-9)
    assert found.references[0].kl[0].max() > 1e-5


def test_half_precision_is_measured_by_differences() -> None:
    model = tiny_model("Llama 2", torch.bfloat16)
    result = neg_service.control(model, TEXTS, TARGETS, probability=0.05, holding=REFERENCES[3:])
    assert model.engine.name == "differences"
    found = neg_service.side_effects(model, result, TEXTS, TARGETS, REFERENCES[:3])
    exact = LanguageModel(tiny_model("Llama 2", torch.bfloat16).model.double(), model.tokenizer)
    expected = neg_service.side_effects(exact, result, TEXTS, TARGETS, REFERENCES[:3])
    for own, other in zip(found.references, expected.references, strict=True):
        np.testing.assert_allclose(own.kl, other.kl, rtol=1e-3)
        np.testing.assert_allclose(own.target, other.target, rtol=1e-4)


def test_conversations_may_be_steered_held_and_measured() -> None:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    model = tiny_model("Llama 2", torch.float64)
    model.tokenizer.chat_template = "{% for one in messages %}{{ one['content'] }} {% endfor %}w90"
    asked, target = said("w3 w14 w15"), TARGETS[0]
    result = neg_service.control(model, [asked], target, probability=0.05, holding=[(said("w3 w4"), " w8")])
    assert result.held == ("w3 w4 w90",)
    found = neg_service.side_effects(model, result, [asked], target, [(said("w5 w6"), " w8"), REFERENCES[0]])
    for r, text in enumerate(("w5 w6 w90", REFERENCES[0][0])):
        after = logits_with_shifts(model, text, result.shift[0]).softmax(-1)
        assert found.references[0].target[0, r] == pytest.approx(float(after[7]), rel=1e-5)
    # The same text of other messages, and of none.
    for reference in (said("w3 w4"), "w3 w4 w90"):
        with refused(PromptError, "references", says="reference 1 .* were held"):
            neg_service.side_effects(model, result, [asked], target, [REFERENCES[0], (reference, " w8")])


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"references": []}, "references", "at least 2"),
    ({"references": REFERENCES[:1]}, "references", "1 references"),
    ({"references": [*REFERENCES, REFERENCES[1]]}, "references", "reference 4 .* is also reference 1"),
    ({"references": [*REFERENCES, (TEXTS[1], " w9")]}, "references", "reference 4 .* is also prompt 1"),
    ({"references": [*REFERENCES, ("w70", " w9")]}, "references", "reference 4 .* were held"),
    ({"references": [*REFERENCES, ("w71", " w9 w9")]}, "references", "reference 4.* 2 tokens"),
    ({"wordings": [["w70"], []]}, "wordings", "wording 0 .* were held"),
    ({"wordings": [[], [REFERENCES[0][0]]]}, "wordings", "wording 0 .* is also reference 0"),
    ({"wordings": [[], [TEXTS[1]]]}, "wordings", "wording 0 .* is also the text that is steered"),
    ({"wordings": [["w71"]]}, "wordings", "lists for 1 prompts"),
    ({"wordings": ["w71", "w72"]}, "wordings", "a list of texts for each"),
    ({"wordings": [[], []]}, "wordings", "no text"),
    ({"wordings": [[], [""]]}, "wordings", "'wording 0' is empty"),
]


@pytest.mark.parametrize(("given", "setting", "says"), BAD)
def test_bad_prompts_are_refused(
    llama: LanguageModel, result: ControlResult, given: dict[str, Any], setting: str, says: str
) -> None:
    held = replace(result, held=("w70",))
    with refused(PromptError, setting, says=says):
        neg_service.side_effects(llama, held, TEXTS, TARGETS, **{"references": REFERENCES, **given})


def test_results_of_something_else_and_bad_seeds_are_refused(llama: LanguageModel, result: ControlResult) -> None:
    ask = neg_service.side_effects
    with refused(ConfigurationError, "result", says="2 prompts"):
        ask(llama, result, TEXTS[:1], TARGETS[:1], REFERENCES)
    with refused(ConfigurationError, "result", "shifts of 3 layers of 39 neurons"):
        ask(llama, replace(result, shift=result.shift[..., 1:]), TEXTS, TARGETS, REFERENCES)
    with refused(ConfigurationError, "result", says="prompt 1 gives its target a probability of 0.9"):
        other = result.probability_before * [1, 0] + [0, 0.9]
        ask(llama, replace(result, probability_before=other), TEXTS, TARGETS, REFERENCES)
    for seed in (-1, 0.5, True):
        with refused(ConfigurationError, "seed", seed):
            ask(llama, result, TEXTS, TARGETS, REFERENCES, seed=seed)  # type: ignore[arg-type]


def test_a_mean_of_an_unknown_method_is_refused(effects: SideEffects) -> None:
    with refused(ConfigurationError, "method", "constant"):
        effects.means(0, "constant")


@pytest.mark.faults
@pytest.mark.model
def test_on_the_default_model_holding_others_lowers_the_divergence_at_equal_effect(smollm2: LanguageModel) -> None:
    split = Split.of(n_steered=2, n_held=40, n_measured=6)
    plain, held = (split.effects(smollm2, n_held) for n_held in (0, 40))
    for effects in (plain, held):
        np.testing.assert_allclose(effects.probability[:, 0], 0.5, atol=0.011)
    before, after = (divergences(effects, SHIFT, split.is_near)[1] for effects in (plain, held))
    # Of other relations than the steered ones: to a third with 20 held, to a tenth with 100.
    assert after.mean() < before.mean() / 3
    assert (after < before).all()
    # Of equal size, on neurons drawn at random, it does next to nothing, neither here nor there.
    assert np.median(divergences(plain, RANDOM, split.is_near)[1]) < np.median(before) / 10
    assert (plain.probability[:, 2] < 0.1).all()

"""Prompts and their tokens: what is accepted, what is left out, and that every refusal names its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from neg_service.errors import PromptError
from neg_service.prompts import facts
from neg_service.prompts.prompt import Prompt, check_prompts, digest
from neg_service.prompts.tokens import encode
from tests.encodings import one_token_targets, within_context
from tests.refusals import ANY, refused
from tests.tiny_models import MASK, tiny_tokenizer


def test_targets_of_several_tokens_can_be_left_out_with_prompts_whose_answers_they_are() -> None:
    class Words:
        """A token a word, and a mark is one of its own; two spellings share one."""

        def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
            words = [text.lower().replace("-", " - ").split() for text in texts]
            return {"input_ids": [[int.from_bytes(word.encode(), "big") for word in own] for own in words]}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [str(number) for number in ids]

    prompts = [
        Prompt("all", "a b", (" c", " d", " e"), 1),
        Prompt("some", "a b", (" x-y", " d", " e"), 2),
        Prompt("answer", "a b", (" c", " x-y", " e"), 1),
        Prompt("same", "a b", (" C", " c", " e"), 1),
        Prompt("few", "a b", (" x-y", " x-z", " e"), 2),
        Prompt("open", "a b", (" c",), None),
    ]
    found = list(one_token_targets(Words(), prompts))
    assert [(own.id, own.targets, own.answer, gone) for own, gone in found] == [
        ("all", (" c", " d", " e"), 1, 0),
        ("some", (" d", " e"), 1, 1),
        ("answer", (), None, 3),
        ("same", (" c", " e"), 0, 1),
        ("few", (), None, 3),
        ("open", (" c",), None, 0),
    ]
    assert list(encode(Words(), [own for own, _ in found if own.targets], None))


@pytest.mark.parametrize(
    ("prompts", "refusal"),
    [
        ([], ("dataset.source", ANY, "there are 0 prompts")),
        ([Prompt("x", "a", ("b",)), Prompt("x", "c", ("d",))], ("dataset.source", ANY, "prompt id 'x' appears twice")),
        ([Prompt("x", "", ("b",))], ("dataset.source", ANY, "prompt 'x' is empty")),
        ([Prompt("x", "a", ())], ("dataset.source", ANY, "prompt 'x' has no targets")),
        ([Prompt("x", "a\ud800", ("b",))], ("dataset.source", ANY, "prompt 'x' holds a lone surrogate")),
        ([Prompt("x", "a", ("b",), at="\ud800")], ("dataset.source", ANY, "prompt 'x' holds a lone surrogate")),
        (
            [Prompt("x", "a", ("b",), wanted=("margin", 1.0, "\udfff"))],
            ("dataset.source", ANY, "prompt 'x' holds a lone surrogate"),
        ),
        (
            [Prompt("x", "a", ("b",), messages=(("system", "\ud800"), ("user", "a")))],
            ("dataset.source", ANY, "prompt 'x' holds a lone surrogate"),
        ),
        ([Prompt("x", "a", ("b",), 1)], ("dataset.source", ANY, "prompt 'x' has answer 1, but its 1 targets")),
    ],
)
def test_prompts_that_are_wrong_without_a_tokenizer(prompts: list[Prompt], refusal: tuple[Any, ...]) -> None:
    with refused(PromptError, *refusal):
        check_prompts(prompts)


@pytest.mark.parametrize(
    ("prompt", "refusal"),
    [
        (
            Prompt("x", "w1", (" w2 w3",)),
            ("dataset.source", ANY, r"target ' w2 w3' is 2 tokens \['w2', 'w3'\], it must be exactly 1"),
        ),
        (Prompt("x", "w1", ("",)), ("dataset.source", ANY, "target '' is 0 tokens")),
        (
            Prompt("x", "w1", (" w2", "  w2")),
            ("dataset.source", ANY, r"targets ' w2' and '  w2' are the same token \['w2'\]"),
        ),
        (
            Prompt("x", "w1", ("2",)),
            ("dataset.source", ANY, r"target '2' merges with the text beside it \['w1'\] into \['w12'\]"),
        ),
        (Prompt("x", "w1 " * 9, ("w2",)), ("model.source", ANY, "has 9 tokens, the model's context holds 8")),
        (Prompt("x", " ", ("w2",)), ("dataset.source", ANY, "has no tokens")),
    ],
)
def test_prompts_that_the_tokenizer_shows_to_be_wrong(prompt: Prompt, refusal: tuple[Any, ...]) -> None:
    with refused(PromptError, *refusal) as caught:
        list(encode(tiny_tokenizer(), [Prompt("good", "w1", (" w2",)), prompt], context_length=8))
    assert "prompt 'x'" in str(caught.value)


def test_encoding_is_lazy_ordered_and_does_not_depend_on_the_batch() -> None:
    prompts = [Prompt(str(i), f"w{i} w1", (f" w{i + 1}", " w0")) for i in range(1, 20)]
    whole = list(encode(tiny_tokenizer(), prompts, None))
    assert whole == list(encode(tiny_tokenizer(), iter(prompts), None, batch=3))
    assert whole[4].ids == (5, 1)
    assert whole[4].target_ids == (6, 0)


def test_the_digest_is_of_the_content() -> None:
    prompts = facts.load()
    assert digest(prompts) == digest(facts.load())
    assert digest(prompts) != digest(prompts[:-1])
    changed = Prompt(prompts[0].id, prompts[0].text + " ", prompts[0].targets, prompts[0].answer)
    assert digest(prompts) != digest([changed, *prompts[1:]])


def test_a_target_that_the_model_has_no_token_for_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = "w0"
    with refused(
        PromptError, "dataset.source", says=r"'p': the model has no token for target ' nothing', only \['w0'\]"
    ):
        list(encode(tokenizer, [Prompt("p", "w5", (" w7", " nothing"))], None))


@dataclass(frozen=True)
class Ids:
    """How many ids a model has."""

    n_input_ids: int | None
    n_output_ids: int | None
    name: str = "small"


@pytest.mark.parametrize(
    ("text", "target", "model", "message"),
    [
        ("w1 w50 w2", " w3", Ids(50, 97), "its token 'w50' has the id 50, but small embeds only the ids below 50"),
        ("w1 w2", " w60", Ids(97, 60), "target ' w60' is the token 'w60' with the id 60, but small predicts only the"),
        # The first of several, and of a prompt that is all in the dark.
        ("w91 w92", " w93", Ids(7, 7), "its token 'w91' has the id 91, but small embeds only the ids below 7"),
    ],
)
def test_ids_of_another_models_tokenizer_are_refused_by_all_who_encode(
    text: str, target: str, model: Ids, message: str
) -> None:
    prompts = [Prompt("good", "w1 w2", (" w3",)), Prompt("x", text, (" w4", target))]
    for refusal in (
        lambda: list(encode(tiny_tokenizer(), prompts, None, model=model)),
        lambda: list(one_token_targets(tiny_tokenizer(), prompts, model=model)),
    ):
        with refused(PromptError, "model.source", says=f"^prompt 'x': {message}"):
            refusal()
    # A masked model predicts what stands in the place of the mask, and need not read it.
    with_mask = [Prompt("x", "w1 w96", ("w60",))]
    with refused(PromptError, "model.source", says="prompt 'x': target 'w60' is the token 'w60' with the id 60"):
        list(encode(tiny_tokenizer(), with_mask, None, MASK, model=Ids(97, 60)))
    assert list(encode(tiny_tokenizer(), with_mask, None, MASK, model=Ids(97, 61)))


def test_ids_up_to_the_last_of_a_model_are_encoded() -> None:
    prompts = [Prompt("x", "w1 w49", (" w59",))]
    for model in (Ids(50, 60), Ids(None, None), Ids(128, 128)):
        (found,) = encode(tiny_tokenizer(), prompts, None, model=model)
        assert (found.ids, found.target_ids) == ((1, 49), (59,))
    # Too long is too long, whatever is in it; what is left in must be known.
    with refused(PromptError, "model.source", says="its token 'w49' has the id 49"):
        within_context(tiny_tokenizer(), prompts, 8, model=Ids(49, 60))

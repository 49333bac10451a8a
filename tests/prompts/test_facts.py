"""The built-in facts: as many as promised, one right target each, single tokens for the default model."""

from __future__ import annotations

from collections import Counter

import pytest

from neg_service import LanguageModel
from neg_service.prompts import facts
from neg_service.prompts.prompt import check_prompts
from neg_service.prompts.tokens import encode


def test_the_facts_are_as_many_and_as_varied_as_promised() -> None:
    prompts = facts.load()
    check_prompts(prompts)
    relations = Counter(prompt.id.split("/")[0] for prompt in prompts)
    assert len(prompts) >= 240
    assert len(relations) >= 8
    for relation in facts.RELATIONS:
        assert len(set(relation.templates)) == 2
    for prompt in prompts:
        assert len(set(prompt.targets)) == 4
        assert prompt.answer is not None
    # The right one's place says nothing.
    places = Counter(prompt.answer for prompt in prompts)
    assert min(places.values()) > 0.8 * max(places.values())


def test_a_wrong_target_is_never_also_right() -> None:
    answers = {
        (r.name.replace(" ", "-"), s.replace(" ", "-")): a for r in facts.RELATIONS for s, a in r.answers.items()
    }
    for prompt in facts.load():
        relation, _, subject = prompt.id.split("/")
        assert prompt.answer is not None
        assert prompt.targets[prompt.answer] == f" {answers[relation, subject]}"
        assert prompt.targets.count(prompt.targets[prompt.answer]) == 1


@pytest.mark.model
def test_all_facts_are_single_tokens_for_the_default_model(smollm2: LanguageModel) -> None:
    encoded = list(encode(smollm2.tokenizer, facts.load(), smollm2.context_length))
    assert len(encoded) == len(facts.load())
    for prompt in encoded[::17]:
        assert [smollm2.tokenizer.decode(i) for i in prompt.target_ids] == list(prompt.prompt.targets)

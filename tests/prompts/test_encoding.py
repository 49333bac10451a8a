"""Each prompt of a run is encoded once, and its ids are those of `encode`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from neg_service.errors import PromptError, TargetError
from neg_service.prompts.encoding import Encoding, Ids
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.prompts.tokens import Skips, encode
from tests.refusals import refused
from tests.tiny_models import tiny_tokenizer

PROMPTS = [Prompt(str(i), " ".join(f"w{j}" for j in range(i + 1)), (f" w{i + 1}", " w9"), 0) for i in range(5)]


class Counting:
    """Encodes, and counts what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._tokenizer = tiny_tokenizer()

    def __call__(self, prompts: Iterable[Prompt]) -> Iterator[EncodedPrompt]:
        asked = list(prompts)
        self.asked += [prompt.id for prompt in asked]
        return encode(self._tokenizer, asked, None)


@pytest.fixture
def expected() -> list[EncodedPrompt]:
    return list(encode(tiny_tokenizer(), PROMPTS, None))


def test_all_are_encoded_once_and_given_as_often_as_asked_for(expected: list[EncodedPrompt]) -> None:
    counting = Counting()
    encoding = Encoding(PROMPTS, counting)
    encoding.encode_all()
    encoding.encode_all()
    assert list(encoding) == expected
    assert encoding[1:4] == expected[1:4]
    assert encoding[-1] == expected[-1]
    assert encoding[::2] == expected[::2]
    assert counting.asked == ["0", "1", "2", "3", "4"]


def test_what_is_asked_for_alone_is_encoded_alone_and_together(expected: list[EncodedPrompt]) -> None:
    counting = Counting()
    encoding = Encoding(PROMPTS, counting)
    assert encoding[3:5] == expected[3:5]
    assert encoding[0] == expected[0]
    assert counting.asked == ["3", "4", "0"]
    assert len(encoding) == 5


def test_ids_that_are_known_are_not_asked_for_again(expected: list[EncodedPrompt]) -> None:
    ids = Ids()
    for one in expected[:3]:
        ids.append(one.ids, one.target_ids)
    counting = Counting()
    encoding = Encoding(PROMPTS, counting, ids)
    assert encoding[:3] == expected[:3]
    encoding.encode_all()
    assert list(encoding) == expected
    assert counting.asked == ["3", "4"]


def test_what_is_left_out_is_counted_in_one_pass() -> None:
    tokenizer = tiny_tokenizer()
    prompts = [
        Prompt("kept", "w1 w2", (" w3", " w4"), 1),
        # Of the same token the right answer stays: the other one is left out with what is two tokens.
        Prompt("fewer", "w1", (" w3", " w5 w6", " w3", " w4"), 2),
        Prompt("no answer", "w1", (" w3 w4", " w5"), 0),
        Prompt("one of two", "w1", (" w3 w4", " w5")),
        Prompt("long", "w1 w2 w3 w4", (" w3", " w4 w4", " w5")),
    ]
    context_length = len(tokenizer(["w1 w2"])["input_ids"][0])
    skips = Skips(not_one_token=True, too_long=True)
    found = list(encode(tokenizer, prompts, context_length, skips=skips))
    assert [(one.prompt.id, one.prompt.targets, one.prompt.answer) for one in found] == [
        ("kept", (" w3", " w4"), 1),
        ("fewer", (" w3", " w4"), 0),
    ]
    # Two targets of `fewer`, one of `long`.
    assert (skips.n_not_one_token, skips.n_targets, skips.n_too_long, skips.first_too_long) == (2, 3, 1, "long")
    for one in found:
        assert one == next(encode(tokenizer, [one.prompt], context_length))
    with refused(TargetError, "dataset.source", says="prompt 'fewer': target ' w5 w6' is 2 tokens"):
        list(encode(tokenizer, prompts, context_length))
    with refused(PromptError, "model.source", says="prompt 'long' has 4 tokens"):
        list(encode(tokenizer, prompts, context_length, skips=Skips(not_one_token=True)))

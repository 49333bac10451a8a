"""What tokenizers add to every text: once, also where a prompt spells it, and never behind a causal prompt."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import transformers as hf
from tokenizers.processors import TemplateProcessing

import neg_service
from neg_service import LanguageModel
from neg_service.errors import PromptError, TargetError
from neg_service.models.loading import load_tokenizer
from neg_service.models.source import LocalModel
from neg_service.prompts import added
from neg_service.prompts.added import added_by
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tokens import encode
from tests import families, oracle
from tests.encodings import one_token_targets, within_context
from tests.refusals import refused
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import (
    END,
    IS,
    Made,
    byte_level,
    ids_of,
    llama,
    metaspace,
    roberta,
    without_unknown,
    word_piece,
    words_of_tiny_models,
)

pytestmark = pytest.mark.usefixtures("nothing_told")

GLM = ("[gMASK]", "<sop>")
# What they put in front of a text, and how they are made.
IN_FRONT: dict[str, tuple[str, Made]] = {
    "byte level": ("<s>", lambda: byte_level("<s> $A")),
    "byte level, a space first": ("<s>", lambda: byte_level("<s> $A", add_prefix_space=True)),
    "byte level, both": ("<s>", lambda: byte_level("<s> $A </s>")),
    "special tokens are read as text": ("<s>", lambda: byte_level("<s> $A", split_special_tokens=True)),
    "two tokens": ("[gMASK]<sop>", lambda: byte_level("[gMASK] <sop> $A", GLM)),
    "one token twice": ("<s><s>", lambda: byte_level("<s> <s> $A")),
    "the same at both ends": (END, lambda: byte_level("</s> $A </s>")),
    "Metaspace, first": ("<s>", lambda: metaspace("<s> $A")),
    "Metaspace, always": ("<s>", lambda: metaspace("<s> $A", "always")),
    "Metaspace, never": ("<s>", lambda: metaspace("<s> $A </s>", "never")),
    "Prepend": ("<s>", lambda: metaspace("<s> $A", "normalizer")),
    "Llama": ("<s>", lambda: llama(add_bos_token=True)),
    "Llama, legacy, both": ("<s>", lambda: llama(add_bos_token=True, add_eos_token=True, legacy=True)),
}


@functools.cache
def in_front(name: str) -> tuple[str, hf.PreTrainedTokenizerFast]:
    spelled, make = IN_FRONT[name]
    return spelled, make()


@pytest.mark.parametrize("name", IN_FRONT)
def test_a_prompt_that_spells_what_is_put_in_front_has_it_once(name: str) -> None:
    spelled, tokenizer = in_front(name)
    bare = ids_of(tokenizer, "The capital of France")
    assert tokenizer.convert_ids_to_tokens(list(bare[0]))[-1].endswith("France")
    before = added_by(tokenizer).before
    assert "".join(tokenizer.convert_ids_to_tokens(list(before))) == spelled
    assert bare[0][: len(before)] == before
    assert not set(before) & set(bare[0][len(before) :])
    is_read_as_text = name == "special tokens are read as text"
    end = added_by(tokenizer).after
    for space in ("", " ", "\n"):
        # As it is written, which is what templates of chats are encoded to.
        written = tuple(tokenizer(f"{spelled}{space}The capital of France")["input_ids"])
        found = ids_of(tokenizer, f"{spelled}{space}The capital of France")
        assert (before + found[0] + end == written) != is_read_as_text
        assert found[1] == bare[1]
        # Most read a text's beginning as they read it behind such a token.
        if name not in ("Metaspace, first", "Llama"):
            assert found in (bare, ids_of(tokenizer, f"{space}The capital of France"))
    # Alone it is a prompt: what comes first of all.
    assert ids_of(tokenizer, spelled, "The")[0] == before


@pytest.mark.parametrize("name", IN_FRONT)
@pytest.mark.parametrize("form", ["{0}{0}The capital", " {0}The capital", "\n\n{0} The capital", "{0} {0}The capital"])
def test_what_is_put_in_front_is_refused_where_a_prompt_has_it_in_another_way(name: str, form: str) -> None:
    spelled, tokenizer = in_front(name)
    with refused(
        PromptError, "dataset.source", says=r"prompt 'x' would begin with \[.*\]: the tokenizer puts"
    ) as caught:
        ids_of(tokenizer, form.format(spelled))
    assert repr(spelled) in str(caught.value)


@pytest.mark.parametrize("text", ["[gMASK]The", "<sop>The", "[gMASK] <sop> The", " <sop>The", "<sop>[gMASK]The"])
def test_a_part_of_what_is_put_in_front_is_refused(text: str) -> None:
    with refused(PromptError, "dataset.source", says=r"prompt 'x' would begin with \['\[gMASK\]', '<sop>', "):
        ids_of(in_front("two tokens")[1], text)


def test_a_data_set_may_spell_it_in_some_prompts_only(caplog: pytest.LogCaptureFixture) -> None:
    _, tokenizer = in_front("Metaspace, always")
    texts = ["The capital", "<s>The capital", "<s> The capital", "The capital", "<s>The capital"]
    prompts = [Prompt(str(i), text, (IS, " of"), 0) for i, text in enumerate(texts)]
    with caplog.at_level(logging.INFO):
        found = list(encode(tokenizer, prompts, None))
    assert len({(one.ids, one.target_ids) for one in found}) == 1
    # Results name prompts as they were given.
    assert [one.prompt for one in found] == prompts
    assert found == list(encode(tokenizer, prompts, None, batch=2))
    assert [own for own, _ in one_token_targets(tokenizer, prompts)] == prompts
    length = len(found[0].ids)
    assert within_context(tokenizer, prompts, length) == [True] * 5
    assert within_context(tokenizer, prompts, length - 1) == [False] * 5
    told = [record.getMessage() for record in caplog.records]
    assert told == ["prompts that spell '<s>' are read without it: the tokenizer adds it to every text"]


def test_special_tokens_within_a_prompt_stay_and_each_prompt_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    _, tokenizer = in_front("byte level")
    texts = ["<s>The capital</s><s>The capital", "The capital of<s> The"]
    later = [Prompt("9", "The<s> capital", (IS,)), Prompt("0", texts[0], (IS,))]
    with caplog.at_level(logging.WARNING):
        found = list(encode(tokenizer, [Prompt(str(i), text, (IS,)) for i, text in enumerate(texts)], None))
        for _ in range(2):
            list(encode(tokenizer, later, None))
    assert [one.ids.count(0) for one in found] == [2, 2]
    both, one = [record.getMessage() for record in caplog.records]
    assert both.startswith("2 prompts spelling tokens of '<s>' in the middle, where they stay")
    assert both.endswith(": '0', '1'")
    assert one.startswith("1 prompt spelling tokens of '<s>'")
    assert one.endswith(": '9'")


@pytest.mark.parametrize("blank", ["\ufeff", "\u200b", "\u200d", "\u2060", " \ufeff\n", "\xad", "\x00"])
@pytest.mark.parametrize("name", ["byte level", "Metaspace, first", "two tokens"])
def test_what_nobody_sees_does_not_hide_what_is_put_in_front(name: str, blank: str) -> None:
    spelled, tokenizer = in_front(name)
    for form in (f"{blank}{spelled}The capital", f"{spelled}{blank}{spelled}The capital"):
        with refused(PromptError, "dataset.source", says="prompt 'x' would begin with"):
            ids_of(tokenizer, form)
    if name == "two tokens":
        with refused(PromptError, "dataset.source", says="prompt 'x' would begin with"):
            ids_of(tokenizer, f"{blank}<sop>The capital")


@pytest.mark.parametrize("name", ["Metaspace, first", "Llama"])
def test_a_prompt_is_read_as_it_is_written(name: str) -> None:
    spelled, tokenizer = in_front(name)
    for text in (f"{spelled}The capital", f"{spelled}[INST] The capital", f"{spelled} The capital", "The capital"):
        (found,) = encode(tokenizer, [Prompt("x", text, (IS, " of"))], None)
        written = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert list(found.ids) == (written if text.startswith(spelled) else [1, *written])
        assert tokenizer.convert_ids_to_tokens(list(found.target_ids)) == ["▁is", "▁of"]
    # Not the tokens of the text without it.
    assert ids_of(tokenizer, f"{spelled}The capital")[0] != ids_of(tokenizer, "The capital")[0]


class AddsToWordsOnly(hf.PreTrainedTokenizerFast):
    """As some of models' own do: nothing is added to a text without words."""

    ends: tuple[int, ...] = ()

    def __call__(self, text: list[str], **options: bool) -> hf.BatchEncoding:
        found = super().__call__(text, **options)
        found["input_ids"] = [[1, *ids, *self.ends] if ids else [] for ids in found["input_ids"]]
        return found


@pytest.mark.parametrize("ends", [(), (2,)])
def test_what_is_not_added_to_the_empty_text_is_found_too(ends: tuple[int, ...]) -> None:
    tokenizer = AddsToWordsOnly(
        tokenizer_object=words_of_tiny_models("$A").backend_tokenizer, bos_token="<s>", eos_token=END
    )
    tokenizer.ends = ends
    found = added_by(tokenizer, [(1, 3, 4, *ends)])
    assert (found.before, found.after) == ((1,), ends)
    for text in ("w3 w4", "<s>w3 w4", "<s> w3 w4"):
        assert ids_of(tokenizer, text, " w5") == ((1, 3, 4), 5)
    with refused(PromptError, "dataset.source", says="would begin with"):
        ids_of(tokenizer, "<s><s>w3 w4", " w5")


def test_what_texts_have_in_common_is_not_taken_for_added() -> None:
    # A first word, a mark of white space, the unknown token.
    for tokenizer, texts in (
        (words_of_tiny_models("$A"), ["<s> w3", "<s> w4"]),
        (words_of_tiny_models("$A"), ["a", "b"]),
        (without_unknown(), ["the capital", "the"]),
        (metaspace("$A", "always"), ["<s>The", "<s>The capital"]),
        (byte_level(), ["<s>The", "<s>The capital"]),
    ):
        assert added_by(tokenizer, tokenizer(texts)["input_ids"]) == added.Added()


def test_a_tokenizer_that_adds_nothing_reads_prompts_as_they_are() -> None:
    tokenizer = byte_level()
    assert added_by(tokenizer) == added.Added()
    for text in ("<s>The capital", "<s><s>The capital", " <s>The capital", "The capital</s>"):
        assert list(ids_of(tokenizer, text)[0]) == tokenizer(text)["input_ids"]
    # A word that begins like what is put in front is another word.
    words = words_of_tiny_models("<s> $A")
    words.backend_tokenizer.post_processor = TemplateProcessing(single="w3 $A", special_tokens=[("w3", 3)])
    assert ids_of(words, "w33 w4", " w5")[0] == (3, 33, 4)
    assert ids_of(words, "w3 w4", " w5")[0] == (3, 4)


BEHIND: dict[str, Made] = {
    "byte level": lambda: byte_level("$A </s>"),
    "both": lambda: byte_level("<s> $A </s>"),
    "the same at both ends": lambda: byte_level("</s> $A </s>"),
    "several": lambda: byte_level("<s> $A </s> <sep> </s>", ("<s>", END, "<sep>")),
    "Metaspace": lambda: metaspace("<s> $A </s>"),
    "Prepend": lambda: metaspace("$A </s>", "normalizer"),
    "Llama": lambda: llama(add_bos_token=True, add_eos_token=True),
    "where there is none": hf.ByT5Tokenizer,
}


@pytest.mark.parametrize("name", BEHIND)
@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_what_is_put_behind_a_text_is_taken_off(name: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = BEHIND[name]()
    end, target = tokenizer.convert_tokens_to_ids(END), "s" if name == "where there is none" else IS
    whole = tokenizer("The capital")["input_ids"]
    with caplog.at_level(logging.INFO):
        prompts = [Prompt(str(i), "The capital", (target, END)) for i in range(3)]
        (found, *others) = encode(tokenizer, prompts, None)
    after = added_by(tokenizer).after
    assert found.ids + after == tuple(whole)
    assert found.ids[-1] != end
    # The target stands where the tokenizer would have put its own.
    assert found.target_ids == (tokenizer("The capital" + target)["input_ids"][len(found.ids)], end)
    assert all((other.ids, other.target_ids) == (found.ids, found.target_ids) for other in others)
    (told,) = [record.getMessage() for record in caplog.records]
    assert re.match(r"the tokenizer puts '</s>.* behind every text: taken off", told)
    assert within_context(tokenizer, prompts[:1], len(found.ids)) == [True]
    assert [(own, gone) for own, gone in one_token_targets(tokenizer, prompts[:1])] == [(prompts[0], 0)]
    # A prompt's own stays, and is told.
    caplog.clear()
    ids, token = ids_of(tokenizer, "The capital</s>", END)
    assert (ids, token) == ((*found.ids, end), end)
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_a_prompt_of_what_is_put_behind_it_alone_is_empty() -> None:
    with refused(PromptError, "dataset.source", says="prompt 'x' has no tokens"):
        ids_of(words_of_tiny_models("$A </s>"), " ", " w3")


MASKED: dict[str, tuple[str, str, Made]] = {
    "BERT": ("[CLS]", "[SEP]", word_piece),
    "BERT, not registered": ("[CLS]", "[SEP]", lambda: word_piece(False)),
    "RoBERTa": ("<s>", END, roberta),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_prompt_that_spells_what_is_added_has_it_once(name: str) -> None:
    first, last, make = MASKED[name]
    tokenizer = make()
    target = "paris" if first == "[CLS]" else "Paris"

    def masked(text: str) -> tuple[int, ...]:
        (found,) = encode(tokenizer, [Prompt("x", text, (target,))], None, tokenizer.mask_token_id)
        assert tokenizer.convert_ids_to_tokens(list(found.target_ids))[0].lstrip("Ġ") == target
        assert [found.ids.count(token) for token in tokenizer.convert_tokens_to_ids([first, last])] == [1, 1]
        assert tokenizer.convert_ids_to_tokens([found.ids[0], found.ids[-1]]) == [first, last]
        return found.ids

    for text in ("the capital of [MASK].", "[MASK]"):
        bare = masked(text)
        for form in (f"{first}{text}{last}", f"{first}{text}", f"{text}{last}"):
            assert masked(form) == bare
        assert masked(f"{first} {text} {last}") in (bare, masked(f" {text} "))
    for wrong in ("{0}{0}the [MASK]", "the [MASK]{1}{1}", "{0}the [MASK]{1} {1}", " {0} {0}the [MASK]"):
        with refused(PromptError, "dataset.source", says="prompt 'x' would (begin|end) with"):
            masked(wrong.format(first, last))


def test_a_masked_prompt_keeps_what_stands_within() -> None:
    tokenizer = word_piece()
    prompt = Prompt("x", "[CLS] the capital [SEP] is [MASK] [SEP]", ("paris",))
    (found,) = encode(tokenizer, [prompt], None, tokenizer.mask_token_id)
    assert found.ids == (2, 5, 6, 3, 8, 4, 3)
    # `[MASK]` is one token for every model, also when lengths are counted.
    tokenizer = roberta()
    prompt = Prompt("x", "The capital [MASK]", ("Paris",))
    (found,) = encode(tokenizer, [prompt], None, tokenizer.mask_token_id)
    for most, is_short in ((len(found.ids), True), (len(found.ids) - 1, False)):
        assert within_context(tokenizer, [prompt], most, mask_token=tokenizer.mask_token_id) == [is_short]


@pytest.mark.parametrize("text", ["w3 w14 w9", "<s>w3 w14 w9", "<s> w3 w14 w9"])
@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_the_library_measures_behind_the_prompt_itself(text: str, template: str) -> None:
    model = LanguageModel(tiny_model("Llama 2").model, words_of_tiny_models(template))
    reference = families.float64_of("Llama 2")
    targets, token = [" w7", END], 2
    p, expected, _ = oracle.neurgrad(reference, [1, 3, 14, 9], [7, token], "paper")
    found = neg_service.neurgrad(model, [text], [targets])
    np.testing.assert_allclose(found.probability[0], p, rtol=1e-5)
    np.testing.assert_allclose(found.neurgrad[0], expected, rtol=0, atol=1e-5 * abs(expected).max())
    np.testing.assert_allclose(neg_service.neg(model, text, END, [(1, 5)], [1.0]).probability, p[1], rtol=1e-5)
    edited = neg_service.intervene(model, [text], [targets], [{"neurons": [(1, 5)], "shift": 0.5}])
    np.testing.assert_allclose(edited.probability_before[0], p, rtol=1e-5)


def test_a_tokenizer_beside_weights_adds_what_its_configuration_says(tmp_path: Path) -> None:
    llama(add_bos_token=True, add_eos_token=True).save_pretrained(tmp_path)
    loaded = load_tokenizer(LocalModel(tmp_path, "own", "none"))
    assert added_by(loaded).after_text == END
    assert ids_of(loaded, "<s> The capital") == ids_of(llama(add_bos_token=True), "The capital")


def test_a_merged_target_is_still_refused_without_what_is_put_behind() -> None:
    with refused(TargetError, "dataset.source", says="target 'ital' merges with the text beside it") as caught:
        ids_of(byte_level("<s> $A </s>"), "The cap", "ital")
    assert END not in str(caught.value)

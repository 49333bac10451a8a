"""What a tokenizer cannot read or leaves out: told of the prompt or target that has it, and nobody else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import BPE

from neg_service.errors import PromptError, TargetError
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tokens import encode
from tests.encodings import one_token_targets, within_context
from tests.refusals import refused
from tests.tiny_tokenizers import ids_of, without_unknown, word_piece

pytestmark = pytest.mark.usefixtures("nothing_told")


def test_a_tokenizer_without_an_unknown_token_reads_what_it_knows() -> None:
    tokenizer = without_unknown()
    assert ids_of(tokenizer, "the capital", " paris") == ((0, 1), 2)
    good = Prompt("good", "the capital", (" paris", " rome"), 0)
    with refused(
        PromptError, setting=None, says=r"prompt 'bad': the model's tokenizer cannot read it: .*\(dataset.source, mod"
    ):
        list(encode(tokenizer, [good, Prompt("bad", "the town", (" paris",))], None))
    with refused(PromptError, setting=None, says="prompt 'bad': .* cannot read it"):
        within_context(tokenizer, [good, Prompt("bad", "the town", (" paris",))], 9)
    mixed = replace(good, id="mixed", targets=(" paris", " berlin", " rome"))
    with refused(
        TargetError, setting=None, says="prompt 'mixed': .* cannot read target ' berlin': .*UNK.*not_one_token=skip"
    ):
        list(encode(tokenizer, [good, mixed], None))
    assert list(one_token_targets(tokenizer, [good, mixed])) == [(good, 0), (replace(good, id="mixed"), 1)]


def drops_what_it_does_not_know() -> hf.PreTrainedTokenizerFast:
    own = Tokenizer(BPE({"a": 0, "b": 1, "c": 2, "0": 3, "ab": 4, " ": 5}, [("a", "b")]))
    return hf.PreTrainedTokenizerFast(tokenizer_object=own)


def test_characters_without_a_token_are_not_left_out_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = drops_what_it_does_not_know()
    for target in ("Xa", "aX", "é0"):
        with refused(TargetError, says=f"no token for 1 of the characters of target '{target}'"):
            ids_of(tokenizer, "b", target)
        prompt = Prompt("x", "b", ("a", target, "c"), 0)
        assert [gone for _, gone in one_token_targets(tokenizer, [prompt])] == [1]
    assert not caplog.records
    # The prompt's own are no fault of a target.
    assert ids_of(tokenizer, "cXc", "a") == ((2, 2), 0)
    assert ids_of(tokenizer, "cX", "a") == ((2,), 0)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert told[0].endswith("with characters that the tokenizer has no token for: read as if they were not there: 'x'")


@pytest.mark.parametrize("target", ["PARIS", "Paris", "Pa\u0301ris", "pÁris", "paris\u200b", "\x00paris", " paris "])
def test_a_target_that_is_written_otherwise_is_none_with_characters_left_out(target: str) -> None:
    tokenizer = word_piece()
    (found,) = encode(tokenizer, [Prompt("x", "the [MASK].", (target,))], None, tokenizer.mask_token_id)
    assert found.target_ids == (9,)

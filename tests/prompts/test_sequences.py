"""Targets of several tokens as they are encoded: which tokens they are, and what of them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from neg_service.config import ScanConfig, plain, typed
from neg_service.errors import ConfigurationError, PromptError, TargetError
from neg_service.prompts.encoding import Encoding, Ids
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.prompts.sources import load_dataset
from neg_service.prompts.tokens import Skips, encode
from tests.refusals import refused
from tests.tiny_models import MASK, tiny_tokenizer


def found(targets: tuple[str, ...], **options: Any) -> EncodedPrompt:
    asked = [Prompt("a row", "w1 w2", targets)]
    (one,) = encode(tiny_tokenizer(), asked, options.pop("context_length", None), sequences=True, **options)
    return one


def test_each_target_is_all_of_its_tokens_and_single_tokens_are_as_ever() -> None:
    one = found((" w3 w4 w5", " w3", " w3 w6", " w9"))
    assert one.target_tokens == ((3, 4, 5), (3,), (3, 6), (9,))
    assert (one.ids, one.target_ids, one.following) == ((1, 2), (3, 3, 3, 9), ((4, 5), (), (6,), ()))
    single = found((" w3", " w9"))
    assert single == EncodedPrompt(single.prompt, (1, 2), (3, 9))
    assert (single.target_tokens, single.has_sequences, one.has_sequences) == (((3,), (9,)), False, True)


def test_arrays_of_ids_give_back_what_follows() -> None:
    prompts = [Prompt("a", "w1 w2", (" w3 w4 w5", " w3")), Prompt("b", "w1", (" w5",)), Prompt("c", "w7", (" w5 w6",))]
    expected = list(encode(tiny_tokenizer(), prompts, None, sequences=True))
    encoding = Encoding(prompts, lambda asked: encode(tiny_tokenizer(), asked, None, sequences=True), Ids())
    assert list(encoding) == expected
    encoding.encode_all()
    assert list(encoding) == expected


def test_what_is_no_target_is_refused_with_the_row() -> None:
    with refused(TargetError, setting="dataset.source", says="prompt 'a row': target '' is no token at all"):
        found((" w3", ""))
    with refused(
        TargetError, setting="dataset.source", says="prompt 'a row': targets ' w3 w4' and '  w3 w4' are the same tokens"
    ):
        found((" w3 w4", "  w3 w4"))
    with refused(
        TargetError, setting="dataset.source", says="prompt 'a row': the model has no token for target ' w3 w96'"
    ):
        found((" w3 w96",))
    with refused(ConfigurationError, setting="dataset.not_one_token", says="masked model predicts one token"):
        found((" w3",), mask_token=MASK)


def test_the_context_holds_the_prompt_and_all_of_a_target_that_is_read() -> None:
    assert found((" w3 w4 w5",), context_length=4).target_tokens == ((3, 4, 5),)
    with refused(
        PromptError, setting="model.source", says="'a row' has 4 tokens with 2 of its longest target, .* holds 3"
    ):
        found((" w3 w4 w5",), context_length=3)
    skips = Skips(too_long=True)
    asked = [Prompt("a", "w1 w2", (" w3 w4 w5",)), Prompt("b", "w1 w2", (" w3 w4",))]
    assert [one.prompt.id for one in encode(tiny_tokenizer(), asked, 3, skips=skips, sequences=True)] == ["b"]
    assert (skips.n_too_long, skips.first_too_long) == (1, "a")


def test_without_the_setting_the_refusal_says_that_there_is_one() -> None:
    with pytest.raises(TargetError, match=r"is 2 tokens .* sequence reads it token by token"):
        list(encode(tiny_tokenizer(), [Prompt("a", "w1", (" w3 w4",))], None))


def test_rows_of_hellaswag_become_prompts_with_endings_for_targets(tmp_path: Path) -> None:
    rows = [
        {"ctx": "w1 w2", "endings": ["w3 w4", "w5", "w6 w7 w8", "w9"], "label": "2", "ind": 4},
        {"ctx": "w1", "endings": ["w3 w4", "w5"], "label": ""},
        {"ctx": "w1", "endings": ["w3 w4", "w5"], "label": 0},
    ]
    file = tmp_path / "validation.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        composed = compose("scan", ["dataset=hellaswag", f"dataset.source={file}", f"storage.uri={tmp_path}"])
    how = typed(ScanConfig, plain(composed)).dataset
    prompts = load_dataset(how)
    assert [(p.text, p.answer) for p in prompts] == [("w1 w2", 2), ("w1", None), ("w1", 0)]
    assert prompts[0].targets == (" w3 w4", " w5", " w6 w7 w8", " w9")
    assert how.not_one_token == "sequence"
    for label in (4, "-1", "w3 w4", True):
        file.write_text(json.dumps({**rows[0], "label": label}) + "\n")
        with refused(PromptError, says="line 1: answer must be an index of the 4 targets from 0"):
            load_dataset(how)

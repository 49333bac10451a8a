"""The column `wordings` of a data set, in all formats that have it, and as tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neg_service.config import DatasetConfig
from neg_service.errors import PromptError
from neg_service.prompts.chat import Chat
from neg_service.prompts.encoding import Encoding, Ids
from neg_service.prompts.prompt import EncodedPrompt, EncodedWording, Prompt, check_prompts, digest
from neg_service.prompts.sources import load_prompts, read_prompts
from neg_service.prompts.store import PromptFile
from neg_service.prompts.tokens import Skips, encode
from neg_service.prompts.wordings import wordings_of
from tests.refusals import refused
from tests.tiny_models import tiny_tokenizer


def written(place: Path, *wordings: Any, **columns: Any) -> str:
    rows = [{"prompt": f"p{i}", "targets": [" a"], "wordings": own, **columns} for i, own in enumerate(wordings)]
    (place / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(place / "rows.jsonl")


def test_rows_of_jsonl(tmp_path: Path) -> None:
    found = load_prompts(written(tmp_path, ["q", "r s"], None, []))
    assert [prompt.wordings for prompt in found] == [(("q", None), ("r s", None)), None, None]
    renamed = written(tmp_path, None, others=["t"])
    (prompt,) = load_prompts(renamed, how=DatasetConfig(renamed, columns={"wordings": "others"}))
    assert prompt.wordings == (("t", None),)
    left_out = written(tmp_path, ["q"])
    (prompt,) = load_prompts(left_out, how=DatasetConfig(left_out, columns={"wordings": ""}))
    assert prompt.wordings is None


def test_rows_of_parquet_and_csv(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["p", "q"], "targets": [[" a"], [" a"]], "wordings": [["r", "s"], None]})
    pq.write_table(table, tmp_path / "rows.parquet")
    expected = [(("r", None), ("s", None)), None]
    assert [prompt.wordings for prompt in load_prompts(str(tmp_path / "rows.parquet"))] == expected
    (tmp_path / "rows.csv").write_text('prompt,targets,wordings\np,"["" a""]","[""r"", ""s""]"\nq,"["" a""]",\n')
    assert [prompt.wordings for prompt in load_prompts(str(tmp_path / "rows.csv"))] == expected
    (tmp_path / "rows.csv").write_text('prompt,targets,wordings\np,"["" a""]",r\n')
    with pytest.raises(PromptError, match="line 2: wordings must be a JSON list"):
        load_prompts(str(tmp_path / "rows.csv"))


class Brackets:
    """A tokenizer whose chat template writes `<role>content`."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_options: Any) -> str:
        return "".join(f"<{one['role']}>{one['content']}" for one in messages) + "<assistant>"


CHAT = Chat(Brackets(), "m", "{{ messages }}")


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_wordings_of_chats(tmp_path: Path) -> None:
    source = str(tmp_path / "chat.jsonl")
    row = {"messages": said("p?"), "targets": ["a"], "wordings": [said("q?")]}
    Path(source).write_text(json.dumps(row))
    (prompt,) = read_prompts(source, chat=lambda: CHAT)
    expected = (("<user>q?<assistant>", (("user", "q?"),)),)
    assert prompt.wordings == expected
    # As one message of the user, as the prompt itself.
    texts = written(tmp_path, ["q?"])
    (prompt,) = read_prompts(texts, how=DatasetConfig(texts, chat=True), chat=lambda: CHAT)
    assert prompt.wordings == expected
    Path(source).write_text(json.dumps(row | {"wordings": ["q?"]}))
    with pytest.raises(PromptError, match="line 1: prompt '000000': wording 0 is a text, and the prompt is messages"):
        list(read_prompts(source, chat=lambda: CHAT))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("q", "wordings must be a list of texts that ask the same, or of messages, not 'q'"),
        ({"q": 1}, "wordings must be a list"),
        ([""], "wording 0 is empty"),
        (["q", 5], "wording 1 must be a text or messages, not 5"),
        (["q", None], "wording 1 must be a text or messages, not None"),
        (["q", "the prompt"], "wording 1 is the prompt itself"),
        (["q", "r", "q"], "wording 2 is there twice"),
        ([[{"role": "user", "content": "q"}]], "wording 0 is messages, and the prompt is none"),
    ],
)
def test_what_is_no_wording(given: Any, says: str) -> None:
    with refused(PromptError, "f.jsonl: line 3", says=f"prompt 'fr': {says}"):
        wordings_of("fr", "f.jsonl: line 3", given, ("the prompt", None), False, lambda: CHAT)


def test_wordings_are_part_of_what_a_data_set_is(tmp_path: Path) -> None:
    found = [load_prompts(written(tmp_path, own)) for own in (None, ["q"], ["r"])]
    assert len({digest(prompts) for prompts in found}) == 3
    assert digest(found[0]) == digest([Prompt("000000", "p0", (" a",))])
    # And of what is on disk.
    assert list(PromptFile(found[1])) == found[1]
    with pytest.raises(PromptError, match="lone surrogate"):
        check_prompts([Prompt("p", "q", (" a",), wordings=(("\ud800", None),))])


PROMPTS = [
    Prompt("a", "w3 w4", (" w7", " w8")),
    Prompt("b", "w3 w5", (" w7", " w8"), 0, wordings=(("w9", None), ("w10 w11", None))),
    Prompt("c", "w3 w6", (" w8",), wordings=(("w12 w13 w14", None),)),
]


def test_wordings_are_encoded_once_with_their_targets() -> None:
    tokenizer = tiny_tokenizer()
    encoding = Encoding(PROMPTS, lambda own: encode(tokenizer, own, 64), Ids())
    on_demand = encoding[:]
    encoding.encode_all()
    assert [encoding[0], encoding[1], encoding[2]] == on_demand
    assert on_demand[0].wordings == ()

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text).input_ids)

    w7, w8 = (ids(f"w9 w{n}")[-1] for n in (7, 8))
    assert on_demand[1].wordings == (EncodedWording(ids("w9"), (w7, w8)), EncodedWording(ids("w10 w11"), (w7, w8)))
    assert on_demand[1].worded(1) == [
        EncodedPrompt(Prompt("b, wording 0", "w9", (" w8",)), ids("w9"), (w8,)),
        EncodedPrompt(Prompt("b, wording 1", "w10 w11", (" w8",)), ids("w10 w11"), (w8,)),
    ]
    assert on_demand[2].wordings == (EncodedWording(ids("w12 w13 w14"), (w8,)),)


def test_wordings_that_cannot_be_read_are_named_with_their_row() -> None:
    tokenizer = tiny_tokenizer()
    n = len(tokenizer("w12 w13 w14").input_ids)
    with pytest.raises(PromptError, match=rf"'c, wording 0' has {n} tokens, the model's context holds {n - 1}"):
        list(encode(tokenizer, PROMPTS, n - 1))
    skips = Skips(too_long=True)
    assert [one.prompt.id for one in encode(tokenizer, PROMPTS, n - 1, skips=skips)] == ["a", "b"]
    assert (skips.n_too_long, skips.first_too_long) == (1, "c")
    # Of targets that are left out their wordings know nothing.
    several = Prompt("d", "w3", (" w7 w8", " w8", " w9"), 1, wordings=(("w9", None),))
    (found,) = encode(tokenizer, [several], None, skips=Skips(not_one_token=True))
    assert len(found.target_ids) == len(found.wordings[0].target_ids) == 2
    # The prompt's own target is told first.
    with pytest.raises(PromptError, match="prompt 'd': target ' w7 w8' is 2 tokens"):
        list(encode(tokenizer, [several], None))

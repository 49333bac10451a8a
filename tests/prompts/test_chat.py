"""Chats: tokens are those of `apply_chat_template`, for every kind of template; what is no conversation is refused."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers as hf

import neg_service
from neg_service.cluster.prepare import prepare
from neg_service.config import DatasetConfig, ModelConfig, ScanConfig, StorageConfig
from neg_service.errors import ConfigurationError, ModelError, PromptError
from neg_service.measures import measure_of
from neg_service.measures.base import ShardInput
from neg_service.models.batches import Budget
from neg_service.prompts import chat as chats
from neg_service.prompts.chat import Chat, chat_of, messages_of, template_text
from neg_service.prompts.prompt import Messages, Prompt, digest
from neg_service.prompts.sources import load_dataset
from neg_service.prompts.store import PromptFile
from neg_service.prompts.tokens import encode
from tests.chat_templates import CHATML, CONVERSATIONS, LLAMA_3, QUESTION, SPECIAL, TEMPLATES, THINKING, WITHOUT_SYSTEM
from tests.fakes import save_family
from tests.refusals import refused
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import byte_level, llama

SAID: Messages = (("user", "France?"),)


def tokenizer(template: str | None = None, adds_first: bool = True) -> hf.PreTrainedTokenizerFast:
    """Of a model that chats; `adds_first`: it puts <s> in front of every text, as Llama, Gemma and Mistral do."""
    found = byte_level("<s> $A" if adds_first else None, SPECIAL)
    found.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    found.chat_template = template
    return found


CASES = [
    (kind, name)
    for kind in TEMPLATES
    for name in CONVERSATIONS
    if not (name == "system" and kind in WITHOUT_SYSTEM)
]  # fmt: skip


@pytest.mark.parametrize("adds_first", [True, False])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_tokens_are_those_of_apply_chat_template(kind: str, name: str, adds_first: bool) -> None:
    own, asked = tokenizer(TEMPLATES[kind], adds_first), CONVERSATIONS[name]
    is_begun = asked[-1]["role"] == "assistant"
    expected = own.apply_chat_template(
        asked, add_generation_prompt=not is_begun, continue_final_message=is_begun, return_dict=False
    )
    messages = messages_of("x", asked)
    prompt = Prompt("x", chat_of(own, "m").text("x", messages), ("Z", "Q"), messages=messages)
    (found,) = encode(own, [prompt], None)
    assert list(found.ids) == expected
    # A target behind it is what the tokenizer makes of the text with it.
    assert [*found.ids, found.target_ids[1]] == own(prompt.text + "Q", add_special_tokens=False)["input_ids"]
    # The first token once where the template writes it, and never twice.
    first = own.convert_tokens_to_ids("<s>")
    assert [token == first for token in found.ids[:2]] == ["bos_token" in TEMPLATES[kind], False]


def test_a_class_that_makes_its_own_template_of_tokens_has_its_first_token_once() -> None:
    own = llama(
        chat_template="{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
    )
    messages = messages_of("x", [QUESTION])
    prompt = Prompt("x", chat_of(own, "m").text("x", messages), (" is",), messages=messages)
    (found,) = encode(own, [prompt], None)
    assert list(found.ids) == own.apply_chat_template([QUESTION], return_dict=False, add_generation_prompt=True)
    assert found.ids.count(own.bos_token_id) == 1


def test_plain_prompts_beside_chats_are_read_as_before() -> None:
    own = tokenizer(CHATML)
    plain = [Prompt("a", "The capital", ("Z",)), Prompt("c", "Rome", ("Z",))]
    chat = Prompt("b", chat_of(own, "m").text("b", SAID), ("Z",), messages=SAID)
    assert [one.ids for one in encode(own, [plain[0], chat, plain[1]], None)] == [
        next(encode(own, [one], None)).ids for one in (plain[0], chat, plain[1])
    ]


def in_file(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows in a file, of the kind that its name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def made_of(own: hf.PreTrainedTokenizerFast, template: str | None = None) -> Callable[[], Chat]:
    return lambda: chat_of(own, "m", template)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_of_messages_are_read_from_files(name: str, tmp_path: Path) -> None:
    rows = [
        {"talk": [{"role": "user", "content": "France?"}], "targets": [" a", " b"], "answer": " b", "id": "fr"},
        {"talk": CONVERSATIONS["begun"], "targets": [" a"], "answer": None, "id": "open"},
    ]
    asked = DatasetConfig(in_file(tmp_path / name, rows), columns={"messages": "talk"})
    first, second = load_dataset(asked, None, made_of(tokenizer(CHATML)))
    assert first == Prompt(
        "fr", "<|im_start|>user\nFrance?<|im_end|>\n<|im_start|>assistant\n", (" a", " b"), 1, (("user", "France?"),)
    )
    assert second.text.endswith("<|im_end|>\n<|im_start|>assistant\nThe capital is ")
    assert list(PromptFile([first, second])) == [first, second]


def test_a_plain_prompt_is_wrapped_as_one_message_of_the_user_and_is_the_same_as_such(tmp_path: Path) -> None:
    rows = [{"prompt": "France?", "targets": [" a"], "id": "x"}]
    asked = [{"messages": [{"role": "user", "content": "France?"}], "targets": [" a"], "id": "x"}]
    chat = made_of(tokenizer(LLAMA_3))
    wrapped = load_dataset(DatasetConfig(in_file(tmp_path / "a.jsonl", rows), chat=True), None, chat)
    given = load_dataset(DatasetConfig(in_file(tmp_path / "b.jsonl", asked)), None, chat)
    assert list(wrapped) == list(given)
    assert digest(wrapped) != digest(load_dataset(DatasetConfig(str(tmp_path / "a.jsonl"))))
    facts = load_dataset(DatasetConfig("facts", chat=True), 2, chat)
    plain = load_dataset(DatasetConfig("facts"), 2)
    assert [one.messages for one in facts] == [(("user", own.text),) for own in plain]
    assert [(one.targets, one.answer) for one in facts] == [(own.targets, own.answer) for own in plain]


def test_answers_alone_follow_the_template_without_a_space_where_it_ends_with_one(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}], "answer": f"A{i}"} for i in range(4)]
    asked = DatasetConfig(in_file(tmp_path / "a.jsonl", rows))
    spaced, open_ = (load_dataset(asked, None, made_of(tokenizer(TEMPLATES[kind]))) for kind in ("chatml", "mistral"))
    # Behind "assistant\n", and behind "[/INST]".
    assert {target[0] for one in spaced for target in one.targets} == {"A"}
    assert {target[0] for one in open_ for target in one.targets} == {" "}
    # What is drawn does not depend on the template.
    assert [tuple(f" {target}" for target in one.targets) for one in spaced] == [one.targets for one in open_]


def row(messages: Any, **more: Any) -> dict[str, Any]:
    return {"id": "fr", "messages": messages, "targets": [" a"], **more}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (row([{"role": "system", "content": "a"}]), "prompt 'fr': its messages have no turn of the user (roles: 'sys"),
        (row([]), "prompt 'fr': messages must be a list of at least one"),
        (row("hello"), "prompt 'fr': messages must be a list of at least one {role, content}, not 'hello'"),
        (row([["user", "a"]]), "prompt 'fr': message 1 must have a role and content, not be ['user', 'a']"),
        (row([QUESTION, {"role": "assistant", "content": ""}]), "prompt 'fr': message 2 has no content"),
        (row([QUESTION, {"content": "a"}]), "prompt 'fr': message 2 has no role"),
        (row([{"role": "user", "content": 5}]), "prompt 'fr': the content of message 1 must be a text, not 5"),
        (
            row([{"role": "user", "content": [{"type": "text"}]}]),
            "prompt 'fr': the content of message 1 must be a text, not [{'type': 'text'}]",
        ),
        (row([QUESTION | {"tool_calls": ["f"]}]), "prompt 'fr': message 1 has 'tool_calls'"),
        (row([QUESTION], prompt="a"), "prompt 'fr': has a prompt and messages"),
        (row([QUESTION] * 2), "prompt 'fr': the chat template of m refuses its messages (roles: 'user, user'): Conv"),
        (row([{"role": "user", "content": "<s>a"}]), "prompt 'fr' would begin with '<s>' twice"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_with_its_row(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    asked = DatasetConfig(in_file(tmp_path / "a.jsonl", [given]))
    chat = made_of(tokenizer(TEMPLATES["llama-2"]))
    with refused(PromptError, "dataset.source", says=re.escape(says)) as caught:
        load_dataset(asked, None, chat)
    assert "\n" not in str(caught.value)


def test_a_text_that_would_begin_twice_is_refused() -> None:
    own = tokenizer("{{ bos_token }}{{ messages[0]['content'] }}")
    assert chat_of(own, "m").text("x", SAID) == "<s>France?"
    with refused(PromptError, "dataset.source", says="prompt 'x' would begin with '<s>' twice"):
        chat_of(own, "m").text("x", (("user", " <s> France?"),))


def test_messages_and_prompts_are_not_mixed_and_no_template_is_given_for_nothing(tmp_path: Path) -> None:
    plain = {"prompt": "a", "targets": [" b"], "id": "plain"}
    asked = DatasetConfig(in_file(tmp_path / "a.jsonl", [row([QUESTION]), plain]))
    with refused(
        PromptError, "dataset.source", says="prompt 'plain': has no messages, but a prompt.*dataset.chat=true"
    ):
        load_dataset(asked, None, made_of(tokenizer(CHATML)))
    assert len(load_dataset(replace(asked, chat=True), None, made_of(tokenizer(CHATML)))) == 2
    asked = DatasetConfig(in_file(tmp_path / "b.jsonl", [plain]), chat_template=CHATML)
    with refused(ConfigurationError, "dataset.chat_template", says="but the prompts are no messages"):
        load_dataset(asked)
    # A column that is not meant is left out.
    asked = DatasetConfig(in_file(tmp_path / "c.jsonl", [row([QUESTION], prompt="a")]), columns={"prompt": ""})
    assert load_dataset(asked, None, made_of(tokenizer(CHATML)))[0].messages == messages_of("fr", [QUESTION])
    assert load_dataset(replace(asked, columns={"messages": ""}))[0] == Prompt("fr", "a", (" a",))


def test_csv_holds_no_messages(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('messages,targets\n[],"[""b""]"\n')
    with refused(PromptError, "dataset.source", says="is CSV, whose cells hold no lists of messages"):
        load_dataset(DatasetConfig(str(tmp_path / "a.csv")))


def test_a_model_without_a_template_is_refused_by_name_and_setting() -> None:
    with refused(
        ModelError, "dataset.chat_template", says="base-model has no chat template: give one with dataset.chat_"
    ):
        chat_of(tokenizer(), "base-model")
    assert chat_of(tokenizer(), "base-model", CHATML).text("x", SAID).startswith("<|im_start|>user")
    with refused(ConfigurationError, "dataset.chat_template", says="is no template of Jinja: .*end"):
        chat_of(tokenizer(), "m", "{% for m in messages %}").text("x", SAID)


def test_arguments_are_told_to_the_template_and_unknown_ones_refused() -> None:
    own = tokenizer(THINKING)
    assert chat_of(own, "m", None, {"enable_thinking": False}).text("x", SAID).endswith("<think>\n\n</think>\n\n")
    assert chat_of(own, "m").text("x", SAID).endswith("assistant\n")
    for name, says in (
        ("enable_thinkin", "does not read 'enable_thinkin'"),
        ("tokenize", "tokenize is not for the templ"),
    ):
        with refused(ConfigurationError, "dataset.chat_arguments", says=says):
            chat_of(own, "m", None, {name: False})


def test_several_first_tokens_stand_once_too(caplog: pytest.LogCaptureFixture) -> None:
    own = tokenizer("[gMASK]<sop><|user|>{{ messages[0]['content'] }}")
    own.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>", "<|user|>"]})
    chat = chat_of(own, "glm")
    assert chat.text("x", SAID) == "[gMASK]<sop><|user|>France?"
    with refused(PromptError, "dataset.source", says="would begin with '\\[gMASK\\]' twice"):
        chat.text("x", (("user", "[gMASK]<sop><|user|>France?"),))
    with caplog.at_level(logging.WARNING):
        assert not caplog.records
        for who in ("y", "z"):
            chat.text(who, (("user", "In [gMASK]<sop> France?"),))
    (told,) = caplog.records
    assert "begins with [gMASK]<sop><|user|>, and messages spell that, too" in told.getMessage()
    assert "prompt 'y' is the first" in told.getMessage()


def test_what_a_template_leaves_out_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    chats._told.clear()
    own = chat_of(tokenizer("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"), "m")
    with caplog.at_level(logging.WARNING):
        for who in ("x", "y"):
            own.text(who, (("system", "Be short."), *SAID))
    assert [one.getMessage() for one in caplog.records] == [
        "the chat template of m leaves out, or changes, what messages of the role 'system' say; prompt 'x' is the first"
    ]


def test_a_begun_message_whose_end_is_taken_off_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    chats._told.clear()
    begun: Messages = (*SAID, ("assistant", "It is "))
    with caplog.at_level(logging.WARNING):
        assert chat_of(tokenizer(CHATML), "m").text("x", begun).endswith("It is ")
        assert not caplog.records
        assert chat_of(tokenizer(LLAMA_3), "m").text("x", begun).endswith("It is")
    assert "takes off the white space at the end of a begun message" in caplog.text
    assert "prompt 'x' is the first" in caplog.text


def test_a_template_that_writes_the_date_is_told_of_and_can_be_told_a_date(caplog: pytest.LogCaptureFixture) -> None:
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    own = tokenizer(dated + "{{ date_string }}" + CHATML)
    with caplog.at_level(logging.WARNING):
        told = chat_of(own, "told a date", None, {"date_string": "26 Jul 2024"})
        assert told.text("x", SAID).startswith("26 Jul 2024<|im_start|>")
        assert not caplog.records
        chat_of(own, "told none")
    assert "writes today's date: a run of another day has other prompts" in caplog.text


def test_a_template_is_a_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(CHATML)
    assert template_text(str(tmp_path / "own.jinja")) == template_text(CHATML) == CHATML
    with refused(ConfigurationError, "dataset.chat_template", says="cannot be read: no such file"):
        template_text(str(tmp_path / "other.jinja"))
    (tmp_path / "no.jinja").write_text("Hello")
    with refused(ConfigurationError, "dataset.chat_template", says="holds no chat template"):
        template_text(str(tmp_path / "no.jinja"))


def test_a_run_goes_on_with_its_own_template_alone(tiny_directory: Path, tmp_path: Path) -> None:
    said = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(said)
    source = in_file(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "w1 w2"}], "targets": [" w3"]}])
    plain = in_file(tmp_path / "b.jsonl", [{"prompt": "w1 w2", "targets": [" w3"]}])

    def of(source: str, **settings: Any) -> Any:
        return prepare(
            ScanConfig(
                model=ModelConfig(str(tiny_directory)),
                dataset=DatasetConfig(source, **settings),
                storage=StorageConfig(str(tmp_path / "results")),
            )
        )

    with refused(ModelError, "dataset.chat_template", says="has no chat template"):
        of(source)
    first = of(source, chat_template=said)
    assert of(source, chat_template=str(tmp_path / "own.jinja")).fingerprint == first.fingerprint
    # The same text by another template, and the same text as a plain prompt, are other runs.
    others = [of(source, chat_template=said + "{# #}"), of(plain), of(plain, chat=True, chat_template=said)]
    assert len({one.fingerprint for one in (first, *others)}) == 4
    assert [one.prompts[0].text for one in (first, *others)] == ["w1 w2"] * 4
    assert first.tables["prompts"].names[-1] == "messages"
    assert "messages" not in others[1].tables["prompts"].names
    assert first.request["dataset"]["chat_template"] == said
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("w2", "w4"))
    assert of(source, chat_template=said).fingerprint != first.fingerprint


def test_the_library_takes_messages_where_it_takes_texts() -> None:
    model = tiny_model("Llama 2")
    talk = [{"role": "user", "content": "w1 w2"}]
    with refused(ModelError, "model.tokenizer.chat_template", says="has no chat template"):
        neg_service.neurgrad(model, [talk], [[" w3"]])
    model.tokenizer.chat_template = "{% for m in messages %}w9 {{ m['content'] }} w8{% endfor %}"
    text = "w9 w1 w2 w8"
    targets, edits = [[" w3", " w4"]], [{"neurons": [(1, 2)], "scale": 0}]
    for one, other in zip(
        (
            neg_service.neurgrad(model, [talk], targets).neurgrad,
            neg_service.integrated_gradients(model, [talk], targets, m=2).integrated_gradients,
            neg_service.intervene(model, [talk], targets, edits).probability,
            neg_service.neg(model, talk, " w3", [(1, 2)], [1.0]).delta_p,
        ),
        (
            neg_service.neurgrad(model, [text], targets).neurgrad,
            neg_service.integrated_gradients(model, [text], targets, m=2).integrated_gradients,
            neg_service.intervene(model, [text], targets, edits).probability,
            neg_service.neg(model, text, " w3", [(1, 2)], [1.0]).delta_p,
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    with refused(PromptError, "prompts", says="prompt '0': its messages have no turn of the user"):
        neg_service.neurgrad(model, [[{"role": "system", "content": "a"}]], [[" w3"]])
    with refused(PromptError, says="prompts must be a list"):
        neg_service.neurgrad(model, talk, [[" w3"]])  # type: ignore[arg-type]
    with refused(ModelError, "model", says="is a masked model, which reads no chats"):
        neg_service.neurgrad(tiny_model("BERT"), [talk], [["w3"]])


def test_a_masked_model_reads_no_chats(tmp_path: Path) -> None:
    model = str(save_family("BERT", tmp_path / "bert"))
    asked = ScanConfig(model=ModelConfig(model), dataset=DatasetConfig("facts-masked", chat=True))
    with refused(ModelError, "model.source", says=r"bert \(BertForMaskedLM\) is a masked model, which reads no chats"):
        prepare(asked)


def test_messages_are_stored_beside_the_text_that_was_made_of_them() -> None:
    model = tiny_model("Llama 2")
    model.tokenizer.chat_template = "{% for m in messages %}w9 {{ m['content'] }} w8{% endfor %}"
    said = [(("user", f"w{i}"),) for i in (1, 2)]
    made = chat_of(model.tokenizer, "m")
    prompts = [
        Prompt(f"p{i}", made.text("p", own), (" w3", " w4"), None, own) for i, own in enumerate(said)
    ]  # fmt: skip
    encoded = tuple(encode(model.tokenizer, prompts, None))
    measure = measure_of({"name": "neurgrad"})
    tables = measure.tables_of(ShardInput(model, encoded, budget=Budget(2**24)))
    assert tables["prompts"].schema.equals(measure.schemas(model.feed_forward, has_messages=True)["prompts"])
    assert [(row["prompt"], row["messages"]) for row in tables["prompts"].to_pylist()] == [
        ("w9 w1 w8", [{"role": "user", "content": "w1"}]),
        ("w9 w2 w8", [{"role": "user", "content": "w2"}]),
    ]
    plain = tuple(encode(model.tokenizer, [replace(own, messages=None) for own in prompts], None))
    assert "messages" not in measure.tables_of(ShardInput(model, plain, budget=Budget(2**24)))["prompts"].column_names

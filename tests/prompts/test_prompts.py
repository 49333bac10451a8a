"""Facts, files and encoding: what is accepted, and that every refusal names its place."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir

from neg_service import LanguageModel
from neg_service.cluster.prepare import prepare
from neg_service.config import DatasetConfig, ScanConfig, plain, typed
from neg_service.errors import PromptError
from neg_service.inputs import without_credentials
from neg_service.models.loading import load_tokenizer
from neg_service.prompts import facts
from neg_service.prompts.prompt import Prompt, check_prompts, digest, encode
from neg_service.prompts.sources import load_dataset, load_prompts
from tests.encodings import one_token_targets, within_context
from tests.tiny_models import MASK, tiny_tokenizer

ROWS = [
    {"prompt": "w1 w2", "targets": [" w3", " w4"], "answer": " w4", "id": "first"},
    {"prompt": "w5, w6", "targets": [" w7"], "answer": None, "id": "second"},
]
EXPECTED = [Prompt("first", "w1 w2", (" w3", " w4"), 1), Prompt("second", "w5, w6", (" w7",), None)]


def test_the_facts_are_as_many_and_as_varied_as_promised() -> None:
    prompts = facts.load()
    check_prompts(prompts)
    relations = Counter(prompt.id.split("/")[0] for prompt in prompts)
    assert len(prompts) >= 240
    assert len(relations) >= 8
    for relation in facts.RELATIONS:
        assert len(set(relation.wordings)) == 2
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


def test_files_of_every_kind_give_the_same_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    csv = ["prompt,targets,answer,id", 'w1 w2,"["" w3"", "" w4""]", w4,first', '"w5, w6","["" w7""]",,second']
    (tmp_path / "a.csv").write_text("\n".join(csv) + "\n")
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        assert load_prompts(str(tmp_path / name)) == EXPECTED
        assert load_prompts(f"file://{tmp_path}/{name}", limit=1) == EXPECTED[:1]


def test_ids_are_row_numbers_when_not_given(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "targets": ["b"]}\n{"prompt": "c", "targets": ["d"]}\n')
    assert [prompt.id for prompt in load_prompts(str(tmp_path / "a.jsonl"))] == ["000000", "000001"]


# Answers alone, of two relations; the file has names of its own for its columns.
ANSWERS = [
    *({"text": f"The capital of {i} is", "word": f"C{i % 5}", "uuid": f"c{i}", "kind": f"P36-{i}"} for i in range(10)),
    *({"text": f"The colour of {i} is ", "word": f"R{i % 2}", "uuid": f"r{i}", "kind": "P462-a"} for i in range(4)),
]
COLUMNS = {"prompt": "text", "answer": "word", "id": "uuid", "group": "kind"}


def test_rows_with_answers_alone_get_others_of_their_group_as_targets(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ANSWERS))
    asked = DatasetConfig(columns=COLUMNS, group_until="-")
    prompts = load_prompts(str(tmp_path / "a.jsonl"), None, asked)
    assert [prompt.id for prompt in prompts] == [row["uuid"] for row in ANSWERS]
    for prompt, row in zip(prompts, ANSWERS, strict=True):
        # A space stands between prompt and target, once.
        own = row["word"] if row["text"].endswith(" ") else f" {row['word']}"
        assert prompt.answer is not None
        assert prompt.targets[prompt.answer] == own
        assert len(set(prompt.targets)) == 4
    for prompt in prompts[:10]:
        assert all(target.startswith(" C") for target in prompt.targets)
    # Of the second group there are two answers only: all of them, and others besides.
    for prompt in prompts[10:]:
        assert sum(target.startswith("R") for target in prompt.targets) == 2
    assert len({prompt.answer for prompt in prompts}) > 1
    assert load_prompts(str(tmp_path / "a.jsonl"), 3, asked) == prompts[:3]
    assert load_prompts(str(tmp_path / "a.jsonl"), None, replace(asked, seed=1)) != prompts
    two = load_prompts(str(tmp_path / "a.jsonl"), None, replace(asked, choices=2, answer_prefix=""))
    assert {len(prompt.targets) for prompt in two} == {2}
    assert {target[0] for prompt in two for target in prompt.targets} == {"C", "R"}
    pq.write_table(pa.Table.from_pylist(ANSWERS), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(pa_csv(ANSWERS))
    for name in ("a.parquet", "a.csv"):
        assert load_prompts(str(tmp_path / name), None, asked) == prompts


def test_many_answers_are_drawn_from_in_no_time_and_spellings_of_one_are_one(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "answer": f"a{i}"} for i in range(20_000)] + [{"prompt": "x", "answer": " a7"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    began = time.process_time()
    prompts = load_prompts(str(tmp_path / "a.jsonl"))
    # Half a second; drawing from all others for each row would take hours.
    assert time.process_time() - began < 30
    assert all(len(set(prompt.targets)) == 4 for prompt in prompts)
    assert len({target for prompt in prompts for target in prompt.targets}) == 20_000


def pa_csv(rows: list[dict[str, str]]) -> str:
    return "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"columns": {"question": "text"}}, "dataset.columns={'question': 'text'}: must say what a file calls some of"),
        ({"columns": ["text"]}, "dataset.columns=['text']: must say"),
        ({"columns": {"prompt": "text", "answer": "text"}}, "prompt and answer would both be the column 'text'"),
        ({"columns": {"prompt": "answer"}}, "prompt and answer would both be the column 'answer'; give each its own"),
        ({"columns": {"answer": "targets"}}, "targets and answer would both be the column 'targets'"),
        ({"columns": {"prompt": "id"}}, "prompt and id would both be the column 'id'"),
        ({"columns": {"prompt": "words", "answer": "word"}}, "line 1 has no 'words'"),
        ({"columns": COLUMNS, "choices": 1}, "dataset.choices=1: must be at least 2"),
    ],
)
def test_wrong_columns_are_refused(tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ANSWERS))
    with pytest.raises(PromptError) as caught:
        load_prompts(str(tmp_path / "a.jsonl"), None, DatasetConfig(**asked))
    assert message in str(caught.value)


@pytest.mark.parametrize("column", ["id", "answer", "group", "targets"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_column_that_is_named_and_is_not_there_is_refused(tmp_path: Path, name: str, column: str) -> None:
    row = {"prompt": "a", "targets": '["b"]', "answer": "b"}
    (tmp_path / "a.csv").write_text('prompt,targets,answer\na,"[""b""]",b\n')
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"targets": ["b"]}))
    pq.write_table(pa.Table.from_pylist([row | {"targets": ["b"]}]), tmp_path / "a.parquet")
    with pytest.raises(PromptError, match=rf"no column 'nope', .*{column}: nope.*its columns are prompt, targets, an"):
        load_prompts(str(tmp_path / name), None, DatasetConfig(columns={column: "nope"}))
    assert load_prompts(
        str(tmp_path / name), None, DatasetConfig(columns={column: "answer"} if column == "id" else None)
    )


def test_ids_that_are_numbers_stay_as_they_are_written(tmp_path: Path) -> None:
    numbers = ["1e5", "1.10", "-0", "12345678901234567890123", "0.1000000000000000055511151231257827", "7"]
    rows = [f'{{"prompt": "a", "targets": ["b"], "id": {number}}}' for number in numbers]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert [prompt.id for prompt in load_prompts(str(tmp_path / "a.jsonl"))] == numbers
    asked = DatasetConfig(source=str(tmp_path / "a.jsonl"), ids=["1e5"])
    assert [prompt.id for prompt in load_dataset(asked)] == ["1e5"]


@pytest.mark.parametrize("task", [None, "agnews"])
@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_source_is_refused(source: str, task: str | None) -> None:
    with pytest.raises(PromptError, match=r"^dataset\.source= ?: has no value"):
        load_dataset(DatasetConfig(source=source, task=task))


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


MYRIADLAMA = Path(__file__).parents[3] / "shared" / "data" / "myriadlama" / "prompts.jsonl"


@pytest.mark.model
@pytest.mark.skipif(not MYRIADLAMA.exists(), reason="MyriadLAMA's prompts are not here")
def test_myriadlama_is_read_by_the_general_loader(tmp_path: Path) -> None:
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        composed = compose("scan", ["dataset=myriadlama", f"dataset.source={MYRIADLAMA}", f"storage.uri={tmp_path}"])
    prompts = load_dataset(typed(ScanConfig, plain(composed)).dataset)
    assert len(prompts) == 1000
    rows = [json.loads(line) for line in MYRIADLAMA.read_text().splitlines()]
    answers_of: dict[str, set[str]] = {}
    for row in rows:
        answers_of.setdefault(row["tpl"].split("-")[0], set()).add(f" {row['answer']}")
    for prompt, row in zip(prompts, rows, strict=True):
        assert prompt.answer is not None
        assert (prompt.id, prompt.targets[prompt.answer]) == (row["uuid"], f" {row['answer']}")
        near = answers_of[row["tpl"].split("-")[0]]
        assert len(near & set(prompt.targets)) == min(4, len(near))
    prepared = prepare(typed(ScanConfig, plain(composed)))
    assert prepared.about["skipped_not_one_token"] == 1000 - len(prepared.prompts) > 0
    list(encode(load_tokenizer(prepared.local, False), prepared.prompts, prepared.info.context_length))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "targets": ["b"]}\n{"prompt": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"prompt": "a", "targets": ["b"]}\n[1]\n', "line 2 is not a JSON object"),
        ("a.jsonl", '{"prompt": "a"}\n', "line 1 has no 'targets'"),
        ("a.jsonl", '{"targets": ["a"]}\n', "line 1 has no 'prompt'"),
        ("a.jsonl", '{"prompt": 5, "targets": ["a"]}\n', "line 1: prompt must be a text, not 5"),
        ("a.jsonl", '{"prompt": "a", "targets": "b"}\n', "line 1: targets must be a list of texts, not 'b'"),
        ("a.jsonl", '{"prompt": "a", "targets": ["b"], "answer": "c"}\n', "line 1: answer 'c' is not one of"),
        ("a.csv", "prompt,id\na,b\n", "its header has no 'targets'"),
        ("a.csv", "prompt,answer\na,\n", "line 2 has no 'targets'"),
        (
            "a.jsonl",
            '{"prompt": "a", "answer": 5}\n',
            "line 1: answer must be a text where there are no targets, not 5",
        ),
        ("a.jsonl", '{"prompt": "a", "targets": ["b"], "id": [1]}\n', "line 1: id must be a text or a number, not [1]"),
        ("a.jsonl", '{"prompt": "a", "targets": ["b"], "id": NaN}\n', "line 1: id must be a text or a number, not nan"),
        (
            "a.jsonl",
            '{"prompt": "a", "answer": "b", "group": {}}\n',
            "line 1: group must be a text or a number, not {}",
        ),
        ("a.jsonl", '{"prompt": "a", "targets": ["b", 5]}\n', "line 1: targets must be a list of texts, not ['b', 5]"),
        ("a.jsonl", '{"prompt": true, "targets": ["b"]}\n', "line 1: prompt must be a text, not True"),
        ("a.jsonl", '{"prompt": "a", "id": ' + "9" * 5000 + "}\n", "line 1 is not JSON that can be read: Exceeds"),
        ("a.csv", 'prompt,targets\na,"[""b"""\n', "line 2: targets must be a JSON list"),
        ("a.jsonl", '{"prompt": "a", "answer": " "}\n', "line 1: answer must be a text where there are no targets"),
        ("a.csv", 'prompt,targets\na,"[""b""]"\nc\n', "line 3 has not as many cells as the header"),
        ("a.csv", 'prompt,targets\na,"[""b""]"\n"x"y,z\n', "after line 2: is not CSV"),
        ("a.csv", "prompt,targets\na,b|c\n", "line 2: targets must be a JSON list"),
        ("a.parquet", "not parquet", "is not Parquet"),
        (
            "a.txt",
            "",
            "neither a built-in data set (facts, facts-masked) nor a file that ends in .jsonl, .parquet, .csv",
        ),
    ],
)
def test_a_broken_file_is_refused_with_the_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptError) as caught:
        load_prompts(str(tmp_path / name))
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lone_surrogate_is_refused_by_its_prompt_also_where_targets_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\\ud800", "answer": "b"}\n{"prompt": "c", "answer": "d\\udfff"}\n')
    with pytest.raises(PromptError, match="prompt '000000' holds a lone surrogate"):
        check_prompts(load_prompts(str(tmp_path / "a.jsonl")))


def test_ids_and_groups_may_be_what_something_else_is_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n')
    found = load_prompts(str(tmp_path / "a.jsonl"), None, DatasetConfig(columns={"id": "prompt", "group": "answer"}))
    assert [prompt.id for prompt in found] == ["a", "c"]


def test_a_file_that_is_not_there_is_one_line() -> None:
    with pytest.raises(PromptError, match=r"dataset\.source=/nowhere/a\.jsonl: cannot be read: no such file"):
        load_prompts("/nowhere/a.jsonl")
    # Bound and not listening.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(PromptError, match=r"/a\.jsonl: cannot be read: nothing answers there"):
            load_prompts(f"http://127.0.0.1:{bound.getsockname()[1]}/a.jsonl")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there are 0 prompts"),
        ([Prompt("x", "a", ("b",)), Prompt("x", "c", ("d",))], "prompt id 'x' appears twice"),
        ([Prompt("x", "", ("b",))], "prompt 'x' is empty"),
        ([Prompt("x", "a", ())], "prompt 'x' has no targets"),
        ([Prompt("x", "a\ud800", ("b",))], "prompt 'x' holds a lone surrogate"),
        ([Prompt("x", "a", ("b",), 1)], "prompt 'x' has answer 1, but its 1 targets"),
    ],
)
def test_prompts_that_are_wrong_without_a_tokenizer(prompts: list[Prompt], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        check_prompts(prompts)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("x", "w1", (" w2 w3",)), r"target ' w2 w3' is 2 tokens \['w2', 'w3'\], it must be exactly 1"),
        (Prompt("x", "w1", ("",)), r"target '' is 0 tokens"),
        (Prompt("x", "w1", (" w2", "  w2")), r"targets ' w2' and '  w2' are the same token \['w2'\]"),
        (Prompt("x", "w1", ("2",)), r"target '2' merges with the text beside it \['w1'\] into \['w12'\]"),
        (Prompt("x", "w1 " * 9, ("w2",)), r"has 9 tokens, the model's context holds 8"),
        (Prompt("x", " ", ("w2",)), r"has no tokens"),
    ],
)
def test_prompts_that_the_tokenizer_shows_to_be_wrong(prompt: Prompt, message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
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
    with pytest.raises(PromptError, match=r"'p': the model has no token for target ' nothing', only \['w0'\]"):
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
    for refused in (
        lambda: list(encode(tiny_tokenizer(), prompts, None, model=model)),
        lambda: list(one_token_targets(tiny_tokenizer(), prompts, model=model)),
    ):
        with pytest.raises(PromptError) as caught:
            refused()
        assert str(caught.value).startswith(f"prompt 'x': {message}")
        assert str(caught.value).endswith("the tokenizer beside the weights is another model's (model.source)")
    # A masked model predicts what stands in the place of the mask, and need not read it.
    with_mask = [Prompt("x", "w1 w96", ("w60",))]
    with pytest.raises(PromptError, match="prompt 'x': target 'w60' is the token 'w60' with the id 60"):
        list(encode(tiny_tokenizer(), with_mask, None, MASK, model=Ids(97, 60)))
    assert list(encode(tiny_tokenizer(), with_mask, None, MASK, model=Ids(97, 61)))


def test_ids_up_to_the_last_of_a_model_are_encoded() -> None:
    prompts = [Prompt("x", "w1 w49", (" w59",))]
    for model in (Ids(50, 60), Ids(None, None), Ids(128, 128)):
        (found,) = encode(tiny_tokenizer(), prompts, None, model=model)
        assert (found.ids, found.target_ids) == ((1, 49), (59,))
    # Too long is too long, whatever is in it; what is left in must be known.
    with pytest.raises(PromptError, match=r"its token 'w49' has the id 49"):
        within_context(tiny_tokenizer(), prompts, 8, model=Ids(49, 60))


def test_an_address_is_printed_without_what_it_hides() -> None:
    assert without_credentials("https://me:secret@host/a.csv?token=secret") == "https://host/a.csv"
    assert without_credentials("/data/a.csv") == "/data/a.csv"
    with pytest.raises(PromptError, match=r"cannot be read: .*AWS_ENDPOINT_URL"):
        load_prompts("s3://bucket/a.jsonl")
    with pytest.raises(PromptError) as caught:
        load_prompts("memory://me:secret@host/a.jsonl")
    assert "secret" not in str(caught.value)

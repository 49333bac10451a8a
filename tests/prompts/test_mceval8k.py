"""Tasks as prompts: every task and template, which rows are used for what, and that every refusal names its row."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neg_service import LanguageModel
from neg_service.cluster.prepare import prepare
from neg_service.config import DatasetConfig, JobConfig, ModelConfig, ScanConfig, StorageConfig
from neg_service.errors import ConfigurationError, PromptError
from neg_service.prompts import mceval8k
from neg_service.prompts.mceval8k import as_masked, load_tasks
from neg_service.prompts.prompt import MASK, Prompt
from neg_service.prompts.sources import load_dataset
from neg_service.prompts.tasks import GENRES, LANGUAGES, TASKS, task_of
from neg_service.prompts.templates import templates_of
from neg_service.prompts.tokens import encode
from tests.rare import one_of
from tests.refusals import ANY, refused
from tests.skills import published_row, write_all, write_split

SHARED = Path(__file__).parents[3] / "shared" / "data" / "mceval8k"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tasks in the published layout, rows of this project's own."""
    return write_all(tmp_path_factory.mktemp("mceval8k"))


def dataset(place: Path, task: Any = "agnews", **settings: Any) -> DatasetConfig:
    return DatasetConfig(source=str(place), task=task, **settings)


def test_there_are_22_tasks_in_six_genres() -> None:
    assert Counter(task.genre for task in TASKS.values()) == dict(zip(GENRES, (4, 3, 4, 3, 3, 5), strict=True))
    for genre in GENRES:
        assert any(len(templates_of(task)) >= 4 for task in TASKS.values() if task.genre == genre), genre
    for task in TASKS.values():
        for by_language in templates_of(task).values():
            assert set(by_language) == (set(LANGUAGES) if task.is_multilingual else {"en"}), task.name


@pytest.mark.parametrize("task", TASKS)
def test_every_task_renders_in_every_wording_and_language(place: Path, task: str) -> None:
    for template, by_language in templates_of(TASKS[task]).items():
        for language in by_language:
            prompts = load_tasks(dataset(place, task, template=template, language=language))
            own = by_language[language]
            n = TASKS[task].n_labels
            for prompt in prompts:
                number = 1000 + int(prompt.id.rsplit("/", 1)[1])
                assert prompt.answer == number % n
                assert prompt.targets == own.labels
                # The instruction, a demonstration a label with its right label, and the question itself.
                assert prompt.text.startswith(own.instruction + "\n\n")
                assert prompt.text.count("\n\n") == n + 1
                cue = own.question.rsplit("}", 1)[1]
                # A made-up row is of the label that its number says.
                shown = prompt.text.split("\n\n")[1:-1]
                assert len(shown) == n
                for demonstration in shown:
                    label = own.labels[int(re.findall(r"\d+", demonstration.replace("8000", ""))[-1]) % n]
                    assert demonstration.endswith(f"{cue}{label}"), demonstration
                assert prompt.text.endswith(cue)
                assert "{" not in prompt.text
            # Demonstrations come from train, so that all rows are left.
            assert len(prompts) == 60


def test_multilingual_rows_are_asked_in_their_own_language_but_not_where_it_is_the_answer(place: Path) -> None:
    of = templates_of(TASKS["xnli"])["default"]
    found = {prompt.text.split("\n\n")[0] for prompt in load_tasks(dataset(place, "xnli"))}
    assert found == {of[language].instruction for language in LANGUAGES}
    german = load_tasks(dataset(place, "xnli", languages=["de"]))
    assert {prompt.text.split("\n\n")[0] for prompt in german} == {of["de"].instruction}
    assert len(german) == 12
    one = {prompt.text.split("\n\n")[0] for prompt in load_tasks(dataset(place, "lti"))}
    assert one == {templates_of(TASKS["lti"])["default"]["en"].instruction}


def test_rows_of_a_task_share_their_beginning(place: Path) -> None:
    prompts = load_tasks(dataset(place))
    heads = {prompt.text.rsplit("\n\n", 1)[0] for prompt in prompts}
    assert len(heads) == 1
    assert load_tasks(dataset(place)) == prompts
    other = load_tasks(dataset(place, demonstration_seed=1))
    assert [prompt.id for prompt in other] == [prompt.id for prompt in prompts]
    assert {prompt.text.rsplit("\n\n", 1)[0] for prompt in other} != heads
    bare = load_tasks(dataset(place, shots=0))
    assert [prompt.id for prompt in bare] == [prompt.id for prompt in prompts]
    assert bare[0].text.count("\n\n") == 1
    assert load_tasks(dataset(place, shots=3))[0].text.count("\n\n") == 3 * 4 + 1


def test_demonstrations_are_never_among_the_evaluated_rows(place: Path, tmp_path: Path) -> None:
    prompts = load_tasks(dataset(place, split="train"))
    assert len(prompts) == 60 - 4
    shown = prompts[0].text.split("\n\n")[1:-1]
    assert not any(prompt.text.rsplit("\n\n", 1)[1] == own.rsplit(" ", 1)[0] for prompt in prompts for own in shown)
    # Without a train split they come from valid, and the rows of test stay what they are.
    for i, split in enumerate(("valid", "test")):
        write_split(tmp_path, "agnews", split, [published_row("agnews", 100 * i + n) for n in range(20)])
    assert len(load_tasks(dataset(tmp_path, split="valid"))) == 16
    assert len(load_tasks(dataset(tmp_path, split="test"))) == 20


def test_a_question_belongs_to_the_last_split_that_has_it(tmp_path: Path) -> None:
    rows = [published_row("agnews", n) for n in range(120)]
    for split, own in (("train", rows[:100]), ("valid", [*rows[20:40], *rows[100:110]]), ("test", rows[30:50])):
        write_split(tmp_path, "agnews", split, own)
    loaded = {
        split: {prompt.text.rsplit("\n\n", 1)[1] for prompt in load_tasks(dataset(tmp_path, split=split))}
        for split in ("train", "valid", "test")
    }
    assert {split: len(own) for split, own in loaded.items()} == {"train": 70 - 4, "valid": 20, "test": 20}
    assert not loaded["train"] & loaded["valid"]
    assert not loaded["valid"] & loaded["test"]
    assert not loaded["train"] & loaded["test"]
    # Options in another order make no other question.
    ner = published_row("ner", 5)
    write_split(tmp_path, "ner", "train", [published_row("ner", n) for n in range(40)])
    write_split(tmp_path, "ner", "test", [{**ner, "options": ner["options"][::-1], "label": 2}])
    assert "ner/train/000005" not in {p.id for p in load_tasks(dataset(tmp_path, "ner", split="train", shots=0))}


def test_where_valid_is_test_a_part_of_train_is_held_out(tmp_path: Path) -> None:
    for split, numbers in (("train", range(100)), ("valid", range(60, 90)), ("test", range(60, 90))):
        write_split(tmp_path, "agnews", split, [published_row("agnews", n) for n in numbers])
    found = {split: {p.id for p in load_tasks(dataset(tmp_path, split=split, shots=0))} for split in ("train", "valid")}
    assert (len(found["train"]), len(found["valid"])) == (60, 10)
    assert not found["train"] & found["valid"]
    assert all(id_.startswith("agnews/train/") for id_ in found["valid"])


def test_rows_of_train_are_the_same_whatever_stands_around_them(place: Path) -> None:
    def ids(**settings: Any) -> set[str]:
        return {prompt.id for prompt in load_tasks(dataset(place, split="train", limit=30, **settings))}

    for changed in ({"shots": 0}, {"demonstration_seed": 1}, {"template": "brief"}):
        # All but the rows that became demonstrations, and as many in their place.
        assert len(ids() & ids(**changed)) >= 30 - 8


def test_demonstrations_of_a_multilingual_task_are_in_its_language(place: Path) -> None:
    for prompt in load_tasks(dataset(place, "xnli", limit=20)):
        numbers = [int(own) for own in re.findall(r"so (\d+)", prompt.text)]
        assert len({LANGUAGES[number // 3 % 5] for number in numbers}) == 1


def test_the_order_of_rows_depends_on_the_seed_alone(place: Path) -> None:
    prompts = load_tasks(dataset(place))
    assert [prompt.id for prompt in prompts] != sorted(prompt.id for prompt in prompts)
    assert load_tasks(dataset(place, limit=7)) == prompts[:7]
    assert load_dataset(dataset(place, limit=7), 3) == prompts[:3]
    assert [p.id for p in load_tasks(dataset(place, seed=1))] != [p.id for p in prompts]
    both = load_tasks(dataset(place, ["agnews", "ner"], split=["valid", "test"], limit=5))
    assert Counter((task_of(p.id), p.id.split("/")[1]) for p in both) == {
        (task, split): 5 for task in ("agnews", "ner") for split in ("valid", "test")
    }


def test_labels_are_balanced_down_and_up(tmp_path: Path) -> None:
    rows = [published_row("imdb", n) for n in range(30) if n % 2 or n < 10]
    write_split(tmp_path, "imdb", "valid", rows)
    for balanced, count in ((None, {0: 5, 1: 15}), ("down", {0: 5, 1: 5}), ("up", {0: 15, 1: 15})):
        prompts = load_tasks(dataset(tmp_path, "imdb", shots=0, balanced=balanced))
        assert Counter(prompt.answer for prompt in prompts) == count
        assert len({prompt.id for prompt in prompts}) == len(prompts)
    first = load_tasks(dataset(tmp_path, "imdb", shots=0, balanced="up", limit=6))
    assert Counter(prompt.answer for prompt in first) == {0: 3, 1: 3}


def test_what_is_published_in_two_ways(tmp_path: Path) -> None:
    rows = [
        {"sentence1": None, "sentence2": " bad one .\t good one .", "acceptable": 1},
        {"sentence1": "good two .\tbad two .", "sentence2": None, "acceptable": 0},
        {"sentence1": "a <br /><br />  b &amp; c", "sentence2": "d\n\ne", "acceptable": 0},
    ]
    write_split(tmp_path, "clang8", "valid", rows)
    prompts = {p.id: p for p in load_tasks(dataset(tmp_path, "clang8", shots=0))}
    assert "A. bad one .\nB. good one .\n" in prompts["clang8/valid/000000"].text
    assert "A. good two .\nB. bad two .\n" in prompts["clang8/valid/000001"].text
    assert "A. a b & c\nB. d e\n" in prompts["clang8/valid/000002"].text


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        ("agnews", {"text": "x"}, r"agnews/valid\.json: row 1: has no field 'label'; it has 'text'"),
        ("agnews", {"text": "x", "label": float("nan")}, "row 1: label must be from 0 to 3, not nan"),
        ("agnews", {"text": "x", "label": 4}, "row 1: label must be from 0 to 3, not 4"),
        ("agnews", {"text": 5, "label": 0}, "row 1: text must be a text, not 5"),
        ("amazon-reviews", {"text": "x", "label": 0.0}, r"row 1: label must be from 1 to 5, not 0\.0"),
        ("ner", {"text": "x", "target_chunk": ["a"], "options": ["a"], "label": 0}, "options must be a list of 4"),
        ("stereoset", {"stereotype": 0, "anti-stereotype": 0, "non-stereotype": 1}, "row 1: its three kinds"),
        ("lti", {"text": "x", "lang": "it"}, "row 1: lang must be one of en, de, es, fr, zh, not 'it'"),
        ("clang8", {"sentence1": None, "sentence2": "one", "acceptable": 0}, "row 1: sentence1 is empty"),
        ("agnews", 3, "row 1 must be an object with fields, not 3"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named(tmp_path: Path, task: str, row: Any, says: str) -> None:
    write_split(tmp_path, task, "valid", [published_row(task, 0), row])
    with refused(PromptError, "dataset.source", says=says):
        load_tasks(dataset(tmp_path, task, shots=0))


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"task": "agnew"}, ("dataset.task", "agnew", "did you mean agnews")),
        ({"task": ["ner", "ner"]}, ("dataset.task", "['ner', 'ner']", "give at least one task, and each once")),
        ({"template": "leters"}, ("dataset.template", "leters", "did you mean letters.* known of agnews are")),
        ({"split": "validation"}, ("dataset.split", "validation", "did you mean valid")),
        (
            {"shots": 99},
            ("dataset.shots", "99", "agnews has 15 rows for label ' World' in its train split; use at most 15"),
        ),
        ({"shots": -1}, ("dataset.shots", "-1", "at least 0")),
        ({"limit": 0}, ("dataset.limit", "0", "at least 1")),
        ({"balanced": "yes"}, ("dataset.balanced", "yes", "down, up")),
        ({"languages": ["it"]}, ("dataset.languages", "it", "en, de")),
        ({"languages": ["de"]}, ("dataset.source", ANY, "no row of agnews, valid, is left to be asked")),
        (
            {"languages": ["de"], "balanced": "down"},
            ("dataset.source", ANY, "no row of agnews, valid, is left to be asked"),
        ),
        ({"split": []}, ("dataset.split", "[]", "give at least one split")),
        ({"language": "it"}, ("dataset.language", "it", "known of agnews, template default are en")),
        ({"source": "/nowhere/at-all/x"}, ("dataset.source", "/nowhere/at-all/x")),
    ],
)
def test_bad_settings_are_refused(place: Path, settings: dict[str, Any], refusal: tuple[Any, ...]) -> None:
    with refused(ConfigurationError, *refusal):
        load_tasks(replace(dataset(place), **settings))


def test_a_missing_split_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    write_split(tmp_path, "imdb", "valid", [published_row("imdb", n) for n in range(4)])
    with refused(
        PromptError,
        "dataset.source",
        says=r"imdb has no split train \(classification/imdb/train\.json\); there is valid",
    ):
        load_tasks(dataset(tmp_path, "imdb", split="train"))
    with refused(PromptError, "dataset.source", says="there is none of its splits"):
        load_tasks(dataset(tmp_path, "ner"))


def test_a_users_own_wordings(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    labels = "labels = [' a', ' b', ' c', ' d']"
    file.write_text(f"[mine.en]\ninstruction = 'Choose.'\nquestion = 'News: {{text}} ->'\n{labels}")
    prompts = load_tasks(dataset(place, templates=str(file), template="mine", shots=0))
    assert prompts[0].text.startswith("Choose.\n\nNews: text ")
    for text, message in (
        ("[mine", "is not TOML"),
        ("[mine.en]\ninstruction = ''", "must have instruction, question and labels"),
        ("[mine.en]\ninstruction = ''\nquestion = '{text}'\nlabels = ['a']", "has 1 labels; agnews needs 4"),
        ("mine = 3", "mine must be a table for each language"),
        ("[mine.en]\ninstruction = ''\nquestion = '{text}'\nlabels = 4", "labels a list of texts"),
        (f"[mine.en]\ninstruction = ''\nquestion = '{{text:d}}'\n{labels}", "question: "),
        (f"[mine.en]\ninstruction = ''\nquestion = '{{claim}}'\n{labels}", "'claim' is no field; the fields are text"),
        (f"[mine.en]\ninstruction = ''\nquestion = 'x'\n{labels}", "uses no field"),
    ):
        file.write_text(text)
        with refused(PromptError, "dataset.templates", says=f"{re.escape(str(file))}.*{message}"):
            load_tasks(dataset(place, templates=str(file), template="mine"))


def test_prompts_beyond_the_context_are_named_or_left_out_and_counted(place: Path, tiny_directory: Path) -> None:
    words = tiny_directory.parent / "short.jsonl"
    lengths = [3, 70, 5]
    rows = [{"prompt": " ".join(["w5"] * n), "targets": [" w7"], "answer": " w7", "id": str(n)} for n in lengths]
    words.write_text("\n".join(map(json.dumps, rows)))
    config = ScanConfig(
        model=ModelConfig(source=str(tiny_directory)),
        dataset=DatasetConfig(source=str(words), too_long="skip"),
        storage=StorageConfig(uri=str(tiny_directory.parent / "results")),
        job=JobConfig(shard_size=2),
    )
    prepared = prepare(config)
    assert prepared.info.context_length == 64
    assert [prompt.id for prompt in prepared.prompts] == ["3", "5"]
    assert prepared.about == {"skipped_too_long": 1}
    assert [prompt.id for prompt in prepare(replace(config, dataset=DatasetConfig(str(words)))).prompts] == [
        "3",
        "70",
        "5",
    ]
    with refused(ConfigurationError, "dataset.too_long", "ignore", allowed="error or skip"):
        prepare(replace(config, dataset=DatasetConfig(str(words), too_long="ignore")))


def test_masked_models_are_asked_for_the_word_at_a_mask() -> None:
    asked = as_masked(Prompt("a", "It is", (" yes", " no"), 1))
    assert asked == Prompt("a", f"It is {MASK}.", ("yes", "no"), 1)


@pytest.mark.model
@pytest.mark.skipif(not SHARED.is_dir(), reason="the published rows are not at hand")
@pytest.mark.parametrize("task", one_of(3, TASKS))
def test_published_rows_become_prompts_with_one_token_a_label(
    smollm2: LanguageModel, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Thousands of rows are read once for all templates.
    read, rows = mceval8k._Loader._published, dict[str, Any]()

    def published(self: Any, split: str) -> Any:
        if split not in rows:
            rows[split] = read(self, split)
        return rows[split]

    monkeypatch.setattr(mceval8k._Loader, "_published", published)
    for template in templates_of(TASKS[task]):
        prompts = load_tasks(DatasetConfig(source=str(SHARED), task=task, template=template, limit=20))
        for encoded in encode(smollm2.tokenizer, prompts, smollm2.context_length):
            assert len(set(encoded.target_ids)) == TASKS[task].n_labels


@pytest.mark.parametrize(
    ("task", "label", "is_right"),
    [
        ("fever", True, True),
        ("fever", False, True),
        ("agnews", 3.0, True),
        ("agnews", True, False),
        ("amazon-reviews", True, False),
        ("agnews", 10**400, False),
        ("agnews", -(10**400), False),
        ("agnews", float("inf"), False),
        ("agnews", float("nan"), False),
        ("agnews", 2.5, False),
    ],
)
def test_a_label_is_an_index_and_a_truth_value_where_there_are_two(
    tmp_path: Path, task: str, label: Any, is_right: bool
) -> None:
    row = {**published_row(task, 0), "label": label}
    write_split(tmp_path, task, "valid", [row])
    if is_right:
        (prompt,) = load_tasks(dataset(tmp_path, task, shots=0))
        assert prompt.answer == int(label)
        return
    with refused(PromptError, "dataset.source", says="row 0: label must be from"):
        load_tasks(dataset(tmp_path, task, shots=0))

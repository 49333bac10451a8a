"""A task with planted skill neurons, probed from its rows to the tables: probes find exactly what was planted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest

from neg_service.config import DatasetConfig, ModelConfig, NeuronsConfig, ScanConfig, StorageConfig
from neg_service.errors import ConfigurationError, PromptError
from neg_service.measures.builtin.neuron_predictions import from_numbers
from neg_service.neurons import NeuronSet
from neg_service.prompts.prompt import MASK
from neg_service.studies.skills.options import SkillOptions
from neg_service.studies.skills.pipeline import run_skills
from neg_service.studies.skills.predictions import read_predictions
from neg_service.studies.skills.scores import read_scores
from tests.here import scan_here
from tests.refusals import refused
from tests.skills import PLANTED, PLANTED_WORDINGS, planted_model, planted_rows, scans_here, write_split
from tests.tiny_models import tiny_model, tiny_tokenizer

OPTIONS = SkillOptions(
    sizes=[1, 3, 8], shard_size=24, train_sizes=[24], studies=["efficiency", "flexibility"], block=3, blocks=2
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model and its task."""
    place = tmp_path_factory.mktemp("planted")
    planted_model(place / "model")
    (place / "templates.toml").write_text(PLANTED_WORDINGS)
    for i, (split, count) in enumerate((("train", 50), ("valid", 26), ("test", 26))):
        write_split(place / "data", "imdb", split, planted_rows(count, 100 * i))
    return place


@dataclass
class Study:
    """What was found, by table, and the URIs of the runs."""

    rows: dict[str, list[dict[str, Any]]]
    runs: list[str]


def found_in(place: Path, options: SkillOptions = OPTIONS, data: str = "data") -> Study:
    """What a study finds; runs are kept between studies, as a user's are."""
    scans = scans_here(place / "model", planted_dataset(place, place / data, "imdb"), place / "results")
    return Study(run_skills(options, scans).rows, [uri for _, uri in scans.runs])


def planted_dataset(place: Path, source: Path, *tasks: str, **changed: Any) -> DatasetConfig:
    return DatasetConfig(source=str(source), task=list(tasks), templates=str(place / "templates.toml"), **changed)


@pytest.fixture(scope="module")
def stored(place: Path) -> Study:
    """From stored gradients."""
    return found_in(place)


def rows_of(found: Study, table: str, **keys: Any) -> list[dict[str, Any]]:
    return [row for row in found.rows[table] if all(row[key] == value for key, value in keys.items())]


@pytest.mark.parametrize("kind", ["polarity", "magnitude"])
def test_probes_find_exactly_the_planted_neurons(stored: Study, kind: str) -> None:
    best = rows_of(stored, "neurons", score_name=kind)[: len(PLANTED)]
    assert {(row["layer"], row["neuron"]): row["polarity"] for row in best} == PLANTED
    # 48 train rows without the two demonstrations; each right label is ahead of one other, in every prompt.
    assert {abs(row["score"]) for row in best} == {96 if kind == "polarity" else 48}
    following = rows_of(stored, "neurons", score_name=kind)[len(PLANTED)]
    assert abs(following["score"]) < 0.8 * abs(best[0]["score"])


def test_planted_neurons_do_the_task(stored: Study) -> None:
    for probe in ("polarity", "magnitude", "forest", "activation"):
        (row,) = rows_of(stored, "accuracy", probe=probe, split="test", n_neurons=3)
        assert row["accuracy"] == 1.0, probe
        (chosen,) = rows_of(stored, "accuracy", probe=probe, split="test", is_chosen=True)
        assert chosen["accuracy"] == 1.0
    for probe in ("majority", "random"):
        assert max(row["accuracy"] for row in rows_of(stored, "accuracy", probe=probe, split="test")) < 0.9
    assert {row["n_prompts"] for row in rows_of(stored, "accuracy", split="test")} == {26}
    first, second = rows_of(stored, "flexibility", probe="polarity")
    assert (first["first_rank"], first["accuracy"], second["first_rank"]) == (0, 1.0, 3)
    assert second["accuracy"] < 1.0
    assert {row["n_train"] for row in stored.rows["efficiency"]} == {24, 48}


def test_both_ways_choose_the_same_neurons_and_answer_alike(stored: Study, place: Path) -> None:
    summed = found_in(place, replace(OPTIONS, store_gradients=False))
    for table in ("neurons", "accuracy", "efficiency", "flexibility"):
        assert summed.rows[table] == stored.rows[table], table
    assert {Path(uri).name.split("-")[3] for uri in summed.runs} == {"skill_scores", "neuron_predictions"}
    # Sums and votes, no gradients: a shard has as many numbers as neurons, and a prompt a few bytes of each chosen one.
    assert not any((Path(uri) / "neurgrad").exists() for uri in summed.runs)


def test_votes_of_before_whose_neurons_were_text_are_read(place: Path) -> None:
    # (0, 3), (0, 17) and (2, 5) of layers of 40 neurons.
    chosen = np.array([3, 17, 85])
    config = ScanConfig(
        ModelConfig(str(place / "model")),
        planted_dataset(place, place / "data", "imdb", split="test"),
        {"name": "neuron_predictions", "chosen": {"imdb": "3 17 85"}},
        storage=StorageConfig(str(place / "results")),
    )
    old = scan_here(config)
    as_object = NeuronsConfig(choose="list", list=NeuronSet.by_task({"imdb": from_numbers(chosen, 40)}))
    new = scan_here(replace(config, measure={"name": "neuron_predictions"}, neurons=as_object))
    assert old.config["measure"]["chosen"] == {"imdb": "3 17 85"}
    assert "chosen" not in new.config["measure"]
    assert new.listed_neurons() == as_object.list
    for neurons in (chosen, chosen[[0, 2]]):
        one, other = (read_predictions(run, "imdb", neurons) for run in (old, new))
        for name in ("sign_pks", "largest_ps", "smallest_ps", "activation_ps", "probability_pk"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert one.n_labels == 2
    with pytest.raises(ConfigurationError, match="has predictions of other neurons than those asked for"):
        read_predictions(new, "imdb", np.array([3, 4]))


def test_the_test_split_is_seen_by_no_choice(stored: Study, place: Path) -> None:
    for split, rows in (("train", planted_rows(50, 0)), ("valid", planted_rows(26, 100))):
        write_split(place / "other", "imdb", split, rows)
    # Every label the wrong way round.
    write_split(place / "other", "imdb", "test", [{**row, "label": 1 - row["label"]} for row in planted_rows(26, 200)])
    other = found_in(place, data="other")
    assert other.rows["neurons"] == stored.rows["neurons"]
    for found in (other, stored):
        assert [row["n_neurons"] for row in rows_of(found, "accuracy", probe="polarity", is_chosen=True)] == [1, 1]
    assert rows_of(other, "accuracy", split="valid") == rows_of(stored, "accuracy", split="valid")
    (row,) = rows_of(other, "accuracy", probe="polarity", split="test", n_neurons=3)
    assert row["accuracy"] == 0.0


def test_robustness_and_interdependency(place: Path) -> None:
    options = replace(OPTIONS, studies=["robustness", "interdependency"], suppressed=3, suppress_by=200.0)
    found = found_in(place, replace(options, contexts=[{"template": "other"}, {"template": "blind"}]))
    rows = rows_of(found, "robustness", probe="polarity")
    assert Counter(row["found_with"] for row in rows) == Counter({row["used_with"]: 3 for row in rows})
    by_context = {(row["found_with"].split(",")[0], row["used_with"].split(",")[0]): row for row in rows}
    # Only the last word counts in this model, so that words before it change nothing; a last word that says nothing
    # hides the skill, from ranking as well as from answering.
    for pair in (("default", "default"), ("default", "other"), ("other", "default")):
        assert (by_context[pair]["accuracy"], by_context[pair]["shared_neurons"]) == (1.0, 3)
    for pair in (("blind", "default"), ("default", "blind")):
        assert by_context[pair]["accuracy"] < 0.9
        assert by_context[pair]["shared_neurons"] < 3
    own, drawn = (rows_of(found, "interdependency", suppressed=name)[0] for name in ("imdb", "random"))
    assert own["accuracy_before"] == drawn["accuracy_before"]
    assert own["accuracy"] <= own["accuracy_before"] - 0.4
    assert abs(drawn["accuracy"] - own["accuracy_before"]) <= 0.25


def test_efficiency_ranks_on_the_first_train_prompts_alone(place: Path) -> None:
    dataset = planted_dataset(place, place / "data", "imdb", split="train")
    scans = scans_here(place / "model", dataset, place / "results")
    run = scan_here(scans.settings_of({"name": "skill_scores"}, shard_size=24))
    scores = read_scores(run, [24])["imdb"]
    assert sorted(scores.at) == [24, 48]
    first = next(part for shard, part in run.parts("skill_scores") if shard == 0).to_table()
    own = first.filter(pc.field("score") == "magnitude")
    np.testing.assert_array_equal(scores.at[24]["magnitude"], np.concatenate(own["values"].to_numpy()))
    assert not np.array_equal(scores.at[24]["magnitude"], scores.at[48]["magnitude"])
    assert scores.ranked("magnitude", 24).neurons.tolist() != scores.ranked("magnitude").neurons.tolist()


def test_two_tasks_keep_their_labels_and_neurons_apart(place: Path, tmp_path: Path) -> None:
    # The second task asks for the opposite, most train rows are of label 1, and most valid rows of label 0.
    for split, start, shares in (("train", 0, (10, 40)), ("valid", 100, (20, 6)), ("test", 200, (13, 13))):
        rows = planted_rows(100, start)
        write_split(tmp_path, "imdb", split, rows[:48])
        chosen = [[row for row in rows if row["label"] == label][:count] for label, count in enumerate(shares)]
        opposite = [{"text": row["text"], "toxic": 1 - row["label"]} for own in chosen for row in own]
        write_split(tmp_path, "toxicity", split, opposite)
    options = replace(OPTIONS, studies=[], probes=["polarity", "majority"], sizes=[3])
    scans = scans_here(place / "model", planted_dataset(place, tmp_path, "imdb", "toxicity"), place / "results")
    found = Study(run_skills(options, scans).rows, [])
    for task, sign in (("imdb", 1), ("toxicity", -1)):
        best = rows_of(found, "neurons", task=task, score_name="polarity")
        assert {(row["layer"], row["neuron"]): row["polarity"] for row in best} == {
            neuron: sign * polarity for neuron, polarity in PLANTED.items()
        }
        (row,) = rows_of(found, "accuracy", task=task, probe="polarity", split="test")
        assert row["accuracy"] == 1.0
    # Of train, whose most frequent label is 0 here, whatever valid says.
    (row,) = rows_of(found, "accuracy", task="toxicity", probe="majority", split="valid")
    assert row["accuracy"] == pytest.approx(6 / 26)
    (shared,) = rows_of(found, "overlap", score_name="polarity")
    assert (shared["task"], shared["other_task"], shared["shared"]) == ("imdb", "toxicity", 3)
    assert shared["by_chance"] == pytest.approx(9 / 120)


def test_more_neurons_than_there_are_is_refused(place: Path) -> None:
    with refused(ConfigurationError, "probe.sizes", "[1, 500]", says="the chosen layers have 120 neurons"):
        found_in(place, replace(OPTIONS, sizes=[1, 500]))


def test_what_cannot_be_asked_in_some_context_is_refused_before_anything_is_scanned(place: Path) -> None:
    options = replace(OPTIONS, studies=["robustness"], contexts=[{"shots": 30}])
    scans = scans_here(place / "model", planted_dataset(place, place / "data", "imdb"), place / "results")
    with refused(PromptError, "dataset.shots", "30", says="imdb has 25 rows for label"):
        run_skills(options, scans)
    assert scans.runs == []


def test_a_masked_model_is_asked_at_its_mask(place: Path, tmp_path: Path) -> None:
    tiny_model("BERT").model.save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    dataset = planted_dataset(place, place / "data", "imdb", split="test", shots=0)
    run = scan_here(scans_here(tmp_path / "bert", dataset, tmp_path / "results").settings_of({"name": "neurgrad"}))
    prompts = run.table("prompts").to_table()
    assert all(text.endswith(f" {MASK}.") for text in prompts["prompt"].to_pylist())
    assert prompts["targets"].to_pylist()[0] == ["w7", "w8"]
    assert (prompts.num_rows, run.table("neurgrad").count_rows()) == (26, 26 * 2 * run.about["model"]["layers"])

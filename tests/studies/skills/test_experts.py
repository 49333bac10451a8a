"""Skill neurons of a tiny mixture, whose first layer is dense and whose others have an MLP that is always on."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neg_service.config import DatasetConfig
from neg_service.layer_neurons import LayerNeurons
from neg_service.storage.reader import open_run
from neg_service.studies.scans import StudyScans
from neg_service.studies.skills import probes
from neg_service.studies.skills.numbering import Numbering
from neg_service.studies.skills.options import SkillOptions
from neg_service.studies.skills.page import neurons_grid
from neg_service.studies.skills.pipeline import run_skills
from neg_service.studies.skills.predictions import NeuronPredictions
from neg_service.studies.skills.scores import Ranking, read_scores
from neg_service.studies.tables import StudyTables
from tests.mixtures import tiny_mixture
from tests.skills import PLANTED_WORDINGS, planted_rows, scans_here, write_split

OPTIONS = SkillOptions(
    probes=["polarity", "magnitude", "random", "activation"], sizes=[4, 40], shard_size=20, train_sizes=[20],
    studies=["efficiency"],
)  # fmt: skip
# (layer, expert, neuron), as tables have them.
Neuron = tuple[int, int | None, int]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixture and a task."""
    place = tmp_path_factory.mktemp("mixture")
    model = tiny_mixture("DeepSeek 3")
    model.model.save_pretrained(place / "model")
    model.tokenizer.save_pretrained(place / "model")
    (place / "templates.toml").write_text(PLANTED_WORDINGS)
    for i, (split, count) in enumerate((("train", 24), ("valid", 8), ("test", 10))):
        write_split(place / "data", "imdb", split, planted_rows(count, 100 * i))
    return place


def scans_of(place: Path) -> StudyScans:
    dataset = DatasetConfig(
        source=str(place / "data"), task=["imdb"], templates=str(place / "templates.toml"), shots=0
    )  # fmt: skip
    return scans_here(place / "model", dataset, place / "results")


@pytest.fixture(scope="module")
def stored(place: Path) -> tuple[StudyTables, StudyScans]:
    """A study of stored gradients, with its scans."""
    scans = scans_of(place)
    options = replace(OPTIONS, studies=["efficiency", "interdependency"], suppressed=30, suppress_by=5.0)
    return run_skills(options, scans), scans


def test_neurons_of_experts_are_ranked_by_what_prompts_that_use_them_say(
    stored: tuple[StudyTables, StudyScans],
) -> None:
    tables, scans = stored
    run = open_run(scans.runs[0][1])
    found: dict[tuple[str, bool], dict[Neuron, float]] = defaultdict(dict)
    for row in run.table("neurgrad").to_table().to_pylist():
        for n, value in enumerate(row["neurgrad"]):
            found[row["prompt_id"], row["is_answer"]][row["layer"], row["expert"], n] = value
    score: dict[Neuron, int] = defaultdict(int)
    for prompt_id in {own for own, _ in found}:
        for neuron, right in found[prompt_id, True].items():
            # Of two labels: 2·sgn(right) - sgn(right) - sgn(wrong).
            score[neuron] += int(np.sign(right)) - int(np.sign(found[prompt_id, False][neuron]))
    best = [row for row in tables.rows["neurons"] if row["score_name"] == "polarity"]
    assert [row["score"] for row in best] == [score[row["layer"], row["expert"], row["neuron"]] for row in best]
    # None before -1, -1 before experts; the lower of equals first.
    order = sorted(score, key=lambda own: (-abs(score[own]), own[0], -2 if own[1] is None else own[1], own[2]))
    assert [(row["layer"], row["expert"], row["neuron"]) for row in best] == order[: len(best)]
    assert len({row["expert"] for row in best}) > 3
    # Which experts a prompt uses differs, so that neurons were silent on some.
    assert 30 < len(score) < 3 * 8 * 20
    scores = read_scores(run, [20])["imdb"]
    assert len(scores.neurons) == len(score) == len(scores.at[20]["polarity"])


def test_both_ways_choose_the_same_neurons_of_experts_and_answer_alike(
    stored: tuple[StudyTables, StudyScans], place: Path
) -> None:
    summed = run_skills(replace(OPTIONS, store_gradients=False), scans_of(place))
    for table in ("neurons", "accuracy", "efficiency"):
        assert summed.rows[table] == stored[0].rows[table], table


def test_neurons_of_experts_are_suppressed_where_they_are_used(stored: tuple[StudyTables, StudyScans]) -> None:
    own, _ = stored[0].rows["interdependency"]
    run = open_run(stored[1].runs[-1][1])
    edit = run.config["measure"]["edits"][0]
    best = [row for row in stored[0].rows["neurons"] if row["score_name"] == "polarity"][:30]
    assert edit["neurons"] == [[row["layer"], row["neuron"], row["expert"]] for row in best]
    # Of the 30, those that are not of experts act on every prompt.
    assert sum(row["expert"] in (None, -1) for row in best) < own["n_routed"] < 30


def test_the_page_and_the_stored_table_name_the_expert(stored: tuple[StudyTables, StudyScans]) -> None:
    tables = stored[0].arrow()
    assert str(tables["neurons"].schema.field("expert").type) == "int16"
    grid = neurons_grid(tables["neurons"])
    row = tables["neurons"].to_pylist()[0]
    shown = dict(zip(grid.head, grid.rows[0], strict=True))
    expert = "-" if row["expert"] is None else str(row["expert"])
    assert (shown["layer"], shown["expert"], shown["neuron"]) == (str(row["layer"]), expert, str(row["neuron"]))


def test_a_neuron_that_abstains_has_no_vote() -> None:
    # Two prompts, three labels, three neurons, of which the second prompt uses the last alone.
    largest, smallest = np.array([[2, 2, 0], [-1, -1, 1]], np.int8), np.array([[1, 1, 1], [-1, -1, 2]], np.int8)
    predictions = NeuronPredictions(
        np.arange(3), ("a", "b"), np.zeros(2, np.int64), np.zeros((2, 3), np.float32),
        np.zeros((2, 3, 3), np.int8), largest, smallest, np.zeros((2, 3), np.float32),
    )  # fmt: skip
    for polarity, expected in (([1, 1, 1], [2, 1]), ([-1, -1, 1], [1, 1]), ([0, 0, 1], [0, 1])):
        ranking = Ranking(np.arange(3), np.array(polarity, np.int8), np.ones(3))
        assert probes.magnitude(predictions, ranking, [3])[3].tolist() == expected


def test_numbers_count_through_unequal_layers() -> None:
    # 5 neurons; 2 that are always on and 2 experts of 3; 2 experts of 3.
    numbering = Numbering([LayerNeurons(5), LayerNeurons(2, 2, 3, 1), LayerNeurons(0, 2, 3, 1)])
    numbers = np.array([13, 4, 5, 7, 10, 18])
    names = [[2, 0, 0], [0, 4, None], [1, 0, -1], [1, 0, 0], [1, 0, 1], [2, 2, 1]]
    assert numbering.names(numbers) == names
    assert numbering.of_set(numbering.set_of(numbers)).tolist() == sorted(numbers.tolist())
    assert Numbering([LayerNeurons(40)] * 3).names(np.array([85, 3])) == [[2, 5], [0, 3]]

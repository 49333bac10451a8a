"""What a report says of runs of `control` that differ in which neurons may move, against the tables of these runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from neg_service.config import NeuronsConfig
from neg_service.neurons import NeuronSet
from neg_service.report import comparison, control_figures
from neg_service.report.comparison import compared
from neg_service.report.figures import drawn
from neg_service.report.page import Section
from neg_service.report.sections import sections_of
from neg_service.report.sections.comparison import comparison_sections
from neg_service.report.sections.loading import Loaded
from neg_service.report.wishes import Quartiles
from neg_service.storage.reader import Run
from tests.report.runs import REFERENCES, run_of, titled

MEASURE = {"name": "control", "probability": [0.02, 0.9], "max_passes": 3, "references": REFERENCES[:2]}
TOP = NeuronsConfig(choose="top", count=6)
PAIRS = NeuronsConfig(choose="list", list=NeuronSet.from_pairs([(0, 3), (1, 7), (2, 7)]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def runs(place: Path, tiny_directory: Path) -> list[Run]:
    """Six neurons, all 120, and three, of which the last has another wish, too, and keeps other shifts."""
    more: Mapping[str, Any] = {**MEASURE, "probability": [0.9, 0.5, 0.02], "keep_shift": "all"}
    asked = ((MEASURE, TOP), (MEASURE, None), (more, PAIRS))
    return [run_of(place, tiny_directory, dict(measure), neurons) for measure, neurons in asked]


@pytest.fixture(scope="module")
def section(runs: list[Run]) -> Section:
    (found,) = comparison_sections(runs)
    return found


def wishes(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.table("control").to_table().to_pylist() if row["wanted"] != 0.5]


def test_the_same_wishes_are_compared_with_the_most_neurons_first(runs: list[Run], section: Section) -> None:
    six, all_of_them, three = (wishes(run) for run in runs)
    shown = titled(section, "The same wishes with other neurons")
    assert [(row["neurons that may move"], row["moved"], row["wishes"]) for row in shown] == [
        ("all", "120", "10"), ("the 6 strongest", "6", "10"), ("a list of 3", "3", "10"),
    ]  # fmt: skip
    for row, own in zip(shown, (all_of_them, six, three), strict=True):
        assert row["reached, %"] == f"{100 * np.mean([one['reached'] for one in own]):.1f}"
        low, median, high = np.quantile([one["passes"] for one in own], (0.25, 0.5, 0.75))
        assert row["passes"] == f"{median:g} ({low:g} to {high:g})"
        assert row["achieved off"] == f"{np.median([abs(one['achieved'] - one['wanted']) for one in own]):.4f}"
        assert row["‖shift‖"] == f"{np.median([one['norm'] for one in own]):.3g}"
        assert "p achieved" not in row
    assert section.text.startswith("3 runs of the same model")
    # Two of which the same neurons may move differ in something else.
    assert compared([runs[0], runs[0]]) == []
    share = 100 * np.mean([one["reached"] for one in three])
    assert f"{share:.3g} % were reached where a list of 3 may move (3 did" in section.text


def test_they_are_compared_by_what_was_wanted_and_by_size(runs: list[Run], section: Section) -> None:
    shown = titled(section, "By what was wanted")
    assert [(row["wanted"], row["neurons"]) for row in shown] == [
        (wanted, neurons) for wanted in ("0.02", "0.9") for neurons in ("all", "the 6 strongest", "a list of 3")
    ]
    own = [row for row in wishes(runs[0]) if row["wanted"] == 0.9]
    assert shown[4]["p achieved"] == f"{np.median([row['probability'] for row in own]):.4f}"
    assert shown[4]["reached, %"] == f"{100 * np.mean([row['reached'] for row in own]):.1f}"
    sizes = titled(section, "By size of the wish")
    assert sum(int(row["wishes"]) for row in sizes) == 3 * 10
    assert [picture.name for picture in section.pictures] == ["neurons-moved-0"]


def test_side_effects_of_the_same_references_stand_beside(runs: list[Run], section: Section) -> None:
    shown = titled(section, "The same wishes with other neurons")
    rows = runs[1].table("control_side_effects").to_table().to_pylist()
    kl = np.quantile([row["kl"] for row in rows if row["method"] == "shift"], (0.25, 0.5, 0.75))
    assert shown[0]["KL on references, nats"] == f"{kl[1]:.2g} ({kl[0]:.2g} to {kl[2]:.2g})"
    assert "change of p at other wordings" not in shown[0]


def saying(run: Run, **settings: Any) -> Run:
    """A run whose measure had other settings."""
    return replace(run, config={**run.config, "measure": {**run.config["measure"], **settings}})


def test_what_differs_in_more_than_its_neurons_is_not_compared(runs: list[Run]) -> None:
    other = saying(runs[0], tolerance=0.02)
    assert not compared([other, runs[1]])
    assert not compared(runs[:1])
    # All in one: the page has one comparison before the sections of its runs.
    titles = [own.title for own in sections_of(Loaded([runs[0], other, runs[1]]))]
    assert titles[1] == "Control, by number of neurons"
    assert len(titles) == 5
    # References are not the same, so that what they say is not compared.
    with_others = saying(runs[0], references=REFERENCES)
    assert all(np.isnan(own.kl_w).all() for own in compared([with_others, runs[1]])[0])


def test_runs_without_wishes_in_common_are_not_compared(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = comparison._kept
    names = iter(["probability", "margin"])

    def of_another_kind(run: Run) -> pa.Table:
        table = kept(run)
        return table.set_column(table.column_names.index("kind"), "kind", pa.array([next(names)] * len(table)))

    monkeypatch.setattr(comparison, "_kept", of_another_kind)
    assert not compared(runs[:2])


def test_of_very_many_wishes_the_same_ones_are_drawn(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "MOST", 5)
    (group,) = compared(runs[:2])
    names = [own.table.select(["prompt_id", "wanted"]).to_pylist() for own in group]
    assert names[0] == names[1]
    assert len(names[0]) == 5


@pytest.mark.usefixtures("rendered")
def test_the_figure_can_be_of_one_number_of_neurons() -> None:
    one = [Quartiles(1.0, 1.0, 1.0)]
    found = control_figures.ByNeurons([1.0], {"0 to 1 nats": np.array([0.0])}, one, one, {0.5: one})
    assert set(drawn(control_figures.by_neurons(found), (5, 3))) == {"light", "dark"}

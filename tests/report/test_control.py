"""What a report shows of targets that were steered: numbers by hand, and sections against the tables of runs."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.report import write_report
from neg_service.config import DatasetConfig, ModelConfig, NeuronsConfig, ScanConfig, StorageConfig
from neg_service.report import control_figures
from neg_service.report.console import describe_tables
from neg_service.report.page import Section
from neg_service.report.sections import control as sections
from neg_service.report.sections import sections_of, side_effects
from neg_service.report.sections.loading import Loaded
from neg_service.report.wishes import BY_SIZE, Carried, Quartiles, by_size, carried, met_in, moved, off, to_go
from neg_service.storage.reader import Run
from tests.here import scan_here
from tests.mixtures import tiny_mixture
from tests.report.runs import REFERENCES, grid_of, only_section, run_of, titled

MEASURE = {"name": "control", "probability": [0.02, 0.3, 0.9], "max_passes": 4, "references": REFERENCES}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("control")


@pytest.fixture(scope="module")
def run(place: Path, tiny_directory: Path) -> Run:
    """Five prompts, of which some wishes are not reached in so few passes, and some need no shift."""
    return run_of(place, tiny_directory, MEASURE)


@pytest.fixture(scope="module")
def section(run: Run) -> Section:
    return only_section(run)


def shown_value(number: float) -> str:
    return f"{number:.4f}" if abs(number) >= 1e-3 or number == 0 else f"{number:.1e}"


def by_hand() -> pa.Table:
    """Four wishes.

    From 0.5 to 0.6: ln 1.5 = 0.41 nats. From 0.01 to 0.5: ln 99 = 4.60 nats, which a shift brings to 0.4 and no
    further, by ln(99 / 1.5) = 4.19. From 0.5 to 0.1, ln 9 = 2.20 nats down. And 3 nats of a margin, from -4 to -1.
    """
    return pa.table(
        {
            "prompt_id": ["a", "b", "c", "d"],
            "kind": ["probability", "probability", "probability", "margin"],
            "wanted": [0.6, 0.5, 0.1, -1.0],
            "value_before": [0.5, 0.01, 0.5, -4.0],
            "probability_before": [0.5, 0.01, 0.5, 0.25],
            "probability": [0.6, 0.4, 0.1, 0.25],
            "first_shot": [0.58, 0.1, 0.2, -2.0],
            "achieved": [0.6, 0.4, 0.1, -1.0],
            "predicted_by_neg": [0.65, 0.03, -0.1, 0.25],
            "predicted_by_log_odds": [0.6, 0.2, 0.14, 0.25],
            "passes": [2, 15, 4, 3],
            "relative_norm": [0.001, 0.04, 0.01, 0.02],
            "reached": [True, False, True, True],
            "reason": ["", "saturates", "", "already there"],
        }
    )


def test_numbers_of_wishes_are_those_by_hand() -> None:
    table = by_hand()
    np.testing.assert_allclose(to_go(table), [math.log(1.5), math.log(99), math.log(9), 3.0])
    np.testing.assert_allclose(moved(table), [math.log(1.5), math.log(66), -math.log(9), 0.0], atol=1e-12)
    # Between 0.5 and 0.6, of margins the difference, and of the top what is lacking.
    assert off("probability", 0.5, 0.6) == pytest.approx(math.log(1.5))
    assert [off("margin", 2.0, -1.5), off("top", 0.0, -0.5), off("top", 0.0, 0.3)] == [3.5, 0.5, 0.0]
    rows = [dict(zip(BY_SIZE, row, strict=True)) for row in by_size(table)]
    # Of 0.41, 2.20 and 4.60 nats; a margin is no probability.
    assert [(row["nats to go"], row["wishes"], row["reached"]) for row in rows] == [
        ("0 to 1", "1", "100 %"), ("1 to 3", "1", "100 %"), ("3 to 6", "1", "0 %"),
    ]  # fmt: skip
    assert [row["first shot off"] for row in rows] == ["0.0200", "0.1000", "0.4000"]
    assert [row["achieved off"] for row in rows] == ["0.0000", "0.0000", "0.1000"]
    assert [row["NEG's prediction off"] for row in rows] == ["0.0500", "0.2000", "0.3700"]
    assert [row["log-odds' prediction off"] for row in rows] == ["0.0000", "0.0400", "0.2000"]
    assert [row["passes"] for row in rows] == ["2", "4", "15"]
    assert [row["of ‖a‖"] for row in rows] == ["0.10 %", "1.00 %", "4.00 %"]
    assert by_size(table.slice(3)) == []


def test_predictions_carry_as_far_as_the_share_of_the_change_that_they_say() -> None:
    found = carried(by_hand())
    # What moved nothing is left out; -0.6 of -0.4, 0.15 of 0.1, 0.02 of 0.39, and -0.36, 0.1 and 0.19 of the same.
    assert [(own.low, own.high, own.n) for own in found] == [(-3, -1, 1), (0, 1, 1), (3, 6, 1)]
    np.testing.assert_allclose([own.by_neg.median for own in found], [1.5, 1.5, 0.02 / 0.39])
    np.testing.assert_allclose([own.by_log_odds.median for own in found], [0.9, 1.0, 0.19 / 0.39])
    twice = carried(pa.concat_tables([by_hand(), by_hand().slice(0, 1).set_column(
        by_hand().column_names.index("predicted_by_neg"), "predicted_by_neg", pa.array([0.55])
    )]))  # fmt: skip
    # 0.5 and 1.5 of the change: quartiles lie a quarter of the way between.
    np.testing.assert_allclose(twice[1].by_neg, [0.75, 1.0, 1.25])


def test_what_was_met_is_counted_over_parts() -> None:
    met = met_in(by_hand().to_batches(max_chunksize=1))
    assert str(met) == "reached 3 of 4, in a median of 3.5 passes"
    assert (met.n_there, dict(met.reasons)) == (1, {"saturates": 1})
    assert str(met_in(by_hand().slice(0, 3).to_batches())) == "reached 2 of 3, in a median of 4 passes"
    assert str(met_in([])) == "nothing was asked for"


def test_the_section_says_what_the_tables_say(run: Run, section: Section) -> None:
    table = run.table("control").to_table()
    rows = table.to_pylist()
    unmet = [row for row in rows if not row["reached"]]
    assert 0 < len(unmet) < len(rows) == 15
    passes = np.median([row["passes"] for row in rows])
    assert section.text.startswith(f"Reached {15 - len(unmet)} of 15, in a median of {passes:g} passes; ")
    n_there = [row["norm"] for row in rows].count(0.0)
    assert n_there > 0
    assert f"{n_there} of them needed no shift. A shift moves 120 neurons" in section.text
    assert [tuple(row.values()) for row in titled(section, "What it took, by size of the wish")] == by_size(table)
    # From about 0.01 to 0.9 NEG tells a small part; that part is said.
    last = carried(table)[-1]
    assert last.low >= 3
    share = f"{100 * last.by_neg.median:.2g} %"
    assert last.by_neg.median < 0.1
    assert f"NEG predicts {share} of the change of probability" in section.text
    shown = titled(section, "How far predictions carry")
    assert sum(int(row["shifts"]) for row in shown) == sum(row["norm"] > 0 for row in rows)
    texts = {row["prompt_id"]: row["prompt"] for row in run.table("prompts").to_table().to_pylist()}
    assert [tuple(row.values()) for row in grid_of(section, "wishes")] == [
        (
            texts[row["prompt_id"]], row["target"], shown_value(row["value_before"]), f"{row['wanted']:g}",
            shown_value(row["first_shot"]), shown_value(row["achieved"]), "yes" if row["reached"] else "no",
            row["reason"],
            str(row["passes"]), f"{100 * row['relative_norm']:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    (each,) = [grid for grid in section.grids if grid.title == "Each wish"]
    reasons = Counter(row["reason"] for row in unmet)
    assert f"Not reached: {len(unmet)}; " in each.caption
    assert all(f"{reason}: {count}" in each.caption for reason, count in reasons.items())
    assert not [grid for grid in section.grids if grid.name.startswith("written")]
    names = ["wanted-0", "effort-0", "predictions-0", "effects-0"]
    assert [picture.name for picture in section.pictures] == names


def test_neurons_that_are_moved_most_stand_once_wish_by_wish(run: Run, section: Section) -> None:
    shifts = run.table("control_shift").to_table().to_pylist()
    shown = grid_of(section, "moved")
    texts = {row["prompt_id"]: row["prompt"] for row in run.table("prompts").to_table().to_pylist()}
    place = 0
    for wish in run.table("control").to_table().to_pylist():
        key = ("prompt_id", "target", "wish")
        own = [row for row in shifts if all(row[name] == wish[name] for name in key)]
        best = sorted(own, key=lambda row: -abs(row["shift"]))[:5]
        assert len(best) == (5 if wish["norm"] else 0)
        assert [tuple(row.values()) for row in shown[place : place + len(best)]] == [
            (
                texts[wish["prompt_id"]], wish["target"], f"{wish['wanted']:g}", str(row["layer"]), str(row["neuron"]),
                f"{row['shift']:+.4f}", f"{row['activation']:+.4f}",
            )
            for row in best
        ]  # fmt: skip
        place += len(best)
    assert len(shown) == place


def test_side_effects_stand_beside_their_baselines_with_intervals(run: Run, section: Section) -> None:
    rows = run.table("control_side_effects").to_table().to_pylist()
    each = grid_of(section, "effects-each")
    assert len(each) == len(rows) == 3 * 15
    for shown, row in zip(each, rows, strict=True):
        assert (shown["target"], shown["method"], shown["n"]) == (row["target"], row["method"], "3")
        assert shown["target's p where steered"] == f"{row['steered_probability']:.4f}"
        assert shown["KL, nats"] == f"{row['kl']:.2g} ({row['kl_low']:.2g} to {row['kl_high']:.2g})"
        assert shown["top answer stays, %"].startswith(f"{100 * row['same_top']:.0f} (")
    summary = grid_of(section, "effects-0")
    assert [row["method"] for row in summary] == ["shift", "logit constant", "random neurons"]
    for shown in summary:
        own = [row for row in rows if row["method"] == shown["method"]]
        low, median, high = np.quantile([row["kl"] for row in own], (0.25, 0.5, 0.75))
        assert shown["KL, nats"] == f"{median:.2g} ({low:.2g} to {high:.2g})"
        change = np.median([row["steered_probability"] - row["steered_probability_before"] for row in own])
        assert shown["target's p where steered, change"].startswith(f"{change:+.3f} (")


def test_wishes_of_every_kind_are_shown_also_without_references(place: Path, tiny_directory: Path) -> None:
    wishes: list[Any] = [0.03, "top", {"margin": -1.0, "against": " w20"}, None]
    rows = [
        {"prompt": f"w{i} w{i + 9}", "targets": [" w7", " w8"], "answer": " w8", "id": f"p{i}", "wanted": wanted}
        for i, wanted in enumerate(wishes)
    ]
    file = place / "wishes.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    run = scan_here(
        ScanConfig(
            model=ModelConfig(source=str(tiny_directory)),
            dataset=DatasetConfig(source=str(file)),
            measure={"name": "control", "probability": 0.1, "keep_shift": "all", "write": 3},
            neurons=NeuronsConfig(choose="top", count=7),
            storage=StorageConfig(uri=str(place / "runs")),
        )
    )
    section = only_section(run)
    names = ["wanted-0", "wanted-margin-0", "effort-0", "predictions-0"]
    assert [picture.name for picture in section.pictures] == names
    assert "A shift moves 7 neurons" in section.text
    asked = dict.fromkeys(row["wanted"] for row in grid_of(section, "moved"))
    assert list(asked) == ["0.03", "top", "-1 nats above ' w20'", "0.1"]
    assert not [grid for grid in section.grids if "effects" in grid.name]
    written = ("text_before", "text", "text_everywhere")
    texts = [tuple(repr(row[name]) for name in written) for row in run.table("control").to_table().to_pylist()]
    assert len({text for row in texts for text in row}) > 1
    assert [tuple(row.values())[3:] for row in grid_of(section, "written")] == texts


def test_many_wishes_are_counted_and_of_few_it_is_shown_what_they_are(
    run: Run, section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, value in (
        (sections, "_SAMPLED", 9), (sections, "_POINTS", 4), (sections, "_NAMED", 3), (side_effects, "_SAMPLED", 12),
        (side_effects, "_LISTED", 5),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    few = only_section(run)
    assert few.text.partition(";")[0] == section.text.partition(";")[0]
    sizes = titled(few, "What it took, by size of the wish")
    assert sum(int(row["wishes"]) for row in sizes) == 9
    captions = {grid.title: grid.caption for grid in few.grids}
    assert captions["What it took, by size of the wish"].endswith("Of 9 of the 15 wishes, drawn at random.")
    assert captions["The wishes that are furthest off"].endswith(
        " 3 of 15: those that were not reached, and those furthest off in nats, first."
    )
    assert captions["Side effects, by method"].endswith("Of 12 of 45 rows, drawn at random.")
    rows = run.table("control").to_table().to_pylist()
    distance = [abs(math.log(p / (1 - p) * (1 - q) / q)) for p, q in ((row["achieved"], row["wanted"]) for row in rows)]
    order = sorted(range(15), key=lambda place: (rows[place]["reached"], -distance[place]))
    assert [row["achieved"] for row in grid_of(few, "wishes")] == [
        shown_value(rows[own]["achieved"]) for own in order[:3]
    ]
    assert {row["prompt"] for row in grid_of(few, "moved")} == {"w20 <b>w21</b>"}
    assert len(grid_of(few, "effects-each")) == 5


def test_of_experts_it_is_said_whose_neuron_is_moved(place: Path) -> None:
    model = tiny_mixture("DeepSeek 3")
    for part in (model.model, model.tokenizer):
        part.save_pretrained(place / "mixture")
    run = run_of(place, place / "mixture", {"name": "control", "probability": 0.02, "max_passes": 2})
    shown = grid_of(only_section(run), "moved")
    rows = run.table("control_shift").to_table().to_pylist()
    first = [row for row in rows if row["prompt_id"] == "p20" and row["rank"] < 5]
    assert [(row["layer"], row["expert"], row["neuron"]) for row in shown[:5]] == [
        (str(row["layer"]), "-" if row["expert"] is None else str(row["expert"]), str(row["neuron"]))
        for row in sorted(first, key=lambda row: row["rank"])
    ]


def test_the_console_says_how_many_wishes_were_reached(run: Run) -> None:
    told = dict(describe_tables(run))
    assert told["rows"] == "15 in table control"
    assert told["wishes"] == str(met_in(run.table("control").to_batches()))
    n_shifts = run.table("control_shift").count_rows()
    assert told["values"] == f"{n_shifts} of shift, units of activation"


def test_what_was_run_says_what_was_wanted(run: Run) -> None:
    (grid,) = [grid for grid in sections_of(Loaded([run]))[0].grids if grid.title == "Runs"]
    settings = grid.rows[0][grid.head.index("settings")]
    assert "max_passes 4" in settings
    assert settings.endswith("probability 0.02, 0.3, 0.9, 3 references")


def test_a_page_of_such_a_run(run: Run, tmp_path: Path) -> None:
    page = Path(write_report([run.uri], str(tmp_path), None)).read_text()
    assert page.count("<h2>") == 2
    for name in ("wanted-0", "effort-0", "predictions-0", "effects-0"):
        assert f'id="figure-{name}"' in page
        assert (tmp_path / "figures" / f"{name}-dark.png").exists()


@pytest.mark.usefixtures("rendered")
def test_figures_can_be_of_a_single_wish_and_of_what_is_far_off() -> None:
    from neg_service.report.figures import drawn

    one, reached = np.array([0.5]), np.array([False])
    found = control_figures.Found(np.array([-1.0]), np.array([np.nan]), np.array([30.0]), reached, "nats above others")
    bins = [Carried(10.0, math.inf, 1, Quartiles(-90.0, 5.0, 1e6), Quartiles(1.0, 1.0, 1.0))]
    for draw in (
        control_figures.first_and_achieved(found),
        control_figures.effort(one, one, np.array([0.0]), reached),
        control_figures.predictions(np.array([[0.5], [0.5]]), {"NEG": np.array([-700.0])}, bins),
        control_figures.effects({"shift": (one, np.array([0.0]))}, 1e-10),
        control_figures.carried_over({"shift": (one, np.array([0.0]))}),
    ):
        assert set(drawn(draw, (4, 2))) == {"light", "dark"}

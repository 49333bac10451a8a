"""What a study of skill neurons found, as sections of a page: how well a few do a task, which ones, and analyses."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from neg_service.report import figures
from neg_service.report.cells import percent, short
from neg_service.report.figures import drawn, themed
from neg_service.report.page import Grid, Picture, Section
from neg_service.report.sections.loading import StudyView
from neg_service.storage.studies import StudyResults
from neg_service.studies.skills.plots import plots
from neg_service.studies.tables import Row

_SHOWN_RANKS = 20
# Plots by the begin of their file's name: title, and a sentence that says what they show.
_ANALYSES = {
    "accuracy_by_neurons": (
        "Accuracy by number of neurons",
        "Accuracy on test, 0 to 1, over how many of the best neurons a probe asks; circles mark the number chosen on "
        "valid, bands hold 95 % of bootstrap draws, dashed lines are baselines without neurons.",
    ),
    "efficiency": ("Efficiency", "Accuracy on test, 0 to 1, over how many train prompts the ranking was made of."),
    "flexibility": ("Flexibility", "Accuracy on test, 0 to 1, of blocks of neurons further down the ranking."),
    "robustness": ("Robustness", "Accuracy on test, 0 to 1, of neurons found with one template and used with another."),
    "interdependency": (
        "Interdependency",
        "The model's own accuracy on test, 0 to 1, on one task (rows) while skill neurons of another (columns) are "
        "suppressed.",
    ),
}  # fmt: skip
# Those that are one matrix, without a panel for each task.
_MATRICES = ("robustness", "interdependency")


def skills_sections(study: StudyResults) -> list[Section]:
    """The sections of a study, from its tables."""
    tables = study.tables
    made = [_accuracy(study.name, tables)]
    if "neurons" in tables and tables["neurons"].num_rows:
        made.append(Section("which-neurons", "Which neurons", "", [neurons_grid(tables["neurons"]), *_overlap(tables)]))
    return [*made, _analyses(tables)]


# There can be dozens of runs, and what they say is in the study's own tables.
SKILLS_VIEW = StudyView("probe", skills_sections, shows_run=lambda purpose: False)


def _accuracy(name: str, tables: Mapping[str, pa.Table]) -> Section:
    rows = [row for row in tables["accuracy"].to_pylist() if row["split"] == "test" and row["is_chosen"]]
    head = ("genre", "task", "probe", "neurons", "accuracy, %", "95 % interval")
    lines = [
        (
            row["genre"] or "-", row["task"] or "-", row["probe"], str(row.get("n_neurons") or "-"),
            percent(row["accuracy"]), _from_to(row),
        )
        for row in rows
    ]  # fmt: skip
    caption = "The number of neurons is chosen on the validation split."
    grid = Grid("Accuracy on test", caption, head, lines, (3, 4), is_interactive=True, name="skill-accuracies")
    picture = Picture(
        "skill-accuracy", "Probes and baselines", "Accuracy on test of each probe and baseline, task by task.",
        "Bars of accuracy for each probe, in a group for each task",
        drawn(figures.accuracies(rows), (max(9, 1.4 * len({row["task"] for row in rows})), 4.4)), is_wide=True,
    )  # fmt: skip
    text = f"From {name}: how well a few neurons do a task without the model's head."
    return Section("skills", "Skill neurons", text, [grid], [picture])


def neurons_grid(table: pa.Table) -> Grid:
    """The best neurons of each task and score."""
    best = table.filter(pc.field("rank") < _SHOWN_RANKS).to_pylist()
    head = [
        key for key in ("task", "score_name", "n_train", "rank", "layer", "expert", "neuron", "polarity", "score")
        if key in best[0]
    ]  # fmt: skip
    return Grid(
        "Skill neurons",
        f"The {_SHOWN_RANKS} best neurons of each task and score, which says how often the right label was ahead.",
        [key.replace("_", " ") for key in head],
        [tuple("-" if row[key] is None else short(row[key]) for key in head) for row in best],
        numeric=[i for i, key in enumerate(head) if key not in ("task", "score_name")],
        is_interactive=True,
        name="skill-neurons",
    )


def _overlap(tables: Mapping[str, pa.Table]) -> list[Grid]:
    if "overlap" not in tables or not tables["overlap"].num_rows:
        return []
    head = ("score", "neurons", "task", "other task", "shared", "by chance")
    rows = [
        (
            row["score_name"], str(row["n_neurons"]), row["task"], row["other_task"], str(row["shared"]),
            f"{row['by_chance']:.2g}",
        )
        for row in tables["overlap"].to_pylist()
        if row["task"] < row["other_task"]
    ]  # fmt: skip
    caption = "How many of the best neurons two tasks have in common, and how many two random choices would."
    return [
        Grid("Overlap", caption, head, rows, (1, 4, 5), is_interactive=True, name="skill-overlap")
    ]  # fmt: skip


def _analyses(tables: Mapping[str, pa.Table]) -> Section:
    pictures = []
    for file, images in themed(lambda: plots(tables)).items():
        stem = file.removesuffix(".png")
        analysis = next(name for name in _ANALYSES if stem.startswith(name))
        title, caption = _ANALYSES[analysis]
        task = stem.removeprefix(analysis).strip("_")
        named = f"{title}: {task}" if task else title
        pictures.append(
            Picture(
                f"skill-{stem.replace('_', '-')}", named, caption, f"Plots: {named}", images, analysis not in _MATRICES
            )
        )
    return Section("skill-studies", "How few, how early, how alone", "", [], pictures)


def _from_to(row: Row) -> str:
    low, high = row.get("low"), row.get("high")
    return "-" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"

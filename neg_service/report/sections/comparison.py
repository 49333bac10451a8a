"""Runs of `control` that differ in which neurons may move alone: how much was reached with how many, at what price."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neg_service.report import control_figures
from neg_service.report.comparison import MOST, Moving, compared, of_sizes, of_wanted
from neg_service.report.figures import drawn
from neg_service.report.page import Grid, Picture, Section
from neg_service.report.wishes import Quartiles, sizes_text
from neg_service.storage.reader import Run

# Of more different wanted probabilities there is no table, and of more than these no lines.
_MOST_WANTED, _MOST_LINES = 12, 5


def comparison_sections(runs: Sequence[Run]) -> list[Section]:
    """One for each group of such runs."""
    groups = compared(runs)
    sections = []
    for number, own in enumerate(groups):
        grids = [_of_all(own), *_by_wanted(own, number), _by_size(own, number)]
        title = "Control, by number of neurons" + f" ({number + 1})" * (len(groups) > 1)
        sections.append(Section(f"neurons-moved-{number}", title, _text(own), grids, [_picture(own, number)]))
    return sections


def _text(movings: Sequence[Moving]) -> str:
    n = len(movings[0].table)
    drawn_from = f", {n} with the smallest hashes of more" * (n >= MOST)
    said = []
    for own in movings:
        all_of = own.medians(np.ones(n, np.bool_))
        said.append(
            f"{100 * all_of['reached']:.3g} % were reached where {own.neurons} may move ({own.n_moved:g} did, by "
            f"{100 * all_of['relative_norm']:.2g} % of the norm of activations)"
        )
    return (
        f"{len(movings)} runs of the same model, prompts and settings, which differ in which neurons may move. What is "
        f"compared are the {n} wishes that all of them have{drawn_from}; numbers are medians over wishes, whether they "
        f"were reached or not. Of the wishes {'; '.join(said)}."
    )


def _of_all(movings: Sequence[Moving]) -> Grid:
    head = [
        "neurons that may move", "moved", "wishes", "reached, %", "passes", "first shot off", "achieved off",
        "‖shift‖", "of ‖a‖, %",
    ]  # fmt: skip
    is_all_w = np.ones(len(movings[0].table), np.bool_)
    rows = []
    for own in movings:
        of = own.medians(is_all_w)
        rows.append(
            [
                own.neurons, f"{own.n_moved:g}", str(len(is_all_w)), f"{100 * of['reached']:.1f}",
                _middle(own.quartiles("passes"), "{:g}"),
                f"{of['first_off']:.4f}", f"{of['off']:.4f}", f"{of['norm']:.3g}",
                _middle(own.quartiles("relative_norm").scaled(100), "{:.2f}"),
            ]
        )  # fmt: skip
    for name, values, form in (
        # Of one wanted probability; of several there is a table.
        ("p achieved", [own.column("probability") for own in movings] * (len(of_wanted(movings)) < 2), "{:.4f}"),
        ("KL on references, nats", [own.kl_w for own in movings], "{:.2g}"),
        ("change of p at other wordings", [own.worded_w for own in movings], "{:+.3f}"),
    ):
        if any(np.isfinite(own_w).any() for own_w in values):
            head.append(name)
            for row, own_w in zip(rows, values, strict=True):
                known = own_w[np.isfinite(own_w)]
                row.append(_middle(Quartiles.of(known), form) if len(known) else "-")
    caption = (
        "In brackets the values between which the middle half is. What is off is a difference from what was wanted, a "
        "probability, or nats of a margin. Fewer neurons need longer shifts, and some wishes are beyond them."
    )
    return Grid("The same wishes with other neurons", caption, head, rows, range(1, len(head)))


def _by_wanted(movings: Sequence[Moving], number: int) -> list[Grid]:
    levels = of_wanted(movings)
    if not 1 < len(levels) <= _MOST_WANTED:
        return []
    head = ("wanted", "neurons", "wishes", "p before", "reached, %", "p achieved", "passes", "of ‖a‖, %")
    rows = []
    for wanted, is_own_w in levels:
        for own in movings:
            of = own.medians(is_own_w)
            rows.append(
                (
                    f"{wanted:g}", own.neurons, str(int(is_own_w.sum())), f"{of['before']:.4f}",
                    f"{100 * of['reached']:.1f}", f"{of['probability']:.4f}", f"{of['passes']:g}",
                    f"{100 * of['relative_norm']:.2f}",
                )
            )  # fmt: skip
    caption = "Medians over the wishes for a probability."
    return [
        Grid(
            "By what was wanted", caption, head, rows, (0, *range(2, len(head))), is_interactive=True,
            name=f"neurons-wanted-{number}",
        )
    ]  # fmt: skip


def _by_size(movings: Sequence[Moving], number: int) -> Grid:
    head = ("nats to go", "neurons", "wishes", "reached, %", "first shot off", "achieved off", "passes", "of ‖a‖, %")
    rows = []
    for low, high, is_own_w in of_sizes(movings):
        for own in movings:
            of = own.medians(is_own_w)
            rows.append(
                (
                    sizes_text(low, high), own.neurons, str(int(is_own_w.sum())), f"{100 * of['reached']:.1f}",
                    f"{of['first_off']:.4f}", f"{of['off']:.4f}", f"{of['passes']:g}",
                    f"{100 * of['relative_norm']:.2f}",
                )
            )  # fmt: skip
    return Grid(
        "By size of the wish",
        "Wishes by how far their target was from what was wanted, in nats of log-odds or of a margin; medians.",
        head, rows, range(2, len(head)), is_interactive=True, name=f"neurons-size-{number}",
    )  # fmt: skip


def _picture(movings: Sequence[Moving], number: int) -> Picture:
    reached = {
        f"{sizes_text(low, high)} nats": np.array([100 * own.medians(is_own_w)["reached"] for own in movings])
        for low, high, is_own_w in of_sizes(movings)
    }
    levels = of_wanted(movings)
    few = levels[:: -(-len(levels) // _MOST_LINES)] if levels else []
    achieved = {
        wanted: [Quartiles.of(own.column("probability")[is_own_w]) for own in movings] for wanted, is_own_w in few
    }
    found = control_figures.ByNeurons(
        # On a logarithmic axis, also where no wish needed a shift.
        n_moved=[max(1.0, own.n_moved) for own in movings],
        reached=reached,
        passes=[own.quartiles("passes") for own in movings],
        share=[own.quartiles("relative_norm").scaled(100) for own in movings],
        achieved=achieved,
    )
    return Picture(
        f"neurons-moved-{number}", "What more neurons buy",
        "Against how many neurons a shift moves: the share of wishes that were reached, by how far they were; the "
        "probability that was achieved, dashed where it was wanted; passes; and the norm of shifts over that of all "
        "activations. Medians with the middle half.",
        "Lines over the number of neurons: reached share, achieved probability, passes and the norm of shifts",
        drawn(control_figures.by_neurons(found), (9.6, 6.6)), is_wide=True,
    )  # fmt: skip


def _middle(own: Quartiles, form: str) -> str:
    """A median with the values between which the middle half is."""
    return f"{form.format(own.median)} ({form.format(own.low)} to {form.format(own.high)})"

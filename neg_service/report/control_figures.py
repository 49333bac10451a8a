"""The figures of runs with the measure `control`, drawn as those of `figures.py` are.

Axes: W wishes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from neg_service.report.figures import Draw, Theme
from neg_service.report.wishes import Carried, Doubles, Quartiles

Flags = NDArray[np.bool_]

# Points of the same place are spread over so much of the axis, and predictions that are far off stand at its ends: so
# much past what shifts gave, and at these shares in percent.
_SPREAD, _PAST, _MOST_SHARE = 0.03, 0.25, 300.0
# Wished for in so many ways at most, they stand in columns.
_FEW = 12


@dataclass(frozen=True)
class Found:
    """What was wanted and found, all in the unit that `label` says [W]."""

    wanted_w: Doubles
    first_w: Doubles
    achieved_w: Doubles
    is_reached_w: Flags
    label: str

    @property
    def is_of_probabilities(self) -> bool:
        """Whether all are between 0 and 1."""
        return self.label == "probability"


def first_and_achieved(found: Found) -> Draw:
    """Two panels: what the first shot gave, and what was achieved, against what was wanted."""
    along, extent = (0.0, 1.0), (0.0, 1.0)
    if not found.is_of_probabilities:
        # Of first shots of margins few are farther off than all others.
        far = np.nanquantile(found.first_w, (0.02, 0.98)) if np.isfinite(found.first_w).any() else found.wanted_w
        along, extent = _extent(found.wanted_w), _extent(np.r_[found.wanted_w, found.achieved_w, far])
    wanted_w, spread = found.wanted_w, _SPREAD * (along[1] - along[0])
    levels = np.unique(wanted_w)
    if len(levels) <= _FEW:
        wanted_w = wanted_w + _draws(len(wanted_w)) * spread

    def draw(figure: Figure, theme: Theme) -> None:
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, own_w, title in zip(
            panels, (found.first_w, found.achieved_w), ("first shot", "achieved"), strict=True
        ):
            if len(levels) <= _FEW:
                axes.hlines(
                    levels, levels - 1.6 * spread, levels + 1.6 * spread, color=theme.faint, linewidth=2, zorder=0
                )
            else:
                axes.plot(along, along, color=theme.faint, zorder=0)
            for is_own, name, colour, marker in _reached(found.is_reached_w, theme):
                value_w = np.clip(own_w[is_own], *extent)
                axes.plot(wanted_w[is_own], value_w, marker, markersize=6, alpha=0.6, color=colour, label=name)
            axes.set_title(title, fontsize=10.5)
            axes.set_xlabel(f"wanted, {found.label}")
        for (low, high), limit in ((along, panels[0].set_xlim), (extent, panels[0].set_ylim)):
            limit(low - 0.02 * (high - low), high + 0.02 * (high - low))
        panels[0].set_ylabel(found.label)
        _legend(figure, panels[0])

    return draw


def effort(to_go_w: Doubles, passes_w: Doubles, share_w: Doubles, is_reached_w: Flags) -> Draw:
    """Passes, and the shift's norm over that of activations, by how far it was in nats."""

    def draw(figure: Figure, theme: Theme) -> None:
        left, right = figure.subplots(1, 2)
        # Whole numbers lie upon each other.
        spread_w = passes_w + _draws(len(passes_w)) * 0.35
        has_shift = share_w > 0
        for is_own, name, colour, marker in _reached(is_reached_w, theme):
            left.plot(to_go_w[is_own], spread_w[is_own], marker, markersize=6, alpha=0.6, color=colour, label=name)
            own = is_own & has_shift
            right.plot(to_go_w[own], 100 * share_w[own], marker, markersize=6, alpha=0.6, color=colour)
        left.set_ylabel("passes")
        left.set_ylim(bottom=-0.4)
        left.yaxis.set_major_locator(MaxNLocator(integer=True))
        right.set_yscale("log")
        right.set_ylabel("‖shift‖ over ‖activations‖, %")
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axes in (left, right):
            axes.set_xlabel("to go, nats")
            axes.set_xlim(left=0)
        _legend(figure, left)

    return draw


def predictions(before_after_2w: Doubles, predicted: Mapping[str, Doubles], bins: Sequence[Carried]) -> Draw:
    """Left: predicted against given change of probability. Right: the share of it that is predicted, by nats given."""
    gave_w = before_after_2w[1] - before_after_2w[0]

    def draw(figure: Figure, theme: Theme) -> None:
        left, right = figure.subplots(1, 2)
        left.plot([-1, 1], [-1, 1], color=theme.faint, zorder=0)
        low, high = float(min(0, gave_w.min(initial=0))), float(max(0, gave_w.max(initial=0)))
        past = _PAST * max(high - low, 1e-6)
        ends = (low - past, high + past)
        for (name, predicted_w), colour in zip(predicted.items(), theme.cycle, strict=False):
            change_w = np.clip(predicted_w - before_after_2w[0], *ends)
            left.plot(gave_w, change_w, ".", markersize=6, alpha=0.6, color=colour, label=name)
        left.set_xlabel("change of probability that the shift gave")
        left.set_ylabel("predicted change")
        room = 0.02 * (ends[1] - ends[0])
        left.set_xlim(low - 2 * room, high + 2 * room)
        left.set_ylim(ends[0] - room, ends[1] + room)
        _shares(right, theme, bins)
        _legend(figure, left)

    return draw


def _shares(axes: Axes, theme: Theme, bins: Sequence[Carried]) -> None:
    """Medians with the middle half, in the order of bins."""
    axes.axhline(100, color=theme.ink, linewidth=0.8, zorder=1)
    places = np.arange(len(bins))
    for number, (key, colour) in enumerate(zip(("by_neg", "by_log_odds"), theme.cycle, strict=False)):
        own_b3 = 100 * np.array([getattr(own, key) for own in bins]).reshape(-1, 3)
        own_b3 = np.clip(own_b3, -_MOST_SHARE, _MOST_SHARE)
        sides = np.abs(own_b3[:, [0, 2]] - own_b3[:, [1]]).T
        axes.errorbar(
            places + 0.16 * (2 * number - 1), own_b3[:, 1], sides, fmt="o", markersize=5, capsize=3, color=colour
        )
    axes.set_xticks(places, [_between(own.low, own.high) for own in bins], fontsize=8)
    axes.set_xlim(-0.6, len(bins) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("the shift moved log-odds by, nats")
    axes.set_ylabel("predicted share of the change, %")


def effects(points: Mapping[str, tuple[Doubles, Doubles]], least: float) -> Draw:
    """KL on references against the change of the target's probability, by method, at least `least`."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        for (name, (change_w, kl_w)), colour, marker in zip(points.items(), theme.cycle, "os^vD*", strict=False):
            axes.plot(
                change_w, np.maximum(kl_w, least), marker, markersize=4.5, alpha=0.6, color=colour, label=name,
                linestyle="none",
            )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel("change of the target's probability where it is steered")
        axes.set_ylabel("KL on references, nats")
        _legend(figure, axes)

    return draw


def carried_over(points: Mapping[str, tuple[Doubles, Doubles]]) -> Draw:
    """Change of the target's probability at other wordings against that where it is steered, by method."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        ends = _extent(np.concatenate([np.r_[own_w, 0.0] for pair in points.values() for own_w in pair]))
        axes.plot(ends, ends, color=theme.faint, zorder=0)
        for (name, (steered_w, worded_w)), colour, marker in zip(points.items(), theme.cycle, "os^vD*", strict=False):
            axes.plot(steered_w, worded_w, marker, markersize=4.5, alpha=0.6, color=colour, label=name)
        axes.set_xlabel("change of the target's probability where it is steered")
        axes.set_ylabel("change at other wordings")
        _legend(figure, axes)

    return draw


@dataclass(frozen=True)
class ByNeurons:
    """Of runs with different numbers of neurons: what the same wishes came to, in the order of `n_moved`.

    reached: percent, by the size of wishes. achieved: probabilities, by what was wanted. share: percent of ‖a‖.
    """

    n_moved: Sequence[float]
    reached: Mapping[str, Doubles]
    passes: Sequence[Quartiles]
    share: Sequence[Quartiles]
    achieved: Mapping[float, Sequence[Quartiles]]


def by_neurons(found: ByNeurons) -> Draw:
    """Four panels against the number of neurons: the reached share, achieved probabilities, passes, norms."""

    def draw(figure: Figure, theme: Theme) -> None:
        panels = figure.subplots(2, 2, sharex=True)
        (reached, achieved), (passes, share) = panels
        for (name, percent), colour in zip(found.reached.items(), theme.cycle, strict=False):
            reached.plot(found.n_moved, percent, "o-", markersize=5, alpha=0.8, color=colour, label=name)
        reached.set_ylabel("reached, %")
        reached.set_ylim(-4, 104)
        reached.legend(fontsize=8.5, title="to go", title_fontsize=8.5)
        for (wanted, own), colour in zip(found.achieved.items(), theme.cycle, strict=False):
            achieved.axhline(wanted, color=colour, linewidth=0.9, linestyle="--", alpha=0.7)
            _with_middle(achieved, found.n_moved, own, colour)
        achieved.set_ylabel("probability achieved")
        achieved.set_ylim(-0.03, 1.03)
        _with_middle(passes, found.n_moved, found.passes, theme.cycle[0])
        passes.set_ylabel("passes")
        passes.set_ylim(bottom=0)
        _with_middle(share, found.n_moved, found.share, theme.cycle[0])
        share.set_yscale("log")
        share.set_ylabel("‖shift‖ over ‖activations‖, %")
        for formatted in (share.yaxis.set_major_formatter, share.yaxis.set_minor_formatter):
            formatted(FuncFormatter(lambda value, _: f"{value:.2g}"))
        share.tick_params(axis="y", which="minor", labelsize=8)
        for axes in panels.flat:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(sorted(set(found.n_moved))))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        for axes in panels[1]:
            axes.set_xlabel("neurons that a shift moves")

    return draw


def _with_middle(axes: Axes, n_moved: Sequence[float], found: Sequence[Quartiles], colour: str) -> None:
    """A line through medians, and the middle half about it."""
    low, median, high = np.array(found).T
    axes.plot(n_moved, median, "o-", markersize=5, color=colour)
    axes.fill_between(n_moved, low, high, color=colour, alpha=0.15, linewidth=0)


def _between(low: float, high: float) -> str:
    if np.isinf(low):
        return f"< {high:g}"
    return f"> {low:g}" if np.isinf(high) else f"{low:g}\nto {high:g}"


def _reached(is_reached_w: Flags, theme: Theme) -> list[tuple[Flags, str, str, str]]:
    """Which wishes there are of either kind, with name, colour and marker."""
    kinds = [(is_reached_w, "reached", theme.cycle[0], "."), (~is_reached_w, "not reached", theme.cycle[1], "x")]
    return [own for own in kinds if own[0].any()]


def _legend(figure: Figure, axes: Axes) -> None:
    # As the points of the legend are to be seen, they are no fainter there.
    handles: list[Any]
    handles, labels = axes.get_legend_handles_labels()
    shown = figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, markerscale=1.6)
    for handle in shown.legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def _extent(values: Doubles) -> tuple[float, float]:
    """The ends of an axis that holds these, with some room."""
    low, high = float(values.min()), float(values.max())
    room = 0.1 * (high - low) or 1.0
    return low - room, high + room


def _draws(n: int) -> Doubles:
    """The same at each drawing, -1 to 1."""
    return np.random.default_rng(0).uniform(-1, 1, n)

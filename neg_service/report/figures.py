"""The figures of a report, drawn with matplotlib, each once for light and once for dark surroundings.

A function draws on the axes that it is given and knows nothing of colours but the theme's.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from neg_service.schema import LINEAR

Doubles = NDArray[np.float64]
Rows = list[dict[str, Any]]

_SIZE = (7.2, 4.2)
_DPI = 130


@dataclass(frozen=True)
class Theme:
    """Colours of a surrounding. cycle: of lines, apart for those who do not tell red from green."""

    paper: str
    ink: str
    faint: str
    cycle: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1d2430", "#c9ced8", ("#1769aa", "#d2691e", "#2a8c6e", "#8e5aa8", "#6b7280", "#b08900"))
DARK = Theme("#151a22", "#e4e8ef", "#3d4655", ("#6cb6ff", "#f2a35e", "#5fd0a8", "#c9a3e6", "#9aa4b5", "#e0c15a"))
THEMES = {"light": LIGHT, "dark": DARK}

Draw = Callable[[Figure, Theme], None]


def drawn(draw: Draw, size: tuple[float, float] = _SIZE) -> dict[str, bytes]:
    """A figure as a PNG for each theme."""
    images = {}
    for name, theme in THEMES.items():
        with mpl.rc_context(_settings(theme)):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, theme)
            image = io.BytesIO()
            figure.savefig(image, format="png")
        images[name] = image.getvalue()
    return images


def themed(make: Callable[[], Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
    """PNGs by name and theme, of a function that draws several in matplotlib's current style."""
    images: dict[str, dict[str, bytes]] = {}
    for theme_name, theme in THEMES.items():
        with mpl.rc_context(_settings(theme)):
            for name, image in make().items():
                images.setdefault(name, {})[theme_name] = image
    return images


def _settings(theme: Theme) -> dict[str, Any]:
    return {
        "figure.facecolor": theme.paper, "axes.facecolor": theme.paper, "savefig.facecolor": theme.paper,
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.faint,
        "xtick.color": theme.ink, "ytick.color": theme.ink, "grid.color": theme.faint, "grid.alpha": 0.6,
        "axes.prop_cycle": cycler(color=theme.cycle), "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "font.size": 10.5, "legend.frameon": False,
        "figure.dpi": _DPI, "savefig.dpi": _DPI,
    }  # fmt: skip


def strength_heat_map(share_lb: Doubles, layers: Sequence[int], edges_b: Doubles, unit: str) -> Draw:
    """Share of a layer's neurons (columns) by half decades of |strength| (rows); layers not measured are grey."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        first, last = min(layers), max(layers)
        shown = np.full((len(edges_b) - 1, last - first + 1), np.nan)
        shown[:, np.array(layers) - first] = np.where(share_lb > 0, share_lb, np.nan).T
        places = np.arange(first, last + 2) - 0.5
        colours = mpl.colormaps["GnBu" if theme is LIGHT else "viridis"]
        smallest = float(np.nanmin(shown)) if np.isfinite(shown).any() else 1e-4
        mesh = axes.pcolormesh(
            places, edges_b, shown, cmap=colours, norm=LogNorm(max(smallest, 1e-5), 1), rasterized=True
        )
        for layer in set(range(first, last + 1)) - set(layers):
            axes.axvspan(layer - 0.5, layer + 0.5, color=theme.faint, linewidth=0)
        axes.set_yscale("log")
        axes.set_xlabel("layer")
        axes.set_ylabel(unit)
        axes.grid(visible=False)
        _layers_along(axes)
        figure.colorbar(mesh, ax=axes, label="share of the layer's neurons")

    return draw


def position_map(total_lt: Doubles, first_layer: int, tokens: Sequence[str], unit: str, n_of_target: int = 0) -> Draw:
    """Sizes by layer (rows, the first at the bottom) and token (columns); what is zero stays blank.

    n_of_target: how many of the last tokens are the target's, behind a line.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        shown = np.where(total_lt > 0, total_lt, np.nan)
        colours = mpl.colormaps["GnBu" if theme is LIGHT else "viridis"]
        if np.isfinite(shown).any():
            most = float(np.nanmax(shown))
            # Six decades say enough.
            norm = LogNorm(max(float(np.nanmin(shown)), most * 1e-6), most * 1.0001)
            places = np.arange(first_layer, first_layer + len(shown) + 1) - 0.5
            mesh = axes.pcolormesh(np.arange(len(tokens) + 1) - 0.5, places, shown, cmap=colours, norm=norm)
            figure.colorbar(mesh, ax=axes, label=unit)
        labels = [_drawable(token.replace(" ", "␣").replace("\n", "⏎"))[:16] for token in tokens]
        if n_of_target:
            axes.axvline(len(tokens) - n_of_target - 0.5, color=theme.ink, linewidth=1.2, linestyle="--")
        axes.set_xticks(range(len(tokens)), labels, rotation=60, ha="right", fontsize=8, parse_math=False)
        axes.set_ylabel("layer")
        axes.grid(visible=False)

    return draw


def scatter_of_estimates(points: Rows, estimators: Sequence[tuple[str, str, str]]) -> Draw:
    """NEG against each estimator (column, name, unit); those whose unit is no slope have axes of their own."""
    neg = np.array([row["neg"] for row in points])

    def draw(figure: Figure, theme: Theme) -> None:
        n_columns = min(3, len(estimators))
        n_rows = -(-len(estimators) // n_columns)
        largest = float(np.abs(neg).max(initial=0)) or 1.0
        for number, (column, name, unit) in enumerate(estimators):
            axes = figure.add_subplot(n_rows, n_columns, number + 1)
            values = np.array([row[column] for row in points])
            is_slope = "a unit" in unit
            axes.plot(values, neg, ".", markersize=2.5, alpha=0.45, color=theme.cycle[0])
            own = float(np.abs(values).max(initial=0)) or 1.0
            for axis, extent, scale in (
                (axes.xaxis, max(own, largest) if is_slope else own, axes.set_xscale),
                (axes.yaxis, largest, axes.set_yscale),
            ):
                scale("symlog", linthresh=extent / 1e4)
                ticks = [10.0 ** np.floor(np.log10(extent)), 10.0 ** (np.floor(np.log10(extent)) - 2)]
                axis.set_major_locator(FixedLocator([-ticks[0], -ticks[1], 0.0, ticks[1], ticks[0]]))
            if is_slope:
                axes.plot([-2 * largest, 2 * largest], [-2 * largest, 2 * largest], color=theme.faint, zorder=0)
            axes.set_title(name, fontsize=10.5)
            axes.set_xlabel(unit, fontsize=8)
            axes.tick_params(labelsize=7.5)
            if number % n_columns == 0:
                axes.set_ylabel("NEG, probability a unit", fontsize=9)

    return draw


def experts_over_layers(panels: Sequence[tuple[str, Mapping[tuple[int, int], float]]]) -> Draw:
    """A panel a quantity, in percent, of each layer (columns) and expert (rows); -1 is what is always on."""

    def draw(figure: Figure, theme: Theme) -> None:
        colours = mpl.colormaps["GnBu" if theme is LIGHT else "viridis"]
        keys = [key for _, percent in panels for key in percent]
        (first, last), (first_expert, last_expert) = ((min(own), max(own)) for own in zip(*keys, strict=True))
        for number, (label, percent) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), number + 1)
            shown = np.full((last_expert - first_expert + 1, last - first + 1), np.nan)
            for (layer, expert), value in percent.items():
                shown[expert - first_expert, layer - first] = value
            axes.set_facecolor(theme.faint)
            mesh = axes.pcolormesh(
                np.arange(first, last + 2) - 0.5, np.arange(first_expert, last_expert + 2) - 0.5, shown,
                cmap=colours, vmin=0, rasterized=True,
            )  # fmt: skip
            axes.set_xlabel("layer")
            axes.set_ylabel("expert")
            axes.grid(visible=False)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            _layers_along(axes)
            figure.colorbar(mesh, ax=axes, label=label)

    return draw


def lines_over_layers(rows: Rows, key: str, names: Mapping[str, str], label: str) -> Draw:
    """A line an estimator over layers, under the name it has; rows have `<key>`, `<key>_low` and `<key>_high`."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        for (estimator, name), colour in zip(names.items(), theme.cycle, strict=False):
            own = sorted((row for row in rows if row["estimator"] == estimator), key=_layer)
            layers = [row["layer"] for row in own]
            low, high = ([row[f"{key}_{end}"] for row in own] for end in ("low", "high"))
            axes.plot(layers, [row[key] for row in own], "-o", markersize=3, label=name, color=colour)
            axes.fill_between(layers, low, high, alpha=0.15, color=colour)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        _layers_along(axes)
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)

    return draw


def linearity_over_ranges(rows: Rows) -> Draw:
    """The share of linear curves by the largest shift: over all layers, and for each layer."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
        for layer in layers:
            own = [row for row in rows if row["layer"] == layer and row["n"]]
            shares = [100 * row["share_linear"] for row in own]
            axes.plot([row["range"] for row in own], shares, color=theme.faint, linewidth=0.8, zorder=1)
        whole = [row for row in rows if row["layer"] is None]
        shares = [100 * row["share_linear"] for row in whole]
        axes.plot([row["range"] for row in whole], shares, "-o", linewidth=2, label="all layers", zorder=2)
        axes.plot([], [], color=theme.faint, label="each layer")
        axes.set_xscale("log")
        axes.set_xticks([row["range"] for row in whole], [f"±{row['range']:g}" for row in whole])
        axes.minorticks_off()
        axes.set_xlabel("largest shift, units of |activation|")
        axes.set_ylabel(f"curves with |r| ≥ {LINEAR}, %")
        axes.set_ylim(top=min(axes.get_ylim()[1], 101))
        axes.legend()

    return draw


def bars_over_layers(counts: Mapping[int, int], label: str) -> Draw:
    """Shares of a whole, a bar a layer."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        total = sum(counts.values()) or 1
        axes.bar(list(counts), [100 * n / total for n in counts.values()], color=theme.cycle[0])
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        _layers_along(axes)

    return draw


def curves(rows: Rows, estimate: str = "neurgrad", what: str = "probability") -> Draw:
    """The change of a value over shifts of a few neurons, with the line that an estimate predicts."""

    def draw(figure: Figure, theme: Theme) -> None:
        n_columns = min(3, len(rows))
        for number, row in enumerate(rows):
            axes = figure.add_subplot(-(-len(rows) // n_columns), n_columns, number + 1)
            shifts = np.array([*row["shifts"], 0.0])
            order = np.argsort(shifts)
            values = np.array([*(row["delta_p"] if "delta_p" in row else row["delta"]), 0.0])[order]
            axes.plot(shifts[order], values, "o-", markersize=3, color=theme.cycle[0])
            near = np.abs(shifts[order]) <= 2
            axes.plot(shifts[order][near], row[estimate] * shifts[order][near], "--", color=theme.cycle[1])
            expert = "" if row.get("expert") is None else f"expert {row['expert']}, "
            name = f"layer {row['layer']}, {expert}neuron {row['neuron']} → {row['target'].strip()!r}"
            axes.set_title(
                _drawable(f"{name}\n{str(row['prompt_id'])[-30:]}"), fontsize=9, parse_math=False
            )  # fmt: skip
            axes.tick_params(labelsize=8)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
            if number % n_columns == 0:
                axes.set_ylabel(f"change, {what}" if what != "probability" else "change of probability", fontsize=9)
            if number >= len(rows) - n_columns:
                axes.set_xlabel("shift, units of |activation|", fontsize=9)

    return draw


def histograms(panels: Mapping[str, Rows]) -> Draw:
    """Shares of curves in bins, a panel a quantity, on logarithmic axes, for most curves are in the last bin.

    The first panel is of |r|, with a line where a curve begins to count as linear.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (label, rows) in zip(grid, panels.items(), strict=True):
            width = rows[0]["high"] - rows[0]["low"]
            total = sum(row["n"] for row in rows) or 1
            axes.bar([row["low"] for row in rows], [100 * row["n"] / total for row in rows], width, align="edge")
            axes.set_yscale("log")
            axes.set_xlabel(label)
        grid[0].axvline(LINEAR, color=theme.cycle[1], linewidth=1)
        grid[0].set_ylabel("share of curves, %")

    return draw


def strength_over_layers(rows: Rows) -> Draw:
    """The spread of |NEG| of each layer, and beside it the share of positive ones."""

    def draw(figure: Figure, theme: Theme) -> None:
        own = sorted((row for row in rows if row["layer"] is not None), key=_layer)
        layers = [row["layer"] for row in own]
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        left.fill_between(layers, [row["neg_q05"] for row in own], [row["neg_q95"] for row in own], alpha=0.15)
        left.fill_between(
            layers, [row["neg_q25"] for row in own], [row["neg_q75"] for row in own], alpha=0.3, color=theme.cycle[0]
        )
        left.plot(layers, [row["neg_q50"] for row in own], "-o", markersize=3)
        left.set_yscale("log")
        left.set_ylabel("|NEG|, probability a unit")
        shares = [np.nan if row["share_positive"] is None else 100 * row["share_positive"] for row in own]
        right.axhline(50, color=theme.faint)
        right.plot(layers, shares, "o", markersize=4, color=theme.cycle[1])
        right.set_ylabel("positive NEGs, %")
        right.set_ylim(0, 100)
        for axes in (left, right):
            axes.set_xlabel("layer")
            _layers_along(axes)

    return draw


def accuracies(rows: Sequence[Mapping[str, Any]]) -> Draw:
    """Test accuracy of each probe and baseline, a group a task."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        probes = list(dict.fromkeys(row["probe"] for row in rows))
        width = 0.8 / max(1, len(probes))
        found = {(row["task"], row["probe"]): row["accuracy"] for row in rows}
        colours = [*theme.cycle, theme.ink]
        for number, probe in enumerate(probes):
            heights = [100 * found.get((task, probe), np.nan) for task in tasks]
            places = np.arange(len(tasks)) - 0.4 + width * (number + 0.5)
            axes.bar(places, heights, width, label=probe, color=colours[number % len(colours)])
        axes.set_xticks(
            range(len(tasks)), tasks, rotation=30 if len(tasks) > 4 else 0, ha="right" if len(tasks) > 4 else "center"
        )
        axes.set_ylabel("accuracy on test, %")
        axes.set_ylim(0, 100)
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside lower center", ncols=4, fontsize=9)

    return draw


def _layers_along(axes: Axes) -> None:
    """Layers are whole numbers, also where there is only one."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axes.get_xlim()
    if high - low < 1:
        axes.set_xlim(low - 0.5, high + 0.5)


def _drawable(text: str) -> str:
    """A text without what matplotlib's font has no shape for."""
    font = get_font(findfont("DejaVu Sans"))
    return "".join(
        character
        if character == "\n" or font.get_char_index(ord(character))
        else character.encode("unicode_escape").decode()
        for character in text
    )


def _layer(row: Mapping[str, Any]) -> int:
    return int(row["layer"])

"""Of models with experts: how much of a layer's strength each expert carries, and how often prompts use it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neg_service.layer_neurons import ALWAYS_ON
from neg_service.report import figures
from neg_service.report.cells import percent
from neg_service.report.figures import drawn
from neg_service.report.page import Grid, Picture
from neg_service.storage.reader import Run

_MOST_EXPERTS = 50
# Layer and expert; layers without experts are not among them.
Mlp = tuple[int, int]


@dataclass
class ExpertStrength:
    """Sums of |value| of the neurons of each expert, and of what is always on beside experts, while values are read."""

    sums: dict[Mlp, float] = field(default_factory=lambda: defaultdict(float))
    n_values: dict[Mlp, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, layer: int, expert: int | None, values: NDArray[Any]) -> None:
        """The values of an expert's neurons in a row; of a layer's only MLP nothing is kept."""
        if expert is not None:
            self.sums[layer, expert] += float(np.abs(values).sum(dtype=np.float64))
            self.n_values[layer, expert] += len(values)

    def shares(self) -> dict[Mlp, float]:
        """Of each expert: its share of the sum over its layer."""
        of_layer: dict[int, float] = defaultdict(float)
        for (layer, _), own in self.sums.items():
            of_layer[layer] += own
        return {mlp: own / of_layer[mlp[0]] if of_layer[mlp[0]] else 0.0 for mlp, own in sorted(self.sums.items())}

    def shown(
        self, run: Run, number: int, what: str, of: str, mean_of: str = "prompts that use it"
    ) -> tuple[list[Grid], list[Picture]]:
        """A table of the experts that carry most, and a picture of all; nothing of models without experts."""
        if not self.sums:
            return [], []
        share, used = self.shares(), experts_used(run)
        head = ["layer", "expert", "share of the layer, %", f"|{what}|, mean"]
        head += ["used by prompts, %", "router's weight, mean"] * bool(used)
        rows = []
        for mlp in sorted(share, key=lambda own: -share[own])[:_MOST_EXPERTS]:
            mean = self.sums[mlp] / self.n_values[mlp]
            rows.append((str(mlp[0]), str(mlp[1]), percent(share[mlp]), f"{mean:.3e}", *_used_cells(used, mlp)))
        caption = f"Shares of the sum of |{what}| over a layer, for {of}; means are over {mean_of}; -1 is always on."
        if len(share) > _MOST_EXPERTS:
            caption += f" The {_MOST_EXPERTS} of {len(share)} with the largest shares."
        grid = Grid(
            "Experts", caption, head, rows, range(len(head)), is_interactive=True, name=f"experts-{number}"
        )  # fmt: skip
        panels = [(f"share of the layer's |{what}|, %", {mlp: 100 * own for mlp, own in share.items()})]
        if used:
            is_used = {mlp: 100 * own.share for mlp, own in used.items()}
            panels.append(("used by prompts, %", is_used | {mlp: 100.0 for mlp in share if mlp[1] == ALWAYS_ON}))
        picture = Picture(
            f"experts-{number}", f"Experts: |{what}|{' and use' if used else ''}",
            f"How much of the sum of |{what}| over a layer's neurons each expert carries, for {of}"
            f"{', and how many prompts use it' if used else ''}; -1 is what is always on beside experts, grey ones no "
            "prompt uses.",
            "Heat maps of layers against experts", drawn(figures.experts_over_layers(panels), (5 * len(panels), 4.4)),
            is_wide=len(panels) > 1,
        )  # fmt: skip
        return [grid], [picture]


@dataclass(frozen=True)
class Use:
    """Of an expert: the share of prompts that use it, 0..1, and the router's mean weight there."""

    share: float
    weight: float


def experts_used(run: Run) -> dict[Mlp, Use]:
    """Of each expert that any prompt uses; nothing where a run does not say."""
    if "routing" not in run.tables:
        return {}
    n_prompts: dict[int, int] = defaultdict(int)
    uses: dict[Mlp, int] = defaultdict(int)
    weights: dict[Mlp, float] = defaultdict(float)
    for batch in run.table("routing", ["layer", "experts", "weights"]).to_batches():
        rows = zip(*(batch[name].to_pylist() for name in ("layer", "experts", "weights")), strict=True)
        for layer, experts, own_weights in rows:
            n_prompts[layer] += 1
            for expert, weight in zip(experts, own_weights, strict=True):
                uses[layer, expert] += 1
                weights[layer, expert] += weight
    return {mlp: Use(n / n_prompts[mlp[0]], weights[mlp] / n) for mlp, n in sorted(uses.items())}


def _used_cells(used: dict[Mlp, Use], mlp: Mlp) -> tuple[str, ...]:
    if not used:
        return ()
    if mlp[1] == ALWAYS_ON:
        return percent(1.0), "-"
    return (percent(used[mlp].share), f"{used[mlp].weight:.3f}") if mlp in used else ("-", "-")

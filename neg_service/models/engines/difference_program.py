"""A model's pass over the last token, written down once as what it does to differences, and run for any number of rows.

Each step takes the differences of some values of the pass, [rows ...], and gives those of another; what all rows have
in common was worked out when the program was written (`difference_trace.py`). A value is a *slot*. At a *site*, where a
layer's neurons pass by, shifts are added. A value that no shift reaches has no difference, and its steps are skipped:
so a run begins at the lowest site that is shifted, whatever the architecture. The same holds row by row: rows of a site
join at that site those of the sites below it, so that rows of all sites make up one batch at the price of each one's
own layers.

Axes: R rows, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from neg_service.models.engines.difference_products import Product
from neg_service.models.feed_forward import Point, Site

# Given how many rows there are, and the differences of what it depends on, of which some but not all may be None.
Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Step:
    """slots: of what it takes. out: the slot of what it gives."""

    run: Run
    slots: tuple[int, ...]
    out: int


@dataclass(frozen=True)
class SiteStep:
    """Where a site's neurons pass by: `before` the slot of their tensor, None if nothing below can be shifted.

    shape: of that tensor with one row; axis: where the rows are; row: its values without a shift [F].
    """

    site: Site
    point: Point
    before: int | None
    out: int
    shape: tuple[int, ...]
    axis: int
    row: Tensor


@dataclass(frozen=True)
class Shifts:
    """Row `rows_i[i]` has neuron `neurons_i[i]` of a site, counted from its first, moved by `shifts_i[i]`: [I] each.

    n_rows: how many rows are moved at this site or below, all before those of the sites above it; None: that is not
    known, and all rows run from the lowest site on.
    """

    rows_i: Tensor
    neurons_i: Tensor
    shifts_i: Tensor
    n_rows: int | None = None


@dataclass
class Program:
    """The steps in their order, and the slot of the hidden states that the vocabulary head reads.

    dtype: the precision of differences. axes: which axis of a slot's value is its rows, None where they share an axis
    with something else.
    """

    dtype: torch.dtype
    steps: list[Step | SiteStep] = field(default_factory=list)
    output: int | None = None
    axes: list[int | None] = field(default_factory=list)
    _frees: list[tuple[int, ...]] = field(default_factory=list)
    _mixes_at_sites: bool = False

    def slot(self) -> int:
        """A new one, whose rows have no axis of their own until that is noted in `axes`."""
        self.axes.append(None)
        return len(self.axes) - 1

    def finish(self, output: int | None) -> None:
        """Take note of the output, of which step is the last one that needs a value, and of what sites meet."""
        self.output = output
        last: dict[int, int] = {}
        for place, step in enumerate(self.steps):
            for slot in (*_slots_of(step), step.out):
                last[slot] = place
        frees: list[list[int]] = [[] for _ in self.steps]
        for slot, place in last.items():
            if slot != output:
                frees[place].append(slot)
        self._frees = [tuple(own) for own in frees]
        self._mixes_at_sites = output is not None and self.axes[output] is None
        live: set[int] = set()
        for step, own in zip(self.steps, frees, strict=True):
            if isinstance(step, SiteStep):
                self._mixes_at_sites |= any(self.axes[slot] is None for slot in live)
            live.add(step.out)
            live.difference_update(own)

    @property
    def sites(self) -> dict[Site, SiteStep]:
        """Where neurons pass by."""
        return {step.site: step for step in self.steps if isinstance(step, SiteStep)}

    def run(self, n_rows: int, shifts: Mapping[Site, Shifts]) -> Tensor | None:
        """Differences of the head's input [R, F]; None where no shift reaches it."""
        if self.output is None:
            return None
        values: list[Tensor | None] = [None] * len(self.axes)
        start = next(i for i, step in enumerate(self.steps) if isinstance(step, SiteStep) and step.site in shifts)
        n_now = 0
        for step, frees in zip(self.steps[start:], self._frees[start:], strict=True):
            if isinstance(step, Step):
                given = [values[slot] for slot in step.slots]
                if any(own is not None for own in given):
                    values[step.out] = step.run(n_now, *given)
            elif step.site in shifts:
                n_now = self._grown(values, n_now, shifts[step.site].n_rows, n_rows)
                before = None if step.before is None else values[step.before]
                values[step.out] = _shifted(step, before, n_now, shifts[step.site], self.dtype)
            elif step.before is not None:
                values[step.out] = values[step.before]
            for slot in frees:
                values[slot] = None
        self._grown(values, n_now, None, n_rows)
        found = values[self.output]
        return None if found is None else found.reshape(n_rows, -1)

    def _grown(self, values: list[Tensor | None], n_now: int, wanted: int | None, most: int) -> int:
        """Let values that are still needed have as many rows as are wanted from here on, and say how many these are.

        New rows have no differences yet. Where rows have no axis of their own, all join at once, before there are any.
        """
        known = [(slot, own) for slot, own in enumerate(values) if own is not None]
        if wanted is None or (not known and self._mixes_at_sites):
            wanted = most
        if known and wanted > n_now:
            for slot, own in known:
                axis = self.axes[slot]
                assert axis is not None
                shape = (*own.shape[:axis], wanted - n_now, *own.shape[axis + 1 :])
                values[slot] = torch.cat([own, own.new_zeros(shape)], axis)
        return max(wanted, n_now)


def _slots_of(step: Step | SiteStep) -> Sequence[int]:
    if isinstance(step, Step):
        return step.slots
    return () if step.before is None else (step.before,)


def _shifted(step: SiteStep, before: Tensor | None, n_rows: int, own: Shifts, dtype: torch.dtype) -> Tensor:
    """The differences at a site with its shifts added."""
    if before is None:
        shape = (*step.shape[: step.axis], n_rows, *step.shape[step.axis + 1 :])
        changed = step.row.new_zeros(shape, dtype=dtype)
    else:
        changed = before.clone(memory_format=torch.contiguous_format)
    device = changed.device
    # Each row has one token, so that rows are all that there is beside the features.
    neurons = step.point.neurons(changed.view(n_rows, -1))
    place = (own.rows_i.to(device), own.neurons_i.to(device))
    neurons.index_put_(place, own.shifts_i.to(device, dtype), accumulate=True)
    return changed


@dataclass(frozen=True)
class Differences:
    """One prompt, ready for shifts of single neurons.

    head_v, logits_v: the vocabulary head's output without a shift, and the model's logits [V], in float64. activation:
    of each site's neurons at the readout position [N], where the layer is, in float64.
    """

    head_v: Tensor
    logits_v: Tensor
    activation: dict[Site, Tensor]
    _program: Program
    _head: nn.Linear
    _product: Product

    @property
    def dtype(self) -> torch.dtype:
        """The precision of differences."""
        return self._program.dtype

    def run(self, n_rows: int, shifts: Mapping[Site, Shifts]) -> Tensor:
        """Differences of the hidden states that the head reads [R, E]."""
        d_re = self._program.run(n_rows, shifts)
        return d_re if d_re is not None else self.head_v.new_zeros(n_rows, self._head.in_features, dtype=self.dtype)

    def product(self, d_re: Tensor, weight_ve: Tensor) -> Tensor:
        """Differences of the head's output [R, V], its bias not among them, of some of its tokens' weights."""
        return self._product(d_re, weight_ve, False)

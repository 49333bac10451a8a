"""A model's pass over the last token, written down once as what it does to differences, and run for any number of rows.

Each step takes the differences of some values of the pass, [rows ...], and gives those of another; what all rows have
in common was worked out when the program was written (`difference_trace.py`). A value is a *slot*. At a *site*, where a
layer's neurons pass by, shifts are added. A value that no shift reaches has no difference, and its steps are skipped:
so a run begins at the lowest site that is shifted, whatever the architecture. The same holds row by row: rows of a site
join at that site those of the sites below it, so that rows of all sites make up one batch at the price of each one's
own layers.

A program may be that of several prompts, whose rows then run together: as many of each of those that have any, prompt
by prompt.

Axes: B prompts of a program, A of them that run, R rows of a prompt, F features, I shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from neg_service.models.engines.difference_products import Product
from neg_service.models.feed_forward import Point, Site


class Batch(NamedTuple):
    """What runs: so many rows of each of some of the program's prompts."""

    prompts: tuple[int, ...]
    rows: int

    @property
    def n(self) -> int:
        """Rows in all."""
        return len(self.prompts) * self.rows


# Given a `Batch`, and the differences of what it depends on, of which some but not all may be None.
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

    shape: of that tensor with a row of each prompt; axis: where the rows are; row: its values without a shift [B, F].
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

    n_rows: how many rows of a prompt are moved at this site or below, all before those of the sites above it; None:
    that is not known, and all rows run from the lowest site on. prompts_i: whose row it is, as a place among those that
    run; the first one's where it is not given.
    """

    rows_i: Tensor
    neurons_i: Tensor
    shifts_i: Tensor
    n_rows: int | None = None
    prompts_i: Tensor | None = None


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

    def run(self, prompts: tuple[int, ...], n_rows: int, shifts: Mapping[Site, Shifts]) -> Tensor | None:
        """Differences of the head's input [A, R, F]; None where no shift reaches it."""
        if self.output is None:
            return None
        values: list[Tensor | None] = [None] * len(self.axes)
        start = next(i for i, step in enumerate(self.steps) if isinstance(step, SiteStep) and step.site in shifts)
        now = Batch(prompts, 0)
        for step, frees in zip(self.steps[start:], self._frees[start:], strict=True):
            if isinstance(step, Step):
                given = [values[slot] for slot in step.slots]
                if any(own is not None for own in given):
                    values[step.out] = step.run(now, *given)
            elif step.site in shifts:
                now = self._grown(values, now, shifts[step.site].n_rows, n_rows)
                before = None if step.before is None else values[step.before]
                values[step.out] = _shifted(step, before, now, shifts[step.site], self.dtype)
            elif step.before is not None:
                values[step.out] = values[step.before]
            for slot in frees:
                values[slot] = None
        self._grown(values, now, None, n_rows)
        found = values[self.output]
        return None if found is None else found.reshape(len(prompts), n_rows, -1)

    def _grown(self, values: list[Tensor | None], now: Batch, wanted: int | None, most: int) -> Batch:
        """Let values that are still needed have as many rows as are wanted from here on, and say how many these are.

        New rows have no differences yet. Where rows have no axis of their own, all join at once, before there are any.
        """
        known = [(slot, own) for slot, own in enumerate(values) if own is not None]
        if wanted is None or (not known and self._mixes_at_sites):
            wanted = most
        if known and wanted > now.rows:
            n_prompts = len(now.prompts)
            for slot, own in known:
                axis = self.axes[slot]
                assert axis is not None
                shape = (*own.shape[:axis], n_prompts, wanted - now.rows, *own.shape[axis + 1 :])
                parts = [torch.unflatten(own, axis, (n_prompts, now.rows)), own.new_zeros(shape)]
                values[slot] = torch.cat(parts, axis + 1).flatten(axis, axis + 1)
        return now._replace(rows=max(wanted, now.rows))


def _slots_of(step: Step | SiteStep) -> Sequence[int]:
    if isinstance(step, Step):
        return step.slots
    return () if step.before is None else (step.before,)


def _shifted(step: SiteStep, before: Tensor | None, batch: Batch, own: Shifts, dtype: torch.dtype) -> Tensor:
    """The differences at a site with its shifts added."""
    if before is None:
        shape = (*step.shape[: step.axis], batch.n, *step.shape[step.axis + 1 :])
        changed = step.row.new_zeros(shape, dtype=dtype)
    else:
        changed = before.clone(memory_format=torch.contiguous_format)
    device = changed.device
    # Each row has one token, so that rows are all that there is beside the features.
    neurons = step.point.neurons(changed.view(batch.n, -1))
    rows_i = own.rows_i if own.prompts_i is None else own.rows_i + own.prompts_i * batch.rows
    place = (rows_i.to(device), own.neurons_i.to(device))
    neurons.index_put_(place, own.shifts_i.to(device, dtype), accumulate=True)
    return changed


@dataclass(frozen=True)
class Differences:
    """Prompts, ready for shifts of single neurons.

    head_bv, logits_bv: the vocabulary head's output without a shift, and the model's logits [B, V], in float64.
    activation: of each site's neurons at the readout position [B, N], where the layer is, in float64.
    """

    head_bv: Tensor
    logits_bv: Tensor
    activation: dict[Site, Tensor]
    _program: Program
    _head: nn.Linear
    _product: Product

    @property
    def dtype(self) -> torch.dtype:
        """The precision of differences."""
        return self._program.dtype

    def run(self, n_rows: int, shifts: Mapping[Site, Shifts], prompts: Sequence[int] = (0,)) -> Tensor:
        """Differences of the hidden states that the head reads [A, R, E], of some of the prompts."""
        d_are = self._program.run(tuple(prompts), n_rows, shifts)
        if d_are is None:
            shape = (len(prompts), n_rows, self._head.in_features)
            return self.head_bv.new_zeros(shape, dtype=self.dtype)
        return d_are

    def product(self, d_are: Tensor, weight_ve: Tensor) -> Tensor:
        """Differences of the head's output [A, R, V], its bias not among them, of some of its tokens' weights."""
        return self._product(d_are.flatten(0, -2), weight_ve, False).view(*d_are.shape[:-1], -1)

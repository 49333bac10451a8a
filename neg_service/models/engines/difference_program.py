"""A model's pass over the last token, written down once as what it does to differences, and run for any number of rows.

Each step takes the differences of some values of the pass, [rows ...], and gives those of another; what all rows have
in common was worked out when the program was written (`difference_trace.py`). A value is a *slot*. At a *site*, where a
layer's neurons pass by, shifts are added. A value that no shift reaches has no difference, and its steps are skipped:
so a run begins at the lowest site that is shifted, whatever the architecture.

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
    """Row `rows_i[i]` has neuron `neurons_i[i]` of a site, counted from its first, moved by `shifts_i[i]`: [I] each."""

    rows_i: Tensor
    neurons_i: Tensor
    shifts_i: Tensor


@dataclass
class Program:
    """The steps in their order, and the slot of the hidden states that the vocabulary head reads.

    dtype: the precision of differences.
    """

    dtype: torch.dtype
    steps: list[Step | SiteStep] = field(default_factory=list)
    n_slots: int = 0
    output: int | None = None
    _frees: list[tuple[int, ...]] = field(default_factory=list)

    def slot(self) -> int:
        """A new one."""
        self.n_slots += 1
        return self.n_slots - 1

    def finish(self, output: int | None) -> None:
        """Take note of the output, and of which step is the last one that needs a value."""
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

    @property
    def sites(self) -> dict[Site, SiteStep]:
        """Where neurons pass by."""
        return {step.site: step for step in self.steps if isinstance(step, SiteStep)}

    def run(self, n_rows: int, shifts: Mapping[Site, Shifts]) -> Tensor | None:
        """Differences of the head's input [R, F]; None where no shift reaches it."""
        if self.output is None:
            return None
        values: list[Tensor | None] = [None] * self.n_slots
        start = next(i for i, step in enumerate(self.steps) if isinstance(step, SiteStep) and step.site in shifts)
        for step, frees in zip(self.steps[start:], self._frees[start:], strict=True):
            if isinstance(step, SiteStep):
                before = None if step.before is None else values[step.before]
                values[step.out] = (
                    before if step.site not in shifts else _shifted(step, before, n_rows, shifts, self.dtype)
                )
            else:
                given = [values[slot] for slot in step.slots]
                if any(own is not None for own in given):
                    values[step.out] = step.run(n_rows, *given)
            for slot in frees:
                values[slot] = None
        found = values[self.output]
        return None if found is None else found.reshape(n_rows, -1)


def _slots_of(step: Step | SiteStep) -> Sequence[int]:
    if isinstance(step, Step):
        return step.slots
    return () if step.before is None else (step.before,)


def _shifted(
    step: SiteStep, before: Tensor | None, n_rows: int, shifts: Mapping[Site, Shifts], dtype: torch.dtype
) -> Tensor:
    """The differences at a site with its shifts added."""
    own = shifts[step.site]
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
        """Differences of the head's output [R, V], its bias not among them."""
        d_re = self._program.run(n_rows, shifts)
        if d_re is None:
            return self.head_v.new_zeros(n_rows, len(self.head_v), dtype=self.dtype)
        return self._product(d_re, self._head.weight, False)

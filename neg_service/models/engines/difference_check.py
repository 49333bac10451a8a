"""Proof that differences of rows are those of another engine's rows: what a rule for a torch function got wrong.

In float64 both are exact to about 1e-13, so that subtracting rows is no longer a loss. All neurons of each layer are
moved together, by large and by small amounts, with windows shorter than the prompt and behind a prefix that prompts
share: of two prompts of unequal length that run together, or, where that cannot be, of one.

Axes: R rows, V vocabulary, N neurons of a site.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neg_service.models.batches import return_cached_memory
from neg_service.models.engines.base import Engine, Ids, MismatchError
from neg_service.models.engines.comparisons import check_ids, short_limits
from neg_service.models.engines.difference_program import Shifts
from neg_service.models.feed_forward import Point, Site, hooks
from neg_service.models.precision import in_precision
from neg_service.models.start_at_layer import flat

# A rule that is wrong is off by more than a hundredth, also where a model's own code rounds to float32.
DIFFERENCES_TOLERANCE = 1e-6
# How far neurons move, in turns; beyond the first of them functions are no longer straight.
_SIZES = (1.0, 0.03, 0.3)
_ROWS_A_SITE = 2
# What passes that are not made for several prompts may raise.
_MAY_FAIL = (RuntimeError, MemoryError, ValueError, TypeError, LookupError, AttributeError)
# By so many tokens is the second prompt shorter.
_SHORTER = 3
# Of the largest logit: smaller differences have no digits left in the rows that they are compared with.
_LEAST = 1e-6


class Compared(NamedTuple):
    """How far differences are from those of rows, of the largest in each row, at the worst row; whether prompts may run
    together; and what was compared, for a person."""

    deviation: float
    together: bool
    tried: str


def compared(engine: Engine, rows_of: Engine) -> Compared:
    """Compare an engine of differences with another one's rows.

    Raises:
        MismatchError: a function without a rule, or a deviation beyond the tolerance.
    """
    model, ids = engine.model, check_ids(engine.model)
    points = model.feed_forward.sites("paper")
    rows = f"differences of {len(points) * _ROWS_A_SITE} rows"
    prompts = (ids, ids[:-_SHORTER])

    def deviation(prompts: Sequence[Ids]) -> float:
        try:
            with in_precision(model.module, model.feed_forward.layers, torch.float64), short_limits(model):
                found = deviation_of_rows(engine, rows_of, prompts, ids[: len(ids) // 2], points)
        finally:
            engine.forget()
            rows_of.forget()
        if not found <= DIFFERENCES_TOLERANCE:
            raise MismatchError(
                f"differences are {found:.1e} off those of {rows_of.name} in float64, at most "
                f"{DIFFERENCES_TOLERANCE:g} is allowed"
            )
        return found

    try:
        return Compared(
            deviation(prompts), True, f"{rows} of each of two prompts together against {rows_of.name}, in float64"
        )
    except (MismatchError, *_MAY_FAIL):
        # One by one, prompts may be right all the same, and fit.
        return_cached_memory()
        return Compared(deviation(prompts[:1]), False, f"{rows} against those of {rows_of.name}, in float64")


@torch.no_grad()
def deviation_of_rows(
    engine: Engine, rows_of: Engine, prompts: Sequence[Ids], shared: Ids, points: dict[Site, Point]
) -> float:
    """Of differences of logits of prompts that run together from those of another engine's rows, in the precision that
    the model computes in."""
    found = engine.differences(prompts, shared, points)
    assert found is not None
    moved_srn = dict(_moves({site: own.shape[1] for site, own in found.activation.items()}))
    n_rows = 1 + _ROWS_A_SITE * len(points)
    shifts = {site: _shifts(*own, len(prompts)) for site, own in moved_srn.items()}
    d_bre = found.run(n_rows, shifts, range(len(prompts)))
    own_brv = found.product(d_bre, engine.model.module.get_output_embeddings().weight).double()
    deviations = [
        _deviation(own_rv, _by_rows(rows_of, ids, shared, points, moved_srn, n_rows))
        for ids, own_rv in zip(prompts, own_brv, strict=True)
    ]
    # NaN is no small deviation.
    return max(own if own == own else float("inf") for own in deviations)


def _deviation(own_rv: Tensor, expected_rv: Tensor) -> float:
    """Of differences from those of rows, of which the first one is not moved."""
    largest = expected_rv[0].abs().amax()
    expected_rv = expected_rv[1:] - expected_rv[:1]
    scale_r = expected_rv.abs().amax(1).clamp_min(_LEAST * largest)
    return float(((own_rv[1:] - expected_rv).abs().amax(1) / scale_r).amax())


def _moves(sizes: dict[Site, int]) -> Iterable[tuple[Site, tuple[int, Tensor]]]:
    """By site: its first row, and by how much its neurons move in its rows [R, N]."""
    draw = torch.Generator().manual_seed(0)
    for place, (site, n) in enumerate(sizes.items()):
        by_rn = torch.randn(_ROWS_A_SITE, n, generator=draw, dtype=torch.float64)
        for i in range(_ROWS_A_SITE):
            by_rn[i] *= _SIZES[(place + i) % len(_SIZES)]
        yield site, (1 + _ROWS_A_SITE * place, by_rn)


def _shifts(first: int, by_rn: Tensor, n_prompts: int) -> Shifts:
    """The same rows of each prompt."""
    n_rows, n = by_rn.shape
    rows_i = torch.arange(first, first + n_rows).repeat_interleave(n)
    prompts_i = torch.arange(n_prompts).repeat_interleave(len(rows_i))
    rows_i, neurons_i, by_i = (x.repeat(n_prompts) for x in (rows_i, torch.arange(n).repeat(n_rows), by_rn.flatten()))
    return Shifts(rows_i, neurons_i, by_i, first + n_rows, prompts_i)


def _by_rows(
    engine: Engine,
    ids: Ids,
    shared: Ids,
    points: dict[Site, Point],
    moved_srn: dict[Site, tuple[int, Tensor]],
    n_rows: int,
) -> Tensor:
    """The head's output [R, V] of rows of which each has the neurons of one site moved; the first one has none."""
    rows = engine.rows([ids], shared)
    head = engine.model.module.get_output_embeddings()
    outputs: list[Tensor] = []

    def move(site: Site, x: Tensor) -> Tensor:
        first, by_rn = moved_srn[site]
        moved = x.clone()
        own = points[site].neurons(flat(moved))
        own[first : first + len(by_rn)] += by_rn.to(own.device, own.dtype)
        return moved

    handle = head.register_forward_hook(lambda _m, _i, out: outputs.append(out.reshape(-1, out.shape[-1])))
    try:
        with hooks(points, move):
            rows.run([n_rows])
    finally:
        handle.remove()
    return outputs[0].double()

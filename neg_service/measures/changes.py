"""Interventions on single neurons at some sites, and what they did: what `interventions.py` is asked for, and gives.

Who needs several, each after what the last ones did, writes this down as `Steps`: a generator that gives interventions
and is sent their changes. So those of several prompts take turns, and run together (`together.py`).

Axes: I interventions, K targets.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from neg_service.models.feed_forward import Site

T = TypeVar("T")


class Moved(NamedTuple):
    """Interventions at one site: neuron `neurons_i[i]`, counted from the site's first, is moved by `shifts_i[i]`.

    Shifts are added to activations as they are; signs are the caller's business.
    """

    site: Site
    neurons_i: Tensor
    shifts_i: Tensor


class Changes(NamedTuple):
    """What interventions did.

    log_p_ik, logit_ik: Δ log p and Δz of every target [I, K]. is_rerouted_i: whether a layer above chose other experts
    [I]; None of a model without. spread_i: the root mean square of what logits moved by [I], which the error of Δ log p
    is a constant share of; None where that error is about the same for all. used_others: of one batch with experts,
    whether its own layer used others than those whose neurons are counted [].
    """

    log_p_ik: Tensor
    logit_ik: Tensor
    is_rerouted_i: Tensor | None = None
    spread_i: Tensor | None = None
    used_others: Tensor | None = None


# Interventions at sites in their order, then what they did, as often as it takes; in the end, what comes out of it.
Steps: TypeAlias = Generator[Sequence[Moved], Changes, T]


def taken(steps: Steps[T], run: Callable[[Sequence[Moved]], Changes]) -> T:
    """Steps taken one after the other, and what comes out of them."""
    try:
        asked = next(steps)
        while True:
            asked = steps.send(run(asked))
    except StopIteration as end:
        found: T = end.value
        return found


def cut(moved: Sequence[Moved], part: range) -> list[Moved]:
    """Those of a range of interventions, counted through all sites."""
    found, start = [], 0
    for site, neurons_i, shifts_i in moved:
        own = slice(max(part.start - start, 0), max(part.stop - start, 0))
        start += len(shifts_i)
        if len(shifts_i[own]):
            found.append(Moved(site, neurons_i[own], shifts_i[own]))
    return found


def joined(parts: Sequence[Changes]) -> Changes:
    """What interventions did, one part after the other; what parts say of themselves is left out."""
    changed = [own.is_rerouted_i for own in parts if own.is_rerouted_i is not None]
    spread = [own.spread_i for own in parts if own.spread_i is not None]
    return Changes(
        torch.cat([own.log_p_ik for own in parts]),
        torch.cat([own.logit_ik for own in parts]),
        torch.cat(changed) if changed else None,
        torch.cat(spread) if spread else None,
    )

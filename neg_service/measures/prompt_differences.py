"""Interventions by difference arithmetic, on one prompt or on several that run together, and what they did.

A prompt's rows stand in the order of the sites at which they are shifted, so that each runs through its own layers only
(`models/engines/difference_program.py`). Prompts that run together have as many rows each: those that one has fewer of
are not shifted, and left out of what is read.

Axes: A prompts that run, R rows of each, I interventions of one, K targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neg_service.measures.changes import Changes, Moved
from neg_service.measures.readout import Baseline, Readout
from neg_service.models.engines.difference_program import Differences, Shifts
from neg_service.models.feed_forward import Site


@dataclass(frozen=True)
class PromptDifferences:
    """One of the prompts of `differences`, at `place` there, and how its rows are read."""

    differences: Differences
    place: int
    readout: Readout
    baseline: Baseline
    target_ids: tuple[int, ...]


@torch.no_grad()
def changes_together(prompts: Sequence[PromptDifferences], moved: Sequence[Sequence[Moved]]) -> list[Changes]:
    """What interventions do, prompt by prompt, in one pass; `prompts` are of the same differences.

    Raises:
        NonFiniteError: NaN or infinity after an intervention.
    """
    differences, readout = prompts[0].differences, prompts[0].readout
    shifts, counts = _shifts([{own.site: own for own in each} for each in moved], list(differences.activation))
    hidden_are = differences.run(max(counts), shifts, [own.place for own in prompts])
    found = readout.differences_read(
        [own.baseline for own in prompts], hidden_are, differences.product, [own.target_ids for own in prompts]
    )
    return [
        Changes(read.log_p_rk[:n], read.logit_rk[:n], None, read.spread_r[:n])
        for read, n in zip(found, counts, strict=True)
    ]


def _shifts(moved: Sequence[dict[Site, Moved]], sites: Sequence[Site]) -> tuple[dict[Site, Shifts], list[int]]:
    """The rows of each prompt, by site, and how many each prompt has."""
    counts = [0] * len(moved)
    shifts: dict[Site, Shifts] = {}
    for site in sites:
        own = [(a, of_prompt[site]) for a, of_prompt in enumerate(moved) if site in of_prompt]
        if not own:
            continue
        rows, prompts = [], []
        for a, (_, _, shifts_i) in own:
            rows.append(torch.arange(counts[a], counts[a] + len(shifts_i), device=shifts_i.device))
            prompts.append(torch.full_like(rows[-1], a))
            counts[a] += len(shifts_i)
        neurons_i = torch.cat([each.neurons_i for _, each in own])
        shifts_i = torch.cat([each.shifts_i for _, each in own])
        shifts[site] = Shifts(torch.cat(rows), neurons_i, shifts_i, max(counts), torch.cat(prompts))
    return shifts, counts

"""Prompts that are prepared, differentiated and swept in one pass, where each alone would leave a device idle.

By difference arithmetic a prompt costs a pass in float64 before its first shift, for which all weights are converted,
and a backward pass: for a few neurons that is several times what their shifts cost. Both, and the shifts themselves,
are shared by as many prompts as a batch has room for; a prompt whose own shifts fill it runs alone. Sweeps take turns:
what each asks for next (`changes.Steps`) runs with what the others do.

Axes: A prompts, K targets, C values that are measured of the targets, M neurons of several sites, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor

from neg_service.measures.batching import in_parts
from neg_service.measures.changes import Changes, Moved, Steps, cut, joined
from neg_service.measures.interventions import Interventions
from neg_service.measures.outputs import Output
from neg_service.measures.prompt_differences import changes_together
from neg_service.models.batches import Budget
from neg_service.models.engines.backward import target_gradients
from neg_service.models.engines.base import Ids
from neg_service.models.language_model import LanguageModel
from neg_service.models.transfer import fetched
from neg_service.prompts.prompt import EncodedPrompt

T = TypeVar("T")

# More prompts hardly make one cheaper, and errors, or a memory that ends, would cost more of them.
MOST_TOGETHER = 32
# Prompts whose interventions fill so many batches or more gain nothing from others.
_BATCHES = 8
# Prompts whose numbers of interventions differ by no more than this factor run together: all have as many rows.
_ALIKE = 2


def run_together(model: LanguageModel, prompt: EncodedPrompt) -> bool:
    """Whether a prompt may run with others: where its rows are differences, of one token."""
    return not prompt.is_tree and model.ensure_checked().check.together


def cost_of(model: LanguageModel, n_tokens: int, n_shared: int, n_targets: int, n_rows: int) -> int:
    """What a prompt takes of a batch's memory, in bytes, of so many tokens, the first `n_shared` of all.

    Its `n_rows` interventions count for a part of what they would take at once: they run in batches, but who fills
    several is to run alone.
    """
    engine = model.engine
    kept = engine.differences_bytes(n_tokens, n_shared)
    filled = n_rows * engine.row_sizes(n_tokens).run // _BATCHES
    return kept + max(filled, engine.cost(n_tokens, n_shared, n_targets, n_targets))


def prepared_together(
    model: LanguageModel, prompts: Sequence[EncodedPrompt], basis: str, shared: Ids = ()
) -> list[Interventions]:
    """Prompts that have run once, without interventions, in one pass; `shared` are first tokens that all have.

    Raises:
        NonFiniteError, ModelError: as `PreparedPrompt`. What the allocator says: they do not fit together.
    """
    differences = model.engine.differences([prompt.ids for prompt in prompts], shared, model.feed_forward.sites(basis))
    assert differences is not None
    return [
        Interventions(model, prompt, basis, shared, ran=(differences, place)) for place, prompt in enumerate(prompts)
    ]


def neurgrads_together(
    model: LanguageModel, prompts: Sequence[Interventions], layers: Sequence[int], budget: Budget,
    outputs: Sequence[Output], shared: Ids = (),
) -> list[Tensor]:  # fmt: skip
    """Each prompt's NeurGrad [C, M], as `Interventions.neurgrad` has it of one.

    In low precision each by itself: what rounding does there depends on how many rows a product has, and is no small
    part of a gradient.

    Raises:
        NonFiniteError: NaN or infinity in a gradient. DoesNotFit: one target's gradients do not fit.
    """
    if model.dtype not in (torch.float32, torch.float64):
        return [own.neurgrad(layers, budget, output) for own, output in zip(prompts, outputs, strict=True)]
    points = {site: prompts[0].points[site] for site in prompts[0].sites(layers)}

    def run(part: range) -> list[Tensor]:
        own = [prompts[a] for a in part]
        if len(own) == 1:
            # Which may have more targets than fit at once.
            return [own[0].neurgrad(layers, budget, outputs[part.start])]
        rows = model.rows([each.prompt.ids for each in own], shared)
        target_ids = [each.prompt.target_ids for each in own]
        found = target_gradients(rows, target_ids, points, of_logits=outputs[part.start].differentiates_logits)
        parts, start = [], 0
        for a, each in zip(part, own, strict=True):
            of_prompt = slice(start, start + len(each.prompt.target_ids))
            start = of_prompt.stop
            by_site = {site: x[of_prompt] for site, x in zip(points, found.gradient_srn, strict=True)}
            parts.append(each.of_output(each.signed(by_site), outputs[a]))
        return parts

    n_shared = len(shared)
    costs = [model.engine.cost(len(own.prompt.ids), n_shared, *[len(own.prompt.target_ids)] * 2) for own in prompts]
    return [own for _, found in in_parts(costs, run, budget) for own in found]


def taken_together(prompts: Sequence[Interventions], steps: Sequence[Steps[T]], budget: Budget) -> list[T]:
    """What comes out of each prompt's steps; what they ask for at a time runs together.

    Raises:
        NonFiniteError: NaN or infinity after an intervention. DoesNotFit: one does not fit beside the prompts. What the
        allocator says: one of each prompt does not fit.
    """
    results: dict[int, T] = {}
    asked: dict[int, Sequence[Moved]] = {}

    def advance(a: int, changes: Changes | None) -> None:
        asked.pop(a, None)
        try:
            asked[a] = next(steps[a]) if changes is None else steps[a].send(changes)
        except StopIteration as end:
            results[a] = end.value

    for a in range(len(steps)):
        advance(a, None)
    while asked:
        # Each may ask again as soon as it has its own.
        for own in _alike({a: sum(len(each.shifts_i) for each in moved) for a, moved in asked.items()}):
            for a, changes in zip(
                own, _changes([prompts[a] for a in own], [asked[a] for a in own], budget), strict=True
            ):
                advance(a, changes)
    return [results[a] for a in range(len(steps))]


def _alike(counts: dict[int, int]) -> Iterator[list[int]]:
    """Prompts of about as many interventions."""
    left = sorted(counts, key=lambda a: (-counts[a], a))
    while left:
        own = [a for a in left if counts[a] * _ALIKE >= counts[left[0]]]
        yield sorted(own)
        left = left[len(own) :]


def _changes(prompts: Sequence[Interventions], moved: Sequence[Sequence[Moved]], budget: Budget) -> list[Changes]:
    """What the interventions on each prompt do."""
    if len(prompts) == 1:
        return [prompts[0].changes(moved[0], budget)]
    counts = [sum(len(own.shifts_i) for own in each) for each in moved]

    def run(part: range) -> list[tuple[int, Changes]]:
        own = [a for a, n in enumerate(counts) if n > part.start]
        differences = [prompts[a].by_differences for a in own]
        cuts = [cut(moved[a], range(part.start, min(part.stop, counts[a]))) for a in own]
        return list(zip(own, changes_together([x for x in differences if x is not None], cuts), strict=True))

    # Of each prompt as many rows, beside what differences of a few rows take while they are worked out.
    size = sum(own.sizes.run for own in prompts)
    with ExitStack() as stack:
        for own in prompts:
            stack.enter_context(own.without_waiting())
        parts = list(in_parts([size] * max(counts), run, budget, size))
        read = [torch.stack([own.log_p_ik.isfinite().all() for _, own in of_part]).all() for _, of_part in parts]
        (is_read,) = fetched([torch.stack(read)])
    for place in (~is_read).nonzero()[:, 0].tolist():
        # The same batch again, so that it gives the same numbers.
        parts[place] = (parts[place][0], run(parts[place][0]))
    found: list[list[Changes]] = [[] for _ in prompts]
    for _, of_part in parts:
        for a, changes in of_part:
            found[a].append(changes)
    return [joined(own) for own in found]

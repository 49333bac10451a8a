"""Which prompts a study of linearity is of: those that the model answers rightly, or all, and a draw of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from neg_service.errors import ConfigurationError
from neg_service.storage.reader import Run, reading
from neg_service.studies.linearity.options import LinearityOptions
from neg_service.studies.tables import Row

log = logging.getLogger(__name__)


def select_prompts(run: Run, options: LinearityOptions) -> tuple[list[str], Row]:
    """The ids of the prompts to study, in the order of the data set, and the row of the table `accuracy`.

    Raises:
        ConfigurationError: right answers alone were asked for, and there is none, or none that could be wrong.
    """
    with reading(run):
        columns = ["prompt_id", "targets", "answer", "prediction", "probabilities"]
        prompts = run.table("prompts", columns=columns).to_table()
    ids = prompts["prompt_id"].to_pylist()
    answer, prediction = prompts["answer"].to_pylist(), prompts["prediction"].to_pylist()
    right = [own for own, a, p in zip(ids, answer, prediction, strict=True) if a is not None and a == p]
    with_answer = sum(a is not None for a in answer)
    candidates = ids
    if options.answered == "right" and with_answer:
        _require_right(prompts, len(right), with_answer)
        candidates = right
    chosen = _drawn(candidates, options)
    row = {"prompts": len(ids), "with_answer": with_answer, "right": len(right), "studied": len(chosen)}
    return chosen, row | {"median_probability": _median_probability(prompts, chosen)}


def spread_over(ids: Sequence[str], count: int) -> list[str]:
    """So many of the ids, or all, spread over the data set, whose prompts lie together by what they ask."""
    return list(ids[:: max(1, len(ids) // count)][:count])


def _require_right(prompts: pa.Table, right: int, with_answer: int) -> None:
    if all(len(targets) < 2 for targets in prompts["targets"].to_pylist()):
        raise ConfigurationError(
            "prompts have one target each, which is always the most probable one; give them several, or use "
            "study.answered=all",
            setting="study.answered",
            value="right",
        )
    if not right:
        raise ConfigurationError(
            f"the model answers none of {with_answer} prompts rightly; use study.answered=all",
            setting="study.answered",
            value="right",
        )


def _drawn(candidates: list[str], options: LinearityOptions) -> list[str]:
    if options.prompts is None or len(candidates) == options.prompts:
        return candidates
    if len(candidates) < options.prompts:
        log.warning("study.prompts=%d, but there are only %d such prompts", options.prompts, len(candidates))
        return candidates
    draw = np.random.default_rng(options.seed).choice(len(candidates), options.prompts, replace=False)
    return [candidates[index] for index in sorted(draw)]


def _median_probability(prompts: pa.Table, chosen: Sequence[str]) -> float | None:
    """Of the right answers of the chosen prompts; None where they have none."""
    taken = set(chosen)
    columns = (prompts[name].to_pylist() for name in ("prompt_id", "answer", "probabilities"))
    of_answers = [p_k[a] for own, a, p_k in zip(*columns, strict=True) if own in taken and a is not None]
    return float(np.median(of_answers)) if of_answers else None

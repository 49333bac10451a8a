"""Is it linear, and who estimates it best: the scans that answer this for a model, and the tables that they come to.

1. NeurGrad of all prompts says which of them the model answers rightly; the study is about those, as in the paper.
2. A sweep of sampled neurons measures NEG by intervention, with NeurGrad and the plain gradient of the same neurons.
3. Integrated gradients of the same prompts.
4. A sweep over several ranges of shifts, on fewer prompts.
5. Joint interventions on sets of the sampled neurons, against what their NEGs foretell.

Each is a run of its own, which resumes and is stored as any other. `triples.py` reads NEGs and their estimates from the
runs, `tables.py` makes tables of them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError, nearest
from neg_service.estimation.linear import by_layer, histogram, shifts_of_ranges
from neg_service.estimation.options import ESTIMATORS, Options
from neg_service.estimation.tables import (
    Rows,
    additivity_table,
    estimators_table,
    points_table,
    ranges_tables,
    sets_of,
)
from neg_service.estimation.triples import Triples, integrals_of, triples_of
from neg_service.measures.shifts import GRIDS
from neg_service.measures.targets import KEEP
from neg_service.storage.reader import Run, reading

log = logging.getLogger(__name__)

# A finished run of a measure on chosen neurons of the prompts with these ids, or of all.
Scan = Callable[[Mapping[str, Any], NeuronsConfig, Sequence[str] | None], Run]
# Refuses a measure of chosen neurons that cannot be scanned, before anything is.
Check = Callable[[Mapping[str, Any], NeuronsConfig], object]


@dataclass
class Findings:
    """What a study found: tables by name, and the runs that they come from."""

    runs: dict[str, str] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)

    def tables(self) -> dict[str, pa.Table]:
        """Arrow tables; those without rows are left out."""
        return {name: pa.Table.from_pylist(rows) for name, rows in self.rows.items() if rows}


def check_options(options: Options) -> None:
    """Refuse what would fail after hours of scanning.

    Raises:
        ConfigurationError: naming the key, its value, and what it may be.
    """
    for key, given in (("estimators", options.estimators), ("sets", options.sets)):
        if len(set(given)) < len(given):
            raise ConfigurationError(f"study.{key}={given}: one is named twice")
    if not options.estimators:
        raise ConfigurationError(f"study.estimators=[]: name at least one of {', '.join(ESTIMATORS)}")
    for name in options.estimators:
        if name not in ESTIMATORS:
            raise ConfigurationError(
                f"study.estimators: {name} is unknown; {nearest(name, ESTIMATORS)}known are {', '.join(ESTIMATORS)}"
            )
    if options.answered not in ("right", "all"):
        raise ConfigurationError(f"study.answered={options.answered}: must be right or all")
    if options.keep not in KEEP:
        raise ConfigurationError(f"study.keep={options.keep} is unknown; known are {', '.join(KEEP)}")
    if options.seed < 0:
        raise ConfigurationError(f"study.seed={options.seed}: must not be negative")
    if not math.isfinite(options.set_shift) or options.set_shift == 0:
        raise ConfigurationError(f"study.set_shift={options.set_shift}: must be a finite number, not zero")
    if options.grid not in GRIDS:
        raise ConfigurationError(f"study.grid={options.grid} is unknown; known are {', '.join(GRIDS)}")
    shifts_of_ranges(options.ranges)
    for key, value in (
        ("steps", options.steps),
        ("range_prompts", options.range_prompts),
        ("draws", options.draws),
        *(("prompts", value) for value in [options.prompts] if value is not None),
        *(("neurons", value) for value in [options.neurons] if value is not None),
        *(("sets", value) for value in options.sets),
    ):
        if value < 1:
            raise ConfigurationError(f"study.{key}={value}: must be at least 1")


def run_study(
    options: Options, neurons: NeuronsConfig, scan: Scan, check: Check = lambda measure, neurons: None
) -> Findings:
    """Run or continue the scans, and make the tables; `neurons` chooses layers.

    Raises:
        ConfigurationError: an option that cannot be, or no prompt that the model answers rightly.
    """
    check_options(options)
    if neurons.choose != "all":
        raise ConfigurationError(
            f"neurons.choose={neurons.choose}: a study draws its neurons itself: study.neurons of each layer of "
            f"neurons.layers, or null for all of them"
        )
    found, measures = Findings(), _measures(options)
    sample = whole = NeuronsConfig(neurons.layers)
    if options.neurons is not None:
        sample = NeuronsConfig(neurons.layers, choose="sample", count=options.neurons, per="layer", seed=options.seed)
    chosen = {"neurgrad": whole, "sweep": sample, "integrated_gradients": whole, "ranges": sample}
    for what, measure in measures.items():
        _told_of_a_study(check, measure, chosen[what])

    n_scans = len(measures) + bool(options.sets)

    def run(what: str, ids: Sequence[str] | None) -> Run:
        log.info("scan %d of %d: %s", len(found.runs) + 1, n_scans, what.replace("_", " "))
        made: Run = _told_of_a_study(scan, measures[what], chosen[what], ids)
        found.runs[what] = made.uri
        return made

    answers = run("neurgrad", None)
    ids, found.rows["accuracy"] = _chosen_prompts(answers, options)
    log.info("%d prompts, %s neurons of each layer", len(ids), options.neurons or "all")
    sweep = run("sweep", ids)
    triples = triples_of(sweep, options.estimators, options.seed)
    costs = {"neurgrad": answers.seconds_a_prompt, "sweep": sweep.seconds_a_prompt}
    if "integrated_gradients" in measures:
        integrals = run("integrated_gradients", ids)
        triples.estimates["integrated_gradients"] = integrals_of(integrals, triples)
        costs["integrated_gradients"] = integrals.seconds_a_prompt
    found.rows["estimators"] = estimators_table(triples, options.estimators, options.draws, costs)
    found.rows |= _linearity_of(triples)
    # Spread over the data set, whose prompts lie together by what they ask.
    few = ids[:: max(1, len(ids) // options.range_prompts)][: options.range_prompts]
    found.rows["ranges"], found.rows["curves"] = ranges_tables(run("ranges", few), options.ranges)
    if edits := sets_of(triples, options.sets, options.set_shift, options.seed):
        measures["sets"], chosen["sets"] = _with_basis({"name": "intervene", "edits": edits}, options), NeuronsConfig()
        found.rows["additivity"] = additivity_table(run("sets", ids), triples, edits, options.draws)
    found.rows["points"] = points_table(triples, options.seed)
    return found


def _measures(options: Options) -> dict[str, dict[str, Any]]:
    """The measures of the scans that can be known before there are any results."""
    shifts = shifts_of_ranges(options.ranges)
    measures: dict[str, dict[str, Any]] = {
        "neurgrad": {"name": "neurgrad", "keep": options.keep},
        "sweep": {"name": "sweep", "grid": options.grid},
        "integrated_gradients": {"name": "integrated_gradients", "steps": options.steps, "keep": options.keep},
        "ranges": {"name": "sweep", "shifts": shifts, "keep_curves": True},
    }
    if "integrated_gradients" not in options.estimators:
        del measures["integrated_gradients"]
    return {what: _with_basis(measure, options) for what, measure in measures.items()}


def _with_basis(measure: dict[str, Any], options: Options) -> dict[str, Any]:
    return {**measure, "basis": options.basis}


def _told_of_a_study(call: Callable[..., Any], *arguments: Any) -> Any:
    """What is refused of a scan's key is told of the study's, under which a person sets it."""
    try:
        return call(*arguments)
    except ConfigurationError as error:
        said = re.sub(r"\bmeasure\.(basis|keep|steps|grid)\b", r"study.\1", str(error))
        said = re.sub(r"\bneurons\.count\b", "study.neurons", said).replace("keep=all or top_k", "keep=all")
        raise type(error)(said) from error


def _linearity_of(triples: Triples) -> dict[str, Rows]:
    """How linear the curves are that NEG was fitted to: by layer, and as histograms."""
    return {
        "layers": by_layer(triples.r, triples.r2, triples.neg, triples.is_resolved, triples.layer),
        "histogram": [
            {"what": what, **row}
            for what, values in (("r", np.abs(triples.r)), ("r2", triples.r2))
            for row in histogram(values[triples.is_resolved])
        ],
    }


def _chosen_prompts(run: Run, options: Options) -> tuple[list[str], Rows]:
    with reading(run):
        columns = ["prompt_id", "targets", "answer", "prediction", "probabilities"]
        prompts = run.table("prompts", columns=columns).to_table()
    ids = prompts["prompt_id"].to_pylist()
    answer, prediction = prompts["answer"].to_pylist(), prompts["prediction"].to_pylist()
    right = [own for own, a, p in zip(ids, answer, prediction, strict=True) if a is not None and a == p]
    known = sum(a is not None for a in answer)
    accuracy = {"prompts": len(ids), "with_answer": known, "right": len(right)}
    wanted = ids
    if options.answered == "right" and known and all(len(targets) < 2 for targets in prompts["targets"].to_pylist()):
        raise ConfigurationError(
            "study.answered=right: prompts have one target each, which is always the most probable one; give them "
            "several, or use study.answered=all"
        )
    if options.answered == "right" and known:
        wanted = right
        if not right:
            raise ConfigurationError(
                f"study.answered=right: the model answers none of {known} prompts rightly; use study.answered=all"
            )
    if options.prompts is not None and len(wanted) > options.prompts:
        draw = np.random.default_rng(options.seed).choice(len(wanted), options.prompts, replace=False)
        wanted = [wanted[index] for index in sorted(draw)]
    elif options.prompts is not None and len(wanted) < options.prompts:
        log.warning("study.prompts=%d, but there are only %d such prompts", options.prompts, len(wanted))
    taken = set(wanted)
    of_answers = [
        p_k[a]
        for own, a, p_k in zip(ids, answer, prompts["probabilities"].to_pylist(), strict=True)
        if own in taken and a is not None
    ]
    median = float(np.median(of_answers)) if of_answers else None
    return wanted, [accuracy | {"studied": len(wanted), "median_probability": median}]

"""Is it linear, and who estimates it best: the scans that answer this for a model, and the tables that they come to.

1. NeurGrad of all prompts says which of them the model answers rightly; the study is about those, as in the paper.
2. A sweep of sampled neurons measures NEG by intervention, with NeurGrad and the plain gradient of the same neurons.
3. Integrated gradients of the same prompts.
4. A sweep over each of several ranges of shifts, on fewer prompts.
5. Joint interventions on sets of the sampled neurons, against what their NEGs predict.

`selection.py` chooses the prompts, `triples.py` reads NEGs and their estimates from the runs, `tables.py` makes tables
of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from neg_service.config import NeuronsConfig, ScanConfig
from neg_service.errors import ConfigurationError
from neg_service.storage.reader import Run
from neg_service.studies.linearity.curves import sweep_of_range
from neg_service.studies.linearity.options import LinearityOptions, check_options
from neg_service.studies.linearity.selection import select_prompts, spread_over
from neg_service.studies.linearity.tables import (
    additivity_table,
    curves_table,
    estimators_table,
    linearity_tables,
    points_table,
    range_table,
    sets_of,
)
from neg_service.studies.linearity.triples import Triples, integrals_of, triples_of
from neg_service.studies.scans import StudyScans
from neg_service.studies.tables import StudyTables

log = logging.getLogger(__name__)
# Settings of a scan, and the study's own under which a person sets them.
_OF_A_STUDY = {f"measure.{name}": f"study.{name}" for name in ("basis", "keep", "steps", "grid")} | {
    "neurons.count": "study.neurons",
    # A study keeps NeurGrad of the answer or of all targets.
    "measure.keep=all or top_k": "study.keep=all",
}
P = ParamSpec("P")
T = TypeVar("T")


def run_linearity(options: LinearityOptions, scans: StudyScans) -> StudyTables:
    """Run or continue the scans, and make the tables; `neurons` of the scans' settings chooses layers.

    Raises:
        ConfigurationError: an option that cannot be, or no prompt that the model answers rightly.
    """
    check_options(options)
    planned = _planned(options, scans)
    for settings in planned.values():
        _told_of_a_study(scans.check_scan, settings)
    n_scans = len(planned) + bool(options.sets)

    def run(purpose: str, settings: ScanConfig) -> Run:
        return _told_of_a_study(scans.run, purpose, settings, n_scans)

    tables = StudyTables()
    answers = run("neurgrad", planned["neurgrad"])
    ids, accuracy = select_prompts(answers, options)
    tables.extend("accuracy", [accuracy])
    log.info("%d prompts, %s neurons of each layer", len(ids), options.neurons or "all")

    sweep = run("sweep", _of_prompts(planned["sweep"], ids))
    triples = triples_of(sweep, options.estimators, options.seed)
    costs = {"neurgrad": answers.seconds_a_prompt, "sweep": sweep.seconds_a_prompt}
    if "integrated_gradients" in planned:
        integrals = run("integrated_gradients", _of_prompts(planned["integrated_gradients"], ids))
        triples.estimates["integrated_gradients"] = integrals_of(integrals, triples)
        costs["integrated_gradients"] = integrals.seconds_a_prompt
    tables.extend("estimators", estimators_table(triples, options.estimators, options.draws, costs))
    for name, rows in linearity_tables(triples).items():
        tables.extend(name, rows)

    few = spread_over(ids, options.range_prompts)
    for largest in options.ranges:
        purpose = _purpose_of(largest)
        of_range = run(purpose, _of_prompts(planned[purpose], few))
        tables.extend("ranges", range_table(of_range, largest))
        if largest == max(options.ranges):
            tables.extend("curves", curves_table(of_range))
    _add_sets(tables, options, scans, triples, lambda settings: run("sets", _of_prompts(settings, ids)))
    tables.extend("points", points_table(triples, options.seed))
    return tables


def _planned(options: LinearityOptions, scans: StudyScans) -> dict[str, ScanConfig]:
    """The scans that can be described before there are any results, by what they are for.

    Raises:
        ConfigurationError: neurons were chosen, which a study draws itself.
    """
    neurons = scans.settings.neurons
    if neurons.choose != "all":
        raise ConfigurationError(
            "a study draws its neurons itself: study.neurons of each layer of neurons.layers, or null for all of them",
            setting="neurons.choose",
            value=neurons.choose,
        )
    sample = whole = NeuronsConfig(neurons.layers)
    if options.neurons is not None:
        sample = NeuronsConfig(neurons.layers, choose="sample", count=options.neurons, per="layer", seed=options.seed)

    def settings(own_neurons: NeuronsConfig, **measure: Any) -> ScanConfig:
        return scans.settings_of({**measure, "basis": options.basis}, own_neurons)

    planned = {
        "neurgrad": settings(whole, name="neurgrad", keep=options.keep),
        "sweep": settings(sample, name="sweep", grid=options.grid),
        "integrated_gradients": settings(
            whole, name="integrated_gradients", steps=options.steps, keep=options.keep
        ),
    }  # fmt: skip
    for largest in options.ranges:
        # They are judged in log-odds, too, and of the widest some are shown.
        sweep = sweep_of_range(largest) | {"keep_curves": True}
        planned[_purpose_of(largest)] = settings(sample, **sweep)
    if "integrated_gradients" not in options.estimators:
        del planned["integrated_gradients"]
    return planned


def _purpose_of(largest: float) -> str:
    return f"range-{largest:g}"


def _add_sets(
    tables: StudyTables, options: LinearityOptions, scans: StudyScans, triples: Triples,
    run: Callable[[ScanConfig], Run],
) -> None:  # fmt: skip
    """The table of sets that are shifted together, where there are enough neurons for one."""
    edits = sets_of(triples, options.sets, options.set_shift, options.seed)
    if edits:
        measure = {"name": "intervene", "edits": edits, "basis": options.basis}
        joint = run(scans.settings_of(measure, NeuronsConfig()))
        tables.extend("additivity", additivity_table(joint, triples, edits, options.draws))


def _of_prompts(settings: ScanConfig, ids: Sequence[str]) -> ScanConfig:
    """The same scan of these prompts alone, wherever in the data set they are."""
    return replace(
        settings, dataset=replace(settings.dataset, ids=list(ids)), job=replace(settings.job, limit=None)
    )  # fmt: skip


def _told_of_a_study(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What is refused of a scan's key is told of the study's, under which a person sets it."""
    try:
        return call(*args, **kwargs)
    except ConfigurationError as error:
        raise error.renamed(_OF_A_STUDY) from error

"""A study of skill neurons from beginning to end: train ranks neurons, valid says how many, test what they can do.

1. The prompts of all splits and contexts are made, so that what cannot be asked is refused before anything is scanned.
2. Scores of train rank the neurons of each task.
3. Predictions of the best ones on valid and test, and on train for the forest, are what probes answer from.
4. Robustness scans each task in other contexts, interdependency suppresses the neurons of each.

`scans.py` runs the scans and reads them, `analyses.py` asks, `tables.py` makes rows of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from neg_service.config import DatasetConfig
from neg_service.errors import ConfigurationError
from neg_service.prompts.mceval8k import chosen_tasks, load_tasks
from neg_service.prompts.tasks import TASKS
from neg_service.prompts.templates import templates_of
from neg_service.studies.scans import StudyScans
from neg_service.studies.skills.analyses import (
    TaskData,
    accuracies,
    efficiency,
    flexibility,
    interdependency,
    needed_neurons,
    robustness,
)
from neg_service.studies.skills.options import Context, SkillOptions, check_options, contexts_of
from neg_service.studies.skills.scans import SkillScans
from neg_service.studies.skills.scores import SkillScores
from neg_service.studies.skills.tables import neuron_rows, overlap_rows
from neg_service.studies.tables import StudyTables

log = logging.getLogger(__name__)
_SPLITS = ["train", "valid", "test"]


def run_skills(options: SkillOptions, scans: StudyScans) -> StudyTables:
    """Run or continue the scans, and make the tables; the data set of the scans' settings names the tasks.

    Raises:
        ConfigurationError: an option that the model or the tasks do not allow.
    """
    check_options(options)
    dataset = scans.settings.dataset
    tasks, context = chosen_tasks(dataset.task), Context.of(dataset)
    contexts = {task: _contexts(options, context, task, dataset) for task in tasks}
    _require_prompts(dataset, contexts)

    skill_scans, tables = SkillScans(options, scans), StudyTables()
    train = skill_scans.train(tasks, context)
    _require_neurons(options, train.scores)
    chosen = {task: needed_neurons(own, options) for task, own in train.scores.items()}
    splits = _SPLITS if "forest" in options.probes else _SPLITS[1:]
    read = skill_scans.predictions(chosen, context, splits)
    for task, scores in train.scores.items():
        data = TaskData(task, scores, train.answers[task], {split: read(task, split) for split in splits})
        tables.extend("neurons", neuron_rows(task, scores, max(options.sizes), train.numbering))
        tables.extend("accuracy", accuracies(data, options))
        if "efficiency" in options.studies:
            tables.extend("efficiency", efficiency(data, options))
        if "flexibility" in options.studies:
            tables.extend("flexibility", flexibility(data, options))
    tables.extend("overlap", overlap_rows(train.scores, sorted(options.sizes)))
    if "robustness" in options.studies:
        for task in tasks:
            tables.extend("robustness", robustness(task, train.scores[task], contexts[task], options, skill_scans))
    if "interdependency" in options.studies:
        rows = interdependency(train.scores, train.numbering, context, options, skill_scans)
        tables.extend("interdependency", rows)
    return tables


def _contexts(options: SkillOptions, context: Context, task: str, dataset: DatasetConfig) -> list[Context]:
    """How a task is put to the model, first as the settings say."""
    if "robustness" not in options.studies:
        return [context]
    return contexts_of(options, context, templates_of(TASKS[task], dataset.templates))


def _require_prompts(dataset: DatasetConfig, contexts: Mapping[str, Sequence[Context]]) -> None:
    """Refuse what cannot be asked: each task in all of its contexts, on all splits."""
    one_row = replace(dataset, limit=1, split=list(_SPLITS))
    for task, of_task in contexts.items():
        for context in of_task:
            load_tasks(replace(one_row, task=task, **asdict(context)))


def _require_neurons(options: SkillOptions, scores: Mapping[str, SkillScores]) -> None:
    for task, own in scores.items():
        if max(options.sizes) > len(own.neurons):
            raise ConfigurationError(
                f"the chosen layers have {len(own.neurons)} neurons", setting="probe.sizes", value=options.sizes
            )
        log.info("%s: neurons ranked on %d prompts", task, own.n_prompts)

"""The scans of a study of skill neurons, and what is read from them: scores on train, predictions on any split.

Either NeurGrad of all labels is stored, and both are computed from it, or each scan adds up or keeps only what is asked
for; both ways give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from neg_service.config import NeuronsConfig
from neg_service.neurons import NeuronSet
from neg_service.prompts.tasks import task_of
from neg_service.storage.reader import Run, reading
from neg_service.studies.scans import StudyScans
from neg_service.studies.skills.numbering import Numbering
from neg_service.studies.skills.options import Context, SkillOptions
from neg_service.studies.skills.parts import Ints
from neg_service.studies.skills.predictions import NeuronPredictions, read_predictions
from neg_service.studies.skills.scores import SkillScores, read_scores

# Scores doubling from a shard on, where efficiency is not told after how many prompts.
_DOUBLINGS = 8
# Their shards have one size, so that scores that were added up and those from stored gradients end at the same prompts.
_BY_SHARD = ("neurgrad", "skill_scores")


@dataclass(frozen=True)
class Train:
    """What train says of each task: skill scores, and the right labels of its prompts."""

    scores: dict[str, SkillScores]
    answers: dict[str, Ints]
    numbering: Numbering


class SkillScans:
    """Scans splits of tasks, and reads what neurons say there."""

    def __init__(self, options: SkillOptions, scans: StudyScans) -> None:
        self._options, self._scans = options, scans
        # Known from train on, which names neurons by their numbers through all layers.
        self._numbering = Numbering([])

    def train(self, tasks: Sequence[str], context: Context) -> Train:
        """Scores of all tasks, also over the first prompts where efficiency asks for them, and what they come from."""
        run = self._scan(self._measure_of_scores(), tasks, "train", context)
        scores = read_scores(run, self._train_sizes())
        self._numbering = Numbering.of_run(run)
        return Train(scores, _answers_of(run), self._numbering)

    def scores(self, task: str, context: Context) -> SkillScores:
        """Scores of a task, as another context gives them."""
        return read_scores(self._scan(self._measure_of_scores(), [task], "train", context))[task]

    def predictions(
        self, chosen: Mapping[str, Ints], context: Context, splits: Iterable[str]
    ) -> Callable[[str, str], NeuronPredictions]:
        """Gives a task's predictions on a split when called; those of all tasks together may not fit into memory.

        chosen: by task, the neurons whose predictions are asked for, ascending.
        """
        measure, neurons = {"name": "neurgrad"}, None
        if not self._options.store_gradients:
            by_task = {task: self._numbering.set_of(own) for task, own in chosen.items()}
            measure, neurons = (
                {"name": "neuron_predictions"},
                NeuronsConfig(choose="list", list=NeuronSet.by_task(by_task)),
            )
        runs = {split: self._scan(measure, list(chosen), split, context, neurons) for split in splits}
        return lambda task, split: read_predictions(runs[split], task, chosen[task])

    def edited(self, edits: Sequence[Mapping[str, Any]], tasks: Sequence[str], context: Context) -> Run:
        """Joint interventions on the tests of tasks."""
        return self._scan({"name": "intervene", "edits": list(edits)}, tasks, "test", context)

    def _scan(
        self,
        measure: Mapping[str, Any],
        tasks: Sequence[str],
        split: str,
        context: Context,
        neurons: NeuronsConfig | None = None,
    ) -> Run:
        options, shared = self._options, self._scans.settings
        limit = getattr(options, split)
        settings = self._scans.settings_of(
            {"basis": options.basis, **measure},
            neurons,
            dataset={
                "task": list(tasks),
                "split": split,
                "limit": shared.dataset.limit if limit is None else limit,
                **asdict(context),
            },
            shard_size=options.shard_size if measure["name"] in _BY_SHARD else "auto",
        )
        return self._scans.run(f"{measure['name']} of {', '.join(tasks)}, {split} ({context.name})", settings)

    def _measure_of_scores(self) -> dict[str, Any]:
        return {"name": "neurgrad" if self._options.store_gradients else "skill_scores"}

    def _train_sizes(self) -> list[int]:
        """After how many train prompts scores are looked at: as asked, or doubling from a shard on."""
        options = self._options
        if "efficiency" not in options.studies:
            return []
        if options.train_sizes is not None:
            return options.train_sizes
        return [options.shard_size * 2**i for i in range(_DOUBLINGS)]


def _answers_of(run: Run) -> dict[str, Ints]:
    """The right labels of a run's prompts, by task."""
    with reading(run):
        table = run.table("prompts", ["prompt_id", "answer"]).to_table()
    task_p = np.array([task_of(own) for own in table["prompt_id"].to_pylist()])
    answer_p = table["answer"].to_numpy().astype(np.int64)
    return {task: answer_p[task_p == task] for task in dict.fromkeys(task_p.tolist())}

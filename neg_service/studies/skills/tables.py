"""The tables of a study of skill neurons, a function for each kind of row.

`accuracy` has a row for each task, probe, number of neurons and split, `efficiency` the same by number of train
prompts, `neurons` one for each of the best neurons, `overlap` for each pair of tasks, `flexibility` for each block of
neurons, `robustness` for each pair of contexts, `interdependency` for each task and edit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from neg_service.prompts.tasks import TASKS
from neg_service.studies.skills.numbering import Numbering
from neg_service.studies.skills.parts import Ints
from neg_service.studies.skills.probes import Accuracy
from neg_service.studies.skills.scores import SkillScores
from neg_service.studies.tables import Row, Rows

# The scores that neurons are ranked by, each with a probe of its name.
SCORES = ("polarity", "magnitude")


def accuracy_columns(found: Accuracy, n_prompts: int) -> Row:
    """A share of right answers with its interval."""
    return {"accuracy": found.value, "low": found.low, "high": found.high, "n_prompts": n_prompts}


def task_columns(task: str) -> Row:
    """A task and its genre, which is empty for a task of somebody's own."""
    return {"task": task, "genre": TASKS[task].genre if task in TASKS else ""}


def accuracy_row(
    task: str, probe: str, n_neurons: int, n_train: int, split: str, found: Accuracy, n_prompts: int, *, is_chosen: bool
) -> Row:
    """What a probe with so many neurons reached; `is_chosen`: the number that valid is best with."""
    return {
        **task_columns(task), "probe": probe, "n_neurons": n_neurons, "n_train": n_train, "split": split,
        **accuracy_columns(found, n_prompts), "is_chosen": is_chosen,
    }  # fmt: skip


def neuron_rows(task: str, scores: SkillScores, most: int, numbering: Numbering) -> Rows:
    """The best neurons of a task, by each score."""
    rows: Rows = []
    for name in SCORES:
        ranking = scores.ranked(name).first(most)
        rows += [
            {
                "task": task, "score_name": name, "rank": rank, **named, "score": int(ranking.score[rank]),
                "polarity": int(ranking.polarity[rank]), "n_train": scores.n_prompts,
            }
            for rank, named in enumerate(numbering.columns(ranking.neurons))
        ]  # fmt: skip
    return rows


def overlap_rows(scores: Mapping[str, SkillScores], sizes: Sequence[int]) -> Rows:
    """How many of two tasks' best neurons are the same, and how many would be by chance."""
    rows: Rows = []
    for name in SCORES:
        rankings = {task: own.ranked(name) for task, own in scores.items()}
        for size in sizes:
            for first, second in combinations(scores, 2):
                a, b = (set(rankings[task].first(size).neurons.tolist()) for task in (first, second))
                of_both = _n_shared(scores[first].neurons, scores[second].neurons)
                by_chance = size**2 * of_both / (len(scores[first].neurons) * len(scores[second].neurons))
                rows.append(
                    {
                        "task": first, "other_task": second, "score_name": name, "n_neurons": size,
                        "shared": len(a & b), "by_chance": by_chance,
                    }
                )  # fmt: skip
    return rows


def _n_shared(one: Ints, other: Ints) -> int:
    """How many neurons two tasks can share: all, but for experts that the prompts of one alone use."""
    return len(one) if np.array_equal(one, other) else len(np.intersect1d(one, other))

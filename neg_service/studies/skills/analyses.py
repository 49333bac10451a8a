"""What is asked of ranked neurons: the accuracy of every probe, and the four analyses of skill neurons.

| analysis          | asks                                                                                       |
|-------------------|--------------------------------------------------------------------------------------------|
| `efficiency`      | how accuracy depends on the number of train prompts                                         |
| `flexibility`     | how well the next neurons of the ranking do, in blocks without the ones before              |
| `robustness`      | how neurons found with one template, number of shots or demonstrations do with another        |
| `interdependency` | what suppressing a task's skill neurons does to the model's answers on this and other tasks |

The setting `probe.studies` names them. Neurons are chosen on the train split, their number on valid, and accuracy is
reported on test; no choice sees test.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc

from neg_service.prompts.tasks import task_of
from neg_service.storage.reader import reading
from neg_service.studies.skills import probes
from neg_service.studies.skills.numbering import Numbering
from neg_service.studies.skills.options import Context, SkillOptions
from neg_service.studies.skills.parts import Ints
from neg_service.studies.skills.predictions import NeuronPredictions
from neg_service.studies.skills.probes import Accuracy, accuracy
from neg_service.studies.skills.scans import SkillScans
from neg_service.studies.skills.scores import Ranking, SkillScores
from neg_service.studies.skills.tables import SCORES, accuracy_columns, accuracy_row, task_columns
from neg_service.studies.tables import Row, Rows

log = logging.getLogger(__name__)

# What a probe answers, by number of neurons; 0 for baselines without neurons.
Answers = dict[int, Ints]
_ASKED = ("valid", "test")
_PROBE_OF_SCORE = {"polarity": probes.polarity, "magnitude": probes.magnitude}


@dataclass(frozen=True)
class TaskData:
    """A task: its skill scores, the right labels of train, and by split what chosen neurons predict."""

    task: str
    scores: SkillScores
    train_answer_p: Ints
    predictions: Mapping[str, NeuronPredictions]


def needed_neurons(scores: SkillScores, options: SkillOptions) -> Ints:
    """All neurons whose predictions any probe or analysis within one context needs, ascending."""
    most = max(options.sizes)
    rankings = [scores.ranked(name).first(most) for name in SCORES]
    rankings += [ranking.first(most) for ranking in _firing(scores, options)]
    rankings.append(scores.of_random("polarity", most, options.seed))
    for n_train in scores.at:
        rankings += [scores.ranked(name, n_train).first(options.efficiency_neurons) for name in SCORES]
    return np.unique(np.concatenate([ranking.neurons for ranking in rankings]))


def accuracies(data: TaskData, options: SkillOptions) -> Rows:
    """All probes and baselines, at every number of neurons, which is chosen on valid."""
    rows: Rows = []
    right = {split: data.predictions[split].answer_p for split in _ASKED}
    for probe in options.probes:
        reached = {
            split: {m: accuracy(own, right[split]) for m, own in by_size.items()}
            for split, by_size in _answers_of(probe, data, options).items()
        }
        best = best_size(reached["valid"])
        rows += [
            accuracy_row(data.task, probe, m, data.scores.n_prompts, split, own, len(right[split]), is_chosen=m == best)
            for split, by_size in reached.items()
            for m, own in by_size.items()
        ]
        with_neurons = f", {best} neurons" if best else ""
        log.info("%s: %s %.3f on test%s", data.task, probe, reached["test"][best].value, with_neurons)
    return rows


def _answers_of(probe: str, data: TaskData, options: SkillOptions) -> dict[str, Answers]:
    """What a probe answers on valid and test."""
    sizes, seed, scores = sorted(options.sizes), options.seed, data.scores
    answer: Callable[[NeuronPredictions], Answers]
    if probe == "forest":
        asked = [data.predictions[split] for split in _ASKED]
        ranking = scores.ranked("magnitude")
        fitted = {m: probes.forest(data.predictions["train"], asked, ranking, m, seed) for m in sizes}
        return {split: {m: both[i] for m, both in fitted.items()} for i, split in enumerate(_ASKED)}
    if probe in _PROBE_OF_SCORE:
        answer = partial(_PROBE_OF_SCORE[probe], ranking=scores.ranked(probe), sizes=sizes)
    elif probe == "random":
        drawn = scores.of_random("polarity", max(sizes), seed)
        answer = partial(probes.polarity, ranking=drawn, sizes=sizes)
    elif probe == "activation":
        rankings = [ranking.first(max(sizes)) for ranking in _firing(scores, options)]
        answer = partial(probes.activation, rankings=rankings, means=scores.means_of(rankings), sizes=sizes)
    elif probe == "probability":
        answer = lambda own: {0: probes.probability(own)}  # noqa: E731
    else:
        answer = lambda own: {0: probes.majority(data.train_answer_p, own)}  # noqa: E731
    return {split: answer(data.predictions[split]) for split in _ASKED}


def efficiency(data: TaskData, options: SkillOptions) -> Rows:
    """Accuracy with neurons that the first so many train prompts rank."""
    most = min(options.efficiency_neurons, max(options.sizes))
    sizes = [size for size in sorted(options.sizes) if size <= most]
    valid, test = data.predictions["valid"], data.predictions["test"]
    rows: Rows = []
    for n_train in data.scores.at:
        for name in SCORES:
            ranking = data.scores.ranked(name, n_train).first(most)
            on_valid = {
                m: accuracy(own, valid.answer_p) for m, own in _PROBE_OF_SCORE[name](valid, ranking, sizes).items()
            }
            best = best_size(on_valid)
            for m, answer_p in _PROBE_OF_SCORE[name](test, ranking, sizes).items():
                reached = accuracy(answer_p, test.answer_p)
                rows.append(
                    accuracy_row(
                        data.task, name, m, n_train, "test", reached, len(test.answer_p), is_chosen=m == best
                    )
                )  # fmt: skip
    return rows


def flexibility(data: TaskData, options: SkillOptions) -> Rows:
    """Accuracy with blocks of neurons down the ranking."""
    test, block = data.predictions["test"], options.block
    rows: Rows = []
    for name in SCORES:
        ranking = data.scores.ranked(name)
        for i in range(min(options.blocks, max(options.sizes) // block)):
            own = ranking.block(i * block, (i + 1) * block)
            reached = accuracy(_PROBE_OF_SCORE[name](test, own, [block])[block], test.answer_p)
            place: Row = {"probe": name, "first_rank": i * block, "n_neurons": block}
            rows.append(task_columns(data.task) | place | accuracy_columns(reached, len(test.answer_p)))
    return rows


def robustness(
    task: str, scores: SkillScores, contexts: Sequence[Context], options: SkillOptions, scans: SkillScans
) -> Rows:
    """Accuracy in each context with the neurons of each; `scores` are of the first of them."""
    m = min(options.block, max(options.sizes))
    scores_of = {contexts[0]: scores} | {context: scans.scores(task, context) for context in contexts[1:]}
    rankings = {(context, name): own.ranked(name).first(m) for context, own in scores_of.items() for name in SCORES}
    chosen = np.unique(np.concatenate([ranking.neurons for ranking in rankings.values()]))
    rows: Rows = []
    for used in contexts:
        test = scans.predictions({task: chosen}, used, ["test"])(task, "test")
        for (source, name), ranking in rankings.items():
            reached = accuracy(_PROBE_OF_SCORE[name](test, ranking, [m])[m], test.answer_p)
            shared = len(np.intersect1d(ranking.neurons, rankings[used, name].neurons))
            place: Row = {
                "probe": name, "found_with": source.name, "used_with": used.name, "n_neurons": m,
                "shared_neurons": shared,
            }  # fmt: skip
            rows.append(task_columns(task) | place | accuracy_columns(reached, len(test.answer_p)))
        log.info("%s: neurons of %d contexts used with %s", task, len(contexts), used.name)
    return rows


def interdependency(
    scores: Mapping[str, SkillScores], numbering: Numbering, context: Context, options: SkillOptions, scans: SkillScans
) -> Rows:
    """The model's own accuracy on each task while neurons of each task, or drawn ones, are suppressed."""
    m = min(options.suppressed, min(len(own.neurons) for own in scores.values()))
    rankings = {task: own.ranked("polarity").first(m) for task, own in scores.items()}
    drawn = next(iter(scores.values())).of_random("polarity", m, options.seed)
    signs = np.random.default_rng(options.seed).choice(np.array([-1, 1], np.int8), len(drawn.neurons))
    rankings["random"] = Ranking(drawn.neurons, signs, drawn.score)
    edits = [_suppressing(name, own, numbering, options.suppress_by) for name, own in rankings.items()]
    run = scans.edited(edits, list(scores), context)
    columns = ["prompt_id", "edit", "target_index", "prediction_before", "prediction"]
    columns += ["n_routed"] * numbering.has_experts
    with reading(run):
        table = run.table("intervene", columns, filter=pc.field("is_answer")).to_table()
    task_r = np.array([task_of(own) for own in table["prompt_id"].to_pylist()])
    edit_r = np.array(table["edit"].to_pylist())
    right_r, before_r, after_r = (table[column].to_numpy() for column in columns[2:5])
    rows: Rows = []
    for task in scores:
        for edit in rankings:
            own = (task_r == task) & (edit_r == edit)
            reached = accuracy(after_r[own], right_r[own])
            place: Row = {
                "suppressed": edit, "n_neurons": m, "shift": options.suppress_by,
                "accuracy_before": float((before_r == right_r)[own].mean()),
            }  # fmt: skip
            if numbering.has_experts:
                # How many of them a prompt used, on average; others cannot be suppressed there.
                place["n_routed"] = float(table["n_routed"].to_numpy()[own].mean())
            rows.append(task_columns(task) | place | accuracy_columns(reached, int(own.sum())))
    log.info("suppressed %d neurons of each of %d tasks", m, len(scores))
    return rows


def best_size(on_valid: Mapping[int, Accuracy]) -> int:
    """The number of neurons with the highest accuracy, the smaller one of equals."""
    return max(sorted(on_valid), key=lambda size: on_valid[size].value)


def _firing(scores: SkillScores, options: SkillOptions) -> list[Ranking]:
    """For each bit of a label the neurons that fire with it, if there is a probe of them."""
    if "activation" not in options.probes:
        return []
    return [scores.ranked(name) for name in sorted(scores.all()) if name.startswith("fires/")]


def _suppressing(name: str, ranking: Ranking, numbering: Numbering, by: float) -> dict[str, Any]:
    known = ranking.polarity != 0
    return {
        "name": name,
        "neurons": numbering.names(ranking.neurons[known]),
        "polarity": ranking.polarity[known].tolist(),
        "suppress": by,
    }

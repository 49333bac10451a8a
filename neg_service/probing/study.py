"""A probe of tasks from beginning to end: scans, rankings, probes and baselines, and the four studies of skill neurons.

| study             | asks                                                                                       |
|-------------------|--------------------------------------------------------------------------------------------|
| `efficiency`      | how accuracy depends on the number of train prompts                                         |
| `flexibility`     | how well the next neurons of the ranking do, in blocks without the ones before              |
| `robustness`      | how neurons found with one wording, number of shots or demonstrations do with another        |
| `interdependency` | what suppressing a task's skill neurons does to the model's answers on this and other tasks |

Neurons are chosen on the train split, their number on valid, and accuracy is reported on test; no choice sees test.
Scans are somebody else's business: a `Scan` runs or continues one, and gives its run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from neg_service.errors import ConfigurationError
from neg_service.measures.builtin.neuron_predictions import as_text
from neg_service.probing import probes
from neg_service.probing.options import Context, Options, check_options, contexts_of
from neg_service.probing.probes import Accuracy, Votes, accuracy, read_votes
from neg_service.probing.ranking import Ints, Ranking, TaskScores, layers_and_size, scores_of
from neg_service.prompts.tasks import TASKS, task_of
from neg_service.prompts.wording import wordings_of
from neg_service.storage.reader import Run, reading

log = logging.getLogger(__name__)

_KINDS = ("polarity", "magnitude")


class Scan(Protocol):
    """Runs a measure on one split of tasks, or continues it, and gives its run when it is done."""

    def __call__(self, measure: Mapping[str, Any], tasks: Sequence[str], split: str, context: Context) -> Run:
        """The finished run."""
        ...


@dataclass
class Findings:
    """The tables of a probe, by name, as rows; and the runs that they are made from."""

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)

    def add(self, table: str, **row: Any) -> None:
        """A row of a table."""
        self.rows.setdefault(table, []).append(row)

    def tables(self) -> dict[str, pa.Table]:
        """Arrow tables."""
        return {name: pa.Table.from_pylist(rows) for name, rows in self.rows.items()}


def run_probe(
    tasks: Sequence[str], context: Context, options: Options, scan: Scan, wordings: str | None = None
) -> Findings:
    """Probe tasks, and make the studies that were asked for; `wordings` is a user's own file of them.

    Raises:
        ConfigurationError: an option that the model or the tasks do not allow.
    """
    check_options(options)
    return _Probe(tasks, context, options, scan, wordings).run()


class _Probe:
    def __init__(
        self, tasks: Sequence[str], context: Context, options: Options, scan: Scan, wordings: str | None
    ) -> None:
        self.tasks, self.context, self.options = list(tasks), context, options
        self._wordings = wordings
        # Known once train was scanned.
        self._n_neurons = 0
        self._train_answers: dict[str, Ints] = {}
        self.found = Findings()
        self._scan = scan
        self._sizes = sorted(options.sizes)

    def run(self) -> Findings:
        scores = self._scores(self.tasks, self.context)
        for task, own in scores.items():
            if max(self._sizes) > len(own.neurons):
                raise ConfigurationError(
                    f"probe.sizes={self.options.sizes}: the chosen layers have {len(own.neurons)} neurons"
                )
            log.info("%s: neurons ranked on %d prompts", task, own.n_prompts)
        chosen = {task: self._chosen(own) for task, own in scores.items()}
        wanted = ["train", "valid", "test"] if "forest" in self.options.probes else ["valid", "test"]
        read = self._votes(chosen, self.context, wanted)
        for task, own in scores.items():
            votes = {split: read(task, split) for split in wanted}
            self._note_neurons(task, own)
            self._accuracies(task, own, votes)
            if "efficiency" in self.options.studies:
                self._efficiency(task, own, votes)
            if "flexibility" in self.options.studies:
                self._flexibility(task, own, votes["test"])
        self._overlap(scores)
        if "robustness" in self.options.studies:
            for task in self.tasks:
                self._robustness(task, scores[task])
        if "interdependency" in self.options.studies:
            self._interdependency(scores)
        return self.found

    # --- where scores and votes come from

    def _run(self, measure: Mapping[str, Any], tasks: Sequence[str], split: str, context: Context) -> Run:
        run = self._scan({"basis": self.options.basis, **measure}, tasks, split, context)
        self.found.runs.append(run.uri)
        return run

    def _scores(self, tasks: Sequence[str], context: Context) -> dict[str, TaskScores]:
        measure = {"name": "neurgrad"} if self.options.store_gradients else {"name": "scores"}
        run = self._run(measure, tasks, "train", context)
        if context == self.context:
            self._n_neurons = layers_and_size(run)[1]
            self._train_answers = _answers_of(run)
        return scores_of(run, self._train_sizes() if context == self.context else ())

    def _votes(
        self, chosen: Mapping[str, Ints], context: Context, splits: Iterable[str]
    ) -> Callable[[str, str], Votes]:
        """Gives a task's votes on a split when asked, because those of all tasks together may not fit into memory."""
        measure: dict[str, Any] = {"name": "neurgrad"}
        if not self.options.store_gradients:
            measure = {"name": "votes", "chosen": {task: as_text(own) for task, own in chosen.items()}}
        runs = {split: self._run(measure, list(chosen), split, context) for split in splits}
        return lambda task, split: read_votes(runs[split], task, chosen[task])

    def _train_sizes(self) -> list[int]:
        """After how many train prompts scores are looked at: as asked, or doubling from a shard on."""
        if "efficiency" not in self.options.studies:
            return []
        if self.options.train_sizes is not None:
            return self.options.train_sizes
        return [self.options.shard_size * 2**i for i in range(8)]

    def _chosen(self, own: TaskScores) -> Ints:
        """All neurons whose votes any probe or study of this context needs, ascending."""
        most = max(self._sizes)
        rankings = [own.ranked(kind).first(most) for kind in _KINDS]
        rankings += [ranking.first(most) for ranking in self._firing(own)]
        rankings.append(own.of_random("polarity", most, self.options.seed))
        for n_train in own.at:
            rankings += [own.ranked(kind, n_train).first(self.options.efficiency_neurons) for kind in _KINDS]
        return np.unique(np.concatenate([ranking.neurons for ranking in rankings]))

    def _firing(self, own: TaskScores) -> list[Ranking]:
        """For each bit of a label the neurons that fire with it."""
        if "activation" not in self.options.probes:
            return []
        return [own.ranked(name) for name in sorted(own.all()) if name.startswith("fires/")]

    # --- accuracies

    def _accuracies(self, task: str, own: TaskScores, votes: Mapping[str, Votes]) -> None:
        """All probes and baselines, at every number of neurons, which is chosen on valid."""
        asked = {split: votes[split] for split in ("valid", "test")}
        for probe in self.options.probes:
            answers = self._answers(probe, task, own, votes)
            found = {
                split: {m: accuracy(one, asked[split].answer_p) for m, one in answers[split].items()} for split in asked
            }
            best = _best(found["valid"])
            for split, by_size in found.items():
                for m, one in by_size.items():
                    self._note_accuracy("accuracy", task, probe, m, own.n_prompts, split, one, asked[split], m == best)
            value = found["test"][best].value
            log.info("%s: %s %.3f on test%s", task, probe, value, f", {best} neurons" if best else "")

    def _answers(
        self, probe: str, task: str, own: TaskScores, votes: Mapping[str, Votes]
    ) -> dict[str, dict[int, Ints]]:
        """What a probe answers on valid and test, by number of neurons; 0 for baselines without neurons."""
        sizes, seed = self._sizes, self.options.seed
        valid, test = votes["valid"], votes["test"]
        ask: Callable[[Votes], dict[int, Ints]]
        if probe == "forest":
            ranking = own.ranked("magnitude")
            fitted = {m: probes.forest(votes["train"], [valid, test], ranking, m, seed) for m in sizes}
            return {split: {m: both[i] for m, both in fitted.items()} for i, split in enumerate(("valid", "test"))}
        if probe in _KINDS:
            ranking = own.ranked(probe)
            ask = partial(getattr(probes, probe), ranking=ranking, sizes=sizes)
        elif probe == "random":
            ask = partial(probes.polarity, ranking=own.of_random("polarity", max(sizes), seed), sizes=sizes)
        elif probe == "activation":
            rankings = [ranking.first(max(sizes)) for ranking in self._firing(own)]
            ask = partial(probes.activation, rankings=rankings, means=own.means_of(rankings), sizes=sizes)
        elif probe == "probability":
            ask = lambda one: {0: probes.probability(one)}  # noqa: E731
        else:
            train_answers = self._train_answers[task]
            ask = lambda one: {0: probes.majority(train_answers, one)}  # noqa: E731
        return {"valid": ask(valid), "test": ask(test)}

    def _efficiency(self, task: str, own: TaskScores, votes: Mapping[str, Votes]) -> None:
        most = min(self.options.efficiency_neurons, max(self._sizes))
        sizes = [size for size in self._sizes if size <= most]
        for n_train in own.at:
            for kind in _KINDS:
                ranking = own.ranked(kind, n_train).first(most)
                ask = getattr(probes, kind)
                valid = votes["valid"]
                best = _best({m: accuracy(own, valid.answer_p) for m, own in ask(valid, ranking, sizes).items()})
                for size, answers in ask(votes["test"], ranking, sizes).items():
                    one = accuracy(answers, votes["test"].answer_p)
                    self._note_accuracy(
                        "efficiency", task, kind, size, n_train, "test", one, votes["test"], size == best
                    )

    def _flexibility(self, task: str, own: TaskScores, test: Votes) -> None:
        block = self.options.block
        for kind in _KINDS:
            ranking = own.ranked(kind)
            for i in range(min(self.options.blocks, max(self._sizes) // block)):
                answers = getattr(probes, kind)(test, ranking.block(i * block, (i + 1) * block), [block])[block]
                one = accuracy(answers, test.answer_p)
                self.found.add(
                    "flexibility", task=task, genre=_genre(task), probe=kind, first_rank=i * block, n_neurons=block,
                    accuracy=one.value, low=one.low, high=one.high, n_prompts=len(answers),
                )  # fmt: skip

    def _robustness(self, task: str, own: TaskScores) -> None:
        wordings = list(wordings_of(TASKS[task], self._wordings))
        contexts = contexts_of(self.options, self.context, wordings)
        m = min(self.options.block, max(self._sizes))
        scores = {
            context: own if context == self.context else self._scores([task], context)[task] for context in contexts
        }
        rankings = {(context, kind): own.ranked(kind).first(m) for context, own in scores.items() for kind in _KINDS}
        chosen = np.unique(np.concatenate([ranking.neurons for ranking in rankings.values()]))
        for used in contexts:
            test = self._votes({task: chosen}, used, ["test"])(task, "test")
            for (found, kind), ranking in rankings.items():
                one = accuracy(getattr(probes, kind)(test, ranking, [m])[m], test.answer_p)
                shared = len(np.intersect1d(ranking.neurons, rankings[used, kind].neurons))
                self.found.add(
                    "robustness", task=task, genre=_genre(task), probe=kind, found_with=found.name, used_with=used.name,
                    n_neurons=m, shared_neurons=shared, accuracy=one.value, low=one.low, high=one.high,
                    n_prompts=len(test.answer_p),
                )  # fmt: skip
            log.info("%s: neurons of %d contexts used with %s", task, len(contexts), used.name)

    def _interdependency(self, scores: Mapping[str, TaskScores]) -> None:
        options, n = self.options, self._n_neurons
        m = min(options.suppressed, min(len(own.neurons) for own in scores.values()))
        edits = [self._suppressing(task, own.ranked("polarity").first(m)) for task, own in scores.items()]
        any_scores = next(iter(scores.values()))
        drawn = any_scores.of_random("polarity", m, options.seed)
        signs = np.random.default_rng(options.seed).choice(np.array([-1, 1], np.int8), len(drawn.neurons))
        edits.append(self._suppressing("random", Ranking(drawn.neurons, signs, drawn.score)))
        run = self._run({"name": "intervene", "edits": edits}, self.tasks, "test", self.context)
        with reading(run):
            columns = ["prompt_id", "edit", "target_index", "prediction_before", "prediction"]
            table = run.table("intervene", columns, filter=pc.field("is_answer")).to_table()
        task_r = np.array([task_of(own) for own in table["prompt_id"].to_pylist()])
        edit_r = np.array(table["edit"].to_pylist())
        right_r, before_r, after_r = (table[c].to_numpy() for c in columns[2:])
        for task in self.tasks:
            for edit in [*scores, "random"]:
                rows = (task_r == task) & (edit_r == edit)
                after = accuracy(after_r[rows], right_r[rows])
                self.found.add(
                    "interdependency", task=task, genre=_genre(task), suppressed=edit, n_neurons=m,
                    shift=options.suppress_by, accuracy_before=float((before_r == right_r)[rows].mean()),
                    accuracy=after.value, low=after.low, high=after.high, n_prompts=int(rows.sum()),
                )  # fmt: skip
        log.info("suppressed %d neurons of each of %d tasks, of %d a layer", m, len(scores), n)

    def _suppressing(self, name: str, ranking: Ranking) -> dict[str, Any]:
        known = ranking.polarity != 0
        neurons = ranking.neurons[known]
        return {
            "name": name,
            "neurons": np.stack(np.divmod(neurons, self._n_neurons), 1).tolist(),
            "polarity": ranking.polarity[known].tolist(),
            "suppress": self.options.suppress_by,
        }

    # --- rows

    def _note_accuracy(
        self, table: str, task: str, probe: str, size: int, n_train: int, split: str, one: Accuracy, asked: Votes,
        is_chosen: bool,
    ) -> None:  # fmt: skip
        self.found.add(
            table, task=task, genre=_genre(task), probe=probe, n_neurons=size, n_train=n_train, split=split,
            accuracy=one.value, low=one.low, high=one.high, n_prompts=len(asked.answer_p), is_chosen=is_chosen,
        )  # fmt: skip

    def _note_neurons(self, task: str, own: TaskScores) -> None:
        for kind in _KINDS:
            ranking = own.ranked(kind).first(max(self._sizes))
            layers, indices = np.divmod(ranking.neurons, self._n_neurons)
            for rank in range(len(layers)):
                self.found.add(
                    "neurons", task=task, score_name=kind, rank=rank, layer=int(layers[rank]),
                    neuron=int(indices[rank]), score=int(ranking.score[rank]), polarity=int(ranking.polarity[rank]),
                    n_train=own.n_prompts,
                )  # fmt: skip

    def _overlap(self, scores: Mapping[str, TaskScores]) -> None:
        """How many of two tasks' best neurons are the same, and how many would be by chance."""
        for kind in _KINDS:
            rankings = {task: own.ranked(kind) for task, own in scores.items()}
            for size in self._sizes:
                for first, second in combinations(scores, 2):
                    a, b = (set(rankings[task].first(size).neurons.tolist()) for task in (first, second))
                    self.found.add(
                        "overlap", task=first, other_task=second, score_name=kind, n_neurons=size, shared=len(a & b),
                        by_chance=size**2 / len(scores[first].neurons),
                    )  # fmt: skip


def _answers_of(run: Run) -> dict[str, Ints]:
    """The right labels of a run's prompts, by task."""
    with reading(run):
        table = run.table("prompts", ["prompt_id", "answer"]).to_table()
    task_p = np.array([task_of(own) for own in table["prompt_id"].to_pylist()])
    answer_p = table["answer"].to_numpy().astype(np.int64)
    return {task: answer_p[task_p == task] for task in dict.fromkeys(task_p.tolist())}


def _best(on_valid: Mapping[int, Accuracy]) -> int:
    """The number of neurons with the highest accuracy, the smaller one of equals."""
    return max(sorted(on_valid), key=lambda size: on_valid[size].value)


def _genre(task: str) -> str:
    return TASKS[task].genre if task in TASKS else ""

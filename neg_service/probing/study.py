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
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from neg_service.errors import ConfigurationError
from neg_service.measures.votes import as_text
from neg_service.probing import probes
from neg_service.probing.probes import PROBES, Accuracy, Votes, accuracy, read_votes
from neg_service.probing.ranking import Ints, Ranking, TaskScores, layers_and_size, scores_of
from neg_service.prompts.mceval8k import TASKS, task_of, wordings_of
from neg_service.storage.reader import Run, reading

log = logging.getLogger(__name__)

STUDIES = ("efficiency", "flexibility", "robustness", "interdependency")
_KINDS = ("polarity", "magnitude")


@dataclass(frozen=True)
class Context:
    """How a task is put to the model; `demonstration_seed` chooses the demonstrations."""

    wording: str = "default"
    shots: int = 1
    demonstration_seed: int = 0

    @property
    def name(self) -> str:
        """For tables and plots."""
        return f"{self.wording}, {self.shots} shot{'s' * (self.shots != 1)}, demonstrations {self.demonstration_seed}"


class Scan(Protocol):
    """Runs a measure on one split of tasks, or continues it, and gives its run when it is done."""

    def __call__(self, measure: Mapping[str, Any], tasks: Sequence[str], split: str, context: Context) -> Run:
        """The finished run."""
        ...


@dataclass
class Options:
    """See `conf/probe.yaml`."""

    store_gradients: bool = True
    basis: str = "paper"
    probes: list[str] = field(default_factory=lambda: list(PROBES))
    sizes: list[int] = field(default_factory=lambda: [1, 4, 16, 64, 256, 1024])
    train: int | None = None
    valid: int | None = None
    test: int | None = None
    shard_size: int = 50
    seed: int = 0
    studies: list[str] = field(default_factory=lambda: ["efficiency", "flexibility"])
    train_sizes: list[int] | None = None
    efficiency_neurons: int = 256
    block: int = 64
    blocks: int = 8
    contexts: list[dict[str, Any]] | None = None
    suppressed: int = 64
    suppress_by: float = 1.0


def check_options(options: Options) -> None:
    """Refuse what no model could do.

    Raises:
        ConfigurationError: naming the key, its value, and what it may be.
    """
    for key, given, known in (("probes", options.probes, PROBES), ("studies", options.studies, STUDIES)):
        if unknown := [one for one in given if one not in known]:
            raise ConfigurationError(f"probe.{key}={unknown[0]} is unknown; known are {', '.join(known)}")
    if not options.sizes or min(options.sizes) < 1 or len(set(options.sizes)) < len(options.sizes):
        raise ConfigurationError(f"probe.sizes={options.sizes}: must be numbers of neurons, each once, at least 1")
    whole = ("train", "valid", "test", "shard_size", "efficiency_neurons", "block", "blocks", "suppressed")
    for key in whole:
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ConfigurationError(f"probe.{key}={value}: must be at least 1")


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


def run_probe(tasks: Sequence[str], context: Context, options: Options, scan: Scan) -> Findings:
    """Probe tasks, and make the studies that were asked for.

    Raises:
        ConfigurationError: an option that the model or the tasks do not allow.
    """
    check_options(options)
    return _Probe(tasks, context, options, scan).run()


class _Probe:
    def __init__(self, tasks: Sequence[str], context: Context, options: Options, scan: Scan) -> None:
        self.tasks, self.context, self.options = list(tasks), context, options
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
        best: dict[str, Ranking] = {}
        for task, own in scores.items():
            votes = {split: read(task, split) for split in wanted}
            self._note_neurons(task, own)
            best[task] = self._accuracies(task, own, votes)
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
        self._n_neurons = layers_and_size(run)[1]
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

    def _accuracies(self, task: str, own: TaskScores, votes: Mapping[str, Votes]) -> Ranking:
        """All probes and baselines; returns the neurons of the polarity probe, as many as were chosen on valid."""
        options, valid, test = self.options, votes["valid"], votes["test"]
        train_answers = votes["train"].answer_p if "train" in votes else valid.answer_p
        ranked = {kind: own.ranked(kind) for kind in _KINDS}
        drawn = own.of_random("polarity", max(self._sizes), options.seed)
        firing = self._firing(own)
        means = dict(zip(own.neurons.tolist(), own.means().tolist(), strict=True)) if firing else {}
        sizes = self._sizes

        def forest(asked: Votes) -> dict[int, Ints]:
            return {
                size: probes.forest(votes["train"], [asked], ranked["magnitude"], size, options.seed)[0]
                for size in sizes
            }

        answers: dict[str, Callable[[Votes], dict[int, Ints]]] = {
            "polarity": lambda asked: probes.polarity(asked, ranked["polarity"], sizes),
            "magnitude": lambda asked: probes.magnitude(asked, ranked["magnitude"], sizes),
            "forest": forest,
            "probability": lambda asked: {0: probes.probability(asked)},
            "activation": lambda asked: probes.activation(asked, firing, means, sizes),
            "random": lambda asked: probes.polarity(asked, drawn, sizes),
            "majority": lambda asked: {0: probes.majority(train_answers, asked)},
        }
        best_size = max(sizes)
        for probe in options.probes:
            on_valid = {size: accuracy(own, valid.answer_p) for size, own in answers[probe](valid).items()}
            on_test = {size: accuracy(own, test.answer_p) for size, own in answers[probe](test).items()}
            best = _best(on_valid)
            if probe == "polarity":
                best_size = best
            for split, of, asked in (("valid", on_valid, valid), ("test", on_test, test)):
                for size, one in of.items():
                    self._note_accuracy("accuracy", task, probe, size, own.n_prompts, split, one, asked, size == best)
            log.info("%s: %s %.3f on test%s", task, probe, on_test[best].value, f", {best} neurons" if best else "")
        return ranked["polarity"].first(best_size)

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
        contexts = self._contexts(task)
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

    def _contexts(self, task: str) -> list[Context]:
        if self.options.contexts is not None:
            asked = [Context(**{**self.context.__dict__, **own}) for own in self.options.contexts]
        else:
            base = self.context
            asked = [Context(wording, base.shots, base.demonstration_seed) for wording in wordings_of(TASKS[task])]
            asked += [Context(base.wording, 0, 0), Context(base.wording, base.shots, base.demonstration_seed + 1)]
        return list(dict.fromkeys([self.context, *asked]))

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


def _best(on_valid: Mapping[int, Accuracy]) -> int:
    """The number of neurons with the highest accuracy, the smaller one of equals."""
    return max(sorted(on_valid), key=lambda size: on_valid[size].value)


def _genre(task: str) -> str:
    return TASKS[task].genre if task in TASKS else ""

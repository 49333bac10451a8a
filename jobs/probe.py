"""python -m jobs.probe: skill neurons of tasks, and how well they do them without the model's head. See `--help`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from omegaconf import DictConfig

from jobs.entry import EXIT_INCOMPLETE, say, start
from jobs.findings import IncompleteError, finished, put_findings
from neg_service.config import ScanConfig, plain, typed
from neg_service.probing.options import Context, Options, check_options, contexts_of
from neg_service.prompts.mceval8k import chosen_tasks, load_tasks
from neg_service.prompts.tasks import TASKS
from neg_service.prompts.wording import wordings_of
from neg_service.storage.reader import Run

if TYPE_CHECKING:
    from neg_service.probing.study import Findings

log = logging.getLogger(__name__)


@dataclass
class ProbeConfig(ScanConfig):
    """Everything that `python -m jobs.probe` is told: a scan's settings without its measure, and the probe's."""

    probe: Options = field(default_factory=Options)


def probe(config: DictConfig) -> int:
    """Scan, rank, probe, study; store tables and plots, and print them."""
    # Slow to load: see `entry.py`.
    from neg_service.cluster.connection import disconnect
    from neg_service.probing.study import run_probe

    asked = typed(ProbeConfig, {key: value for key, value in plain(config).items() if key != "measure"})
    check_options(asked.probe)
    tasks = chosen_tasks(asked.dataset.task)
    context = Context(asked.dataset.wording, asked.dataset.shots, asked.dataset.demonstration_seed)
    _require_prompts(asked, tasks, context)
    try:
        found = run_probe(tasks, context, asked.probe, _Scans(asked), asked.dataset.wordings)
    except IncompleteError as error:
        log.error("%s", error)
        return EXIT_INCOMPLETE
    finally:
        disconnect()
    tables = found.tables()
    uri = _put(asked, found, tables)
    said = f"\naccuracy on test, in percent; in brackets how many neurons, chosen on valid\n\n{_shown(tables)}"
    say(f"{said}\n\nresults: {uri}", asked.job.log)
    return 0


def _require_prompts(config: ProbeConfig, tasks: Sequence[str], context: Context) -> None:
    """All splits, in all contexts that will be compared, before anything is scanned."""
    dataset = replace(config.dataset, limit=1, split=["train", "valid", "test"])
    for task in tasks:
        contexts = [context]
        if "robustness" in config.probe.studies:
            contexts = contexts_of(config.probe, context, list(wordings_of(TASKS[task], dataset.wordings)))
        for own in contexts:
            load_tasks(replace(dataset, task=task, **asdict(own)))


class _Scans:
    """Runs the scans that a probe asks for, one after the other, with one Ray."""

    def __init__(self, config: ProbeConfig) -> None:
        self._config = config

    def __call__(self, measure: Mapping[str, Any], tasks: Sequence[str], split: str, context: Context) -> Run:
        """A finished run of a measure on a split."""
        asked = self._config
        limit = getattr(asked.probe, split)
        dataset = replace(
            asked.dataset,
            task=list(tasks),
            split=split,
            limit=limit if limit is not None else asked.dataset.limit,
            **asdict(context),
        )
        # Shards of one size, so that scores that were added up and those from stored gradients end at the same prompts.
        shard_size = asked.probe.shard_size if measure["name"] in ("neurgrad", "scores") else "auto"
        scan = ScanConfig(
            model=asked.model,
            dataset=dataset,
            measure=dict(measure),
            neurons=asked.neurons,
            cluster=asked.cluster,
            storage=asked.storage,
            job=replace(asked.job, shard_size=shard_size, resume=None, name=None),
        )
        log.info("%s of %s, %s (%s)", measure["name"], ", ".join(tasks), split, context.name)
        return finished(scan)


def _put(config: ProbeConfig, found: Findings, tables: Mapping[str, pa.Table]) -> str:
    """Store what was found beside the runs that it comes from."""
    # Slow to load: see `entry.py`.
    from neg_service.cluster.prepare import to_be_stored
    from neg_service.report.skills import plots

    dataset = to_be_stored(config.dataset)
    about = {
        "probe": asdict(config.probe),
        "dataset": {key: value for key, value in dataset.items() if key not in ("split", "limit", "ids")},
        "runs": list(dict.fromkeys(found.runs)),
    }
    files = {f"plots/{name}": image for name, image in plots(tables).items()}
    return put_findings(config, "probe", about, tables, {**files, "tables.txt": _shown(tables).encode()})


def _shown(tables: Mapping[str, pa.Table]) -> str:
    from neg_service.report.skills import accuracy_table, studies_text

    return "\n\n".join(part for part in (accuracy_table(tables["accuracy"]), studies_text(tables)) if part)


if __name__ == "__main__":
    start("probe", probe, ProbeConfig)

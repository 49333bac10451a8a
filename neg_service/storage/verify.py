"""Checking a run: every part against the plan and its own checksums, run.json and neurons, and nothing besides.

Reads every byte of the run once, a few parts at a time. What is found is data; repairing is somebody else's business,
except for what needs no model: run.json and its copy, and objects that do not belong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from neg_service.errors import DestinationError
from neg_service.storage.neurons import NEURONS_FILE, neurons_problem
from neg_service.storage.objects import ObjectStore
from neg_service.storage.parts import part_key, problem_of, shard_of
from neg_service.storage.reader import Run, run_from
from neg_service.storage.run import RUN_COPY, RUN_FILE, fingerprint_of, is_as_written, parse_run_file, put_run_file

# Parts in memory at once.
_READERS = 4
FOREIGN = "foreign"


@dataclass(frozen=True)
class Finding:
    """Something wrong with the object at `key`; `shard` is the one to compute again, if that mends it."""

    key: str
    problem: str
    shard: int | None = None

    def __str__(self) -> str:
        """For example `neurgrad/shard-000003.parquet: missing`."""
        return f"{self.key}: {self.problem}"


@dataclass
class Verdict:
    """What a check has found.

    findings: wrong or lost. not_done: shards of which nothing is there. n_parts, n_bytes: what was read.
    """

    run: Run
    findings: list[Finding] = field(default_factory=list)
    not_done: list[int] = field(default_factory=list)
    n_parts: int = 0
    n_bytes: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether the run is complete and as it was written."""
        return not self.findings and not self.not_done

    @property
    def is_without_neurons(self) -> bool:
        """Whether the neurons of its list are lost or damaged."""
        return any(finding.key == NEURONS_FILE for finding in self.findings)

    @property
    def shards_to_repair(self) -> set[int]:
        """The shards that have to be computed again, or at all."""
        return {finding.shard for finding in self.findings if finding.shard is not None} | set(self.not_done)


def verify(
    store: ObjectStore,
    on_part: Callable[[int, int], None] = lambda done, of: None,
    endpoint_url: str | None = None,
) -> Verdict:
    """Check the run at a store; `on_part` hears how many parts of how many have been checked.

    Of a run that extends another one its own shards are checked: the other is a run, too (`Run.lineage`), which has to
    be found, on S3 at `endpoint_url`.

    Raises:
        DestinationError: there is no run, or neither run.json nor its copy can be trusted, or what it extends is lost.
    """
    run, findings = _checked_run(store, endpoint_url)
    if run.said_of_neurons is not None and (problem := neurons_problem(store, run.said_of_neurons)) is not None:
        findings.append(Finding(NEURONS_FILE, problem))
    verdict = Verdict(run, findings)
    to_read: list[tuple[str, int]] = []
    shards_there: dict[int, int] = {}
    # The last table first: a shard that is finished while we look has all its earlier parts by then.
    for name in reversed(run.directory.tables):
        for entry in store.list(name):
            shard = shard_of(entry.key)
            if shard is None or shard not in run.own_shards:
                planned = _planned(run) if shard is not None else "no part has this name"
                verdict.findings.append(Finding(entry.key, f"foreign: {planned}"))
            else:
                to_read.append((name, shard))
                shards_there[shard] = shards_there.get(shard, 0) + 1
    there = set(to_read)
    for shard in run.own_shards:
        if shard not in shards_there:
            verdict.not_done.append(shard)
        elif shards_there[shard] < len(run.directory.tables):
            missing = (part_key(name, shard) for name in run.directory.tables if (name, shard) not in there)
            verdict.findings += [Finding(key, "missing", shard) for key in missing]
    for size, finding in _check_parts(run, to_read):
        verdict.n_parts += 1
        verdict.n_bytes += size
        if finding is not None:
            verdict.findings.append(finding)
        on_part(verdict.n_parts, len(to_read))
    verdict.findings.sort(key=lambda finding: finding.key)
    return verdict


def lineage_of(store: ObjectStore, endpoint_url: str | None = None) -> list[str]:
    """The URIs of the runs that make up the one at a store: first what was extended, that one last.

    Raises:
        DestinationError: see `verify`.
    """
    return [run.uri for run in _checked_run(store, endpoint_url)[0].lineage]


def restore_run_file(store: ObjectStore, verdict: Verdict) -> list[str]:
    """Write run.json and its copy from the one that can be trusted, if the other cannot; what was done."""
    wrong = [finding.key for finding in verdict.findings if finding.key in (RUN_FILE, RUN_COPY)]
    if wrong:
        good = _trusted(store, RUN_FILE) or _trusted(store, RUN_COPY)
        assert good is not None
        put_run_file(store, {key: value for key, value in good.items() if key != "sha256"})
    return [f"restored {key} from {RUN_COPY if key == RUN_FILE else RUN_FILE}" for key in wrong]


def clear_wrong(store: ObjectStore, verdict: Verdict) -> list[str]:
    """Take what is wrong out of the tables' folders, so that its shards are not done and no reader finds it.

    What is damaged is deleted. What is whole and belongs elsewhere is moved to a folder `foreign`. What was done.
    run.json, its copy and the neurons stay: they are written anew.
    """
    done = []
    for finding in verdict.findings:
        if finding.key in (RUN_FILE, RUN_COPY, NEURONS_FILE) or finding.problem == "missing":
            continue
        content = store.get(finding.key)
        if content is not None and finding.problem.startswith("foreign"):
            store.put(f"{FOREIGN}/{finding.key}", content)
            done.append(f"moved {finding.key} to {FOREIGN}/{finding.key}")
        else:
            done.append(f"deleted {finding.key}")
        store.delete(finding.key)
    return done


def _planned(run: Run) -> str:
    if run.base is None:
        return f"the plan has {run.n_shards} shards"
    return f"the plan has the shards from {run.own_shards.start} to {run.own_shards.stop - 1}"


def _checked_run(store: ObjectStore, endpoint_url: str | None) -> tuple[Run, list[Finding]]:
    """The run as the first of run.json and its copy says that is as it was written, and what is wrong with the two."""
    findings, good = [], []
    for key in (RUN_FILE, RUN_COPY):
        parsed, problem = _read(store, key)
        if problem is not None:
            findings.append(Finding(key, problem))
        elif parsed is not None:
            good.append(parsed)
    if not good:
        if all(finding.problem == "missing" for finding in findings):
            raise DestinationError(f"{store.uri}: there is no {RUN_FILE}; give the URI of a run directory")
        raise DestinationError(
            f"{store.uri}: neither {RUN_FILE} nor {RUN_COPY} is as it was written, so nothing says what belongs here; "
            f"delete both and run the scan again, which keeps the parts that are its own"
        )
    if good[0]["fingerprint"] != good[-1]["fingerprint"]:
        raise DestinationError(
            f"{store.uri}: {RUN_FILE} is of run {good[0]['fingerprint']}, {RUN_COPY} of run {good[-1]['fingerprint']}; "
            f"delete the one that does not belong"
        )
    return run_from(store, good[0], endpoint_url), findings


def _trusted(store: ObjectStore, key: str) -> dict[str, Any] | None:
    return _read(store, key)[0]


def _read(store: ObjectStore, key: str) -> tuple[dict[str, Any] | None, str | None]:
    """run.json or its copy, if it can be trusted, or else what is wrong with it."""
    content = store.get(key)
    if content is None:
        return None, "missing"
    try:
        parsed = parse_run_file(store, content)
    except DestinationError:
        return None, "damaged: it was changed after it was written"
    if not is_as_written(parsed) or parsed["fingerprint"] != fingerprint_of(parsed["identity"]):
        return None, "damaged: it was changed after it was written"
    # A run's directory carries its fingerprint, unless somebody gave it another name.
    named = re.search(r"-([0-9a-f]{12})$", store.uri)
    if named and named[1] != parsed["fingerprint"]:
        return None, f"foreign: fingerprint {parsed['fingerprint']} in the place of {named[1]}"
    return parsed, None


def _check_parts(run: Run, parts: list[tuple[str, int]]) -> Iterator[tuple[int, Finding | None]]:
    """The size of each part, and what is wrong with it."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="verify") as pool:
        # Not all at once, so that no more than a few parts wait for the caller.
        for start in range(0, len(parts), _READERS):
            yield from pool.map(lambda part: _check_part(run, *part), parts[start : start + _READERS])


def _check_part(run: Run, name: str, shard: int) -> tuple[int, Finding | None]:
    key = part_key(name, shard)
    data = run.directory.store.get(key)
    if data is None:
        return 0, Finding(key, "missing", shard)
    problem = problem_of(data, name, shard, run.fingerprint, run.stored_schemas[name])
    return len(data), Finding(key, problem, shard) if problem else None

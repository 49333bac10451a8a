"""Opens what lies at the URIs that a report is asked for: runs, and studies with their tables and runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from neg_service.errors import DestinationError
from neg_service.report.page import Section
from neg_service.storage.reader import Run, open_run
from neg_service.storage.run import RUN_FILE
from neg_service.storage.stores import open_store
from neg_service.storage.studies import StudyResults, read_study


@dataclass(frozen=True)
class StudyView:
    """How studies of one kind are shown; each study brings its own, so that a page knows none of them.

    kind: see `StudyResults`. sections: of a stored study. shows_run: whether the run that a study had for a purpose has
    sections of its own beside the study's.
    """

    kind: str
    sections: Callable[[StudyResults], list[Section]]
    shows_run: Callable[[str], bool]


@dataclass(frozen=True)
class Loaded:
    """runs: those that were asked for, and those of studies that have sections of their own."""

    runs: list[Run] = field(default_factory=list)
    studies: list[StudyResults] = field(default_factory=list)


def load(uris: Sequence[str], endpoint_url: str | None, views: Sequence[StudyView] = ()) -> Loaded:
    """Open runs, and studies of the kinds that there are views of, with the runs that they name.

    Raises:
        DestinationError: neither a run nor a study, or a study whose runs are gone.
    """
    loaded = Loaded()
    opened = {store.uri: (uri, store) for uri in uris for store in [open_store(uri, endpoint_url, key="runs")]}
    shows_run = {view.kind: view.shows_run for view in views}
    for uri, store in opened.values():
        study = read_study(store, uri, list(shows_run), endpoint_url)
        if study is not None:
            loaded.studies.append(study)
            shown = [run for purpose, run in study.runs.items() if shows_run[study.kind](purpose)]
        elif store.get(RUN_FILE) is not None:
            shown = [open_run(uri, endpoint_url, key="runs")]
        else:
            raise DestinationError("there is no run, no study and no probe", setting="runs", value=uri)
        known = {run.uri for run in loaded.runs}
        loaded.runs.extend(run for run in shown if run.uri not in known)
    return loaded

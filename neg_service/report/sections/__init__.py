"""What a report says of runs: their tables and figures, each with a sentence; and where what studies say stands.

`loading.py` opens what lies at the URIs; `overview.py` and `runs.py` make sections of it, and studies make their own.
Tables of values are streamed: what is kept of a run is a histogram a layer and the strongest neurons of each prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from neg_service.report.page import Section
from neg_service.report.sections.comparison import comparison_sections
from neg_service.report.sections.loading import Loaded, StudyView
from neg_service.report.sections.overview import overview
from neg_service.report.sections.runs import run_sections
from neg_service.storage.studies import StudyResults


def sections_of(loaded: Loaded, views: Sequence[StudyView] = ()) -> list[Section]:
    """The page from top to bottom; `views` say how studies are shown."""
    made = [overview(loaded)]
    sections = {view.kind: view.sections for view in views}
    kinds = [study.kind for study in loaded.studies]
    for number, study in enumerate(loaded.studies):
        own = sections[study.kind](study)
        made += own if kinds.count(study.kind) == 1 else [_numbered(one, study, number) for one in own]
    made += comparison_sections(loaded.runs)
    for number, run in enumerate(loaded.runs):
        made += run_sections(run, number)
    return [section for section in made if section.grids or section.pictures]


def _numbered(section: Section, study: StudyResults, number: int) -> Section:
    """The same section with names of its own, where there are several of its kind."""
    prefix = f"{study.kind}-{number}"
    return replace(
        section,
        name=f"{prefix}-{section.name}",
        title=f"{section.title}: {study.name}",
        grids=[replace(grid, name=f"{prefix}-{grid.name}" if grid.name else "") for grid in section.grids],
        pictures=[replace(picture, name=f"{prefix}-{picture.name}") for picture in section.pictures],
    )

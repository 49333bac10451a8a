"""What a report says of runs, studies and probes: their tables and figures, each with a sentence.

`found.py` opens what lies at the URIs; `overview.py`, `studies.py`, `probes.py` and `runs.py` make sections of it.
Tables of values are streamed: what is kept of a run is a histogram a layer and the strongest neurons of each prompt.
"""

from __future__ import annotations

from dataclasses import replace

from neg_service.report.page import Section
from neg_service.report.sections.found import Finding, Found
from neg_service.report.sections.overview import overview
from neg_service.report.sections.probes import probe_sections
from neg_service.report.sections.runs import run_sections
from neg_service.report.sections.studies import study_sections


def sections_of(found: Found) -> list[Section]:
    """The page from top to bottom."""
    made = [overview(found)]
    kinds = [finding.kind for finding in found.findings]
    for number, finding in enumerate(found.findings):
        own = study_sections(finding) if finding.kind == "study" else probe_sections(finding)
        made += own if kinds.count(finding.kind) == 1 else [_numbered(one, finding, number) for one in own]
    for number, run in enumerate(found.runs):
        made += run_sections(run, number)
    return [section for section in made if section.grids or section.pictures]


def _numbered(section: Section, finding: Finding, number: int) -> Section:
    """The same section with names of its own, where there are several of its kind."""
    prefix = f"{finding.kind}-{number}"
    return replace(
        section,
        name=f"{prefix}-{section.name}",
        title=f"{section.title}: {finding.name}",
        grids=[replace(grid, name=f"{prefix}-{grid.name}" if grid.name else "") for grid in section.grids],
        pictures=[replace(picture, name=f"{prefix}-{picture.name}") for picture in section.pictures],
    )

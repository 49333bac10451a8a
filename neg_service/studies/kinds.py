"""The kinds of studies that there are, to show what is stored."""

from __future__ import annotations

from neg_service.studies.linearity.page import LINEARITY_VIEW
from neg_service.studies.skills.page import SKILLS_VIEW

STUDY_VIEWS = (LINEARITY_VIEW, SKILLS_VIEW)

"""The table of families in `neg_service/models/README.md`: `python -m tests.families_table` writes it.

From the same comparisons that the tests make, of dense families, hybrids and mixtures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from neg_service import LanguageModel
from neg_service.settings import BASES
from tests import families, mixture_families
from tests.mixtures import MIXTURES
from tests.tiny_models import FAMILIES, HYBRIDS

README = Path(__file__).parents[1] / "neg_service" / "models" / "README.md"


def table() -> list[str]:
    """A row a family: what is supported, and the largest relative deviations over its bases."""
    rows = [
        "| family | read at | bases | engine | NeurGrad, float32 | NEG, float64 | joint edits, float64 |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in (*FAMILIES, *HYBRIDS):
        compare = (
            lambda basis, own=family: families.neurgrad_deviation(own, basis, families.LENGTHS),
            lambda basis, own=family: families.sweep_deviation(own, basis),
            lambda basis, own=family: families.joint_deviation(own, basis),
        )
        rows.append(_row(family, families.model_of(family), families.bases_of(family), compare))
    for family in MIXTURES:
        compare = (
            lambda basis, own=family: mixture_families.neurgrad_deviation(own, basis, families.LENGTHS),
            lambda basis, own=family: mixture_families.sweep_deviation(own, basis),
            lambda basis, own=family: mixture_families.joint_deviation(own, basis),
        )
        rows.append(_row(family, mixture_families.model_of(family), BASES, compare))
    return rows


def _row(family: str, model: LanguageModel, bases: Sequence[str], compare: Sequence[Callable[[str], float]]) -> str:
    model.ensure_checked()
    numbers = " | ".join(f"{max(map(one, bases)):.0e}" for one in compare)
    return " | ".join([f"| {family}", read_at(model), ", ".join(bases), model.engine.name, f"{numbers} |"])


def read_at(model: LanguageModel) -> str:
    """Where a family's prompts are read."""
    return "mask token" if model.is_masked else "last token"


def shown() -> list[str]:
    """The table as it stands there."""
    found = re.search(r"(?<=<!-- families -->\n).*?(?=\n<!-- /families -->)", README.read_text(), re.DOTALL)
    assert found is not None
    return found.group().splitlines()


def main() -> None:
    """Write the table."""
    # First, for it takes minutes, in which somebody may write elsewhere in that file.
    now = "\n".join(table())
    README.write_text(README.read_text().replace("\n".join(shown()), now))


if __name__ == "__main__":
    main()

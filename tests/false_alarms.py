"""Models that are right and are refused, or lose their fast engine: `python -m tests.false_alarms 36`, so many seeds.

Every family of the tests with weights drawn anew for each seed, in float32. About half a minute a seed on one core.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from neg_service import LanguageModel
from neg_service.errors import ModelError
from neg_service.models.engines.base import Engine
from tests.mixtures import MIXTURES, tiny_mixture
from tests.tiny_models import FAMILIES, HYBRIDS, tiny_model


def models(seed: int) -> Iterator[tuple[str, LanguageModel, type[Engine]]]:
    """Each family's name, a model of it, and the engine that is known to fit."""
    for name, family in (FAMILIES | HYBRIDS).items():
        yield name, tiny_model(name, seed=seed), family.engine
    for name, mixture in MIXTURES.items():
        yield name, tiny_mixture(name, seed=seed), mixture.engine


def alarms(seed: int) -> Iterator[str]:
    """What the self-check says against models that are right."""
    for name, model, engine in models(seed):
        try:
            chosen = model.ensure_checked()
        except ModelError as error:
            yield f"seed {seed}, {name}: {error}"
            continue
        if type(chosen.engine) is not engine:
            yield f"seed {seed}, {name}: runs as {chosen.engine.name}: {chosen.rejected}"


def main(n_seeds: int) -> None:
    """Print each alarm as it comes, and how many there were."""
    count = 0
    for seed in range(n_seeds):
        for alarm in alarms(seed):
            sys.stdout.write(f"{alarm}\n")
            count += 1
    n_families = len(FAMILIES) + len(HYBRIDS) + len(MIXTURES)
    sys.stdout.write(f"{count} false alarms in {n_families} families with {n_seeds} seeds each\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 36)

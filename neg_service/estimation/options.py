"""What a study may be told; apart from the study, which imports torch, so that `--help` need not wait for that."""

from __future__ import annotations

from dataclasses import dataclass, field

ESTIMATORS = ("neurgrad", "gradient", "integrated_gradients", "gradient_x_activation", "activation", "random")


@dataclass
class Options:
    """See `conf/study.yaml`."""

    prompts: int | None = 100
    answered: str = "right"
    neurons: int | None = 70
    seed: int = 0
    basis: str = "paper"
    grid: str = "full"
    keep: str = "answer"
    steps: int = 20
    estimators: list[str] = field(default_factory=lambda: list(ESTIMATORS))
    ranges: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0, 10.0])
    range_prompts: int = 20
    sets: list[int] = field(default_factory=lambda: [2, 8, 32])
    set_shift: float = 0.5
    draws: int = 1000

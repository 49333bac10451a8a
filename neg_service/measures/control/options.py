"""What may be asked of `control`, before any model is there. What becomes of it with a prompt's tokens: `aims.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neg_service.errors import ConfigurationError
from neg_service.prompts.prompt import Prompt

NORMS = ("l2", "scaled")
MAX_PASSES = 15


@dataclass(frozen=True)
class Wanted:
    """What is asked of all prompts, or of one; it becomes an `Aim` with a prompt's tokens.

    kind, wanted, tolerance: see `Aim`. against: a text that follows the prompt, or None.
    """

    kind: str = "probability"
    wanted: float = 0.5
    tolerance: float = 0.01
    against: str | None = None

    @classmethod
    def checked(
        cls, probability: float = 0.5, top: bool = False, margin: float | None = None, against: str | None = None,
        tolerance: float = 0.01,
    ) -> Wanted:  # fmt: skip
        """What settings say; `probability` counts where neither `top` nor `margin` is given.

        Raises:
            ConfigurationError: a probability that is not between 0 and 1, a tolerance that nothing fails, two wishes
                at once, or `against` without a margin.
        """

        def refused(name: str, value: object, allowed: str, reason: str = "") -> ConfigurationError:
            return ConfigurationError(reason, setting=f"measure.{name}", value=value, allowed=allowed)

        if not isinstance(top, bool):
            raise refused("top", top, "true or false")
        if not _is_number(tolerance) or not tolerance > 0:
            raise refused("tolerance", tolerance, "a number above 0")
        if margin is not None and not _is_number(margin):
            raise refused("margin", margin, "a number of nats")
        if top and margin is not None:
            raise refused("margin", margin, "left out where top is asked for", "one wish at a time can be met")
        if not isinstance(against, str | None) or against == "":
            raise refused("against", against, "a text that follows the prompt, in the place of its target")
        if against is not None and margin is None:
            raise refused("against", repr(against), "left out", "a margin alone is measured against another target")
        if top or margin is not None:
            return cls("top" if top else "margin", 0.0 if margin is None else float(margin), float(tolerance), against)
        if not _is_number(probability) or not 0 < probability < 1:
            raise refused("probability", probability, "above 0 and below 1")
        if tolerance >= max(probability, 1 - probability):
            raise refused(
                "tolerance", tolerance, f"below {max(probability, 1 - probability):g}",
                f"around a probability of {probability:g} it covers everything",
            )  # fmt: skip
        return cls("probability", float(probability), float(tolerance))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def each(value: object, n: int, name: str) -> Sequence[object]:
    """One value for all prompts as one for each, or the list that there is.

    Raises:
        ConfigurationError: a list of another length.
    """
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return [value] * n
    own = list(value)  # type: ignore[call-overload]
    if len(own) != n:
        raise ConfigurationError(
            f"has {len(own)} values for {n} prompts", setting=name, allowed="one value, or one for each prompt"
        )
    return [one.item() if hasattr(one, "item") else one for one in own]


def wishes_of(prompt: Prompt, wishes: Sequence[Wanted]) -> Sequence[Wanted]:
    """What is wanted of a prompt's targets: what its row says, or else what all are asked.

    Raises:
        ConfigurationError: a probability that the tolerance covers everything of.
    """
    if prompt.wanted is None:
        return wishes
    kind, number, against = prompt.wanted
    tolerance = wishes[0].tolerance
    if kind == "probability":
        return [Wanted.checked(number, tolerance=tolerance)]
    return [Wanted(kind, number, tolerance, against)]

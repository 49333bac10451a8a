"""What is wanted of a prompt's target, as a number that a shift moves almost linearly.

| wanted                        | value                                        | unit | met                            |
|-------------------------------|----------------------------------------------|------|--------------------------------|
| a probability p*              | log p - log(1 - p), the log-odds             | nats | |p - p*| ≤ tolerance           |
| a margin m* against a token   | log p - log p of that token                  | nats | |margin - m*| ≤ tolerance      |
| a margin m* against all       | log p - log p of the most probable other one | nats | |margin - m*| ≤ tolerance      |
| to be the most probable token | the same                                     | nats | 0 < margin ≤ 0.1; before: > 0  |

Probabilities themselves bend where log-odds do not: in them the same search takes three times the passes and misses.

Axes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neg_service.errors import ConfigurationError

# A target that is to be the most probable token is brought so far above the next one, in nats, and at most so far.
_TOP_MARGIN, _MOST_TOP_MARGIN = 0.05, 0.1
# Of the other tokens so many are kept below it.
_RIVALS = 3


@dataclass(frozen=True)
class Aim:
    """What is wanted of a prompt's target.

    kind: `probability`, `margin` or `top`. wanted: a probability 0..1, or nats. tolerance: in the same unit.
    target: its token. against: the token that a margin is measured from; None of the most probable other one.
    """

    kind: str
    wanted: float
    tolerance: float
    target: int
    against: int | None = None

    @property
    def goal(self) -> float:
        """What the value is to become."""
        if self.kind == "probability":
            return math.log(self.wanted) - math.log1p(-self.wanted)
        return _TOP_MARGIN if self.kind == "top" else self.wanted

    def value(self, logits_v: Tensor) -> float:
        """What the value is, from logits in float64."""
        own = logits_v[self.target]
        if self.kind == "probability":
            return float(own - _without(logits_v, self.target).logsumexp(0))
        return float(own - logits_v[self.compared_with(logits_v)[0]])

    def compared_with(self, logits_v: Tensor) -> list[int]:
        """The token that a margin is measured from, and the next ones that may take its place; none of a probability.

        Where these are not looked at, a shift that pushes one down has the next one rise.
        """
        if self.kind == "probability":
            return []
        if self.against is not None:
            return [self.against]
        found: list[int] = _without(logits_v, self.target).topk(min(_RIVALS, len(logits_v) - 1)).indices.tolist()
        return found

    def lacks(self, logits_v: Tensor) -> list[float]:
        """What the value is short of, and of a margin what it would be against the other tokens, too."""
        if self.kind == "probability":
            return [self.goal - self.value(logits_v)]
        return [self.goal - float(logits_v[self.target] - logits_v[own]) for own in self.compared_with(logits_v)]

    def is_met(self, value: float) -> bool:
        """Whether a value is close enough."""
        if self.kind == "top":
            return 0 < value <= _MOST_TOP_MARGIN
        return abs(self.shown(value) - self.wanted) <= self.tolerance

    def is_met_before(self, value: float) -> bool:
        """Whether nothing need be done."""
        return value > 0 if self.kind == "top" else self.is_met(value)

    def shown(self, value: float) -> float:
        """A value in the unit of what is wanted: a probability, or nats."""
        return 1 / (1 + math.exp(-value)) if self.kind == "probability" and value > -700 else _or_zero(self.kind, value)

    def resolution(self, logits_v: Tensor, epsilon: float) -> float:
        """How far off the value may be, in the unit of the tolerance, where logits are rounded to `epsilon`."""
        nats = epsilon * float(logits_v.abs().max())
        return nats * self.wanted * (1 - self.wanted) if self.kind == "probability" else nats


def _or_zero(kind: str, value: float) -> float:
    return 0.0 if kind == "probability" else value


def _without(logits_v: Tensor, token: int) -> Tensor:
    others = logits_v.clone()
    others[token] = -math.inf
    return others


def probability_of(logits_v: Tensor, token: int) -> float:
    """Of a token, from logits in float64."""
    return float(torch.exp(logits_v[token] - logits_v.logsumexp(0)))


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
        tolerance: float = 0.01, *, group: str = "control",
    ) -> Wanted:  # fmt: skip
        """What settings say; `probability` counts where neither `top` nor `margin` is given.

        Raises:
            ConfigurationError: a probability that is not between 0 and 1, a tolerance that nothing fails, two wishes
                at once, or `against` without a margin.
        """

        def refused(name: str, value: object, allowed: str, reason: str = "") -> ConfigurationError:
            return ConfigurationError(reason, setting=f"{group}.{name}", value=value, allowed=allowed)

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

    def aim(self, target: int, against: int | None) -> Aim:
        """The same of one prompt's tokens."""
        return Aim(self.kind, self.wanted, self.tolerance, target, against)

    @property
    def words(self) -> str:
        """For a person."""
        if self.kind == "probability":
            return f"probability {self.wanted:g}"
        if self.kind == "top":
            return "the most probable token"
        other = "the next token" if self.against is None else repr(self.against)
        return f"{self.wanted:g} nats above {other}"


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

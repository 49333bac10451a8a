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
from dataclasses import dataclass

import torch
from torch import Tensor

from neg_service.measures.control.options import Wanted

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

    @classmethod
    def of(cls, wanted: Wanted, target: int, against: int | None = None) -> Aim:
        """What was asked, of a prompt's tokens."""
        return cls(wanted.kind, wanted.wanted, wanted.tolerance, target, against)

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

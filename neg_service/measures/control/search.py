"""How far to go: steps along least shifts, each tried, with a new gradient where the last one leads no further.

A search is a plain state machine on vectors; it says what it wants next, the value or the gradient at `shift`, and is
told. So many prompts' searches run in one batch, and the arithmetic is tested without a model.

1. The first shift is the least one by the gradient without a shift: with c what the value lacks, d = c·h / (g·h).
2. Where values follow the gradient, a secant through the last two of them goes on along the same ray; once the wanted
   value lies between two, inside these.
3. Where they do not (the ray saturates: gradients turn by 80 degrees within a few nats), the gradient is taken anew at
   the best shift, and the least further shift is tried from there, within a trust radius.

Of a value that is linear in the shift the result is the least one there is. Otherwise it is the sum of least steps,
which on SmolLM2-135M is up to a third longer than the nearest point of the level set. Going for that one (d' = (g'·d +
c)·h' / (g'·h'), the iteration of Hasofer, Lind, Rackwitz and Fiessler) takes four times the passes or fails.

Axes: M neurons, C values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from neg_service.measures.control.least_shift import LeastShift, Vector

# A shift may grow by so much from one pass to the next, and its norm to so many times that of the activations.
_MOST_GROWTH, MOST_NORMS = 3.0, 3.0
# Shares of what a gradient says that a step gained: above the first a secant goes on; above the second the next step
# may be as long, below it half as long. One that gains nothing is tried again, by so much shorter.
_FOLLOWS, _BENDS, _SHORTER = 0.8, 0.3, 0.35
# So many times it is tried; a new gradient that brings the value nearer by less than this share of what it lacked at
# first is the last one.
_MOST_SHORTER, _LEAST_GAIN = 3, 0.02
# Inside a bracket a secant keeps this share of it away from its ends. Where it is narrower than this share of a shift,
# and its ends differ by more than this share of what was lacking, the value jumps: experts are chosen anew.
_FROM_ENDS, _NARROW, _JUMP = 0.02, 0.02, 0.2


@dataclass
class _Ray:
    """Shifts origin + t·step; at t = 1 a linear value would be what is wanted.

    lacks: what the value at the origin is short of. size: the step's norm. most: the largest t. last, near, far: the
    last point (t, what is lacking), the last one short of what is wanted, and the last one beyond it.
    """

    origin: Vector
    step: Vector
    lacks: float
    size: float
    most: float
    n_shorter: int = 0
    far: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self.last = self.near = (0.0, self.lacks)


@dataclass
class Search:
    """The search for one shift.

    value, goal: without a shift, and what is wanted. gradient_cm, lacks_c: of the value, without a shift, and of others
    that may take its place on the way, and what they lack; see `least_shift.py`. is_met: whether a value is close
    enough. activation_norm: that of the activations, in the norm of `least`. dtype: to which shifts are rounded before
    they are tried. is_met_before: whether nothing need be done. passes: how many values and gradients were taken.
    first: the value of the first shift that was tried. best: the nearest value, and its shift. reason: why the search
    ended without success.
    """

    value: float
    goal: float
    is_met: Callable[[float], bool]
    least: LeastShift
    gradient_cm: Vector
    lacks_c: Vector
    most_passes: int
    activation_norm: float
    dtype: type[np.floating] = np.float64
    is_met_before: bool = False
    passes: int = 0
    first: float = math.nan
    reason: str = ""
    is_over: bool = False
    wants: Literal["value", "gradient"] = "value"
    best: tuple[float, Vector] = field(init=False)
    shift: Vector = field(init=False)
    _radius: float = math.inf
    _t: float = 1.0
    _ray: _Ray = field(init=False)

    def __post_init__(self) -> None:
        self.shift = np.zeros(self.gradient_cm.shape[1])
        self.best = (self.value, self.shift)
        if self.is_met_before:
            self.first = self.value
            self._end("already there")
        else:
            self._begin(self.gradient_cm, self.lacks_c)

    def _lacks(self, value: float) -> float:
        return self.goal - value

    def _end(self, reason: str) -> None:
        self.is_over, self.reason = True, reason
        self.shift = self.best[1]

    def _begin(self, gradient_cm: Vector, lacks_c: Vector) -> None:
        """A ray from the best shift, along the least further one."""
        value, origin = self.best
        step = self.least.step(gradient_cm, lacks_c)
        size = 0.0 if step is None else self.least.norm(step)
        if step is None or not (size > 0 and math.isfinite(size)):
            self._end("no neuron that may move changes it")
            return
        lacks = self._lacks(value)
        room = MOST_NORMS * self.activation_norm - self.least.norm(origin)
        self._ray = _Ray(origin, step, lacks, size, room / size)
        if room <= 1e-6 * size:
            self._end(_too_large())
            return
        self._propose(min(1.0, self._radius / size, self._ray.most))

    def _propose(self, t: float) -> None:
        self._t, self.wants = t, "value"
        self.shift = (self._ray.origin + t * self._ray.step).astype(self.dtype).astype(np.float64)

    def take_value(self, value: float) -> None:
        """The value at `shift`."""
        self.passes += 1
        if math.isnan(self.first):
            self.first = value
        if abs(self._lacks(value)) < abs(self._lacks(self.best[0])) or self.is_met(value):
            self.best = (value, self.shift)
        if self.is_met(value):
            self._end("")
        elif self.passes >= self.most_passes:
            self._end("max_passes")
        else:
            self._go_on(self._lacks(value))

    def _go_on(self, lacks: float) -> None:
        ray, t = self._ray, self._t
        way = math.copysign(1.0, ray.lacks)
        last, ray.last = ray.last, (t, lacks)
        # By how much less is lacking for each unit of t, and what share that is of what the gradient says.
        gain = (last[1] - lacks) / (t - last[0]) if t != last[0] else 0.0
        share = gain / ray.lacks
        if lacks * way < 0:
            ray.far = (t, lacks)
        elif ray.far is not None or lacks * way < ray.near[1] * way:
            ray.near = (t, lacks)
        if ray.far is not None and self._jumps(ray.near, ray.far):
            self._end("jumps past it, where other experts are chosen")
        elif ray.far is not None:
            self._propose(self._inside(t + lacks / gain if gain else math.nan))
        elif share > _FOLLOWS and t < ray.most:
            self._propose(min(t + lacks / gain, _MOST_GROWTH * t, ray.most))
        elif ray.near[0] == 0:
            self._shorten()
        elif self.best[1] is self.shift and t >= ray.most:
            self._end(_too_large())
        else:
            size = ray.near[0] * ray.size
            self._radius = size if share > _BENDS else size / 2
            self._ask_for_gradient()

    def _shorten(self) -> None:
        """Try a shorter step where one brought nothing."""
        ray = self._ray
        ray.n_shorter += 1
        if ray.n_shorter > _MOST_SHORTER:
            self._end("saturates")
            return
        ray.last = (0.0, ray.lacks)
        self._propose(self._t * _SHORTER)

    def _inside(self, t: float) -> float:
        """A place between the two that the wanted value lies between."""
        assert self._ray.far is not None
        low, high = sorted((self._ray.near[0], self._ray.far[0]))
        room = _FROM_ENDS * (high - low)
        return t if low + room < t < high - room else (low + high) / 2

    def _jumps(self, near: tuple[float, float], far: tuple[float, float]) -> bool:
        is_narrow = abs(far[0] - near[0]) < _NARROW * max(abs(far[0]), abs(near[0]))
        return is_narrow and abs(far[1] - near[1]) > _JUMP * abs(self._ray.lacks)

    def _ask_for_gradient(self) -> None:
        gained = abs(self._ray.lacks) - abs(self._lacks(self.best[0]))
        if gained < _LEAST_GAIN * abs(self._lacks(self.value)):
            self._end("saturates")
            return
        self.shift, self.wants = self.best[1], "gradient"

    def take_gradient(self, gradient_cm: Vector, lacks_c: Vector) -> None:
        """The value's gradient at `shift`, or those of several, and what they lack; the value's own first."""
        self.passes += 1
        if self.passes >= self.most_passes:
            self._end("max_passes")
        else:
            self._begin(gradient_cm, lacks_c)


def _too_large() -> str:
    return f"the shift would be more than {MOST_NORMS:g} times as large as the activations"

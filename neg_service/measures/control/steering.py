"""Prompts brought to what is wanted of them: searches of many prompts, run together, each step seen by an intervention.

Axes: M neurons that act on a prompt, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from neg_service.errors import ConfigurationError
from neg_service.measures.batching import named
from neg_service.measures.control.aims import Aim, probability_of
from neg_service.measures.control.least_shift import LeastShift, Vector, strongest
from neg_service.measures.control.options import MAX_PASSES
from neg_service.measures.control.search import Search
from neg_service.measures.control.shifted_rows import Shift, ShiftedRows, Slopes
from neg_service.measures.routing import PromptRouting
from neg_service.models.language_model import LanguageModel
from neg_service.neurons import NeuronSet
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.slots import Slots

# So many prompts' searches run together, and of so many neurons in all: each search holds some vectors of these.
_TOGETHER, _NEURONS_TOGETHER = 64, 2**24


@dataclass(frozen=True)
class Movable:
    """Which neurons may move, and what counts as a small shift.

    count: the strongest so many of each prompt; of all where None. chosen: only these. norm: see `least_shift.py`.
    """

    count: int | None = None
    chosen: NeuronSet | None = None
    norm: str = "l2"

    def size(self, activation_m: Vector) -> float:
        """The norm of a prompt's activations, as that of a shift is measured."""
        return (
            math.sqrt(np.count_nonzero(activation_m)) if self.norm == "scaled" else float(np.linalg.norm(activation_m))
        )

    def scale(self, slots: Slots, gradient_m: Vector, activation_m: Vector) -> Vector:
        """By which each neuron's shift is measured [M]; 0 of those that stay."""
        scale_m = np.abs(activation_m) if self.norm == "scaled" else np.ones(slots.m)
        if self.chosen is not None:
            place_n = slots.places_of(self.chosen)
            is_chosen_m = np.zeros(slots.m, bool)
            is_chosen_m[place_n[place_n >= 0]] = True
            scale_m = np.where(is_chosen_m, scale_m, 0.0)
        return scale_m if self.count is None else strongest(gradient_m, scale_m, self.count)


# Rows of held references [q, M], of the neurons of some slots.
Held = Callable[[Slots], "np.ndarray[tuple[int, int], np.dtype[np.float32]]"]


@dataclass(frozen=True, eq=False)
class Steered:
    """One prompt, and the shift that was found for it.

    shift: what is added to its neurons. activation_m: these without it. logits_before_v, logits_v: float64, up to a
    constant each, without and with the shift. value_before, first_shot, achieved: see `Aim.shown` for their unit; the
    first shot is the value of the first shift that was tried. predicted_by_neg, predicted_by_log_odds: probabilities
    of the target with the shift, as gradients without it predict them. passes: interventions, and gradients beside the
    first. norm: of the shift, √Σδ²; relative_norm: over that of all activations; largest: the largest |δ|.
    """

    aim: Aim
    shift: Shift
    activation_m: Vector
    routing: PromptRouting
    logits_before_v: Tensor
    logits_v: Tensor
    value_before: float
    first_shot: float
    achieved: float
    predicted_by_neg: float
    predicted_by_log_odds: float
    reached: bool
    reason: str
    passes: int

    @property
    def probability_before(self) -> float:
        """Of the target, without the shift."""
        return probability_of(self.logits_before_v, self.aim.target)

    @property
    def probability(self) -> float:
        """Of the target, with the shift."""
        return probability_of(self.logits_v, self.aim.target)

    @property
    def norm(self) -> float:
        """See above."""
        return float(np.linalg.norm(self.shift.shift_m))

    @property
    def relative_norm(self) -> float:
        """See above."""
        size = float(np.linalg.norm(self.activation_m))
        return self.norm / size if size else math.nan

    @property
    def largest(self) -> float:
        """See above."""
        return float(np.abs(self.shift.shift_m).max(initial=0))


def steered(
    rows: ShiftedRows, model: LanguageModel, prompts: Sequence[EncodedPrompt], aims: Sequence[Aim], movable: Movable,
    max_passes: int = MAX_PASSES, held: Held | None = None,
) -> Iterator[tuple[int, Steered]]:  # fmt: skip
    """Bring each prompt to its aim; yields (index, found), each index once, in order.

    Raises:
        ConfigurationError: a tolerance that the model's precision cannot tell. DoesNotFit, NonFiniteError: see
            `ShiftedRows`.
    """
    # Of experts each prompt has an array of its own of what is held.
    is_alone = rows.one_at_a_time or (held is not None and model.feed_forward.has_experts)
    together = 1 if is_alone else max(1, min(_TOGETHER, _NEURONS_TOGETHER // max(1, rows.n_neurons)))
    for start in range(0, len(prompts), together):
        own = slice(start, start + together)
        found = _steered_together(rows, model, prompts[own], aims[own], movable, max_passes, held)
        yield from enumerate(found, start)


@dataclass
class _Running:
    """A prompt whose search runs: what it began with, and logits with the best shift so far."""

    prompt: EncodedPrompt
    aim: Aim
    slopes: Slopes
    logits_before_v: Tensor
    search: Search
    compared: tuple[int, ...]
    logits_v: Tensor

    @property
    def shift(self) -> Shift:
        return Shift(self.slopes.slots, self.search.shift)


def _steered_together(
    rows: ShiftedRows, model: LanguageModel, prompts: Sequence[EncodedPrompt], aims: Sequence[Aim], movable: Movable,
    max_passes: int, held: Held | None,
) -> list[Steered]:  # fmt: skip
    before = rows.logits(prompts, [None] * len(prompts))
    for prompt, aim, logits_v in zip(prompts, aims, before, strict=True):
        _require_resolution(model, prompt, aim, logits_v, rows.epsilon)
    compared = [_compared(aim, logits_v) for aim, logits_v in zip(aims, before, strict=True)]
    slopes = rows.slopes(prompts, compared, [None] * len(prompts))
    running: list[_Running] = []
    for prompt, aim, logits_v, tokens, own in zip(prompts, aims, before, compared, slopes, strict=True):
        gradient_cm = _gradients(aim, logits_v, own.slope_km)
        scale_m = movable.scale(own.slots, gradient_cm[0], own.activation_m)
        least = _least(scale_m, None if held is None else held(own.slots), running[-1:])
        search = Search(
            value=aim.value(logits_v), goal=aim.goal, is_met=aim.is_met, least=least, gradient_cm=gradient_cm,
            lacks_c=np.array(aim.lacks(logits_v)), most_passes=max_passes,
            activation_norm=movable.size(own.activation_m), dtype=rows.dtype,
            is_met_before=aim.is_met_before(aim.value(logits_v)),
        )  # fmt: skip
        running.append(_Running(prompt, aim, own, logits_v, search, tokens, logits_v))
    while open_ := [own for own in running if not own.search.is_over]:
        _step(rows, open_)
    return [_finished(own) for own in running]


def _least(scale_m: Vector, held_qm: NDArray[np.float32] | None, before: Sequence[_Running]) -> LeastShift:
    """What a prompt's shift is measured by: as with the one before where that is the same, which is worked out once."""
    for own in before:
        known = own.search.least
        if known.held_qm is held_qm and np.array_equal(known.scale_m, scale_m):
            return known
    return LeastShift.of(scale_m, held_qm)


def _step(rows: ShiftedRows, running: Sequence[_Running]) -> None:
    """Give each search what it wants."""
    values = [own for own in running if own.search.wants == "value"]
    gradients = [own for own in running if own.search.wants == "gradient"]
    for own, logits_v in zip(
        values, rows.logits([own.prompt for own in values], [own.shift for own in values]), strict=True
    ):
        shift_m = own.search.shift
        own.search.take_value(own.aim.value(logits_v))
        if own.search.best[1] is shift_m:
            own.logits_v = logits_v
    for own in gradients:
        own.compared = _compared(own.aim, own.logits_v)
    slopes = rows.slopes(
        [own.prompt for own in gradients], [own.compared for own in gradients], [own.shift for own in gradients]
    )
    for own, found in zip(gradients, slopes, strict=True):
        slope_km = np.stack([_in_slots(found, own.slopes.slots, slope_m) for slope_m in found.slope_km])
        lacks_c = np.array(own.aim.lacks(own.logits_v))
        own.search.take_gradient(_gradients(own.aim, own.logits_v, slope_km), lacks_c)


def _in_slots(found: Slopes, slots: Slots, slope_m: Vector) -> Vector:
    """Gradients of the neurons of some slots, 0 of experts that the shifted row does not use."""
    if np.array_equal(found.slots.layer, slots.layer) and np.array_equal(found.slots.expert, slots.expert):
        return slope_m
    neurons = NeuronSet(*np.ascontiguousarray(slots.rows_at(np.arange(slots.m)).T))
    place_m = found.slots.places_of(neurons)
    return np.where(place_m >= 0, slope_m[place_m], 0.0)


def _compared(aim: Aim, logits_v: Tensor) -> tuple[int, ...]:
    """The tokens whose log p is differentiated."""
    return (aim.target, *aim.compared_with(logits_v))


def _gradients(aim: Aim, logits_v: Tensor, slope_km: Vector) -> Vector:
    """Those of the values [C, M], from those of log p of the target and of what it is compared with."""
    if aim.kind == "probability":
        return slope_km[:1] / _rest(logits_v, aim.target)
    return slope_km[:1] - slope_km[1:]


def _rest(logits_v: Tensor, token: int) -> float:
    """What a token leaves to all others, 1 - p, without subtracting."""
    others_v = logits_v.clone()
    others_v[token] = -math.inf
    return math.exp(float(others_v.logsumexp(0) - logits_v.logsumexp(0)))


def _require_resolution(
    model: LanguageModel, prompt: EncodedPrompt, aim: Aim, logits_v: Tensor, epsilon: float
) -> None:
    resolution = aim.resolution(logits_v, epsilon)
    if aim.kind != "top" and resolution > aim.tolerance:
        raise ConfigurationError(
            f"{named(prompt, model)} is told to about {resolution:.1g} only; or use model.dtype=float32, or an engine "
            "that has difference arithmetic (model.engine=differences)",
            setting="measure.tolerance",
            value=aim.tolerance,
            allowed=f"at least {resolution:.1g}",
        )


def _finished(own: _Running) -> Steered:
    search, aim, logits_v = own.search, own.aim, own.logits_before_v
    shift_m = search.best[1]
    p = probability_of(logits_v, aim.target)
    slope = float(own.slopes.slope_km[0] @ shift_m)
    log_odds = math.log(p) - math.log(_rest(logits_v, aim.target)) if p > 0 else -math.inf
    return Steered(
        aim=aim,
        shift=Shift(own.slopes.slots, shift_m),
        activation_m=own.slopes.activation_m,
        routing=own.slopes.routing,
        logits_before_v=logits_v,
        logits_v=own.logits_v,
        value_before=aim.shown(search.value),
        first_shot=aim.shown(search.first),
        achieved=aim.shown(search.best[0]),
        predicted_by_neg=p + p * slope,
        predicted_by_log_odds=_sigmoid(log_odds + slope / _rest(logits_v, aim.target)),
        reached=search.is_met(search.best[0]) or search.is_met_before,
        reason=search.reason,
        passes=search.passes,
    )


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

"""Shifts of steered prompts laid on other prompts, and on as many neurons drawn at random: what changes there.

A shift is laid on by layer, expert and neuron, at the other prompt's readout position; what is of an expert that its
token does not use moves nothing. Beside it stands a constant on the target's logit, which is arithmetic on the logits
before. Each prompt meets all shifts in turn, so that what its rows share is worked out once, and no more than a block
of rows' logits is held.

Axes: P shifts, T methods, n other prompts, L layers, S slots of a layer, M neurons that act on a prompt, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.layer_neurons import NO_EXPERT
from neg_service.measures.control.control import ControlResult
from neg_service.measures.control.shifted_rows import Shift, ShiftedRows
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.slots import Slots

Doubles = NDArray[np.float64]

METHODS = ("shift", "logit constant", "random neurons")
SHIFT, CONSTANT, RANDOM = range(len(METHODS))
# Rows of so many bytes run together: their shifts and logits, in float64; and at most so many.
_BYTES, _ROWS = 2**28, 64
# Of a model that does not say it.
_VOCABULARY = 2**18


@dataclass(frozen=True)
class Laid:
    """One steered prompt's shift, the same values on random neurons, and the target's token."""

    shift: Shift
    random: Shift
    target: int

    @classmethod
    def of(cls, model: LanguageModel, result: ControlResult, index: int, target: int, seed: int) -> Laid:
        """That of prompt `index` of a result."""
        shift = shift_of(model, result, index)
        random_m = np.random.default_rng([seed, index]).permutation(shift.shift_m)
        return cls(shift, Shift(shift.slots, random_m), target)


def shift_of(model: LanguageModel, result: ControlResult, index: int) -> Shift:
    """The shift of a prompt of a result, with the neurons that it is of."""
    layer, expert, size, values = [], [], [], []
    for place, number in enumerate(result.layers):
        own = model.feed_forward.layer_neurons[number]
        shift_s = result.shift[index, place]
        if result.expert is None or not own.n_experts:
            # A layer's only MLP.
            expert_s = np.repeat([one for one, _ in own.mlps], [n for _, n in own.mlps])
        else:
            expert_s = result.expert[index, place]
            # A prompt has fewer neurons than others in layers without experts, or with identities in their place.
            expert_s = expert_s[expert_s != NO_EXPERT]
        bounds = [0, *(np.flatnonzero(np.diff(expert_s)) + 1).tolist(), len(expert_s)]
        for start, end in pairwise(bounds):
            layer.append(number)
            expert.append(int(expert_s[start]))
            size.append(end - start)
        values.append(shift_s[: len(expert_s)])
    slots = Slots(np.array(layer, np.int64), np.array(expert, np.int64), np.array(size, np.int64))
    return Shift(slots, np.concatenate(values).astype(np.float64))


class Read:
    """What a model predicts at a readout position: log p [V] in float64."""

    def __init__(self, logits_v: Tensor) -> None:
        self._log_p_v = logits_v - logits_v.logsumexp(0)

    @property
    def top(self) -> int:
        """The most probable token."""
        return int(self._log_p_v.argmax())

    def probability(self, token: int) -> float:
        """Of a token."""
        return math.exp(float(self._log_p_v[token]))

    def log_odds(self, token: int) -> float:
        """log p - log(1 - p) of a token, without subtracting from 1."""
        others_v = self._log_p_v.clone()
        others_v[token] = -math.inf
        return float(self._log_p_v[token] - others_v.logsumexp(0))

    def divergence(self, other: Read) -> float:
        """Σ p·log(p / p') over the vocabulary, nats; p' is the other's."""
        p_v = self._log_p_v.exp()
        # Where p underflows, log p' may be anything.
        terms_v = torch.where(p_v > 0, p_v * (self._log_p_v - other._log_p_v), 0.0)
        return max(0.0, float(terms_v.sum()))

    def with_constant(self, token: int, constant: float) -> Read:
        """The same with a constant added to a token's logit."""
        changed_v = self._log_p_v.clone()
        changed_v[token] += constant
        return Read(changed_v)


@dataclass(frozen=True)
class OtherPrompts:
    """What each method [T] does at n other prompts.

    answer_before, target_before: [n], probabilities of the prompt's own answer, and there of the steered prompt's
    target. answer, target: [T, n], the same with the method. is_same_top: [T, n], whether the most probable token stays
    the same. kl: [T, n], Σ p·log(p / p') over the vocabulary, p before and p' with the method, nats. Prompts without an
    answer of their own have NaN for it.
    """

    answer_before: Doubles
    answer: Doubles
    target_before: Doubles
    target: Doubles
    is_same_top: NDArray[np.bool_]
    kl: Doubles

    @classmethod
    def empty(cls, n: int) -> OtherPrompts:
        """To be filled."""
        t = len(METHODS)
        return cls(
            answer_before=np.full(n, np.nan),
            answer=np.full((t, n), np.nan),
            target_before=np.full(n, np.nan),
            target=np.full((t, n), np.nan),
            is_same_top=np.zeros((t, n), np.bool_),
            kl=np.full((t, n), np.nan),
        )

    def take(self, place: int, method: int, before: Read, after: Read, target: int, answer: int | None) -> None:
        """What a method does at a prompt."""
        self.target_before[place], self.target[method, place] = before.probability(target), after.probability(target)
        self.is_same_top[method, place] = before.top == after.top
        self.kl[method, place] = before.divergence(after)
        if answer is not None:
            self.answer_before[place] = before.probability(answer)
            self.answer[method, place] = after.probability(answer)


@dataclass(frozen=True)
class AtSteered:
    """What methods do to the steered prompts' own targets.

    probability_before: [P]. probability: [P, T]. constant_p: [P], nats, which give what the shift gives.
    """

    probability_before: Doubles
    probability: Doubles
    constant_p: Doubles


def at_steered(rows: ShiftedRows, prompts: Sequence[EncodedPrompt], laid: Sequence[Laid]) -> AtSteered:
    """Of each prompt with its own shift.

    Raises:
        DoesNotFit, NonFiniteError: see `ShiftedRows`.
    """
    found = AtSteered(np.zeros(len(laid)), np.zeros((len(laid), len(METHODS))), np.zeros(len(laid)))
    for place, method, before, after in _passes(rows, prompts, [[own.shift, own.random] for own in laid]):
        target = laid[place].target
        found.probability_before[place] = before.probability(target)
        if method == 0:
            found.constant_p[place] = after.log_odds(target) - before.log_odds(target)
            constant = before.with_constant(target, found.constant_p[place])
            found.probability[place, CONSTANT] = constant.probability(target)
        found.probability[place, RANDOM if method else SHIFT] = after.probability(target)
    return found


def at_others(
    rows: ShiftedRows, prompts: Sequence[EncodedPrompt], laid: Sequence[Laid], constant_p: Doubles,
    is_reference: bool,
) -> list[OtherPrompts]:  # fmt: skip
    """Of each shift, at all of the prompts; the first target of references is their answer, of wordings the target.

    Raises:
        DoesNotFit, NonFiniteError: see `ShiftedRows`.
    """
    found = [OtherPrompts.empty(len(prompts)) for _ in laid]
    shifts = [shift for own in laid for shift in (own.shift, own.random)]
    for place, which, before, after in _passes(rows, prompts, [shifts] * len(prompts)):
        p, is_random = divmod(which, 2)
        own_token = prompts[place].target_ids[0]
        target, answer = (laid[p].target, own_token) if is_reference else (own_token, None)
        found[p].take(place, RANDOM if is_random else SHIFT, before, after, target, answer)
        if not is_random:
            with_constant = before.with_constant(target, float(constant_p[p]))
            found[p].take(place, CONSTANT, before, with_constant, target, answer)
    return found


def _passes(
    rows: ShiftedRows, prompts: Sequence[EncodedPrompt], shifts: Sequence[Sequence[Shift]]
) -> Iterator[tuple[int, int, Read, Read]]:
    """Each prompt with each of its shifts: yields (prompt, shift, without it, with it), prompt by prompt."""
    asked = [(place, which) for place, own in enumerate(shifts) for which in range(-1, len(own))]
    largest = max((shift.slots.m for own in shifts for shift in own), default=0)
    together = min(_ROWS, max(1, _BYTES // (8 * (largest + (rows.n_vocabulary or _VOCABULARY)))))
    before = None
    for start in range(0, len(asked), together):
        block = asked[start : start + together]
        own = [None if which < 0 else shifts[place][which] for place, which in block]
        for (place, which), logits_v in zip(block, rows.logits([prompts[p] for p, _ in block], own), strict=True):
            read = Read(logits_v)
            if which < 0:
                before = read
            else:
                assert before is not None
                yield place, which, before, read

"""References: prompts with their right answers, which a shift shall leave alone, or at which it is seen what it does.

Held, a reference gives a row √p_k·∇log p_k for its answer and for each of its runners-up, the most probable other
tokens: the KL divergence of its output is half the sum of squares of what a shift does along its rows, to second order
and as far as these tokens carry it. `least_shift.py` has the closed form. Other references, which are not held, say
what that brings: the same prompt is never both.

A steered prompt has other experts than a reference. The gradient of a neuron whose expert the reference's token does
not use is 0: there the shift does nothing.

Axes: k tokens of a reference, q = references x tokens, M neurons that act on a prompt, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from neg_service.errors import PromptError, shortened
from neg_service.measures.batching import encoded_prompts
from neg_service.measures.control.shifted_rows import ShiftedRows
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.chat import prompts_of
from neg_service.prompts.prompt import Asked, EncodedPrompt, check_prompts, is_conversation
from neg_service.slots import Slots

# A prompt, a text or messages, and the text that is its right answer.
Reference = tuple[Asked, str]
Floats = NDArray[np.float32]

# Beside the answer so many of the most probable tokens are held. On SmolLM2-135M an answer and two others carry half of
# what is probable, and what is left moves: the divergence at other references falls to a fifth, with nine to a tenth.
RUNNERS_UP = 9
# So many references are differentiated before their gradients are put into single precision.
_TOGETHER = 16


@dataclass(frozen=True, eq=False)
class HeldReferences:
    """Rows of held references, for any steered prompt's neurons: what `steered` takes for `held`.

    slots, row_km: of each reference its neurons, and its rows [k, M] of these. row_qm: all of them in one array, where
    all have the same neurons.
    """

    slots: tuple[Slots, ...]
    row_km: tuple[Floats, ...]
    row_qm: Floats | None

    @classmethod
    def of(cls, rows: ShiftedRows, references: Sequence[EncodedPrompt], runners_up: int = RUNNERS_UP) -> HeldReferences:
        """Of references whose first target is their answer, at the neurons of `rows`.

        Raises:
            DoesNotFit: a reference does not fit even alone. NonFiniteError: NaN or infinity in logits or gradients.
        """
        slots: list[Slots] = []
        row_km: list[Floats] = []
        for start in range(0, len(references), _TOGETHER):
            own = references[start : start + _TOGETHER]
            tokens = [held_tokens(logits_v, prompt.target_ids[0], runners_up)
                      for prompt, logits_v in zip(own, rows.logits(own, [None] * len(own)), strict=True)]  # fmt: skip
            for token_k, found in zip(tokens, rows.slopes(own, tokens, [None] * len(own)), strict=True):
                root_k = found.log_p_v[token_k].mul(0.5).exp().numpy()
                slots.append(found.slots)
                row_km.append((root_k[:, None] * found.slope_km).astype(np.float32))
        if not all(_are_same(one, slots[0]) for one in slots):
            return cls(tuple(slots), tuple(row_km), None)
        row_qm = np.concatenate(row_km)
        return cls(tuple(slots), tuple(np.split(row_qm, len(slots))), row_qm)

    def __call__(self, slots: Slots) -> Floats:
        """Rows of the neurons of a steered prompt [q, M]; not to be written to."""
        if self.row_qm is not None and _are_same(self.slots[0], slots):
            return self.row_qm
        return np.concatenate(
            [_in_slots(own_km, own, slots) for own, own_km in zip(self.slots, self.row_km, strict=True)]
        )


def held_tokens(logits_v: Tensor, answer: int, runners_up: int) -> list[int]:
    """The answer, and its runners-up: the most probable other tokens."""
    others_v = logits_v.clone()
    others_v[answer] = -math.inf
    return [answer, *others_v.topk(min(runners_up, len(logits_v) - 1)).indices.tolist()]


def _are_same(one: Slots, other: Slots) -> bool:
    return np.array_equal(one.layer, other.layer) and np.array_equal(one.expert, other.expert)


def _in_slots(row_km: Floats, own: Slots, wanted: Slots) -> Floats:
    """Rows of some slots as those of others; 0 of experts that are not among the first."""
    found_km = np.zeros((len(row_km), wanted.m), np.float32)
    places = {key: place for place, key in enumerate(zip(own.layer.tolist(), own.expert.tolist(), strict=True))}
    for to, key in enumerate(zip(wanted.layer.tolist(), wanted.expert.tolist(), strict=True)):
        if key in places:
            at = places[key]
            found_km[:, wanted.start[to] : wanted.start[to + 1]] = row_km[:, own.start[at] : own.start[at + 1]]
    return found_km


def encoded_references(
    model: LanguageModel, references: Sequence[Reference], setting: str, *, least: int = 1
) -> list[EncodedPrompt]:
    """References as tokens; the answer is the only target. `setting` is what they were given as.

    Raises:
        PromptError: fewer than `least`, what is no pair of a prompt and its answer, one that is given twice, or a
            prompt or an answer that cannot be used.
    """
    pairs = _pairs(references, setting)
    if len(pairs) < least:
        raise PromptError(
            "an interval needs several" if least > 1 else "", setting=setting, value=f"{len(pairs)} references",
            allowed=f"at least {least} of (prompt, answer)",
        )  # fmt: skip
    encoded = encoded_as(model, [prompt for prompt, _ in pairs], [[answer] for _, answer in pairs], setting,
                         "reference")  # fmt: skip
    first: dict[str, str] = {}
    for own in encoded:
        if first.setdefault(own.prompt.text, own.prompt.id) != own.prompt.id:
            check_apart([own], first, setting, "leave one of them out")
    return encoded


def encoded_as(
    model: LanguageModel, asked: Sequence[Asked], targets: Sequence[Sequence[str]], setting: str, kind: str
) -> list[EncodedPrompt]:
    """Prompts that are no steered ones as tokens; messages call them `kind` and their number.

    Raises:
        PromptError: a prompt or a target that cannot be used.
    """
    try:
        prompts = [
            replace(one, id=f"{kind} {index}") for index, one in enumerate(prompts_of(model, list(asked), targets))
        ]
        check_prompts(prompts)
        return encoded_prompts(model, prompts, "error")
    except PromptError as error:
        raise error.renamed({"dataset.source": setting}) from error


def check_apart(prompts: Sequence[EncodedPrompt], others: Mapping[str, str], setting: str, reason: str) -> None:
    """Refuse prompts that are something else at once. others: the texts of these, and what they are.

    Raises:
        PromptError: naming both.
    """
    for own in prompts:
        text = own.prompt.text
        if text in others:
            raise PromptError(f"{own.prompt.id} ({shortened(text)}) is also {others[text]}: {reason}", change=setting)


def _pairs(references: Any, setting: str) -> list[Reference]:
    is_list = hasattr(references, "__iter__") and not isinstance(references, str | bytes | Mapping)
    found = list(references) if is_list else [references]
    for index, own in enumerate(found):
        is_pair = isinstance(own, list | tuple) and len(own) == 2 and isinstance(own[1], str)
        if not is_pair or not (isinstance(own[0], str) or is_conversation(own[0])):
            raise PromptError(
                f"reference {index} must be a pair of a prompt, a text or messages, and its right answer: "
                '("The capital of Italy is", " Rome")', change=setting,
            )  # fmt: skip
    return [(own[0], own[1]) for own in found]

"""`side_effects`: what shifts that `control` found do to other prompts, beside two baselines.

References are prompts with right answers that no shift shall touch, and that were not held while it was looked for. A
shift is laid on their neurons (`other_prompts.py`). Beside it stand

- `logit constant`: a constant on the target's logit, of the size that gives the steered prompt the same probability.
  It needs no neurons; a shift is worth something where it does less to references.
- `random neurons`: the values of the shift on as many neurons drawn at random. Its size is equal, its effect is not:
  what it does to the steered prompt is said.

Means over references have 95 % intervals from the bootstrap over references.

Axes: P steered prompts, T methods, n other prompts, b draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from neg_service.errors import ConfigurationError, PromptError, told_by_parameters
from neg_service.measures.batching import budget_of
from neg_service.measures.control.control import ControlResult, asked_prompts
from neg_service.measures.control.effects_table import schema_of_effects
from neg_service.measures.control.other_prompts import METHODS, Doubles, Laid, OtherPrompts, at_others, at_steered
from neg_service.measures.control.references import Reference, check_apart, encoded_as, encoded_references
from neg_service.measures.control.shifted_rows import ShiftedRows
from neg_service.measures.neurgrad import encoded_texts
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import Asked, EncodedPrompt

REFERENCES, WORDINGS = "references", "wordings"
LEVEL, _DRAWS = 0.95, 2000
# A result is of other prompts where it says by more than this share something else of a target without a shift; logits
# that are rounded to more than this do not tell.
_SAME, _EXACT = 1e-3, 1e-5


class Mean(NamedTuple):
    """A mean over prompts, and its 95 % interval; NaN of a single prompt."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SideEffects:
    """Of P shifts, with each method of `METHODS` [T]: what it does to the steered prompt, and to others.

    probability_before: [P], of the target at its steered prompt. probability: [P, T], with each method. size: [P, T],
    √Σδ² of shifts; of a constant itself, in nats. references, wordings: of each shift; no wordings where none were
    given. seed: of random neurons and intervals.
    """

    prompts: tuple[str, ...]
    targets: tuple[str, ...]
    probability_before: Doubles
    probability: Doubles
    size: Doubles
    references: tuple[OtherPrompts, ...]
    wordings: tuple[OtherPrompts, ...]
    seed: int

    def table(self) -> pa.Table:
        """A row for each prompt, method, and kind of other prompts; see `effects_table.py`."""
        kinds = [(REFERENCES, self.references), (WORDINGS, self.wordings)]
        rows = [
            self._row(index, method, kind, own[index])
            for index in range(len(self.prompts))
            for kind, own in kinds
            if len(own) and len(own[index].target_before)
            for method in range(len(METHODS))
        ]
        return pa.Table.from_pylist(rows, schema_of_effects())

    def means(self, index: int, method: str, kind: str = REFERENCES) -> dict[str, Mean]:
        """Of the shift of one steered prompt: the means of the table, by the names of their columns.

        Raises:
            ConfigurationError: an unknown method or kind.
        """
        for name, value, known in (("method", method, METHODS), ("kind", kind, (REFERENCES, WORDINGS))):
            if value not in known:
                raise ConfigurationError(setting=name, value=value, allowed=f"one of {', '.join(known)}")
        own = (self.references if kind == REFERENCES else self.wordings)[index]
        return self._means(own, METHODS.index(method), kind)

    def _means(self, own: OtherPrompts, method: int, kind: str) -> dict[str, Mean]:
        columns = {"target_probability_before": own.target_before, "target_probability": own.target[method]}
        if kind == REFERENCES:
            columns |= {"answer_probability_before": own.answer_before, "answer_probability": own.answer[method],
                        "same_top": own.is_same_top[method].astype(np.float64), "kl": own.kl[method]}  # fmt: skip
        # All of a table are of the same draws, so that their differences are those of the same prompts.
        weights_bn = _draws(len(own.target_before), self.seed)
        return {name: _mean(values_n, weights_bn) for name, values_n in columns.items()}

    def _row(self, index: int, method: int, kind: str, own: OtherPrompts) -> dict[str, Any]:
        found = {
            "prompt_id": str(index), "prompt": self.prompts[index], "target": self.targets[index],
            "method": METHODS[method], "kind": kind, "n": len(own.target_before),
            "steered_probability_before": self.probability_before[index],
            "steered_probability": self.probability[index, method], "size": self.size[index, method],
        }  # fmt: skip
        for name, mean in self._means(own, method, kind).items():
            low, high = (None if np.isnan(end) else end for end in (mean.low, mean.high))
            found |= {name: mean.value, f"{name}_low": low, f"{name}_high": high}
        return found


@told_by_parameters(
    model__source="model", dataset__source="prompts", dataset__chat_template="model.tokenizer.chat_template"
)
def side_effects(
    model: LanguageModel,
    result: ControlResult,
    prompts: Asked | Sequence[Asked],
    targets: str | Sequence[str] | Sequence[Sequence[str]],
    references: Sequence[Reference],
    *,
    wordings: Sequence[Sequence[Asked]] | None = None,
    seed: int = 0,
    batch_bytes: int | None = None,
) -> SideEffects:
    """Measure what each shift of a result does to other prompts, beside two baselines; see this module's header.

    Args:
        model: from `load_model`.
        result: of `control`, for these prompts and targets.
        prompts, targets: as `control` takes them.
        references: R pairs of a prompt and its right answer, one token there; none of them steered or held.
        wordings: for each prompt other texts that ask the same: there the target is wanted, too.
        seed: of random neurons and intervals.
        batch_bytes: memory that a batch may take; if not given, what keeps the device busy and fits it.

    Raises:
        PromptError: an unusable prompt, target, reference or wording; one that is steered or held, too; fewer than two
            references.
        ConfigurationError: a result of other prompts or of another model, or a seed that is none.
        NonFiniteError: NaN or infinity in a prompt's logits, without or with a shift.
    """
    asked, steered_targets = asked_prompts(prompts, targets)
    _check_result(model, result, len(asked))
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigurationError(setting="measure.seed", value=seed, allowed="a whole number, at least 0")
    encoded = encoded_texts(model, asked, [[target] for target in steered_targets])
    others = encoded_references(model, references, "measure.references", least=2)
    worded = _wordings(model, wordings, encoded)
    _check_apart(encoded, others, worded, result.held)

    rows = ShiftedRows(model, result.basis, result.layers, budget_of(model, batch_bytes))
    return effects_on_others(model, rows, result, encoded, others, worded, seed)


def effects_on_others(
    model: LanguageModel, rows: ShiftedRows, result: ControlResult, encoded: Sequence[EncodedPrompt],
    others: Sequence[EncodedPrompt], worded: Sequence[Sequence[EncodedPrompt]] = (), seed: int = 0,
) -> SideEffects:  # fmt: skip
    """The same of encoded prompts, which are what was steered, each with its target first.

    Raises:
        ConfigurationError: a result of other prompts. NonFiniteError: see `side_effects`.
    """
    laid = [Laid.of(model, result, index, own.target_ids[0], seed) for index, own in enumerate(encoded)]
    steered = at_steered(rows, encoded, laid)
    _check_same(rows, result, steered.probability_before)
    constants = steered.constant_p
    norms = [float(np.linalg.norm(own.shift.shift_m)) for own in laid]
    return SideEffects(
        prompts=tuple(own.prompt.text for own in encoded),
        targets=tuple(own.prompt.targets[0] for own in encoded),
        probability_before=steered.probability_before,
        probability=steered.probability,
        size=np.stack([norms, constants, norms], 1),
        references=tuple(at_others(rows, others, laid, constants, is_reference=True)),
        wordings=tuple(
            at_others(rows, own, laid[index : index + 1], constants[index : index + 1], is_reference=False)[0]
            for index, own in enumerate(worded)
        ),
        seed=seed,
    )


def _check_result(model: LanguageModel, result: ControlResult, n: int) -> None:
    if len(result.shift) != n:
        raise ConfigurationError(
            "it has a shift for each prompt that was steered", setting="result",
            value=f"shifts of {len(result.shift)} prompts", allowed=f"of these {n}",
        )  # fmt: skip
    sizes = model.feed_forward.layer_neurons
    is_of_model = max(result.layers) < len(sizes) and (result.expert is not None) == model.feed_forward.has_experts
    if not is_of_model or result.shift.shape[2] != max(sizes[layer].n_slots for layer in result.layers):
        raise ConfigurationError(
            f"its layers and neurons are not those of {model.name}", setting="result",
            value=f"shifts of {len(result.layers)} layers of {result.shift.shape[2]} neurons",
            allowed="of this model",
        )  # fmt: skip


def _check_same(rows: ShiftedRows, result: ControlResult, before_p: Doubles) -> None:
    """Refuse a result of prompts in another order."""
    if rows.epsilon > _EXACT:
        return
    for index in np.flatnonzero(np.abs(before_p - result.probability_before) > _SAME * before_p + 1e-12)[:1]:
        raise ConfigurationError(
            f"says that prompt {index} gives its target a probability of {result.probability_before[index]:.3g} "
            f"without a shift, and it gives {before_p[index]:.3g}: give the prompts and targets that were steered",
            setting="result",
        )


def _wordings(
    model: LanguageModel, wordings: Sequence[Sequence[Asked]] | None, steered: Sequence[EncodedPrompt]
) -> list[list[EncodedPrompt]]:
    """Of each prompt its wordings with its target as tokens; none at all where none are given."""
    if wordings is None:
        return []
    if isinstance(wordings, str) or any(isinstance(own, str) for own in wordings):
        raise PromptError('must be a list of texts for each prompt: [["..."]]', setting="measure.wordings")
    if len(wordings) != len(steered):
        raise PromptError(
            setting="measure.wordings", value=f"lists for {len(wordings)} prompts",
            allowed=f"a list for each of the {len(steered)} prompts; an empty one where there are none",
        )  # fmt: skip
    asked = [one for own in wordings for one in own]
    targets = [prompt.prompt.targets for own, prompt in zip(wordings, steered, strict=True) for _ in own]
    if not asked:
        raise PromptError("holds no text: leave it out", setting="measure.wordings")
    encoded = iter(encoded_as(model, asked, targets, "measure.wordings", "wording"))
    return [[next(encoded) for _ in own] for own in wordings]


def _check_apart(
    steered: Sequence[EncodedPrompt], references: Sequence[EncodedPrompt], worded: Sequence[Sequence[EncodedPrompt]],
    held: Sequence[str],
) -> None:  # fmt: skip
    """Refuse a prompt that would be two things at once.

    Raises:
        PromptError: naming it.
    """
    steered_texts = {own.prompt.text: f"prompt {index}, which is steered" for index, own in enumerate(steered)}
    held_texts = dict.fromkeys(held, "one of those that were held")
    check_apart(references, steered_texts, "measure.references", "a side effect is what happens elsewhere")
    check_apart(references, held_texts, "measure.references", "measure at others than those that were held")
    reference_texts = {own.prompt.text: own.prompt.id for own in references}
    for prompt, own in zip(steered, worded, strict=False):
        its_own = {prompt.prompt.text: "the text that is steered"}
        check_apart(own, its_own | held_texts | reference_texts, "measure.wordings", "a wording is neither")


def _draws(n: int, seed: int) -> Doubles:
    """How often each of n prompts is in each draw, over n [b, n]."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_DRAWS) / n


def _mean(value_n: Doubles, weight_bn: Doubles) -> Mean:
    if len(value_n) < 2:
        return Mean(float(value_n.mean()), np.nan, np.nan)
    low, high = np.quantile(weight_bn @ value_n, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Mean(float(value_n.mean()), float(low), float(high))

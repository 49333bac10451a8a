"""`control`: give targets the probability that is asked for, and say what it took.

Of all joint shifts of neurons at the readout position that bring a target there, the least is looked for: along the
gradient of its log-odds (`least_shift.py`, `search.py`), each step seen by an intervention. What is given is what an
intervention achieved, never a prediction; predictions stand beside it.

This is a dial for a prompt's answer. It is no editor of knowledge: the same shift in another prompt raises the answer
there too, more or less, and moves other answers. What it does beside stands in `side_effects.py`.

Axes: P prompts, L layers, N neurons of a layer; of a model with experts the slots of a token, as in `neurgrad.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError, PromptError, told_by_parameters
from neg_service.measures.batching import budget_of, encoded_prompts
from neg_service.measures.choice import checked_neurons, layers_with_neurons
from neg_service.measures.control.aims import Aim
from neg_service.measures.control.options import MAX_PASSES, NORMS, Wanted, each
from neg_service.measures.control.references import HeldReferences, Reference, check_apart, encoded_references
from neg_service.measures.control.shifted_rows import ShiftedRows
from neg_service.measures.control.steering import Movable, Steered, steered
from neg_service.measures.edits import Edit
from neg_service.measures.neurgrad import slots_by_layer
from neg_service.models.language_model import LanguageModel
from neg_service.neurons import NeuronSet
from neg_service.prompts.chat import prompts_of
from neg_service.prompts.prompt import Asked, EncodedPrompt, check_prompts, is_conversation

Doubles = NDArray[np.float64]
Neurons = Literal["all"] | int | Sequence[int] | Sequence[Sequence[int | None]] | NeuronSet


class Predicted(NamedTuple):
    """Probabilities of the targets with the shifts that were found, as gradients without them predict them [P] each.

    by_neg: linear in probability, as NEG is. by_log_odds: linear in log-odds.
    """

    by_neg: Doubles
    by_log_odds: Doubles


@dataclass(frozen=True)
class ControlResult:
    """What was wanted of P targets, what was achieved, and by which shifts.

    shift: [P, L, N], what is added to each neuron's activation, signed, in activation units; of a model with experts
    NaN where a layer has fewer slots. layers: along L; expert, neuron: of a model with experts, as in `NeurGradResult`.
    kind: P times `probability`, `margin` or `top`.
    wanted, value_before, first_shot, achieved: [P], probabilities 0..1, or nats of margin where a margin or the top
    was asked for: without a shift, with the first one that was tried, and with the one that is given. All are read from
    passes of the model. probability_before, probability: [P], of the targets, whatever was asked for.
    reached: [P], whether `achieved` is within the tolerance. reason: P texts, why not; `already there` where nothing
    had to be done. Of a target that was not reached `achieved` is as near as it came.
    passes: [P], interventions, and gradients beside the first. norm: [P], √Σδ²; relative_norm: over that of all
    activations; largest: the largest |δ|. held: the references that were held still, as the model reads them.
    """

    shift: NDArray[Any]
    kind: tuple[str, ...]
    wanted: Doubles
    probability_before: Doubles
    probability: Doubles
    value_before: Doubles
    predicted: Predicted
    first_shot: Doubles
    achieved: Doubles
    reached: NDArray[np.bool_]
    reason: tuple[str, ...]
    passes: NDArray[np.int64]
    norm: Doubles
    relative_norm: Doubles
    largest: Doubles
    layers: tuple[int, ...]
    basis: str
    expert: NDArray[np.int64] | None = None
    neuron: NDArray[np.int64] | None = None
    held: tuple[str, ...] = ()

    def neurons(self, index: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """The neurons that a prompt's shift moves, as (layer, neuron) or (layer, neuron, expert) rows, and by what."""
        shift_ln = np.nan_to_num(self.shift[index])
        place_l, slot_l = shift_ln.nonzero()
        layer = np.array(self.layers)[place_l]
        if self.expert is None or self.neuron is None:
            return np.stack([layer, slot_l], 1), shift_ln[place_l, slot_l]
        own = (self.neuron[index, place_l, slot_l], self.expert[index, place_l, slot_l])
        return np.stack([layer, *own], 1), shift_ln[place_l, slot_l]

    def edits(self) -> list[Edit]:
        """A joint edit for each prompt whose shift is not zero, named by the prompt's number, for `intervene`."""
        moved = [(index, *self.neurons(index)) for index in range(len(self.shift))]
        return [Edit(neurons.tolist(), add=added.tolist(), name=str(n)) for n, neurons, added in moved if len(added)]


@told_by_parameters(
    model__source="model", dataset__source="prompts", dataset__chat_template="model.tokenizer.chat_template",
    model__dtype="load_model's dtype", model__engine="load_model's engine", neurons__layers="neurons",
    neurons__count="neurons", neurons__list="neurons",
)  # fmt: skip
def control(
    model: LanguageModel,
    prompts: Asked | Sequence[Asked],
    targets: str | Sequence[str] | Sequence[Sequence[str]],
    *,
    probability: float | Sequence[float] = 0.5,
    top: bool = False,
    margin: float | Sequence[float] | None = None,
    against: str | Sequence[str] | None = None,
    neurons: Neurons = "all",
    norm: str = "l2",
    tolerance: float = 0.01,
    max_passes: int = MAX_PASSES,
    basis: str = "paper",
    batch_bytes: int | None = None,
    holding: Sequence[Reference] | None = None,
) -> ControlResult:
    """Find, for each prompt, the least joint shift of neurons with which its target is as probable as is asked for.

    Args:
        model: from `load_model`.
        prompts: P texts, or one; or lists of messages, `{"role": ..., "content": ...}`, for the model's chat template.
        targets: for each prompt the text that follows it verbatim and is to be steered, one token there; of a list of
            texts the first.
        probability: what is wanted, above 0 and below 1; one for all prompts, or one each.
        top: bring the target just above all other tokens, in the place of a probability.
        margin: bring it so many nats above another token, in the place of a probability.
        against: which one, as a text that follows the prompt; the most probable other token where not given.
        neurons: `all`; a number, the strongest so many of each prompt; layer numbers; or (layer, neuron) pairs,
            (layer, neuron, expert) triples where a layer has experts.
        norm: what is least: `l2`, the sum of squares of what is added; or `scaled`, of what is added over the neuron's
            activation, so that silent neurons stay silent.
        tolerance: how far off what is achieved may be: probability, or nats of a margin.
        max_passes: interventions, and gradients beside the first, that may be spent on a prompt.
        basis: which tensor is "the neuron": `paper`, `hidden` or `gate`.
        batch_bytes: memory that a batch may take; if not given, what keeps the device busy and fits it.
        holding: references, pairs of a prompt and its right answer: of all shifts with the wanted effect the one is
            looked for that leaves their answers and runners-up alone. They take 40 bytes a reference and neuron.

    Raises:
        PromptError: an unusable prompt, target or reference, or a reference that is steered, too. ConfigurationError:
            what cannot be asked for, or a tolerance that the model's precision cannot tell. ModelError: the model fails
            its self-check. NonFiniteError: NaN or infinity in a prompt's logits, without or with a shift.
    """
    asked, steered_targets = asked_prompts(prompts, targets)
    wanted = _wanted(len(asked), probability, top, margin, against, tolerance)
    texts = _texts(steered_targets, wanted)
    rows_of_prompts = prompts_of(model, asked, texts)
    check_prompts(rows_of_prompts)
    layers, movable = checked_movable(model, neurons, norm)
    check_passes(max_passes)
    encoded = encoded_prompts(model, rows_of_prompts, "error")
    aims = [Aim.of(own, *own_ids(prompt)) for own, prompt in zip(wanted, encoded, strict=True)]
    references = _to_hold(model, holding, encoded)
    rows = ShiftedRows(model, basis, layers, budget_of(model, batch_bytes))
    held = HeldReferences.of(rows, references) if references else None
    found = [own for _, own in steered(rows, model, encoded, aims, movable, max_passes, held)]
    return replace(
        result_of(model, found, layers, basis, rows.dtype), held=tuple(own.prompt.text for own in references)
    )


def _to_hold(
    model: LanguageModel, holding: Sequence[Reference] | None, steered_prompts: Sequence[EncodedPrompt]
) -> list[EncodedPrompt]:
    if holding is None:
        return []
    references = encoded_references(model, holding, "measure.holding")
    steered_texts = {own.prompt.text: f"prompt {index}, which is steered" for index, own in enumerate(steered_prompts)}
    check_apart(references, steered_texts, "measure.holding", "what is held still cannot move")
    return references


def own_ids(prompt: EncodedPrompt) -> tuple[int, int | None]:
    """The tokens of the target and of what it is compared with, if anything."""
    return prompt.target_ids[0], prompt.target_ids[1] if len(prompt.target_ids) > 1 else None


def result_of(
    model: LanguageModel, found: Sequence[Steered], layers: Sequence[int], basis: str, dtype: type[np.floating]
) -> ControlResult:
    """Arrays of what was found for each prompt."""
    slots = slots_by_layer(model, len(found), layers)
    empty = np.nan if model.feed_forward.has_experts or len(set(model.feed_forward.neurons_by_layer)) > 1 else 0
    shift = np.full((len(found), len(layers), slots.n), empty, dtype)
    for index, own in enumerate(found):
        shift[index, *slots.places(index, own.shift.slots)] = own.shift.shift_m

    def column(name: str, kind: type = np.float64) -> NDArray[Any]:
        return np.array([getattr(own, name) for own in found], kind)

    return ControlResult(
        shift=shift,
        kind=tuple(own.aim.kind for own in found),
        wanted=np.array([own.aim.wanted for own in found]),
        probability_before=column("probability_before"),
        probability=column("probability"),
        value_before=column("value_before"),
        predicted=Predicted(column("predicted_by_neg"), column("predicted_by_log_odds")),
        first_shot=column("first_shot"),
        achieved=column("achieved"),
        reached=column("reached", np.bool_),
        reason=tuple(own.reason for own in found),
        passes=column("passes", np.int64),
        norm=column("norm"),
        relative_norm=column("relative_norm"),
        largest=column("largest"),
        layers=tuple(layers),
        basis=basis,
        expert=slots.expert,
        neuron=slots.neuron,
    )


def checked_movable(model: LanguageModel, neurons: Any, norm: str) -> tuple[list[int], Movable]:
    """The layers that are run with hooks, and which of their neurons may move.

    Raises:
        ConfigurationError: neurons that do not exist, more than there are, or an unknown norm.
    """
    if norm not in NORMS:
        raise ConfigurationError(setting="measure.norm", value=norm, allowed=f"one of {', '.join(NORMS)}")
    sizes = model.feed_forward.layer_neurons
    everywhere = layers_with_neurons(NeuronsConfig("all"), sizes)
    if isinstance(neurons, str):
        if neurons != "all":
            raise ConfigurationError(setting="neurons", value=repr(neurons), allowed="all, a number, layers or a list")
        return everywhere, Movable(norm=norm)
    if isinstance(neurons, int | np.integer) and not isinstance(neurons, bool):
        most = sum(own.n_slots for own in sizes)
        if not 1 <= neurons <= most:
            raise ConfigurationError(
                f"the choice must be from 1 to {most}, the neurons that act on a prompt", setting="neurons",
                value=int(neurons),
            )  # fmt: skip
        return everywhere, Movable(int(neurons), norm=norm)
    if not isinstance(neurons, NeuronSet) and _are_layers(neurons):
        return layers_with_neurons(NeuronsConfig([int(layer) for layer in neurons]), sizes), Movable(norm=norm)
    chosen, _ = NeuronSet.distinct(checked_neurons(neurons, sizes))
    return everywhere, Movable(chosen=chosen, norm=norm)


def check_passes(max_passes: int) -> None:
    """Refuse what is no number of passes.

    Raises:
        ConfigurationError: naming what it may be.
    """
    if not isinstance(max_passes, int) or isinstance(max_passes, bool) or max_passes < 1:
        raise ConfigurationError(setting="measure.max_passes", value=max_passes, allowed="at least 1")


def _are_layers(neurons: Any) -> bool:
    if isinstance(neurons, np.ndarray):
        return neurons.ndim == 1
    return len(neurons) > 0 and all(isinstance(one, int | np.integer) and not isinstance(one, bool) for one in neurons)


def asked_prompts(prompts: Any, targets: Any) -> tuple[list[Asked], list[str]]:
    """Prompts, and the target of each that is steered."""
    is_one_chat = is_conversation(prompts) and len(prompts) > 0 and all(isinstance(own, Mapping) for own in prompts)
    asked = [prompts] if isinstance(prompts, str) or is_one_chat else list(prompts)
    given = [targets] * len(asked) if isinstance(targets, str) else list(targets)
    if len(asked) != len(given):
        raise ConfigurationError(f"{len(asked)} prompts, but targets for {len(given)}; one for each prompt is needed")
    first = [own if isinstance(own, str) else next(iter(own), None) for own in given]
    if not all(isinstance(own, str) for own in first):
        raise PromptError('targets must be a text for each prompt, or a list of texts of which the first is steered: '
                          '[" Paris"]')  # fmt: skip
    return asked, [str(own) for own in first]


def _wanted(n: int, probability: Any, top: Any, margin: Any, against: Any, tolerance: Any) -> list[Wanted]:
    if (top or margin is not None) and not (np.isscalar(probability) and probability == 0.5):
        raise ConfigurationError(
            "one wish at a time can be met", setting="measure.probability", value=probability,
            allowed="left out where top or a margin is asked for",
        )  # fmt: skip
    columns = (each(probability, n, "measure.probability"), each(margin, n, "measure.margin"),
               each(against, n, "measure.against"))  # fmt: skip
    return [
        Wanted.checked(one, top, own_margin, other, tolerance)  # type: ignore[arg-type]
        for one, own_margin, other in zip(*columns, strict=True)
    ]


def _texts(targets: Sequence[str], wanted: Sequence[Wanted]) -> list[list[str]]:
    """For each prompt its target, and what that is compared with, if anything."""
    texts = [[one] if own.against is None else [one, own.against] for one, own in zip(targets, wanted, strict=True)]
    for index, own in enumerate(texts):
        if len(own) > 1 and own[0] == own[1]:
            raise PromptError(f"prompt {index}: its target {own[0]!r} would be compared with itself: choose another "
                              "against", change="against")  # fmt: skip
    return texts

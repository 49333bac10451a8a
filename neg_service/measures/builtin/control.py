"""The measure `control`: targets brought to a wanted probability, and the shifts that do it.

What is looked for, and how: `measures/control/`. What is wanted says the configuration, or each row of the data set for
itself (`wanted`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from neg_service import schema
from neg_service.config import NeuronsConfig
from neg_service.errors import PromptError
from neg_service.measures import targets
from neg_service.measures.base import Cost, Measure, ShardInput, Sizes, has_experts, layers_of_model, prompt_bytes
from neg_service.measures.choice import check_choice, count_of
from neg_service.measures.control.options import NORMS, Wanted, wishes_of
from neg_service.measures.control.tables import CONTROL, CONTROL_SHIFT, control_row, shift_rows
from neg_service.measures.tables import prompt_tables
from neg_service.measures.targets import check_keep, kept_targets, wanted_targets
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.schema import Table
from neg_service.settings import basis_setting, setting

if TYPE_CHECKING:
    from neg_service.measures.control.steering import Movable
    from neg_service.models.inspection import ModelInfo

# About how many passes a wish takes.
_PASSES = 5
KEEP_SHIFT = ("strongest", "all")


@dataclass
class ControlOptions:
    """See `conf/measure/control.yaml`."""

    name: str = "control"
    basis: str = basis_setting()
    keep: str = setting(
        "answer", "which targets are steered: the right answer, or all, one at a time", allowed=targets.KEEP
    )
    probability: Any = setting(
        0.5, "what is wanted, above 0 and below 1; of a list each in turn. A row's `wanted` counts before it"
    )
    top: bool = setting(False, "in its place: just above all other tokens")
    margin: float | None = setting(None, "in its place: so many nats above another token")
    against: Any = setting(None, "of a margin: the other token, a text that follows the prompt; not given: all others")
    tolerance: float = setting(0.01, "how far off what is achieved may be: probability, or nats of a margin")
    norm: str = setting("l2", "what is least: the squares of shifts, or of shifts over activations", allowed=NORMS)
    max_passes: int = setting(15, "interventions and gradients that a wish may take", least=1)
    keep_shift: str = setting(
        "strongest", "which neurons' shifts are stored: the `top_k` largest, or all", allowed=KEEP_SHIFT
    )
    top_k: int = setting(100, "how many, for keep_shift: strongest", least=1)


class Control(Measure[ControlOptions]):
    """The least joint shift that brings a target to what is wanted."""

    Options = ControlOptions
    NAMES = ("control",)
    MEASURES_SINGLE_NEURONS = True

    def validate(self, info: ModelInfo, neurons: NeuronsConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse wishes that cannot be met by anything, and choices of neurons that there are not, too."""
        super().validate(info, neurons, prompts)
        check_choice(neurons, layers_of_model(info))
        check_keep(self.options.keep, targets.KEEP, prompts)
        wishes = self._wishes
        for prompt in prompts:
            for own in wishes_of(prompt, wishes):
                steered = [prompt.targets[k] for k in wanted_targets(prompt, self.options.keep)]
                if own.against is not None and own.against in steered:
                    raise PromptError(
                        f"prompt {prompt.id!r}: its target {own.against!r} would be compared with itself "
                        "(measure.against)", change="measure.against",
                    )  # fmt: skip

    def fingerprint_inputs(self) -> dict[str, Any]:
        """`top_k` decides nothing where all shifts are kept."""
        given = self.configuration()
        if self.options.keep_shift == "all":
            del given["top_k"]
        return given

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts`, `control` and `control_shift`."""
        note = "What is added to the neuron's activation, so that the target is as probable as was wanted."
        return {
            **schema.prompt_tables(has_experts(sizes)),
            "control": Table(CONTROL, "probability", schema.PROBABILITY),
            "control_shift": Table(CONTROL_SHIFT, "shift", "units of activation", "shift", note),
        }

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """Some passes for each wish."""
        n = kept_targets(self.options.keep, n_targets) * len(self._wishes)
        moved = count_of(neurons, layers_of_model(info))
        kept = moved if self.options.keep_shift == "all" else min(moved, self.options.top_k)
        own = {"control": int(160 * n), "control_shift": int(22 * kept * n)}
        return Cost({**prompt_bytes(info), **own}, _PASSES * n, "interventions")

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """Rows by target, then wish."""
        from neg_service.measures.control.aims import Aim
        from neg_service.measures.control.shifted_rows import ShiftedRows
        from neg_service.measures.control.steering import steered

        model, options = shard.model, self.options
        wished = [
            (index, target, wish, own)
            for index, prompt in enumerate(shard.prompts)
            for target in wanted_targets(prompt.prompt, options.keep)
            for wish, own in enumerate(wishes_of(prompt.prompt, self._wishes))
        ]
        prompts = [shard.prompts[index] for index, *_ in wished]
        aims = [
            Aim.of(own, prompt.target_ids[target], _token_against(model, prompt, own))
            for prompt, (_, target, _, own) in zip(prompts, wished, strict=True)
        ]
        rows = ShiftedRows(model, options.basis, shard.layers, shard.budget)
        dtype = str(model.dtype).removeprefix("torch.")
        most = None if options.keep_shift == "all" else options.top_k
        of_prompt: dict[int, list[tuple[pa.Table, pa.Table]]] = {index: [] for index in range(len(shard.prompts))}
        left = [len([1 for own, *_ in wished if own == index]) for index in range(len(shard.prompts))]
        for place, found in steered(rows, model, prompts, aims, self._movable(shard.neurons), options.max_passes):
            index, target, wish, own = wished[place]
            prompt = shard.prompts[index]
            of_prompt[index].append(
                (
                    control_row(prompt, target, wish, own.against, found, options.basis, dtype, options.norm),
                    shift_rows(prompt, target, wish, found, options.basis, most),
                )
            )
            if len(of_prompt[index]) == left[index]:
                probability_k = found.logits_before_v.softmax(0)[list(prompt.target_ids)].float().numpy()
                own_tables = prompt_tables(prompt, probability_k, found.routing, model.feed_forward.has_experts)
                control, shifts = (pa.concat_tables(parts) for parts in zip(*of_prompt.pop(index), strict=True))
                yield index, {**own_tables, "control": control, "control_shift": shifts}

    @property
    def _wishes(self) -> list[Wanted]:
        options = self.options
        probabilities = options.probability if isinstance(options.probability, list) else [options.probability]
        if options.top or options.margin is not None:
            probabilities = [0.5]
        return [
            Wanted.checked(one, options.top, options.margin, options.against, options.tolerance, group="measure")
            for one in probabilities
        ]

    def _movable(self, neurons: NeuronsConfig) -> Movable:
        from neg_service.measures.choice import set_of
        from neg_service.measures.control.steering import Movable

        if neurons.choose in ("list", "sample"):
            return Movable(chosen=set_of(neurons), norm=self.options.norm)
        return Movable(neurons.count if neurons.choose == "top" else None, norm=self.options.norm)


def _token_against(model: Any, prompt: EncodedPrompt, wanted: Wanted) -> int | None:
    """The token that a margin is measured from: one of the prompt's targets, or another text behind it."""
    from neg_service.measures.batching import encoded_prompts

    if wanted.against is None:
        return None
    if wanted.against in prompt.prompt.targets:
        return prompt.target_ids[prompt.prompt.targets.index(wanted.against)]
    (found,) = encoded_prompts(model, [replace(prompt.prompt, targets=(wanted.against,), answer=None)], "error")
    return found.target_ids[0]

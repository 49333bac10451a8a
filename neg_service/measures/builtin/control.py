"""The measure `control`: targets brought to a wanted probability, and the shifts that do it.

What is looked for, and how: `measures/control/`. What is wanted says the configuration, or each row of the data set for
itself (`wanted`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from neg_service import schema
from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError, PromptError, shortened
from neg_service.measures import targets
from neg_service.measures.base import Cost, Measure, ShardInput, Sizes, has_experts, layers_of_model, prompt_bytes
from neg_service.measures.choice import check_choice, count_of
from neg_service.measures.control.options import NORMS, Wanted, wishes_of
from neg_service.measures.control.tables import (
    CONTROL,
    CONTROL_SHIFT,
    CONTROL_SIDE_EFFECTS,
    control_row,
    shift_rows,
    side_effect_rows,
)
from neg_service.measures.tables import prompt_tables
from neg_service.measures.targets import check_keep, kept_targets, wanted_targets
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.schema import Table
from neg_service.settings import basis_setting, setting

if TYPE_CHECKING:
    from neg_service.measures.control.references import HeldReferences
    from neg_service.measures.control.shifted_rows import ShiftedRows
    from neg_service.measures.control.steering import Movable, Steered
    from neg_service.models.inspection import ModelInfo
    from neg_service.models.language_model import LanguageModel

# About how many passes a wish takes.
_PASSES = 5
# About how many wordings a row has.
_WORDINGS = 3
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
    against: str | None = setting(
        None, "of a margin: the other token, a text that follows the prompt; not given: all others"
    )
    tolerance: float = setting(0.01, "how far off what is achieved may be: probability, or nats of a margin")
    norm: str = setting("l2", "what is least: the squares of shifts, or of shifts over activations", allowed=NORMS)
    max_passes: int = setting(15, "interventions and gradients that a wish may take", least=1)
    keep_shift: str = setting(
        "strongest", "which neurons' shifts are stored: the `top_k` largest, or all", allowed=KEEP_SHIFT
    )
    top_k: int = setting(100, "how many, for keep_shift: strongest", least=1)
    write: int = setting(
        0, "tokens of text that are written behind each prompt, without and with its shift, to be looked at", least=0
    )
    references: Any = setting(
        None,
        "a data set of prompts with answers, on which each shift's side effects are measured: a file, or a list of "
        "[prompt, answer]",
        kind=str | list[Any] | None,
    )
    holding: Any = setting(
        None,
        "references: every other one of these is held still by the shift, and side effects are measured on the rest; "
        "or a data set of its own",
        kind=str | list[Any] | None,
    )
    wordings: bool | None = setting(
        None, "whether side effects are measured at rows' `wordings`; not given: where any row has some"
    )


class Control(Measure[ControlOptions]):
    """The least joint shift that brings a target to what is wanted."""

    Options = ControlOptions
    NAMES = ("control",)
    MEASURES_SINGLE_NEURONS = True
    USES_WORDINGS = True

    def with_files_read(self) -> Self:
        """References themselves in the place of their files, half of them held where that is asked for."""
        options = self.options
        references = pairs_of("measure.references", options.references)
        if options.holding == "references":
            if references is None:
                raise ConfigurationError(
                    "needs measure.references, of which every other one is then held", setting="measure.holding",
                    value="references",
                )  # fmt: skip
            return type(self)(replace(options, references=references[1::2], holding=references[::2]))
        return type(self)(replace(options, references=references, holding=pairs_of("measure.holding", options.holding)))

    def of_prompts(self, prompts: Iterable[Prompt]) -> Self:
        """Whether there are wordings, which decides the tables.

        Raises:
            ConfigurationError: they are asked for, and no row has any.
        """
        wanted = self.options.wordings
        has_some = wanted is not False and any(prompt.wordings for prompt in prompts)
        if wanted and not has_some:
            raise ConfigurationError(
                "no row of the data set has any", setting="measure.wordings", value="true", allowed="left out, or false"
            )
        return type(self)(replace(self.options, wordings=has_some))

    def validate(self, info: ModelInfo, neurons: NeuronsConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse wishes that cannot be met by anything, and choices of neurons that there are not, too."""
        super().validate(info, neurons, prompts)
        check_choice(neurons, layers_of_model(info))
        check_keep(self.options.keep, targets.KEEP, prompts)
        if self.options.write and info.is_masked:
            raise ConfigurationError(
                f"{info.name} is a masked model, which writes no text", setting="measure.write",
                value=self.options.write, allowed="0",
            )  # fmt: skip
        wishes, others = self._wishes, self._others()
        for prompt in prompts:
            if prompt.text in others:
                raise PromptError(
                    f"prompt {prompt.id!r} is steered, and in {others[prompt.text]}, too: leave it out of one of them",
                    change=others[prompt.text],
                )
            for number, (text, _) in enumerate(prompt.wordings or ()):
                if text in others:
                    raise PromptError(
                        f"prompt {prompt.id!r}: its wording {number} is in {others[text]}, too: leave it out of one of "
                        "them", change=others[text],
                    )  # fmt: skip
            for own in wishes_of(prompt, wishes):
                steered = [prompt.targets[k] for k in wanted_targets(prompt, self.options.keep)]
                if own.against is not None and own.against in steered:
                    raise PromptError(
                        f"prompt {prompt.id!r}: its target {own.against!r} would be compared with itself "
                        "(measure.against)", change="measure.against",
                    )  # fmt: skip

    def _others(self) -> dict[str, str]:
        """Texts that are not to be steered, and the setting that names them.

        Raises:
            PromptError: one that is held and measured, or fewer than two that are measured.
        """
        held = {prompt: "measure.holding" for prompt, _ in self.options.holding or ()}
        measured = {prompt: "measure.references" for prompt, _ in self.options.references or ()}
        if both := next((prompt for prompt in measured if prompt in held), None):
            raise PromptError(
                f"{shortened(both)} is held (measure.holding) and measured: leave it out of one of them",
                change="measure.references",
            )
        if self.options.references is not None and len(measured) < 2:
            raise PromptError(
                "an interval needs several; with measure.holding=references half of them are held",
                setting="measure.references", value=f"{len(measured)} to measure", allowed="at least 2",
            )  # fmt: skip
        return held | measured

    def fingerprint_inputs(self) -> dict[str, Any]:
        """`top_k` decides nothing where all shifts are kept."""
        given = self.configuration()
        if self.options.keep_shift == "all":
            del given["top_k"]
        without = ("references", "holding", "write", "wordings")
        return {name: value for name, value in given.items() if name not in without or value}

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts`, `control`, `control_side_effects` of references and wordings, and `control_shift`."""
        note = "What is added to the neuron's activation, so that the target is as probable as was wanted."
        effects = {"control_side_effects": Table(CONTROL_SIDE_EFFECTS, "side effects")}
        return {
            **schema.prompt_tables(has_experts(sizes), bool(self.options.wordings)),
            "control": Table(CONTROL, "probability", schema.PROBABILITY),
            **(effects if self.options.references or self.options.wordings else {}),
            "control_shift": Table(CONTROL_SHIFT, "shift", "units of activation", "shift", note),
        }

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """Some passes for each wish."""
        n = kept_targets(self.options.keep, n_targets) * len(self._wishes)
        moved = count_of(neurons, layers_of_model(info))
        kept = moved if self.options.keep_shift == "all" else min(moved, self.options.top_k)
        n_kinds = bool(self.options.references) + bool(self.options.wordings)
        n_others = len(self.options.references or ()) + _WORDINGS * bool(self.options.wordings)
        effects = {"control_side_effects": int(3 * 250 * n_kinds * n)} if n_kinds else {}
        own = {"control": int(160 * n), **effects, "control_shift": int(22 * kept * n)}
        # The shift and random neurons, on each reference and wording.
        # Of each wish activations and shift, and logits without it and with it, in float64.
        held = int(16 * (moved + (info.n_output_ids or 0)) * n)
        return Cost({**prompt_bytes(info), **own}, (_PASSES + 2 * n_others) * n, "interventions", held=held)

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """Rows by target, then wish."""
        from neg_service.measures.control.aims import Aim
        from neg_service.measures.control.shifted_rows import ShiftedRows
        from neg_service.measures.control.steering import steered

        model, options = shard.model, self.options
        asked = [
            _Asked(index, target, wish, own)
            for index, prompt in enumerate(shard.prompts)
            for target in wanted_targets(prompt.prompt, options.keep)
            for wish, own in enumerate(wishes_of(prompt.prompt, self._wishes))
        ]
        prompts = [shard.prompts[own.index] for own in asked]
        aims = [
            Aim.of(own.wanted, prompt.target_ids[own.target], _token_against(model, prompt, own.wanted))
            for prompt, own in zip(prompts, asked, strict=True)
        ]
        rows = ShiftedRows(model, options.basis, shard.layers, shard.budget)
        held = _held(model, rows, options.holding)
        movable = self._movable(shard.neurons)
        found = [own for _, own in steered(rows, model, prompts, aims, movable, options.max_passes, held)]
        effects, texts = self._effects(shard, rows, asked, found), self._texts(shard, rows, asked, found)
        for index, prompt in enumerate(shard.prompts):
            places = [place for place, own in enumerate(asked) if own.index == index]
            first = found[places[0]]
            probability_k = first.logits_before_v.softmax(0)[list(prompt.target_ids)].float().numpy()
            of_prompt = prompt_tables(prompt, probability_k, first.routing, model.feed_forward.has_experts)
            if options.wordings:
                texts_of_wordings = pa.array([[text for text, _ in prompt.prompt.wordings or ()]], schema.WORDINGS.type)
                of_prompt["prompts"] = of_prompt["prompts"].append_column(schema.WORDINGS, texts_of_wordings)
            own_tables = [self._tables_of(prompt, asked[place], found[place], texts[place], model) for place in places]
            joined = {name: pa.concat_tables([own[name] for own in own_tables]) for name in own_tables[0]}
            if effects is not None:
                joined["control_side_effects"] = pa.concat_tables([effects[place] for place in places])
            yield index, {**of_prompt, **joined}

    def _tables_of(
        self,
        prompt: EncodedPrompt,
        own: _Asked,
        found: Steered,
        texts: tuple[str, str, str] | None,
        model: LanguageModel,
    ) -> dict[str, pa.Table]:
        options, dtype = self.options, str(model.dtype).removeprefix("torch.")
        most = None if options.keep_shift == "all" else options.top_k
        against, norm = own.wanted.against, options.norm
        return {
            "control": control_row(prompt, own.target, own.wish, against, found, options.basis, dtype, norm, texts),
            "control_shift": shift_rows(prompt, own.target, own.wish, found, options.basis, most),
        }

    def _texts(
        self, shard: ShardInput, rows: ShiftedRows, asked: Sequence[_Asked], found: Sequence[Steered]
    ) -> Sequence[tuple[str, str, str] | None]:
        """What is written behind each prompt without its shift, with it once, and with it everywhere."""
        from neg_service.measures.control.control import result_of
        from neg_service.measures.control.generation import require_generator, written

        n = self.options.write
        if not n:
            return [None] * len(asked)
        require_generator(shard.model)
        result = result_of(shard.model, found, shard.layers, self.options.basis, rows.dtype)
        texts = []
        for place, own in enumerate(asked):
            ids = shard.prompts[own.index].ids
            once, everywhere = (written(shard.model, ids, result, place, n, at) for at in ("readout", "all"))
            texts.append((once.before, once.after, everywhere.after))
        return texts

    def _effects(
        self, shard: ShardInput, rows: ShiftedRows, asked: Sequence[_Asked], found: Sequence[Steered]
    ) -> list[pa.Table] | None:
        """Rows of side effects of each shift; None without references and wordings."""
        from neg_service.measures.control.control import result_of
        from neg_service.measures.control.references import encoded_references
        from neg_service.measures.control.side_effects import effects_on_others

        references, has_wordings = self.options.references, self.options.wordings
        if not references and not has_wordings:
            return None
        others = encoded_references(shard.model, references, "measure.references", least=2) if references else []
        worded = [shard.prompts[own.index].worded(own.target) for own in asked] if has_wordings else []
        result = result_of(shard.model, found, shard.layers, self.options.basis, rows.dtype)
        alone = [_with_target_alone(shard.prompts[own.index], own.target) for own in asked]
        table = effects_on_others(shard.model, rows, result, alone, others, worded).table()
        # A shift has rows of the kinds that its prompt has.
        of_shift = [table.filter(pc.equal(table["prompt_id"], str(place))) for place in range(len(asked))]
        return [
            side_effect_rows(shard.prompts[own.index], own.target, own.wish, found)
            for own, found in zip(asked, of_shift, strict=True)
        ]

    @property
    def _wishes(self) -> list[Wanted]:
        options = self.options
        probabilities = options.probability if isinstance(options.probability, list) else [options.probability]
        if not probabilities:
            raise ConfigurationError(setting="measure.probability", value="[]", allowed="a number, or at least one")
        if options.top or options.margin is not None:
            probabilities = [0.5]
        return [
            Wanted.checked(one, options.top, options.margin, options.against, options.tolerance)
            for one in probabilities
        ]

    def _movable(self, neurons: NeuronsConfig) -> Movable:
        from neg_service.measures.choice import set_of
        from neg_service.measures.control.steering import Movable

        if neurons.choose in ("list", "sample"):
            return Movable(chosen=set_of(neurons), norm=self.options.norm)
        return Movable(neurons.count if neurons.choose == "top" else None, norm=self.options.norm)


@dataclass(frozen=True)
class _Asked:
    """A wish: for a prompt of the shard, and a target of it, the how-manieth, and what."""

    index: int
    target: int
    wish: int
    wanted: Wanted


def pairs_of(key: str, source: Any) -> list[list[str]] | None:
    """Prompts with their answers, of a data set or as they are.

    Raises:
        PromptError: a data set that cannot be read, a prompt without an answer, or what is no such list.
    """
    if source is None:
        return None
    if isinstance(source, str):
        from neg_service.prompts.sources import load_prompts

        try:
            prompts = load_prompts(source)
        except PromptError as error:
            raise error.renamed({"dataset.source": key}) from error
        without = next((prompt.id for prompt in prompts if prompt.answer is None or prompt.messages), None)
        if without is not None:
            raise PromptError(f"prompt {without!r} is a chat, or has no answer", setting=key, value=source)
        return [[prompt.text, prompt.targets[prompt.answer or 0]] for prompt in prompts]
    is_pairs = isinstance(source, list) and all(
        isinstance(own, list | tuple) and len(own) == 2 and all(isinstance(text, str) for text in own) for own in source
    )
    if not is_pairs:
        raise PromptError(setting=key, value=shortened(source), allowed="a data set, or a list of [prompt, answer]")
    return [list(own) for own in source]


def _held(model: LanguageModel, rows: ShiftedRows, holding: Sequence[Sequence[str]] | None) -> HeldReferences | None:
    from neg_service.measures.control.references import HeldReferences, encoded_references

    if not holding:
        return None
    pairs = [(prompt, answer) for prompt, answer in holding]
    return HeldReferences.of(rows, encoded_references(model, pairs, "measure.holding"))


def _with_target_alone(prompt: EncodedPrompt, target: int) -> EncodedPrompt:
    own = replace(prompt.prompt, targets=(prompt.prompt.targets[target],), answer=None)
    return replace(prompt, prompt=own, target_ids=(prompt.target_ids[target],))


def _token_against(model: Any, prompt: EncodedPrompt, wanted: Wanted) -> int | None:
    """The token that a margin is measured from: one of the prompt's targets, or another text behind it."""
    from neg_service.measures.batching import encoded_prompts

    if wanted.against is None:
        return None
    if wanted.against in prompt.prompt.targets:
        return prompt.target_ids[prompt.prompt.targets.index(wanted.against)]
    (found,) = encoded_prompts(
        model, [replace(prompt.prompt, targets=(wanted.against,), answer=None, wordings=None)], "error"
    )
    return found.target_ids[0]

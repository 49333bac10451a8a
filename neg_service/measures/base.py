"""What a measure is: a class that says what it takes, what it gives and what that costs, and that measures shards.

A measure of your own is a subclass of `Measure` in a module of your own, named by its path (`measure.name=my.module`,
or `my.module:Class` where a module has several). The least that it has: `Options`, a dataclass of what may be set;
`tables`, each with its schema, its title, its unit and the column that holds values of neurons; `cost`; and either
`rows`, the tables of one prompt after the other, or `measure`, those of a whole shard. Reader, console and report know
a table by what `tables` says of it, never by the measure's name.

Nothing here and nothing that a measure's class needs before it measures imports torch: commands start fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

import pyarrow as pa

from neg_service.config import NeuronsConfig, checked_layers, typed
from neg_service.errors import ConfigurationError, PromptError
from neg_service.layer_neurons import LayerNeurons, layers_of_sizes
from neg_service.measures.choice import check_whole_layers, described, layers_with_neurons
from neg_service.schema import Table, with_messages
from neg_service.settings import check_fields

if TYPE_CHECKING:
    from neg_service.models.batches import Budget
    from neg_service.models.inspection import ModelInfo
    from neg_service.models.language_model import LanguageModel
    from neg_service.prompts.prompt import EncodedPrompt, Prompt


class Sizes(Protocol):
    """How many layers a model has, and how many neurons each: what schemas may depend on."""

    @property
    def n_layers(self) -> int:
        """Of the model."""
        ...

    @property
    def n_neurons(self) -> int:
        """How many act on a token in a layer, the most of all layers."""
        ...

    @property
    def neurons_by_layer(self) -> tuple[int, ...]:
        """How many neurons each layer has, of all its experts."""
        ...

    @property
    def layer_neurons(self) -> tuple[LayerNeurons, ...]:
        """What neurons each layer has: of its MLP, and of each of its experts."""
        ...

    @property
    def has_experts(self) -> bool:
        """Whether any layer has experts."""
        ...


OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True)
class Cost:
    """What a prompt is expected to cost.

    bytes: of each table, before compression. rows: how many rows run through layers: targets, or interventions.
    rows_are: what a person calls them. passes: how often a row runs through all layers and the head: there and back are
    two, half of the layers a half. held: bytes of memory that are kept of a prompt until its whole shard is measured.
    """

    bytes: dict[str, int]
    rows: float
    rows_are: str = "gradients"
    passes: float = field(default=2.0, kw_only=True)
    held: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class ShardInput:
    """What a shard is measured from.

    neurons: which ones, with those of a list or a sample as a `NeuronSet` in `neurons.list`: they were resolved when
    the run was planned. budget: the memory of a batch. calibration: what the run found out before its first shard.
    """

    model: LanguageModel
    prompts: Sequence[EncodedPrompt]
    neurons: NeuronsConfig = field(default_factory=NeuronsConfig)
    budget: Budget = field(kw_only=True)
    calibration: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    @property
    def layers(self) -> list[int]:
        """The chosen layers."""
        return checked_layers(self.neurons, self.model.feed_forward.n_layers)


class Measure(ABC, Generic[OptionsT]):
    """How neurons are measured, with the options that were given."""

    # A dataclass of what `conf/measure/<name>.yaml` may say; its `name` is what `measure.name` was.
    Options: ClassVar[type[Any]]
    # What `measure.name` may be, of the measures of this package; others are named by their path.
    NAMES: ClassVar[tuple[str, ...]] = ()
    # Whether `neurons.choose` may be something else than `all`.
    MEASURES_SINGLE_NEURONS: ClassVar[bool] = False
    # Whether targets may be several tokens: whoever takes `EncodedPrompt.target_ids` for all of a target does not.
    TAKES_SEQUENCES: ClassVar[bool] = False
    # Whether rows may say at which token neurons are (`at`): not of whoever takes them for those at the last one.
    TAKES_PLACES: ClassVar[bool] = False
    # Whether a list may have other neurons for each task.
    TAKES_NEURONS_BY_TASK: ClassVar[bool] = False
    # Whether rows' `wordings` are read.
    USES_WORDINGS: ClassVar[bool] = False
    # Memory that a batch may take, where a replica says it; for what has no shard, such as calibrating.
    budget: Budget | None = None

    def __init__(self, options: OptionsT) -> None:
        """With options as they are; `of` checks their names and types."""
        self.options = options

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """With options from a configuration.

        Raises:
            ConfigurationError: an unknown option, or a value of another type.
        """
        return cls(typed(cls.Options, given, "measure"))

    @property
    def name(self) -> str:
        """What `measure.name` was."""
        return str(getattr(self.options, "name", type(self).__name__))

    # --- what a measure says

    @abstractmethod
    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """The tables that each shard gives, in the order in which their parts are put; the last is the commit.

        Where several hold values of neurons, the last of them is what the run is about.
        """

    def least_batch_bytes(self, info: ModelInfo) -> int:
        """With how little memory for a batch this is refused before anything starts; without a limit 0."""
        return 0

    @abstractmethod
    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """The expected cost of a prompt with `n_targets` targets."""

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """The tables of each prompt, by its index in the shard, in whatever order is cheapest."""
        raise NotImplementedError(f"{type(self).__name__} has neither rows nor measure")

    # --- what most leave as it is

    def with_files_read(self) -> Self:
        """The same with the content of files that options name in the place of the names: replicas see no files."""
        return self

    def validate(self, info: ModelInfo, neurons: NeuronsConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse, before anything starts, what this measure cannot do.

        Raises:
            ConfigurationError: naming the key, its value, and what it may be.
        """
        check_fields("measure", self.options)
        # Models import torch; who validates has inspected one.
        from neg_service.models.feed_forward import check_basis

        basis = getattr(self.options, "basis", None)
        if basis is not None:
            check_basis(basis, info.is_gated, info.architecture, info.offers_gate)
        if not self.MEASURES_SINGLE_NEURONS:
            check_whole_layers(neurons, self.name)
        if not self.TAKES_NEURONS_BY_TASK and neurons.choose == "list" and getattr(neurons.list, "tasks", None):
            raise ConfigurationError(f"measure={self.name} takes the same for all tasks", setting="neurons.list")
        layers_with_neurons(neurons, layers_of_model(info))

    def check_targets(self, info: ModelInfo, not_one_token: str) -> None:
        """Refuse targets of several tokens, if they are asked for, where a model or this measure has no use for them.

        Raises:
            ConfigurationError: saying what is possible.
        """
        against = getattr(self.options, "against", None)
        if not_one_token == "skip" and isinstance(against, int):
            raise ConfigurationError(
                "counts targets, of which dataset.not_one_token=skip leaves out others for each prompt",
                setting="measure.against",
                value=against,
                allowed="others, or a target's text",
            )
        if not_one_token != "sequence":
            return
        if info.is_masked:
            raise ConfigurationError(
                f"{info.name} is a masked model, which predicts one token in the place of its mask",
                setting="dataset.not_one_token",
                value="sequence",
                allowed="error or skip",
            )
        if not self.TAKES_SEQUENCES:
            raise ConfigurationError(
                f"measure={self.name} takes targets of one token",
                setting="dataset.not_one_token",
                value="sequence",
                allowed="error or skip",
            )
        if getattr(self.options, "readout", None) == "logit":
            raise ConfigurationError(
                "targets of several tokens (dataset.not_one_token=sequence) have no logit",
                setting="measure.readout",
                value="logit",
                allowed="probability, log_probability or log_odds",
            )

    def check_places(self, prompts: Iterable[Prompt]) -> None:
        """Refuse prompts that say at which token neurons are (`at`), where this measure has no use for that.

        Raises:
            PromptError: naming the first one.
        """
        moves_each = getattr(self.options, "at", "readout") == "each"
        if self.TAKES_PLACES and not moves_each:
            return
        first = next((prompt for prompt in prompts if prompt.at is not None), None)
        if first is not None:
            why = (
                "measure.at=each moves neurons at several" if moves_each else f"measure={self.name} has no use for that"
            )
            raise PromptError(
                f"prompt {first.id!r} says at which token its neurons are (at), and {why}", change="dataset.source"
            )

    def of_prompts(self, prompts: Iterable[Prompt]) -> Self:
        """The same, with options complete that follow from what the rows of a data set say.

        Raises:
            PromptError: a row has `wordings`, and this measure has no use for them.
        """
        first = None if self.USES_WORDINGS else next((prompt for prompt in prompts if prompt.wordings), None)
        if first is not None:
            raise PromptError(
                f"prompt {first.id!r} has wordings, and measure={self.name} has no use for them: leave them out with "
                "dataset.columns={wordings: ''}",
                change="dataset.source",
            )
        return self

    def fingerprint_inputs(self) -> dict[str, Any]:
        """The options that decide the numbers; they go into the run's fingerprint."""
        return self.configuration()

    def describe_neurons(self, info: ModelInfo, neurons: NeuronsConfig) -> str:
        """Which neurons are measured, for a person."""
        return described(neurons, layers_of_model(info))

    def calibrate(
        self, model: LanguageModel, prompts: Sequence[EncodedPrompt], neurons: NeuronsConfig
    ) -> dict[str, Any]:
        """What one replica of a run finds out before its first shard, from a few prompts; JSON, kept in run.json."""
        return {}

    def measure(self, shard: ShardInput) -> dict[str, pa.Table]:
        """The tables of a shard: those of its prompts below each other, in the shard's order."""
        of_prompt = dict(self.rows(shard))
        ordered = [of_prompt[index] for index in range(len(shard.prompts))]
        return {name: pa.concat_tables([own[name] for own in ordered]) for name in ordered[0]}

    # --- what follows

    @property
    def has_to_calibrate(self) -> bool:
        """Whether a replica has to find something out first: otherwise none waits for another."""
        return type(self).calibrate is not Measure.calibrate

    def configuration(self) -> dict[str, Any]:
        """All options, as `of` takes them."""
        options: Any = self.options
        return asdict(options)

    def tables_of(self, shard: ShardInput) -> dict[str, pa.Table]:
        """The tables of a shard, which say of themselves what `tables` says.

        Raises:
            ConfigurationError: `measure` gave others than those.
        """
        found, declared = self.measure(shard), self.tables(shard.model.feed_forward)
        if set(found) != set(declared):
            raise ConfigurationError(
                f"gave the tables {', '.join(found)}, but says that it gives {', '.join(declared)}",
                setting="measure.name",
                value=self.name,
            )
        for name, table in declared.items():
            if not found[name].schema.equals(table.schema):
                raise ConfigurationError(
                    f"gave a table {name} of {_columns(found[name].schema)}, but says that it is of "
                    f"{_columns(table.schema)}",
                    setting="measure.name",
                    value=self.name,
                )
        # In the order of their parts.
        tables = {name: found[name].cast(table.described()) for name, table in declared.items()}
        if "prompts" in tables and shard.prompts[0].prompt.messages is not None:
            tables["prompts"] = _with_messages(tables["prompts"], shard.prompts)
        return tables

    def schemas(self, sizes: Sizes, has_messages: bool = False) -> dict[str, pa.Schema]:
        """The schemas of the tables, which carry what `tables` says of them; `has_messages`: of chats."""
        found = {name: table.described() for name, table in self.tables(sizes).items()}
        return with_messages(found) if has_messages else found


def _with_messages(table: pa.Table, prompts: Sequence[EncodedPrompt]) -> pa.Table:
    """Table `prompts` with what a chat template made each prompt of; no measure need know of it."""
    messages_of = {one.prompt.id: one.prompt.messages or () for one in prompts}
    own = with_messages({"prompts": table.schema})["prompts"].field("messages")
    found = [
        [{"role": role, "content": content} for role, content in messages_of[who]]
        for who in table["prompt_id"].to_pylist()
    ]
    return table.append_column(own, pa.array(found, own.type))


def layers_of_model(sizes: Sizes) -> tuple[LayerNeurons, ...]:
    """What neurons each layer has; who tells their numbers alone has no experts."""
    found = getattr(sizes, "layer_neurons", None)
    return tuple(layers_of_sizes(sizes.neurons_by_layer)) if found is None else tuple(found)


def has_experts(sizes: Sizes) -> bool:
    """Whether any layer has experts."""
    return any(own.n_experts for own in layers_of_model(sizes))


def n_slots(sizes: Sizes, layers: Sequence[int]) -> int:
    """How many neurons of these layers act on a prompt."""
    own = layers_of_model(sizes)
    return sum(own[layer].n_slots for layer in layers)


def prompt_bytes(sizes: Sizes, text: int = 256) -> dict[str, int]:
    """What a prompt's own tables take, of so many bytes of text."""
    # A number and a weight of each chosen expert, and a key in each layer.
    routing = sum(16 + 6 * own.n_chosen for own in layers_of_model(sizes) if own.n_experts)
    return {"prompts": text, **({"routing": routing} if has_experts(sizes) else {})}


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}{'' if field.nullable else ' not null'}" for field in schema)

"""What an engine is: how rows of prompts are run, and what that needs of a model, shares between prompts and costs.

A measure asks for rows and does not care how they are run. A *row* is one or several tokens that run behind a frozen
prefix: one of them has its neurons shifted, and logits are read behind one or more of them.

| question                            | a row                                       | shifted   | read     |
|-------------------------------------|---------------------------------------------|-----------|----------|
| of a causal model                   | the last token, or the whole prompt         | the last  | the last |
| of a masked model                   | the whole prompt                            | its mask  | its mask |
| targets of several tokens           | the last token, and what targets begin with | the first | all      |
| shifts at an earlier position       | the tokens from that position on            | the first | the last |

An engine refuses rows that it cannot run (`Engine.prepare`). What runs once for a prefix that prompts share is the
engine's own affair: keys and values today; states of recurrent layers are not shared.

Axes: R rows, V vocabulary, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from neg_service.errors import ModelError
from neg_service.models.batches import Group, group_by_prefix
from neg_service.models.dimensions import PassValues, pass_values
from neg_service.models.engines.difference_program import Differences
from neg_service.models.experts import own_experts, plain_experts
from neg_service.models.feed_forward import FeedForward, Point, Site

Ids = Sequence[int]
T = TypeVar("T")

LAST_TOKEN, MASK_TOKEN = "last token", "mask token"
# So many shared prefixes are kept for prompts to come.
_PREFIXES_KEPT = 4


@dataclass(frozen=True)
class Row:
    """Tokens of one row, a tree: `parents[i]` is the place in the row of the token before token i, -1 the prefix's end.

    shifted: place in the row of the token whose neurons are shifted.
    read: places of the tokens behind which logits are read.
    """

    ids: tuple[int, ...]
    parents: tuple[int, ...]
    shifted: int
    read: tuple[int, ...]

    def __post_init__(self) -> None:
        n = len(self.ids)
        if len(self.parents) != n or any(not -1 <= parent < i for i, parent in enumerate(self.parents)):
            raise ValueError(f"parents={self.parents}: of each of the {n} tokens one that comes before it, or -1")
        if not self.read or any(not 0 <= place < n for place in (self.shifted, *self.read)):
            raise ValueError(f"shifted={self.shifted}, read={self.read}: must be places of the row's {n} tokens")

    @classmethod
    def chain(cls, ids: Ids, at: int) -> Row:
        """Tokens one behind the other, of which one is both shifted and read."""
        return cls(tuple(ids), tuple(range(-1, len(ids) - 1)), at, (at,))

    @property
    def is_chain(self) -> bool:
        """Whether tokens stand one behind the other."""
        return self.parents == tuple(range(-1, len(self.ids) - 1))

    @property
    def depths(self) -> tuple[int, ...]:
        """How many tokens of the row stand before each."""
        found: list[int] = []
        for parent in self.parents:
            found.append(0 if parent < 0 else found[parent] + 1)
        return tuple(found)

    def positions(self, start: int) -> tuple[int, ...]:
        """Each token's position behind a prefix of `start` tokens."""
        return tuple(start + depth for depth in self.depths)


@dataclass(frozen=True)
class SplitPrompt:
    """A prompt as an engine runs it: tokens that run once and stay frozen, and the row that runs behind them."""

    prefix: tuple[int, ...]
    row: Row

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens, of a row that is a chain."""
        return (*self.prefix, *self.row.ids)


@dataclass(frozen=True)
class RowSizes:
    """What a row takes of memory, in bytes, at the most.

    run: while it runs through a layer or the head, without a graph. graph: what its graph keeps, of all layers.
    slopes: the way back of one target of it, and what comes out of that, of all layers; slope: of one layer.
    """

    run: int
    graph: int
    slopes: int
    slope: int


@dataclass(frozen=True)
class LoadedModel:
    """What engines need of a model: its modules, where its neurons are, and its mask token if it is a masked one.

    products: how differences are multiplied with weights in low precision; see `difference_products.py`.
    """

    module: PreTrainedModel
    feed_forward: FeedForward
    mask_token: int | None = None
    name: str = "model"
    products: str = "exact"

    @property
    def read_at(self) -> str:
        """Where prompts are read."""
        return LAST_TOKEN if self.mask_token is None else MASK_TOKEN

    @property
    def device(self) -> torch.device:
        """Where inputs go; with several devices, the first layer's."""
        device: torch.device = self.module.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of weights and activations."""
        dtype: torch.dtype = self.module.dtype
        return dtype

    def own_experts(self) -> AbstractContextManager[None]:
        """Let passes show the neurons of experts, and what is routed: without experts nothing changes."""
        return own_experts(self.feed_forward.experts_modules, self.feed_forward.attention_routers)

    def plain_experts(self) -> AbstractContextManager[None]:
        """Let passes run experts by the modeling code's own loop."""
        return plain_experts(self.feed_forward.experts_modules)

    def row_sizes(self, tokens: int, attended: int, copied_values: int = 0) -> RowSizes:
        """What a row of some tokens takes.

        attended: how many tokens each of them looks at. copied_values: what a row copies that others do not share, of
        one layer. Of SmolLM2 in float32, with 20 tokens, peaks of the allocator say that `run` is 2.5 times what a row
        takes, the graph and the slopes together 1.6 times, and a frozen token 0.9 times.
        """
        values = self._values
        attention = 3 * values.heads * attended
        run = 4 * tokens * values.experts + values.row + (tokens - 1) * values.token + tokens * attention
        n_layers = self.feed_forward.n_blocks
        kept = tokens * (values.hidden + n_layers * (attention + 2 * values.experts)) + n_layers * copied_values
        others = (tokens - 1) * values.token
        return RowSizes(
            run=self._wide * (run + copied_values),
            graph=self._wide * kept + self.dtype.itemsize * tokens * values.neurons,
            slopes=self._wide * (values.slopes + others),
            slope=self._wide * (values.slope + others),
        )

    def frozen_bytes(self, tokens: int, attended: int) -> int:
        """What tokens of a prefix take while they run, each of which looks at no more than `attended`."""
        return self._wide * tokens * (self._values.frozen + 3 * self._values.heads * attended)

    @cached_property
    def _values(self) -> PassValues:
        # Asked for each prompt, and a configuration answers slowly.
        return pass_values(self.module.config, self.feed_forward)

    @property
    def _wide(self) -> int:
        # Norms, softmax and the readout are in float32 where the model is in less.
        return max(4, self.dtype.itemsize)


class Rows(Protocol):
    """Prompts, ready to be run in rows: `counts[b]` rows of prompt b, prompt by prompt."""

    # How many tokens a row carries through the layers.
    tokens: int
    # Whether a prompt's targets are read, and differentiated, from one row.
    targets_share_rows: bool

    # What one more row takes.
    sizes: RowSizes

    def run(self, counts: Sequence[int]) -> Tensor:
        """Logits behind the token that is read, of each row [R, V], in the model's precision."""

    def positions(self, counts: Sequence[int]) -> Tensor:
        """Where each row's shifted token is [R], in any tensor of the pass seen as [tokens, F]."""

    def expand_rows(self, x: Tensor, n_rows: int) -> Tensor:
        """A tensor from a pass of one row of one prompt, as that of `n_rows` equal rows; not to be written to.

        Of an engine that `expands_together`, of one row of each prompt, as that of so many of each.
        """


class TreeRows(Rows, Protocol):
    """Rows of several tokens that are all read: trees, one for all rows of a prompt, or each its own.
    `run` gives logits of each row's tokens, one row after the other [R·S, V]; of `expand_rows` rows are all of one
    prompt, whose tree is one.
    """

    def with_rows(self, rows: Sequence[Sequence[Row]]) -> TreeRows:
        """Other rows of the same prompts, behind the same prefix."""

    def copies(self, counts: Sequence[int]) -> Tensor:
        """All places of each row's shifted token [R, Q]: several, where an engine runs a tree as several sequences."""

    def each_positions(self, counts: Sequence[int]) -> Tensor:
        """All places of each token of each row [R, Q], those of a prompt's rows in one order; -1 where a row has fewer.

        Of a row that is a chain, those that are there stand in the order of its tokens.
        """

    def read_positions(self, counts: Sequence[int]) -> Tensor:
        """Where the tokens are that `run` reads [R·S], in any tensor of the pass seen as [tokens, F]."""


class KeptPrefixes(Generic[T]):
    """What shared prefixes left when they ran, of the last few used, for prompts to come."""

    def __init__(self) -> None:
        self._kept: list[tuple[tuple[int, ...], T]] = []

    def of(self, ids: Ids, run: Callable[[tuple[int, ...]], T]) -> T:
        """What a prefix left, `run` now unless it is kept. An empty one takes no place among those kept."""
        wanted = tuple(ids)
        if not wanted:
            return run(wanted)
        known = next((own for own in self._kept if own[0] == wanted), None)
        if known is None:
            known = wanted, run(wanted)
        else:
            self._kept.remove(known)
        self._kept = [known, *self._kept[: _PREFIXES_KEPT - 1]]
        return known[1]

    def longest(self, prompts: Sequence[Ids]) -> int:
        """Length of the longest one kept with which all `prompts` begin, leaving each its last token."""

        def serves(ids: tuple[int, ...]) -> bool:
            return all(len(prompt) > len(ids) and tuple(prompt[: len(ids)]) == ids for prompt in prompts)

        return max((len(ids) for ids, _ in self._kept if serves(ids)), default=0)

    def forget(self) -> None:
        """Free their memory."""
        self._kept = []


class MismatchError(Exception):
    """An engine and a model do not fit each other: what it runs is not what the plain model does."""


class Engine(ABC):
    """How a model's rows are run.

    name: as runs record it and people are told; nothing else is decided by it. row_is: a row, for a person.
    rows_are_prompts: a row is a whole prompt, which costs as many times one token's work as it has tokens.
    reads_at: at which tokens it can read. shares_prefixes: prompts' common beginnings may run once for all.
    runs_prompts_together: rows of several prompts may be in one batch.
    targets_share_rows: a prompt's targets are read, and differentiated, from one row.
    expands_together: `expand_rows` is for several prompts, too, whose rows of one token may then begin at a layer.
    runs_trees: rows may be several tokens, as targets of several tokens need.
    refines: the engine of which it is a kind that runs shifts of single neurons better, and all else alike.
    """

    name: ClassVar[str]
    row_is: ClassVar[str]
    rows_are_prompts: ClassVar[bool] = False
    reads_at: ClassVar[tuple[str, ...]]
    shares_prefixes: ClassVar[bool]
    runs_prompts_together: bool
    targets_share_rows: ClassVar[bool]
    expands_together: ClassVar[bool] = False
    runs_trees: ClassVar[bool] = False
    refines: ClassVar[type[Engine] | None] = None

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.prefixes: KeptPrefixes[Any] = KeptPrefixes()

    @classmethod
    @abstractmethod
    def refusal(cls, model: PreTrainedModel) -> str | None:
        """Why it cannot run a model, as far as its configuration tells, with what to do about it; else None."""

    @abstractmethod
    def split(self, prompt: Ids) -> SplitPrompt:
        """A prompt whose target is the one token that follows, or stands at the mask: what is frozen, and the row."""

    @abstractmethod
    def prepare(self, prompts: Sequence[SplitPrompt], shared: Ids = ()) -> Rows:
        """Run what is frozen; `shared` are first tokens that all prompts have, of an engine that shares prefixes.

        Raises:
            ModelError: rows that this engine cannot run.
            MismatchError: the model is not as the engine needs it; the self-check meets it before anyone else.
        """

    @abstractmethod
    def row_sizes(self, n_tokens: int) -> RowSizes:
        """What a row of a prompt of so many tokens takes of memory."""

    def cost(self, n_tokens: int, shared: int, n_rows: int, n_targets: int = 0) -> int:
        """What a prompt takes of a batch's memory, in bytes: tokens that run once, behind `shared` ones, and its rows.

        n_targets: how many are differentiated; with none no graph is kept.
        """
        row = self.row_sizes(n_tokens)
        frozen = self.model.frozen_bytes(n_tokens - shared, n_tokens) if self.shares_prefixes else 0
        return frozen + (n_rows * row.graph + n_targets * row.slopes if n_targets else n_rows * row.run)

    def run_shared(self, ids: tuple[int, ...]) -> Any:
        """Run tokens that prompts share; what they leave serves every prompt that begins with them."""
        raise NotImplementedError(f"{type(self).__name__} shares no prefixes")

    def shared_prefix(self, ids: Ids) -> Any:
        """What `run_shared` gives, of the last few prefixes without running them again."""
        return self.prefixes.of(ids, self.run_shared)

    def differences(self, prompts: Sequence[Ids], shared: Ids, points: Mapping[Site, Point]) -> Differences | None:
        """Prompts for shifts of single neurons at `points` by difference arithmetic; None of engines without it.

        `shared` are first tokens that all have.

        Raises:
            MismatchError: the model is not as the engine needs it.
        """
        return None

    def differences_bytes(self, n_tokens: int, shared: int) -> int:
        """What one of the prompts of `differences` takes of memory, of so many tokens, the first `shared` of all."""
        raise NotImplementedError(f"{type(self).__name__} has no difference arithmetic")

    def forget(self) -> None:
        """Free the memory of shared prefixes that are kept for prompts to come."""
        self.prefixes.forget()

    def rows(self, prompts: Sequence[Ids], shared: Ids = ()) -> Rows:
        """Prompts' rows, each as `split` makes it."""
        return self.prepare([self.split(prompt) for prompt in prompts], shared)

    def trees(self, prompts: Sequence[Ids], rows: Sequence[Sequence[Row]], shared: Ids = ()) -> TreeRows:
        """Prompts' rows of several tokens, each of which begins with its prompt's last token.

        rows: of each prompt one for all that it will have, or all of them.
        """
        raise NotImplementedError(f"{type(self).__name__} runs rows of one token")

    def tree_sizes(self, n_tokens: int, row: Row) -> RowSizes:
        """What a row of several tokens takes of memory, of a prompt of so many."""
        raise NotImplementedError(f"{type(self).__name__} runs rows of one token")

    def groups(self, prompts: Sequence[Ids]) -> list[Group]:
        """Which prompts to run together: those with a common beginning, or all, where nothing can be shared."""
        groups = group_by_prefix(prompts) if self.shares_prefixes else [Group(tuple(range(len(prompts))), 0)]
        if self.runs_prompts_together:
            return groups
        return [Group((member,), group.shared) for group in groups for member in group.members]


def last_token_behind_the_rest(prompt: Ids) -> SplitPrompt:
    """A prompt whose row is its last token, for engines that freeze all before it."""
    return SplitPrompt(tuple(prompt[:-1]), Row.chain(prompt[-1:], 0))


def require_single_tokens(engine: Engine, prompts: Sequence[SplitPrompt]) -> None:
    """Refuse rows of several tokens, for engines that run one.

    Raises:
        ModelError: naming how many tokens a row has.
    """
    for prompt in prompts:
        if len(prompt.row.ids) != 1:
            raise ModelError(
                f"{engine.model.name}: its engine ({engine.name}) runs rows of one token, not of "
                f"{len(prompt.row.ids)}: ask for targets of one token, at the prompt's last token"
            )

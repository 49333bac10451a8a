"""A language model ready to be measured: weights, tokenizer, where its neurons live, and the engine that runs its rows.

Causal models are read at a prompt's last token, masked models at its mask token. How rows are run is the affair of the
engine (`engines/`), which is chosen when it is first needed, by a check that compares engines with the plain model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from neg_service.errors import ModelError
from neg_service.models.batches import Group
from neg_service.models.byte_patches import steady_patches
from neg_service.models.configuration import is_masked_architecture
from neg_service.models.cpu_product import CpuProduct
from neg_service.models.dimensions import context_length, row_values, steady_temperature, vocabulary
from neg_service.models.engines.base import Engine, Ids, LoadedModel, MismatchError, Row, Rows
from neg_service.models.engines.difference_products import EXACT
from neg_service.models.engines.full_sequence import FullSequenceEngine
from neg_service.models.engines.select import AUTO, Selection, select_engine, select_for_trees
from neg_service.models.feed_forward import FeedForward, find_feed_forward
from neg_service.models.inspection import mask_token_of, require_measurable
from neg_service.models.onednn import use_onednn
from neg_service.models.quantized import Dequantised
from neg_service.models.remembered_checks import selected_before
from neg_service.models.repeated_layers import unroll

log = logging.getLogger(__name__)

T = TypeVar("T")

# The identity of a model that was not read from files.
UNKNOWN_IDENTITY = "unknown"


class LanguageModel:
    """A causal or masked language model in evaluation mode, with its tokenizer and its feed-forward neurons."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        name: str = "model",
        identity: str = UNKNOWN_IDENTITY,
        dequantised: Dequantised | None = None,
        cpu_product: CpuProduct | None = None,
        engine: str = AUTO,
        products: str = EXACT,
    ) -> None:
        """Wrap a loaded model; its parameters are frozen, and layers that it runs again unrolled.

        dequantised: what they were made from, if quantised. cpu_product: what was chosen to multiply them, where there
        is a choice.

        engine, products: see `load_model`.

        Raises:
            ModelError: an architecture whose neurons are not known, or a masked model without a mask token.
        """
        require_measurable(model)
        self.model = model.eval().requires_grad_(False)
        steady_temperature(model)
        steady_patches(model)
        unroll(model)
        self.tokenizer = tokenizer
        self.name = name
        self.identity = identity
        self.dequantised = dequantised
        self.cpu_product = cpu_product
        self.feed_forward: FeedForward = find_feed_forward(model)
        self.is_masked = is_masked_architecture(type(model).__name__)
        self.n_input_ids, self.n_output_ids = vocabulary(model)
        self.mask_token: int | None = mask_token_of(tokenizer, name, self.n_input_ids) if self.is_masked else None
        self._engine, self._products = engine, products
        self._selection: Selection | None = None
        self._selection_for_trees: Selection | None = None
        self._remembers = False

    @property
    def device(self) -> torch.device:
        """Where inputs go; with several devices, the first layer's."""
        device: torch.device = self.model.device
        return device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that hold a part of it, the first layer's first."""
        return tuple(dict.fromkeys(weight.device for weight in self.model.parameters()))

    @property
    def dtype(self) -> torch.dtype:
        """The precision of weights and activations."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def context_length(self) -> int | None:
        """The most tokens a prompt may have; None where the configuration gives no limit."""
        return context_length(self.model)

    @property
    def row_values(self) -> int:
        """About how many values a row of one token holds at once: logits and differences, and those of the token."""
        return row_values(self.model.config, self.feed_forward.n_neurons)

    @property
    def engine(self) -> Engine:
        """How rows are run; asked for first, it runs the self-check, which chooses.

        Raises:
            ModelError: see `ensure_checked`.
        """
        return self.ensure_checked().engine

    def ensure_checked(self) -> Selection:
        """The engine, and what the self-check found of it and of faster ones; run when first needed.

        Raises:
            ModelError: see `select_engine`.
        """
        if self._selection is None:
            self._selection = self._selected()
            for name, reason in self._selection.rejected.items():
                log.info("%s: runs as %s, not as %s: %s", self.name, self._selection.engine.name, name, reason)
        return self._selection

    def ensure_checked_for_trees(self) -> Selection:
        """The engine for targets of several tokens, checked when first needed.

        Raises:
            ModelError: see `select_for_trees`.
        """
        if self._selection_for_trees is None:
            own = self.ensure_checked()
            found = self._select_or_recall(select_for_trees, own)
            if type(found.engine) is type(own.engine):
                # With the prefixes that it keeps.
                found = replace(found, engine=own.engine)
            self._selection_for_trees = found
            if found.engine is not own.engine:
                reason = found.rejected.get(own.engine.name, "does not fit")
                log.info("%s: targets of several tokens run as %s: %s %s", self.name, found.engine.name,
                         own.engine.name, reason)  # fmt: skip
        return self._selection_for_trees

    def remember_checks(self) -> None:
        """From here on a self-check counts that it has passed here before; see `remembered_checks.py`."""
        self._remembers = True

    def _select_or_recall(self, select: Callable[[T, str], Selection], of: T) -> Selection:
        """What `select` finds of its first argument, or found of it before, where that counts."""
        if not self._remembers or self.identity == UNKNOWN_IDENTITY:
            return select(of, self._engine)
        settings = {
            "identity": self.identity,
            "engine": self._engine,
            "products": self._products,
            "cpu_product": None if self.cpu_product is None else self.cpu_product.name,
            "selects": select.__name__,
            "from": [of.engine.name, repr(of.check)] if isinstance(of, Selection) else None,
        }
        return selected_before(self._loaded, settings, lambda: select(of, self._engine))

    def _selected(self) -> Selection:
        try:
            return self._select_or_recall(select_engine, self._loaded)
        except ModelError as refusal:
            if self.cpu_product is None or self.cpu_product.name == "torch":
                raise
            log.warning("%s: checked again without oneDNN, with which it was refused: %s", self.name, refusal)
        use_onednn(self.model, False)
        self.cpu_product = CpuProduct("torch", "with oneDNN the model fails its self-check")
        return self._select_or_recall(select_engine, self._loaded)

    def use_product(self, name: str) -> None:
        """Multiply by `torch` or `onednn`, as another copy of this model did; by `onednn` only where it is right."""
        own = self.cpu_product
        if own is None or own.name == name or (name == "onednn" and not own.is_right):
            return
        log.info("%s: matrix products on the CPU: %s, as the run began", self.name, name)
        use_onednn(self.model, name == "onednn")
        self.cpu_product = replace(own, name=name, reason="as the run began")

    def adopt(self, selection: Selection) -> None:
        """Run rows by the engine that another copy of this model chose; nothing is checked again."""
        self._selection = replace(selection, engine=type(selection.engine)(self._loaded))
        self._selection_for_trees = None

    def rows(self, prompts: Sequence[Sequence[int]], shared: Sequence[int] = ()) -> Rows:
        """Prompts' tokens, ready to be run in rows; `shared` are first ones that all have, as `groups` says."""
        return self.engine.rows(prompts, shared)

    def groups(self, prompts: Sequence[Sequence[int]]) -> list[Group]:
        """Which prompts to run together: those with a common beginning, or all, where nothing can be shared."""
        return self.engine.groups(prompts)

    def whole_prompt(self, prompt: Ids, row: Row | None = None) -> Rows:
        """A prompt as a row of all its tokens, by a plain pass whatever the engine is.

        row: tokens from the prompt's last one on, all of which are read.

        Raises:
            ModelError: what is behind a token changes what is read at it, so that no row of several can be read.
        """
        engine = FullSequenceEngine(self._loaded)
        try:
            return engine.rows([prompt]) if row is None else engine.trees([prompt], [[row]])
        except MismatchError as error:
            raise ModelError(
                f"{self.name} runs no targets of several tokens: {error}", change="dataset.not_one_token"
            ) from error

    def forget_prefixes(self) -> None:
        """Free the memory of shared prefixes that are kept for prompts to come."""
        for selection in (self._selection, self._selection_for_trees):
            if selection is not None:
                selection.engine.forget()

    @property
    def _loaded(self) -> LoadedModel:
        return LoadedModel(self.model, self.feed_forward, self.mask_token, self.name, self._products)

"""A prompt that has run once, without interventions: its neurons, its experts, its targets, and each layer's input.

What shifts do to it: `interventions.py`.

Axes: B prompts that ran together, K targets, S tokens that are read, R rows, M neurons of several sites, C values that
are measured of the targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.errors import ModelError, NonFiniteError
from neg_service.measures.adaptive import RowNoise
from neg_service.measures.batching import named, naming_memory
from neg_service.measures.outputs import Output
from neg_service.measures.prompt_differences import PromptDifferences
from neg_service.measures.readout import Readout
from neg_service.measures.routing import PromptRouting, TokenExperts, routing_of_rows, slots_of
from neg_service.measures.sequences import TokenLogP, TreeBaseline, nodes_of_targets, tree_of
from neg_service.models.engines.base import Rows, TreeRows
from neg_service.models.engines.difference_program import Differences
from neg_service.models.experts_function import watching_routing
from neg_service.models.feed_forward import Point, Site, hooks
from neg_service.models.language_model import LanguageModel
from neg_service.models.start_at_layer import flat, keep_inputs
from neg_service.models.transfer import indices, sent
from neg_service.neurons import NeuronSet
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.slots import Slots


@dataclass(frozen=True)
class RanOnce:
    """What prompts that ran together gave, without a shift.

    head_bv, logits_bv: the vocabulary head's output and the model's logits [B, V]. activation: of each site's neurons
    at the readout position [B, N], where the layer is.
    """

    head_bv: Tensor
    logits_bv: Tensor
    activation: dict[Site, Tensor]


class PreparedPrompt:
    """One prompt, run once: layer inputs are stored, and the baseline output is known.

    probability_k: of each target without a shift [K], at least float32, on the model's device. rest_k: of all other
    tokens [K], float64. tokens_k: how many each has; the error of Δ log p adds up over them.
    activation: of each site's neurons at the readout position, on the layer's device; points: where they are.
    routing: the experts that the readout token used. Where neurons are shifted at every token, a site of experts has
    those of all experts that any of them uses, silent where the readout token does not.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: EncodedPrompt,
        basis: str,
        shared: Sequence[int] = (),
        *,
        by_rows: bool = False,
        each: str | None = None,
        ran: tuple[Differences | RanOnce, int] | None = None,
    ) -> None:
        """Run the prompt once; `shared` are first tokens that it shares with others, and that run only once for all.

        by_rows: run rows and not their differences, for measures that change more than single neurons. each: shift,
        and differentiate, at every token that predicts one of a target's, `magnitude` or `signed` as shifts are.
        ran: what prompts that ran together gave, none of them with experts, and which of these this one is.

        Raises:
            NonFiniteError: NaN or infinity in the prompt's logits.
            DoesNotFit: the prompt alone does not fit.
            ModelError: the model fails its self-check, or does to its logits what no difference passes through.
        """
        self._who = named(prompt, model)
        self._feed_forward, self._model_dtype = model.feed_forward, model.dtype
        self.points: dict[Site, Point] = model.feed_forward.sites(basis)
        self._layers = model.feed_forward.layers
        self._readout = Readout(model)
        self._target_ids, self.prompt = list(prompt.target_ids), prompt
        self._each = each if prompt.has_sequences else None
        self._tree = tree_of(prompt) if prompt.is_tree else None
        selection = model.ensure_checked_for_trees() if self._tree else model.ensure_checked()
        engine, checked = selection.engine, selection.check
        self._engine_name = engine.name
        self._rows_of: Callable[[], Rows] = lambda: engine.rows([prompt.ids], shared)
        self._late_expansion, self._starts_at_layers = checked.late_expansion, checked.starts_at_layers
        self.device = model.device
        found: Differences | RanOnce | None
        found, self._place = ran or (None, 0)
        self.by_differences: PromptDifferences | None = None
        self._stored: tuple[list[Tensor], list[Any]] | None = None
        with self.naming_memory("its tokens do"):
            trees = engine.trees([prompt.until_shifted], [[self._tree.row]], shared) if self._tree else None
            self._tree_rows: TreeRows | None = trees
            # Of a prompt's differences rows are needed for gradients alone, and those of several prompts run together.
            self.sizes = trees.sizes if trees else engine.row_sizes(len(prompt.ids))
            if not by_rows and self._tree is None and found is None:
                found = engine.differences([prompt.ids], shared, self.points)
            self._differences = found if isinstance(found, Differences) else None
            if found is None:
                head_sv, logits_sv, self.activation, self.routing = self._run_once()
            else:
                b = self._place
                head_sv, logits_sv = found.head_bv[b : b + 1], found.logits_bv[b : b + 1]
                self.activation = {site: own[b] for site, own in found.activation.items()}
                self.routing = PromptRouting()
                self._experts = TokenExperts(self._feed_forward, {})
        self._read_targets(head_sv, logits_sv)

    @cached_property
    def rows(self) -> Rows:
        """The prompt's rows, behind what runs once."""
        if self._tree_rows is not None:
            return self._tree_rows
        with self.naming_memory("its tokens do"):
            return self._rows_of()

    def _read_targets(self, head_sv: Tensor, logits_sv: Tensor) -> None:
        """Take over what the row without a shift says of the targets."""
        self.tokens_k = indices([len(own) for own in self.prompt.target_tokens], self.device).double()
        self.token_log_p: TokenLogP = None
        if self._tree is not None:
            self._of_tree = TreeBaseline.of(self._readout, head_sv, logits_sv, self._tree, self._who)
            self._log_p_k = self._of_tree.log_p_k.to(self.device)
            self.token_log_p = self._of_tree.token_log_p()
            self.probability_k, self.rest_k = self._log_p_k.exp(), -torch.expm1(self._log_p_k)
            return
        baseline = self._readout.baseline(head_sv[0], logits_sv[0], self._who)
        p_v, at_k = baseline.p_v, indices(self._target_ids, baseline.p_v.device)
        self.probability_k = p_v[at_k].to(self.device)
        # As exact as the probabilities are, also where one is nearly 1.
        self.rest_k = (p_v.double().sum() - p_v[at_k].double()).to(self.device)
        self._log_p_k = self.probability_k.double().log()
        self._baseline = baseline
        if self._differences is not None:
            self._baseline = baseline.to(self._differences.dtype)
            self.by_differences = PromptDifferences(
                self._differences, self._place, self._readout, self._baseline, tuple(self._target_ids)
            )

    @torch.no_grad()
    def _run_once(self) -> tuple[Tensor, Tensor, dict[Site, Tensor], PromptRouting]:
        """Run one row and store the input of each layer; the head's output and logits behind each token that is read
        [S, V], activations, and routing."""
        captured: dict[Site, Tensor] = {}
        # What runs once does so before anything watches.
        rows = self.rows
        with ExitStack() as stack:
            self._stored = stack.enter_context(keep_inputs(self._layers))
            stack.enter_context(hooks(self.points, lambda site, x: captured.update({site: x})))
            routing = stack.enter_context(watching_routing())
            head_rv = stack.enter_context(self._readout.watching())
            logits_rv = rows.run([1])
        place = rows.positions([1])
        activation = {
            site: point.neurons(flat(captured[site])[sent(place, captured[site].device)])[0]
            for site, point in self.points.items()
        }
        (own,) = routing_of_rows(self._feed_forward, routing, place)
        self._experts = TokenExperts.of(self._feed_forward, routing, self._moved_places(1)[0])
        for site in [site for site in activation if site.is_experts]:
            if self._each:
                activation[site] = self._experts.spread(site.layer, activation[site])
            else:
                # Behind the neurons of experts stand the places of identities.
                n = len(own.experts[site.layer]) * len(self._feed_forward.numbers(site))
                activation[site] = activation[site][:n]
        return head_rv[0], logits_rv, activation, own

    def _read_places(self, n_rows: int) -> Tensor:
        """Where the tokens are that are read, of the row or rows [R, S]; the first is the one that is shifted."""
        if self._tree_rows is None:
            return self.rows.positions([n_rows])[:, None]
        return self._tree_rows.read_positions([n_rows]).view(n_rows, -1)

    def _moved_places(self, n_rows: int) -> Tensor:
        """Where those are at which neurons are moved, of several copies one."""
        return self._read_places(n_rows)[:, : None if self._each else 1]

    @property
    def _layer_inputs(self) -> tuple[list[Tensor], list[Any]]:
        """The input of each layer, and what else its output holds."""
        if self._stored is None:
            self._run_once()
        assert self._stored is not None
        return self._stored

    @property
    def has_experts(self) -> bool:
        """Whether any layer has experts, so that a shift may change which ones run."""
        return self._feed_forward.has_experts

    @property
    def errors_are_shares(self) -> bool:
        """Whether the error of a row is a share of what it moves, as difference arithmetic has it."""
        return self._differences is not None

    @property
    def row_dtype(self) -> torch.dtype:
        """The precision that rows, or their differences, are worked out in, at the least."""
        return torch.promote_types(self._model_dtype, torch.float32)

    @property
    def gradients_are_exact(self) -> bool:
        """Whether gradients have the digits that interventions have: not where differences of weights in low precision
        are worked out in a higher one."""
        return self._differences is None or self._model_dtype in (torch.float32, torch.float64)

    def require_kind_of_noise(self, noise: RowNoise) -> None:
        """See that noise is not that of difference arithmetic where there is none; the reverse is on the safe side.

        Raises:
            ModelError: it is.
        """
        if noise.is_per_row and not self.errors_are_shares:
            raise ModelError(
                f"{self._who}: runs as {self._engine_name}, and the run's noise was measured with difference "
                "arithmetic: begin a new run, or set model.engine",
                change="model.engine",
            )

    def noise_of(self, output: Output) -> Tensor:
        """How much further than the Δ log p of a token each value's change is off [C], float64."""
        own_c = output.noise(self.probabilities_for(output), self.rest_k)
        return own_c * (self.tokens_k.max() if output.readouts.is_contrast else output.of_kept(self.tokens_k))

    def probabilities_for(self, output: Output) -> Tensor:
        """Of each target [K], float64; where they are only compared with each other, over the largest of them."""
        if not output.readouts.is_contrast:
            return self.probability_k.double()
        return (self._log_p_k - self._log_p_k.max()).exp()

    def require_values(self, output: Output) -> None:
        """See that what is to be measured has a value.

        Raises:
            NonFiniteError: log-odds of a target whose probability leaves nothing to others.
        """
        if not self.noise_of(output).isfinite().all():
            raise NonFiniteError(f"{self._who}: a target's probability is 1 to all digits, which has no log-odds")

    def sites(self, layers: Sequence[int]) -> list[Site]:
        """Those of some layers."""
        wanted = set(layers)
        return [site for site in self.points if site.layer in wanted]

    def slots(self, sites: Sequence[Site]) -> Slots:
        """The neurons at some sites that act on the prompt, in the order in which their values stand."""
        return slots_of(self._feed_forward, self._experts.experts, sites)

    @property
    def paths(self) -> Sequence[Sequence[tuple[int, int]]]:
        """Of each target (place among the tokens that are read, token that is predicted behind it), token by token."""
        return [((0, token),) for token in self._target_ids] if self._tree is None else self._tree.paths

    def are_routed(self, neurons: NeuronSet) -> NDArray[np.bool_]:
        """Of which neurons the experts are used by a token at which they are shifted, for each target [n, K]."""
        nodes = nodes_of_targets(self._tree) if self._tree is not None and self._each else [[0]] * len(self._target_ids)
        return np.stack([self._experts.are_used(neurons, own) for own in nodes], 1)

    def naming_memory(self, what: str) -> AbstractContextManager[None]:
        """See `batching.naming_memory`."""
        return naming_memory(self._who, self.device, f"{what} not fit", "use a larger device or a shorter prompt")

"""Interventions on single neurons: what a shift does to the targets' probabilities, for very many shifts at once.

For one prompt, a row of a batch is one (neuron, shift). All rows of a layer start from its stored input, so that the
layers below never run again (`models/start_at_layer.py`); and up to its neurons the layer itself runs once, because
only there do rows begin to differ. Architectures whose layers cannot grow rows on the way (the self-check finds out)
run the whole layer for each row. Row 0 of every batch is not shifted: another batch shape alone moves logits by more
than a weak neuron does. Probabilities are never subtracted (`readout.py`).

An engine of difference arithmetic (`models/engines/differences.py`) runs no such rows: each is its difference from the
prompt's one row without a shift, which is computed in float64 whatever the model's precision. Then probabilities and
activations here are that row's, too. Its batches hold rows of several layers, which join on the way up.

Targets of several tokens are read from rows of several tokens, always as rows (`sequences.py`).

Neurons of a layer's experts and of its MLP pass by at two *sites*. An intervention does not change which experts its
own layer chose; layers above may choose others, and each intervention says whether they did.

Axes: K targets, I interventions, R rows of a batch, M neurons of several sites, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from neg_service.errors import ModelError, NonFiniteError
from neg_service.measures.adaptive import RowNoise
from neg_service.measures.batching import in_parts, named, naming_memory
from neg_service.measures.changes import Changes, Moved, cut, joined
from neg_service.measures.outputs import Output
from neg_service.measures.readout import Readout
from neg_service.measures.readouts import PLAIN
from neg_service.measures.routing import (
    PromptRouting,
    other_experts,
    require_same_experts,
    routing_changed,
    routing_of_rows,
    slots_of,
)
from neg_service.measures.sequences import TokenLogP, TreeBaseline, gradients_of_targets, shifts_of_rows, tree_of
from neg_service.measures.signs import signed_by
from neg_service.models.batches import Budget
from neg_service.models.engines.backward import target_gradients
from neg_service.models.engines.base import Rows, TreeRows
from neg_service.models.engines.difference_program import Differences, Shifts
from neg_service.models.experts_function import Routing, watching_routing
from neg_service.models.feed_forward import Point, Site, hooks
from neg_service.models.language_model import LanguageModel
from neg_service.models.start_at_layer import flat, keep_inputs, start_at_layer
from neg_service.models.transfer import fetched, indices, sent
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.slots import Slots

Change = Callable[[Tensor, Tensor], Tensor]


class Interventions:
    """One prompt, ready for interventions: layer inputs are stored, and the baseline output is known.

    probability_k: of each target without a shift [K], at least float32, on the model's device. rest_k: of all other
    tokens [K], float64. tokens_k: how many each has; the error of Δ log p adds up over them.
    activation: of each site's neurons at the readout position, on the layer's device; points: where they are.
    routing: the experts that the readout token used.
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
    ) -> None:
        """Run the prompt once; `shared` are first tokens that it shares with others, and that run only once for all.

        by_rows: run rows and not their differences, for measures that change more than single neurons. each: shift,
        and differentiate, at every token that predicts one of a target's, `magnitude` or `signed` as shifts are.

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
        self._target_ids, self._prompt = list(prompt.target_ids), prompt
        self._each = each if prompt.has_sequences else None
        self._tree = tree_of(prompt) if prompt.is_tree else None
        selection = model.ensure_checked_for_trees() if self._tree else model.ensure_checked()
        engine, checked = selection.engine, selection.check
        self._engine_name = engine.name
        self._late_expansion, self._starts_at_layers = checked.late_expansion, checked.starts_at_layers
        self.device = model.device
        self._differences: Differences | None = None
        self._stored: tuple[list[Tensor], list[Any]] | None = None
        with self.naming_memory("its tokens do"):
            trees = engine.trees([prompt.until_shifted], [[self._tree.row]], shared) if self._tree else None
            self._tree_rows: TreeRows | None = trees
            self.rows: Rows = trees or model.rows([prompt.ids], shared)
            if not by_rows and self._tree is None:
                self._differences = engine.differences(self.rows, prompt.ids, shared, self.points)
            if self._differences is None:
                head_sv, logits_sv, self.activation, self.routing = self._run_once()
            else:
                head_sv, logits_sv = self._differences.head_v[None], self._differences.logits_v[None]
                self.activation, self.routing = self._differences.activation, PromptRouting()
        self._read_targets(head_sv, logits_sv)

    def _read_targets(self, head_sv: Tensor, logits_sv: Tensor) -> None:
        """Take over what the row without a shift says of the targets."""
        self.tokens_k = torch.tensor([len(own) for own in self._prompt.target_tokens], device=self.device).double()
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
        self._baseline = baseline if self._differences is None else baseline.to(self._differences.dtype)

    @torch.no_grad()
    def _run_once(self) -> tuple[Tensor, Tensor, dict[Site, Tensor], PromptRouting]:
        """Run one row and store the input of each layer; the head's output and logits behind each token that is read
        [S, V], activations, and routing."""
        captured: dict[Site, Tensor] = {}
        with ExitStack() as stack:
            self._stored = stack.enter_context(keep_inputs(self._layers))
            stack.enter_context(hooks(self.points, lambda site, x: captured.update({site: x})))
            routing = stack.enter_context(watching_routing())
            head_rv = stack.enter_context(self._readout.watching())
            logits_rv = self.rows.run([1])
        place = self.rows.positions([1])
        activation = {
            site: point.neurons(flat(captured[site])[sent(place, captured[site].device)])[0]
            for site, point in self.points.items()
        }
        (own,) = routing_of_rows(self._feed_forward, routing, place)
        return head_rv[0], logits_rv, activation, own

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
        return own_c * (self.tokens_k.max() if output.readouts.is_contrast else self.tokens_k[list(output.kept)])

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

    def gradient(self, layers: Sequence[int], budget: Budget, output: Output | None = None) -> Tensor | None:
        """The plain gradient [C, M], where neurons are shifted at every token: there no sign makes it of NeurGrad."""
        return None if self._each is None else self._gradients(layers, budget, "signed", output)

    def sites(self, layers: Sequence[int]) -> list[Site]:
        """Those of some layers."""
        wanted = set(layers)
        return [site for site in self.points if site.layer in wanted]

    def slots(self, sites: Sequence[Site]) -> Slots:
        """The neurons at some sites that act on the prompt, in the order in which their values stand."""
        return slots_of(self._feed_forward, self.routing, sites)

    def neurgrad(self, layers: Sequence[int], budget: Budget, output: Output | None = None) -> Tensor:
        """NeurGrad [C, M] of the layers' neurons, over the same prefix; of the probability where no output is given.

        Per unit of |activation|. M is that of `slots(sites(layers))`. Where neurons are shifted at every token, over
        all of these.

        Raises:
            NonFiniteError: NaN or infinity in a gradient.
            DoesNotFit: one target's gradients do not fit.
        """
        return self._gradients(layers, budget, None if self._each is None else "magnitude", output)

    def _gradients(self, layers: Sequence[int], budget: Budget, each: str | None, output: Output | None) -> Tensor:
        points = {site: self.points[site] for site in self.sites(layers)}
        output = output or Output(PLAIN, len(self._target_ids))
        of_logits = output.differentiates_logits

        def run(part: range) -> Tensor:
            if self._tree_rows is not None:
                found = gradients_of_targets(self._tree_rows, self._prompt, part, points, each, of_logits=of_logits)
            else:
                ids = [self._target_ids[part.start : part.stop]]
                found = target_gradients(self.rows, ids, points, of_logits=of_logits)
            if self.has_experts:
                require_same_experts(
                    self._who, {n: self._other_experts(n, found.routing, found.place_r) for n in layers}
                )
            pairs = zip(points, found.gradient_srn, strict=True)
            signed = [own if each else signed_by(self.activation[site], own) for site, own in pairs]
            return torch.cat([own.to(self.device, self.probability_k.dtype) for own in signed], 1)

        sizes, shares = self.rows.sizes, self.rows.targets_share_rows
        own, beside = (sizes.slopes, sizes.graph) if shares else (sizes.graph + sizes.slopes, 0)
        with self.naming_memory("the gradients of one of its targets do"):
            parts = [found for _, found in in_parts([own] * len(self._target_ids), run, budget, beside)]
        neurgrad_km = output.gradients(torch.cat(parts), self.probabilities_for(output), self.rest_k)
        if not neurgrad_km.isfinite().all():
            raise NonFiniteError(f"{self._who}: NaN or infinity in gradients; try another model.dtype")
        return neurgrad_km

    def naming_memory(self, what: str) -> AbstractContextManager[None]:
        """See `batching.naming_memory`."""
        return naming_memory(self._who, self.device, f"{what} not fit", "use a larger device or a shorter prompt")

    def delta_log_p(
        self, site: Site, neurons_i: Tensor, shifts_i: Tensor, budget: Budget
    ) -> tuple[Tensor, Tensor | None]:
        """Δ log p of every target [I, K], and whether a layer above chose other experts [I]; see `changes`."""
        found = self.changes([Moved(site, neurons_i, shifts_i)], budget)
        return found.log_p_ik, found.is_rerouted_i

    def changes(self, moved: Sequence[Moved], budget: Budget) -> Changes:
        """What interventions at some sites do, which are given in the order of `sites`; I of all, one after the other.

        Batches are filled evenly: across sites by an engine whose rows may begin at any, else site by site.

        Raises:
            DoesNotFit: one intervention beside the baseline row does not fit.
            NonFiniteError: NaN or infinity after an intervention.
        """
        together = [moved] if self._differences is not None else [[own] for own in moved]
        return joined([self._changes_of_batches(own, budget) for own in together])

    def _changes_of_batches(self, moved: Sequence[Moved], budget: Budget) -> Changes:
        def run(part: range) -> Changes:
            return self._run(cut(moved, part))

        size, n = self.rows.sizes.run, sum(len(own.shifts_i) for own in moved)
        with self.naming_memory("one intervention does"), self._without_waiting():
            # Beside the baseline row, or what differences of a few rows take while they are worked out.
            parts = list(in_parts([size] * n, run, budget, size))
            found = [own for _, own in parts]
            # What a batch says of itself is asked for once, for all of them.
            nothing = torch.zeros((), dtype=torch.bool, device=self.device)
            is_other = torch.stack([nothing if own.used_others is None else own.used_others for own in found])
            is_read = torch.stack([own.log_p_ik.isfinite().all() for own in found])
            is_other, is_read = fetched([is_other, is_read])
        # Where rows have experts, all are of one site.
        require_same_experts(self._who, {moved[0].site.layer: is_other.any()})
        with self.naming_memory("one intervention does"):
            for place in (~is_read).nonzero()[:, 0].tolist():
                # The same batch again, so that it gives the same numbers.
                found[place] = run(parts[place][0])
        return joined(found)

    def _without_waiting(self) -> AbstractContextManager[None]:
        """On a CPU there is no queue that could run empty."""
        return nullcontext() if self.device.type == "cpu" else self._readout.without_waiting()

    def run_from(self, layer: int, n_rows: int, changes: Mapping[Site, Change]) -> Tensor:
        """Logits [R, V] of rows that begin at a layer, with what `changes` make of the tensors of some of its sites.

        Each is given a copy of that tensor for all rows as [tokens, F], which it may write to, and where in it each
        row's readout position is [R].
        """
        position_r = self.rows.positions([n_rows])
        # Several sites grow rows in one layer only where it has one.
        is_late = len(changes) == 1 and self._late_expansion.issuperset(changes)
        if self._tree_rows is not None:
            # What goes beside the neurons does not broadcast where it is of several sequences.
            is_late &= self._tree_rows.copies([1]).shape[1] == 1

        def change_copy(site: Site, x: Tensor) -> Tensor:
            copied = (self.rows.expand_rows(x, n_rows) if is_late else x).clone()
            return changes[site](flat(copied), sent(position_r, x.device)).view_as(copied)

        with (
            self._starting_at(layer, 1 if is_late else n_rows),
            hooks({site: self.points[site] for site in changes}, change_copy),
        ):
            return self.rows.run([1 if is_late else n_rows])

    @torch.no_grad()
    def run_baseline(self, layer: int, n_rows: int) -> None:
        """Run `n_rows` equal rows from a layer on and drop them: the least that interventions there can cost."""
        with self._starting_at(layer, n_rows):
            self.rows.run([n_rows])

    def _starting_at(self, layer: int, n_rows: int) -> AbstractContextManager[None]:
        """Let passes of some rows begin at a layer; where layers hand on more than their outputs, all of them run."""
        if layer == 0 or not self._starts_at_layers:
            return nullcontext()
        inputs, output_structures = self._layer_inputs
        stored = inputs[layer]
        if n_rows > 1:
            stored = self.rows.expand_rows(stored, n_rows)
        return start_at_layer(self._layers, layer, stored, output_structures)

    @torch.no_grad()
    def _run(self, moved: Sequence[Moved]) -> Changes:
        if self._differences is not None:
            shifts: dict[Site, Shifts] = {}
            n = 0
            for site, neurons_r, shifts_r in moved:
                rows_r = torch.arange(n, n + len(shifts_r), device=shifts_r.device)
                n += len(shifts_r)
                shifts[site] = Shifts(rows_r, neurons_r, shifts_r, n)
            read = self._readout.differences_read(
                self._baseline, self._differences.run(n, shifts), self._differences.product, self._target_ids
            )
            return Changes(read.log_p_rk, read.logit_rk, None, read.spread_r)
        ((site, neurons_r, shifts_r),) = moved
        n_rows = len(shifts_r) + 1

        def shift(x_tf: Tensor, position_r: Tensor) -> Tensor:
            neurons_i, shifts_i, place_i = (sent(own, x_tf.device) for own in (neurons_r, shifts_r, position_r[1:]))
            own_tn = self.points[site].neurons(x_tf)
            if self._tree_rows is not None:
                place_i, neurons_i, shifts_i = shifts_of_rows(self._tree_rows, own_tn, neurons_i, shifts_i, self._each)
            own_tn[place_i, neurons_i] += shifts_i.to(x_tf.dtype)
            return x_tf

        n_read = 1 if self._tree is None else len(self._tree.row.read)
        with self._readout.differences([n_rows], [n_read]) as head_rv, watching_routing() as routing:
            self.run_from(site.layer, n_rows, {site: shift})
        other_experts = self._other_experts(site.layer, routing, self.rows.positions([n_rows]))
        read_rs = self.rows.positions([n_rows])[:, None]
        if self._tree_rows is not None:
            read_rs = self._tree_rows.read_positions([n_rows]).view(n_rows, -1)
        changed = routing_changed(self._feed_forward, site.layer, routing, read_rs, self.device)
        if self._tree is not None:
            log_p_rk, logit_rk = self._of_tree.changes(self._readout, head_rv[0].view(n_rows, n_read, -1)[1:])
            # Of targets of several tokens, what is compared is log p.
            compared_rk = log_p_rk if self._prompt.has_sequences else logit_rk
            return Changes(log_p_rk, compared_rk, changed, None, other_experts)
        read = self._readout.rows_read(self._baseline, head_rv[0][1:], self._target_ids)
        return Changes(read.log_p_rk, read.logit_rk, changed, None, other_experts)

    def _other_experts(self, layer: int, routing: Mapping[nn.Module, Routing], position_r: Tensor) -> Tensor:
        return other_experts(self._feed_forward, self.routing, layer, routing, position_r, self.device)

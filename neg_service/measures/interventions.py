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

Neurons of a layer's experts and of its MLPs pass by at *sites* of their own. An intervention does not change which
experts its own layer chose; layers above may choose others, and each intervention says whether they did.

Axes: K targets, I interventions, R rows of a batch, M neurons of several sites, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from neg_service.errors import NonFiniteError
from neg_service.measures.batching import in_parts
from neg_service.measures.changes import Changes, Moved, cut, joined
from neg_service.measures.outputs import Output
from neg_service.measures.prepared_prompt import PreparedPrompt
from neg_service.measures.prompt_differences import changes_together
from neg_service.measures.readouts import PLAIN
from neg_service.measures.routing import require_same_experts, routing_changed
from neg_service.measures.sequences import gradients_of_targets, nodes_of_targets, shifts_of_rows
from neg_service.measures.signs import signed_by
from neg_service.models.batches import Budget
from neg_service.models.engines.backward import target_gradients
from neg_service.models.experts_function import Routing, watching_routing
from neg_service.models.feed_forward import Site, hooks
from neg_service.models.start_at_layer import flat, start_at_layer
from neg_service.models.transfer import fetched, sent

Change = Callable[[Tensor, Tensor], Tensor]


class Interventions(PreparedPrompt):
    """A prompt that is ready for interventions, and what they do."""

    def gradient(self, layers: Sequence[int], budget: Budget, output: Output | None = None) -> Tensor | None:
        """The plain gradient [C, M], where neurons are shifted at every token: there no sign makes it of NeurGrad."""
        return None if self._each is None else self._gradients(layers, budget, "signed", output)

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
            tokens: list[int] | None = None
            if self._tree_rows is not None:
                found = gradients_of_targets(
                    self._tree_rows, self.prompt, part, points, each, self._experts.used() if each else None,
                    of_logits=of_logits,
                )  # fmt: skip
                if each and self._tree is not None:
                    tokens = [node for own in nodes_of_targets(self._tree)[part.start : part.stop] for node in own]
            else:
                ids = [self._target_ids[part.start : part.stop]]
                found = target_gradients(self.rows, ids, points, of_logits=of_logits)
            if self.has_experts:
                place_rs = found.place_r[:, None] if found.place_a is None else found.place_a[None]
                others = {n: self._experts.is_other(n, found.routing, place_rs, self.device, tokens) for n in layers}
                require_same_experts(self._who, others)
            # Behind the neurons of experts that were chosen nothing stands but identities' places.
            by_site = dict(zip(points, found.gradient_srn, strict=True))
            return self._joined(by_site) if each else self.signed(by_site)

        sizes, shares = self.rows.sizes, self.rows.targets_share_rows
        own, beside = (sizes.slopes, sizes.graph) if shares else (sizes.graph + sizes.slopes, 0)
        with self.naming_memory("the gradients of one of its targets do"):
            parts = [found for _, found in in_parts([own] * len(self._target_ids), run, budget, beside)]
        return self.of_output(torch.cat(parts), output)

    def signed(self, gradient_srn: Mapping[Site, Tensor]) -> Tensor:
        """Gradients by site [R, N] in the direction of activations, of all sites one behind the other [R, M]."""
        n_of = {site: len(self.activation[site]) for site in gradient_srn}
        return self._joined(
            {site: signed_by(self.activation[site], own[:, : n_of[site]]) for site, own in gradient_srn.items()}
        )

    def _joined(self, gradient_srn: Mapping[Site, Tensor]) -> Tensor:
        own_srn = [own[:, : len(self.activation[site])] for site, own in gradient_srn.items()]
        return torch.cat([own.to(self.device, self.probability_k.dtype) for own in own_srn], 1)

    def of_output(self, slope_km: Tensor, output: Output) -> Tensor:
        """Gradients of each value that is measured [C, M], from those of log p, or of logits [K, M].

        Raises:
            NonFiniteError: NaN or infinity.
        """
        neurgrad_km = output.gradients(slope_km, self.probabilities_for(output), self.rest_k)
        if not neurgrad_km.isfinite().all():
            raise NonFiniteError(f"{self._who}: NaN or infinity in gradients; try another model.dtype")
        return neurgrad_km

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
        together = [moved] if self.by_differences is not None else [[own] for own in moved]
        return joined([self._changes_of_batches(own, budget) for own in together])

    def _changes_of_batches(self, moved: Sequence[Moved], budget: Budget) -> Changes:
        def run(part: range) -> Changes:
            return self._run(cut(moved, part))

        size, n = self.sizes.run, sum(len(own.shifts_i) for own in moved)
        with self.naming_memory("one intervention does"), self.without_waiting():
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

    def without_waiting(self) -> AbstractContextManager[None]:
        """See `Readout.without_waiting`. On a CPU there is no queue that could run empty."""
        return nullcontext() if self.device.type == "cpu" else self._readout.without_waiting()

    def run_from(self, layer: int, n_rows: int, changes: Mapping[Site, Change]) -> Tensor:
        """Logits [R, V] of rows that begin at a layer, with what `changes` make of the tensors of some of its sites.

        Each is given a copy of that tensor for all rows as [tokens, F], which it may write to, and where in it each
        row's shifted token is [R, Q], which an engine may run several times. Of rows of several tokens logits are of
        all that are read, one row after the other [R·S, V].
        """
        place_rq = self.rows.positions([n_rows])[:, None]
        if self._tree_rows is not None:
            place_rq = self._tree_rows.copies([n_rows])
        # Several sites grow rows in one layer only where it has one.
        is_late = len(changes) == 1 and self._late_expansion.issuperset(changes)
        if self._tree_rows is not None:
            # What goes beside the neurons does not broadcast where it is of several sequences, or tokens of experts.
            is_late &= self._tree_rows.copies([1]).shape[1] == 1 and not any(site.is_experts for site in changes)

        def change_copy(site: Site, x: Tensor) -> Tensor:
            copied = (self.rows.expand_rows(x, n_rows) if is_late else x).clone()
            return changes[site](flat(copied), sent(place_rq, x.device)).view_as(copied)

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
        if self.by_differences is not None:
            (found,) = changes_together([self.by_differences], [moved])
            return found
        ((site, neurons_r, shifts_r),) = moved
        n_rows = len(shifts_r) + 1

        def shift(x_tf: Tensor, place_rq: Tensor) -> Tensor:
            neurons_i, shifts_i, place_i = (sent(own, x_tf.device) for own in (neurons_r, shifts_r, place_rq[1:, 0]))
            own_tn = self.points[site].neurons(x_tf)
            if self._tree_rows is not None:
                experts = self._experts_at(site, routing) if self._each else None
                place_i, neurons_i, shifts_i = shifts_of_rows(
                    self._tree_rows, own_tn, neurons_i, shifts_i, self._each, experts
                )
            own_tn[place_i, neurons_i] += shifts_i.to(x_tf.dtype)
            return x_tf

        n_read = 1 if self._tree is None else len(self._tree.row.read)
        with self._readout.differences([n_rows], [n_read]) as head_rv, watching_routing() as routing:
            self.run_from(site.layer, n_rows, {site: shift})
        other_experts = self._experts.is_other(site.layer, routing, self._moved_places(n_rows), self.device)
        changed = routing_changed(self._feed_forward, site.layer, routing, self._read_places(n_rows), self.device)
        if self._tree is not None:
            log_p_rk, logit_rk = self._of_tree.changes(self._readout, head_rv[0].view(n_rows, n_read, -1)[1:])
            # Of targets of several tokens, what is compared is log p.
            compared_rk = log_p_rk if self.prompt.has_sequences else logit_rk
            return Changes(log_p_rk, compared_rk, changed, None, other_experts)
        read = self._readout.rows_read(self._baseline, head_rv[0][1:], self._target_ids)
        return Changes(read.log_p_rk, read.logit_rk, changed, None, other_experts)

    def _experts_at(self, site: Site, routing: Mapping[nn.Module, Routing]) -> tuple[Tensor, Tensor] | None:
        """Of a site of experts, those that each token of the pass chose, and those of which neurons are numbered."""
        experts = self._feed_forward.experts[site.layer]
        if not site.is_experts or experts is None:
            return None
        chosen_tk = routing[experts.module].expert_tk
        return chosen_tk, sent(torch.from_numpy(self._experts.experts[site.layer]), chosen_tk.device)

"""Interventions on single neurons: what a shift does to the targets' probabilities, for very many shifts at once.

For one prompt, a row of a batch is one (neuron, shift) of one layer. All rows start from the stored input of their
layer, so that the layers below never run again (`models/start_at_layer.py`); and up to its neurons the layer itself
runs once, because only there do rows begin to differ. Architectures whose layers cannot grow rows on the way (the
self-check finds out) run the whole layer for each row. Row 0 of every batch is not shifted: another batch shape alone
moves logits by more than a weak neuron does. Probabilities are never subtracted (`readout.py`).

Neurons of a layer's experts and of its MLP pass by at two *sites*. An intervention does not change which experts its
own layer chose; layers above may choose others, and each intervention says whether they did.

Axes: K targets, I interventions, R rows of a batch, M neurons of several sites, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neg_service.errors import DoesNotFit, NonFiniteError
from neg_service.measures.batching import in_parts, named
from neg_service.measures.gradients import signed_by
from neg_service.measures.readout import Readout
from neg_service.measures.routing import routing_of_rows, slots_of
from neg_service.memory import is_out_of_memory
from neg_service.models.batches import Budget, without_frames
from neg_service.models.engines.backward import target_gradients
from neg_service.models.engines.base import Rows
from neg_service.models.experts_function import Routing, watching_routing
from neg_service.models.feed_forward import Point, Site, hooks
from neg_service.models.language_model import LanguageModel
from neg_service.models.start_at_layer import flat, keep_inputs, start_at_layer
from neg_service.models.transfer import fetched, indices, sent
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.slots import Slots

Change = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Part:
    """Of one batch: Δ log p [R, K], whether its layer used other experts [], and whether layers above did [R]."""

    delta_rk: Tensor
    other_experts: Tensor
    routing_changed_r: Tensor | None


class Interventions:
    """One prompt, ready for interventions: layer inputs are stored, and the baseline output is known.

    probability_k: of each target without a shift [K], at least float32, on the model's device.
    activation: of each site's neurons at the readout position, on the layer's device; points: where they are.
    routing: the experts that the readout token used.
    """

    def __init__(self, model: LanguageModel, prompt: EncodedPrompt, basis: str, shared: Sequence[int] = ()) -> None:
        """Run the prompt once; `shared` are first tokens that it shares with others, and that run only once for all.

        Raises:
            NonFiniteError: NaN or infinity in the prompt's logits.
            DoesNotFit: the prompt alone does not fit.
            ModelError: the model fails its self-check, or does to its logits what no difference passes through.
        """
        self._who = named(prompt, model)
        self._feed_forward = model.feed_forward
        self.points: dict[Site, Point] = model.feed_forward.sites(basis)
        self._layers = model.feed_forward.layers
        self._readout = Readout(model)
        self._target_ids = list(prompt.target_ids)
        checked = model.ensure_checked().check
        self._late_expansion, self._starts_at_layers = checked.late_expansion, checked.starts_at_layers
        self.device = model.device
        with self.naming_memory("its tokens do"):
            self.rows: Rows = model.rows([prompt.ids], shared)
        captured: dict[Site, Tensor] = {}

        with torch.no_grad(), self.naming_memory("its tokens do"), ExitStack() as stack:
            self._inputs, self._output_structures = stack.enter_context(keep_inputs(self._layers))
            stack.enter_context(hooks(self.points, lambda site, x: captured.update({site: x})))
            routing = stack.enter_context(watching_routing())
            head_rv = stack.enter_context(self._readout.watching())
            logits_rv = self.rows.run([1])
        place = self.rows.positions([1])
        self._baseline = self._readout.baseline(head_rv[0][0], logits_rv[0], self._who)
        p_v = self._baseline.p_v
        self.probability_k = p_v[indices(self._target_ids, p_v.device)].to(self.device)
        self.activation = {
            site: point.neurons(flat(captured[site])[sent(place, captured[site].device)])[0]
            for site, point in self.points.items()
        }
        (self.routing,) = routing_of_rows(self._feed_forward, routing, place)

    @property
    def has_experts(self) -> bool:
        """Whether any layer has experts, so that a shift may change which ones run."""
        return self._feed_forward.has_experts

    def sites(self, layers: Sequence[int]) -> list[Site]:
        """Those of some layers."""
        wanted = set(layers)
        return [site for site in self.points if site.layer in wanted]

    def slots(self, sites: Sequence[Site]) -> Slots:
        """The neurons at some sites that act on the prompt, in the order in which their values stand."""
        return slots_of(self._feed_forward, self.routing, sites)

    def neurgrad(self, layers: Sequence[int], budget: Budget) -> Tensor:
        """NeurGrad [K, M] of the layers' neurons, over the same prefix; probability per unit of |activation|.

        M is that of `slots(sites(layers))`.

        Raises:
            NonFiniteError: NaN or infinity in a gradient.
            DoesNotFit: one target's gradients do not fit.
        """
        points = {site: self.points[site] for site in self.sites(layers)}

        def run(part: range) -> Tensor:
            found = target_gradients(self.rows, [self._target_ids[part.start : part.stop]], points)
            if self.has_experts:
                self._require_same_experts({n: self._other_experts(n, found.routing, found.place_r) for n in layers})
            signed = [
                signed_by(activation_kn, slope_kn).to(self.device, self.probability_k.dtype)
                for slope_kn, activation_kn in zip(found.gradient_srn, found.activation_srn, strict=True)
            ]
            return torch.cat(signed, 1)

        sizes, shares = self.rows.sizes, self.rows.targets_share_rows
        own, beside = (sizes.slopes, sizes.graph) if shares else (sizes.graph + sizes.slopes, 0)
        with self.naming_memory("the gradients of one of its targets do"):
            parts = [found for _, found in in_parts([own] * len(self._target_ids), run, budget, beside)]
        neurgrad_km = torch.cat(parts) * self.probability_k[:, None]
        if not neurgrad_km.isfinite().all():
            raise NonFiniteError(f"{self._who}: NaN or infinity in gradients; try another model.dtype")
        return neurgrad_km

    @contextmanager
    def naming_memory(self, what: str) -> Iterator[None]:
        """Let an error that says that memory ended name the prompt, and what does not fit (`its tokens do`).

        Raises:
            DoesNotFit: in the place of that error.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFit(
                f"{self._who}: {what} not fit into the memory of {self.device}: use a larger device or a shorter prompt"
            ) from without_frames(error)

    def delta_log_p(
        self, site: Site, neurons_i: Tensor, shifts_i: Tensor, budget: Budget
    ) -> tuple[Tensor, Tensor | None]:
        """Δ log p of every target [I, K] when neuron `neurons_i[i]` of a site is moved by `shifts_i[i]`.

        Beside it, whether a layer above chose other experts [I]; None of a model without experts. Neurons are counted
        from the site's first. `shifts_i` are added to the activation as they are; signs are the caller's business.
        Batches are filled evenly.

        Raises:
            DoesNotFit: one intervention beside the baseline row does not fit.
            NonFiniteError: NaN or infinity after an intervention.
        """

        def run(part: range) -> _Part:
            own = slice(part.start, part.stop)
            return self._run(site, neurons_i[own], shifts_i[own])

        size = self.rows.sizes.run
        with self.naming_memory("one intervention does"), self._without_waiting():
            # Beside the baseline row.
            parts = list(in_parts([size] * len(shifts_i), run, budget, size))
            found = [own.delta_rk for _, own in parts]
            # What a batch says of itself is asked for once, for all of them.
            is_other = torch.stack([own.other_experts for _, own in parts])
            is_read = torch.stack([own.isfinite().all() for own in found])
            is_other, is_read = fetched([is_other, is_read])
        self._require_same_experts({site.layer: is_other.any()})
        with self.naming_memory("one intervention does"):
            for place in (~is_read).nonzero()[:, 0].tolist():
                # The same batch again, so that it gives the same numbers.
                found[place] = run(parts[place][0]).delta_rk
        changed = [own.routing_changed_r for _, own in parts if own.routing_changed_r is not None]
        return torch.cat(found), torch.cat(changed) if changed else None

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
        stored = self._inputs[layer]
        if n_rows > 1:
            stored = self.rows.expand_rows(stored, n_rows)
        return start_at_layer(self._layers, layer, stored, self._output_structures)

    @torch.no_grad()
    def _run(self, site: Site, neurons_r: Tensor, shifts_r: Tensor) -> _Part:
        n_rows = len(shifts_r) + 1

        def shift(x_tf: Tensor, position_r: Tensor) -> Tensor:
            place = (position_r[1:], sent(neurons_r, x_tf.device))
            self.points[site].neurons(x_tf)[place] += sent(shifts_r, x_tf.device).to(x_tf.dtype)
            return x_tf

        with self._readout.differences([n_rows]) as head_rv, watching_routing() as routing:
            self.run_from(site.layer, n_rows, {site: shift})
        other_experts = self._other_experts(site.layer, routing, self.rows.positions([n_rows]))
        found = self._readout.delta_log_p(self._baseline, head_rv[0][1:], self._target_ids)
        return _Part(found, other_experts, self._routing_changed(site.layer, routing, n_rows))

    def _require_same_experts(self, other_experts: Mapping[int, Tensor]) -> None:
        """See that layers used the experts whose neurons are counted: in another batch rounding may choose others.

        Raises:
            NonFiniteError: a layer did not.
        """
        layers = list(other_experts)
        (is_other,) = fetched([torch.stack(list(other_experts.values()))])
        for place in is_other.nonzero()[:1, 0].tolist():
            raise NonFiniteError(
                f"{self._who}: rounding has layer {layers[place]} choose other experts in another batch; use "
                "model.dtype=float32"
            )

    def _other_experts(self, layer: int, routing: Mapping[nn.Module, Routing], position_r: Tensor) -> Tensor:
        """Whether a layer used other experts at some positions of a pass than those whose neurons are counted, []."""
        experts = self._feed_forward.experts[layer]
        if experts is None:
            return torch.zeros((), dtype=torch.bool, device=self.device)
        chosen_tk = routing[experts.module].expert_tk
        # Where rows grew behind the experts, these ran for one row alone.
        place_r = position_r if len(chosen_tk) > int(position_r[-1]) else position_r[:1]
        chosen_rk = chosen_tk[sent(place_r, chosen_tk.device)]
        expected_k = sent(torch.from_numpy(self.routing.of_layer(layer)), chosen_rk.device)
        return (chosen_rk != expected_k).any().to(self.device)

    def _routing_changed(self, layer: int, routing: Mapping[nn.Module, Routing], n_rows: int) -> Tensor | None:
        """Whether layers above chose other experts for a row than for the one that is not shifted [R - 1]."""
        if not self._feed_forward.has_experts:
            return None
        position_r = self.rows.positions([n_rows])
        changed = torch.zeros(n_rows - 1, dtype=torch.bool, device=self.device)
        for experts in self._feed_forward.experts[layer + 1 :]:
            if experts is not None:
                chosen = routing[experts.module].expert_tk
                chosen_rk = chosen[sent(position_r, chosen.device)]
                changed |= (chosen_rk[1:] != chosen_rk[:1]).any(-1).to(self.device)
        return changed

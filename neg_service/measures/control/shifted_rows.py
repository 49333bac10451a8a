"""Running a model with joint shifts of any neurons: logits, and gradients at the shifted neurons.

Each prompt is one row with a shift of its own, given for all neurons that act on it. Rows of many prompts run together,
over shared prefixes, as they do for gradients. Weights in low precision have no digits for that: there a row is its
difference from the one without a shift, where the engine has difference arithmetic, prompt by prompt.

A neuron of an expert is shifted where the shifted row's token still uses that expert.

Axes: B prompts of a batch, K tokens of a prompt that are differentiated, R rows of a batch, M neurons that act on a
prompt, N neurons of a site, k chosen experts, n neurons of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from neg_service.errors import NonFiniteError
from neg_service.layer_neurons import NO_EXPERT
from neg_service.measures.batches_of_gradients import columns_of_prompts
from neg_service.measures.batching import in_batches, named, naming_memory
from neg_service.measures.control.least_shift import Vector
from neg_service.measures.readout import Baseline, Readout
from neg_service.measures.routing import PromptRouting, routing_of_rows, slots_of
from neg_service.models.batches import Budget
from neg_service.models.engines.backward import target_gradients
from neg_service.models.engines.base import Engine
from neg_service.models.engines.difference_program import Differences, Shifts
from neg_service.models.experts_function import Routing, watching_routing
from neg_service.models.feed_forward import FeedForward, Point, Site, hooks
from neg_service.models.language_model import LanguageModel
from neg_service.models.start_at_layer import flat
from neg_service.models.transfer import fetched, sent
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.slots import Slots


@dataclass(frozen=True, eq=False)
class Shift:
    """A joint shift of one prompt's neurons: `shift_m[i]` is added to neuron i of `slots`."""

    slots: Slots
    shift_m: Vector


@dataclass(frozen=True)
class Slopes:
    """Of one prompt: d log p / d a of some tokens [K, M], activations [M], log p [V], in float64, and which neurons."""

    slope_km: Vector
    activation_m: Vector
    log_p_v: Tensor
    slots: Slots
    routing: PromptRouting


class ShiftedRows:
    """A model whose neurons of some layers are shifted and differentiated."""

    def __init__(self, model: LanguageModel, basis: str, layers: Sequence[int], budget: Budget) -> None:
        model.ensure_checked()
        self._model, self._basis, self._layers, self._budget = model, basis, list(layers), budget
        self._points: dict[Site, Point] = model.feed_forward.sites(basis, layers)
        is_low = model.dtype not in (torch.float32, torch.float64)
        self._by_differences = _ByDifferences(model, basis) if is_low and _has_differences(model) else None

    @property
    def one_at_a_time(self) -> bool:
        """Whether prompts had better be finished one after the other."""
        return self._by_differences is not None

    @property
    def n_vocabulary(self) -> int | None:
        """How many tokens a row's logits are of, where the model says it."""
        return self._model.n_output_ids

    @property
    def n_neurons(self) -> int:
        """How many neurons of the layers act on a prompt."""
        sizes = self._model.feed_forward.layer_neurons
        return sum(sizes[layer].n_slots for layer in self._layers)

    @property
    def epsilon(self) -> float:
        """The relative rounding of logits."""
        dtype = torch.float32 if self._by_differences else self._model.dtype
        return torch.finfo(dtype).eps

    @property
    def dtype(self) -> type[np.floating]:
        """The precision in which shifts are given: what a row is not rounded by."""
        return np.float64 if self._model.dtype == torch.float64 else np.float32

    def logits(self, prompts: Sequence[EncodedPrompt], shifts: Sequence[Shift | None]) -> list[Tensor]:
        """Logits [V] of each prompt's readout position with its shift, float64, on the CPU.

        Raises:
            DoesNotFit: a prompt does not fit even alone. NonFiniteError: NaN or infinity in its logits.
        """
        if self._by_differences:
            return [self._by_differences.logits(*own) for own in zip(prompts, shifts, strict=True)]

        def run(indices: Sequence[int], shared: tuple[int, ...]) -> list[Tensor]:
            own = [prompts[i] for i in indices]
            rows = self._model.rows([prompt.ids for prompt in own], shared)
            counts = [1] * len(own)
            with torch.no_grad(), self._shifting([shifts[i] for i in indices], rows.positions(counts)):
                (logits_bv,) = fetched([rows.run(counts)])
            self._require_finite(own, logits_bv)
            return list(logits_bv.double())

        found = dict(in_batches(self._model, prompts, [1] * len(prompts), run, self._budget))
        return [found[index] for index in range(len(prompts))]

    def slopes(
        self, prompts: Sequence[EncodedPrompt], tokens: Sequence[Sequence[int]], shifts: Sequence[Shift | None]
    ) -> list[Slopes]:
        """Gradients of log p of `tokens[b]` behind prompt b, at its neurons as they are with its shift.

        Raises:
            DoesNotFit: a prompt does not fit even alone. NonFiniteError: NaN or infinity in logits or gradients.
        """
        counts = [1 if self._model.engine.targets_share_rows else len(own) for own in tokens]

        def run(indices: Sequence[int], shared: tuple[int, ...]) -> list[Slopes]:
            return self._slopes([prompts[i] for i in indices], [tokens[i] for i in indices],
                                [shifts[i] for i in indices], shared)  # fmt: skip

        batches = in_batches(self._model, prompts, counts, run, self._budget, [len(own) for own in tokens])
        found = dict(batches)
        return [found[index] for index in range(len(prompts))]

    def _slopes(
        self, prompts: Sequence[EncodedPrompt], tokens: Sequence[Sequence[int]], shifts: Sequence[Shift | None],
        shared: tuple[int, ...],
    ) -> list[Slopes]:  # fmt: skip
        rows = self._model.rows([prompt.ids for prompt in prompts], shared)
        counts = [1 if rows.targets_share_rows else len(own) for own in tokens]
        repeated = [shift for shift, n in zip(shifts, counts, strict=True) for _ in range(n)]
        with self._shifting(repeated, rows.positions(counts)):
            found = target_gradients(rows, tokens, self._points)
        ends = np.cumsum([0, *map(len, tokens)]).tolist()
        first = torch.tensor(ends[:-1])
        routings = routing_of_rows(self._model.feed_forward, found.routing, found.place_r[first])
        device = found.log_p_rv.device
        slots = [slots_of(self._model.feed_forward, own.experts, self._points) for own in routings]
        columns = columns_of_prompts(self._points, [own.shape[1] for own in found.gradient_srn], slots)
        slope_rm, activation_bm, log_p_bv = fetched(
            [
                torch.cat([own.to(device) for own in found.gradient_srn], 1),
                torch.cat([own[sent(first, own.device)].to(device) for own in found.activation_srn], 1),
                found.log_p_rv[sent(first, device)],
            ]
        )
        self._require_finite(prompts, log_p_bv)
        self._require_finite([prompts[b] for b, own in enumerate(tokens) for _ in own], slope_rm)
        return [
            Slopes(
                slope_rm[start:end].double().numpy()[:, own],
                activation_bm[b].double().numpy()[own],
                log_p_bv[b].double(),
                slots[b],
                routings[b],
            )
            for b, (start, end) in enumerate(pairwise(ends))
            for own in [slice(None) if columns is None else columns[b]]
        ]

    def _require_finite(self, prompts: Sequence[EncodedPrompt], values_rx: Tensor) -> None:
        is_finite_r = values_rx.isfinite().all(-1)
        for prompt, is_finite in zip(prompts, is_finite_r.tolist(), strict=True):
            if not is_finite:
                who = named(prompt, self._model)
                raise NonFiniteError(f"{who}: NaN or infinity in logits or gradients; try another model.dtype")

    @contextmanager
    def _shifting(self, shifts: Sequence[Shift | None], position_r: Tensor) -> Iterator[None]:
        """Add each row's shift to its neurons, in all passes within."""
        if all(shift is None for shift in shifts):
            yield
            return
        feed_forward = self._model.feed_forward
        added = {
            site: _Added.of(site, point.size, shifts, feed_forward, self.dtype) for site, point in self._points.items()
        }
        moved = {site: point for site, point in self._points.items() if added[site].moves}
        with watching_routing() as routing:

            def add(site: Site, x: Tensor) -> Tensor:
                experts = feed_forward.experts[site.layer]
                chosen = routing[experts.module] if site.is_experts and experts is not None else None
                return added[site].to(x, moved[site], position_r, chosen)

            with hooks(moved, add):
                yield


@dataclass(frozen=True)
class _Added:
    """What is added at a site: [R, N] of an MLP; of experts [R, k, n], with the numbers of these experts [R, k]."""

    shift: Tensor
    expert_rk: Tensor | None = None

    @classmethod
    def of(
        cls, site: Site, size: int, shifts: Sequence[Shift | None], feed_forward: FeedForward, dtype: type[np.floating]
    ) -> _Added:
        """Of the shifts of all rows; `dtype`: to which they are rounded already."""
        numbers = feed_forward.numbers(site)
        n, k = len(numbers), size // len(numbers)
        shift_rkn = np.zeros((len(shifts), k, n), dtype)
        expert_rk = np.full((len(shifts), k), NO_EXPERT)
        for r, own in enumerate(shifts):
            if own is None:
                continue
            slots = own.slots
            is_own = (slots.layer == site.layer) & ((slots.expert >= 0) == site.is_experts)
            for place, group in enumerate(is_own.nonzero()[0].tolist()):
                of_group = own.shift_m[slots.start[group] : slots.start[group + 1]]
                shift_rkn[r, place] = of_group[numbers.start : numbers.stop]
                expert_rk[r, place] = slots.expert[group]
        if site.is_experts:
            return cls(torch.from_numpy(shift_rkn), torch.from_numpy(expert_rk))
        return cls(torch.from_numpy(shift_rkn[:, 0]))

    @property
    def moves(self) -> bool:
        """Whether any neuron is moved."""
        return bool(self.shift.any())

    def to(self, x: Tensor, point: Point, position_r: Tensor, chosen: Routing | None) -> Tensor:
        """A site's tensor with what is added at rows' positions."""
        changed = x.clone(memory_format=torch.contiguous_format)
        neurons_tn = point.neurons(flat(changed))
        place_r = sent(position_r, x.device)
        shift = sent(self.shift, x.device)
        if chosen is not None and self.expert_rk is not None:
            # Experts of a shifted row may be others, or stand elsewhere among them.
            is_same_rjk = chosen.expert_tk[place_r][:, :, None] == sent(self.expert_rk, x.device)[:, None, :]
            shift = torch.einsum("rjk,rkn->rjn", is_same_rjk.to(shift.dtype), shift).flatten(1)
        neurons_tn[place_r] = (neurons_tn[place_r].double() + shift).to(x.dtype)
        return changed


def _has_differences(model: LanguageModel) -> bool:
    return type(model.engine).differences is not Engine.differences


class _ByDifferences:
    """Logits of shifted rows by difference arithmetic; the last prompt's program is kept."""

    def __init__(self, model: LanguageModel, basis: str) -> None:
        self._model, self._points = model, model.feed_forward.sites(basis)
        self._readout = Readout(model)
        self._kept: tuple[tuple[int, ...], Differences, Baseline] | None = None

    @torch.no_grad()
    def logits(self, prompt: EncodedPrompt, shift: Shift | None) -> Tensor:
        """Of the readout position [V], float64."""
        with naming_memory(named(prompt, self._model), self._model.device, "its tokens do not fit",
                           "use a larger device or a shorter prompt"):  # fmt: skip
            differences, baseline = self._prepared(prompt)
            moved = {} if shift is None else self._moved(shift)
            if not moved:
                return baseline.logits_v.cpu()
            (hidden_re,) = differences.run(1, moved)
            delta_rv = self._readout.logits_moved(baseline, hidden_re, differences.product)
        logits_v = baseline.logits_v + delta_rv[0].double()
        if not logits_v.isfinite().all():
            raise NonFiniteError(f"{named(prompt, self._model)}: NaN or infinity in logits with a shift")
        return logits_v.cpu()

    def _prepared(self, prompt: EncodedPrompt) -> tuple[Differences, Baseline]:
        if self._kept is None or self._kept[0] != prompt.ids:
            self._kept = None
            differences = self._model.engine.differences([prompt.ids], (), self._points)
            assert differences is not None
            (head_v,), (logits_v,) = differences.head_bv, differences.logits_bv
            baseline = self._readout.baseline(head_v, logits_v, named(prompt, self._model))
            self._kept = (prompt.ids, differences, baseline)
        return self._kept[1:]

    def _moved(self, shift: Shift) -> dict[Site, Shifts]:
        """Of models without experts, which difference arithmetic does not take."""
        moved = {}
        start_of = dict(zip(shift.slots.layer.tolist(), shift.slots.start.tolist(), strict=False))
        for site in [own for own in self._points if own.layer in start_of]:
            numbers, start = self._model.feed_forward.numbers(site), start_of[site.layer]
            own_n = shift.shift_m[start + numbers.start : start + numbers.stop]
            (neuron_i,) = own_n.nonzero()
            if len(neuron_i):
                row_i = torch.zeros(len(neuron_i), dtype=torch.long)
                moved[site] = Shifts(row_i, torch.from_numpy(neuron_i), torch.from_numpy(own_n[neuron_i]))
        return moved

"""Differences of probabilities that are far smaller than the probabilities: the difference readout.

Two nearly equal probabilities, or logits, are never subtracted. The vocabulary head is linear, so it is given the
*difference* of the final hidden states, h_shifted - h_baseline, and gives differences of logits Δz. With r the most
probable token and d_j = Δz_j - Δz_r,

    Δ log p_t = d_t - log1p( Σ_{j≠r} p_j · expm1(d_j) )          Δp_t = p_t · expm1(Δ log p_t)

in float32 or better. One sum serves all targets. Taking r as the reference keeps it free of the one large term: for
t = r this is the exact form -log1p(Σ_{j≠t} ...), for any other t, p_t is at most 1/2 and nothing cancels by more than
a factor of two.

What a model does to its logits after the head is of two kinds. A constant factor passes through. A soft cap,
z -> c·tanh(z/c), does not, and the difference of capped logits is had without subtracting them either:

    c·tanh((z + Δ)/c) - c·tanh(z/c) = c·tanh(Δ/c) · (1 - tanh(z/c)·tanh((z + Δ)/c))

Anything else is refused.

Axes: A prompts that are read together, R rows of each, V vocabulary, K targets, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from neg_service.errors import ModelError, NonFiniteError
from neg_service.models.engines.self_check import LOGIT_TOLERANCE
from neg_service.models.language_model import LanguageModel
from neg_service.models.precision import at_least_float32
from neg_service.models.text_config import text_config
from neg_service.models.transfer import indices, sent

# On a CPU so many rows at a time, or so many tokens and values: they stay in the processor's cache.
_CPU_ROWS = 8
_CPU_TOKENS, _CPU_VALUES = 1024, 2**19

# What configurations call the cap c of logits that end as c·tanh(z/c).
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")
# A factor that is so close to one is one: its logits say so to a few digits fewer than they have. In low precision that
# is a share of what rounding does to one of them.
_NEARLY_ONE, _SHARE_OF_ROUNDING = 1e-5, 0.2


@dataclass(frozen=True)
class Baseline:
    """A prompt's output without any intervention.

    who: names the prompt in messages. logits_v, p_v: logits and probabilities of the vocabulary. reference: the most
    probable token. factor: from the head's output to logits, before a soft cap. uncapped_v: the logits before it.
    """

    who: str
    logits_v: Tensor
    p_v: Tensor
    reference: int
    factor: float
    uncapped_v: Tensor

    def to(self, dtype: torch.dtype) -> Baseline:
        """The same in another precision."""
        logits_v, p_v, uncapped_v = (own.to(dtype) for own in (self.logits_v, self.p_v, self.uncapped_v))
        return replace(self, logits_v=logits_v, p_v=p_v, uncapped_v=uncapped_v)


@dataclass(frozen=True)
class _Baselines:
    """Those of prompts that are read together, which share a model: fields as in `Baseline`, prompt by prompt."""

    own: tuple[Baseline, ...]
    p_av: Tensor
    uncapped_av: Tensor
    # From the head's output to logits: of one prompt a number, of several [A, 1, 1]; None where all are 1.
    factor: Tensor | float | None

    @classmethod
    def of(cls, own: Sequence[Baseline]) -> _Baselines:
        """Of one prompt nothing is copied."""
        factors = [x.factor for x in own]
        is_one = all(factor == 1 for factor in factors)
        if len(own) == 1:
            return cls(tuple(own), own[0].p_v[None], own[0].uncapped_v[None], None if is_one else factors[0])
        p_av, uncapped_av = (torch.stack(x) for x in zip(*((x.p_v, x.uncapped_v) for x in own), strict=True))
        factor = None if is_one else sent(torch.tensor(factors, dtype=p_av.dtype), p_av.device)[:, None, None]
        return cls(tuple(own), p_av, uncapped_av, factor)


class Read(NamedTuple):
    """What rows of differences say: Δ log p and Δz of the targets [R, K], and the root mean square of all Δz [R]."""

    log_p_rk: Tensor
    logit_rk: Tensor
    spread_r: Tensor


class Readout:
    """Reads a model's output as differences from a row without interventions."""

    def __init__(self, model: LanguageModel) -> None:
        head = model.model.get_output_embeddings()
        if head is None:
            raise ModelError(
                f"{type(model.model).__name__} names no vocabulary head: choose another model.source",
                change="model.source",
            )
        self._head: nn.Module = head
        self._name = type(model.model).__name__
        config = text_config(model.model.config)
        self._cap: float | None = next((own for own in (getattr(config, name, None) for name in _CAPS) if own), None)
        self._tolerance = LOGIT_TOLERANCE[model.dtype]
        self._reads_beyond = True
        self._nearly_one = max(_NEARLY_ONE, _SHARE_OF_ROUNDING * torch.finfo(model.dtype).eps)

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """Gives a list that receives the head's output [R, V] of each pass."""
        seen: list[Tensor] = []
        handle = self._head.register_forward_hook(lambda _m, _i, out: seen.append(out.reshape(-1, out.shape[-1])))
        try:
            yield seen
        finally:
            handle.remove()

    @contextmanager
    def differences(self, rows: Sequence[int], tokens: Sequence[int] | None = None) -> Iterator[list[Tensor]]:
        """The same, of passes whose rows come in groups of `rows[i]`; all but a group's first row are differences from
        it. tokens: how many are read of each row of a group, one if not given."""

        def subtract(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            changed = inputs[0].clone()
            flat = changed.view(-1, changed.shape[-1])
            start = 0
            for count, n in zip(rows, tokens or [1] * len(rows), strict=True):
                # Each token from the first row's at its place.
                own = flat[start : start + count * n].view(count, n, -1)
                own[1:] -= own[:1]
                start += count * n
            return (changed, *inputs[1:])

        handle = self._head.register_forward_pre_hook(subtract)
        try:
            with self.watching() as seen:
                yield seen
        finally:
            handle.remove()

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Leave what float32's exponential does not hold NaN or infinite, for the caller to read again without this.

        Otherwise a device is asked after each batch whether there is any, which has it run out of work.
        """
        self._reads_beyond = False
        try:
            yield
        finally:
            self._reads_beyond = True

    def baseline(self, head_v: Tensor, logits_v: Tensor, who: str) -> Baseline:
        """What the differences of a prompt refer to, from the head's output and the model's logits for it.

        Raises:
            NonFiniteError: NaN or infinity in the logits; `who` names the prompt.
            ModelError: logits that are neither a multiple of the head's output nor a soft cap of it.
        """
        # The head may lie on another device than that to which a model brings its logits.
        head_v, logits_v = at_least_float32(head_v), at_least_float32(logits_v.to(head_v.device))
        if not logits_v.isfinite().all():
            raise NonFiniteError(f"{who}: NaN or infinity in logits; try another model.dtype")
        factor = self._factor(head_v, logits_v)
        uncapped_v = head_v * factor
        expected_v = uncapped_v if self._cap is None else self._cap * torch.tanh(uncapped_v / self._cap)
        if not (expected_v - logits_v).abs().max() <= self._tolerance * logits_v.abs().max():
            raise ModelError(
                f"{self._name} does something to its logits after the head that is neither a factor nor a soft "
                "cap; differences cannot be read: choose another model.source",
                change="model.source",
            )
        if logits_v.dtype != expected_v.dtype:
            # Some models (Nemotron-H) round logits to float32 whatever their precision.
            logits_v = expected_v
        return Baseline(
            who=who,
            logits_v=logits_v,
            # In float32 the sum over the vocabulary would lose its many small terms; see `models/head.py`.
            p_v=logits_v.double().softmax(-1).to(logits_v.dtype),
            reference=int(logits_v.argmax()),
            factor=factor,
            uncapped_v=uncapped_v,
        )

    def _factor(self, head_v: Tensor, logits_v: Tensor) -> float:
        """From the head's output to logits, before a soft cap, as the logits say that no cap has flattened."""
        wanted_v = logits_v
        if self._cap is not None:
            inside_v = logits_v.double() / self._cap
            wanted_v = self._cap * torch.atanh(torch.where(inside_v.abs() <= 0.5, inside_v, 0))
        # Of all of them, so that what low precision rounds averages out. Where nothing is to be had of it, the
        # comparison that follows tells.
        given_v = torch.where(wanted_v == 0, 0, head_v.double())
        factor = float(given_v @ wanted_v.double() / (given_v @ given_v))
        return factor if math.isfinite(factor) and abs(factor - 1) > self._nearly_one else 1.0

    def delta_log_p(self, baseline: Baseline, difference_rv: Tensor, target_ids: Sequence[int]) -> Tensor:
        """Δ log p of the targets [R, K]; see `rows_read`."""
        return self.rows_read(baseline, difference_rv, target_ids).log_p_rk

    def rows_read(self, baseline: Baseline, difference_rv: Tensor, target_ids: Sequence[int]) -> Read:
        """What rows of differences of the head's output say [R, V]; may take its bias off them.

        Raises:
            NonFiniteError: NaN or infinity after an intervention.
        """
        bias = getattr(self._head, "bias", None)
        if bias is not None:
            # The head added it to the differences too. What rounding that leaves is far below that of the layers.
            difference_rv = at_least_float32(difference_rv).sub_(bias)
        # On a CPU a few rows at a time: they stay in the processor's cache from step to step.
        at_once = _CPU_ROWS if difference_rv.device.type == "cpu" else max(1, len(difference_rv))
        whole = [slice(0, difference_rv.shape[1])]

        baselines = _Baselines.of([baseline])

        def read(part_rv: Tensor) -> Read:
            (found,) = self._read(baselines, lambda own: part_rv[None, :, own], whole, [target_ids])
            return found

        parts = [read(part_rv) for part_rv in torch.split(difference_rv, at_once)]
        return Read(*(torch.cat(own) for own in zip(*parts, strict=True)))

    def differences_read(
        self, baselines: Sequence[Baseline], hidden_are: Tensor, product: Callable[[Tensor, Tensor], Tensor],
        target_ids: Sequence[Sequence[int]],
    ) -> list[Read]:  # fmt: skip
        """What differences of the hidden states that the head reads say [A, R, E], prompt by prompt.

        product: of hidden states with some rows of the head's weight; on a CPU of so few that what it gives is read
        before it leaves the processor's cache.

        Raises:
            NonFiniteError: NaN or infinity after an intervention.
        """
        weight_ve = self._head.get_parameter("weight")
        n = len(weight_ve)
        n_rows = hidden_are.shape[0] * hidden_are.shape[1]
        at_once = max(_CPU_TOKENS, _CPU_VALUES // n_rows) if hidden_are.device.type == "cpu" else n
        parts = [slice(start, min(start + at_once, n)) for start in range(0, n, at_once)]
        known = _Baselines.of(baselines)
        return self._read(known, lambda own: product(hidden_are, weight_ve[own]), parts, target_ids)

    def logits_moved(
        self, baseline: Baseline, hidden_re: Tensor, product: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """What differences of the hidden states that the head reads move logits by [R, V]; see `differences_read`."""
        known, delta_arv = _Baselines.of([baseline]), product(hidden_re, self._head.get_parameter("weight"))[None]
        return self._logits(known, delta_arv, slice(None))[0]

    def _read(
        self, baselines: _Baselines, at: Callable[[slice | Tensor], Tensor], parts: Sequence[slice],
        target_ids: Sequence[Sequence[int]],
    ) -> list[Read]:  # fmt: skip
        """The same of what `at` gives of the head's output at some tokens [A, R, tokens]; parts: all tokens."""
        references = [own.reference for own in baselines.own]
        asked = [[reference, *own] for reference, own in zip(references, target_ids, strict=True)]
        few = indices([token for own in asked for token in own], baselines.p_av.device)
        few_arx = self._logits(baselines, at(few), few)
        few_ark = [own[a] for a, own in enumerate(torch.split(few_arx, [len(own) for own in asked], -1))]
        reference_ar1 = torch.stack([own_rk[:, :1] for own_rk in few_ark])
        rests, squares = [], []
        for part in parts:
            delta_arv = self._logits(baselines, at(part), part)
            squares.append(torch.linalg.vector_norm(delta_arv, dim=-1).square())
            relative_arv = delta_arv - reference_ar1
            for a, reference in enumerate(references):
                if part.start <= reference < part.stop:
                    # Exactly, however another product rounds it.
                    relative_arv[a, :, reference - part.start] = 0
            # By sums of sums: a product with p adds the whole vocabulary up one by one, which costs digits (`head.py`).
            rests.append(relative_arv.expm1_().mul_(baselines.p_av[:, None, part]).sum(-1))
        rest_ar, square_ar = torch.stack(rests).sum(0), torch.stack(squares).sum(0)
        found = []
        for a, own_rk in enumerate(few_ark):
            log_p_rk = own_rk[:, 1:] - own_rk[:, :1] - rest_ar[a].log1p()[:, None]
            is_beyond_r = ~log_p_rk.isfinite().all(1)
            if self._reads_beyond and is_beyond_r.any():
                log_p_rk[is_beyond_r] = self._read_beyond(baselines, a, is_beyond_r, at, parts, target_ids[a])
            found.append(Read(log_p_rk, own_rk[:, 1:], (square_ar[a] / baselines.p_av.shape[1]).sqrt()))
        return found

    def _read_beyond(
        self, baselines: _Baselines, a: int, is_beyond_r: Tensor, at: Callable[[slice | Tensor], Tensor],
        parts: Sequence[slice], target_ids: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """Δ log p of a prompt's rows where a logit moved by more than float32's exponential holds: nothing is nearly
        equal, so it may be subtracted.

        Raises:
            NonFiniteError: NaN or infinity after an intervention.
        """
        own = baselines.own[a]
        alone = _Baselines.of([own])
        delta_rv = torch.cat([self._logits(alone, at(part)[a : a + 1, is_beyond_r], part)[0] for part in parts], 1)
        after_rv = (own.logits_v + delta_rv).log_softmax(-1)
        found_rk: Tensor = (after_rv - own.logits_v.log_softmax(-1))[:, list(target_ids)]
        if not found_rk.isfinite().all():
            raise NonFiniteError(f"{own.who}: NaN or infinity in logits after an intervention")
        return found_rk

    def _logits(self, baselines: _Baselines, difference_arv: Tensor, tokens: slice | Tensor) -> Tensor:
        """Differences of logits of some tokens, from those of the head's output."""
        delta_arv = at_least_float32(difference_arv)
        if baselines.factor is not None:
            delta_arv = delta_arv * baselines.factor
        if self._cap is None:
            return delta_arv
        before_a1v = baselines.uncapped_av[:, None, tokens]
        after_arv = torch.tanh((before_a1v + delta_arv) / self._cap)
        slope_arv = 1 - torch.tanh(before_a1v / self._cap) * after_arv
        return torch.tanh(delta_arv / self._cap).mul_(self._cap).mul_(slope_arv)

"""Differences of attention over a frozen prefix: the pass with which a row is traced.

A row's query, key and value differ from those of the row without a shift by dq, dk, dv; the prefix is the same. With s
the scores of that row, p their softmax, o what it gives, and S keys, of which the last is its own,

    ds_j = scaling·dq·k_j, and of its own key  scaling·(dq·k + (q + dq)·dk)
    e = expm1(ds),  m = Σ_j p_j·e_j
    do = (Σ_j p_j·e_j·(v_j - o) + p_S·(1 + e_S)·dv) / (1 + m)

Soft caps are differenced as tanh is; keys that a window hides are left out; a sink is one more p whose ds is zero.
Several prompts are as many more heads: each has its own keys, of which p is zero where another has more.

Axes: B prompts, A of them that run, R rows of a prompt, H query heads and G key/value heads, of a prompt or of all,
N = H/G, X = N·R, S keys, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from neg_service.models.engines import difference_functions as functions
from neg_service.models.engines.base import MismatchError
from neg_service.models.engines.difference_program import Batch
from neg_service.models.engines.difference_trace import Trace
from neg_service.models.engines.prefix_attention import FrozenPrefix, RowPass, View
from neg_service.models.precision import float32_as_asked
from neg_service.models.transfer import indices

# Exponentials of differences are kept below this power of e.
_MOST = 60.0


class TracedPass:
    """Attention of the traced row of each prompt: to the shared prefix, to its own, and to itself."""

    def __init__(self, trace: Trace, prefix: FrozenPrefix) -> None:
        self._trace, self._prefix = trace, prefix
        # It knows what windows and chunks hide.
        self._plain = RowPass(prefix, [1] * trace.prompts)
        self._known: dict[Any, list[tuple[Tensor | None, Tensor | None]]] = {}

    def attend(self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], view: View) -> Tensor:
        """The attention output [1, B·R, H, D] of one layer."""
        query, key, value = (self._trace.wrapped(x) for x in qkv)
        n_rows, rows = self._trace.rows, [x.row for x in (query, key, value)]
        if any(x.ndim != 4 or len(x) != 1 or x.shape[2] != n_rows for x in (query, key, value)):
            raise MismatchError(f"attention is given rows as {tuple(query.shape)}, which has no rule for differences")
        row = self._plain.attend(layer, (rows[0], rows[1], rows[2]), view)
        with float32_as_asked():
            own = _Attention(_Attended.of(rows, *self._of_prefix(layer, view, rows[1]), view), view, self._trace.dtype)
        shape = (1, n_rows, *row.shape[2:])
        slot = self._trace.step(own, query, key, value)
        return self._trace.made(row, slot, shape, query.dtype)

    def _of_prefix(self, layer: int, view: View, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values [G, T, D] that each prompt's row sees, of the shared prefix and of its own."""
        shared, own = self._prefix.shared, self._prefix.keys_bgtd.get(layer)
        # Of prompts of one token there is nothing.
        nothing = like.new_zeros(like.shape[1], 0, 0)
        keys, values = [], []
        for b, (seen_shared, seen_own) in enumerate(self._seen(view, like.device)):
            parts: list[tuple[Tensor, Tensor]] = []
            if shared.ids:
                parts.append((_at(shared.keys_gcd[layer], seen_shared), _at(shared.values_gcd[layer], seen_shared)))
            if own is not None:
                own_values = self._prefix.values_bgtd[layer][b]
                parts.append((_at(own[b], seen_own), _at(own_values, seen_own)))
            keys.append(torch.cat([known for known, _ in parts], 1) if parts else nothing)
            values.append(torch.cat([known for _, known in parts], 1) if parts else nothing)
        return keys, values

    def _seen(self, view: View, device: torch.device) -> list[tuple[Tensor | None, Tensor | None]]:
        """Which keys each prompt's row sees, of the shared prefix and of its own; None: all.

        Asked of the device once for all layers of a kind.
        """
        key = (view.window, view.chunk, device)
        if key not in self._known:
            hidden = self._plain.hidden_keys(view, device)
            by_part = [
                [None] * self._trace.prompts if own is None else [(~row).nonzero()[:, 0] for row in own]
                for own in hidden
            ]
            self._known[key] = list(zip(*by_part, strict=True))
        return self._known[key]


def _at(x_gtd: Tensor, places: Tensor | None) -> Tensor:
    return x_gtd if places is None else x_gtd.index_select(1, places)


@dataclass(frozen=True)
class _Attended:
    """One layer's attention of prompts' rows without a shift, each prompt's heads behind the other's.

    query_gnd, keys_gsd, values_gsd: the last key is the row's own. is_empty_gs: where a prompt has no key, None if all
    have as many; all G of one prompt are alike. sink_gn1: of each query head, None without.
    """

    query_gnd: Tensor
    keys_gsd: Tensor
    values_gsd: Tensor
    is_empty_gs: Tensor | None
    sink_gn1: Tensor | None
    n_prompts: int

    @classmethod
    def of(cls, rows: list[Tensor], keys: list[Tensor], values: list[Tensor], view: View) -> _Attended:
        """Of query, key and value [1, heads, B, D], and of what each prompt's row sees before itself [G, T, D]."""
        n_prompts, g = len(keys), rows[1].shape[1]
        query, key_gd, value_gd = (x[0].transpose(0, 1).flatten(0, 1) for x in rows)
        longest = max(known.shape[1] for known in keys)
        keys_gsd, values_gsd = (
            torch.cat([torch.cat([_padded(x, longest, own_gd) for x in known]), own_gd[:, None]], 1)
            for known, own_gd in ((keys, key_gd), (values, value_gd))
        )
        empty = [longest - known.shape[1] for known in keys for _ in range(g)]
        is_empty_gs = None
        if any(empty):
            is_empty_gs = torch.arange(longest + 1, device=query.device) < indices(empty, query.device)[:, None]
        query_gnd = query.view(n_prompts * g, -1, query.shape[-1])
        sinks = None
        if view.sinks is not None:
            sinks = view.sinks.detach().view(g, -1, 1).to(query.dtype).repeat(n_prompts, 1, 1)
        return cls(query_gnd, keys_gsd, values_gsd, is_empty_gs, sinks, n_prompts)


def _padded(known_gtd: Tensor, longest: int, like_gd: Tensor) -> Tensor:
    """With zeros before, so that the row's own key comes last for all prompts."""
    if not known_gtd.shape[1]:
        return known_gtd.new_zeros(len(known_gtd), longest, like_gd.shape[-1])
    return nn.functional.pad(known_gtd, (0, 0, longest - known_gtd.shape[1], 0))


class _Attention:
    """One layer's attention of rows without a shift, as a step."""

    def __init__(self, attended: _Attended, view: View, dtype: torch.dtype) -> None:
        self._all = tuple(range(attended.n_prompts))
        # Of all, and of those of the last call that was of some.
        self._weighed = {self._all: _Weighed.of(attended, view, dtype)}

    def __call__(self, batch: Batch, *given: Tensor | None) -> Tensor:
        """do [1, A·R, H, D] of dq [1, H, A·R, D], dk and dv [1, G, A·R, D], each None where it is zero."""
        if batch.prompts not in self._weighed:
            every = self._weighed[self._all]
            self._weighed = {self._all: every, batch.prompts: every.some(batch.prompts, len(self._all))}
        apart = (None if d is None else self._by_heads(d, batch) for d in given)
        found_hrd = self._weighed[batch.prompts].difference(batch.rows, *apart)
        if len(batch.prompts) == 1:
            return found_hrd[None].transpose(1, 2)
        return torch.unflatten(found_hrd, 0, (len(batch.prompts), -1)).transpose(1, 2).flatten(0, 1)[None]

    def _by_heads(self, d: Tensor, batch: Batch) -> Tensor:
        """[A·H, R, D] of [1, H, A·R, D]."""
        if len(batch.prompts) == 1:
            return d[0]
        return torch.unflatten(d[0], 1, (len(batch.prompts), batch.rows)).transpose(0, 1).flatten(0, 1)


@dataclass(frozen=True)
class _Weighed:
    """What differences of attention need to know, of some prompts, in the precision of differences.

    p_gns: the softmax of scores; inside_gns: scores over the soft cap, in float64, None without one; p_sink_gn1: what
    goes to the sink, None without one. Values less the output are worked out anew in each pass: they would take the
    memory of all query heads' values.
    """

    query_gnd: Tensor
    keys_gsd: Tensor
    values_gsd: Tensor
    out_gnd: Tensor
    p_gns: Tensor
    p_sink_gn1: Tensor | None
    inside_gns: Tensor | None
    scaling: float
    cap: float | None

    @classmethod
    def of(cls, attended: _Attended, view: View, dtype: torch.dtype) -> _Weighed:
        """Of rows and keys in float64."""
        score_gns = attended.query_gnd @ attended.keys_gsd.mT * view.scaling
        inside_gns = None
        if view.softcap is not None:
            inside_gns = score_gns / view.softcap
            score_gns = torch.tanh(inside_gns) * view.softcap
        if attended.is_empty_gs is not None:
            score_gns = score_gns.masked_fill(attended.is_empty_gs[:, None], float("-inf"))
        p_sink_gn1 = None
        if attended.sink_gn1 is None:
            p_gns = score_gns.softmax(-1)
        else:
            p_gns = torch.cat([score_gns, attended.sink_gn1], -1).softmax(-1)
            p_sink_gn1, p_gns = p_gns[..., -1:].to(dtype), p_gns[..., :-1]
        out_gnd = p_gns @ attended.values_gsd
        query, keys, values, out, p = (
            own.to(dtype) for own in (attended.query_gnd, attended.keys_gsd, attended.values_gsd, out_gnd, p_gns)
        )
        return cls(query, keys, values, out, p, p_sink_gn1, inside_gns, view.scaling, view.softcap)

    def some(self, prompts: tuple[int, ...], n_prompts: int) -> _Weighed:
        """Of some of the prompts."""
        at = indices(prompts, self.p_gns.device)
        changed: dict[str, Any] = {}
        for name in (own.name for own in fields(self)):
            if isinstance(x := getattr(self, name), Tensor):
                changed[name] = torch.unflatten(x, 0, (n_prompts, -1))[at].flatten(0, 1)
        return replace(self, **changed)

    @cached_property
    def _capped(self) -> functions.Difference | None:
        return None if self.inside_gns is None else functions.tanh(self.inside_gns[:, :, None], self.p_gns.dtype)

    def difference(self, n_rows: int, d_query: Tensor | None, d_key: Tensor | None, d_value: Tensor | None) -> Tensor:
        """do [H, R, D] of dq [H, R, D], dk and dv [G, R, D], heads of all prompts, each None where it is zero."""
        g, n = self.p_gns.shape[:2]
        if d_query is None and d_key is None:
            e_gnrs = None
        else:
            ds_gnrs = self._score_differences(n_rows, d_query, d_key)
            if self._capped is not None and self.cap is not None:
                ds_gnrs = self._capped(ds_gnrs / self.cap).mul_(self.cap)
            top = (ds_gnrs.amax(-1, keepdim=True) - _MOST).clamp_(min=0)
            e_gnrs = ds_gnrs.sub_(top).expm1_()
        own = self.p_gns[:, :, None, -1:]
        if e_gnrs is None:
            assert d_value is not None
            return (own * d_value.unsqueeze(1)).reshape(g * n, n_rows, -1)
        s = e_gnrs.shape[-1]
        # [G, N, S, D+1]: each value less the output, times its p; and p itself, for m.
        weighted = self.p_gns[..., None] * (self.values_gsd[:, None] - self.out_gnd[:, :, None])
        weighted = torch.cat([weighted, self.p_gns[..., None]], -1)
        found = torch.bmm(e_gnrs.reshape(g * n, n_rows, s), weighted.view(g * n, s, -1)).view(g, n, n_rows, -1)
        above, total = found[..., :-1], 1 + found[..., -1:]
        if self.p_sink_gn1 is not None:
            total = total + self.p_sink_gn1[:, :, None] * torch.expm1(-top)
            above = above - (self.p_sink_gn1[:, :, None] * torch.expm1(-top)) * self.out_gnd[:, :, None]
        if d_value is not None:
            above = above + own * (1 + e_gnrs[..., -1:]) * d_value.unsqueeze(1)
        return (above / total).view(g * n, n_rows, -1)

    def _score_differences(self, n_rows: int, d_query: Tensor | None, d_key: Tensor | None) -> Tensor:
        """ds [G, N, R, S], before a soft cap."""
        g, n = self.p_gns.shape[:2]
        query_gn1d = self.query_gnd[:, :, None]
        if d_query is None:
            ds_gnrs = self.keys_gsd.new_zeros(g, n, n_rows, self.p_gns.shape[-1])
        else:
            keys_gds = (self.keys_gsd * self.scaling).mT
            ds_gxs = torch.bmm(d_query.reshape(g, n * n_rows, -1), keys_gds)
            ds_gnrs = ds_gxs.view(g, n, n_rows, -1)
        if d_key is not None:
            after = query_gn1d if d_query is None else query_gn1d + d_query.view(g, n, n_rows, -1)
            ds_gnrs[..., -1] += (after * d_key.unsqueeze(1)).sum(-1) * self.scaling
        return ds_gnrs

"""Differences of attention over a frozen prefix: the pass with which a row is traced.

A row's query, key and value differ from those of the row without a shift by dq, dk, dv; the prefix is the same. With s
the scores of that row, p their softmax, o what it gives, and S keys, of which the last is its own,

    ds_j = scaling·dq·k_j, and of its own key  scaling·(dq·k + (q + dq)·dk)
    e = expm1(ds),  m = Σ_j p_j·e_j
    do = (Σ_j p_j·e_j·(v_j - o) + p_S·(1 + e_S)·dv) / (1 + m)

Soft caps are differenced as tanh is; keys that a window hides are left out; a sink is one more p whose ds is zero.

Axes: R rows, H query heads, G key/value heads, X = H/G·R, S keys, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neg_service.models.engines import difference_functions as functions
from neg_service.models.engines.base import MismatchError
from neg_service.models.engines.difference_trace import Trace
from neg_service.models.engines.prefix_attention import FrozenPrefix, RowPass, View
from neg_service.models.precision import float32_as_asked

# Exponentials of differences are kept below this power of e.
_MOST = 60.0


class TracedPass:
    """Attention of one prompt's traced row: to the shared prefix, to its own, and to itself."""

    def __init__(self, trace: Trace, prefix: FrozenPrefix) -> None:
        self._trace, self._prefix = trace, prefix
        # It knows what windows and chunks hide.
        self._plain = RowPass(prefix, [1])

    def attend(self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], view: View) -> Tensor:
        """The attention output [1, R, H, D] of one layer."""
        query, key, value = (self._trace.wrapped(x) for x in qkv)
        n_rows, rows = self._trace.rows, [x.row for x in (query, key, value)]
        if any(x.ndim != 4 or len(x) != 1 or x.shape[2] != n_rows for x in (query, key, value)):
            raise MismatchError(f"attention is given rows as {tuple(query.shape)}, which has no rule for differences")
        row = self._plain.attend(layer, (rows[0], rows[1], rows[2]), view)
        with float32_as_asked():
            own = _Attention(rows, *self._of_prefix(layer, view, rows[1]), view, self._trace.dtype)
        shape = (1, n_rows, *row.shape[2:])
        slot = self._trace.step(own.difference, query, key, value)
        return self._trace.made(row, slot, shape, query.dtype)

    def _of_prefix(self, layer: int, view: View, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values [G, T, D] that the row sees, of the shared prefix and of its own."""
        shared, own = self._prefix.shared, self._prefix.keys_bgtd.get(layer)
        keys, values = [], []
        for known, hidden in zip(
            (
                (shared.keys_gcd[layer], shared.values_gcd[layer]) if shared.ids else None,
                None if own is None else (own[0], self._prefix.values_bgtd[layer][0]),
            ),
            self._plain.hidden_keys(view, like.device),
            strict=True,
        ):
            if known is None:
                continue
            # What is hidden stands before all that is seen.
            first = 0 if hidden is None else int(hidden.sum())
            if hidden is not None and bool(hidden[0, first:].any()):
                raise MismatchError("attention that hides keys between others has no rule for differences")
            keys.append(known[0][:, first:])
            values.append(known[1][:, first:])
        return keys, values


class _Attention:
    """One layer's attention of the row without a shift: what its differences need to know.

    Values less the output are worked out anew in each pass: they would take the memory of all query heads' values.
    """

    def __init__(
        self, rows: list[Tensor], keys: list[Tensor], values: list[Tensor], view: View, dtype: torch.dtype
    ) -> None:
        self._scaling, self._cap = view.scaling, view.softcap
        query, key_gd, value_gd = (x[0, :, 0] for x in rows)
        keys_gsd, values_gsd = (
            torch.cat([*known, own[:, None]], 1) for known, own in ((keys, key_gd), (values, value_gd))
        )
        self._g, self._n = len(key_gd), len(query) // len(key_gd)
        query_gnd = query.view(self._g, self._n, -1)
        score_gns = query_gnd @ keys_gsd.mT * view.scaling
        self._capped = None
        if view.softcap is not None:
            self._capped = functions.tanh((score_gns / view.softcap)[:, :, None], dtype)
            score_gns = torch.tanh(score_gns / view.softcap) * view.softcap
        self._p_sink = None
        if view.sinks is None:
            p_gns = score_gns.softmax(-1)
        else:
            sink_gn1 = view.sinks.detach().view(self._g, self._n, 1).to(score_gns.dtype)
            p_gns = torch.cat([score_gns, sink_gn1], -1).softmax(-1)
            self._p_sink = p_gns[..., -1:].to(dtype)
            p_gns = p_gns[..., :-1]
        out_gnd = p_gns @ values_gsd
        self._keys_gsd, self._values_gsd, self._query_gnd, self._p_gns, self._out_gnd = (
            own.to(dtype) for own in (keys_gsd, values_gsd, query_gnd, p_gns, out_gnd)
        )

    def difference(self, n_rows: int, d_query: Tensor | None, d_key: Tensor | None, d_value: Tensor | None) -> Tensor:
        """do [1, R, H, D] of dq [1, H, R, D], dk and dv [1, G, R, D], each None where it is zero."""
        g, n = self._g, self._n
        if d_query is None and d_key is None:
            e_gnrs = None
        else:
            ds_gnrs = self._score_differences(n_rows, d_query, d_key)
            if self._capped is not None and self._cap is not None:
                ds_gnrs = self._capped(ds_gnrs / self._cap).mul_(self._cap)
            top = (ds_gnrs.amax(-1, keepdim=True) - _MOST).clamp_(min=0)
            e_gnrs = ds_gnrs.sub_(top).expm1_()
        own = self._p_gns[:, :, None, -1:]
        if e_gnrs is None:
            assert d_value is not None
            do_gnrd = own * d_value[0].unsqueeze(1)
            return do_gnrd.reshape(1, g * n, n_rows, -1).transpose(1, 2)
        s = e_gnrs.shape[-1]
        # [G, N, S, D+1]: each value less the output, times its p; and p itself, for m.
        weighted = self._p_gns[..., None] * (self._values_gsd[:, None] - self._out_gnd[:, :, None])
        weighted = torch.cat([weighted, self._p_gns[..., None]], -1)
        found = torch.bmm(e_gnrs.reshape(g * n, n_rows, s), weighted.view(g * n, s, -1)).view(g, n, n_rows, -1)
        above, total = found[..., :-1], 1 + found[..., -1:]
        if self._p_sink is not None:
            total = total + self._p_sink[:, :, None] * torch.expm1(-top)
            above = above - (self._p_sink[:, :, None] * torch.expm1(-top)) * self._out_gnd[:, :, None]
        if d_value is not None:
            above = above + own * (1 + e_gnrs[..., -1:]) * d_value[0].unsqueeze(1)
        return (above / total).view(1, g * n, n_rows, -1).transpose(1, 2)

    def _score_differences(self, n_rows: int, d_query: Tensor | None, d_key: Tensor | None) -> Tensor:
        """ds [G, N, R, S], before a soft cap."""
        g, n = self._g, self._n
        query_gn1d = self._query_gnd[:, :, None]
        if d_query is None:
            ds_gnrs = self._keys_gsd.new_zeros(g, n, n_rows, self._p_gns.shape[-1])
        else:
            keys_gds = (self._keys_gsd * self._scaling).mT
            ds_gxs = torch.bmm(d_query[0].reshape(g, n * n_rows, -1), keys_gds)
            ds_gnrs = ds_gxs.view(g, n, n_rows, -1)
        if d_key is not None:
            after = query_gn1d if d_query is None else query_gn1d + d_query[0].view(g, n, n_rows, -1)
            ds_gnrs[..., -1] += (after * d_key[0].unsqueeze(1)).sum(-1) * self._scaling
        return ds_gnrs

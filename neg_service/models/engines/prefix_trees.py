"""Rows of several tokens behind a frozen prefix: trees of a prompt's last token and of what its targets begin with.

As `prefix_attention.py`, whose prefixes these rows attend to; each token attends to its prompt's prefix, to the tokens
of its own row from which it descends, and to itself. How far it stands behind the prefix, its depth, decides its
position, what a window shows of the prefix and of its row, and which chunk it is in.

Equal rows of one prompt travel as a batch [J, S]: their tokens' positions are those of one row, so that one row may
become more on its way through the layers. Rows of several prompts, or unequal ones, travel packed [1, M], so that no
linear layer sees padding. For attention both become a grid [B, J, S].

Axes: B prompts, J rows of a prompt (the most), S tokens of a row (the most), M tokens in all, T longest own prefix,
C shared tokens, H query heads, G key/value heads, N = H/G, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neg_service.models.engines.base import LoadedModel, Row, RowSizes
from neg_service.models.engines.prefix_attention import FrozenPrefix, View, packed, running, softcapped
from neg_service.models.engines.trees import rows_of, starts_of
from neg_service.models.head import exact_head_gradient
from neg_service.models.precision import at_least_float32
from neg_service.models.transfer import indices, sent


class _Grid:
    """Between the tokens of rows, one behind the other, and a grid [B, J, S], padded where rows are unequal.

    What rows look like is known of one row each prompt or of all: along J there may be 1 for any number.
    """

    def __init__(self, rows: Sequence[Sequence[Row]], *, grows: bool) -> None:
        self.b, self.s = len(rows), max(len(row.ids) for own in rows for row in own)
        self.j = max(map(len, rows))
        # Equal rows of one prompt may be any number.
        self._grows = grows
        lengths = [len(row.ids) for own in rows for row in own]
        starts = [(b * self.j + j) * self.s for b, own in enumerate(rows) for j in range(len(own))]
        self._is_full = grows or len(lengths) * self.s == sum(lengths) == self.b * self.j * self.s
        self._slots_m = torch.cat([torch.arange(n) + start for n, start in zip(lengths, starts, strict=True)])
        seen = [1 if grows or len(own) == 1 else self.j for own in rows]
        self.depth_bjs = torch.zeros(self.b, max(seen), self.s, dtype=torch.long)
        # Padding sees itself, so that its softmax is a number.
        self.sees_bjss = torch.eye(self.s, dtype=torch.bool).repeat(self.b, max(seen), 1, 1)
        for b, own in enumerate(rows):
            for j, row in enumerate(own[: max(seen)]):
                for place, (parent, depth) in enumerate(zip(row.parents, row.depths, strict=True)):
                    self.depth_bjs[b, j, place] = depth
                    if parent >= 0:
                        self.sees_bjss[b, j, place] |= self.sees_bjss[b, j, parent]

    def padded(self, x_xhyd: Tensor) -> Tensor:
        """[B, J, S, H, D] of heads' vectors as a model hands them on [X, H, Y, D]."""
        x_mhd = x_xhyd.transpose(1, 2).reshape(-1, x_xhyd.shape[1], x_xhyd.shape[3])
        if not self._is_full:
            self._slots_m = self._slots_on(x_mhd.device)
            empty = x_mhd.new_zeros(self.b * self.j * self.s, *x_mhd.shape[1:])
            x_mhd = empty.index_copy(0, self._slots_m, x_mhd)
        return x_mhd.reshape(self.b, -1, self.s, *x_mhd.shape[1:])

    def unpadded(self, x_bjshd: Tensor, n_batch: int) -> Tensor:
        """What attention gives [X, Y, H, D], with X the batch as it came."""
        x_mhd = x_bjshd.reshape(-1, *x_bjshd.shape[3:])
        if not self._is_full:
            x_mhd = x_mhd[self._slots_on(x_mhd.device)]
        # Some code (JetMoE) takes its memory to be in this order.
        return x_mhd.reshape(n_batch, -1, *x_mhd.shape[1:]).contiguous()

    def _slots_on(self, device: torch.device) -> Tensor:
        return self._slots_m if self._slots_m.device == device else sent(self._slots_m, device)


class TreePass:
    """Attention of rows of several tokens: to the shared prefix, to their prompt's own prefix, and to their row."""

    def __init__(self, prefix: FrozenPrefix, grid: _Grid) -> None:
        self.prefix, self.grid = prefix, grid
        self._hidden: dict[tuple[int | None, int | None, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def attend(self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], view: View) -> Tensor:
        q, k, v = (self.grid.padded(x) for x in qkv)
        b, j, s, h, d = q.shape
        g = k.shape[3]
        # [B, G, N·J·S, D]: the query heads that share a key/value head become one axis of queries.
        q_bgxd = (q * view.scaling).reshape(b, j, s, g, h // g, d).permute(0, 3, 4, 1, 2, 5).reshape(b, g, -1, d)
        shared_hidden, own_hidden, row_hidden = self._hidden_keys(view, q.device)

        def masked(score_bgxt: Tensor, hidden_bjst: Tensor) -> Tensor:
            score = softcapped(score_bgxt, view.softcap).view(b, g, h // g, j, s, -1)
            return score.masked_fill(hidden_bjst[:, None, None], float("-inf")).view(b, g, -1, score.shape[-1])

        scores: list[Tensor] = []
        values: list[Tensor] = []
        if self.prefix.shared.ids:
            q_gyd = q_bgxd.transpose(0, 1).reshape(g, -1, d)
            score_gyc = q_gyd @ self.prefix.shared.keys_gcd[layer].transpose(1, 2)
            score_bgxc = score_gyc.view(g, b, -1, score_gyc.shape[-1]).transpose(0, 1)
            scores.append(masked(score_bgxc.contiguous(), shared_hidden))
            values.append(self.prefix.shared.values_gcd[layer].expand(b, -1, -1, -1))
        if layer in self.prefix.keys_bgtd:
            scores.append(masked(q_bgxd @ self.prefix.keys_bgtd[layer].transpose(2, 3), own_hidden))
            values.append(self.prefix.values_bgtd[layer])
        k_bgjsd, v_bgjsd = (x.permute(0, 3, 1, 2, 4)[:, :, None] for x in (k, v))
        row = q_bgxd.view(b, g, h // g, j, s, d) @ k_bgjsd.transpose(-1, -2)
        scores.append(masked(row.reshape(b, g, -1, s), row_hidden))
        if view.sinks is not None:
            sinks_gn = view.sinks.view(1, g, h // g, 1, 1).expand(b, -1, -1, j, s)
            scores.append(sinks_gn.reshape(b, g, -1, 1).to(q.dtype))

        weights = at_least_float32(torch.cat(scores, -1)).softmax(-1).to(q.dtype)
        parts = torch.split(weights, [score.shape[-1] for score in scores], -1)
        *prefix_weights, row_weight = parts if view.sinks is None else parts[:-1]
        out_bgxd = (row_weight.view(b, g, h // g, j, s, s) @ v_bgjsd).reshape(b, g, -1, v.shape[-1])
        for weight_bgxt, value_bgtd in zip(prefix_weights, values, strict=True):
            out_bgxd = out_bgxd + weight_bgxt @ value_bgtd
        out = out_bgxd.view(b, g, h // g, j, s, -1).permute(0, 3, 4, 1, 2, 5).reshape(b, j, s, h, -1)
        return self.grid.unpadded(out, len(qkv[0]))

    def _hidden_keys(self, view: View, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Shared keys [B, J, S, C], own keys [B, J, S, T] and keys of the row [B, J, S, S] that tokens may not see."""
        window, chunk = view.window, view.chunk
        if (window, chunk, device) not in self._hidden:
            c = len(self.prefix.shared.ids)
            length_b = indices(self.prefix.own_lengths, device)
            depth_bjs, sees_bjss = (sent(x, device) for x in (self.grid.depth_bjs, self.grid.sees_bjss))
            at_bjs1 = (c + length_b[:, None, None] + depth_bjs)[..., None]
            t = torch.arange(max(self.prefix.own_lengths), device=device)
            own = (t >= length_b[:, None]).expand(*depth_bjs.shape[1:], -1, -1).permute(2, 0, 1, 3)
            keys = [torch.arange(c, device=device), c + t, at_bjs1.squeeze(-1)[:, :, None]]
            hidden = [torch.zeros((), dtype=torch.bool, device=device), own, ~sees_bjss]
            for i, key in enumerate(keys):
                if window is not None:
                    hidden[i] = hidden[i] | (at_bjs1 - key >= window)
                if chunk is not None:
                    hidden[i] = hidden[i] | (at_bjs1 // chunk != key // chunk)
            shared, own, row = hidden
            self._hidden[window, chunk, device] = shared.expand(*depth_bjs.shape, c), own, row
        return self._hidden[window, chunk, device]


class SharedPrefixTrees:
    """Rows of several tokens over a frozen prefix; see `TreeRows`."""

    targets_share_rows = False

    def __init__(self, model: LoadedModel, prefix: FrozenPrefix, rows: Sequence[Sequence[Row]]) -> None:
        self._model, self._rows = model, [list(own) for own in rows]
        self.prefix = prefix
        self.tokens = max(len(row.ids) for own in rows for row in own)
        self.sizes = tree_sizes(model, 1 + len(prefix.shared.ids) + max(prefix.own_lengths), self.tokens)

    def with_rows(self, rows: Sequence[Sequence[Row]]) -> SharedPrefixTrees:
        """See `TreeRows`."""
        return SharedPrefixTrees(self._model, self.prefix, rows)

    def run(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`."""
        module, c, rows = self._model.module, len(self.prefix.shared.ids), rows_of(self._rows, counts)
        grows = self._grows
        ids = [[token for row in own for token in row.ids] for own in rows]
        positions = [
            [at for row in own for at in row.positions(c + n)]
            for own, n in zip(rows, self.prefix.own_lengths, strict=True)
        ]
        inputs: dict[str, Any] = packed(module, ids, positions)
        if grows:
            for name in ("input_ids", "position_ids"):
                inputs[name] = inputs[name].view(len(rows[0]), -1)
        tree_pass = TreePass(self.prefix, _Grid(self._rows if grows else rows, grows=grows))
        with running(module, tree_pass), self._model.own_experts(), exact_head_gradient(module):
            logits: Tensor = module(**inputs).logits
        return logits.flatten(0, -2)

    def positions(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`."""
        return starts_of([len(row.ids) for own in rows_of(self._rows, counts) for row in own])

    def copies(self, counts: Sequence[int]) -> Tensor:
        """See `TreeRows`."""
        return self.positions(counts)[:, None]

    def each_positions(self, counts: Sequence[int]) -> Tensor:
        """See `TreeRows`."""
        rows = [row for own in rows_of(self._rows, counts) for row in own]
        place_r1, token = self.positions(counts)[:, None], torch.arange(self.tokens)
        return torch.where(token < torch.tensor([[len(row.ids)] for row in rows]), place_r1 + token, -1)

    def read_positions(self, counts: Sequence[int]) -> Tensor:
        """See `TreeRows`."""
        return torch.arange(sum(len(row.ids) for own in rows_of(self._rows, counts) for row in own))

    def expand_rows(self, x: Tensor, n_rows: int) -> Tensor:
        """See `Rows`."""
        return x.expand(n_rows, *x.shape[1:]) if x.ndim > 2 else x.repeat(n_rows, 1)

    @property
    def _grows(self) -> bool:
        return len(self._rows) == 1 == len(self._rows[0])


def tree_sizes(model: LoadedModel, attended: int, tokens: int) -> RowSizes:
    """What a row of some tokens takes, each of which is read: at the most as much as so many rows of one token."""
    one = model.row_sizes(1, attended + tokens)
    return RowSizes(one.run * tokens, one.graph * tokens, one.slopes * tokens, one.slope * tokens)

"""Rows of several prompts in one pass that begins at a layer; what they do there is the caller's business.

As `Interventions.run_from` has it of one prompt: each prompt runs once, in a row of its own, and leaves its layers'
inputs, behind which as many rows of each prompt begin as are asked for.

Axes: B prompts, J rows of each, N neurons of a site, F features, Q tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neg_service.measures.interventions import Change, Interventions
from neg_service.measures.prepared_prompt import RanOnce
from neg_service.measures.readout import Readout
from neg_service.models.engines.base import Ids, Rows
from neg_service.models.feed_forward import Site, hooks
from neg_service.models.language_model import LanguageModel
from neg_service.models.start_at_layer import flat, keep_inputs, start_at_layer
from neg_service.models.transfer import sent
from neg_service.prompts.prompt import EncodedPrompt


def rows_join(model: LanguageModel, prompt: EncodedPrompt) -> bool:
    """Whether a prompt's rows may run with others': those of one token, where passes may begin at a layer."""
    found = model.ensure_checked()
    is_plain = not prompt.is_tree and not model.feed_forward.has_experts
    return is_plain and found.engine.expands_together and found.check.starts_at_layers


@dataclass(frozen=True)
class _Passes:
    """What passes of several prompts need: their layers and rows, and each layer's input and what else it gives."""

    layers: nn.ModuleList
    rows: Rows
    inputs: list[Tensor]
    structures: list[Any]


class RowsTogether:
    """Prompts that have run once; `members`: each of them. Of one alone any that can be shifted."""

    def __init__(self, members: Sequence[Interventions], passes: _Passes | None = None) -> None:
        """See `of`."""
        self.members = list(members)
        self.points = members[0].points
        self._passes = passes

    @classmethod
    def of(cls, model: LanguageModel, prompts: Sequence[EncodedPrompt], basis: str, shared: Ids = ()) -> RowsTogether:
        """Prompts in one pass; `shared` are first tokens that all have.

        Raises:
            NonFiniteError: NaN or infinity in a prompt's logits. What the allocator says: they do not fit together.
        """
        if len(prompts) == 1:
            return cls([Interventions(model, prompts[0], basis, shared, by_rows=True)])
        rows, points = model.rows([prompt.ids for prompt in prompts], shared), model.feed_forward.sites(basis)
        counts, captured = [1] * len(prompts), dict[Site, Tensor]()
        with torch.no_grad(), ExitStack() as stack:
            inputs, structures = stack.enter_context(keep_inputs(model.feed_forward.layers))
            stack.enter_context(hooks(points, lambda site, x: captured.update({site: x})))
            head_bv = stack.enter_context(Readout(model).watching())
            logits_bv = rows.run(counts)
        place_b = rows.positions(counts)
        activation = {
            site: point.neurons(flat(captured[site])[sent(place_b, captured[site].device)])
            for site, point in points.items()
        }
        ran = RanOnce(head_bv[0], logits_bv, activation)
        members = [
            Interventions(model, prompt, basis, shared, by_rows=True, ran=(ran, place))
            for place, prompt in enumerate(prompts)
        ]
        return cls(members, _Passes(model.feed_forward.layers, rows, inputs, structures))

    def activation(self, site: Site) -> Tensor:
        """Of a site's neurons at each prompt's readout position [B, N]."""
        return torch.stack([own.activation[site] for own in self.members])

    def run_from(self, layer: int, n_rows: int, changes: Mapping[Site, Change]) -> Tensor:
        """As `Interventions.run_from`, with `n_rows` of each prompt, prompt by prompt: logits [B·J·S, V]."""
        passes = self._passes
        if passes is None:
            return self.members[0].run_from(layer, n_rows, changes)
        counts = [n_rows] * len(self.members)
        place_rq = passes.rows.positions(counts)[:, None]

        def change_copy(site: Site, x: Tensor) -> Tensor:
            copied = x.clone()
            return changes[site](flat(copied), sent(place_rq, x.device)).view_as(copied)

        starting: AbstractContextManager[None] = nullcontext()
        if layer:
            stored = passes.rows.expand_rows(passes.inputs[layer], n_rows)
            starting = start_at_layer(passes.layers, layer, stored, passes.structures)
        with starting, hooks({site: self.points[site] for site in changes}, change_copy):
            return passes.rows.run(counts)

"""The engine of difference arithmetic: each row is carried as its exact difference from the row without a shift.

A weak neuron moves a hidden state by less than float32 rounds it to, so that rows which are computed and then
subtracted have few digits in common with the truth. Here a row is its difference all the way: nothing nearly equal is
subtracted, and what rounding there is is relative to the difference. NEG is a few hundred times more exact than by
rows in float32, and with weights in bfloat16 it is as exact as with float32. The row without a shift is computed in
float64, whatever the model's precision: its errors would be the same in all rows.

This is for interventions on single neurons. Gradients, joint edits and all else run as in `shared_prefix.py`, of which
this engine is a kind. Prompts are traced, one or several together (`difference_trace.py`); the program that this leaves
(`difference_program.py`) runs for any number of rows of each.

Axes: B prompts, R rows, E hidden size, N neurons of a site, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neg_service.models.engines.base import Engine, Ids, KeptPrefixes, LoadedModel, MismatchError
from neg_service.models.engines.difference_attention import TracedPass
from neg_service.models.engines.difference_products import product_of
from neg_service.models.engines.difference_program import Differences
from neg_service.models.engines.difference_rules import RULES
from neg_service.models.engines.difference_trace import Trace, Traced, primes_for
from neg_service.models.engines.prefix_attention import FrozenPrefix, SharedPrefix, packed, running
from neg_service.models.engines.shared_prefix import SharedPrefixEngine, run_prefix, run_shared_prefix
from neg_service.models.experts import is_experts
from neg_service.models.feed_forward import Point, Site, hooks
from neg_service.models.precision import in_precision


class DifferencesEngine(SharedPrefixEngine):
    """Interventions by difference arithmetic; all else as in its base."""

    name = "differences"
    row_is = "the last token's difference from the row without a shift, over a prefix that all rows share"
    refines: ClassVar[type[Engine] | None] = SharedPrefixEngine

    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model)
        self._product = product_of(model.products)
        self._weights_dtype = model.dtype
        # In float64, in which rows without a shift are computed.
        self._precise_prefixes: KeptPrefixes[SharedPrefix] = KeptPrefixes()
        self._traced_rows = primes_for(size for own in model.module.parameters() for size in own.shape)

    @classmethod
    def refusal(cls, model: PreTrainedModel) -> str | None:
        """See `Engine`."""
        if any(map(is_experts, model.modules())):
            return "has experts: which ones run may differ from row to row"
        if not isinstance(model.get_output_embeddings(), nn.Linear):
            return "has a vocabulary head that is no plain product"
        return super().refusal(model)

    def forget(self) -> None:
        """See `Engine`."""
        super().forget()
        self._precise_prefixes.forget()

    @torch.no_grad()
    def differences(self, prompts: Sequence[Ids], shared: Ids, points: Mapping[Site, Point]) -> Differences:
        """See `Engine`."""
        if self.model.dtype == torch.float64:
            return self._traced(run_prefix(self.model, prompts, self.shared_prefix(shared)), points, torch.float64)
        with in_precision(self.model.module, self.model.feed_forward.layers, torch.float64):
            known = self._precise_prefixes.of(shared, lambda ids: run_shared_prefix(self.model, ids))
            return self._traced(run_prefix(self.model, prompts, known), points, torch.float32)

    def differences_bytes(self, n_tokens: int, shared: int) -> int:
        """See `Engine`: its prefix runs in float64; keys and values, those that are shared too, are each prompt's own;
        and of its row is kept what a graph would keep, in float64 and in the precision of differences."""
        model, row = self.model, self.row_sizes(n_tokens)
        frozen = model.frozen_bytes(n_tokens - shared, n_tokens) + model.frozen_bytes(n_tokens, 1)
        return 2 * frozen + 3 * (row.graph + row.run)

    def _traced(self, prefix: FrozenPrefix, points: Mapping[Site, Point], dtype: torch.dtype) -> Differences:
        module, head = self.model.module, self.model.module.get_output_embeddings()
        n_prompts, n_shared = len(prefix.last_ids), len(prefix.shared.ids)
        trace = Trace(RULES, self._traced_rows, self._product, self._weights_dtype, dtype, n_prompts)
        outputs: list[Tensor] = []
        ends: list[int | None] = []

        def end(_head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
            hidden = trace.wrapped(inputs[0])
            ends.append(hidden.slot)
            return (hidden.row,)

        handles = (
            module.get_input_embeddings().register_forward_hook(lambda _m, _i, found: trace.wrapped(found)),
            head.register_forward_pre_hook(end, prepend=True),
            head.register_forward_hook(lambda _m, _i, found: outputs.append(found.reshape(n_prompts, -1))),
        )
        ids = [[prefix.last_ids[b]] for b in trace.prompt_of]
        positions = [[n_shared + prefix.own_lengths[b]] for b in trace.prompt_of]
        try:
            with (
                hooks(points, lambda site, x: trace.site(site, points[site], x)),
                running(module, TracedPass(trace, prefix)),
            ):
                logits = module(**packed(module, ids, positions)).logits
            if len(ends) != 1 or isinstance(logits, Traced) or logits.numel() != outputs[0].numel():
                raise MismatchError("its vocabulary head is no module that reads the hidden states once")
            program = trace.finish(ends[0])
        finally:
            trace.let_go()
            for handle in handles:
                handle.remove()
        sites = program.sites
        if sites.keys() != points.keys():
            raise MismatchError("its neurons do not pass by in a pass of differences")
        activation = {site: point.neurons(sites[site].row) for site, point in points.items()}
        return Differences(outputs[0], logits.reshape(n_prompts, -1), activation, program, head, self._product)

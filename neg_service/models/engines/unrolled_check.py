"""Proof that a model whose layers were unrolled (`repeated_layers.py`) computes what it was loaded to compute.

Another version of its code may run its layers in another order, or another number of times: the neurons of a layer
would then be those of another run, which no other comparison sees, for all of them are of the unrolled model.
"""

from __future__ import annotations

from contextlib import ExitStack

from neg_service.models.engines.base import LoadedModel
from neg_service.models.engines.comparisons import check_ids, deviation_of, plain_logits
from neg_service.models.repeated_layers import as_loaded


def runs_otherwise(model: LoadedModel, tolerance: float) -> str | None:
    """What an unrolled model does otherwise than the one that was loaded; None of any other model.

    Each layer has to run once, in the order of the list, and logits have to be the same.
    """
    ids = check_ids(model)
    with as_loaded(model.module) as is_unrolled:
        if not is_unrolled:
            return None
        expected = plain_logits(model, ids)
    ran: list[int] = []
    layers = model.feed_forward.layers
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            handle = layer.register_forward_hook(lambda *_, own=number: ran.append(own))
            stack.callback(handle.remove)
        found = plain_logits(model, ids)
    if ran != list(range(len(layers))):
        return f"its code does not run {len(layers)} layers one behind the other, of which the same ones come again"
    off = deviation_of(found, expected)
    return None if off <= tolerance else f"with a layer for each run its logits are {off:.1e} off"

"""Attention that chooses experts, too (JetMoE): each token's queries and outputs are made by those that a router chose.

They are no feed-forward neurons, and are not measured. But a shift of a neuron may have attention in the layers above
choose others, and the curve breaks there as it does at the experts of an MLP: what these routers choose is seen as
routing, and counts in `routing_changed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from neg_service.models.experts_function import choice_of_jetmoe, note_routing

_CLASS = "JetMoeMoA"


def attention_routers(layer: nn.Module) -> tuple[nn.Module, ...]:
    """What chooses the experts of a layer's attention, if it has some."""
    return tuple(part.get_submodule("router") for part in layer.modules() if type(part).__name__ == _CLASS)


@contextmanager
def noting_attention(routers: Iterable[nn.Module]) -> Iterator[None]:
    """Let what these routers choose be seen by those who watch routing; the hooks are gone on leaving."""

    def note(router: nn.Module, _inputs: Any, routed: tuple[Any, ...]) -> None:
        expert_tk, weight_tk = choice_of_jetmoe(routed)
        expert_tk, order = expert_tk.sort(-1)
        note_routing(router, expert_tk, weight_tk.gather(-1, order), is_attention=True)

    with ExitStack() as stack:
        for router in routers:
            stack.callback(router.register_forward_hook(note).remove)
        yield

"""An MLP of a layer: the names inside it, and where its neurons of a basis pass by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from neg_service.models.hook_points import HookPoint
from neg_service.models.layouts import Function, Layout, n_neurons_of


@dataclass(frozen=True)
class Mlp:
    """The MLP of a layer, with the names inside it and how many neurons it has.

    within: its layer, where other layers have the same modules. added: see `Layout`.
    """

    module: nn.Module
    layout: Layout
    n_neurons: int
    within: nn.Module | None = None
    added: nn.Module | None = None

    def point(self, basis: str) -> HookPoint:
        """Where its neurons of a basis are."""
        layout = self.layout
        if basis == "gate":
            assert layout.act is not None
            return self._output(layout.act)
        if basis == "hidden" or not layout.is_gated:
            down = self.module.get_submodule(layout.norm or layout.down)
            return HookPoint(down, "input", 0, self.n_neurons, self.within)
        point = self._output(layout.up, self.n_neurons if layout.fused else 0)
        return replace(point, added=self.added)

    def activated(self) -> tuple[HookPoint, Function]:
        """Where the activated values are, of a gate or of plain neurons, or what they are made of, and how."""
        if self.layout.act is not None:
            return self._output(self.layout.act), lambda x: x
        assert self.layout.function is not None
        return self._output(self.layout.gate or self.layout.up), self.layout.function

    @property
    def is_gated(self) -> bool:
        """Whether it has a gate."""
        return self.layout.is_gated

    @property
    def offers_gate(self) -> bool:
        """Whether this gate's activation can be seen and replaced."""
        return self.layout.is_gated and self.layout.act is not None

    @property
    def parts(self) -> list[nn.Module]:
        """The modules at which its neurons can be seen."""
        return [self.module.get_submodule(name) for name in self.layout.names]

    def _output(self, name: str, start: int = 0) -> HookPoint:
        return HookPoint(self.module.get_submodule(name), "output", start, self.n_neurons, self.within)


def mlp_of(module: nn.Module, layout: Layout, layer: int) -> Mlp:
    """A module as an MLP of a layer."""
    added = None
    if layout.added is not None:
        # By the model's own table: which of them is the layer's.
        places: Any = module.layer_dic
        added = module.get_submodule(f"{layout.added}.{places[layer]}")
    return Mlp(module, layout, n_neurons_of(module, layout), added=added)

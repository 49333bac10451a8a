"""Where the neurons of a layer's MLP pass by in a pass of a model, and how they are seen and replaced there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Visit = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class HookPoint:
    """A slice of the last axis of a module's input or output.

    within: of a module that several layers share, the layer during which alone it counts.
    added: a module whose output the model adds to this one's, right behind it; the neurons are in the sum.
    """

    module: nn.Module
    side: Literal["input", "output"]
    start: int
    size: int
    within: nn.Module | None = None
    added: nn.Module | None = None

    def neurons(self, x: Tensor) -> Tensor:
        """The neurons [..., N] within the tensor that passes by."""
        return x[..., self.start : self.start + self.size]

    def register(self, visit: Visit) -> Callable[[], None]:
        """Let `visit` see the whole tensor, and replace it, whenever it passes by; gives what takes it back."""
        stack = ExitStack()
        runs = _running(self.within, stack)

        def on_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            changed = visit(inputs[0]) if runs() else None
            return None if changed is None else (changed, *inputs[1:])

        def on_output(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            # Some modules (I-BERT) give more than the tensor.
            rest = output[1:] if isinstance(output, tuple) else None
            changed = visit(output if rest is None else output[0]) if runs() else None
            return changed if changed is None or rest is None else (changed, *rest)

        if self.side == "input":
            stack.callback(self.module.register_forward_pre_hook(on_input).remove)
        elif self.added is None:
            stack.callback(self.module.register_forward_hook(on_output).remove)
        else:
            _register_sum(self.module, self.added, visit, runs, stack)
        return stack.close


def _running(layer: nn.Module | None, stack: ExitStack) -> Callable[[], bool]:
    """Whether a layer runs just now; without one it is always so."""
    if layer is None:
        return lambda: True
    inside: list[None] = []
    stack.callback(layer.register_forward_pre_hook(lambda *_: inside.append(None)).remove)
    # Also when the layer raises.
    stack.callback(layer.register_forward_hook(lambda *_: inside.clear(), always_call=True).remove)
    return lambda: bool(inside)


def _register_sum(
    first: nn.Module, second: nn.Module, visit: Visit, runs: Callable[[], bool], stack: ExitStack
) -> None:
    """Visit the sum of two modules' outputs: the first gives zeros, and the second the whole sum, to the bit."""
    kept: list[Tensor] = []

    def on_first(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        if not runs():
            return None
        kept[:] = [output]
        return output.new_zeros(())

    def on_second(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        if not kept:
            return None
        whole = kept.pop() + output
        changed = visit(whole)
        return whole if changed is None else changed

    stack.callback(first.register_forward_hook(on_first).remove)
    stack.callback(second.register_forward_hook(on_second).remove)

"""How MLPs are made: one table from the names inside an MLP to what its neurons are made of.

A new architecture is a row of `LAYOUTS`. A row fits where all of its names are there *and* the sizes are: the up
projection gives what the down projection takes, or twice as much where it gives the gate too. So a plain row does not
take a fused MLP of the same names (Moshi's `fc1` against Phi's), which would be neurons of a wrong tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """Names of the modules inside an MLP, or inside the layer where that has no module `mlp`.

    act: the activation's module; function: what is computed in its place where it is no module.
    fused: one projection gives gate and up, in this order.
    added: a list of modules of which a layer's own adds to what the up projection gives.
    norm: what stands between the neurons and the down projection.
    """

    up: str
    down: str
    act: str | None = None
    gate: str | None = None
    fused: bool = False
    function: Function | None = None
    added: str | None = None
    norm: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All modules that it asks for."""
        return tuple(name for name in (self.gate, self.up, self.act, self.added, self.norm, self.down) if name)

    @property
    def is_gated(self) -> bool:
        """Whether a gate multiplies what the up projection gives."""
        return self.gate is not None or self.fused


# Of two rows that fit, the first is taken: it asks for more.
LAYOUTS = (
    Layout(gate="gate_proj", up="up_proj", act="act_fn", norm="ffn_sub_norm", down="down_proj"),  # BitNet
    Layout(gate="gate_proj", up="up_proj", act="act_fn", down="down_proj"),  # Llama, Qwen, Mistral, Gemma, OLMo, ...
    Layout(gate="gate_proj", up="up_proj", act="activation_fn", down="down_proj"),  # Llama 4
    Layout(up="input_linear", act="activation", down="output_linear", fused=True),  # Granite MoE, shared
    Layout(up="gate_up_proj", act="activation_fn", down="down_proj", fused=True),  # Phi-3 and 4, GLM-4
    # Zamba 2, whose layers share all but these.
    Layout(up="gate_up_proj", act="act_fn", down="down_proj", fused=True, added="gate_up_proj_adapter_list"),
    Layout(up="fc1", act="activation_fn", down="fc2", fused=True),  # Moshi
    Layout(up="Wi", act="act", down="Wo", fused=True),  # ModernBERT
    Layout(gate="w1", up="w3", down="w2", function=silu),  # LFM2, LFM3
    Layout(gate="proj_up_gate", up="proj_up", act="act_fn", down="proj_down"),  # xLSTM
    Layout(up="up_proj", act="act_fn", down="down_proj"),  # Nemotron, Nemotron-H, Arcee, Apertus
    Layout(up="c_fc", act="act", down="c_proj"),  # GPT, GPT-2, GPT-Neo, StarCoder
    Layout(up="fc_in", act="act", down="fc_out"),  # GPT-J, CodeGen
    Layout(up="dense_h_to_4h", act="act", down="dense_4h_to_h"),  # GPT-NeoX (Pythia), Falcon
    Layout(up="dense_h_to_4h", act="gelu_impl", down="dense_4h_to_h"),  # BLOOM
    Layout(up="fc1", act="activation_fn", down="fc2"),  # Phi; in the layer itself: OPT, BART and their like
    Layout(up="ffn.0", act="ffn.1", down="ffn.2"),  # CTRL
    Layout(up="ffn.up_proj", act="ffn.act", down="ffn.down_proj"),  # MPT
    # BERT, RoBERTa, XLM-R, ELECTRA, DeBERTa, I-BERT.
    Layout(up="intermediate.dense", act="intermediate.intermediate_act_fn", down="output.dense"),
    Layout(up="intermediate.dense", down="output.dense", function=gelu),  # ESM
    Layout(up="ffn.lin1", act="ffn.activation", down="ffn.lin2"),  # DistilBERT
    Layout(up="ffn", act="activation", down="ffn_output"),  # ALBERT, in the layer itself
)
# Those that a module by itself may have, wherever in a layer it is.
_OF_A_MODULE = tuple(row for row in LAYOUTS if not any("." in name for name in row.names))


def layout_of(module: nn.Module, *, is_whole: bool = True) -> Layout | None:
    """The row that fits a module, if one does; `is_whole`: it may also be a layer that has the parts of its MLP."""
    return next((row for row in (LAYOUTS if is_whole else _OF_A_MODULE) if _fits(module, row)), None)


def n_neurons_of(module: nn.Module, layout: Layout) -> int:
    """How many neurons an MLP has: what its down projection takes."""
    return _sizes(module.get_submodule(layout.down))[0]


def _fits(module: nn.Module, layout: Layout) -> bool:
    own = dict(module.named_modules())
    if not all(name in own for name in layout.names):
        return False
    (_, given), (taken, _) = _sizes(own[layout.up]), _sizes(own[layout.down])
    return given == (2 * taken if layout.fused else taken)


def _sizes(projection: nn.Module) -> tuple[int, int]:
    """How many values a projection takes and gives."""
    # Quantised ones have their own classes, and weights of other shapes, but say so likewise.
    taken, given = (getattr(projection, name, None) for name in ("in_features", "out_features"))
    if taken and given:
        return int(taken), int(given)
    # GPT-2's Conv1D keeps its weight transposed and names only its output size.
    weight = getattr(projection, "weight", None)
    return (weight.shape[0], weight.shape[1]) if isinstance(weight, Tensor) and weight.ndim == 2 else (0, -1)

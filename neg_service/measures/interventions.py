"""Interventions on single neurons: what a shift does to the targets' probabilities, for very many shifts at once.

For one prompt, a row of a batch is one (neuron, shift) of one layer; all rows are branches of the last token over the
prompt's frozen prefix, and start from the stored input of their layer, so that the layers below never run again. Row
0 of every batch is not shifted: another batch shape alone moves logits by more than a weak neuron does.

Difference readout: two nearly equal probabilities are never subtracted. The vocabulary head is linear, so it is given
the *difference* of the final hidden states, which it turns into differences of logits; with r the most probable token

    d_j = W_j·(h_shifted - h_unshifted) - the same of r
    Δ log p_t = d_t - log1p( Σ_{j≠r} p_j · expm1(d_j) )          Δp_t = p_t · expm1(Δ log p_t)

One sum serves all targets. Taking r as the reference keeps it free of the one large term: for t = r this is the exact
form -log1p(Σ_{j≠t} ...), for any other t, p_t is at most 1/2 and nothing cancels by more than a factor of two.

Axes: K targets, I interventions, R rows of a batch, N neurons of a layer, V vocabulary, E hidden size.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from neg_service.errors import ConfigurationError, NonFiniteError
from neg_service.models.branches import Prefix, at_least_float32, resuming_at, run_branches, run_prefix
from neg_service.models.feed_forward import visiting
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt


class Interventions:
    """One prompt, ready for interventions: prefix and layer inputs are stored, and the unshifted output is known.

    probability_k: of each target without a shift [K], float64 on the CPU.
    activation_ln: of each layer's neurons at the readout position, on the layer's device.
    """

    def __init__(self, model: LanguageModel, prompt: EncodedPrompt, basis: str) -> None:
        """Run the prompt once.

        Raises:
            NonFiniteError: NaN or infinity in the prompt's logits.
        """
        self._model = model
        self._sites = model.feed_forward.sites(basis)
        self._layers = model.feed_forward.layers
        self._head: nn.Module = model.model.get_output_embeddings()
        self._prefix: Prefix = run_prefix(model.model, [prompt.ids], model.header(()))
        self._inputs: list[Tensor] = []
        self._gives_tuple: list[bool] = []
        self._target_ids = prompt.target_ids
        captured: dict[int, Tensor] = {}

        def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._inputs.append(args[0] if args else kwargs["hidden_states"])
            self._gives_tuple.append(isinstance(output, tuple))

        with torch.no_grad(), ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_hook(keep, with_kwargs=True).remove)
            stack.enter_context(visiting(dict(enumerate(self._sites)), lambda i, x: captured.update({i: x})))
            raw: list[Tensor] = []
            stack.callback(self._head.register_forward_hook(lambda _m, _i, out: raw.append(out)).remove)
            logits_v = at_least_float32(run_branches(model.model, self._prefix, [1])[0])
        if not logits_v.isfinite().all():
            raise NonFiniteError(
                f"prompt {prompt.prompt.id!r} ({len(prompt.ids)} tokens): NaN or infinity in logits in {model.dtype}; "
                f"try another model.dtype"
            )
        self._is_capped = not torch.equal(raw[0].reshape(-1), logits_v.to(raw[0].dtype))
        self._reference = int(logits_v.argmax())
        self._p_v = logits_v.softmax(-1)
        self.probability_k = self._p_v[list(self._target_ids)].double().cpu()
        self.activation_ln = [site.neurons(captured[i]).reshape(-1) for i, site in enumerate(self._sites)]

    def delta_log_p(self, layer: int, neurons_i: Tensor, shifts_i: Tensor, batch_rows: int) -> Tensor:
        """Δ log p of every target [I, K] when neuron `neurons_i[i]` of a layer is moved by `shifts_i[i]`.

        `shifts_i` are added to the activation as they are; signs are the caller's business. `batch_rows` is the most
        rows of a batch, the unshifted one included; batches are filled evenly.

        Raises:
            ConfigurationError: fewer than two rows.
        """
        if batch_rows < 2:
            raise ConfigurationError(f"a batch of {batch_rows} rows holds no intervention beside the unshifted row")
        n_batches = max(1, -(-len(shifts_i) // (batch_rows - 1)))
        parts = zip(neurons_i.chunk(n_batches), shifts_i.chunk(n_batches), strict=True)
        return torch.cat([self._run(layer, neurons, shifts) for neurons, shifts in parts])

    @torch.no_grad()
    def _run(self, layer: int, neurons_r: Tensor, shifts_r: Tensor) -> Tensor:
        site = self._sites[layer]
        n_rows = len(shifts_r) + 1

        def shift(_layer: int, x: Tensor) -> Tensor:
            shifted = x.clone()
            rows = site.neurons(shifted).view(n_rows, -1) if x.ndim == 2 else site.neurons(shifted)[0]
            device = x.device
            rows[torch.arange(1, n_rows, device=device), neurons_r.to(device)] += shifts_r.to(device, x.dtype)
            return shifted

        with ExitStack() as stack:
            stack.enter_context(resuming_at(self._layers, layer, self._inputs[layer], n_rows, self._gives_tuple))
            stack.enter_context(visiting({layer: site}, shift))
            if not self._is_capped:
                stack.callback(self._head.register_forward_pre_hook(_differences).remove)
            out_rv = at_least_float32(run_branches(self._model.model, self._prefix, [n_rows]))
        delta_rv = out_rv[1:] - out_rv[:1] if self._is_capped else out_rv[1:]
        bias = getattr(self._head, "bias", None)
        if bias is not None and not self._is_capped:
            delta_rv = delta_rv - bias
        delta_rv = delta_rv - delta_rv[:, self._reference, None]
        target_rk = delta_rv[:, list(self._target_ids)]
        # expm1 of the reference is zero exactly, so it needs no leaving out.
        rest_r = delta_rv.expm1_() @ self._p_v
        return target_rk - rest_r.log1p()[:, None]


def _differences(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The head's input with every row but the first replaced by its difference from the first."""
    hidden = inputs[0]
    flat = hidden.reshape(-1, hidden.shape[-1])
    return (torch.cat([flat[:1], flat[1:] - flat[:1]]).view_as(hidden), *inputs[1:])

"""Sweeps of a shard's prompts: NEG by intervention of chosen neurons, for every target, as rows of the table `sweep`.

For each prompt: the prefix runs once, then NeurGrad of all chosen layers over it (which also ranks the neurons, where
the strongest are asked for), then every (neuron, shift); all targets share these passes. Curves and what is made of
them stay on the device; a row for each target and neuron leaves it. What is measured: `neg.py` and `linearity.py`.

Axes: n chosen neurons, K targets, S shifts, M neurons that act on a prompt.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service import schema
from neg_service.config import NeuronsConfig
from neg_service.measures.adaptive import RowNoise
from neg_service.measures.base import ShardInput
from neg_service.measures.choice import chosen_neurons, layers_of, strongest_neurons
from neg_service.measures.curves import SweepResult, sweep_prompt
from neg_service.measures.interventions import Interventions
from neg_service.measures.noise import row_noise
from neg_service.measures.outputs import Output
from neg_service.measures.readouts import Readouts
from neg_service.measures.shifts import Sweep
from neg_service.measures.signs import signed_by
from neg_service.measures.tables import fixed_size, key_columns, mlp_columns, prompt_tables, table_of
from neg_service.neurons import NeuronSet
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.slots import Slots

log = logging.getLogger(__name__)

_SPEAK_SECONDS = 30.0


def sweep_rows(
    shard: ShardInput, sweep: Sweep, noise: RowNoise, keep_curves: bool, readouts: Readouts
) -> Iterator[tuple[int, dict[str, pa.Table]]]:
    """The tables `prompts` and `sweep` of each prompt, by its index.

    Raises:
        ModelError: the noise of the run was measured with an engine of another kind.
    """
    model, neurons = shard.model, shard.neurons
    sizes = model.feed_forward
    layers = layers_of(neurons, sizes.n_layers)
    # All that act on a prompt depend on it where there are experts.
    is_of_prompt = neurons.choose == "top" or (neurons.choose == "all" and sizes.has_experts)
    chosen = None if is_of_prompt else chosen_neurons(neurons, sizes.layer_neurons)
    for group in model.groups([prompt.until_shifted for prompt in shard.prompts]):
        for index in group.members:
            prompt = shard.prompts[index]
            interventions = Interventions(
                model, prompt, sweep.basis, prompt.ids[: group.shared], each=sweep.shift if sweep.each else None
            )
            of_rows = row_noise(model, sweep.basis, shard.budget, sequences=True) if prompt.is_tree else noise
            output = Output.of(readouts, prompt.prompt)
            neurgrad_km = interventions.neurgrad(layers, shard.budget, output)
            gradient_km = interventions.gradient(layers, shard.budget, output)
            slots = interventions.slots(interventions.sites(layers))
            own = _of_prompt(neurons, slots, neurgrad_km) if chosen is None else chosen
            place_n = slots.places_of(own)
            if neurons.choose == "sample":
                # Of a list each is told, also where a prompt does not use its expert.
                own, place_n = own.take(np.flatnonzero(place_n >= 0)), place_n[place_n >= 0]
            progress = _Progress(prompt.prompt.id, len(own))
            found = sweep_prompt(
                interventions,
                own,
                sweep,
                shard.budget,
                keep_curves,
                neurgrad_km,
                of_rows,
                progress.add,
                gradient_km,
                output,
            )
            is_routed_n = torch.from_numpy(place_n >= 0).to(neurgrad_km.device)
            neurgrad_kn = torch.where(is_routed_n, neurgrad_km[:, np.maximum(place_n, 0)], 0.0)
            probability_k = interventions.probability_k.float().cpu().numpy()
            gradient_kn = signed_by(found.activation_n, neurgrad_kn)
            if gradient_km is not None:
                gradient_kn = torch.where(is_routed_n, gradient_km[:, np.maximum(place_n, 0)], 0.0)
            noise_k = of_rows.sigma * interventions.noise_of(output)
            estimates = (neurgrad_kn, gradient_kn)
            table = _table(shard, prompt, own, found, sweep, estimates, interventions.probability_k, noise_k, output)
            of_prompt = prompt_tables(
                prompt, probability_k, interventions.routing, sizes.has_experts, interventions.token_log_p,
                readouts.readout,
            )  # fmt: skip
            yield index, {**of_prompt, "sweep": table}


def _of_prompt(neurons: NeuronsConfig, slots: Slots, neurgrad_km: Tensor) -> NeuronSet:
    """All neurons that act on a prompt, or the strongest of them."""
    if neurons.choose == "all":
        return NeuronSet.distinct(slots.rows_at(np.arange(slots.m)))[0]
    return strongest_neurons(slots, neurgrad_km.abs().amax(0).cpu().numpy(), neurons.count)


def _table(
    shard: ShardInput,
    prompt: EncodedPrompt,
    neurons: NeuronSet,
    found: SweepResult,
    sweep: Sweep,
    estimates: tuple[Tensor, Tensor],
    probability_k: Tensor,
    noise_k: Tensor,
    output: Output,
) -> pa.Table:
    """Rows by target, then neuron; estimates: NeurGrad and the plain gradient [C, n]."""
    model, evaluated, kept = shard.model, found.evaluated, np.array(output.kept)
    values = evaluated.linearity_nk
    n, k = values.neg.shape
    neg_kn = values.neg.T
    neurgrad_kn, gradient_kn = estimates
    estimate_kn = gradient_kn if sweep.shift == "signed" else neurgrad_kn
    resolution_kn = evaluated.resolution(noise_k).T
    is_resolved = _column(neg_kn.abs() > resolution_kn)
    is_plain = output.readouts.is_plain
    curves = {}
    if evaluated.curve_nsk is not None:
        curves["delta_p" if is_plain else "delta"] = fixed_size(
            evaluated.curve_nsk.permute(2, 0, 1).float().cpu().numpy()
        )
    return table_of(
        schema.sweep(
            None if evaluated.curve_nsk is None else len(sweep.grid.shifts), model.feed_forward.has_experts, is_plain
        ),
        k * n,
        **key_columns(prompt, np.repeat(kept, n)),
        **mlp_columns(np.tile(neurons.layer, k), np.tile(neurons.expert, k)),
        neuron=np.tile(neurons.neuron, k),
        basis=sweep.basis,
        shift=sweep.shift,
        dtype=str(model.dtype).removeprefix("torch."),
        readout=output.readouts.label,
        probability=_column(probability_k[list(output.kept), None].expand(k, n)),
        activation=_column(found.activation_n.expand(k, n)),
        neg=_column(neg_kn),
        neg_error=_column(evaluated.error(noise_k, torch.promote_types(model.dtype, torch.float32)).T),
        n_shifts=np.tile(evaluated.n_shifts_n.cpu().numpy().astype(np.int32), k),
        r=_column(values.r.T),
        r2=_column(values.r2.T),
        **{"max_abs_delta_p" if is_plain else "max_abs_delta": _column(values.max_abs_delta_p.T)},
        neurgrad=_column(neurgrad_kn),
        gradient=_column(gradient_kn),
        resolution=_column(resolution_kn),
        is_resolved=is_resolved,
        is_routed=found.is_routed_nc.T.ravel(),
        routing_changed=_column(evaluated.routing_changed_n.expand(k, n)),
        signs_agree=pa.array(_column(neg_kn.sign() == estimate_kn.sign()), mask=~is_resolved),
        **curves,
    )


def _column(values_kn: Tensor) -> NDArray[Any]:
    column: NDArray[Any] = values_kn.flatten().cpu().numpy()
    return column.astype(np.float32) if column.dtype == np.float64 else column


class _Progress:
    """Says now and then how far a prompt is that takes minutes; the driver hears of whole shards only."""

    def __init__(self, prompt_id: str, n_neurons: int) -> None:
        self._who, self._of, self._done = prompt_id, n_neurons, 0
        self._began = self._spoke = time.monotonic()

    def add(self, n_neurons: int) -> None:
        self._done += n_neurons
        now = time.monotonic()
        if now - self._spoke >= _SPEAK_SECONDS and self._done < self._of:
            self._spoke = now
            left = (now - self._began) / self._done * (self._of - self._done)
            log.info("prompt %r: %d of %d neurons, %.0f s left", self._who, self._done, self._of, left)

"""Sweeps of a shard's prompts: NEG by intervention of chosen neurons, for every target, as rows of the table `sweep`.

For each prompt: the prefix runs once, then NeurGrad of all chosen layers over it (which also ranks the neurons, where
the strongest are asked for), then every (neuron, shift); all targets share these passes, and so do prompts that leave
room in them (`together.py`). Curves and what is made of them stay on the device; a row for each target and neuron
leaves it. What is measured: `neg.py` and `linearity.py`.

Axes: n chosen neurons, K targets, S shifts, M neurons that act on a prompt.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from neg_service import schema
from neg_service.config import NeuronsConfig
from neg_service.measures.adaptive import RowNoise
from neg_service.measures.base import ShardInput
from neg_service.measures.batching import in_joint_parts
from neg_service.measures.changes import Steps, taken
from neg_service.measures.choice import chosen_neurons, layers_of, strongest_neurons
from neg_service.measures.curves import SweepResult, sweep_steps
from neg_service.measures.interventions import Interventions
from neg_service.measures.noise import row_noise
from neg_service.measures.outputs import Output
from neg_service.measures.readouts import Readouts
from neg_service.measures.shifts import AdaptiveGrid, Sweep
from neg_service.measures.signs import signed_by
from neg_service.measures.tables import fixed_size, key_columns, mlp_columns, prompt_tables, table_of
from neg_service.measures.together import (
    MOST_TOGETHER,
    cost_of,
    neurgrads_together,
    prepared_together,
    run_together,
    taken_together,
)
from neg_service.models.transfer import fetched
from neg_service.neurons import NeuronSet
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.slots import Slots

log = logging.getLogger(__name__)

_SPEAK_SECONDS = 30.0

Tables = dict[str, pa.Table]


def sweep_rows(
    shard: ShardInput, sweep: Sweep, noise: RowNoise, keep_curves: bool, readouts: Readouts
) -> Iterator[tuple[int, Tables]]:
    """The tables `prompts` and `sweep` of each prompt, by its index.

    Raises:
        ModelError: the noise of the run was measured with an engine of another kind.
    """
    own, model, prompts = _SweptShard(shard, sweep, noise, keep_curves, readouts), shard.model, shard.prompts

    def kind_of(index: int) -> int | None:
        return 0 if run_together(model, prompts[index]) else None

    def cost_of_one(index: int, longest: int, n_shared: int) -> int:
        return cost_of(model, longest, n_shared, len(prompts[index].target_ids), own.n_rows)

    yield from in_joint_parts(model, prompts, kind_of, cost_of_one, own.tables, shard.budget, MOST_TOGETHER)


class _SweptShard:
    """A shard's prompts, swept one by one or some together."""

    def __init__(self, shard: ShardInput, sweep: Sweep, noise: RowNoise, keep_curves: bool, readouts: Readouts) -> None:
        self._shard, self._sweep, self._noise = shard, sweep, noise
        self._keep_curves, self._readouts = keep_curves, readouts
        neurons, sizes = shard.neurons, shard.model.feed_forward
        self._layers = layers_of(neurons, sizes.n_layers)
        # All that act on a prompt depend on it where there are experts.
        is_of_prompt = neurons.choose == "top" or (neurons.choose == "all" and sizes.has_experts)
        self._chosen = None if is_of_prompt else chosen_neurons(neurons, sizes.layer_neurons)

    @property
    def n_rows(self) -> int:
        """How many interventions a prompt begins with."""
        grid = self._sweep.grid
        n = self._shard.neurons.count if self._chosen is None else len(self._chosen)
        return n * len((grid.stages[0] if isinstance(grid, AdaptiveGrid) else grid).shifts)

    def tables(self, members: Sequence[int], shared: tuple[int, ...]) -> list[Tables]:
        """The tables of some prompts that begin with shared tokens, in their order."""
        if len(members) == 1:
            return [self._alone(members[0], shared)]
        model, budget = self._shard.model, self._shard.budget
        prompts = [self._shard.prompts[index] for index in members]
        prepared = prepared_together(model, prompts, self._sweep.basis, shared)
        outputs = [Output.of(self._readouts, prompt.prompt) for prompt in prompts]
        found = neurgrads_together(model, prepared, self._layers, budget, outputs, shared)
        progress = _Progress(f"{prompts[0].prompt.id!r} and {len(prompts) - 1} more")
        ready = [
            self._ready(prompt, own, output, neurgrad_km, None, progress)
            for prompt, own, output, neurgrad_km in zip(prompts, prepared, outputs, found, strict=True)
        ]
        swept = taken_together(prepared, [own.steps for own in ready], budget)
        return [own.tables(result) for own, result in zip(ready, swept, strict=True)]

    def _alone(self, index: int, shared: tuple[int, ...]) -> Tables:
        """The tables of a prompt."""
        model, prompt, budget = self._shard.model, self._shard.prompts[index], self._shard.budget
        interventions = Interventions(
            model, prompt, self._sweep.basis, shared, each=self._sweep.shift if self._sweep.each else None
        )
        output = Output.of(self._readouts, prompt.prompt)
        neurgrad_km = interventions.neurgrad(self._layers, budget, output)
        gradient_km = interventions.gradient(self._layers, budget, output)
        progress = _Progress(repr(prompt.prompt.id))
        own = self._ready(prompt, interventions, output, neurgrad_km, gradient_km, progress)
        return own.tables(taken(own.steps, lambda moved: interventions.changes(moved, budget)))

    def _ready(
        self, prompt: EncodedPrompt, interventions: Interventions, output: Output, neurgrad_km: Tensor,
        gradient_km: Tensor | None, progress: _Progress,
    ) -> _ReadyPrompt:  # fmt: skip
        """A prompt whose gradients are known."""
        shard, neurons = self._shard, self._shard.neurons
        noise = self._noise
        if prompt.is_tree:
            noise = row_noise(shard.model, self._sweep.basis, shard.budget, sequences=True)
        slots = interventions.slots(interventions.sites(self._layers))
        own = _of_prompt(neurons, slots, neurgrad_km) if self._chosen is None else self._chosen
        place_n = slots.places_of(own)
        if neurons.choose == "sample":
            # Of a list each is told, also where a prompt does not use its expert.
            own, place_n = own.take(np.flatnonzero(place_n >= 0)), place_n[place_n >= 0]
        progress.expect(len(own))
        steps = sweep_steps(
            interventions,
            own,
            self._sweep,
            shard.budget,
            self._keep_curves,
            neurgrad_km,
            noise,
            progress.add,
            gradient_km,
            output,
        )

        def tables(found: SweepResult) -> Tables:
            is_routed_n = torch.from_numpy(place_n >= 0).to(neurgrad_km.device)
            neurgrad_kn = torch.where(is_routed_n, neurgrad_km[:, np.maximum(place_n, 0)], 0.0)
            probability_k = interventions.probability_k.float().cpu().numpy()
            gradient_kn = signed_by(found.activation_n, neurgrad_kn)
            if gradient_km is not None:
                gradient_kn = torch.where(is_routed_n, gradient_km[:, np.maximum(place_n, 0)], 0.0)
            noise_k = noise.sigma * interventions.noise_of(output)
            estimates = (neurgrad_kn, gradient_kn)
            p_k = interventions.probability_k
            table = _table(shard, prompt, own, found, self._sweep, estimates, p_k, noise_k, output)
            of_prompt = prompt_tables(
                prompt, probability_k, interventions.routing, shard.model.feed_forward.has_experts,
                interventions.token_log_p, self._readouts.readout,
            )  # fmt: skip
            return {**of_prompt, "sweep": table}

        return _ReadyPrompt(steps, tables)


@dataclass(frozen=True)
class _ReadyPrompt:
    """What sweeps a prompt, and what makes tables of what that finds."""

    steps: Steps[SweepResult]
    tables: Callable[[SweepResult], Tables]


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
    is_plain = output.readouts.is_plain
    estimate_kn = gradient_kn if sweep.shift == "signed" else neurgrad_kn
    resolution_kn = evaluated.resolution(noise_k).T
    columns = _fetched_columns(
        {
            "probability": output.of_kept(probability_k)[:, None].expand(k, n),
            "activation": found.activation_n.expand(k, n),
            "neg": neg_kn,
            "neg_error": evaluated.error(noise_k, torch.promote_types(model.dtype, torch.float32)).T,
            "n_shifts": evaluated.n_shifts_n.int().expand(k, n),
            "r": values.r.T,
            "r2": values.r2.T,
            "max_abs_delta_p" if is_plain else "max_abs_delta": values.max_abs_delta_p.T,
            "neurgrad": neurgrad_kn,
            "gradient": gradient_kn,
            "resolution": resolution_kn,
            "is_resolved": neg_kn.abs() > resolution_kn,
            "routing_changed": evaluated.routing_changed_n.expand(k, n),
            "signs_agree": neg_kn.sign() == estimate_kn.sign(),
            **({} if evaluated.curve_nsk is None else {"curve": evaluated.curve_nsk.permute(2, 0, 1)}),
        }
    )
    if (curve := columns.pop("curve", None)) is not None:
        columns["delta_p" if is_plain else "delta"] = fixed_size(curve.reshape(k, n, -1))
    columns["signs_agree"] = pa.array(columns["signs_agree"], mask=~columns["is_resolved"])
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
        is_routed=found.is_routed_nc.T.ravel(),
        **columns,
    )


def _fetched_columns(columns: dict[str, Tensor]) -> dict[str, Any]:
    """Columns of a table from tensors of a device, which is asked for all of them at once."""
    flat = [own.flatten() for own in columns.values()]
    on_cpu = fetched([own.float() if own.dtype == torch.float64 else own for own in flat])
    return {name: own.numpy() for name, own in zip(columns, on_cpu, strict=True)}


class _Progress:
    """Says now and then how far prompts are that take minutes; the driver hears of whole shards only."""

    def __init__(self, who: str) -> None:
        self._who, self._of, self._done = who, 0, 0
        self._began = self._spoke = time.monotonic()

    def expect(self, n_neurons: int) -> None:
        """So many more are to be swept."""
        self._of += n_neurons

    def add(self, n_neurons: int) -> None:
        self._done += n_neurons
        now = time.monotonic()
        if now - self._spoke >= _SPEAK_SECONDS and self._done < self._of:
            self._spoke = now
            left = (now - self._began) / self._done * (self._of - self._done)
            log.info("prompt %s: %d of %d neurons, %.0f s left", self._who, self._done, self._of, left)

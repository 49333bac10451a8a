"""The measure `sweep`: NEG by intervention of chosen neurons, for every target of every prompt.

For each prompt: the prefix runs once, then NeurGrad of all chosen layers over it (which also ranks the neurons, where
the strongest are asked for), then every (neuron, shift); all targets share these passes. Curves and what is made of
them stay on the device; a row a (target, neuron) leaves it. What is measured: `neg.py` and `linearity.py`.

Axes: n chosen neurons, K targets, S shifts, L layers, N neurons of a layer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service import schema
from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError
from neg_service.measures import Cost
from neg_service.measures.choice import (
    Neurons,
    check_choice,
    chosen_neurons,
    count_of,
    layers_of,
    strongest_neurons,
)
from neg_service.measures.gradients import signed_by
from neg_service.measures.interventions import Interventions, check_batch_bytes, rows_that_fit
from neg_service.measures.linearity import Grid, chosen_grid
from neg_service.measures.neg import BATCH_BYTES, Sweep, Swept, check_shift, sweep_prompt
from neg_service.measures.noise import measure_noise, resolution
from neg_service.measures.tables import fixed_size, key_columns, prompt_row, table_of
from neg_service.models.batches import Budget
from neg_service.models.feed_forward import check_basis
from neg_service.models.inspection import ModelInfo
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt, Prompt

log = logging.getLogger(__name__)

# A GPU is busy only with far more rows than a CPU.
_GPU_BATCH_BYTES = 8 * BATCH_BYTES
_SPEAK_SECONDS = 30.0


@dataclass
class Options:
    """See `conf/measure/sweep.yaml`."""

    name: str = "sweep"
    basis: str = "paper"
    shift: str = "magnitude"
    grid: str = "full"
    max_shift: float = 2.0
    step: float = 0.1
    shifts: Any = None
    keep_curves: bool = False
    batch_bytes: Any = "auto"


def read(options: Options) -> Options:
    """No files."""
    return options


def check(options: Options, neurons: NeuronsConfig, info: ModelInfo, prompts: Sequence[Prompt]) -> None:
    """Refuse bad options.

    Raises:
        ConfigurationError: naming the key, its value, and what it may be.
    """
    check_basis(options.basis, info.is_gated, info.architecture)
    check_shift(options.shift)
    _grid(options)
    check_choice(neurons, info.n_layers, info.n_neurons)
    size = options.batch_bytes
    if size != "auto":
        if not isinstance(size, int) or isinstance(size, bool):
            raise ConfigurationError(f"measure.batch_bytes={size}: must be auto or a whole number of bytes")
        check_batch_bytes(size, info.row_values)


def identity(options: Options) -> dict[str, Any]:
    """The options that decide the numbers; a grid is named by its shifts, however they were given."""
    grid = _grid(options)
    found: dict[str, Any] = {"name": options.name, "basis": options.basis, "shift": options.shift}
    found |= {"grid": options.grid, "shifts": grid.shifts.tolist(), "keep_curves": options.keep_curves}
    if options.grid == "coarse":
        found |= {"max_shift": options.max_shift, "step": options.step}
    return found


def tables(options: Options, info: ModelInfo) -> dict[str, pa.Schema]:
    """`prompts` and `sweep`."""
    n_shifts = len(_grid(options).shifts) if options.keep_curves else None
    return {"prompts": schema.PROMPTS, "sweep": schema.sweep(n_shifts)}


def cost_a_prompt(options: Options, neurons: NeuronsConfig, info: ModelInfo, n_targets: float) -> Cost:
    """A row of numbers a (target, neuron), an intervention a (neuron, shift)."""
    n_shifts = len(_grid(options).shifts)
    n = count_of(neurons, info.n_layers, info.n_neurons)
    # Eight numbers, and the key and marks of a row, which compress to little.
    row = 120 + (4 * n_shifts if options.keep_curves else 0)
    return Cost({"prompts": 256, "sweep": int(row * n * n_targets)}, n * n_shifts)


def calibrate(
    model: LanguageModel, prompts: Sequence[EncodedPrompt], options: Options, neurons: NeuronsConfig
) -> dict[str, Any]:
    """The sweep's noise against a higher precision; see `noise.py`."""
    if neurons.choose == "top":
        neurons = NeuronsConfig(neurons.layers)
    chosen = chosen_neurons(neurons, model.feed_forward.n_layers, model.feed_forward.n_neurons)
    return {"noise": asdict(measure_noise(model, prompts, chosen, _sweep(options), _batch_bytes(options, model)))}


def measure(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    options: Options,
    neurons: NeuronsConfig,
    budget: Budget,
    calibration: Mapping[str, Any],
) -> dict[str, pa.Table]:
    """One shard's tables."""
    sweep, sigma = _sweep(options), float(calibration["noise"]["sigma"])
    n_layers, n_neurons = model.feed_forward.n_layers, model.feed_forward.n_neurons
    layers = layers_of(neurons, n_layers)
    chosen = None if neurons.choose == "top" else chosen_neurons(neurons, n_layers, n_neurons)
    rows_of: dict[int, tuple[pa.Table, pa.Table]] = {}
    for group in model.groups([prompt.ids for prompt in prompts]):
        for index in group.members:
            prompt = prompts[index]
            interventions = Interventions(model, prompt, options.basis, prompt.ids[: group.shared])
            neurgrad_kln = interventions.neurgrad(layers)
            own = chosen
            if own is None:
                own = strongest_neurons(layers, neurgrad_kln.abs().amax(0).cpu().numpy(), neurons.count)
            rows = rows_that_fit(interventions.rows, _batch_bytes(options, model) * budget.scale)
            fitting = rows.rows
            progress = _Progress(prompt.prompt.id, len(own))
            found = sweep_prompt(interventions, own, sweep, rows, options.keep_curves, progress.add)
            # What did not fit just now will not fit for the next prompt.
            if rows.rows < fitting:
                budget.lower(rows.rows / fitting)
            else:
                budget.has_fitted()
            neurgrad_kn = neurgrad_kln[:, np.searchsorted(layers, own[:, 0]), own[:, 1]]
            probability_k = interventions.probability_k.float().cpu().numpy()
            table = _table(prompt, own, found, sweep, neurgrad_kn, interventions.probability_k, sigma, model.dtype)
            rows_of[index] = prompt_row(prompt, probability_k), table
    ordered = [rows_of[index] for index in range(len(prompts))]
    return {
        "prompts": pa.concat_tables([prompt for prompt, _ in ordered]),
        "sweep": pa.concat_tables([swept for _, swept in ordered]),
    }


def _table(
    prompt: EncodedPrompt,
    neurons: Neurons,
    found: Swept,
    sweep: Sweep,
    neurgrad_kn: Tensor,
    probability_k: Tensor,
    sigma: float,
    dtype: torch.dtype,
) -> pa.Table:
    """Rows by target, then neuron."""
    n, k = found.linearity_nk.neg.shape
    neg_kn = found.linearity_nk.neg.T
    gradient_kn = signed_by(found.activation_n, neurgrad_kn)
    estimate_kn = gradient_kn if sweep.shift == "signed" else neurgrad_kn
    resolution_kn = (probability_k * resolution(sweep.grid, sigma))[:, None].expand(k, n)
    is_resolved = _column(neg_kn.abs() > resolution_kn)
    curves = {}
    if found.delta_p_nsk is not None:
        curves["delta_p"] = fixed_size(found.delta_p_nsk.permute(2, 0, 1).float().cpu().numpy())
    return table_of(
        schema.sweep(None if found.delta_p_nsk is None else len(sweep.grid.shifts)),
        k * n,
        **key_columns(prompt, np.repeat(np.arange(k), n)),
        layer=np.tile(neurons[:, 0], k),
        neuron=np.tile(neurons[:, 1], k),
        basis=sweep.basis,
        shift=sweep.shift,
        dtype=str(dtype).removeprefix("torch."),
        probability=_column(probability_k[:, None].expand(k, n)),
        activation=_column(found.activation_n.expand(k, n)),
        neg=_column(neg_kn),
        r=_column(found.linearity_nk.r.T),
        r2=_column(found.linearity_nk.r2.T),
        largest_delta_p=_column(found.linearity_nk.largest.T),
        neurgrad=_column(neurgrad_kn),
        gradient=_column(gradient_kn),
        resolution=_column(resolution_kn),
        is_resolved=is_resolved,
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


def _batch_bytes(options: Options, model: LanguageModel) -> int:
    if options.batch_bytes != "auto":
        return int(options.batch_bytes)
    return BATCH_BYTES if model.device.type == "cpu" else _GPU_BATCH_BYTES


def _sweep(options: Options) -> Sweep:
    return Sweep(_grid(options), options.basis, options.shift)


def _grid(options: Options) -> Grid:
    if options.shifts is not None and not isinstance(options.shifts, list):
        raise ConfigurationError(f"measure.shifts={options.shifts}: must be a list of numbers such as [-1,1]")
    return chosen_grid(options.grid, options.shifts, options.max_shift, options.step)

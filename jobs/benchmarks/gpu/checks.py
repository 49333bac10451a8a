"""How exact, in how much memory, and what happens when it ends: no times, but what a device does to numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from jobs.benchmarks.gpu.pacing import measured
from jobs.benchmarks.gpu.subject import Subject
from neg_service.measures.batching import budget_of
from neg_service.measures.curves import sweep_prompt
from neg_service.measures.interventions import Interventions
from neg_service.measures.noise import measure_noise
from neg_service.measures.shifts import Sweep, coarse_grid, given_grid
from neg_service.models.batches import PATIENCE, Budget
from neg_service.models.precision import in_precision
from neg_service.neurons import NeuronSet

_NEURONS_A_LAYER = 16
# Small enough that a curve is a line, large enough for float64.
_SMALL_SHIFT = 1e-4
_MOST_BATCHES = 8 * PATIENCE
# Memory is left for so many rows as estimates have them, and at least so much; so many times as many are asked for,
# for estimates are up to four times too much.
_ROWS_LEFT, _LEAST_LEFT, _TIMES_TOO_MANY = 128, 2**28, 12


def accuracy(subject: Subject) -> dict[str, Any]:
    """NEG and NeurGrad of some neurons against float64 with the same weights, on the device.

    In float32 also what TF32 would make of them, which is off everywhere else.
    """
    model, sweep = subject.model, Sweep(coarse_grid())
    interventions = Interventions(model, subject.prompt, "paper")
    neurons = _some_neurons(subject, interventions)
    exact = _negs(subject, neurons, sweep, torch.float64)
    slope = _negs(subject, neurons, Sweep(given_grid([-_SMALL_SHIFT, _SMALL_SHIFT])), torch.float64)
    found = {f"NEG in {subject.dtype}": _errors(_negs(subject, neurons, sweep, model.dtype), exact)}
    layers = sorted(set(neurons.layer.tolist()))
    place_n = interventions.slots(interventions.sites(layers)).places_of(neurons)
    estimate_km = interventions.neurgrad(layers, budget_of(model)).double().cpu().numpy()
    found[f"NeurGrad in {subject.dtype}"] = _errors(estimate_km[:, place_n].T, slope)
    if subject.dtype == "float32" and subject.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        try:
            found["NEG in float32 with TF32"] = _errors(_negs(subject, neurons, sweep, torch.float32), exact)
        finally:
            torch.set_float32_matmul_precision("highest")
    noise: dict[str, Any] = {}
    seconds, _ = measured(
        subject.device,
        lambda: noise.update(asdict(measure_noise(model, [subject.prompt], neurons, sweep, budget_of(model)))),
    )
    return {
        "against": "float64 with the same weights; relative errors",
        "neurons": len(neurons),
        **found,
        "calibration of a sweep": {"seconds": float(f"{seconds:.3g}"), **noise},
    }


def batch_invariance(subject: Subject) -> dict[str, Any]:
    """How far a prompt's numbers move with what runs beside it, against the largest of them; 0 is bit for bit.

    Gradients: alone, eight together, and all together. Interventions: one at a time, and all in one batch.
    """
    one, whole = Budget(1), budget_of(subject.model)
    which, many = range(8), range(min(64, subject.settings.prompts))
    by_itself, together, in_crowd = (
        subject.gradients(own, budget) for own, budget in ((which, one), (which, whole), (many, whole))
    )
    own = Interventions(subject.model, subject.prompt, "paper")
    layer = subject.layers["middle"]
    alone = subject.run_interventions(own, layer, 40, Budget(1)).double().cpu().numpy()
    beside = subject.run_interventions(own, layer, 40 * _NEURONS_A_LAYER, whole).double().cpu().numpy()[:40]
    return {
        "gradients, eight together": max(_moved(by_itself[i].gradient_km, together[i].gradient_km) for i in which),
        f"gradients, {len(many)} together": max(
            _moved(by_itself[i].gradient_km, in_crowd[i].gradient_km) for i in which
        ),
        "interventions, all in a batch": _moved(alone, beside),
    }


def foreseen_memory(subject: Subject) -> dict[str, Any]:
    """The peak of a batch of each kind beside what its plan took it for, as many rows as a batch has by itself."""
    model, budget = subject.model, budget_of(subject.model)
    engine, header = model.engine, subject.settings.header_tokens
    found: dict[str, Any] = {"a batch by itself, MiB": _mib(budget.bytes)}
    costs = [engine.cost(len(own.ids), header, len(own.target_ids), len(own.target_ids)) for own in subject.encoded]
    n = max(1, int(np.searchsorted(np.cumsum(costs), budget.bytes, side="right")))
    n = min(n, len(costs))
    # Once before, so that the header is kept.
    subject.gradients(range(n), budget)
    _, peak = measured(subject.device, lambda: subject.gradients(range(n), Budget(2 * sum(costs))))
    found[f"gradients of {n} prompts"] = _beside(sum(costs[:n]), peak)
    own = Interventions(model, subject.prompt, "paper")
    size = own.rows.sizes.run
    rows = max(2, min(budget.bytes // size, 16384))
    _, peak = measured(
        subject.device,
        lambda: subject.run_interventions(own, subject.layers["bottom"], rows - 1, Budget(2 * rows * size)),
    )
    found[f"{rows - 1} interventions"] = _beside(rows * size, peak)
    return found


def memory_ends(subject: Subject) -> dict[str, Any]:
    """A batch that is asked too large, with little memory left: it has to be halved, be right, and recover."""
    own, layer = Interventions(subject.model, subject.prompt, "paper"), subject.layers["bottom"]
    size = own.rows.sizes.run
    left = max(_LEAST_LEFT, _ROWS_LEFT * size)
    n = _TIMES_TOO_MANY * left // size
    expected = subject.run_interventions(own, layer, n, Budget(left)).cpu()
    asked = Budget(2 * n * size)
    before = asked.bytes
    with limited(subject.device, left):
        found = subject.run_interventions(own, layer, n, asked).cpu()
    lowered = asked.bytes
    if lowered == before:
        raise AssertionError(f"{n} interventions fitted into {_mib(left)} MiB: memory did not end")
    # Longer where it grew while memory was still short, and had to be lowered again.
    for _ in range(_MOST_BATCHES):
        subject.run_interventions(own, layer, 1, asked)
        if asked.bytes > lowered:
            break
    return {
        "asked for MiB": _mib(before),
        "lowered to MiB": _mib(lowered),
        "halvings": round(math.log2(before / lowered), 1),
        "later MiB": _mib(asked.bytes),
        "recovers": asked.bytes > lowered,
        "moved": _moved(expected.double().numpy(), found.double().numpy()),
    }


@contextmanager
def limited(device: torch.device, n_bytes: int) -> Iterator[None]:
    """Leave this process so many bytes of a GPU beside what it has there.

    Raises:
        ValueError: the device is no GPU: nothing else has a limit that can be set.
    """
    if device.type != "cuda":
        raise ValueError(f"a device of kind {device.type} has no limit on memory that could be set")
    torch.cuda.empty_cache()
    whole = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved(device) + n_bytes) / whole), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def processor(device: torch.device) -> dict[str, Any]:
    """What the device is, and what it does at its best: products of square matrices, and a copy."""
    is_gpu = device.type == "cuda"
    n = 8192 if is_gpu else 256
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if is_gpu else device.type,
        "memory GiB": round(torch.cuda.mem_get_info(device)[1] / 2**30, 1) if is_gpu else None,
        "CUDA": torch.version.cuda,
        "TF32 in measurements": torch.get_float32_matmul_precision() != "highest",
    }
    rates: dict[str, float] = {}
    for name, dtype, precision in (
        ("float64", torch.float64, "highest"),
        ("float32", torch.float32, "highest"),
        ("float32 with TF32", torch.float32, "high"),
        ("bfloat16", torch.bfloat16, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        x = torch.randn(n, n, device=device, dtype=torch.float32).to(dtype)
        seconds = min(measured(device, partial(torch.matmul, x, x))[0] for _ in range(4))
        rates[name] = float(f"{2 * n**3 / seconds / 1e12:.3g}")
    torch.set_float32_matmul_precision("highest")
    x = torch.empty(n * n, device=device)
    seconds = min(measured(device, x.clone)[0] for _ in range(4))
    return found | {"TFLOP/s": rates, "copy GB/s, read and written": float(f"{2 * x.nbytes / seconds / 1e9:.3g}")}


def _some_neurons(subject: Subject, interventions: Interventions) -> NeuronSet:
    """Some neurons of three layers that act on the prompt, drawn with a fixed seed."""
    draw = np.random.default_rng(0)
    slots = interventions.slots(interventions.sites(list(subject.layers.values())))
    chosen = draw.choice(slots.m, min(slots.m, len(subject.layers) * _NEURONS_A_LAYER), replace=False)
    return NeuronSet.distinct(slots.rows_at(chosen))[0]


def _negs(subject: Subject, neurons: NeuronSet, sweep: Sweep, dtype: torch.dtype) -> Any:
    """NEG [n, K] with the model computing in `dtype`, from its own weights."""
    model = subject.model
    is_own = dtype == model.dtype
    with nullcontext() if is_own else in_precision(model.model, model.feed_forward.layers, dtype):
        interventions = Interventions(model, subject.prompt, sweep.basis)
        found = sweep_prompt(interventions, neurons, sweep, budget_of(model), keep_curves=False)
    return found.evaluated.linearity_nk.neg.cpu().numpy()


def _errors(found: Any, exact: Any) -> dict[str, Any]:
    """Relative errors, and the share of signs that agree, of what is not zero exactly."""
    is_known = exact != 0
    error = np.abs(found - exact)[is_known] / np.abs(exact)[is_known]
    median, most = np.quantile(error, [0.5, 0.9])
    agree = (np.sign(found) == np.sign(exact))[is_known].mean()
    return {"median": float(f"{median:.2g}"), "90 %": float(f"{most:.2g}"), "signs that agree": round(float(agree), 3)}


def _moved(expected: Any, found: Any) -> float:
    largest = float(np.abs(expected).max())
    return float(f"{float(np.abs(found - expected).max()) / largest:.2g}")


def _beside(foreseen: int, peak: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {"foreseen MiB": _mib(foreseen)}
    if peak is None:
        return found | {"peak MiB": None}
    return found | {"peak MiB": _mib(peak), "foreseen over peak": round(foreseen / max(1, peak), 2)}


def _mib(n_bytes: float) -> float:
    return round(n_bytes / 2**20, 1)

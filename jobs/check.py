"""python -m jobs.check: whether a model can be measured, and by which engine. `--help` says what can be set."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from jobs.entry import flag_of, start
from neg_service.config import JobConfig, ModelConfig, typed
from neg_service.layer_neurons import LayerNeurons, described_layers
from neg_service.settings import BASES

if TYPE_CHECKING:
    from neg_service.models.language_model import LanguageModel


@dataclass
class CheckConfig:
    """Everything that `python -m jobs.check` is told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    json: bool = False
    job: JobConfig = field(default_factory=JobConfig)


def check(config: DictConfig) -> int:
    """Load a model, let it check itself, and print what was found."""
    # Slow to load: see `entry.py`.
    from neg_service.models.loading import loaded

    began = time.monotonic()
    model = loaded(typed(ModelConfig, config.model, "model"))
    began_check = time.monotonic()
    model.ensure_checked()
    found = report(model, began_check - began, time.monotonic() - began_check)
    is_json = flag_of(config, "json") or typed(JobConfig, config.job, "job").log == "json"
    print(json.dumps(found) if is_json else describe(found))
    return 0


def report(model: LanguageModel, load_seconds: float, check_seconds: float) -> dict[str, Any]:
    """What there is to know of a checked model; deviations are relative, memory in bytes."""
    import torch

    from neg_service.models.engines.difference_check import DIFFERENCES_TOLERANCE
    from neg_service.models.engines.self_check import (
        FINITE_DIFFERENCE_TOLERANCE,
        GRADIENT_TOLERANCE,
        LOGIT_TOLERANCE,
        READOUT_FACTOR,
    )

    chosen, own = model.ensure_checked(), model.feed_forward
    checked = chosen.check
    # Models with experts are checked in float32, whatever their precision.
    checked_in = torch.promote_types(model.dtype, torch.float32) if own.has_experts else model.dtype
    bases = BASES if own.offers_gate else BASES[:2]
    return {
        "model": model.name,
        "identity": model.identity,
        "architecture": type(model.model).__name__,
        "read_at": "mask token" if model.is_masked else "last token",
        "layers": own.n_layers,
        "neurons_a_layer": own.n_neurons,
        "layer_neurons": [asdict(layer) for layer in own.layer_neurons],
        "bases": {basis: _places(model, basis) for basis in bases},
        "context_tokens": model.context_length,
        "dtype": str(model.dtype).removeprefix("torch."),
        "devices": [str(device) for device in model.devices],
        "dequantised": model.dequantised and asdict(model.dequantised),
        "cpu_product": model.cpu_product and model.cpu_product.as_dict(),
        "engine": chosen.engine.name,
        "row_is": chosen.engine.row_is,
        "rows_are_prompts": chosen.engine.rows_are_prompts,
        "rejected": chosen.rejected,
        "checked": checked.tried,
        "starts_at_layers": checked.starts_at_layers,
        "supports_late_expansion": len(checked.late_expansion) == len(own.sites("paper")),
        "deviations": {"row_logits": checked.logits, "neurons": checked.neurons}
        | ({} if checked.experts is None else {"experts": checked.experts})
        | {
            "at_readout": checked.at_readout,
            "gradients": checked.gradients,
            "finite_difference": checked.finite_difference,
        }
        | ({} if checked.differences is None else {"differences": checked.differences}),
        "allowed": {"row_logits": LOGIT_TOLERANCE[checked_in], "neurons": LOGIT_TOLERANCE[checked_in]}
        | ({} if checked.experts is None else {"experts": LOGIT_TOLERANCE[checked_in]})
        | {"at_readout": READOUT_FACTOR * LOGIT_TOLERANCE[checked_in]}
        | (
            {}
            if checked.finite_difference is None
            else {"gradients": GRADIENT_TOLERANCE, "finite_difference": FINITE_DIFFERENCE_TOLERANCE}
        )
        | ({} if checked.differences is None else {"differences": DIFFERENCES_TOLERANCE}),
        "weights_bytes": sum(weight.nbytes for weight in model.model.parameters()),
        "peak_bytes": _peak_bytes(model),
        "load_seconds": load_seconds,
        "check_seconds": check_seconds,
    }


def describe(found: dict[str, Any]) -> str:
    """For a person."""
    # Slow to load: see `entry.py`.
    from neg_service.report.console import aligned, bytes_text, dequantised_text

    neurons = [LayerNeurons(**own) for own in found["layer_neurons"]]
    deviations, allowed = found["deviations"], found["allowed"]
    gradients = finite_difference = f"not tried in {found['dtype']}: it drowns in rounding"
    if deviations["finite_difference"] is not None:
        gradients = f"{deviations['gradients']:.1e} off the plain model's own, at most {allowed['gradients']:g}"
        off, most = deviations["finite_difference"], allowed["finite_difference"]
        finite_difference = f"{off:.1e} off what the gradient says, at most {most:g}"
    engine = [
        f"{found['engine']}: a row is {found['row_is']}",
        *(f"not {name}: {reason}" for name, reason in found["rejected"].items()),
    ]
    if found["rows_are_prompts"] and found["read_at"] == "last token":
        engine.append("slow: a prompt of 100 tokens takes about 100 times the work of rows of one token")
    if not found["starts_at_layers"]:
        engine.append("an intervention runs all layers, not only those from its own on")
    if not found["supports_late_expansion"]:
        engine.append("an intervention runs its whole layer for each row, in some layers or all")
    peak = ", ".join(f"{bytes_text(size)} on {device}" for device, size in found["peak_bytes"].items())
    rows = [
        ("model", f"{found['model']} ({found['architecture']})"),
        ("identity", found["identity"]),
        ("neurons", f"{described_layers(neurons)}; {sum(own.total for own in neurons)} in all"),
        ("basis", "\n".join(f"{basis}: {place}" for basis, place in found["bases"].items())),
        ("read at", found["read_at"]),
        ("context", f"{found['context_tokens']} tokens" if found["context_tokens"] else "no limit given"),
        ("precision", f"{found['dtype']} on {', '.join(found['devices'])}"),
        *([("weights", dequantised_text(found["dequantised"]))] if found["dequantised"] else []),
        *([("products", _product(found["cpu_product"]))] if found["cpu_product"] else []),
        ("engine", "\n".join(engine)),
        ("checked", "\n".join(found["checked"])),
        ("row logits", f"{deviations['row_logits']:.1e} off the plain forward pass, at most {allowed['row_logits']:g}"),
        (
            "at readout",
            f"{deviations['at_readout']:.1e} off the plain neurons, at most {allowed['at_readout']:g}",
        ),
        ("captured neurons", f"{deviations['neurons']:.1e} off their MLP, at most {allowed['neurons']:g}"),
        *_experts(deviations, allowed),
        ("gradients", gradients),
        ("small shifts", finite_difference),
        *_differences(deviations, allowed),
        ("memory", f"{bytes_text(found['weights_bytes'])} of weights; {peak} at the most so far"),
        ("seconds", f"{found['load_seconds']:.1f} to load, {found['check_seconds']:.1f} to check"),
    ]
    return f"{aligned(rows)}\n\nThis model can be measured."


def _product(found: dict[str, Any]) -> str:
    gain = f" (oneDNN {found['gain']:.2f} times as fast as PyTorch's own way)" if "gain" in found else ""
    return f"{found['name']}, {found['reason']}{gain}"


def _experts(deviations: dict[str, float], allowed: dict[str, float]) -> list[tuple[str, str]]:
    if "experts" not in deviations:
        return []
    off, most = deviations["experts"], allowed["experts"]
    return [("experts", f"{off:.1e} off the modeling code's own loop, in float32, at most {most:g}")]


def _differences(deviations: dict[str, float], allowed: dict[str, float]) -> list[tuple[str, str]]:
    if "differences" not in deviations:
        return []
    off, most = deviations["differences"], allowed["differences"]
    return [("differences", f"{off:.1e} off those of rows, in float64, at most {most:g}")]


def _places(model: LanguageModel, basis: str) -> str:
    """Where neurons are in the first layer of each kind, by the names that the model gives to modules."""
    from neg_service.models.hook_points import HookPoint

    own, found = model.feed_forward, []
    firsts = {layer: own.layer_neurons.index(layer) for layer in own.layer_neurons}
    for point in own.sites(basis, sorted(firsts.values())).values():
        name = next(name for name, module in model.model.named_modules() if module is point.module)
        if isinstance(point, HookPoint):
            found.append(f"{point.side} of {name}" + (f", from {point.start} on" if point.start else ""))
        else:
            found.append(f"inside {name}")
    return "; ".join(found)


def _peak_bytes(model: LanguageModel) -> dict[str, int]:
    """The most memory used so far, by device; on a CPU, of this process."""
    import torch

    peaks = {str(own): torch.cuda.max_memory_allocated(own) for own in model.devices if own.type == "cuda"}
    return peaks or {"cpu": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


if __name__ == "__main__":
    start("check", check, CheckConfig)

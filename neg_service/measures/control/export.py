"""Export of a shift: what `control` found for a prompt, as tensors that any program can add to the plain model.

| form     | what is written                                      | is the same shift for                             |
|----------|------------------------------------------------------|---------------------------------------------------|
| `bias`   | the shift itself, added to the projection's output   | every prompt                                      |
| `vector` | what the shift adds to each MLP's output, a constant | the steered prompt; some bases: every prompt      |

A bias exists where the neuron is a projection's plain output: basis `paper` of a gated MLP. A vector exists for every
basis. That of a layer is the MLP's output with its shift less that without it, both with the shifts of the layers
below. It is the same for every prompt where the neurons are what the down projection reads, as in the basis `hidden`;
else a gate or a norm multiplies them, which depends on the prompt. It is worked out by one plain pass for each layer
that is shifted, and one more; added at the same position it gives the same pass, but for rounding.

Experts are not exported, also where they are always on: what reaches the output of theirs depends on the router, whose
choice and weights change from token to token, so that neither form would be the shift. What is written and how it is
read again: `exported.py`.

Axes: N neurons of an MLP, H hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neg_service import __version__
from neg_service.errors import ConfigurationError, ModelError, PromptError, told_by_parameters
from neg_service.measures.control.control import ControlResult
from neg_service.measures.control.exported import BIAS, VECTOR, ExportedShift, Part, checked_place, part_of, write
from neg_service.measures.control.plain_passes import READOUT, Addition, adding, encoded, experts_for, moved_by
from neg_service.models.feed_forward import Site, hooks
from neg_service.models.hook_points import HookPoint
from neg_service.models.language_model import LanguageModel
from neg_service.models.mlp import Mlp
from neg_service.models.repeated_layers import layers_as_run
from neg_service.prompts.prompt import Asked, EncodedPrompt

FORMS = (BIAS, VECTOR)
# How far the probability in a plain pass may be from what the result says, relative to it; in low precision passes
# differ that much, and only a prompt that is another one differs by more.
_SAME, _SAME_IN_LOW_PRECISION = 0.01, 0.3


@told_by_parameters(
    model__source="model", dataset__source="prompt", dataset__chat_template="model.tokenizer.chat_template"
)
def export_shift(
    model: LanguageModel,
    result: ControlResult,
    index: int,
    place: str | os.PathLike[str],
    *,
    form: str = BIAS,
    side_effects: Any = None,
    prompt: Asked | None = None,
    target: str | None = None,
) -> Path:
    """Write the shift of one prompt of a result as `shift.safetensors` and `shift.json`.

    Args:
        model: the model that the result was made with.
        result: what `control` gave.
        index: which of its prompts.
        place: a folder that is made, or an empty one.
        form: `bias` or `vector`; see the module's header.
        side_effects: what was measured of them, to be written beside: a mapping, or what has a `table()`.
        prompt: the prompt that was steered, a text or messages; a vector is made from it.
        target: its target. With both given, a plain pass with what is exported is run, and its probabilities are
            written beside those of the result.

    Returns:
        The folder.

    Raises:
        ConfigurationError: an unknown form, a basis that has no bias, no vector without a prompt, a target without its
            prompt, a shift that is zero or moves experts. PromptError: a prompt that is not the one of the result.
        ModelError: a masked model, or one whose layers run again. DestinationError: a folder that holds something, or
            cannot be written.
    """
    if form not in FORMS:
        raise ConfigurationError(setting="form", value=form, allowed=f"one of {', '.join(FORMS)}")
    if model.is_masked:
        raise ModelError(
            f"{model.name} is a masked model, whose mask stands elsewhere in each prompt, and a shift is exported for "
            "the last token: choose a causal model", change="model.source",
        )  # fmt: skip
    if layers_as_run(model.model) is not None:
        raise ModelError(
            f"{model.name} runs one layer's weights as several layers, and what is added to a module of the plain "
            "model acts in all of its runs: choose another model", change="model.source",
        )  # fmt: skip
    moved = moved_by(model, result, index)
    _require_exportable(model, moved, index)
    if target is not None and prompt is None:
        raise ConfigurationError(setting="target", value=target, allowed="given together with its prompt")
    folder, measured = checked_place(place), _side_effects(side_effects)
    own = None if prompt is None else encoded(model, prompt, target)
    parts, tensors = _biases(model, result, moved) if form == BIAS else _vectors(model, result, moved, own)
    about = {
        **_about(model, result, index, form, moved),
        "prompt": prompt,
        "target": target,
        "side_effects": measured,
    }
    shift = ExportedShift(_in_json(about), parts, tensors)
    if own is not None and own.target_ids:
        plain_pass = _plain_pass(model, shift, own, result, index)
        shift = ExportedShift({**shift.about, "plain_pass": plain_pass}, parts, tensors)
    write(folder, shift)
    return folder


def _require_exportable(model: LanguageModel, moved: Mapping[Site, Addition], index: int) -> None:
    if not moved:
        raise ConfigurationError(
            "the shift of this prompt is zero: there is nothing to export", setting="index", value=index
        )
    layers = [site.layer for site in moved if not isinstance(model.feed_forward.mlp_at.get(site), Mlp)]
    if layers:
        raise ConfigurationError(
            f"the shift moves neurons of experts in layer {layers[0]}; what these add depends on the router, which "
            "chooses and weighs experts for each token, so that neither a bias nor a constant vector is the same "
            "shift: steer neurons that belong to no expert (neurons)",
            setting="index",
            value=index,
        )


def _biases(
    model: LanguageModel, result: ControlResult, moved: Mapping[Site, Addition]
) -> tuple[tuple[Part, ...], dict[str, Tensor]]:
    """The shift as biases of the projections that hold the neurons: zero at what else these give, such as a gate."""
    paths, parts, tensors = _paths(model), [], {}
    for site, addition in moved.items():
        mlp = _mlp(model, site)
        if result.basis != "paper" or not mlp.layout.is_gated:
            behind = "behind an activation" if result.basis == "gate" or not mlp.layout.is_gated else "a product"
            raise ConfigurationError(
                f"neurons of the basis {result.basis} are {behind} in {type(mlp.module).__name__}, and no projection's "
                "output, to which a bias could be added: use form=vector",
                setting="form",
                value=BIAS,
            )
        if mlp.within is not None:
            raise ConfigurationError(
                f"layer {site.layer} shares its {type(mlp.module).__name__} with other layers, in which a bias would "
                "act, too: use form=vector",
                setting="form",
                value=BIAS,
            )
        assert isinstance(addition.point, HookPoint)
        point = addition.point
        whole = torch.zeros(2 * point.size if mlp.layout.fused else point.size, dtype=_dtype(result))
        whole[point.start : point.start + point.size] = addition.constant.to(whole.dtype)
        module = paths[point.module]
        parts.append(part_of(f"{module}.bias", site.layer, module, whole, None))
        tensors[parts[-1].tensor] = whole
    return tuple(parts), tensors


@torch.no_grad()
def _vectors(
    model: LanguageModel, result: ControlResult, moved: Mapping[Site, Addition], prompt: EncodedPrompt | None
) -> tuple[tuple[Part, ...], dict[str, Tensor]]:
    """What the shift adds to the output of each MLP [H] at the readout position of a prompt."""
    if prompt is None:
        raise ConfigurationError(
            "what a shift adds to an MLP's output is worked out from the prompt that was steered", setting="prompt",
            allowed="given with form=vector",
        )  # fmt: skip
    paths, parts, tensors = _paths(model), [], {}
    sites = sorted(moved)
    down = {site: _down(_mlp(model, site)) for site in sites}
    with_all = _outputs(model, prompt, [moved[site] for site in sites], down)
    for place, site in enumerate(sites):
        # The same input of the MLP, without its own shift.
        without = _outputs(model, prompt, [moved[below] for below in sites[:place]], {site: down[site]})
        vector_h = (with_all[site] - without[site]).to(_dtype(result))
        module, within = paths[down[site].module], down[site].within
        # A module that is shared has a vector for each of its layers.
        name = f"{module}.output" if within is None else f"{module}.output.{site.layer}"
        parts.append(part_of(name, site.layer, module, vector_h, None if within is None else paths[within]))
        tensors[name] = vector_h
    return tuple(parts), tensors


def _outputs(
    model: LanguageModel, prompt: EncodedPrompt, additions: Sequence[Addition], points: Mapping[Site, HookPoint]
) -> dict[Site, Tensor]:
    """What modules give at the last token, in a plain pass with some constants: float64, on the CPU."""
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, x: Tensor) -> None:
        seen[site] = x.reshape(-1, x.shape[-1])[-1].double().cpu()

    with adding(model.model, additions, READOUT), hooks(points, keep):
        _logits(model, prompt)
    return seen


@torch.no_grad()
def _logits(model: LanguageModel, prompt: EncodedPrompt) -> Tensor:
    """Of the readout position [V], by a plain pass over the whole prompt, in float64."""
    plain: Any = model.model
    options = {"logits_to_keep": 1} if "logits_to_keep" in signature(plain.forward).parameters else {}
    with experts_for(model, []):
        logits: Tensor = plain(torch.tensor([prompt.ids], device=model.device), use_cache=False, **options).logits
    return logits[0, -1].double()


def _plain_pass(
    model: LanguageModel, shift: ExportedShift, prompt: EncodedPrompt, result: ControlResult, index: int
) -> dict[str, float]:
    """Probabilities of the target in plain passes, without and with what is exported.

    Raises:
        PromptError: they are others than the result's.
    """
    (target,) = prompt.target_ids
    before = float(_logits(model, prompt).softmax(-1)[target])
    with shift.applied(model.model):
        after = float(_logits(model, prompt).softmax(-1)[target])
    is_low = model.dtype not in (torch.float32, torch.float64)
    most = _SAME_IN_LOW_PRECISION if is_low else _SAME
    known = (float(result.probability_before[index]), float(result.probability[index]))
    if any(abs(own - other) > most * max(own, other) for own, other in zip((before, after), known, strict=True)):
        raise PromptError(
            f"a plain pass moves this target from probability {before:.4g} to {after:.4g}, prompt {index} of the "
            f"result goes from {known[0]:.4g} to {known[1]:.4g}: give the prompt and the target of that index",
            change="prompt",
        )
    return {"probability_before": before, "probability": after}


def _about(
    model: LanguageModel, result: ControlResult, index: int, form: str, moved: Mapping[Site, Addition]
) -> dict[str, Any]:
    """What the text says of where a shift is from and what it achieved."""
    mlps = [_mlp(model, site) for site in moved]
    is_read_by_down = result.basis == "hidden" or (
        result.basis == "paper" and not any(own.layout.is_gated for own in mlps)
    )
    is_same_everywhere = form == BIAS or (is_read_by_down and all(own.layout.norm is None for own in mlps))
    numbers = ("kind", "wanted", "value_before", "first_shot", "achieved", "probability_before", "probability",
               "reached", "reason", "passes", "norm", "relative_norm", "largest")  # fmt: skip
    return {
        "form": form,
        "exact_for": "every prompt" if is_same_everywhere else "this prompt, at its last token",
        "basis": result.basis,
        "package": {"name": "neg-service", "version": __version__},
        "model": {
            "name": model.name,
            "identity": model.identity,
            "architecture": type(model.model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "n_neurons": len(result.neurons(index)[1]),
        **{name: getattr(result, name)[index] for name in numbers},
    }


def _side_effects(given: Any) -> Any:
    """What was measured, as lists and mappings.

    Raises:
        ConfigurationError: neither a mapping nor a table.
    """
    if given is None:
        return None
    own = given.table() if callable(getattr(given, "table", None)) else given
    if not isinstance(own, Mapping | list) and not hasattr(own, "to_pylist"):
        raise ConfigurationError(
            setting="side_effects", value=type(given).__name__, allowed="a mapping, or something with a table()"
        )
    return _in_json(own)


def _in_json(value: Any) -> Any:
    """A value as JSON has it: tables as lists of rows, what is no finite number as null.

    Raises:
        ConfigurationError: something else.
    """
    if hasattr(value, "to_pylist"):
        value = value.to_pylist()
    elif isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _in_json(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(own) for own in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise ConfigurationError(
        "JSON has no such values", setting="side_effects", value=type(value).__name__, allowed="numbers and texts"
    )


def _mlp(model: LanguageModel, site: Site) -> Mlp:
    mlp = model.feed_forward.mlp_at[site]
    assert isinstance(mlp, Mlp)
    return mlp


def _down(mlp: Mlp) -> HookPoint:
    """Where an MLP's output passes by."""
    return HookPoint(mlp.module.get_submodule(mlp.layout.down), "output", 0, 0, mlp.within)


def _paths(model: LanguageModel) -> dict[nn.Module, str]:
    """The path of each module; of one that has several, the first."""
    return {module: path for path, module in model.model.named_modules()}


def _dtype(result: ControlResult) -> torch.dtype:
    return torch.float64 if result.shift.dtype == np.float64 else torch.float32

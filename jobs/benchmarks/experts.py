"""A mixture of experts with random weights: gradients and interventions against their floors and the textbook way.

The floors run the library's own experts, in its fastest implementation; all ways take turns in one process. The
textbook way runs whole sequences: for gradients with a graph and a backward pass for each label, for interventions a
forward pass each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn

from jobs.benchmarks import neurgrad, ways
from jobs.benchmarks.figures import bar, figure, ratio
from neg_service.measures.batching import budget_of
from neg_service.measures.curves import sweep_prompt
from neg_service.measures.interventions import Interventions
from neg_service.measures.shifts import Sweep, full_grid
from neg_service.models.engines.base import LoadedModel
from neg_service.models.engines.shared_prefix import SharedPrefixEngine
from neg_service.models.language_model import LanguageModel
from neg_service.models.loading import set_threads
from neg_service.models.start_at_layer import keep_inputs, start_at_layer
from neg_service.neurons import NeuronSet
from neg_service.prompts.prompt import EncodedPrompt, Prompt

FLOOR_ROWS = (256, 640)
_TEXTBOOK_PROMPTS, _TEXTBOOK_SHIFTS = 2, 8


@dataclass
class Settings:
    """See `conf/benchmark/experts.yaml`."""

    name: str
    threads: int
    repeats: int
    layers: int
    experts: int
    used: int
    hidden: int
    neurons: int
    vocabulary: int
    header_tokens: int
    least_own_tokens: int
    most_own_tokens: int
    targets: int
    prompts: int
    swept: int


class PlainExperts(LoadedModel):
    """A model whose passes run the library's own experts, in which no neurons are seen."""

    def own_experts(self) -> Any:
        """Nothing is replaced."""
        return nullcontext()


def run(settings: Settings) -> dict[str, Any]:
    """Measure; the result's `bars` say what was reached."""
    set_threads(settings.threads)
    model = _random_model(settings)
    check = model.ensure_checked()
    plain = PlainExperts(**{own.name: getattr(model._loaded, own.name) for own in fields(LoadedModel)})
    seconds: dict[str, list[float]] = {}
    ways_of = {**_gradients(settings, model, plain), **_interventions(settings, model, plain)}
    for turn in range(settings.repeats + 1):
        for name, way in ways_of.items():
            value = way()
            sys.stderr.write(f"{f'repeat {turn}' if turn else 'warm-up'}: {name} {1e3 * value:.4g} ms\n")
            if turn:
                seconds.setdefault(name, []).append(value)
    names = [name for name in ways_of if name.startswith("interventions, layer")]
    for name in names:
        # Of the number of rows that is best, not of the luckiest of all turns.
        sizes = [seconds.pop(_floor_of(name, rows)) for rows in FLOOR_ROWS]
        seconds[f"floor of {name}"] = min(sizes, key=median)
    ratios = {
        "gradients over floor": ratio(seconds["gradients"], seconds["gradients, floor"]),
        "textbook gradients over gradients": ratio(seconds["gradients, textbook"], seconds["gradients"]),
        **{f"{name} over floor": ratio(seconds[name], seconds[f"floor of {name}"]) for name in names},
    }
    mean = [sum(own) / len(names) for own in zip(*(seconds[name] for name in names), strict=True)]
    ratios["textbook intervention over intervention"] = ratio(seconds["interventions, textbook"], mean)
    return {
        "engine": check.engine.name,
        "experts of the floor": model.model.config._experts_implementation,
        "milliseconds": {name: figure([1e3 * one for one in own], "ms") for name, own in seconds.items()},
        "ratios": ratios,
        "note": "gradients in ms a prompt, interventions in ms each; textbook gradients run fewer prompts",
        "bars": [
            bar("gradients over floor", ratios["gradients over floor"]["median"], 1.5, at_most=True),
            *(bar(f"{name} over floor", ratios[f"{name} over floor"]["median"], 1.3, at_most=True) for name in names),
            *(
                bar(name, ratios[name]["median"], 8, at_most=False)
                for name in ("textbook gradients over gradients", "textbook intervention over intervention")
            ),
        ],
    }


def _random_model(settings: Settings) -> LanguageModel:
    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=settings.hidden // 8,
        intermediate_size=settings.neurons,
        moe_intermediate_size=settings.neurons,
        num_experts=settings.experts,
        num_experts_per_tok=settings.used,
        norm_topk_prob=True,
        max_position_embeddings=4096,
    )
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return LanguageModel(model, name="random mixture")


def _gradients(settings: Settings, model: LanguageModel, plain: LoadedModel) -> dict[str, Callable[[], float]]:
    """Seconds a prompt."""
    shape = {own.name: getattr(settings, own.name) for own in fields(neurgrad.Settings) if hasattr(settings, own.name)}
    data = neurgrad.data_of(neurgrad.Settings(**{**shape, "model": ""}), settings.vocabulary)
    few = (data[0][:_TEXTBOOK_PROMPTS], data[1][:_TEXTBOOK_PROMPTS])

    def timed(way: Callable[[], Any], n: int) -> float:
        model.forget_prefixes()
        began = time.perf_counter()
        way()
        return (time.perf_counter() - began) / n

    floor = partial(ways.floor, plain, data[0], settings.header_tokens, settings.prompts)
    return {
        "gradients": partial(timed, partial(neurgrad.engine, model, data), settings.prompts),
        "gradients, floor": partial(timed, floor, settings.prompts),
        "gradients, textbook": partial(timed, partial(textbook_gradients, model.model, *few), _TEXTBOOK_PROMPTS),
    }


def textbook_gradients(model: Any, prompts: ways.Ids, targets: ways.Ids) -> list[Tensor]:
    """Whole sequences with a graph that begins at the experts' inputs, one prompt at a time."""
    results = []
    for ids, own in zip(prompts, targets, strict=True):
        with torch.enable_grad(), _inputs_of_experts(model) as inputs:
            inputs_t = torch.tensor([list(ids)], device=model.device)
            log_p = model(inputs_t, use_cache=False, logits_to_keep=1).logits[0, -1].log_softmax(-1)
            for token in own:
                slopes = torch.autograd.grad(log_p[token], inputs, retain_graph=token != own[-1])
                results.append(torch.stack([slope[0, -1] for slope in slopes]))
    return results


@contextmanager
def _inputs_of_experts(model: Any) -> Iterator[list[Tensor]]:
    inputs: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(args[0] if args[0].requires_grad else args[0].detach().requires_grad_())
        return (inputs[-1], *args[1:])

    handles = [layer.mlp.register_forward_pre_hook(keep) for layer in model.model.layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _interventions(settings: Settings, model: LanguageModel, plain: LoadedModel) -> dict[str, Callable[[], float]]:
    """Seconds an intervention, in the first, the middle and the last layer."""
    draw = np.random.default_rng(0)
    ids = tuple(draw.integers(0, settings.vocabulary, settings.header_tokens).tolist())
    prompt = EncodedPrompt(Prompt("0", "-", ("-",)), ids, (5,))
    interventions, sweep = Interventions(model, prompt, "paper"), Sweep(full_grid())
    floors = Floor(plain, ids)
    found: dict[str, Callable[[], float]] = {}
    for layer in (0, settings.layers // 2, settings.layers - 1):
        expert = int(interventions.routing.experts[layer][0])
        neurons = NeuronSet.of_mlps({(layer, expert): np.arange(settings.swept)})

        def engine(neurons: NeuronSet = neurons) -> float:
            began = time.perf_counter()
            sweep_prompt(interventions, neurons, sweep, budget_of(model), keep_curves=False)
            return (time.perf_counter() - began) / (settings.swept * len(sweep.grid.shifts))

        name = f"interventions, layer {layer}"
        found[name] = engine
        found |= {_floor_of(name, rows): partial(floors.seconds, layer, rows) for rows in FLOOR_ROWS}
    found["interventions, textbook"] = partial(_textbook_interventions, model.model, ids)
    return found


def _floor_of(name: str, rows: int) -> str:
    return f"floor of {name}, {rows} rows"


class Floor:
    """The last token through the remaining layers and the head, in many rows, by the library's own experts.

    With the log of one token's probability, which is what an intervention is for.
    """

    def __init__(self, plain: LoadedModel, ids: Sequence[int]) -> None:
        self._layers = plain.feed_forward.layers
        self._rows = SharedPrefixEngine(plain).rows([ids])
        with torch.no_grad(), keep_inputs(self._layers) as (self._inputs, self._structures):
            self._rows.run([1])

    def seconds(self, layer: int, n: int) -> float:
        """Of a row, among `n`."""
        began = time.perf_counter()
        self.run(layer, n)
        return (time.perf_counter() - began) / n

    @torch.no_grad()
    def run(self, layer: int, n: int) -> None:
        """Run `n` rows from a layer on."""
        stored = self._rows.expand_rows(self._inputs[layer], n)
        with start_at_layer(self._layers, layer, stored, self._structures):
            self._rows.run([n]).log_softmax(-1)[:, 0]


@torch.no_grad()
def _textbook_interventions(model: Any, ids: Sequence[int]) -> float:
    """A forward pass of the whole prompt for each shift, all shifts of a neuron in one batch."""
    began = time.perf_counter()
    model(torch.tensor([list(ids)] * _TEXTBOOK_SHIFTS), use_cache=False, logits_to_keep=1)
    return (time.perf_counter() - began) / _TEXTBOOK_SHIFTS

"""What the engine is compared with: the floor, the textbook way, an expert's way, and a plain forward pass.

First gradients, then interventions.

Each is written as well as its idea allows: logits of the last position only, no graph below the first neuron, one
forward pass for all labels where the idea permits it. Gradients are of the `paper` basis of a Llama-shaped model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from neg_service.measures.interventions import Interventions
from neg_service.models.engines.base import LoadedModel
from neg_service.models.engines.prefix_attention import FrozenPrefix, PrefixPass, packed, running
from neg_service.models.engines.shared_prefix import run_shared_prefix
from neg_service.models.feed_forward import find_feed_forward, hooks

Ids = Sequence[Sequence[int]]


@torch.no_grad()
def floor(loaded: LoadedModel, prompts: Ids, header: int, batch: int) -> None:
    """One forward pass over the deduplicated tokens, packed without padding; the head on last tokens only.

    This is the engine's own prefix pass, run to the last token: no way of measuring can cost less.
    """
    model = loaded.module
    shared = run_shared_prefix(loaded, prompts[0][:header])
    order = sorted(prompts, key=len)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        own = [list(ids[header:]) for ids in part]
        prefix = FrozenPrefix(shared, tuple(map(len, own)), tuple(ids[-1] for ids in part))
        with running(model, PrefixPass(prefix)):
            inputs = packed(model, own, [range(header, header + len(ids)) for ids in own])
            hidden = model.base_model(**inputs).last_hidden_state
        ends = torch.tensor(list(accumulate(prefix.own_lengths)), device=hidden.device) - 1
        model.get_output_embeddings()(hidden[0, ends])


@torch.no_grad()
def plain_forward(model: PreTrainedModel, prompts: Ids, batch: int) -> None:
    """One forward pass of the full prompts, padded, nothing measured."""
    for start in range(0, len(prompts), batch):
        inputs = _padded(model, prompts[start : start + batch])
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        model.get_output_embeddings()(hidden[range(len(last)), last])


def textbook(model: PreTrainedModel, prompts: Ids, targets: Ids, batch: int) -> list[Tensor]:
    """Whole sequences with a graph, one forward pass, a backward pass a label."""
    results = []
    for start in range(0, len(prompts), batch):
        part, own = prompts[start : start + batch], targets[start : start + batch]
        seen: dict[int, Tensor] = {}
        with torch.enable_grad(), hooks(_hook_points(model), _capturing(seen)):
            inputs = _padded(model, part)
            last = inputs["attention_mask"].sum(1) - 1
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
            log_p = model.get_output_embeddings()(hidden[range(len(part)), last]).log_softmax(-1)
            neurons = [seen[layer] for layer in sorted(seen)]
            for k in range(len(own[0])):
                chosen = log_p[range(len(part)), [ids[k] for ids in own]]
                slopes = torch.autograd.grad(chosen.sum(), neurons, retain_graph=k + 1 < len(own[0]))
                at_last = torch.stack([slope[range(len(part)), last] for slope in slopes], 1)
                results.append(at_last * chosen.detach().exp()[:, None, None])
    return results


def expert(model: PreTrainedModel, prompts: Ids, targets: Ids) -> list[Tensor]:
    """A key/value cache for each prompt, then its labels as rows of one last-token batch, one backward pass."""
    results = []
    for ids, own in zip(prompts, targets, strict=True):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model.base_model(torch.tensor([ids[:-1]], device=model.device), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(own))
        seen: dict[int, Tensor] = {}
        with torch.enable_grad(), hooks(_hook_points(model), _capturing(seen)):
            rows = torch.tensor([[ids[-1]]] * len(own), device=model.device)
            log_p = model(rows, past_key_values=cache, use_cache=True).logits[:, -1].log_softmax(-1)
            chosen = log_p[range(len(own)), list(own)]
            slopes = torch.autograd.grad(chosen.sum(), [seen[layer] for layer in sorted(seen)])
        at_last = torch.stack([slope[:, -1] for slope in slopes], 1)
        results.append(at_last * chosen.detach().exp()[:, None, None])
    return results


def _hook_points(model: PreTrainedModel) -> dict[int, Any]:
    return {site.layer: point for site, point in find_feed_forward(model).sites("paper").items()}


def _capturing(seen: dict[int, Tensor]) -> Any:
    def capture(layer: int, x: Tensor) -> Tensor:
        seen[layer] = x if x.requires_grad else x.detach().requires_grad_()
        return seen[layer]

    return capture


def _padded(model: PreTrainedModel, prompts: Ids) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in prompts], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in prompts], device=model.device)
    return {"input_ids": ids, "attention_mask": mask}


# Interventions: (layer, neuron, shift) of the activation itself, at the last token.
Shifted = Sequence[tuple[int, int, float]]


@torch.no_grad()
def remaining_layers(interventions: Interventions, layer: int, rows: int) -> range:
    """The last token through the layers from `layer` on and the vocabulary head, in `rows` rows, without intervention.

    This is the engine's own pass without shifts and readout: no way of intervening at `layer` can cost less.
    """
    interventions.run_baseline(layer, rows)
    return range(rows)


@torch.no_grad()
def textbook_interventions(
    model: PreTrainedModel, ids: Sequence[int], target: int, shifted: Shifted, batch: int, logits: int
) -> list[float]:
    """A hook on one neuron and a full forward pass of the prompt, `batch` shifts of the neuron at a time.

    Gives the target's probability with each intervention. `logits`: of how many last tokens; 0 means all, which is what
    a plain call of the model gives.
    """
    points = _hook_points(model)
    probabilities: list[float] = []
    for start in range(0, len(shifted), batch):
        part = shifted[start : start + batch]
        layer, neuron = part[0][:2]
        shift_r = torch.tensor([shift for *_, shift in part], device=model.device)

        def shift(_layer: int, x: Tensor, neuron: int = neuron, shift_r: Tensor = shift_r) -> Tensor:
            x[:, -1, neuron] += shift_r.to(x.dtype)
            return x

        with hooks({layer: points[layer]}, shift):
            inputs = torch.tensor([list(ids)] * len(part), device=model.device)
            last = model(inputs, use_cache=False, logits_to_keep=logits).logits[:, -1]
        probabilities += last.softmax(-1)[:, target].tolist()
    return probabilities


class Cached:
    """An expert's interventions: a key/value cache of the prompt, a row an intervention, all layers."""

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], rows: int) -> None:
        self._model, self._last = model, torch.tensor([[ids[-1]]] * rows, device=model.device)
        self._cache = DynamicCache(config=model.config)
        with torch.no_grad():
            prefix = torch.tensor([list(ids[:-1])], device=model.device)
            model.base_model(prefix, past_key_values=self._cache, use_cache=True)
        self._cache.batch_repeat_interleave(rows)

    @torch.no_grad()
    def interventions(self, target: int, shifted: Shifted) -> list[float]:
        """One batch of as many interventions as there are rows, all in one layer; the target's probabilities."""
        layer = shifted[0][0]
        device = self._last.device
        neuron_r = torch.tensor([neuron for _, neuron, _ in shifted], device=device)
        shift_r = torch.tensor([shift for *_, shift in shifted], device=device)

        def shift(_layer: int, x: Tensor) -> Tensor:
            x[torch.arange(len(x), device=device), -1, neuron_r] += shift_r.to(x.dtype)
            return x

        with hooks({layer: _hook_points(self._model)[layer]}, shift):
            logits = self._model(self._last, past_key_values=self._cache, use_cache=True).logits[:, -1]
        # A pass changes the cache in place; what it added is taken off again.
        self._cache.crop(-1)
        probabilities: list[float] = logits.softmax(-1)[:, target].tolist()
        return probabilities

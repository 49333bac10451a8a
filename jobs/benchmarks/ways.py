"""What the engine is compared with: the floor, the textbook way, an expert's way, and a plain forward pass.

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

from neg_service.models.branches import Prefix, PrefixPass, packed, run_header, running
from neg_service.models.feed_forward import find_feed_forward, visiting

Ids = Sequence[Sequence[int]]


@torch.no_grad()
def floor(model: PreTrainedModel, prompts: Ids, header: int, batch: int) -> None:
    """One forward pass over the deduplicated tokens, packed without padding; the head on last tokens only.

    This is the engine's own prefix pass, run to the last token: no way of measuring can cost less.
    """
    shared = run_header(model, prompts[0][:header])
    order = sorted(prompts, key=len)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        own = [list(ids[header:]) for ids in part]
        prefix = Prefix(shared, tuple(map(len, own)), tuple(ids[-1] for ids in part))
        with running(model, PrefixPass(prefix)):
            inputs = packed(model, own, [range(header, header + len(ids)) for ids in own])
            hidden = model.base_model(**inputs).last_hidden_state
        ends = torch.tensor(list(accumulate(prefix.own_lengths))) - 1
        model.get_output_embeddings()(hidden[0, ends])


@torch.no_grad()
def plain_forward(model: PreTrainedModel, prompts: Ids, batch: int) -> None:
    """One forward pass of the full prompts, padded, nothing measured."""
    for start in range(0, len(prompts), batch):
        inputs = _padded(prompts[start : start + batch])
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        model.get_output_embeddings()(hidden[range(len(last)), last])


def textbook(model: PreTrainedModel, prompts: Ids, targets: Ids, batch: int) -> list[Tensor]:
    """Whole sequences with a graph, one forward pass, a backward pass a label."""
    results = []
    for start in range(0, len(prompts), batch):
        part, own = prompts[start : start + batch], targets[start : start + batch]
        seen: dict[int, Tensor] = {}
        with torch.enable_grad(), visiting(_sites(model), _capturing(seen)):
            inputs = _padded(part)
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
            model.base_model(torch.tensor([ids[:-1]]), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(own))
        seen: dict[int, Tensor] = {}
        with torch.enable_grad(), visiting(_sites(model), _capturing(seen)):
            rows = torch.tensor([[ids[-1]]] * len(own))
            log_p = model(rows, past_key_values=cache, use_cache=True).logits[:, -1].log_softmax(-1)
            chosen = log_p[range(len(own)), list(own)]
            slopes = torch.autograd.grad(chosen.sum(), [seen[layer] for layer in sorted(seen)])
        at_last = torch.stack([slope[:, -1] for slope in slopes], 1)
        results.append(at_last * chosen.detach().exp()[:, None, None])
    return results


def _sites(model: PreTrainedModel) -> dict[int, Any]:
    return dict(enumerate(find_feed_forward(model).sites("paper")))


def _capturing(seen: dict[int, Tensor]) -> Any:
    def capture(layer: int, x: Tensor) -> Tensor:
        seen[layer] = x if x.requires_grad else x.detach().requires_grad_()
        return seen[layer]

    return capture


def _padded(prompts: Ids) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in prompts])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in prompts])
    return {"input_ids": ids, "attention_mask": mask}

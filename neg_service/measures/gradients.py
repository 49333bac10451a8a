"""Gradients of target probabilities at every feed-forward neuron, for batches of prompts of unequal length.

For target k, layer l and neuron n at the readout position (the prompt's last token):

    gradient[k, l, n] = d p[k] / d a[l, n] = p[k] * d log p[k] / d a[l, n]

in probability per activation unit. log p is what is differentiated, in float32: the tail of a low-precision
softmax is zero. Each target is a branch of its own over the prompt's frozen prefix, so one backward over a *sum* of
independent rows gives every gradient; nothing is averaged.

Left out on purpose: a backward pass per target over one shared forward row. It would save half of the branches'
forward work, a few per cent of the whole, and needs vectorised autograd, which not every operation supports.

Axes: K targets of a prompt, L chosen layers, N neurons of a layer, R branches of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.errors import NonFiniteError, OutOfMemory
from neg_service.models.batches import Budget, fill_batches, group_by_header
from neg_service.models.branches import at_least_float32, run_branches, run_prefix
from neg_service.models.feed_forward import Site, visiting
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt

Floats = NDArray[np.float32]

# A header known from earlier prompts serves unless it leaves more than this many shared tokens unshared.
HEADER_SLACK = 16
# So many prompts are planned together; planning costs the square of it.
PLANNED_TOGETHER = 256


@dataclass(frozen=True)
class PromptGradients:
    """One prompt's gradients.

    targets: indices of the differentiated targets, along the first axis of `gradient_kln`.
    probability_k: of *all* targets of the prompt, 0..1.
    gradient_kln: probability per activation unit.
    activation_ln: the neurons' activations at the readout position.
    """

    targets: tuple[int, ...]
    probability_k: Floats
    gradient_kln: Floats
    activation_ln: Floats


def default_batch_tokens(model: LanguageModel) -> int:
    """A batch that keeps the processor busy: more does not make it faster, and costs memory."""
    return 2048 if model.device.type == "cpu" else 16384


def gradients(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    wanted: Sequence[Sequence[int]],
    basis: str,
    layers: Sequence[int],
    budget: Budget,
) -> Iterator[tuple[int, PromptGradients]]:
    """Measure prompts in whatever order is cheapest; yields (index, result), each index once.

    `wanted[i]` are the indices of the targets of prompt i to differentiate; probabilities cover all targets.
    """
    all_sites = model.feed_forward.sites(basis)
    sites = {layer: all_sites[layer] for layer in layers}
    for start in range(0, len(prompts), PLANNED_TOGETHER):
        block = range(len(prompts))[start : start + PLANNED_TOGETHER]
        for group in group_by_header([prompts[i].ids for i in block]):
            members = [block[i] for i in group.members]
            first = prompts[members[0]].ids
            known = model.known_header([prompts[i].ids for i in members])
            header = known if known and known >= group.header - HEADER_SLACK else group.header
            lengths = [len(prompts[i].ids) - header for i in members]
            branches = [len(wanted[i]) for i in members]
            for batch in fill_batches(lengths, branches, budget):
                indices = [members[i] for i in batch]
                for part, results in _halving(model, prompts, wanted, sites, first[:header], indices, budget):
                    yield from zip(part, results, strict=True)


def _halving(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    wanted: Sequence[Sequence[int]],
    sites: dict[int, Site],
    header: tuple[int, ...],
    indices: list[int],
    budget: Budget,
) -> Iterator[tuple[list[int], list[PromptGradients]]]:
    """Run a batch; when memory ends, halve the budget for all that follows and run the batch in two halves."""
    waiting = [indices]
    while waiting:
        part = waiting.pop()
        try:
            results = _run_batch(model, [prompts[i] for i in part], [wanted[i] for i in part], sites, header)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                prompt = prompts[part[0]]
                raise OutOfMemory(
                    f"prompt {prompt.prompt.id!r} with {len(prompt.ids)} tokens and {len(wanted[part[0]])} targets "
                    f"does not fit into the memory of {model.device} even alone: use a larger device or fewer targets"
                ) from error
            budget.halve()
            waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
            results = None
        if results is None:
            # Out of the handler, where the failed batch's tensors are no longer held by the traceback.
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        yield part, results


def _run_batch(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    wanted: Sequence[Sequence[int]],
    sites: dict[int, Site],
    header: tuple[int, ...],
) -> list[PromptGradients]:
    rows = [len(own) for own in wanted]
    prefix = run_prefix(model.model, [prompt.ids for prompt in prompts], model.header(header))
    target_ids = [prompt.target_ids[k] for prompt, own in zip(prompts, wanted, strict=True) for k in own]
    found = row_gradients(
        lambda _: run_branches(model.model, prefix, rows), sites, lambda x: x.view(-1, x.shape[-1]), target_ids
    )
    log_p_rv = found.log_p_rv
    finite_r = log_p_rv.isfinite().all(-1).cpu()
    p_r = log_p_rv[range(len(target_ids)), target_ids].exp().cpu().numpy()
    # Layer by layer to the CPU: all of them on an accelerator would take the room of the next batch.
    gradient_rln: Floats = torch.stack([slopes.float().cpu() for slopes in found.gradient_lrn], 1).numpy()
    activation_rln: Floats = torch.stack([values.float().cpu() for values in found.activation_lrn], 1).numpy()
    results, row = [], 0
    for prompt, own in zip(prompts, wanted, strict=True):
        ours = slice(row, row + len(own))
        gradient_kln = gradient_rln[ours] * p_r[ours, None, None]
        activation_ln = activation_rln[row]
        if not (finite_r[ours].all() and np.isfinite(gradient_kln).all()):
            raise NonFiniteError(
                f"prompt {prompt.prompt.id!r} ({len(prompt.ids)} tokens): NaN or infinity in logits or gradients in "
                f"{model.dtype}; try another model.dtype"
            )
        targets = torch.tensor(prompt.target_ids, device=log_p_rv.device)
        results.append(
            PromptGradients(
                targets=tuple(own),
                probability_k=log_p_rv[row, targets].detach().exp().cpu().numpy(),
                gradient_kln=gradient_kln,
                activation_ln=activation_ln,
            )
        )
        row += len(own)
    return results


@dataclass(frozen=True)
class RowGradients:
    """Of a pass over rows: log p of the vocabulary [R, V]; for each layer, d log p[target of the row] / d a, and a.

    Each layer's [R, N] lies where the layer does.
    """

    log_p_rv: Tensor
    gradient_lrn: list[Tensor]
    activation_lrn: list[Tensor]


def row_gradients(
    run: Callable[[int], Tensor],
    sites: Mapping[int, Site],
    at_readout: Callable[[Tensor], Tensor],
    target_ids: Sequence[int],
) -> RowGradients:
    """One backward over a sum of independent rows, each with a target of its own.

    `run(R)` gives logits [R, V]; `at_readout` sees a tensor that passes by as [R, ...] at the readout position.
    """
    captured: dict[int, Tensor] = {}

    def capture(layer: int, x: Tensor) -> Tensor:
        # Nothing frozen requires a gradient; the lowest chosen layer's neurons are where the graph begins.
        captured[layer] = x if x.requires_grad else x.detach().requires_grad_()
        return captured[layer]

    with torch.enable_grad(), visiting(sites, capture):
        log_p_rv = at_least_float32(run(len(target_ids))).log_softmax(-1)
        target_r1 = torch.tensor(target_ids, device=log_p_rv.device)[:, None]
        slopes = torch.autograd.grad(log_p_rv.gather(1, target_r1).sum(), [captured[layer] for layer in sites])

    def own(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [site.neurons(at_readout(x.detach())) for site, x in zip(sites.values(), tensors, strict=True)]

    return RowGradients(log_p_rv.detach(), own(slopes), own([captured[layer] for layer in sites]))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ended."""
    # PyTorch has a class for it on accelerators; on the CPU the allocator raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)

"""Targets of several tokens: their gradients and probabilities, and what shifts do to them.

With a target's tokens t_1 .. t_S, each predicted behind the prompt and the tokens before it (teacher forcing):

    p = Π_s p(t_s)         d p / d a = p · Σ_s d log p(t_s) / d a         Δ log p = Σ_s Δ log p(t_s)

with a the neuron's activation at the readout position, the prompt's last token, in probability and activation units.
No target has to end there: of two targets of which one begins with all of the other, the shorter one's probability is
that of any text that begins so, and holds that of the longer one. How rows read targets: `models/engines/trees.py`.

Axes: B prompts, K targets of a prompt, S tokens of a target or of a row, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neg_service.models.engines.backward import TargetGradients, sequence_gradients
from neg_service.models.engines.base import TreeRows
from neg_service.models.engines.trees import target_chain, target_tree
from neg_service.models.feed_forward import Point, Site
from neg_service.models.head import log_softmax
from neg_service.models.language_model import LanguageModel
from neg_service.models.precision import at_least_float32
from neg_service.models.transfer import indices
from neg_service.prompts.prompt import EncodedPrompt


def differentiated_sequences(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    wanted: Sequence[Sequence[int]],
    points: dict[Site, Point],
    shared: tuple[int, ...],
) -> tuple[TargetGradients, Tensor]:
    """Gradients of some targets of each prompt, and log p [B, K, S] of the tokens of all of them, zero behind each.

    Raises:
        ModelError: no engine runs such targets.
    """
    engine = model.ensure_checked_for_trees().engine
    targets = [[prompt.target_tokens[k] for k in own] for prompt, own in zip(prompts, wanted, strict=True)]
    chains = [
        [target_chain(prompt.ids[-1], tokens) for tokens in own] for prompt, own in zip(prompts, targets, strict=True)
    ]
    rows = engine.trees([prompt.ids for prompt in prompts], chains, shared)
    found = sequence_gradients(rows, targets, points)
    if all(len(own) == len(prompt.target_ids) for prompt, own in zip(prompts, wanted, strict=True)):
        log_p_bks = _empty(prompts, found.log_p_rv)
    else:
        # A row more for each prompt, that reads all of its targets.
        log_p_bks = _log_p_of_trees(rows, prompts)
    prompt_r = indices([b for b, own in enumerate(wanted) for _ in own], log_p_bks.device)
    target_r = indices([k for own in wanted for k in own], log_p_bks.device)
    log_p_bks[prompt_r, target_r, : found.log_p_rv.shape[1]] = found.log_p_rv
    return found, log_p_bks


def _empty(prompts: Sequence[EncodedPrompt], like: Tensor) -> Tensor:
    longest = max(len(tokens) for prompt in prompts for tokens in prompt.target_tokens)
    return like.new_zeros(len(prompts), max(len(prompt.target_ids) for prompt in prompts), longest)


@torch.no_grad()
def _log_p_of_trees(rows: TreeRows, prompts: Sequence[EncodedPrompt]) -> Tensor:
    trees = [target_tree(prompt.ids[-1], prompt.target_tokens) for prompt in prompts]
    log_p_mv = log_softmax(at_least_float32(rows.with_rows([[tree.row] for tree in trees]).run([1] * len(trees))))
    found, start = _empty(prompts, log_p_mv), 0
    for b, tree in enumerate(trees):
        for k, path in enumerate(tree.paths):
            at = indices([start + place for place, _ in path], log_p_mv.device)
            found[b, k, : len(path)] = log_p_mv[at, indices([token for _, token in path], log_p_mv.device)]
        start += len(tree.row.ids)
    return found

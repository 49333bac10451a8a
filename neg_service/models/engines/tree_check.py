"""Proof that an engine's rows of several tokens are what the plain model makes of a prompt and the targets behind it.

Run when targets of several tokens are first asked for (`select.py`), beside the self-check of rows of one token. With
plain passes over prompt and target, one by one, are compared: logits behind each token of a tree, and of the chains
that gradients take, behind no shared prefix and behind one, beside another prompt, with every limit of attention made
shorter than the prompt; and gradients of a target's log probability at the input of every layer, at the prompt's last
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from neg_service.models.engines.base import Engine, Ids, MismatchError, Row
from neg_service.models.engines.comparisons import (
    check_ids,
    check_prompts,
    deviation_of,
    plain_logits,
    plain_sequence,
    short_limits,
    slopes_of_layers,
    spread_ids,
)
from neg_service.models.engines.self_check import GRADIENT_TOLERANCE, LOGIT_TOLERANCE, require_within
from neg_service.models.engines.trees import TargetTree, chain_to, target_chain, target_tree
from neg_service.models.head import log_softmax
from neg_service.models.precision import at_least_float32, in_precision


def check_trees(engine: Engine) -> str:
    """Compare rows of several tokens with plain passes; gives what was compared, for a person.

    Raises:
        MismatchError: a deviation beyond its tolerance; what else its passes raise.
    """
    module, layers = engine.model.module, engine.model.feed_forward.layers
    is_low = engine.model.dtype not in (torch.float32, torch.float64)
    is_other = engine.model.feed_forward.has_experts and is_low
    with in_precision(module, layers, torch.float32) if is_other else nullcontext():
        tolerance = LOGIT_TOLERANCE[engine.model.dtype]
        what = "logits of rows of several tokens are {} off plain passes over prompt and target"
        require_within(_logits_deviation(engine), tolerance, what)
        with short_limits(engine.model) as shortened:
            if shortened:
                require_within(_logits_deviation(engine), tolerance, what)
        if not is_low:
            what = "gradients of targets of several tokens are {} off those of the plain model's own pass"
            require_within(_gradient_deviation(engine), GRADIENT_TOLERANCE, what)
    engine.forget()
    return "rows of several tokens against plain passes over prompt and target, one by one"


def _targets(engine: Engine) -> list[list[int]]:
    """Of one token, of several, one that begins as another, and one that is all that another begins with."""
    a, b, c, d, e = spread_ids(engine.model, 5)
    return [[b, d, a], [c], [b, d], [b, a, e, c]]


@torch.no_grad()
def _logits_deviation(engine: Engine) -> float:
    ids = check_ids(engine.model)
    prompts, counts = check_prompts(engine, ids)
    trees = [target_tree(prompt[-1], _targets(engine)) for prompt in prompts]
    worst = 0.0
    plain = [_plain(engine, prompt, tree.row) for prompt, tree in zip(prompts, trees, strict=True)]
    for n_shared in (0, len(ids) // 2) if engine.shares_prefixes else (0,):
        rows = engine.trees(prompts, [[tree.row] for tree in trees], ids[:n_shared])
        expected = torch.cat([own.repeat(n, 1) for own, n in zip(plain, counts, strict=True)])
        for _ in range(1 if n_shared else 2):
            worst = max(worst, deviation_of(rows.run(counts), expected))
        # As gradients take them.
        chains = [[target_chain(prompt[-1], target) for target in _targets(engine)] for prompt in prompts]
        found = rows.with_rows(chains).run([len(own) for own in chains])
        expected = torch.cat([_of_chains(own, tree) for own, tree in zip(plain, trees, strict=True)])
        worst = max(worst, deviation_of(found, expected))
    engine.forget()
    return worst


def _plain(engine: Engine, prompt: Ids, row: Row) -> Tensor:
    """Logits behind each token of a row [S, V], each by a pass of its own."""
    sequences = [[*prompt, *(row.ids[own] for own in chain_to(row, place)[1:])] for place in range(len(row.ids))]
    return torch.stack([plain_logits(engine.model, own) for own in sequences])


def _of_chains(logits_sv: Tensor, tree: TargetTree) -> Tensor:
    """A tree's logits as those of its targets' chains, one behind the other."""
    return logits_sv[[place for path in tree.paths for place, _ in path]]


def _gradient_deviation(engine: Engine) -> float:
    """Of d log p / d hidden state of each layer's input at the prompt's last token, p of a target of several tokens."""
    model, prompt, target = engine.model, check_ids(engine.model), _targets(engine)[0]
    rows = engine.trees([prompt], [[target_chain(prompt[-1], target)]])
    n = len(target)

    def of_target(logits_sv: Tensor) -> Tensor:
        log_p_sv = log_softmax(at_least_float32(logits_sv))
        return log_p_sv[torch.arange(n), torch.tensor(target, device=log_p_sv.device)].sum()

    whole: Sequence[int] = [*prompt, *target[:-1]]
    own = slopes_of_layers(model, lambda: of_target(rows.run([1])), rows.tokens, int(rows.positions([1])))
    expected = slopes_of_layers(
        model, lambda: of_target(plain_sequence(model, whole)[-n:]), len(whole), len(prompt) - 1
    )
    if own.keys() != expected.keys():
        raise MismatchError("its passes run other layers than the plain model's")
    return max((deviation_of(own[layer], slope) for layer, slope in expected.items()), default=0.0)

"""Targets of several tokens: their gradients and probabilities, and what shifts do to them.

With a target's tokens t_1 .. t_S, each predicted behind the prompt and the tokens before it (teacher forcing):

    p = Π_s p(t_s)         d p / d a = p · Σ_s d log p(t_s) / d a         Δ log p = Σ_s Δ log p(t_s)

with a the neuron's activation at the readout position, the prompt's last token, in probability and activation units.
With `at="each"` the neuron is moved at every token that predicts one of the target's, by δ·sgn(a) of its activation
there, and NeurGrad is the sum of d p / d a · sgn(a) over them. A neuron of an expert is moved at those of them that
chose the expert: it is there for a target if any of its tokens did, and silent at those that did not.
No target has to end there: of two targets of which one begins with all of the other, the shorter one's probability is
that of any text that begins so, and holds that of the longer one. How rows read targets: `models/engines/trees.py`.

Axes: B prompts, K targets of a prompt, S tokens of a target or of a row, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.measures.readout import Baseline, Readout
from neg_service.models.engines.backward import TargetGradients, sequence_gradients
from neg_service.models.engines.base import Row, TreeRows
from neg_service.models.engines.token_sums import UsedExperts, used_experts
from neg_service.models.engines.trees import TargetTree, target_chain, target_tree
from neg_service.models.experts_function import watching_routing
from neg_service.models.feed_forward import Point, Site
from neg_service.models.head import log_softmax
from neg_service.models.language_model import LanguageModel
from neg_service.models.precision import at_least_float32
from neg_service.models.transfer import indices, sent
from neg_service.prompts.prompt import EncodedPrompt


def differentiated_sequences(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    wanted: Sequence[Sequence[int]],
    points: dict[Site, Point],
    shared: tuple[int, ...],
    each: bool = False,
    *,
    of_logits: bool = False,
    with_rest: bool = False,
) -> tuple[TargetGradients, Tensor]:
    """Gradients of some targets of each prompt, and log p [B, K, S] of the tokens of all of them, zero behind each.

    each: times the activation's sign at the readout position they are NeurGrad of shifts at every token that predicts.

    Raises:
        ModelError: no engine runs such targets.
    """
    engine = model.ensure_checked_for_trees().engine
    targets = [[prompt.target_tokens[k] for k in own] for prompt, own in zip(prompts, wanted, strict=True)]
    chains = [[chain_of(prompt, tokens) for tokens in own] for prompt, own in zip(prompts, targets, strict=True)]
    rows = engine.trees([prompt.until_shifted for prompt in prompts], chains, shared)
    behind = [len(prompt.behind_shifted) for prompt in prompts]
    of_trees: tuple[Tensor, UsedExperts] | None = None
    if any(len(own) < len(prompt.target_ids) for prompt, own in zip(prompts, wanted, strict=True)):
        # A row more for each prompt, that reads all of its targets.
        of_trees = _log_p_of_trees(rows, prompts)
    found = sequence_gradients(
        rows, targets, points, "magnitude" if each else None, behind, of_trees[1] if of_trees and each else None,
        of_logits=of_logits, with_rest=with_rest,
    )  # fmt: skip
    if each:
        pairs = zip(found.gradient_srn, found.activation_srn, strict=True)
        found.gradient_srn[:] = [torch.where(activation < 0, -slope, slope) for slope, activation in pairs]
    log_p_bks = of_trees[0] if of_trees else _empty(prompts, found.log_p_rv)
    prompt_r = indices([b for b, own in enumerate(wanted) for _ in own], log_p_bks.device)
    target_r = indices([k for own in wanted for k in own], log_p_bks.device)
    log_p_bks[prompt_r, target_r, : found.log_p_rv.shape[1]] = found.log_p_rv
    return found, log_p_bks


def gradients_of_targets(
    rows: TreeRows, prompt: EncodedPrompt, part: range, points: Mapping[Site, Point], each: str | None = None,
    used: UsedExperts | None = None, *, of_logits: bool = False,
) -> TargetGradients:  # fmt: skip
    """Gradients of some of a prompt's targets, behind the prefix of its rows; each, used: see `sequence_gradients`."""
    targets = [prompt.target_tokens[k] for k in part]
    chains = [chain_of(prompt, tokens) for tokens in targets]
    behind = [len(prompt.behind_shifted)]
    return sequence_gradients(rows.with_rows([chains]), [targets], points, each, behind, used, of_logits=of_logits)


def tree_of(prompt: EncodedPrompt) -> TargetTree:
    """The row that reads all targets of a prompt, from the token on that is shifted."""
    return target_tree(prompt.until_shifted[-1], prompt.target_tokens, prompt.behind_shifted)


def tokens_moved(prompt: EncodedPrompt, each: bool) -> int:
    """At how many tokens its neurons are moved, for any target."""
    return len(tree_of(prompt).row.ids) if each and prompt.has_sequences else 1


def chain_of(prompt: EncodedPrompt, target: Sequence[int]) -> Row:
    """The row that reads one of them, given by its tokens."""
    return target_chain(prompt.until_shifted[-1], target, prompt.behind_shifted)


def shifts_of_rows(
    rows: TreeRows, neurons_tn: Tensor, neurons_i: Tensor, shifts_i: Tensor, each: str | None,
    experts: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Places, neurons and shifts of all rows but the first, of which row i + 1 shifts neuron i of a site.

    neurons_tn: the site's activations, not shifted yet. shifts_i: of the activation at the readout position. each: at
    every token, by as much if `signed`, else by as much in the direction of the activation's sign there.
    experts: of a site of experts whose neurons are moved at every token, those that each token chose [T, k], and those
    of which neurons are numbered [U]; a neuron is moved where its expert was chosen.
    """
    counts = [len(shifts_i) + 1]
    places_rq = rows.copies(counts) if each is None else rows.each_positions(counts)
    # Rows are equal: what fills up one fills up all.
    place_iq = sent(places_rq[1:, places_rq[0] >= 0], neurons_tn.device)
    column_iq, shifts_iq = (own[:, None].expand(place_iq.shape) for own in (neurons_i, shifts_i))
    is_there_iq = None
    if experts is not None:
        chosen_tk, numbered_u = experts
        n = neurons_tn.shape[1] // chosen_tk.shape[1]
        is_own_iqk = chosen_tk[place_iq] == numbered_u[neurons_i // n][:, None, None]
        is_there_iq, column_iq = is_own_iqk.any(-1), is_own_iqk.int().argmax(-1) * n + (neurons_i % n)[:, None]
    if each == "magnitude":
        # The first place is the readout position's; what is not there is silent.
        is_negative_iq = neurons_tn[place_iq, column_iq] < 0
        is_negative_iq = is_negative_iq if is_there_iq is None else is_negative_iq & is_there_iq
        shifts_iq = torch.where(is_negative_iq != is_negative_iq[:, :1], -shifts_iq, shifts_iq)
    found = (place_iq, column_iq, shifts_iq)
    place_j, column_j, shifts_j = (own.flatten() if is_there_iq is None else own[is_there_iq] for own in found)
    return place_j, column_j, shifts_j


def nodes_of_targets(tree: TargetTree) -> list[list[int]]:
    """Of each target the places in the tree of the tokens that predict it."""
    return [[place for place, _ in path] for path in tree.paths]


# Of each target its tokens' log p [S], of a prompt that has targets of several tokens.
TokenLogP = tuple[NDArray[Any], ...] | None


@dataclass(frozen=True)
class TreeBaseline:
    """A prompt's output without any intervention behind each token of the tree that reads its targets.

    nodes: of each token, in the order of the row. log_p: of each target, its tokens' [S], float64, as is what follows:
    of many tokens the product is below what float32 holds.
    """

    tree: TargetTree
    nodes: list[Baseline]
    log_p: list[Tensor]

    @property
    def log_p_k(self) -> Tensor:
        """Of each target [K]."""
        return torch.stack([own.sum() for own in self.log_p])

    @classmethod
    def of(cls, readout: Readout, head_sv: Tensor, logits_sv: Tensor, tree: TargetTree, who: str) -> TreeBaseline:
        """From the head's output and the model's logits behind each token.

        Raises:
            NonFiniteError, ModelError: see `Readout.baseline`.
        """
        nodes = [readout.baseline(head_v, logits_v, who) for head_v, logits_v in zip(head_sv, logits_sv, strict=True)]
        log_p_sv = torch.stack([node.logits_v.double().log_softmax(-1) for node in nodes])
        log_p = [torch.stack([log_p_sv[place, token] for place, token in path]) for path in tree.paths]
        return cls(tree, nodes, log_p)

    def token_log_p(self) -> TokenLogP:
        """Of each target its tokens' log p, on the CPU."""
        return tuple(own.cpu().numpy() for own in self.log_p)

    def changes(self, readout: Readout, difference_rsv: Tensor) -> tuple[Tensor, Tensor]:
        """Δ log p of the targets [R, K], and the sum of Δz over their tokens; from the head's output for rows of
        differences, which its bias may be taken off.

        Raises:
            NonFiniteError: NaN or infinity after an intervention.
        """
        found_rk: list[tuple[Tensor, Tensor] | None] = [None] * len(self.tree.paths)
        for place, node in enumerate(self.nodes):
            # The targets that go through here, and the token that each of them has next.
            own = [(k, token) for k, path in enumerate(self.tree.paths) for at, token in path if at == place]
            if not own:
                # A token of the prompt behind the shifted one.
                continue
            read = readout.rows_read(node, difference_rsv[:, place], [token for _, token in own])
            for (k, _), log_p_r, logit_r in zip(own, read.log_p_rk.unbind(1), read.logit_rk.unbind(1), strict=True):
                before = found_rk[k]
                found_rk[k] = (log_p_r, logit_r) if before is None else (before[0] + log_p_r, before[1] + logit_r)
        known = [own for own in found_rk if own is not None]
        return torch.stack([log_p_r for log_p_r, _ in known], 1), torch.stack([logit_r for _, logit_r in known], 1)


def _empty(prompts: Sequence[EncodedPrompt], like: Tensor) -> Tensor:
    longest = max(len(tokens) for prompt in prompts for tokens in prompt.target_tokens)
    return like.new_zeros(len(prompts), max(len(prompt.target_ids) for prompt in prompts), longest)


@torch.no_grad()
def _log_p_of_trees(rows: TreeRows, prompts: Sequence[EncodedPrompt]) -> tuple[Tensor, UsedExperts]:
    """log p [B, K, S] of the tokens of all targets, and the experts that the tokens use that predict them."""
    trees, ones = [tree_of(prompt) for prompt in prompts], [1] * len(prompts)
    of_trees = rows.with_rows([[tree.row] for tree in trees])
    with watching_routing() as routing:
        log_p_mv = log_softmax(at_least_float32(of_trees.run(ones)))
    prompt_m = torch.tensor([b for b, tree in enumerate(trees) for _ in tree.row.ids])
    used = used_experts(routing, of_trees.read_positions(ones), prompt_m, len(trees))
    found, start = _empty(prompts, log_p_mv), 0
    for b, tree in enumerate(trees):
        for k, path in enumerate(tree.paths):
            at = indices([start + place for place, _ in path], log_p_mv.device)
            found[b, k, : len(path)] = log_p_mv[at, indices([token for _, token in path], log_p_mv.device)]
        start += len(tree.row.ids)
    return found, used

"""Targets of several tokens as rows: the tree of tokens that predict them, behind a prompt's last token.

A target's probability is the product over its tokens, each predicted behind the prompt and the tokens before it
(teacher forcing). What predicts a prompt's targets is its last token and all of each target but its last token; targets
that begin alike share what they begin with. So one row, a tree, reads all targets of a prompt:

    targets " New York City", " New Orleans", " Rome"      row:  last token -> " New" -> " York"
                                                           " City" is read behind " York", " Orleans" behind " New"

Targets of one token alone make a row of the last token alone. Gradients take a row for each target, a chain: what is
differentiated is then one sum over independent rows.

Axes: R rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neg_service.models.engines.base import Row


@dataclass(frozen=True)
class TargetTree:
    """The row that reads a prompt's targets; its first token is shifted, mostly the prompt's last, and all are read.

    paths: of each target (place in the row, token that is predicted behind it), from its first token to its last.
    """

    row: Row
    paths: tuple[tuple[tuple[int, int], ...], ...]


def target_tree(shifted: int, targets: Sequence[Sequence[int]], behind: Sequence[int] = ()) -> TargetTree:
    """The tree of some targets, given by their tokens, behind a prompt.

    shifted: the prompt's token that is shifted, its last one but for those that stand `behind` it.
    """
    ids, parents = [shifted, *behind], list(range(-1, len(behind)))
    place_of: dict[tuple[int, int], int] = {}
    paths = []
    for target in targets:
        place, path = len(behind), []
        for i, token in enumerate(target):
            path.append((place, token))
            if i + 1 < len(target):
                key = (place, token)
                if key not in place_of:
                    place_of[key] = len(ids)
                    ids.append(token)
                    parents.append(place)
                place = place_of[key]
        paths.append(tuple(path))
    return TargetTree(Row(tuple(ids), tuple(parents), 0, tuple(range(len(ids)))), tuple(paths))


def target_chain(shifted: int, target: Sequence[int], behind: Sequence[int] = ()) -> Row:
    """The row that reads one target."""
    return target_tree(shifted, [target], behind).row


def leaves(row: Row) -> list[int]:
    """The places of the tokens that none stands behind."""
    inner = set(row.parents)
    return [place for place in range(len(row.ids)) if place not in inner]


def chain_to(row: Row, place: int) -> list[int]:
    """The places of the tokens from the row's first to one of them."""
    found = [place]
    while row.parents[found[0]] >= 0:
        found.insert(0, row.parents[found[0]])
    return found


def rows_of(rows: Sequence[Sequence[Row]], counts: Sequence[int]) -> list[list[Row]]:
    """The rows of each prompt: its only one as often as it is counted, or all that it has.

    Raises:
        ValueError: a prompt has several rows, and not as many are asked for.
    """
    found = [list(own) * n if len(own) == 1 else list(own) for own, n in zip(rows, counts, strict=True)]
    if any(len(own) != n for own, n in zip(found, counts, strict=True)):
        raise ValueError(f"counts={list(counts)}: {[len(own) for own in rows]} rows are there")
    return found


def starts_of(lengths: Sequence[int]) -> Tensor:
    """Where each of some rows begins, which stand one behind the other."""
    return torch.cat([torch.zeros(1, dtype=torch.long), torch.tensor(list(lengths)).cumsum(0)[:-1]])

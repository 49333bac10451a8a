"""What neurons a layer has: those of its MLP, of its experts, or of both, and what a layer is called by.

Needs nothing: schemas, results and models all speak of layers so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# In the place of an expert's number: of a layer's only MLP (null in Arrow), and of one always on beside experts.
NO_EXPERT, ALWAYS_ON = -2, -1


@dataclass(frozen=True)
class LayerNeurons:
    """What neurons a layer has: those of its MLP, and of each of its experts, of which a token uses some.

    n_mlp: of the only MLP, or of the one that is always on beside experts; 0 of a layer that has experts alone. Where
    several MLPs run one after another, of all of them: the neurons of the first one have the first numbers.
    n_chosen: how many experts a token uses, at the most: some routers may choose identities in their place.
    """

    n_mlp: int
    n_experts: int = 0
    n_of_expert: int = 0
    n_chosen: int = 0

    @property
    def total(self) -> int:
        """All that there are."""
        return self.n_mlp + self.n_experts * self.n_of_expert

    @property
    def n_slots(self) -> int:
        """How many act on a token."""
        return self.n_slots_of(1)

    def n_slots_of(self, n_tokens: int) -> int:
        """How many act on any of some tokens, at the most."""
        return self.n_mlp + min(self.n_experts, n_tokens * self.n_chosen) * self.n_of_expert

    @property
    def mlps(self) -> list[tuple[int, int]]:
        """(expert, neurons) of each expert and of the MLP, which is `NO_EXPERT` or `ALWAYS_ON`, in ascending order."""
        own = [(ALWAYS_ON if self.n_experts else NO_EXPERT, self.n_mlp)] if self.n_mlp else []
        return own + [(expert, self.n_of_expert) for expert in range(self.n_experts)]

    def size_of(self, expert: int) -> int:
        """How many neurons an expert has, or the MLP; 0 where there is none such."""
        if expert >= 0:
            return self.n_of_expert if expert < self.n_experts else 0
        return self.n_mlp if (expert == ALWAYS_ON) == bool(self.n_experts) else 0


def described_layers(layers: Sequence[LayerNeurons]) -> str:
    """For a person: for example `30 layers of 1536 neurons`."""
    kinds = list(dict.fromkeys(layers))
    if len(kinds) == 1:
        return f"{len(layers)} layers {'with' if kinds[0].n_experts else 'of'} {_described(kinds[0])}"
    return f"{len(layers)} layers: " + "; ".join(f"{layers.count(kind)} with {_described(kind)}" for kind in kinds)


def _described(own: LayerNeurons) -> str:
    if not own.n_experts:
        return f"{own.n_mlp} neurons"
    always_on = f", and {own.n_mlp} neurons that are always on" if own.n_mlp else ""
    return f"{own.n_experts} experts of {own.n_of_expert} neurons, {own.n_chosen} of them used by a token{always_on}"


# What functions take for a layer: a number where it has no experts.
LayerSize = int | LayerNeurons


def layers_of_sizes(sizes: Sequence[LayerSize]) -> list[LayerNeurons]:
    """Each layer's neurons; a number is a layer of so many, without experts."""
    return [own if isinstance(own, LayerNeurons) else LayerNeurons(int(own)) for own in sizes]

"""The table of side effects in the README of control: `python -m tests.side_effects_table` logs it.

On the default model, wrong targets of facts are brought to a probability of 0.5, without and with references held, and
it is seen what that does to other facts: those of the same relation, where a shift raises the target most, and all
others. Steered, held and measured subjects all differ.
"""

from __future__ import annotations

import logging
import random
import sys
from dataclasses import dataclass

import numpy as np

import neg_service
from neg_service import LanguageModel, SideEffects
from neg_service.measures.control.other_prompts import METHODS
from neg_service.prompts import facts
from neg_service.prompts.prompt import Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Facts to steer, with another wording each, to hold and to measure at; no subject is in two of these."""

    steered: list[Prompt]
    wordings: list[list[str]]
    held: list[Prompt]
    measured: list[Prompt]

    @classmethod
    def of(cls, n_steered: int, n_held: int, n_measured: int, seed: int = 0) -> Split:
        """Drawn with a seed."""
        by_subject: dict[tuple[str, str], list[Prompt]] = {}
        for prompt in facts.load():
            relation, _, subject = prompt.id.split("/")
            by_subject.setdefault((relation, subject), []).append(prompt)
        subjects = list(by_subject.values())
        random.Random(seed).shuffle(subjects)
        steered = subjects[:n_steered]
        others = subjects[n_steered : len(subjects) - n_measured]
        return cls(
            steered=[own[0] for own in steered],
            wordings=[[own[1].text] for own in steered],
            held=[prompt for own in others for prompt in own][:n_held],
            measured=[own[0] for own in subjects[len(subjects) - n_measured :]],
        )

    @property
    def targets(self) -> list[str]:
        """A wrong one of each steered prompt."""
        return [own.targets[((own.answer or 0) + 1) % len(own.targets)] for own in self.steered]

    @property
    def is_near(self) -> np.ndarray:
        """Whether a measured fact is of a steered one's relation [P, n]."""
        relations = [[own.id.split("/")[0] for own in prompts] for prompts in (self.steered, self.measured)]
        return np.array(relations[0])[:, None] == np.array(relations[1])

    def effects(self, model: LanguageModel, n_held: int) -> SideEffects:
        """With so many facts held."""
        prompts = [own.text for own in self.steered]
        holding = pairs(self.held[:n_held]) if n_held else None
        found = neg_service.control(model, prompts, self.targets, holding=holding)
        return neg_service.side_effects(
            model, found, prompts, self.targets, pairs(self.measured), wordings=self.wordings
        )


def pairs(prompts: list[Prompt]) -> list[tuple[str, str]]:
    """References: prompts with their answers."""
    return [(own.text, own.targets[own.answer or 0]) for own in prompts]


def divergences(effects: SideEffects, method: str, is_near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL at facts of the same relation, and at others."""
    kl_pn = np.stack([own.kl[METHODS.index(method)] for own in effects.references])
    return kl_pn[is_near], kl_pn[~is_near]


def row(name: str, effects: SideEffects, method: str, is_near: np.ndarray) -> str:
    """A row of the table."""
    m = METHODS.index(method)
    near, far = divergences(effects, method, is_near)
    leak = np.stack([own.target[m] for own in effects.references])
    top = np.stack([own.is_same_top[m] for own in effects.references])
    wording = np.mean([own.target[m].mean() for own in effects.wordings])
    numbers = (
        f"{np.median(effects.probability[:, m]):.2f}", f"{far.mean():.4f}", f"{np.median(far):.4f}",
        f"{top[~is_near].mean():.2f}", f"{near.mean():.2f}", f"{leak[~is_near].mean():.4f}",
        f"{leak[is_near].mean():.2f}", f"{wording:.2f}",
    )  # fmt: skip
    return f"| {name} | {' | '.join(numbers)} |"


def table(n_steered: int = 12, n_held: int = 100, n_measured: int = 40) -> list[str]:
    """All rows."""
    model = neg_service.load_model("smollm2")
    split = Split.of(n_steered, n_held, n_measured)
    plain, held = split.effects(model, 0), split.effects(model, n_held)
    return [
        "| method | target | KL, others: mean | median | same top, others | KL, same relation | leak, others "
        "| leak, same relation | other wording |",
        "|---|---|---|---|---|---|---|---|---|",
        row("shift", plain, "shift", split.is_near),
        row(f"shift, {n_held} held", held, "shift", split.is_near),
        row("logit constant", plain, "logit constant", split.is_near),
        row("random neurons", plain, "random neurons", split.is_near),
    ]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("%s", "\n".join(table(*map(int, sys.argv[1:]))))

"""How far the adaptive grid is off: `python -m tests.adaptive_errors`, on facts and 50 ordinary sentences.

Of each prompt some neurons drawn from all layers, and some of its 1,000 strongest: adaptive in float32 against all 40
shifts in float64, for one target each. A quarter of a second for each neuron on one core.

Axes: n neurons.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neg_service import LanguageModel, load_model, neg, neurgrad
from neg_service.prompts import facts

# Ordinary sentences that break off, with the word that goes on.
SENTENCES = """\
She opened the window because the room was too | hot
The children played in the garden until it was | dark
He forgot his umbrella and got | wet
After the storm, the streets were full of | water
My grandmother makes the best apple | pie
The train was late, so we missed the | meeting
I would like a cup of | coffee
The cat sat on the | floor
They walked along the river and talked about the | future
If you heat ice, it turns into | water
The doctor told him to stop | smoking
We ran out of milk, so I went to the | store
The book was so good that I read it | again
At night you can see the | stars
He works as a teacher at a small | school
The price of oil has gone | up
In winter the lake is covered with | ice
The dog barked at the | door
She has been learning to play the | piano
The museum is closed on | Sunday
The results of the study were published in the | journal
It is important to drink enough | water
The plane landed safely at the | airport
The committee will meet again next | week
He closed his eyes and fell | asleep
The company announced that it would cut | jobs
The soup needs a little more | salt
You should never look directly at the | sun
The police are looking for the | man
The king lived in a large | castle
The students were asked to write an | essay
The new law will come into | effect
Her brother is two years older than | her
The ship sank to the bottom of the | ocean
I have never seen such a beautiful | place
The bread is baked in a hot | oven
The team lost the game by one | point
Please turn off the lights before you | leave
The farmer sold his cows at the | market
The experiment was repeated three | times
The wind blew the leaves off the | trees
We took a photograph of the | house
He was born in a small | town
The bus stops in front of the | hotel
There is nothing left to | do
The teacher wrote the answer on the | board
The soldiers were ordered to | retreat
She put the letter into an | envelope
Most birds can | fly
The judge found him not | guilty"""


def prompts(n_facts: int) -> list[tuple[str, str]]:
    """Texts and their targets: so many facts, spread evenly over all of them, then the sentences."""
    sentences = [tuple(line.split(" | ")) for line in SENTENCES.split("\n")]
    of_facts = [(own.text, own.targets[own.answer or 0]) for own in facts.load()]
    some = np.linspace(0, len(of_facts) - 1, n_facts).astype(int)
    return [of_facts[i] for i in some] + [(text, f" {word}") for text, word in sentences]


def chosen(
    model: LanguageModel, text: str, target: str, n_drawn: int, n_strong: int, draw: np.random.Generator
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Neurons (layer, neuron) drawn from all, then some of the 1,000 with the largest |NeurGrad|."""
    size_ln = np.abs(neurgrad(model, [text], [[target]]).neurgrad[0, 0])
    n_layers, n = size_ln.shape
    strongest = np.argsort(-size_ln, axis=None)[:1000]
    strong = draw.choice(strongest, n_strong, replace=False)
    drawn = np.concatenate([layer * n + draw.choice(n, n_drawn, replace=False) for layer in range(n_layers)])
    drawn = np.setdiff1d(drawn, strong)
    return [(int(i // n), int(i % n)) for i in drawn], [(int(i // n), int(i % n)) for i in strong]


def compared(
    model: LanguageModel, reference: LanguageModel, text: str, target: str, neurons: Sequence[tuple[int, int]]
) -> dict[str, NDArray[Any]]:
    """For each neuron how many shifts it took, and how far NEG and r are off."""
    found = neg(model, text, target, neurons)
    true = neg(reference, text, target, neurons, grid="full")
    share = np.abs(found.neg - true.neg) / found.error
    return {
        "shifts": found.n_shifts,
        "share": share,
        "relative": np.abs(found.neg / true.neg - 1),
        "r": np.abs(found.r - true.r),
        "is_sure": np.full(len(share), found.probability >= 0.99),
    }


def told(name: str, parts: Sequence[dict[str, NDArray[Any]]]) -> str:
    """A line for some neurons."""
    all_n = {key: np.concatenate([own[key] for own in parts]) for key in parts[0]}
    unsure_r = all_n["r"][~all_n["is_sure"].astype(bool)]
    return (
        f"{name}: {len(all_n['share'])} neurons, {all_n['shifts'].mean():.2f} shifts on average; off by no more than "
        f"the stated error {100 * np.mean(all_n['share'] <= 1):.2f} %, at the most {all_n['share'].max():.2f} times; "
        f"NEG off by {np.median(all_n['relative']):.0e} in the median, {np.quantile(all_n['relative'], 0.99):.0e} at "
        f"99 %; r by {np.quantile(unsure_r, 0.99):.0e} at 99 %"
    )


def main() -> None:
    """Compare, and print what was found of each prompt and of all."""
    parser = argparse.ArgumentParser(prog="python -m tests.adaptive_errors", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--facts", type=int, default=50, help="how many of the facts")
    parser.add_argument("--drawn", type=int, default=1, help="neurons drawn from each layer")
    parser.add_argument("--strong", type=int, default=10, help="neurons drawn from the 1,000 strongest")
    asked = parser.parse_args()
    model, reference = load_model("smollm2", device="cpu"), load_model("smollm2", device="cpu", dtype="float64")
    own, draw = prompts(asked.facts), np.random.default_rng(0)
    kinds = {"facts": slice(0, asked.facts), "sentences": slice(asked.facts, None)}
    of_drawn, of_strong = [], []
    for text, target in own:
        drawn, strong = chosen(model, text, target, asked.drawn, asked.strong, draw)
        found = compared(model, reference, text, target, [*drawn, *strong])
        of_drawn.append({key: values[: len(drawn)] for key, values in found.items()})
        of_strong.append({key: values[len(drawn) :] for key, values in found.items()})
        lines = (f"{text!r}{target}", told("  drawn", of_drawn[-1:]), told("  strong", of_strong[-1:]))
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
    for kind, some in kinds.items():
        if own[some]:
            lines = (f"{len(own[some])} {kind}", told("  drawn", of_drawn[some]), told("  strong", of_strong[some]))
            sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""What of transformers is measured, counted: `python -m tests.coverage` goes through every configuration there is.

For each causal and masked language model of the installed version: a tiny random model from the configuration's own
defaults (`configurations.py`), the engine that the self-check chooses, and how far NeurGrad and an intervention are
from the textbook way, which is the plain model on the whole prompt. Or the reason why it is refused. `--write` puts the
table into the models' README. It ends with an error where something is measured wrongly, or refused by a traceback.

Left out: the tables of neurons themselves, which both ways take from `find_feed_forward` here; the families' tests have
them by hand, and the self-check rebuilds each MLP's `hidden` from its `act` and `paper`.

Axes: N neurons of a site, F features, V vocabulary.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import textwrap
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.utils import logging as library_logging

from neg_service import LanguageModel
from neg_service.errors import ModelError
from neg_service.measures.interventions import Interventions
from neg_service.models.batches import Budget
from neg_service.models.experts import own_experts
from neg_service.models.feed_forward import Point, Site, hooks
from neg_service.models.start_at_layer import flat
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from tests.configurations import NOT_TEXT, model_types, tiny
from tests.families import random_ids, readout
from tests.tiny_models import tiny_tokenizer

README = Path(__file__).parents[1] / "neg_service" / "models" / "README.md"
MEASURED, REFUSED, WITHOUT, APART, WRONG = "measured", "refused", "without", "apart", "WRONG"
NO_LAYERS = "has no feed-forward layers"
# Both ways are in float32; a wrong neuron, token or prefix is off by 0.1 and more.
TOLERANCE = 2e-3
LENGTH, TARGETS, SHIFT = 17, (7, 11), 0.5
# All that somebody else's configuration or model may raise; what comes out of it is told as a failure.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Outcome:
    """What became of a configuration that is read in one way.

    neurgrad, intervention: the largest deviations from the textbook way, relative to the largest value.
    """

    model_type: str
    read_as: str
    status: str
    reason: str = ""
    engine: str = ""
    neurgrad: float = 0.0
    intervention: float = 0.0

    def __str__(self) -> str:
        what = f"{self.status} by {self.engine}: NeurGrad {self.neurgrad:.0e}, Δ log p {self.intervention:.0e}"
        told = what if self.engine else f"{self.status}: {self.reason}"
        return f"{self.model_type} ({self.read_as}): {told}"


def cover(model_type: str, read_as: str) -> Outcome:
    """Build a configuration's tiny model, measure it, and compare with the textbook way."""
    if model_type in NOT_TEXT:
        return Outcome(model_type, read_as, APART, NOT_TEXT[model_type])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = tiny(model_type, is_masked=read_as == "masked").eval()
    except _FAILURES as error:
        return Outcome(model_type, read_as, APART, f"is not built from its defaults: {_one_line(error)}")
    try:
        measured = LanguageModel(model, tiny_tokenizer())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            measured.ensure_checked()
            neurgrad, intervention = deviations(measured)
    except ModelError as error:
        reason = _short(str(error), type(model).__name__)
        status = WITHOUT if NO_LAYERS in reason else REFUSED
        return Outcome(model_type, read_as, status, reason)
    except _FAILURES as error:
        return Outcome(model_type, read_as, WRONG, f"{type(error).__name__}: {_one_line(error)}")
    is_right = max(neurgrad, intervention) <= TOLERANCE
    status = MEASURED if is_right else WRONG
    return Outcome(model_type, read_as, status, "", measured.engine.name, neurgrad, intervention)


def deviations(model: LanguageModel) -> tuple[float, float]:
    """Of NeurGrad of all neurons, and of Δ log p of one intervention at each kind of site, from the plain model's."""
    (ids,) = random_ids([LENGTH], model.is_masked)
    prompt = EncodedPrompt(Prompt("0", "-", tuple(map(str, TARGETS))), ids, TARGETS)
    interventions, budget = Interventions(model, prompt, "paper"), Budget(2**28)
    layers = range(model.feed_forward.n_layers)
    found_km = interventions.neurgrad(list(layers), budget)
    plain_of, log_p_k = _plain_neurgrad(model, ids, interventions.points)
    # Behind the neurons of chosen experts are places of identities, which have none.
    sizes = {site: len(own) for site, own in interventions.activation.items()}
    plain_km = torch.cat([own_kn[:, : sizes[site]] for site, own_kn in plain_of.items()], 1)
    assert not any(own_kn[:, sizes[site] :].any() for site, own_kn in plain_of.items())
    neurgrad = float((found_km.cpu() - plain_km).abs().max() / plain_km.abs().max())
    worst = 0.0
    for site, point in _of_each_kind(interventions.points).items():
        if not sizes[site]:
            continue
        neuron = int(plain_of[site][0, : sizes[site]].abs().argmax())
        at = torch.tensor([neuron])
        found, _ = interventions.delta_log_p(site, at, torch.tensor([SHIFT]), budget)
        expected = _plain_log_p(model, ids, point, neuron, SHIFT) - log_p_k
        worst = max(worst, float((found[0].cpu() - expected).abs().max() / expected.abs().max()))
    return neurgrad, worst


def _of_each_kind(points: Mapping[Site, Point]) -> dict[Site, Point]:
    """The first and the last MLP, also of those that are a layer's second one, and the first and the last experts."""
    found: dict[Site, Point] = {}
    for kind in dict.fromkeys((site.is_experts, site.part) for site in points):
        own = [site for site in points if (site.is_experts, site.part) == kind]
        found |= {site: points[site] for site in own[:1] + own[-1:]}
    return found


def _plain_neurgrad(
    model: LanguageModel, ids: Sequence[int], points: Mapping[Site, Point]
) -> tuple[dict[Site, Tensor], Tensor]:
    """NeurGrad [K, N] in probability, by site, and log p [K]: the whole prompt at once, a backward pass a target."""
    place, leaves, activations = readout(ids, model.is_masked), {}, {}

    def capture(site: Site, x: Tensor) -> Tensor:
        activations[site] = points[site].neurons(flat(x.detach().contiguous()))[place]
        leaves[site] = torch.zeros_like(x, requires_grad=True)
        return x + leaves[site]

    with torch.enable_grad(), hooks(points, capture):
        log_p_k = _logits(model, ids).log_softmax(-1)[list(TARGETS)]
        rows = []
        for log_p in log_p_k:
            slopes = torch.autograd.grad(log_p, [leaves[site] for site in points], retain_graph=True)
            own = [
                points[site].neurons(flat(slope.contiguous()))[place] * torch.where(activations[site] < 0, -1, 1)
                for site, slope in zip(points, slopes, strict=True)
            ]
            rows.append([own_n * log_p.detach().exp() for own_n in own])
    return {site: torch.stack(own) for site, own in zip(points, zip(*rows, strict=True), strict=True)}, log_p_k.detach()


@torch.no_grad()
def _plain_log_p(model: LanguageModel, ids: Sequence[int], point: Point, neuron: int, shift: float) -> Tensor:
    """Log p of the targets [K] with one neuron moved: a pass of the whole prompt."""

    def move(_: int, x: Tensor) -> Tensor:
        moved = x.clone(memory_format=torch.contiguous_format)
        point.neurons(flat(moved))[readout(ids, model.is_masked), neuron] += shift
        return moved

    with hooks({0: point}, move):
        return _logits(model, ids).log_softmax(-1)[list(TARGETS)]


def _logits(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    options = {} if model.is_masked else {"use_cache": False}
    # By the function that shows the neurons of experts; the self-check compared it with the modeling code's.
    with own_experts(model.feed_forward.experts_modules):
        logits: Tensor = model.model(torch.tensor([list(ids)]), **options).logits
    return logits[0, readout(ids, model.is_masked)]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _short(message: str, name: str) -> str:
    """A refusal without what it says to everyone; of a self-check what it says of the engine that was tried last."""
    message = re.sub(r": choose another model\.source.*$", "", " ".join(message.split()))
    message = re.sub(r" \(model\.source\)$", "", message)
    if message.startswith("self-check of "):
        message = message.split("full_sequence: ")[-1]
    message = re.sub(r"; known are MLPs made of .*", "", message)
    return message.replace(f" of {name}", "").replace(f"{name} ", "")


# --- the table


def coverage(names: Iterable[str] = ()) -> list[Outcome]:
    """Every configuration, or some, each in every way in which it is read; told as they come."""
    library_logging.set_verbosity_error()
    wanted, found = set(names), []
    for model_type, ways in model_types().items():
        if wanted and model_type not in wanted:
            continue
        for read_as in ways:
            found.append(cover(model_type, read_as))
            sys.stdout.write(f"{found[-1]}\n")
            sys.stdout.flush()
    return found


def counted(outcomes: Sequence[Outcome]) -> str:
    """In two sentences: how many there are, with feed-forward layers, and measured.

    A configuration that is read in two ways counts once, by the better one (decoders of encoder-decoders are measured
    alone, their whole is not); wrong is what is wrong in one of them.
    """
    order = (WRONG, MEASURED, REFUSED, WITHOUT, APART)
    statuses: dict[str, str] = {}
    for own in outcomes:
        statuses[own.model_type] = min(statuses.get(own.model_type, APART), own.status, key=order.index)
    n = {status: list(statuses.values()).count(status) for status in order}
    n_with = len(statuses) - n[APART] - n[WITHOUT]
    ways = [own.status for own in outcomes if own.status not in (APART, WITHOUT)]
    wrong = f", {n[WRONG]} wrongly" if n[WRONG] else ""
    return (
        f"transformers {transformers.__version__}: {len(statuses)} configurations, {n[APART]} of which are no language "
        f"models of text by themselves, {n[WITHOUT]} have no feed-forward layers, {n_with} have; of these "
        f"{n[MEASURED]} are measured ({100 * n[MEASURED] / max(1, n_with):.0f} %){wrong}. Some are read in two ways, "
        f"causal and masked: {ways.count(MEASURED)} of {len(ways)} ways are measured."
    )


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """By engine what is measured, and by reason what is not."""
    rows = [
        *textwrap.wrap(counted(outcomes), 120),
        "",
        "| engine | read at | NeurGrad | Δ log p | configurations |",
        "|---|---|---|---|---|",
    ]
    groups = defaultdict(list)
    for own in outcomes:
        if own.engine:
            groups[own.engine, {"causal": "last token", "masked": "mask token"}[own.read_as]].append(own)
    for (engine, place), members in groups.items():
        worst = [max(getattr(own, name) for own in members) for name in ("neurgrad", "intervention")]
        names = ", ".join(f"`{own.model_type}`" for own in members)
        rows.append(f"| {engine} | {place} | {worst[0]:.0e} | {worst[1]:.0e} | {names} |")
    for title, statuses in (("refused", (REFUSED, WRONG)), ("no feed-forward layers", (WITHOUT,)), ("apart", (APART,))):
        reasons = defaultdict(list)
        for own in outcomes:
            if own.status in statuses and not own.engine:
                reasons[own.reason].append(f"`{own.model_type}`" + (", masked" if own.read_as == "masked" else ""))
        rows += ["", f"| {title} | why |", "|---|---|"]
        rows += [f"| {', '.join(names)} | {reason.replace('|', '/')} |" for reason, names in reasons.items()]
    return rows


_TABLE = re.compile(r"(?<=<!-- coverage -->\n).*?(?=\n<!-- /coverage -->)", re.DOTALL)


def shown() -> str:
    """The table as it stands in the README."""
    found = _TABLE.search(README.read_text())
    assert found is not None
    return found.group()


def written(readme: str, rows: Sequence[str]) -> str:
    """The README with another table in the place of the one that stands there."""
    return _TABLE.sub(lambda _: "\n".join(rows), readme)


def main(arguments: Sequence[str] | None = None) -> Any:
    """Go through them, and write the table if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.coverage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types, all if none is named")
    parser.add_argument("--write", action="store_true", help="put the table into neg_service/models/README.md")
    asked = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    started = time.monotonic()
    outcomes = coverage(asked.names)
    sys.stdout.write(f"\n{counted(outcomes)} {time.monotonic() - started:.0f} s\n")
    if asked.write and not asked.names:
        README.write_text(written(README.read_text(), table(outcomes)))
    return [str(own) for own in outcomes if own.status == WRONG]


if __name__ == "__main__":
    sys.exit("\n".join(main()) or None)

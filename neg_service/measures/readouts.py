"""The settings `readout` and `against`: which value of the output NEG and NeurGrad are of. Formulas: `outputs.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neg_service.errors import ConfigurationError, PromptError
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.settings import setting

READOUTS = ("probability", "log_probability", "log_odds", "logit")
# The readouts of which differences between targets make sense.
CONTRASTED = ("log_odds", "logit")
OTHERS = "others"
_WORDS = {"probability": "probability", "log_probability": "log-probability", "log_odds": "log-odds", "logit": "logit"}
_UNITS = {"probability": "probability", "log_probability": "nats", "log_odds": "nats", "logit": "logits"}


@dataclass(frozen=True)
class Readouts:
    """What is measured of each prompt's targets.

    against: what a target is compared with: None; `others`, all other targets of its prompt; or one of them, by its
    place or its text.
    """

    readout: str = "probability"
    against: int | str | None = None

    @classmethod
    def checked(cls, readout: str, against: Any) -> Readouts:
        """What settings say.

        Raises:
            ConfigurationError: an unknown readout, or one that is not compared.
        """
        if readout not in READOUTS:
            raise ConfigurationError(setting="measure.readout", value=readout, allowed=f"one of {', '.join(READOUTS)}")
        if isinstance(against, bool) or not (against is None or isinstance(against, int | str)):
            raise ConfigurationError(
                setting="measure.against", value=against, allowed=f"{OTHERS}, a target's place from 0, or its text"
            )
        if against is not None and readout not in CONTRASTED:
            raise ConfigurationError(
                f"{readout} is not compared with another target's: use measure.readout={' or '.join(CONTRASTED)}",
                setting="measure.against",
                value=against,
            )
        return cls(readout, against)

    @property
    def is_plain(self) -> bool:
        """Whether it is the probability, as it is where nothing is said."""
        return self.readout == "probability"

    @property
    def is_contrast(self) -> bool:
        """Whether targets are compared with others of their prompt."""
        return self.against is not None

    def fingerprint(self) -> dict[str, Any]:
        """What decides numbers; nothing of the probability, which runs had before there was a choice."""
        return {} if self.is_plain else {"readout": self.readout, "against": self.against}

    @property
    def words(self) -> str:
        """What people call the value."""
        return _WORDS[self.readout]

    def title(self, of_probability: str) -> str:
        """The title of a value by neuron, from that of probabilities."""
        against = "" if self.against is None else f" against {self.against}"
        return of_probability if self.is_plain else f"{of_probability} of {self.words}{against}"

    @property
    def uses_rest(self) -> bool:
        """Whether values depend on the probability that a target leaves to all else."""
        return self.readout == "log_odds" and not self.is_contrast

    @property
    def label(self) -> str:
        """What rows say."""
        return self.readout if self.against is None else f"{self.readout} against {self.against}"

    def unit(self, of_probability: str) -> str:
        """The unit of a value by neuron, from that of probabilities."""
        return of_probability.replace("probability", _UNITS[self.readout], 1)

    def place(self, prompt: Prompt) -> int | None:
        """The place of the target that the others of a prompt are compared with; None where there is no such one.

        Raises:
            PromptError: the prompt has no such target, or no other.
        """
        if self.against is None:
            return None
        if len(prompt.targets) < 2:
            raise PromptError(
                f"prompt {prompt.id!r} has 1 target, which would be compared with itself; measure.against="
                f"{self.against} needs another",
                change="dataset.source",
            )
        if self.against == OTHERS:
            return None
        if isinstance(self.against, str):
            if self.against not in prompt.targets:
                raise PromptError(
                    f"prompt {prompt.id!r} has no target {self.against!r}, which measure.against asks for; it has "
                    f"{', '.join(map(repr, prompt.targets))}",
                    change="measure.against",
                )
            return prompt.targets.index(self.against)
        if not 0 <= self.against < len(prompt.targets):
            raise PromptError(
                f"prompt {prompt.id!r} has no target {self.against}, which measure.against asks for; its "
                f"{len(prompt.targets)} targets are numbered from 0",
                change="measure.against",
            )
        return self.against


def check_logits(readouts: Readouts, prompts: Sequence[EncodedPrompt]) -> None:
    """Refuse logits of targets of several tokens, each of which has one.

    Raises:
        PromptError: naming the prompt.
    """
    for prompt in prompts if readouts.readout == "logit" else ():
        if prompt.has_sequences:
            raise PromptError(
                f"prompt {prompt.prompt.id!r} has targets of several tokens, which have no logit: use "
                "measure.readout=log_probability or log_odds",
                change="measure.readout",
            )


PLAIN = Readouts()


def readout_setting() -> Any:
    """The setting `readout` of a measure."""
    return setting(
        "probability", "what of a target is measured: its probability, or another value of the output", allowed=READOUTS
    )


def against_setting() -> Any:
    """The setting `against` of a measure."""
    return setting(
        None,
        "of log_odds and logit, what a target is compared with: others, all other targets of its prompt; or one of "
        "them, by its place from 0 or its text",
        kind=int | str | None,
    )


def check_readouts(readouts: Readouts, prompts: Sequence[Prompt], keep: str = "all") -> None:
    """Refuse prompts that have no target to compare with, or of which no other is kept.

    Raises:
        PromptError, ConfigurationError: naming the prompt.
    """
    if not readouts.is_contrast:
        return
    for prompt in prompts:
        if readouts.place(prompt) == prompt.answer is not None and keep == "answer":
            raise PromptError(
                f"prompt {prompt.id!r}: its answer {prompt.targets[prompt.answer]!r} would be compared with itself; "
                f"measure.against={readouts.against} needs measure.keep=all",
                change="measure.against",
            )

"""Which targets' values are kept: those of all targets, or those of the right answer only (`measure.keep`)."""

from __future__ import annotations

from collections.abc import Sequence

from neg_service.errors import ConfigurationError
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.prompts.tasks import task_of
from neg_service.settings import AT

KEEP = ("all", "answer")


def check_keep(keep: str, known: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """Refuse to keep the values of the `answer` where a prompt has none.

    Raises:
        ConfigurationError: naming what it may be.
    """
    if keep == "answer":
        unanswered = next((prompt.id for prompt in prompts if prompt.answer is None), None)
        if unanswered is not None:
            others = " or ".join(other for other in known if other != "answer")
            raise ConfigurationError(
                f"prompt {unanswered!r} has no answer; use measure.keep={others}",
                setting="measure.keep",
                value="answer",
            )


def check_at(at: str, setting: str = "measure.at") -> None:
    """Refuse an unknown place for shifts.

    Raises:
        ConfigurationError: naming what it may be.
    """
    if at not in AT:
        raise ConfigurationError(setting=setting, value=at, allowed=f"one of {', '.join(AT)}")


def wanted_targets(prompt: Prompt, keep: str) -> tuple[int, ...]:
    """The indices of the targets whose values `measure.keep` asks for."""
    if keep == "answer":
        assert prompt.answer is not None
        return (prompt.answer,)
    return tuple(range(len(prompt.targets)))


def kept_targets(keep: str, n_targets: float) -> float:
    """How many targets' values are kept of a prompt with `n_targets`."""
    return 1.0 if keep == "answer" else n_targets


def check_answers(measure: str, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts without a right label, and a task whose prompts differ in their number of labels.

    Raises:
        ConfigurationError: naming the prompt.
    """
    n_labels: dict[str, int] = {}
    for prompt in prompts:
        if prompt.answer is None:
            raise ConfigurationError(
                f"prompt {prompt.id!r} has no answer (dataset.source)", setting="measure", value=measure
            )
        known = n_labels.setdefault(task_of(prompt.id), len(prompt.targets))
        if known != len(prompt.targets):
            raise ConfigurationError(
                f"prompt {prompt.id!r} has {len(prompt.targets)} targets, others of its task have {known} "
                "(dataset.source)",
                setting="measure",
                value=measure,
            )


def check_each(at: str, prompts: Sequence[EncodedPrompt]) -> None:
    """Refuse neurons at one token of a prompt that are to be moved at several.

    Raises:
        ConfigurationError: naming the prompt.
    """
    first = next((prompt for prompt in prompts if prompt.at is not None), None)
    if at == "each" and first is not None:
        raise ConfigurationError(
            f"prompt {first.prompt.id!r} says at which token its neurons are: leave one of both out",
            setting="at",
            value=at,
        )

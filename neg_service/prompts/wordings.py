"""Other texts that ask the same as a row's prompt, for the side effects of `control`: the column `wordings`.

A list of texts, `["France is a country whose capital city is called"]`; in a row of messages, a list of conversations.
With `dataset.chat=true` a text is what the user says, as a prompt is. The row's targets follow each of them.
"""

from __future__ import annotations

from typing import Any

from neg_service.errors import PromptError, shortened
from neg_service.prompts.chat import USER, MakeChat, messages_of
from neg_service.prompts.prompt import Messages, Prompt, Wording, is_conversation


def wordings_of(
    who: str, where: str, given: Any, prompt: tuple[str, Messages | None], wraps: bool, chat: MakeChat
) -> tuple[Wording, ...] | None:
    """What the column says of the prompt `who`, whose row is at `where`; None where it says nothing.

    prompt: the row's text, and its messages if it has some. wraps: whether texts become messages of the user.

    Raises:
        PromptError: what is no list, a wording that is empty, neither text nor messages, of another kind than the
            prompt, the prompt itself, or there twice.
    """
    text_of_prompt, is_chat = prompt[0], prompt[1] is not None

    def refusal(words: str) -> PromptError:
        return PromptError(f"prompt {who!r}: {words}", given=where)

    if given is None:
        return None
    if not is_conversation(given):
        raise refusal(f"wordings must be a list of texts that ask the same, or of messages, not {shortened(given)}")
    found: dict[str, Wording] = {}
    for number, one in enumerate(given):
        if is_conversation(one):
            if not is_chat:
                raise refusal(f"wording {number} is messages, and the prompt is none: give a text")
            messages: Messages | None = messages_of(f"{who}, wording {number}", one, where)
        elif not isinstance(one, str) or not one:
            what = "is empty" if one == "" else f"must be a text or messages, not {shortened(one)}"
            raise refusal(f"wording {number} {what}")
        elif is_chat and not wraps:
            raise refusal(f"wording {number} is a text, and the prompt is messages: give messages")
        else:
            messages = ((USER, one),) if is_chat else None
        text = one if messages is None else chat().text(f"{who}, wording {number}", messages)
        if text == text_of_prompt:
            raise refusal(f"wording {number} is the prompt itself: leave it out")
        if text in found:
            raise refusal(f"wording {number} is there twice: leave it out")
        found[text] = (text, messages)
    return tuple(found.values()) or None


def as_prompts(prompt: Prompt) -> list[Prompt]:
    """The wordings of a prompt as prompts of their own, with its targets."""
    return [
        Prompt(f"{prompt.id}, wording {number}", text, prompt.targets, messages=messages)
        for number, (text, messages) in enumerate(prompt.wordings or ())
    ]

"""Conversations as prompts: what a row's messages may be, and the text that a chat template makes of them.

A chat template is a Jinja program beside a model's tokenizer, which writes messages as the model was trained to read
them, its first token included. So its text is encoded as it is, without what the tokenizer puts around other texts:
the tokens are those of `tokenizer.apply_chat_template`. Behind the last message stands what begins the assistant's
turn; a last message of the assistant itself is left open, and goes on with the target.

The tokenizer is given, and knows how to run its template; nothing here imports transformers.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol

from neg_service.contents import text_of
from neg_service.errors import ConfigurationError, ModelError, PromptError, one_line, shortened
from neg_service.inputs import read_input
from neg_service.places import without_credentials
from neg_service.prompts.prompt import Asked, Messages, Prompt, is_conversation
from neg_service.prompts.spans import at_of

log = logging.getLogger(__name__)

USER, ASSISTANT = "user", "assistant"
_KEYS = ("role", "content")
# What Jinja programs have and file names hardly do.
_JINJA = re.compile(r"\{[{%#]")
# Of these parameters a template may be told; all others say how it is run.
_FOR_TEMPLATES = ("tools", "documents", "kwargs")
_told: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Chat:
    """A tokenizer, and the chat template that writes conversations for it; `chat_of` makes and checks it.

    model: what messages call the model. arguments: what the template is told beside the messages.
    """

    tokenizer: Any
    model: str
    template: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def text(self, who: str, messages: Messages) -> str:
        """The conversation as the model reads it, up to where the assistant's next word stands.

        `who` is the prompt's id.

        Raises:
            PromptError: the template refuses the messages, leaves nothing of them, or the text begins with its first
                special tokens twice.
        """
        is_begun = messages[-1][0] == ASSISTANT
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(zip(_KEYS, message, strict=True)) for message in messages],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=not is_begun,
                continue_final_message=is_begun,
                **self.arguments,
            )
        # A template is a program of whoever made the model, which says what it does not take in its own ways.
        except Exception as error:
            # Transformers' template language is needed for this alone, and is imported by nothing here.
            if type(error).__name__ == "TemplateSyntaxError":
                raise ConfigurationError(
                    f"the chat template for {self.model} is no template of Jinja: {one_line(error)}",
                    change="dataset.chat_template",
                ) from error
            roles = ", ".join(role for role, _ in messages)
            raise PromptError(
                f"prompt {who!r}: the chat template of {self.model} refuses its messages (roles: {shortened(roles)}): "
                f"{one_line(error)}",
                change="dataset.source",
            ) from error
        first = self._refuse_two_beginnings(who, text)
        if any(token in content for token in first for _, content in messages):
            _tell_spelled(first, self.model, who)
        begun = messages[-1][1] if is_begun else ""
        if not text.endswith(begun[len(begun.rstrip()) :]):
            _tell_trimmed(self.model, who)
        for role, content in messages:
            if content.strip() not in text:
                _tell_left_out(role, self.model, who)
        return str(text)

    def as_one_message(self, prompt: Prompt) -> Prompt:
        """A plain prompt as what the user says, with the same targets."""
        messages = ((USER, prompt.text),)
        # An empty one is refused as a prompt.
        text = self.text(prompt.id, messages) if prompt.text else ""
        return replace(prompt, text=text, messages=messages)

    def identity(self) -> dict[str, Any]:
        """What decides the texts, for a run's fingerprint."""
        found: dict[str, Any] = {"template_sha256": hashlib.sha256(self.template.encode()).hexdigest()}
        return {**found, "arguments": dict(self.arguments)} if self.arguments else found

    def _refuse_two_beginnings(self, who: str, text: str) -> tuple[str, ...]:
        """The special tokens that the text begins with; a message that spells them again would have them twice."""
        special = sorted({*getattr(self.tokenizer, "all_special_tokens", ()), *self._added}, key=len, reverse=True)
        first: list[str] = []
        rest = text.lstrip()
        while token := next((own for own in special if own and rest.startswith(own)), None):
            if token in first:
                raise PromptError(
                    f"prompt {who!r} would begin with {token!r} twice: the chat template writes it, and a message or "
                    "the template spells it again; leave that out",
                    change="dataset.source",
                )
            first.append(token)
            rest = rest.removeprefix(token).lstrip()
        return tuple(first)

    @property
    def _added(self) -> list[str]:
        """Special tokens that have no name of their own, such as [gMASK] and <sop>."""
        known = getattr(self.tokenizer, "added_tokens_decoder", {})
        return [str(own) for own in known.values() if getattr(own, "special", False)]


MakeChat = Callable[[], Chat]


class Chatting(Protocol):
    """What is used of a model: a `LanguageModel`."""

    tokenizer: Any
    mask_token: int | None

    @property
    def name(self) -> str:
        """What messages call the model."""
        ...


def chat_of(
    tokenizer: Any, model: str, template: str | None = None, arguments: Mapping[str, Any] | None = None
) -> Chat:
    """How a model's tokenizer writes conversations: by its own template, or by the text of another.

    Raises:
        ModelError: it has no template, or none that is its default.
        ConfigurationError: arguments that the template does not read, or that are not its own.
    """
    try:
        text = tokenizer.get_chat_template(template)
    # ValueError: none, or several and no default; tokenizers of other makes have no such method.
    except (ValueError, AttributeError) as error:
        several = isinstance(getattr(tokenizer, "chat_template", None), dict)
        raise ModelError(
            f"{model} has {'several chat templates, and none is its default' if several else 'no chat template'}: "
            "give one with dataset.chat_template, or choose a model that was trained to chat (model.source)",
            change="dataset.chat_template",
        ) from error
    given = dict(arguments or {})
    own = set(inspect.signature(tokenizer.apply_chat_template).parameters).difference(_FOR_TEMPLATES) | {"messages"}
    for name in given:
        if name in own:
            raise ConfigurationError(
                f"{name} is not for the template to be told", setting="dataset.chat_arguments", value=given
            )
        if not re.search(rf"\b{re.escape(name)}\b", text):
            raise ConfigurationError(
                f"the chat template of {model} does not read {name!r}", setting="dataset.chat_arguments", value=given
            )
    if "strftime_now" in text and not any("date" in name for name in given):
        _tell_of_date(model)
    return Chat(tokenizer, model, text, given)


def template_text(given: str) -> str:
    """The text of `dataset.chat_template`: itself, or the content of the file that it names.

    Raises:
        ConfigurationError: no such file, or one that is no text, or no template.
    """
    if _JINJA.search(given):
        return given
    key = "dataset.chat_template"
    text = text_of(f"{key}={without_credentials(given)}", read_input(key, given))
    if not _JINJA.search(text):
        raise ConfigurationError("holds no chat template, which has expressions of Jinja", setting=key, value=given)
    return text


def messages_of(who: str, value: Any, where: str | None = None) -> Messages:
    """The messages of a prompt, as (role, content), from a list of mappings with these keys.

    `who` is the prompt's id, `where` the place of its row.

    Raises:
        PromptError: no messages, one without role or content, content that is no text, other keys, or no user's turn.
    """

    def refusal(words: str) -> PromptError:
        said = f"prompt {who!r}: {words}"
        return PromptError(said, given=where) if where is not None else PromptError(said, change="dataset.source")

    if not isinstance(value, list | tuple) or not value:
        raise refusal(f"messages must be a list of at least one {{role, content}}, not {shortened(value)}")
    found: list[tuple[str, str]] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise refusal(f"message {number} must have a role and content, not be {shortened(message)}")
        for key in _KEYS:
            text = message.get(key)
            if text is None or text == "":
                raise refusal(f"message {number} has no {key}")
            if not isinstance(text, str):
                raise refusal(f"the {key} of message {number} must be a text, not {shortened(text)}")
        if other := [str(key) for key, own in message.items() if key not in _KEYS and own is not None]:
            raise refusal(f"message {number} has {other[0]!r}; of a message, role and content alone are read")
        found.append((message["role"], message["content"]))
    if USER not in (role for role, _ in found):
        roles = ", ".join(role for role, _ in found)
        raise refusal(f"its messages have no turn of the user (roles: {shortened(roles)})")
    return tuple(found)


def prompts_of(
    model: Chatting,
    asked: Sequence[Asked],
    targets: Sequence[Sequence[str]],
    answers: Sequence[int | None] | None = None,
    neurons_at: Sequence[Any] | None = None,
) -> list[Prompt]:
    """Prompts from texts, and from messages, which the model's chat template makes texts of; ids are their numbers.

    neurons_at: for each where its neurons are, None at the readout position; see `spans.py`.

    Raises:
        PromptError: messages that are none, or that the template refuses, or what is no place of a token.
        ModelError: the model has no template, or is a masked one.
    """
    is_one = isinstance(neurons_at, str) or not isinstance(neurons_at, Sequence | None)
    if is_one or (
        isinstance(neurons_at, tuple) and len(neurons_at) == 2 and all(type(end) is int for end in neurons_at)
    ):
        # Letters, and a range of characters, would be read as places of several prompts.
        raise ConfigurationError(
            setting="neurons_at",
            value=neurons_at,
            allowed='a list with one for each prompt, such as [-2] or ["France"]',
        )
    if neurons_at is not None and len(neurons_at) != len(asked):
        raise ConfigurationError(
            f"{len(neurons_at)} for {len(asked)} prompts; one for each prompt is needed", setting="neurons_at"
        )
    chat = cache(lambda: _chat_of_model(model))
    prompts = []
    for index, (one, own) in enumerate(zip(asked, targets, strict=True)):
        answer = answers[index] if answers is not None else None
        at = None if neurons_at is None else at_of(str(index), neurons_at[index])
        if isinstance(one, str) or not is_conversation(one):
            prompts.append(Prompt(str(index), str(one), tuple(own), answer, at=at))
            continue
        messages = messages_of(str(index), one)
        prompts.append(Prompt(str(index), chat().text(str(index), messages), tuple(own), answer, messages, at))
    return prompts


def _chat_of_model(model: Chatting) -> Chat:
    if model.mask_token is not None:
        raise no_chats(model.name)
    return chat_of(model.tokenizer, model.name)


def no_chats(model: str) -> ModelError:
    """What is said of a masked model."""
    return ModelError(
        f"{model} is a masked model, which reads no chats: leave out messages and dataset.chat, or choose a causal one",
        change="model.source",
    )


def in_json(messages: Messages) -> str:
    """Messages in one text, which others do not have."""
    return json.dumps(messages, ensure_ascii=False)


def _tell_left_out(role: str, model: str, who: str) -> None:
    """Once for a role, whichever prompt is the first."""
    if (role, model) not in _told:
        _told.add((role, model))
        log.warning(
            "the chat template of %s leaves out, or changes, what messages of the role %r say; prompt %r is the first",
            model, role, who,
        )  # fmt: skip


def _tell_spelled(first: Sequence[str], model: str, who: str) -> None:
    if ("".join(first), model) not in _told:
        _told.add(("".join(first), model))
        log.warning(
            "the chat template of %s begins with %s, and messages spell that, too, where it stays as it is; prompt %r "
            "is the first",
            model, "".join(first), who,
        )  # fmt: skip


def _tell_trimmed(model: str, who: str) -> None:
    if ("", model) not in _told:
        _told.add(("", model))
        log.warning(
            "the chat template of %s takes off the white space at the end of a begun message: targets follow without, "
            "and should begin with it; prompt %r is the first",
            model, who,
        )  # fmt: skip


@cache
def _tell_of_date(model: str) -> None:
    log.warning(
        "the chat template of %s writes today's date: a run of another day has other prompts, and is another run; "
        "where the template can be told a date, dataset.chat_arguments={date_string: '26 Jul 2024'} keeps it",
        model,
    )

"""A prompt: text, its targets, and the right one if there is one. How it becomes tokens: `tokens.py`."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np

from neg_service.errors import PromptError
from neg_service.prompts.wanted import WantedOfRow

# What a prompt may write for the mask token of any masked model.
MASK = "[MASK]"

# Of a conversation, each with its role and what it says.
Messages = tuple[tuple[str, str], ...]
# A text whose last token is meant, a range of characters, of which it is the last one's, or a token's place.
At = str | tuple[int, int] | int
# Another text that asks the same, and what a chat template made it of.
Wording = tuple[str, Messages | None]
# What programs give for a prompt: a text, or messages as mappings of `role` and `content`.
Asked = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Prompt:
    """A text, the targets that may follow it verbatim, and the index of the right one, if known.

    messages: what a chat template made the text of, which then has all special tokens that it needs; see `chat.py`.
    at: at which token neurons are read and shifted, if it is not the readout position; see `spans.py`.
    wanted: what `control` shall make of its targets; see `wanted.py`. wordings: texts that ask the same; `wordings.py`.
    """

    id: str
    text: str
    targets: tuple[str, ...]
    answer: int | None = None
    messages: Messages | None = None
    at: At | None = None
    wanted: WantedOfRow | None = None
    wordings: tuple[Wording, ...] | None = None


class EncodedWording(NamedTuple):
    """A wording as token ids, and the token of each of its prompt's targets behind it."""

    ids: tuple[int, ...]
    target_ids: tuple[int, ...]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids; `target_ids[k]` is the first token of target k after the prompt, mostly its only one.

    following: of targets of several tokens, the tokens behind the first of each target; empty where all targets of the
    prompt are one token. at: the place of the token whose neurons are read and shifted, None of the readout position.
    wordings: of each wording of the prompt, in their order.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    following: tuple[tuple[int, ...], ...] = ()
    at: int | None = None
    wordings: tuple[EncodedWording, ...] = ()

    @property
    def has_sequences(self) -> bool:
        """Whether any target is several tokens."""
        return bool(self.following)

    @property
    def is_tree(self) -> bool:
        """Whether rows are several tokens: those behind the one that is shifted, and those of targets."""
        return bool(self.following) or self.at is not None

    @property
    def until_shifted(self) -> tuple[int, ...]:
        """The tokens up to the one whose neurons are shifted, which is the last of them."""
        return self.ids if self.at is None else self.ids[: self.at + 1]

    @property
    def behind_shifted(self) -> tuple[int, ...]:
        """The other ones."""
        return () if self.at is None else self.ids[self.at + 1 :]

    def first_tokens(self) -> EncodedPrompt:
        """The prompt with the first token of each target for the whole of it, each once; itself where all are one."""
        if not self.following:
            return self
        places = {token: place for place, token in reversed([*enumerate(self.target_ids)])}
        targets = tuple(self.prompt.targets[place] for place in places.values())
        return EncodedPrompt(replace(self.prompt, targets=targets, answer=None), self.ids, tuple(places), (), self.at)

    def worded(self, target: int) -> list[EncodedPrompt]:
        """Its wordings as prompts of their own, each with one of its targets alone."""
        return [
            EncodedPrompt(
                Prompt(f"{self.prompt.id}, wording {number}", text, (self.prompt.targets[target],), messages=messages),
                own.ids,
                (own.target_ids[target],),
            )
            for number, ((text, messages), own) in enumerate(
                zip(self.prompt.wordings or (), self.wordings, strict=True)
            )
        ]

    @property
    def target_tokens(self) -> tuple[tuple[int, ...], ...]:
        """All tokens of each target."""
        following = self.following or ((),) * len(self.target_ids)
        return tuple((first, *rest) for first, rest in zip(self.target_ids, following, strict=True))


class Vocabulary(Protocol):
    """How many tokens a model reads and predicts, None where that is not known: a `LanguageModel` or a `ModelInfo`."""

    @property
    def name(self) -> str:
        """What messages call the model."""
        ...

    @property
    def n_input_ids(self) -> int | None:
        """Rows of its embedding."""
        ...

    @property
    def n_output_ids(self) -> int | None:
        """Rows of its vocabulary head."""
        ...


def digest(prompts: Iterable[Prompt]) -> str:
    """SHA-256 over the content of prompts in order; the identity of a data set."""
    sha = hashlib.sha256()
    for prompt in prompts:
        # Not `asdict`, which copies all texts.
        content = dict(vars(prompt))
        # As it was before prompts could have these.
        for name in ("messages", "at", "wanted", "wordings"):
            if content[name] is None:
                del content[name]
        sha.update(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())
        sha.update(b"\n")
    return sha.hexdigest()


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Refuse what needs no tokenizer to be wrong: no prompts, repeated ids, empty texts, bad targets.

    Raises:
        PromptError: naming the prompt.
    """
    if not prompts:
        raise PromptError(
            "there are 0 prompts, at least 1 is needed: check dataset.source and job.limit", change="dataset.source"
        )
    # Eight bytes of each: where two are the same, and only there, the ids themselves are compared.
    hashes = array("q")
    for prompt in prompts:
        hashes.append(hash(prompt.id))
        if not prompt.text:
            raise PromptError(f"prompt {prompt.id!r} is empty; it needs at least one token", change="dataset.source")
        if any(map(_is_not_text, _texts_of(prompt))):
            raise PromptError(
                f"prompt {prompt.id!r} holds a lone surrogate, which no text has", change="dataset.source"
            )
        if not prompt.targets:
            raise PromptError(f"prompt {prompt.id!r} has no targets; it needs at least one", change="dataset.source")
        if prompt.answer is not None and not 0 <= prompt.answer < len(prompt.targets):
            raise PromptError(
                f"prompt {prompt.id!r} has answer {prompt.answer}, but its {len(prompt.targets)} targets are "
                "numbered from 0",
                change="dataset.source",
            )
    _check_ids_differ(prompts, hashes)


def _check_ids_differ(prompts: Sequence[Prompt], hashes: array[int]) -> None:
    values, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
    repeated = set(values[counts > 1].tolist())
    if not repeated:
        return
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise PromptError(f"prompt id {prompt.id!r} appears twice; ids must differ", change="dataset.source")
        if hash(prompt.id) in repeated:
            seen.add(prompt.id)


def check_texts(prompts: Sequence[Asked], targets: Sequence[Sequence[str]]) -> None:
    """Refuse a text where a list of texts is meant, whose letters would be taken for prompts or targets; and no texts.

    A prompt may be a list of messages, which are checked where they become a text.

    Raises:
        PromptError: saying what is meant.
    """
    lists = (prompts, targets, *(targets if _is_list(targets) else ()))
    asked = (one for one in prompts if not is_conversation(one)) if _is_list(prompts) else ()
    if not all(map(_is_list, lists)) or not all(isinstance(text, str) for text in chain(asked, *targets)):
        raise PromptError('prompts must be a list of texts, and targets a list of texts for each: ["..."], [[" a"]]')


def is_conversation(given: object) -> bool:
    """Whether messages are meant, and no text."""
    return isinstance(given, list | tuple)


def _is_list(given: object) -> bool:
    # Anything that has elements, such as an array.
    return isinstance(given, Iterable) and not isinstance(given, str | bytes)


def _texts_of(prompt: Prompt) -> Iterator[str]:
    yield from (prompt.id, prompt.text, *prompt.targets)
    yield from chain.from_iterable(prompt.messages or ())
    if isinstance(prompt.at, str):
        yield prompt.at
    if prompt.wanted is not None and prompt.wanted[2] is not None:
        yield prompt.wanted[2]
    for text, messages in prompt.wordings or ():
        yield from (text, *chain.from_iterable(messages or ()))


def _is_not_text(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)

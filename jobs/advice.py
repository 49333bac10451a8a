"""How a setting is written so that Hydra's grammar reads it: an argument to copy."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from antlr4 import CommonTokenStream, InputStream
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.overrides_visitor import HydraErrorListener
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf import grammar_parser
from omegaconf.errors import GrammarParseError

from jobs.conf_folder import CONF
from jobs.kinds import can_be_text, element_of, field_of, is_in_mapping, is_only_text, names_in

_GROUPS = Path(CONF)


def is_group(key: str) -> bool:
    """Whether a key names one of the files of a directory, as `model` and `measure` do."""
    name = key.partition("@")[0]
    return bool(name) and ("/" in name or ("." not in name and (_GROUPS / name).is_dir()))


def in_quotes(text: str) -> str:
    """A text as Hydra's grammar writes it, whatever is in it."""
    quote = Quote.double if "'" in text and '"' not in text else Quote.single
    return str(QuotedString(text, quote).with_quotes())


def for_a_shell(argument: str) -> str:
    """An argument as it is typed in a POSIX shell."""
    if "'" in argument and not re.search(r'["$`\\!]', argument):
        return f'"{argument}"'
    return shlex.quote(argument)


def tree_of(override: str) -> OverrideParser.OverrideContext:
    """What Hydra's own parser makes of an override."""
    told = HydraErrorListener()
    lexer = OverrideLexer(InputStream(override))
    lexer.removeErrorListeners()
    lexer.addErrorListener(told)
    parser = OverrideParser(CommonTokenStream(lexer))
    parser.removeErrorListeners()
    parser.addErrorListener(told)
    return parser.override()


def is_container(typed: str) -> bool:
    """Whether a list or a mapping begins here."""
    return typed.lstrip()[:1] in ("[", "{")


def advice(begin: str, typed: str, kind: Any, is_sweep: bool = False) -> str:
    """How the same is written so that it is read, as an argument to copy; nothing where nobody can know."""
    key = begin.rstrip("=").lstrip("+")
    said: list[tuple[str, Callable[[Any], bool], str]] = []
    reader, holds_several = _Reader(typed), _holds_several(kind) and not is_group(key)
    if is_container(typed) and holds_several:
        written = reader.whole(kind)
        words = "as a list it is written" if typed.lstrip()[0] == "[" else "it is written"
        if reader.has_quoted_keys:
            words = f"keys stand without quotes here: {words}"
        said.append((written, lambda read: isinstance(read, list | dict), words))
        if is_sweep:
            said.append((_Reader(typed).several(kind), lambda _: True, "as several values they are written"))
    elif "," in typed and is_sweep:
        said.append((reader.several(kind), lambda _: True, "as several values they are written"))
    elif "," in typed and holds_several:
        written = f"[{reader.several(element_of(kind))}]"
        said.append((written, lambda read: isinstance(read, list), "as a list it is written"))
    if can_be_text(kind) or (kind in (None, Any) and not is_group(key)):
        said.append((in_quotes(literal(typed)), lambda read: read == literal(typed), "as one text it is written"))
    for written_value, is_right, words in said:
        argument = f"{begin}{written_value}"
        if argument.isprintable() and _reads_back(argument, is_right):
            return f"; {words} {for_a_shell(argument)}"
    if names := names_in(kind):
        return (
            f"; its settings are set one by one, as {key}.{names[0]}=..."
            if "," not in typed or is_container(typed)
            else ""
        )
    return "; put texts into quotes within the argument" if can_be_text(kind) or "," in typed else ""


def literal(text: str) -> str:
    """A text in which `${` and what follows is meant as it is, as OmegaConf writes it."""
    try:
        grammar_parser.parse(text)
    except GrammarParseError:
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return text


class _Reader:
    """Reads lists and mappings more tolerantly than the grammar does: as they are meant, not as they are written."""

    def __init__(self, typed: str) -> None:
        self.typed = self.rest = typed.strip()
        self.has_quoted_keys = False

    def whole(self, kind: Any) -> str:
        """A list or a mapping with quotes around what needs them, and closed; as it was where it cannot be read."""
        try:
            written = self._value(kind)
        except ValueError:
            return self.typed
        return self.typed if self.rest else written

    def several(self, kind: Any) -> str:
        """Values with commas between them."""
        try:
            values = [self._value(kind)]
            while self._takes(","):
                values.append(self._value(kind))
        except ValueError:
            return self.typed
        return self.typed if self.rest else ",".join(values)

    def _value(self, kind: Any) -> str:
        if not is_only_text(kind) and self._takes("["):
            return f"[{', '.join(self._items('],', lambda: self._value(element_of(kind))))}]"
        if not is_only_text(kind) and self._takes("{"):
            return f"{{{', '.join(self._items('},', lambda: self._pair(kind)))}}}"
        if (quoted := self._quoted()) is not None:
            return quoted
        # A text ends where a list or a mapping around it does.
        found = re.match(r"(?:\$\{[^}]*\}|[^,\]}])*", self.rest)
        assert found is not None
        leaf, self.rest = found[0].strip(), self.rest[found.end() :].lstrip()
        if not leaf:
            raise ValueError
        return (
            leaf
            if _reads_back(f"key={leaf}", lambda read: not isinstance(read, list | dict))
            else in_quotes(literal(leaf))
        )

    def _items(self, ends: str, one: Callable[[], str]) -> list[str]:
        items: list[str] = []
        # Where it was not closed, the end closes it.
        while self.rest and not self._takes(ends[0]):
            if items and not self._takes(ends[1]):
                raise ValueError
            items.append(one())
        return items

    def _pair(self, kind: Any) -> str:
        key = self._quoted()
        if key is not None:
            self.has_quoted_keys = True
            key = key[1:-1]
        else:
            found = re.match(r"[^:,\[\]{}]*", self.rest)
            assert found is not None
            key, self.rest = found[0].strip(), self.rest[found.end() :]
        if not key or not self._takes(":"):
            raise ValueError
        return f"{key}: {self._value(field_of(kind, key))}"

    def _quoted(self) -> str | None:
        found = re.match(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*(?=[,:\]}]|$)""", self.rest)
        if found is None:
            return None
        self.rest = self.rest[found.end() :]
        return found[1]

    def _takes(self, sign: str) -> bool:
        found = self.rest.lstrip()
        if not found.startswith(sign):
            return False
        self.rest = found[len(sign) :].lstrip()
        return True


def _holds_several(kind: Any) -> bool:
    return kind in (None, Any) or element_of(kind) is not None or is_in_mapping(kind) or bool(names_in(kind))


def _reads_back(argument: str, is_right: Callable[[Any], bool]) -> bool:
    try:
        return is_right(OverridesParser.create().parse_override(argument).value())
    except HydraException:
        return False

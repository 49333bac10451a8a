"""What is typed on the command line, and that settings which are text stay as they were typed.

Hydra's grammar reads `job.name=1e5` as 100000.0 and `storage.uri=2026_11_25` as 20261125, trims spaces, and has no
place for `(`, `=`, `~` or an umlaut outside of quotes. The typed configuration knows which settings are text. Theirs
are put into quotes here before Hydra sees them: numbers, words such as true, and what the grammar cannot read at all.
What it can read keeps its meaning: quotes, `\\=`, `${...}`, lists, `null` where a setting may be empty, and sweeps with
commas, which is why a comma in a text has to be quoted by a person.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from antlr4 import ParserRuleContext
from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.overrides_visitor import HydraOverrideVisitor
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from jobs.advice import advice, for_a_shell, in_quotes, is_container, is_group, literal, tree_of
from jobs.kinds import (
    can_be_text,
    can_be_whole,
    element_of,
    field_of,
    is_in_mapping,
    is_only_text,
    is_optional,
    type_at,
)
from jobs.shorthand import written_out
from neg_service.errors import ConfigurationError
from neg_service.settings import types_of

_OVERRIDE = re.compile(r"(?P<sign>\+{0,2})(?P<key>[^=+~][^=]*)=(?P<value>.*)", re.DOTALL)
_KEY = re.compile(r"[\w$./@:-]+", re.ASCII)
_NOT_TEXT = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL, OverrideLexer.NULL)
_SEVERAL = "{} stands for the values of several jobs, which --multirun runs"
# What these are given is what the setting becomes.
_HANDING_ON = ("choice", "sort", "shuffle", "tag", "str")
_NUMBERS = ("int", "float", "bool")
_INTERPOLATION = re.compile(r"\$\{[^}]*\}")
_UNENDED = "${ begins the name of another setting, which does not end well, unless it is written \\${"


def as_typed(overrides: Sequence[str], settings: type, is_sweep: bool) -> list[str]:
    """`overrides` in such words that Hydra gives each setting of `settings` that is text as it was typed.

    is_sweep: several jobs were asked for, so that commas separate their values.

    Raises:
        ConfigurationError: one that Hydra's grammar has another meaning for, or none: with how it is written.
    """
    return [_as_typed(override, settings, is_sweep) for override in written_out(overrides)]


def _as_typed(override: str, settings: type, is_sweep: bool) -> str:
    parts = _OVERRIDE.fullmatch(override)
    if parts is None:
        if override.startswith("~"):
            return override
        meant = f"; a run is given as run={override}" if "run" in types_of(settings) else ""
        raise ConfigurationError(f"is not a setting, which is KEY=VALUE{meant}", given=override)
    key, typed = parts["key"], parts["value"]
    if not _KEY.fullmatch(key):
        raise ConfigurationError(f"{key!r} is not the name of a setting, which is KEY=VALUE", given=override)
    kind, begin = type_at(settings, key), f"{parts['sign']}{key}="
    # Which files there are to choose from, Hydra says itself, of a name in quotes as of any other.
    can_be_quoted = can_be_text(kind) or (is_group(key) and not is_container(typed))
    try:
        value = tree_of(override).value()
    except HydraException as error:
        if can_be_quoted and _is_plain(typed, kind):
            return _as_text(override, begin, typed)
        raise ConfigurationError(
            f"{_unreadable(typed)}{advice(begin, typed, kind, is_sweep)}", given=override
        ) from error
    if value is None:
        # Spaces alone; nothing at all stays nothing.
        return begin + in_quotes(typed) if typed and can_be_text(kind) else override
    _require_meaning(override, begin, typed, value)
    sweep, element = value.simpleChoiceSweep(), value.element()
    if sweep is not None and not is_sweep:
        raise ConfigurationError(f"{_SEVERAL.format('a comma')}{advice(begin, typed, kind)}", given=override)
    if element is not None and can_be_quoted:
        if element.function() is not None:
            return _of_function(override, begin, typed, element.function(), is_sweep)
        if element.primitive() is None and is_only_text(kind):
            raise ConfigurationError(
                f"is a list or a mapping, and {key} is one text{advice(begin, typed, kind)}", given=override
            )
    if element is not None and element.primitive() is not None and can_be_text(kind):
        has_spaces = typed != typed.strip(" \t") and not _is_quoted(typed)
        if has_spaces:
            return begin + in_quotes(_with_its_spaces(typed, element.primitive()))
    # The names of files are text, too.
    return _with_quotes(override, value, str | list[str] if is_group(key) else kind)


def _as_text(override: str, begin: str, typed: str) -> str:
    """What the grammar cannot read, in quotes."""
    text = literal(typed)
    if text != typed and _INTERPOLATION.search(typed):
        raise ConfigurationError(f"{_UNENDED}; as one text it is written {_written(begin, text)}", given=override)
    return begin + in_quotes(text)


def _require_meaning(override: str, begin: str, typed: str, value: OverrideParser.ValueContext) -> None:
    """Refuse what Hydra or OmegaConf would silently read as something else, or tell in words of theirs."""
    read = HydraOverrideVisitor(create_functions())
    for part in _parts(value):
        if isinstance(part, OverrideParser.DictContainerContext):
            keys: list[Any] = []
            for pair in part.dictKeyValuePair():
                if (name := read.visitDictKey(pair.dictKey())) in keys:
                    raise ConfigurationError(f"has the key {name} twice in one mapping", given=override)
                keys.append(name)
        elif isinstance(part, OverrideParser.PrimitiveContext):
            found = read.visitPrimitive(part)
            text = found.text if isinstance(found, QuotedString) else found
            if text == "???":
                raise ConfigurationError(
                    "??? stands for a value that is still to be given, and is no text", given=override
                )
            if isinstance(text, str) and literal(text) != text:
                whole = part.start.start == value.start.start and part.stop.stop == value.stop.stop
                advised = f"; as one text it is written {_written(begin, literal(text))}" if whole else ""
                raise ConfigurationError(f"{_UNENDED}{advised}", given=override)


def _written(begin: str, text: str) -> str:
    return for_a_shell(f"{begin}{in_quotes(text)}")


def _parts(context: ParserRuleContext) -> Iterator[ParserRuleContext]:
    """A part of an override with all parts of it."""
    yield context
    for child in context.getChildren():
        if isinstance(child, ParserRuleContext):
            yield from _parts(child)


def require_text(config: Any, settings: Any, key: str = "") -> None:
    """Refuse a number in the place of a text: its digits are not what was written in the file that it comes from.

    Raises:
        ConfigurationError: with its key.
    """
    if isinstance(config, DictConfig):
        if config._is_none() or config._is_missing():
            return
        for name in map(str, config):
            if not OmegaConf.is_missing(config, name) and not OmegaConf.is_interpolation(config, name):
                require_text(config[name], field_of(settings, name), f"{key}.{name}" if key else name)
    elif isinstance(config, ListConfig):
        for index in range(0 if config._is_none() or config._is_missing() else len(config)):
            if not OmegaConf.is_interpolation(config, index):
                require_text(config[index], element_of(settings), key)
    elif type(config) is int and can_be_whole(settings):
        return
    elif config is not None and not isinstance(config, str) and can_be_text(settings):
        kind = "true or false" if isinstance(config, bool) else f"a {type(config).__name__}"
        raise ConfigurationError(
            f"is {kind} where a text belongs, and not as it was written any more: put it into quotes in the YAML "
            "file that it comes from",
            setting=key,
            value=config,
        )


def _with_quotes(override: str, value: OverrideParser.ValueContext, kind: Any) -> str:
    sweep = value.simpleChoiceSweep()
    elements = [value.element()] if sweep is None else sweep.element()
    for start, stop in sorted((span for one in elements for span in _not_text(one, kind, False)), reverse=True):
        override = override[:start] + in_quotes(override[start : stop + 1]) + override[stop + 1 :]
    return override


def _not_text(element: OverrideParser.ElementContext, kind: Any, is_inside: bool) -> Iterator[tuple[int, int]]:
    """Where the grammar reads a number, a truth value, nothing, or a call, and `kind` says text."""
    if (primitive := element.primitive()) is not None:
        tokens = [child.symbol for child in primitive.getChildren() if child.symbol.type != OverrideLexer.WS]
        is_a_word = len(tokens) == 1 and tokens[0].type in _NOT_TEXT
        if is_a_word and tokens[0].type == OverrideLexer.INT and can_be_whole(kind):
            return
        # Nothing is nothing, but for one of several texts.
        if is_a_word and can_be_text(kind) and (is_inside or tokens[0].type != OverrideLexer.NULL):
            yield tokens[0].start, tokens[0].stop
    elif (several := element.listContainer()) is not None:
        for one in several.element():
            yield from _not_text(one, element_of(kind), True)
    elif (mapping := element.dictContainer()) is not None:
        for pair in mapping.dictKeyValuePair():
            own = field_of(kind, pair.dictKey().getText().strip())
            yield from _not_text(pair.element(), own, not is_optional(own) and is_in_mapping(kind))
    elif (function := element.function()) is not None:
        if can_be_text(kind) and not _is_known(function):
            yield function.start.start, function.stop.stop
        elif function.ID().getText() in _HANDING_ON:
            for one in function.element():
                yield from _not_text(one, kind, is_inside)


def _is_known(function: OverrideParser.FunctionContext) -> bool:
    return function.ID().getText() in create_functions().definitions


def _of_function(
    override: str, begin: str, typed: str, function: OverrideParser.FunctionContext, is_sweep: bool
) -> str:
    """A name with parentheses behind it is a text, unless it is one that Hydra knows."""
    name = function.ID().getText()
    key = begin.lstrip("+").rstrip("=")
    if not _is_known(function):
        return begin + in_quotes(typed)
    if not is_sweep and name not in ("str", *_NUMBERS):
        told = "" if is_group(key) else advice(begin, typed, str)
        raise ConfigurationError(f"{_SEVERAL.format(f'{name}(...)')}{told}", given=override)
    if is_group(key):
        return override
    if name in (*_NUMBERS, "glob", "interval"):
        why = "chooses among files, as of models" if name == "glob" else "stands for numbers or truth values"
        raise ConfigurationError(f"{name}(...) {why}, and {key} is text{advice(begin, typed, str)}", given=override)
    said = _with_quotes(override, function.parentCtx.parentCtx, str)
    if name == "choice" and not function.argName():
        # What is chosen from by a call loses its quotes on the way to a job; separated by commas it does not.
        call = tree_of(said).value().element().function()
        return begin + said[call.POPEN().symbol.stop + 1 : call.PCLOSE().symbol.start]
    if name == "str":
        return said
    try:
        read = OverridesParser.create().parse_override(said)
        values: list[Any] = list(read.sweep_string_iterator() if name == "range" else read.sweep_iterator())
    except HydraException as error:
        raise ConfigurationError(
            f"{' '.join(str(error).split())}{advice(begin, typed, str)}", given=override
        ) from error
    if not all(isinstance(one, str | QuotedString) for one in values):
        return said
    return begin + ",".join(in_quotes(one.text if isinstance(one, QuotedString) else one) for one in values)


def _with_its_spaces(typed: str, primitive: OverrideParser.PrimitiveContext) -> str:
    bare = typed.strip(" \t")
    value = HydraOverrideVisitor(create_functions()).visitPrimitive(primitive)
    begins = typed[: len(typed) - len(typed.lstrip(" \t"))]
    return begins + (value if isinstance(value, str) else bare) + typed[len(begins) + len(bare) :]


def _is_plain(typed: str, kind: Any) -> bool:
    """Whether what the grammar cannot read can only be meant as a text."""
    is_a_container = is_container(typed) and not is_only_text(kind)
    return not is_a_container and "," not in typed and not _is_quoted(typed)


def _is_quoted(typed: str) -> bool:
    return typed.lstrip()[:1] in ("'", '"')


def _unreadable(typed: str) -> str:
    if _is_quoted(typed):
        return "what begins with a quote must end with it and hold no other"
    if "," in typed and not is_container(typed):
        return "a comma separates values, and these cannot be read"
    return "cannot be read"

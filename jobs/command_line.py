"""What is typed on the command line, and that settings which are text stay as they were typed.

Hydra's grammar reads `job.name=1e5` as 100000.0 and `storage.uri=2026_11_25` as 20261125, trims spaces, and has no
place for `(`, `=`, `~` or an umlaut outside of quotes. The typed configuration knows which settings are text. Theirs
are put into quotes here before Hydra sees them: numbers, words such as true, and what the grammar cannot read at all.
What it can read keeps its meaning: quotes, `\\=`, `${...}`, lists, `null` where a setting may be empty, and sweeps with
commas, which is why a comma in a text has to be quoted by a person.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from antlr4 import CommonTokenStream, InputStream
from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from neg_service.config import ScanConfig, types_of
from neg_service.errors import ConfigurationError

_OVERRIDE = re.compile(r"(?P<sign>\+{0,2})(?P<key>[^=+~][^=]*)=(?P<value>.*)", re.DOTALL)
_KEY = re.compile(r"[\w$./@:-]+", re.ASCII)
_NOT_TEXT = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL, OverrideLexer.NULL)
_SEVERAL = "{} stands for the values of several jobs, which --multirun runs"
# What these are given is what the setting becomes.
_HANDING_ON = ("choice", "sort", "shuffle", "tag", "str")


def as_typed(overrides: Sequence[str], settings: type, is_sweep: bool) -> list[str]:
    """`overrides` in such words that Hydra gives each setting of `settings` that is text as it was typed.

    is_sweep: several jobs were asked for, so that commas separate their values.

    Raises:
        ConfigurationError: one that Hydra's grammar has another meaning for, or none: with how it is written.
    """
    return [_as_typed(override, settings, is_sweep) for override in overrides]


def _as_typed(override: str, settings: type, is_sweep: bool) -> str:
    parts = _OVERRIDE.fullmatch(override)
    if parts is None:
        if override.startswith("~"):
            return override
        raise ConfigurationError(f"{override}: is not a setting, which is KEY=VALUE")
    key, typed = parts["key"], parts["value"]
    if not _KEY.fullmatch(key):
        raise ConfigurationError(f"{override}: {key!r} is not the name of a setting, which is KEY=VALUE")
    kind, begin = type_at(settings, key), f"{parts['sign']}{key}="
    try:
        value = _tree(override).value()
    except HydraException as error:
        if _can_be_text(kind) and _is_plain(typed, kind):
            return begin + in_quotes(typed)
        raise ConfigurationError(f"{override}: {_unreadable(typed)}{_advice(begin, typed, kind)}") from error
    if value is None:
        # Spaces alone; nothing at all stays nothing.
        return begin + in_quotes(typed) if typed and _can_be_text(kind) else override
    sweep, element = value.simpleChoiceSweep(), value.element()
    if sweep is not None and not is_sweep:
        raise ConfigurationError(f"{override}: {_SEVERAL.format('a comma')}{_advice(begin, typed, kind)}")
    if element is not None and _can_be_text(kind):
        if element.primitive() is not None and typed != typed.strip(" \t") and not _is_quoted(typed):
            return begin + in_quotes(_with_its_spaces(typed, element.primitive()))
        if element.function() is not None:
            return _of_function(override, begin, typed, element.function(), is_sweep)
        if element.primitive() is None and _is_only_text(kind):
            raise ConfigurationError(
                f"{override}: is a list or a mapping, and {key} is one text{_advice(begin, typed, kind)}"
            )
    return _with_quotes(override, value, kind)


def in_quotes(text: str) -> str:
    """A text as Hydra's grammar writes it, whatever is in it."""
    quote = Quote.double if "'" in text and '"' not in text else Quote.single
    return str(QuotedString(text, quote).with_quotes())


def for_a_shell(argument: str) -> str:
    """An argument as it is typed in a POSIX shell."""
    if "'" in argument and not re.search(r'["$`\\!]', argument):
        return f'"{argument}"'
    return shlex.quote(argument)


def type_at(settings: Any, key: str) -> Any:
    """The type of what a key with dots names, by the annotations of dataclasses; None for what they do not know."""
    kind: Any = settings
    for name in key.split("."):
        kind = _field(kind, name)
    return kind


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
                require_text(config[name], _field(settings, name), f"{key}.{name}" if key else name)
    elif isinstance(config, ListConfig):
        for index in range(0 if config._is_none() or config._is_missing() else len(config)):
            if not OmegaConf.is_interpolation(config, index):
                require_text(config[index], _element(settings), key)
    elif config is not None and not isinstance(config, str) and _can_be_text(settings):
        kind = "true or false" if isinstance(config, bool) else f"a {type(config).__name__}"
        raise ConfigurationError(
            f"{key}={config}: is {kind} where a text belongs, and not as it was written any more: put it into quotes "
            f"in the YAML file that it comes from"
        )


def _tree(override: str) -> OverrideParser.OverrideContext:
    """What Hydra's own parser makes of an override."""
    told = HydraErrorListener()
    lexer = OverrideLexer(InputStream(override))
    lexer.removeErrorListeners()
    lexer.addErrorListener(told)
    parser = OverrideParser(CommonTokenStream(lexer))
    parser.removeErrorListeners()
    parser.addErrorListener(told)
    return parser.override()


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
        # Nothing is nothing, but for one of several texts.
        if is_a_word and _can_be_text(kind) and (is_inside or tokens[0].type != OverrideLexer.NULL):
            yield tokens[0].start, tokens[0].stop
    elif (several := element.listContainer()) is not None:
        for one in several.element():
            yield from _not_text(one, _element(kind), True)
    elif (mapping := element.dictContainer()) is not None:
        for pair in mapping.dictKeyValuePair():
            own = _field(kind, pair.dictKey().getText().strip())
            yield from _not_text(pair.element(), own, not _is_optional(own) and _is_in_mapping(kind))
    elif (function := element.function()) is not None:
        if _can_be_text(kind) and not _is_known(function):
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
    if not _is_known(function):
        return begin + in_quotes(typed)
    if not is_sweep and name not in ("str", "int", "float", "bool"):
        raise ConfigurationError(f"{override}: {_SEVERAL.format(f'{name}(...)')}{_advice(begin, typed, str)}")
    if name == "choice" and not function.argName():
        # What is chosen from by a call loses its quotes on the way to a job; separated by commas it does not.
        said = _with_quotes(override, function.parentCtx.parentCtx, str)
        call = _tree(said).value().element().function()
        return begin + said[call.POPEN().symbol.stop + 1 : call.PCLOSE().symbol.start]
    if name == "range":
        values = OverridesParser.create().parse_override(override).sweep_string_iterator()
        return begin + ",".join(in_quotes(value) for value in values)
    return _with_quotes(override, function.parentCtx.parentCtx, str)


def _with_its_spaces(typed: str, primitive: OverrideParser.PrimitiveContext) -> str:
    bare = typed.strip(" \t")
    value = HydraOverrideVisitor(create_functions()).visitPrimitive(primitive)
    begins = typed[: len(typed) - len(typed.lstrip(" \t"))]
    return begins + (value if isinstance(value, str) else bare) + typed[len(begins) + len(bare) :]


def _is_plain(typed: str, kind: Any) -> bool:
    """Whether what the grammar cannot read can only be meant as a text."""
    is_container = _is_container(typed) and not _is_only_text(kind)
    return not is_container and "," not in typed and not _is_quoted(typed)


def _is_container(typed: str) -> bool:
    return typed.lstrip()[:1] in ("[", "{")


def _is_quoted(typed: str) -> bool:
    return typed.lstrip()[:1] in ("'", '"')


def _unreadable(typed: str) -> str:
    if _is_quoted(typed):
        return "what begins with a quote must end with it and hold no other"
    if "," in typed and not _is_container(typed):
        return "a comma separates values, and these cannot be read"
    return "cannot be read"


def _advice(begin: str, typed: str, kind: Any) -> str:
    """How the same is written so that it is read, as an argument to copy."""
    texts: list[tuple[str, Any, str]] = [(f"{begin}{in_quotes(typed)}", typed, "as one text it is written")]
    if not _is_only_text(kind):
        values = [one.strip() for one in typed.strip().removeprefix("[").removesuffix("]").split(",")]
        is_of_texts = _can_be_text(_element(kind))
        written = ",".join(in_quotes(one) if is_of_texts else one for one in values)
        listed = (f"{begin}[{written}]", values if is_of_texts else None, "as a list it is written")
        if _is_container(typed):
            texts = [listed] if is_of_texts and typed.rstrip().endswith("]") else texts
        elif "," in typed:
            texts.insert(0, listed)
    if not _can_be_text(kind) and kind not in (None, Any):
        texts = []
    for argument, value, words in texts:
        if argument.isprintable() and _reads_back(argument, value):
            return f"; {words} {for_a_shell(argument)}"
    return "" if texts == [] else "; put texts into quotes within the argument"


def _reads_back(argument: str, value: Any) -> bool:
    try:
        read = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return False
    return read == value if value is not None else isinstance(read, list)


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _can_be_text(kind: Any) -> bool:
    """Whether a single value of this type is text, and never a number."""
    return str in _members(kind)


def _is_only_text(kind: Any) -> bool:
    return set(_members(kind)) <= {str, NoneType}


def _is_optional(kind: Any) -> bool:
    return NoneType in _members(kind)


def _is_in_mapping(kind: Any) -> bool:
    return any(get_origin(member) is dict for member in _members(kind))


def _element(kind: Any) -> Any:
    """The type of a list's elements."""
    return next((get_args(member)[0] for member in _members(kind) if get_origin(member) is list), None)


def _field(kind: Any, name: str) -> Any:
    """The type of what is called `name` in a dataclass or a mapping."""
    for member in _members(kind):
        if get_origin(member) is dict:
            return get_args(member)[1]
        if isinstance(member, Mapping):
            return member.get(name)
        if is_dataclass(member) and isinstance(member, type):
            if name == "measure" and issubclass(member, ScanConfig):
                # Measures import torch.
                from neg_service.measures import types_of_options

                return types_of_options()
            return types_of(member).get(name)
    return None

"""How a neuron is measured. `base.py` says what a measure is; nothing registers one.

`measure.name` is a name of a measure of this package (`builtin/`), or the dotted path of one elsewhere: a module that
has one measure, or `module:Class`. One driver, one replica and one store serve them all.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from neg_service.errors import ConfigurationError
from neg_service.former_names import MEASURES
from neg_service.measures import builtin
from neg_service.measures.base import Measure
from neg_service.settings import types_of

# What a module had to have before measures were classes.
_OF_MODULES = ("Options", "read", "check", "identity", "tables", "cost_a_prompt", "calibrate", "measure")


def measure_of(given: Mapping[str, Any]) -> Measure[Any]:
    """The measure that a configuration asks for: `name`, and its options.

    Raises:
        ConfigurationError: an unknown name or option, or a value of another type.
    """
    return find_measure(str(given.get("name"))).of(given)


def find_measure(name: str) -> type[Measure[Any]]:
    """The class of a measure.

    Raises:
        ConfigurationError: an unknown name, with those that are known; a module that has not exactly one measure.
    """
    known = {own: found for found in _builtin() for own in found.NAMES}
    if name in MEASURES:
        raise ConfigurationError(f"is called {MEASURES[name]} by now", setting="measure.name", value=name)
    if name in known:
        return known[name]
    path, _, wanted = name.partition(":")
    is_path = all(part.isidentifier() for part in path.split("."))
    module = _module(path) if is_path and ("." in path or wanted) else None
    if module is None:
        raise ConfigurationError(
            setting="measure.name",
            value=name,
            allowed=f"one of {', '.join(sorted(known))}, or the dotted path of a module of yours",
        )
    found = {own.__name__: own for own in _measures_in(module)}
    if wanted:
        found = {own: found[own] for own in [wanted] if own in found}
    if len(found) == 1:
        return next(iter(found.values()))
    raise ConfigurationError(_what_is_wrong(module, wanted, list(found)), setting="measure.name", value=name)


def types_of_options() -> dict[str, Any]:
    """What the options of this package's measures are called, with their types: those of one name have one type."""
    return {name: kind for own in _builtin() for name, kind in types_of(own.Options).items()}


def _builtin() -> list[type[Measure[Any]]]:
    modules = (
        importlib.import_module(f"{builtin.__name__}.{own.name}") for own in pkgutil.iter_modules(builtin.__path__)
    )
    return [found for module in modules for found in _measures_in(module)]


def _measures_in(module: ModuleType) -> list[type[Measure[Any]]]:
    """The measures that a module defines, not those that it imports."""
    return [own for own in _subclasses_in(module) if not inspect.isabstract(own)]


def _subclasses_in(module: ModuleType) -> list[type[Measure[Any]]]:
    classes = (own for own in vars(module).values() if isinstance(own, type) and own.__module__ == module.__name__)
    return [own for own in classes if issubclass(own, Measure)]


def _what_is_wrong(module: ModuleType, wanted: str, found: list[str]) -> str:
    unfinished = [own for own in _subclasses_in(module) if inspect.isabstract(own) and wanted in ("", own.__name__)]
    if unfinished and not found:
        return f"{unfinished[0].__name__} lacks {', '.join(sorted(unfinished[0].__abstractmethods__))}"
    if wanted:
        return f"{module.__name__} defines no measure {wanted}"
    if found:
        return f"{module.__name__} defines {', '.join(found)}; say which one, as {module.__name__}:{found[0]}"
    if all(hasattr(module, name) for name in _OF_MODULES):
        return (
            f"{module.__name__} is a module of functions, as measures were before; a measure is a subclass of "
            f"neg_service.measures.base.Measure by now"
        )
    return f"{module.__name__} defines no subclass of neg_service.measures.base.Measure"


def _module(path: str) -> ModuleType | None:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        # A measure that exists but misses a package of its own should say so itself.
        if error.name is not None and (path == error.name or path.startswith(f"{error.name}.")):
            return None
        raise

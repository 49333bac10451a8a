"""The types of settings, by the annotations of the dataclasses that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from neg_service.config import ScanConfig
from neg_service.settings import types_of


def type_at(settings: Any, key: str) -> Any:
    """The type of what a key with dots names, by the annotations of dataclasses; None for what they do not know."""
    kind: Any = settings
    for name in key.split("."):
        kind = field_of(kind, name)
    return kind


def members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def can_be_text(kind: Any) -> bool:
    """Whether a single value of this type is text, and no number unless `can_be_whole`."""
    return str in members(kind)


def can_be_whole(kind: Any) -> bool:
    """Whether it may be a whole number, where such a one is typed."""
    return int in members(kind)


def is_only_text(kind: Any) -> bool:
    """Whether it is one text or nothing."""
    return all(member in (str, NoneType) for member in members(kind))


def is_optional(kind: Any) -> bool:
    """Whether it may be nothing."""
    return NoneType in members(kind)


def is_in_mapping(kind: Any) -> bool:
    """Whether it is a mapping in which every value has the same type."""
    return any(get_origin(member) is dict for member in members(kind))


def element_of(kind: Any) -> Any:
    """The type of a list's elements."""
    return next((get_args(member)[0] for member in members(kind) if get_origin(member) is list), None)


def names_in(kind: Any) -> list[str]:
    """What the settings of a dataclass, or of a mapping with names of its own, are called."""
    for member in members(kind):
        if isinstance(member, Mapping):
            return list(member)
        if is_dataclass(member) and isinstance(member, type):
            return list(types_of(member))
    return []


def field_of(kind: Any, name: str) -> Any:
    """The type of what is called `name` in a dataclass or a mapping."""
    for member in members(kind):
        if get_origin(member) is dict:
            return get_args(member)[1]
        if isinstance(member, Mapping):
            return member.get(name)
        if is_dataclass(member) and isinstance(member, type):
            if name == "measure" and issubclass(member, ScanConfig):
                # Schemas import pyarrow; most commands ask for no measure.
                from neg_service.measures import types_of_options

                return types_of_options()
            return types_of(member).get(name)
    return None

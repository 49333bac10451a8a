"""What a setting says of itself, beside its field: what it means, and what it may be; and the check of that.

`conf/README.md` is written from it, and the command line keeps what is text as it was typed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import field, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from neg_service.errors import ConfigurationError, nearest

# Which activation is the neuron; see `models/feed_forward.py`.
BASES = ("paper", "hidden", "gate")


def holds(kind: Any) -> dict[str, Any]:
    """Metadata of a field that is Any to OmegaConf: what its values are of, for those who want to know."""
    return {"holds": kind}


def types_of(cls: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields, with what `holds` says of them."""
    hints = get_type_hints(cls)
    return {own.name: own.metadata.get("holds", hints[own.name]) for own in fields(cls)}


def basis_setting() -> Any:
    """The field of all that measures neurons."""
    return setting("paper", "which activation is the neuron", allowed=BASES)


AT = ("readout", "each")


def at_setting() -> Any:
    """The field of measures that move neurons, or differentiate at them, where targets may be several tokens."""
    return setting(
        "readout",
        "where neurons move, of targets of several tokens: at the prompt's last token, or at each token that predicts "
        "one of the target's",
        allowed=AT,
    )


def setting(
    default: Any,
    says: str,
    *,
    allowed: tuple[str, ...] = (),
    least: float | None = None,
    is_whole: bool = False,
    kind: Any = None,
) -> Any:
    """A field with what `conf/README.md` says of it, and what it may be; of a list, what each of its members may be.

    allowed: the texts that it may be; with `least`, in the place of a number. least: the smallest number that it may
    be. is_whole, kind: of what is Any to OmegaConf: whether its numbers are whole; what its values are of.
    """
    metadata = {"says": says, "allowed": allowed, "least": least, "is_whole": is_whole}
    metadata |= {} if kind is None else holds(kind)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_fields(group: str, settings: Any, only: Collection[str] | None = None) -> None:
    """Refuse values that the fields of a dataclass do not allow, of all of them or some.

    Raises:
        ConfigurationError: naming the key in `group`, its value, and what it may be.
    """
    kinds = types_of(type(settings))
    for own in fields(settings):
        if own.name == "replicas" or (only is not None and own.name not in only):
            continue
        value = getattr(settings, own.name)
        if value is None and (own.default is None or NoneType in get_args(kinds[own.name])):
            continue
        for one in value if isinstance(value, list) else [value]:
            if must := must_be(own.metadata, one):
                near = nearest(one, own.metadata["allowed"]) if isinstance(one, str) else ""
                raise ConfigurationError(near.rstrip(" "), setting=f"{group}.{own.name}", value=one, allowed=must)


def must_be(said: Mapping[str, Any], value: Any) -> str:
    """What a value that is something else must be, to be read after "must be"."""
    allowed, least, is_whole = said.get("allowed", ()), said.get("least"), said.get("is_whole", False)
    if value in allowed or (least is None and not allowed):
        return ""
    if least is None:
        return f"one of {', '.join(allowed)}" if len(allowed) > 2 else " or ".join(allowed)
    is_number = isinstance(value, int if is_whole else int | float) and not isinstance(value, bool)
    if is_number and value >= least:
        return ""
    if allowed:
        return f"{' or '.join(allowed)} or a {'whole ' if is_whole else ''}number, at least {least}"
    return f"at least {least}" if least else "0 or more"

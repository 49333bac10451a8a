"""Edits: what is done to any set of neurons at once, and the table of neurons, factors and constants that it becomes.

| an edit with     | does this to each of its neurons                                       |
|------------------|------------------------------------------------------------------------|
| `shift: δ`       | moves its magnitude, a -> a + δ·sgn(a), or with `signed` a -> a + δ      |
| `add: δ`         | a -> a + δ, the same as a signed shift; what `control` writes, with a δ of each neuron |
| `scale: c`       | a -> c·a; 0 switches it off                                             |
| `set: v`         | a -> v                                                                  |
| `enhance: δ`     | shifts by δ where its NEG is positive and by -δ where it is negative: the target gains |
| `suppress: δ`    | the reverse                                                             |

`sgn(a)` and the sign of NEG are those of the prompt without any edit, sgn(0) = +1; so an edit is a fixed displacement,
whatever its other neurons do. The sign of NEG is `polarity` where it is given (+1 or -1 a neuron), else that of
NeurGrad for the prompt's answer, or for its first target where there is no answer. `scale` works on what arrives,
after the edits in lower layers.

Source of enhance and suppress: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from neg_service.contents import is_deeper, json_lines, json_of, repeated
from neg_service.errors import ConfigurationError, shortened
from neg_service.layer_neurons import LayerSize
from neg_service.measures.choice import checked_neurons
from neg_service.neurons import NeuronSet
from neg_service.places import without_credentials

OPERATIONS = ("shift", "add", "scale", "set", "enhance", "suppress")
_KEYS = {"name", "neurons", "polarity", "signed", *OPERATIONS}
# A list of edits, with lists of neurons, of which each is a pair; two more are told what is wrong with them.
_LEVELS = 6


@dataclass(frozen=True)
class Edit:
    """One edit; see the module's header. Exactly one operation is given, with a number for all neurons or one each.

    neurons: (layer, neuron) pairs, or (layer, neuron, expert) where a layer has experts.
    """

    neurons: Sequence[Sequence[int | None]]
    shift: float | Sequence[float] | None = None
    scale: float | Sequence[float] | None = None
    set: float | Sequence[float] | None = None
    enhance: float | Sequence[float] | None = None
    suppress: float | Sequence[float] | None = None
    polarity: Sequence[int] | None = None
    signed: bool = False
    name: str = ""
    add: float | Sequence[float] | None = None


@dataclass(frozen=True)
class CheckedEdit:
    """An edit on a known model: n neurons, the operation, a value each, and a polarity each if one was given.

    All are in the order of the set, whatever the order in which they were given.
    """

    name: str
    neurons: NeuronSet
    operation: str
    values: np.ndarray[Any, np.dtype[np.float64]]
    polarity: np.ndarray[Any, np.dtype[np.float64]] | None
    is_signed: bool

    @property
    def needs_sign_of_neg(self) -> bool:
        """Whether NeurGrad must say which way its neurons go."""
        return self.operation in ("enhance", "suppress") and self.polarity is None


def checked_edits(
    edits: Sequence[Edit | Mapping[str, Any]], neurons_by_layer: Sequence[LayerSize]
) -> list[CheckedEdit]:
    """Edits that the model can do; mappings have the fields of `Edit`.

    Raises:
        ConfigurationError: no edits, unknown keys, not exactly one operation, bad values, neurons that do not exist or
            appear twice in an edit, two edits of one name.
    """
    if isinstance(edits, str | Mapping) or not isinstance(edits, Sequence) or not edits:
        raise ConfigurationError(setting="measure.edits", value=shortened(edits), allowed="a list of at least one edit")
    found = [_checked(edit, index, neurons_by_layer) for index, edit in enumerate(edits)]
    if (name := repeated(edit.name for edit in found)) is not None:
        raise ConfigurationError(f"two edits are named {name!r}; names must differ", setting="measure.edits")
    return found


def edit_name(edit: Mapping[str, Any], index: int) -> str:
    """What results call an edit: its own name, or its number."""
    name = edit.get("name")
    return f"edit-{index}" if name in (None, "") else str(name)


def read_edits(source: Any) -> Any:
    """A list of edits as it is; a path or URI ends in .json or .jsonl, or is a table of shifts, and is read.

    Raises:
        ConfigurationError: a file that cannot be read, or is not JSON, or nested too deep to be edits.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str):
        return source
    # What reads any address takes long to import, and most edits are given as they are.
    from neg_service.inputs import read_input, suffix_of

    if not suffix_of(source):
        from neg_service.measures.shift_tables import edits_in

        if (edits := edits_in(source)) is not None:
            return edits
    content = read_input("measure.edits", source)
    where = f"measure.edits={without_credentials(source)}"
    is_lines = suffix_of(source) == ".jsonl"

    def read(*, as_written: bool = False) -> Any:
        if not is_lines:
            return json_of(where, content, as_written=as_written)
        return [edit for _, edit in json_lines(where, content, as_written=as_written)]

    edits = read()
    # Before anything walks through them.
    if is_deeper(edits, _LEVELS):
        raise ConfigurationError(
            f'is nested more than {_LEVELS} deep; edits are a list of objects such as {{"neurons": [[0, 5]], '
            '"shift": 0.5}',
            given=where,
        )
    return _named_as_written(edits, read(as_written=True))


def _named_as_written(edits: Any, written: Any) -> Any:
    """Edits with names for texts: 1.10 is another name than 1.1."""
    if not isinstance(edits, list):
        return edits
    return [
        edit | {"name": str(own["name"])}
        if isinstance(edit, dict) and isinstance(edit.get("name"), int | float) and not isinstance(edit["name"], bool)
        else edit
        for edit, own in zip(edits, written, strict=True)
    ]


def _checked(edit: Edit | Mapping[str, Any], index: int, neurons_by_layer: Sequence[LayerSize]) -> CheckedEdit:
    given = asdict(edit) if isinstance(edit, Edit) else edit
    where = f"measure.edits[{index}]"
    if not isinstance(given, Mapping):
        raise ConfigurationError(given=where, allowed="an edit such as {neurons: [[0, 5]], shift: 0.5}")
    if unknown := set(given) - _KEYS:
        raise ConfigurationError(
            f"{min(map(str, unknown))} is unknown; known are {', '.join(sorted(_KEYS))}", given=where
        )
    _require_name_and_kind(where, given)
    operations = [name for name in OPERATIONS if given.get(name) is not None]
    if len(operations) != 1:
        raise ConfigurationError(f"has {len(operations)} operations, needs one of {', '.join(OPERATIONS)}", given=where)
    try:
        rows_n3 = checked_neurons(given.get("neurons", []), neurons_by_layer)
    except ConfigurationError as error:
        raise error.renamed({"neurons": f"{where}.neurons"}) from None
    neurons, place_n = NeuronSet.distinct(rows_n3)
    if len(neurons) < len(rows_n3):
        raise ConfigurationError("a neuron is given twice", given=where)
    in_order = np.argsort(place_n)
    operation = operations[0]
    values = _numbers(f"{where}.{operation}", given[operation], len(neurons))[in_order]
    polarity = given.get("polarity")
    if polarity is not None:
        if operation not in ("enhance", "suppress"):
            raise ConfigurationError(f"polarity goes with enhance or suppress, not with {operation}", given=where)
        polarity = _numbers(f"{where}.polarity", polarity, len(neurons))[in_order]
        if not (np.abs(polarity) == 1).all():
            raise ConfigurationError("polarity must be +1 or -1 for each neuron", given=where)
    if given.get("signed") and operation != "shift":
        raise ConfigurationError(f"signed goes with shift, not with {operation}", given=where)
    return CheckedEdit(edit_name(given, index), neurons, operation, values, polarity, bool(given.get("signed")))


def _require_name_and_kind(where: str, given: Mapping[str, Any]) -> None:
    name, signed = given.get("name"), given.get("signed")
    if isinstance(name, bool) or not isinstance(name, str | int | float | None):
        raise ConfigurationError(setting=f"{where}.name", value=shortened(name), allowed="a text")
    if any("\ud800" <= character <= "\udfff" for character in str(name)):
        raise ConfigurationError(
            "holds a lone surrogate, which no text has", setting=f"{where}.name", value=ascii(name)
        )
    # Any text is true, also "false".
    if not isinstance(signed, bool | None):
        raise ConfigurationError(setting=f"{where}.signed", value=shortened(signed), allowed="true or false")


def _numbers(where: str, value: Any, n: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    try:
        given = np.asarray(value)
    except (TypeError, ValueError, RecursionError):
        given = np.empty(0, dtype=object)
    # Text and truth values would become numbers too, and a list of one would be for all.
    is_odd = isinstance(value, list | tuple) and any(isinstance(one, bool | np.bool_) for one in value)
    if is_odd or given.dtype.kind not in "iuf" or given.shape not in ((), (n,)):
        raise ConfigurationError(
            setting=where, value=shortened(value), allowed=f"a number, or {n} numbers, one for each neuron"
        )
    numbers = np.broadcast_to(given.astype(np.float64), (n,))
    bad = next((number for number in numbers if not math.isfinite(number)), None)
    if bad is not None:
        raise ConfigurationError(f"{bad:g} is not finite", given=where)
    return numbers

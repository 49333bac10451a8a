"""Edits: what is done to any set of neurons at once, and the table of neurons, factors and constants that it becomes.

| an edit with     | does this to each of its neurons                                       |
|------------------|------------------------------------------------------------------------|
| `shift: δ`       | moves its magnitude, a -> a + δ·sgn(a), or with `signed` a -> a + δ      |
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

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from neg_service.errors import ConfigurationError, one_line
from neg_service.inputs import read_input, suffix_of
from neg_service.measures.choice import Neurons, checked_neurons
from neg_service.places import without_credentials

OPERATIONS = ("shift", "scale", "set", "enhance", "suppress")
_KEYS = {"name", "neurons", "polarity", "signed", *OPERATIONS}


@dataclass(frozen=True)
class Edit:
    """One edit; see the module's header. Exactly one operation is given, with a number for all neurons or one each."""

    neurons: Sequence[Sequence[int]]
    shift: float | Sequence[float] | None = None
    scale: float | Sequence[float] | None = None
    set: float | Sequence[float] | None = None
    enhance: float | Sequence[float] | None = None
    suppress: float | Sequence[float] | None = None
    polarity: Sequence[int] | None = None
    signed: bool = False
    name: str = ""


@dataclass(frozen=True)
class CheckedEdit:
    """An edit on a known model: n neurons, the operation, a value each, and a polarity each if one was given."""

    name: str
    neurons: Neurons
    operation: str
    values: np.ndarray[Any, np.dtype[np.float64]]
    polarity: np.ndarray[Any, np.dtype[np.float64]] | None
    is_signed: bool

    @property
    def needs_sign_of_neg(self) -> bool:
        """Whether NeurGrad must say which way its neurons go."""
        return self.operation in ("enhance", "suppress") and self.polarity is None


def checked_edits(edits: Sequence[Edit | Mapping[str, Any]], n_layers: int, n_neurons: int) -> list[CheckedEdit]:
    """Edits that the model can do; mappings have the fields of `Edit`.

    Raises:
        ConfigurationError: no edits, unknown keys, not exactly one operation, bad values, neurons that do not exist or
            appear twice in an edit, two edits of one name.
    """
    if isinstance(edits, str | Mapping) or not isinstance(edits, Sequence) or not edits:
        raise ConfigurationError(f"measure.edits={edits!r}: must be a list of at least one edit")
    found = [_checked(edit, index, n_layers, n_neurons) for index, edit in enumerate(edits)]
    names = [edit.name for edit in found]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigurationError(f"measure.edits: two edits are named {repeated!r}; names must differ")
    return found


def edit_name(edit: Mapping[str, Any], index: int) -> str:
    """What results call an edit: its own name, or its number."""
    return str(edit.get("name") or f"edit-{index}")


def read_edits(source: Any) -> Any:
    """A list of edits as it is; a path or URI ends in .json or .jsonl and is read.

    Raises:
        ConfigurationError: a file that cannot be read or is not JSON.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str):
        return source
    content = read_input("measure.edits", source)
    shown = without_credentials(source)
    try:
        text = content.decode()
        if suffix_of(source) == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"measure.edits={shown}: is not JSON: {one_line(error)}") from error


def _checked(edit: Edit | Mapping[str, Any], index: int, n_layers: int, n_neurons: int) -> CheckedEdit:
    given = asdict(edit) if isinstance(edit, Edit) else edit
    where = f"measure.edits[{index}]"
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"{where}: must be an edit such as {{neurons: [[0, 5]], shift: 0.5}}")
    if unknown := set(given) - _KEYS:
        raise ConfigurationError(f"{where}: {min(unknown)} is unknown; known are {', '.join(sorted(_KEYS))}")
    operations = [name for name in OPERATIONS if given.get(name) is not None]
    if len(operations) != 1:
        raise ConfigurationError(f"{where}: has {len(operations)} operations, needs one of {', '.join(OPERATIONS)}")
    try:
        neurons = checked_neurons(given.get("neurons", []), n_layers, n_neurons)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from error
    if len(np.unique(neurons, axis=0)) < len(neurons):
        raise ConfigurationError(f"{where}: a neuron is given twice")
    operation = operations[0]
    values = _numbers(f"{where}.{operation}", given[operation], len(neurons))
    polarity = given.get("polarity")
    if polarity is not None:
        if operation not in ("enhance", "suppress"):
            raise ConfigurationError(f"{where}: polarity goes with enhance or suppress, not with {operation}")
        polarity = _numbers(f"{where}.polarity", polarity, len(neurons))
        if not (np.abs(polarity) == 1).all():
            raise ConfigurationError(f"{where}: polarity must be +1 or -1 for each neuron")
    if given.get("signed") and operation != "shift":
        raise ConfigurationError(f"{where}: signed goes with shift, not with {operation}")
    return CheckedEdit(edit_name(given, index), neurons, operation, values, polarity, bool(given.get("signed")))


def _numbers(where: str, value: Any, n: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    try:
        numbers = np.broadcast_to(np.asarray(value, dtype=np.float64), (n,))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{where}={value!r}: must be a number, or {n} numbers, one a neuron") from error
    bad = next((number for number in numbers if not math.isfinite(number)), None)
    if bad is not None:
        raise ConfigurationError(f"{where}: {bad:g} is not finite")
    return numbers

"""A shift outside of this package: a folder with its tensors and with a text that says what it is.

`shift.safetensors` has one tensor a layer, float64 or float32: what is added to the output of a module. `shift.json`
says to which, from which model, prompt and target it is, what it achieved and what it does beside. To use it, torch and
the model's own class suffice: a bias is a bias, and a vector is added to what a module gives.

Axes: F features of a module's output.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from neg_service.contents import json_of
from neg_service.errors import ConfigurationError, DestinationError, ModelError, one_line, shortened
from neg_service.measures.control.plain_passes import ALL, Addition, adding, check_place
from neg_service.models.hook_points import HookPoint

TENSORS, ABOUT = "shift.safetensors", "shift.json"
BIAS, VECTOR = "bias", "vector"
# What the text means; a later meaning has another number.
_FORMAT = 1


@dataclass(frozen=True)
class Part:
    """A tensor [F] of a shift, and the module to whose output it is added.

    within: the layer during which alone it counts, of a module that several layers share. norm: √Σ of its squares.
    """

    tensor: str
    layer: int
    module: str
    norm: float
    within: str | None = None


@dataclass(frozen=True, eq=False)
class ExportedShift:
    """A shift as it is written: `about` is what `shift.json` says, `tensors` [F] each are what is added."""

    about: Mapping[str, Any]
    parts: tuple[Part, ...]
    tensors: Mapping[str, Tensor]

    @property
    def form(self) -> str:
        """`bias` or `vector`."""
        return str(self.about["form"])

    @property
    def basis(self) -> str:
        """Which tensor is "the neuron"."""
        return str(self.about["basis"])

    @contextmanager
    def applied(self, model: nn.Module, at: str = "readout") -> Iterator[None]:
        """Let a model of the library's own class run with the shift; afterwards it is as before, to the bit.

        Args:
            model: the plain model from which the shift was made, such as `AutoModelForCausalLM.from_pretrained` gives.
            at: `readout`, at the last position of each pass that begins a prompt, so that in `model.generate` it acts
                once, at the prompt's last token; or `all`, at all positions. A bias is then the projection's bias.

        Raises:
            ModelError: it lacks the modules that the shift belongs to. ConfigurationError: an unknown `at`, or a module
                that takes no bias.
        """
        check_place(at)
        if not isinstance(model, nn.Module):
            raise ConfigurationError(
                "the engines of a loaded model lay out tokens in ways of their own: use its plain model, model.model",
                setting="model", value=type(model).__name__, allowed="a model of transformers",
            )  # fmt: skip
        if at == ALL and self.form == BIAS:
            with ExitStack() as stack:
                for part in self.parts:
                    stack.enter_context(_biased(self._module(model, part), self.tensors[part.tensor], part.module))
                yield
            return
        with adding(model, [self._addition(model, part) for part in self.parts], at):
            yield

    def _addition(self, model: nn.Module, part: Part) -> Addition:
        constant = self.tensors[part.tensor]
        within = None if part.within is None else self._submodule(model, part.within)
        return Addition(HookPoint(self._module(model, part), "output", 0, len(constant), within), constant)

    def _module(self, model: nn.Module, part: Part) -> nn.Module:
        module = self._submodule(model, part.module)
        # Linear layers, and GPT-2's.
        size = getattr(module, "out_features", getattr(module, "nf", None))
        if size is not None and size != len(self.tensors[part.tensor]):
            raise ModelError(
                f"{part.module} of {type(model).__name__} gives {size} values, the shift has "
                f"{len(self.tensors[part.tensor])}: {self._origin}"
            )
        return module

    def _submodule(self, model: nn.Module, path: str) -> nn.Module:
        try:
            return model.get_submodule(path)
        except AttributeError as error:
            raise ModelError(f"{type(model).__name__} has no module {path}: {self._origin}") from error

    @property
    def _origin(self) -> str:
        return f"this shift is of {self.about['model']['name']} ({self.about['model']['architecture']})"


@contextmanager
def _biased(module: nn.Module, added_f: Tensor, name: str) -> Iterator[None]:
    """Add to a module's bias, or give it one; afterwards it has the very parameter that it had."""
    if "bias" not in module._parameters:
        raise ConfigurationError(
            f"{name} ({type(module).__name__}) takes no bias: use at=readout, or export with form=vector", setting="at",
            value=ALL,
        )  # fmt: skip
    before, weight = module._parameters["bias"], next(own for own in module.parameters(recurse=False))
    sum_f = added_f.to(weight.device).double()
    if before is not None:
        sum_f = sum_f + before.detach().double()
    module._parameters["bias"] = nn.Parameter(sum_f.to(weight.dtype), requires_grad=False)
    try:
        yield
    finally:
        module._parameters["bias"] = before


def checked_place(place: str | os.PathLike[str]) -> Path:
    """Where a folder can be written: a path at which there is nothing, or an empty folder.

    Raises:
        DestinationError: there is something, which would be mixed with the export, or it cannot be looked at.
    """
    if not isinstance(place, str | os.PathLike) or not os.fspath(place):
        raise DestinationError(setting="place", value=repr(place), allowed="a path of a folder")
    path = Path(place)
    try:
        if path.is_dir():
            held = next((own.name for own in sorted(path.iterdir())), None)
            if held is not None:
                raise DestinationError(f"holds {held}", setting="place", value=path, allowed="a new or an empty folder")
        elif path.exists() or path.is_symlink():
            raise DestinationError("is a file", setting="place", value=path, allowed="a new or an empty folder")
    except OSError as error:
        raise _refusal(path, error) from error
    return path


def write(place: Path, shift: ExportedShift) -> None:
    """Write both files, under other names first; the text is renamed last, so that where it is, all is.

    Raises:
        DestinationError: the folder cannot be written; what was begun is taken away again.
    """
    tensors = save({name: own.contiguous() for name, own in shift.tensors.items()})
    about = {
        "format": _FORMAT,
        **shift.about,
        "tensors": [asdict(part) for part in shift.parts],
        "sha256": hashlib.sha256(tensors).hexdigest(),
    }
    text = json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    is_new = not place.exists()
    begun: list[Path] = []
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, content in ((TENSORS, tensors), (ABOUT, text.encode())):
            begun.append(place / f".{name}.partial")
            begun[-1].write_bytes(content)
        for name, partial in zip((TENSORS, ABOUT), tuple(begun), strict=True):
            begun.append(partial.rename(place / name))
    except OSError as error:
        for file in begun:
            file.unlink(missing_ok=True)
        if is_new and place.is_dir():
            place.rmdir()
        raise _refusal(place, error) from error


def load_shift(place: str | os.PathLike[str]) -> ExportedShift:
    """Read a folder that `export_shift` wrote.

    Raises:
        ConfigurationError: no such folder, a file that is missing, damaged or of another version, or two files that do
            not belong together.
    """
    path = Path(place)

    def refused(reason: str) -> ConfigurationError:
        return ConfigurationError(reason, setting="place", value=path)

    contents = {}
    for name in (ABOUT, TENSORS):
        try:
            contents[name] = (path / name).read_bytes()
        except OSError as error:
            raise refused(
                f"has no {name} that can be read ({error.strerror}): give a folder of export_shift"
            ) from error
    about = json_of(f"place={path / ABOUT}", contents[ABOUT])
    if not isinstance(about, dict) or about.get("format") != _FORMAT or about.get("form") not in (BIAS, VECTOR):
        raise refused(f"{ABOUT} is not of a shift in format {_FORMAT}, which this version reads")
    if hashlib.sha256(contents[TENSORS]).hexdigest() != about.get("sha256"):
        raise refused(f"{TENSORS} is not the file that {ABOUT} was written with: copy both again")
    try:
        tensors = load(contents[TENSORS])
        parts = tuple(Part(**own) for own in about["tensors"])
        lacking = {part.tensor for part in parts} ^ set(tensors)
        if lacking or not isinstance(about["model"]["architecture"], str):
            raise refused(f"{ABOUT} and {TENSORS} name different tensors: {shortened(sorted(lacking))}")
    except (SafetensorError, KeyError, TypeError) as error:
        raise refused(f"is damaged: {one_line(error)}") from error
    return ExportedShift(about, parts, tensors)


def _refusal(place: Path, error: OSError) -> DestinationError:
    return DestinationError(f"cannot be written: {error.strerror}", setting="place", value=place)


def part_of(tensor: str, layer: int, module: str, constant_f: Tensor, within: str | None) -> Part:
    """The entry of a tensor."""
    return Part(tensor, layer, module, float(torch.linalg.vector_norm(constant_f.double())), within)

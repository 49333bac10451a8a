"""The reference of settings in `conf/README.md`, from what the settings themselves say.

`python -m tests.settings_reference` writes it. Names, types, defaults, meanings and allowed values are those of the
fields of dataclasses: in `neg_service/config.py`, and for the options of measures and studies in the files of these.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from jobs.catalogue import CatalogueConfig
from jobs.conf_folder import CONF
from jobs.kinds import members
from jobs.probe import ProbeConfig
from jobs.study import StudyConfig
from neg_service.config import ScanConfig
from neg_service.measures import find_measure
from neg_service.settings import types_of

README = Path(CONF) / "README.md"
_BEGIN, _END = "<!-- settings -->\n", "\n<!-- /settings -->"
# What OmegaConf takes as it is, and the code then checks.
_ANY = {
    "cluster.replicas": "auto or a number",
    "neurons.layers": "text or a list",
    "measure.probability": "number or list of number",
    "measure.shifts": "list or null",
    "cluster.batch_tokens": "whole number, auto or null",
    "measure.batch_bytes": "whole number, auto or null",
}


def reference() -> str:
    """All tables."""
    parts = [text for name in ("model", "dataset", "neurons") for text in _group(name)]
    for path in sorted(Path(CONF).glob("measure/*.yaml")):
        text = path.read_text()
        parts += [f"### measure={path.stem}", text.splitlines()[0].removeprefix("# ")]
        parts.append(_table("measure", find_measure(path.stem).Options, _keys(text)))
    parts += [text for name in ("cluster", "storage", "job") for text in _group(name)]
    for name, settings in (("study", StudyConfig), ("probe", ProbeConfig), ("catalogue", CatalogueConfig)):
        parts += [f"### {name} (`python -m jobs.{name}`)", _table(name, types_of(settings)[name])]
    return "\n\n".join(parts)


def shown() -> str:
    """The reference as it stands in the README."""
    text = README.read_text()
    return text[text.index(_BEGIN) + len(_BEGIN) : text.index(_END)]


def _group(name: str) -> Iterator[str]:
    settings = types_of(ScanConfig)[name]
    yield f"### {name}"
    yield " ".join((settings.__doc__ or "").partition("\n\n")[0].split())
    yield _table(name, settings)


def _table(group: str, settings: type, only: Collection[str] | None = None) -> str:
    kinds = types_of(settings)
    rows = ["| setting | type | default | what |", "|---|---|---|---|"]
    for own in fields(settings):
        # A measure's file leaves out what is of other measures of its class; its name is the file's.
        if "says" in own.metadata and (only is None or own.name in only):
            key = f"{group}.{own.name}"
            cells = (f"`{key}`", _type(key, own, kinds[own.name]), _default(own), _meaning(own))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _type(key: str, own: Field[Any], kind: Any) -> str:
    if kind is Any:
        is_whole, is_auto = own.metadata.get("is_whole"), own.default == "auto"
        return _ANY.get(key, f"auto or a {'whole ' * bool(is_whole)}number" if is_auto else "text")
    return " or ".join(_word(member) for member in members(kind))


def _word(kind: Any) -> str:
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null"}
    if kind in words:
        return words[kind]
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        return f"list of {_word(inner)}" if inner in words else "list"
    return "mapping"


def _default(own: Field[Any]) -> str:
    default = own.default_factory() if own.default_factory is not MISSING else own.default
    if isinstance(default, list):
        return f"`[{', '.join(map(str, default))}]`"
    words = {None: "null", True: "true", False: "false", " ": '" "'}
    is_word = default is None or isinstance(default, bool | str)
    return f"`{words.get(default, default) if is_word else default}`"


def _meaning(own: Field[Any]) -> str:
    said = [str(own.metadata["says"])]
    allowed, least = own.metadata.get("allowed", ()), own.metadata.get("least")
    if allowed and least is None:
        said.append(f"one of {', '.join(f'`{one}`' for one in allowed)}")
    if least is not None:
        said.append(f"at least {least}")
    return "; ".join(said)


def _keys(text: str) -> set[str]:
    """The settings that a YAML file gives a value."""
    return set(re.findall(r"^(\w+):", text, re.MULTILINE))


def main() -> None:
    """Write the reference into the README."""
    README.write_text(README.read_text().replace(shown(), reference()))


if __name__ == "__main__":
    main()

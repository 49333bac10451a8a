"""What settings, measures, tables, columns and engines were called before, and are called now.

A command that is given a former name, as it is typed or in a YAML file, tells the present one and does what was meant;
a program that gives the former name of a measure is refused with the present one. Runs that were stored under former
names (schema 3 and before) are read under the present ones. Nothing is written under a former name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

SETTINGS = {
    "storage.patience_seconds": "storage.retry_timeout_seconds",
    "dataset.wording": "dataset.template",
    "dataset.wordings": "dataset.templates",
}
# Measures, and the tables that each of them gives under its own name.
MEASURES = {"strength": "aggregate_importance", "scores": "skill_scores", "votes": "neuron_predictions"}
COLUMNS = {
    "sweep": {"largest_delta_p": "max_abs_delta_p"},
    "aggregate_importance": {"strength": "aggregate_importance"},
}
ENGINES = {"branches": "shared_prefix", "rows": "kv_cache", "sequences": "full_sequence"}
# Where a run kept why shards failed.
FAILED_FOLDER = "set_aside"
# A measure's name alone, in quotes, or among several that are swept over, and not as a part of a path.
_MEASURE = re.compile(rf"(?<![\w./:-])(?:{'|'.join(MEASURES)})(?![\w./:-])")


def current_override(override: str) -> str:
    """A setting as it is typed, `KEY=VALUE`, under its present name; of measures also the values."""
    sign = override[: len(override) - len(override.lstrip("+"))]
    key, equals, value = override[len(sign) :].partition("=")
    if key in SETTINGS and equals:
        tell(key, SETTINGS[key])
        return f"{sign}{SETTINGS[key]}={value}"
    if key in ("measure", "measure.name"):
        return f"{sign}{key}={_MEASURE.sub(lambda found: current_measure(found[0]), value)}" if equals else override
    if key == "probe.contexts" and "wording:" in value:
        tell("probe.contexts: wording", "template")
        return override.replace("wording:", "template:")
    return override


def current_measure(name: str) -> str:
    """The present name of a measure, told where a former one was given."""
    if name in MEASURES:
        tell(f"measure={name}", f"measure={MEASURES[name]}")
    return MEASURES.get(name, name)


def current_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a stored run says was asked for, under present names; its fingerprint is of what it was stored as."""
    found = dict(config)
    for group, kept in (("storage", SETTINGS), ("dataset", SETTINGS)):
        if isinstance(found.get(group), Mapping):
            found[group] = {
                kept.get(f"{group}.{key}", f"{group}.{key}").partition(".")[2]: value
                for key, value in found[group].items()
            }
    measure = found.get("measure")
    if isinstance(measure, Mapping) and measure.get("name") in MEASURES:
        found["measure"] = {**measure, "name": MEASURES[measure["name"]]}
    return found


def current_about(about: Mapping[str, Any]) -> dict[str, Any]:
    """What else a stored run says of itself, with the present names of engines."""
    found = dict(about)
    if found.get("engine") in ENGINES:
        found["engine"] = ENGINES[found["engine"]]
    return found


def former_columns(table: str, names: list[str]) -> dict[str, str]:
    """Of a table's stored columns those that are called otherwise now: present names, with the stored ones."""
    return {now: before for before, now in COLUMNS.get(table, {}).items() if before in names}


def tell(before: str, now: str) -> None:
    """Say once more what something is called by now."""
    log.warning("%s is called %s by now; the former name goes on to work for a while", before, now)

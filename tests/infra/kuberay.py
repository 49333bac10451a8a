"""What KubeRay's operator takes: its published definitions, and what it refuses in code. And the manifests' parts."""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema
import pytest
import yaml

from tests.infra.kustomize import KUBERAY, ROOT

DEFINITIONS = ROOT.parent / "shared" / "data" / "kuberay"


def part(path: str) -> dict[str, Any]:
    """A file of the manifests, read anew."""
    found: dict[str, Any] = yaml.safe_load((KUBERAY / path).read_text())
    return found


def settings(overlay: str) -> dict[str, str]:
    """What a person sets, as it stands."""
    found: dict[str, str] = part(f"overlays/{overlay}/settings.yaml")["data"]
    return found


def of_ray(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The one RayJob or RayCluster among them."""
    (found,) = [one for one in objects if one["apiVersion"] == "ray.io/v1"]
    return found


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A Kubernetes schema that refuses unknown fields, which the API server would silently drop."""
    made = {
        key: strict(value) if isinstance(value, dict) else value for key, value in schema.items() if key != "properties"
    }
    if "properties" in schema:
        made["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        made.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return made


@cache
def operators_definition(kind: str) -> Any:
    """What validates a RayJob or RayCluster as the operator's definition does; skips where it is not at hand."""
    file = DEFINITIONS / f"ray.io_{kind.lower()}s.yaml"
    if not file.exists():
        pytest.skip(f"the operator's definitions are not at hand: {file.name}")
    # Half a megabyte, of which the loader written in Python takes its time.
    versions = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = [one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1"]
    schema["properties"]["metadata"] = {"type": "object", "additionalProperties": True}
    return jsonschema.validators.validator_for(schema)(strict(schema))


def operator_refuses(job: dict[str, Any]) -> list[str]:
    """What KubeRay's operator, by its code, says against how a RayJob and its cluster are deleted."""
    spec, found = job["spec"], []
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    if rules and spec.get("shutdownAfterJobFinishes"):
        found.append("deletionRules beside shutdownAfterJobFinishes")
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        found.append("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
    waits: dict[str, dict[str, int]] = {}
    for rule in rules:
        condition = dict(rule["condition"])
        seconds = condition.pop("ttlSeconds", 0)
        if len(condition) != 1:
            found.append("a condition has either a jobStatus or a jobDeploymentStatus")
        policies = waits.setdefault(str(condition), {})
        if rule["policy"] in policies:
            found.append("the same rule twice")
        policies[rule["policy"]] = seconds
        if rule["policy"] == "DeleteWorkers" and spec["rayClusterSpec"].get("enableInTreeAutoscaling"):
            found.append("DeleteWorkers beside the autoscaler")
    for policies in waits.values():
        ordered = [policies[one] for one in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if one in policies]
        if ordered != sorted(ordered):
            found.append("what holds the rest goes first")
    return found

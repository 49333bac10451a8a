"""The pods of a Ray manifest, each as a bare pod, against what Kubernetes' API server checks.

The operator's definitions of RayJob and RayCluster leave most of a pod's template unchecked: a port of 808000 passes,
and the pod is refused when it is made, minutes later. So each template is made a pod here, and held against Kubernetes'
own schemas, against the ranges and references that the API server checks in code, and against the standard
`restricted`.
Only what the manifests use is checked; a volume or a probe of another kind is said to be unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import kubernetes_validate

VERSION = "1.37"
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
PORT_NAME = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")
QUANTITY = re.compile(r"(\d+\.?\d*|\.\d+)([numk]|[MGTPE]i?|Ki|[eE][+-]?\d+)?")
IMAGE = re.compile(r"[a-z0-9][a-z0-9._/:-]*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?")
POWERS = {"n": -3, "u": -2, "m": -1, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
# The least value of each number of a probe.
PROBES = {
    "initialDelaySeconds": 0, "periodSeconds": 1, "timeoutSeconds": 1, "successThreshold": 1, "failureThreshold": 1,
}  # fmt: skip


def bare_pods(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each pod that the operator makes of a RayJob or a RayCluster, by its role; `head`, `gpu`, `autoscaler`, ..."""
    spec = manifest["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    templates = {}
    if "submitterPodTemplate" in spec:
        templates["submitter"] = spec["submitterPodTemplate"]
    if "headGroupSpec" in cluster:
        templates["head"] = cluster["headGroupSpec"]["template"]
        templates |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    pods = {
        role: {
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": role, **one["metadata"]}, "spec": one["spec"],
        }
        for role, one in templates.items()
    }  # fmt: skip
    if "autoscalerOptions" in cluster:
        # A container beside the head's, of which the options are a part.
        options = cluster["autoscalerOptions"]
        ours = {
            key: value for key, value in options.items() if key in ("resources", "securityContext", "env", "envFrom")
        }
        container = {"name": "autoscaler", "image": "rayproject/ray:2.60.0", **ours}
        pods["autoscaler"] = {**pods["head"], "spec": {**pods["head"]["spec"], "containers": [container]}}
    return pods


def container(pod: dict[str, Any]) -> dict[str, Any]:
    """Its first, which is Ray's."""
    found: dict[str, Any] = pod["spec"]["containers"][0]
    return found


def amount(quantity: str | int) -> Decimal:
    """A quantity as a number: `500m` is 0.5, `1Ki` is 1024. Raises `ValueError` for what is none."""
    match = QUANTITY.fullmatch(str(quantity))
    if match is None:
        raise ValueError(f"{quantity!r} is no quantity")
    number, unit = Decimal(match[1]), match[2] or ""
    if unit[:1] in ("e", "E") and unit[1:] not in ("", "i"):
        return number.scaleb(int(unit[1:]))
    power = POWERS.get(unit[:1].replace("K", "k"), 0)
    return number * (Decimal(1024) if unit.endswith("i") else Decimal(1000)) ** power


def complaints(pod: dict[str, Any]) -> list[str]:
    """What Kubernetes would say against this pod; nothing, if it is well."""
    try:
        kubernetes_validate.validate(pod, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"schema: {error.message}"]
    return [*_of_the_pod(pod), *(one for own in pod["spec"]["containers"] for one in _of_a_container(own, pod["spec"]))]


def _of_the_pod(pod: dict[str, Any]) -> Iterator[str]:
    spec = pod["spec"]
    security = spec.get("securityContext", {})
    names = [own["name"] for own in spec["containers"]]
    volumes = [own["name"] for own in spec.get("volumes", [])]
    for name in [*names, *volumes, spec.get("priorityClassName", "none")]:
        if not DNS_LABEL.fullmatch(name):
            yield f"name {name!r}"
    if len(set(names)) != len(names) or len(set(volumes)) != len(volumes):
        yield "a name is there twice"
    for value in pod["metadata"].get("labels", {}).values():
        if not LABEL_VALUE.fullmatch(value):
            yield f"label {value!r}"
    if spec.get("terminationGracePeriodSeconds", 30) < 0:
        yield "grace period"
    for own in spec.get("tolerations", []):
        if own.get("operator") not in ("Exists", "Equal") or (own["operator"] == "Exists" and "value" in own):
            yield f"toleration {own}"
    for own in spec.get("topologySpreadConstraints", []):
        if own["maxSkew"] < 1 or own["whenUnsatisfiable"] not in ("DoNotSchedule", "ScheduleAnyway"):
            yield f"spread {own}"
        if set(own.get("matchLabelKeys", [])) & set(own.get("labelSelector", {}).get("matchLabels", {})):
            yield "spread: a label is matched twice"
    for own in spec.get("volumes", []):
        if set(own) - {"name"} not in ({"emptyDir"}, {"persistentVolumeClaim"}):
            yield f"restricted: volume {own}"
        if "sizeLimit" in own.get("emptyDir", {}) and not _is_quantity(own["emptyDir"]["sizeLimit"]):
            yield f"quantity {own['emptyDir']['sizeLimit']!r}"
    if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")) or "sysctls" in security:
        yield "restricted: the host's namespaces or settings"
    if security.get("runAsNonRoot") is not True or security.get("runAsUser") == 0:
        yield "restricted: runs as root"
    if security.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "restricted: seccomp"


def _of_a_container(own: dict[str, Any], spec: dict[str, Any]) -> Iterator[str]:
    if not IMAGE.fullmatch(own.get("image", "")):
        yield f"image {own.get('image')!r}"
    for port in own.get("ports", []):
        if not 1 <= port["containerPort"] <= 65535:
            yield f"port {port['containerPort']}"
        if not PORT_NAME.fullmatch(port.get("name", "x")):
            yield f"port's name {port['name']!r}"
        if port.get("hostPort"):
            yield "restricted: a port of the host"
    mounts = own.get("volumeMounts", [])
    if len({mount["mountPath"] for mount in mounts}) != len(mounts):
        yield "two volumes at one place"
    for mount in mounts:
        if mount["name"] not in [volume["name"] for volume in spec.get("volumes", [])]:
            yield f"no volume {mount['name']!r}"
    yield from _of_resources(own.get("resources", {}))
    for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
        probe = own.get(kind, {})
        for key, least in PROBES.items():
            if probe.get(key, least) < least:
                yield f"{kind}: {key}"
        if kind != "readinessProbe" and probe.get("successThreshold", 1) != 1:
            yield f"{kind}: successThreshold"
    security = own.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield "restricted: privileges"
    if security.get("runAsNonRoot") is False or security.get("runAsUser") == 0:
        yield "restricted: runs as root"
    capabilities = security.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "restricted: capabilities"


def _of_resources(resources: dict[str, Any]) -> Iterator[str]:
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for value in [*requests.values(), *limits.values()]:
        if not _is_quantity(value):
            yield f"quantity {value!r}"
            return
    for name, value in requests.items():
        if name in limits and amount(value) > amount(limits[name]):
            yield f"requests more {name} than its limit"
    for name in {*requests, *limits}:
        # Devices are whole, and not shared between what is asked for and what is allowed.
        if "/" in name and (requests.get(name) != limits.get(name) or amount(limits[name]) % 1):
            yield f"{name}: request and limit are one whole number"


def _is_quantity(value: str | int) -> bool:
    return QUANTITY.fullmatch(str(value)) is not None

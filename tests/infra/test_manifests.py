"""The manifests of Kubernetes, in parts and whole, against those who will read them.

Against the operator's published definitions, Kubernetes' schemas and the ranges that its API server adds, and what this
program accepts. No API server is started. What overlays and components add is in `test_overlays.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.infra.bare_pods import VERSION, amount, bare_pods, complaints, container
from tests.infra.kuberay import of_ray, operators_definition, part
from tests.infra.kustomize import COMPONENTS, OVERLAYS, rendered

# What is there without kustomize: each is whole, but for the RayJob's cluster.
PARTS = ["base/raycluster.yaml", "overlays/one-scan/rayjob.yaml"]
OF_KUBERNETES = ["networkpolicy", "priorityclass", "disruptionbudget"]
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@pytest.mark.parametrize("path", PARTS)
def test_the_parts_are_what_the_operator_defines(path: str) -> None:
    found = part(path)
    operators_definition(found["kind"]).validate(found | {"spec": _with_a_cluster(found["spec"])})


@each_overlay
def test_the_whole_is_what_the_operator_defines(overlay: str) -> None:
    found = of_ray(rendered(overlay))
    validator = operators_definition(found["kind"])
    validator.validate(found)
    for name in COMPONENTS[overlay]:
        validator.validate(of_ray(rendered(overlay, name)))
    # The check has teeth.
    found["spec"]["shutDownAfterJobFinishes"] = True
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(found)


def _with_a_cluster(spec: dict[str, Any]) -> dict[str, Any]:
    whole = part("base/raycluster.yaml")["spec"]
    return spec | {"rayClusterSpec": whole} if "rayClusterSpec" in spec else spec


@pytest.mark.parametrize("path", PARTS)
def test_each_pod_of_the_parts_is_one_that_kubernetes_takes(path: str) -> None:
    found = bare_pods(part(path))
    assert {role: complaints(pod) for role, pod in found.items()} == {role: [] for role in found}
    assert len(found) == {"RayCluster": 4, "RayJob": 1}[part(path)["kind"]]


@each_overlay
def test_each_pod_of_the_whole_is_one_that_kubernetes_takes(overlay: str) -> None:
    for add in [(), *((name,) for name in COMPONENTS[overlay])]:
        found = bare_pods(of_ray(rendered(overlay, *add)))
        assert {role: complaints(pod) for role, pod in found.items()} == {role: [] for role in found}, add
        roles = {"one-scan": {"submitter", "head", "gpu"}, "standing-cluster": {"head", "gpu", "cpu"}}[overlay]
        assert set(found) == roles | ({"autoscaler"} if "kueue" not in add else set())
        for pod in found.values():
            assert pod["spec"]["priorityClassName"] == part("base/priorityclass.yaml")["metadata"]["name"]
            for own in pod["spec"]["containers"]:
                assert own["resources"]["requests"]["ephemeral-storage"]
                plain = {one["name"] for one in own.get("env", [])}
                assert plain <= {"NEG_BUCKET", "NEG_REPLICAS"}, "secrets come from references alone"


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "port": (lambda pod: container(pod)["ports"][0].update(containerPort=808000), "port 808000"),
    "no port": (lambda pod: container(pod)["ports"][0].update(containerPort=0), "port 0"),
    "port's name": (lambda pod: container(pod)["ports"][0].update(name="prometheus-metrics"), "port's name"),
    "name": (lambda pod: container(pod).update(name="ray_worker"), "name 'ray_worker'"),
    "field": (lambda pod: container(pod).update(volumeMount=[]), "schema"),
    "image": (lambda pod: container(pod).update(image="registry/ neg"), "image"),
    "quantity": (lambda pod: container(pod)["resources"]["limits"].update(memory="32 GB"), "quantity '32 GB'"),
    "unit": (lambda pod: container(pod)["resources"]["limits"].update(memory="32ki"), "quantity '32ki'"),
    "request": (lambda pod: container(pod)["resources"]["requests"].update(memory="33Gi"), "requests more memory"),
    "device": (lambda pod: container(pod)["resources"]["requests"].pop("nvidia.com/gpu"), "nvidia.com/gpu"),
    "half a device": (
        lambda pod: [own.update({"nvidia.com/gpu": "500m"}) for own in container(pod)["resources"].values()],
        "nvidia.com/gpu",
    ),
    "size": (lambda pod: pod["spec"]["volumes"][0]["emptyDir"].update(sizeLimit="much"), "quantity 'much'"),
    "mount": (lambda pod: container(pod)["volumeMounts"][0].update(name="cash"), "no volume 'cash'"),
    "probe": (lambda pod: container(pod).update(livenessProbe={"periodSeconds": 0}), "livenessProbe"),
    "label": (lambda pod: pod["metadata"]["labels"].update(a="b c"), "label"),
    "spread": (lambda pod: pod["spec"]["topologySpreadConstraints"][0].update(maxSkew=0), "spread"),
    "toleration": (lambda pod: pod["spec"]["tolerations"][0].update(value="x"), "toleration"),
    "root": (lambda pod: pod["spec"]["securityContext"].update(runAsUser=0), "restricted: runs as root"),
    "seccomp": (lambda pod: pod["spec"]["securityContext"].pop("seccompProfile"), "restricted: seccomp"),
    "host": (lambda pod: pod["spec"].update(hostNetwork=True), "restricted: the host"),
    "path": (
        lambda pod: pod["spec"]["volumes"].__setitem__(1, {"name": "shm", "hostPath": {"path": "/dev/shm"}}),
        "restricted: volume",
    ),
    "privileges": (lambda pod: container(pod).pop("securityContext"), "restricted: privileges"),
    "capabilities": (
        lambda pod: container(pod)["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]),
        "restricted: capabilities",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_pod_that_kubernetes_would_refuse_is_found(mistake: str) -> None:
    make, said = MISTAKES[mistake]
    pod = copy.deepcopy(bare_pods(part("base/raycluster.yaml"))["gpu"])
    make(pod)
    assert said in " ".join(complaints(pod))


def test_the_operators_own_definition_lets_a_port_of_808000_pass() -> None:
    wrong = part("base/raycluster.yaml")
    wrong["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"][1]["containerPort"] = 808000
    assert complaints(bare_pods(wrong)["head"]) == ["port 808000"]
    operators_definition("RayCluster").validate(wrong)


@pytest.mark.parametrize("name", OF_KUBERNETES)
def test_the_other_kinds_are_what_kubernetes_defines(name: str) -> None:
    kubernetes_validate.validate(part(f"base/{name}.yaml"), VERSION, strict=True)


@each_overlay
def test_all_that_is_rendered_is_known_and_holds_no_secret(overlay: str) -> None:
    found = rendered(overlay, "shared-cache")
    for one in found:
        if one["apiVersion"] != "ray.io/v1":
            kubernetes_validate.validate(one, VERSION, strict=True)
    of_the_scan = "RayJob" if overlay == "one-scan" else "RayCluster"
    assert {one["kind"] for one in found} == {
        of_the_scan, "NetworkPolicy", "PriorityClass", "PodDisruptionBudget", "PersistentVolumeClaim",
    }  # fmt: skip
    assert not re.search(r"AKIA|hf_[A-Za-z0-9]{8}", yaml.safe_dump_all(found))


def test_quantities_are_read_as_kubernetes_reads_them() -> None:
    pairs = [("500m", "0.5"), ("1Ki", "1024"), ("1k", "1000"), ("2Gi", str(2 * 2**30)), ("1e3", "1000"), ("1E", "1e18")]
    assert [amount(one) for one, _ in pairs] == [amount(number) for _, number in pairs]
    with pytest.raises(ValueError, match="no quantity"):
        amount("1 Gi")

"""The manifests as kustomize renders them: a setting has one place, and components add what its readers take."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from jobs.entry import CONF
from neg_service.config import ScanConfig, check, most_replicas, plain, typed
from tests.infra.bare_pods import amount, bare_pods, container
from tests.infra.kuberay import of_ray, operator_refuses, part, settings
from tests.infra.kustomize import (
    COMPONENTS,
    OLDEST,
    OVERLAYS,
    ROOT,
    copied,
    kubectl,
    leaves,
    render,
    rendered,
    version,
)

QUEUE = "kueue.x-k8s.io/queue-name"
# How many places of the rendered manifests each setting has.
PLACES = {
    "one-scan": {
        "bucket": 2, "deadline-seconds": 1, "head-cpu": 1, "head-memory": 2, "replicas": 2, "gpu-workers": 1,
        "gpu-worker-cpu": 1, "gpu-worker-memory": 2, "gpu-worker-gpus": 2, "cache": 2, "disk": 4, "queue": 0,
    },
    "standing-cluster": {
        "head-cpu": 1, "head-memory": 2, "gpu-workers": 1, "gpu-worker-cpu": 1, "gpu-worker-memory": 2,
        "gpu-worker-gpus": 2, "cpu-workers": 1, "cpu-worker-cpu": 1, "cpu-worker-memory": 2, "cache": 3, "disk": 6,
        "queue": 0,
    },
}  # fmt: skip

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@each_overlay
def test_a_setting_has_one_place(overlay: str, tmp_path: Path) -> None:
    own, before = settings(overlay), leaves(rendered(overlay))
    folder = copied(tmp_path, overlay)
    text = (folder / "settings.yaml").read_text()
    # A value that nothing else has, to each.
    new = {key: re.sub(r"\d+", str(700 + i), own[key]) for i, key in enumerate(own)}
    new |= {key: f"other-{key}" for key in ("bucket", "queue") if key in own}
    for key, value in new.items():
        text, count = re.subn(rf"^(  {key}: \"?){re.escape(own[key])}", rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert count == 1
    (folder / "settings.yaml").write_text(text)
    after = leaves(render(folder))
    assert after.keys() == before.keys()
    changed = {where: leaf for where, leaf in after.items() if leaf != before[where]}
    found = dict.fromkeys(own, 0)
    for where, leaf in changed.items():
        # A number stays a number.
        assert type(leaf) is type(before[where])
        for key, value in new.items():
            found[key] += str(leaf) == value
    assert found == PLACES[overlay]
    assert "my-bucket" not in str(after)


@each_overlay
def test_image_and_namespace_have_one_place(overlay: str, tmp_path: Path) -> None:
    folder = copied(tmp_path, overlay, add=("shared-cache",))
    text = (folder / "kustomization.yaml").read_text()
    text, count = re.subn("^namespace: .*$", "namespace: other", text, flags=re.MULTILINE)
    assert count == 1
    text = text.replace("registry.example.com/neg-service", "elsewhere/neg").replace("0.1.0-cuda", "9.9.9-cuda")
    (folder / "kustomization.yaml").write_text(text)
    found = render(folder)
    assert {one["metadata"].get("namespace") for one in found if one["kind"] != "PriorityClass"} == {"other"}
    images = {role: container(pod)["image"] for role, pod in bare_pods(of_ray(found)).items() if role != "autoscaler"}
    assert images == {role: f"elsewhere/neg:{'0.1.0-cpu' if role == 'cpu' else '9.9.9-cuda'}" for role in images}


@each_overlay
def test_what_refers_to_pods_meets_them(overlay: str) -> None:
    found = rendered(overlay)
    pods = bare_pods(of_ray(found))
    labels = {role: pod["metadata"]["labels"].items() for role, pod in pods.items() if role != "autoscaler"}
    (budget,) = [one["spec"] for one in found if one["kind"] == "PodDisruptionBudget"]
    assert [role for role in labels if budget["selector"]["matchLabels"].items() <= labels[role]] == ["head"]
    # Kubernetes cannot scale these pods' owner, so it takes a number of those that stay, and nothing else.
    assert isinstance(budget["minAvailable"], int)
    assert "maxUnavailable" not in budget
    (policy,) = [one["spec"] for one in found if one["kind"] == "NetworkPolicy"]
    assert all(policy["podSelector"]["matchLabels"].items() <= own for own in labels.values())
    (spread,) = pods["gpu"]["spec"]["topologySpreadConstraints"]
    assert [role for role in labels if spread["labelSelector"]["matchLabels"].items() <= labels[role]] == ["gpu"]
    (priority,) = [one for one in found if one["kind"] == "PriorityClass"]
    assert -10 <= priority["value"] < 0, "behind others, and not below what node autoscalers answer to"


@each_overlay
def test_a_pods_disk_holds_its_cache_and_logs_and_its_memory_what_is_shared(overlay: str) -> None:
    pods = bare_pods(of_ray(rendered(overlay)))
    for role in set(pods) - {"submitter", "autoscaler"}:
        limits = container(pods[role])["resources"]["limits"]
        cache, shm = pods[role]["spec"]["volumes"]
        assert amount(limits["ephemeral-storage"]) >= amount(cache["emptyDir"]["sizeLimit"]) + amount("10Gi")
        assert amount(shm["emptyDir"]["sizeLimit"]) < amount(limits["memory"])


def test_the_shared_cache_is_the_volume_of_every_node() -> None:
    for overlay in OVERLAYS:
        found = rendered(overlay, "shared-cache")
        (claim,) = [one for one in found if one["kind"] == "PersistentVolumeClaim"]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        assert claim["spec"]["resources"]["requests"]["storage"] == settings(overlay)["cache"]
        pods = bare_pods(of_ray(found))
        for role in set(pods) - {"submitter"}:
            volume = pods[role]["spec"]["volumes"][0]
            assert volume == {"name": "cache", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}


def test_what_stays_of_a_scan_is_what_the_operator_takes() -> None:
    assert operator_refuses(of_ray(rendered("one-scan"))) == []
    kept = of_ray(rendered("one-scan", "keep-failed"))
    assert operator_refuses(kept) == []
    # However a scan ends by itself, its cluster goes.
    ends = [
        one["condition"]
        for one in kept["spec"]["deletionStrategy"]["deletionRules"]
        if one["policy"] == "DeleteCluster"
    ]
    assert {one.get("jobStatus", "neither") for one in ends} == {"SUCCEEDED", "FAILED", "neither"}
    # The check has teeth.
    wrong = copy.deepcopy(kept)
    wrong["spec"]["shutdownAfterJobFinishes"] = True
    wrong["spec"]["deletionStrategy"]["deletionRules"][0]["policy"] = "DeleteWorkers"
    wrong["spec"]["deletionStrategy"]["deletionRules"][3]["condition"]["ttlSeconds"] = 1
    assert len(operator_refuses(wrong)) == 3


@each_overlay
def test_what_kueue_manages_is_what_it_takes(overlay: str) -> None:
    own = of_ray(rendered(overlay, "kueue"))
    queue = own["metadata"]["labels"][QUEUE]
    assert queue == settings(overlay)["queue"]
    # As Kueue's Workload defines `queueName`; and the value of a label.
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", queue)
    assert len(queue) <= 63
    cluster = own["spec"].get("rayClusterSpec", own["spec"])
    assert cluster["enableInTreeAutoscaling"] is False
    # A Workload has eight pod sets at most, named by labels of DNS: the head, each group, and who submits a job.
    pod_sets = ["head", *(group["groupName"] for group in cluster["workerGroupSpecs"])]
    pod_sets += ["submitter"] * (own["kind"] == "RayJob")
    assert len(set(pod_sets)) == len(pod_sets) <= 8
    assert all(re.fullmatch("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name) for name in pod_sets)
    (gpu,) = [group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu"]
    assert gpu["replicas"] == gpu["maxReplicas"] == int(settings(overlay)["gpu-workers"]), "all are there at the start"
    if own["kind"] == "RayJob":
        assert own["spec"]["shutdownAfterJobFinishes"] is True
        assert "clusterSelector" not in own["spec"]


def test_components_that_exclude_each_other_are_refused() -> None:
    kubectl()
    with pytest.raises(subprocess.CalledProcessError) as refused:
        rendered("one-scan", "keep-failed", "kueue")
    assert "shutdownAfterJobFinishes" in refused.value.stderr


def test_the_part_of_the_entry_point_is_what_the_program_accepts() -> None:
    job, own = part("overlays/one-scan/rayjob.yaml")["spec"], settings("one-scan")
    environment = _environment(job["submitterPodTemplate"])
    assert environment == {"NEG_BUCKET": own["bucket"], "NEG_REPLICAS": own["replicas"]}
    assert most_replicas(_accepted(_expanded(job["entrypoint"], environment)).cluster) == int(own["replicas"])
    assert job["activeDeadlineSeconds"] == int(own["deadline-seconds"])


def test_the_whole_entry_point_is_what_the_program_accepts() -> None:
    spec = of_ray(rendered("one-scan"))["spec"]
    config = _accepted(_words(spec))
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert most_replicas(config.cluster) * config.cluster.gpus_per_replica == group["maxReplicas"] * gpus


# What an operator does to the entry point: a setting behind the last one, a hub id ahead of all, another order.
EDITS: dict[str, Callable[[list[str]], list[str]]] = {
    "appended": lambda typed_in: [*typed_in, "job.shard_size=7"],
    "hub id first": lambda typed_in: ["model.source=meta-llama/Llama-3.1-8B", *typed_in, "job.shard_size=7"],
    "other order": lambda typed_in: ["job.shard_size=7", *reversed(typed_in)],
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_entry_point_may_be_changed(edit: str, tmp_path: Path) -> None:
    folder = copied(tmp_path, "one-scan")
    file, own = folder / "rayjob.yaml", folder / "settings.yaml"
    before = part("overlays/one-scan/rayjob.yaml")["spec"]["entrypoint"].split(" ")
    text, count = re.subn(
        r"entrypoint: >-\n(    .*\n)+",
        f"entrypoint: {' '.join([*before[:3], *EDITS[edit](before[3:])])}\n",
        file.read_text(),
    )
    assert count == 1
    file.write_text(text)
    # Names that look like numbers, too.
    text = own.read_text().replace("bucket: my-bucket", 'bucket: "20261127"').replace('replicas: "8"', 'replicas: "16"')
    own.write_text(text)
    config = _accepted(_words(of_ray(render(folder))["spec"]))
    assert config.job.shard_size == 7
    assert (config.model.source == "meta-llama/Llama-3.1-8B") == (edit == "hub id first")
    assert config.dataset.source == "s3://20261127/prompts.jsonl"
    assert config.storage.uri == "s3://20261127/runs"
    assert most_replicas(config.cluster) == 16


def _words(spec: dict[str, Any]) -> list[str]:
    """What the program is started with, whoever expands the variables."""
    of_submitter, of_head = (
        _environment(own) for own in (spec["submitterPodTemplate"], spec["rayClusterSpec"]["headGroupSpec"]["template"])
    )
    assert all(isinstance(value, str) for value in [*of_submitter.values(), *of_head.values()]), "else it is refused"
    submitted = _expanded(spec["entrypoint"], of_submitter)
    # Ray's command quotes each word, and the head node's shell splits them again.
    assert _expanded(shlex.join(submitted), of_head) == submitted
    assert _expanded(spec["entrypoint"], of_head) == submitted
    return submitted


def _environment(template: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in template["spec"]["containers"][0]["env"]}


def _expanded(entrypoint: str, environment: dict[str, str]) -> list[str]:
    # A variable that is not there is an error.
    command = ["/bin/sh", "-uc", f'printf "%s\\n" {entrypoint}']
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


def _accepted(words: list[str]) -> ScanConfig:
    assert words[:3] == ["python", "-m", "jobs.scan"]
    with initialize_config_dir(CONF, version_base="1.3"):
        config = typed(ScanConfig, plain(compose("scan", overrides=words[3:])))
    check(config)
    assert config.cluster.wait_seconds > 0, "the GPU group starts empty"
    assert config.storage.uri.startswith("s3://")
    return config


def test_a_worker_drains_before_its_grace_period_ends() -> None:
    pods = bare_pods(part("base/raycluster.yaml"))
    for role in ("gpu", "cpu"):
        command = container(pods[role])["lifecycle"]["preStop"]["exec"]["command"][-1]
        leave = shlex.split(command.partition(";")[0])
        assert leave[:3] == ["python", "-m", "jobs.drain"]
        assert int(leave[leave.index("--seconds") + 1]) < pods[role]["spec"]["terminationGracePeriodSeconds"]


def test_rays_version_is_the_locked_one() -> None:
    (line,) = re.findall(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert part("base/raycluster.yaml")["spec"]["rayVersion"] == line


@pytest.mark.infra
@each_overlay
def test_every_kubectl_of_this_machine_renders_the_same(overlay: str, tmp_path: Path) -> None:
    beside = Path(shutil.which("kubectl") or kubectl()).resolve().parent
    folders = {beside, Path(kubectl()).parent, *map(Path, os.environ["PATH"].split(os.pathsep))}
    found = {file.resolve() for one in folders if one.is_dir() for file in one.glob("kubectl*") if file.is_file()}
    by_version = {version(str(file)): file for file in found if re.fullmatch(r"kubectl(\.\d+\.\d+)?", file.name)}
    programs = {known: str(file) for known, file in sorted(by_version.items()) if known >= OLDEST}
    if len(programs) < 2:
        pytest.skip(f"one kubectl alone is on this machine: {programs}")
    for i, add in enumerate([(), *((name,) for name in COMPONENTS[overlay])]):
        folder = copied(tmp_path / str(i), overlay, add=add)
        first, *others = [render(folder, program) for program in programs.values()]
        assert all(other == first for other in others)

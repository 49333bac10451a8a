"""What operators install, against the definitions of those who will read it, and against what this program accepts."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from hydra import compose, initialize_config_dir
from ray.autoscaler._private.util import prepare_config, validate_config

from infra.grafana import dashboard
from jobs.entry import CONF
from neg_service import errors
from neg_service.cluster import metrics
from neg_service.config import ScanConfig, check, most_replicas, plain, typed

ROOT = Path(__file__).parent.parent.parent
INFRA = ROOT / "infra"
DEFINITIONS = ROOT.parent / "shared" / "data" / "kuberay"
RAY_MANIFESTS = ["rayjob", "raycluster"]


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((INFRA / "kuberay" / f"{name}.yaml").read_text())
    return found


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """All pod specifications inside a manifest."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A Kubernetes schema that refuses unknown fields, which the API server would silently drop."""
    made = {
        key: strict(value) if isinstance(value, dict) else value for key, value in schema.items() if key != "properties"
    }
    if "properties" in schema:
        made["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        made.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return made


@pytest.mark.parametrize("name", RAY_MANIFESTS)
def test_ray_manifests_are_what_the_operator_defines(name: str) -> None:
    definition = DEFINITIONS / f"ray.io_{name}s.yaml"
    if not definition.exists():
        pytest.skip(f"the operator's definitions are not at hand: {definition.name}")
    # Half a megabyte, of which the loader written in Python takes its time.
    versions = yaml.load(definition.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = [one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1"]
    schema["properties"]["metadata"] = {"type": "object", "additionalProperties": True}
    validator = jsonschema.validators.validator_for(schema)(strict(schema))
    validator.validate(manifest(name))
    # The check has teeth.
    wrong = manifest(name)
    wrong["spec"]["shutDownAfterJobFinishes"] = True
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(wrong)


@pytest.mark.parametrize("name", RAY_MANIFESTS)
def test_pods_are_what_kubernetes_defines_run_as_nobody_special_and_hold_no_secrets(name: str) -> None:
    found = list(pods(manifest(name)))
    assert len(found) >= 3
    for pod in found:
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
        kubernetes_validate.validate(body, "1.31", strict=True)
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["requests"]
            assert "env" not in container, "secrets come from references alone"
    text = (INFRA / "kuberay" / f"{name}.yaml").read_text()
    assert not re.search(r"AKIA|hf_[A-Za-z0-9]{8}", text)


def test_the_other_kinds_of_kubernetes_and_the_launchers_file_are_valid() -> None:
    kubernetes_validate.validate(manifest("networkpolicy"), "1.31", strict=True)
    launcher = yaml.safe_load((INFRA / "ray" / "aws.yaml").read_text())
    validate_config(prepare_config(launcher))
    assert launcher["head_node_type"] in launcher["available_node_types"]


def test_every_entry_point_is_what_the_program_accepts() -> None:
    entrypoint = shlex.split(manifest("rayjob")["spec"]["entrypoint"])
    assert entrypoint[:3] == ["python", "-m", "jobs.scan"]
    with initialize_config_dir(CONF, version_base="1.3"):
        config = typed(ScanConfig, plain(compose("scan", overrides=entrypoint[3:])))
    check(config)
    assert config.cluster.wait_seconds > 0, "the GPU group starts empty"
    (group,) = manifest("rayjob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert most_replicas(config.cluster) == group["maxReplicas"], "an autoscaler adds what replicas wait for"
    assert config.storage.uri.startswith("s3://")
    before_the_end = [
        pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        for name in RAY_MANIFESTS
        for pod in pods(manifest(name))
        if "lifecycle" in pod["containers"][0]
    ]
    for command in before_the_end:
        leave = shlex.split(command.partition(";")[0])
        assert leave[:3] == ["python", "-m", "jobs.drain"]
        assert int(leave[leave.index("--seconds") + 1]) < 120, "the pods' grace period"
    commands = re.findall(r"python -m jobs\.(\w+)", (INFRA / "README.md").read_text())
    assert commands
    assert all((ROOT / "jobs" / f"{name}.py").exists() for name in commands)


def test_the_image_copies_what_there_is_and_does_not_run_as_root() -> None:
    lines = (INFRA / "docker" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    for line in lines:
        if line.startswith("COPY") and "--from" not in line:
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users == ["1000"]
    assert "ARG VARIANT=cpu" in lines
    # What the image is built from is not hidden from the build.
    shown = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source for line in lines if line.startswith("COPY") and "--from" not in line for source in line.split()[1:-1]
    }
    assert copied <= shown
    assert f"rayVersion: {_locked('ray')}" in (INFRA / "kuberay" / "rayjob.yaml").read_text()
    assert f"rayVersion: {_locked('ray')}" in (INFRA / "kuberay" / "raycluster.yaml").read_text()


def test_the_lifecycle_rule_is_what_s3_takes() -> None:
    rules = json.loads((INFRA / "s3" / "lifecycle.json").read_text())
    shape = (
        get_session()
        .get_service_model("s3")
        .operation_model("PutBucketLifecycleConfiguration")
        .input_shape.members["LifecycleConfiguration"]
    )
    assert not ParamValidator().validate(rules, shape).has_errors()
    assert rules["Rules"][0]["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] >= 1


def test_dashboard_and_alerts_ask_for_metrics_that_there_are() -> None:
    own = {f"ray_{name}" for name in exported_names()}
    panels = json.loads((INFRA / "grafana" / "dashboard.json").read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    asked += [rule["expr"] for rule in rules()]
    used = {name for expression in asked for name in re.findall(r"ray_neg_\w+", expression)}
    assert used <= own, used - own
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert {name for expression in asked for name in re.findall(r"neg:\w+", expression)} <= recorded
    states = {state for one in asked for text in re.findall(r'state=~?"([\w|]+)"', one) for state in text.split("|")}
    assert states <= {"done", "running", "waiting", "failed", "ready", "starting"}
    for panel in panels:
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["fieldConfig"]["defaults"]["unit"]


def test_panels_do_not_cover_each_other() -> None:
    panels = json.loads((INFRA / "grafana" / "dashboard.json").read_text())["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


with_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool, which comes with Prometheus, is not installed"
)


@with_promtool
def test_prometheus_understands_alerts_and_dashboard(tmp_path: Path) -> None:
    panels = json.loads((INFRA / "grafana" / "dashboard.json").read_text())["panels"]
    asked = [
        target["expr"].replace("$run", ".*").replace("$__range", "6h")
        for panel in panels
        for target in panel.get("targets", [])
    ]
    rules = [{"record": f"panel_{i}", "expr": expression} for i, expression in enumerate(asked)]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    for file in (tmp_path / "panels.yaml", INFRA / "prometheus" / "alerts.yaml"):
        subprocess.run(["promtool", "check", "rules", str(file)], check=True, capture_output=True)


@with_promtool
def test_alerts_fire_when_they_should_and_else_are_silent(tmp_path: Path) -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", str(INFRA / "prometheus" / "alerts_test.yaml")],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # The test of the tests: without its conditions an alert fires where it should not.
    text = (INFRA / "prometheus" / "alerts.yaml").read_text()
    (tmp_path / "alerts.yaml").write_text(re.sub(r"> \d[\d.]*\n", "> -1\n", text))
    shutil.copy(INFRA / "prometheus" / "alerts_test.yaml", tmp_path)
    wrong = ["promtool", "test", "rules", str(tmp_path / "alerts_test.yaml")]
    assert subprocess.run(wrong, check=False, capture_output=True).returncode != 0


def test_each_alert_is_tested_to_fire_and_to_be_silent() -> None:
    tests = yaml.safe_load((INFRA / "prometheus" / "alerts_test.yaml").read_text())["tests"]
    asked = [(one["alertname"], bool(one.get("exp_alerts"))) for test in tests for one in test["alert_rule_test"]]
    assert set(asked) == {(rule["alert"], fires) for rule in alerts() for fires in (True, False)}


def test_the_dashboard_is_what_its_code_makes() -> None:
    assert (INFRA / "grafana" / "dashboard.json").read_text() == dashboard.text(), "run make dashboard"


def test_the_readme_names_every_metric() -> None:
    own = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported_names()}
    section = (ROOT / "neg_service" / "cluster" / "README.md").read_text()
    section = section[section.index("| metric | what |") :].partition("\n\n")[0]
    assert set(re.findall(r"`(neg_\w+)", section)) == own


def test_the_runbook_has_a_heading_for_each_exception_and_each_alert() -> None:
    text = (INFRA / "README.md").read_text() + (INFRA / "RUNBOOK.md").read_text()
    headings = set(re.findall(r"^### (\w+)$", text, re.MULTILINE))
    exceptions = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)
    }
    assert headings == exceptions | {rule["alert"] for rule in alerts()}


def exported_names() -> set[str]:
    """All metrics of ours, without what Ray puts before their names."""
    return set(re.findall(r'"(neg_\w+)"', Path(metrics.__file__).read_text()))


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((INFRA / "prometheus" / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def _locked(package: str) -> str:
    return next(
        line.split("==")[1]
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line.startswith(f"{package}==")
    )

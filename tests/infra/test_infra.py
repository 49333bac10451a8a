"""What operators install, against the definitions of those who will read it; manifests are in `test_manifests.py`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

from infra.docker.lock import EXTRAS
from infra.grafana import dashboard
from neg_service import errors
from neg_service.cluster import metrics

ROOT = Path(__file__).parent.parent.parent
INFRA = ROOT / "infra"


def test_the_launchers_file_is_valid() -> None:
    launcher = yaml.safe_load((INFRA / "ray" / "aws.yaml").read_text())
    validate_config(prepare_config(launcher))
    assert launcher["head_node_type"] in launcher["available_node_types"]
    # What the image has is there, too.
    (extras,) = re.findall(r"neg_service\[([\w,]+)\]", "\n".join(launcher["setup_commands"]))
    assert extras.split(",") == sorted(EXTRAS)


def test_every_command_of_the_readme_is_there() -> None:
    commands = re.findall(r"python -m jobs\.(\w+)", (INFRA / "README.md").read_text())
    assert commands
    assert all((ROOT / "jobs" / f"{name}.py").exists() for name in commands)


def test_the_image_copies_what_there_is_and_does_not_run_as_root() -> None:
    lines = (INFRA / "docker" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [
        source.replace("$VARIANT", variant)
        for line in lines
        if line.startswith("COPY") and "--from" not in line
        for source in line.split()[1:-1]
        for variant in ("cpu", "cuda")
    ]
    assert copied
    # What the image is built from is there, and is not hidden from the build.
    shown = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for source in copied:
        assert (ROOT / source).exists(), source
        assert {source, str(Path(source).parent)} & shown, source
    # The build is shown nothing of which it copies nothing.
    assert {place for place in shown if not any(source.startswith(place) for source in copied)} == set()
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users == ["1000"]
    assert "ARG VARIANT=cpu" in lines


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
    tests = yaml.safe_load((INFRA / "prometheus" / "alerts_test.yaml").read_text())
    (tmp_path / "alerts_test.yaml").write_text(yaml.safe_dump({**tests, "tests": tests["tests"][:1]}))
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


def test_each_alert_leads_to_its_heading_and_the_runbook_says_which_of_them_page() -> None:
    text = (INFRA / "RUNBOOK.md").read_text()
    listed = {
        name: severity
        for severity, names in re.findall(r"^- \*\*(\w+)\*\*, .*: (.*)\.$", text, re.MULTILINE)
        for name in names.split(", ")
    }
    assert listed == {rule["alert"]: rule["labels"]["severity"] for rule in alerts()}
    for rule in alerts():
        url, _, heading = rule["annotations"]["runbook_url"].rpartition("/RUNBOOK.md#")
        # A path would be none that a message can lead to.
        assert url.startswith("https://")
        assert heading == rule["alert"].lower()


def exported_names() -> set[str]:
    """All metrics of ours, without what Ray puts before their names."""
    return set(re.findall(r'"(neg_\w+)"', Path(metrics.__file__).read_text()))


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((INFRA / "prometheus" / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]

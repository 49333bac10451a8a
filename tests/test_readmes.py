"""What the READMEs say: links lead somewhere, commands can be composed, recipes run, tables are up to date."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import neg_service
from jobs import submit
from jobs.bench import BenchConfig
from jobs.catalogue import CatalogueConfig
from jobs.check import CheckConfig
from jobs.command_line import as_typed
from jobs.control import ControlConfig
from jobs.entry import composed
from jobs.probe import ProbeConfig
from jobs.report import ReportConfig
from jobs.status import StatusConfig
from jobs.study import StudyConfig
from jobs.tasks import TasksConfig
from jobs.verify import VerifyConfig
from neg_service import LanguageModel
from neg_service.config import DatasetConfig, ModelConfig, ScanConfig, StorageConfig, check, plain, typed
from tests import settings_reference
from tests.here import scan_here

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("conf", "infra", "jobs", "neg_service", "tests")
READMES = [
    ROOT / "README.md",
    ROOT / "infra" / "RUNBOOK.md",
    *sorted(path for name in FOLDERS for path in (ROOT / name).rglob("README.md")),
]
SETTINGS: dict[str, type] = {
    "scan": ScanConfig, "demo": ScanConfig, "study": StudyConfig, "probe": ProbeConfig, "verify": VerifyConfig,
    "check": CheckConfig, "status": StatusConfig, "tasks": TasksConfig, "report": ReportConfig, "bench": BenchConfig,
    "control": ControlConfig, "catalogue": CatalogueConfig,
}  # fmt: skip
# All but a former name.
JOBS = {
    path.stem
    for path in (ROOT / "jobs").glob("*.py")
    if 'if __name__ == "__main__"' in path.read_text() and path.stem != "leave"
}

each_readme = pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))


def without_code(text: str) -> str:
    """A README without its blocks of code."""
    return re.sub(r"(?s:```.*?```)|^    .*$", "", text, flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What its headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> Iterator[tuple[Path, str]]:
    """The files that a README links to, each with the heading."""
    for link in re.findall(r"\]\(([^)]+)\)", without_code(path.read_text())):
        if not link.startswith("http"):
            place, _, heading = link.partition("#")
            yield ((path.parent / place).resolve() if place else path), heading


def commands(path: Path) -> list[list[str]]:
    """What stands in its blocks of code, a command each, as a shell splits it."""
    text = path.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"python -m |neg-|make ", line)]


def blocks(path: Path) -> list[str]:
    """Its blocks of Python."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def test_the_first_one_is_short_and_leads_to_all_others() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 12 * 1024
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        if (path := ahead.pop()) not in seen:
            seen.add(path)
            ahead += [to for to, _ in links(path) if to.suffix == ".md"]
    assert set(READMES) <= seen


@each_readme
def test_links_lead_somewhere(path: Path) -> None:
    for to, heading in links(path):
        assert to.exists(), to
        assert not heading or heading in anchors(to.read_text()), f"{to}#{heading}"


@each_readme
def test_lines_are_short_and_decisions_come_last(path: Path) -> None:
    text = path.read_text()
    assert not [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
    headings = re.findall(r"^## (.*)$", without_code(text), re.MULTILINE)
    assert "Decisions" not in headings[:-1]


@each_readme
def test_commands_can_be_composed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for first, *rest in commands(path):
        if first == "make":
            assert rest[0] in targets
        else:
            require_command(*([first.replace("neg-", "jobs."), *rest] if first != "python" else rest[1:]))


def require_command(module: str, *arguments: str) -> None:
    """It is there and takes these arguments."""
    importlib.import_module(module)
    package, _, name = module.partition(".")
    if package == "tests" or name in ("drain", "health"):
        return
    if name == "submit":
        asked = submit._parser().parse_intermixed_args(arguments)
        name, arguments = asked.job, tuple(asked.overrides)
    if "--multirun" in arguments:
        assert as_typed([one for one in arguments if one != "--multirun"], SETTINGS[name], is_sweep=True)
        return
    config = composed(name, [one for one in arguments if not one.startswith("--")], SETTINGS[name])
    if SETTINGS[name] is ScanConfig:
        check(typed(ScanConfig, plain(config)))


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "jobs" / "README.md"])
def test_each_command_stands_in_the_table(path: Path) -> None:
    rows = re.findall(r"^\| \[?`(?:python -m jobs\.)?(\w+)`", path.read_text(), re.MULTILINE)
    assert set(rows) >= JOBS


def test_each_measure_stands_in_the_table() -> None:
    table = (ROOT / "neg_service" / "measures" / "README.md").read_text().partition("\n\n## ")[0]
    assert {path.stem for path in (ROOT / "conf" / "measure").glob("*.yaml")} <= set(re.findall(r"`(\w+)`", table))


def test_the_reference_of_settings_is_up_to_date() -> None:
    found = settings_reference.reference()
    assert settings_reference.shown() == found, "make settings writes it"
    assert not re.findall(r"^.*\|  \|$", found, re.MULTILINE), "what does it mean?"
    for key in ("`cluster.stall_seconds` | auto or a number | `auto` |", "`measure.top_k` | whole number | `100` |"):
        assert key in found


def test_all_recipes_in_python_are_run() -> None:
    # That of storage is run on a real server, in `storage/test_s3_results.py`.
    run = {
        ROOT / "README.md",
        *(ROOT / "neg_service" / own / "README.md" for own in ("", "storage", "measures/control")),
    }
    assert {path for path in READMES if blocks(path)} == run


@pytest.mark.model
def test_the_recipes_of_the_library_run_as_they_stand(smollm2: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neg_service, "load_model", {"smollm2": smollm2}.__getitem__)
    names: dict[str, object] = {}
    for block in blocks(ROOT / "neg_service" / "README.md"):
        exec(block, names)
    assert names["s"].delta_p.shape == (2, 40)  # type: ignore[attr-defined]
    assert names["result"].neurgrad.shape == (1, 2, 30, 1536)  # type: ignore[attr-defined]
    # One prompt, two edits, two targets.
    assert names["e"].probability.shape == (1, 2, 2)  # type: ignore[attr-defined]


@pytest.mark.model
def test_the_recipes_of_control_run_as_they_stand(
    smollm2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(neg_service, "load_model", {"smollm2": smollm2}.__getitem__)
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "neg_service" / "measures" / "control" / "README.md"):
        exec(block, names)
    assert names["result"].shift.shape == (1, 30, 1536)
    assert all(names[own].reached.all() for own in ("result", "few", "above", "careful"))
    # The same shift as edits, and as exported.
    np.testing.assert_allclose(names["after"].probability[0, 0, 0], names["result"].achieved, rtol=1e-4)
    exported = names["logits"][0, -1].softmax(0)[smollm2.tokenizer(" Rome").input_ids[0]]
    np.testing.assert_allclose(exported.item(), names["careful"].achieved[0], rtol=1e-4)
    assert names["table"].num_rows == 6
    assert names["texts"].before != names["texts"].after


@pytest.mark.model
def test_the_recipes_of_the_first_readme_run(
    smollm2: LanguageModel, tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.jsonl").write_text('{"prompt": "w1 w2", "targets": [" w3", " w4"], "answer": " w4"}\n')
    run = scan_here(
        ScanConfig(
            model=ModelConfig(source=str(tiny_directory)),
            dataset=DatasetConfig(source=str(tmp_path / "words.jsonl")),
            storage=StorageConfig(uri=str(tmp_path / "results")),
        )
    )
    monkeypatch.setattr(neg_service, "load_model", {"smollm2": smollm2}.__getitem__)
    names: dict[str, object] = {}
    for block in blocks(ROOT / "README.md"):
        code = re.sub(r"^uri = .*$", f"uri = {run.uri!r}", block, flags=re.MULTILINE)
        exec(code.replace("(20, 1011)", "(1, 7)"), names)
    # A layer of the right answer each; both targets of one neuron.
    assert names["table"].num_rows == 3  # type: ignore[attr-defined]
    assert len(names["frame"]) == 2  # type: ignore[arg-type]
    assert names["result"].neurgrad.shape == (1, 2, 30, 1536)  # type: ignore[attr-defined]

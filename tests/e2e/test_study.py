"""A study of a tiny model and its report, as a person runs them, and the page in a real browser.

Its scans are computed in this process, without Ray: `test_probe.py` has the same several scans on one.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver

import neg_service
from jobs.entry import composed
from jobs.report import ReportConfig, report
from jobs.study import StudyConfig, study
from neg_service.errors import ConfigurationError
from tests.here import run_here
from tests.refusals import refused

PROMPTS, NEURONS = 6, 8
needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="no chromium and chromedriver on this machine",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_directory: Path) -> Path:
    """A folder with a study of all its prompts, and with the report of it."""
    folder = tmp_path_factory.mktemp("study")
    rows = [
        {"prompt": f"w{i} w{i + 1} w9", "targets": [" w7", " w8"], "answer": " w7", "id": f"p{i}"}
        for i in range(10, 18)
    ]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [
        f"model.source={tiny_directory}", f"dataset.source={folder}/words.jsonl", f"storage.uri={folder}/runs",
        f"study.prompts={PROMPTS}", f"study.neurons={NEURONS}", "study.answered=all", "study.range_prompts=2",
        "study.sets=[2,4]", "study.draws=50", "study.steps=5",
    ]  # fmt: skip
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neg_service.cluster.scan.run", run_here)
        patch.setattr("jobs.studies.say", lambda text, style: said.append(text))
        assert study(composed("study", asked, StudyConfig)) == 0
    found = re.search(r"results: (\S+)", said[0])
    assert found
    assert "neurgrad" in said[0]
    (folder / "uri").write_text(found[1])
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert report(composed("report", [f"runs=[{found[1]}]", f"out={folder}/report"], ReportConfig)) == 0
    assert printed.getvalue().strip() == f"{folder}/report/report.html"
    return folder


def test_the_table_of_estimators_is_what_the_runs_say(place: Path) -> None:
    study = Path((place / "uri").read_text())
    about = json.loads((study / "study.json").read_text())
    rows = {(row["estimator"], row["layer"]): row for row in pq.read_table(study / "estimators.parquet").to_pylist()}
    sweep = neg_service.open_run(about["runs"]["sweep"]).table("sweep").to_table().to_pandas()
    sweep = sweep[sweep.is_answer]
    n_layers = sweep.layer.nunique()
    assert len(sweep) == PROMPTS * NEURONS * n_layers
    integrals = neg_service.open_run(about["runs"]["integrated_gradients"]).table("integrated_gradients").to_table()
    of = {
        (row["prompt_id"], row["layer"]): row["integrated_gradients"]
        for row in integrals.to_pylist()
        if row["is_answer"]
    }
    estimates = {
        "neurgrad": sweep.neurgrad,
        "gradient": sweep.gradient,
        "activation": sweep.activation,
        "gradient_x_activation": sweep.gradient * sweep.activation,
        "integrated_gradients": np.array(
            [
                of[prompt, layer][neuron]
                for prompt, layer, neuron in zip(sweep.prompt_id, sweep.layer, sweep.neuron, strict=True)
            ]
        ),
    }
    for name, values in estimates.items():
        for layer in [None, 0, n_layers - 1]:
            own = np.ones(len(sweep), bool) if layer is None else (sweep.layer == layer).to_numpy()
            found = rows[name, layer]
            neg, estimate = sweep.neg.to_numpy()[own].astype(float), np.asarray(values)[own].astype(float)
            assert found["pearson"] == pytest.approx(stats.pearsonr(neg, estimate).statistic, rel=1e-6)
            assert found["spearman"] == pytest.approx(stats.spearmanr(neg, estimate).statistic, rel=1e-6)
            assert found["n"] == len(neg)
    assert abs(rows["random", None]["pearson"]) < 0.5
    cost = neg_service.open_run(about["runs"]["integrated_gradients"]).about["cost"]
    assert cost["prompts"] == PROMPTS
    assert 0 < cost["computed_seconds"] <= cost["seconds"]
    assert rows["integrated_gradients", None]["seconds_a_prompt"] == pytest.approx(cost["computed_seconds"] / PROMPTS)


def test_sets_that_are_shifted_together_are_compared_with_the_sum_of_their_negs(place: Path) -> None:
    study = Path((place / "uri").read_text())
    about = json.loads((study / "study.json").read_text())
    sweep = neg_service.open_run(about["runs"]["sweep"]).table("sweep").to_table().to_pandas()
    slope = {(r.prompt_id, r.target, r.layer, r.neuron): r.neg for r in sweep[sweep.is_answer].itertuples()}
    joint = neg_service.open_run(about["runs"]["sets"])
    neurons = {edit["name"]: edit["neurons"] for edit in joint.config["measure"]["edits"]}
    table = joint.table("intervene").to_table().to_pandas()
    table = table[table.is_answer]
    for row in pq.read_table(study / "additivity.parquet").to_pylist():
        own = table[[len(neurons[name]) == row["n_neurons"] for name in table.edit]]
        summed = [
            0.5 * sum(slope[r.prompt_id, r.target, *pair] for pair in map(tuple, neurons[r.edit]))
            for r in own.itertuples()
        ]
        assert row["n"] == len(own)
        assert row["pearson"] == pytest.approx(stats.pearsonr(own.delta_p, summed).statistic, rel=1e-5)


def test_only_what_is_answered_rightly_is_studied_unless_all_is_asked_for(place: Path, tiny_directory: Path) -> None:
    study = Path((place / "uri").read_text())
    (accuracy,) = pq.read_table(study / "accuracy.parquet").to_pylist()
    assert (accuracy["prompts"], accuracy["studied"]) == (8, PROMPTS)
    prompts = neg_service.open_run(json.loads((study / "study.json").read_text())["runs"]["neurgrad"])
    table = prompts.table("prompts").to_table().to_pandas()
    right = list(table[table.answer == table.prediction].prompt_id)
    assert accuracy["right"] == len(right)


def test_the_page_needs_no_network_and_names_every_figure(place: Path) -> None:
    page = (place / "report" / "report.html").read_text()
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", page)
    figures = {path.stem for path in (place / "report" / "figures").glob("*.png")}
    assert len(figures) >= 2 * 7
    for name in (figure for figure in figures if not figure.endswith("-dark")):
        assert f'id="figure-{name}"' in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs=[results/nothing]"], "runs=results/nothing: there is no run, no study and no probe"),
        (["runs=[]"], "runs=[]: name at least one"),
        ([], "runs: has no value"),
    ],
)
def test_what_cannot_be_reported_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        report(composed("report", arguments, ReportConfig))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_refuses_a_study_before_it_scans(tiny_directory: Path, tmp_path: Path) -> None:
    asked = [f"model.source={tiny_directory}", f"storage.uri={tmp_path / 'runs'}", "study.draws=0"]
    with refused(ConfigurationError, "study.draws", "0", allowed="at least 1"):
        study(composed("study", asked, StudyConfig))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=[(1400, False), (400, True)], ids=["wide and light", "narrow and dark"])
def browser(request: pytest.FixtureRequest) -> Iterator[WebDriver]:
    """Chromium with no network."""
    width, is_dark = request.param
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    driver.set_window_size(width, 1000)
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]},
    )
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    try:
        yield driver
    finally:
        driver.quit()


@needs_browser
def test_a_browser_shows_every_figure_and_sorts_and_filters_the_neurons(place: Path, browser: WebDriver) -> None:
    browser.get((place / "report" / "report.html").as_uri())
    images = browser.find_elements(By.CSS_SELECTOR, "figure img")
    assert len(images) >= 7
    for image in images:
        browser.execute_script("arguments[0].scrollIntoView()", image)
        assert browser.execute_script("return arguments[0].complete && arguments[0].naturalWidth > 300", image)
        assert image.is_displayed()
        assert image.get_attribute("alt")
    # Nothing sticks out of the window; wide tables scroll within themselves.
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    is_dark = browser.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches")
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(21, 26, 34)") == is_dark
    table = browser.find_element(By.CSS_SELECTOR, "table[id^='strongest-']")
    buttons = table.find_elements(By.CSS_SELECTOR, "th button")

    def column(index: int) -> list[str]:
        return browser.execute_script(
            "return [...arguments[0].tBodies[0].rows].filter((row) => !row.hidden)"
            ".map((row) => row.cells[arguments[1]].textContent)", table, index,
        )  # fmt: skip

    before = column(4)
    browser.execute_script("arguments[0].click()", buttons[4])
    values = [float(text) for text in column(4)]
    assert values == sorted(values, reverse=True)
    browser.execute_script("arguments[0].click()", buttons[4])
    values = [float(text) for text in column(4)]
    assert values == sorted(values)
    assert sorted(before) == sorted(column(4))
    browser.execute_script("arguments[0].click()", buttons[2])
    layers = [int(text) for text in column(2)]
    assert layers == sorted(layers, reverse=True)
    box = browser.find_element(By.CSS_SELECTOR, f"input[data-table='{table.get_attribute('id')}']")
    box.send_keys("w10 w11")
    assert set(column(0)) == {"w10 w11 w9"}
    count = browser.find_element(By.ID, f"count-{table.get_attribute('id')}").text
    assert count == f"{len(column(0))} of {len(before)} rows"
    # A column's name asks for one of its values.
    box.clear()
    box.send_keys("layer 1 w10")
    assert set(column(2)) == {"1"}
    assert set(column(0)) <= {"w10 w11 w9"}
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []

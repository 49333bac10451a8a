"""The benchmark for GPUs on a CPU: every part gives its figures, and what fails or hangs costs nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import yaml

from jobs.benchmarks import gpu
from jobs.benchmarks.gpu import Settings, checks, pacing, process, speed
from jobs.benchmarks.gpu.__main__ import settings_of
from jobs.benchmarks.gpu.pacing import Way, ratio_of, take_turns
from jobs.benchmarks.gpu.shapes import SHAPES, random_model
from jobs.benchmarks.gpu.subject import Subject
from jobs.benchmarks.isolated import Outcome, Task, one_after_the_other
from neg_service.errors import ConfigurationError
from neg_service.measures.interventions import Interventions
from neg_service.models.language_model import LanguageModel
from tests.devices import pretended
from tests.e2e.commands import ROOT, environment
from tests.refusals import refused

_SMALL = [
    "device=cpu", "repeats=1", "part_seconds=0.02", "seconds=60", "prompts=8", "targets=2", "header_tokens=6",
    "least_own_tokens=2", "most_own_tokens=5", "tokens=6", "neurons=4", "dtypes=[float32]",
]  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings() -> Settings:
    return settings_of(_SMALL)


@pytest.fixture
def subject(settings: Settings) -> Subject:
    return Subject("tiny", random_model("tiny", CPU, torch.float32), settings)


def measured_here(shape: str, settings: Settings) -> dict[str, Any]:
    told: dict[str, Any] = {}
    process.measure_shape(lambda step, value: told.update({step: value}), shape, settings, True)
    return gpu._by_dtype(Outcome(json.loads(json.dumps(told)), 1.0))


def without_other_packages(arguments: list[str]) -> dict[str, Any]:
    """The tiny shape, where Hydra, Ray and what belongs to storage are not installed."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments], cwd=ROOT, text=True, capture_output=True, check=False,
        env=environment(PYTHONPATH=str(ROOT)), timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return gpu._by_dtype(Outcome(json.loads(done.stdout), 1.0))


_PROGRAM = """
import json, sys
for name in ("ray", "hydra", "omegaconf", "antlr4", "s3fs", "tenacity", "tabulate", "gguf"):
    sys.modules[name] = None
from jobs.benchmarks.gpu.__main__ import settings_of
settings = settings_of(sys.argv[1:])
assert "torch" not in sys.modules
from jobs.benchmarks.gpu.process import measure_shape
told = {}
measure_shape(lambda step, value: told.update({step: value}), "tiny", settings, True)
print(json.dumps(told))
"""


@pytest.mark.faults
@pytest.mark.parametrize("shape", ["tiny", "tiny-mixture"])
def test_every_part_gives_its_figures(shape: str, settings: Settings) -> None:
    found = without_other_packages(_SMALL) if shape == "tiny" else measured_here(shape, settings)
    assert gpu._failures(found) == []
    parts = found["float32"]
    assert set(parts) == {"model", *process.PARTS}
    assert {name for name, own in parts.items() if "left out" in own} == set(process.OF_GPUS)
    assert parts["gradients"]["ratios"]["engine over floor"]["median"] > 0
    together = parts["prompts together"]["ratios"]
    for name in ("sweep", "integrated gradients"):
        assert together[f"{name}, one by one over together"]["median"] > 0
    assert parts["accuracy"]["NEG in float32"]["median"] < 1e-3
    assert parts["accuracy"]["NeurGrad in float32"]["signs that agree"] > 0.9
    assert parts["batch invariance"]["gradients, eight together"] < 1e-4
    engines = {name for name, own in parts["engines"].items() if name != "seconds" and "refused" not in own}
    assert engines - {"differences"} == {"shared_prefix", "kv_cache", "full_sequence"}
    assert ("differences" in engines) == (shape == "tiny")
    layers = {one["name"].rpartition(", ")[2] for one in gpu._bars({shape: found})}
    assert layers == {"gradients: engine over floor", "layer 0", "layer 1", "layer 2"}


def test_all_ways_run_where_the_model_lies(subject: Subject, settings: Settings) -> None:
    selection = subject.model.ensure_checked()
    with pretended():
        model = LanguageModel(subject.model.model.to("meta:0"))
        model.adopt(selection)
        elsewhere = Subject("tiny", model, settings)
        found = speed.gradients(elsewhere)["milliseconds"]
        others = take_turns(speed._other_gradients(elsewhere), torch.device("meta:0"), 1, 0.0, "test")
    assert [own for own in found.values() if "failed" in own] == []
    assert [own.failed for own in others.values()] == [None] * 4


def test_a_part_that_fails_is_told_and_others_go_on(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_subject: Subject) -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(
        process,
        "PARTS",
        {"first": process.Part(fails, 1), "second": process.Part(lambda own: {"title": own.title}, 1)},
    )
    found = measured_here("tiny", settings)
    assert gpu._failures({"tiny": found}) == [
        "tiny, float32, first: RuntimeError: CUDA error: an illegal memory access was encountered"
    ]
    assert found["float32"]["second"]["title"] == "tiny, float32"


def test_a_part_for_which_no_time_is_left_is_left_out(settings: Settings) -> None:
    found = measured_here("tiny", Settings(**vars(settings) | {"seconds": 0.0}))
    assert found["float32"]["engines"] == {"left out": "no time was left of benchmark.seconds=0"}


@contextmanager
def _out_of_memory_beyond(rows: int) -> Iterator[None]:
    run = Interventions._run

    def too_many(self: Interventions, moved: Any) -> Any:
        if sum(len(own.shifts_i) for own in moved) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(self, moved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interventions, "_run", too_many)
        yield


def test_when_memory_ends_batches_are_halved_and_recover(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    size = Interventions(subject.model, subject.prompt, "paper").rows.sizes.run
    monkeypatch.setattr(checks, "_LEAST_LEFT", 20 * size)
    monkeypatch.setattr(checks, "_ROWS_LEFT", 1)
    monkeypatch.setattr(checks, "limited", lambda _device, _bytes: _out_of_memory_beyond(70))
    found = checks.memory_ends(subject)
    # 240 interventions in batches of at most 70: halves of halves of them.
    assert found["recovers"]
    assert found["halvings"] == 3.0
    assert found["moved"] < 1e-4
    monkeypatch.setattr(checks, "limited", lambda _device, _bytes: _out_of_memory_beyond(1000))
    with pytest.raises(AssertionError, match="memory did not end"):
        checks.memory_ends(subject)


def test_a_limit_on_memory_is_for_gpus() -> None:
    with pytest.raises(ValueError, match="kind cpu has no limit"), checks.limited(CPU, 1):
        pass


def test_a_peak_stands_beside_what_was_foreseen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(_device: torch.device, call: Callable[[], Any]) -> tuple[float, int]:
        call()
        return 0.0, 2**20

    monkeypatch.setattr(checks, "measured", measured)
    found = checks.foreseen_memory(subject)
    assert found["gradients of 8 prompts"]["peak MiB"] == 1.0
    cost = sum(subject.model.engine.cost(len(own.ids), 6, 2, 2) for own in subject.encoded)
    assert found["gradients of 8 prompts"]["foreseen over peak"] == pytest.approx(cost / 2**20, abs=0.01)


def test_ways_take_turns_with_as_many_items_as_fit() -> None:
    calls: list[tuple[str, int]] = []
    ways = {
        "one": Way(lambda n: calls.append(("one", n)), (1, 8)),
        "same": Way({"a": lambda n: calls.append(("same", n))}, as_many_as="one"),
        "slow": Way(lambda n: calls.append(("slow", n)), (3,), is_slow=True),
        "none": Way(lambda n: torch.zeros(2) @ torch.zeros(3), (1,)),
    }
    found = take_turns(ways, CPU, 2, 1.0, "test")
    # Eight is more than four times one.
    assert calls == [("one", 1), ("same", 1), ("slow", 3), *[("one", 1), ("same", 1)] * 2]
    assert found["none"].told()["failed"].startswith("RuntimeError: ")
    assert len(ratio_of(found["one"], found["same"])) == 4
    with pytest.raises(ValueError, match="has no ratio"):
        ratio_of(found["one"], found["none"])
    # Whose time is over runs once all the same, with the least.
    assert [len(own.seconds) for own in take_turns(ways, CPU, 2, 0.0, "test").values()] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("launch", "item", "calls"),
    [
        # The share is 0.5 s. Launching is all that a pass costs: as many as there are, in three calls.
        (0.4, 0.0, [8, 32, 128]),
        # 8 take 0.44, 32 take 0.56: too long, but no more than four times as long as a call that was within its share.
        (0.4, 0.005, [8, 32]),
        # The line through 0.18 and 0.42 says that 64 would take 0.74.
        (0.1, 0.01, [8, 32]),
        # 8 take 0.14 and 32 take 0.26: 64 are within it, 128 are not.
        (0.1, 0.005, [8, 32, 64]),
        # A first call may have loaded kernels; no more than these are run where they take too long again.
        (0.6, 0.0, [8, 8]),
    ],
)
def test_as_many_items_as_measured_calls_allow(
    launch: float, item: float, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[int] = []

    def measured(_device: torch.device, call: Callable[[], Any]) -> tuple[float, None]:
        call()
        return launch + item * run[-1], None

    monkeypatch.setattr(pacing, "measured", measured)
    way = Way(run.append, (8, 16, 32, 64, 128))
    found = take_turns({"way": way}, CPU, 1, 1.5, "test")["way"]
    assert run == [*calls, calls[-1]]
    assert found.seconds == [pytest.approx((launch + item * calls[-1]) / calls[-1])]


def test_of_variants_the_fastest_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[str] = []
    monkeypatch.setattr(pacing, "measured", lambda _device, call: (call(), None))

    def variant(name: str, seconds: float) -> Callable[[int], float]:
        return lambda _n: run.append(name) or seconds

    ways = {
        "one": Way(lambda _n: 0.1, (4,)),
        "floor": Way({"few": variant("few", 0.3), "many": variant("many", 0.2)}, as_many_as="one"),
    }
    found = take_turns(ways, CPU, 1, 9.0, "test")["floor"]
    assert run == ["few", "many", "many"]
    assert (found.told()["variant"], found.count, found.seconds) == ("many", 4, [0.05])


def test_parts_share_the_time_that_is_left(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"first": process.Part(lambda own: {"may take": own.seconds}, 1)}
    parts["second"] = process.Part(parts["first"].measure, 3)
    monkeypatch.setattr(process, "PARTS", parts)
    found = measured_here("tiny", Settings(**vars(settings) | {"seconds": 60.0, "part_seconds": 100.0}))["float32"]
    # The model took some of it, the first part nothing.
    assert 40 < found["second"]["may take"] <= 60
    assert found["first"]["may take"] == pytest.approx(found["second"]["may take"] / 4, rel=0.01)
    limited = measured_here("tiny", Settings(**vars(settings) | {"seconds": 60.0, "part_seconds": 0.5}))["float32"]
    assert limited["second"]["may take"] == 0.5


def test_a_process_that_hangs_or_dies_costs_only_itself() -> None:
    module = "tests.jobs.isolated_tasks"
    found = one_after_the_other(
        {"hangs": Task(module, "hangs"), "dies": Task(module, "dies"), "ends": Task(module, "ends", (7,))}, 2.0
    )
    assert found["hangs"].told == {"first": 1}
    assert found["hangs"].failed == "second: was not ready within 2 s, and was ended"
    assert found["dies"].failed == "alone: its process ended with 3; stderr says why"
    assert (found["ends"].told, found["ends"].failed) == ({"whole": 7}, None)


def test_settings_are_checked() -> None:
    with refused(ConfigurationError, "benchmark.shapes", "gpt", says="must be of tiny, "):
        gpu.run(settings_of(["shapes=[gpt]"]))
    with refused(ConfigurationError, "benchmark.repeats", 0, says="at least 1"):
        gpu.run(settings_of(["repeats=0"]))
    with refused(ConfigurationError, "arguments", "shape=[tiny]", says="KEY=VALUE, of name, device"):
        settings_of(["shape=[tiny]"])
    with refused(ConfigurationError, "repeats", "many", says="a int, such as 3"):
        settings_of(["repeats=many"])
    shown = yaml.safe_load((ROOT / "conf" / "benchmark" / "gpu.yaml").read_text())
    assert set(shown["shapes"]) <= set(SHAPES)

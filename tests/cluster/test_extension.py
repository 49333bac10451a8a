"""Extending a finished run: what it had stays, bit for bit; what is new is computed; what differs is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

import neg_service
from jobs.descriptions import describe_plan
from jobs.entry import EXIT_INCOMPLETE, composed
from jobs.status import describe
from jobs.verify import VerifyConfig
from jobs.verify import verify as verify_command
from neg_service.cluster import forecast, scan
from neg_service.cluster import inputs as preparing
from neg_service.cluster.extension import Window
from neg_service.cluster.prepare import prepare, prepare_again
from neg_service.config import DatasetConfig, ModelConfig, NeuronsConfig, ScanConfig, StorageConfig
from neg_service.errors import ConfigurationError, DestinationError, PromptError
from neg_service.measures.builtin.aggregate_importance import total
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tokens import encode
from neg_service.storage.reader import Run
from neg_service.storage.run import RUN_FILE
from neg_service.storage.status import status_of
from neg_service.storage.stores import open_store
from neg_service.storage.verify import verify
from neg_service.studies.scans import StudyScans
from tests.here import run_here, scan_here
from tests.refusals import ANY, refused

N_OLD, N_NEW = 5, 9


def row(place: int, **changed: Any) -> dict[str, Any]:
    return {"prompt": f"w{place} w2", "targets": [" w3", " w4"], "answer": " w3", "id": f"p{place}", **changed}


@pytest.fixture(scope="module")
def scanned(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ScanConfig, Run]:
    """A scan of five prompts in shards of two, of which the last has one, and its finished run."""
    place = tmp_path_factory.mktemp("scanned")
    found = ScanConfig(ModelConfig(str(tiny_directory)), DatasetConfig(words(place, N_OLD)))
    found.storage = StorageConfig(str(place / "results"))
    found.job.shard_size = 2
    return found, scan_here(found)


@pytest.fixture
def config(scanned: tuple[ScanConfig, Run], tmp_path: Path) -> ScanConfig:
    """The same scan, with results of its own."""
    return replace(
        scanned[0],
        dataset=replace(scanned[0].dataset, source=words(tmp_path, N_OLD)),
        storage=StorageConfig(str(tmp_path / "results")),
    )


@pytest.fixture
def base(scanned: tuple[ScanConfig, Run], config: ScanConfig) -> Run:
    """The finished run, a copy of it."""
    place = Path(config.storage.uri, scanned[1].name)
    shutil.copytree(scanned[1].uri, place)
    return neg_service.open_run(place)


def words(folder: Path, rows: int | Sequence[dict[str, Any]], name: str = "") -> str:
    """A file of so many rows, or of these."""
    rows = [row(place) for place in range(rows)] if isinstance(rows, int) else rows
    path = folder / f"{name or len(rows)}.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def more(config: ScanConfig, base: Run, rows: int | Sequence[dict[str, Any]], **job: Any) -> ScanConfig:
    """The same scan of more rows, as an extension of a run."""
    source = words(Path(config.storage.uri).parent, rows, "rows" if not isinstance(rows, int) else "")
    dataset = replace(config.dataset, source=source)
    return replace(config, dataset=dataset, job=replace(config.job, extend=base.uri, **job))


def content(run: Run) -> dict[str, bytes]:
    """All that lies in a run's own directory, with its bytes."""
    store = run.directory.store
    return {entry.key: store.get(entry.key) or b"" for entry in store.list("")}


def test_an_extension_adds_shards_and_is_read_as_a_run_of_all_prompts(
    config: ScanConfig, base: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(base)
    encoded: list[str] = []

    def counting(tokenizer: Any, prompts: Any, *more: Any, **named: Any) -> Any:
        prompts = list(prompts)
        encoded.extend(prompt.id for prompt in prompts)
        return encode(tokenizer, prompts, *more, **named)

    monkeypatch.setattr(preparing, "encode", counting)
    prepared = prepare(more(config, base, N_NEW))
    assert (prepared.plan.n_prompts, prepared.plan.shards) == (4, range(3, 5))
    assert f"{N_OLD} prompts in 3 shards of {base.uri}" in describe_plan(prepared)
    assert forecast._shards_looked_at(prepared) == [range(2), range(2, 4)]
    summary = run_here(prepared)
    assert (summary.shards_done, summary.n_prompts_now) == (2, 4)
    assert set(encoded) == {f"p{place}" for place in range(N_OLD, N_NEW)}

    run = neg_service.open_run(summary.uri)
    assert run.uri != base.uri
    assert content(base) == before
    assert run.config["extends"] == {"fingerprint": base.fingerprint, "prompts": N_OLD, "shards": 3}
    assert run.config["prompts"]["count"] == N_NEW
    assert (run.n_shards, run.done()) == (5, set(range(5)))
    assert [len(part.to_table()) for _, part in run.parts("prompts")] == [2, 2, 1, 2, 2]
    # In shards of five prompts and four the rows are as in those of one scan of all.
    whole = scan_here(replace(more(config, base, N_NEW), job=replace(config.job, extend=None)))
    for name in run.tables:
        found, expected = run.table(name).to_table(), whole.table(name).to_table()
        keys = [(key, "ascending") for key in ("prompt_id", "target_index", "layer") if key in found.column_names]
        assert found.drop_columns(["basis"] * ("basis" in found.column_names)).num_rows == expected.num_rows
        own, others = found.sort_by(keys).to_pydict(), expected.sort_by(keys).to_pydict()
        for column, values in own.items():
            assert _close(values, others[column]), (name, column)
    assert run.neuron(1, 3)["prompt_id"].to_pylist() == whole.neuron(1, 3)["prompt_id"].to_pylist()


def _close(found: list[Any], expected: list[Any]) -> bool:
    is_number = isinstance(found[0], float) or (isinstance(found[0], list) and isinstance(found[0][0], float))
    if not is_number:
        return found == expected
    return all(one == pytest.approx(other, rel=1e-3, abs=1e-7) for one, other in zip(found, expected, strict=True))


def test_an_extension_is_extended_and_all_commands_know_it(
    config: ScanConfig, base: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    second = scan_here(more(config, base, N_NEW))
    third = scan_here(more(config, second, N_NEW + 1))
    assert [one.uri for one in third.lineage] == [base.uri, second.uri, third.uri]
    assert [one.own_shards for one in third.lineage] == [range(3), range(3, 5), range(5, 6)]
    assert third.table("prompts").to_table()["prompt_id"].to_pylist() == [f"p{i}" for i in range(N_NEW + 1)]
    status = status_of(third)
    assert (status.n_shards, status.n_prompts, status.missing) == (6, 10, frozenset())
    assert {table.name: table.n_parts for table in status.tables} == dict.fromkeys(third.tables, 6)
    assert f"{second.uri}: 1 prompts beside its 9" in describe(status)

    def verified(*more: str) -> tuple[int, str]:
        code = verify_command(composed("verify", [f"run={third.uri}", *more], VerifyConfig))
        return code, capsys.readouterr().out

    code, said = verified()
    assert code == 0
    assert [said.count(f"{one.uri}\nclean") for one in third.lineage] == [1, 1, 1]
    # A part that was damaged in what was extended is named, and nothing is computed for it in vain.
    damaged = Path(second.uri, "neurgrad/shard-000003.parquet")
    damaged.write_bytes(damaged.read_bytes()[:-9])
    Path(base.uri, "prompts/shard-000001.parquet").unlink()
    code, said = verified()
    assert code == EXIT_INCOMPLETE
    assert "neurgrad/shard-000003.parquet: damaged" in said
    assert "prompts/shard-000001.parquet: missing" in said
    assert status_of(third).missing == {1}
    with monkeypatch.context() as patch:
        patch.setattr(scan, "run", run_here)
        code, said = verified("repair=true")
    assert code == 0
    assert [f"computing again: shards {shard}" in said for shard in (1, 3)] == [True, True]
    assert status_of(third).missing == set()
    # Beside it lies what is of no plan.
    shutil.copy(Path(base.uri, "prompts/shard-000000.parquet"), Path(third.uri, "prompts/shard-000000.parquet"))
    (finding,) = verify(open_store(third.uri)).findings
    assert str(finding) == "prompts/shard-000000.parquet: foreign: the plan has the shards from 5 to 5"
    assert 0 in third.done()


def test_what_is_lost_of_any_run_of_a_lineage_can_be_computed_again(
    config: ScanConfig, base: Run, tmp_path: Path
) -> None:
    # One file, which has grown between the runs.
    words(tmp_path, N_NEW, str(N_OLD))
    grown = replace(config, job=replace(config.job, extend=base.uri))
    run = scan_here(grown)
    parts = {place: Path(one.uri, f"prompts/shard-00000{place}.parquet") for place, one in ((2, base), (4, run))}
    before = {place: part.read_bytes() for place, part in parts.items()}
    for one in (base, run):
        parts[one.own_shards.stop - 1].unlink()
        again = prepare_again(one, ScanConfig())
        assert (again.uri, again.fingerprint) == (one.uri, one.fingerprint)
        run_here(again)
    assert {place: part.read_bytes() for place, part in parts.items()} == before


def test_a_stopped_extension_goes_on_by_the_same_command_or_by_its_uri(config: ScanConfig, base: Run) -> None:
    asked = more(config, base, N_NEW)
    begun = run_here(prepare(asked), shards=1)
    run = neg_service.open_run(begun.uri)
    assert run.done() == {0, 1, 2, 3}
    assert len(run.table("prompts").to_table()) == N_OLD + 2
    status = status_of(run)
    assert status.missing == {4}
    assert status.is_running
    for again in (asked, replace(asked, job=replace(config.job, resume=run.uri))):
        prepared = prepare(again)
        assert (prepared.uri, prepared.fingerprint) == (run.uri, run.fingerprint)
    # What is stored of it is what was asked for.
    assert run_here(prepare_again(run, ScanConfig())).n_prompts_now == 2
    assert neg_service.open_run(run.uri).done() == set(range(5))
    with refused(DestinationError, says="prompts.count: 9 there, 10 asked"):
        prepare(more(config, base, N_NEW + 1, resume=run.uri))


def test_nothing_is_said_of_a_run_whose_newest_part_is_of_another(config: ScanConfig, base: Run) -> None:
    prepared = prepare(more(config, base, N_NEW))
    scan._begin(prepared, open_store(prepared.uri))
    status = status_of(neg_service.open_run(prepared.uri))
    assert (status.silent_seconds, status.is_running, status.rate) == (None, None, None)
    assert (len(status.done), status.missing) == (3, {3, 4})


def test_two_extensions_of_one_run_are_two_runs(config: ScanConfig, base: Run) -> None:
    one, other = scan_here(more(config, base, 6)), scan_here(more(config, base, 7))
    assert len({base.uri, one.uri, other.uri}) == 3
    assert [len(run.table("prompts").to_table()) for run in (base, one, other)] == [5, 6, 7]
    # Not those of a scan of all of it, which has other shards.
    whole = prepare(replace(more(config, base, 7), job=config.job))
    assert whole.uri not in (one.uri, other.uri)


def test_a_lineage_that_was_moved_is_found_and_one_that_was_torn_apart_is_told(
    config: ScanConfig, base: Run, tmp_path: Path
) -> None:
    run = scan_here(more(config, base, N_NEW))
    moved = Path(config.storage.uri).rename(tmp_path / "moved")
    found = neg_service.open_run(moved / run.name)
    assert found.base is not None
    assert found.base.uri == str(moved / base.name)
    assert len(found.table("prompts").to_table()) == N_NEW
    assert prepare_again(found, ScanConfig()).uri == found.uri
    Path(found.base.uri, RUN_FILE).unlink()
    with refused(DestinationError, says=f"{found.base.uri}: there is no run.json, but run.copy.json is"):
        neg_service.open_run(found.uri)
    (moved / base.name).rename(moved / "elsewhere")
    # Another run in its place is none.
    shutil.copytree(moved / run.name, moved / base.name)
    with refused(DestinationError, says=f"extends the run {base.uri}, which has 5 of its prompts and is not there"):
        neg_service.open_run(moved / run.name)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [row(0), row(1, prompt="w9"), row(3), row(4), row(5), row(6)],
            "1 is missing ('p2'), 1 is changed ('p1'), 2 are in another place ('p3', 'p4'); the prompts of the run "
            "have to come first",
        ),
        ([row(i) for i in range(1, 9)], "1 is missing ('p0'), 4 are in another place ('p1', 'p2', 'p3', ...)"),
        ([row(i, answer=" w4") for i in range(9)], "5 are changed ('p0', 'p1', 'p2', ...)"),
        ([row(i, targets=[" w3", " w5"]) for i in range(9)], "give the old rows the targets that the run's table"),
        ([row(i) for i in range(3)], "2 are missing ('p3', 'p4')"),
        ([row(i) for i in range(5)], "has the same 5 prompts as job.extend="),
    ],
)
def test_prompts_that_changed_or_are_gone_are_named(
    config: ScanConfig, base: Run, rows: list[dict[str, Any]], says: str
) -> None:
    asked = more(config, base, rows)
    with refused(PromptError, "dataset.source", asked.dataset.source, says=re.escape(says)):
        prepare(asked)
    assert [Path(base.uri)] == list(Path(config.storage.uri).iterdir())


def test_a_prompt_whose_neurons_are_elsewhere_is_named(config: ScanConfig, tmp_path: Path) -> None:
    rows = [row(place, prompt="w1 w20 w2", at="w1" if place == 1 else None) for place in range(3)]
    done = scan_here(replace(config, dataset=replace(config.dataset, source=words(tmp_path, rows, "old"))))
    changed = [*rows[:2], row(2, prompt="w1 w20 w2", at="w20"), row(3)]
    with refused(
        PromptError, "dataset.source", ANY, says=re.escape("1 has another at, other messages or other wordings ('p2')")
    ):
        prepare(more(config, done, changed))


def test_whatever_else_would_differ_is_refused_by_name(config: ScanConfig, base: Run) -> None:
    asked = more(config, base, N_NEW)
    for changed, says in (
        ({"model": replace(config.model, dtype="bfloat16")}, 'model.dtype: "float32" there, "bfloat16" asked'),
        ({"measure": {"name": "neurgrad", "keep": "answer"}}, 'measure.keep: "all" there, "answer" asked'),
        ({"neurons": NeuronsConfig([1])}, "neurons.layers: [0, 1, 2] there, [1] asked"),
        ({"job": replace(asked.job, shard_size=3)}, "plan.shard_size: 2 there, 3 asked; job.extend adds prompts and"),
    ):
        with refused(DestinationError, says=re.escape(says)):
            prepare(replace(asked, **changed))
    # Left to the plan, it is the run's.
    assert prepare(replace(asked, job=replace(asked.job, shard_size="auto"))).plan.shard_size == 2
    top = NeuronsConfig(choose="top", count=3, over="dataset")
    with refused(
        ConfigurationError, "job.extend", base.uri, says="neurons.over=dataset ranks neurons over all prompts"
    ):
        prepare(replace(asked, neurons=top, measure={"name": "sweep"}))
    study = StudyScans(asked, scan_here)
    with refused(ConfigurationError, "job.extend", base.uri, says="is of one scan"):
        study.settings_of({"name": "sweep"})
    with refused(DestinationError, says="there is no run.json"):
        prepare(replace(asked, job=replace(asked.job, extend=config.storage.uri)))
    _, part, *_ = sorted(Path(base.uri, "neurgrad").iterdir())
    part.unlink()
    says = "is not finished: 1 of its 3 shards are not done, the first is 1"
    with refused(ConfigurationError, "job.extend", base.uri, says=re.escape(says)):
        prepare(asked)


def test_prompts_that_are_left_out_are_left_out_of_all(config: ScanConfig, tmp_path: Path) -> None:
    config = replace(config, dataset=replace(config.dataset, not_one_token="skip"))
    long = {"targets": [" w3 w4", " w4"], "answer": " w3 w4"}
    rows = [row(i, **(long if i in (1, 6) else {})) for i in range(9)]
    source = words(tmp_path, rows[:5], "skipped")
    base = scan_here(replace(config, dataset=replace(config.dataset, source=source)))
    prepared = prepare(more(config, base, rows))
    assert [prompt.id for prompt in prepared.prompts] == ["p5", "p7", "p8"]
    assert [one.prompt.id for one in prepared.encoding] == ["p5", "p7", "p8"]
    assert [one.ids for one in prepared.encoding] == [
        one.ids for one in prepare(replace(more(config, base, rows), job=config.job)).encoding[4:]
    ]
    assert prepared.about["skipped_not_one_token"] == 2
    run = scan_here(more(config, base, rows))
    assert len(run.table("prompts").to_table()) == 7


def test_a_trial_of_the_first_prompts_is_extended_to_more_of_them(config: ScanConfig, tmp_path: Path) -> None:
    config = replace(config, dataset=replace(config.dataset, source=words(tmp_path, N_NEW)))
    base = scan_here(replace(config, job=replace(config.job, limit=3)))
    prepared = prepare(replace(config, job=replace(config.job, limit=7, extend=base.uri)))
    assert [prompt.id for prompt in prepared.prompts] == [f"p{i}" for i in range(3, 7)]


def test_a_sweep_goes_on_with_the_noise_that_it_began_with(config: ScanConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config.measure = {"name": "sweep", "shifts": [-1.0, 1.0]}
    config.neurons = NeuronsConfig([1], choose="sample", count=2)
    base = scan_here(config)
    prepared = prepare(more(config, base, N_NEW))
    store = open_store(prepared.uri)
    scan._begin(prepared, store)
    # Before a replica could find out its own.
    assert scan._known_calibration(prepared.measure, store) == base.about["calibration"] != {}
    assert neg_service.open_run(prepared.uri).about["calibration"] == base.about["calibration"]
    # A run of which it is not known cannot be gone on with alike.
    file = Path(base.uri, RUN_FILE)
    monkeypatch.setattr("neg_service.storage.run.is_as_written", lambda _: True)
    parsed = json.loads(file.read_text())
    del parsed["about"]["calibration"]
    file.write_text(json.dumps(parsed))
    with refused(DestinationError, "job.extend", base.uri, says="does not say how sweep was calibrated"):
        prepare(more(config, base, N_NEW + 1))


def test_sums_over_a_data_set_are_those_of_all_shards(config: ScanConfig) -> None:
    config.measure = {"name": "aggregate_importance"}
    base = scan_here(config)
    run = scan_here(more(config, base, N_NEW))
    before, added, found = (
        total(part.to_table() for shard, part in run.parts("aggregate_importance") if shard in shards)
        for shards in (range(3), range(3, 5), range(5))
    )
    assert found.keys() == {(layer, -2) for layer in range(3)}
    for key, values in found.items():
        assert values == pytest.approx(before[key] + added[key])
        assert (added[key] > 0).all()
    n_prompts = run.table("aggregate_importance", filter=pc.field("layer") == 1).to_table()["n_prompts"]
    assert n_prompts.to_pylist() == [2, 2, 1, 2, 2]
    # No table says which prompts were measured, so that those that differ cannot be named.
    with refused(PromptError, "dataset.source", ANY, says="does not begin with the 5 prompts of job.extend="):
        prepare(more(config, base, [row(i) for i in range(1, 9)]))


def test_some_prompts_of_a_data_set_are_a_sequence() -> None:
    prompts = [Prompt(str(i), "w1", (" w2",)) for i in range(6)]
    window = Window(prompts, 2, 5)
    assert (len(window), list(window)) == (3, prompts[2:5])
    assert (window[0], window[-1]) == (prompts[2], prompts[4])
    assert (window[1:], window[:9], window[3:], window[::-1]) == (prompts[3:5], prompts[2:5], [], prompts[4:1:-1])
    with pytest.raises(IndexError):
        window[3]

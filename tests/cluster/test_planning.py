"""Planning and configuration: pure functions, no cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from hydra import compose, initialize_config_dir
from transformers import LlamaForCausalLM

from jobs.entry import CONF
from neg_service.batch_size import BatchSize, batch_size
from neg_service.cluster.plan import make_plan, replica_bytes, shards_of
from neg_service.cluster.prepare import Prepared, prepare, prepare_again
from neg_service.cluster.ranking import ranking_of
from neg_service.cluster.scan import run
from neg_service.config import (
    ClusterConfig,
    NeuronsConfig,
    ScanConfig,
    StorageConfig,
    check,
    checked_layers,
    most_replicas,
    typed,
)
from neg_service.errors import (
    ConfigurationError,
    PromptError,
)
from neg_service.measures import find_measure
from neg_service.measures.base import Cost
from neg_service.models.inspection import ModelInfo
from neg_service.models.loading import checked_dtype
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.storage.reader import open_run
from neg_service.storage.run import write_or_match
from neg_service.storage.stores import open_store
from tests.refusals import ANY, refused
from tests.tiny_models import tiny_model, tiny_tokenizer

PROMPTS = [Prompt(str(i), "w1", (" w2",)) for i in range(10)]
ENCODED = [EncodedPrompt(prompt, (i,), (7,)) for i, prompt in enumerate(PROMPTS)]


def test_every_prompt_is_in_exactly_one_shard() -> None:
    for size in (1, 3, 10, 99):
        plan = make_plan(PROMPTS, Cost({"t": 1}, 1), size)
        shards = list(shards_of(ENCODED, plan))
        assert [p for shard in shards for p in shard.prompts] == ENCODED
        assert [len(plan.places_of(shard.index)) for shard in shards] == [len(shard.prompts) for shard in shards]
        assert len(shards) == plan.n_shards
        assert all(len(shard.prompts) <= size for shard in shards)


def test_done_shards_are_left_out_and_the_others_keep_their_numbers() -> None:
    plan = make_plan(PROMPTS, Cost({"t": 1}, 1), 3)
    assert [shard.index for shard in shards_of(ENCODED, plan, {0, 2})] == [1, 3]


def test_a_plan_adds_up_what_its_prompts_cost() -> None:
    assert make_plan(PROMPTS, Cost({"a": 5, "b": 7}, 1), 4).total_bytes == 120
    assert make_plan(PROMPTS, Cost({"t": 1}, 46080 * 40), 1).n_rows == 10 * 46080 * 40


def test_a_replica_has_room_for_a_layer_in_float64_also_where_layers_share_weights() -> None:
    plan, batch = make_plan(PROMPTS, Cost({"t": 1}, 1), 4), BatchSize("cluster.batch_bytes", 0, "bytes")
    # A large model's layer is what counts: of 2e9 weights in 2 layers, then of 1e9 in one that runs as 12.
    plain = ModelInfo("m", "-", "M", 2, 40, 64, 2 * 10**9, True, False, row_values=1)
    again = replace(plain, n_layers=12, n_parameters=10**9, token_weights=12 * 10**9)
    of_plain, of_again = (replica_bytes(info, "bfloat16", plan, batch) for info in (plain, again))
    assert of_plain - of_again == 2 * 10**9
    assert of_again > 2 * 10**9 + 8 * 10**9


@pytest.mark.parametrize(
    ("override", "most"),
    [
        ("cluster.replicas.max=7", 7),
        ("cluster.replicas=7", 7),
        ("cluster.replicas=auto", "auto"),
        ("cluster=ray", "auto"),
    ],
)
def test_the_largest_number_of_replicas_is_said_either_way(override: str, most: int | str) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        config = typed(ScanConfig, compose("scan", overrides=[override]))
    check(config)
    assert most_replicas(config.cluster) == most


def test_something_else_than_their_largest_number_is_refused() -> None:
    for replicas, refusal in (
        ({"max": 0}, ("cluster.replicas.max", 0)),
        ({"min": 1}, ("cluster.replicas.min", ANY, "there is only cluster.replicas.max")),
    ):
        with refused(ConfigurationError, *refusal):
            check(ScanConfig(cluster=ClusterConfig(replicas=replicas)))


@pytest.mark.parametrize(
    ("values", "setting", "says"),
    [
        ({"model": {"sorce": "x"}}, "model.sorce", "Key 'sorce' not in 'ModelConfig'"),
        ({"extra": 1}, "extra", "Key 'extra' not in 'ScanConfig'"),
        ({"job": {"limit": "many"}}, "job.limit", "job.limit=many: must be a whole number"),
        ({"job": {"dry_run": "maybe"}}, "job.dry_run", "job.dry_run=maybe: must be true or false"),
        ({"cluster": {"start_seconds": "long"}}, "cluster.start_seconds", "start_seconds=long: must be a number"),
        ({"storage": {"uri": "???"}}, "storage.uri", "has no value; give one"),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused_by_their_full_key(
    values: dict[str, Any], setting: str, says: str
) -> None:
    with refused(ConfigurationError, setting, says=says):
        typed(ScanConfig, values)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("cluster", "replicas", 0),
        ("cluster", "replicas", "many"),
        ("cluster", "batch_tokens", 1.5),
        ("cluster", "batch_bytes", 0),
        ("cluster", "batch_bytes", "half"),
        ("cluster", "cpus_per_replica", 0.5),
        ("cluster", "gpus_per_replica", -1),
        ("cluster", "attempts", 0),
        ("job", "shard_size", 0),
        ("job", "limit", 0),
        ("job", "progress_seconds", -1.0),
        ("job", "progress_seconds", float("nan")),
    ],
)
def test_numbers_out_of_range_are_refused(section: str, key: str, value: Any) -> None:
    with refused(ConfigurationError, f"{section}.{key}", value):
        check(typed(ScanConfig, {section: {key: value}}))


@pytest.mark.parametrize(
    ("cluster", "measure", "expected"),
    [
        ({}, {}, (None, "cluster.batch_bytes", "bytes")),
        ({"batch_bytes": 9}, {}, (9, "cluster.batch_bytes", "bytes")),
        ({"batch_tokens": 9}, {}, (9, "cluster.batch_tokens", "tokens")),
        ({}, {"batch_bytes": 9}, (9, "measure.batch_bytes", "bytes")),
        # Old names that say nothing, as older runs and files of settings have them.
        ({"batch_tokens": "auto"}, {"batch_bytes": "auto"}, (None, "cluster.batch_bytes", "bytes")),
        ({"batch_bytes": 9, "batch_tokens": None}, {"batch_bytes": None}, (9, "cluster.batch_bytes", "bytes")),
        # An option of somebody else's measure.
        ({}, {"name": "my.measure", "batch_bytes": 9}, (None, "cluster.batch_bytes", "bytes")),
    ],
)
def test_what_a_batch_may_take_is_said_by_one_name(
    cluster: dict[str, Any], measure: dict[str, Any], expected: tuple[int | None, str, str]
) -> None:
    config = ScanConfig(measure={"name": "sweep", **measure}, cluster=ClusterConfig(**cluster))
    check(config)
    found = batch_size(config)
    assert (found.value, found.key, found.unit) == expected
    assert found.is_by_old_name == (found.key != "cluster.batch_bytes")


@pytest.mark.parametrize(
    ("cluster", "option", "message"),
    [
        (
            {"batch_bytes": 8, "batch_tokens": 9},
            None,
            r"cluster\.batch_tokens=9: .*batch_bytes=8 is given, too",
        ),
        ({"batch_bytes": 8}, 9, r"measure\.batch_bytes=9: .*cluster\.batch_bytes=8 is given, too"),
        ({"batch_tokens": 8}, 9, r"cluster\.batch_tokens=8: .*measure\.batch_bytes=9 is given, too"),
        ({}, "lots", r"measure\.batch_bytes=lots: must be auto or a whole number, at least 1"),
        ({}, True, r"measure\.batch_bytes=True: must be auto or a whole number"),
    ],
)
def test_two_names_of_a_batch_are_refused(cluster: dict[str, Any], option: Any, message: str) -> None:
    config = ScanConfig(measure={"name": "sweep", "batch_bytes": option}, cluster=ClusterConfig(**cluster))
    with pytest.raises(ConfigurationError, match=message):
        batch_size(config)


def test_layers_are_checked_and_sorted() -> None:
    assert checked_layers(NeuronsConfig("all"), 3) == [0, 1, 2]
    assert checked_layers(NeuronsConfig([2, 0]), 3) == [0, 2]
    assert checked_layers(NeuronsConfig(1), 3) == [1]
    for layers, message in [
        ([3], "layer 3 does not exist; the model has layers 0 to 2"),
        ([-1], "layer -1 does not exist"),
        ([], "all or a list"),
        ("some", "all or a list"),
        ([1, 1], "named twice"),
    ]:
        with refused(ConfigurationError, "neurons.layers", layers, message):
            checked_layers(NeuronsConfig(layers), 3)


def test_measures_are_found_by_name_or_path_and_unknown_ones_name_the_known() -> None:
    assert find_measure("neurgrad") is find_measure("neg_service.measures.builtin.neurgrad")
    for unknown in ("nothing", "gradients", "no.such.module"):
        with refused(ConfigurationError, "measure.name", unknown, "one of activation, .*, intervene, neurgrad"):
            find_measure(unknown)


def _prepared(tiny: Path, **changes: Any) -> Prepared:
    config = ScanConfig()
    config.model.source = str(tiny)
    config.dataset.source = changes.pop("dataset")
    config.measure |= changes.pop("measure", {})
    for section, values in changes.items():
        setattr(config, section, replace(getattr(config, section), **values))
    return prepare(config)


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "w{i} w2", "targets": [" w3", " w4"], "answer": " w3"}}\n' for i in range(9)))
    return str(path)


def test_the_fingerprint_holds_science_and_no_operations(tiny_directory: Path, dataset: str) -> None:
    base = _prepared(tiny_directory, dataset=dataset).fingerprint
    same = [
        {"cluster": {"replicas": 7, "batch_bytes": 5, "cpus_per_replica": 1}},
        {"cluster": {"batch_tokens": 5}},
        {"storage": {"uri": "/elsewhere"}},
        {"job": {"progress_seconds": 1.0, "dry_run": True, "name": "other"}},
        {"model": {"device": "cpu"}},
    ]
    other = [
        {"model": {"dtype": "bfloat16"}},
        {"measure": {"basis": "hidden"}},
        {"measure": {"keep": "answer"}},
        {"neurons": {"layers": [0]}},
        {"job": {"limit": 8}},
        {"job": {"shard_size": 2}},
    ]
    for changes in same:
        assert _prepared(tiny_directory, dataset=dataset, **changes).fingerprint == base, changes
    prints = [_prepared(tiny_directory, dataset=dataset, **changes).fingerprint for changes in other]
    assert len({base, *prints}) == len(other) + 1


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"neurons": {"layers": [3]}}, ("neurons.layers", [3], "layer 3 does not exist")),
        ({"measure": {"keep": "best"}}, ("measure.keep", "best", "one of all, answer, top_k")),
        ({"measure": {"keep": "top_k", "top_k": 121}}, ("measure.top_k", 121, "at most 120")),
        ({"measure": {"tok_k": 5}}, ("measure.tok_k", ANY, "Key 'tok_k' not in 'NeurGradOptions'")),
        ({"model": {"dtype": "int4"}}, ("model.dtype", "int4")),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    tiny_directory: Path, dataset: str, changes: dict[str, Any], refusal: tuple[Any, ...]
) -> None:
    with refused(ConfigurationError, *refusal):
        _prepared(tiny_directory, dataset=dataset, **changes)


@pytest.mark.parametrize("settings", [{}, {"not_one_token": "skip"}, {"too_long": "skip"}])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "w3 w70", "targets": [" w5"]}, "prompt '000002': its token 'w70' has the id 70, but other embeds"),
        ({"prompt": "w3", "targets": [" w5", " w70"]}, "prompt '000002': target ' w70' is the token 'w70' with the id"),
    ],
)
def test_another_models_tokenizer_is_refused_before_ray_starts(
    settings: dict[str, str], bad: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = tiny_model("Llama 2").model.config
    place = tmp_path / "other"
    LlamaForCausalLM(type(config)(**{**config.to_dict(), "vocab_size": 50})).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    rows = [{"prompt": "w1", "targets": [" w2"]}, {"prompt": "w3 w49", "targets": [" w4"]}, bad]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    asked = {
        "model": {"source": str(place)},
        "dataset": {"source": str(tmp_path / "data.jsonl"), **settings},
        "measure": {"name": "neurgrad"},
        "storage": {"uri": str(tmp_path / "results")},
    }
    with refused(PromptError, "model.source", says=f"^{message}.*below 50"):
        run(prepare(typed(ScanConfig, asked)))
    assert not ray.is_initialized()
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").iterdir())


def test_old_names_of_a_batch_are_told_and_planned_for(
    tiny_directory: Path, dataset: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = _prepared(tiny_directory, dataset=dataset)
    assert "by now" not in caplog.text
    in_bytes = 2**16 * 4 * plain.info.gradient_row_values
    tokens = _prepared(tiny_directory, dataset=dataset, cluster={"batch_tokens": 2**20})
    said = "cluster.batch_tokens=1048576 is called cluster.batch_bytes by now: use about"
    told = [record.message for record in caplog.records if "by now" in record.message]
    assert told == [f"{said} cluster.batch_bytes={in_bytes}"]
    # A batch is a part of what a replica needs.
    assert tokens.memory - plain.memory == in_bytes - 2**29
    assert _prepared(tiny_directory, dataset=dataset, cluster={"batch_bytes": 7}).memory == plain.memory - 2**29 + 7
    sweep = _prepared(tiny_directory, dataset=dataset, measure={"name": "sweep"})
    caplog.clear()
    old = _prepared(tiny_directory, dataset=dataset, measure={"name": "sweep", "batch_bytes": 10**6})
    assert "measure.batch_bytes=1000000 is called cluster.batch_bytes by now" in caplog.text
    assert old.fingerprint == sweep.fingerprint
    assert old.memory == sweep.memory - 2**29 + 10**6


@pytest.mark.parametrize("key", ["cluster", "measure"])
def test_a_batch_without_room_for_two_rows_of_a_sweep_is_refused(tiny_directory: Path, dataset: str, key: str) -> None:
    measure, cluster = {"name": "sweep"}, {}
    {"cluster": cluster, "measure": measure}[key]["batch_bytes"] = 99  # type: ignore[index]
    with pytest.raises(ConfigurationError, match=rf"^{key}\.batch_bytes=99: must be at least 6552; holds 0 rows"):
        _prepared(tiny_directory, dataset=dataset, measure=measure, cluster=cluster)
    # Gradients run one prompt after the other then.
    assert _prepared(tiny_directory, dataset=dataset, cluster={"batch_bytes": 1})


@pytest.mark.parametrize("option", ["auto", None, 10**6])
def test_a_run_that_was_stored_with_the_old_names_goes_on(
    tiny_directory: Path, dataset: str, tmp_path: Path, option: Any
) -> None:
    storage = {"uri": str(tmp_path / "results")}
    made = _prepared(tiny_directory, dataset=dataset, measure={"name": "sweep"}, storage=storage)
    assert "batch_bytes" not in made.request["measure"]
    request = {**made.request, "measure": {**made.request["measure"], "batch_bytes": option}}
    write_or_match(open_store(made.uri), made.identity, made.tables, {}, request)
    again = prepare_again(open_run(made.uri), ScanConfig(storage=StorageConfig(**storage)))
    assert (again.uri, again.fingerprint) == (made.uri, made.fingerprint)


def test_settings_that_change_no_number_change_no_fingerprint(tiny_directory: Path, dataset: str) -> None:
    base = _prepared(tiny_directory, dataset=dataset).fingerprint
    assert _prepared(tiny_directory, dataset=dataset, measure={"top_k": 7}).fingerprint == base
    assert _prepared(tiny_directory, dataset=dataset, neurons={"layers": [2, 0, 1]}).fingerprint == base


def test_a_gate_is_refused_where_there_is_none_before_anything_starts(tmp_path: Path, dataset: str) -> None:
    plain = tiny_model("GPT-2")
    plain.model.save_pretrained(tmp_path / "gpt2")
    plain.tokenizer.save_pretrained(tmp_path / "gpt2")
    with refused(ConfigurationError, "measure.basis", "gate", says="GPT2LMHeadModel has no gate"):
        _prepared(tmp_path / "gpt2", dataset=dataset, measure={"basis": "gate"})


@pytest.mark.parametrize("measure", [{"name": "my.measure"}, {"name": "sweep", "basis": "hidden"}])
def test_neurons_are_ranked_in_the_basis_of_the_measure_if_it_has_one(measure: dict[str, Any]) -> None:
    config = ScanConfig(measure=measure, neurons=NeuronsConfig([1, 2], choose="top", count=5, over="dataset"))
    ranking = ranking_of(config)
    assert ranking.measure == {**measure, "name": "aggregate_importance"}
    assert ranking.neurons == NeuronsConfig([1, 2])
    assert ranking.dataset == config.dataset


def test_keeping_the_answer_needs_answers(tiny_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "w1", "targets": [" w3"], "id": "me"}\n')
    with refused(ConfigurationError, "measure.keep", "answer", says="prompt 'me' has no answer"):
        _prepared(tiny_directory, dataset=str(tmp_path / "a.jsonl"), measure={"keep": "answer"})


@pytest.mark.parametrize("path", sorted(Path(CONF).glob("model/*.yaml")), ids=lambda path: path.stem)
def test_every_named_model_is_a_configuration(path: Path) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        config = typed(ScanConfig, compose("scan", overrides=[f"model={path.stem}"]))
    check(config)
    assert checked_dtype(config.model.dtype)

"""Settings that are text stay as they were typed, and what Hydra's grammar cannot read is told with how to write it."""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from jobs.advice import for_a_shell, in_quotes
from jobs.bench import BenchConfig
from jobs.catalogue import CatalogueConfig
from jobs.check import CheckConfig
from jobs.command_line import as_typed, require_text
from jobs.control import ControlConfig
from jobs.entry import CONF, composed
from jobs.probe import ProbeConfig
from jobs.report import ReportConfig
from jobs.status import StatusConfig
from jobs.study import StudyConfig
from jobs.tasks import TasksConfig
from jobs.verify import VerifyConfig
from neg_service.config import ScanConfig
from neg_service.errors import ConfigurationError
from neg_service.settings import types_of
from tests.refusals import refused

SETTINGS: dict[str, type] = {
    "scan": ScanConfig, "demo": ScanConfig, "probe": ProbeConfig, "study": StudyConfig, "check": CheckConfig,
    "status": StatusConfig, "verify": VerifyConfig, "report": ReportConfig, "tasks": TasksConfig, "bench": BenchConfig,
    "control": ControlConfig, "catalogue": CatalogueConfig,
}  # fmt: skip
# What Hydra's grammar or YAML makes a number, a truth value, a call or another text of.
CHANGED = [
    "2026_11_25", "1e5", "12e3", "007", "1_000", "+5", "-0", ".5", "1.", "1.10", "inf", "nan", "NaN", "true", "False",
    "TRUE", "0x10", "1:30", "2026-11-25", "on", "no", "None", "1e400", "report(1)", "f(x y)", " a", "a ", " 1e5 ", "  ",
]  # fmt: skip
# What it cannot read at all.
UNREADABLE = [
    "a=b", "/data/x=1/y", "a(1", "(a)", "a (1).jsonl", "~/runs", "~", "année.jsonl", "s3://b/exp#1", "日本", "a;b",
    "a&b", "it's", 'say "so"', "a'b'c", "a{b}", "a [2026]", "a[0]", "x{", "a\nb", "<s>", "a!b", "a^b`c",
    "\udcff", "e\u0301",
]  # fmt: skip


def text_keys(kind: Any, config: Any, key: str = "") -> Iterator[str]:
    """The settings of a command that are one text, of those that its configuration has."""
    for name, own in types_of(kind).items():
        if name not in list(config):
            continue
        if is_dataclass(own) and isinstance(own, type):
            yield from text_keys(own, config[name], f"{key}{name}.")
        elif own in (str, str | None):
            yield f"{key}{name}"


def read(override: str) -> Any:
    return OverridesParser.create().parse_override(override).value()


def test_every_command_has_all_of_its_settings_typed() -> None:
    for path in Path(CONF).glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        known = types_of(SETTINGS[path.stem])
        for name in set(content) - {"hydra", "defaults"}:
            assert name in known, (path.name, name)
            if isinstance(content[name], dict):
                assert set(content[name]) <= set(types_of(known[name])), (path.name, name)


@pytest.mark.parametrize("text", CHANGED + UNREADABLE)
def test_one_text_stays_as_it_was_typed(text: str) -> None:
    for key in ("job.name", "storage.uri", "model.revision", "dataset.source", "neurons.list", "measure.edits"):
        for sign, is_sweep in (("", False), ("++", True)):
            (said,) = as_typed([f"{sign}{key}={text}"], ScanConfig, is_sweep)
            assert read(said) == text, key


@pytest.mark.parametrize(
    "command", ["scan", "probe", "study", "check", "status", "verify", "report", "tasks", "control", "catalogue"]
)
def test_every_text_of_every_command_stays_as_it_was_typed(command: str) -> None:
    settings = SETTINGS[command]
    keys = list(text_keys(settings, composed(command, [], settings)))
    assert {"status": "run", "report": "out", "catalogue": "run"}.get(command, "model.source") in keys
    typed = {key: CHANGED[index % len(CHANGED)] for index, key in enumerate(keys)}
    config = composed(command, [f"{key}={text}" for key, text in typed.items()], settings)
    assert {key: OmegaConf.select(config, key) for key in keys} == typed


def test_texts_in_lists_and_mappings_stay_as_they_were_typed() -> None:
    config = composed(
        "scan",
        [
            "dataset.ids=[001,1e3, 2_0 ,null,true,a(1),'x,y']", "dataset.columns={id: 007, prompt: 1e3,answer:null}",
            "+dataset.languages=[no,1e1]", "+dataset.task=1e3", "model.device=0", "neurons.layers=[0,15]",
            "measure=intervene", "measure.edits=[{name: 1e5, neurons: [[0,864]], scale: 0, signed: true}]",
        ],
        ScanConfig,
    )  # fmt: skip
    assert config.dataset.ids == ["001", "1e3", "2_0", "null", "true", "a(1)", "x,y"]
    assert config.dataset.columns == {"id": "007", "prompt": "1e3", "answer": "null"}
    assert (config.dataset.languages, config.dataset.task, config.model.device) == (["no", "1e1"], "1e3", "0")
    assert config.neurons.layers == [0, 15]
    assert config.measure.edits == [{"name": "1e5", "neurons": [[0, 864]], "scale": 0, "signed": True}]
    probe = composed("probe", ["probe.contexts=[{template: 1e3},{shots: 0}]"], ProbeConfig)
    assert probe.probe.contexts == [{"template": "1e3"}, {"shots": 0}]
    assert composed("report", ["runs=[2026_11_25,1e3]"], ReportConfig).runs == ["2026_11_25", "1e3"]
    assert composed("report", ["runs=2026_11_25"], ReportConfig).runs == "2026_11_25"
    assert composed("tasks", ["task=1e3"], TasksConfig).task == "1e3"


@pytest.mark.parametrize(
    ("command", "setting", "typed", "value"),
    [
        # A blank before a token is part of it: without, it is another token.
        ("control", "control.against", " London", " London"),
        ("control", "control.against", "5", "5"),
        ("scan", "measure.against", " London", " London"),
        ("scan", "measure.against", "1e5", "1e5"),
        # A target's place, which its text would have to be quoted for.
        ("scan", "measure.against", "5", 5),
        ("scan", "measure.against", "'5'", "5"),
    ],
)
def test_texts_of_measures_stay_as_they_were_typed(command: str, setting: str, typed: str, value: int | str) -> None:
    config = composed(command, [f"{setting}={typed}"], SETTINGS[command])
    assert OmegaConf.select(config, setting) == value
    assert type(OmegaConf.select(config, setting)) is type(value)


def test_what_the_grammar_can_read_keeps_its_meaning() -> None:
    for given, value in [
        ("job.name='1e5'", "1e5"), ('job.name="a=b"', "a=b"), (r"dataset.source=a\=b\,c.jsonl", "a=b,c.jsonl"),
        ("job.name=null", None), ("model.revision=null", None), ("job.limit=12", 12), ("cluster.replicas=2", 2),
        ("job.shard_size=auto", "auto"), ("job.dry_run=true", True), ("dataset.answer_prefix=", ""),
        ("dataset.answer_prefix=''", ""), ("job.name=${storage.uri}", "${storage.uri}"), ("job.name=str(1e5)", "1e5"),
        ("storage.retry_timeout_seconds=1e2", 100.0), ("dataset.source='a\\\\'", "a\\"), ("job.limit=null", None),
    ]:  # fmt: skip
        assert read(*as_typed([given], ScanConfig, is_sweep=False)) == value, given
    others = ["model=llama-2-7b", "~job.name", "hydra.run.dir=.", "measure=sweep"]
    assert as_typed(others, ScanConfig, is_sweep=False) == others


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("job.name=1e5,2e5", ["1e5", "2e5"]), ("job.name=choice(1e5,true,b)", ["1e5", "true", "b"]),
        ("job.name=range(1,4)", ["1", "2", "3"]), ("model.revision=001, 1_0", ["001", "1_0"]),
        ("dataset.ids=[1e5],[2e5]", [["1e5"], ["2e5"]]), ("job.limit=1,2", [1, 2]),
    ],
)  # fmt: skip
def test_sweeps_over_texts(given: str, values: list[Any]) -> None:
    (said,) = as_typed([given], ScanConfig, is_sweep=True)
    each = OverridesParser.create().parse_override(said).sweep_string_iterator()
    assert [read(f"{given.partition('=')[0]}={one}") for one in each] == values


@pytest.mark.parametrize(
    "given",
    [
        "dataset.source=a,b.jsonl", "storage.uri=/a, b (1)/c", "job.name='x'y", 'job.name="x', "storage.uri=[a]",
        "storage.uri={a: b}", "dataset.task=[x](1)", "job.name=choice(a,b)", "job.name=glob(x)", "neurons.list=[a](1)",
        "dataset.source=it's, \"so\"", "dataset.source=a,$b", "dataset.source=a,\\", "foo.bar=(",
    ],
)  # fmt: skip
def test_what_has_to_be_quoted_is_told_ready_to_be_copied(given: str) -> None:
    setting, _, value = given.partition("=")
    with refused(ConfigurationError, setting, value) as caught:
        as_typed([given], ScanConfig, is_sweep=False)
    message = str(caught.value)
    # What a shell makes of the advice, and Hydra of that.
    (argument,) = shlex.split(message.partition("as one text it is written ")[2])
    (said,) = as_typed([argument], ScanConfig, is_sweep=False)
    assert read(said) == given.partition("=")[2]


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("dataset.task=ner,paws", ["ner", "paws"]), ("neurons.layers=0,1", [0, 1]),
        ("dataset.ids=[a(,1e5]", ["a(", "1e5"]),
    ],
)  # fmt: skip
def test_lists_are_told_as_lists(given: str, value: list[Any]) -> None:
    with refused(ConfigurationError, says="as a list it is written ") as caught:
        as_typed([given], ScanConfig, is_sweep=False)
    (argument,) = shlex.split(str(caught.value).partition("as a list it is written ")[2])
    (said,) = as_typed([argument], ScanConfig, is_sweep=False)
    assert read(said) == value


def test_quotes_hold_whatever_a_text_has() -> None:
    draw = random.Random(0)
    for _ in range(1000):
        text = "".join(draw.choice("ab1 '\"\\\\$`!,=()[]{}:~#%é\t") for _ in range(draw.randint(1, 12)))
        argument = f"job.name={in_quotes(text)}"
        assert read(argument) == text
        assert shlex.split(for_a_shell(argument)) == [argument]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("scan", "scan: is not a setting, which is KEY=VALUE"), ("=x", "=x: is not a setting"),
        ("my file=x", "'my file' is not the name of a setting"), ("job.limit=(3", "job.limit=(3: cannot be read"),
        ("job.limit=1,2", "job.limit=1,2: a comma stands for the values of several jobs, which --multirun runs"),
        ("job.nme=x", "job.nme is no setting; did you mean name?"), ("job.limit=x=y", "job.limit=x=y: cannot be read"),
        ("measure.steps=3", "measure.steps is no setting of this measure (see"), ("xyz=1", "xyz is no setting (see"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(given: str, message: str) -> None:
    with refused(ConfigurationError, says=re.escape(message)) as caught:
        composed("scan", [given], ScanConfig)
    assert "Lexer" not in str(caught.value)


@pytest.mark.parametrize("written", ["12e3", "2026_11_25", "1:30", "yes", "010", "0.10"])
def test_a_number_of_a_yaml_file_in_the_place_of_a_text_is_refused(written: str) -> None:
    for key, text in (
        ("model.revision", f"model:\n  revision: {written}"), ("dataset.ids", f"dataset:\n  ids: [a, {written}]"),
        ("dataset.columns.id", f"dataset:\n  columns: {{id: {written}}}"),
        ("measure.keep", f"measure:\n  keep: {written}"),
    ):  # fmt: skip
        quoted = OmegaConf.create(text.replace(written, f"'{written}'"))
        assert isinstance(quoted, DictConfig)
        require_text(quoted, ScanConfig)
        # Some of these the reader of YAML files leaves as they are.
        if OmegaConf.select(OmegaConf.create(text), key) not in (written, ["a", written]):
            with refused(ConfigurationError, key, says="put it into quotes in the YAML file"):
                require_text(OmegaConf.create(text), ScanConfig)


@pytest.mark.parametrize("group", ["measure", "model", "neurons", "cluster", "storage", "+experiment"])
@pytest.mark.parametrize("name", ["é", "a=b", "(x)", "a(b)", "a#b", "a b(1)", "1e5", "2026_11_25", "true", "007"])
def test_a_group_is_told_with_the_names_of_its_files(group: str, name: str) -> None:
    options = sorted(path.stem for path in Path(CONF, group.lstrip("+")).glob("*.yaml"))
    with refused(ConfigurationError, says=re.escape(f"Could not find '{group.lstrip('+')}/{name}'")) as caught:
        composed("scan", [f"{group}={name}"], ScanConfig)
    assert re.search(f"Available options .*{'.*'.join(map(re.escape, options))}", str(caught.value))
    with refused(ConfigurationError, group, "a,b", says="a comma stands for the values of several jobs"):
        as_typed([f"{group}=a,b"], ScanConfig, is_sweep=False)
    with refused(ConfigurationError, group, "a,é", says="as several values they are written .*=a,'é'"):
        as_typed([f"{group}=a,é"], ScanConfig, is_sweep=True)
    with refused(ConfigurationError, group, "{name: é}", says="cannot be read"):
        as_typed([f"{group}={{name: é}}"], ScanConfig, is_sweep=False)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("measure.edits=[{neurons: [[0,1]], shift: 1, shift: 2}]", "shift"), ("dataset.columns={id: a, id: b}", "id"),
        ("dataset.columns={ id : a,prompt: c,id:a}", "id"), ("++measure.edits=[{a: {b: {c: 1, c: 1}}}]", "c"),
        ("job={name: a, name: b}", "name"), ("dataset.columns={id: a},{id: b, id: c}", "id"),
        ("foo.bar=[[{1: a, 1: b}]]", "1"), ("job.limit=choice({x: 1, x: 2})", "x"),
    ],
)  # fmt: skip
def test_a_key_twice_in_one_mapping_is_refused(given: str, key: str) -> None:
    setting, _, value = given.partition("=")
    with refused(ConfigurationError, setting, value, says=f"has the key {key} twice in one mapping"):
        as_typed([given], ScanConfig, is_sweep=True)


def test_a_key_in_several_mappings_is_no_key_twice() -> None:
    for given in ("measure.edits=[{shift: 1},{shift: 2}]", "job.name='{a: 1, a: 2}'", "foo={a: {a: 1}}"):
        assert as_typed([given], ScanConfig, is_sweep=False) == [given]


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("dataset.columns={prompt: Frage (de), id: Kürzel}", {"prompt": "Frage (de)", "id": "Kürzel"}),
        ("dataset.columns={id: a=b, prompt: 1e3", {"id": "a=b", "prompt": "1e3"}),
        ('dataset.columns={"id": "x, y"}', {"id": "x, y"}), ("dataset.ids=[é,'a,b', 007", ["é", "a,b", "007"]),
        ('measure.edits=[{"name": "off", "neurons": [[0, 1]], "scale": 0}]',
         [{"name": "off", "neurons": [[0, 1]], "scale": 0}]),
        ("measure.edits=[{name: ä, 'signed': true}]", [{"name": "ä", "signed": True}]),
        ("neurons.layers=[0,15", [0, 15]), ("measure.shifts=[-1,1", [-1, 1]), ("measure.shifts=[-1,.5e1", [-1, 5.0]),
    ],
)  # fmt: skip
def test_lists_and_mappings_are_told_with_quotes_where_they_belong(given: str, value: Any) -> None:
    with refused(ConfigurationError, says="cannot be read; .*it is written ") as caught:
        as_typed([given], ScanConfig, is_sweep=False)
    message = str(caught.value)
    assert "as one text" not in message
    assert ("keys stand without quotes" in message) == bool(re.search(r"""[{,]\s*["'][^,]*["']:""", given))
    (argument,) = shlex.split(message.partition("it is written ")[2])
    config = composed("scan", ["measure=intervene", "+measure.shifts=0", *as_typed([argument], ScanConfig, False)],
                      ScanConfig)  # fmt: skip
    assert OmegaConf.select(config, given.partition("=")[0]) == value


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("storage.uri=/tmp/a#1,/tmp/b#2", ["/tmp/a#1", "/tmp/b#2"]), ("job.name=it's,b", ["it's", "b"]),
        ("storage.uri=/a b (1), /c", ["/a b (1)", "/c"]), ("job.name='a,b',é", ["a,b", "é"]),
        ("job.name=x=1,${job.log},1e5", ["x=1", "${job.log}", "1e5"]), ("dataset.ids=[é],[1e5]", [["é"], ["1e5"]]),
    ],
)  # fmt: skip
def test_of_several_jobs_each_value_is_told_with_its_quotes(given: str, values: list[Any]) -> None:
    with refused(ConfigurationError, says="as several values they are written") as caught:
        as_typed([given], ScanConfig, is_sweep=True)
    (argument,) = shlex.split(str(caught.value).partition("they are written ")[2])
    (said,) = as_typed([argument], ScanConfig, is_sweep=True)
    each = OverridesParser.create().parse_override(said).sweep_string_iterator()
    assert [read(f"{given.partition('=')[0]}={one}") for one in each] == values


@pytest.mark.parametrize("call", ["shuffle(1e5,true,2e5)", "sort(true,2e5,1e5)", "shuffle(choice(1e5,2e5,true))",
                                  "tag(x,choice(1e5,2e5,true))"])  # fmt: skip
def test_calls_that_hand_texts_on_keep_them_for_every_job(call: str) -> None:
    (said,) = as_typed([f"job.name={call}"], ScanConfig, is_sweep=True)
    each = OverridesParser.create().parse_override(said).sweep_string_iterator()
    assert sorted(read(f"job.name={one}") for one in each) == ["1e5", "2e5", "true"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("job.name=int(5)", "numbers or truth values, and job.name is text; as one text it is written"),
        ("dataset.source=float(1e5)", "numbers or truth"), ("model.source=bool(true)", "numbers or truth"),
        ("job.name=glob(*)", "chooses among files, as of models, and job.name is text"),
        ("job.name=???", "??? stands for a value that is still to be given"), ("job.name='???'", "??? stands for"),
        ("dataset.columns={id: ???}", "??? stands for"), ("job.limit=???", "??? stands for"),
        ("job.name='a${b'", r"unless it is written \${; as one text it is written"),
        ("dataset.ids=['a${b']", r"unless it is written \${"), ("job.name=a${job.log}c${d", r"written \${; as one"),
    ],
)  # fmt: skip
def test_what_would_become_something_else_is_refused(given: str, message: str) -> None:
    setting, _, value = given.partition("=")
    with refused(ConfigurationError, setting, value, says=re.escape(message)) as caught:
        as_typed([given], ScanConfig, is_sweep=True)
    assert "YAML" not in str(caught.value)


@pytest.mark.parametrize("text", ["/tmp/a${b", "${", "a${b${c", "x/${/y", "é${", "a=${b"])
def test_what_begins_as_an_interpolation_and_is_none_is_text(text: str) -> None:
    assert composed("scan", [f"storage.uri={text}"], ScanConfig).storage.uri == text


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("storage.uri=/tmp/${x}", "Interpolation key 'x' not found"), ("job.limit=${x.y}", "Interpolation key"),
        ("job.name=${job.name}", "Recursive interpolation"), ("job.name=${oc.env:NOT_SET_AT_ALL}", "KeyError raised"),
        ("job.name=${nonsense:x}", "Unsupported interpolation type nonsense"),
    ],
)  # fmt: skip
def test_an_interpolation_of_nothing_is_told_in_one_line(given: str, reason: str) -> None:
    setting, _, value = given.partition("=")
    with refused(ConfigurationError, setting, value, says=reason) as caught:
        composed("scan", [given], ScanConfig)
    assert str(caught.value).endswith(r"where it is meant as it is, \${ is written")

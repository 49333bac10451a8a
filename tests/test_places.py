"""Places: no character is given a meaning, what is typed is the place, and credentials are refused unseen."""

from __future__ import annotations

import io
import logging
import shlex
import signal
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import neg_service
from jobs.check import CheckConfig
from jobs.entry import CONF, start
from jobs.guard import tell
from jobs.report import ReportConfig, write_report
from jobs.submit import main as submit
from neg_service.config import DatasetConfig, ScanConfig
from neg_service.errors import ConfigurationError, DestinationError, PromptError
from neg_service.inputs import parts_of_input, read_if_there, read_input
from neg_service.models.source import fetch
from neg_service.places import (
    absolute,
    argument,
    below,
    file_name_of,
    holds_credentials,
    is_chain,
    literal,
    name_of,
    parent_of,
    refuse_credentials,
    without_credentials,
)
from neg_service.prompts.sources import dataset_name, load_prompts
from neg_service.storage.objects import LocalStore
from neg_service.storage.s3 import S3Store
from neg_service.storage.stores import open_store
from tests.refusals import NOT_GIVEN, refused

# Characters that URLs, shells, patterns or Hydra give a meaning.
ODD = [
    "exp#1", "exp?1", "exp;1", "exp%1", "exp%23", "a%2Fb", "a%20b", "a b", "a  b", "a\tb", "a+b", "a&b=c", "caf\u00e9",
    "cafe\u0301", "a@b", "a:b", "a::b", "a*b", "a[b]", "a{b}", "a'b", 'a"b', " a", "a ", "~a", "a|b", "a$b", "a${b}",
    "a,b", "(a)", "!a", "2026_11_25", "...", "\U0001f600", "zip::x",
]  # fmt: skip


@pytest.fixture
def own_logs_and_signals() -> Iterator[None]:
    """What a command sets up for its process is taken back."""
    root = logging.getLogger()
    handlers, level, on_stop = root.handlers[:], root.level, signal.getsignal(signal.SIGTERM)
    yield
    root.handlers[:], root.level = handlers, level
    signal.signal(signal.SIGTERM, on_stop)


@pytest.mark.parametrize("name", ODD)
def test_a_place_is_what_was_typed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in (f"s3://runs/{name}", f"s3://runs/x/{name}/y"):
        assert open_store(uri).uri == open_store(f"{uri}/").uri == uri
        assert isinstance(open_store(uri), S3Store)
    path = tmp_path / name
    for uri in (str(path), f"file://{path}", f"file:{path}", f"file://localhost{path}", f"FILE://{path}", path):
        store = open_store(uri)
        assert isinstance(store, LocalStore)
        assert store.uri == str(path)
    monkeypatch.chdir(tmp_path)
    open_store(f"./{name}").put("t/a", b"1")
    assert (path / "t" / "a").read_bytes() == b"1"
    # What a store says of itself opens it again.
    assert open_store(open_store(f"./{name}").uri).get("t/a") == b"1"


@pytest.mark.parametrize("name", ["a\\b", "a//b", "a/../b", "./a", *ODD])
def test_a_file_is_read_under_the_name_that_it_has(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    file = folder / f"{name.replace('/', '-')}.jsonl"
    file.write_text('{"prompt": "w1", "targets": [" w2"]}')
    for source in (str(file), f"file://{file}", file):
        (prompt,) = load_prompts(source)
        assert prompt.text == "w1"
    assert read_if_there("dataset.source", f"{folder}/{file.name}") is not None
    assert read_if_there("dataset.source", f"{folder}/{file.name}x") is None
    (folder / "b.parquet").write_bytes(b"2")
    (folder / "a.parquet").write_bytes(b"1")
    assert [content for _, content in parts_of_input("neurons.list", str(folder))] == [b"1", b"2"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3:/bucket/x", r"two slashes follow s3:"),
        ("s3:bucket/x", r"two slashes follow s3:"),
        ("https:/host/x", r"two slashes follow https:"),
        (" s3://bucket/x", "is no scheme"),
        ("'s3://bucket/x'", "is no scheme"),
        ("s3a://bucket/x", "scheme 's3a' is unknown"),
        ("https://host/x", "scheme 'https' is unknown"),
        ("s3://bucket//x", "two slashes in a row"),
        ("s3://bucket/a//b", "two slashes in a row"),
        ("s3://bucket/a//", "two slashes in a row"),
        ("s3://bucket/a/../b", r"has a part '\.\.'"),
        ("s3://bucket/./b", r"has a part '\.'"),
        ("s3://bucket/a\\b", "has a backslash"),
        ("s3://bucket/a?versionId=b", "names a version"),
        ("s3://bucket/a\nb", "cannot be shown in one line"),
        ("/a\rb", "cannot be shown in one line"),
        ("/a\0b", "cannot be shown in one line"),
        ("/a\u2028b", "cannot be shown in one line"),
        ("/a\udcffb", "cannot be shown in one line"),
        ("file://host/x", "names a host"),
        ("file://", "names no path"),
        ("~nobody-of-this-name/x", "there is no home ~nobody-of-this-name"),
    ],
)
def test_what_would_not_be_found_again_is_refused_with_the_setting_to_change(uri: str, message: str) -> None:
    with refused(DestinationError, "storage.uri", says=message):
        open_store(uri)
    for key, opened in (
        ("run", lambda: neg_service.open_run(uri)),
        ("run", lambda: neg_service.open_runs([uri])),
        ("runs", lambda: write_report([uri], "/nowhere", None)),
        ("out", lambda: write_report(["/nowhere"], uri, None)),
    ):
        with refused(DestinationError, key, says=message):
            opened()


def test_a_run_is_opened_by_its_path(tmp_path: Path) -> None:
    with refused(DestinationError, says=f"{tmp_path}: there is no run.json"):
        neg_service.open_run(tmp_path)
    with refused(DestinationError, says=f"{tmp_path}: there is no run.json"):
        neg_service.open_runs(tmp_path)
    # A path is never anything else, whatever it is called.
    assert open_store(Path("s3:/bucket/x")).uri == f"{Path.cwd()}/s3:/bucket/x"


@pytest.mark.parametrize(
    ("place", "child", "parent", "name"),
    [
        ("s3://b/x#1", "s3://b/x#1/n", "s3://b", "x#1"),
        ("s3://b", "s3://b/n", None, "b"),
        ("/x", "/x/n", "/", "x"),
        ("/a?b/c%2Fd", "/a?b/c%2Fd/n", "/a?b", "c%2Fd"),
        ("/", "/n", None, ""),
    ],
)
def test_folders_and_names(place: str, child: str, parent: str | None, name: str) -> None:
    assert (below(place, "n"), parent_of(place), name_of(place)) == (child, parent, name)


@pytest.mark.parametrize(
    ("place", "child", "file"),
    [
        ("https://h/d?sig=x/y", "https://h/d/n.json?sig=x/y", "d"),
        ("zip://d::/a/x.zip", "zip://d/n.json::/a/x.zip", "d"),
        ("zip::/a/x.zip", "zip://n.json::/a/x.zip", "x.zip"),
        ("simplecache::s3://b/d", "simplecache::s3://b/d/n.json", "d"),
        ("simplecache::zip://d/::https://h/x.zip?s", "simplecache::zip://d/n.json::https://h/x.zip?s", "d"),
        ("s3://b/a.jsonl?versionId=1", None, "a.jsonl"),
        ("s3://b/a::c#1.jsonl", None, "a::c#1.jsonl"),
        ("file:///a b/c#d.csv", "file:///a b/c#d.csv/n.json", "c#d.csv"),
    ],
)
def test_links_of_chains_and_queries_of_urls(place: str, child: str | None, file: str) -> None:
    assert child is None or below(place, "n.json") == child
    assert file_name_of(place) == file


def test_paths_become_absolute_also_within_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x#1.zip").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert absolute("x#1.zip") == str(tmp_path / "x#1.zip")
    assert absolute("zip://a.jsonl::x#1.zip") == f"zip://a.jsonl::{tmp_path}/x#1.zip"
    assert absolute("not-here") == "not-here"
    assert absolute("x" * 5000) == "x" * 5000
    assert is_chain("simplecache::s3://b/x")
    assert not is_chain("s3://b/a::c")


@pytest.mark.parametrize("value", [*(f"s3://runs/{name}" for name in ODD), *ODD, "a\\b", "a\\'b", "a\\", "1e5", "null"])
def test_an_argument_that_is_shown_can_be_typed(value: str) -> None:
    (typed,) = shlex.split(argument("run", value))
    with initialize_config_dir(CONF, version_base="1.3"):
        assert compose("status", overrides=[typed]).run == value
    assert eval(literal(value)) == value
    assert argument("run", "s3://runs/a-b_c.d") == "run=s3://runs/a-b_c.d"


SECRET = [
    "s3://KEY:hidden@bucket/x",
    "s3://KEY:hid/den@bucket/x",
    "s3://hidden@bucket/x",
    "s3://KEY:12/hidden@bucket/x",
    "s3://KEY:/hidden@bucket/x",
    "gs://KEY:12/hidden@bucket/x",
    "zip://a.jsonl::s3://KEY:12/hidden@bucket/x.zip",
    "http://me:12/hidden@host/x.jsonl",
    "s3://KEY:12/hidden",
    "s3://bucket/x?X-Amz-Signature=hidden",
    "s3://bucket/x.jsonl?a=1&AWSAccessKeyId=hidden",
    "http://me:hidden@host/x.jsonl",
    "https://hidden@host/x.jsonl",
    "http://me:hid#den@host/x.jsonl",
    "ftp://me:hidden@host/x.jsonl",
    "memory://me:hidden@host/x.jsonl",
    "simplecache::https://me:hidden@host/x.jsonl",
    "zip://a.jsonl::s3://KEY:hidden@bucket/x.zip",
]
NO_SECRET = [
    "s3://bucket/a@b/c:d@e", "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/x@y", "/data/me:x@y", "a:b@c",
    "s3://b,s3://bucket/a@b", "http://127.0.0.1:9000/a@b.jsonl", "s3://bucket/exp?1", "https://host:8080/@me/a.jsonl", "https://host/a.jsonl?X-Amz-Signature=read",
    "abfs://container@account.dfs.core.windows.net/x", "http://[::1]:9000/x", "github://org:repo@sha/x.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("uri", SECRET)
def test_credentials_are_refused_without_being_shown(uri: str) -> None:
    assert holds_credentials(uri)
    for key, taken in (
        ("storage.uri", lambda: open_store(uri)),
        ("run", lambda: neg_service.open_run(uri)),
        ("storage.endpoint_url", lambda: S3Store("s3://bucket/x", uri)),
        ("measure.edits", lambda: read_input("measure.edits", uri)),
        ("dataset.source", lambda: read_if_there("dataset.source", uri)),
        ("neurons.list", lambda: list(parts_of_input("neurons.list", uri))),
        ("dataset.source", lambda: load_prompts(uri)),
        ("model.source", lambda: fetch(uri)),
        ("runs", lambda: refuse_credentials("runs", f"[s3://bucket/x,{uri}]")),
    ):
        with refused(ConfigurationError, key, NOT_GIVEN, says="holds credentials") as caught:
            taken()
        assert "hid" not in str(caught.value)
        assert "den" not in str(caught.value).replace("credentials", "")


@pytest.mark.parametrize("uri", NO_SECRET)
def test_what_only_looks_like_credentials_is_taken(uri: str) -> None:
    assert not holds_credentials(uri)
    refuse_credentials("dataset.source", uri)


def test_the_query_of_a_url_is_neither_shown_nor_stored() -> None:
    assert without_credentials("https://host/a.csv?X-Amz-Signature=hidden#x") == "https://host/a.csv"
    assert without_credentials("zip://a#1.csv::https://host/x.zip?hidden") == "zip://a#1.csv::https://host/x.zip"
    with refused(PromptError, "dataset.source", says="cannot be read") as caught:
        load_prompts("http://127.0.0.1:9/a.jsonl?X-Amz-Signature=hidden")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("uri", ["https://h/x?sig=hidden", "https:/h/x?sig=hidden", "'https://h/x?sig=hidden'"])
def test_a_place_for_results_that_is_none_is_told_without_its_signature(uri: str) -> None:
    for wrong in (uri, f"{uri}\n"):
        with refused(ConfigurationError, "storage.uri", says="https") as caught:
            open_store(wrong)
        assert "hidden" not in str(caught.value)
    if uri[0] == "h":
        with refused(ConfigurationError, "model.source", "https://h/x") as caught:
            fetch("https://h/x?sig=hidden")
        assert "hidden" not in str(caught.value)


def test_a_place_is_told_by_the_setting_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for key in ("run", "out"):
        with refused(DestinationError, key, f"{tmp_path}/file/x"):
            open_store(f"{tmp_path}/file/x", key=key).check()
        with refused(DestinationError, key, "s3://b/x (storage.endpoint_url=nonsense)"):
            open_store("s3://b/x", "nonsense", key=key).check()


@pytest.mark.parametrize(
    "source", ["http://[::1/a.jsonl", "s3://[bucket/a.jsonl", "s3:///a.jsonl", "nothing-of-fsspec://x/a.jsonl"]
)
def test_addresses_that_are_none_are_told_in_one_line(source: str) -> None:
    with refused(PromptError, "dataset.source", source):
        load_prompts(source)


def test_an_endpoint_that_is_no_url_is_told() -> None:
    with refused(
        DestinationError,
        "storage.uri",
        "s3://bucket/x (storage.endpoint_url=http://[::1)",
        says="is no URL",
    ):
        open_store("s3://bucket/x", "http://[::1").check()


@pytest.mark.parametrize(
    ("name", "settings", "arguments"),
    [
        ("scan", ScanConfig, ["storage.uri='s3://KEY:hidden@bucket/x'"]),
        ("scan", ScanConfig, ["storage.endpoint_url=http://me:hidden@127.0.0.1:9"]),
        # Hydra's own messages show what they do not understand.
        ("scan", ScanConfig, ["dataset.sourc=https://me:hidden@host/a=b(.jsonl"]),
        ("report", ReportConfig, ["runs=[s3://b/x,s3://KEY:hidden@b/y]"]),
        ("check", CheckConfig, ["model.source=https://me:hidden@host/model", "--cfg", "job"]),
    ],
)
@pytest.mark.usefixtures("own_logs_and_signals")
def test_no_command_shows_credentials(
    name: str,
    settings: type,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"jobs.{name}", *arguments])
    with pytest.raises(SystemExit) as ended:
        start(name, lambda config: 0, settings)
    shown = capsys.readouterr()
    assert ended.value.code == 1
    assert "hidden" not in shown.out + shown.err
    assert shown.err.startswith("error: ")
    assert "holds credentials" in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("where", [["--address", "http://me:hidden@127.0.0.1:9"], ["storage.uri=s3://KEY:hidden@b/x"]])
def test_nothing_is_submitted_with_credentials(where: list[str]) -> None:
    setting = "an argument" if where[0] == "--address" else "storage.uri"
    with refused(ConfigurationError, setting, says="holds credentials") as caught:
        submit([*where, "model.source=nothing"])
    assert "hidden" not in str(caught.value)


def test_an_error_shows_a_place_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    tell("storage.uri=/a  b\tc\u00a0d: wrong\n  in two lines")
    assert capsys.readouterr().err == "error: storage.uri=/a  b\tc\u00a0d: wrong in two lines\n"


ROW = b'{"prompt": "w1", "targets": [" w2"]}'


@pytest.mark.filterwarnings("error")
def test_inputs_are_read_out_of_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x#1.zip", "w") as archive:
        archive.writestr("in/a#1.jsonl", ROW)
    with tarfile.open("x.tar", "w") as packed:
        about = tarfile.TarInfo("a.jsonl")
        about.size = len(ROW)
        packed.addfile(about, io.BytesIO(ROW))
    for source in (
        "zip://in/a#1.jsonl::x#1.zip",
        f"zip://in/a#1.jsonl::{tmp_path}/x#1.zip",
        f"zip://in/a#1.jsonl::file://{tmp_path}/x#1.zip",
        f"simplecache::zip://in/a#1.jsonl::{tmp_path}/x#1.zip",
        "tar://a.jsonl::x.tar",
    ):
        (prompt,) = load_prompts(source)
        assert prompt.text == "w1"
    assert dataset_name(DatasetConfig(source="zip://in/a#1.jsonl::x#1.zip")) == "a#1"
    # Packed anew it is another archive.
    with zipfile.ZipFile("x#1.zip", "w") as archive:
        archive.writestr("in/a#1.jsonl", ROW.replace(b"w1", b"w3"))
    assert load_prompts("zip://in/a#1.jsonl::x#1.zip")[0].text == "w3"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("zip://b.jsonl::x.zip", "no such file"),
        ("zip://a.jsonl::nothing.zip", "no such file"),
        ("zip://a.jsonl::broken.zip", "not a zip file"),
        ("zip://a.jsonl::cut.zip", ""),
        ("tar://a.jsonl::broken.zip", ""),
        ("simplecache::nonsense://a.jsonl", ""),
        ("zip://a.jsonl::https://127.0.0.1:9/x.zip", "nothing answers there"),
    ],
)
def test_archives_that_are_none_are_told_in_one_line(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", ROW)
    content = bytearray(Path("x.zip").read_bytes())
    content[45:60] = bytes(15)
    Path("cut.zip").write_bytes(content)
    Path("broken.zip").write_bytes(b"nothing")
    with refused(PromptError, "dataset.source", source, says=f"cannot be read: .*{message}"):
        load_prompts(source)

"""Files at any URI: archives whose checksums are wrong, servers that refuse or break off, folders of odd names."""

from __future__ import annotations

import gzip
import http.server
import io
import lzma
import socket
import ssl
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import HTTPClientError
from fsspec import AbstractFileSystem

import neg_service
from infra.s3.server import Keys
from neg_service.config import DatasetConfig, NeuronsConfig
from neg_service.errors import ConfigurationError, DestinationError, NegServiceError, PromptError
from neg_service.inputs import parts_of_input, read_if_there, read_input
from neg_service.measures.choice import with_list_read
from neg_service.prompts.mceval8k import load_tasks
from neg_service.prompts.sources import load_prompts
from neg_service.prompts.tasks import TASKS
from neg_service.prompts.templates import templates_of
from neg_service.refusals import advice_of
from neg_service.storage.parts import encode_part
from tests.refusals import refused
from tests.s3 import acting_as

ROWS = b"".join(b'{"prompt": "a%d", "targets": ["b"], "id": "%d"}\n' % (i, i * i) for i in range(300))


def _zip(method: int) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        archive.writestr("a.jsonl", ROWS)
    return content.getvalue()


def _tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = len(ROWS)
        archive.addfile(entry, io.BytesIO(ROWS))
    return content.getvalue()


ARCHIVES = {
    "stored.zip": _zip(zipfile.ZIP_STORED),
    "deflated.zip": _zip(zipfile.ZIP_DEFLATED),
    "bzip2.zip": _zip(zipfile.ZIP_BZIP2),
    "lzma.zip": _zip(zipfile.ZIP_LZMA),
    # Small blocks, so that most bytes are of rows.
    "a.tar.gz": gzip.compress(_tar(), 1),
    "a.tar.xz": lzma.compress(_tar()),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_the_checksums_of_archives_are_verified(tmp_path: Path, name: str) -> None:
    content = ARCHIVES[name]
    uri = f"{'zip' if name.endswith('zip') else 'tar'}://a.jsonl::{tmp_path / name}"
    (tmp_path / name).write_bytes(content)
    assert read_input("dataset.source", uri, PromptError) == ROWS
    # Well within the rows; and an archive that was cut short.
    for broken in (
        _flipped(content, len(content) // 3),
        _flipped(content, len(content) // 2),
        content[: len(content) // 2],
    ):
        (tmp_path / name).write_bytes(broken)
        with refused(PromptError, "dataset.source", says="cannot be read: "):
            read_input("dataset.source", uri, PromptError)


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("other", ["a.jsonl", "./a.jsonl", "/a.jsonl"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_in_an_archive_are_refused(tmp_path: Path, kind: str, other: str) -> None:
    place = tmp_path / f"x.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(place, "w") as archive:
            for name in ("a.jsonl", other):
                archive.writestr(name, ROWS)
    else:
        with tarfile.open(place, "w") as archive:
            for name in ("a.jsonl", other):
                entry = tarfile.TarInfo(name)
                entry.size = len(ROWS)
                archive.addfile(entry, io.BytesIO(ROWS))
    with refused(PromptError, "dataset.source", says="the archive has two files 'a.jsonl'; names must differ"):
        read_input("dataset.source", f"{kind}://a.jsonl::{place}", PromptError)


def _flipped(content: bytes, at: int) -> bytes:
    broken = bytearray(content)
    broken[at] ^= 2
    return bytes(broken)


@pytest.mark.parametrize(
    "source",
    [
        "zip://b.jsonl::PLACE/deflated.zip",
        "zip://a.jsonl",
        "zip://a.jsonl::PLACE/nowhere.zip",
        "zip://a.jsonl::PLACE/a.jsonl",
        "tar://a.jsonl::PLACE/a.jsonl",
        "reference://a.jsonl",
        "dir://a.jsonl",
        "jupyter://a.jsonl",
        "nothing://a.jsonl",
        "simplecache::nothing://a.jsonl",
        "git://a.jsonl",
        "PLACE",
        "PLACE/a.jsonl/b.jsonl",
        "\0.jsonl",
    ],
)
def test_whatever_a_file_system_raises_is_one_line(tmp_path: Path, source: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(ROWS)
    (tmp_path / "deflated.zip").write_bytes(ARCHIVES["deflated.zip"])
    with refused(ConfigurationError, "dataset.source", says="cannot be read: "):
        read_input("dataset.source", source.replace("PLACE", str(tmp_path)))


EXPIRED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>CODE</Code><Message>What S3 says of it.</Message>'
    b"<RequestId>1</RequestId></Error>"
)


class _Refusing(http.server.BaseHTTPRequestHandler):
    """Refuses as the path says: /401/..., /cut/... breaks off, /ExpiredToken/... is S3's 400 with that code."""

    def do_GET(self) -> None:
        _, first, *_ = self.path.split("?")[0].split("/")
        if first == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(ROWS)))
            self.end_headers()
            self.wfile.write(ROWS[: len(ROWS) // 2])
            self.close_connection = True
            return
        # To HEAD nothing is said but the status.
        says = b"" if self.command == "HEAD" else EXPIRED.replace(b"CODE", first.encode())
        status = int(first) if first.isdigit() else 403 if first in ("AccessDenied", "InvalidAccessKeyId") else 400
        self.send_response(status)
        self.send_header("Content-Length", str(len(says)))
        self.end_headers()
        self.wfile.write(says)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def refusing() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class _OnIPv6(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


class _Giving(_Refusing):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(ROWS)))
        self.end_headers()
        self.wfile.write(ROWS)


def test_the_address_of_a_host_in_brackets_is_no_chain() -> None:
    with refused(ConfigurationError, "dataset.source", says="cannot be read: nothing answers there"):
        read_input("dataset.source", "http://[::1]:9/x.jsonl")
    try:
        server = _OnIPv6(("::1", 0), _Giving)
    except OSError:
        pytest.skip("no IPv6 on this machine")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert read_input("dataset.source", f"http://[::1]:{server.server_port}/x.jsonl") == ROWS
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (
            "401/x",
            "the server says 401 Unauthorized: it needs credentials, or those in the address are wrong or have ex",
        ),
        (
            "403/x",
            "the server says 403 Forbidden: it needs credentials, or those in the address are wrong or have expired",
        ),
        ("410/x", "the server says 410 Gone"),
        ("404/x", "no such file"),
        ("cut/x", "damaged or cut short: "),
    ],
)
def test_a_server_that_refuses_or_breaks_off_is_told_with_its_reason(refusing: str, path: str, reason: str) -> None:
    for query in ("", "?signature=secret"):
        with refused(PromptError, "dataset.source", says="cannot be read: ") as caught:
            load_prompts(f"{refusing}/{path}/a.jsonl{query}")
        assert caught.value.value == f"{refusing}/{path}/a.jsonl"
        assert "secret" not in str(caught.value)
        assert query or reason in str(caught.value)
        assert reason.split(":")[0] in str(caught.value) or path.startswith("cut")
    # Also where a file need not be there: what refuses to say is no file that is not there.
    if path == "404/x":
        assert read_if_there("dataset.source", f"{refusing}/{path}/a.jsonl") is None
        return
    with refused(PromptError, "dataset.source", says="cannot be read: "):
        load_tasks(DatasetConfig(source=f"{refusing}/{path}", task="agnews"))
    with refused(PromptError, "dataset.templates", says="cannot be read: "):
        templates_of(TASKS["agnews"], f"{refusing}/{path}")


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("ExpiredToken", "the credentials in the environment are of a session that is over or another's: renew them"),
        ("TokenRefreshRequired", "renew them"),
        ("InvalidToken", "AWS_SESSION_TOKEN does not belong to the keys in the environment"),
        ("InvalidAccessKeyId", "AWS_ACCESS_KEY_ID is unknown there"),
        ("AccessDenied", "the key in the environment may not read it"),
    ],
)
def test_credentials_that_s3_refuses_are_named(
    refusing: str, monkeypatch: pytest.MonkeyPatch, code: str, advice: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", refusing)
    with acting_as(Keys("a", "b")):
        monkeypatch.setenv("AWS_SESSION_TOKEN", "c")
        told = f"cannot be read: {code}: What S3 says of it: .*{advice}"
        with refused(PromptError, "dataset.source", f"s3://{code}/x/a.jsonl", says=told):
            load_prompts(f"s3://{code}/x/a.jsonl")
        with refused(PromptError, "dataset.source", says=told):
            load_tasks(DatasetConfig(source=f"s3://{code}/x", task="agnews"))
        with refused(ConfigurationError, "neurons.list", f"s3://{code}/x/n.csv", says=told):
            with_list_read(NeuronsConfig(choose="list", list=f"s3://{code}/x/n.csv"))


@pytest.mark.parametrize("code", ["ExpiredToken", "TokenRefreshRequired", "InvalidToken", "PermanentRedirect"])
def test_what_s3_refuses_is_told_through_a_chain_and_of_results_too(
    refusing: str, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    advice = {"InvalidToken": "AWS_SESSION_TOKEN", "PermanentRedirect": "AWS_DEFAULT_REGION"}.get(code, "renew them")
    monkeypatch.setenv("AWS_ENDPOINT_URL", refusing)
    with acting_as(Keys("a", "b")):
        monkeypatch.setenv("AWS_SESSION_TOKEN", "c")
        for chain in (f"zip://a.jsonl::s3://{code}/x.zip", f"simplecache::s3://{code}/a.jsonl"):
            told = f"{code}: What S3 says of it: .*{advice}.*AWS_ENDPOINT_URL"
            with refused(PromptError, "dataset.source", chain, says=told):
                load_prompts(chain)
        with refused(DestinationError, "run", f"s3://{code}/r", says=f"{code}: What S3 says of it: .*{advice}"):
            neg_service.open_run(f"s3://{code}/r")


def test_a_bucket_of_another_region_is_told_where_the_client_goes_round_and_round() -> None:
    lost = HTTPClientError(error=RecursionError("maximum recursion depth exceeded"))
    assert "AWS_DEFAULT_REGION" in str(advice_of(lost))


class _Raising(AbstractFileSystem):
    """A file system of a library that nobody knows here."""

    protocol = "raising"
    raised: Exception

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        raise self.raised


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (type("Strange", (Exception,), {})("it went wrong\nbadly"), "it went wrong"),
        (type("ConnectError", (Exception,), {})("All attempts failed"), "nothing answers there"),
        (ConnectionRefusedError(111, "Connection refused"), "nothing answers there"),
        (socket.gaierror(-2, "Name or service not known"), "nothing answers there"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset"),
        (ssl.SSLCertVerificationError("certificate verify failed"), "certificate verify failed"),
        (type("Invalid", (Exception,), {})("Validation failed:\nname: [a"), r"Validation failed: name: \[a"),
        (TypeError("None has no startswith"), r"fsspec cannot open it \(TypeError: None has no startswith\)"),
    ],
)
def test_whatever_a_library_raises_is_told(problem: Exception, reason: str) -> None:
    fsspec.register_implementation("raising", _Raising, clobber=True)
    _Raising.raised = problem
    for read in (read_input, read_if_there):
        with refused(PromptError, "dataset.source", "raising://a.jsonl", says=f"cannot be read: .*{reason}"):
            read("dataset.source", "raising://a.jsonl", PromptError)


def test_an_archive_with_two_files_of_one_name_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("in/a.jsonl", b"1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("in/a.jsonl", b"2")
    with refused(PromptError, "dataset.source", says=r"has two files 'in/a\.jsonl'; names must differ"):
        load_prompts(f"zip://in/a.jsonl::{tmp_path}/x.zip")


def test_hidden_files_are_no_parts_of_a_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"layer": [1], "neuron": [2]}), tmp_path / "a.parquet")
    (tmp_path / "._a.parquet").write_bytes(b"of another system")
    assert with_list_read(NeuronsConfig(choose="list", list=str(tmp_path))).list.tolist() == [[1, 2]]


ODD = ("results[1]", "a*b", "what?", "{x}", "[!a]", "a b", "ä")


@pytest.mark.parametrize("name", ODD)
def test_a_folder_of_any_name_is_a_list_of_its_own_parts_alone(tmp_path: Path, name: str) -> None:
    # What the name would match, were it a pattern.
    for other in ("results1", "axb", "whatx", "x", "b"):
        (tmp_path / other / "sweep").mkdir(parents=True)
        pq.write_table(pa.table({"layer": [9], "neuron": [9]}), tmp_path / other / "sweep/shard-000000.parquet")
    place = tmp_path / name / "sweep"
    place.mkdir(parents=True)
    for shard in range(2):
        table = pa.table({"layer": [2], "neuron": [shard]})
        (place / f"shard-{shard:06d}.parquet").write_bytes(encode_part("sweep", table, "f", shard))
    (place / "note.txt").write_text("no part")
    (place / "folder.parquet").mkdir()
    for uri in (str(place), f"{place}/"):
        assert with_list_read(NeuronsConfig(choose="list", list=uri)).list.tolist() == [[2, 0], [2, 1]]
    (place / "n.csv").write_text("layer,neuron\n1,2\n")
    assert with_list_read(NeuronsConfig(choose="list", list=str(place / "n.csv"))).list.tolist() == [[1, 2]]
    (place / "a.jsonl").write_bytes(ROWS)
    assert len(load_prompts(str(place / "a.jsonl"))) == 300


def test_a_damaged_part_among_results_is_named_wherever_a_bit_flips(tmp_path: Path) -> None:
    content = encode_part("sweep", pa.table({"layer": [2, 1], "neuron": [3, 4]}), "f", 0)
    part = tmp_path / "shard-000000.parquet"
    named = 0
    for at in range(4, len(content), 3):
        part.write_bytes(_flipped(content, at))
        try:
            found = with_list_read(NeuronsConfig(choose="list", list=str(tmp_path))).list
        except NegServiceError as error:
            named += f"neurons.list={part}" in str(error)
            continue
        raise AssertionError(f"byte {at} makes it {found}")
    assert named == len(range(4, len(content), 3))
    # What somebody made of a part has its words in the footer, and a sum that is not its own.
    part.write_bytes(content)
    pq.write_table(pq.read_table(part).slice(0, 1), tmp_path / "mine.parquet")
    assert with_list_read(NeuronsConfig(choose="list", list=str(tmp_path / "mine.parquet"))).list.tolist() == [[1, 4]]


def test_parts_are_fetched_one_after_the_other(tmp_path: Path) -> None:
    for i in range(3):
        pq.write_table(pa.table({"layer": [i], "neuron": [i]}), tmp_path / f"{i}.parquet")
    parts = parts_of_input("neurons.list", str(tmp_path))
    assert next(parts)[0].endswith("0.parquet")
    (tmp_path / "1.parquet").unlink()
    with refused(ConfigurationError, "neurons.list", says="cannot be read: no such file"):
        next(parts)


def test_a_file_in_memory_is_read() -> None:
    with fsspec.open("memory://a.jsonl", "wb") as file:
        file.write(ROWS)
    assert len(load_prompts("memory://a.jsonl")) == 300

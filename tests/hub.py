"""A hub with one data set, on this machine: as much of its interface as is asked for when a data set is read."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"
NAME = "owner/facts"


@contextmanager
def hub(files: Mapping[str, bytes], revisions: tuple[str, ...] = ("main", COMMIT)) -> Iterator[str]:
    """Serves `files` as the data set NAME at each revision; gives the address, for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(has_body=False)

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer(parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()))

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

        def _answer(self, form: Mapping[str, list[str]] | None = None, has_body: bool = True) -> None:
            asked = urlsplit(self.path)
            form = {**parse_qs(asked.query), **(form or {})}
            status, headers, body = _reply(unquote(asked.path), form, files, revisions)
            if (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and status == 200:
                start, stop = int(span[1]), int(span[2] or len(body) - 1) + 1
                headers["Content-Range"] = f"bytes {start}-{min(stop, len(body)) - 1}/{len(body)}"
                status, body = 206, body[start:stop]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if has_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _reply(
    path: str, form: Mapping[str, list[str]], files: Mapping[str, bytes], revisions: tuple[str, ...]
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    found = re.fullmatch(rf"(?:/api)?/datasets/{NAME}(?:/([a-z-]+)/([^/]+)(?:/(.*))?)?", path)
    if found is None:
        return 404, {"X-Error-Code": "RepoNotFound"}, b""
    what, revision, name = found.groups()
    if revision is not None and revision not in revisions:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b""
    if what == "resolve":
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        tag = hashlib.sha1(files[name], usedforsecurity=False).hexdigest()
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}, files[name]
    if what in ("tree", "paths-info"):
        is_whole = form.get("recursive", [""])[0].lower() == "true"
        wanted = form["paths"] if what == "paths-info" else list(files) if is_whole else _within(name or "", files)
        listed = [
            {"type": "file", "path": one, "size": len(files[one]), "oid": "0" * 40}
            if one in files
            else {"type": "directory", "path": one, "oid": "0" * 40}
            for one in wanted
        ]
        return 200, {}, json.dumps(listed).encode()
    siblings = [{"rfilename": one} for one in files]
    return 200, {}, json.dumps({"id": NAME, "sha": COMMIT, "private": False, "siblings": siblings}).encode()


def _within(folder: str, files: Mapping[str, bytes]) -> list[str]:
    """What lies in a folder: files, and the folders of others."""
    start = f"{folder}/" if folder else ""
    return sorted({start + one.removeprefix(start).partition("/")[0] for one in files if one.startswith(start)})

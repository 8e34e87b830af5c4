"""Downloads that break: against a small HTTP server that cuts, counts and changes its object. Real HTTP, real client."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from perch_exporter import ranges
from perch_exporter.contract import Location, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.store import Credentials, Store, open_store

PART = 2**18
CONTENT = np.random.default_rng(0).bytes(5 * PART + 1234)


@dataclass
class Source:
    content: bytes = CONTENT
    etag: str = '"one"'
    cuts: int = 0
    """So many answers end after 100,000 bytes, whatever they promised."""
    dead: bool = False
    """Every answer with a range ends before its first byte."""
    ranges: bool = True
    """Else the whole object comes, whatever part is asked for."""
    sent: int = 0
    refused: list[str] = field(default_factory=list)
    port: int = 0


class Handler(http.server.BaseHTTPRequestHandler):
    source: Source
    lock = threading.Lock()

    def do_GET(self) -> None:
        source = self.source
        if (wanted := self.headers.get("If-Match")) and wanted != source.etag:
            source.refused.append(wanted)
            self._head(412, 0)
            return
        ranged = self.headers.get("Range") if source.ranges else None
        first, last = (int(end) for end in ranged.removeprefix("bytes=").split("-")) if ranged else (0, len(source.content) - 1)
        body = source.content[first : last + 1]
        self._head(206 if ranged else 200, len(body))
        if not self.headers.get("Range"):
            return  # a client that wants the size alone
        with self.lock:
            if source.dead:
                body = b""
            elif source.cuts:
                source.cuts -= 1
                body = body[:100_000]
            source.sent += len(body)
        self.wfile.write(body)

    def _head(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", self.source.etag)
        self.end_headers()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    monkeypatch.setattr(ranges, "PART", PART)
    monkeypatch.setattr(ranges, "_FIRST_DELAY_SECONDS", 0.0)
    made = Source()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"source": made}))
    made.port = server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made
    server.shutdown()
    server.server_close()


def store(source: Source) -> Store:
    place = Location(uri="s3://checkpoints", endpoint=f"http://127.0.0.1:{source.port}")
    return open_store(place, Credentials("X", "key", "secret"))


def test_an_object_comes_whole_however_often_the_connection_breaks(source: Source, tmp_path: Path) -> None:
    source.cuts = 9
    store(source).download("v1.pt", tmp_path / "v1.pt", len(CONTENT))
    assert (tmp_path / "v1.pt").read_bytes() == CONTENT
    assert source.sent == len(CONTENT), "no byte came twice"
    assert [path.name for path in tmp_path.iterdir()] == ["v1.pt"]


def test_a_later_attempt_brings_what_is_missing_alone(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_AT_ONCE", 1)
    broken = _break_after(source, 3, tmp_path)
    source.dead = False
    store(source).download("v1.pt", tmp_path / "v1.pt", len(CONTENT))
    assert (tmp_path / "v1.pt").read_bytes() == CONTENT
    assert source.sent == len(CONTENT) - broken
    assert broken == 3 * PART


def test_an_object_that_changed_meanwhile_is_brought_from_its_beginning(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_AT_ONCE", 1)
    _break_after(source, 3, tmp_path)
    source.dead, source.content, source.etag = False, CONTENT[::-1], '"two"'
    store(source).download("v1.pt", tmp_path / "v1.pt", len(CONTENT))
    assert (tmp_path / "v1.pt").read_bytes() == CONTENT[::-1]


def _break_after(source: Source, parts: int, folder: Path) -> int:
    """Lets so many parts come and no more; how many bytes are done then. What was sent is counted anew."""
    served, original = 0, Handler._head

    def head(self: Handler, status: int, length: int) -> None:
        nonlocal served
        served += status == 206
        source.dead = served > parts
        original(self, status, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "_head", head)
        with pytest.raises(StepFailed) as caught:
            store(source).download("v1.pt", folder / "v1.pt", len(CONTENT))
    assert caught.value.reason is Reason.STORE_UNREACHABLE
    assert not (folder / "v1.pt").exists()
    done, source.sent = source.sent, 0
    return done


def test_an_object_that_changes_while_it_is_read_is_no_mixture(source: Source, tmp_path: Path) -> None:
    original = Handler._head

    def head(self: Handler, status: int, length: int) -> None:
        original(self, status, length)
        self.source.etag = '"two"'

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "_head", head)
        with pytest.raises(StepFailed, match="the object changed while it was read") as caught:
            store(source).download("v1.pt", tmp_path / "v1.pt", len(CONTENT))
    assert caught.value.reason is Reason.STORE_REFUSED
    assert caught.value.reason.retryable
    assert not (tmp_path / "v1.pt").exists()


@pytest.mark.parametrize("record", ["", "{}", "[]", '{"etag": 3}', '{"etag": "\\"one\\"", "size": 1, "part": 1, "done": [0]}'])
def test_a_record_that_makes_no_sense_is_none(record: str, source: Source, tmp_path: Path) -> None:
    (tmp_path / "v1.pt.partial").write_bytes(b"x" * len(CONTENT))
    (tmp_path / "v1.pt.partial.json").write_text(record)
    store(source).download("v1.pt", tmp_path / "v1.pt", len(CONTENT))
    assert (tmp_path / "v1.pt").read_bytes() == CONTENT


def test_an_empty_object_is_a_file_too(source: Source, tmp_path: Path) -> None:
    source.content = b""
    store(source).download("v1.pt", tmp_path / "v1.pt", 1)
    assert (tmp_path / "v1.pt").read_bytes() == b""


def test_a_larger_object_than_allowed_is_refused_before_a_byte_is_written(source: Source, tmp_path: Path) -> None:
    with pytest.raises(StepFailed) as caught:
        store(source).download("v1.pt", tmp_path / "v1.pt", len(CONTENT) - 1)
    assert caught.value.reason is Reason.OBJECT_TOO_LARGE
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_knows_no_ranges_is_told_from_one_that_sends_other_bytes(source: Source, tmp_path: Path) -> None:
    source.ranges = False
    with pytest.raises(StepFailed, match="does not answer with the range asked for"):
        store(source).download("v1.pt", tmp_path / "v1.pt", len(CONTENT))
    assert not (tmp_path / "v1.pt").exists()

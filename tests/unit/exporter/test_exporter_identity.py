"""Credentials that end: a session token in a Secret, and a pod's identity that is changed for credentials at STS.

The stand-in speaks as much of STS and S3 as one download needs: it checks no signature, and knows one object. What EKS' webhook
gives a container (AWS_ROLE_ARN, a token file) is set by the test; the real webhook has not been tried. GKE and Azure have their
own for stores of their own, which Perch does not speak.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from perch_exporter.contract import Location, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.store import checkpoint_credentials, open_store, repository_credentials

CONTENT = b"an object"
ROLE = "arn:aws:iam::123456789012:role/perch"
ANSWER = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult>
<Credentials><AccessKeyId>ASIA{number}</AccessKeyId><SecretAccessKey>secret</SecretAccessKey><SessionToken>session-{number}</SessionToken>
<Expiration>{ends}</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""

REFUSAL = b"""<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>AccessDenied</Code>
<Message>Not authorized to perform sts:AssumeRoleWithWebIdentity</Message></Error></ErrorResponse>"""


@dataclass
class Cloud:
    url: str = ""
    lasts: timedelta = timedelta(hours=1)
    """How long the credentials are good that STS gives."""
    refuses: bool = False
    roles: list[tuple[str, str]] = field(default_factory=list)
    """Role and token of each call of STS."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Access key and session token of each call of S3."""


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    found = Cloud()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            assert form["Action"] == ["AssumeRoleWithWebIdentity"]
            found.roles.append((form["RoleArn"][0], form["WebIdentityToken"][0]))
            if found.refuses:
                self._answer(REFUSAL, "text/xml", 403)
                return
            ends = (datetime.now(UTC) + found.lasts).strftime("%Y-%m-%dT%H:%M:%SZ")
            self._answer(ANSWER.format(number=len(found.roles), ends=ends).encode(), "text/xml")

        def do_GET(self) -> None:
            key = self.headers["Authorization"].partition("Credential=")[2].partition("/")[0]
            found.asked.append((key, self.headers.get("X-Amz-Security-Token", "")))
            self._answer(CONTENT, "application/octet-stream")

        def _answer(self, body: bytes, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", found.url)
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def token(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the webhook mounts."""
    path = tmp_path / "token"
    path.write_text("first")
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(path))
    return path


def location(cloud: Cloud) -> Location:
    return Location(uri="s3://models/prod", endpoint=cloud.url, region="eu-central-1")


def test_a_pods_identity_is_changed_for_credentials(cloud: Cloud, token: Path) -> None:
    store = open_store(location(cloud), repository_credentials({}))
    assert store.read("manifest.json", 100) == CONTENT
    assert cloud.roles == [(ROLE, "first")]
    assert cloud.asked == [("ASIA1", "session-1")]


def test_credentials_that_end_are_renewed_with_the_token_of_that_time(cloud: Cloud, token: Path) -> None:
    cloud.lasts = timedelta(minutes=1)  # less than the library's reserve: renewed before each use
    store = open_store(location(cloud), repository_credentials({}))
    assert store.read("manifest.json", 100) == CONTENT
    token.write_text("second")
    assert store.read("manifest.json", 100) == CONTENT
    assert cloud.roles[0] == (ROLE, "first")
    assert cloud.roles[-1] == (ROLE, "second")
    assert cloud.asked[-1] == (f"ASIA{len(cloud.roles)}", f"session-{len(cloud.roles)}")


@pytest.mark.parametrize("prefix", ["AWS_", "CHECKPOINT_AWS_"])
def test_a_session_token_of_a_secret_goes_along(cloud: Cloud, prefix: str) -> None:
    names = {"ACCESS_KEY_ID": "ASIAOWN", "SECRET_ACCESS_KEY": "s", "SESSION_TOKEN": "for an hour"}
    given = {f"{prefix}{name}": value for name, value in names.items()}
    store = open_store(location(cloud), checkpoint_credentials(given))
    assert store.read("v1.pt", 100) == CONTENT
    assert cloud.asked == [("ASIAOWN", "for an hour")]
    assert cloud.roles == []


def test_a_checkpoints_own_key_comes_before_the_pods_identity(cloud: Cloud, token: Path) -> None:
    own = {"CHECKPOINT_AWS_ACCESS_KEY_ID": "AKIAOWN", "CHECKPOINT_AWS_SECRET_ACCESS_KEY": "s"}
    assert open_store(location(cloud), checkpoint_credentials(own)).read("v1.pt", 100) == CONTENT
    assert open_store(location(cloud), repository_credentials(own)).read("manifest.json", 100) == CONTENT
    assert cloud.asked == [("AKIAOWN", ""), ("ASIA1", "session-1")]


def test_an_identity_that_gets_no_credentials_says_what_to_check(cloud: Cloud, token: Path) -> None:
    cloud.refuses = True
    with pytest.raises(StepFailed, match=r"STS gave .* no credentials .*AccessDenied \(403\).*whether the role trusts") as caught:
        open_store(location(cloud), repository_credentials({})).read("manifest.json", 100)
    assert caught.value.reason is Reason.ACCESS_DENIED
    assert cloud.asked == []


def test_an_identity_without_its_token_is_told_from_a_crash(cloud: Cloud, token: Path) -> None:
    token.unlink()
    with pytest.raises(StepFailed, match="No such file") as caught:
        open_store(location(cloud), repository_credentials({})).read("manifest.json", 100)
    assert caught.value.reason is Reason.ACCESS_DENIED
    assert str(token) in caught.value.message

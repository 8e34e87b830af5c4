"""The object store's errors as typed failures.

S3 answers come from botocore's Stubber: this proves the mapping and the words. TLS is a real server's; signing, real HTTP,
retries and multipart are for tests/e2e/test_store.py, against a real S3 server.
"""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import (
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    SSLError,
)
from botocore.stub import Stubber

from devcluster.certificates import Authority
from perch_exporter.contract import Location, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.store import (
    Credentials,
    FileStore,
    S3Store,
    checkpoint_credentials,
    open_object,
    open_store,
    reason_of,
    repository_credentials,
)

SECRET = "wJalr-this-must-never-be-shown"
ENDPOINT = "http://s3.storage:9000"


@pytest.fixture
def store() -> S3Store:
    keys = Credentials("AWS_ACCESS_KEY_ID", "AKIAPERCH", SECRET)
    opened = open_store(Location(uri="s3://models/prod", endpoint=ENDPOINT, region="eu-west-1"), keys)
    assert isinstance(opened, S3Store)
    return opened


@pytest.mark.parametrize(
    ("code", "status", "reason", "hint"),
    [
        ("NoSuchBucket", 404, Reason.BUCKET_NOT_FOUND, "create the bucket"),
        ("NoSuchKey", 404, Reason.OBJECT_NOT_FOUND, "upload the object"),
        ("404", 404, Reason.STORE_REFUSED, "an S3 server"),
        ("XAdminUserNotFound", 404, Reason.ACCESS_DENIED, "Secret"),
        ("AccessDenied", 403, Reason.ACCESS_DENIED, "Secret"),
        ("InvalidAccessKeyId", 403, Reason.ACCESS_DENIED, "Secret"),
        ("SignatureDoesNotMatch", 403, Reason.ACCESS_DENIED, "Secret"),
        ("403", 403, Reason.ACCESS_DENIED, "Secret"),
        ("ExpiredToken", 400, Reason.ACCESS_DENIED, "Secret"),
        ("PermanentRedirect", 301, Reason.STORE_REFUSED, "region"),
        ("AuthorizationHeaderMalformed", 400, Reason.STORE_REFUSED, "region"),
        ("InternalError", 500, Reason.STORE_UNREACHABLE, ""),
        ("SlowDown", 503, Reason.STORE_UNREACHABLE, ""),
        ("RequestTimeout", 408, Reason.STORE_UNREACHABLE, ""),
        ("QuotaExceeded", 400, Reason.STORE_REFUSED, ""),
    ],
)
def test_s3_error_codes_have_reasons(code: str, status: int, reason: Reason, hint: str) -> None:
    assert reason_of(code, status)[0] is reason
    assert hint in reason_of(code, status)[1]


CALLS: list[tuple[str, Callable[[S3Store], object]]] = [
    ("list_objects_v2", lambda store: store.sizes()),
    ("get_object", lambda store: store.read("manifest.json", 10)),
    ("get_object", lambda store: store.download("v1.pt", Path("/nonexistent/x"), 10)),
    ("put_object", lambda store: store.write("manifest.json", b"x")),
    ("delete_object", lambda store: store.delete(["manifest.json"])),
]


@pytest.mark.parametrize(("operation", "call"), CALLS)
def test_every_call_names_bucket_endpoint_credential_and_code_but_never_the_secret(
    operation: str, call: Callable[[S3Store], object], store: S3Store
) -> None:
    with Stubber(store._client) as stubber:
        stubber.add_client_error(operation, "AccessDenied", "no right", 403)
        with pytest.raises(StepFailed) as caught:
            call(store)
    assert caught.value.reason is Reason.ACCESS_DENIED
    for part in ("s3://models/prod/", ENDPOINT, "AKIAPERCH", "AWS_ACCESS_KEY_ID", "AccessDenied", "403", "no right"):
        assert part in caught.value.message
    assert SECRET not in caught.value.message


def test_a_missing_object_is_none_but_a_missing_bucket_is_an_error(store: S3Store) -> None:
    with Stubber(store._client) as stubber:
        stubber.add_client_error("get_object", "NoSuchKey", "", 404)
        assert store.read("manifest.json", 10) is None
        stubber.add_client_error("get_object", "NoSuchBucket", "", 404)
        with pytest.raises(StepFailed, match="BucketNotFound"):
            store.read("manifest.json", 10)


@pytest.mark.parametrize("code", ["404", "XAdminUserNotFound"])
def test_a_404_that_is_not_about_the_object_is_never_taken_for_a_missing_manifest(code: str, store: S3Store) -> None:
    """A web server at a mistyped endpoint, or an unknown access key: publishing again on its word would overwrite."""
    with Stubber(store._client) as stubber:
        stubber.add_client_error("get_object", code, "", 404)
        with pytest.raises(StepFailed):
            store.read("manifest.json", 10)


def _raise(error: Exception) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EndpointConnectionError(endpoint_url=ENDPOINT), Reason.STORE_UNREACHABLE),
        (ConnectTimeoutError(endpoint_url=ENDPOINT), Reason.STORE_UNREACHABLE),
        (SSLError(endpoint_url=ENDPOINT, error="self-signed"), Reason.STORE_UNREACHABLE),
        (NoCredentialsError(), Reason.ACCESS_DENIED),
        (ParamValidationError(report="bad bucket"), Reason.INVALID_REQUEST),
    ],
)
def test_errors_before_any_answer_are_typed_too(
    error: Exception, reason: Reason, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store._client, "put_object", _raise(error))
    with pytest.raises(StepFailed) as caught:
        store.write("x", b"")
    assert caught.value.reason is reason


def test_keys_are_relative_to_the_prefix_and_pages_are_followed(store: S3Store) -> None:
    with Stubber(store._client) as stubber:
        first = {"Contents": [{"Key": "prod/a", "Size": 1}], "IsTruncated": True, "NextContinuationToken": "more"}
        stubber.add_response("list_objects_v2", first, {"Bucket": "models", "Prefix": "prod/"})
        stubber.add_response("list_objects_v2", {"Contents": [{"Key": "prod/b/c", "Size": 2}], "IsTruncated": False})
        assert store.sizes() == {"a": 1, "b/c": 2}


def test_the_client_is_bounded_in_time_and_tries(store: S3Store) -> None:
    config = store._client.meta.config
    assert (config.connect_timeout, config.read_timeout) == (5, 60)
    assert config.retries == {"total_max_attempts": 4, "mode": "standard"}
    assert config.s3["addressing_style"] == "path"
    assert store._client.meta.region_name == "eu-west-1"


def test_the_checkpoint_has_credentials_of_its_own_only_where_they_are_given() -> None:
    both = {"AWS_ACCESS_KEY_ID": "repo", "CHECKPOINT_AWS_ACCESS_KEY_ID": "own", "CHECKPOINT_AWS_SECRET_ACCESS_KEY": "s"}
    assert checkpoint_credentials(both) == Credentials("CHECKPOINT_AWS_ACCESS_KEY_ID", "own", "s")
    assert repository_credentials(both).access_key_id == "repo"
    assert checkpoint_credentials({"AWS_ACCESS_KEY_ID": "repo"}).access_key_id == "repo"


def test_a_checkpoint_is_opened_in_its_own_folder() -> None:
    opened, key = open_object(Location(uri="s3://checkpoints/digits/v1.pt", endpoint=ENDPOINT), Credentials("X", "a", "b"))
    assert key == "v1.pt"
    assert opened.where(key).startswith("s3://checkpoints/digits/v1.pt at http://s3.storage:9000 with access key a")
    opened, key = open_object(Location(uri="s3://checkpoints/v1.pt"), Credentials("X", "a", "b"))
    assert opened.where(key).startswith("s3://checkpoints/v1.pt at AWS S3 in ")


def test_a_folder_store_bounds_what_it_reads_and_copies(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.write("deep/down/x", b"12345")
    assert store.sizes() == {"deep/down/x": 5}
    assert store.read("deep/down/x", 5) == b"12345"
    assert store.read("nothing", 5) is None
    with pytest.raises(StepFailed, match="ArtifactCorrupt"):
        store.read("deep/down/x", 4)
    with pytest.raises(StepFailed, match="ObjectTooLarge"):
        store.download("deep/down/x", tmp_path / "copy", 4)
    assert not (tmp_path / "copy").exists()
    with pytest.raises(StepFailed, match="ObjectNotFound"):
        store.download("nothing", tmp_path / "copy", 4)
    store.delete(["deep/down/x", "nothing"])
    assert list(tmp_path.iterdir()) == []


def test_an_object_larger_than_its_bound_is_refused_before_a_byte_is_written(store: S3Store, tmp_path: Path) -> None:
    import io

    from botocore.response import StreamingBody

    with Stubber(store._client) as stubber:
        body = StreamingBody(io.BytesIO(b""), 0)
        stubber.add_response("get_object", {"Body": body, "ContentLength": 21 * 2**30})
        with pytest.raises(StepFailed, match=r"ObjectTooLarge.*22,548,578,304 bytes"):
            store.download("v1.pt", tmp_path / "x", 20 * 2**30)
    assert not (tmp_path / "x").exists()


class Answering(http.server.BaseHTTPRequestHandler):
    """Has every object that it is asked for."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def private(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server whose certificate is of an authority that no machine knows: its address, and the authority's bundle."""
    authority = Authority(tmp_path / "pki")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.server("store", ["127.0.0.1"]))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_address[1]}", authority.certificate
    server.shutdown()
    server.server_close()


def test_a_store_of_a_private_authority_is_trusted_with_its_bundle_and_not_without(
    private: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, bundle = private
    where, keys = Location(uri="s3://models/prod", endpoint=endpoint), Credentials("AWS_ACCESS_KEY_ID", "a", "b")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    assert open_store(where, keys).read("manifest.json", 2) == b"{}"

    monkeypatch.delenv("AWS_CA_BUNDLE")
    with pytest.raises(StepFailed, match="CERTIFICATE_VERIFY_FAILED") as caught:
        open_store(where, keys).read("manifest.json", 2)
    assert caught.value.reason is Reason.STORE_UNREACHABLE

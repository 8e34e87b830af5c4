"""Object stores: S3 by boto3, and plain folders (`file://`) for laptops. The only module that talks to either.

A store is opened at a prefix and its keys are relative to it. Every error of the store becomes a StepFailed that names
the object, the endpoint, the credential's public half and the store's own error code, since "Access Denied" alone has
cost users of every serving system hours. No conditional writes are assumed: not every S3 server has them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from perch_exporter import ranges
from perch_exporter.contract import Location, Reason
from perch_exporter.failure import StepFailed

log = logging.getLogger(__name__)

_MIB = 2**20
_TRANSFER = TransferConfig(multipart_threshold=16 * _MIB, multipart_chunksize=16 * _MIB, max_concurrency=4)
_PROGRESS_EVERY_SECONDS = 10.0
_TOKEN_FILE = "AWS_WEB_IDENTITY_TOKEN_FILE"  # noqa: S105  # a name

# The last one is what versitygw says, with status 404, to an access key that it does not know.
_DENIED_CODES = {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "XAdminUserNotFound"}
_BREAKS = (HTTPClientError, IncompleteReadError)
_REGION_CODES = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}


class Store(Protocol):
    """A prefix of an object store. What is missing is None or absent in answers to questions, and raises elsewhere."""

    def where(self, key: str = "") -> str:
        """For messages: the object and, for S3, the endpoint and the credential."""

    def sizes(self) -> dict[str, int]:
        """Every key below the prefix, with its size in bytes."""

    def read(self, key: str, limit: int) -> bytes | None:
        """A small object whole; raises ArtifactCorrupt where it has more than `limit` bytes."""

    def download(self, key: str, target: Path, limit: int) -> None:
        """Raises ObjectTooLarge, before a byte is written, where the object has more than `limit` bytes.

        Goes on where an earlier attempt at the same target broke off, if the object is still the same.
        """

    def upload(self, source: Path, key: str) -> None: ...

    def write(self, key: str, content: bytes) -> None: ...

    def delete(self, keys: Iterable[str]) -> None: ...


@dataclass(frozen=True)
class Credentials:
    """Static keys and the environment variable they came from; without keys the library's own chain is asked."""

    source: str
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None


def repository_credentials(environment: Mapping[str, str]) -> Credentials:
    return _credentials(environment, "AWS_")


def checkpoint_credentials(environment: Mapping[str, str]) -> Credentials:
    """The checkpoint's own where it has some, else the repository's."""
    own = _credentials(environment, "CHECKPOINT_AWS_")
    return own if own.access_key_id else repository_credentials(environment)


def _credentials(environment: Mapping[str, str], prefix: str) -> Credentials:
    return Credentials(
        source=prefix + "ACCESS_KEY_ID",
        access_key_id=environment.get(prefix + "ACCESS_KEY_ID"),
        secret_access_key=environment.get(prefix + "SECRET_ACCESS_KEY"),
        session_token=environment.get(prefix + "SESSION_TOKEN"),
    )


def open_store(location: Location, credentials: Credentials) -> Store:
    parts = urlsplit(location.uri)
    if parts.scheme == "file":
        return FileStore(Path(unquote(parts.path)))
    return S3Store(parts.netloc, parts.path.strip("/"), location.endpoint, location.region, credentials)


def open_object(location: Location, credentials: Credentials) -> tuple[Store, str]:
    """The store of the object's folder, and the object's key in it."""
    folder, _, name = location.uri.rstrip("/").rpartition("/")
    return open_store(location.model_copy(update={"uri": folder}), credentials), name


class S3Store:
    def __init__(self, bucket: str, prefix: str, endpoint: str | None, region: str | None, credentials: Credentials) -> None:
        self._bucket = bucket
        self._prefix = prefix + "/" if prefix else ""
        session = boto3.Session(
            aws_access_key_id=credentials.access_key_id or None,
            aws_secret_access_key=credentials.secret_access_key or None,
            aws_session_token=credentials.session_token or None,
            region_name=region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        )
        config = Config(
            connect_timeout=5,
            read_timeout=60,
            retries={"total_max_attempts": 4, "mode": "standard"},
            # Path style where the endpoint is somebody's own: few of those have wildcard DNS.
            s3={"addressing_style": "path" if endpoint else "auto"},
            # Newer clients send checksums that older S3 servers refuse; every byte is checked by sha256 anyway.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self._endpoint = endpoint or f"AWS S3 in {session.region_name}"
        self._credential = f"access key {credentials.access_key_id} (from {credentials.source})"
        with self._typed(""):
            self._client: Any = session.client("s3", endpoint_url=endpoint, config=config)
            found = session.get_credentials()
            if found is None:
                self._credential = f"no credential ({credentials.source} is not set)"
            elif isinstance(found, RefreshableCredentials):
                # To ask for its key would ask STS for one, which may fail, and the next request may have another.
                self._credential = f"the credentials of {found.method}"
            elif not credentials.access_key_id:
                self._credential = f"access key {found.access_key} (from {found.method})"

    def where(self, key: str = "") -> str:
        return f"s3://{self._bucket}/{self._prefix}{key} at {self._endpoint} with {self._credential}"

    def sizes(self) -> dict[str, int]:
        with self._typed(""):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            return {item["Key"].removeprefix(self._prefix): item["Size"] for page in pages for item in page.get("Contents", [])}

    def read(self, key: str, limit: int) -> bytes | None:
        try:
            with self._typed(key):
                body = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)["Body"]
                with body:
                    content = body.read(limit + 1)
        except StepFailed as failure:
            if failure.reason is Reason.OBJECT_NOT_FOUND:
                return None
            raise
        return _bounded(content, limit, self.where(key))

    def download(self, key: str, target: Path, limit: int) -> None:
        full = self._prefix + key
        with self._typed(key):
            # GET, though only the size is wanted: the answer to HEAD has no body, so it cannot tell a missing bucket
            # from a missing object, nor a wrong secret from a missing right.
            answer = self._client.get_object(Bucket=self._bucket, Key=full)
            answer["Body"].close()
            size, etag = answer["ContentLength"], answer.get("ETag", "")
            _refuse_too_large(size, limit, self.where(key))
            same = {"IfMatch": etag} if etag else {}

            def read(first: int, last: int) -> Iterator[bytes]:
                asked = {"Bucket": self._bucket, "Key": full, "Range": f"bytes={first}-{last}", **same}
                answer = self._client.get_object(**asked)
                with closing(answer["Body"]) as body:
                    if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
                        raise StepFailed(Reason.STORE_REFUSED, f"{self.where(key)} does not answer with the range asked for")
                    yield from body.iter_chunks(_MIB)

            ranges.fetch(read, target, size=size, etag=etag, passing=_BREAKS, progress=_progress(f"fetched {key}", size))

    def upload(self, source: Path, key: str) -> None:
        with self._typed(key), source.open("rb") as content:
            progress = _progress(f"uploaded {key}", source.stat().st_size)
            self._client.upload_fileobj(content, self._bucket, self._prefix + key, Config=_TRANSFER, Callback=progress)

    def write(self, key: str, content: bytes) -> None:
        with self._typed(key):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=content)

    def delete(self, keys: Iterable[str]) -> None:
        # One by one: an artefact has a handful of files, and servers disagree on the bulk call's checksums.
        for key in keys:
            with self._typed(key):
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    @contextmanager
    def _typed(self, key: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise self._refusal(key, error) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise StepFailed(
                Reason.ACCESS_DENIED,
                f"no usable credential for {self.where(key)}: {error}; the Secret needs AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY",
            ) from error
        except HTTPClientError as error:
            raise StepFailed(Reason.STORE_UNREACHABLE, f"cannot reach {self.where(key)}: {error}") from error
        except (ParamValidationError, ValueError) as error:
            raise StepFailed(Reason.INVALID_REQUEST, f"not usable as an S3 address: {error}") from error
        except (BotoCoreError, Boto3Error, EOFError) as error:
            raise StepFailed(
                Reason.STORE_UNREACHABLE, f"trouble with {self.where(key)}: {type(error).__name__}: {error}"
            ) from error
        except OSError as error:
            token = os.environ.get(_TOKEN_FILE)
            if token is None or error.filename != token:
                raise
            raise StepFailed(
                Reason.ACCESS_DENIED, f"the pod's identity for {self.where(key)} cannot be read: {token}: {error.strerror}"
            ) from error

    def _refusal(self, key: str, error: ClientError) -> StepFailed:
        code = str(error.response.get("Error", {}).get("Code", "unknown"))
        words = str(error.response.get("Error", {}).get("Message", "no message")).rstrip(".")
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if error.operation_name == "AssumeRoleWithWebIdentity":
            return StepFailed(
                Reason.ACCESS_DENIED,
                f"STS gave the pod's identity no credentials for {self.where(key)}: it answered {code} ({status}): {words}; "
                "check the role that the ServiceAccount names, and whether the role trusts this ServiceAccount",
            )
        reason, hint = reason_of(code, status)
        return StepFailed(reason, f"{self.where(key)} answered {code} ({status}): {words}{hint}")


def reason_of(code: str, status: int) -> tuple[Reason, str]:
    """The contract's reason for an S3 error code and HTTP status, and what to add to the store's own words."""
    if code == "NoSuchBucket":
        return Reason.BUCKET_NOT_FOUND, "; create the bucket or correct the URI"
    if code == "NoSuchKey":
        return Reason.OBJECT_NOT_FOUND, "; upload the object or correct the URI"
    if code in _DENIED_CODES or status in (401, 403):
        return Reason.ACCESS_DENIED, "; check the credential's Secret and its rights on the bucket"
    if code == "PreconditionFailed" or status == 412:
        return Reason.STORE_REFUSED, "; the object changed while it was read"
    if code in _REGION_CODES:
        return Reason.STORE_REFUSED, "; the bucket lies in another region: set `region`"
    if status == 404:
        # Not "missing": a proxy or a web server says 404 too, and a manifest taken for missing would be written again.
        return Reason.STORE_REFUSED, "; is the endpoint an S3 server?"
    if status >= 500 or status in (408, 429):
        return Reason.STORE_UNREACHABLE, ""
    return Reason.STORE_REFUSED, ""


class FileStore:
    """A folder. Writes go through a file beside the target, so that a reader never sees half an object."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def where(self, key: str = "") -> str:
        return (self._root / key).as_uri()

    def sizes(self) -> dict[str, int]:
        with self._typed(""):
            files = (path for path in self._root.rglob("*") if path.is_file())
            return {path.relative_to(self._root).as_posix(): path.stat().st_size for path in files}

    def read(self, key: str, limit: int) -> bytes | None:
        path = self._root / key
        with self._typed(key):
            if not path.exists():
                return None
            with path.open("rb") as file:
                content = file.read(limit + 1)
        return _bounded(content, limit, self.where(key))

    def download(self, key: str, target: Path, limit: int) -> None:
        with self._typed(key):
            source = self._root / key
            _refuse_too_large(source.stat().st_size, limit, self.where(key))
            _copy(source, target)

    def upload(self, source: Path, key: str) -> None:
        with self._typed(key):
            _copy(source, self._target(key))

    def write(self, key: str, content: bytes) -> None:
        with self._typed(key):
            target = self._target(key)
            partial = target.with_name(target.name + ".partial")
            partial.write_bytes(content)
            partial.replace(target)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._typed(key):
                (self._root / key).unlink(missing_ok=True)
        with self._typed(""):
            for folder in sorted((path for path in self._root.rglob("*") if path.is_dir()), reverse=True):
                if not any(folder.iterdir()):
                    folder.rmdir()

    def _target(self, key: str) -> Path:
        target = self._root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    @contextmanager
    def _typed(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise StepFailed(Reason.OBJECT_NOT_FOUND, f"{self.where(key)} is not there") from error
        except PermissionError as error:
            raise StepFailed(Reason.ACCESS_DENIED, f"{self.where(key)}: {error.strerror}") from error
        except OSError as error:
            raise StepFailed(Reason.STORE_REFUSED, f"{self.where(key)}: {error.strerror or error}") from error


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    with source.open("rb") as reader, partial.open("wb") as writer:
        while chunk := reader.read(4 * _MIB):
            writer.write(chunk)
    partial.replace(target)


def _bounded(content: bytes, limit: int, where: str) -> bytes:
    if len(content) > limit:
        raise StepFailed(Reason.ARTIFACT_CORRUPT, f"{where} has more than the {limit} bytes that such a file may have")
    return content


def _refuse_too_large(size: int, limit: int, where: str) -> None:
    if size > limit:
        raise StepFailed(Reason.OBJECT_TOO_LARGE, f"{where} has {size:,} bytes, more than the {limit:,} that are taken")


def _progress(what: str, total: int) -> Callable[[int], None]:
    """A line every ten seconds. Transfers call it from several threads; a line too many is no harm."""
    done, last = 0, time.monotonic()

    def callback(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last >= _PROGRESS_EVERY_SECONDS:
            last = time.monotonic()
            log.info("%s: %d of %d MiB", what, done // _MIB, total // _MIB)

    return callback

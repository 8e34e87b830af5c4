"""First step of the Job: brings what the request names and checks each sha256, before a byte of it is parsed by anything.

Stands in the slim image with the checkpoint's and the repository's credentials. It also looks whether the repository
holds this very artefact already, and then the later steps have nothing to do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from perch_exporter.artifact import published, sha256_of
from perch_exporter.contract import ExportRequest, Object, Outcome, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.store import checkpoint_credentials, open_object, open_store, repository_credentials
from perch_exporter.timings import fetch_timings
from perch_exporter.workspace import Workspace

log = logging.getLogger(__name__)


def fetch(request: ExportRequest, workspace: Workspace, environment: Mapping[str, str]) -> None:
    started = time.monotonic()
    repository = open_store(request.destination, repository_credentials(environment))
    log.info("looking for the artefact at %s", repository.where())
    if found := published(repository, request.owner, request.artifact_revision):
        workspace.write_published(found.summary(request.destination.uri, Outcome.ALREADY_PUBLISHED))
        log.info("already published as %s, nothing to do", found.digest)
        return
    bring(request, workspace, environment)
    fetch_timings(request, workspace, environment)
    workspace.write_fetch_seconds(time.monotonic() - started)


def bring(request: ExportRequest, workspace: Workspace, environment: Mapping[str, str]) -> None:
    """What the request names, without a question to the repository."""
    # Not sooner: it brings Triton's protobuf along, which what is published already need not wait for.
    from perch_exporter.model_files import check_request

    check_request(request)  # what it refuses, it refuses before minutes of work
    for name, wanted in request.objects().items():
        _fetch_object(name, wanted, workspace.object(name), environment)


def _fetch_object(name: str, wanted: Object, target: Path, environment: Mapping[str, str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and sha256_of(target) == wanted.sha256:
        log.info("the %s is here already, from an earlier attempt", name)
        return
    store, key = open_object(wanted, checkpoint_credentials(environment))
    log.info("fetching %s", store.where(key))
    store.download(key, target, wanted.LIMIT)
    actual = sha256_of(target)
    if actual != wanted.sha256:
        target.unlink()
        raise StepFailed(
            Reason.CHECKSUM_MISMATCH,
            f"{wanted.uri} has sha256 {actual}, but the version's {name}.sha256 says "
            f"{wanted.sha256}: the object changed, or the number is another file's",
        )
    log.info("%s of %d bytes has the expected sha256", name, target.stat().st_size)

"""Init container of every Triton pod: brings the artefact that the operator pinned, and checks each byte of it.

Slim image, repository credentials; Triton beside it has none. The digest is the manifest's, and the manifest carries
every file's, so nothing can be served that is not what passed the gates.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from perch_exporter.artifact import digest_of, parse_manifest, sha256_of
from perch_exporter.contract import MANIFEST_LIMIT, FileEntry, Location, Manifest, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.store import Store, open_store, repository_credentials
from perch_exporter.workspace import REPORT

log = logging.getLogger(__name__)


def download(location: Location, digest: str, target: Path, environment: Mapping[str, str]) -> Manifest:
    """Fills target/models (Triton's repository), target/golden and target/manifest.json."""
    store = open_store(location, repository_credentials(environment))
    content = store.read(Manifest.FILE_NAME, MANIFEST_LIMIT)
    where = store.where(Manifest.FILE_NAME)
    if content is None:
        raise StepFailed(Reason.OBJECT_NOT_FOUND, f"{where} is not there: the artefact was deleted, or was never published whole")
    if digest_of(content) != digest:
        raise StepFailed(
            Reason.ARTIFACT_CORRUPT,
            f"{where} has digest {digest_of(content)} and not the pinned {digest}: it was changed after publishing",
        )
    manifest = parse_manifest(content, where)
    for key, entry in manifest.files.items():
        if key != REPORT:  # for people
            _download_file(store, key, entry, target / local_path(key))
    (target / Manifest.FILE_NAME).write_bytes(content)
    log.info("%d files, %d bytes, all as published", len(manifest.files), manifest.size_bytes)
    return manifest


def local_path(key: str) -> Path:
    """The repository keeps one model under model/, Triton wants a folder of models."""
    group, _, rest = key.partition("/")
    return Path("models" if group == "model" else group) / rest


def _download_file(store: Store, key: str, entry: FileEntry, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("fetching %s (%d bytes)", key, entry.size)
    store.download(key, path, limit=entry.size)
    actual = sha256_of(path)
    if actual != entry.sha256:
        path.unlink()
        raise StepFailed(
            Reason.ARTIFACT_CORRUPT,
            f"{store.where(key)} has sha256 {actual} and not {entry.sha256} as the manifest says: it was changed",
        )

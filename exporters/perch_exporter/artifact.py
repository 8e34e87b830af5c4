"""An artefact in the repository: its keys, whose it is, whether it is whole. Fetch, publish and delete ask the same.

Three states of a prefix: nothing ours; claimed (claim.json there, manifest.json not: half published or half deleted);
published (manifest.json there). Readers go by the manifest alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from perch_exporter.contract import (
    MANIFEST_LIMIT,
    Claim,
    ExportRequest,
    Manifest,
    Outcome,
    Owner,
    Reason,
    StepSeconds,
    Summary,
)
from perch_exporter.failure import StepFailed
from perch_exporter.store import Store
from perch_exporter.workspace import MODEL, MODEL_DATA, PLAN

GOLDEN_KEY = "golden/golden.npz"
PICTURES_KEY = "golden/pictures.npz"


def config_key(request: ExportRequest) -> str:
    """Of the network."""
    return f"model/{request.network_name}/config.pbtxt"


def model_key(request: ExportRequest) -> str:
    return f"model/{request.network_name}/{request.version}/{MODEL}"


def model_data_key(request: ExportRequest) -> str:
    return f"model/{request.network_name}/{request.version}/{MODEL_DATA}"


def plan_key(request: ExportRequest) -> str:
    return f"model/{request.network_name}/{request.version}/{PLAN}"


@dataclass(frozen=True)
class Published:
    manifest: Manifest
    digest: str

    def summary(self, uri: str, outcome: Outcome, seconds: StepSeconds | None = None) -> Summary:
        return Summary(
            outcome=outcome,
            artifact_uri=uri,
            artifact_digest=self.digest,
            size_bytes=self.manifest.size_bytes,
            parity=self.manifest.parity,
            tolerance=self.manifest.tolerance,
            accuracy=self.manifest.accuracy and self.manifest.accuracy.brief,
            tooling=self.manifest.tooling,
            seconds=seconds,
        )


def digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_manifest(content: bytes, where: str) -> Manifest:
    try:
        return Manifest.from_json(content)
    except ValidationError as error:
        raise StepFailed(
            Reason.ARTIFACT_CORRUPT,
            f"{where} is not a manifest that this release understands ({error.errors()[0]['msg']}); "
            "if the artefact is not needed, delete its prefix by hand",
        ) from error


def published(store: Store, owner: Owner, revision: str) -> Published | None:
    """The artefact if it is there and whole. Raises PrefixOwnedByAnother where the manifest names somebody else."""
    content = owned_manifest(store, owner, revision)
    if content is None:
        return None
    manifest, digest = content
    present = store.sizes()
    if any(present.get(key) != entry.size for key, entry in manifest.files.items()):
        return None
    return Published(manifest, digest)


def owned_manifest(store: Store, owner: Owner, revision: str) -> tuple[Manifest, str] | None:
    """Our manifest and its digest, None where there is none; raises PrefixOwnedByAnother."""
    content = store.read(Manifest.FILE_NAME, MANIFEST_LIMIT)
    if content is None:
        return None
    manifest = parse_manifest(content, store.where(Manifest.FILE_NAME))
    _refuse_foreign(store, Manifest.FILE_NAME, (manifest.owner, manifest.artifact_revision), (owner, revision))
    return manifest, digest_of(content)


def claimed(store: Store, owner: Owner, revision: str) -> bool:
    """Whether claim.json says that the prefix is ours; raises PrefixOwnedByAnother where it names somebody else."""
    content = store.read(Claim.FILE_NAME, MANIFEST_LIMIT)
    if content is None:
        return False
    try:
        claim = Claim.from_json(content)
    except ValidationError as error:
        raise StepFailed(
            Reason.ARTIFACT_CORRUPT, f"{store.where(Claim.FILE_NAME)} is not a claim: {error.errors()[0]['msg']}"
        ) from error
    _refuse_foreign(store, Claim.FILE_NAME, (claim.owner, claim.artifact_revision), (owner, revision))
    return True


def _refuse_foreign(store: Store, key: str, theirs: tuple[Owner, str], ours: tuple[Owner, str]) -> None:
    if theirs != ours:
        raise StepFailed(
            Reason.PREFIX_OWNED_BY_ANOTHER,
            f"{store.where(key)} belongs to {theirs[0]}, revision {theirs[1]}, "
            f"and not to {ours[0]}, revision {ours[1]}; it is left as it is: "
            "use another repository.uri, or delete that artefact first",
        )

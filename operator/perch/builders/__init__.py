"""Pure builders of the Kubernetes objects that Perch owns. Plain dicts for server-side apply: only the fields we mean."""

from __future__ import annotations

from typing import Any

from perch.api import GROUP, KIND, VERSION
from perch.observed import Identity


def build_metadata(
    identity: Identity, name: str, labels: dict[str, str], annotations: dict[str, str] | None = None
) -> dict[str, Any]:
    """Metadata of a child: in the owner's namespace, and garbage-collected with the owner even where Perch is gone."""
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": identity.namespace,
        "labels": labels,
        "ownerReferences": [
            {
                "apiVersion": f"{GROUP}/{VERSION}",
                "kind": KIND,
                "name": identity.name,
                "uid": identity.uid,
                "controller": True,
                "blockOwnerDeletion": False,
            }
        ],
    }
    if annotations:
        metadata["annotations"] = annotations
    return metadata


def compact(content: dict[str, Any]) -> dict[str, Any]:
    """Drop what is None: server-side apply would own the field with no value."""
    return {key: value for key, value in content.items() if value is not None}


POD_SECURITY: dict[str, Any] = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "runAsGroup": 65532,
    "fsGroup": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
SMALL: dict[str, Any] = {
    "requests": {"cpu": "50m", "memory": "128Mi"},
    "limits": {"memory": "512Mi"},
}
"""Resources of the containers that only move and hash files."""

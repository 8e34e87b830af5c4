"""How a pod reaches the object store: credentials and certificate authorities, by reference. The operator reads neither."""

from __future__ import annotations

from typing import Any

from perch.api import Repository

CA_FILE = "/perch/ca/bundle.pem"


def credentials_env(secret: str, prefix: str = "") -> list[dict[str, Any]]:
    return [
        {"name": f"{prefix}{key}", "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    ]


def ca_env(repository: Repository) -> list[dict[str, Any]]:
    return [{"name": "AWS_CA_BUNDLE", "value": CA_FILE}] if repository.ca_bundle_config_map_ref else []


def ca_mount(repository: Repository) -> list[dict[str, Any]]:
    if repository.ca_bundle_config_map_ref is None:
        return []
    return [{"name": "ca", "mountPath": "/perch/ca", "readOnly": True}]


def ca_volume(repository: Repository) -> list[dict[str, Any]]:
    ref = repository.ca_bundle_config_map_ref
    if ref is None:
        return []
    return [{"name": "ca", "configMap": {"name": ref.name, "items": [{"key": ref.key, "path": "bundle.pem"}]}}]

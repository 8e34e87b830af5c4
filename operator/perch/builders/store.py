"""How a pod reaches the object store: credentials or an identity, and certificate authorities. The operator reads none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perch.api import Repository

CA_FILE = "/perch/ca/bundle.pem"


def repository_env(repository: Repository) -> list[dict[str, Any]]:
    """None of it where a ServiceAccount is the identity: then the cluster's webhook adds what the store's library reads."""
    secret = repository.credentials_secret_ref
    return (credentials_env(secret.name) if secret else []) + ca_env(repository)


def credentials_env(secret: str, prefix: str = "") -> list[dict[str, Any]]:
    """The session token is there where credentials are temporary; a Secret without one is as good."""
    keys = {"AWS_ACCESS_KEY_ID": {}, "AWS_SECRET_ACCESS_KEY": {}, "AWS_SESSION_TOKEN": {"optional": True}}
    return [
        {"name": f"{prefix}{key}", "valueFrom": {"secretKeyRef": {"name": secret, "key": key, **more}}}
        for key, more in keys.items()
    ]


def without_identity(repository: Repository, containers: Sequence[str]) -> dict[str, str]:
    """Annotations of a pod whose ServiceAccount is an identity, for the containers that must not have it.

    The webhook of EKS gives each container of a pod the token and the role, unless it is named here.
    """
    if repository.service_account_name is None:
        return {}
    return {"eks.amazonaws.com/skip-containers": ",".join(containers)}


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

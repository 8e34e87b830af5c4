"""What the operator is told by its environment; the chart sets it. See `charts/perch/values.yaml` for the meaning of each."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass


class SettingsError(Exception):
    """A setting is missing or cannot be used."""


@dataclass(frozen=True)
class Settings:
    exporter_image: str
    artifacts_image: str
    triton_image: str
    image_pull_policy: str | None
    namespaces: tuple[str, ...]
    """Namespaces to watch; empty for all."""
    cluster_name: str
    """Lasting name of the cluster, which owns the artefacts; empty: the UID of namespace kube-system."""
    namespace: str
    identity: str
    lease_name: str
    http_port: int
    log_level: str
    log_format: str


def read_settings(env: Mapping[str, str] = os.environ) -> Settings:
    """Raises SettingsError, which names the variable."""

    def need(name: str) -> str:
        if not env.get(name):
            raise SettingsError(f"{name} is not set: the chart sets it; outside the cluster, export it first")
        return env[name]

    port = env.get("PERCH_HTTP_PORT", "8080")
    if not port.isdigit():
        raise SettingsError(f"PERCH_HTTP_PORT is {port!r}: write a port number")
    return Settings(
        exporter_image=need("PERCH_EXPORTER_IMAGE"),
        artifacts_image=need("PERCH_ARTIFACTS_IMAGE"),
        triton_image=need("PERCH_TRITON_IMAGE"),
        image_pull_policy=env.get("PERCH_IMAGE_PULL_POLICY") or None,
        namespaces=tuple(n.strip() for n in env.get("PERCH_WATCH_NAMESPACES", "").split(",") if n.strip()),
        cluster_name=env.get("PERCH_CLUSTER_NAME", ""),
        namespace=env.get("PERCH_NAMESPACE", "default"),
        identity=env.get("PERCH_POD_NAME") or f"{socket.gethostname()}-{os.getpid()}",
        lease_name=env.get("PERCH_LEASE_NAME", "perch"),
        http_port=int(port),
        log_level=env.get("PERCH_LOG_LEVEL", "INFO").upper(),
        log_format=env.get("PERCH_LOG_FORMAT", "text"),
    )

"""Names, labels and hashes. Pure: everything derives from the object's identity and content, nothing is remembered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from perch.api import GROUP, Spec, Version

FIELD_MANAGER = "perch"
FINALIZER = f"{GROUP}/artifacts"

LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_OWNER = f"{GROUP}/model-deployment"
LABEL_VERSION = f"{GROUP}/version"
LABEL_COMPONENT = f"{GROUP}/component"
FOUND_BY = (LABEL_MANAGED_BY, LABEL_OWNER, LABEL_VERSION, LABEL_COMPONENT)
SELECTOR = f"{LABEL_MANAGED_BY}={FIELD_MANAGER},{LABEL_OWNER}"

ANNOTATION_REVISION = f"{GROUP}/artifact-revision"
ANNOTATION_SERVING_HASH = f"{GROUP}/serving-hash"
ANNOTATION_EXPORT_HASH = f"{GROUP}/export-hash"
ANNOTATION_REQUEST = f"{GROUP}/request"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def artifact_revision(entry: Version) -> str:
    """Eight hex digits over what the user wrote in a version's entry.

    Values equal to their default do not count, so that a release of Perch which adds a field re-exports nothing.
    """
    return _digest(entry.model_dump(mode="json", by_alias=True, exclude_defaults=True))[:8]


def export_hash(request: Mapping[str, Any], spec: Spec) -> str:
    """Twelve hex digits over all that the user has an export Job made of: what failed with one hash may do better with another.

    That is the request, `builder`, and how the store is reached. What the operator adds (its images, the Job's form) does not
    count: an upgrade of Perch would start a Job for every export of the cluster that ever failed.
    """
    builder = spec.builder.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude={"network_policy"})
    return _digest([request, builder, _access(spec)])[:12]


def serving_hash(revision: str, artifact_digest: str, spec: Spec) -> str:
    """Twelve hex digits over all that a version's pods depend on: another hash rolls them, the same hash never does.

    That is the artefact, `runtime`, and how the store is reached: a pod that names a former Secret cannot be started again.
    `replicas` and `autoscaling` only scale. The operator's own defaults (images, labels, sidecar) do not count: upgrading Perch
    restarts no model.
    """
    runtime = spec.runtime.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude={"replicas", "autoscaling"})
    return _digest([revision, artifact_digest, runtime, _access(spec)])[:12]


_ACCESS = {"credentials_secret_ref", "service_account_name", "ca_bundle_config_map_ref"}


def _access(spec: Spec) -> Mapping[str, Any]:
    return spec.repository.model_dump(mode="json", by_alias=True, exclude_defaults=True, include=_ACCESS)


def gpu_labels(compute_capability: str) -> dict[str, str]:
    """Of the nodes whose GPU has it, by NVIDIA's GPU feature discovery, which its GPU operator brings along."""
    major, minor = compute_capability.split(".")
    return {"nvidia.com/gpu.compute.major": major, "nvidia.com/gpu.compute.minor": minor}


def serving_name(name: str, version: int) -> str:
    """Name of a version's Deployment, Service and PodDisruptionBudget."""
    return f"{name}-v{version}"


def version_of(name: str, child: str) -> int | None:
    """The reverse of `serving_name`; None for a name that is not of its form."""
    number = child.removeprefix(f"{name}-v")
    return int(number) if number != child and number.isdigit() else None


def export_job_name(name: str, version: int, revision: str) -> str:
    return f"{name}-v{version}-{revision}"


def export_of(name: str, child: str) -> tuple[int, str] | None:
    """The reverse of `export_job_name`: version and revision."""
    serving, _, revision = child.rpartition("-")
    version = version_of(name, serving)
    return (version, revision) if version is not None and revision else None


def export_policy_name(name: str) -> str:
    """Name of the NetworkPolicy of all export pods."""
    return f"{name}-export"


def cleanup_job_name(name: str, revision: str) -> str:
    return f"{name}-{revision}-delete"


def cleanup_of(name: str, child: str) -> str | None:
    """The reverse of `cleanup_job_name`: the revision."""
    revision = child.removeprefix(f"{name}-").removesuffix("-delete")
    return revision if revision and child == cleanup_job_name(name, revision) else None


def artifact_uri(repository_uri: str, namespace: str, name: str, version: int, revision: str) -> str:
    return f"{repository_uri.rstrip('/')}/{namespace}/{name}/{version}-{revision}"


def owner_labels(name: str) -> dict[str, str]:
    return {LABEL_MANAGED_BY: FIELD_MANAGER, LABEL_OWNER: name, "app.kubernetes.io/name": name}


def child_labels(name: str, component: str, version: int | None = None) -> dict[str, str]:
    labels = {**owner_labels(name), LABEL_COMPONENT: component}
    if version is not None:
        labels[LABEL_VERSION] = str(version)
    return labels


def pod_selector(name: str, version: int) -> dict[str, str]:
    """Selector of a version's Triton pods. Immutable in a Deployment: never change it."""
    return {LABEL_OWNER: name, LABEL_VERSION: str(version), LABEL_COMPONENT: "triton"}


def labels_of(kind: str, name: str, child: str) -> dict[str, str]:
    """The labels by which a child is found, from its kind and name; empty for a name that Perch gives no child.

    Others are not among them: a release that adds a label would patch every child of the cluster at once.
    """
    component, version = None, version_of(name, child)
    if kind == "Job" and (export := export_of(name, child)):
        component, version = "export", export[0]
    elif kind == "Job" and cleanup_of(name, child):
        component = "cleanup"
    elif kind == "HTTPRoute" and child == name:
        component = "route"
    elif kind == "NetworkPolicy" and child == export_policy_name(name):
        component = "export"
    elif kind in ("Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler") and version is not None:
        component = "triton"
    labels = child_labels(name, component, version) if component else {}
    return {label: value for label, value in labels.items() if label in FOUND_BY}

"""A version's Triton Deployment, Service and PodDisruptionBudget.

A pod: an init container downloads the artefact and checks every byte against the digest pinned here; Triton serves the local
copy and holds no credentials; the golden sidecar replays the checkpoint's answers against this very pod and is Ready only when
they agree. So every pod proves itself, rescheduled ones too, and no pod is in a Service before it has.
"""

from __future__ import annotations

import math
from typing import Any

from perch.api import Runtime, Spec, Tensor, Version
from perch.builders import CONTAINER_SECURITY, POD_SECURITY, SMALL, build_metadata, compact
from perch.builders.store import ca_mount, ca_volume, repository_env, without_identity
from perch.durations import parse_duration
from perch.names import (
    ANNOTATION_REVISION,
    ANNOTATION_SERVING_HASH,
    artifact_uri,
    child_labels,
    gpu_labels,
    pod_selector,
    serving_hash,
    serving_name,
)
from perch.observed import Identity, Installation

ARTIFACT = "/perch/artifact"
PRE_STOP_SECONDS = 15
"""Proxies learn within seconds that a pod is leaving; until then it goes on answering (triton server#6230, #8253)."""
HTTP, GRPC, METRICS, GOLDEN = 8000, 8001, 8002, 8003
LEAST_START_SECONDS = 600
"""A model may load for so long; longer where rollout.progressDeadline waits longer."""
ARTIFACT_SIZE = "50Gi"
"""As much as an export's output may take. The download writes what the manifest lists and nothing else."""
GOLDEN_SAMPLES = 32
"""MiB that all golden samples of an artefact take at most, answers included: the exporter publishes no more."""
STACK_KIBIBYTES = 256 * 1024
START = f"""\
ulimit -S -s {STACK_KIBIBYTES} || {{
  echo "The hard limit on a thread's stack is $(ulimit -H -s) KiB here, and Triton should have {STACK_KIBIBYTES}." \
    "A form (POST with Content-Type application/x-www-form-urlencoded) larger than half the limit ends Triton." \
    "Raise the limit of the container runtime." >&2
  ulimit -S -s "$(ulimit -H -s)"
}}
exec "$0" "$@"
"""
"""Starts Triton with larger stacks for its threads: glibc gives each thread as much as the soft limit at the start of a program.

Triton's HTTP library (libevhtp 1.2.18, in all releases) copies a form twice onto the stack of a thread, which has 8 MiB: one of
4 MiB ends the process (triton server#5840, libevhtp#118), and curl and urllib call every body a form unless told otherwise.
Before 25.07 Triton put 16 bytes there for each chunk of a body, too (CVE-2025-23310). Stacks are reserved, not used: no memory is
taken until such a request comes. The route takes the Content-Type away; this is for those who call a pod's Service.
"""
RESTRICTED = "shared-memory,model-repository,trace,logging"


def exit_timeout(runtime: Runtime) -> int:
    """Seconds for Triton to finish what it has: the pod's grace less the pre-stop sleep and five seconds to spare."""
    return runtime.termination_grace_period_seconds - PRE_STOP_SECONDS - 5


def golden_mebibytes(entry: Version) -> int:
    """Memory limit of the golden check: eight times what it replays at once, and 256 MiB for itself.

    That is all golden samples; or one batch of maxBatchSize, for a Triton that builds an engine for the largest batch. Measured
    with 3x224x224 inputs: 5 times the batch, with 92 MiB beside it.
    """
    batch = 0
    if entry.triton.accelerator:
        batch = entry.triton.max_batch_size * sum(map(_sample_bytes, (*entry.inputs, *entry.outputs)))
    return 256 + 8 * max(GOLDEN_SAMPLES, math.ceil(batch / 2**20))


def _sample_bytes(tensor: Tensor) -> int:
    """A dynamic dimension counts as 224, which is what the exporter makes of it."""
    width = {"FP32": 4, "FP16": 2, "INT64": 8, "INT32": 4, "UINT8": 1, "BOOL": 1}[tensor.data_type]
    return width * math.prod(224 if size == -1 else size for size in tensor.shape)


def build_deployment(
    identity: Identity,
    spec: Spec,
    entry: Version,
    revision: str,
    artifact_digest: str,
    installation: Installation,
    *,
    replicas: int | None = None,
    compute_capability: str | None = None,
) -> dict[str, Any]:
    """The Deployment of one published version. Rolling updates surge: a pod leaves only when its successor has proven itself.

    `replicas`: pods; runtime.replicas if omitted. Always written: a server-side apply that no longer names what a former one did
    resets it to 1, so beside an autoscaler the present number must be given.
    `compute_capability`: of the GPU that a TensorRT plan was built on, and that its pods need.
    """
    runtime = spec.runtime
    dump = runtime.model_dump(mode="json", by_alias=True, exclude_none=True)
    model = spec.model_name or identity.name
    repository = spec.repository
    start_seconds = LEAST_START_SECONDS
    if spec.rollout:
        start_seconds = max(start_seconds, int(parse_duration(spec.rollout.progress_deadline).total_seconds()))
    labels = child_labels(identity.name, "triton", entry.version)
    location = ["--uri", artifact_uri(repository.uri, identity.namespace, identity.name, entry.version, revision)]
    if repository.endpoint:
        location += ["--endpoint", repository.endpoint]
    if repository.region:
        location += ["--region", repository.region]
    download = compact(
        {
            "name": "download",
            "image": installation.artifacts_image,
            "imagePullPolicy": installation.image_pull_policy,
            "command": ["python3", "-m", "perch_exporter", "download", *location,
                        "--digest", artifact_digest, "--target", ARTIFACT],
            "env": repository_env(repository) or None,
            "resources": SMALL,
            "securityContext": CONTAINER_SECURITY,
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [
                {"name": "artifact", "mountPath": ARTIFACT},
                {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
                *ca_mount(repository),
            ],
        }
    )  # fmt: skip
    triton = compact(
        {
            "name": "triton",
            "image": runtime.image or installation.triton_image,
            "imagePullPolicy": runtime.image_pull_policy or installation.image_pull_policy,
            "command": [
                *("sh", "-c", START, "tritonserver"),
                f"--model-repository={ARTIFACT}/models",
                "--model-control-mode=none",
                "--strict-readiness=true",
                "--exit-on-error=true",
                f"--exit-timeout-secs={exit_timeout(runtime)}",
                # Defence in depth: the route exposes none of these, and pods inside the cluster cannot call them either.
                f"--grpc-restricted-protocol={RESTRICTED}:perch={identity.uid}",
                f"--http-restricted-api={RESTRICTED}:perch={identity.uid}",
                *_cache(entry, runtime),
            ],
            "env": _environment(dump.get("env", [])),
            "ports": [
                {"name": "http", "containerPort": HTTP, "protocol": "TCP"},
                {"name": "grpc", "containerPort": GRPC, "protocol": "TCP"},
                {"name": "metrics", "containerPort": METRICS, "protocol": "TCP"},
            ],
            "resources": dump.get("resources"),
            "securityContext": CONTAINER_SECURITY,
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "startupProbe": {
                "httpGet": {"path": f"/v2/models/{model}/ready", "port": HTTP},
                "periodSeconds": 2,
                "timeoutSeconds": 2,
                "failureThreshold": math.ceil(start_seconds / 2),
            },
            "readinessProbe": {
                "httpGet": {"path": f"/v2/models/{model}/ready", "port": HTTP},
                "periodSeconds": 5,
                "timeoutSeconds": 5,
                "failureThreshold": 3,
            },
            "livenessProbe": {
                "httpGet": {"path": "/v2/health/live", "port": HTTP},
                "periodSeconds": 10,
                "timeoutSeconds": 10,
                "failureThreshold": 6,
            },
            "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
            "volumeMounts": [
                {"name": "artifact", "mountPath": ARTIFACT, "readOnly": True},
                {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
                {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
            ],
        }
    )
    golden = compact(
        {
            "name": "golden",
            "image": installation.artifacts_image,
            "imagePullPolicy": installation.image_pull_policy,
            "command": ["python3", "-m", "perch_exporter", "golden", "--artifact", ARTIFACT,
                        "--grpc", f"127.0.0.1:{GRPC}", "--listen", f"0.0.0.0:{GOLDEN}"],
            "ports": [{"name": "golden", "containerPort": GOLDEN, "protocol": "TCP"}],
            "resources": {"requests": {"cpu": "10m", "memory": "96Mi"}, "limits": {"memory": f"{golden_mebibytes(entry)}Mi"}},
            "securityContext": CONTAINER_SECURITY,
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "readinessProbe": {
                "httpGet": {"path": "/ready", "port": GOLDEN},
                "periodSeconds": 2,
                "timeoutSeconds": 5,
                "failureThreshold": 2,
            },
            "livenessProbe": {
                "httpGet": {"path": "/live", "port": GOLDEN},
                "periodSeconds": 20,
                "timeoutSeconds": 10,
                "failureThreshold": 3,
            },
            "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
            "volumeMounts": [
                {"name": "artifact", "mountPath": ARTIFACT, "readOnly": True},
                {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
            ],
        }
    )  # fmt: skip
    pod = compact(
        {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": POD_SECURITY,
            "terminationGracePeriodSeconds": runtime.termination_grace_period_seconds,
            "initContainers": [download],
            "containers": [triton, golden],
            "volumes": [
                {"name": "artifact", "emptyDir": {"sizeLimit": ARTIFACT_SIZE}},
                {"name": "tmp", "emptyDir": {"sizeLimit": str(runtime.temporary_storage_size)}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": str(runtime.shared_memory_size)}},
                *ca_volume(repository),
            ],
            **{
                key: dump.get(key)
                for key in (
                    "nodeSelector",
                    "tolerations",
                    "imagePullSecrets",
                    "runtimeClassName",
                    "priorityClassName",
                    "resourceClaims",
                )
            },
            "serviceAccountName": runtime.service_account_name or repository.service_account_name,
            "topologySpreadConstraints": _spread(dump.get("topologySpreadConstraints"), identity, entry.version),
            "affinity": _affinity(dump.get("affinity"), compute_capability),
        }
    )
    content = serving_hash(revision, artifact_digest, spec)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": build_metadata(
            identity,
            serving_name(identity.name, entry.version),
            {**(runtime.labels or {}), **labels},
            {ANNOTATION_REVISION: revision, ANNOTATION_SERVING_HASH: content},
        ),
        "spec": {
            "replicas": runtime.replicas if replicas is None else replicas,
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": start_seconds,
            "selector": {"matchLabels": pod_selector(identity.name, entry.version)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            # The pods carry it, so that the trouble of one that is being replaced is not taken for its successor's.
            "template": {
                "metadata": {
                    "labels": {**(runtime.labels or {}), **labels},
                    "annotations": {**without_identity(repository, ("triton", "golden")), ANNOTATION_SERVING_HASH: content},
                },
                "spec": pod,
            },
        },
    }


def _affinity(wanted: dict[str, Any] | None, compute_capability: str | None) -> dict[str, Any] | None:
    """The user's, and besides the nodes that can run the plan: on a GPU of another generation it would load in none."""
    if compute_capability is None:
        return wanted
    own = [{"key": label, "operator": "In", "values": [value]} for label, value in gpu_labels(compute_capability).items()]
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    nodes = (wanted or {}).get("nodeAffinity", {})
    # Any of the terms is enough for the scheduler, so each of them asks for it; an empty one matches no node, and stays so.
    terms = [
        {**term, "matchExpressions": [*term.get("matchExpressions", []), *own]} if term else term
        for term in nodes.get(required, {"nodeSelectorTerms": [{"matchExpressions": []}]})["nodeSelectorTerms"]
    ]
    return {**(wanted or {}), "nodeAffinity": {**nodes, required: {"nodeSelectorTerms": terms}}}


def _spread(wanted: list[dict[str, Any]] | None, identity: Identity, version: int) -> list[dict[str, Any]] | None:
    """Over the pods of this version; those that a rolling update is about to take away do not count."""
    if wanted is None:
        return None
    pods = {"labelSelector": {"matchLabels": pod_selector(identity.name, version)}, "matchLabelKeys": ["pod-template-hash"]}
    return [{**constraint, **pods} for constraint in wanted]


def _cache(entry: Version, runtime: Runtime) -> list[str]:
    """Triton has a response cache only where it is told how large; a model that does not ask for it needs none."""
    if not entry.triton.response_cache:
        return []
    return [f"--cache-config=local,size={runtime.response_cache_mebibytes * 2**20}"]


def _environment(wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The user's variables, and FP32 taken at its word: NVIDIA's libraries would round its products to TF32 by default, which
    the golden check could take for another model. Who wants TF32 sets NVIDIA_TF32_OVERRIDE in runtime.env."""
    own = [{"name": "NVIDIA_TF32_OVERRIDE", "value": "0"}]
    return [e for e in own if e["name"] not in {w["name"] for w in wanted}] + wanted


def build_service(identity: Identity, version: int) -> dict[str, Any]:
    """The way in to one version, for the route and for those who have no Gateway."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": build_metadata(
            identity, serving_name(identity.name, version), child_labels(identity.name, "triton", version)
        ),
        "spec": {
            "selector": pod_selector(identity.name, version),
            "ports": [
                {"name": "http", "port": HTTP, "targetPort": "http", "protocol": "TCP", "appProtocol": "http"},
                {"name": "grpc", "port": GRPC, "targetPort": "grpc", "protocol": "TCP",
                 "appProtocol": "kubernetes.io/h2c"},
                {"name": "metrics", "port": METRICS, "targetPort": "metrics", "protocol": "TCP"},
            ],
        },
    }  # fmt: skip


def build_budget(identity: Identity, version: int) -> dict[str, Any]:
    """A drain of nodes takes one pod of a version at a time."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": build_metadata(
            identity, serving_name(identity.name, version), child_labels(identity.name, "triton", version)
        ),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": pod_selector(identity.name, version)}},
    }

"""The export Job (fetch -> convert -> prove -> publish, with build before publish for a TensorRT plan) and the cleanup Job.

Four containers in a row, so that a credential and somebody's bytes never meet: fetch has credentials and only hashes, convert
parses the checkpoint and has neither credentials nor a Kubernetes token, nor have those that read what it made; publish has
credentials and checks what it is handed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from perch.api import Architecture, Model, Repository, Resources, Spec, Version
from perch.builders import CONTAINER_SECURITY, POD_SECURITY, SMALL, build_metadata, compact
from perch.builders.autoscaler import amount
from perch.builders.store import ca_mount, ca_volume, credentials_env, repository_env, without_identity
from perch.names import (
    ANNOTATION_EXPORT_HASH,
    ANNOTATION_REQUEST,
    ANNOTATION_REVISION,
    artifact_uri,
    child_labels,
    cleanup_job_name,
    export_hash,
    export_job_name,
)
from perch.observed import Identity, Installation
from perch_exporter import contract

REQUEST_FILE = "/perch/request/request.json"
WORKSPACE = "/perch/work"
UNTRUSTED = ("convert", "prove", "build")
"""Containers that parse the checkpoint, or what was made of it: no credential and no identity is for them."""
KEEP_FINISHED_SECONDS = 3600
CLEANUP_DEADLINE_SECONDS = 180
"""A cleanup that takes longer is given up, with an Event: it may not keep a deletion hanging."""
DEFAULT_MEMORY_LIMIT = "8Gi"
EXIT_KILLED = 137
"""128 + SIGKILL: the kernel's OOM killer, above all."""


def build_owner(identity: Identity, installation: Installation) -> contract.Owner:
    return contract.Owner(cluster=installation.cluster, namespace=identity.namespace, name=identity.name)


def build_export_request(
    identity: Identity, spec: Spec, entry: Version, revision: str, installation: Installation
) -> contract.ExportRequest:
    """The exporter's view of one version. Raises pydantic.ValidationError where the exporter would refuse it."""
    repository, checkpoint = spec.repository, entry.checkpoint
    parity, accuracy, calibration = entry.verification.parity, entry.verification.accuracy, entry.conversion.calibration
    plan = entry.conversion.target == "TensorRT"
    # Whatever else a version names lies beside its checkpoint.
    reached = {"endpoint": checkpoint.endpoint or repository.endpoint, "region": checkpoint.region or repository.region}
    return contract.ExportRequest(
        owner=build_owner(identity, installation),
        model_name=spec.model_name or identity.name,
        version=entry.version,
        artifact_revision=revision,
        checkpoint=contract.Checkpoint(
            uri=checkpoint.uri,
            format=contract.CheckpointFormat(checkpoint.format),
            sha256=checkpoint.sha256,
            state_dict_key=checkpoint.state_dict_key,
            trust_source=checkpoint.trust_source,
            **reached,
        ),
        architecture=_architecture(entry.architecture, reached) if entry.architecture else None,
        inputs=tuple(_tensor(t.name, t.data_type, t.shape) for t in entry.inputs),
        outputs=tuple(_tensor(t.name, t.data_type, t.shape) for t in entry.outputs),
        conversion=contract.Conversion(
            target=contract.Target(entry.conversion.target),
            precision=contract.Precision(entry.conversion.precision),
            opset=entry.conversion.opset,
            calibration=contract.DataSet(uri=calibration.uri, sha256=calibration.sha256, **reached) if calibration else None,
        ),
        verification=contract.Verification(
            parity=contract.ParityLimits(
                absolute_tolerance=parity.absolute_tolerance if parity else None,
                relative_tolerance=parity.relative_tolerance if parity else None,
                minimum_top1_agreement=parity.minimum_top1_agreement if parity else None,
                minimum_cosine=parity.minimum_cosine if parity else None,
            ),
            samples=contract.DataSet(uri=parity.samples.uri, sha256=parity.samples.sha256, **reached)
            if parity and parity.samples
            else None,
            accuracy=contract.AccuracyGate(
                dataset=contract.DataSet(uri=accuracy.dataset.uri, sha256=accuracy.dataset.sha256, **reached),
                minimum=accuracy.minimum,
                maximum_drop=accuracy.maximum_drop,
                on_failure=contract.OnFailure(accuracy.on_failure),
            )
            if accuracy
            else None,
        ),
        triton=contract.Triton.model_validate(
            entry.triton.model_dump(mode="json", by_alias=True, exclude_none=True)
            | ({"instanceKind": "GPU"} if plan or entry.triton.accelerator else {})
        ),
        tensorrt_version=spec.runtime.tensorrt_version if plan else None,
        preprocessing=_parsed(contract.Preprocessing, entry.preprocessing),
        postprocessing=_parsed(contract.Postprocessing, entry.postprocessing),
        destination=_destination(identity, repository, entry.version, revision),
    )


def _architecture(architecture: Architecture, reached: Mapping[str, str | None]) -> contract.Architecture:
    source = architecture.source
    return contract.Architecture(
        name=architecture.name,
        entry_point=architecture.entry_point,
        source=contract.Source(uri=source.uri, sha256=source.sha256, **reached) if source else None,
        parameters={name: _parameter(value) for name, value in (architecture.parameters or {}).items()},
        layer=architecture.layer,
    )


def _parameter(value: int | str) -> contract.ParameterValue:
    """What a constructor gets: a text that is a JSON number, true, false or a quoted text is that, any other is itself.

    Kubernetes' schemas know a field of integer or text, and none that takes fractions and truth values beside them.
    """
    if isinstance(value, int):
        return value
    try:
        meant = json.loads(value)
    except ValueError:
        return value
    if isinstance(meant, float) and not math.isfinite(meant):
        return value
    return meant if isinstance(meant, bool | int | float | str) else value


Part = TypeVar("Part", contract.Preprocessing, contract.Postprocessing)


def _parsed(part: type[Part], wanted: Model | None) -> Part | None:
    """Fields of the same names on both sides."""
    return part.model_validate(wanted.model_dump(mode="json", by_alias=True, exclude_none=True)) if wanted else None


def _tensor(name: str, data_type: Any, shape: list[int]) -> contract.TensorSpec:
    return contract.TensorSpec(name=name, data_type=contract.DataType(data_type), shape=tuple(shape))


def _destination(identity: Identity, repository: Repository, version: int, revision: str) -> contract.Destination:
    return contract.Destination(
        uri=artifact_uri(repository.uri, identity.namespace, identity.name, version, revision),
        endpoint=repository.endpoint,
        region=repository.region,
    )


def build_export_job(identity: Identity, spec: Spec, entry: Version, revision: str, installation: Installation) -> dict[str, Any]:
    """The Job that turns one version's checkpoint into a published artefact. Immutable once made: its name is its content."""
    request = build_export_request(identity, spec, entry, revision, installation)
    publish_env = repository_env(spec.repository)
    fetch_env = list(publish_env)
    other = entry.checkpoint.credentials_secret_ref
    if other is not None:
        fetch_env += credentials_env(other.name, prefix="CHECKPOINT_")
    ca = ca_mount(spec.repository)

    def command(step: str) -> list[str]:
        return ["python3", "-m", "perch_exporter", step, "--request", REQUEST_FILE, "--workspace", WORKSPACE]

    def mounts(*parts: tuple[str, bool]) -> list[dict[str, Any]]:
        return [
            {"name": "request", "mountPath": "/perch/request", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the container's own emptyDir
            *({"name": part, "mountPath": f"{WORKSPACE}/{part}", "readOnly": read_only} for part, read_only in parts),
        ]

    fetch = _container(
        "fetch", installation.artifacts_image, installation, command("fetch"), fetch_env, SMALL,
        mounts(("checkpoint", False), ("state", False)) + ca,
    )  # fmt: skip
    convert = _container(
        "convert", installation.exporter_image, installation, command("convert"),
        [{"name": "HOME", "value": "/tmp"}],  # noqa: S108
        _convert_resources(spec.builder.resources),
        mounts(("checkpoint", True), ("state", True), ("output", False)),
    )  # fmt: skip
    prove = _container(
        "prove", installation.exporter_image, installation, command("prove"),
        [{"name": "HOME", "value": "/tmp"}],  # noqa: S108
        _convert_resources(spec.builder.resources),
        mounts(("checkpoint", True), ("state", True), ("output", True), ("proof", False)),
    )  # fmt: skip
    plan = request.conversion.target is contract.Target.TENSOR_RT
    build = _container(
        "build", spec.builder.tensorrt_image or "", installation, command("build"),
        [{"name": "HOME", "value": "/tmp"}],  # noqa: S108
        _convert_resources(spec.builder.resources),
        mounts(("state", True), ("output", True), ("plan", False)),
    )  # fmt: skip
    publish = _container(
        "publish", installation.artifacts_image, installation, command("publish"), publish_env, SMALL,
        mounts(("state", True), ("output", True), ("proof", True), *([("plan", True)] if plan else [])) + ca,
    )  # fmt: skip
    labels = {**(spec.builder.labels or {}), **child_labels(identity.name, "export", entry.version)}
    made_of = export_hash(request.model_dump(mode="json", exclude_defaults=True), spec)
    return _job(
        identity,
        export_job_name(identity.name, entry.version, revision),
        labels,
        {ANNOTATION_REVISION: revision, ANNOTATION_EXPORT_HASH: made_of},
        request.to_json(),
        spec,
        init=[fetch, convert, prove, build] if plan else [fetch, convert, prove],
        main=publish,
        volumes={"checkpoint": "25Gi", "state": "16Mi", "output": "50Gi", "proof": "1Gi", **({"plan": "25Gi"} if plan else {})},
        deadline=spec.builder.active_deadline_seconds,
        # Passing trouble too, and what was killed, nearly always for its memory: the planner tries again later, with growing
        # delays and the reason in a condition.
        fail_at_once=[contract.EXIT_PERMANENT, contract.EXIT_PASSING, EXIT_KILLED],
    )


def build_cleanup_job(identity: Identity, spec: Spec, version: int, revision: str, installation: Installation) -> dict[str, Any]:
    """The Job that erases one artefact, if its manifest says that it is ours."""
    request = contract.DeleteRequest(
        owner=build_owner(identity, installation),
        artifact_revision=revision,
        destination=_destination(identity, spec.repository, version, revision),
    )
    delete = _container(
        "delete", installation.artifacts_image, installation,
        ["python3", "-m", "perch_exporter", "delete", "--request", REQUEST_FILE],
        repository_env(spec.repository),
        SMALL,
        [
            {"name": "request", "mountPath": "/perch/request", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
            *ca_mount(spec.repository),
        ],
    )  # fmt: skip
    return _job(
        identity,
        cleanup_job_name(identity.name, revision),
        child_labels(identity.name, "cleanup", version),
        {ANNOTATION_REVISION: revision},
        request.to_json(),
        spec,
        init=[],
        main=delete,
        volumes={},
        deadline=CLEANUP_DEADLINE_SECONDS,
        fail_at_once=[contract.EXIT_PERMANENT],
    )


def _job(
    identity: Identity,
    name: str,
    labels: dict[str, str],
    annotations: dict[str, str],
    request: str,
    spec: Spec,
    *,
    init: list[dict[str, Any]],
    main: dict[str, Any],
    volumes: dict[str, str],
    deadline: int,
    fail_at_once: list[int],
) -> dict[str, Any]:
    dump = spec.builder.model_dump(mode="json", by_alias=True, exclude_none=True)
    pod = compact(
        {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 10,
            "securityContext": POD_SECURITY,
            "initContainers": init or None,
            "containers": [main],
            "nodeSelector": dump.get("nodeSelector"),
            "tolerations": dump.get("tolerations"),
            "imagePullSecrets": dump.get("imagePullSecrets"),
            "runtimeClassName": dump.get("runtimeClassName"),
            "priorityClassName": dump.get("priorityClassName"),
            "resourceClaims": dump.get("resourceClaims") if init else None,
            "serviceAccountName": spec.repository.service_account_name,
            "volumes": [
                {
                    "name": "request",
                    "downwardAPI": {
                        "items": [
                            {
                                "path": "request.json",
                                "fieldRef": {"fieldPath": f"metadata.annotations['{ANNOTATION_REQUEST}']"},
                            }
                        ]
                    },
                },
                {"name": "tmp", "emptyDir": {"sizeLimit": "50Gi"}},  # a network is written there to be quantized
                *({"name": name, "emptyDir": {"sizeLimit": size}} for name, size in volumes.items()),
                *ca_volume(spec.repository),
            ],
        }
    )
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": build_metadata(identity, name, labels, annotations),
        "spec": {
            # A crash is tried again at once.
            "backoffLimit": 4,
            "activeDeadlineSeconds": deadline,
            "ttlSecondsAfterFinished": KEEP_FINISHED_SECONDS,
            "podFailurePolicy": {
                "rules": [
                    # Evicted or preempted: a container killed by that has exit code 137 too, and its pod is simply made again.
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {"action": "FailJob", "onExitCodes": {"operator": "In", "values": fail_at_once}},
                ]
            },
            "template": {
                "metadata": {
                    "labels": labels,
                    "annotations": {
                        **annotations,
                        **without_identity(spec.repository, UNTRUSTED),
                        ANNOTATION_REQUEST: request,
                    },
                },
                "spec": pod,
            },
        },
    }


def _container(
    name: str,
    image: str,
    installation: Installation,
    command: list[str],
    env: list[dict[str, Any]],
    resources: dict[str, Any],
    mounts: list[dict[str, Any]],
) -> dict[str, Any]:
    return compact(
        {
            "name": name,
            "image": image,
            "imagePullPolicy": installation.image_pull_policy,
            "command": command,
            "env": env or None,
            "resources": resources,
            "securityContext": CONTAINER_SECURITY,
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": mounts,
        }
    )


def _convert_resources(resources: Resources | None) -> dict[str, Any]:
    wanted = resources.model_dump(mode="json", by_alias=True, exclude_none=True) if resources else {}
    limits = {"memory": DEFAULT_MEMORY_LIMIT, **wanted.get("limits", {})}
    # A request above its limit would be refused: where the user's limit is the lower of both, that much is asked for.
    requests = {
        name: least if name not in limits or amount(least) <= amount(str(limits[name])) else limits[name]
        for name, least in {"cpu": "500m", "memory": "1Gi"}.items()
    }
    return {**wanted, "requests": {**requests, **wanted.get("requests", {})}, "limits": limits}

"""ModelDeployments of the demo's checkpoints, as the tests, the benchmarks and the fault scenarios write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from devcluster.tenant import SECRET, Tenant

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"


def lenet(version: int, key: str, sha256: str, **more: Any) -> dict[str, Any]:
    """An entry of spec.versions for a LeNet-5 checkpoint."""
    entry = {
        "version": version,
        "checkpoint": {"uri": f"s3://checkpoints/{key}", "format": "StateDict", "sha256": sha256},
        "architecture": {"name": "lenet5", "parameters": {"numClasses": 10}},
        "inputs": [{"name": "image", "dataType": "FP32", "shape": [1, 28, 28]}],
        "outputs": [{"name": "logits", "dataType": "FP32", "shape": [10]}],
        "triton": {"maxBatchSize": 32, "dynamicBatching": {"maxQueueDelayMicroseconds": 500}},
    }
    return {**entry, **more}


def upload_digits(tenant: Tenant) -> list[dict[str, Any]]:
    """Both demo checkpoints in the bucket; their entries."""
    entries = []
    for version in (1, 2):
        key = f"{tenant.namespace}/v{version}.pt"
        sha = tenant.upload(key, (CHECKPOINTS / f"v{version}.pt").read_bytes())
        entries.append(lenet(version, key, sha))
    return entries


def deployment(
    tenant: Tenant, entries: list[dict[str, Any]], stable: int = 1, canary: int | None = None, name: str = "digits", **spec: Any
) -> dict[str, Any]:
    """A ModelDeployment; `spec` replaces whole top-level fields, None removes one."""
    s3 = tenant.cluster.s3
    content = {
        "repository": {
            "uri": "s3://models/e2e",
            "endpoint": s3.endpoint,
            "region": s3.region,
            "credentialsSecretRef": {"name": SECRET},
        },
        "versions": entries,
        "traffic": {"stable": stable} | ({"canary": canary} if canary else {}),
        "rollout": {"steps": [{"weight": 10, "hold": "Indefinite"}], "scaleDownDelay": "10s"},
        "runtime": {"terminationGracePeriodSeconds": 30},
        "routing": {
            "parentRefs": [{"name": "gateway", "namespace": "gateway-system"}],
            "hostnames": [f"{name}.{tenant.namespace}.example.com"],
        },
        **spec,
    }
    return {
        "apiVersion": "serving.perch.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": name, "namespace": tenant.namespace},
        "spec": {k: v for k, v in content.items() if v is not None},
    }

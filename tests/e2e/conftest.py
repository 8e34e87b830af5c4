"""A whole real cluster with Perch on it, once for all end-to-end tests; a namespace of its own for each test that asks for one.

PERCH_TEST_CLUSTER names the cluster (default: test). PERCH_KEEP_CLUSTER=1 leaves it running for a look afterwards.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devcluster import Cluster
from devcluster.release import NAMESPACE, install
from devcluster.tenant import SECRET, Tenant

CHECKPOINTS = Path(__file__).resolve().parents[2] / "hack" / "demo" / "checkpoints"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(os.environ.get("PERCH_TEST_CLUSTER", "test"), gpus=1)
    try:
        cluster.up()
        install(cluster)
        yield cluster
    finally:
        if not os.environ.get("PERCH_KEEP_CLUSTER"):
            cluster.down()


@pytest.fixture
def tenant(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Tenant]:
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[5:40].strip("-")
    # A name of its own in each run: on a cluster that was kept, the buckets remember what a former run published.
    name = f"{words}-{uuid.uuid4().hex[:6]}"
    tenant = Tenant(cluster, name).make()
    yield tenant
    if request.node.stash.get(FAILED, False):
        explain(tenant)
    tenant.delete(wait=False)


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    report = yield
    if report.when == "call" and report.failed:
        item.stash[FAILED] = True
    return report


def explain(tenant: Tenant) -> None:
    """What a person would look at first, printed into the report of a failed test."""
    print(tenant.kubectl("get", "mdep,jobs,pods,httproutes", "-o", "wide", check=False))
    print(tenant.kubectl("get", "mdep", "-o", "yaml", check=False))
    print(tenant.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False)[-6000:])
    logs = tenant.cluster.kubectl("-n", NAMESPACE, "logs", "-l", "app.kubernetes.io/name=perch", "--tail=80", check=False)
    print(logs.stdout)


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

"""No GPU to spare, and pods that an autoscaler grew, on a whole real cluster under live load."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos.stage import Stage, is_ready
from demo.digits import held_out
from demo.manifests import deployment, upload_digits
from devcluster import Cluster
from devcluster.tenant import Tenant
from faults import Kind, mark
from faults.publish import publish
from perch.names import ANNOTATION_SERVING_HASH

from .test_rollout import failed, load, rollout

GPU = "nvidia.com/gpu"


@pytest.fixture
def two_gpus(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    """The node has two GPUs for whoever asks now. Those of pods that are going are counted as if they were free already."""
    pods = json.loads(cluster.kubectl("get", "pods", "--all-namespaces", "-o", "json").stdout)["items"]
    held = [
        p["spec"] for p in pods if "deletionTimestamp" not in p["metadata"] and p["status"]["phase"] in ("Pending", "Running")
    ]
    taken = sum(int(c.get("resources", {}).get("limits", {}).get(GPU, 0)) for spec in held for c in spec["containers"])
    node = Stage(cluster, tmp_path)
    node.offer_gpus(taken + 2)
    yield
    node.offer_gpus(cluster.gpus or 1)


def ready_pods(tenant: Tenant) -> Counter[str]:
    """By version; those that are going do not count."""
    pods = tenant.list("pods", "serving.perch.dev/component=triton")
    return Counter(p["metadata"]["labels"]["serving.perch.dev/version"] for p in pods if is_ready(p))


def test_where_no_gpu_is_to_spare_a_canary_takes_its_place_from_stable_and_an_abort_gives_it_back(
    tenant: Tenant, two_gpus: None
) -> None:
    """The canary is a shadow, so that its failures are no user's."""
    entries = upload_digits(tenant)
    runtime = {"terminationGracePeriodSeconds": 30, "replicas": 2, "resources": {"limits": {GPU: 1}}}
    shadow = deployment(
        tenant,
        entries,
        runtime=runtime,
        traffic={"stable": 1, "canary": 2, "mirror": {"percent": 20}},
        rollout=rollout(surge="WithinReplicas", inspectFor="10s", steps=[{"weight": 0, "hold": "1h"}, {"weight": 100}]),
    )
    publish(tenant, shadow, 2)
    tenant.apply(deployment(tenant, entries, runtime=runtime))
    tenant.wait_ready("digits", "Serving")
    assert ready_pods(tenant) == {"1": 2}
    with load(tenant, images=mark(held_out()[0], Kind.ERROR, share=0.5, count=20_000)) as running:
        tenant.apply(shadow)
        arithmetic = "surge is WithinReplicas: 1 of 2 pods are stable's, each has 100 % of the traffic where it would have 50 %"
        tenant.wait(lambda: tenant.condition("digits").get("message", ""), lambda said: arithmetic in said)
        tenant.wait(lambda: ready_pods(tenant), lambda pods: pods == {"1": 1, "2": 1}, 90)
        tenant.wait_reason("digits", "ErrorRateHigher", timeout=90)
        # It is kept for inspectFor, on the GPU that stable waits for.
        tenant.wait(lambda: ready_pods(tenant), lambda pods: pods == {"1": 2}, 120)
    assert failed(running.results()) == []


def test_pods_that_an_autoscaler_grew_stay_through_a_release_and_a_changed_runtime(tenant: Tenant) -> None:
    """There is no metrics server here: `kubectl scale` stands in for growth by load. The autoscaler itself keeps its minimum."""
    entries = upload_digits(tenant)
    scaling = {"minReplicas": 1, "maxReplicas": 4, "targetCPUUtilizationPercentage": 80}
    runtime = {
        "terminationGracePeriodSeconds": 30,
        "resources": {"requests": {"cpu": "20m"}},
        "autoscaling": scaling,
    }
    tenant.apply(deployment(tenant, entries, runtime=runtime))
    tenant.wait_ready("digits", "Serving")
    tenant.wait(lambda: able_to_scale(tenant, 1), bool)
    tenant.kubectl("scale", "deployment/digits-v1", "--replicas=3")
    tenant.wait(lambda: ready_pods(tenant), lambda pods: pods == {"1": 3})
    with load(tenant) as running:
        steps = [{"weight": 50, "hold": "5s"}, {"weight": 100}]
        tenant.apply(deployment(tenant, entries, canary=2, runtime=runtime, rollout=rollout(steps=steps, scaleDownDelay="1m")))
        tenant.wait_ready("digits", "AwaitingPromotion")
        assert autoscaler(tenant, 1)["spec"]["minReplicas"] == 3
        assert scalings(tenant, 1) == ["from 0 to 1", "from 1 to 3"]
        assert scalings(tenant, 2) == ["from 0 to 2", "from 2 to 3"]

        # The commit that finishes the release, and one more change of what is rendered into the Deployment.
        before = (tenant.get("deployment", "digits-v2") or {})["metadata"]["annotations"][ANNOTATION_SERVING_HASH]
        runtime["env"] = [{"name": "MARK", "value": "1"}]
        tenant.apply(deployment(tenant, entries, stable=2, runtime=runtime))
        after = tenant.wait(
            lambda: tenant.get("deployment", "digits-v2"),
            lambda found: found["metadata"]["annotations"][ANNOTATION_SERVING_HASH] != before,
        )
        assert after["spec"]["replicas"] == 3
        assert autoscaler(tenant, 2)["spec"]["minReplicas"] == 1
    assert failed(running.results()) == []


def autoscaler(tenant: Tenant, version: int) -> dict[str, Any]:
    return tenant.get("hpa", f"digits-v{version}") or {}


def able_to_scale(tenant: Tenant, version: int) -> bool:
    """Whether the controller has taken the autoscaler in and found what it scales."""
    conditions = autoscaler(tenant, version).get("status", {}).get("conditions", [])
    return any(c["type"] == "AbleToScale" and c["status"] == "True" for c in conditions)


def scalings(tenant: Tenant, version: int) -> list[str]:
    """Every change of a Deployment's number of pods, by the events of its controller: none is so short as to be overlooked."""
    selector = f"involvedObject.name=digits-v{version},reason=ScalingReplicaSet"
    events = json.loads(tenant.kubectl("get", "events", f"--field-selector={selector}", "-o", "json"))["items"]
    return [f"from {e['message'].split(' from ')[1]}" for e in sorted(events, key=lambda e: str(e["firstTimestamp"]))]

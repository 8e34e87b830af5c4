"""Deletion, operators that are away, upgraded or doubled, and components that fail."""

from __future__ import annotations

import time
from typing import Any

import pytest

from devcluster import Cluster
from devcluster.release import NAMESPACE, install
from devcluster.tenant import Tenant

from .conftest import deployment, upload_digits
from .test_journey import answers, kill_operator, pod_uids


def scale_operator(cluster: Cluster, replicas: int) -> None:
    cluster.kubectl("-n", NAMESPACE, "scale", "deployment/perch", f"--replicas={replicas}")
    selector = "-l", "app.kubernetes.io/name=perch"
    if replicas:
        cluster.kubectl("-n", NAMESPACE, "rollout", "status", "deployment/perch", "--timeout=120s")
    else:
        cluster.kubectl("-n", NAMESPACE, "wait", "--for=delete", "pods", *selector, "--timeout=60s")


def with_policy(tenant: Tenant, policy: str) -> dict[str, Any]:
    entries = upload_digits(tenant)[:1]
    manifest = deployment(tenant, entries, routing=None, rollout=None)
    manifest["spec"]["repository"]["deletionPolicy"] = policy
    return manifest


@pytest.mark.parametrize("policy", ["Retain", "Delete"])
def test_deletion_keeps_or_erases_the_artefacts_as_the_policy_says(tenant: Tenant, policy: str) -> None:
    tenant.apply(with_policy(tenant, policy))
    tenant.wait_ready("digits")
    prefix = f"e2e/{tenant.namespace}/digits/"
    assert tenant.keys(prefix)
    tenant.kubectl("delete", "mdep", "digits", "--timeout=90s")
    assert bool(tenant.keys(prefix)) == (policy == "Retain")
    tenant.wait(lambda: tenant.list("deployments") + tenant.list("jobs") + tenant.list("pods"), lambda left: not left, 90)


def test_deletion_does_not_hang_while_the_operator_is_away_nor_with_the_whole_namespace(tenant: Tenant) -> None:
    cluster = tenant.cluster
    other = Tenant(cluster, f"{tenant.namespace}-2").make()
    tenant.apply(with_policy(tenant, "Retain"))
    other.apply(with_policy(other, "Delete"))
    tenant.wait_ready("digits")
    other.wait_ready("digits")
    scale_operator(cluster, 0)
    try:
        tenant.kubectl("delete", "mdep", "digits", "--timeout=30s")
        tenant.wait(lambda: tenant.list("deployments"), lambda left: not left, 60)
    finally:
        scale_operator(cluster, 1)
    # With Delete a finalizer holds the object; in a namespace that goes, no cleanup can run and the finalizer is released.
    cluster.kubectl("delete", "namespace", other.namespace, "--timeout=120s")


def test_an_operator_upgrade_restarts_no_model(tenant: Tenant) -> None:
    """kserve#5085, modelmesh-serving#486: another build with other pod defaults, sidecar image and labels."""
    cluster = tenant.cluster
    tenant.apply(deployment(tenant, upload_digits(tenant)[:1]))
    tenant.wait_ready("digits")
    before = pod_uids(tenant)
    generation = tenant.get("deployment", "digits-v1")["metadata"]["generation"]  # type: ignore[index]
    try:
        install(
            cluster, "artifacts.image=example.com/another-artifacts:9", "triton.image=example.com/another-triton:9",
            "exporter.image=example.com/another-exporter:9", "imagePullPolicy=Always", "podAnnotations.upgrade=yes",
        )  # fmt: skip
        # Make it look at the object anew, and give it time to do harm.
        tenant.kubectl("annotate", "mdep", "digits", "look=again")
        time.sleep(5)
        assert answers(tenant, 5) == {"1": 5}
        assert pod_uids(tenant) == before
        assert tenant.get("deployment", "digits-v1")["metadata"]["generation"] == generation  # type: ignore[index]
        assert tenant.condition("digits")["status"] == "True"
    finally:
        install(cluster)


def test_of_two_operators_one_acts_and_the_other_takes_over(tenant: Tenant) -> None:
    cluster = tenant.cluster
    tenant.apply(deployment(tenant, upload_digits(tenant)[:1]))
    tenant.wait_ready("digits")
    install(cluster, "replicas=2")
    try:
        lease = ("-n", NAMESPACE, "get", "lease", "perch", "-o", "jsonpath={.spec.holderIdentity}")
        holder = tenant.wait(lambda: cluster.kubectl(*lease).stdout, bool, 60)
        kill_operator(tenant)
        began = time.monotonic()
        cluster.kubectl("-n", NAMESPACE, "delete", "pod", holder, "--grace-period=0", "--force", "--wait=false")
        taker = tenant.wait(lambda: cluster.kubectl(*lease).stdout, lambda now: now not in ("", holder), 60)
        took = time.monotonic() - began
        assert taker != holder
        print(f"takeover after SIGKILL: {took:.1f} s")
        assert answers(tenant, 5) == {"1": 5}
        tenant.apply(deployment(tenant, upload_digits(tenant)[:1], runtime={"replicas": 2, "terminationGracePeriodSeconds": 30}))
        tenant.wait(lambda: len(pod_uids(tenant)), lambda n: n == 2, 60)
    finally:
        install(cluster, "replicas=1")


def test_what_others_change_on_children_is_put_right(tenant: Tenant) -> None:
    tenant.apply(deployment(tenant, upload_digits(tenant)[:1]))
    tenant.wait_ready("digits")
    tenant.kubectl("delete", "service", "digits-v1")
    tenant.wait(lambda: tenant.get("service", "digits-v1"), bool, 20)
    tenant.kubectl("delete", "httproute", "digits")
    tenant.wait(lambda: tenant.get("httproute", "digits"), bool, 20)
    tenant.kubectl("scale", "deployment", "digits-v1", "--replicas=0")
    tenant.wait(lambda: tenant.get("deployment", "digits-v1")["spec"]["replicas"], lambda n: n == 1, 20)  # type: ignore[index]
    tenant.wait_ready("digits")
    assert answers(tenant, 5) == {"1": 5}


def test_a_crash_looping_pod_is_never_called_ready(tenant: Tenant) -> None:
    """kserve#1859, #2037: Ready=True while pods crash-loop."""
    entries = upload_digits(tenant)[:1]
    broken = {"terminationGracePeriodSeconds": 30, "env": [{"name": "LD_LIBRARY_PATH", "value": "/nowhere"}]}
    tenant.apply(deployment(tenant, entries, runtime=broken, routing=None, rollout=None))
    condition = tenant.wait(lambda: tenant.condition("digits"), lambda c: "CrashLoopBackOff" in c.get("message", ""), 120)
    assert condition["status"] == "False"
    assert tenant.condition("digits", "Available")["status"] == "False"
    tenant.apply(deployment(tenant, entries, routing=None, rollout=None))
    tenant.wait_ready("digits")

"""A release that watches one namespace: it serves there by Roles alone, and neither sees nor touches another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from demo.manifests import deployment, upload_digits
from devcluster.release import NAMESPACE, RELEASE, install
from devcluster.tenant import Tenant

from .test_journey import answers

ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"
NEEDED = ["list pods", "watch jobs.batch", "create deployments.apps", "patch httproutes.gateway.networking.k8s.io"]


@pytest.fixture
def neighbour(tenant: Tenant) -> Iterator[Tenant]:
    other = Tenant(tenant.cluster, f"{tenant.namespace}-2").make()
    yield other
    other.delete(wait=False)


def may(tenant: Tenant, right: str) -> bool:
    return tenant.kubectl("auth", "can-i", *right.split(), f"--as={ACCOUNT}", check=False).strip() == "yes"


def test_a_release_for_one_namespace_serves_there_and_touches_no_other(tenant: Tenant, neighbour: Tenant) -> None:
    cluster = tenant.cluster
    for each in (tenant, neighbour):
        assert all(may(each, right) for right in NEEDED), "cluster-wide it may: else the refusals below would say nothing"
    install(cluster, f"watch.namespaces={{{tenant.namespace}}}", "clusterName=namespaced")
    try:
        ours = ("-l", f"app.kubernetes.io/instance={RELEASE}", "-o", "name")
        assert cluster.kubectl("get", "clusterroles,clusterrolebindings", *ours).stdout == ""
        assert [right for right in NEEDED if not may(tenant, right)] == []
        assert [right for right in NEEDED if may(neighbour, right)] == []
        assert not may(tenant, "get secrets")
        for each in (neighbour, tenant):
            each.apply(deployment(each, upload_digits(each)[:1]))
        tenant.wait_ready("digits", "Serving")
        assert answers(tenant, 5) == {"1": 5}
        assert neighbour.status("digits") == {}
        assert neighbour.list("jobs") + neighbour.list("deployments") + neighbour.list("pods") == []
    finally:
        install(cluster)
    # It lacked nothing but an operator that watches it; and the other one goes on, though its artefact has another owner's name.
    neighbour.wait_ready("digits", "Serving")
    assert tenant.wait_ready("digits")["reason"] == "Serving"
    assert answers(tenant, 5) == {"1": 5}

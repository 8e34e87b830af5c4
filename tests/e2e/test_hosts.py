"""Two ModelDeployments, and a stranger's route, that want one host name, on a whole real cluster."""

from __future__ import annotations

from typing import Any

from demo.manifests import deployment, upload_digits
from devcluster.tenant import Tenant

from .test_journey import answers, host


def test_the_second_model_with_a_host_name_says_who_has_it_takes_nothing_and_follows(tenant: Tenant) -> None:
    entries = upload_digits(tenant)[:1]
    first, second = (deployment(tenant, entries, name=name) for name in ("digits", "others"))
    second["spec"]["routing"] = first["spec"]["routing"]
    tenant.apply(first)
    tenant.wait_ready("digits", "Serving")
    tenant.apply(second)
    told = tenant.wait_reason("others", "HostnameConflict")
    assert f"ModelDeployment {tenant.namespace}/digits has host name {host(tenant)}" in told["message"]
    assert tenant.condition("others", "TrafficAccepted")["status"] == "False"
    assert tenant.get("httproute", "others") is None
    assert tenant.condition("digits")["status"] == "True"
    assert answers(tenant, 10) == {"1": 10}

    tenant.apply(stranger(first))
    told = tenant.wait_reason("digits", "HostnameConflict", "TrafficAccepted")
    assert f"HTTPRoute {tenant.namespace}/stranger" in told["message"]
    tenant.kubectl("delete", "httproute", "stranger")
    tenant.wait_ready("digits", "Serving")

    tenant.kubectl("delete", "modeldeployment", "digits")
    tenant.wait_ready("others", "Serving")
    tenant.apply(first)
    told = tenant.wait_reason("digits", "HostnameConflict")
    assert f"ModelDeployment {tenant.namespace}/others has host name" in told["message"]
    assert tenant.condition("others")["status"] == "True"


def stranger(model: dict[str, Any]) -> dict[str, Any]:
    """A route of somebody else's for one of the model's paths."""
    path = {"path": {"type": "Exact", "value": "/v2"}}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "stranger", "namespace": model["metadata"]["namespace"]},
        "spec": {
            **model["spec"]["routing"],
            "rules": [{"matches": [path], "backendRefs": [{"name": "digits-v1", "port": 8000}]}],
        },
    }

"""The main job on a whole real cluster: first deploy, fixed split, promotion and rollback under load, the operator killed."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import httpx
import psutil
import pytest

from demo.digits import held_out
from demo.load import Load, grpc_client, infer
from demo.manifests import deployment, upload_digits
from devcluster.tenant import Tenant

HOST = "digits.{}.example.com"


def host(tenant: Tenant) -> str:
    return HOST.format(tenant.namespace)


def pod_uids(tenant: Tenant) -> set[str]:
    return {p["metadata"]["uid"] for p in tenant.list("pods", "serving.perch.dev/component=triton")}


def operators(tenant: Tenant) -> list[psutil.Process]:
    """The processes of this cluster's operator, on this machine."""
    cluster_ip = tenant.cluster.kubectl("get", "service", "kubernetes", "-o", "jsonpath={.spec.clusterIP}").stdout
    return [process for process in psutil.process_iter(["cmdline"]) if is_operator(process, cluster_ip)]


def kill_operator(tenant: Tenant) -> None:
    """SIGKILL to the operator's process itself: no goodbye, no released Lease. (Deleting its pod by force begins with a SIGTERM.)

    Waits until there is one: the kubelet lets a container that was killed before wait longer each time.
    """
    for process in tenant.wait(lambda: operators(tenant), bool, 120):
        process.kill()


def is_operator(process: psutil.Process, cluster_ip: str) -> bool:
    """Whether it is this cluster's operator: others may stand beside it on the machine."""
    try:
        words = process.info["cmdline"] or []
        return words[1:3] == ["-m", "perch"] and process.environ().get("KUBERNETES_SERVICE_HOST") == cluster_ip
    except psutil.Error:
        return False


def answers(tenant: Tenant, count: int) -> Counter[str]:
    """Which version answered, by its own word, over so many gRPC requests through the gateway."""
    client = grpc_client(tenant.cluster.gateway_address(), host(tenant))
    images, _ = held_out()
    return Counter(infer(client, "digits", images[i % len(images)][None])[1] for i in range(count))


def test_a_release_and_its_rollback_lose_no_request_even_when_the_operator_dies(tenant: Tenant) -> None:
    entries = upload_digits(tenant)
    tenant.apply(deployment(tenant, entries))
    kill_operator(tenant)
    tenant.wait_ready("digits", "Serving")
    assert answers(tenant, 20) == {"1": 20}
    status = tenant.status("digits")
    by_version = {v["version"]: v for v in status["versions"]}
    assert by_version[1]["phase"] == "Serving"
    tenant.wait(lambda: tenant.status("digits")["versions"][1]["phase"], lambda phase: phase == "Published")
    assert by_version[1]["parity"]["verdict"] == "Passed"
    stored = tenant.keys(f"e2e/{tenant.namespace}/digits/1-")
    assert {key.rsplit("/", 1)[1] for key in stored} >= {"manifest.json", "model.onnx", "config.pbtxt", "golden.npz"}

    # REST and gRPC answer on one host name, and what is not this model's inference is not routed.
    address = "http://{}:{}".format(*tenant.cluster.gateway_address())
    with httpx.Client(base_url=address, headers={"Host": host(tenant)}) as rest:
        assert rest.get("/v2/models/digits/ready").status_code == 200
        assert rest.get("/v2/models/digits").json()["versions"] == ["1"]
        for hidden in ("/v2/repository/index", "/v2/systemsharedmemory/status", "/v2/trace/setting", "/v2/logging", "/metrics"):
            assert rest.request("POST", hidden).status_code == 404, hidden
            assert rest.get(hidden).status_code == 404, hidden

    # A canary of 10 %, while the operator is killed.
    tenant.apply(deployment(tenant, entries, canary=2))
    kill_operator(tenant)
    tenant.wait_ready("digits", "SplitHeld")
    seen = answers(tenant, 200)
    assert seen["1"] == pytest.approx(180, abs=6)
    assert seen["2"] == pytest.approx(20, abs=6)
    pods = pod_uids(tenant)

    # Promotion and rollback under load from both protocols, the operator killed in the middle of each.
    with Load(tenant.cluster.gateway_address(), host(tenant), "digits", grpc_rate=40, rest_rate=10) as load:
        time.sleep(2)
        for stable in (2, 1):
            victims = tenant.wait(lambda: operators(tenant), bool, 120)
            tenant.apply(deployment(tenant, entries, stable=stable))
            for victim in victims:
                victim.kill()
            tenant.wait_ready("digits", "Serving")
            assert tenant.status("digits")["weights"]["accepted"][stable - 1] == {"version": stable, "weight": 100}
            time.sleep(1)
            assert answers(tenant, 20) == {str(stable): 20}
        time.sleep(2)
    results = load.results()
    assert len(results) > 200
    failed = [r for r in results if not r.ok]
    assert failed == []
    assert {r.protocol for r in results} == {"grpc", "rest"}
    assert pod_uids(tenant) >= pods, "no pod was restarted by a promotion or a rollback"

    # The version that left traffic is drained, then scaled away; the one that serves is untouched.
    tenant.wait(lambda: tenant.get("deployment", "digits-v2"), lambda found: found is None, 90)
    assert tenant.get("service", "digits-v2") is None
    assert answers(tenant, 10) == {"1": 10}


def test_a_changed_runtime_rolls_the_pods_without_a_lost_request(tenant: Tenant) -> None:
    entries = upload_digits(tenant)[:1]
    tenant.apply(deployment(tenant, entries))
    tenant.wait_ready("digits")
    before = pod_uids(tenant)
    with Load(tenant.cluster.gateway_address(), host(tenant), "digits", grpc_rate=40, rest_rate=10) as load:
        time.sleep(1)
        runtime = {"terminationGracePeriodSeconds": 30, "replicas": 2, "env": [{"name": "MARK", "value": "1"}]}
        tenant.apply(deployment(tenant, entries, runtime=runtime))
        tenant.wait_ready("digits")
        tenant.wait(lambda: pod_uids(tenant) & before, lambda left: not left, 90)
        time.sleep(2)
    assert [r for r in load.results() if not r.ok] == []
    assert len(load.results()) > 200
    assert tenant.get("pdb", "digits-v1") is not None
    pods = tenant.list("pods", "serving.perch.dev/component=triton")
    assert len(pods) == 2
    assert_locked_down(pods[0])


def assert_locked_down(pod: dict[str, Any]) -> None:
    """No credential beside Triton, no Kubernetes token, non-root, read-only."""
    spec = pod["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    for container in spec["containers"]:
        names = {e["name"] for e in container.get("env", [])}
        assert not any("AWS" in name for name in names), container["name"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert not any("serviceaccount" in m["mountPath"] for m in container["volumeMounts"])

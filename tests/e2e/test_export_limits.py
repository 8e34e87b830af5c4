"""Exports that take more than they may: each ends, and the condition names the limit and the field that raises it."""

from __future__ import annotations

import hashlib
import io
import zipfile
from typing import Any

import pytest

from demo.manifests import CHECKPOINTS, deployment, lenet, upload_digits
from devcluster.kind import is_wanted
from devcluster.tenant import Tenant

ENDLESS = "def build():\n    while True: pass\n"


def with_code(tenant: Tenant, text: str) -> list[dict[str, Any]]:
    """The demo's checkpoint, with a network of the user's own that runs this."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("net.py", text)
    sha = tenant.upload(f"{tenant.namespace}/net.zip", content.getvalue())
    weights = (CHECKPOINTS / "v1.pt").read_bytes()
    tenant.upload(f"{tenant.namespace}/v1.pt", weights)
    source = {"uri": f"s3://checkpoints/{tenant.namespace}/net.zip", "sha256": sha}
    architecture = {"entryPoint": "net:build", "source": source}
    return [lenet(1, f"{tenant.namespace}/v1.pt", hashlib.sha256(weights).hexdigest(), architecture=architecture)]


def test_an_export_that_is_killed_for_memory_names_its_limit_and_succeeds_with_a_larger_one(tenant: Tenant) -> None:
    entries = upload_digits(tenant)[:1]
    builder: dict[str, Any] = {"resources": {"limits": {"memory": "150Mi"}}}
    tenant.apply(deployment(tenant, entries, builder=builder, routing=None, rollout=None))
    wanted = (
        "convert was killed for want of memory, of which it may have 150Mi (OOMKilled): raise builder.resources.limits.memory"
    )
    condition = tenant.wait(lambda: tenant.condition("digits"), lambda c: wanted in c.get("message", ""), 120)
    assert condition["status"] == "False"
    condition = tenant.wait_reason("digits", "ExportRetrying", timeout=400)
    assert wanted in condition["message"]
    tenant.apply(deployment(tenant, entries, routing=None, rollout=None))
    tenant.wait_ready("digits", timeout=400)


def test_code_that_never_ends_is_ended_by_the_deadline_and_the_condition_says_so(tenant: Tenant) -> None:
    builder = {"activeDeadlineSeconds": 60}
    tenant.apply(deployment(tenant, with_code(tenant, ENDLESS), builder=builder, routing=None, rollout=None))
    condition = tenant.wait_reason("digits", "ExportRetrying", timeout=180)
    assert "longer than its 60 s and was ended (DeadlineExceeded): raise builder.activeDeadlineSeconds" in condition["message"]
    assert not [key for key in tenant.keys(f"e2e/{tenant.namespace}/") if key.endswith("manifest.json")]


def test_a_network_policy_stands_before_the_first_export_and_goes_when_it_is_no_longer_asked_for(tenant: Tenant) -> None:
    entries = upload_digits(tenant)[:1]
    builder = {"networkPolicy": {"allow": [{"namespace": "storage"}]}}
    tenant.apply(deployment(tenant, entries, builder=builder, routing=None, rollout=None))
    tenant.wait_ready("digits", timeout=300)
    policy = tenant.get("networkpolicy", "digits-export")
    assert policy is not None
    jobs = tenant.list("jobs", "serving.perch.dev/component=export")
    assert policy["metadata"]["creationTimestamp"] <= jobs[0]["metadata"]["creationTimestamp"]
    assert policy["metadata"]["ownerReferences"][0]["kind"] == "ModelDeployment"
    tenant.apply(deployment(tenant, entries, routing=None, rollout=None))
    tenant.wait(lambda: tenant.get("networkpolicy", "digits-export"), lambda found: found is None, 60)


REACH = """
import socket
def reaches(host, port):
    try:
        socket.create_connection((host, port), 5).close()
        return True
    except OSError:
        return False
print(reaches("s3.storage.svc", 9000), reaches("kubernetes.default.svc", 443))
"""


@pytest.mark.skipif(
    not is_wanted(), reason="NOT TESTED HERE: this cluster's network enforces no NetworkPolicy; kind's does (PERCH_BACKEND=kind)"
)
def test_an_export_pod_reaches_its_store_and_nothing_else_private_and_the_same_pod_without_the_policy_does(
    tenant: Tenant,
) -> None:
    builder = {"networkPolicy": {"allow": [{"namespace": "storage"}]}}
    tenant.apply(deployment(tenant, upload_digits(tenant)[:1], builder=builder, routing=None, rollout=None))
    tenant.wait(lambda: tenant.get("networkpolicy", "digits-export"), lambda found: found is not None, 60)
    labels = {"serving.perch.dev/model-deployment": "digits", "serving.perch.dev/component": "export"}
    for name, more in (("confined", labels), ("control", {})):
        container = {"name": "reach", "image": tenant.cluster.images["perch-artifacts"], "command": ["python3", "-c", REACH]}
        pod = {"restartPolicy": "Never", "automountServiceAccountToken": False, "containers": [container]}
        tenant.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": tenant.namespace, "labels": more},
                "spec": pod,
            }
        )
    phase = ("-o", "jsonpath={.status.phase}")
    for name, says in (("confined", "True False"), ("control", "True True")):
        tenant.wait(lambda name=name: tenant.kubectl("get", "pod", name, *phase), lambda now: now == "Succeeded", 120)
        assert tenant.kubectl("logs", name).strip() == says

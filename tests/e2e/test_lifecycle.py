"""Deletion, operators that are away, upgraded or doubled, and components that fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from demo.manifests import deployment, upload_digits
from devcluster import Cluster
from devcluster.release import NAMESPACE, install
from devcluster.tenant import Tenant

from .test_journey import answers, operators, pod_uids
from .test_rollout import failed, load

ROOT = Path(__file__).resolve().parents[2]


def scale_operator(cluster: Cluster, replicas: int) -> None:
    cluster.kubectl("-n", NAMESPACE, "scale", "deployment/perch", f"--replicas={replicas}")
    selector = "-l", "app.kubernetes.io/name=perch"
    if replicas:
        cluster.kubectl("-n", NAMESPACE, "rollout", "status", "deployment/perch", "--timeout=120s")
    else:
        cluster.kubectl("-n", NAMESPACE, "wait", "--for=delete", "pods", *selector, "--timeout=60s")


def holder(cluster: Cluster) -> str:
    """The operator's pod that holds the Lease: the one that acts."""
    return cluster.kubectl("-n", NAMESPACE, "get", "lease", "perch", "-o", "jsonpath={.spec.holderIdentity}").stdout


def next_holder(tenant: Tenant, former: str) -> str:
    taker: str = tenant.wait(lambda: holder(tenant.cluster), lambda now: now not in ("", former), 60)
    return taker


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


def test_what_docs_say_in_place_of_deleting_by_hand_loses_no_request(tenant: Tenant) -> None:
    """docs/releases-and-rollbacks.md. Deleting an object and applying it again lost every request of 12 s."""
    manifest = deployment(tenant, upload_digits(tenant)[:1], runtime={"replicas": 2})
    tenant.apply(manifest)
    tenant.wait_ready("digits", "Serving")
    first = pod_uids(tenant)
    with load(tenant) as running:
        tenant.kubectl("delete", "modeldeployment", "digits", "--cascade=orphan")
        tenant.apply(manifest)
        tenant.wait_ready("digits", "Serving")
        # The new object's pods bear its own uid, so they replace the former ones, one after the other.
        tenant.wait(lambda: pod_uids(tenant), lambda uids: len(uids) == 2 and not uids & first, 120)
        tenant.wait_ready("digits", "Serving")
        again = pod_uids(tenant)
        tenant.kubectl("rollout", "restart", "deployment", "digits-v1")
        tenant.wait(lambda: pod_uids(tenant), lambda uids: len(uids) == 2 and not uids & again, 120)
        tenant.wait_ready("digits", "Serving")
    assert failed(running.results()) == []
    (owner,) = (tenant.get("deployment", "digits-v1") or {})["metadata"]["ownerReferences"]
    assert owner["uid"] == (tenant.get("modeldeployment", "digits") or {})["metadata"]["uid"]


def test_deletion_does_not_hang_while_the_operator_is_away_nor_with_the_whole_namespace(tenant: Tenant) -> None:
    cluster = tenant.cluster
    waiting, going = (Tenant(cluster, f"{tenant.namespace}-{number}").make() for number in (2, 3))
    tenant.apply(with_policy(tenant, "Retain"))
    for each in (waiting, going):
        each.apply(with_policy(each, "Delete"))
    for each in (tenant, waiting, going):
        each.wait_ready("digits")
    prefix = f"e2e/{waiting.namespace}/digits/"
    scale_operator(cluster, 0)
    try:
        # With Delete a finalizer holds the object until the artefacts are erased, which waits for an operator.
        waiting.kubectl("delete", "mdep", "digits", "--wait=false")
        tenant.kubectl("delete", "mdep", "digits", "--timeout=30s")
        tenant.wait(lambda: tenant.list("deployments"), lambda left: not left, 60)
        assert waiting.get("mdep", "digits") is not None
        assert waiting.keys(prefix)
    finally:
        scale_operator(cluster, 1)
    waiting.kubectl("wait", "--for=delete", "mdep/digits", "--timeout=60s")
    assert waiting.keys(prefix) == []
    waiting.delete(wait=False)
    # In a namespace that goes no cleanup can run, and the finalizer is released.
    cluster.kubectl("delete", "namespace", going.namespace, "--timeout=120s")


def test_an_operator_upgrade_restarts_no_model(tenant: Tenant) -> None:
    """kserve#5085, modelmesh-serving#486: a Helm upgrade with other images and pull policy."""
    cluster = tenant.cluster
    entries = upload_digits(tenant)
    tenant.apply(deployment(tenant, entries[:1]))
    tenant.wait_ready("digits")
    before, former = pod_uids(tenant), holder(cluster)
    generation = tenant.get("deployment", "digits-v1")["metadata"]["generation"]  # type: ignore[index]
    try:
        install(
            cluster, "artifacts.image=example.com/another-artifacts:9", "triton.image=example.com/another-triton:9",
            "exporter.image=example.com/another-exporter:9", "imagePullPolicy=Always", "podAnnotations.upgrade=yes",
        )  # fmt: skip
        next_holder(tenant, former)
        # The new one does act: the version that is listed now gets its Job, with the new image.
        tenant.apply(deployment(tenant, entries))
        tenant.wait(lambda: json.dumps(tenant.list("jobs")), lambda jobs: "example.com/another-exporter:9" in jobs, 30)
        tenant.wait_ready("digits", "Serving")
        assert answers(tenant, 5) == {"1": 5}
        assert pod_uids(tenant) == before
        assert tenant.get("deployment", "digits-v1")["metadata"]["generation"] == generation  # type: ignore[index]
    finally:
        install(cluster)


@contextmanager
def another_build(cluster: Cluster, folder: Path) -> Iterator[Path]:
    """The operator of another release in the place of the cluster's own: other labels, other pod defaults, other images.

    It runs outside the cluster, from changed sources; yields its log.
    """
    shutil.copytree(ROOT / "operator" / "perch", folder / "perch")
    for file, (old, new) in {
        "names.py": ('"app.kubernetes.io/name": name}', '"app.kubernetes.io/name": name, "app.kubernetes.io/version": "9"}'),
        "builders/serving.py": ('"periodSeconds": 2,', '"periodSeconds": 7,'),
        "builders/__init__.py": ('"memory": "512Mi"', '"memory": "768Mi"'),
    }.items():
        text = (folder / "perch" / file).read_text()
        assert old in text, f"{file} has changed: the other build would not differ"
        (folder / "perch" / file).write_text(text.replace(old, new))
    env = {
        **os.environ, "KUBECONFIG": str(cluster.kubeconfig), "PYTHONPATH": f"{folder}:{ROOT / 'exporters'}",
        "PERCH_EXPORTER_IMAGE": "example.com/e:9", "PERCH_ARTIFACTS_IMAGE": "example.com/a:9",
        "PERCH_TRITON_IMAGE": "example.com/t:9",
        "PERCH_NAMESPACE": NAMESPACE, "PERCH_POD_NAME": "another-build", "PERCH_HTTP_PORT": "18091",
    }  # fmt: skip
    log = folder / "log"
    scale_operator(cluster, 0)
    with log.open("wb") as sink:
        operator = subprocess.Popen([sys.executable, "-m", "perch"], env=env, stdout=sink, stderr=sink)
    try:
        yield log
    finally:
        operator.terminate()
        operator.wait(20)
        scale_operator(cluster, 1)


def test_another_build_of_the_operator_restarts_no_model(tenant: Tenant, tmp_path: Path) -> None:
    entries = upload_digits(tenant)
    tenant.apply(deployment(tenant, entries[:1]))
    tenant.wait_ready("digits")
    before = pod_uids(tenant)
    generation = tenant.get("deployment", "digits-v1")["metadata"]["generation"]  # type: ignore[index]
    with another_build(tenant.cluster, tmp_path) as log:
        tenant.wait(log.read_text, lambda said: "took Lease" in said, 60)
        # It does act: the version that is listed now gets its Job, with the other build's labels.
        tenant.apply(deployment(tenant, entries))
        jobs = tenant.wait(lambda: tenant.list("jobs", "app.kubernetes.io/version=9"), bool, 30)
        assert len(jobs) == 1
        assert pod_uids(tenant) == before
        assert tenant.get("deployment", "digits-v1")["metadata"]["generation"] == generation  # type: ignore[index]
        assert answers(tenant, 5) == {"1": 5}


def test_of_two_operators_one_acts_and_the_other_takes_over(tenant: Tenant) -> None:
    cluster = tenant.cluster
    tenant.apply(deployment(tenant, upload_digits(tenant)[:1]))
    tenant.wait_ready("digits")
    install(cluster, "replicas=2")
    try:
        both = tenant.wait(lambda: operators(tenant), lambda found: len(found) == 2, 60)
        by_pod = {process.environ()["PERCH_POD_NAME"]: process for process in both}
        former = next_holder(tenant, "")
        acting = by_pod.pop(former)
        ((expected, standby),) = by_pod.items()
        began = time.monotonic()
        acting.kill()
        # Gone with its pod, or its container would start again under the same name, which may have the Lease back at once.
        cluster.kubectl("-n", NAMESPACE, "delete", "pod", former, "--grace-period=0", "--force", "--wait=false")
        assert next_holder(tenant, former) == expected
        took = time.monotonic() - began
        print(f"takeover after SIGKILL: {took:.1f} s")
        assert took < 20
        assert standby.is_running(), "the one that stood by was not touched"
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

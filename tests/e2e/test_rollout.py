"""Rollouts that judge themselves, on a whole real cluster under live load: forward on evidence, back by themselves, nothing lost.

The promises are those of docs/rollouts.md; where users of other systems have suffered, the issue is named.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from demo.digits import held_out
from demo.load import Answer, Load
from demo.manifests import deployment, upload_digits
from devcluster.tenant import Tenant
from faults import Kind, mark
from faults.publish import publish

from .judged import rollout
from .test_journey import host, kill_operator
from .watching import Watch


@contextmanager
def load(tenant: Tenant, **more: Any) -> Iterator[Load]:
    with Load(tenant.cluster.gateway_address(), host(tenant), "digits", grpc_rate=30, rest_rate=10, **more) as running:
        yield running


def failed(answers: list[Answer]) -> list[Answer]:
    return [a for a in answers if not a.ok]


def test_a_healthy_canary_goes_through_its_steps_by_itself_even_when_the_operator_is_killed(tenant: Tenant) -> None:
    """kserve#3085: automatic promotion wanted. argo-rollouts#4612, #4841: weight moved before the backend switched."""
    entries = upload_digits(tenant)
    tenant.apply(deployment(tenant, entries))
    tenant.wait_ready("digits", "Serving")
    with Watch(tenant) as watch, load(tenant) as running:
        tenant.apply(deployment(tenant, entries, canary=2, rollout=rollout()))
        tenant.wait(lambda: (tenant.status("digits").get("step") or {}).get("until"), bool, 60)
        kill_operator(tenant)
        tenant.wait_ready("digits", "AwaitingPromotion", 180)
        # Stable is scaled away after scaleDownDelay; the commit that finishes the release moves nothing.
        tenant.wait(lambda: tenant.get("deployment", "digits-v1"), lambda found: found is None, 90)
        tenant.apply(deployment(tenant, entries, stable=2, rollout=rollout()))
        tenant.wait_ready("digits", "Serving")
    watch.check()
    assert watch.shares(2) == [0, 20, 60, 100]
    assert failed(running.results()) == []
    status = tenant.status("digits")
    assert [(h["version"], h["outcome"]) for h in status["history"]] == [(2, "Promoted")]


def test_a_canary_that_fails_on_some_requests_is_gone_in_seconds_and_not_tried_again(tenant: Tenant) -> None:
    """argo-cd#9570, argo-rollouts#3578: auto-sync fights the rollback. argo-rollouts#1665: weight left over after an abort."""
    entries = upload_digits(tenant)
    manifest = deployment(tenant, entries, canary=2, rollout=rollout(steps=[{"weight": 20, "hold": "1h"}, {"weight": 100}]))
    publish(tenant, manifest, 2)
    tenant.apply(deployment(tenant, entries))
    tenant.wait_ready("digits", "Serving")
    images = mark(held_out()[0], Kind.ERROR, share=0.5, count=20_000)
    with Watch(tenant) as watch, load(tenant, images=images) as running:
        tenant.apply(manifest)
        tenant.wait_reason("digits", "ErrorRateHigher", timeout=120)
        tenant.wait(lambda: tenant.status("digits")["weights"]["accepted"], lambda w: {"version": 1, "weight": 100} in w)
        gone = time.monotonic() + 1
        time.sleep(3)
        # GitOps applies the same again, and again: Git is left alone, and so is the abort.
        tenant.apply(manifest)
        time.sleep(3)
    watch.check()
    assert watch.shares(2) == [0, 20, 0]
    assert [a for a in failed(running.results()) if a.sent > gone] == [], "stable has all traffic again"
    status = tenant.status("digits")
    (aborted,) = status["aborted"]
    assert (aborted["version"], aborted["reason"]) == (2, "ErrorRateHigher")
    assert tenant.condition("digits", "Stalled")["status"] == "True"
    assert tenant.condition("digits", "Available")["status"] == "True"
    assert tenant.get("deployment", "digits-v2") is not None, "its pods are kept for inspection"
    # Four a second fail: it was gone within seconds of the first, however busy the machine.
    sent = [a.sent for a in failed(running.results())]
    assert max(sent) - min(sent) < 20
    assert len(sent) < 80

    # Only who moves retryAt asks for another try.
    again = deployment(tenant, entries, canary=2, rollout={**manifest["spec"]["rollout"], "retryAt": "2026-01-01T00:00:00Z"})
    tenant.apply(again)
    tenant.wait(lambda: tenant.status("digits").get("canaryWeight"), lambda weight: weight == 20)


def test_a_canary_whose_answers_differ_from_the_checkpoints_is_aborted_before_a_user_sees_it(tenant: Tenant) -> None:
    entries = upload_digits(tenant)
    manifest = deployment(tenant, entries, canary=2, rollout=rollout())
    publish(tenant, manifest, 2, always=Kind.WRONG)
    tenant.apply(deployment(tenant, entries))
    tenant.wait_ready("digits", "Serving")
    with Watch(tenant) as watch, load(tenant) as running:
        tenant.apply(manifest)
        condition = tenant.wait_reason("digits", "GoldenMismatch", timeout=120)
    assert watch.shares(2) == [0]
    assert failed(running.results()) == []
    assert condition["status"] == "False"
    assert "largest error" in condition["message"], "the figures stand in the message"


def test_a_canary_that_the_cluster_has_no_gpu_for_harms_nobody_and_is_aborted_with_the_schedulers_words(tenant: Tenant) -> None:
    entries = upload_digits(tenant)
    runtime = {"terminationGracePeriodSeconds": 30, "resources": {"limits": {"nvidia.com/gpu": 1}}}
    tenant.apply(deployment(tenant, entries, runtime=runtime))
    tenant.wait_ready("digits", "Serving")
    with load(tenant) as running:
        tenant.apply(deployment(tenant, entries, canary=2, runtime=runtime, rollout=rollout(progressDeadline="15s")))
        tenant.wait(lambda: tenant.condition("digits").get("message", ""), lambda said: "Insufficient nvidia.com/gpu" in said)
        tenant.wait_reason("digits", "Unschedulable", timeout=60)
    assert failed(running.results()) == []
    assert tenant.condition("digits", "Available")["status"] == "True"


def test_too_little_traffic_pauses_a_step_and_says_how_much_is_missing(tenant: Tenant) -> None:
    """argo-rollouts#2866, #1905: pause, not abort, on missing data. flagger#1353: low traffic fails releases."""
    entries = upload_digits(tenant)
    tenant.apply(deployment(tenant, entries))
    tenant.wait_ready("digits", "Serving")
    tenant.apply(deployment(tenant, entries, canary=2, rollout=rollout(steps=[{"weight": 20, "hold": "4s"}, {"weight": 100}])))
    condition = tenant.wait_reason("digits", "Inconclusive", timeout=60)
    assert "30" in condition["message"]
    with load(tenant) as running:
        tenant.wait_ready("digits", "AwaitingPromotion", 90)
    assert failed(running.results()) == []


@pytest.mark.parametrize(
    ("instances", "runtime", "reason", "words"),
    [
        pytest.param(16, {"resources": {"limits": {"memory": "256Mi"}}}, "OutOfMemory", "killed for want of memory", id="memory"),
        pytest.param(8, {"sharedMemorySize": "4Mi"}, "CrashLoop", "failed to load all models", id="crash"),
    ],
)
def test_a_canary_that_its_pods_cannot_carry_is_aborted_with_their_own_words(
    tenant: Tenant, instances: int, runtime: dict[str, Any], reason: str, words: str
) -> None:
    """It has more instances of its model than there is memory for, or shared memory, for want of which Triton ends by itself."""
    entries = upload_digits(tenant)
    entries[1]["triton"]["instanceCount"] = instances
    runtime = {"terminationGracePeriodSeconds": 30, **runtime}
    tenant.apply(deployment(tenant, entries, runtime=runtime))
    tenant.wait_ready("digits", "Serving")
    (stable,) = tenant.list("pods", "serving.perch.dev/component=triton")
    with Watch(tenant) as watch, load(tenant) as running:
        tenant.apply(deployment(tenant, entries, canary=2, runtime=runtime, rollout=rollout()))
        condition = tenant.wait_reason("digits", reason, timeout=150)
    assert "pod digits-v2-" in condition["message"]
    assert words in condition["message"]
    assert watch.shares(2) == [0]
    assert failed(running.results()) == []
    still = tenant.get("pod", stable["metadata"]["name"]) or {}
    assert [s["restartCount"] for s in still["status"]["containerStatuses"]] == [0, 0]

"""What takes a canary out, alarm by alarm, on a whole real cluster under live load; and a stable version that breaks beside it.

The other alarms: errors, golden check, memory, crash loop and scheduling in test_rollout.py, latency and metrics in
test_traffic.py. The ModelDeployment is the one of tests/e2e/judged.py.
"""

from __future__ import annotations

import time
from typing import Any

from chaos.crashes import triton_of
from demo.digits import held_out
from demo.load import count_by_version
from faults import Kind, mark

from .judged import ANALYSIS, FAULTY, PROMETHEUS, Judged
from .test_rollout import failed, load
from .watching import Watch

TOLD_BY_GATEWAY = (
    'sum(label_replace(COUNTER{envoy_cluster_name=~"httproute/{{namespace}}/{{name}}/rule/[01].*"}, '
    '"ip", "$1", "envoy_endpoint_address", "(.*):.*") * on (ip) group_left () group by (ip) (label_replace('
    'nv_inference_request_success{namespace="{{namespace}}",model="{{model}}",version="{{version}}"}, '
    '"ip", "$1", "instance", "(.*):.*")))'
)
"""What the Gateway's proxies counted at a version's pods, as in docs/rollouts.md: which pods these are, they say themselves."""


def test_what_the_gateway_counts_takes_a_canary_out_through_prometheus(judged: Judged) -> None:
    """triton server#7713, #8521: Triton counts some errors as successes; the gateway does not."""
    tenant = judged.tenant
    failures = TOLD_BY_GATEWAY.replace("COUNTER", "envoy_cluster_endpoint_rq_error")
    successes = TOLD_BY_GATEWAY.replace("COUNTER", "envoy_cluster_endpoint_rq_success")
    prometheus = {
        "address": f"{PROMETHEUS}:9090",
        "requests": f"{successes} + {failures}",
        "failures": failures,
        # The development cluster's Prometheus asks every 2 s.
        "scrapeInterval": "3s",
    }
    images = mark(held_out()[0], Kind.ERROR, share=0.5, count=20_000)
    with load(tenant, images=images) as running:
        held = [{"weight": 20, "hold": "1h"}, {"weight": 100}]
        judged.commit(FAULTY, steps=held, analysis={**ANALYSIS, "prometheus": prometheus})
        tenant.wait_reason("digits", "ErrorRateHigher", timeout=120)
        tenant.wait(lambda: tenant.status("digits")["canaryWeight"], lambda weight: weight == 0)
    counted = tenant.status("digits")["evidence"]
    assert 0 < counted["canary"]["failures"] <= len(failed(running.results()))
    assert counted["canary"]["failures"] <= counted["canary"]["requests"] < counted["stable"]["requests"]
    assert counted["stable"]["failures"] == 0


def test_a_canary_with_all_the_traffic_is_held_to_the_maximum_and_the_traffic_comes_back(judged: Judged) -> None:
    tenant = judged.tenant
    images = mark(held_out()[0], Kind.ERROR, share=0.5, count=20_000)
    with Watch(tenant) as watch, load(tenant, images=images) as running:
        judged.commit(FAULTY, steps=[{"weight": 100}], scaleDownDelay="5m")
        aborted = tenant.wait_reason("digits", "ErrorRateAboveMaximum", timeout=120)
        tenant.wait(lambda: tenant.status("digits")["canaryWeight"], lambda weight: weight == 0)
        back = time.monotonic() + 1
        time.sleep(3)
    watch.check()
    assert watch.shares(FAULTY) == [0, 100, 0]
    assert "maxErrorRate" in aborted["message"]
    assert [a for a in failed(running.results()) if a.sent > back] == []


def test_weights_stay_while_stable_is_broken_and_a_canary_that_loses_its_readiness_is_out_at_once(judged: Judged) -> None:
    """Their Tritons are frozen (SIGSTOP), one after the other: alive, and answering nothing."""
    tenant = judged.tenant

    def share() -> Any:
        return tenant.status("digits").get("canaryWeight")

    def wait_available(status: str) -> None:
        tenant.wait(lambda: tenant.condition("digits", "Available").get("status"), lambda said: said == status, 90)

    with Watch(tenant) as watch, load(tenant) as running:
        judged.commit(FAULTY, steps=[{"weight": 20, "hold": "Indefinite"}])
        tenant.wait(share, lambda weight: weight == 20)
        (stable,) = tenant.list("pods", "serving.perch.dev/component=triton,serving.perch.dev/version=1")
        frozen = triton_of(stable)
        frozen.suspend()
        try:
            wait_available("False")
            time.sleep(3)
            assert share() == 20, "the canary was trusted with its share only"
        finally:
            frozen.resume()
        wait_available("True")

        (canary,) = tenant.list("pods", "serving.perch.dev/component=triton,serving.perch.dev/version=2")
        frozen = triton_of(canary)
        frozen.suspend()
        try:
            tenant.wait(share, lambda weight: weight == 0, 60)
            gone = time.monotonic() + 1
            aborted = tenant.wait_reason("digits", "ReadinessLost", timeout=90)
        finally:
            frozen.resume()
    watch.check()
    assert watch.shares(FAULTY) == [0, 20, 0]
    assert "lost its readiness" in aborted["message"]
    assert tenant.condition("digits", "Available")["status"] == "True"
    later = [a for a in running.results() if a.sent > gone]
    assert failed(later) == []
    assert count_by_version(later).keys() == {"1"}


def test_a_canary_that_hangs_is_taken_out_though_no_counter_moves(judged: Judged) -> None:
    tenant = judged.tenant
    images = mark(held_out()[0], Kind.STALL, share=0.3, count=20_000)
    with load(tenant, images=images, in_flight=8) as running:
        analysis = {**ANALYSIS, "stallAfter": "5s"}
        # What hangs goes with its pod, ten seconds after the abort.
        judged.commit(FAULTY, steps=[{"weight": 50, "hold": "1h"}, {"weight": 100}], analysis=analysis, inspectFor="10s")
        aborted = tenant.wait_reason("digits", "Stalled", timeout=120)
        tenant.wait(lambda: tenant.status("digits")["canaryWeight"], lambda weight: weight == 0)
        gone = time.monotonic() + 1
        time.sleep(3)
    assert "pending" in aborted["message"]
    assert [a for a in failed(running.results()) if a.sent > gone] == []
    tenant.wait(lambda: tenant.get("deployment", f"digits-v{FAULTY}"), lambda found: found is None, 90)

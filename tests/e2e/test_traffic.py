"""Testers, shadows, custom metrics and latency, on a whole real cluster under live load.

The ModelDeployment is the one of tests/e2e/judged.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from demo.digits import held_out
from demo.load import count_by_version
from devcluster.tenant import Tenant
from faults import Kind, mark
from faults.client import PROTOCOLS, Client, Request

from .judged import ANALYSIS, FAULTY, PROMETHEUS, SLOW, Judged
from .test_journey import host
from .test_rollout import failed, load

RATE = 'sum(rate(envoy_cluster_upstream_rq_total{envoy_cluster_name=~"httproute/{{namespace}}/{{name}}/.*"}[{{window}}]))'
"""Requests a second that the Gateway's proxies sent to this model, of which the load makes up to 40."""


def test_requests_with_the_testers_header_go_to_a_canary_of_weight_0_and_all_others_to_stable(judged: Judged) -> None:
    tenant, address = judged.tenant, "{}:{}".format(*judged.tenant.cluster.gateway_address())
    clients = {name: Client(address, host(tenant), {"x-tester": name}) for name in ("ann", "bob")}
    image = Request(held_out()[0][:1])
    with load(tenant) as running:
        match = {"headers": [{"name": "X-Tester", "value": "ann"}]}
        judged.commit(FAULTY, {"match": match}, steps=[{"weight": 0, "hold": "Indefinite"}])
        tenant.wait_ready("digits", "SplitHeld")
        for protocol in PROTOCOLS:
            # The Gateway has accepted the route, its proxies follow within a second or so.
            tenant.wait(lambda p=protocol: clients["ann"].ask(p, image).version, lambda version: version == "2", 10)
            answers = Counter((name, client.ask(protocol, image).version) for _ in range(30) for name, client in clients.items())
            assert answers == {("ann", "2"): 30, ("bob", "1"): 30}, protocol
    assert failed(running.results()) == []
    assert count_by_version(running.results()).keys() == {"1"}


def test_a_gateway_that_takes_turns_is_found_out(judged: Judged) -> None:
    """Envoy Gateway is one, for backends without filters (docs/evidence.md)."""
    tenant = judged.tenant
    with load(tenant) as running:
        judged.commit(FAULTY, steps=[{"weight": 20, "hold": "Indefinite"}])
        tenant.wait_ready("digits", "SplitHeld")
        told = tenant.wait(
            lambda: tenant.condition("digits", "TrafficAccepted"), lambda c: "takes turns" in c.get("message", ""), 300
        )
    assert told["status"] == "True"
    assert "RequestsInTurn" in tenant.kubectl("get", "events", "--field-selector=type=Warning", "-o", "jsonpath={..reason}")
    assert tenant.condition("digits")["status"] == "True"
    assert failed(running.results()) == []


def test_a_canary_that_fails_on_copied_requests_is_aborted_and_no_user_notices(judged: Judged) -> None:
    tenant = judged.tenant
    images = mark(held_out()[0], Kind.ERROR, share=0.5, count=20_000)
    with load(tenant, images=images) as running:
        judged.commit(FAULTY, {"mirror": {"percent": 20}}, steps=[{"weight": 0, "hold": "1h"}, {"weight": 100}])
        tenant.wait_reason("digits", "ErrorRateHigher", timeout=120)
        tenant.wait(lambda: copying(tenant), lambda rules: not rules)
    assert failed(running.results()) == []
    assert count_by_version(running.results()).keys() == {"1"}
    counted = tenant.status("digits")["evidence"]
    assert 0 < counted["canary"]["requests"] < counted["stable"]["requests"]
    assert counted["stable"]["failures"] == 0


def copying(tenant: Tenant) -> list[dict[str, Any]]:
    """The route's rules that copy requests."""
    route = tenant.get("httproute", "digits") or {}
    return [rule for rule in route["spec"]["rules"] if any(f["type"] == "RequestMirror" for f in rule.get("filters", []))]


def test_a_metric_of_prometheus_must_be_read_and_within_its_bounds(judged: Judged) -> None:
    tenant = judged.tenant

    def commit(port: int, **bounds: str) -> None:
        metric = {"name": "rate", "query": RATE, **bounds}
        prometheus = {"address": f"{PROMETHEUS}:{port}", "metrics": [metric]}
        judged.commit(FAULTY, steps=[{"weight": 20, "hold": "5s"}, {"weight": 60, "hold": "1h"}, {"weight": 100}],
                     analysis={**ANALYSIS, "prometheus": prometheus})  # fmt: skip

    with load(tenant) as running:
        commit(9, max="1000")
        condition = tenant.wait(
            lambda: tenant.condition("digits"), lambda c: c.get("reason") == "NoMetric" and PROMETHEUS in c["message"]
        )
        assert "stays at 20 %" in condition["message"]
        commit(9090, min="5", max="1000")
        tenant.wait(lambda: judged.step().get("weight"), lambda weight: weight == 60)
        commit(9090, max="5")
        aborted = tenant.wait_reason("digits", "MetricOutOfBounds", timeout=90)
    assert "metric rate was 2 times in a row out of bounds" in aborted["message"]
    (metric,) = tenant.status("digits")["evidence"]["metrics"]
    assert 5 < float(metric["value"]) < 100, "what the proxies sent on"
    assert f"{metric['value']} is above its maximum of 5" in aborted["message"]
    assert failed(running.results()) == []


def test_a_canary_that_answers_rightly_but_late_is_aborted_where_maxLatencyRatio_is_given(judged: Judged) -> None:
    with load(judged.tenant) as running:
        judged.commit(SLOW, steps=[{"weight": 50, "hold": "1h"}, {"weight": 100}], analysis={**ANALYSIS, "maxLatencyRatio": "2"})
        aborted = judged.tenant.wait_reason("digits", "LatencyHigher", timeout=120)
    assert "more than 2 times as long as stable (maxLatencyRatio)" in aborted["message"]
    assert failed(running.results()) == []

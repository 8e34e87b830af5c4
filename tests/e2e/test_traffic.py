"""Testers, shadows, custom metrics and latency, on a whole real cluster under live load.

One ModelDeployment serves all tests. Version 2 fails where a request asks for it, version 3 is slow whatever it is asked.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from demo.digits import held_out
from demo.load import count_by_version
from devcluster import Cluster
from devcluster.tenant import Tenant
from faults import Kind, mark
from faults.client import PROTOCOLS, Client, Request
from faults.publish import publish

from .conftest import FAILED, deployment, explain, upload_digits
from .test_journey import host
from .test_rollout import ANALYSIS, failed, load, rollout

FAULTY, SLOW = 2, 3
TURNS = 24
"""Of the slow answer's loop: many times as long as a sound answer, and not so long that a core is busy with it."""
PROMETHEUS = "http://prometheus.monitoring"
RATE = 'sum(rate(envoy_cluster_upstream_rq_total{envoy_cluster_name=~"httproute/{{namespace}}/{{name}}/.*"}[{{window}}]))'
"""Requests a second that the Gateway's proxies sent to this model, of which the load makes up to 40."""


@dataclass
class Stage:
    tenant: Tenant
    entries: list[dict[str, Any]]
    trial: int = 0
    """An aborted canary is tried again by the next test."""

    def serve(self) -> None:
        self.trial += 1
        self.tenant.apply(deployment(self.tenant, self.entries))
        self.tenant.wait_ready("digits", "Serving")

    def commit(self, canary: int, traffic: dict[str, Any] | None = None, **more: Any) -> None:
        self.tenant.apply(
            deployment(
                self.tenant,
                self.entries,
                traffic={"stable": 1, "canary": canary, **(traffic or {})},
                rollout=rollout(retryAt=f"2026-01-01T00:00:{self.trial:02}Z", **more),
            )
        )

    def step(self) -> dict[str, Any]:
        return self.tenant.status("digits").get("step") or {}


@pytest.fixture(scope="module")
def built(cluster: Cluster) -> Iterator[Stage]:
    tenant = Tenant(cluster, f"traffic-{uuid.uuid4().hex[:6]}").make()
    entries = upload_digits(tenant)
    entries.append({**entries[1], "version": SLOW})
    manifest = deployment(tenant, entries)
    publish(tenant, manifest, FAULTY)
    publish(tenant, manifest, SLOW, always=Kind.SLOW, turns=TURNS)
    yield Stage(tenant, entries)
    tenant.delete(wait=False)


@pytest.fixture
def stage(built: Stage, request: pytest.FixtureRequest) -> Iterator[Stage]:
    built.serve()
    yield built
    if request.node.stash.get(FAILED, False):
        explain(built.tenant)


def test_requests_with_the_testers_header_go_to_a_canary_of_weight_0_and_all_others_to_stable(stage: Stage) -> None:
    tenant, address = stage.tenant, "{}:{}".format(*stage.tenant.cluster.gateway_address())
    clients = {name: Client(address, host(tenant), {"x-tester": name}) for name in ("ann", "bob")}
    image = Request(held_out()[0][:1])
    with load(tenant) as running:
        match = {"headers": [{"name": "X-Tester", "value": "ann"}]}
        stage.commit(FAULTY, {"match": match}, steps=[{"weight": 0, "hold": "Indefinite"}])
        tenant.wait_ready("digits", "SplitHeld")
        for protocol in PROTOCOLS:
            # The Gateway has accepted the route, its proxies follow within a second or so.
            tenant.wait(lambda p=protocol: clients["ann"].ask(p, image).version, lambda version: version == "2", 10)
            answers = Counter((name, client.ask(protocol, image).version) for _ in range(30) for name, client in clients.items())
            assert answers == {("ann", "2"): 30, ("bob", "1"): 30}, protocol
    assert failed(running.results()) == []
    assert count_by_version(running.results()).keys() == {"1"}


def test_a_canary_that_fails_on_copied_requests_is_aborted_and_no_user_notices(stage: Stage) -> None:
    tenant = stage.tenant
    images = mark(held_out()[0], Kind.ERROR, share=0.5, count=20_000)
    with load(tenant, images=images) as running:
        stage.commit(FAULTY, {"mirror": {"percent": 20}}, steps=[{"weight": 0, "hold": "1h"}, {"weight": 100}])
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
    return [rule for rule in route["spec"]["rules"] if rule.get("filters")]


def test_a_metric_of_prometheus_must_be_read_and_within_its_bounds(stage: Stage) -> None:
    tenant = stage.tenant

    def commit(port: int, **bounds: str) -> None:
        metric = {"name": "rate", "query": RATE, **bounds}
        prometheus = {"address": f"{PROMETHEUS}:{port}", "metrics": [metric]}
        stage.commit(FAULTY, steps=[{"weight": 20, "hold": "5s"}, {"weight": 60, "hold": "1h"}, {"weight": 100}],
                     analysis={**ANALYSIS, "prometheus": prometheus})  # fmt: skip

    with load(tenant) as running:
        commit(9, max="1000")
        condition = tenant.wait(
            lambda: tenant.condition("digits"), lambda c: c.get("reason") == "NoMetric" and PROMETHEUS in c["message"]
        )
        assert "stays at 20 %" in condition["message"]
        commit(9090, min="5", max="1000")
        tenant.wait(lambda: stage.step().get("weight"), lambda weight: weight == 60)
        commit(9090, max="5")
        aborted = tenant.wait_reason("digits", "MetricOutOfBounds", timeout=90)
    assert "metric rate was 2 times in a row out of bounds" in aborted["message"]
    (metric,) = tenant.status("digits")["evidence"]["metrics"]
    assert 5 < float(metric["value"]) < 100, "what the proxies sent on"
    assert f"{metric['value']} is above its maximum of 5" in aborted["message"]
    assert failed(running.results()) == []


def test_a_canary_that_answers_rightly_but_late_is_aborted_where_maxLatencyRatio_is_given(stage: Stage) -> None:
    with load(stage.tenant) as running:
        stage.commit(SLOW, steps=[{"weight": 50, "hold": "1h"}, {"weight": 100}], analysis={**ANALYSIS, "maxLatencyRatio": "2"})
        aborted = stage.tenant.wait_reason("digits", "LatencyHigher", timeout=120)
    assert "and maxLatencyRatio is 2" in aborted["message"]
    assert failed(running.results()) == []

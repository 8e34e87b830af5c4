"""What is done under load, one function for each scenario. A function returns what was seen, or raises Broken.

Before it the stage has settled: version 1 has all traffic and two pods, version 2 may still be on its way out. The load runs
from before the function to after it. What the function changes on the cluster it puts back; the stage settles the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chaos import crashes, streams
from chaos.kills import kill_at_every_write
from chaos.stage import GPUS, NAME, PATIENCE, REPLICAS, SLOW, Stage, expect, rfc3339_now
from devcluster.release import install

API_DOWN = 60.0
STEPS: list[dict[str, Any]] = [{"weight": 10, "hold": "5s"}, {"weight": 50, "hold": "5s"}, {"weight": 100}]
HELD: list[dict[str, Any]] = [{"weight": 20, "hold": "1h"}, {"weight": 100}]
ANALYSIS = {"maxErrorRate": "0.1"}
"""A step passes on 30 requests: some seconds at 10 %."""
PROMETHEUS = "http://prometheus.monitoring:9090"


@dataclass(frozen=True)
class Scenario:
    name: str
    done: str
    """What was done, for the matrix."""
    play: Callable[[Stage], str]
    lossless: bool = True
    """Whether a lost request breaks a promise; else it is counted and told."""


# --- releases ----------------------------------------------------------------------------------------------------------


def promote(stage: Stage) -> str:
    stage.serve(1, canary=2)
    stage.serve(2)
    stage.wait_gone(1)
    return ""


def revert(stage: Stage) -> str:
    stage.serve(1, canary=2)
    stage.serve(2)
    kept = stage.uids(1)
    applied = time.monotonic()
    stage.serve(1)
    stage.wait_gone(2)
    expect(stage.uids(1) == kept, "the pods of version 1 are the same ones")
    last = max(answer.answered for answer in stage.answers() if answer.version == "2")
    return f"the last answer of version 2 came {max(0.0, last - applied):.1f} s after `kubectl apply` began"


def revert_late(stage: Stage) -> str:
    stage.serve(1, canary=2)
    stage.serve(2)
    stage.wait_gone(1)
    applied = time.monotonic()
    stage.serve(1)
    took = time.monotonic() - applied
    stage.wait_gone(2)
    return f"version 1 started anew and had all traffic after {took:.0f} s; version 2 served meanwhile"


def change_runtime(stage: Stage) -> str:
    stage.serve(1, canary=2)
    for env in ({"MARK": "1"}, None):
        former = stage.uids()
        stage.serve(1, canary=2, env=env)
        stage.wait_replaced(former)
    return "every pod of both versions replaced, twice"


def canary_does_not_fit(stage: Stage) -> str:
    stage.wait_gone(2)
    kept = stage.uids(1)
    stage.offer_gpus(REPLICAS)
    stage.apply(1, canary=2)
    told = stage.wait(stage.condition, lambda c: "Unschedulable" in c.get("message", ""), "the scheduler's words are told")
    time.sleep(10)
    expect(stage.condition("Available")["status"] == "True", "Available stays True")
    expect(stage.uids(1) == kept, "no pod of version 1 went")
    expect({a.version for a in stage.answers() if a.ok} == {"1"}, "version 1 gives every answer")
    stage.offer_gpus(GPUS)
    stage.wait_served(split=True)
    return f"“{told['message']}”; once there was room, the split was in place"


def no_room(stage: Stage) -> str:
    """As many GPUs as stable has pods, and a rollout that takes its canary's from them."""
    stage.wait_gone(2)
    stage.offer_gpus(REPLICAS)
    narrow: dict[str, Any] = {"surge": "WithinReplicas", "analysis": ANALYSIS}
    stage.apply(1, canary=2, steps=STEPS[1:], **narrow)
    told = stage.wait(stage.condition, lambda c: "surge is WithinReplicas" in c.get("message", ""), "the arithmetic is told")
    stage.tenant.wait_ready(NAME, "AwaitingPromotion", PATIENCE)
    expect(len(stage.pods(1)) == 1, "stable keeps a place to come back to")
    stage.serve(2, **narrow)
    stage.wait_gone(1)
    stage.wait_full(2)
    return f"“{told['message']}”; promoted, version 2 has both places"


# --- rollouts that judge themselves ----------------------------------------------------------------------------------------


def steps(stage: Stage) -> str:
    shares: list[int] = []
    stage.apply(1, canary=2, steps=STEPS, analysis=ANALYSIS)

    def look() -> str:
        share = stage.tenant.status(NAME).get("canaryWeight") or 0
        if not shares or shares[-1] != share:
            shares.append(share)
        return str(stage.condition().get("reason"))

    stage.wait(look, lambda reason: reason == "AwaitingPromotion", "the canary has gone through its steps", every=0.2)
    stage.wait_gone(1)
    stage.serve(2)
    return f"the canary's share went {', '.join(map(str, shares))} by itself; version 1's pods went before the promotion's commit"


def abort(stage: Stage) -> str:
    kept = stage.uids(1)
    stage.apply(1, canary=SLOW, steps=HELD, analysis={"maxLatencyRatio": "1.5"}, inspectFor="10s", retryAt=rfc3339_now())
    share = HELD[0]["weight"]
    stage.wait(
        lambda: stage.tenant.status(NAME).get("canaryWeight"), lambda has: has == share, "the canary has its share", every=0.1
    )
    began = time.monotonic()
    told = stage.wait(stage.condition, lambda c: c.get("reason") == "LatencyHigher", "it is aborted", every=0.1)
    aborted = time.monotonic()
    stage.wait_gone(SLOW)
    expect(stage.uids(1) == kept, "no pod of version 1 went")
    expect(stage.condition("Available")["status"] == "True", "Available stays True")
    last = max((a.answered for a in stage.answers() if a.version == str(SLOW)), default=began)
    return (
        f"aborted {aborted - began:.0f} s after it had its share, its last answer {last - aborted:+.1f} s from then: "
        f"“{told['message']}”"
    )


def prometheus_down(stage: Stage) -> str:
    """While a step asks it for a metric."""
    prometheus = {"address": PROMETHEUS, "metrics": [{"name": "one", "query": "vector(1)", "min": "1"}]}
    with stage.without("prometheus"):
        stage.apply(1, canary=2, steps=STEPS, analysis={**ANALYSIS, "prometheus": prometheus})
        told = stage.wait(stage.condition, lambda c: c.get("reason") == "NoMetric", "the missing metric holds the step")
        held = stage.tenant.status(NAME)["canaryWeight"]
        expect(held == STEPS[0]["weight"], f"the weight stays at the first step's, not {held} %")
    stage.tenant.wait_ready(NAME, "AwaitingPromotion", PATIENCE)
    return f"the first step waited (“{told['message']}”), and went on by itself once Prometheus was back"


# --- the operator ------------------------------------------------------------------------------------------------------


def upgrade_operator(stage: Stage) -> str:
    """Other images as defaults too: pods that are there must not be rendered again for them."""
    stage.wait_gone(2)
    stage.apply(1, canary=2)
    stage.wait(lambda: stage.tenant.get("deployment", f"{NAME}-v2"), bool, "the canary is being started")
    others = [f"{image}.image=example.com/another-{image}:9" for image in ("exporter", "artifacts", "triton")]
    try:
        install(stage.cluster, *others, "log.level=DEBUG", "podAnnotations.upgrade=yes", wait=False)
        stage.wait_served(split=True)
        kept = stage.uids()
        # Long enough to stay: a version 1 that is started anew by the operator with the other images could not be pulled.
        stage.serve(2, scaleDownDelay="10m")
        install(stage.cluster, wait=False)
        stage.serve(1, scaleDownDelay="10m")
        # The promotion added pods to version 2, which leave again.
        expect(kept <= stage.uids(), "no pod was replaced")
    finally:
        install(stage.cluster)
    return "upgraded while the canary started, and back between a promotion and its revert; no pod of a model was replaced"


# --- what is around it -------------------------------------------------------------------------------------------------


def api_server_down(stage: Stage) -> str:
    with stage.without("kube-apiserver"):
        time.sleep(API_DOWN)
    back = time.monotonic()
    stage.serve(1, canary=2)
    return f"a canary applied when it was back had its share {time.monotonic() - back:.0f} s later"


def api_server_down_at_work(stage: Stage) -> str:
    stage.wait_gone(2)
    stage.apply(1, canary=2)
    with stage.without("kube-apiserver"):
        time.sleep(API_DOWN)
    back = time.monotonic()
    stage.wait_served(split=True)
    took = time.monotonic() - back
    stage.apply(2)
    with stage.without("kube-apiserver"):
        time.sleep(API_DOWN)
    back = time.monotonic()
    stage.wait_served(split=False)
    stage.wait_gone(1)
    return (
        f"killed right after the canary was applied: it had its share {took:.0f} s after the return; "
        f"and right after the promotion: done {time.monotonic() - back:.0f} s after the return"
    )


def store_down(stage: Stage) -> str:
    stage.wait_full(1)
    victim = stage.pods(1)[0]["metadata"]
    with stage.without("s3"):
        stage.tenant.kubectl("delete", "pod", victim["name"], "--wait=false")
        stage.wait(lambda: stage.uids(1), lambda uids: victim["uid"] not in uids, "the pod is gone")
        told = stage.wait(stage.condition, lambda c: "download" in c.get("message", ""), "the download's words are told", 120)
    stage.wait_full(1)
    return (
        f"a pod deleted meanwhile: its successor could not download (“{told['message']}”) and was ready once the store was back"
    )


def pod_deleted(stage: Stage) -> str:
    stage.wait_full(1)
    for victim in stage.pods(1):
        stage.tenant.kubectl("delete", "pod", victim["metadata"]["name"], "--wait=false")
        stage.wait_replaced({victim["metadata"]["uid"]})
        stage.wait_full(1)
    return "each of the two pods, one after the other"


SCENARIOS = (
    Scenario("promote", "{stable: 1, canary: 2} at 50 %, then {stable: 2}, until version 1's pods are gone", promote),
    Scenario("revert", "{stable: 2} back to {stable: 1}, whose pods are still there", revert),
    Scenario("revert-late", "{stable: 2} back to {stable: 1}, whose pods are gone", revert_late),
    Scenario("steps", "a canary through 10, 50 and 100 % by itself, each step held 5 s and judged; then {stable: 2}", steps),
    Scenario("abort", "a canary at 20 % that is slow, not wrong: aborted by maxLatencyRatio, its pods removed", abort),
    Scenario("runtime", "spec.runtime.env changed during a split, and back", change_runtime),
    Scenario("full-node", "a canary for which the node has no GPU left", canary_does_not_fit),
    Scenario("no-room", "a canary in stable's places (surge: WithinReplicas) through 50 and 100 %, then {stable: 2}", no_room),
    Scenario(
        "operator-kills",
        "the operator killed (SIGKILL) at every write of two releases, a revert, an abort, a change of runtime, a first deploy "
        "and a deletion: each of its lives makes one write",
        kill_at_every_write,
    ),
    Scenario(
        "operator-upgrade", "helm upgrade of the operator in mid-rollout: other images, log level; and back", upgrade_operator
    ),
    Scenario("api-server", f"kube-apiserver killed (SIGKILL), down for {API_DOWN:.0f} s", api_server_down),
    Scenario("api-server-busy", "the same twice, each time right after `kubectl apply`", api_server_down_at_work),
    Scenario("store", "the S3 server down while serving, and while a new pod is asked for", store_down),
    Scenario("prometheus", "Prometheus down while a step asks it for a metric", prometheus_down),
    Scenario("pod-deleted", "`kubectl delete pod` of a Triton pod, a second one serving", pod_deleted),
    Scenario("streams", "gRPC streams during a promotion, until version 1's pods are gone", streams.streams_during_promotion),
    Scenario("streams-abort", "the same while a slow canary is aborted, until its pods are gone", streams.streams_during_abort),
    Scenario("crash", "a Triton killed (SIGKILL), a second one serving", crashes.killed_without_retries, lossless=False),
    Scenario("crash-safe", f"the same, retries on {', '.join(crashes.SAFE)}", crashes.killed_with_safe_retries, lossless=False),
    Scenario("crash-retried", f"the same, retries on {', '.join(crashes.ALL)}", crashes.killed_with_retries),
    Scenario("crash-large", "the same, and requests of 97 KB", crashes.killed_with_large_requests, lossless=False),
    Scenario("crash-large-buffered", "the same, with 4 MiB of buffer", crashes.killed_with_large_requests_and_buffers),
)

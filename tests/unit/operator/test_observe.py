"""Facts read from raw objects, the queue, and the executor's manners. Objects are cut down to what is read."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from perch.cache import Cache
from perch.execute import execute
from perch.kube import DEPLOYMENT, ApiError
from perch.observe import pod_words, route_facts
from perch.observed import Identity, matches
from perch.plan import Apply, Delete
from perch.reconcile import Queue
from perch_exporter.contract import ErrorReport, Outcome, Reason, Step, Summary

IDENTITY = Identity("vision", "digits", "uid-1", 1, "1")
PARENT = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "gateway", "namespace": "gateways"}


def route(*parents: dict[str, Any], generation: int = 2) -> dict[str, Any]:
    return {
        "metadata": {"name": "digits", "namespace": "vision", "generation": generation, "resourceVersion": "5"},
        "spec": {"parentRefs": [PARENT], "rules": [{"backendRefs": [{"name": "digits-v1", "weight": 100}]}]},
        "status": {"parents": list(parents)},
    }


def voice(accepted: str = "True", resolved: str = "True", generation: int = 2, **ref: Any) -> dict[str, Any]:
    conditions = [
        {"type": kind, "status": status, "reason": "Why", "message": "because", "observedGeneration": generation}
        for kind, status in (("Accepted", accepted), ("ResolvedRefs", resolved))
    ]
    return {"parentRef": {**PARENT, **ref}, "conditions": conditions}


@pytest.mark.parametrize(
    ("parents", "accepted", "reason"),
    [
        pytest.param([], False, "AwaitingGateway", id="nobody has looked"),
        pytest.param([voice()], True, "Accepted", id="the Gateway has accepted this generation"),
        pytest.param([voice(generation=1)], False, "AwaitingGateway", id="only the former generation was accepted"),
        pytest.param([voice(accepted="False")], False, "Why", id="the Gateway refuses"),
        pytest.param([voice(resolved="False")], False, "Why", id="a backend is missing"),
        pytest.param([voice(name="other")], False, "AwaitingGateway", id="another Gateway spoke"),
        pytest.param([voice(namespace="elsewhere")], False, "AwaitingGateway", id="a Gateway of the same name elsewhere spoke"),
        pytest.param([voice(generation=1), voice()], True, "Accepted", id="a former controller's entry lingers"),
    ],
)
def test_a_route_is_accepted_when_each_gateway_has_taken_in_this_very_generation(
    parents: list[dict[str, Any]], accepted: bool, reason: str
) -> None:
    facts = route_facts(route(*parents), "digits")
    assert (facts.accepted, facts.reason) == (accepted, reason)
    assert facts.weights == {1: 100}


def container(name: str, **state: Any) -> dict[str, Any]:
    return {"name": name, **state}


PULL = {"reason": "ErrImagePull", "message": "no such image"}
KILLED = {"exitCode": 137, "reason": "OOMKilled"}
TOLD = Summary(
    outcome=Outcome.FAILED,
    error=ErrorReport(reason=Reason.ARTIFACT_CORRUPT, message="model.onnx differs", retryable=False, step=Step.DOWNLOAD),
).to_json()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        pytest.param({"containerStatuses": [container("triton", state={"running": {}})]}, None, id="all is well"),
        pytest.param(
            {"conditions": [{"type": "PodScheduled", "reason": "Unschedulable", "message": "no nvidia.com/gpu"}]},
            "Unschedulable: no nvidia.com/gpu",
            id="the scheduler",
        ),
        pytest.param(
            {"initContainerStatuses": [container("download", state={"waiting": PULL})]},
            "download: ErrImagePull: no such image",
            id="the kubelet",
        ),
        pytest.param(
            {"initContainerStatuses": [container("download", state={"terminated": {"exitCode": 3, "message": TOLD}})]},
            "download ended with code 3: model.onnx differs (ArtifactCorrupt)",
            id="the exporter's sentence",
        ),
        pytest.param(
            {
                "containerStatuses": [
                    container(
                        "triton",
                        state={"waiting": {"reason": "CrashLoopBackOff"}},
                        lastState={"terminated": {"exitCode": 127, "message": "first line\nlibfoo.so: cannot open"}},
                    )
                ]
            },
            "triton crashes again and again (CrashLoopBackOff), code 127: libfoo.so: cannot open",
            id="a crash loop with its last words",
        ),
        pytest.param(
            {"initContainerStatuses": [container("convert", state={"terminated": KILLED})]},
            "convert was killed for want of memory: raise its memory limit",
            id="out of memory",
        ),
    ],
)
def test_a_pods_own_words(status: dict[str, Any], words: str | None) -> None:
    assert pod_words({"metadata": {}, "status": status}) == words


def test_what_the_server_or_others_add_is_no_drift_and_what_they_change_is() -> None:
    wanted = {"ports": [{"name": "http", "port": 8000}], "selector": {"a": "b"}}
    assert matches(
        wanted, {"ports": [{"name": "http", "port": 8000, "nodePort": 0}], "selector": {"a": "b"}, "clusterIP": "10.0.0.1"}
    )
    assert not matches(wanted, {"ports": [{"name": "http", "port": 8001}], "selector": {"a": "b"}})
    assert not matches(wanted, {"ports": [], "selector": {"a": "b"}})
    assert not matches(wanted, None)


async def test_a_key_woken_during_its_own_pass_gets_another_one_and_never_two_at_once() -> None:
    queue, key = Queue(), ("vision", "digits")
    queue.add(key)
    queue.add(key)
    assert await queue.take() == key
    queue.add(key)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.take(), 0.05)
    queue.done(key)
    assert await asyncio.wait_for(queue.take(), 1) == key
    queue.done(key)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.take(), 0.05)


async def test_a_later_deadline_replaces_the_former_one() -> None:
    queue, key = Queue(), ("vision", "digits")
    task = asyncio.create_task(queue.run_deadlines())
    queue.add_after(key, 0.1)
    queue.add_after(key, 30)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.take(), 0.4)
    queue.add_after(key, 0.05)
    assert await asyncio.wait_for(queue.take(), 1) == key
    task.cancel()


class Server:
    """Stands in for `Kube`: holds what it is told to, refuses what it is told to. Leaves out everything else of an API server."""

    def __init__(self) -> None:
        self.refuse: dict[str, ApiError] = {}
        self.foreign: set[str] = set()
        self.calls: list[str] = []

    async def get(self, _: Any, __: str, name: str) -> dict[str, Any]:
        if name not in self.foreign:
            raise ApiError(404, "NotFound", f"{name} not found")
        return {"metadata": {"name": name, "labels": {"app": "somebody-elses"}}}

    async def apply(self, body: dict[str, Any], resource_version: str | None = None) -> dict[str, Any]:
        self.calls.append(f"apply {body['kind']}")
        if body["kind"] in self.refuse:
            raise self.refuse[body["kind"]]
        labels = {"serving.perch.dev/model-deployment": "digits"}
        return {**body, "metadata": {**body["metadata"], "labels": labels, "resourceVersion": "2", "uid": "u"}}

    async def delete(self, kind: Any, _: str, name: str, known: dict[str, Any] | None) -> None:
        self.calls.append(f"delete {kind.kind} {name} {known['metadata']['uid'] if known else None}")


def body(kind: str, name: str = "digits") -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": "vision"}}


async def test_one_refusal_keeps_no_other_write_from_being_made_and_is_told() -> None:
    server = Server()
    server.refuse["Job"] = ApiError(500, "InternalError", "failed calling webhook")
    cache = Cache(server, (), lambda _: None)  # type: ignore[arg-type]
    outcome = await execute(server, cache, IDENTITY, [Apply(body("Job")), Apply(body("HTTPRoute"))])  # type: ignore[arg-type]
    assert server.calls == ["apply Job", "apply HTTPRoute"]
    assert outcome.refused == ["apply Job digits: failed calling webhook"]
    assert not outcome.stale


async def test_a_conflict_is_no_refusal_but_a_reason_to_look_again() -> None:
    server = Server()
    server.refuse["HTTPRoute"] = ApiError(409, "Conflict", "the object has been modified")
    cache = Cache(server, (), lambda _: None)  # type: ignore[arg-type]
    outcome = await execute(server, cache, IDENTITY, [Apply(body("HTTPRoute"), "1")])  # type: ignore[arg-type]
    assert outcome.stale
    assert outcome.refused == []


async def test_somebody_elses_object_is_not_taken_over() -> None:
    server = Server()
    server.foreign.add("digits-v1")
    cache = Cache(server, (), lambda _: None)  # type: ignore[arg-type]
    outcome = await execute(server, cache, IDENTITY, [Apply(body("Service", "digits-v1"))])  # type: ignore[arg-type]
    assert server.calls == []
    assert "is not Perch's" in outcome.refused[0]


async def test_a_delete_names_the_very_object_that_was_seen() -> None:
    server = Server()
    cache = Cache(server, (), lambda _: None)  # type: ignore[arg-type]
    labels = {"serving.perch.dev/model-deployment": "digits"}
    cache.absorb(
        {
            "kind": "Deployment",
            "metadata": {"name": "digits-v1", "namespace": "vision", "labels": labels, "uid": "u7", "resourceVersion": "9"},
        }
    )
    await execute(server, cache, IDENTITY, [Delete("Deployment", "digits-v1")])  # type: ignore[arg-type]
    assert server.calls == ["delete Deployment digits-v1 u7"]
    assert cache.children(DEPLOYMENT, ("vision", "digits")) == {}

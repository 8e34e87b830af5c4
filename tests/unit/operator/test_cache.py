"""The caches: what a watch brings, what it hides, and what fails beside others."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from perch import cache as caches
from perch.cache import Cache
from perch.kube import DEPLOYMENT, EVENT, JOB, ApiError, Kind

from .world import START

KEY = ("vision", "digits")
OWNER = {
    "apiVersion": "serving.perch.dev/v1alpha1",
    "kind": "ModelDeployment",
    "name": "digits",
    "uid": "uid-1",
    "controller": True,
}


def child(name: str, version: int = 1, namespace: str = "vision", **metadata: Any) -> dict[str, Any]:
    labels = {"serving.perch.dev/model-deployment": "digits"}
    more = {"labels": labels, "ownerReferences": [OWNER], "uid": f"uid-of-{name}", "resourceVersion": str(version)}
    return {"metadata": {"name": name, "namespace": namespace, **more, **metadata}}


class Server:
    """Stands in for `Kube`: lists and shows what it is told to, then says nothing more. Leaves out all else."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, str | None], list[dict[str, Any]] | Exception] = {}
        self.changes: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        self.there: dict[str, dict[str, Any]] = {}
        self.looks = 0

    async def list(self, kind: Kind, scope: str | None, _: Any) -> tuple[list[dict[str, Any]], str]:
        found = self.items.get((kind.kind, scope), [])
        if isinstance(found, Exception):
            raise found
        return copy.deepcopy(found), "1"

    async def watch(self, kind: Kind, scope: str | None, *_: Any) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        for change in self.changes.pop(kind.kind, []):
            yield change
        await asyncio.Event().wait()

    async def get(self, kind: Kind, namespace: str, name: str) -> dict[str, Any]:
        self.looks += 1
        if name not in self.there:
            raise ApiError(404, "NotFound", f"{name} not found")
        return copy.deepcopy(self.there[name])


async def run(server: Server, *namespaces: str) -> tuple[Cache, list[Any]]:
    """The cache after it has taken in all that the server says."""
    woken: list[Any] = []
    cache = Cache(cast(Any, server), namespaces, woken.append, lambda: START, woken.append)
    task = asyncio.create_task(cache.run())
    await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    return cache, woken


async def test_a_child_whose_labels_were_taken_off_is_a_child_still() -> None:
    server = Server()
    bare = child("digits-v1", 7, labels={})
    server.items["Deployment", None] = [child("digits-v1")]
    server.changes["Deployment"] = [("DELETED", child("digits-v1", 7))]
    server.there["digits-v1"] = bare
    cache, woken = await run(server)
    assert cache.children(DEPLOYMENT, KEY)["digits-v1"]["metadata"]["labels"] == {}
    assert KEY in woken


@pytest.mark.parametrize("successor", [None, child("digits-v1", 8, uid="another")], ids=["gone", "replaced by somebody's"])
async def test_a_child_that_is_gone_is_gone(successor: dict[str, Any] | None) -> None:
    server = Server()
    server.items["Deployment", None] = [child("digits-v1")]
    server.changes["Deployment"] = [("DELETED", child("digits-v1", 7))]
    if successor:
        server.there["digits-v1"] = successor
    cache, woken = await run(server)
    assert cache.children(DEPLOYMENT, KEY) == {}
    assert woken.count(KEY) == 2


async def test_a_label_that_names_another_owner_gives_it_no_child() -> None:
    server = Server()
    moved = child("digits-v1", 7, labels={"serving.perch.dev/model-deployment": "faces"})
    server.items["Deployment", None] = [child("digits-v1")]
    server.changes["Deployment"] = [("MODIFIED", moved)]
    cache, _ = await run(server)
    assert set(cache.children(DEPLOYMENT, KEY)) == {"digits-v1"}
    assert cache.children(DEPLOYMENT, ("vision", "faces")) == {}


@pytest.mark.parametrize(
    "trouble", [ApiError(403, "Forbidden", "deployments is forbidden"), ApiError(500, "Internal", "etcd"), KeyError("metadata")]
)
async def test_a_watch_that_fails_blinds_its_own_namespace_alone(trouble: Exception) -> None:
    server = Server()
    server.items["Deployment", "one"] = trouble
    server.items["Deployment", "two"] = [child("digits-v1", namespace="two")]
    cache, woken = await run(server, "one", "two")
    assert cache.unseen("one") == ("Deployment",)
    assert "deployments" in (cache.trouble("one") or "")
    assert (cache.unseen("two"), cache.trouble("two")) == ((), None)
    assert set(cache.children(DEPLOYMENT, ("two", "digits"))) == {"digits-v1"}
    assert cache.is_synced, "the process is ready all the same"
    assert "one" in woken


async def test_a_kind_that_no_pass_depends_on_blinds_nobody() -> None:
    server = Server()
    for kind in ("HorizontalPodAutoscaler", "NetworkPolicy", "PodDisruptionBudget", "Event"):
        server.items[kind, None] = ApiError(403, "Forbidden", "not for you")
    cache, _ = await run(server)
    assert (cache.unseen("vision"), cache.trouble("vision")) == ((), None)


async def test_a_kind_that_can_be_listed_later_is_seen_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MISSING_SECONDS", 0.01)
    server = Server()
    server.items["Pod", "one"] = ApiError(403, "Forbidden", "pods is forbidden")
    woken: list[Any] = []
    cache = Cache(cast(Any, server), ("one",), woken.append, lambda: START, woken.append)
    task = asyncio.create_task(cache.run())
    await asyncio.sleep(0.05)
    assert cache.unseen("one") == ("Pod",)
    woken.clear()
    del server.items["Pod", "one"]
    await asyncio.sleep(0.05)
    assert cache.unseen("one") == ()
    assert woken == ["one"], "those who waited for it are woken"
    task.cancel()


async def test_why_a_job_has_no_pod_is_told_by_its_newest_event_until_that_expires() -> None:
    def event(number: int, message: str) -> dict[str, Any]:
        about = {"kind": "Job", "name": "digits-v1-0123abcd", "uid": "job-1"}
        meta = {"name": f"e{number}", "namespace": "vision", "uid": f"e{number}", "resourceVersion": str(number)}
        return {"metadata": meta, "involvedObject": about, "message": message}

    server = Server()
    server.items["Job", None] = [child("digits-v1-0123abcd", uid="job-1")]
    server.items[EVENT.kind, None] = [event(2, "exceeded quota: a")]
    server.changes[EVENT.kind] = [
        ("ADDED", event(9, "exceeded quota: b")),
        ("ADDED", event(8, "older")),
        ("DELETED", event(8, "")),
    ]
    cache, woken = await run(server)
    assert cache.children(JOB, KEY)
    assert cache.job_words("job-1") == "exceeded quota: b"
    assert cache.job_words("job-2") is None
    assert woken.count(KEY) >= 2

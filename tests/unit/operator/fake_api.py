"""A stand-in for the API server with what the fence rests on: resourceVersions and preconditions. And hands that do what
controllers would.

It leaves out: validation, defaults, field ownership (an apply replaces the spec), label selectors, garbage collection, watches (a
leader is shown the store by `Leader.watch`), admission. Those are tested against the real one in tests/api and tests/e2e.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, cast

from perch.api import GROUP, KIND, VERSION, Spec
from perch.kube import CHILDREN, DEPLOYMENT, JOB, MODEL_DEPLOYMENT, ROUTE, ApiError, Kind
from perch.lease import LeaseLostError
from perch.names import ANNOTATION_REVISION, ANNOTATION_SERVING_HASH, LABEL_VERSION
from perch.reconcile import Reconciler
from perch_exporter.contract import Outcome, Summary

from .world import INSTALLATION

KEY = ("vision", "digits")
Place = tuple[str, str]


class Store:
    """Objects by kind and name, in one namespace."""

    def __init__(self) -> None:
        self.objects: dict[Place, dict[str, Any]] = {}
        self.version = 0
        self.weights: list[dict[str, int]] = []
        """What the route has said, in order."""

    def put(self, kind: str, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Store it as a newer version. The generation moves with the spec."""
        self.version += 1
        old, new = self.objects.get((kind, name)), copy.deepcopy(dict(body))
        metadata = {**(old["metadata"] if old else {"uid": f"uid-{self.version}"}), **new["metadata"]}
        moved = old is None or old.get("spec") != new.get("spec")
        metadata["generation"] = (old["metadata"]["generation"] if old else 0) + moved
        metadata.setdefault("creationTimestamp", f"2026-01-01T00:00:{self.version % 60:02d}Z")
        new["metadata"] = {**metadata, "resourceVersion": str(self.version)}
        self.objects[kind, name] = {"kind": kind, **new}
        if kind == "HTTPRoute" and moved:
            refs = new["spec"]["rules"][0]["backendRefs"]
            self.weights.append({ref["name"]: ref["weight"] for ref in refs if ref["weight"]})
        return copy.deepcopy(self.objects[kind, name])

    def get(self, kind: str, name: str) -> dict[str, Any]:
        if (kind, name) not in self.objects:
            raise ApiError(404, "NotFound", f"{kind} {name} not found")
        return copy.deepcopy(self.objects[kind, name])

    def check(self, kind: str, name: str, version: str | None) -> None:
        found = self.objects.get((kind, name))
        if version is not None and (found is None or found["metadata"]["resourceVersion"] != version):
            raise ApiError(409, "Conflict", f"{kind} {name}: the object has been modified")

    def of(self, kind: Kind) -> list[dict[str, Any]]:
        return [obj for (found, _), obj in self.objects.items() if found == kind.kind]

    @property
    def status(self) -> dict[str, Any]:
        return cast(dict[str, Any], self.get(KIND, KEY[1]).get("status", {}))

    def commit(self, spec: Spec) -> None:
        """The user's new spec."""
        old = self.objects.get((KIND, KEY[1]), {"metadata": {"name": KEY[1], "namespace": KEY[0]}})
        content = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        self.put(KIND, KEY[1], {**old, "apiVersion": f"{GROUP}/{VERSION}", "spec": content})

    def go_well(self) -> None:
        """Exports are published, pods become ready, the Gateway accepts the route."""
        for job in self.of(JOB):
            self._publish(job)
        for deployment in self.of(DEPLOYMENT):
            replicas = deployment["spec"]["replicas"]
            counts = {"replicas": replicas, "readyReplicas": replicas, "updatedReplicas": replicas}
            self._stand(deployment, {**counts, "observedGeneration": deployment["metadata"]["generation"]})
        for route in self.of(ROUTE):
            generation = route["metadata"]["generation"]
            voices = [{"type": t, "status": "True", "observedGeneration": generation} for t in ("Accepted", "ResolvedRefs")]
            self._stand(route, {"parents": [{"parentRef": {"name": "gateway"}, "conditions": voices}]})

    def crash(self, version: int, now: datetime) -> None:
        """The pods of a version end again and again, and none is ready."""
        deployment = self.get("Deployment", f"{KEY[1]}-v{version}")
        self._stand(deployment, {**deployment["status"], "readyReplicas": 0})
        labels = {**deployment["metadata"]["labels"]}
        template = {ANNOTATION_SERVING_HASH: deployment["metadata"]["annotations"][ANNOTATION_SERVING_HASH]}
        ended = {"exitCode": 139, "reason": "Error", "finishedAt": now.isoformat()}
        triton = {"name": "triton", "ready": False, "restartCount": 5, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}
        pod = {
            "metadata": {"name": f"{KEY[1]}-v{version}-x", "namespace": KEY[0], "labels": labels, "annotations": template},
            "status": {"phase": "Running", "containerStatuses": [{**triton, "lastState": {"terminated": ended}}]},
        }
        self.put("Pod", pod["metadata"]["name"], pod)

    def _publish(self, job: Mapping[str, Any]) -> None:
        meta = job["metadata"]
        summary = Summary(
            outcome=Outcome.PUBLISHED,
            artifact_uri=f"s3://models/{meta['name']}",
            artifact_digest=f"sha256:{meta['annotations'][ANNOTATION_REVISION] * 8}",
        )
        ended = {"terminated": {"exitCode": 0, "message": summary.to_json()}}
        pod = {
            "metadata": {
                "name": f"{meta['name']}-x",
                "namespace": KEY[0],
                "labels": {**meta["labels"], LABEL_VERSION: meta["labels"][LABEL_VERSION]},
                "ownerReferences": [{"uid": meta["uid"], "controller": True}],
            },
            "status": {"phase": "Succeeded", "containerStatuses": [{"name": "publish", "state": ended}]},
        }
        if ("Pod", pod["metadata"]["name"]) not in self.objects:
            self.put("Pod", pod["metadata"]["name"], pod)
            self._stand(job, {"conditions": [{"type": "Complete", "status": "True"}]})

    def _stand(self, obj: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        if obj.get("status") != status:
            self.put(obj["kind"], obj["metadata"]["name"], {**obj, "status": status})


class Leader:
    """One operator, which may be paused at any of its writes: after it has asked whether it holds the Lease, before the write
    arrives."""

    requests = 0

    def __init__(self, store: Store, clock: Callable[[], datetime]) -> None:
        self.store = store
        self.lost = False
        self.writes = 0
        self.wrote: set[Place] = set()
        self.pause_at: int | None = None
        self.paused, self.resumed = asyncio.Event(), asyncio.Event()
        self.refuse: Callable[[str, Any], None] = lambda what, body: None
        self.reconciler = Reconciler(cast(Any, self), INSTALLATION, (), clock)

    def watch(self) -> None:
        """See everything as it is now."""
        cache = self.reconciler.cache
        for kind in CHILDREN:
            cache._mark_listed(kind, None)
            for place in list(cache._owners[kind.kind]):
                cache._remove(kind.kind, place)
            for obj in self.store.of(kind):
                cache.absorb(copy.deepcopy(obj))
        for obj in self.store.of(MODEL_DEPLOYMENT):
            self.reconciler.see(copy.deepcopy(obj), deleted=False)

    async def work(self, passes: int = 1) -> None:
        for _ in range(passes):
            self.watch()
            await self.reconciler._guarded_pass(KEY)

    # --- what `Kube` offers ---

    async def get(self, kind: Kind, _: str, name: str) -> dict[str, Any]:
        return self.store.get(kind.kind, name)

    async def apply(self, body: Mapping[str, Any], resource_version: str | None = None) -> dict[str, Any]:
        def write() -> dict[str, Any]:
            kind, name = body["kind"], body["metadata"]["name"]
            self.store.check(kind, name, resource_version)
            self.wrote.add((kind, name))
            return self.store.put(kind, name, {**self.store.objects.get((kind, name), {}), **body})

        return await self._write(f"apply {body['kind']}", body, write)

    async def patch(self, kind: Kind, _: str, name: str, body: Mapping[str, Any], part: str | None = None) -> dict[str, Any]:
        def write() -> dict[str, Any]:
            self.store.check(kind.kind, name, body.get("metadata", {}).get("resourceVersion"))
            self.wrote.add((kind.kind, name))
            return self.store.put(kind.kind, name, _merged(self.store.get(kind.kind, name), body))

        return await self._write(f"patch {kind.kind} {part or ''}".strip(), body, write)

    async def delete(self, kind: Kind, _: str, name: str, known: Mapping[str, Any] | None = None) -> None:
        def write() -> dict[str, Any]:
            self.store.check(kind.kind, name, known["metadata"]["resourceVersion"] if known else None)
            return self.store.objects.pop((kind.kind, name), {})

        await self._write(f"delete {kind.kind}", None, write)

    async def create(self, kind: Kind, _: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return dict(body)

    async def _write(self, what: str, body: Any, write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if self.lost:
            raise LeaseLostError("it has run out")
        self.writes += 1
        if self.writes == self.pause_at:
            self.paused.set()
            await self.resumed.wait()
        self.refuse(what, body)
        return write()


def _merged(old: Any, patch: Any) -> Any:
    """A JSON merge patch."""
    if not isinstance(patch, Mapping):
        return patch
    new = dict(old) if isinstance(old, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            new.pop(key, None)
        else:
            new[key] = _merged(new.get(key), value)
    return new


async def settle(store: Store, leader: Leader, passes: int = 12) -> None:
    for _ in range(passes):
        await leader.work()
        store.go_well()

"""Watch caches of Perch's own children: what `observe` reads, kept current by watches with a selector on the server's side.

One list and one watch per kind and namespace (or for the whole cluster), whatever the number of ModelDeployments. What a write
returned is taken in at once, so that the next pass never acts on what it has itself outdated. A watch that fails harms only the
ModelDeployments that need it: those of its namespace, and of them those that have such children.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from perch import metrics
from perch.api import GROUP, KIND
from perch.kube import CHILDREN, DEPLOYMENT, EVENT, JOB, POD, ROUTE, SERVICE, SILENCE, ApiError, Kind, Kube, Selector
from perch.names import LABEL_OWNER, SELECTOR

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name of a ModelDeployment, or of a child."""
RETRY_SECONDS = 5
MISSING_SECONDS = 30
"""How often a missing kind (Gateway API not installed), or one that may not be listed, is looked for again."""
NEEDED = (JOB, DEPLOYMENT, SERVICE, POD, ROUTE)
"""Of these a pass must know what there is. What is not seen of the others is applied again, which changes nothing."""
OF_CHILDREN: Selector = {"labelSelector": SELECTOR}
OF_JOBS_WITHOUT_PODS: Selector = {"fieldSelector": "involvedObject.kind=Job,reason=FailedCreate"}


class Cache:
    """Children by kind and owner. `changed` is called with the owner of every child that changed, and `seen` with the namespace
    (None: the whole cluster) where a kind can be seen, or not, from now on."""

    def __init__(
        self,
        kube: Kube,
        namespaces: tuple[str, ...],
        changed: Callable[[Key], None],
        clock: Callable[[], datetime],
        seen: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        self._kube = kube
        self._scopes: tuple[str | None, ...] = namespaces or (None,)
        self._changed = changed
        self._seen = seen
        self._objects: dict[str, dict[Key, dict[str, dict[str, Any]]]] = {kind.kind: defaultdict(dict) for kind in CHILDREN}
        self._owners: dict[str, dict[Key, Key]] = {kind.kind: {} for kind in CHILDREN}
        self._events: dict[str, dict[str, Any]] = {}
        """By their own UID: why a Job has no pod."""
        every = {(kind.kind, scope) for kind in CHILDREN for scope in self._scopes}
        self._untried = set(every)
        self._unlisted = set(every)
        self._troubles: dict[tuple[str, str | None], str] = {}
        self._synced = asyncio.Event()
        self._missing: set[str] = set()
        self._clock = clock
        self._lost: set[tuple[str, str | None]] = set(every)
        self._watching_since: dict[str | None, datetime] = {}

    def children(self, kind: Kind, owner: Key) -> Mapping[str, dict[str, Any]]:
        """Objects of one kind by name that belong to the owner."""
        return self._objects[kind.kind].get(owner, {})

    def every(self, kind: Kind) -> Iterator[tuple[Key, dict[str, Any]]]:
        """All objects of one kind that belong to somebody, with their owners."""
        for owner, objects in self._objects[kind.kind].items():
            for obj in objects.values():
                yield owner, obj

    def job_words(self, uid: str) -> str | None:
        """Why a Job got no pod, in the Job controller's words; the newest ones."""
        about = [e for e in self._events.values() if e.get("involvedObject", {}).get("uid") == uid]
        newest = max(about, key=lambda e: int(e["metadata"]["resourceVersion"]), default=None)
        return str(newest.get("message", "")) if newest else None

    @property
    def is_synced(self) -> bool:
        """Whether each kind was listed in each namespace, or refused."""
        return self._synced.is_set()

    @property
    def gateway_api(self) -> bool:
        return ROUTE.kind not in self._missing

    def unseen(self, namespace: str) -> tuple[str, ...]:
        """Kinds that a pass in this namespace needs and that were never listed: it would take what it cannot see for gone."""
        scope = self._scope(namespace)
        return tuple(kind.kind for kind in NEEDED if (kind.kind, scope) in self._unlisted)

    def trouble(self, namespace: str) -> str | None:
        """What cannot be watched there that a pass needs, and why; None also while it was not answered yet."""
        scope = self._scope(namespace)
        found = [(kind, self._troubles[kind.kind, scope]) for kind in NEEDED if (kind.kind, scope) in self._troubles]
        return "; ".join(f"{kind.plural}: {said}" for kind, said in found) or None

    def watching_since(self, namespace: str) -> datetime:
        """Since when all children of a namespace have been watched without a break; now, while a watch is lost."""
        scope = self._scope(namespace)
        if any((kind.kind, scope) in self._lost for kind in NEEDED):
            return self._clock()
        return self._watching_since.get(scope) or self._clock()

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as group:
            for scope in self._scopes:
                for kind in CHILDREN:
                    group.create_task(self._follow(kind, scope), name=f"watch {kind.plural}")
                group.create_task(self._follow_events(scope), name="watch events")

    def absorb(self, obj: Mapping[str, Any]) -> None:
        """Take in what a write or a look returned."""
        self._put(obj["kind"], dict(obj))

    def forget(self, kind: str, owner: Key, name: str) -> None:
        """Take in that a delete succeeded. An object that lingers (a finalizer) comes back with its next event."""
        self._remove(kind, (owner[0], name))

    def _scope(self, namespace: str) -> str | None:
        return namespace if namespace in self._scopes else None

    async def _follow(self, kind: Kind, scope: str | None) -> None:
        while True:
            pause: float = RETRY_SECONDS
            try:
                version = await self._list(kind, scope)
                while True:
                    version = await self._watch(kind, scope, version)
            except ApiError as error:
                if error.status == 404:
                    pause = MISSING_SECONDS
                    self._mark_missing(kind, scope)
                elif error.status == 410:
                    pause = 0
                else:
                    pause = MISSING_SECONDS if error.status == 403 else RETRY_SECONDS
                    self._mark_lost(kind, scope, error.message)
            except SILENCE as error:
                self._mark_lost(kind, scope, None)
                log.warning("lost the watch of %s, listing again: %r", kind.plural, error)
            except Exception as error:
                self._mark_lost(kind, scope, f"Perch failed to read them ({type(error).__name__}), its log says more")
                log.exception("the watch of %s in %s: this is a defect of Perch", kind.plural, scope or "all namespaces")
            await asyncio.sleep(pause)

    async def _list(self, kind: Kind, scope: str | None) -> str:
        items, version = await self._kube.list(kind, scope, OF_CHILDREN)
        before = {place for place in self._owners[kind.kind] if scope in (None, place[0])}
        for item in items:
            place = (item["metadata"]["namespace"], item["metadata"]["name"])
            before.discard(place)
            self._put(kind.kind, {"kind": kind.kind, "apiVersion": kind.api_version, **item})
            self._wake(kind, place)
        for place in before:
            await self._gone(kind, place)
        if kind.kind in self._missing:
            self._missing.discard(kind.kind)
            self._wake_all()
        self._mark_listed(kind, scope)
        return version

    async def _watch(self, kind: Kind, scope: str | None, version: str) -> str:
        async for change, obj in self._kube.watch(kind, scope, OF_CHILDREN, version):
            version = obj["metadata"]["resourceVersion"]
            if change == "BOOKMARK":
                continue
            place = (obj["metadata"]["namespace"], obj["metadata"]["name"])
            if change == "DELETED":
                await self._gone(kind, place)
            else:
                self._put(kind.kind, obj)
                self._wake(kind, place)
        return version

    async def _gone(self, kind: Kind, place: Key) -> None:
        """A child is gone, or somebody took its labels off: then the watch shows it no more, and it is a child all the same."""
        known, owner = self._known(kind, place), self._owners[kind.kind].get(place)
        if known is None or owner is None:
            return
        live = None if kind is POD else await self._find(kind, place)
        if live is not None and live["metadata"]["uid"] == known["metadata"]["uid"] and controller(live) == controller(known):
            self._put(kind.kind, {"kind": kind.kind, "apiVersion": kind.api_version, **live})
        elif self._known(kind, place) is known:
            self._remove(kind.kind, place)
        self._changed(owner)

    async def _find(self, kind: Kind, place: Key) -> dict[str, Any] | None:
        try:
            return await self._kube.get(kind, *place)
        except ApiError as error:
            if error.status in (403, 404):
                return None
            raise

    async def _follow_events(self, scope: str | None) -> None:
        """Why Jobs get no pods. Without the right to read it, only these words are missing."""
        while True:
            pause: float = RETRY_SECONDS
            try:
                items, version = await self._kube.list(EVENT, scope, OF_JOBS_WITHOUT_PODS)
                kept = {uid: e for uid, e in self._events.items() if scope not in (None, e["metadata"]["namespace"])}
                self._events = kept | {e["metadata"]["uid"]: e for e in items}
                metrics.WATCHES.labels(EVENT.kind, scope or "").set(1)
                while True:
                    async for change, event in self._kube.watch(EVENT, scope, OF_JOBS_WITHOUT_PODS, version):
                        version = event["metadata"]["resourceVersion"]
                        if change != "BOOKMARK":
                            self._take_in(change, event)
            except ApiError as error:
                pause = 0 if error.status == 410 else MISSING_SECONDS
                if error.status != 410:
                    metrics.WATCHES.labels(EVENT.kind, scope or "").set(0)
                    log.warning("events of Jobs cannot be watched in %s: %s", scope or "all namespaces", error)
            except SILENCE as error:
                metrics.WATCHES.labels(EVENT.kind, scope or "").set(0)
                log.warning("lost the watch of events, listing again: %r", error)
            except Exception:
                log.exception("the watch of events in %s: this is a defect of Perch", scope or "all namespaces")
            await asyncio.sleep(pause)

    def _take_in(self, change: str, event: dict[str, Any]) -> None:
        uid = event["metadata"]["uid"]
        if change == "DELETED":
            self._events.pop(uid, None)
            return
        self._events[uid] = event
        self._wake(JOB, (event["metadata"]["namespace"], event.get("involvedObject", {}).get("name", "")))

    def _put(self, kind: str, obj: dict[str, Any]) -> None:
        owner, place = _owner(obj), (obj["metadata"]["namespace"], obj["metadata"]["name"])
        former = self._owners[kind].get(place)
        old = self._objects[kind][former].get(place[1]) if former else None
        if old is not None and older(obj, old):
            return
        self._remove(kind, place)
        if owner is None:
            return
        obj["metadata"].pop("managedFields", None)
        self._owners[kind][place] = owner
        self._objects[kind][owner][place[1]] = obj

    def _remove(self, kind: str, place: Key) -> None:
        owner = self._owners[kind].pop(place, None)
        if owner is not None:
            self._objects[kind][owner].pop(place[1], None)

    def _known(self, kind: Kind, place: Key) -> dict[str, Any] | None:
        owner = self._owners[kind.kind].get(place)
        return self._objects[kind.kind][owner].get(place[1]) if owner else None

    def _wake(self, kind: Kind, place: Key) -> None:
        owner = self._owners[kind.kind].get(place)
        if owner is not None:
            self._changed(owner)

    def _mark_missing(self, kind: Kind, scope: str | None) -> None:
        if kind.kind not in self._missing:
            log.warning("the cluster has no %s (%s)", kind.kind, kind.api_version)
            self._missing.add(kind.kind)
            self._wake_all()
        self._objects[kind.kind].clear()
        self._owners[kind.kind].clear()
        self._mark_listed(kind, scope)

    def _mark_lost(self, kind: Kind, scope: str | None, said: str | None) -> None:
        """`said`: what the API server answered; None where it did not."""
        self._lost.add((kind.kind, scope))
        metrics.WATCHES.labels(kind.kind, scope or "").set(0)
        if said is None:
            return
        if self._troubles.get((kind.kind, scope)) != said:
            self._troubles[kind.kind, scope] = said
            where = f"namespace {scope}" if scope else "the cluster"
            log.error("cannot watch %s in %s, which harms only what needs them there: %s", kind.plural, where, said)
            self._seen(scope)
        self._mark_tried(kind, scope)

    def _mark_listed(self, kind: Kind, scope: str | None) -> None:
        place = (kind.kind, scope)
        if place in self._lost:
            self._lost.discard(place)
            self._watching_since[scope] = self._clock()
        self._troubles.pop(place, None)
        metrics.WATCHES.labels(kind.kind, scope or "").set(1)
        if place in self._unlisted:
            self._unlisted.discard(place)
            self._seen(scope)
        self._mark_tried(kind, scope)

    def _mark_tried(self, kind: Kind, scope: str | None) -> None:
        self._untried.discard((kind.kind, scope))
        if not self._untried:
            self._synced.set()

    def _wake_all(self) -> None:
        for owner in {owner for store in self._objects.values() for owner in store}:
            self._changed(owner)


def older(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether `one` is an older state of the same object. Resource versions are ordered numbers (a promise since 1.35)."""
    if one["metadata"].get("uid") != other["metadata"].get("uid"):
        return False
    return int(one["metadata"]["resourceVersion"]) < int(other["metadata"]["resourceVersion"])


def controller(obj: Mapping[str, Any]) -> str | None:
    """The UID of the object that controls it."""
    return next((ref["uid"] for ref in obj["metadata"].get("ownerReferences", []) if ref.get("controller")), None)


def owner_name(obj: Mapping[str, Any]) -> str:
    """The ModelDeployment that an object belongs to: the one that controls it, whatever its labels say; of a pod, or of an
    orphan, the one that its label names. Empty for none."""
    metadata = obj["metadata"]
    for ref in metadata.get("ownerReferences", []):
        if ref.get("controller") and ref.get("kind") == KIND and ref.get("apiVersion", "").startswith(f"{GROUP}/"):
            return str(ref["name"])
    return str((metadata.get("labels") or {}).get(LABEL_OWNER, ""))


def _owner(obj: Mapping[str, Any]) -> Key | None:
    name = owner_name(obj)
    return (obj["metadata"]["namespace"], name) if name else None

"""Watch caches of Perch's own children: what `observe` reads, kept current by watches with a label selector on the server's side.

One list and one watch per kind and namespace (or for the whole cluster), whatever the number of ModelDeployments. What a write
returned is taken in at once, so that the next pass never acts on what it has itself outdated.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import aiohttp

from perch.kube import CHILDREN, ROUTE, ApiError, Kind, Kube
from perch.names import LABEL_OWNER, SELECTOR

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name of a ModelDeployment."""
RETRY_SECONDS = 5
MISSING_SECONDS = 30
"""How often a missing kind (Gateway API not installed) is looked for again."""


class Cache:
    """Children by kind and owner. `changed` is called with the owner of every child that changed."""

    def __init__(
        self, kube: Kube, namespaces: tuple[str, ...], changed: Callable[[Key], None], clock: Callable[[], datetime]
    ) -> None:
        self._kube = kube
        self._scopes: tuple[str | None, ...] = namespaces or (None,)
        self._changed = changed
        self._objects: dict[str, dict[Key, dict[str, dict[str, Any]]]] = {kind.kind: defaultdict(dict) for kind in CHILDREN}
        self._unsynced = {(kind.kind, scope) for kind in CHILDREN for scope in self._scopes}
        self._synced = asyncio.Event()
        self._missing: set[str] = set()
        self._clock = clock
        self._lost: set[tuple[str, str | None]] = set(self._unsynced)
        self._watching_since: dict[str | None, datetime] = {}

    def children(self, kind: Kind, owner: Key) -> Mapping[str, dict[str, Any]]:
        """Objects of one kind by name that belong to the owner."""
        return self._objects[kind.kind].get(owner, {})

    @property
    def is_synced(self) -> bool:
        return self._synced.is_set()

    @property
    def gateway_api(self) -> bool:
        return ROUTE.kind not in self._missing

    def watching_since(self, namespace: str) -> datetime:
        """Since when all children of a namespace have been watched without a break; now, while a watch is lost."""
        scope = namespace if namespace in self._scopes else None
        if any(lost == scope for _, lost in self._lost):
            return self._clock()
        return self._watching_since.get(scope) or self._clock()

    async def synced(self) -> None:
        """Wait until every kind was listed once (or found missing)."""
        await self._synced.wait()

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as group:
            for kind in CHILDREN:
                for scope in self._scopes:
                    group.create_task(self._follow(kind, scope), name=f"watch {kind.plural}")

    def absorb(self, obj: Mapping[str, Any]) -> None:
        """Take in what a write returned."""
        self._put(obj["kind"], dict(obj))

    def forget(self, kind: str, owner: Key, name: str) -> None:
        """Take in that a delete succeeded. An object that lingers (a finalizer) comes back with its next event."""
        self._objects[kind].get(owner, {}).pop(name, None)

    async def _follow(self, kind: Kind, scope: str | None) -> None:
        while True:
            pause = RETRY_SECONDS
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
                elif error.status == 403 and scope is not None:
                    # One namespace that is gone, or whose Role is, must not stop the others.
                    log.error("no right to list %s in namespace %s: %s", kind.plural, scope, error.message)
                    self._mark_synced(kind, scope)
                    pause = MISSING_SECONDS
                else:
                    self._lost.add((kind.kind, scope))
                    log.warning("cannot watch %s: %s", kind.plural, error)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                self._lost.add((kind.kind, scope))
                log.warning("lost the watch of %s, listing again: %r", kind.plural, error)
            await asyncio.sleep(pause)

    async def _list(self, kind: Kind, scope: str | None) -> str:
        items, version = await self._kube.list(kind, scope, SELECTOR)
        store = self._objects[kind.kind]
        before = {(owner, name) for owner, named in store.items() if scope in (None, owner[0]) for name in named}
        found = set()
        for item in items:
            owner = _owner(item)
            found.add((owner, item["metadata"]["name"]))
            self._put(kind.kind, {"kind": kind.kind, "apiVersion": kind.api_version, **item})
            self._changed(owner)
        for owner, name in before - found:
            del store[owner][name]
            self._changed(owner)
        if kind.kind in self._missing:
            self._missing.discard(kind.kind)
            self._wake_all()
        self._mark_synced(kind, scope)
        return version

    async def _watch(self, kind: Kind, scope: str | None, version: str) -> str:
        async for change, obj in self._kube.watch(kind, scope, SELECTOR, version):
            version = obj["metadata"]["resourceVersion"]
            if change == "BOOKMARK":
                continue
            owner = _owner(obj)
            if change == "DELETED":
                self._objects[kind.kind][owner].pop(obj["metadata"]["name"], None)
            else:
                self._put(kind.kind, obj)
            self._changed(owner)
        return version

    def _put(self, kind: str, obj: dict[str, Any]) -> None:
        named = self._objects[kind][_owner(obj)]
        old = named.get(obj["metadata"]["name"])
        if old is not None and older(obj, old):
            return
        obj["metadata"].pop("managedFields", None)
        named[obj["metadata"]["name"]] = obj

    def _mark_missing(self, kind: Kind, scope: str | None) -> None:
        if kind.kind not in self._missing:
            log.warning("the cluster has no %s (%s)", kind.kind, kind.api_version)
            self._missing.add(kind.kind)
            self._wake_all()
        self._objects[kind.kind].clear()
        self._mark_synced(kind, scope)

    def _mark_synced(self, kind: Kind, scope: str | None) -> None:
        if (kind.kind, scope) in self._lost:
            self._lost.discard((kind.kind, scope))
            self._watching_since[scope] = self._clock()
        self._unsynced.discard((kind.kind, scope))
        if not self._unsynced:
            self._synced.set()

    def _wake_all(self) -> None:
        for owner in {owner for store in self._objects.values() for owner in store}:
            self._changed(owner)


def older(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether `one` is an older state of the same object. Resource versions are ordered numbers (a promise since 1.35)."""
    if one["metadata"].get("uid") != other["metadata"].get("uid"):
        return False
    return int(one["metadata"]["resourceVersion"]) < int(other["metadata"]["resourceVersion"])


def _owner(obj: Mapping[str, Any]) -> Key:
    return obj["metadata"]["namespace"], obj["metadata"]["labels"][LABEL_OWNER]

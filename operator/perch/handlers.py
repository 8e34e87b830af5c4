"""Kopf: the watches of ModelDeployments. Bare event handlers wake the loop in `reconcile`: no finalizer, no annotation.

Kopf's change handlers are edge-triggered and keep their progress on the object; Perch is level-triggered and keeps none.

Each namespace has a kopf of its own: a watch that may not go on (the namespace is gone, or its Role is) ends the whole kopf that
it belongs to, and must end nobody else's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import kopf

from perch import metrics
from perch.api import GROUP, KIND, PLURAL, VERSION
from perch.kube import MODEL_DEPLOYMENT, SILENCE, ApiError, Kube
from perch.reconcile import Reconciler

log = logging.getLogger(__name__)

RETRY_SECONDS = 5
REFUSED_SECONDS = 30


class WatchEndedError(Exception):
    """No ModelDeployment can be watched any more: this process can no longer see."""


def build_registry() -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry)(login)
    kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(wake)
    return registry


def build_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True  # needs no rights on namespaces and CRDs
    settings.posting.enabled = False  # Perch posts its own events, on transitions only
    settings.networking.request_timeout = 20
    settings.networking.connect_timeout = 10
    settings.watching.server_timeout = 290
    settings.watching.connect_timeout = 10
    return settings


def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """The pod's service account, read anew at each 401 since tokens are rotated; else KUBECONFIG."""
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)


async def wake(event: Any, memo: Any, **_: Any) -> None:
    reconciler: Reconciler = memo.reconciler
    reconciler.see(event["object"], deleted=event["type"] == "DELETED")


async def can_list(kube: Kube, namespace: str | None) -> None:
    """Raises ApiError where ModelDeployments may not be listed, or are not known."""
    await kube.request("GET", MODEL_DEPLOYMENT.path(namespace), query={"limit": "1"})


class Watches:
    """One kopf for each namespace, or one for the whole cluster."""

    def __init__(self, kube: Kube, reconciler: Reconciler, namespaces: tuple[str, ...], started: Callable[[], None]) -> None:
        """`started` is called after each start of a kopf: each puts its signal handlers in the place of others."""
        self._kube = kube
        self._reconciler = reconciler
        self._scopes: tuple[str | None, ...] = namespaces or (None,)
        self._started = started
        self._refused: set[str | None] = set()

    async def run(self) -> None:
        """Watch until cancelled. Raises WatchEndedError when no namespace can be watched any more."""
        async with asyncio.TaskGroup() as group:
            for scope in self._scopes:
                group.create_task(self._follow(scope), name=f"kopf {scope or ''}")

    async def _follow(self, scope: str | None) -> None:
        while True:
            pause: float = REFUSED_SECONDS
            try:
                await can_list(self._kube, scope)
                self._note(scope, None)
                await self._watch(scope)
                why: object = "its watch ended"
            except ApiError as error:
                why = error
            except SILENCE as error:
                log.warning("the API server does not answer: %r", error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            except Exception as error:
                why, pause = f"its watch ended: {error!r}", RETRY_SECONDS
            self._note(scope, why)
            await asyncio.sleep(pause)

    async def _watch(self, scope: str | None) -> None:
        """Run kopf until its watch cannot go on, such as when the CRD was removed."""
        ready = asyncio.Event()
        running = asyncio.create_task(
            kopf.operator(
                registry=build_registry(),
                settings=build_settings(),
                memo=kopf.Memo(reconciler=self._reconciler),
                standalone=True,
                # Unused without peering; kopf would ask for the user's name, and a container's user has none.
                identity="perch",  # type: ignore[arg-type]
                clusterwide=scope is None,
                namespaces=[scope] if scope else [],
                ready_flag=ready,
            )
        )
        waiting = asyncio.create_task(ready.wait())
        try:
            await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
            self._started()
            await running
        finally:
            waiting.cancel()
            if running.cancel():
                await asyncio.wait({running})

    def _note(self, scope: str | None, why: object | None) -> None:
        """Whether a namespace is watched, by metric and log; the end of the process where none is."""
        metrics.WATCHES.labels(KIND, scope or "").set(why is None)
        where = f"namespace {scope}" if scope else "the cluster"
        if why is None:
            if scope in self._refused:
                log.info("ModelDeployments of %s are watched again", where)
            self._refused.discard(scope)
            return
        self._refused.add(scope)
        if len(self._refused) == len(self._scopes):
            raise WatchEndedError(f"ModelDeployments of {where} cannot be watched: {why}, and no others are")
        log.error("ModelDeployments of %s cannot be watched, others can: %s", where, why)

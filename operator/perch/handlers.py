"""Kopf: the watch of ModelDeployments. Bare event handlers wake the loop in `reconcile`: no finalizer, no annotation.

Kopf's change handlers are edge-triggered and keep their progress on the object; Perch is level-triggered and keeps none.
"""

from __future__ import annotations

import asyncio
from typing import Any

import kopf

from perch.api import GROUP, PLURAL, VERSION
from perch.reconcile import Reconciler


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


async def serve(reconciler: Reconciler, namespaces: tuple[str, ...], started: asyncio.Event) -> None:
    """Run kopf until cancelled; `started` is set when it has set itself up, its signal handlers included.

    Returns or raises when its watch cannot go on, such as when the CRD was removed.
    """
    await kopf.operator(
        registry=build_registry(),
        settings=build_settings(),
        memo=kopf.Memo(reconciler=reconciler),
        standalone=True,
        # Unused without peering; kopf would ask for the user's name, and a container's user has none.
        identity="perch",  # type: ignore[arg-type]
        clusterwide=not namespaces,
        namespaces=list(namespaces),
        ready_flag=started,
    )

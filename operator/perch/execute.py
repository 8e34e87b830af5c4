"""Carry out a plan: one write after the other, each idempotent, each answer taken into the cache. Decides nothing.

A refusal of one write does not keep the others from being made; all refusals come back, for the status to tell.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from perch import metrics
from perch.api import GROUP, KIND, VERSION, Status
from perch.cache import Cache
from perch.kube import BY_KIND, DEPLOYMENT, EVENT, MODEL_DEPLOYMENT, ApiError, Kube
from perch.names import FINALIZER
from perch.observed import Identity
from perch.plan import Action, Apply, Delete, Scale, SetFinalizer
from perch.status import Event, format_time

log = logging.getLogger(__name__)


class NamespaceTerminatingError(Exception):
    """Nothing can be created any more: the namespace is going."""


class StaleError(Exception):
    """Somebody wrote in between; the next pass sees it."""


async def execute(kube: Kube, cache: Cache, identity: Identity, actions: Sequence[Action]) -> list[str]:
    """Return what the API server refused, one sentence each. Raises StaleError or NamespaceTerminatingError, or on silence."""
    refused: list[str] = []
    for action in actions:
        try:
            await _carry_out(kube, cache, identity, action)
        except ApiError as error:
            if "NamespaceTerminating" in error.causes or (error.status == 404 and error.message.startswith("namespaces ")):
                raise NamespaceTerminatingError from error
            if error.status == 409:
                raise StaleError(str(error)) from error
            if error.status >= 500 or error.status == 429:
                raise
            log.warning("%s/%s: %s was refused: %s", identity.namespace, identity.name, _what(action), error)
            refused.append(f"{_what(action)}: {error.message}")
    return refused


async def _carry_out(kube: Kube, cache: Cache, identity: Identity, action: Action) -> None:
    owner = (identity.namespace, identity.name)
    log.info("%s/%s: %s", identity.namespace, identity.name, _what(action))
    match action:
        case Apply():
            cache.absorb(await kube.apply(action.body, action.resource_version))
        case Scale():
            scale = {"spec": {"replicas": action.replicas}}
            cache.absorb(await kube.patch(DEPLOYMENT, identity.namespace, action.name, scale))
        case Delete():
            await kube.delete(BY_KIND[action.kind], identity.namespace, action.name)
            cache.forget(action.kind, owner, action.name)
        case SetFinalizer():
            others = [f for f in identity.finalizers if f != FINALIZER]
            wanted = [*others, FINALIZER] if action.present else others
            body = {"metadata": {"finalizers": wanted, "resourceVersion": identity.resource_version}}
            await kube.patch(MODEL_DEPLOYMENT, identity.namespace, identity.name, body)
    metrics.WRITES.labels(type(action).__name__).inc()


def _what(action: Action) -> str:
    match action:
        case Apply():
            return f"apply {action.body['kind']} {action.body['metadata']['name']}"
        case Scale():
            return f"scale Deployment {action.name} to {action.replicas}"
        case Delete():
            return f"delete {action.kind} {action.name}"
        case SetFinalizer():
            return "set finalizer" if action.present else "release finalizer"


async def write_status(kube: Kube, identity: Identity, status: Status) -> dict[str, Any]:
    """Replace the status. Fields that went are set to null, since a merge patch would keep them."""
    content = status.model_dump(mode="json", by_alias=True)
    return await kube.patch(MODEL_DEPLOYMENT, identity.namespace, identity.name, {"status": content}, "status")


async def post_events(
    kube: Kube, identity: Identity, events: Sequence[Event], now: datetime, *, namespace_terminating: bool = False
) -> None:
    """Tell what happened. Events are for humans: one that cannot be posted is logged and forgotten.

    A namespace that goes takes in no event: then it is posted about the namespace itself, which events in `default` may name.
    """
    about = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "namespace": identity.namespace,
        "name": identity.name,
        "uid": identity.uid,
    }
    where = identity.namespace
    if namespace_terminating:
        about, where = {"apiVersion": "v1", "kind": "Namespace", "name": identity.namespace}, "default"
    for event in events:
        stamp = format_time(now)
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{identity.name}-", "namespace": where},
            "type": event.kind,
            "reason": event.reason,
            "message": event.message[:1024],
            "involvedObject": about,
            "source": {"component": "perch"},
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
        }
        log.info("%s/%s: %s %s", identity.namespace, identity.name, event.reason, event.message)
        try:
            await kube.create(EVENT, where, body)
        except (ApiError, OSError, TimeoutError) as error:
            log.warning("event not posted: %s", error)

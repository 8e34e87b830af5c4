"""Carry out a plan: one write after the other, each idempotent, each answer taken into the cache. Decides nothing.

A write that is refused, or gets no answer, does not keep the others from being made; all come back, for the status to tell.
Nobody else's object is taken over. Every write of an object that is there names the very state that was seen: a process that was
paused in mid-write, and holds the Lease no more, changes nothing that its successor has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from perch import metrics
from perch.api import GROUP, KIND, VERSION, Status
from perch.cache import Cache, controller
from perch.kube import BY_KIND, DEPLOYMENT, EVENT, MODEL_DEPLOYMENT, SILENCE, ApiError, Kube
from perch.lease import LeaseLostError
from perch.names import FIELD_MANAGER, FINALIZER, LABEL_MANAGED_BY, LABEL_OWNER
from perch.observed import Identity
from perch.plan import Action, Apply, Delete, Label, Scale, SetFinalizer
from perch.status import Event, format_time

log = logging.getLogger(__name__)


class NamespaceTerminatingError(Exception):
    """Nothing can be created any more: the namespace is going."""


@dataclass
class Outcome:
    """What came of a plan's writes."""

    refused: list[str] = field(default_factory=list)
    """What the API server, or an object of somebody else in the way, did not let happen; one sentence each."""
    stale: bool = False
    """Somebody wrote in between: the next pass will see it."""
    found: bool = False
    """A child turned up that the watch does not show, since its labels are gone: what was decided without it is void."""
    owner: dict[str, Any] | None = None
    """The ModelDeployment as a write of its metadata returned it."""


async def execute(kube: Kube, cache: Cache, identity: Identity, actions: Sequence[Action]) -> Outcome:
    """No write keeps another from being made. Raises NamespaceTerminatingError, LeaseLostError, or on a second silence of the
    API server's: the others would wait in vain, too."""
    outcome, silent = Outcome(), 0
    for action in actions:
        try:
            await _carry_out(kube, cache, identity, action, outcome)
            if outcome.found:
                return outcome
        except ApiError as error:
            if "NamespaceTerminating" in error.causes or (error.status == 404 and error.message.startswith("namespaces ")):
                raise NamespaceTerminatingError from error
            if error.status == 409:
                outcome.stale = True
                continue
            log.warning("%s/%s: %s was refused: %s", identity.namespace, identity.name, _what(action), error)
            outcome.refused.append(f"{_what(action)}: {error.message}")
        except SILENCE as error:
            silent += 1
            if silent > 1:
                raise
            log.warning("%s/%s: %s got no answer: %r", identity.namespace, identity.name, _what(action), error)
            outcome.refused.append(f"{_what(action)}: no answer")
        except LeaseLostError:
            raise
        except Exception as error:
            log.exception("%s/%s: %s: this is a defect of Perch", identity.namespace, identity.name, _what(action))
            outcome.refused.append(f"{_what(action)}: Perch failed at it ({type(error).__name__}), its log says more")
    return outcome


async def _carry_out(kube: Kube, cache: Cache, identity: Identity, action: Action, outcome: Outcome) -> None:
    owner = (identity.namespace, identity.name)
    log.info("%s/%s: %s", identity.namespace, identity.name, _what(action))
    match action:
        case Apply():
            if await _is_there(kube, cache, identity, action, outcome):
                return
            seen = cache.children(BY_KIND[action.body["kind"]], owner).get(action.body["metadata"]["name"])
            cache.absorb(await _apply(kube, action, action.resource_version or _version(seen), outcome))
        case Scale():
            seen = cache.children(DEPLOYMENT, owner).get(action.name)
            scale = {"metadata": {"resourceVersion": _version(seen)}, "spec": {"replicas": action.replicas}}
            cache.absorb(await kube.patch(DEPLOYMENT, identity.namespace, action.name, scale))
        case Label():
            kind = BY_KIND[action.kind]
            seen = cache.children(kind, owner).get(action.name)
            labels = {"metadata": {"resourceVersion": _version(seen), "labels": dict(action.labels)}}
            cache.absorb(await kube.patch(kind, identity.namespace, action.name, labels))
        case Delete():
            kind = BY_KIND[action.kind]
            known = cache.children(kind, owner).get(action.name)
            if known is not None:
                await kube.delete(kind, identity.namespace, action.name, known)
                cache.forget(action.kind, owner, action.name)
        case SetFinalizer():
            others = [f for f in identity.finalizers if f != FINALIZER]
            wanted = [*others, FINALIZER] if action.present else others
            body = {"metadata": {"finalizers": wanted, "resourceVersion": identity.resource_version}}
            outcome.owner = await kube.patch(MODEL_DEPLOYMENT, identity.namespace, identity.name, body)
    metrics.WRITES.labels(type(action).__name__).inc()


async def _apply(kube: Kube, action: Apply, version: str | None, outcome: Outcome) -> dict[str, Any]:
    """Apply the body, or where the API server refuses it what the plan has beside it. The refusal is told in both cases."""
    try:
        return await kube.apply(action.body, version)
    except ApiError as error:
        if action.fallback is None or error.status == 409:
            raise
        log.warning("%s was refused, applying only what it changes of the weights: %s", _what(action), error)
        outcome.refused.append(f"{_what(action)}: {error.message}")
        return await kube.apply(action.fallback, version)


def _version(seen: Mapping[str, Any] | None) -> str | None:
    return str(seen["metadata"]["resourceVersion"]) if seen else None


async def _is_there(kube: Kube, cache: Cache, identity: Identity, action: Apply, outcome: Outcome) -> bool:
    """Whether an object that we are about to make is there already, unseen by the watch: ours without its labels, or somebody
    else's. Server-side apply would take that over, and render the pods of the other anew."""
    kind, name = BY_KIND[action.body["kind"]], action.body["metadata"]["name"]
    if name in cache.children(kind, (identity.namespace, identity.name)):
        return False
    try:
        found = await kube.get(kind, identity.namespace, name)
    except ApiError as error:
        if error.status == 404:
            return False
        raise
    if controller(found) == identity.uid:
        cache.absorb({"kind": kind.kind, "apiVersion": kind.api_version, **found})
        outcome.found = True
        return True
    labels = found["metadata"].get("labels", {})
    if labels.get(LABEL_MANAGED_BY) == FIELD_MANAGER and labels.get(LABEL_OWNER) == identity.name:
        return False
    outcome.refused.append(
        f"{_what(action)}: another object has this name and is not Perch's, so Perch leaves it alone. Give the ModelDeployment "
        "another name, or delete that object if nothing uses it"
    )
    return True


def _what(action: Action) -> str:
    match action:
        case Apply():
            return f"apply {action.body['kind']} {action.body['metadata']['name']}"
        case Scale():
            return f"scale Deployment {action.name} to {action.replicas}"
        case Delete():
            return f"delete {action.kind} {action.name}"
        case Label():
            return f"label {action.kind} {action.name}"
        case SetFinalizer():
            return "set finalizer" if action.present else "release finalizer"


async def write_status(kube: Kube, seen: Mapping[str, Any], status: Status) -> dict[str, Any]:
    """Replace the status of the ModelDeployment as it was `seen`: ApiError 409 where somebody wrote it since.

    Fields that went are set to null, since a merge patch would keep them.
    """
    metadata = seen["metadata"]
    body = {
        "metadata": {"resourceVersion": metadata["resourceVersion"]},
        "status": status.model_dump(mode="json", by_alias=True),
    }
    return await kube.patch(MODEL_DEPLOYMENT, metadata["namespace"], metadata["name"], body, "status")


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
        except (ApiError, *SILENCE) as error:
            log.warning("event not posted: %r", error)

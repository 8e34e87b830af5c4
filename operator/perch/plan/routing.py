"""The route: all weights in one write, and what leaves it when its traffic is gone."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from perch.api import Phase, Rollout, VersionStatus
from perch.builders.route import MOST_BACKENDS, build_route, build_weights_only, is_current, must_rehearse
from perch.durations import parse_duration
from perch.plan.context import Apply, Context, Delete
from perch.plan.rollout import short
from perch.plan.servings import readiness, remove_serving
from perch.status import VersionFacts, format_time, parse_time

SETTLE = timedelta(seconds=10)
"""Proxies converge within this time after a route was accepted: no pod leaves a version before."""


def plan_retirement(
    ctx: Context,
    versions: dict[int, VersionFacts],
    running: set[int],
    inspected: int | None,
    target: Mapping[int, int] | None,
    watched_until: datetime | None,
) -> set[int]:
    """Drain, then remove, what is to run no more. Returns the versions that may leave the route.

    Weight 0, accepted by the Gateway, then scaleDownDelay (never less than the proxies need; for an aborted canary, `inspected`,
    its inspectFor; for stable, not before `watched_until`), then out of the route, and only when the route without it was
    accepted, the pods go.
    """
    rollout = ctx.spec.rollout
    fields = Rollout.model_fields
    stay = rollout.scale_down_delay if rollout else fields["scale_down_delay"].default
    inspect = rollout.inspect_for if rollout else fields["inspect_for"].default
    leaving: set[int] = set()
    for version in sorted(set(ctx.observed.servings) - running):
        delay = max(parse_duration(inspect if version == inspected else stay), SETTLE)
        if any(weight == 100 and short(ctx, heir) for heir, weight in (target or {}).items()):
            # Who has all the traffic has not all the pods, for these stand in their places.
            delay = SETTLE
        known = ctx.status.of(version)
        facts = versions.get(version)
        drained_at = known.drained_at if known else None
        busy = ctx.present.get(version, 0) > 0 or bool(target and target.get(version, 0) > 0)
        if ctx.observed.route is None and not versions[ctx.spec.traffic.stable].readiness.full:
            # Nobody's weights say who answers: clients of its Service may, until the new stable can.
            busy = True
        unsure = ctx.observed.route is not None and not ctx.observed.route.accepted
        if busy:
            drained_at = None
        elif drained_at is None and not unsure:
            drained_at = format_time(ctx.now)
        if drained_at is not None:
            due = parse_time(drained_at) + delay
            if version == ctx.spec.traffic.stable and watched_until is not None:
                due = max(due, watched_until)
            if ctx.now < due:
                ctx.wakes.append(due)
            else:
                leaving.add(version)
                if version not in ctx.present and not unsure:
                    remove_serving(ctx, version)
        if facts is not None:
            update = {"phase": Phase.ABORTED if version == inspected else Phase.DRAINING, "drained_at": drained_at}
            versions[version] = facts.replace_status(facts.status.model_copy(update=update))
        else:
            versions[version] = _removed(ctx, version, drained_at)
    return leaving


def _removed(ctx: Context, version: int, drained_at: str | None) -> VersionFacts:
    """A version that left spec.versions but still runs keeps its line in status until it is gone."""
    serving = ctx.observed.servings[version]
    known = ctx.status.of(version) or VersionStatus(
        version=version, artifact_revision=serving.revision, phase=Phase.DRAINING, serving_hash=serving.serving_hash
    )
    update = {
        "phase": Phase.DRAINING,
        "drained_at": drained_at,
        "replicas": serving.replicas,
        "ready_replicas": serving.ready,
        "message": None,
    }
    return VersionFacts(known.model_copy(update=update), readiness=readiness(serving, serving.replicas), removed=True)


def host_conflict(ctx: Context) -> str | None:
    """Why requests for a host name go to somebody else; None where nobody is in the way.

    Of two routes with the same host name and paths a Gateway takes the older one's rules (Gateway API). Which one that is Perch
    knows of its own; of a stranger's it knows only that the Gateway calls them in each other's way.
    """
    route, key = ctx.observed.route, f"{ctx.identity.namespace}/{ctx.identity.name}"
    for claim in ctx.observed.claims:
        if route is None or not claim.held or (claim.created, claim.owner) < (route.created, key):
            names = " and ".join(sorted(claim.hostnames))
            return (
                f"ModelDeployment {claim.owner} has host name {names} on the same Gateway already, and gets its requests: write "
                "another name into routing.hostnames here or there"
            )
    known = {claim.owner for claim in ctx.observed.claims}
    strangers = [name for name in (route.overlaps if route else ()) if name not in known]
    if strangers:
        names = " and ".join(name if name.startswith("GRPCRoute") else f"HTTPRoute {name}" for name in strangers)
        return (
            f"the Gateway says that {names} {'ask' if len(strangers) > 1 else 'asks'} for the same requests, and the older route "
            "gets them: change the host name here or there"
        )
    return None


def plan_route(
    ctx: Context, target: Mapping[int, int] | None, leaving: set[int], *, trial: int | None = None
) -> dict[int, int] | None:
    """One write sets all weights. Backends with weight 0 stay until they are drained: swapping backends can answer 503.

    `trial`: the canary, where it is ready for the requests that traffic.match and traffic.mirror send it.
    """
    if not ctx.observed.gateway_api:
        return None
    route, routing, traffic = ctx.observed.route, ctx.spec.routing, ctx.spec.traffic
    if routing is None:
        if route is not None:
            ctx.actions.append(Delete("HTTPRoute", ctx.identity.name))
        return None
    if target is None:
        return None
    given = {v for v, weight in target.items() if weight > 0}
    weights = _bounded(ctx, {v: target.get(v, 0) for v in sorted(given | (set(ctx.observed.servings) - leaving))})
    model = ctx.spec.model_name or ctx.identity.name
    streams = _streams(ctx, weights)
    steady = build_weights_only(ctx.identity, weights, route.spec, streams=streams, keep=trial is not None) if route else None

    def build() -> dict[str, Any] | None:
        return build_route(
            ctx.identity,
            routing,
            model,
            weights,
            streams=streams,
            headers=(trial, traffic.match.headers) if trial is not None and traffic.match else None,
            mirror=(trial, traffic.mirror.percent)
            if trial is not None and traffic.mirror and target.get(trial, 0) < 100
            else None,
            rehearsal=must_rehearse(route),
        )

    # A host name that another one has is not asked for: the route stays as it stands, where it stands.
    taken = any(not claim.held for claim in ctx.observed.claims)
    body = steady if taken else ctx.attempt("the HTTPRoute", build, lambda: steady)
    if body is None and taken:
        return None
    if body is None or (route is not None and is_current(body["spec"], route.spec)):
        return weights
    # Where nothing but numbers changes, the first try is the fallback already.
    fallback = steady if route and steady and steady != body and not is_current(steady["spec"], route.spec) else None
    ctx.actions.append(Apply(body, route.resource_version if route else None, fallback))
    return weights


def plan_numbers(ctx: Context, target: Mapping[int, int], *, keep: bool) -> None:
    """Write these weights onto the route as it stands, and nothing else. `keep`: see `build_weights_only`."""
    route = ctx.observed.route
    if route is None:
        return
    weights = _bounded(ctx, {v: target.get(v, 0) for v in sorted({*route.weights, *target})})
    body = build_weights_only(ctx.identity, weights, route.spec, streams=_streams(ctx, weights), keep=keep)
    if not is_current(body["spec"], route.spec):
        ctx.actions.append(Apply(body, route.resource_version))


def _streams(ctx: Context, weights: Mapping[int, int]) -> int:
    """Who gets new streams: who has the traffic that the canary has not, and the canary when it has all."""
    others = {v: weight for v, weight in weights.items() if weight and v != ctx.spec.traffic.canary}
    return max(others or weights, key=lambda v: weights[v])


def _bounded(ctx: Context, weights: dict[int, int]) -> dict[int, int]:
    """As many backends as a rule may have: those without traffic leave, the one that was drained first before the others."""

    def drained(version: int) -> str:
        known = ctx.status.of(version)
        return (known.drained_at if known else None) or "9"

    idle = sorted((v for v, weight in weights.items() if weight == 0), key=lambda v: (drained(v), v))
    gone = set(idle[: max(0, len(weights) - MOST_BACKENDS)])
    return {v: weight for v, weight in weights.items() if v not in gone}

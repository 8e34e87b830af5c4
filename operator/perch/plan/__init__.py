"""The planner: one pure function from spec, status, observed children and the time to actions, status and the next wake-up.

No client, clock, randomness, log or environment here. Any pass may be repeated, or die between two of its writes: each decision
is taken anew from what is observed, and every name derives from identity and content. What a pass must remember (a published
digest, when a retry is due, when a version was drained) stands in status; where status is lost it is found again from the
children or from the repository, which publishes a thing once.

The parts: `exports` (versions become artefacts), `rollout` (what the canary gets), `servings` (pods), `routing` (weights, and
what leaves), `removal` (what left the spec). `traffic` has the last word on weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from perch.api import DeletionPolicy, Spec, Status, Version, VersionStatus, Weights, WeightStatus
from perch.names import FINALIZER, serving_name
from perch.observed import Identity, Installation, Observed
from perch.plan.context import Action, Apply, Context, Delete, Label, Plan, Scale, SetFinalizer, say_invalid
from perch.plan.exports import known_export, plan_export, plan_export_policy
from perch.plan.invalid import plan_invalid
from perch.plan.removal import plan_deletion, plan_removed
from perch.plan.rollout import (
    Progress,
    abort_to_record,
    aborted_before,
    as_it_stands,
    canary_replicas,
    decide_rollout,
    is_desperate,
    share_places,
    stable_replicas,
    within_replicas,
)
from perch.plan.routing import host_conflict, plan_retirement, plan_route
from perch.plan.servings import keep_services, plan_serving, readiness, report_serving, sweep
from perch.status import Facts, VersionFacts, build_conditions
from perch.traffic import decide_weights

__all__ = ["Action", "Apply", "Delete", "Label", "Plan", "Scale", "SetFinalizer", "plan", "plan_invalid", "say_invalid"]


def plan(identity: Identity, spec: Spec, status: Status, observed: Observed, installation: Installation, now: datetime) -> Plan:
    """Decide what to do now. `now` has a time zone and whole seconds."""
    ctx = Context(identity, spec, status, observed, installation, now)
    if identity.deleting_since is not None:
        return plan_deletion(ctx, identity.deleting_since)
    wants_finalizer = spec.repository.deletion_policy is DeletionPolicy.DELETE
    if wants_finalizer != (FINALIZER in identity.finalizers):
        ctx.actions.append(SetFinalizer(wants_finalizer))

    ctx.actions.extend(Label(child.kind, child.name, child.labels) for child in observed.unlabelled)
    ctx.attempt("builder.networkPolicy", lambda: plan_export_policy(ctx), lambda: None)
    exported = {entry.version: _export(ctx, entry) for entry in spec.versions}
    progress = ctx.attempt("the rollout", lambda: decide_rollout(ctx, exported), lambda: as_it_stands(ctx))
    replicas = _replicas(ctx, progress)
    versions = {e.version: _serve(ctx, e, exported[e.version], replicas.get(e.version)) for e in spec.versions}

    others = {v: readiness(s, s.replicas) for v, s in observed.servings.items() if v not in versions}
    target = decide_weights(
        spec.traffic.stable,
        spec.traffic.canary,
        progress.share,
        {v: f.readiness for v, f in versions.items()} | others,
        {v: w for v, w in ctx.present.items() if w > 0},
        rescue=is_desperate(ctx, progress),
    )
    inspected = progress.out.version if progress.out else None
    before = dict(versions)
    retired, versions = ctx.attempt(
        "what leaves the traffic",
        lambda: (plan_retirement(ctx, versions, set(replicas), inspected, target, progress.watched_until), versions),
        lambda: (set[int](), before),
    )
    canary = spec.traffic.canary
    trial = canary if canary is not None and progress.itself and versions[canary].readiness.able else None
    weights = plan_route(ctx, target, retired, trial=trial)
    ctx.attempt("the Services of the route", lambda: keep_services(ctx, weights or {}), lambda: None)
    gone = ctx.attempt("versions that left the spec", lambda: plan_removed(ctx, versions), lambda: _still_known(ctx))
    ctx.attempt("what is left of versions", lambda: sweep(ctx, set(replicas)), lambda: None)

    conflict = host_conflict(ctx)
    new_status = _build_status(ctx, progress, versions, gone, weights)
    facts = Facts(
        generation=identity.generation,
        stable=versions[spec.traffic.stable],
        canary=versions[canary] if canary is not None else None,
        rollout=progress.verdict,
        aborted=progress.out is not None,
        complete=progress.complete,
        present={v: w for v, w in ctx.present.items() if w > 0},
        target={v: w for v, w in target.items() if w > 0} if target else {},
        serving={v: s.able for v, s in observed.servings.items()},
        routed=spec.routing is not None,
        route=observed.route,
        rewritten=any(map(_sets_weights, ctx.actions)),
        host_conflict=conflict,
        in_turn=progress.evidence is not None and progress.evidence.lots.in_turn and not progress.out,
        gateway_api=observed.gateway_api,
        removable=tuple(sorted({e.version for e in spec.versions} - {spec.traffic.stable, canary})),
    )
    new_status = new_status.model_copy(update={"conditions": build_conditions(facts, status.conditions, now)})
    # Traffic first: what keeps a Job from being made must not keep a rollback waiting.
    actions = sorted(ctx.actions, key=lambda action: not _sets_weights(action))
    return Plan(
        tuple(actions),
        new_status,
        tuple(ctx.events),
        ctx.wake_at,
        progress.aim,
        abort_to_record(status, progress),
        bool(observed.claims) and conflict is not None,
        (*observed.unreadable, *ctx.faults),
    )


def _export(ctx: Context, entry: Version) -> VersionStatus:
    """A version's export; where it cannot be planned, what is known of it stays."""
    return ctx.attempt(
        f"the export of version {entry.version}", lambda: plan_export(ctx, entry), lambda: known_export(ctx, entry)
    )


def _serve(ctx: Context, entry: Version, exported: VersionStatus, wanted: int | None) -> VersionFacts:
    """A version's pods; where they cannot be planned, those that there are go on serving."""
    return ctx.attempt(
        f"the pods of version {entry.version}",
        lambda: plan_serving(ctx, entry, exported, wanted),
        lambda: report_serving(ctx, entry, exported, wanted),
    )


def _still_known(ctx: Context) -> list[VersionStatus]:
    return [known for known in ctx.status.versions if known.version not in {e.version for e in ctx.spec.versions}]


def _sets_weights(action: Action) -> bool:
    return isinstance(action, Apply) and action.body["kind"] == "HTTPRoute"


def _replicas(ctx: Context, progress: Progress) -> dict[int, int]:
    """Pods by version of those that shall run. An aborted canary and a stable that has been replaced are left as they are."""
    stable, canary = ctx.spec.traffic.stable, ctx.spec.traffic.canary
    if canary is None or progress.out is not None:
        return {stable: stable_replicas(ctx, None)}
    if progress.step is None:
        # Not published yet: none of its pods can start, and stable gives up none for it.
        return {stable: stable_replicas(ctx, None), canary: 1}
    pods = canary_replicas(ctx, progress.step.weight)
    if progress.complete and not within_replicas(ctx):
        return {canary: pods}
    # Where pods are short, stable keeps its one: else no place would be left to come back to, before the promotion is committed.
    return {stable: stable_replicas(ctx, pods), canary: pods}


def _build_status(
    ctx: Context,
    progress: Progress,
    versions: Mapping[int, VersionFacts],
    gone: list[VersionStatus],
    weights: Mapping[int, int] | None,
) -> Status:
    stable, canary, route = ctx.spec.traffic.stable, ctx.spec.traffic.canary, ctx.observed.route
    listed = [_with_weight(ctx, versions[e.version].status) for e in ctx.spec.versions]
    accepted = bool(route and route.accepted)
    return Status(
        observed_generation=ctx.identity.generation,
        stable=stable,
        canary=canary,
        canary_weight=ctx.present.get(canary, 0) if canary is not None else None,
        endpoint=ctx.spec.routing.hostnames[0]
        if ctx.spec.routing
        else f"{serving_name(ctx.identity.name, stable)}.{ctx.identity.namespace}.svc",
        artifact=versions[stable].status.artifact_uri,
        weights=WeightStatus(
            desired=_weights(weights or {}),
            accepted=_weights(ctx.present) if accepted else ctx.status.weights.accepted if route else [],
        ),
        sharing_places=share_places(ctx),
        step=progress.step,
        evidence=progress.evidence,
        aborted=list(progress.aborted),
        aborted_before=aborted_before(ctx, progress),
        history=list(progress.history),
        versions=sorted([*listed, *(_with_weight(ctx, g) for g in gone)], key=lambda v: v.version),
    )


def _with_weight(ctx: Context, status: VersionStatus) -> VersionStatus:
    return status.model_copy(update={"weight": ctx.present.get(status.version, 0)})


def _weights(weights: Mapping[int, int]) -> list[Weights]:
    return [Weights(version=v, weight=w) for v, w in sorted(weights.items())]

"""A spec that the API server took and this operator cannot read as a whole: a field of a newer CRD, or a rule of the types alone.

Nothing of it is begun. What serves goes on, the canary gains nothing and is judged by what can be read, and the way back is open:
an abort, and traffic that names a version whose pods run. Only the numbers of the route that stands are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeVar

from pydantic import ValidationError

from perch.api import Model, Phase, Rollout, Runtime, Spec, Status, Step, Traffic, Version, VersionStatus, Weights, WeightStatus
from perch.observed import Identity, Installation, Observed
from perch.plan.context import Context, Plan
from perch.plan.rollout import Progress, abort_to_record, as_it_stands, decide_held, is_desperate
from perch.plan.routing import plan_numbers
from perch.plan.servings import readiness
from perch.status import Facts, VersionFacts, build_conditions
from perch.traffic import decide_weights

Part = TypeVar("Part", bound=Model)


def read_parts(raw: Mapping[str, Any], status: Status) -> Spec | None:
    """What the way back needs of a spec, as far as it can be read; else what was so before, or the defaults. None where nothing
    says which version is stable."""
    traffic = _read(Traffic, raw.get("traffic"))
    if traffic is None and status.stable is not None:
        traffic = Traffic.model_construct(stable=status.stable, canary=status.canary)
    if traffic is None:
        return None
    entries = [_read(Version, entry) for entry in raw.get("versions", [])]
    parts: dict[str, Any] = {
        "model_name": raw.get("modelName"),
        "versions": [entry for entry in entries if entry is not None],
        "traffic": traffic,
        "rollout": _read_rollout(raw.get("rollout")),
        "runtime": _read(Runtime, raw.get("runtime")) or Runtime(),
    }
    return Spec.model_construct(**parts)


def _read_rollout(raw: Any) -> Rollout:
    steps = [Step(weight=100)]
    analysis = {"steps": [{"weight": 100}], "analysis": raw.get("analysis")} if isinstance(raw, Mapping) else None
    return _read(Rollout, raw) or _read(Rollout, analysis) or Rollout(steps=steps)


def _read(model: type[Part], raw: Any) -> Part | None:
    try:
        return model.model_validate(raw)
    except ValidationError:
        return None


def plan_invalid(
    identity: Identity,
    raw: Mapping[str, Any],
    why: str,
    status: Status,
    observed: Observed,
    installation: Installation,
    now: datetime,
) -> Plan:
    """Keep what serves, and the way back. `why`: what of the spec cannot be read."""
    spec = read_parts(raw, status)
    if spec is None:
        conditions = build_conditions(why, status.conditions, now, generation=identity.generation)
        return Plan((), status.model_copy(update={"observed_generation": identity.generation, "conditions": conditions}))
    ctx = Context(identity, spec, status, observed, installation, now)
    progress = ctx.attempt("the rollout", lambda: decide_held(ctx), lambda: as_it_stands(ctx))
    target = ctx.attempt("the way back", lambda: _shift(ctx, progress), lambda: None)
    return Plan(
        tuple(ctx.actions),
        _status(ctx, progress, target, why),
        tuple(ctx.events),
        ctx.wake_at,
        progress.aim,
        abort_to_record(status, progress),
        faults=(*observed.unreadable, *ctx.faults),
    )


def _shift(ctx: Context, progress: Progress) -> dict[int, int] | None:
    """Weights in percent by version. Stable gains what it has the pods for: as many as whoever has the traffic."""
    traffic, servings = ctx.spec.traffic, ctx.observed.servings
    present = {v: w for v, w in ctx.present.items() if w > 0}
    needed = max((servings[v].replicas for v in present if v in servings), default=1)
    ready = {v: readiness(s, needed if v == traffic.stable else s.replicas) for v, s in servings.items()}
    rescue = is_desperate(ctx, progress)
    target = decide_weights(traffic.stable, traffic.canary, progress.share, ready, present, rescue=rescue) if present else None
    if target is not None:
        canary = servings.get(traffic.canary) if traffic.canary is not None and progress.out is None else None
        plan_numbers(ctx, target, keep=canary is not None and canary.able)
    return target


def _status(ctx: Context, progress: Progress, target: Mapping[int, int] | None, why: str) -> Status:
    status, route, stable, canary = ctx.status, ctx.observed.route, ctx.spec.traffic.stable, ctx.spec.traffic.canary
    accepted = bool(route and route.accepted)
    facts = Facts(
        generation=ctx.identity.generation,
        stable=VersionFacts(status.of(stable) or VersionStatus(version=stable, artifact_revision="", phase=Phase.EXPORTING)),
        canary=None,
        present={v: w for v, w in ctx.present.items() if w > 0},
        target={v: w for v, w in target.items() if w > 0} if target else {},
        serving={v: s.able for v, s in ctx.observed.servings.items()},
        routed=route is not None,
        route=route,
        rewritten=bool(ctx.actions),
        invalid=f"{why}. {_goes_on(ctx, progress)}",
    )
    return status.model_copy(
        update={
            "observed_generation": ctx.identity.generation,
            "conditions": build_conditions(facts, status.conditions, ctx.now),
            "canary_weight": ctx.present.get(canary, 0) if canary is not None else None,
            "weights": WeightStatus(
                desired=_weights(target or ctx.present), accepted=_weights(ctx.present) if accepted else status.weights.accepted
            ),
            "step": progress.step,
            "evidence": progress.evidence,
            "aborted": list(progress.aborted),
            "history": list(progress.history),
            "versions": [v.model_copy(update={"weight": ctx.present.get(v.version, 0)}) for v in status.versions],
        }
    )


def _weights(weights: Mapping[int, int]) -> list[Weights]:
    return [Weights(version=v, weight=w) for v, w in sorted(weights.items())]


def _goes_on(ctx: Context, progress: Progress) -> str:
    traffic = ctx.spec.traffic
    way_back = f"traffic {{stable: {traffic.stable}}} still moves the traffic there"
    if progress.verdict is not None:
        return f"Nothing of this spec is begun. {progress.verdict.message}"
    if progress.share and progress.aim is not None:
        return f"What serves goes on serving: version {traffic.canary} keeps {progress.share} % and is judged, and {way_back}"
    return "What serves goes on serving, and nothing of this spec is begun but a way back to a version whose pods run"

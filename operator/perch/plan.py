"""The planner: one pure function from spec, status, observed children and the time to actions, status and the next wake-up.

No client, clock, randomness, log or environment here. Any pass may be repeated, or die between two of its writes: each decision
is taken anew from what is observed, and every name derives from identity and content. What a pass must remember (a published
digest, when a retry is due, when a version was drained) stands in status; where status is lost it is found again from the
children or from the repository, which publishes a thing once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from perch.api import (
    DeletionPolicy,
    ParityStatus,
    Phase,
    Rollout,
    Spec,
    Status,
    Version,
    VersionStatus,
    Weights,
    WeightStatus,
)
from perch.builders.jobs import build_cleanup_job, build_export_job
from perch.builders.route import build_route
from perch.builders.serving import build_budget, build_deployment, build_service
from perch.names import (
    FINALIZER,
    artifact_revision,
    artifact_uri,
    serving_hash,
    serving_name,
    version_of,
)
from perch.observed import Identity, Installation, JobFacts, JobState, Observed, ServingFacts, matches
from perch.status import Event, Facts, VersionFacts, build_conditions, format_time, parse_time
from perch.traffic import Readiness, decide_weights
from perch_exporter.contract import Summary

BACKOFF = (15, 30, 60, 120, 300)
"""Seconds until a failed export is tried again, by attempt; the last one stays."""
SETTLE = timedelta(seconds=10)
"""Proxies converge within this time after a route was accepted: no pod leaves a version before."""
DEFAULT_SCALE_DOWN_DELAY: str = Rollout.model_fields["scale_down_delay"].default
CLEANUP_PATIENCE = timedelta(minutes=10)
"""How long a deletion waits for its artefacts to be erased, before it lets go and says what is left."""
LAST_WORDS = timedelta(seconds=15)
"""How long a finished Job may go without its pod's termination message: the two are watched apart."""


@dataclass(frozen=True)
class Apply:
    """Server-side apply. With `resource_version` it fails where somebody wrote in between."""

    body: Mapping[str, Any]
    resource_version: str | None = None


@dataclass(frozen=True)
class Scale:
    """Set a Deployment's replicas and nothing else: its template is not rendered again."""

    name: str
    replicas: int


@dataclass(frozen=True)
class Delete:
    kind: str
    name: str


@dataclass(frozen=True)
class SetFinalizer:
    present: bool


Action = Apply | Scale | Delete | SetFinalizer


@dataclass(frozen=True)
class Plan:
    actions: tuple[Action, ...] = ()
    status: Status | None = None
    """The status to be; None where the object is about to go."""
    events: tuple[Event, ...] = ()
    """What no difference between two statuses tells; `build_events` tells the transitions."""
    wake_at: datetime | None = None


@dataclass
class _Draft:
    """What a pass gathers. Lives within one call of `plan`."""

    actions: list[Action] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    wakes: list[datetime] = field(default_factory=list)

    @property
    def wake_at(self) -> datetime | None:
        return min(self.wakes, default=None)


def plan(identity: Identity, spec: Spec, status: Status, observed: Observed, installation: Installation, now: datetime) -> Plan:
    """Decide what to do now. `now` has a time zone and whole seconds."""
    if identity.deleting_since is not None:
        return _plan_deletion(identity, spec, status, observed, installation, identity.deleting_since, now)
    draft = _Draft()
    wants_finalizer = spec.repository.deletion_policy is DeletionPolicy.DELETE
    if wants_finalizer != (FINALIZER in identity.finalizers):
        draft.actions.append(SetFinalizer(wants_finalizer))

    versions: dict[int, VersionFacts] = {}
    for entry in spec.versions:
        exported = _plan_export(identity, spec, entry, status, observed, installation, now, draft)
        versions[entry.version] = _plan_serving(identity, spec, entry, exported, observed, installation, draft)

    active = {v for v in (spec.traffic.stable, spec.traffic.canary) if v is not None}
    present = dict(observed.route.weights) if observed.route else {}
    target = decide_weights(
        spec.traffic.stable,
        spec.traffic.canary,
        _canary_weight(spec),
        {v: f.readiness for v, f in versions.items()} | _readiness_of_others(observed, versions),
        {v: w for v, w in present.items() if w > 0},
    )
    retired = _plan_retirement(identity, spec, status, observed, versions, active, present, target, now, draft)
    weights = _plan_route(identity, spec, observed, present, target, retired, draft)
    gone = _plan_removed(identity, spec, status, observed, installation, versions, draft)
    _sweep(identity, observed, active, present, draft)

    listed = [_with_weight(versions[e.version].status, present) for e in spec.versions]
    accepted = bool(observed.route and observed.route.accepted)
    new_status = Status(
        observed_generation=identity.generation,
        stable=spec.traffic.stable,
        canary=spec.traffic.canary,
        canary_weight=present.get(spec.traffic.canary, 0) if spec.traffic.canary is not None else None,
        endpoint=_endpoint(identity, spec),
        artifact=versions[spec.traffic.stable].status.artifact_uri,
        weights=WeightStatus(
            desired=_weights(weights or {}),
            accepted=_weights(present) if accepted else status.weights.accepted if observed.route else [],
        ),
        versions=sorted([*listed, *(_with_weight(g, present) for g in gone)], key=lambda v: v.version),
    )
    facts = Facts(
        generation=identity.generation,
        stable=versions[spec.traffic.stable],
        canary=versions[spec.traffic.canary] if spec.traffic.canary is not None else None,
        canary_weight=_canary_weight(spec),
        present={v: w for v, w in present.items() if w > 0},
        target={v: w for v, w in target.items() if w > 0} if target else {},
        serving={v: s.able for v, s in observed.servings.items()},
        routed=spec.routing is not None,
        route=observed.route,
        gateway_api=observed.gateway_api,
        removable=tuple(sorted(set(versions) - active)),
    )
    new_status = new_status.model_copy(update={"conditions": build_conditions(facts, status.conditions, now)})
    # Traffic first: what keeps a Job from being made must not keep a rollback waiting.
    actions = sorted(draft.actions, key=lambda action: not _sets_weights(action))
    return Plan(tuple(actions), new_status, tuple(draft.events), draft.wake_at)


def _sets_weights(action: Action) -> bool:
    return isinstance(action, Apply) and action.body["kind"] == "HTTPRoute"


def plan_invalid(identity: Identity, status: Status, message: str, now: datetime) -> Plan:
    """A spec that this operator cannot read: say so, and touch nothing that serves."""
    conditions = build_conditions(message, status.conditions, now, generation=identity.generation)
    new = status.model_copy(update={"observed_generation": identity.generation, "conditions": conditions})
    return Plan((), new)


# --- exports -----------------------------------------------------------------------------------------------------------


def _plan_export(
    identity: Identity,
    spec: Spec,
    entry: Version,
    status: Status,
    observed: Observed,
    installation: Installation,
    now: datetime,
    draft: _Draft,
) -> VersionStatus:
    """Bring one listed version to Published, whether it is in traffic or not."""
    revision = artifact_revision(entry)
    known = status.of(entry.version)
    if known is None or known.artifact_revision != revision or known.phase is Phase.DELETING:
        known = VersionStatus(version=entry.version, artifact_revision=revision, phase=Phase.EXPORTING)
    erasing = observed.cleanup_of(revision)
    if erasing is not None:
        # Whatever status says was published: it is going, or gone.
        if erasing.state is not JobState.RUNNING:
            draft.actions.append(Delete("Job", erasing.name))
        return VersionStatus(
            version=entry.version,
            artifact_revision=revision,
            phase=Phase.EXPORTING,
            message="waiting until the former artefact of this version is erased",
        )
    if known.artifact_digest is not None:
        return known.model_copy(update={"phase": Phase.PUBLISHED, "message": None, "retry_at": None, "attempts": 0})

    job = observed.export_of(entry.version, revision)
    if job is None:
        return _start_export(identity, spec, entry, known, installation, now, draft)
    if job.state is JobState.RUNNING:
        return known.model_copy(update={"phase": Phase.EXPORTING, "message": job.words, "retry_at": None})
    if job.state is JobState.SUCCEEDED and job.summary is not None and job.summary.artifact_digest is not None:
        return _published(known, job.summary)
    if job.state is JobState.SUCCEEDED:
        # The Job is done but nobody can say what it published: run it again, the repository answers at once.
        since = job.finished_at or now
        if now < since + LAST_WORDS:
            draft.wakes.append(since + LAST_WORDS)
        else:
            draft.actions.append(Delete("Job", job.name))
        return known
    return _failed_export(known, job, now, draft)


def _start_export(
    identity: Identity,
    spec: Spec,
    entry: Version,
    known: VersionStatus,
    installation: Installation,
    now: datetime,
    draft: _Draft,
) -> VersionStatus:
    if known.phase is Phase.FAILED:
        if known.retry_at is None:
            return known
        due = parse_time(known.retry_at)
        if now < due:
            draft.wakes.append(due)
            return known
    try:
        job = build_export_job(identity, spec, entry, known.artifact_revision, installation)
    except ValidationError as refused:
        return known.model_copy(update={"phase": Phase.FAILED, "message": say_invalid(refused, f"versions[{entry.version}]")})
    draft.actions.append(Apply(job))
    return known.model_copy(update={"phase": Phase.EXPORTING, "message": None, "retry_at": None})


def _published(known: VersionStatus, summary: Summary) -> VersionStatus:
    parity = summary.parity
    return known.model_copy(
        update={
            "phase": Phase.PUBLISHED,
            "artifact_uri": summary.artifact_uri,
            "artifact_digest": summary.artifact_digest,
            "parity": ParityStatus(
                max_absolute_error=_figure(parity.max_absolute_error),
                max_relative_error=_figure(parity.max_relative_error),
                verdict=parity.verdict.value,
            )
            if parity
            else None,
            "message": None,
            "retry_at": None,
            "attempts": 0,
        }
    )


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _failed_export(known: VersionStatus, job: JobFacts, now: datetime, draft: _Draft) -> VersionStatus:
    error = job.summary.error if job.summary else None
    since = job.finished_at or now
    if error is None and job.words is None and known.phase is not Phase.FAILED and now < since + LAST_WORDS:
        draft.wakes.append(since + LAST_WORDS)
        return known
    message = f"{error.step.value}: {error.message} ({error.reason.value})" if error else job.words or "the export Job failed"
    if error is not None and not error.retryable:
        return known.model_copy(update={"phase": Phase.FAILED, "message": message, "retry_at": None})
    if known.phase is Phase.FAILED and known.retry_at is not None:
        due = parse_time(known.retry_at)
        if now < due:
            draft.wakes.append(due)
        else:
            # Its name is taken until it is gone; its end wakes us, and then the next one starts.
            draft.actions.append(Delete("Job", job.name))
        return known.model_copy(update={"message": message if error else known.message})
    due = now + timedelta(seconds=BACKOFF[min(known.attempts, len(BACKOFF) - 1)])
    draft.wakes.append(due)
    return known.model_copy(
        update={
            "phase": Phase.FAILED,
            "message": message,
            "retry_at": format_time(due),
            "attempts": known.attempts + 1,
        }
    )


# --- serving -----------------------------------------------------------------------------------------------------------


def _plan_serving(
    identity: Identity,
    spec: Spec,
    entry: Version,
    exported: VersionStatus,
    observed: Observed,
    installation: Installation,
    draft: _Draft,
) -> VersionFacts:
    """Run a version that traffic names, once it is published; report how it stands."""
    serving = observed.servings.get(entry.version)
    in_traffic = entry.version in (spec.traffic.stable, spec.traffic.canary)
    conflict = serving is not None and serving.revision != exported.artifact_revision
    if in_traffic and exported.artifact_digest is not None and not conflict:
        _apply_serving(identity, spec, entry, exported, serving, observed, installation, draft)
    if serving is None or conflict:
        starting = in_traffic and exported.phase is Phase.PUBLISHED and not conflict
        update = {
            "phase": Phase.STARTING if starting else exported.phase,
            "replicas": spec.runtime.replicas if starting else 0,
            "ready_replicas": 0,
            "serving_hash": None,
            "drained_at": None,
        }
        return VersionFacts(exported.model_copy(update=update), conflict=conflict)
    phase = Phase.SERVING if serving.full else Phase.STARTING
    return VersionFacts(
        exported.model_copy(
            update={
                "phase": phase if in_traffic else Phase.DRAINING,
                "serving_hash": serving.serving_hash,
                "replicas": serving.replicas,
                "ready_replicas": serving.ready,
                "message": serving.words if not serving.rolled else None,
                "drained_at": None,
            }
        ),
        readiness=_readiness(serving),
        rolled=serving.rolled and serving.serving_hash == _wanted_hash(spec, exported),
        deadline_exceeded=serving.deadline_exceeded,
    )


def _wanted_hash(spec: Spec, exported: VersionStatus) -> str:
    return serving_hash(exported.artifact_revision, exported.artifact_digest or "", spec)


def _apply_serving(
    identity: Identity,
    spec: Spec,
    entry: Version,
    exported: VersionStatus,
    serving: ServingFacts | None,
    observed: Observed,
    installation: Installation,
    draft: _Draft,
) -> None:
    name = serving_name(identity.name, entry.version)
    service = build_service(identity, entry.version)
    if not matches(service["spec"], observed.services.get(name)):
        draft.actions.append(Apply(service))
    if serving is None or serving.serving_hash != _wanted_hash(spec, exported):
        digest = exported.artifact_digest or ""
        draft.actions.append(Apply(build_deployment(identity, spec, entry, exported.artifact_revision, digest, installation)))
    elif serving.replicas != spec.runtime.replicas:
        draft.actions.append(Scale(name, spec.runtime.replicas))
    budget = build_budget(identity, entry.version)
    if spec.runtime.replicas > 1 and not matches(budget["spec"], observed.budgets.get(name)):
        draft.actions.append(Apply(budget))
    if spec.runtime.replicas == 1 and name in observed.budgets:
        # A budget over one pod would block every drain of its node.
        draft.actions.append(Delete("PodDisruptionBudget", name))


def _readiness(serving: ServingFacts) -> Readiness:
    return Readiness(full=serving.full, able=serving.able, most=serving.most, settled=serving.deadline_exceeded)


def _readiness_of_others(observed: Observed, versions: Mapping[int, VersionFacts]) -> dict[int, Readiness]:
    """Versions that left the spec but still run: they gain nothing, but whether they answer matters to the others."""
    return {v: _readiness(s) for v, s in observed.servings.items() if v not in versions}


# --- traffic -----------------------------------------------------------------------------------------------------------


def _canary_weight(spec: Spec) -> int:
    return spec.rollout.steps[-1].weight if spec.rollout else 0


def _plan_retirement(
    identity: Identity,
    spec: Spec,
    status: Status,
    observed: Observed,
    versions: dict[int, VersionFacts],
    active: set[int],
    present: Mapping[int, int],
    target: Mapping[int, int] | None,
    now: datetime,
    draft: _Draft,
) -> set[int]:
    """Drain, then remove, what traffic names no more. Returns the versions that may leave the route.

    Weight 0, accepted by the Gateway, then scaleDownDelay (never less than the proxies need), then out of the route, and only
    when the route without it was accepted, the pods go.
    """
    stay = spec.rollout.scale_down_delay if spec.rollout else DEFAULT_SCALE_DOWN_DELAY
    delay = max(_duration(stay), SETTLE)
    leaving: set[int] = set()
    for version in sorted(set(observed.servings) - active):
        known = status.of(version)
        facts = versions.get(version)
        drained_at = known.drained_at if known else None
        busy = present.get(version, 0) > 0 or bool(target and target.get(version, 0) > 0)
        if observed.route is None and not versions[spec.traffic.stable].readiness.full:
            # Nobody's weights say who answers: clients of its Service may, until the new stable can.
            busy = True
        unsure = observed.route is not None and not observed.route.accepted
        if busy:
            drained_at = None
        elif drained_at is None and not unsure:
            drained_at = format_time(now)
        if drained_at is not None:
            due = parse_time(drained_at) + delay
            if now < due:
                draft.wakes.append(due)
            else:
                leaving.add(version)
                if version not in present and not unsure:
                    _remove_serving(identity, version, observed, draft)
        if facts is not None:
            update = {"phase": Phase.DRAINING, "drained_at": drained_at}
            versions[version] = facts.replace_status(facts.status.model_copy(update=update))
        else:
            _remember_removed(status, version, drained_at, observed, versions)
    return leaving


def _remember_removed(
    status: Status, version: int, drained_at: str | None, observed: Observed, versions: dict[int, VersionFacts]
) -> None:
    """A version that left spec.versions but still runs keeps its line in status until it is gone."""
    serving = observed.servings[version]
    known = status.of(version) or VersionStatus(
        version=version, artifact_revision=serving.revision, phase=Phase.DRAINING, serving_hash=serving.serving_hash
    )
    update = {
        "phase": Phase.DRAINING,
        "drained_at": drained_at,
        "replicas": serving.replicas,
        "ready_replicas": serving.ready,
        "message": None,
    }
    versions[version] = VersionFacts(known.model_copy(update=update), readiness=_readiness(serving), removed=True)


def _remove_serving(identity: Identity, version: int, observed: Observed, draft: _Draft) -> None:
    name = serving_name(identity.name, version)
    if name in observed.budgets:
        draft.actions.append(Delete("PodDisruptionBudget", name))
    draft.actions += [Delete("Deployment", name), Delete("Service", name)]


def _sweep(identity: Identity, observed: Observed, active: set[int], present: Mapping[int, int], draft: _Draft) -> None:
    """Services and budgets whose pods are gone: left where the operator died between two deletes."""
    for kind, names in (("Service", observed.services), ("PodDisruptionBudget", observed.budgets)):
        for name in names:
            version = version_of(identity.name, name)
            if version is not None and version not in active | set(observed.servings) | set(present):
                draft.actions.append(Delete(kind, name))


def _plan_route(
    identity: Identity,
    spec: Spec,
    observed: Observed,
    present: Mapping[int, int],
    target: Mapping[int, int] | None,
    leaving: set[int],
    draft: _Draft,
) -> dict[int, int] | None:
    """One write sets all weights. Backends with weight 0 stay until they are drained: swapping backends can answer 503."""
    if not observed.gateway_api:
        return None
    if spec.routing is None:
        if observed.route is not None:
            draft.actions.append(Delete("HTTPRoute", identity.name))
        return None
    if target is None:
        return None
    idle = {v for v in (set(present) | set(observed.servings)) - leaving if v in observed.servings}
    weights = {v: target.get(v, 0) for v in sorted(set(target) | idle)}
    body = build_route(identity, spec.routing, spec.model_name or identity.name, weights)
    if observed.route is None or not matches(body["spec"], observed.route.spec):
        draft.actions.append(Apply(body, observed.route.resource_version if observed.route else None))
    return weights


# --- versions that left the spec, and deletion ---------------------------------------------------------------------------


def _plan_removed(
    identity: Identity,
    spec: Spec,
    status: Status,
    observed: Observed,
    installation: Installation,
    versions: Mapping[int, VersionFacts],
    draft: _Draft,
) -> list[VersionStatus]:
    """Versions that left spec.versions: their export Jobs go, and with policy Delete their artefacts too. Returns who is left."""
    listed = {e.version: artifact_revision(e) for e in spec.versions}
    for export in observed.exports:
        if export.version is not None and listed.get(export.version) != export.revision:
            draft.actions.append(Delete("Job", export.name))
    erase = spec.repository.deletion_policy is DeletionPolicy.DELETE
    if not erase:
        draft.actions += [Delete("Job", job.name) for job in observed.cleanups if job.state is JobState.RUNNING]
    left: list[VersionStatus] = []
    for known in status.versions:
        facts = versions.get(known.version)
        if known.version in listed:
            # The number stands for other content now: its former artefact goes, for nothing in the spec needs it.
            if erase and known.artifact_digest and known.artifact_revision != listed[known.version]:
                draft.actions.append(
                    Apply(build_cleanup_job(identity, spec, known.version, known.artifact_revision, installation))
                )
            continue
        if facts is not None:
            left.append(facts.status)
            continue
        if not erase:
            continue
        job = observed.cleanup_of(known.artifact_revision)
        if job is not None and job.state is JobState.FAILED:
            draft.events.append(_artifact_left(identity, spec, known.version, job))
        if job is None or job.state is JobState.RUNNING:
            # An export that is still running could publish behind the cleanup's back.
            if job is None and known.artifact_revision not in observed.exporting:
                draft.actions.append(
                    Apply(build_cleanup_job(identity, spec, known.version, known.artifact_revision, installation))
                )
            left.append(known.model_copy(update={"phase": Phase.DELETING, "message": job.words if job else None}))
    left += [f.status for v, f in versions.items() if f.removed and status.of(v) is None]
    return left


def _plan_deletion(
    identity: Identity,
    spec: Spec,
    status: Status,
    observed: Observed,
    installation: Installation,
    since: datetime,
    now: datetime,
) -> Plan:
    """The ModelDeployment goes. Children are garbage-collected; artefacts with policy Delete need us, and may not hang it."""
    if FINALIZER not in identity.finalizers:
        return Plan()
    actions: list[Action] = [Delete("Job", job.name) for job in observed.exports]
    if spec.repository.deletion_policy is not DeletionPolicy.DELETE:
        return Plan((*actions, SetFinalizer(False)), status)
    prefixes = {artifact_revision(e): e.version for e in spec.versions}
    prefixes |= {v.artifact_revision: v.version for v in status.versions}
    if observed.namespace_terminating:
        uris = ", ".join(_prefix(identity, spec, v, r) for r, v in prefixes.items())
        gone = Event("Warning", "ArtifactsLeft", f"the namespace is going, no cleanup Job can run in it: erase {uris} by hand")
        return Plan((*actions, SetFinalizer(False)), status, (gone,))
    jobs = {revision: observed.cleanup_of(revision) for revision in prefixes}
    due = since + CLEANUP_PATIENCE
    if now >= due:
        # A node that never came back, a quota, a policy: whatever it is, the deletion may not hang on it.
        left = tuple(
            Event(
                "Warning",
                "ArtifactsLeft",
                f"{_prefix(identity, spec, prefixes[revision], revision)} was not erased within "
                f"{CLEANUP_PATIENCE.seconds} s, do it by hand",
            )
            for revision, job in jobs.items()
            if job is None or job.state is not JobState.SUCCEEDED
        )
        return Plan((*actions, SetFinalizer(False)), status, left)
    if observed.exports or observed.exporting:
        # An export that is still running could publish behind the cleanup's back.
        return Plan(tuple(actions), status, wake_at=due)
    missing = [
        Apply(build_cleanup_job(identity, spec, prefixes[revision], revision, installation))
        for revision, job in jobs.items()
        if job is None
    ]
    if missing or any(job and job.state is JobState.RUNNING for job in jobs.values()):
        return Plan((*actions, *missing), status, wake_at=due)
    events = tuple(
        _artifact_left(identity, spec, prefixes[revision], job)
        for revision, job in jobs.items()
        if job and job.state is JobState.FAILED
    )
    return Plan((*actions, SetFinalizer(False)), status, events)


def _artifact_left(identity: Identity, spec: Spec, version: int, job: JobFacts) -> Event:
    error = job.summary.error if job.summary else None
    why = error.message if error else job.words or "the cleanup Job failed"
    return Event(
        "Warning", "ArtifactsLeft", f"{_prefix(identity, spec, version, job.revision)} was not erased, do it by hand: {why}"
    )


def _prefix(identity: Identity, spec: Spec, version: int, revision: str) -> str:
    return artifact_uri(spec.repository.uri, identity.namespace, identity.name, version, revision)


# --- small things ------------------------------------------------------------------------------------------------------


def _with_weight(status: VersionStatus, present: Mapping[int, int]) -> VersionStatus:
    return status.model_copy(update={"weight": present.get(status.version, 0)})


def _weights(weights: Mapping[int, int]) -> list[Weights]:
    return [Weights(version=v, weight=w) for v, w in sorted(weights.items())]


def _endpoint(identity: Identity, spec: Spec) -> str:
    if spec.routing is not None:
        return spec.routing.hostnames[0]
    return f"{serving_name(identity.name, spec.traffic.stable)}.{identity.namespace}.svc"


def _duration(text: str) -> timedelta:
    """A Gateway API duration such as 1h30m. The schema has checked its form."""
    units = {"h": 3600, "m": 60, "s": 1}
    return timedelta(seconds=sum(int(n) * units[u] for n, u in re.findall(r"(\d+)([hms])", text)))


def say_invalid(error: ValidationError, where: str) -> str:
    """The first few complaints of a validation, each with its field."""
    found = [f"{where}.{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()[:3]]
    return "; ".join(found)

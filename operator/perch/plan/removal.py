"""What goes: versions that left spec.versions, and the ModelDeployment itself; with policy Delete their artefacts too."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from perch.api import DeletionPolicy, Phase, VersionStatus
from perch.builders.jobs import build_cleanup_job
from perch.names import FINALIZER, artifact_revision
from perch.observed import JobFacts, JobState
from perch.plan.context import Action, Apply, Context, Delete, Plan, SetFinalizer
from perch.status import Event, VersionFacts

CLEANUP_PATIENCE = timedelta(minutes=10)
"""How long a deletion waits for its artefacts to be erased, before it lets go and says what is left."""


def plan_removed(ctx: Context, versions: Mapping[int, VersionFacts]) -> list[VersionStatus]:
    """Versions that left spec.versions: their export Jobs go, and with policy Delete their artefacts too. Returns who is left."""
    listed = {e.version: artifact_revision(e) for e in ctx.spec.versions}
    for export in ctx.observed.exports:
        if export.version is not None and listed.get(export.version) != export.revision:
            ctx.actions.append(Delete("Job", export.name))
    erase = ctx.spec.repository.deletion_policy is DeletionPolicy.DELETE
    if not erase:
        ctx.actions.extend(Delete("Job", job.name) for job in ctx.observed.cleanups if job.state is JobState.RUNNING)
    left: list[VersionStatus] = []
    for known in ctx.status.versions:
        facts = versions.get(known.version)
        if known.version in listed:
            # The number stands for other content now: its former artefact goes, for nothing in the spec needs it.
            if erase and known.artifact_digest and known.artifact_revision != listed[known.version]:
                ctx.actions.append(
                    Apply(build_cleanup_job(ctx.identity, ctx.spec, known.version, known.artifact_revision, ctx.installation))
                )
            continue
        if facts is not None:
            left.append(facts.status)
            continue
        if not erase:
            continue
        job = ctx.observed.cleanup_of(known.artifact_revision)
        if job is not None and job.state is JobState.FAILED:
            ctx.events.append(_artifact_left(ctx, known.version, job))
        if job is None or job.state is JobState.RUNNING:
            # An export that is still running could publish behind the cleanup's back.
            if job is None and known.artifact_revision not in ctx.observed.exporting:
                ctx.actions.append(
                    Apply(build_cleanup_job(ctx.identity, ctx.spec, known.version, known.artifact_revision, ctx.installation))
                )
            left.append(known.model_copy(update={"phase": Phase.DELETING, "message": job.words if job else None}))
    left += [f.status for v, f in versions.items() if f.removed and ctx.status.of(v) is None]
    return left


def plan_deletion(ctx: Context, since: datetime) -> Plan:
    """The ModelDeployment goes. Children are garbage-collected; artefacts with policy Delete need us, and may not hang it."""
    if FINALIZER not in ctx.identity.finalizers:
        return Plan()
    actions: list[Action] = [Delete("Job", job.name) for job in ctx.observed.exports]
    if ctx.spec.repository.deletion_policy is not DeletionPolicy.DELETE:
        return Plan((*actions, SetFinalizer(False)), ctx.status)
    prefixes = {artifact_revision(e): e.version for e in ctx.spec.versions}
    prefixes |= {v.artifact_revision: v.version for v in ctx.status.versions}
    if ctx.observed.namespace_terminating:
        uris = ", ".join(ctx.prefix(v, r) for r, v in prefixes.items())
        gone = Event("Warning", "ArtifactsLeft", f"the namespace is going, no cleanup Job can run in it: erase {uris} by hand")
        return Plan((*actions, SetFinalizer(False)), ctx.status, (gone,))
    jobs = {revision: ctx.observed.cleanup_of(revision) for revision in prefixes}
    due = since + CLEANUP_PATIENCE
    if ctx.now >= due:
        # A node that never came back, a quota, a policy: whatever it is, the deletion may not hang on it.
        left = tuple(
            Event(
                "Warning",
                "ArtifactsLeft",
                f"{ctx.prefix(prefixes[revision], revision)} was not erased within {CLEANUP_PATIENCE.seconds} s, do it by hand",
            )
            for revision, job in jobs.items()
            if job is None or job.state is not JobState.SUCCEEDED
        )
        return Plan((*actions, SetFinalizer(False)), ctx.status, left)
    if ctx.observed.exports or ctx.observed.exporting:
        # An export that is still running could publish behind the cleanup's back.
        return Plan(tuple(actions), ctx.status, wake_at=due)
    missing = [
        Apply(build_cleanup_job(ctx.identity, ctx.spec, prefixes[revision], revision, ctx.installation))
        for revision, job in jobs.items()
        if job is None
    ]
    if missing or any(job and job.state is JobState.RUNNING for job in jobs.values()):
        return Plan((*actions, *missing), ctx.status, wake_at=due)
    events = tuple(
        _artifact_left(ctx, prefixes[revision], job) for revision, job in jobs.items() if job and job.state is JobState.FAILED
    )
    return Plan((*actions, SetFinalizer(False)), ctx.status, events)


def _artifact_left(ctx: Context, version: int, job: JobFacts) -> Event:
    error = job.summary.error if job.summary else None
    why = error.message if error else job.words or "the cleanup Job failed"
    return Event("Warning", "ArtifactsLeft", f"{ctx.prefix(version, job.revision)} was not erased, do it by hand: {why}")

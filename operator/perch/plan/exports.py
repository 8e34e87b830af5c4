"""The exports: every listed version is brought to Published, whether it is in traffic or not."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from pydantic import ValidationError

from perch.api import AccuracyStatus, ParityStatus, Phase, TensorRTStatus, Version, VersionStatus
from perch.builders.jobs import build_export_job
from perch.builders.network import build_export_policy
from perch.names import ANNOTATION_EXPORT_HASH, artifact_revision, export_policy_name
from perch.observed import JobFacts, JobState, matches
from perch.plan.context import Apply, Context, Delete, say_invalid
from perch.status import format_time, parse_time
from perch_exporter import contract
from perch_exporter.contract import Summary

BACKOFF = (15, 30, 60, 120, 300)
"""Seconds until a failed export is tried again, by attempt; the last one stays."""
LAST_WORDS = timedelta(seconds=15)
"""How long a finished Job may go without its pod's termination message: the two are watched apart."""


def plan_export_policy(ctx: Context) -> None:
    """The NetworkPolicy of export pods, as the spec asks; see `_confined` for what waits for it."""
    name = export_policy_name(ctx.identity.name)
    if ctx.spec.builder.network_policy is not None:
        if not _confined(ctx):
            ctx.actions.append(Apply(build_export_policy(ctx.identity, ctx.spec)))
    elif name in ctx.observed.policies:
        ctx.actions.append(Delete("NetworkPolicy", name))


def _confined(ctx: Context) -> bool:
    """Whether a pod that starts now has the policy that it shall have. None is started before: it could run without."""
    if ctx.spec.builder.network_policy is None:
        return True
    policy = build_export_policy(ctx.identity, ctx.spec)
    # A rule more, too, is somebody's: lists are compared whole.
    return matches(policy["spec"], ctx.observed.policies.get(policy["metadata"]["name"]))


def known_export(ctx: Context, entry: Version) -> VersionStatus:
    """What status says of this very entry's export."""
    revision = artifact_revision(entry)
    known = ctx.status.of(entry.version)
    if known is None or known.artifact_revision != revision or known.phase is Phase.DELETING:
        return VersionStatus(version=entry.version, artifact_revision=revision, phase=Phase.EXPORTING)
    return known


def plan_export(ctx: Context, entry: Version) -> VersionStatus:
    """Bring one listed version to Published, whether it is in traffic or not."""
    known = known_export(ctx, entry)
    revision = known.artifact_revision
    erasing = ctx.observed.cleanup_of(revision)
    if erasing is not None:
        # Whatever status says was published: it is going, or gone.
        if erasing.state is not JobState.RUNNING:
            ctx.actions.append(Delete("Job", erasing.name))
        return VersionStatus(
            version=entry.version,
            artifact_revision=revision,
            phase=Phase.EXPORTING,
            message="waiting until the former artefact of this version is erased",
        )
    if known.artifact_digest is not None:
        return known.model_copy(update={"phase": Phase.PUBLISHED, "message": None, "retry_at": None, "attempts": 0})

    job = ctx.observed.export_of(entry.version, revision)
    if job is None or job.state is JobState.FAILED:
        return _export(ctx, entry, known, job)
    if job.state is JobState.RUNNING:
        return _under_way(known, job.words)
    if job.state is JobState.SUCCEEDED and job.summary is not None and job.summary.artifact_digest is not None:
        return _published(known, job.summary)
    # The Job is done but nobody can say what it published: run it again, the repository answers at once.
    if not _may_still_speak(ctx, job):
        ctx.actions.append(Delete("Job", job.name))
    return known


def _may_still_speak(ctx: Context, job: JobFacts) -> bool:
    until = (job.finished_at or ctx.now) + LAST_WORDS
    if ctx.now < until:
        ctx.wakes.append(until)
    return ctx.now < until


def _export(ctx: Context, entry: Version, known: VersionStatus, failed: JobFacts | None) -> VersionStatus:
    """Nothing runs: start the export, or say why not. A failure holds for the Job that failed, not for one of other things."""
    try:
        job = build_export_job(ctx.identity, ctx.spec, entry, known.artifact_revision, ctx.installation)
    except ValidationError as refused:
        message = say_invalid(refused, f"versions[{entry.version}]")
        return known.model_copy(update={"phase": Phase.FAILED, "message": message, "retry_at": None, "export_hash": None})
    made_of = job["metadata"]["annotations"][ANNOTATION_EXPORT_HASH]
    if failed is not None and failed.export_hash == made_of:
        mute = failed.words is None and (failed.summary is None or failed.summary.error is None)
        if mute and known.phase is not Phase.FAILED and _may_still_speak(ctx, failed):
            return known
        known = _failed(ctx, known, failed)
    if known.phase is Phase.FAILED and known.export_hash == made_of:
        if not _is_due(ctx, known):
            return known
    elif known.phase is Phase.FAILED:
        known = known.model_copy(update={"attempts": 0})
    if failed is not None:
        # Its name is taken until it is gone; its end wakes us, and then the next one starts. Till then the failure is known.
        ctx.actions.append(Delete("Job", failed.name))
        return known
    if not _confined(ctx):
        return _under_way(known, "waiting until the NetworkPolicy that builder.networkPolicy asks for is there")
    ctx.actions.append(Apply(job))
    return _under_way(known)


def _is_due(ctx: Context, failed: VersionStatus) -> bool:
    """Whether a failed export is tried again now: after its delay, and never by itself what failed for good."""
    if failed.retry_at is None:
        return False
    due = parse_time(failed.retry_at)
    if ctx.now < due:
        ctx.wakes.append(due)
    return ctx.now >= due


def _under_way(known: VersionStatus, message: str | None = None) -> VersionStatus:
    update = {"phase": Phase.EXPORTING, "message": message, "retry_at": None, "export_hash": None}
    return known.model_copy(update=_gates(None) | update)


def _published(known: VersionStatus, summary: Summary) -> VersionStatus:
    tooling = summary.tooling
    return known.model_copy(
        update=_gates(summary)
        | {
            "phase": Phase.PUBLISHED,
            "artifact_uri": summary.artifact_uri,
            "artifact_digest": summary.artifact_digest,
            "tensorrt": TensorRTStatus(version=tooling.tensorrt, compute_capability=tooling.compute_capability)
            if tooling and tooling.tensorrt and tooling.compute_capability
            else None,
            "message": None,
            "retry_at": None,
            "attempts": 0,
            "export_hash": None,
        }
    )


def _gates(summary: Summary | None) -> dict[str, Any]:
    """Figures and limits of the gates, as far as they were judged."""
    parity, accuracy = (summary.parity, summary.accuracy) if summary else (None, None)
    return {
        "parity": _parity(parity, summary.tolerance) if summary and parity else None,
        "accuracy": _accuracy(accuracy) if accuracy else None,
    }


def _parity(found: contract.Parity, limits: contract.ParityTolerance | None) -> ParityStatus:
    return ParityStatus(
        verdict=found.verdict.value,
        samples=found.samples,
        max_absolute_error=_figure(found.max_absolute_error) or "not finite",
        absolute_tolerance=limits and limits.absolute_tolerance,
        max_relative_error=_figure(found.max_relative_error) or "not finite",
        relative_tolerance=limits and limits.relative_tolerance,
        spread=_figure(found.spread),
        top1_agreement=_share(found.top1_agreement),
        minimum_top1_agreement=limits and limits.minimum_top1_agreement,
        cosine=_share(found.cosine),
        minimum_cosine=limits and limits.minimum_cosine,
        minimum_iou=limits and limits.minimum_iou,
    )


def _accuracy(found: contract.Accuracy) -> AccuracyStatus:
    return AccuracyStatus(
        accuracy=f"{found.correct / found.samples:.4f}",
        checkpoint_accuracy=f"{found.checkpoint_correct / found.samples:.4f}",
        correct=found.correct,
        samples=found.samples,
        dataset_sha256=found.dataset_sha256,
        minimum=found.minimum,
        maximum_drop=found.maximum_drop,
        verdict=found.verdict.value,
    )


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def _share(value: float | None) -> str | None:
    """A digit more than limits have: what misses 0.999 by little must not read like it."""
    return None if value is None else f"{value:.5g}"


def _failed(ctx: Context, known: VersionStatus, job: JobFacts) -> VersionStatus:
    """What a failed Job leaves in status: why, and when the next one is due if that may help."""
    error = job.summary.error if job.summary else None
    message = f"{error.step.value}: {error.message} ({error.reason.value})" if error else job.words or "the export Job failed"
    if job.late and error is None and known.phase is Phase.EXPORTING and known.message:
        # It waited for something, and a longer deadline would only make it wait longer.
        message = f"the export Job was ended by its deadline (DeadlineExceeded) while it waited: {known.message}"
    failure = {"phase": Phase.FAILED, "message": message, "export_hash": job.export_hash}
    if error is not None and not error.retryable:
        return known.model_copy(update=_gates(job.summary) | failure | {"retry_at": None})
    if known.export_hash == job.export_hash and known.retry_at is not None:
        return known.model_copy(update={"message": message if error else known.message})
    due = ctx.now + timedelta(seconds=BACKOFF[min(known.attempts, len(BACKOFF) - 1)])
    return known.model_copy(update=failure | {"retry_at": format_time(due), "attempts": known.attempts + 1})

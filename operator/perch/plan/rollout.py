"""The rollout of a canary: which step it is at, what it waits for, whether it goes on or comes back. Pure.

A step: ask for its weight; wait until the canary's pods and the Gateway have it; hold; judge; go on. Evidence is judged from the
moment the weight is accepted, an alarm at any time aborts. All times are absolute and stand in status, so a restarted operator
goes on where it was; it asks for fresh evidence before it goes further.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Literal

from perch.api import (
    Aborted,
    Accuracy,
    Analysis,
    Evidence,
    OnInconclusive,
    Outcome,
    Rollout,
    Status,
    StepStatus,
    VersionStatus,
)
from perch.builders.route import makes_copies
from perch.durations import parse_duration
from perch.evidence import Aim, Batch, Gathered
from perch.judge import HUNG_PODS, STALE, Kind, begin_step, judge, take_in, take_in_reading
from perch.names import gpu_labels, serving_name
from perch.observed import ServingFacts
from perch.plan.context import Context
from perch.plan.servings import conflicts, foreign_plan, readiness, wanted_hash
from perch.status import IN_TURN, Event, Verdict, format_time, parse_time
from perch.words import are, count

CONVERGED = timedelta(seconds=1)
"""Counting begins so long after new weights were written. Most proxies have taken them in by then. Where one has not, a canary
whose weight rises gets less than is assumed, which errs on its side; one whose weight falls gets more, which the counts show, but
only in the mean of the step."""
FRESH = timedelta(seconds=60)
"""A restarted operator watches so long, at most a whole hold, before it lets a canary go further; always for a batch at least."""
WATCHED = timedelta(seconds=10)
"""So long a canary with all traffic is counted at least before stable's pods may go: a few looks."""
LOST = timedelta(seconds=30)
"""A canary that had traffic and runs, but is not ready, has so long to recover."""
DESPERATE = ("ErrorRateHigher", "ErrorRateAboveMaximum", "GoldenMismatch")
"""Aborted for these, many pods of the canary are no better than one of stable's."""
BLIND = ("NoEvidence", "NoMetric")
"""Verdicts about what cannot be seen: they stand, whatever else is to be said of the evidence."""
COMPARED = 300
"""Requests of stable in a step before what is copied of all is compared with what was asked to be."""
SECOND = timedelta(seconds=1)
HISTORY = 10

Said = tuple[Literal["Ready", "Reconciling", "Stalled"], str, str]


@dataclass(frozen=True)
class Progress:
    """How the rollout stands after this pass."""

    share: int = 0
    """Percent that the canary shall have, once it is ready for it."""
    itself: bool = False
    """The canary's pods are those that are judged."""
    step: StepStatus | None = None
    evidence: Evidence | None = None
    aborted: tuple[Aborted, ...] = ()
    history: tuple[Outcome, ...] = ()
    verdict: Verdict | None = None
    """What to say where nothing more urgent is to be said; Stalled where the canary was aborted."""
    aim: Aim | None = None
    out: Aborted | None = None
    """The record of the present canary, where it is taken out."""
    complete: bool = False
    """The canary has all traffic: stable may be scaled away after its delay."""
    watched_until: datetime | None = None
    """Nor before this: with stable's pods goes the way back, and the judging ends."""


@dataclass(frozen=True)
class _Trial:
    """The canary on trial in this pass."""

    ctx: Context
    rollout: Rollout
    canary: VersionStatus
    serving: ServingFacts | None
    step: StepStatus
    evidence: Evidence
    aborted: tuple[Aborted, ...]
    history: tuple[Outcome, ...]
    gathered: Gathered | None = field(default=None)
    dropped: str | None = None
    """By how much its accuracy is too far below stable's."""

    @property
    def analysis(self) -> Analysis:
        return self.rollout.analysis

    @property
    def hold(self) -> timedelta | None:
        """How long the present step is held at least; None where it is never left."""
        text = self.rollout.steps[self.step.index].hold
        return None if text in (None, "Indefinite") else parse_duration(text or "")

    @property
    def name(self) -> str:
        return f"version {self.canary.version}"


def decide_rollout(ctx: Context, exported: dict[int, VersionStatus]) -> Progress:
    """Where the canary stands and what it gets. `exported`: the listed versions' exports in this pass."""
    spec, traffic = ctx.spec, ctx.spec.traffic
    # Also of versions that left the list: a release in one commit, reverted and committed again, finds its canary aborted still.
    kept = tuple(a for a in ctx.status.aborted if a.version != traffic.stable)[-HISTORY:]
    history = _ended(ctx)
    if traffic.canary is None or spec.rollout is None:
        return Progress(aborted=kept, history=history)
    canary = exported[traffic.canary]
    if canary.artifact_digest is None or conflicts(ctx, canary) or foreign_plan(ctx, canary):
        return _hold(ctx, spec.rollout, canary, kept, history)
    others = tuple(a for a in kept if a.version != canary.version)
    known = (*kept, *ctx.status.aborted_before)
    found = next((a for a in known if a.version == canary.version and _stands(ctx, a, canary, spec.rollout)), None)
    if found is not None:
        seen = ctx.status.evidence if ctx.status.evidence and ctx.status.evidence.serving_hash == found.serving_hash else None
        verdict = _aborted_verdict(ctx, found, spec.rollout)
        return Progress(aborted=(*others, found), history=history, out=found, evidence=seen, verdict=verdict)
    kept = others
    gate = next(e.verification.accuracy for e in spec.versions if e.version == traffic.canary)
    dropped = _dropped(gate, canary, exported[traffic.stable])
    step = ctx.status.step
    evidence = ctx.status.evidence
    if step is None or (step.version, step.artifact_revision) != (canary.version, canary.artifact_revision):
        step = StepStatus(
            version=canary.version,
            artifact_revision=canary.artifact_revision,
            index=0,
            weight=spec.rollout.steps[0].weight,
            started_at=format_time(ctx.now),
        )
        evidence = None
        if dropped is not None and gate is not None and gate.on_failure == "Warn":
            ctx.events.append(Event("Warning", "AccuracyDropped", f"{dropped}; it goes on, since onFailure is Warn"))
        if gate is not None and gate.maximum_drop_from_stable and not _comparable(canary, exported[traffic.stable]):
            said = f"versions {traffic.stable} and {canary.version} were not measured on the same data set"
            ctx.events.append(Event("Warning", "AccuracyNotCompared", f"{said}: maximumDropFromStable says nothing about them"))
    step = _relocate(ctx, step, spec.rollout)
    runs = wanted_hash(ctx, canary)
    if evidence is None or evidence.serving_hash != runs:
        # Another runtime is another canary: what pods of the former one did says nothing for it, nor against it.
        evidence = Evidence(serving_hash=runs, crashes_before=_crashes(ctx.observed.servings.get(canary.version), runs))
        step = step.model_copy(update={"accepted_at": None, "until": None})
    trial = _Trial(
        ctx,
        spec.rollout,
        canary,
        ctx.observed.servings.get(canary.version),
        step,
        evidence,
        kept,
        history,
        ctx.observed.gathered,
        dropped if gate is not None and gate.on_failure == "Block" else None,
    )
    return _proceed(_note_readiness(trial))


def decide_held(ctx: Context) -> Progress:
    """The canary of a spec that cannot be read as a whole: it keeps what it has, gains nothing, and is judged."""
    traffic, rollout = ctx.spec.traffic, ctx.spec.rollout
    kept, history = tuple(ctx.status.aborted), _ended(ctx)
    canary = ctx.status.of(traffic.canary) if traffic.canary is not None else None
    if canary is None or rollout is None:
        return replace(as_it_stands(ctx), history=history)
    out = next((a for a in kept if (a.version, a.artifact_revision) == (canary.version, canary.artifact_revision)), None)
    if out is not None:
        verdict = _aborted_verdict(ctx, out, rollout)
        return Progress(aborted=kept, history=history, out=out, evidence=ctx.status.evidence, verdict=verdict)
    held = _hold(ctx, rollout, canary, kept, history)
    return held if held.step is not None or held.out is not None else replace(held, share=ctx.present.get(canary.version, 0))


def abort_to_record(status: Status, progress: Progress) -> Status | None:
    """An abort is known before it is done: half done and forgotten, it would give the canary its traffic back."""
    if progress.out is None or progress.out in status.aborted:
        return None
    return status.model_copy(update={"aborted": list(progress.aborted), "history": list(progress.history)})


def aborted_before(ctx: Context, progress: Progress) -> list[Aborted]:
    """Aborts that do not stand now, for the canary has another hash. Where it is tried again with the same one, they are over."""

    def key(record: Aborted) -> tuple[int, str, str]:
        return record.version, record.artifact_revision, record.serving_hash

    again = progress.evidence.serving_hash if progress.evidence else None
    present = {key(a) for a in progress.aborted}
    found = {
        key(a): a
        for a in (*ctx.status.aborted_before, *ctx.status.aborted)
        if key(a) not in present and a.serving_hash != again and a.version != ctx.spec.traffic.stable
    }
    return list(found.values())[-HISTORY:]


def as_it_stands(ctx: Context) -> Progress:
    """The rollout where nothing can be decided about the canary: it keeps what it has, and nothing is forgotten."""
    canary, step = ctx.spec.traffic.canary, ctx.status.step
    kept = Progress(aborted=tuple(ctx.status.aborted), history=tuple(ctx.status.history))
    if canary is None or step is None or step.version != canary:
        return kept
    out = next((a for a in kept.aborted if a.version == canary and a.artifact_revision == step.artifact_revision), None)
    has = ctx.present.get(canary, 0)
    if out is not None:
        return replace(kept, out=out)
    return replace(kept, share=has, step=step, evidence=ctx.status.evidence, complete=step.weight == 100 and has == 100)


def _hold(
    ctx: Context, rollout: Rollout, canary: VersionStatus, kept: tuple[Aborted, ...], history: tuple[Outcome, ...]
) -> Progress:
    """The spec names content or a runtime that cannot take over from the pods that run: these keep what they have and gain
    nothing, and are judged as before. A canary that fails is cut off, whatever the spec says by now."""
    held = replace(as_it_stands(ctx), aborted=kept, history=history)
    serving = ctx.observed.servings.get(canary.version)
    if held.step is None or held.evidence is None or serving is None:
        return held
    runs = canary.model_copy(update={"artifact_revision": held.step.artifact_revision})
    trial = _Trial(ctx, rollout, runs, serving, held.step, held.evidence, kept, history, ctx.observed.gathered)
    if doom := _broken(trial):
        return _abort(trial, *doom)
    trial = _fold(_note_counted(trial))
    if trial.evidence.weight is not None:
        finding = judge(trial.evidence, trial.analysis, ctx.now)
        if finding.kind is Kind.ABORT:
            return _abort(trial, finding.reason, finding.message)
    return replace(held, itself=_is_itself(trial), evidence=trial.evidence, aim=_aim(trial))


def _dropped(gate: Accuracy | None, canary: VersionStatus, stable: VersionStatus) -> str | None:
    """How far the canary's accuracy lies below stable's, where that is more than its entry allows and both saw the same data."""
    ours, theirs = canary.accuracy, stable.accuracy
    if gate is None or gate.maximum_drop_from_stable is None or ours is None or theirs is None:
        return None
    if not _comparable(canary, stable):
        return None
    fewer, allowed = theirs.correct - ours.correct, gate.maximum_drop_from_stable
    if fewer <= Decimal(allowed) * ours.samples:
        return None
    return (
        f"on the same {count(ours.samples, 'sample')} version {canary.version} has accuracy {ours.accuracy} and version "
        f"{stable.version} {theirs.accuracy}: a drop of {fewer / ours.samples:.4f}, and "
        f"verification.accuracy.maximumDropFromStable is {allowed}"
    )


def _comparable(canary: VersionStatus, stable: VersionStatus) -> bool:
    ours, theirs = canary.accuracy, stable.accuracy
    if ours is None or theirs is None:
        return False
    return (ours.dataset_sha256, ours.samples) == (theirs.dataset_sha256, theirs.samples)


def canary_replicas(ctx: Context, weight: int) -> int:
    """Pods that the canary needs for its share (mirrored requests count), at least one, rounded up.

    For the share that it has until it has another: nobody's pods go while their traffic is still to go.
    """
    full, has = full_replicas(ctx, on_trial=True), answered(ctx, ctx.spec.traffic.canary)
    mirror = ctx.spec.traffic.mirror
    copied = mirror.percent if mirror and weight < 100 else 0
    if not (within_replicas(ctx) and stable_runs(ctx)):
        wanted, scaling = max(1, math.ceil(full * (max(weight, has) + copied) / 100)), ctx.spec.runtime.autoscaling
        # With mirrored requests it may need more than all; an autoscaler gives no more than its maximum.
        return wanted if scaling is None else min(wanted, scaling.max_replicas)
    # Neither can have what it needs before the traffic has moved. Half-way, both carry the same too much, and the last is moved
    # when the traffic is: with w the share to come and s what stable has still, w / (w + s) of all pods.
    coming, stays = weight + copied, 100 - has
    part = coming / (coming + stays) if coming + stays else 1.0
    return min(full - 1, max(1, math.floor(full * part + 0.5)))


def answered(ctx: Context, version: int | None) -> int:
    """Percent that a version may be asked to answer now: until the Gateway has accepted a lower weight, still the former."""
    has = ctx.present.get(version, 0) if version is not None else 0
    if ctx.observed.route is None or ctx.observed.route.accepted:
        return has
    return max(has, *(w.weight for w in ctx.status.weights.accepted if w.version == version), 0)


def full_replicas(ctx: Context, *, on_trial: bool = False) -> int:
    """Pods of a version with all the traffic. Under an autoscaler: as many as stable has grown to, while a canary is on trial."""
    scaling = ctx.spec.runtime.autoscaling
    if scaling is None:
        return ctx.spec.runtime.replicas
    stable = ctx.observed.servings.get(ctx.spec.traffic.stable)
    grown = stable.replicas if stable is not None and on_trial else 0
    return min(max(scaling.min_replicas, grown), scaling.max_replicas)


def stable_replicas(ctx: Context, canary: int | None) -> int:
    """Stable keeps its full size until the promotion, unless the user chose to make room for the canary's pods.

    `canary`: the pods that the canary is to have; None without one on trial.
    """
    full = full_replicas(ctx, on_trial=canary is not None)
    if canary is not None and within_replicas(ctx):
        return max(1, full - canary)
    stable, pods = ctx.spec.traffic.stable, {v: s.replicas for v, s in ctx.observed.servings.items()}
    has = pods.pop(stable, 0)
    # It had given pods up, and their places are not free before those that took them have gone.
    return max(has, 1, full - sum(pods.values())) if share_places(ctx) and has < full else full


def share_places(ctx: Context) -> bool:
    """Whether versions stand in each other's places: by the user's choice, or still so after it was reverted."""
    left = bool(set(ctx.observed.servings) - {ctx.spec.traffic.stable})
    return ctx.spec.runtime.autoscaling is None and (within_replicas(ctx) or (ctx.status.sharing_places and left))


def short(ctx: Context, version: int) -> bool:
    """Whether a version runs on fewer pods than all the traffic takes, because others have their places."""
    serving = ctx.observed.servings.get(version)
    return share_places(ctx) and serving is not None and serving.replicas < full_replicas(ctx)


def within_replicas(ctx: Context) -> bool:
    return ctx.spec.rollout is not None and ctx.spec.rollout.surge == "WithinReplicas"


def stable_runs(ctx: Context) -> bool:
    return ctx.spec.traffic.stable in ctx.observed.servings


# --- one pass over a canary on trial ---------------------------------------------------------------------------------------


def _proceed(trial: _Trial) -> Progress:
    if doom := _broken(trial):
        return _abort(trial, *doom)
    trial = _fold(_note_counted(_note_acceptance(trial)))
    if trial.evidence.weight is not None:
        # Whatever the step waits for: who has traffic is judged.
        finding = judge(trial.evidence, trial.analysis, trial.ctx.now)
        if finding.kind is Kind.ABORT:
            return _abort(trial, finding.reason, finding.message)
        if (unseen := _unseen(trial)) is not None:
            return unseen
    if trial.step.accepted_at is None:
        return _waiting(trial, _paused(trial) if trial.rollout.paused else _unaccepted(trial))
    return _at_the_end(trial) if trial.step.weight == 100 else _held(trial)


def _unseen(trial: _Trial) -> Progress | None:
    """A canary with traffic of which nothing has been seen for a while, by an operator that has had the time to look."""
    ctx, evidence, gathered = trial.ctx, trial.evidence, trial.gathered
    aim = _aim(trial)
    if aim is None:
        return None
    if gathered is None or gathered.epoch != _epoch(trial):
        ctx.wakes.append(ctx.now + STALE)
        return None
    if gathered.silent < STALE:
        ctx.wakes.append(ctx.now + STALE - gathered.silent)
        return None
    why = evidence.trouble or f"no counts have come since {format_time(ctx.now - gathered.silent)}"
    said = f"{trial.name} has {evidence.weight} % and is not judged: {why}. It goes on by itself when the evidence comes"
    left = parse_duration(trial.rollout.progress_deadline) - gathered.silent
    if left > timedelta():
        ctx.wakes.append(ctx.now + left)
    return _waiting(trial, ("Reconciling" if left > timedelta() else "Stalled", "NoEvidence", said))


def _held(trial: _Trial) -> Progress:
    """The weight is in place: wait for the end of the hold, then go on where the evidence says so."""
    ctx, step = trial.ctx, trial.step
    if trial.hold is None:
        return _done(trial, _split_held(trial))
    until = _until(trial)
    trial = replace(trial, step=step.model_copy(update={"until": format_time(until)}))
    if trial.rollout.paused:
        return _waiting(trial, _paused(trial))
    if ctx.now < until:
        ctx.wakes.append(until)
        seen = f"; {count(trial.evidence.step_canary.requests, 'request')} judged in this step" if _is_judged(trial) else ""
        said = f"{trial.name} has {step.weight} % until {format_time(until)} at least (step {_place(trial)}){seen}"
        return _waiting(trial, ("Reconciling", "Holding", said))
    if not _is_judged(trial):
        return _advance(trial, f"held at {step.weight} %, where it had no requests to be judged by")
    finding = judge(trial.evidence, trial.analysis, ctx.now, trial.gathered.silent if trial.gathered else timedelta())
    if finding.reason not in BLIND and (missing := _not_seen_itself(trial)):
        return _inconclusive(trial, *missing, until)
    if finding.kind is Kind.PASS:
        return _advance(trial, finding.message)
    return _inconclusive(trial, finding.reason, finding.message, until)


def _not_seen_itself(trial: _Trial) -> tuple[str, str] | None:
    """What the running operator has not seen itself (reason and message): what a former one has carries no canary further."""
    gathered = trial.gathered
    if gathered is None or gathered.epoch != _epoch(trial) or not gathered.seen:
        return "NoEvidence", "no counts have come since the operator began to look"
    unread = next((m.name for m in trial.evidence.metrics if parse_time(m.at) < gathered.since), None)
    return ("NoMetric", f"metric {unread} has not been read since the operator began to look") if unread else None


def _inconclusive(trial: _Trial, reason: str, message: str, until: datetime) -> Progress:
    """Too little evidence at the end of a hold: neither a pass nor a failure."""
    ctx = trial.ctx
    if reason in BLIND:
        # What cannot be seen is never promoted, and is no fault of the canary's.
        due = until + parse_duration(trial.rollout.progress_deadline)
        said = f"{trial.name} stays at {trial.step.weight} %: {message}"
        if ctx.now < due:
            ctx.wakes.append(due)
            return _waiting(trial, ("Reconciling", reason, said))
        return _waiting(trial, ("Stalled", reason, f"{said}. It goes on by itself when the evidence comes"))
    match trial.analysis.on_inconclusive or OnInconclusive.PAUSE:
        case OnInconclusive.PROMOTE:
            return _advance(trial, f"{message}; onInconclusive is Promote")
        case OnInconclusive.ABORT:
            return _abort(trial, "Inconclusive", f"{message}; onInconclusive is Abort")
        case OnInconclusive.PAUSE:
            said = f"{trial.name} stays at {trial.step.weight} %: {message}. It goes on by itself when there is enough"
            return _waiting(trial, ("Reconciling", "Inconclusive", said))


def _advance(trial: _Trial, why: str) -> Progress:
    index = trial.step.index + 1
    weight = trial.rollout.steps[index].weight
    step = StepStatus(
        version=trial.step.version,
        artifact_revision=trial.step.artifact_revision,
        index=index,
        weight=weight,
        started_at=format_time(trial.ctx.now),
    )
    trial = replace(trial, step=step)
    return _waiting(trial, ("Reconciling", "Stepping", f"{trial.name} goes to {weight} % (step {_place(trial)}): {why}"))


def _at_the_end(trial: _Trial) -> Progress:
    number, stable = trial.canary.version, trial.ctx.spec.traffic.stable
    said = f"version {number} serves all traffic as the canary: commit traffic {{stable: {number}}} to finish the release"
    if stable_runs(trial.ctx):
        said += f"; the pods of version {stable} stay for scaleDownDelay, a revert is immediate until then"
    return _done(trial, Verdict("Ready", "AwaitingPromotion", said))


def _split_held(trial: _Trial) -> Verdict:
    number, stable, weight = trial.canary.version, trial.ctx.spec.traffic.stable, trial.step.weight
    return Verdict(
        "Ready",
        "SplitHeld",
        f"versions {stable} and {number} share the traffic {100 - weight} to {weight}, held until "
        f"Git says otherwise: commit traffic {{stable: {number}}} to promote, {{stable: {stable}}} to go back",
    )


def _waiting(trial: _Trial, said: Said) -> Progress:
    state, reason, message = said
    trial = replace(trial, step=trial.step.model_copy(update={"waiting_for": message[:1024]}))
    return _done(trial, Verdict(state, reason, message + _room(trial)))


def _room(trial: _Trial) -> str:
    """The arithmetic of a canary that runs on stable's pods."""
    ctx = trial.ctx
    full, stable = full_replicas(ctx, on_trial=True), ctx.observed.servings.get(ctx.spec.traffic.stable)
    if not within_replicas(ctx) or stable is None:
        return ""
    left = 100 - ctx.present.get(trial.step.version, 0)
    return (
        f"; surge is WithinReplicas: {stable.replicas} of {count(full, 'pod')} {are(full)} stable's, each has "
        f"{left / max(stable.replicas, 1):.0f} % of the traffic where it would have {left / full:.0f} %"
    )


def _done(trial: _Trial, verdict: Verdict | None) -> Progress:
    step, present = trial.step, trial.ctx.present
    has = present.get(step.version, 0)
    # Not a question of acceptance: an edit of the route must not start the pods of a stable that was scaled away.
    complete = step.weight == 100 and has == 100
    # Pods of a former runtime, of one that was aborted even, gain nothing in the name of those to come.
    held = trial.rollout.paused or not _is_itself(trial)
    return Progress(
        share=min(step.weight, has) if held else step.weight,
        itself=_is_itself(trial),
        step=trial.step,
        evidence=trial.evidence,
        aborted=trial.aborted,
        history=trial.history,
        verdict=verdict,
        aim=_aim(trial),
        complete=complete,
        watched_until=_watched_until(trial) if complete else None,
    )


def _watched_until(trial: _Trial) -> datetime:
    """Until when the canary has been counted for a while at its present weight."""
    since, behind = trial.evidence.counted_since, _behind(trial.analysis)
    # A first scrape shows the weight, and another one what came of it.
    return (parse_time(since) if since else trial.ctx.now) + CONVERGED + 2 * behind + WATCHED


# --- what can be wrong ---------------------------------------------------------------------------------------------------


def _broken(trial: _Trial) -> tuple[str, str] | None:
    """What its figures and the canary's own pods say against it, as reason and message."""
    ctx, step, serving = trial.ctx, trial.step, trial.serving
    if trial.dropped is not None:
        return "AccuracyDropped", trial.dropped
    # Pods of another runtime, which the present one replaces, say nothing of the canary that is judged.
    troubles = serving.troubles if serving is not None and serving.serving_hash == trial.evidence.serving_hash else ()
    # A pod that was kept from a former try may still wait out its back-off: it is heard when it has tried again.
    known = trial.evidence.crashes_before
    fresh = [t for t in troubles if t.at is None or format_time(t.at) not in known]
    trouble = next(iter([*fresh, *troubles]), None)
    if trouble is not None and fresh and trouble.reason in ("CrashLoop", "OutOfMemory", "GoldenMismatch"):
        return trouble.reason, trouble.message
    if step.unable_since is not None and trouble is not None and trouble.reason == "NotReady":
        lost = _watched(ctx, step.unable_since) + LOST
        if ctx.now >= lost:
            return "ReadinessLost", f"it had traffic and lost its readiness for {LOST.seconds} s: {trouble.message}"
        ctx.wakes.append(lost)
    if step.unready_since is None:
        return None
    due = _watched(ctx, step.unready_since) + parse_duration(trial.rollout.progress_deadline)
    if ctx.now < due:
        ctx.wakes.append(due)
        return None
    words = (trouble.message if trouble else None) or (serving.words if serving else None) or "its pods say nothing"
    said = f"not ready within progressDeadline ({trial.rollout.progress_deadline}): {words}"
    if trouble is not None and trouble.reason == "Unschedulable":
        return trouble.reason, said + _way_out(trial, trouble.message)
    return "ProgressDeadlineExceeded", said


def _crashes(serving: ServingFacts | None, serving_hash: str) -> list[str]:
    """When pods of this hash have crashed so far. Their nodes' clocks may differ from the operator's, so nothing is compared
    with its time."""
    if serving is None or serving.serving_hash != serving_hash:
        return []
    return sorted({format_time(t.at) for t in serving.troubles if t.at is not None})


def _watched(ctx: Context, since: str) -> datetime:
    """From when a deadline counts: from `since`, but no time in which nobody watched the pods.

    An operator that was away, or could not reach the API server, does not know what they did; nor is the clock of the one that
    wrote `since` this one's.
    """
    watching = ctx.observed.watching_since
    return max(parse_time(since), watching) if watching else parse_time(since)


def _way_out(trial: _Trial, words: str) -> str:
    """What a user can do about pods that no node takes, where the scheduler's words do not tell."""
    plan = trial.canary.tensorrt
    if plan is not None and "affinity" in words:
        labels = " and ".join(f"{label}={value}" for label, value in gpu_labels(plan.compute_capability).items())
        return f"; a TensorRT plan runs on GPUs like the one that built it, so its pods require nodes labelled {labels}"
    stable, scaled = trial.ctx.observed.servings.get(trial.ctx.spec.traffic.stable), trial.ctx.spec.runtime.autoscaling
    # What stable's pods hold they can give up, all but the last one's. No node of the right kind is not theirs to give.
    gives_room = stable is not None and stable.replicas > 1 and scaled is None and "Insufficient" in words
    return "; surge: WithinReplicas would take its pods from stable's" if trial.rollout.surge is None and gives_room else ""


def _abort(trial: _Trial, reason: str, why: str) -> Progress:
    ctx, canary = trial.ctx, trial.canary
    record = Aborted(
        version=canary.version,
        artifact_revision=canary.artifact_revision,
        serving_hash=trial.evidence.serving_hash or wanted_hash(ctx, canary),
        reason=reason,
        message=why[:1024],
        time=format_time(ctx.now),
        retry_at=trial.rollout.retry_at,
    )
    outcome = Outcome(
        version=canary.version,
        outcome="Aborted",
        time=format_time(ctx.now),
        message=f"at {ctx.present.get(canary.version, 0)} %: {reason}: {why}"[:1024],
    )
    return Progress(
        evidence=trial.evidence,
        aborted=(*trial.aborted, record),
        history=_add(trial.history, outcome),
        verdict=_aborted_verdict(ctx, record, trial.rollout, new=True),
        out=record,
    )


def is_desperate(ctx: Context, progress: Progress) -> bool:
    """Whether the canary was aborted, and for what makes one pod of stable's better than all of its own."""
    out, evidence = progress.out, progress.evidence
    if out is None or out.reason != "Stalled":
        return out is not None and out.reason in DESPERATE
    # A pod that hangs says nothing of the others, which answer. Of many pods no more are remembered: so many are taken for all.
    serving, hung = ctx.observed.servings.get(out.version), len(evidence.hung) if evidence else 0
    return serving is None or hung >= min(serving.ready, HUNG_PODS)


def _stands(ctx: Context, found: Aborted, canary: VersionStatus, rollout: Rollout) -> bool:
    """Whether an abort still holds: the same content on the same runtime, and nobody asked for another try."""
    return (found.artifact_revision, found.serving_hash, found.retry_at) == (
        canary.artifact_revision,
        wanted_hash(ctx, canary),
        rollout.retry_at,
    )


def _aborted_verdict(ctx: Context, record: Aborted, rollout: Rollout, *, new: bool = False) -> Verdict:
    """`new`: this very pass aborts it, and writes the route."""
    stable = ctx.spec.traffic.stable
    serving, has = ctx.observed.servings.get(stable), ctx.present.get(record.version, 0)
    goes, way_out = f"the traffic goes to version {stable}", ""
    if has and not (serving is not None and serving.full):
        goes = f"but keeps {has} % of the traffic until enough pods of version {stable} are ready"
    elif has and new:
        goes = f"Perch moves its {has} % of the traffic to version {stable}"
    elif has:
        goes = f"but still has {has} % of the traffic, because the HTTPRoute could not be written yet"
        way_out = (
            ". Perch tries again. If Ready says that the API server refuses the HTTPRoute, allow that write or set the weights "
            f"by hand: kubectl edit httproute {ctx.identity.name}"
        )
    kept = ""
    if record.version in ctx.observed.servings and not share_places(ctx):
        until = parse_time(record.time) + parse_duration(rollout.inspect_for)
        kept = f". Its pods are kept for inspection until {format_time(until)} at least"
    return Verdict(
        "Stalled",
        record.reason,
        f"version {record.version} was aborted, {goes}: {record.message}{way_out}{kept}. Commit traffic "
        f"{{stable: {stable}}} to end the release; move rollout.retryAt to try the same version again",
    )


def _paused(trial: _Trial) -> Said:
    has = trial.ctx.present.get(trial.step.version, 0)
    return "Ready", "Paused", f"{trial.name} is held at {has} % because rollout.paused is true: set it to false to go on"


def _unaccepted(trial: _Trial) -> Said:
    """Why the step's weight is not in place."""
    wanted = canary_replicas(trial.ctx, trial.step.weight)
    if trial.serving is not None and trial.serving.able and not _is_itself(trial):
        words = f": {trial.serving.words}" if trial.serving.words else ""
        return "Reconciling", "RollingUpdate", f"{trial.name} is taking over its runtime, and is not judged before it has{words}"
    if not readiness(trial.serving, wanted).full:
        have = trial.serving.ready if trial.serving else 0
        said = f"{trial.name}: {have} of the {count(wanted, 'pod')} for {trial.step.weight} % {are(wanted)} ready"
        if trial.serving is not None and trial.serving.words:
            said += f": {trial.serving.words}"
        return "Reconciling", "Starting", said
    return "Reconciling", "ShiftingTraffic", f"{trial.name} gets {trial.step.weight} %: the Gateway has not accepted it yet"


# --- times and counts ----------------------------------------------------------------------------------------------------


def _relocate(ctx: Context, step: StepStatus, rollout: Rollout) -> StepStatus:
    """Edited steps take effect from the present weight on, which stays until it has passed: an edit never goes back, nor
    further unjudged. It moves where it is not between the steps any more: all are above it, or none is.
    """
    weights = [s.weight for s in rollout.steps]
    index = max((i for i, weight in enumerate(weights) if weight <= step.weight), default=0)
    weight = step.weight if weights[0] <= step.weight < weights[-1] else weights[index]
    if (index, weight) == (step.index, step.weight):
        return step
    update: dict[str, object] = {"index": index, "weight": weight}
    if weight != step.weight:
        update |= {"accepted_at": None, "until": None, "unready_since": None, "started_at": format_time(ctx.now)}
    return step.model_copy(update=update)


def _note_readiness(trial: _Trial) -> _Trial:
    step, now = trial.step, format_time(trial.ctx.now)
    able = trial.serving is not None and trial.serving.able
    ready = readiness(trial.serving, canary_replicas(trial.ctx, step.weight)).full and _is_itself(trial)
    had_traffic = trial.evidence.since is not None
    update = {
        "unready_since": None if ready or step.accepted_at is not None else step.unready_since or now,
        "unable_since": None if able or not had_traffic else step.unable_since or now,
        "waiting_for": None,
    }
    return replace(trial, step=step.model_copy(update=update))


def _note_acceptance(trial: _Trial) -> _Trial:
    """The step and its hold count from the moment the Gateway has accepted its weight, and again where that was lost."""
    ctx, step = trial.ctx, trial.step
    route = ctx.observed.route
    wanted = {ctx.spec.traffic.stable: 100 - step.weight, step.version: step.weight}
    wanted, has = {v: w for v, w in wanted.items() if w}, {v: w for v, w in ctx.present.items() if w}
    # The Gateway may be at another edit of the route, with the same weights: that is no new beginning.
    was = {w.version: w.weight for w in ctx.status.weights.accepted if w.weight}
    stands = route is not None and (route.accepted or (step.accepted_at is not None and was == wanted))
    in_place = stands and has == wanted
    if route is not None and ctx.spec.traffic.mirror is not None and step.weight < 100:
        in_place = in_place and makes_copies(route.spec)
    current = step.accepted_at is not None or (trial.serving is not None and trial.serving.current)
    if not (in_place and current and _is_itself(trial)):
        return replace(trial, step=step.model_copy(update={"accepted_at": None, "until": None}))
    if step.accepted_at is not None:
        return trial
    step = step.model_copy(update={"accepted_at": format_time(ctx.now), "until": None})
    return replace(trial, step=step, evidence=begin_step(trial.evidence, trial.analysis))


def _is_itself(trial: _Trial) -> bool:
    """Whether what answers is the canary that is judged, and no pod of a former runtime."""
    serving = trial.serving
    return serving is not None and serving.able and serving.uniform and serving.serving_hash == trial.evidence.serving_hash


def _note_counted(trial: _Trial) -> _Trial:
    """At which weight of the canary's requests are counted now: the one in place, whichever the step asks for.

    Until the Gateway has accepted another, either may be true, and the larger is the milder one.
    """
    ctx, evidence = trial.ctx, trial.evidence
    canary, route = trial.canary.version, ctx.observed.route
    weight: int | None = None
    current = evidence.weight is not None or (trial.serving is not None and trial.serving.current)
    if route is not None and _other(trial) is not None and current and _is_itself(trial):
        present = ctx.present.get(canary, 0)
        known = (present, *(w.weight for w in ctx.status.weights.accepted if w.version == canary))
        weight = present if route.accepted else max((w for w in known if w < 100), default=0)
        if weight == 0 and not (route.accepted and makes_copies(route.spec)):
            weight = None
    if weight == evidence.weight:
        return trial
    since = None if weight is None else format_time(ctx.now)
    return replace(trial, evidence=evidence.model_copy(update={"weight": weight, "counted_since": since}))


def _until(trial: _Trial) -> datetime:
    """End of the hold. A restarted operator adds a while of its own, to see fresh evidence."""
    hold = trial.hold or timedelta()
    accepted = parse_time(trial.step.accepted_at or trial.step.started_at)
    # A time in status is cut to its second: a hold is no shorter than it says.
    until = accepted + hold + (SECOND if hold else timedelta())
    if trial.evidence.since is not None and parse_time(trial.evidence.since) > accepted:
        until = max(until, parse_time(trial.evidence.since) + min(hold, FRESH))
    return until


def _is_judged(trial: _Trial) -> bool:
    """Whether the canary gets requests in this step that count."""
    return trial.step.weight > 0 or trial.ctx.spec.traffic.mirror is not None


def _other(trial: _Trial) -> int | None:
    """Who has the traffic that the canary has not: stable, or the former one while stable is still to start."""
    rest = [v for v, w in trial.ctx.present.items() if w and v != trial.canary.version]
    return (rest or [trial.ctx.spec.traffic.stable])[0] if len(rest) < 2 else None


def _epoch(trial: _Trial) -> str:
    """Another one for whatever changes which share of the counted requests is the canary's."""
    evidence = trial.evidence
    parts = (trial.canary.version, evidence.serving_hash, evidence.weight, evidence.counted_since, _other(trial), _copied(trial))
    return "-".join(map(str, parts))


def _fold(trial: _Trial) -> _Trial:
    """Take in what was gathered for this very epoch and is not taken in yet."""
    gathered, evidence = trial.gathered, trial.evidence
    if gathered is None or gathered.epoch != _epoch(trial):
        return trial
    evidence = evidence.model_copy(update={"since": format_time(gathered.since), "trouble": gathered.trouble})
    for batch in gathered.batches:
        meant, copied = _meant_share(trial, batch), _copied(trial) > 0
        evidence = take_in(evidence, batch, trial.analysis, share=meant, together=_together(trial), copied=copied)
    known = {m.name: m for m in evidence.metrics}
    prometheus = trial.analysis.prometheus
    queries = (prometheus.metrics or []) if prometheus else []
    evidence = evidence.model_copy(update={"metrics": [m for m in evidence.metrics if m.name in {q.name for q in queries}]})
    for query in queries:
        reading = gathered.readings.get(query.name)
        if reading is not None and (query.name not in known or reading.at > parse_time(known[query.name].at)):
            evidence = take_in_reading(evidence, reading, query)
    if (share := _copied_too_often(trial, evidence)) and not _copied_too_often(trial, trial.evidence):
        said = f"about {share:.0f} of 100 requests are copied to {trial.name}, and traffic.mirror.percent is {_copied(trial)}"
        why = "the Gateway may ignore the percent and copy all of them, or clients ask the canary's Service past it"
        trial.ctx.events.append(Event("Warning", "MirrorPercentExceeded", f"{said}: {why}"))
    if evidence.lots.in_turn and not trial.evidence.lots.in_turn:
        trial.ctx.events.append(Event("Warning", "RequestsInTurn", IN_TURN))
    return replace(trial, evidence=evidence)


def _copied_too_often(trial: _Trial, evidence: Evidence) -> float | None:
    """Percent of all requests that is copied in this step, where that is nearer to all than to what was asked for.

    A Gateway may accept a mirror and ignore its percent. At most half of the requests must be asked for: then so many tell it
    from chance.
    """
    stable, canary, weight = evidence.step_stable.requests, evidence.step_canary.requests, evidence.weight
    percent = _copied(trial)
    if trial.step.accepted_at is None or not 0 < percent <= 50 or weight is None or stable < COMPARED:
        return None
    copied = canary / stable * (100 - weight) - weight
    return copied if copied > (100 + percent) / 2 else None


def _meant_share(trial: _Trial, batch: Batch) -> float:
    """The part of all counted requests that the canary is meant to get; a mirrored one is counted at both versions.

    Of a weight of 100 that the Gateway has not accepted yet each batch tells how far it is in place: every error from outside is
    the canary's then, and it must not look worse by it than stable, who answers nothing.
    """
    weight, copied = trial.evidence.weight or 0, _copied(trial)
    meant, requests = (weight + copied) / (100 + copied), batch.canary.requests + batch.stable.requests
    if trial.ctx.present.get(trial.canary.version) == 100 and requests:
        return max(meant, batch.canary.requests / requests)
    return meant


def _copied(trial: _Trial) -> int:
    mirror = trial.ctx.spec.traffic.mirror
    return mirror.percent if mirror and trial.evidence.weight != 100 else 0


def _together(trial: _Trial) -> int:
    """The most requests that can fail as one: an error fails the whole batch that Triton has formed."""
    pair = (trial.canary.version, trial.ctx.spec.traffic.stable)
    models = [e.triton for e in trial.ctx.spec.versions if e.version in pair]
    return max((m.max_batch_size for m in models if m.batches), default=1)


def _aim(trial: _Trial) -> Aim | None:
    """What to gather next: nothing while the canary has no requests, nor after stable was scaled away."""
    ctx, evidence = trial.ctx, trial.evidence
    stable, canary = _other(trial), trial.canary.version
    if evidence.counted_since is None or stable is None or stable not in ctx.observed.servings:
        return None
    prometheus = trial.analysis.prometheus
    fill = {
        "namespace": ctx.identity.namespace,
        "name": ctx.identity.name,
        "model": ctx.spec.model_name or ctx.identity.name,
        "stable": str(stable),
        "canary": str(canary),
        "stableService": serving_name(ctx.identity.name, stable),
        "canaryService": serving_name(ctx.identity.name, canary),
    }
    return Aim(
        epoch=_epoch(trial),
        model=fill["model"],
        stable=stable if evidence.weight != 100 else None,
        canary=canary,
        not_before=parse_time(evidence.counted_since) + CONVERGED,
        requests=_filled(prometheus.requests, fill) if prometheus and prometheus.requests else None,
        failures=_filled(prometheus.failures, fill) if prometheus and prometheus.failures else None,
        behind=_behind(trial.analysis),
        address=prometheus.address if prometheus else None,
        metrics={q.name: _filled(q.query, fill) for q in (prometheus.metrics or [])} if prometheus else {},
    )


def _behind(analysis: Analysis) -> timedelta:
    """How old counters may be."""
    prometheus = analysis.prometheus
    return parse_duration(prometheus.scrape_interval or "60s") if prometheus and prometheus.requests else timedelta()


def _filled(query: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        query = query.replace("{{" + name + "}}", value)
    return query


def _place(trial: _Trial) -> str:
    return f"{trial.step.index + 1} of {len(trial.rollout.steps)}"


# --- how rollouts ended --------------------------------------------------------------------------------------------------


def _ended(ctx: Context) -> tuple[Outcome, ...]:
    """History, with the former canary's outcome where the spec has just made an end of it."""
    history = tuple(ctx.status.history)
    step, traffic = ctx.status.step, ctx.spec.traffic
    ended = step is not None and any(
        (a.version, a.artifact_revision) == (step.version, step.artifact_revision) for a in ctx.status.aborted
    )
    if step is None or step.version == traffic.canary or ended:
        return history
    has = ctx.present.get(step.version, 0)
    if step.version == traffic.stable:
        outcome = Outcome(version=step.version, outcome="Promoted", time=format_time(ctx.now), message=f"from {has} %")
    else:
        now = f"version {traffic.canary} took its place" if traffic.canary else f"version {traffic.stable} has all traffic"
        outcome = Outcome(version=step.version, outcome="Superseded", time=format_time(ctx.now), message=f"at {has} %: {now}")
    return _add(history, outcome)


def _add(history: tuple[Outcome, ...], outcome: Outcome) -> tuple[Outcome, ...]:
    return (outcome, *history)[:HISTORY]

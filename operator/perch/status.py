"""Conditions and events, in kstatus' terms, from the facts of one pass. Pure.

Ready, Available and TrafficAccepted are there with True or False; Reconciling and Stalled only while they hold. A message says
what is the matter in the children's own words, and what to do next. lastTransitionTime moves only when a status flips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal

from perch.api import AccuracyStatus, Condition, ParityStatus, Phase, Status, VersionStatus
from perch.observed import Fault, RouteFacts
from perch.traffic import NOT_READY, Readiness
from perch.words import are, count

MESSAGE_LIMIT = 2048
FAULTS_LIMIT = 1000
IN_TURN = (
    "the Gateway takes turns between stable and canary instead of drawing lots, so a client that sends bad requests at regular "
    "intervals may meet the canary each time and make it look worse. Judge it with that in mind, or use a Gateway that draws lots"
)


@dataclass(frozen=True)
class Event:
    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class VersionFacts:
    """One version after the pass has looked at its export and its pods."""

    status: VersionStatus
    readiness: Readiness = NOT_READY
    rolled: bool = False
    """Every pod runs what the spec says now."""
    deadline_exceeded: bool = False
    conflict: bool = False
    """Pods of this number run another content: the entry was removed and put back changed."""
    foreign: tuple[str, str] | None = None
    """Why this runtime may not have the artefact (reason and message): a plan of another TensorRT, or for other GPUs."""
    removed: bool = False

    def replace_status(self, status: VersionStatus) -> VersionFacts:
        return replace(self, status=status)


@dataclass(frozen=True)
class Verdict:
    state: Literal["Ready", "Reconciling", "Stalled"]
    reason: str
    message: str


@dataclass(frozen=True)
class Facts:
    generation: int
    stable: VersionFacts
    canary: VersionFacts | None
    present: Mapping[int, int]
    """Weights above 0 in the route."""
    target: Mapping[int, int]
    rollout: Verdict | None = None
    """What the rollout says of its canary."""
    aborted: bool = False
    """The canary was taken out."""
    complete: bool = False
    """The canary has replaced stable, whose pods may be gone."""
    serving: Mapping[int, bool] = field(default_factory=dict)
    """Whether a version has at least one ready pod."""
    routed: bool = True
    route: RouteFacts | None = None
    rewritten: bool = False
    """This very pass writes the route: what the Gateway has accepted is the former one."""
    host_conflict: str | None = None
    """Who gets requests for a host name in this one's place."""
    in_turn: bool = False
    """The Gateway takes turns between stable and canary, and draws no lots."""
    gateway_api: bool = True
    removable: tuple[int, ...] = ()
    invalid: str | None = None
    """Why the spec cannot be read as a whole, and what goes on."""


def build_conditions(
    facts: Facts | str, previous: Sequence[Condition], now: datetime, generation: int | None = None
) -> list[Condition]:
    """All conditions of one pass; a string instead of facts is why the spec could not be read."""
    if isinstance(facts, str):
        kept = [c for c in previous if c.type in ("Available", "TrafficAccepted")]
        wanted = [
            ("Ready", False, "InvalidSpec", facts),
            ("Stalled", True, "InvalidSpec", facts),
            *((c.type, c.status == "True", c.reason, c.message) for c in kept),
        ]
        return _stamp(wanted, previous, now, generation or 0)
    verdict = judge(facts)
    wanted = [("Ready", verdict.state == "Ready", verdict.reason, verdict.message)]
    if verdict.state == "Reconciling":
        wanted.append(("Reconciling", True, verdict.reason, verdict.message))
    if verdict.state == "Stalled":
        wanted.append(("Stalled", True, verdict.reason, verdict.message))
    wanted.append(("Available", *_available(facts)))
    if facts.routed:
        wanted.append(("TrafficAccepted", *_traffic_accepted(facts)))
    return _stamp(wanted, previous, now, facts.generation)


def judge(facts: Facts) -> Verdict:
    """The one sentence about the whole: what is broken first, then what is under way, then that all is well."""
    if facts.invalid is not None:
        return Verdict("Stalled", "InvalidSpec", facts.invalid)
    pair = [] if facts.complete else [facts.stable]
    pair += [facts.canary] if facts.canary and not facts.aborted else []
    for version in pair:
        # How long a canary may take to start is the rollout's own question (progressDeadline).
        if verdict := _stalled(version, deadline=version is facts.stable, serving=any(facts.serving.values())):
            return verdict
    if facts.aborted and facts.rollout is not None:
        return facts.rollout
    for version in pair:
        if verdict := _under_way(version):
            return verdict
    return _traffic_under_way(facts) or facts.rollout or _well(facts)


def _stalled(facts: VersionFacts, *, deadline: bool, serving: bool) -> Verdict | None:
    """`serving`: something of this ModelDeployment answers, and goes on."""
    number, said = facts.status.version, facts.status.message or "no reason given"
    goes_on = ". What serves goes on serving" if serving else ""
    if facts.conflict:
        return Verdict(
            "Stalled",
            "VersionReused",
            f"version {number} was removed and put back with other content while pods of the former one still run: "
            f"list it under a new version number{goes_on}",
        )
    if facts.foreign is not None:
        reason, why = facts.foreign
        return Verdict("Stalled", reason, why + goes_on)
    if facts.status.phase is Phase.FAILED and facts.status.retry_at is None:
        return Verdict(
            "Stalled",
            "ExportFailed",
            f"version {number} cannot be exported: {said}{goes_on}. Fix the checkpoint or its entry and list it under a "
            "new version number, or fix what builder or runtime says of it, and it is tried again",
        )
    if deadline and facts.deadline_exceeded and not facts.rolled:
        return Verdict("Stalled", "ProgressDeadlineExceeded", f"version {number} does not become ready: {said}")
    return None


def _under_way(facts: VersionFacts) -> Verdict | None:
    number, status = facts.status.version, facts.status
    said = f": {status.message}" if status.message else ""
    if status.phase is Phase.FAILED:
        return Verdict(
            "Reconciling",
            "ExportRetrying",
            f"version {number}: the export failed and is tried again at {status.retry_at}{said}",
        )
    if status.artifact_digest is None:
        return Verdict("Reconciling", "Exporting", f"version {number} is being exported{said}")
    if not facts.readiness.full:
        return Verdict(
            "Reconciling",
            "Starting",
            f"version {number}: {status.ready_replicas} of {count(status.replicas, 'pod')} {are(status.replicas)} ready{said}",
        )
    if not facts.rolled:
        return Verdict("Reconciling", "RollingUpdate", f"version {number} is taking over the new runtime{said}")
    return None


def _traffic_under_way(facts: Facts) -> Verdict | None:
    if not facts.routed:
        return None
    accepted, reason, message = _traffic_accepted(facts)
    if accepted and dict(facts.present) == dict(facts.target):
        return None
    if reason == "HostnameConflict":
        return Verdict("Stalled", reason, message)
    if facts.gateway_api and facts.route is None:
        message = "the HTTPRoute is being written"
    elif accepted:
        message = f"the weights go from {_split(facts.present)} to {_split(facts.target)}"
    waiting = accepted or reason in ("AwaitingGateway", "NotRouted")
    return Verdict("Reconciling", "ShiftingTraffic" if waiting else reason, message)


def _split(weights: Mapping[int, int]) -> str:
    return ", ".join(f"version {v}: {w} %" for v, w in sorted(weights.items())) or "nothing"


def _well(facts: Facts) -> Verdict:
    stable = facts.stable.status.version
    hint = ""
    if facts.removable:
        names = ", ".join(map(str, facts.removable))
        hint = f"; no traffic names version {names}: a revert may, or remove it from spec.versions"
    return Verdict("Ready", "Serving", f"version {stable} serves all traffic{hint}")


def _available(facts: Facts) -> tuple[bool, str, str]:
    voters = sorted(facts.present) or [facts.stable.status.version]
    down = [v for v in voters if not facts.serving.get(v, False)]
    if not down:
        names = " and ".join(map(str, voters))
        return True, "PodsReady", f"version {names} answers"
    names = " and ".join(map(str, down))
    return False, "NoReadyPods", f"version {names} has no ready pod"


def _traffic_accepted(facts: Facts) -> tuple[bool, str, str]:
    if not facts.gateway_api:
        return (
            False,
            "GatewayAPIMissing",
            "the cluster has no HTTPRoute (gateway.networking.k8s.io/v1): install Gateway API and an implementation of it; "
            "until then the versions' Services answer",
        )
    if facts.host_conflict is not None:
        return False, "HostnameConflict", facts.host_conflict
    if facts.route is None:
        return False, "NotRouted", "no traffic is routed before the stable version is ready"
    if facts.rewritten:
        moves = f": the weights go from {_split(facts.present)} to {_split(facts.target)}"
        return False, "AwaitingGateway", "the HTTPRoute is being written" + ("" if facts.present == facts.target else moves)
    said = f"{facts.route.message}; {IN_TURN}" if facts.in_turn and facts.route.accepted else facts.route.message
    return facts.route.accepted, facts.route.reason, said


def with_failures(status: Status, failures: Sequence[str], now: datetime) -> Status:
    """The status where the API server refused writes: what it said comes first, since nothing else moves until it is fixed."""
    return _unready(status, "ApplyFailed", "the API server refused: " + "; ".join(failures), now)


def with_blindness(status: Status, trouble: str, now: datetime) -> Status:
    """The status where Perch cannot see the children of a namespace."""
    message = f"Perch cannot watch {trouble}. Give the operator's ServiceAccount the rights of the chart"
    return _unready(status, "WatchFailed", message, now)


def _unready(status: Status, reason: str, message: str, now: datetime) -> Status:
    """What is Stalled stays so."""
    kept = [c for c in status.conditions if c.type not in ("Ready", "Reconciling")]
    wanted = [
        ("Ready", False, reason, message),
        *([] if status.condition("Stalled") else [("Reconciling", True, reason, message)]),
        *((c.type, c.status == "True", c.reason, c.message) for c in kept),
    ]
    conditions = _stamp(wanted, status.conditions, now, status.observed_generation)
    return status.model_copy(update={"conditions": conditions})


def with_faults(status: Status, faults: Sequence[Fault], now: datetime) -> Status:
    """The status where parts of a pass failed by a defect of Perch. What is Stalled stays so; nothing is called Ready."""
    said = "; ".join(map(str, faults))[:FAULTS_LIMIT]
    message = f"Perch failed at {said}. The rest of the spec is carried out. The operator's log says more: please report it"
    kept = [c for c in status.conditions if c.type not in ("Ready", "Reconciling")]
    wanted = [
        ("Ready", False, "InternalError", message),
        *([] if status.condition("Stalled") else [("Stalled", True, "InternalError", message)]),
        *((c.type, c.status == "True", c.reason, c.message) for c in kept),
    ]
    conditions = _stamp(wanted, status.conditions, now, status.observed_generation)
    return status.model_copy(update={"conditions": conditions})


def _stamp(
    wanted: Sequence[tuple[str, bool, str, str]], previous: Sequence[Condition], now: datetime, generation: int
) -> list[Condition]:
    before = {c.type: c for c in previous}
    conditions = []
    for kind, holds, reason, message in wanted:
        status: Literal["True", "False"] = "True" if holds else "False"
        old = before.get(kind)
        conditions.append(
            Condition(
                type=kind,
                status=status,
                reason=reason,
                message=message[:MESSAGE_LIMIT],
                observed_generation=generation,
                last_transition_time=old.last_transition_time if old and old.status == status else format_time(now),
            )
        )
    return conditions


def build_events(before: Status, after: Status) -> tuple[Event, ...]:
    """One event for each transition between two statuses."""
    events: list[Event] = []
    for version in after.versions:
        old = before.of(version.version)
        if version.artifact_digest and (old is None or old.artifact_digest != version.artifact_digest):
            events.append(_published(version))
            if version.accuracy and version.accuracy.verdict != "Passed":
                events.append(_missed(version.version, version.accuracy))
        if old is None or old.phase is not version.phase or old.artifact_revision != version.artifact_revision:
            if event := _phase_event(version, old):
                events.append(event)
        if _unanswered(version) and not (old is not None and _unanswered(old)):
            events.append(_no_ready_pods(version))
    for old in before.versions:
        if after.of(old.version) is None:
            events.append(Event("Normal", "VersionGone", f"version {old.version} and its children are gone"))
    if before.weights.accepted != after.weights.accepted and after.weights.accepted:
        split = ", ".join(f"version {w.version}: {w.weight} %" for w in after.weights.accepted)
        events.append(Event("Normal", "TrafficShifted", f"the Gateway has accepted {split}"))
    old_ready, ready = before.condition("Ready"), after.condition("Ready")
    if ready and (old_ready is None or (old_ready.status, old_ready.reason) != (ready.status, ready.reason)):
        trouble = after.condition("Stalled") is not None or ready.reason in ("ApplyFailed", "ExportRetrying", "WatchFailed")
        events.append(Event("Warning" if trouble else "Normal", ready.reason, ready.message))
    return tuple(events)


def _unanswered(version: VersionStatus) -> bool:
    return version.weight > 0 and version.ready_replicas == 0


def _no_ready_pods(version: VersionStatus) -> Event:
    said = f": {version.message}" if version.message else ""
    return Event(
        "Warning", "NoReadyPods", f"version {version.version} has {version.weight} % of the traffic and no ready pod{said}"
    )


def _phase_event(version: VersionStatus, old: VersionStatus | None) -> Event | None:
    number = version.version
    match version.phase:
        case Phase.EXPORTING:
            return Event("Normal", "ExportStarted", f"version {number}: export {version.artifact_revision} started")
        case Phase.FAILED:
            return Event("Warning", "ExportFailed", f"version {number}: {version.message}")
        case Phase.PUBLISHED:
            was = old.phase if old else None
            away = was in (Phase.DRAINING, Phase.ABORTED, Phase.SERVING, Phase.STARTING)
            return Event("Normal", "VersionScaledAway", f"version {number} left the traffic, its pods are gone") if away else None
        case Phase.STARTING:
            return Event(
                "Normal",
                "VersionStarting",
                f"version {number}: {count(version.replicas, 'pod')} {are(version.replicas)} starting",
            )
        case Phase.SERVING if old is not None and old.phase is Phase.DRAINING:
            return Event("Normal", "VersionReady", f"version {number} is back in the traffic, its pods had not left")
        case Phase.SERVING:
            return Event("Normal", "VersionReady", f"version {number}: every pod has proven itself")
        case Phase.DRAINING:
            return Event("Normal", "VersionDraining", f"version {number} left the traffic")
        case Phase.ABORTED:
            return Event(
                "Warning", "VersionAborted", f"version {number} has no traffic any more, its pods are kept for inspection"
            )
        case Phase.DELETING:
            return Event("Normal", "ArtifactDeleting", f"version {number}: its artefact is being erased")


def _published(version: VersionStatus) -> Event:
    parity = version.parity
    figures = f", {_parity(parity)}" if parity else ""
    if accuracy := version.accuracy:
        figures += f", {_accuracy(accuracy)}"
        if version.tensorrt:
            figures += ", measured on the ONNX file that the plan was built of"
    return Event("Normal", "VersionPublished", f"version {version.version}: {version.artifact_uri}{figures}")


def _parity(found: ParityStatus) -> str:
    allowed = f" (allowed {found.relative_tolerance})" if found.relative_tolerance else ""
    words = f"parity {found.verdict} at a relative error of {found.max_relative_error}{allowed}"
    if found.minimum_iou:
        words = (
            f"parity {found.verdict} with {found.max_relative_error} of the detections without a partner{allowed}, "
            f"scores up to {found.max_absolute_error} apart (allowed {found.absolute_tolerance})"
        )
    if found.minimum_top1_agreement:
        words += f", top-1 agreement {found.top1_agreement} (at least {found.minimum_top1_agreement})"
    if found.minimum_cosine:
        words += f", cosine {found.cosine} (at least {found.minimum_cosine})"
    return words


def _accuracy(found: AccuracyStatus) -> str:
    limits = f", at least {found.minimum}" if found.minimum else ""
    limits += f", at most {found.maximum_drop} below" if found.maximum_drop else ""
    return f"accuracy {found.accuracy} ({found.verdict}; the checkpoint's is {found.checkpoint_accuracy}{limits})"


def _missed(number: int, accuracy: AccuracyStatus) -> Event:
    return Event(
        "Warning",
        "AccuracyMissed",
        f"version {number} is published though its accuracy of {accuracy.accuracy} on {accuracy.samples} samples "
        f"(the checkpoint's is {accuracy.checkpoint_accuracy}) misses a limit of verification.accuracy, since onFailure is Warn",
    )


def format_time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    return datetime.fromisoformat(text)

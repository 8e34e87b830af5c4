"""From watch caches to the planner's facts. Reads and interprets; decides nothing and writes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, TypeVar

from pydantic import ValidationError

from perch.api import Routing
from perch.builders.route import read_weights
from perch.cache import Cache, Key, controller, owner_name
from perch.foreign import clean
from perch.kube import AUTOSCALER, BUDGET, CHILDREN, DEPLOYMENT, JOB, POD, POLICY, ROUTE, SERVICE, Kind
from perch.names import (
    ANNOTATION_EXPORT_HASH,
    ANNOTATION_REVISION,
    ANNOTATION_SERVING_HASH,
    LABEL_COMPONENT,
    LABEL_VERSION,
    cleanup_of,
    export_of,
    labels_of,
    version_of,
)
from perch.observed import Claim, Fault, JobFacts, JobState, Observed, PodTrouble, RouteFacts, ServingFacts, Unlabelled
from perch_exporter.contract import Accuracy, Outcome, Parity, Reason, Step, Summary

Raw = Mapping[str, Any]
T = TypeVar("T")

OVERLAP = "RouteRulesOverlap"
NO_ROUTE = "9"
"""In place of a time of creation: after all of those."""
_ROUTE_NAME = re.compile(r"(?:HTTPRoute |(?=GRPCRoute ))((?:GRPCRoute )?[-.a-z0-9]+/[-.a-z0-9]+)")
LOOP = timedelta(minutes=10)
"""A run that lasted so long is not part of a crash loop: the kubelet then begins its back-off anew, too."""
SERIOUSNESS = ("GoldenMismatch", "OutOfMemory", "CrashLoop", "Unschedulable", "NotReady")
"""Most serious first: wrong answers, then what kills, by its cause where that is known, then what only keeps from work."""


def observe(cache: Cache, owner: Key, uid: str) -> Observed:
    """Everything the planner needs to know about one ModelDeployment's children.

    Children of a former ModelDeployment of the same name are not seen: they are about to be garbage-collected, or were orphaned
    and are taken over when they are applied anew.
    """

    name = owner[1]
    unreadable: list[Fault] = []

    def own(kind: Kind) -> dict[str, Raw]:
        return {child: obj for child, obj in cache.children(kind, owner).items() if controller(obj) == uid}

    def read(
        kind: Kind, facts: Callable[[Raw], T], objects: Iterable[Raw], otherwise: Callable[[Raw], T] | None = None
    ) -> list[T]:
        """Facts of each object. One that cannot be read is told, and is there all the same where `otherwise` says how."""
        found = []
        for obj in objects:
            try:
                found.append(facts(obj))
            except Exception as error:
                unreadable.append(Fault(f"reading {kind.kind} {obj['metadata']['name']}", error))
                if otherwise is not None:
                    found.append(otherwise(obj))
        return found

    def specs(kind: Kind) -> dict[str, Raw]:
        return dict(read(kind, lambda obj: (obj["metadata"]["name"], obj["spec"]), own(kind).values()))

    pods = read(POD, _readable, cache.children(POD, owner).values())
    servings = read(
        DEPLOYMENT,
        lambda deployment: serving_facts(deployment, pods),
        (d for child, d in own(DEPLOYMENT).items() if version_of(name, child) is not None),
        lambda deployment: _bare_serving(deployment, name),
    )

    def jobs(which: Callable[[str, str], object]) -> tuple[JobFacts, ...]:
        found = (job for child, job in own(JOB).items() if which(name, child))
        return tuple(read(JOB, lambda job: job_facts(job, pods, cache.job_words), found, lambda job: _bare_job(job, name)))

    return Observed(
        exports=jobs(export_of),
        cleanups=jobs(cleanup_of),
        servings={facts.version: facts for facts in servings},
        exporting=frozenset(_revision(p) for p in pods if _label(p, LABEL_COMPONENT) == "export" and _alive(p)),
        services=specs(SERVICE),
        budgets=specs(BUDGET),
        autoscalers=specs(AUTOSCALER),
        policies=specs(POLICY),
        route=next(
            (
                facts
                for facts in read(
                    ROUTE,
                    lambda route: route_facts(route, name),
                    (route for child, route in own(ROUTE).items() if child == name),
                    lambda route: _bare_route(route, name),
                )
                if facts is not None
            ),
            None,
        ),
        gateway_api=cache.gateway_api,
        unreadable=tuple(unreadable),
        unlabelled=tuple(found for kind in CHILDREN for found in _unlabelled(kind, name, own(kind))),
    )


def _unlabelled(kind: Kind, name: str, children: Mapping[str, Raw]) -> Iterable[Unlabelled]:
    """Children that somebody took labels off: the watch would show them no more."""
    for child, obj in children.items():
        labels, found = labels_of(kind.kind, name, child), obj["metadata"].get("labels") or {}
        if any(found.get(label) != value for label, value in labels.items()) and not _leaving(obj):
            yield Unlabelled(kind.kind, child, labels)


def _readable(pod: Raw) -> Raw:
    """The pod, where all that is read of pods can be read of it."""
    pod_words(pod), pod_trouble(pod), _summary(pod), _version(pod), _leaving(pod)
    return pod


def _bare_serving(deployment: Raw, name: str) -> ServingFacts:
    """A Deployment that cannot be read: it is there, and what it answers it goes on answering."""
    status = deployment.get("status")
    ready = status.get("readyReplicas") if isinstance(status, Mapping) else None
    return ServingFacts(
        version=version_of(name, deployment["metadata"]["name"]) or 0,
        revision="",
        serving_hash="",
        replicas=0,
        ready=ready if isinstance(ready, int) else 0,
        words="its Deployment cannot be read",
        readable=False,
    )


def _bare_job(job: Raw, name: str) -> JobFacts:
    """A Job that cannot be read: nothing is started beside it, and nothing published is believed of it."""
    child = job["metadata"]["name"]
    version, revision = export_of(name, child) or (None, cleanup_of(name, child) or "")
    return JobFacts(name=child, revision=revision, version=version, state=JobState.RUNNING, words="the Job cannot be read")


def _bare_route(route: Raw, name: str) -> RouteFacts | None:
    """A route of which only the spec can be read; None where that cannot either, so that it is written anew."""
    try:
        weights = read_weights(route["spec"], name)
    except Exception:
        return None
    return RouteFacts(
        weights=weights,
        spec=route["spec"],
        resource_version=str(route["metadata"]["resourceVersion"]),
        accepted=False,
        reason="Unreadable",
        message="what the Gateway says of the HTTPRoute cannot be read",
    )


def job_facts(job: Raw, pods: Iterable[Raw], words_of: Callable[[str], str | None] = lambda _: None) -> JobFacts:
    """An export or cleanup Job with the summary that its newest pod left as a termination message.

    `words_of`: why the Job of this UID got no pod, where the Job controller said so.
    """
    status = job.get("status", {})
    ended = {c["type"]: c for c in status.get("conditions", []) if c.get("status") == "True"}
    end = ended.get("Complete") or ended.get("Failed")
    state = JobState.SUCCEEDED if "Complete" in ended else JobState.FAILED if "Failed" in ended else JobState.RUNNING
    uid = job["metadata"]["uid"]
    own = sorted((p for p in pods if controller(p) == uid), key=lambda p: p["metadata"]["creationTimestamp"])
    newest = own[-1] if own else None
    # A new attempt has nothing to say yet: why the one before it ended is what a reader wants to know meanwhile.
    words = next((said for said in map(pod_words, reversed(own[-2:])) if said), None)
    if newest is None and (refused := words_of(uid)):
        words = clean(refused)
    late = state is JobState.FAILED and end is not None and end.get("reason") == "DeadlineExceeded"
    if late:
        limit = job["spec"].get("activeDeadlineSeconds")
        then = f". Before that: {words}" if words else ": raise builder.activeDeadlineSeconds"
        words = clean(f"it took longer than its {limit} s and was ended (DeadlineExceeded){then}")
    if state is JobState.RUNNING and newest is not None:
        state = _main_ended(newest) or state
    if _leaving(job):
        # Its name is taken until it is gone: as good as running.
        state = JobState.RUNNING
    child = job["metadata"]["name"]
    export = export_of(owner_name(job), child) if owner_name(job) else None
    return JobFacts(
        name=child,
        revision=export[1] if export else _revision(job),
        version=export[0] if export else _version(job),
        export_hash=job["metadata"].get("annotations", {}).get(ANNOTATION_EXPORT_HASH),
        state=state,
        summary=_summary(newest) if newest else None,
        words=words,
        late=late,
        finished_at=_time(end.get("lastTransitionTime")) if end else None,
    )


def _main_ended(pod: Raw) -> JobState | None:
    """How the pod's own last container ended, though the pod runs on: others may have put a container beside it that never ends,
    such as a service mesh's proxy. Without this the Job would be ended by its deadline."""
    spec, statuses = pod.get("spec", {}), pod.get("status", {}).get("containerStatuses", [])
    main = next((c["name"] for c in spec.get("containers", []) if c["name"] in ("publish", "delete")), None)
    ended = next((c.get("state", {}).get("terminated") for c in statuses if c["name"] == main), None)
    if ended is None or not _alive(pod):
        return None
    return JobState.SUCCEEDED if ended.get("exitCode") == 0 else JobState.FAILED


def serving_facts(deployment: Raw, pods: Iterable[Raw]) -> ServingFacts:
    meta, spec, status = deployment["metadata"], deployment["spec"], deployment.get("status", {})
    version = _version_by_name(deployment)
    own = [p for p in pods if _label(p, LABEL_COMPONENT) == "triton" and _version(p) == version and not _leaving(p)]
    words = [w for w in (pod_words(p) for p in own) if w]
    words += [
        clean(c.get("message", ""))
        for c in status.get("conditions", [])
        if c["type"] == "ReplicaFailure" and c.get("status") == "True"
    ]
    progressing: Raw = next((c for c in status.get("conditions", []) if c["type"] == "Progressing"), {})
    annotations = meta.get("annotations", {})
    # What a pod of a former template suffers from may be the very thing that the present one fixes.
    content = _template_hash(spec["template"])
    troubles = [t for t in (pod_trouble(p) for p in own if _alive(p) and _template_hash(p) == content) if t]
    troubles.sort(key=lambda t: (SERIOUSNESS.index(t.reason), t.message))
    return ServingFacts(
        version=version or 0,
        revision=annotations.get(ANNOTATION_REVISION, ""),
        serving_hash=annotations.get(ANNOTATION_SERVING_HASH, ""),
        replicas=spec.get("replicas", 1),
        ready=status.get("readyReplicas", 0),
        updated=status.get("updatedReplicas", 0),
        total=status.get("replicas", 0),
        current=status.get("observedGeneration", 0) >= meta.get("generation", 0),
        deadline_exceeded=progressing.get("reason") == "ProgressDeadlineExceeded",
        words=words[0] if words else None,
        trouble=troubles[0] if troubles else None,
        other_troubles=tuple(troubles[1:]),
        resource_version=meta["resourceVersion"],
    )


def route_facts(route: Raw, name: str) -> RouteFacts:
    """Accepted means: every Gateway that is named has accepted this very generation and found all its backends."""
    spec = route["spec"]
    generation = route["metadata"]["generation"]
    parents = route.get("status", {}).get("parents", [])
    accepted, reason, message = False, "AwaitingGateway", "no Gateway implementation has looked at the HTTPRoute yet"
    verdicts = [_parent_verdict(ref, parents, generation, route["metadata"]["namespace"]) for ref in spec.get("parentRefs", [])]
    if verdicts:
        accepted, reason, message = min(verdicts, key=lambda v: v[0])
    return RouteFacts(
        weights=read_weights(spec, name),
        spec=spec,
        resource_version=route["metadata"]["resourceVersion"],
        accepted=accepted,
        reason=reason,
        message=message,
        created=route["metadata"].get("creationTimestamp", ""),
        overlaps=_overlaps(parents),
    )


def claims(cache: Cache, key: Key, routing: Routing | None, objects: Mapping[Key, Raw]) -> tuple[Claim, ...]:
    """Who else has a host name that this ModelDeployment wants, on the same Gateway; the oldest route first.

    `objects`: all ModelDeployments. One whose route was deleted a moment ago still has its names.
    """
    if routing is None:
        return ()
    refs = [ref.model_dump(mode="json", by_alias=True, exclude_none=True) for ref in routing.parent_refs]
    mine = cache.children(ROUTE, key).get(key[1], {}).get("spec", {})
    routes = {
        owner: (route["metadata"].get("creationTimestamp", ""), route.get("spec", {})) for owner, route in cache.every(ROUTE)
    }
    for owner, obj in objects.items():
        if owner not in routes and obj.get("status", {}).get("weights", {}).get("desired"):
            routes[owner] = (NO_ROUTE, obj["spec"].get("routing", {}))
    found = []
    for owner, (created, spec) in routes.items():
        theirs, wanted = spec.get("parentRefs", []), set(routing.hostnames) & _hosts(spec)
        if owner != key and wanted and _meet(refs, key[0], theirs, owner[0]):
            held = bool(_hosts(mine) & wanted) and _meet(mine.get("parentRefs", []), key[0], theirs, owner[0])
            found.append(Claim("/".join(owner), created, frozenset(wanted), held))
    return tuple(sorted(found, key=lambda claim: (claim.created, claim.owner)))


def _hosts(spec: Raw) -> set[str]:
    return set(spec.get("hostnames", []))


def _meet(ours: Iterable[Raw], namespace: str, theirs: Iterable[Raw], their_namespace: str) -> bool:
    """Whether both routes are for one listener of a Gateway: one that names none is for all."""

    def one(a: Raw, b: Raw) -> bool:
        same = (a["name"], a.get("namespace", namespace)) == (b["name"], b.get("namespace", their_namespace))
        return same and all(a.get(part) is None or b.get(part) is None or a[part] == b[part] for part in ("sectionName", "port"))

    theirs = list(theirs)
    return any(one(a, b) for a in ours for b in theirs)


def _overlaps(parents: Iterable[Raw]) -> tuple[str, ...]:
    """Routes that a Gateway calls in the way of this one, as Envoy Gateway does: of HTTPRoutes the name alone."""
    said = [
        c.get("message", "") for p in parents for c in p.get("conditions", []) if c["type"] == OVERLAP and c["status"] == "True"
    ]
    return tuple(sorted({name for text in said for name in _ROUTE_NAME.findall(text)}))


def _parent_verdict(ref: Raw, parents: Iterable[Raw], generation: int, namespace: str) -> tuple[bool, str, str]:
    """What is said of one parentRef; of several voices (a former controller's entry may linger) the best one."""

    def place(parent: Raw) -> tuple[Any, ...]:
        return parent["name"], parent.get("namespace", namespace), parent.get("sectionName"), parent.get("port")

    label = f"Gateway {ref.get('namespace', namespace)}/{ref['name']}"
    verdicts = [_voice(parent, generation, label) for parent in parents if place(parent["parentRef"]) == place(ref)]
    if not verdicts:
        return False, "AwaitingGateway", f"{label} has not answered: does it exist, and does its listener admit this namespace?"
    return max(verdicts, key=lambda verdict: (verdict[0], verdict[1] != "AwaitingGateway"))


def _voice(parent: Raw, generation: int, label: str) -> tuple[bool, str, str]:
    conditions = {c["type"]: c for c in parent.get("conditions", [])}

    def words(condition: Raw) -> str:
        return clean(condition.get("message") or condition["reason"])

    for kind in ("Accepted", "ResolvedRefs"):
        condition = conditions.get(kind)
        if condition is None or condition.get("observedGeneration", 0) < generation:
            return False, "AwaitingGateway", f"{label} has not taken in the newest weights yet"
        if condition["status"] != "True":
            return False, condition["reason"], f"{label}: {words(condition)}"
    dropped = conditions.get("PartiallyInvalid", {})
    if dropped.get("status") == "True" and dropped.get("observedGeneration", 0) >= generation:
        # The route counts as accepted, but the Gateway left out a rule that it does not understand.
        return False, dropped["reason"], f"{label} takes the route in part only: {words(dropped)}"
    return True, "Accepted", f"{label} has accepted the route"


# --- the pods' own words -------------------------------------------------------------------------------------------------


def pod_words(pod: Raw) -> str | None:
    """What keeps this pod from its work, in the words of the scheduler, the kubelet or the container itself."""
    said = _pod_words(pod)
    return clean(said) if said else None


def _pod_words(pod: Raw) -> str | None:
    status = pod.get("status", {})
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return f"Unschedulable: {condition.get('message', '')}"
    if status.get("phase") == "Failed" and status.get("reason") == "Evicted":
        # Its containers were killed for it, which says less.
        return f"Evicted: {status.get('message', '')}".strip(": \n")
    said = None
    limits = _memory_limits(pod)
    for container in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])):
        said = said or _container_words(container, limits.get(container["name"]))
    if said:
        return said
    containers = {c["name"]: c for c in status.get("containerStatuses", [])}
    golden = containers.get("golden", {})
    if containers.get("triton", {}).get("ready") and not golden.get("ready") and golden.get("state", {}).get("running"):
        return f"Triton is ready and the golden check runs: kubectl logs {pod['metadata']['name']} -c golden tells how far it is"
    if status.get("phase") == "Failed":
        return status.get("message") or status.get("reason") or "the pod failed"
    return None


_MEMORY_FIELDS = {
    "convert": "builder.resources.limits.memory",
    "prove": "builder.resources.limits.memory",
    "triton": "runtime.resources.limits.memory",
}
"""Where the user says a container's memory limit; that of the others is fixed."""


def _memory_limits(pod: Raw) -> dict[str, str]:
    spec = pod.get("spec", {})
    found = {
        container["name"]: container.get("resources", {}).get("limits", {}).get("memory")
        for container in (*spec.get("initContainers", []), *spec.get("containers", []))
    }
    return {name: str(limit) for name, limit in found.items() if limit is not None}


def _killed_for_memory(name: str, limit: str | None) -> str:
    within = f", of which it may have {limit}" if limit else ""
    field = _MEMORY_FIELDS.get(name)
    return f"{name} was killed for want of memory{within} (OOMKilled): " + (
        f"raise {field}"
        if field
        else "Perch sets this limit. Please report it, with the shapes of the version's inputs and outputs"
    )


def _container_words(container: Raw, memory: str | None = None) -> str | None:
    name = container["name"]
    state = container.get("state", {})
    ended = state.get("terminated") or (container.get("lastState") or {}).get("terminated") or {}
    waiting = state.get("waiting") or {}
    if ended.get("exitCode", 0) == 0:
        ended = {}
    if ended.get("reason") == "OOMKilled":
        return _killed_for_memory(name, memory)
    message = _error_message(name, ended.get("message")) if ended else None
    if waiting.get("reason") in (None, "PodInitializing", "ContainerCreating"):
        return f"{name} ended with code {ended['exitCode']}: {message or ended.get('reason', '')}" if ended else None
    if waiting["reason"] == "CrashLoopBackOff" and ended:
        return f"{name} crashes again and again (CrashLoopBackOff), code {ended.get('exitCode')}: {message or ''}"
    return f"{name}: {waiting['reason']}: {waiting.get('message', '')}"


def pod_trouble(pod: Raw) -> PodTrouble | None:
    """The most serious of what speaks against the pod's version now.

    Only of containers that are not ready. Restarts and last states stay in a pod's status as long as it lives, and there is no
    clock here to tell an hour from a month; who is ready again has got over them, and a pod that is kept for inspection must not
    condemn the next try unheard. Nothing is missed by it: a model loads for seconds before its pod is ready, and each change of
    a pod wakes a pass.
    """
    status = pod.get("status", {})
    containers = {c["name"]: c for c in status.get("containerStatuses", [])}
    triton, golden = containers.get("triton", {}), containers.get("golden", {})
    for found in (_mismatch(pod, golden), _killed_or_crashing(pod, triton), _unschedulable(pod), _lost_readiness(pod)):
        if found is not None:
            return replace(found, message=clean(f"pod {pod['metadata']['name']}: {found.message}"))
    return None


def _mismatch(pod: Raw, golden: Raw) -> PodTrouble | None:
    summary = _read_summary("golden", _end(pod, golden).get("message"))
    if summary is None or summary.error is None or summary.error.reason is not Reason.GOLDEN_MISMATCH:
        return None
    return PodTrouble("GoldenMismatch", summary.error.message, _time(_end(pod, golden).get("finishedAt")))


def _killed_or_crashing(pod: Raw, triton: Raw) -> PodTrouble | None:
    end = _end(pod, triton)
    if end.get("reason") == "OOMKilled":
        said = "triton was killed for want of memory: raise runtime.resources.limits.memory"
        return PodTrouble("OutOfMemory", said, _time(end.get("finishedAt")))
    backing_off = (triton.get("state", {}).get("waiting") or {}).get("reason") == "CrashLoopBackOff"
    again = triton.get("restartCount", 0) >= 2 and bool(end) and _lasted(end) < LOOP
    if not (backing_off or again):
        return None
    return PodTrouble("CrashLoop", _again_and_again(end), _time(end.get("finishedAt")))


def _again_and_again(end: Raw) -> str:
    """How triton ends each time. Code 0 is no crash: somebody asked it to end, and it did."""
    if not end:
        return "triton crashes again and again"
    if end.get("exitCode") == 0:
        return "triton is stopped and started again and again (last code 0): does its liveness probe fail? kubectl describe tells"
    said = _error_message("triton", end.get("message")) or end.get("reason", "")
    return f"triton crashes again and again, last with code {end.get('exitCode')}: {said}"


def _unschedulable(pod: Raw) -> PodTrouble | None:
    scheduled = _condition(pod, "PodScheduled")
    if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable":
        return PodTrouble("Unschedulable", scheduled.get("message") or "no node takes it")
    return None


def _lost_readiness(pod: Raw) -> PodTrouble | None:
    """All containers run, and the pod was ready since they started: else it is only on its way, which may take a while."""
    containers = pod.get("status", {}).get("containerStatuses", [])
    if not containers or all(c.get("ready") for c in containers) or not all(_was_ready(pod, c) for c in containers):
        return None
    unready = _condition(pod, "Ready")
    return PodTrouble("NotReady", f"not ready since {unready['lastTransitionTime']}: {unready.get('message', '')}")


def _end(pod: Raw, container: Raw) -> Raw:
    """How the container last ended, where it has not been ready since; empty if it has, or never ended."""
    ended: Raw = container.get("state", {}).get("terminated") or {}
    if ended or container.get("ready") or _was_ready(pod, container):
        return ended
    before: Raw = (container.get("lastState") or {}).get("terminated") or {}
    return before


def _was_ready(pod: Raw, container: Raw) -> bool:
    """Whether the pod was ready during the container's present run, though it is not now.

    A container that ends makes its pod unready before it is started again, so a pod that became unready later had been ready.
    """
    running = container.get("state", {}).get("running") or {}
    ready = _condition(pod, "Ready")
    since, started = _time(ready.get("lastTransitionTime")), _time(running.get("startedAt"))
    return ready.get("status") == "False" and since is not None and started is not None and since > started


def _lasted(end: Raw) -> timedelta:
    """How long a container's run lasted; no time where the kubelet does not know."""
    started, finished = _time(end.get("startedAt")), _time(end.get("finishedAt"))
    return finished - started if started and finished else timedelta()


def _condition(pod: Raw, kind: str) -> Raw:
    return next((c for c in pod.get("status", {}).get("conditions", []) if c["type"] == kind), {})


def _template_hash(obj: Raw) -> str | None:
    found: str | None = obj.get("metadata", {}).get("annotations", {}).get(ANNOTATION_SERVING_HASH)
    return found


def _error_message(container: str, text: str | None) -> str | None:
    """The sentence in a termination message: the exporter's summary, or the most telling line of a log."""
    if not text:
        return None
    summary = _read_summary(container, text)
    if summary is None:
        return _telling_line(text)
    return f"{summary.error.message} ({summary.error.reason.value})" if summary.error else None


_FATAL = re.compile(
    r"Signal \(\d+\) received|terminate called|Segmentation fault|Bus error|std::bad_alloc|Fatal Python error|^panic:|"
    r"out of memory"
)
"""What a process says first when it dies; a backtrace follows."""
_ERROR = re.compile(r"^[EF]\d{4} |^error:|^\w*(Error|Exception)\b|\b(ERROR|CRITICAL|FATAL)\b")
_NOISE = re.compile(r"^\s*(#?\d+#? |at |File \"|\^|[+|=-]{3})|^\s*[|+]")
"""A frame of a backtrace, a caret under a line of code, a table."""


def _telling_line(log: str) -> str | None:
    """Why a process ended, from the end of its log: what killed it, else its last error, else its last words.

    A backtrace comes after the line that names the signal, and threads that are still running go on to log.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    spoken = [line for line in lines if not _NOISE.search(line)]
    fatal = [line for line in spoken if _FATAL.search(line)]
    errors = [line for line in spoken if _ERROR.search(line)]
    found = fatal[:1] or errors[-1:] or spoken[-1:] or lines[-1:]
    return found[0][:500] if found else None


def _summary(pod: Raw) -> Summary | None:
    status = pod.get("status", {})
    for container in (*status.get("containerStatuses", []), *status.get("initContainerStatuses", [])):
        ended = container.get("state", {}).get("terminated") or {}
        summary = _read_summary(container["name"], ended.get("message"))
        if summary is None:
            continue
        # Only publish speaks for the whole. Convert may run somebody's code: a success that it claims is worth nothing.
        if summary.outcome is Outcome.FAILED or container["name"] == "publish":
            return summary
    return None


def _read_summary(container: str, text: str | None) -> Summary | None:
    """What a container of the exporter's says of itself; None if it says nothing of that form.

    Convert runs somebody's code and may write anything. So the words are cleaned, the step is the container's, and whether
    another try may help follows from the reason.
    """
    try:
        summary = Summary.from_json(text or "")
    except ValidationError:
        return None
    error, steps = summary.error, [step.value for step in Step]
    if error is not None:
        step = Step(container) if container in steps else error.step
        said = {"message": clean(error.message), "step": step, "retryable": error.reason.retryable}
        error = error.model_copy(update=said)
    return summary.model_copy(
        update={"error": error, "parity": _with_clean_words(summary.parity), "accuracy": _with_clean_words(summary.accuracy)}
    )


Figures = TypeVar("Figures", Parity, Accuracy)


def _with_clean_words(figures: Figures | None) -> Figures | None:
    return figures and figures.model_copy(update={"message": clean(figures.message)})


def _label(obj: Raw, name: str) -> str:
    return str(obj["metadata"].get("labels", {}).get(name, ""))


def _version(obj: Raw) -> int | None:
    text = _label(obj, LABEL_VERSION)
    return int(text) if text.isdigit() else None


def _version_by_name(obj: Raw) -> int | None:
    """A child's name cannot be edited, its labels can."""
    by_name = version_of(owner_name(obj), obj["metadata"]["name"])
    return by_name if by_name is not None else _version(obj)


def _revision(obj: Raw) -> str:
    return str(obj["metadata"].get("annotations", {}).get(ANNOTATION_REVISION, ""))


def _alive(pod: Raw) -> bool:
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


def _leaving(obj: Raw) -> bool:
    return "deletionTimestamp" in obj["metadata"]


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None

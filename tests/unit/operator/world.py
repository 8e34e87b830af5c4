"""A small stand-in for a cluster, for the planner's tests: it holds what plans write and lets tests say what happens next.

It leaves out: scheduling, rolling updates pod by pod, watches and their delays, API validation, collection, the data plane.
Those are tested on the real cluster in tests/e2e.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from perch.api import GROUP, Phase, Spec, Status, Tally
from perch.builders.route import read_weights
from perch.evidence import Batch, Gathered
from perch.names import ANNOTATION_EXPORT_HASH, ANNOTATION_REVISION, ANNOTATION_SERVING_HASH, LABEL_COMPONENT, LABEL_VERSION
from perch.observed import Claim, Identity, Installation, JobFacts, JobState, Observed, RouteFacts, ServingFacts
from perch.plan import Apply, Delete, Plan, Scale, SetFinalizer, plan
from perch_exporter.contract import Accuracy, ErrorReport, Outcome, Reason, Step, Summary, Tooling

START = datetime(2026, 1, 1, tzinfo=UTC)
INSTALLATION = Installation("test-cluster", "exporter:1", "artifacts:1", "triton:1")


def entry(version: int, **more: Any) -> dict[str, Any]:
    return {
        "version": version,
        "checkpoint": {"uri": f"s3://checkpoints/digits/v{version}.pt", "format": "StateDict", "sha256": f"{version:064x}"},
        "architecture": {"name": "lenet5"},
        "inputs": [{"name": "image", "dataType": "FP32", "shape": [1, 28, 28]}],
        "outputs": [{"name": "logits", "dataType": "FP32", "shape": [10]}],
        **more,
    }


def spec(*versions: int, stable: int = 1, canary: int | None = None, weight: int = 10, **more: Any) -> Spec:
    """A spec with these versions and a fixed split; `more` replaces whole top-level fields."""
    step = {"weight": weight, "hold": "Indefinite"} if weight < 100 else {"weight": 100}
    return Spec.model_validate(
        {
            "repository": {"uri": "s3://models/prod", "credentialsSecretRef": {"name": "s3"}},
            "versions": [entry(v) for v in versions],
            "traffic": {"stable": stable} | ({"canary": canary} if canary else {}),
            "rollout": {"steps": [step], "scaleDownDelay": "1m"},
            "routing": {"parentRefs": [{"name": "gateway"}], "hostnames": ["digits.example.com"]},
            **more,
        }
    )


@dataclass
class World:
    spec: Spec
    status: Status = field(default_factory=Status)
    now: datetime = START
    generation: int = 1
    finalizers: tuple[str, ...] = ()
    deleting: bool = False
    deleting_since: datetime = START
    jobs: dict[str, JobFacts] = field(default_factory=dict)
    servings: dict[int, ServingFacts] = field(default_factory=dict)
    services: dict[str, Any] = field(default_factory=dict)
    budgets: dict[str, Any] = field(default_factory=dict)
    route: RouteFacts | None = None
    lingering: set[str] = field(default_factory=set)
    """Revisions whose export pods outlive their Job for a while."""
    gateway_api: bool = True
    gateway_accepts: bool = True
    claims: tuple[Claim, ...] = ()
    namespace_terminating: bool = False
    tooling: Tooling | None = None
    """What the exports' summaries say that they were made with."""
    written_weights: list[dict[int, int]] = field(default_factory=list)
    rendered: list[str] = field(default_factory=list)
    """Names of Deployments that were rendered (not scaled), in order."""
    plans: list[Plan] = field(default_factory=list)
    autoscalers: dict[str, Any] = field(default_factory=dict)
    policies: dict[str, Any] = field(default_factory=dict)
    accuracies: dict[int | None, Accuracy] = field(default_factory=dict)
    """What the exports of a version find."""
    gates: dict[str, Any] = field(default_factory=dict)
    """What any export's summary says of the gates, passed or failed."""
    gathered: Gathered | None = None
    gathering_since: datetime = START
    life: str = "life"
    looks: int = 0
    watching_since: datetime | None = None

    @property
    def identity(self) -> Identity:
        return Identity(
            "vision", "digits", "uid-1", self.generation, "1", self.finalizers, self.deleting_since if self.deleting else None
        )

    def observe(self) -> Observed:
        jobs = self.jobs.values()
        return Observed(
            exports=tuple(j for j in jobs if not j.name.endswith("-delete")),
            cleanups=tuple(j for j in jobs if j.name.endswith("-delete")),
            servings=dict(self.servings),
            exporting=frozenset(self.lingering)
            | {j.revision for j in jobs if j.state is JobState.RUNNING and not j.name.endswith("-delete")},
            services=dict(self.services),
            budgets=dict(self.budgets),
            route=self.route,
            gateway_api=self.gateway_api,
            claims=self.claims,
            namespace_terminating=self.namespace_terminating,
            autoscalers=dict(self.autoscalers),
            policies=dict(self.policies),
            gathered=self._gathered(),
            watching_since=self.watching_since,
        )

    def _gathered(self) -> Gathered | None:
        """What was gathered, and how long ago the last of it."""
        found = self.gathered
        if found is None:
            return None
        aim = self.plans[-1].aim
        due = [aim.not_before + aim.behind] if aim is not None else []
        last = found.batches[-1].until if found.batches else max([found.since, *due])
        return replace(found, seen=bool(found.batches), silent=max(self.now - last, timedelta()))

    def think(self) -> Plan:
        return plan(self.identity, self.spec, self.status, self.observe(), INSTALLATION, self.now)

    def step(self, writes: int | None = None) -> Plan:
        """One pass. With `writes` the operator dies after so many actions, before it writes the status."""
        decided = self.think()
        self.plans.append(decided)
        if decided.first is not None:
            self.status = Status.model_validate(decided.first.model_dump(by_alias=True, mode="json"))
        for action in decided.actions[:writes]:
            self._do(action)
        if writes is None and decided.status is not None:
            self.status = Status.model_validate(decided.status.model_dump(by_alias=True, mode="json"))
        return decided

    def feed(self, stable: tuple[int, int] = (900, 0), canary: tuple[int, int] = (100, 0), seconds: int = 3, **more: Any) -> None:
        """Traffic for some seconds, as the gatherer would report it: requests and failures of each version. Only where the last
        pass asked for it."""
        aim = self.plans[-1].aim
        since, self.now = self.now, self.now + timedelta(seconds=seconds)
        if aim is None:
            self.gathered = None
            return
        self.looks += 1
        described: dict[str, Any] = {"life": self.life, "number": self.looks} | more
        batch = Batch(
            since,
            self.now,
            Tally(requests=stable[0], failures=stable[1]) if aim.stable is not None else Tally(),
            Tally(requests=canary[0], failures=canary[1], failed_executions=canary[1]),
            **described,
        )
        former = self.gathered.batches if self.gathered and self.gathered.epoch == aim.epoch else ()
        self.gathered = Gathered(aim.epoch, self.gathering_since, (*former, batch))

    def restart(self) -> None:
        """The operator dies and starts again: what it had gathered and not written down is lost."""
        self.gathered, self.gathering_since = None, self.now
        self.life, self.looks, self.watching_since = f"life {self.now}", 0, self.now

    def settle(self, passes: int = 240) -> None:
        """Let everything go well, time and traffic included, until a pass changes nothing and waits for nothing.

        A canary that is held is judged for ever: that nothing has moved for a while is the end of it.
        """
        idle = 0
        for _ in range(passes):
            before = self.status
            decided = self.step()
            moved = self.go_well()
            if decided.actions or moved or (self.status.step, self.status.conditions) != (before.step, before.conditions):
                idle = 0
                continue
            idle += 1
            if decided.aim is not None and decided.wake_at is not None and idle < 30:
                self.feed((3600, 0), (400, 0), seconds=30)
                continue
            if decided.aim is not None:
                return
            if decided.wake_at is None:
                return
            self.now = max(self.now + timedelta(seconds=1), decided.wake_at)
        raise AssertionError(f"never settles: {decided.actions} {decided.wake_at}")

    def settle_pods(self) -> None:
        """Jobs succeed and pods become ready, whatever the Gateway does."""
        for _ in range(6):
            self.step()
            self.go_well()

    def go_well_except_pods(self) -> None:
        for name, job in self.jobs.items():
            if job.state is JobState.RUNNING:
                self.finish(name)

    def go_well(self) -> bool:
        """Jobs succeed, pods become ready, the Gateway accepts. Returns whether anything moved."""
        before = (dict(self.jobs), dict(self.servings), self.route)
        for name, job in self.jobs.items():
            if job.state is JobState.RUNNING:
                self.finish(name)
        for version in self.servings:
            self.ready(version)
        self.accept()
        return before != (self.jobs, self.servings, self.route)

    def finish(self, name: str) -> None:
        job = self.jobs[name]
        summary = None
        if not name.endswith("-delete"):
            summary = Summary(
                **{"accuracy": self.accuracies.get(job.version)} | self.gates,
                outcome=Outcome.PUBLISHED,
                artifact_uri=f"s3://models/{name}",
                artifact_digest=f"sha256:{job.revision * 8}",
                tooling=self.tooling,
            )
        self.jobs[name] = replace(job, state=JobState.SUCCEEDED, summary=summary, finished_at=self.now)

    def fail(self, name: str, reason: Reason, message: str = "no such thing") -> None:
        report = ErrorReport(reason=reason, message=message, retryable=reason.retryable, step=Step.FETCH)
        summary = Summary(outcome=Outcome.FAILED, error=report, **self.gates)
        self.jobs[name] = replace(self.jobs[name], state=JobState.FAILED, summary=summary, finished_at=self.now)

    def ready(self, version: int, pods: int | None = None, **more: Any) -> None:
        serving = self.servings[version]
        pods = serving.replicas if pods is None else pods
        self.servings[version] = replace(
            serving, **{"ready": pods, "updated": serving.replicas, "total": serving.replicas, **more}
        )

    def accept(self) -> None:
        if self.route is not None and self.gateway_accepts:
            self.route = replace(self.route, accepted=True, reason="Accepted", message="accepted")

    @property
    def weights(self) -> dict[int, int]:
        return {v: w for v, w in self.route.weights.items() if w > 0} if self.route else {}

    def phase(self, version: int) -> Phase | None:
        known = self.status.of(version)
        return known.phase if known else None

    def ready_condition(self) -> tuple[str, str]:
        condition = self.status.condition("Ready")
        assert condition is not None
        return condition.status, condition.reason

    def _do(self, action: Any) -> None:
        match action:
            case Apply(body=body):
                getattr(self, "_apply_" + body["kind"].lower())(body, body["metadata"])
            case Scale(name=name, replicas=replicas):
                version = int(name.rsplit("v", 1)[1])
                former = self.servings[version]
                needed = math.ceil(self.spec.runtime.replicas * self.weights.get(version, 0) / 100)
                within = self.spec.rollout is not None and self.spec.rollout.surge == "WithinReplicas"
                assert replicas >= min(needed, former.replicas) or within, f"version {version} has traffic for {needed} pods"
                left = {field: min(replicas, getattr(former, field)) for field in ("ready", "updated", "total")}
                self.servings[version] = replace(former, replicas=replicas, **left)
            case Delete(kind="Job", name=name):
                self.jobs.pop(name, None)
            case Delete(kind="Deployment", name=name):
                version = int(name.rsplit("v", 1)[1])
                assert self.weights.get(version, 0) == 0, f"version {version} was removed while it had traffic"
                assert self.route is None or version not in self.route.weights, "pods went before their backend left the route"
                self.servings.pop(version, None)
            case Delete(kind="Service", name=name):
                self.services.pop(name, None)
            case Delete(kind="PodDisruptionBudget", name=name):
                self.budgets.pop(name, None)
            case Delete(kind="HorizontalPodAutoscaler", name=name):
                self.autoscalers.pop(name, None)
            case Delete(kind="NetworkPolicy", name=name):
                self.policies.pop(name, None)
            case Delete(kind="HTTPRoute"):
                self.route = None
            case SetFinalizer(present=present):
                self.finalizers = (f"{GROUP}/artifacts",) if present else ()
            case _:
                raise AssertionError(action)

    def _apply_job(self, body: dict[str, Any], meta: dict[str, Any]) -> None:
        assert self.namespace_terminating is False
        version = int(meta["labels"][LABEL_VERSION])
        annotations = meta["annotations"]
        self.jobs.setdefault(
            meta["name"],
            JobFacts(
                meta["name"],
                annotations[ANNOTATION_REVISION],
                JobState.RUNNING,
                version,
                annotations.get(ANNOTATION_EXPORT_HASH),
            ),
        )

    def _apply_deployment(self, body: dict[str, Any], meta: dict[str, Any]) -> None:
        version = int(meta["labels"][LABEL_VERSION])
        old = self.servings.get(version)
        self.rendered.append(meta["name"])
        assert meta["labels"][LABEL_COMPONENT] == "triton"
        self.servings[version] = ServingFacts(
            version=version,
            revision=meta["annotations"][ANNOTATION_REVISION],
            serving_hash=meta["annotations"][ANNOTATION_SERVING_HASH],
            replicas=body["spec"]["replicas"],
            # A rolling update surges: the former pods stay until their successors are ready.
            ready=old.ready if old else 0,
            updated=1,
            total=(old.replicas if old else 0) + 1,
        )

    def _apply_service(self, body: dict[str, Any], meta: dict[str, Any]) -> None:
        self.services[meta["name"]] = body["spec"]

    def _apply_poddisruptionbudget(self, body: dict[str, Any], meta: dict[str, Any]) -> None:
        self.budgets[meta["name"]] = body["spec"]

    def _apply_horizontalpodautoscaler(self, body: dict[str, Any], meta: dict[str, Any]) -> None:
        self.autoscalers[meta["name"]] = body["spec"]

    def _apply_networkpolicy(self, body: dict[str, Any], meta: dict[str, Any]) -> None:
        self.policies[meta["name"]] = body["spec"]

    def _apply_httproute(self, body: dict[str, Any], meta: dict[str, Any]) -> None:
        weights = read_weights(body["spec"], "digits")
        before = self.weights
        assert sum(weights.values()) == 100, weights
        assert len([w for w in weights.values() if w]) <= 2, weights
        for version, weight in weights.items():
            if weight > before.get(version, 0):
                assert version in self.servings, f"{weight} % for version {version}, which does not run"
                assert self.servings[version].ready > 0, f"{weight} % for version {version}, which has no ready pod"
        assert body["spec"]["rules"][0]["backendRefs"][0]["weight"] == body["spec"]["rules"][1]["backendRefs"][0]["weight"]
        if self.route is None or weights != self.route.weights:
            self.written_weights.append(dict(weights))
        self.route = RouteFacts(weights, body["spec"], "2", False, "AwaitingGateway", "not yet")

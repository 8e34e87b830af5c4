"""What the planner sees: typed, frozen facts about one ModelDeployment and its children. `observe` fills them in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from perch.evidence import Gathered
from perch.foreign import clean
from perch_exporter.contract import Summary


@dataclass(frozen=True)
class Identity:
    """The ModelDeployment itself, less its spec and status."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    finalizers: tuple[str, ...] = ()
    deleting_since: datetime | None = None


@dataclass(frozen=True)
class Installation:
    """What the operator's own installation decides: images for new children, and the cluster's lasting name."""

    cluster: str
    exporter_image: str
    artifacts_image: str
    triton_image: str
    image_pull_policy: str | None = None


@dataclass(frozen=True)
class Fault:
    """A part of a pass that failed, by a defect or by an object that nobody expected. The rest of the pass went on without it."""

    part: str
    error: Exception

    def __str__(self) -> str:
        # An address in memory is another in every pass: the status would change, and wake the next pass, without end.
        said = re.sub(r"\b0x[0-9a-f]+", "0x…", str(self.error))
        return clean(f"{self.part}: {said or 'no reason given'} ({type(self.error).__name__})")


class JobState(StrEnum):
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


@dataclass(frozen=True)
class JobFacts:
    """An export or cleanup Job, with its pods' last words."""

    name: str
    revision: str
    state: JobState
    version: int | None = None
    export_hash: str | None = None
    """What the Job is made of; none for a cleanup."""
    summary: Summary | None = None
    words: str | None = None
    late: bool = False
    """Its deadline ended it. Its pods are gone then, with what they last said."""
    finished_at: datetime | None = None


@dataclass(frozen=True)
class PodTrouble:
    """What a version's pods say against it, in the pod's own words."""

    reason: Literal["CrashLoop", "OutOfMemory", "GoldenMismatch", "Unschedulable", "NotReady"]
    message: str
    at: datetime | None = None
    """When the container ended that it is about, by its node's clock: it tells this end from another, and nothing else."""


@dataclass(frozen=True)
class ServingFacts:
    """One version's Triton Deployment and its pods."""

    version: int
    revision: str
    serving_hash: str
    replicas: int
    ready: int = 0
    updated: int = 0
    """Pods of the present template, ready or not."""
    total: int = 0
    """Pods of any template."""
    current: bool = True
    """The Deployment controller has seen the present generation."""
    deadline_exceeded: bool = False
    words: str | None = None
    trouble: PodTrouble | None = None
    """The most serious of what is wrong with pods of the present template now."""
    other_troubles: tuple[PodTrouble, ...] = ()
    """What is wrong with other pods of it."""
    resource_version: str | None = None
    """The Deployment's."""
    readable: bool = True
    """Else nothing but its name and its ready pods is known: it is left as it is."""

    @property
    def troubles(self) -> tuple[PodTrouble, ...]:
        """All of them, the most serious first."""
        return (self.trouble, *self.other_troubles) if self.trouble is not None else ()

    @property
    def full(self) -> bool:
        """Every pod that is wanted is ready: the version may be given more traffic."""
        return self.current and self.replicas > 0 and self.ready >= self.replicas

    @property
    def able(self) -> bool:
        """At least one pod is ready: the traffic that it has is answered."""
        return self.ready > 0

    @property
    def uniform(self) -> bool:
        """No pod of a former template is left."""
        return self.total == self.updated

    @property
    def rolled(self) -> bool:
        """Every pod runs the present template and is ready; a pending one beside a ready former one does not count."""
        return self.full and self.updated >= self.replicas and self.uniform


@dataclass(frozen=True)
class RouteFacts:
    """The HTTPRoute: its weights as they stand, and whether every Gateway has accepted them."""

    weights: Mapping[int, int]
    spec: Mapping[str, Any]
    resource_version: str
    accepted: bool
    reason: str
    message: str
    created: str = ""
    overlaps: tuple[str, ...] = ()
    """`namespace/name` of HTTPRoutes that ask for the same requests, by a Gateway's own word; GRPCRoutes with their kind."""


@dataclass(frozen=True)
class Claim:
    """Another ModelDeployment's HTTPRoute for a host name that this one wants, on the same Gateway."""

    owner: str
    """`namespace/name`, of the route too."""
    created: str
    hostnames: frozenset[str]
    """Those that both want."""
    held: bool
    """This one's route, as it stands, has one of them as well."""


@dataclass(frozen=True)
class Unlabelled:
    """A child that lost labels by which it is found, and what they are."""

    kind: str
    name: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Observed:
    exports: tuple[JobFacts, ...] = ()
    cleanups: tuple[JobFacts, ...] = ()
    servings: Mapping[int, ServingFacts] = field(default_factory=dict)
    services: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Service specs by name."""
    budgets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """PodDisruptionBudget specs by name."""
    autoscalers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """HorizontalPodAutoscaler specs by name."""
    policies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """NetworkPolicy specs by name."""
    route: RouteFacts | None = None
    claims: tuple[Claim, ...] = ()
    exporting: frozenset[str] = frozenset()
    """Artifact revisions whose export pods still run, even where their Job is gone already."""
    gateway_api: bool = True
    """The cluster knows HTTPRoute."""
    namespace_terminating: bool = False
    unreadable: tuple[Fault, ...] = ()
    """Children that could not be read: the others are there all the same."""
    unlabelled: tuple[Unlabelled, ...] = ()
    watching_since: datetime | None = None
    """Since when the children have been watched without a break; None where that is not known to have been interrupted."""
    gathered: Gathered | None = None
    """Evidence about the canary, if any is being gathered."""

    def export_of(self, version: int, revision: str) -> JobFacts | None:
        return next((j for j in self.exports if j.version == version and j.revision == revision), None)

    def cleanup_of(self, revision: str) -> JobFacts | None:
        return next((j for j in self.cleanups if j.revision == revision), None)


def matches(wanted: Any, found: Any) -> bool:
    """Whether `found` holds all that `wanted` says; what others or the API server's defaults added does not count."""
    if isinstance(wanted, Mapping):
        return isinstance(found, Mapping) and all(k in found and matches(v, found[k]) for k, v in wanted.items())
    if isinstance(wanted, list):
        return isinstance(found, list) and len(wanted) == len(found) and all(map(matches, wanted, found))
    return bool(wanted == found)

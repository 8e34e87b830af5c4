"""What one pass knows and gathers, and what it may ask for. Lives within one call of `plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from pydantic import ValidationError

from perch.api import Spec, Status
from perch.evidence import Aim
from perch.names import artifact_uri
from perch.observed import Fault, Identity, Installation, Observed
from perch.status import Event


@dataclass(frozen=True)
class Apply:
    """Server-side apply. With `resource_version` it fails where somebody wrote in between.

    `fallback`: what to apply where the API server refuses the body.
    """

    body: Mapping[str, Any]
    resource_version: str | None = None
    fallback: Mapping[str, Any] | None = None


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
class Label:
    """Put labels back that somebody took off or changed. Nothing else of the object is touched."""

    kind: str
    name: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class SetFinalizer:
    present: bool


Action = Apply | Scale | Delete | Label | SetFinalizer
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    actions: tuple[Action, ...] = ()
    status: Status | None = None
    """The status to be; None where the object is about to go."""
    events: tuple[Event, ...] = ()
    """What no difference between two statuses tells; `build_events` tells the transitions."""
    wake_at: datetime | None = None
    aim: Aim | None = None
    """The evidence to gather from now on."""
    first: Status | None = None
    """Written before the actions: what an operator that dies between two of them must not have forgotten."""
    contests: bool = False
    """It waits for a host name that another ModelDeployment has."""
    faults: tuple[Fault, ...] = ()
    """Parts that raised: to be logged, counted, told in a condition and tried again after a while."""


@dataclass(frozen=True)
class Context:
    """The question of one pass, and the answer as it grows: the lists are filled by the parts of the planner."""

    identity: Identity
    spec: Spec
    status: Status
    observed: Observed
    installation: Installation
    now: datetime
    actions: list[Action] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    wakes: list[datetime] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def attempt(self, part: str, decide: Callable[[], T], otherwise: Callable[[], T]) -> T:
        """Run one part of the planner. If it raises, what it asked for is dropped and the other parts go on.

        The way back must not depend on a field that only another part reads: an abort and a revert reach the route whatever
        an export or a builder makes of the rest of the spec.
        """
        lists: tuple[list[Any], ...] = (self.actions, self.events, self.wakes)
        before = [len(each) for each in lists]
        try:
            return decide()
        except Exception as error:
            for each, length in zip(lists, before, strict=True):
                del each[length:]
            self.faults.append(Fault(part, error))
            return otherwise()

    @property
    def present(self) -> Mapping[int, int]:
        """Percent by version in the route as it stands, backends with 0 too."""
        return self.observed.route.weights if self.observed.route else {}

    @property
    def wake_at(self) -> datetime | None:
        return min(self.wakes, default=None)

    def prefix(self, version: int, revision: str) -> str:
        """Where the artefact of a version lies."""
        return artifact_uri(self.spec.repository.uri, self.identity.namespace, self.identity.name, version, revision)


def say_invalid(error: ValidationError, where: str = "") -> str:
    """The first few complaints of a validation, each with its field."""
    found = [f"{'.'.join(filter(None, (where, *map(str, e['loc']))))}: {e['msg']}" for e in error.errors()[:3]]
    return "; ".join(found)

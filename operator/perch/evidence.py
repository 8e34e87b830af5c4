"""Evidence about a canary as the edge brings it and the judge takes it in: typed, frozen, pure.

`counters` makes it, `judge` folds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from perch.api import Tally


@dataclass(frozen=True)
class Batch:
    """What became of requests between two looks at every pod of both versions, with the weights standing still.

    Counts are differences. A pod hangs that had requests in hand at the end of the batch and completed none in it.
    """

    since: datetime
    until: datetime
    stable: Tally
    canary: Tally
    hung: tuple[str, ...] = ()
    """The canary's pods that hang: `PodScrape.pod`."""
    stable_hung: tuple[str, ...] = ()
    """Stable's pods that hang."""
    largest: int | None = None
    """The most requests that one execution can have held; None where executions are not counted."""
    life: str = ""
    number: int = 0
    """Which look of which start of the operator this is. Wall clocks jump; these order batches."""


@dataclass(frozen=True)
class Reading:
    """One custom metric's value; None, with the reason, where Prometheus gave no usable one."""

    name: str
    at: datetime
    value: float | None
    trouble: str | None = None


@dataclass(frozen=True)
class Gathered:
    """What the running operator has gathered about one canary since `since`, for one `epoch` (weight, pods, acceptance)."""

    epoch: str
    since: datetime
    """When this process began to gather for this canary: a later time than status knows means a restart."""
    batches: tuple[Batch, ...] = ()
    """In order; those that status has taken in already may still be among them."""
    readings: Mapping[str, Reading] = field(default_factory=dict)
    trouble: str | None = None
    """Why no counts come: which pod or address, and what it said."""
    seen: bool = False
    """Whether a look succeeded since the process began to gather for this epoch."""
    silent: timedelta = timedelta()
    """How long none has succeeded, or since it should have begun to; by a clock that never jumps."""


@dataclass(frozen=True)
class Aim:
    """What the planner wants gathered. Another epoch begins with a new baseline: no batch spans a change of weights."""

    epoch: str
    model: str
    stable: int | None
    """None where stable has no traffic (weight 100): only the canary is looked at."""
    canary: int
    not_before: datetime
    """Proxies converge until then."""
    requests: str | None = None
    failures: str | None = None
    """PromQL with {{version}} and {{service}} still in it, in place of Triton's counters."""
    behind: timedelta = timedelta()
    """These may be from so long ago: a baseline sooner after `not_before` would be of the former weight."""
    address: str | None = None
    metrics: Mapping[str, str] = field(default_factory=dict)
    """PromQL by name with every variable but {{window}} filled in."""

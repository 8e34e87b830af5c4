"""Counters of a Triton pod, or of a Prometheus server, and the honest difference between two looks at them. Pure.

Stands between `gather`, which asks, and `judge`, which takes the differences in. A difference that might ascribe a request to the
wrong version or moment is not made at all (None): to look again costs seconds, while an invented failure could abort a canary.
What each failure looks like in these counters, and which are in none of them: docs/evidence.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import datetime, timedelta

from prometheus_client.parser import text_string_to_metric_families

from perch.api import Tally
from perch.evidence import Batch
from perch_exporter.contract import NETWORK, POSTPROCESS, PREPROCESS

MAX_SKEW = timedelta(milliseconds=250)
"""Pods that are read further apart than this show different moments: when something common to both versions begins to fail in
between, one version seems to fail alone. docs/judging.md has what the simulation says of it."""

SUCCESS = "nv_inference_request_success"
FAILURE = "nv_inference_request_failure"
PENDING = "nv_inference_pending_request_count"
REQUEST_TIME = "nv_inference_request_duration_us"
QUEUE_TIME = "nv_inference_queue_duration_us"
EXECUTIONS = "nv_inference_exec_count"
_NAMES = (SUCCESS, FAILURE, PENDING, REQUEST_TIME, QUEUE_TIME)
_OF_INNER = (FAILURE, PENDING, QUEUE_TIME)
CANCELED, REJECTED = "CANCELED", "REJECTED"
"""Reasons of failures that depend on how long requests wait, and so on how busy a pod is: a client gave one up in the queue, or
the queue's policy did. BACKEND and OTHER are the model's own errors."""


class CountersError(Exception):
    """The counters cannot be used; the text says what is missing. Holds nothing of what the other side wrote."""


@dataclass(frozen=True)
class Counters:
    """One version of one model in one Triton, since that Triton started."""

    succeeded: int
    failed: int
    cancelled: int
    pending: int
    """Requests in hand now; the others only grow."""
    request_microseconds: int
    queue_microseconds: int
    rejected: int = 0
    executions: int = 0
    """Failed ones too; 0 where Triton does not count them by model, as of an ensemble."""


@dataclass(frozen=True)
class PodScrape:
    pod: str
    """<name>/<start of its Triton>: counters begin at zero with each."""
    version: int
    counters: Counters


@dataclass(frozen=True)
class Scrape:
    """One look at all pods. Read the canary's pods first, then stable's: see `difference`."""

    since: datetime
    until: datetime
    pods: tuple[PodScrape, ...]

    @property
    def skewed(self) -> bool:
        """Whether the look took too long to be a look at one moment."""
        return self.until - self.since > MAX_SKEW


@dataclass(frozen=True)
class Totals:
    """What Prometheus said at one moment. The four queries must be asked for the same moment."""

    at: datetime
    stable_requests: float
    stable_failures: float
    canary_requests: float
    canary_failures: float


def vanished(before: Totals, after: Totals) -> bool:
    """Whether a version's requests fell to exactly 0. They may come back with all their history (`… or vector(0)`), which is no
    news; after a real reset, the first request ends it."""
    pairs = ((before.stable_requests, after.stable_requests), (before.canary_requests, after.canary_requests))
    return any(former > 0 and now == 0 for former, now in pairs)


def parse_counters(text: str, model: str, version: int) -> Counters:
    """Read what Triton's metrics endpoint answered. Raises CountersError.

    A version whose instances run on several GPUs has a line for each, told apart by gpu_uuid: they are added up.

    A version that takes pictures is an ensemble. Triton 2.51 counts each of its failures twice, as OTHER, and a picture that
    cannot be read is one of them. So what failed and what waits is read of the models behind it, where each failure is one, and
    what a client did wrong is none, as with tensors; what succeeded, and how long it took, is the ensemble's own.
    """
    sums: dict[str, float] = {}
    reasons: dict[str | None, float] = {}
    inner = [model + suffix for suffix in (PREPROCESS, NETWORK, POSTPROCESS)]
    ensemble = f'model="{model}{NETWORK}"' in text
    try:
        for name, labels, value in _samples(text, [model, *inner]):
            whose = inner if ensemble and name in _OF_INNER else [model]
            if labels.get("model") not in whose or labels.get("version") != str(version):
                continue
            if not math.isfinite(value):
                raise CountersError(f"{name} of model {model}, version {version} is no number")
            if name == FAILURE:
                reasons[labels.get("reason")] = reasons.get(labels.get("reason"), 0.0) + value
            sums[name] = sums.get(name, 0.0) + value
    except (ValueError, KeyError, IndexError):
        raise CountersError("the text is not in Prometheus' format") from None
    missing = [name for name in _NAMES if name not in sums]
    if missing:
        raise CountersError(f"no {', '.join(missing)} of model {model}, version {version}")
    cancelled, rejected = reasons.get(CANCELED, 0.0), reasons.get(REJECTED, 0.0)
    return Counters(
        succeeded=round(sums[SUCCESS]),
        failed=round(sums[FAILURE] - cancelled - rejected),
        cancelled=round(cancelled),
        rejected=round(rejected),
        executions=0 if ensemble else round(sums.get(EXECUTIONS, 0.0)),
        pending=max(0, round(sums[PENDING])),
        request_microseconds=round(sums[REQUEST_TIME]),
        queue_microseconds=round(sums[QUEUE_TIME]),
    )


def _samples(text: str, models: list[str]) -> Iterable[tuple[str, dict[str, str], float]]:
    """The samples that may be these models'. Only their lines are parsed: a Triton tells much else, and every few seconds."""
    marks = [f'"{model}"' for model in models]
    found = (line for line in text.splitlines() if line.startswith((*_NAMES, EXECUTIONS)) and any(mark in line for mark in marks))
    lines = "".join(f"{line}\n" for line in found)
    for family in text_string_to_metric_families(lines):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def difference(before: Scrape, after: Scrape, canary: int) -> Batch | None:
    """What happened between two looks; every version but `canary` counts as stable. None where it cannot be told:

    a pod came, went or restarted; a counter went back; a look took too long. Then the later look is the next one's `before`,
    unless it is the skewed one.

    When the canary is read before stable, stable's failures are never behind the canary's. A failure of something that both
    depend on then shows in stable's counters at the same look or an earlier one, and does not look like the canary's own.
    """
    if before.skewed or after.skewed:
        return None
    earlier = {pod.pod: pod for pod in before.pods}
    if {(pod.pod, pod.version) for pod in before.pods} != {(pod.pod, pod.version) for pod in after.pods}:
        return None
    stable, candidate = Tally(), Tally()
    hung: list[str] = []
    stable_hung: list[str] = []
    measured: list[Tally] = []
    for pod in after.pods:
        tally = _grown(earlier[pod.pod].counters, pod.counters)
        if tally is None:
            return None
        if tally.executions:
            measured.append(tally)
        # One by one: its siblings' answers would hide it.
        hangs = pod.counters.pending > 0 and not tally.requests
        if pod.version == canary:
            candidate = add(candidate, tally)
            hung += [pod.pod] if hangs else []
        else:
            stable = add(stable, tally)
            stable_hung += [pod.pod] if hangs else []
    largest = max((_largest(tally) for tally in measured), default=None)
    return Batch(before.until, after.until, stable, candidate, tuple(sorted(hung)), tuple(sorted(stable_hung)), largest)


def _grown(before: Counters, after: Counters) -> Tally | None:
    grown = {f.name: getattr(after, f.name) - getattr(before, f.name) for f in fields(Counters) if f.name != "pending"}
    if min(grown.values()) < 0:
        return None
    requests, failures, executions = grown["succeeded"] + grown["failed"], grown["failed"], grown["executions"]
    return Tally(
        requests=requests,
        failures=failures,
        rejections=grown["rejected"],
        cancellations=grown["cancelled"],
        executions=executions,
        failed_executions=_failed_executions(requests, failures, executions),
        request_microseconds=grown["request_microseconds"],
        queue_microseconds=grown["queue_microseconds"],
    )


def _failed_executions(requests: int, failures: int, executions: int) -> int:
    """How many executions failed, at least, of those that held these requests.

    An execution that did not fail held one of the requests that succeeded, so no more than these can be sound. Where each
    request was executed alone, that is exact. Executions that a dead backend never began are not counted: then one failed, at
    least.
    """
    return min(failures, max(1, executions - (requests - failures))) if failures else 0


def _largest(tally: Tally) -> int:
    """The most requests that one execution can have held: each of the others held one at least."""
    return max(1, tally.requests - tally.executions + 1)


def counter_batch(before: Totals, after: Totals) -> Batch | None:
    """What happened between two answers of Prometheus; None where a counter went back or is no number.

    Raises CountersError where the queries do not fit together. Prometheus tells neither times, cancellations nor what is pending:
    latency, cancellations and stalls are not judged by it.
    """
    stable = _counted(before.stable_requests, before.stable_failures, after.stable_requests, after.stable_failures)
    candidate = _counted(before.canary_requests, before.canary_failures, after.canary_requests, after.canary_failures)
    if stable is None or candidate is None:
        return None
    return Batch(before.at, after.at, stable, candidate)


def _counted(requests: float, failures: float, later_requests: float, later_failures: float) -> Tally | None:
    if not all(map(math.isfinite, (requests, failures, later_requests, later_failures))):
        return None
    if failures > requests or later_failures > later_requests:
        raise CountersError("failures exceed requests: the requests query must count failed ones too")
    grown, failed = round(later_requests - requests), round(later_failures - failures)
    if grown < 0 or failed < 0:
        return None
    # A failure may be counted before its request is, by the width of a scrape.
    return Tally(requests=max(grown, failed), failures=failed)


def add(one: Tally, other: Tally) -> Tally:
    """Both together."""
    return Tally(
        requests=one.requests + other.requests,
        failures=one.failures + other.failures,
        rejections=one.rejections + other.rejections,
        cancellations=one.cancellations + other.cancellations,
        executions=one.executions + other.executions,
        failed_executions=one.failed_executions + other.failed_executions,
        request_microseconds=one.request_microseconds + other.request_microseconds,
        queue_microseconds=one.queue_microseconds + other.queue_microseconds,
    )

"""The judge of a canary: takes evidence in, batch by batch, and says whether to abort, to pass or to wait for more. Pure.

Stands between `gather`, which brings batches of counts, and `plan`, which acts on the verdict. All it knows stands in
status.evidence, so a restart forgets nothing. docs/judging.md tells the statistics to an engineer; in short:

A test is a purse of money that bets against "this canary is no worse than tolerated". Each batch multiplies the stakes by
likelihood ratios whose mean is at most 1 if the canary is no worse, whatever the errors that hit both versions. Then the purse
passes 1/α with probability at most α, however often one looks (Ville's inequality). Bets on many sizes of harm, made at
many moments, are mixed (Robbins), so neither the size nor the beginning of the trouble needs to be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from fractions import Fraction

from perch.api import Analysis, Evidence, HungPod, MetricQuery, MetricStatus, Tally
from perch.counters import add
from perch.durations import parse_duration
from perch.evidence import Batch, Reading

POINTS = 32
MOST_ODDS = 1000.0
"""Bets are on odds of failing up to so many times those of stable, or of the maximum."""
NOTHING = -60.0
"""Natural logarithm of a stake too small to matter: JSON has no -inf. Adds less than 1e-15 to a purse in a billion batches."""
LATENCY_REQUESTS = 100
"""Answers on either side before mean times are compared."""
VIOLATIONS = 2
"""Readings out of bounds in a row that abort."""
STALE = timedelta(seconds=60)
"""Counts older than this say nothing about the canary of now: none passes by them."""
UNWATCHED = timedelta(seconds=10)
"""Between two batches, more than some lost looks: nobody knows what was completed then."""
HUNG_PODS = 8
"""So many of the canary's pods that hang are remembered, those that have hung longest: one of them is enough for an alarm."""
LARGEST = 2**31 - 1


class Kind(StrEnum):
    ABORT = "Abort"
    PASS = "Pass"  # noqa: S105
    INCONCLUSIVE = "Inconclusive"


@dataclass(frozen=True)
class Finding:
    """What the judge says: a CamelCase reason and a sentence for a human."""

    kind: Kind
    reason: str
    message: str


@dataclass(frozen=True)
class _Terms:
    """An analysis with its defaults, as numbers. α is split: one half for errors, a quarter each for the two others."""

    alpha: float
    tolerated: float
    max_error_rate: float
    needed: int
    stall_after: timedelta

    @classmethod
    def of(cls, analysis: Analysis) -> _Terms:
        rate = analysis.max_error_rate or "0.01"
        return cls(
            alpha=float(analysis.alpha or "0.05"),
            tolerated=float(analysis.tolerated_odds or "1.1"),
            max_error_rate=float(rate),
            needed=min(math.ceil(3 / Fraction(rate)), LARGEST),
            stall_after=parse_duration(analysis.stall_after or "30s"),
        )


def begin_step(evidence: Evidence, analysis: Analysis) -> Evidence:
    """Evidence at the start of a step: counts and readings of the step from nothing, the rest as it is."""
    fresh = {"step_stable": Tally(), "step_canary": Tally(), "needed": _Terms.of(analysis).needed, "metrics": []}
    return evidence.model_copy(update=fresh)


def take_in(evidence: Evidence, batch: Batch, analysis: Analysis, *, share: float, together: int = 1) -> Evidence:
    """Add a batch. One that is no later than what is in already changes nothing.

    share: the part of all counted requests that the canary is meant to get, weight / 100; 1: stable gets none by design;
    0: nothing is assigned at random, so nothing is compared. together: the most requests that can fail as one, the model's
    maxBatchSize where Triton batches dynamically (an error fails the whole batch), else 1.
    """
    if evidence.last_at is not None and batch.until <= datetime.fromisoformat(evidence.last_at):
        return evidence
    terms = _Terms.of(analysis)
    stable, canary = add(evidence.step_stable, batch.stable), add(evidence.step_canary, batch.canary)
    update: dict[str, object] = {
        "last_at": _stamp(batch.until),
        "stable": add(evidence.stable, batch.stable),
        "canary": add(evidence.canary, batch.canary),
        "step_stable": stable,
        "step_canary": canary,
        "needed": terms.needed,
        "hung": _hung(evidence, batch),
    }
    if 0 < share < 1:
        for name, count, whole in (("errors", _failures, _requests), ("cancellations", _cancellations, _sent)):
            part = _share(share, whole(canary), whole(stable))
            bad, other = count(batch.canary), count(batch.stable)
            if bad + other and part < 1:
                update[name] = _play(getattr(evidence, name), _odds_bets(part, bad, other, terms.tolerated, together))
    elif share >= 1 and batch.canary.requests:
        bets = _rate_bets(batch.canary.failures, batch.canary.requests, terms.max_error_rate, together)
        update["bound"] = _play(evidence.bound, bets)
    return evidence.model_copy(update=update)


def take_in_reading(evidence: Evidence, reading: Reading, query: MetricQuery) -> Evidence:
    """Add a custom metric's reading. One without a value neither excuses nor accuses."""
    former = next((m for m in evidence.metrics if m.name == reading.name), None)
    violations = former.violations if former else 0
    value, message = None, reading.trouble or "it has no value"
    if reading.value is not None and math.isfinite(reading.value):
        value = f"{reading.value:.6g}"
        message = _violated(reading.value, query)
        violations = violations + 1 if message else 0
    status = MetricStatus(name=reading.name, value=value, at=_stamp(reading.at), violations=violations, message=message or None)
    others = [status if m is former else m for m in evidence.metrics] if former else [*evidence.metrics, status]
    return evidence.model_copy(update={"metrics": others})


def judge(evidence: Evidence, analysis: Analysis, now: datetime) -> Finding:
    """What the evidence says of the canary now. An alarm comes before everything else."""
    terms = _Terms.of(analysis)
    for alarm in (
        _stall_alarm(evidence, terms),
        _error_alarm(evidence, terms),
        _bound_alarm(evidence, terms),
        _cancellation_alarm(evidence, terms),
        _latency_alarm(evidence, analysis),
        _metric_alarm(evidence, analysis),
    ):
        if alarm is not None:
            return Finding(Kind.ABORT, *alarm)
    lack = _lack(evidence, analysis, terms, now)
    if lack is not None:
        return Finding(Kind.INCONCLUSIVE, *lack)
    return Finding(Kind.PASS, "Passed", f"no alarm: {_compare(evidence, _failures, 'failed', _requests)}")


# --- bets ----------------------------------------------------------------------------------------------------------------


def _play(purse: Sequence[float], bets: Sequence[float]) -> list[float]:
    """The purse after one batch: natural logarithms of the money on each point, and last of what is not staked yet.

    Before batch t, a part of 1/(t (t+1)) of the first money is taken from the reserve and spread over the points. So a canary
    that turns bad after a good month is bet against with money that the good month has not lost, at a price that grows with
    log t only. Money only changes hands: the purse stays fair.
    """
    points, reserve = (purse[:-1], purse[-1]) if len(purse) == POINTS + 1 else ([NOTHING] * POINTS, 0.0)
    kept = reserve - math.log1p(math.exp(reserve))
    stake = reserve + kept - math.log(POINTS)
    played = [max(NOTHING, _log_sum((point, stake)) + bet) for point, bet in zip(points, bets, strict=True)]
    return [round(money, 6) for money in (*played, kept)]


def _odds_bets(share: float, canary: int, stable: int, tolerated: float, together: int) -> list[float]:
    """Log likelihood ratios of bad outcomes' versions: odds of the grid against the odds that are tolerated.

    If a bad outcome is `odds` times as likely at the canary, it is the canary's with probability odds·share / (odds·share + 1 -
    share). The ratio is taken against the tolerated odds, and not against equal ones, so what is tolerated really is.

    Outcomes that may come together count less: the root of a ratio has a mean of at most 1, too (Jensen), and none of the
    groups is larger than `together` or than all there are.
    """
    bad = canary + stable
    power = 1 / max(1, min(together, bad))
    bets = []
    for odds in _grid(tolerated):
        none = math.log((tolerated * share + 1 - share) / (odds * share + 1 - share))
        bets.append(power * (canary * math.log(odds / tolerated) + bad * none))
    return bets


def _rate_bets(failures: int, requests: int, bound: float, together: int) -> list[float]:
    """Log likelihood ratios of failures: shares above the bound, at the grid's odds, against the bound itself."""
    bets = []
    for odds in _grid(1.0):
        none = -math.log(odds * bound + 1 - bound)
        bets.append((failures * math.log(odds) + requests * none) / max(1, together))
    return bets


def _grid(lowest: float) -> list[float]:
    return [lowest * (MOST_ODDS / lowest) ** (k / POINTS) for k in range(1, POINTS + 1)]


def _share(meant: float, canary: int, stable: int) -> float:
    """The canary's share to judge by: what it was meant to get or what it got in this step, whichever is more.

    The meant share makes every failure count in full, however few requests a batch has; the one seen protects a canary that
    gets more than its weight says. The larger share is the milder one. 1 where stable answered nothing: nothing can be compared.
    """
    return max(meant, canary / (canary + stable)) if stable else 1.0


def _money(purse: Sequence[float]) -> float:
    """Natural logarithm of all money in a purse."""
    return _log_sum(purse) if purse else 0.0


def _log_sum(logs: Sequence[float]) -> float:
    most = max(logs)
    return most + math.log(sum(math.exp(value - most) for value in logs))


# --- alarms: reason and message ------------------------------------------------------------------------------------------

Said = tuple[str, str]


def _hung(evidence: Evidence, batch: Batch) -> list[HungPod]:
    """Since when which of the canary's pods hang, the longest first. Time in which stable hangs too does not count."""
    lost = evidence.last_at is not None and batch.since > datetime.fromisoformat(evidence.last_at) + UNWATCHED
    known = {} if lost else {one.pod: datetime.fromisoformat(one.since) for one in evidence.hung}
    excused = batch.until - batch.since if batch.stable_hangs else timedelta()
    found = sorted((known.get(pod, batch.since) + excused, pod) for pod in batch.hung)
    return [HungPod(pod=pod, since=_stamp(since)) for since, pod in found[:HUNG_PODS]]


def _stall_alarm(evidence: Evidence, terms: _Terms) -> Said | None:
    if not evidence.hung or evidence.last_at is None:
        return None
    longest = evidence.hung[0]
    lasted = datetime.fromisoformat(evidence.last_at) - datetime.fromisoformat(longest.since)
    if lasted < terms.stall_after:
        return None
    name = longest.pod.partition("/")[0]
    return "Stalled", f"the canary's pod {name} has requests pending and has completed none for {lasted.total_seconds():.0f} s"


def _error_alarm(evidence: Evidence, terms: _Terms) -> Said | None:
    said = _decided(evidence.errors, terms.alpha / 2)
    if said is None:
        return None
    return "ErrorRateHigher", (
        f"{_compare(evidence, _failures, 'failed', _requests)}: that its odds of failing are more than {terms.tolerated:g} times "
        f"stable's is {said}"
    )


def _bound_alarm(evidence: Evidence, terms: _Terms) -> Said | None:
    said = _decided(evidence.bound, terms.alpha / 4)
    if said is None:
        return None
    step = evidence.step_canary
    return "ErrorRateAboveMaximum", (
        f"with all the traffic, the canary failed {_of(step.failures, step.requests)}: that it fails more than maxErrorRate "
        f"({_percent(terms.max_error_rate)}) is {said}"
    )


def _cancellation_alarm(evidence: Evidence, terms: _Terms) -> Said | None:
    said = _decided(evidence.cancellations, terms.alpha / 4)
    if said is None:
        return None
    return "CancellationsHigher", (
        f"{_compare(evidence, _cancellations, 'had cancelled by clients', _sent)}: that the odds are more than "
        f"{terms.tolerated:g} times stable's is {said}"
    )


def _latency_alarm(evidence: Evidence, analysis: Analysis) -> Said | None:
    """A guard-rail, not a test: it has no part in α."""
    canary, stable = _mean_time(evidence.step_canary), _mean_time(evidence.step_stable)
    if analysis.max_latency_ratio is None or canary is None or not stable:
        return None
    ratio = canary / stable
    if ratio <= float(analysis.max_latency_ratio):
        return None
    return "LatencyHigher", (
        f"the canary took {canary / 1000:.3g} ms for a request, without the time in the queue, and stable "
        f"{stable / 1000:.3g} ms: {ratio:.3g} times as long, and maxLatencyRatio is {analysis.max_latency_ratio}"
    )


def _metric_alarm(evidence: Evidence, analysis: Analysis) -> Said | None:
    known = {m.name: m for m in evidence.metrics}
    for query in _queries(analysis):
        metric = known.get(query.name)
        if metric is not None and metric.violations >= VIOLATIONS:
            return (
                "MetricOutOfBounds",
                f"metric {query.name} was {metric.violations} times in a row out of bounds: {metric.message}",
            )
    return None


def _lack(evidence: Evidence, analysis: Analysis, terms: _Terms, now: datetime) -> Said | None:
    """What is missing for a pass."""
    if evidence.trouble is not None:
        return "NoEvidence", f"no evidence: {evidence.trouble}"
    if evidence.last_at is None:
        return "NoEvidence", "no counts have come yet"
    if now - datetime.fromisoformat(evidence.last_at) > STALE:
        return "NoEvidence", f"no counts have come since {evidence.last_at}"
    known = {m.name: m for m in evidence.metrics}
    for query in _queries(analysis):
        metric = known.get(query.name)
        if metric is None:
            return "NoMetric", f"metric {query.name} has not been read yet"
        if metric.value is None:
            return "NoMetric", f"metric {query.name}: {metric.message}"
        if now - datetime.fromisoformat(metric.at) > STALE:
            return "NoMetric", f"metric {query.name} has not been read since {metric.at}"
        if metric.violations:
            return "NoMetric", f"metric {query.name}: {metric.message}; another reading decides"
    seen = evidence.step_canary.requests
    if seen < terms.needed:
        return "TooFewRequests", (
            f"the canary has answered {seen} requests in this step and {terms.needed} are needed: with fewer, a share of "
            f"{_percent(terms.max_error_rate)} failed (maxErrorRate) could stay unseen"
        )
    return None


# --- counts and words ----------------------------------------------------------------------------------------------------

Count = Callable[[Tally], int]


def _decided(purse: Sequence[float], alpha: float) -> str | None:
    """How sure it is, where that is enough."""
    money = _money(purse)
    if money <= -math.log(alpha):
        return None
    odds = f"{math.exp(money):,.0f}" if money < math.log(1e6) else "more than 1,000,000"
    return f"{odds} to 1, and {1 / alpha:,.0f} to 1 decides"


def _compare(evidence: Evidence, count: Count, verb: str, whole: Count) -> str:
    canary, stable = evidence.step_canary, evidence.step_stable
    said = f"the canary {verb} {_of(count(canary), whole(canary))} in this step"
    return f"{said}, stable {_of(count(stable), whole(stable))}" if whole(stable) else said


def _of(some: int, all_of_them: int) -> str:
    share = f" ({_percent(some / all_of_them)})" if all_of_them else ""
    return f"{some:,} of {all_of_them:,} requests{share}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _requests(tally: Tally) -> int:
    return tally.requests


def _failures(tally: Tally) -> int:
    return tally.failures


def _cancellations(tally: Tally) -> int:
    return tally.cancellations


def _sent(tally: Tally) -> int:
    return tally.requests + tally.cancellations


def _mean_time(tally: Tally) -> float | None:
    """Mean time of an answer, µs; Triton measures those that succeed. None where there are too few of them."""
    answers = tally.requests - tally.failures
    return (tally.request_microseconds - tally.queue_microseconds) / answers if answers >= LATENCY_REQUESTS else None


def _queries(analysis: Analysis) -> Sequence[MetricQuery]:
    return (analysis.prometheus.metrics or ()) if analysis.prometheus else ()


def _violated(value: float, query: MetricQuery) -> str:
    if query.max is not None and value > float(query.max):
        return f"{value:.6g} is above its maximum of {query.max}"
    if query.min is not None and value < float(query.min):
        return f"{value:.6g} is below its minimum of {query.min}"
    return ""


def _stamp(moment: datetime) -> str:
    """To the microsecond: whole seconds would let a batch be taken in twice."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")

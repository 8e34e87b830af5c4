"""The judge of a canary: takes evidence in, batch by batch, and says whether to abort, to pass or to wait for more. Pure.

Stands between `gather`, which brings batches of counts, and `plan`, which acts on the verdict. All it knows stands in
status.evidence, so a restart forgets nothing. docs/judging.md tells the statistics to an engineer; in short:

A test is wealth that is staked against "this canary is no worse than tolerated". Each batch multiplies the stakes by
likelihood ratios whose mean is at most 1 if the canary is no worse, whatever the errors that hit both versions. Then the wealth
passes 1/α with probability at most α, however often one looks (Ville's inequality). Bets on many sizes of harm, made at
many moments, are mixed (Robbins), so neither the size nor the beginning of the trouble needs to be known.

What depends on how busy a pod is (rejections, cancellations, times) is in no test: stable and the canary do not carry the same
load for each pod. It is judged by guard-rails, which have no part in α.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from fractions import Fraction

from perch import words
from perch.api import Analysis, Evidence, HungPod, Lots, MetricQuery, MetricStatus, Tally
from perch.counters import add
from perch.durations import parse_duration
from perch.evidence import Batch, Reading

POINTS = 32
MOST_ODDS = 1000.0
"""Bets are on odds of failing up to so many times those of stable, or of the maximum."""
LOTS_LOOKS, LOTS_VARIANCE, IN_TURN = 40, 2.0, 0.25
"""Looks, the least variance by lot that a look must have to say anything, and the part of it below which turns are taken."""
NOTHING = -60.0
"""Natural logarithm of a stake too small to matter: JSON has no -inf. Adds less than 1e-15 to the wealth in a billion batches."""
LATENCY_REQUESTS = (30, 100)
"""Answers of the canary and of stable for one comparison of mean times. Stable's sample must not be the small one: see below."""
LATENCY_ALPHA = 0.01
"""How rarely the guard-rail on times cries wolf, where the canary is the slower one by the ratio at most every second time."""
LATENCY_BATCHES = 1.25
"""Times are not compared where the canary's executions hold more requests than stable's by this factor: they take longer by
it."""
LOST_REQUESTS = 100
"""Requests to the canary before what waited in vain is compared."""
LOST_SHARE = 0.2
LOST_RATIO = 4.0
"""A canary that loses so large a share of its requests to waiting, and so many times stable's share, is aborted. Far from what
load does: each of its pods has at most the load that each of stable's had before the rollout."""
VIOLATIONS = 2
"""Readings out of bounds in a row that abort."""
STALE = timedelta(seconds=60)
"""Counts older than this say nothing about the canary of now: none passes by them."""
UNWATCHED = timedelta(seconds=10)
"""Between two batches, more than some lost looks: nobody knows what was completed then. No batch counts for longer, either: its
times are a wall clock's, which jumps."""
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
    """An analysis with its defaults, as numbers. α is split: one half for errors, one for the bound."""

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


def take_in(
    evidence: Evidence, batch: Batch, analysis: Analysis, *, share: float, together: int = 1, copied: bool = False
) -> Evidence:
    """Add a batch. One that is in already changes nothing, nor does one in which nothing happened.

    share: the part of all counted requests that the canary is meant to get, weight / 100; 1: stable gets none by design;
    0: nothing is assigned at random, so nothing is compared. together: the most requests that can fail as one where executions
    are not counted, the model's maxBatchSize where it batches, else 1. copied: some requests are counted at both versions.
    """
    if batch.life == evidence.life and batch.number <= evidence.number:
        return evidence
    if batch.stable == batch.canary == Tally() and not batch.hung and not evidence.hung:
        return evidence
    terms = _Terms.of(analysis)
    stable, canary = add(evidence.step_stable, batch.stable), add(evidence.step_canary, batch.canary)
    update: dict[str, object] = {
        "last_at": _stamp(batch.until),
        "life": batch.life,
        "number": batch.number,
        "stable": add(evidence.stable, batch.stable),
        "canary": add(evidence.canary, batch.canary),
        "step_stable": stable,
        "step_canary": canary,
        "needed": terms.needed,
        "hung": _hung(evidence, batch),
    }
    most = _most_together(batch, together)
    if 0 < share < 1:
        part = _share(share, canary, stable)
        # Of an execution that failed with a whole batch one failure counts for the canary, and each of stable's counts in full.
        bad = max(batch.canary.failed_executions, math.ceil(batch.canary.failures / most))
        if bad + batch.stable.failures and part < 1:
            update["errors"] = _play(evidence.errors, _odds_bets(part, bad, batch.stable.failures, terms.tolerated))
        update |= _compare_times(evidence, batch, analysis)
        if not copied:
            update["lots"] = _note_lots(evidence.lots, batch, share)
    elif share >= 1 and batch.canary.requests:
        bets = _rate_bets(batch.canary.failures, batch.canary.requests, terms.max_error_rate, most)
        update["bound"] = _play(evidence.bound, bets)
    return evidence.model_copy(update=update)


def _note_lots(lots: Lots, batch: Batch, share: float) -> Lots:
    """By lot, the canary's number of a look's n requests is binomial, with variance n·share·(1 - share). A gateway that takes
    turns is never further than a request or two from n·share. After LOTS_LOOKS looks the sum of the squared deviations tells them
    apart (Pearson's dispersion test, on its lower side): by lot it is a chi-squared variable, and calls lots turns about once in
    a million times. The upper side says nothing, since requests that are answered in batches vary more than lots do.
    """
    requests = batch.canary.requests + batch.stable.requests
    usual = requests * share * (1 - share)
    if usual < LOTS_VARIANCE:
        return lots
    looks = lots.looks + 1
    variance = round(lots.variance + (batch.canary.requests - requests * share) ** 2 / usual, 6)
    if looks < LOTS_LOOKS:
        return lots.model_copy(update={"looks": looks, "variance": variance})
    return Lots(in_turn=variance < IN_TURN * looks)


def _most_together(batch: Batch, together: int) -> int:
    """The most requests that can have failed as one in this batch.

    What was measured counts, also against what the version's configuration says: a batch may come of a line that nobody reads.
    """
    if batch.largest is None:
        return max(1, together)
    return min(batch.largest, together) if together > 1 else batch.largest


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


def judge(evidence: Evidence, analysis: Analysis, now: datetime, silent: timedelta = timedelta()) -> Finding:
    """What the evidence says of the canary now. An alarm comes before everything else.

    silent: how long no look at the counters has succeeded.
    """
    terms = _Terms.of(analysis)
    for alarm in (
        _stall_alarm(evidence, terms),
        _error_alarm(evidence, terms),
        _bound_alarm(evidence, terms),
        _lost_alarm(evidence, "RejectionsHigher", "rejected by its queue", _rejections),
        _lost_alarm(evidence, "CancellationsHigher", "cancelled by clients while they waited", _cancellations),
        _latency_alarm(evidence, analysis),
        _metric_alarm(evidence, analysis),
    ):
        if alarm is not None:
            return Finding(Kind.ABORT, *alarm)
    lack = _lack(evidence, analysis, terms, now, silent)
    if lack is not None:
        return Finding(Kind.INCONCLUSIVE, *lack)
    return Finding(Kind.PASS, "Passed", f"no alarm: {_compare(evidence, _failures, 'failed', _requests)}")


# --- bets ----------------------------------------------------------------------------------------------------------------


def _play(wealth: Sequence[float], bets: Sequence[float]) -> list[float]:
    """Wealth after one batch: natural logarithms of the stake on each point, and last of what is not staked yet.

    Before batch t, a part of 1/(t (t+1)) of the initial wealth is taken from the reserve and spread over the points. So a canary
    that turns bad after a good month is bet against with wealth that the good month has not lost, at a price that grows with
    log t only. Wealth is moved, never made: the bet stays fair.
    """
    points, reserve = (wealth[:-1], wealth[-1]) if len(wealth) == POINTS + 1 else ([NOTHING] * POINTS, 0.0)
    kept = reserve - math.log1p(math.exp(reserve))
    stake = reserve + kept - math.log(POINTS)
    played = [max(NOTHING, _log_sum((point, stake)) + bet) for point, bet in zip(points, bets, strict=True)]
    return [round(money, 6) for money in (*played, kept)]


def _odds_bets(share: float, canary: int, stable: int, tolerated: float) -> list[float]:
    """Log likelihood ratios of failures' versions: odds of the grid against the odds that are tolerated.

    If a failure is `odds` times as likely at the canary, it is the canary's with probability odds·share / (odds·share + 1 -
    share). The ratio is taken against the tolerated odds, and not against equal ones, so what is tolerated really is.
    """
    bad = canary + stable
    bets = []
    for odds in _grid(tolerated):
        none = math.log((tolerated * share + 1 - share) / (odds * share + 1 - share))
        bets.append(canary * math.log(odds / tolerated) + bad * none)
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


def _share(meant: float, canary: Tally, stable: Tally) -> float:
    """The canary's share to judge by: what it was meant to get, what it got of the step's requests, or what it had of the step's
    executions, whichever is most.

    The meant share makes every failure count in full, however few requests a batch has. That of requests protects a canary that
    gets more than its weight says. That of executions protects one whose batches are smaller than stable's, since an error may
    come once an execution as well as once a request. The larger share is the milder one. 1 where stable answered nothing:
    nothing can be compared.
    """
    if not stable.requests:
        return 1.0
    requests = canary.requests / (canary.requests + stable.requests)
    counted = canary.executions and stable.executions
    executions = canary.executions / (canary.executions + stable.executions) if counted else 0.0
    return max(meant, requests, executions)


def _compare_times(evidence: Evidence, batch: Batch, analysis: Analysis) -> dict[str, object]:
    """Adds to the samples of times, and compares their means once both are large enough: one bet on who is the slower one.

    Of two versions alike, the one with the smaller sample seems faster more often than not, since long times are rare ones; and
    no one is the slower by the whole ratio more often than every second time. So a few slow requests decide nothing, and a
    canary that is always slower is found within a dozen comparisons.
    """
    if analysis.max_latency_ratio is None:
        return {}
    stable, canary = add(evidence.slow_stable, batch.stable), add(evidence.slow_canary, batch.canary)
    ours, theirs = (_mean_time(t, least) for t, least in zip((canary, stable), LATENCY_REQUESTS, strict=True))
    if ours is None or not theirs:
        return {"slow_stable": stable, "slow_canary": canary}
    begun_anew: dict[str, object] = {"slow_stable": Tally(), "slow_canary": Tally()}
    if _batch_size(canary) > LATENCY_BATCHES * _batch_size(stable):
        return begun_anew
    slower = ours > float(analysis.max_latency_ratio) * theirs
    chances = [0.5 + 0.5 * k / (POINTS + 1) for k in range(1, POINTS + 1)]
    bets = [math.log(2 * (chance if slower else 1 - chance)) for chance in chances]
    return begun_anew | {"latency": _play(evidence.latency, bets)}


def _batch_size(tally: Tally) -> float:
    return tally.requests / tally.executions if tally.executions else 1.0


def _total(wealth: Sequence[float]) -> float:
    """Natural logarithm of all of it; the initial wealth is 1."""
    return _log_sum(wealth) if wealth else 0.0


def _log_sum(logs: Sequence[float]) -> float:
    most = max(logs)
    return most + math.log(sum(math.exp(value - most) for value in logs))


# --- alarms: reason and message ------------------------------------------------------------------------------------------

Said = tuple[str, str]


def _hung(evidence: Evidence, batch: Batch) -> list[HungPod]:
    """For how long which of the canary's pods hang, the longest first. Time in which as many of stable's hang does not count."""
    lost = evidence.last_at is not None and batch.since > datetime.fromisoformat(evidence.last_at) + UNWATCHED
    known = {} if lost else {one.pod: one for one in evidence.hung}
    lasted = (
        0 if len(batch.stable_hung) >= len(batch.hung) else min(max(batch.until - batch.since, timedelta()), UNWATCHED).seconds
    )
    found = [known.get(pod, HungPod(pod=pod, since=_stamp(batch.since))) for pod in batch.hung]
    found = [one.model_copy(update={"seconds": one.seconds + lasted}) for one in found]
    return sorted(found, key=lambda one: (-one.seconds, one.pod))[:HUNG_PODS]


def _stall_alarm(evidence: Evidence, terms: _Terms) -> Said | None:
    if not evidence.hung or evidence.hung[0].seconds < terms.stall_after.total_seconds():
        return None
    longest = evidence.hung[0]
    name = longest.pod.partition("/")[0]
    return "Stalled", f"the canary's pod {name} has requests pending and has completed none for {longest.seconds} s"


def _error_alarm(evidence: Evidence, terms: _Terms) -> Said | None:
    if not _decided(evidence.errors, terms.alpha / 2):
        return None
    said = _compare(evidence, _failures, "failed", _requests)
    tolerated = f"no worse than tolerated (up to {terms.tolerated:g} times stable's odds of failing)"
    chance = _chance(evidence.errors)
    return "ErrorRateHigher", f"{said}. If it were {tolerated}, as much evidence against it would come up {chance}"


def _bound_alarm(evidence: Evidence, terms: _Terms) -> Said | None:
    if not _decided(evidence.bound, terms.alpha / 2):
        return None
    step = evidence.step_canary
    return "ErrorRateAboveMaximum", (
        f"with all the traffic, the canary failed {_of(step.failures, step.requests)}. If it failed no more than maxErrorRate "
        f"({_percent(terms.max_error_rate)}), as much evidence against it would come up {_chance(evidence.bound)}"
    )


def _lost_alarm(evidence: Evidence, reason: str, verb: str, count: Count) -> Said | None:
    """A guard-rail, not a test: what waits depends on how busy a pod is."""
    canary, stable = evidence.step_canary, evidence.step_stable
    ours = count(canary) / _sent(canary) if _sent(canary) >= LOST_REQUESTS else 0.0
    theirs = count(stable) / _sent(stable) if _sent(stable) else 0.0
    if ours <= max(LOST_SHARE, LOST_RATIO * theirs):
        return None
    return reason, (
        f"{_compare(evidence, count, f'had {verb}', _sent)}: more than {_percent(LOST_SHARE)}, and {LOST_RATIO:g} times "
        "stable's share or more. Its pods are too slow or too few for their share of the traffic"
    )


def _latency_alarm(evidence: Evidence, analysis: Analysis) -> Said | None:
    """A guard-rail, not a test: it has no part in α."""
    if analysis.max_latency_ratio is None or not _decided(evidence.latency, LATENCY_ALPHA):
        return None
    said = ""
    canary, stable = _mean_time(evidence.step_canary), _mean_time(evidence.step_stable)
    if canary is not None and stable:
        said = (
            f"in this step the canary took {canary / 1000:.3g} ms for a request, without the time in the queue, and stable "
            f"{stable / 1000:.3g} ms. "
        )
    return "LatencyHigher", (
        f"{said}In comparison after comparison it took more than "
        f"{analysis.max_latency_ratio} times as long as stable (maxLatencyRatio)"
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


def _lack(evidence: Evidence, analysis: Analysis, terms: _Terms, now: datetime, silent: timedelta) -> Said | None:
    """What is missing for a pass."""
    if evidence.trouble is not None:
        return "NoEvidence", f"no evidence: {evidence.trouble}"
    if silent > STALE:
        return "NoEvidence", f"no counts have come for {silent.total_seconds():.0f} s"
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
            f"the canary has answered {words.count(seen, 'request')} in this step and {terms.needed} are needed: "
            f"with fewer, a share of {_percent(terms.max_error_rate)} failed (maxErrorRate) could stay unseen"
        )
    return None


# --- counts and words ----------------------------------------------------------------------------------------------------

Count = Callable[[Tally], int]


def _decided(wealth: Sequence[float], alpha: float) -> bool:
    return _total(wealth) > -math.log(alpha)


def _chance(wealth: Sequence[float]) -> str:
    """How rarely so much would be won by chance, in words."""
    odds = math.exp(min(_total(wealth), math.log(1e6)))
    return f"once in {odds:,.0f} rollouts" if odds < 1e6 else "less than once in 1,000,000 rollouts"


def _compare(evidence: Evidence, count: Count, verb: str, whole: Count) -> str:
    canary, stable = evidence.step_canary, evidence.step_stable
    said = f"the canary {verb} {_of(count(canary), whole(canary))} in this step"
    return f"{said}, stable {_of(count(stable), whole(stable))}" if whole(stable) else said


def _of(some: int, all_of_them: int) -> str:
    share = f" ({_percent(some / all_of_them)})" if all_of_them else ""
    return f"{some:,} of {words.count(all_of_them, 'request')}{share}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _requests(tally: Tally) -> int:
    return tally.requests


def _failures(tally: Tally) -> int:
    return tally.failures


def _cancellations(tally: Tally) -> int:
    return tally.cancellations


def _rejections(tally: Tally) -> int:
    return tally.rejections


def _sent(tally: Tally) -> int:
    return tally.requests + tally.rejections + tally.cancellations


def _mean_time(tally: Tally, least: int = 1) -> float | None:
    """Mean time of an answer, µs; Triton measures those that succeed. None where there are fewer than `least`."""
    answers = tally.requests - tally.failures
    return (tally.request_microseconds - tally.queue_microseconds) / answers if answers >= least else None


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

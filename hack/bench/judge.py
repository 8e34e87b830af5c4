"""How well the judge judges, by simulation: `make simulate`, or `python -m bench.judge --quick` for a hundredth of it.

Prints the tables of docs/benchmarks.md, and fails where canaries may be aborted by mistake more often than alpha allows.

Twins: whole rollouts of a version beside its twin through the planner, where an assumption is strained (bench.nulls).

False aborts: whole rollouts of canaries that are no worse than tolerated, looked at every 3 s. Every look writes the text that
each Triton pod would have answered, and it goes through the operator's own parser, difference and judge. Requests, errors, bursts
of errors that hit both versions, restarts and the moments at which pods are read are drawn at random.

Power: canaries that are worse, in batches of counts (the text would change nothing), and two rules of thumb on the same requests.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from bench import nulls, times
from bench.triton import triton_text
from perch.api import Analysis, Evidence, Tally
from perch.counters import MAX_SKEW, PodScrape, Scrape, difference, parse_counters
from perch.evidence import Batch
from perch.judge import Kind, begin_step, judge, take_in

ALPHA = 0.05
TOLERATED = 1.1
MOST_ERRORS = 0.01
"""Defaults of the analysis."""
LOOK = 3.0
"""Seconds between looks."""
TICK = 0.05
START = datetime(2026, 1, 1, tzinfo=UTC)
PROCESSES = multiprocessing.cpu_count()

Counts = NDArray[np.int64]


# --- healthy canaries --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What rollouts of a kind are drawn from."""

    name: str
    odds: float = 1.0
    """Odds of the canary's failing and of its being cancelled, relative to stable's at the same moment."""
    traffic: tuple[float, float] = (0.3, 200.0)
    """Requests per second, log-uniform; half of the rollouts below 5."""
    errors: tuple[float, float] = (1e-4, 9e-3)
    """Share of requests that fail at either version, log-uniform."""
    bursts: tuple[float, float] | None = (0.05, 0.30)
    """Share that fails while a burst lasts (1 to 20 s, one in a minute on average)."""
    steps: tuple[tuple[int, float], ...] = ((5, 60.0), (50, 60.0), (100, 30.0))
    """Weight and seconds. No burst at 100: there is no stable to tell it from the canary's own."""
    restarts: float = 0.3
    """Restarts of a pod in a rollout, on average; half of them are seen by the counters only."""
    together: int = 1
    """Requests that fail as one."""
    told: int | None = None
    """What the judge is told of that, if not the truth."""
    counted: bool = True
    """Whether executions are counted, which tells what failed as one whatever the judge is told."""
    skew: float = MAX_SKEW.total_seconds()
    """Longest time between the first and the last reading of an honest look; a look in fifty takes longer."""
    canary_first: bool = True
    """Which pods a look reads first."""


GROUPED = World("errors in groups of 8, judge told", together=8, traffic=(20.0, 100.0), steps=((5, 60.0), (50, 60.0)))
OUTAGES = World("bursts in which everything fails", bursts=(1.0, 1.0), traffic=(20.0, 400.0), steps=((5, 60.0), (50, 60.0)))
MIXED = World("everything drawn at random, no worse")
STEADY = World(
    "steady 5 to 30 % of errors, odds 1.1", odds=TOLERATED, errors=(0.05, 0.3), bursts=None, steps=((5, 90.0), (50, 120.0))
)
WORLDS = (
    (MIXED, 10_000),
    (replace(MIXED, name="the same, at the tolerated odds of 1.1", odds=TOLERATED), 1_500),
    (replace(MIXED, name="the same, healthier: odds 0.9", odds=0.9), 1_000),
    (replace(MIXED, name="the same, healthier: odds 0.5", odds=0.5), 1_000),
    (STEADY, 1_000),
    (OUTAGES, 600),
    (replace(OUTAGES, name="the same, stable read before the canary", canary_first=False), 600),
    (GROUPED, 600),
    (replace(GROUPED, name="the same, judge told by the count of executions alone", told=1), 600),
    (replace(GROUPED, name="the same, executions not counted", counted=False), 600),
    (replace(GROUPED, name="the same, executions not counted and judge not told", told=1, counted=False), 300),
)


@dataclass
class Pod:
    version: int
    replica: int
    cumulative: Counts
    """[5, ticks + 1]: succeeded, failed, cancelled, µs, executions; before each tick."""
    restarts: dict[int, bool]
    """Tick of each restart; whether Kubernetes tells of it."""

    def scrape(self, tick: int) -> PodScrape:
        begun = max((t for t in self.restarts if t <= tick), default=0)
        seen = sum(told for t, told in self.restarts.items() if t <= tick)
        counts = self.cumulative[:, tick] - (self.cumulative[:, begun] if begun else 0)
        if self.cumulative[4, 0] < 0:
            counts[4] = -1
        text = triton_text(self.version, *(int(c) for c in counts))
        return PodScrape(f"pod-{self.version}-{self.replica}/{seen}", self.version, parse_counters(text, "digits", self.version))


def rollout(world: World, rng: np.random.Generator) -> str | None:
    """One rollout, looked at to its end; the reason of the abort, if there was one."""
    low, high = world.traffic
    middle = 5.0 if low < 5.0 < high else math.sqrt(low * high)
    traffic = _log_uniform(rng, *((low, middle) if rng.random() < 0.5 else (middle, high)))
    errors = _log_uniform(rng, world.errors[0], world.errors[1] / world.odds)
    replicas = {1: int(rng.integers(1, 4)), 2: int(rng.integers(1, 3))}
    analysis = Analysis()
    evidence = Evidence()
    clock = 0.0
    for weight, seconds in world.steps:
        evidence = begin_step(evidence, analysis)
        for batch in _batches(world, rng, traffic, errors, replicas, weight, seconds, clock):
            evidence = take_in(evidence, batch, analysis, share=weight / 100, together=world.told or world.together)
            finding = judge(evidence, analysis, batch.until)
            if finding.kind is Kind.ABORT:
                return finding.reason
        clock += seconds + 10
    return None


def _batches(
    world: World,
    rng: np.random.Generator,
    traffic: float,
    errors: float,
    replicas: dict[int, int],
    weight: int,
    seconds: float,
    clock: float,
) -> Iterator[Batch]:
    ticks = int((seconds + 2 * LOOK) / TICK)
    rates = _rates(world, rng, errors, ticks, calm=weight == 100)
    sent = rng.poisson(traffic * TICK, ticks)
    to_canary = rng.binomial(sent, weight / 100)
    pods = {
        1: _pods(world, rng, 1, replicas[1], sent - to_canary, rates, seconds),
        2: _pods(world, rng, 2, replicas[2], to_canary, _at_odds(rates, world.odds), seconds),
    }
    asked = [pods[2]] if weight == 100 else [pods[2], pods[1]] if world.canary_first else [pods[1], pods[2]]
    before: Scrape | None = None
    for look in range(int(seconds / LOOK) + 1):
        width = world.skew * rng.random() if rng.random() > 0.02 else 4 * world.skew
        first = look * int(LOOK / TICK)
        scrapes = []
        for turn, group in enumerate(asked):
            # One version is read wholly before the other; pods of one version at once, each a little off.
            parts = (turn + rng.random(len(group))) / len(asked)
            scrapes += [pod.scrape(first + int(part * width / TICK)) for pod, part in zip(group, parts, strict=True)]
        since = START + timedelta(seconds=clock + first * TICK)
        scrape = Scrape(since, since + timedelta(seconds=width), tuple(scrapes))
        if scrape.skewed:
            continue
        batch = difference(before, scrape, canary=2) if before is not None else None
        before = scrape
        if batch is not None:
            yield replace(batch, number=round(clock / LOOK) + look)


def _rates(world: World, rng: np.random.Generator, errors: float, ticks: int, *, calm: bool) -> NDArray[np.float64]:
    """Share of stable's requests that fails, by tick."""
    rates = np.full(ticks, errors)
    if world.bursts is None or calm:
        return rates
    tick = rng.exponential(60.0) / TICK
    while tick < ticks:
        length = rng.uniform(1.0, 20.0) / TICK
        rates[int(tick) : int(tick + length)] = rng.uniform(*world.bursts)
        tick += length + rng.exponential(60.0) / TICK
    return rates


def _pods(
    world: World,
    rng: np.random.Generator,
    version: int,
    replicas: int,
    requests: Counts,
    rates: NDArray[np.float64],
    seconds: float,
) -> list[Pod]:
    pods = []
    left = requests
    for replica in range(replicas):
        mine = rng.binomial(left, 1 / (replicas - replica))
        left = left - mine
        # Whole executions fail, and may hold more requests than came in this tick.
        failed = world.together * rng.binomial(mine, rates / world.together)
        cancelled = rng.binomial(np.maximum(mine - failed, 0), 0.2 * rates)
        succeeded = np.maximum(mine - failed - cancelled, 0)
        counts = np.stack([succeeded, failed, cancelled, succeeded * 5000, succeeded + failed // world.together])
        cumulative = np.zeros((5, len(requests) + 1), np.int64)
        np.cumsum(counts, axis=1, out=cumulative[:, 1:])
        cumulative += rng.integers(1, 10_000, (5, 1))
        if not world.counted:
            cumulative[4] = -1
        restarts = {}
        for _ in range(rng.poisson(world.restarts * seconds / 150 / replicas)):
            restarts[int(rng.integers(1, len(requests)))] = bool(rng.random() < 0.5)
        pods.append(Pod(version, replica, cumulative, restarts))
    return pods


def _at_odds(rates: NDArray[np.float64], odds: float) -> NDArray[np.float64]:
    return odds * rates / (1 - rates + odds * rates)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(math.exp(rng.uniform(math.log(low), math.log(high))))


def false_aborts(world: World, rollouts: int, seed: int) -> dict[str, int]:
    """Aborts of so many rollouts, by reason."""
    rng = np.random.default_rng(seed)
    found: dict[str, int] = {}
    for _ in range(rollouts):
        reason = rollout(world, rng)
        if reason is not None:
            found[reason] = found.get(reason, 0) + 1
    return found


def upper_bound(events: int, trials: int, confidence: float = 0.95) -> float:
    """Clopper and Pearson's one-sided upper bound of a probability."""
    if events >= trials:
        return 1.0
    low, high = events / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        seen = math.fsum(math.exp(_log_binomial(k, trials, middle)) for k in range(events + 1))
        low, high = (middle, high) if seen > 1 - confidence else (low, middle)
    return high


def _log_binomial(k: int, n: int, p: float) -> float:
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return ways + (k * math.log(p) if k else 0.0) + ((n - k) * math.log1p(-p) if n > k else 0.0)


# --- broken canaries ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A canary at one weight."""

    canary: float
    """Share of its requests that fails."""
    traffic: float
    share: float
    stable: float = 0.001
    together: int = 1
    healthy_for: float = 0.0
    """Seconds in which it fails as stable does."""
    bursts: bool = False
    seconds: float = 1800.0
    """How long it is watched from then on."""


@dataclass(frozen=True)
class Cut:
    """What the canary had answered since it turned bad, when it was taken out."""

    requests: int
    failures: int
    seconds: float


class Perch:
    def __init__(self, trial: Trial) -> None:
        self.trial, self.analysis = trial, Analysis()
        self.evidence = begin_step(Evidence(), self.analysis)

    def alarmed(self, batch: Batch) -> bool:
        self.evidence = take_in(self.evidence, batch, self.analysis, share=self.trial.share, together=self.trial.together)
        return judge(self.evidence, self.analysis, batch.until).kind is Kind.ABORT


class Interval:
    """The canary's share of failures in each interval of 60 s against a threshold; `failed` intervals above it abort.

    Failed intervals are counted over the whole rollout. One without requests is not counted.
    """

    def __init__(self, failed: int) -> None:
        self.left, self.requests, self.failures = failed, 0, 0

    def alarmed(self, batch: Batch) -> bool:
        self.requests += batch.canary.requests
        self.failures += batch.canary.failures
        if (batch.until - START).total_seconds() % 60 >= LOOK:
            return False
        if self.requests and self.failures / self.requests > MOST_ERRORS:
            self.left -= 1
        self.requests = self.failures = 0
        return self.left == 0


RULES: dict[str, Callable[[Trial], Perch | Interval]] = {
    "Perch": Perch,
    "one interval of 60 s above 1 %": lambda _: Interval(1),
    "five intervals of 60 s above 1 %": lambda _: Interval(5),
}


def cut(trial: Trial, rng: np.random.Generator, rule: Callable[[Trial], Perch | Interval] = Perch) -> Cut | None:
    """Watch a canary until the rule takes it out; None if it does not."""
    watcher = rule(trial)
    requests = failures = 0
    burst = 0
    for look in range(1, int((trial.healthy_for + trial.seconds) / LOOK) + 1):
        sick = look * LOOK > trial.healthy_for
        stable_rate, canary_rate = trial.stable, trial.canary if sick else trial.stable
        if trial.bursts:
            burst = burst - 1 if burst else int(rng.integers(1, 7)) if rng.random() < LOOK / 120 else 0
            if burst:
                stable_rate = canary_rate = max(canary_rate, 0.15)
        sent = int(rng.poisson(trial.traffic * LOOK))
        canary = int(rng.binomial(sent, trial.share))
        failed, stable_failed = int(rng.binomial(canary, canary_rate)), int(rng.binomial(sent - canary, stable_rate))
        if sick:
            requests, failures = requests + canary, failures + failed
        until = START + timedelta(seconds=look * LOOK)
        batch = Batch(
            until - timedelta(seconds=LOOK),
            until,
            Tally(requests=sent - canary, failures=stable_failed),
            Tally(requests=canary, failures=failed),
            number=look,
        )
        if watcher.alarmed(batch):
            return Cut(requests, failures, look * LOOK - trial.healthy_for)
    return None


@dataclass(frozen=True)
class Cuts:
    """Many trials of one kind: medians of those that were cut, and which part that is."""

    caught: float
    requests: float
    failures: float
    seconds: float

    def __str__(self) -> str:
        if self.caught < 0.5:
            return f"– ({self.caught:.0%})"
        note = "" if self.caught > 0.995 else f" ({self.caught:.0%})"
        return f"{self.requests:,.0f} / {self.failures:,.0f} / {self.seconds:,.0f}{note}"


def cuts(trial: Trial, repeats: int, seed: int, rule: str = "Perch") -> Cuts:
    rng = np.random.default_rng(seed)
    found = [c for c in (cut(trial, rng, RULES[rule]) for _ in range(repeats)) if c is not None]
    if not found:
        return Cuts(0.0, math.nan, math.nan, math.nan)
    medians = (statistics.median(getattr(c, name) for c in found) for name in ("requests", "failures", "seconds"))
    return Cuts(len(found) / repeats, *medians)


# --- the report --------------------------------------------------------------------------------------------------------

CHUNK = 25
RATES = (1.0, 0.2, 0.05, 0.02)
TRAFFICS = (1.0, 5.0, 50.0, 500.0)
SHARES = (0.01, 0.05, 0.1, 0.5, 0.95)


def _false_aborts(job: tuple[World, int, int]) -> dict[str, int]:
    return false_aborts(*job)


def _twin_aborts(job: tuple[nulls.Null, int, int]) -> dict[str, int]:
    return nulls.aborts(*job)


def _slow(job: tuple[times.Times, int, int]) -> list[float]:
    return times.watch(*job)


def _cuts(job: tuple[Trial, int, int, str]) -> Cuts:
    return cuts(*job)


LEAST = 100
"""Rollouts that tell whether alpha is kept: of fewer than 59, not even one that aborts none has its bound below 5 %."""


def exceeds(world: World, aborted: int, rollouts: int) -> str | None:
    """What is wrong with so many false aborts; nothing where the judge was not told what it must know."""
    bound = upper_bound(aborted, rollouts)
    if (world.told is not None and not world.counted) or bound <= ALPHA:
        return None
    return f"{world.name}: {aborted} of {rollouts:,} rollouts were aborted, up to {bound:.2%} may be, and alpha is {ALPHA:.0%}"


def report(scale: float = 1.0) -> Iterator[str]:
    """The tables, line by line; `scale` times as many repeats as usual. Exits at the end where alpha may not be kept."""
    repeats = max(5, int(60 * scale))
    wrong: list[str] = []
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        yield from _twins(pool, scale, wrong)
        yield ""
        yield "| canary | rollouts | aborted | share, with its 95 % upper bound | reasons |"
        yield "|---|---|---|---|---|"
        for number, (world, usual) in enumerate(WORLDS):
            rollouts = max(LEAST, int(usual * scale))
            jobs = [(world, CHUNK, 1000 * number + chunk) for chunk in range(rollouts // CHUNK)]
            reasons = _sum(pool.imap_unordered(_false_aborts, jobs))
            aborted, trials = sum(reasons.values()), len(jobs) * CHUNK
            yield f"| {world.name} | {_row(aborted, trials, reasons)} |"
            wrong += filter(None, [exceeds(world, aborted, trials)])
        for rate in RATES:
            yield ""
            yield f"{rate:.0%} of the canary's requests fail:"
            yield ""
            yield "| requests per second | " + " | ".join(f"share {share:.0%}" for share in SHARES) + " |"
            yield "|---" * (len(SHARES) + 1) + "|"
            power = [(Trial(rate, traffic, share), repeats, 7, "Perch") for traffic in TRAFFICS for share in SHARES]
            cells = pool.map(_cuts, power, chunksize=1)
            for row, traffic in enumerate(TRAFFICS):
                yield f"| {traffic:g} | " + " | ".join(str(c) for c in cells[row * len(SHARES) : (row + 1) * len(SHARES)]) + " |"
        yield ""
        yield from _times(pool, scale)
        yield from _rules(pool, repeats)
        yield from _others(pool, repeats)
    if wrong:
        sys.exit("\n".join(wrong))


def _times(pool: multiprocessing.pool.Pool, scale: float) -> Iterator[str]:
    yield "| `maxLatencyRatio: 1.5`, watched for 5 minutes | aborted |"
    yield "|---|---|"
    for number, kind in enumerate((*times.TWINS, *times.SLOWER)):
        rollouts = max(LEAST, int(2_000 * scale))
        jobs = [(kind, CHUNK, 1000 * number + chunk) for chunk in range(rollouts // CHUNK)]
        found = [seconds for part in pool.imap_unordered(_slow, jobs) for seconds in part]
        yield f"| {kind.name} | {times.said(found, len(jobs) * CHUNK)} |"


def _twins(pool: multiprocessing.pool.Pool, scale: float, wrong: list[str]) -> Iterator[str]:
    yield "| twin, through the planner | rollouts | aborted | share, with its 95 % upper bound | reasons | alpha |"
    yield "|---|---|---|---|---|---|"
    for number, null in enumerate(nulls.NULLS):
        rollouts = max(LEAST, int((nulls.SHOWN if null.outside else nulls.COVERED) * scale))
        jobs = [(null, CHUNK, 1000 * number + chunk) for chunk in range(rollouts // CHUNK)]
        reasons = _sum(pool.imap_unordered(_twin_aborts, jobs))
        aborted, trials = sum(reasons.values()), len(jobs) * CHUNK
        yield f"| {null.name} | {_row(aborted, trials, reasons)} | {null.outside or 'covered'} |"
        if null.outside is None and upper_bound(aborted, trials) > ALPHA:
            wrong.append(f"{null.name}: {aborted} of {trials:,} rollouts were aborted, and alpha is {ALPHA:.0%}")


def _sum(found: Iterable[dict[str, int]]) -> dict[str, int]:
    reasons: dict[str, int] = {}
    for part in found:
        for reason, count in part.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return reasons


def _row(aborted: int, trials: int, reasons: dict[str, int]) -> str:
    said = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())) or "–"
    return f"{trials:,} | {aborted} | {aborted / trials:.2%} (at most {upper_bound(aborted, trials):.2%}) | {said}"


def _rules(pool: multiprocessing.pool.Pool, repeats: int) -> Iterator[str]:
    yield ""
    yield "| canary | requests per second | " + " | ".join(RULES) + " |"
    yield "|---" * (len(RULES) + 2) + "|"
    kinds = [(f"{rate:.0%} of requests fail", replace(Trial(rate, 1.0, 0.05))) for rate in RATES]
    for name, trial in kinds:
        for traffic in (5.0, 50.0):
            jobs = [(replace(trial, traffic=traffic), repeats, 11, rule) for rule in RULES]
            yield f"| {name} | {traffic:g} | " + " | ".join(str(c) for c in pool.map(_cuts, jobs, chunksize=1)) + " |"
    for name, bursts in (("healthy, 0.1 % fail", False), ("healthy, with bursts of 15 % at both versions", True)):
        for traffic in (1.0, 5.0, 50.0):
            healthy = Trial(0.001, traffic, 0.05, bursts=bursts, seconds=600.0)
            jobs = [(healthy, 10 * repeats, 13, rule) for rule in RULES]
            found = [f"{c.caught:.1%} aborted" for c in pool.map(_cuts, jobs, chunksize=1)]
            yield f"| {name} | {traffic:g} | " + " | ".join(found) + " |"


def _others(pool: multiprocessing.pool.Pool, repeats: int) -> Iterator[str]:
    yield ""
    yield "| canary | requests / failures / seconds until the abort |"
    yield "|---|---|"
    trials = {
        "all requests fail at once, alone at 100 %, 5/s": Trial(1.0, 5.0, 1.0),
        "5 % fail, alone at 100 %, 50/s": Trial(0.05, 50.0, 1.0),
        "20 % fail from the second hour on, share 10 %, 10/s, stable fails 1 %": Trial(
            0.2, 10.0, 0.1, stable=0.01, healthy_for=3600.0
        ),
        "all fail, share 5 %, 50/s, up to 8 can fail together": Trial(1.0, 50.0, 0.05, together=8),
        "all fail, share 50 %, 50/s, up to 8 can fail together": Trial(1.0, 50.0, 0.5, together=8),
        "all fail, share 50 %, 50/s, up to 32 can fail together": Trial(1.0, 50.0, 0.5, together=32),
        "5 % fail, share 50 %, 50/s, up to 8 can fail together": Trial(0.05, 50.0, 0.5, together=8),
        "20 % fail, stable fails 10 %, share 50 %, 50/s": Trial(0.2, 50.0, 0.5, stable=0.1),
    }
    for name, found in zip(
        trials, pool.map(_cuts, [(t, repeats, 17, "Perch") for t in trials.values()], chunksize=1), strict=True
    ):
        yield f"| {name} | {found} |"


if __name__ == "__main__":
    for line in report(0.01 if "--quick" in sys.argv else 1.0):
        print(line, flush=True)

"""The guard-rail of latency by simulation: how often a version is called slower than its twin, and how soon a slower one is."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from perch.api import Analysis, Evidence, Tally
from perch.evidence import Batch
from perch.judge import begin_step, judge, take_in

LOOK = 3
SECONDS = 300
"""How long each rollout is watched."""
START = datetime(2026, 1, 1, tzinfo=UTC)
ANALYSIS = Analysis(max_latency_ratio="1.5")
TRAFFICS, SHARES = (5.0, 20.0, 100.0), (0.05, 0.2, 0.5)


@dataclass(frozen=True)
class Times:
    """How long requests take: 5 ms, log-normal with a deviation of 0.3, and what is added here."""

    name: str
    tail: float = 0.0
    """Share of requests that take 100 times longer."""
    cold: int = 0
    """So many first requests of the canary take 10 times longer."""
    bursts: float = 0.0
    """Share of looks in which everything takes 5 times longer, at both versions."""
    slower: float = 1.0
    """The canary's times by stable's."""


TWINS = (
    Times("alike"),
    Times("1 % of requests take 100 times longer", tail=0.01),
    Times("0.1 % of requests take 100 times longer", tail=0.001),
    Times("the canary's first 300 requests take 10 times longer", cold=300),
    Times("in one look of 20 everything takes 5 times longer", bursts=0.05),
    Times("1.3 times slower, and 1.5 times is allowed", slower=1.3),
)
SLOWER = (Times("twice as slow", slower=2.0), Times("twice as slow, 1 % take 100 times longer", slower=2.0, tail=0.01))


def aborted_after(times: Times, rng: np.random.Generator) -> float | None:
    """Seconds until a rollout is aborted; None if it is not."""
    evidence = begin_step(Evidence(), ANALYSIS)
    traffic, share = rng.choice(TRAFFICS), rng.choice(SHARES)
    begun = 0
    for look in range(SECONDS // LOOK):
        sent = int(rng.poisson(traffic * LOOK))
        canary = int(rng.binomial(sent, share))
        slow = 5.0 if rng.random() < times.bursts else 1.0
        ours = _draw(times, rng, canary) * slow * times.slower
        ours[: max(0, times.cold - begun)] *= 10
        begun += canary
        theirs = _draw(times, rng, sent - canary) * slow
        until = START + timedelta(seconds=LOOK * (look + 1))
        batch = Batch(until - timedelta(seconds=LOOK), until, _tally(theirs), _tally(ours), number=look + 1)
        evidence = take_in(evidence, batch, ANALYSIS, share=float(share))
        if judge(evidence, ANALYSIS, until).reason == "LatencyHigher":
            return float(LOOK * (look + 1))
    return None


def _draw(times: Times, rng: np.random.Generator, requests: int) -> NDArray[np.float64]:
    """Microseconds."""
    return rng.lognormal(math.log(5000), 0.3, requests) * np.where(rng.random(requests) < times.tail, 100, 1)


def _tally(times: NDArray[np.float64]) -> Tally:
    return Tally(requests=len(times), request_microseconds=int(times.sum()), executions=len(times))


def watch(times: Times, rollouts: int, seed: int) -> list[float]:
    """Seconds until the abort, of those of so many rollouts that were aborted."""
    rng = np.random.default_rng(seed)
    return [seconds for seconds in (aborted_after(times, rng) for _ in range(rollouts)) if seconds is not None]


def said(found: list[float], rollouts: int) -> str:
    when = f", after {statistics.median(found):.0f} s (median)" if found else ""
    return f"{len(found)} of {rollouts:,} aborted ({len(found) / rollouts:.2%}){when}"

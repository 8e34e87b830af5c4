"""Whole rollouts of a version beside its twin, through the planner: how often the twin is aborted where an
assumption is strained.

Each second, requests come in, are assigned by the weights that the proxies have, and are answered by pods that are as busy as
the planner's own numbers of pods make them. Each look writes the text that every pod's Triton would have answered, and it goes
through the operator's parser, its difference and `plan()`. The unit tests' world stands in for the cluster: pods are ready at
once. Left out are skew, restarts and pods that come and go, which bench.judge has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.unit.operator.world import World, entry, spec

from bench.triton import triton_text
from perch.counters import PodScrape, Scrape, difference, parse_counters
from perch.evidence import Aim, Batch, Gathered

LOOK = 3
QUEUE = 8
"""Requests that may wait at a pod before the next is lost."""
LARGEST = 8
"""Requests of a batch, at most."""

Shares = NDArray[np.float64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Null:
    """A kind of rollout. Both versions are the same; what is drawn for each rollout is said as (lowest, highest)."""

    name: str
    outside: str | None = None
    """Why alpha does not cover it; the rate is shown all the same."""
    steps: tuple[tuple[int, int], ...] = ((25, 30), (50, 30), (90, 30), (100, 20))
    """Weight and seconds."""
    replicas: tuple[int, ...] = (2, 4, 6)
    traffic: tuple[float, float] = (10.0, 200.0)
    """Requests per second, log-uniform."""
    errors: tuple[float, float] = (1e-3, 9e-3)
    """Share of requests that fail, whoever answers, log-uniform."""
    load: tuple[float, float] | None = None
    """Of stable's pods before the rollout, as a share of what a pod can answer: beyond its queue requests are lost."""
    lost: str = "rejected"
    """Or cancelled: by clients that will not wait."""
    poison: tuple[float, float] | None = None
    """Share of requests that take along the whole batch that they are in; a busier pod forms larger ones."""
    streams: float = 0.0
    """Share of requests that come over streams, of which one in fifty fails: one sender's."""
    senders: int = 0
    """Clients that ask in turn; what one of them asks fails in three of ten cases."""
    turns: bool = False
    """The gateway takes turns between the versions and draws no lots."""
    retries: int = 0
    """So often a failed request is sent again."""
    uneven: bool = False
    """Pods of a version get different shares of its requests."""


COVERED, SHOWN = 2_000, 400
"""Rollouts of a kind that alpha covers, and of one that it does not."""
NULLS = (
    Null("unequal load per pod, errors at random"),
    Null("the same, uneven pods", uneven=True),
    Null("requests that are rejected by load, pods up to 95 % busy before", load=(0.5, 0.95)),
    Null("requests that are cancelled by load, pods up to 95 % busy before", load=(0.5, 0.95), lost="cancelled"),
    Null(
        "requests that are rejected by load, pods 1.2 to 1.5 times too busy before",
        outside="a guard-rail: the model was overloaded before the rollout",
        load=(1.2, 1.5),
    ),
    Null("poison requests, batches that grow with the load", poison=(2e-4, 1e-3), traffic=(20.0, 200.0)),
    Null("a fifth of the requests over streams, one sender with 2 % bad ones", streams=0.2, errors=(1e-4, 2e-3)),
    Null("senders in turn, one with bad requests, by lot", senders=10, errors=(1e-4, 2e-3), steps=((10, 60), (50, 60))),
    Null(
        "the same, a gateway that takes turns",
        outside="requests are not assigned at random; Perch says so (RequestsInTurn)",
        senders=10,
        turns=True,
        errors=(1e-4, 2e-3),
        steps=((10, 60), (50, 60)),
    ),
    Null(
        "clients that send a failed request up to 3 times again, to 50 %",
        retries=3,
        errors=(1e-3, 2e-3),
        steps=((25, 30), (50, 60)),
    ),
    Null(
        "the same, to 100 %",
        outside="at 100 % nothing is compared, and one bad request counts as often as it is sent",
        retries=3,
        errors=(1e-3, 2e-3),
    ),
)


@dataclass
class Pod:
    counters: Numbers = field(default_factory=lambda: np.zeros(6, np.int64))
    """Succeeded, failed, cancelled, µs, executions, rejected."""
    waiting: float = 0.0

    def overflow(self, requests: int, capacity: float) -> int:
        """Of these requests of a second, those for which there is no place in the queue any more."""
        self.waiting = max(0.0, self.waiting + requests - capacity)
        lost = min(requests, math.ceil(max(0.0, self.waiting - QUEUE)))
        self.waiting -= lost
        return lost


@dataclass
class Cluster:
    """The data plane, the Gateway and the gatherer of one rollout."""

    null: Null
    rng: np.random.Generator
    world: World
    traffic: float
    errors: float
    capacity: float
    """Requests a second that a pod can answer."""
    poison: float
    bad: int
    """Which of the senders sends bad requests: a gateway that takes turns may always give it the canary, or never."""
    pods: dict[int, list[Pod]] = field(default_factory=dict)
    shares: dict[int, Shares] = field(default_factory=dict)
    routed: dict[int, int] = field(default_factory=dict)
    """Weights as the proxies have them: those of a second ago."""
    asked: int = 0
    aim: Aim | None = None
    before: Scrape | None = None
    batches: list[Batch] = field(default_factory=list)

    @classmethod
    def begin(cls, null: Null, rng: np.random.Generator) -> Cluster:
        replicas = int(rng.choice(null.replicas))
        versions = [_entry(version, batching=null.poison is not None) for version in (1, 2)]
        listed: dict[str, Any] = {"versions": versions, "runtime": {"replicas": replicas}}
        world = World(spec(1, 2, **listed))
        world.settle()
        steps = [{"weight": weight, "hold": f"{seconds}s"} for weight, seconds in null.steps]
        if null.steps[-1][0] < 100:
            steps[-1]["hold"] = "Indefinite"
        rollout = {"steps": steps, "scaleDownDelay": "1h", "analysis": {"onInconclusive": "Promote"}}
        world.spec = spec(1, 2, traffic={"stable": 1, "canary": 2}, rollout=rollout, **listed)
        world.generation += 1
        requests = _log_uniform(rng, null.traffic)
        load = rng.uniform(*null.load) if null.load else 0.0
        return cls(
            null,
            rng,
            world,
            requests,
            errors=_log_uniform(rng, null.errors),
            capacity=requests / replicas / load if load else math.inf,
            poison=_log_uniform(rng, null.poison) if null.poison else 0.0,
            bad=int(rng.integers(null.senders)) if null.senders else 0,
        )

    def play(self) -> str | None:
        """The rollout to the end of its steps; the reason of the abort, if there was one."""
        seconds = sum(held for _, held in self.null.steps) + 12 * len(self.null.steps)
        for second in range(1, seconds + 1):
            self._second()
            if second % LOOK == 0:
                self._look()
                self.world.step()
                if self.world.status.aborted:
                    return self.world.status.aborted[0].reason
        return None

    def _second(self) -> None:
        world = self.world
        world.now += timedelta(seconds=1)
        for version in world.servings:
            world.ready(version)
            pods = self.pods.setdefault(version, [])
            wanted = world.servings[version].replicas
            if len(pods) != wanted:
                self.pods[version] = [*pods, *(Pod() for _ in range(wanted - len(pods)))][:wanted]
                even = np.full(wanted, 1 / wanted)
                self.shares[version] = self.rng.dirichlet(np.full(wanted, 2.0)) if self.null.uneven else even
        if self.routed:
            self._requests()
        world.accept()
        self.routed = dict(world.weights)

    def _requests(self) -> None:
        sent = int(self.rng.poisson(self.traffic))
        streamed = int(self.rng.binomial(sent, self.null.streams))
        if streamed:
            # Streams are wholly stable's until the canary has everything.
            whose = 2 if self.routed == {2: 100} else 1
            self._answer(whose, streamed, int(self.rng.binomial(streamed, 0.02)))
        places = self.asked + np.arange(sent - streamed)
        self.asked += sent - streamed
        fails = self.rng.random(len(places)) < self.errors
        if self.null.senders:
            fails |= (places % self.null.senders == self.bad) & (self.rng.random(len(places)) < 0.3)
        if self.null.retries:
            again = np.repeat(places[fails], self.null.retries)
            places, fails = np.concatenate([places, again]), np.concatenate([fails, np.ones(len(again), bool)])
        to_canary = self._to_canary(places)
        for version, mine in ((1, ~to_canary), (2, to_canary)):
            if version in self.pods and mine.any():
                self._answer(version, int(mine.sum()), int(fails[mine].sum()))

    def _to_canary(self, places: Numbers) -> NDArray[np.bool_]:
        share = self.routed.get(2, 0) / 100
        if self.null.turns:
            return np.asarray(np.floor((places + 1) * share) > np.floor(places * share))
        return np.asarray(self.rng.random(len(places)) < share)

    def _answer(self, version: int, requests: int, failing: int) -> None:
        shares = self.shares[version]
        failed = self.rng.multinomial(failing, shares)
        sound = self.rng.multinomial(requests - failing, shares)
        for pod, ours, bad in zip(self.pods[version], sound + failed, failed, strict=True):
            lost = pod.overflow(int(ours), self.capacity)
            executed = int(ours) - lost
            batches, fail = self._execute(executed, min(int(bad), executed))
            rejected, cancelled = (lost, 0) if self.null.lost == "rejected" else (0, lost)
            pod.counters += np.array([executed - fail, fail, cancelled, 5000 * (executed - fail), batches, rejected], np.int64)

    def _execute(self, requests: int, bad: int) -> tuple[int, int]:
        """Executions, and failed requests. A poison request takes its whole batch along."""
        if not self.poison or not requests:
            return requests, bad
        size = min(LARGEST, max(1, round(requests / 10)))
        batches = math.ceil(requests / size)
        poisoned = int(self.rng.binomial(batches, 1 - (1 - self.poison) ** size))
        return batches, min(requests, poisoned * size)

    def _look(self) -> None:
        aim, now = self.world.plans[-1].aim if self.world.plans else None, self.world.now
        if aim is None or self.aim is None or aim.epoch != self.aim.epoch:
            self.aim, self.before, self.batches = aim, None, []
        if aim is None or now < aim.not_before:
            self.world.gathered = Gathered(aim.epoch, self.world.gathering_since) if aim else None
            return
        asked: Sequence[int] = [v for v in (aim.canary, aim.stable) if v is not None]
        scrape = Scrape(now, now, tuple(_scrape(v, i, pod) for v in asked for i, pod in enumerate(self.pods[v])))
        batch = difference(self.before, scrape, aim.canary) if self.before is not None else None
        self.before = scrape
        self.world.looks += 1
        self.batches += [replace(batch, life="life", number=self.world.looks)] if batch is not None else []
        self.world.gathered = Gathered(aim.epoch, self.world.gathering_since, tuple(self.batches))


def _scrape(version: int, place: int, pod: Pod) -> PodScrape:
    succeeded, failed, cancelled, microseconds, executions, rejected = (int(c) for c in pod.counters)
    text = triton_text(version, succeeded, failed, cancelled, microseconds, executions, rejected)
    return PodScrape(f"pod-{version}-{place}/0", version, parse_counters(text, "digits", version))


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return math.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1])))


def _entry(version: int, *, batching: bool) -> dict[str, Any]:
    triton: dict[str, Any] = {"maxBatchSize": LARGEST}
    if batching:
        triton["dynamicBatching"] = {"maxQueueDelayMicroseconds": 500}
    return entry(version, triton=triton)


def aborts(null: Null, rollouts: int, seed: int) -> dict[str, int]:
    """Aborts of so many rollouts, by reason."""
    rng = np.random.default_rng(seed)
    found: dict[str, int] = {}
    for _ in range(rollouts):
        reason = Cluster.begin(null, rng).play()
        if reason is not None:
            found[reason] = found.get(reason, 0) + 1
    return found

"""Whole rollouts of canaries that are as good as stable, through the planner itself, with errors from outside at every moment at
which a batch could be ascribed to the wrong weight.

`Cluster` stands in for the data plane, the Gateway and the gatherer: it sends requests by the weights that the proxies have, lets
Triton's text go through the real parser and difference, and begins with a new baseline for each epoch, as `gather` does. It
leaves out pods that come and go, and skew: bench.judge has these.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import pytest

from bench.triton import triton_text
from perch.counters import PodScrape, Scrape, difference, parse_counters
from perch.evidence import Aim, Batch, Gathered
from perch.plan import rollout

from .world import World, spec

LOOK = 3
STEPS = [{"weight": 5, "hold": "20s"}, {"weight": 50, "hold": "20s"}, {"weight": 100}]
OUTAGE, CALM = 0.3, 0.008
"""Share of all requests that fails, whoever answers: until the canary has everything, and then."""


@dataclass
class Cluster:
    world: World
    rng: random.Random
    traffic: int
    accepts_after: int
    """Requests a second, and the seconds that the Gateway takes to accept a route."""
    counters: dict[int, list[int]] = field(default_factory=lambda: {1: [0, 0], 2: [0, 0]})
    """Succeeded and failed, by version."""
    routed: dict[int, int] = field(default_factory=dict)
    """Weights as the proxies have them: those of a second ago."""
    written_at: datetime | None = None
    aim: Aim | None = None
    before: Scrape | None = None
    batches: list[Batch] = field(default_factory=list)

    def second(self) -> None:
        """Traffic for a second; then the proxies have the weights that stand in the route."""
        world = self.world
        world.now += timedelta(seconds=1)
        for version in world.servings:
            world.ready(version)
        accepted = world.route is None or world.route.accepted
        if world.route is not None and not accepted:
            self.written_at = self.written_at or world.now
            if world.now >= self.written_at + timedelta(seconds=self.accepts_after):
                self.written_at = None
                world.accept()
        rate = CALM if self.routed == {2: 100} else OUTAGE
        for _ in range(self.traffic):
            version = self.rng.choices(list(self.routed), list(self.routed.values()))[0] if self.routed else 1
            self.counters[version][self.rng.random() < rate] += 1
        self.routed = dict(world.weights)

    def look(self) -> None:
        aim, now = self.world.plans[-1].aim, self.world.now
        if aim is None or self.aim is None or aim.epoch != self.aim.epoch:
            self.aim, self.before, self.batches = aim, None, []
        if aim is None or now < aim.not_before:
            self.world.gathered = Gathered(aim.epoch, self.world.gathering_since) if aim else None
            return
        pods = []
        for version in (aim.canary, aim.stable):
            if version is not None:
                text = triton_text(version, *self.counters[version], 0, 0)
                pods.append(PodScrape(f"pod-{version}/1", version, parse_counters(text, "digits", version)))
        scrape = Scrape(now, now, tuple(pods))
        batch = difference(self.before, scrape, aim.canary) if self.before is not None else None
        self.before = scrape
        self.world.looks += 1
        self.batches += [replace(batch, life="life", number=self.world.looks)] if batch is not None else []
        self.world.gathered = Gathered(aim.epoch, self.world.gathering_since, tuple(self.batches))

    def play(self) -> World:
        """The rollout, and half a minute more."""
        for second in range(1, 151):
            self.second()
            if second % LOOK == 0:
                self.look()
                self.world.step()
        return self.world


def play(seed: int, accepts_after: int, traffic: int) -> World:
    world = World(spec(1, 2))
    world.settle()
    analysis = {"onInconclusive": "Promote"}
    world.spec = spec(
        1, 2, traffic={"stable": 1, "canary": 2}, rollout={"steps": STEPS, "scaleDownDelay": "1h", "analysis": analysis}
    )
    world.generation += 1
    return Cluster(world, random.Random(seed), traffic, accepts_after).play()


def test_no_canary_is_aborted_for_errors_from_outside_around_its_changes_of_weight() -> None:
    for seed in range(30):
        world = play(seed, accepts_after=(0, 1, 4, 15)[seed % 4], traffic=(2, 10, 80)[seed % 3])
        assert world.weights == {2: 100}, (seed, world.status.aborted)


def test_with_batches_that_straddle_a_change_of_weight_they_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch for all weights: nothing is dropped, and what both versions suffered counts against the canary alone."""
    assert all(play(seed, accepts_after=0, traffic=80).weights == {2: 100} for seed in range(3))
    monkeypatch.setattr(rollout, "_epoch", lambda trial: "all")
    assert all(play(seed, accepts_after=0, traffic=80).status.aborted for seed in range(3))

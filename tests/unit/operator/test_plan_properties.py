"""What must hold whatever users, pods, Gateways and crashes do, in any order. `World` asserts the invariants at each write:
weights sum to 100, at most two versions have weight, none rises without a ready pod, no pods go while they have traffic."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perch.api import Status
from perch.observed import JobState
from perch.status import build_events
from perch.traffic import Readiness, decide_weights
from perch_exporter.contract import Reason

from .world import World, spec

VERSIONS = (1, 2, 3)

traffic = st.tuples(st.sampled_from(VERSIONS), st.sampled_from((None, *VERSIONS)), st.sampled_from((0, 10, 50, 100))).filter(
    lambda t: t[0] != t[1]
)
step = st.one_of(
    st.tuples(st.just("traffic"), traffic),
    st.tuples(st.just("runtime"), st.sampled_from(({"replicas": 2}, {"replicas": 1}, {"image": "triton:2"}))),
    st.tuples(st.just("pass"), st.none()),
    st.tuples(st.just("crash"), st.integers(0, 6)),
    st.tuples(st.just("well"), st.none()),
    st.tuples(st.just("pods"), st.tuples(st.sampled_from(VERSIONS), st.integers(0, 2))),
    st.tuples(st.just("job fails"), st.sampled_from((Reason.ACCESS_DENIED, Reason.STORE_UNREACHABLE))),
    st.tuples(st.just("gateway"), st.booleans()),
    st.tuples(st.just("time"), st.sampled_from((1, 30, 400))),
    st.tuples(st.just("status lost"), st.none()),
)


class Story:
    """A world to which anything may happen."""

    def __init__(self) -> None:
        self.traffic: tuple[int, int | None, int] = (1, None, 10)
        self.runtime: dict[str, Any] = {}
        self.world = World(self._spec())

    def _spec(self) -> Any:
        stable, canary, weight = self.traffic
        # Longer than any story: a canary that is aborted for its slow start ends otherwise (see RolloutStory).
        made = spec(*VERSIONS, stable=stable, canary=canary, weight=weight, runtime=self.runtime)
        assert made.rollout is not None
        return made.model_copy(update={"rollout": made.rollout.model_copy(update={"progress_deadline": "24h"})})

    def happen(self, what: str, detail: Any) -> None:
        world = self.world
        match what:
            case "traffic":
                self.traffic = detail
                world.spec, world.generation = self._spec(), world.generation + 1
            case "runtime":
                self.runtime = detail
                world.spec, world.generation = self._spec(), world.generation + 1
            case "pass":
                world.step()
            case "crash":
                world.step(writes=detail)
            case "well":
                world.go_well()
            case "pods" if detail[0] in world.servings:
                world.ready(detail[0], min(detail[1], world.servings[detail[0]].replicas))
            case "job fails":
                for name, job in list(world.jobs.items()):
                    if job.state is JobState.RUNNING:
                        world.fail(name, detail)
            case "gateway":
                world.gateway_accepts = detail
            case "time":
                world.now += timedelta(seconds=detail)
            case "status lost":
                world.status = type(world.status)()

    def end(self) -> None:
        self.world.gateway_accepts = True
        self.world.settle()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(step, max_size=30))
def test_any_story_keeps_the_invariants_and_ends_where_the_spec_says(steps: list[tuple[str, Any]]) -> None:
    story = Story()
    for what, detail in steps:
        story.happen(what, detail)
    story.end()
    stable, canary, weight = story.traffic
    wanted = {stable: 100 - weight, canary: weight} if canary else {stable: 100}
    assert story.world.weights == {v: w for v, w in wanted.items() if w}
    assert story.world.ready_condition()[0] == "True"
    # A canary with all the traffic has replaced stable, whose pods leave after scaleDownDelay.
    assert set(story.world.servings) == {v for v in wanted if wanted[v] or v == canary}
    assert set(story.world.services) == {f"digits-v{v}" for v in story.world.servings}
    assert set(story.world.budgets) <= set(story.world.services)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(step, max_size=20))
def test_a_plan_is_idempotent_a_second_pass_over_the_same_world_says_nothing_new(steps: list[tuple[str, Any]]) -> None:
    story = Story()
    for what, detail in steps:
        story.happen(what, detail)
    story.end()
    again = story.world.think()
    assert again.actions == ()
    assert again.status is not None
    assert build_events(story.world.status, again.status) == ()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(step, max_size=20), st.sampled_from(VERSIONS))
def test_a_revert_from_any_state_reaches_stable_without_a_moment_of_no_capacity(
    steps: list[tuple[str, Any]], target: int
) -> None:
    story = Story()
    for what, detail in steps:
        story.happen(what, detail)
    before = len(story.world.written_weights)
    story.happen("traffic", (target, None, 10))
    story.end()
    assert story.world.weights == {target: 100}
    for weights in story.world.written_weights[before:]:
        assert sum(weights.values()) == 100


readiness = st.builds(Readiness, full=st.booleans(), able=st.booleans(), settled=st.booleans()).map(
    lambda r: Readiness(full=r.full, able=r.able or r.full, settled=r.settled)
)


@st.composite
def presents(draw: st.DrawFn) -> dict[int, int]:
    if draw(st.booleans()):
        return {}
    share = draw(st.sampled_from((0, 5, 50, 95, 100)))
    one, other = draw(st.permutations(VERSIONS))[:2]
    return {v: w for v, w in {one: 100 - share, other: share}.items() if w}


@settings(max_examples=2000)
@given(traffic, st.fixed_dictionaries(dict.fromkeys(VERSIONS, readiness)), presents())
def test_weights_sum_to_100_and_rise_only_on_the_ready(
    wanted: tuple[int, int | None, int], ready: dict[int, Readiness], present: dict[int, int]
) -> None:
    """kgateway#11548: an empty backend still gets its share, and weights that are all zero are errors."""
    stable, canary, weight = wanted
    decided = decide_weights(stable, canary, weight, ready, present)
    if decided is None:
        assert not present, "weights that were there never vanish"
        return
    assert sum(decided.values()) == 100
    assert all(0 <= w <= 100 for w in decided.values())
    assert len([w for w in decided.values() if w]) <= 2
    for version, share in decided.items():
        if share > present.get(version, 0):
            assert ready[version].able
            assert version in (stable, canary)


def test_stable_and_canary_both_ready_get_just_what_was_asked_for() -> None:
    both = {1: Readiness(full=True, able=True), 2: Readiness(full=True, able=True)}
    for weight in range(101):
        decided = decide_weights(1, 2, weight, both, {1: 100})
        assert decided == {1: 100 - weight, 2: weight}


def test_a_stable_that_is_half_there_gains_nothing_while_another_answers() -> None:
    ready = {1: Readiness(able=True), 2: Readiness(full=True, able=True)}
    assert decide_weights(1, None, 0, ready, {2: 100}) == {2: 100}


def test_a_stable_that_will_not_get_more_pods_takes_over_with_those_it_has() -> None:
    ready = {1: Readiness(able=True, settled=True), 2: Readiness(full=True, able=True)}
    assert decide_weights(1, None, 0, ready, {2: 100}) == {1: 100}


def test_a_stable_that_is_half_there_takes_over_from_a_version_that_is_down() -> None:
    assert decide_weights(1, None, 0, {1: Readiness(able=True)}, {2: 100}) == {1: 100}


BROKEN = Readiness()
ONE_POD = Readiness(able=True)
ALL_PODS = Readiness(full=True, able=True)


@pytest.mark.parametrize(
    ("stable", "canary", "present", "decided"),
    [
        pytest.param(BROKEN, ALL_PODS, {1: 100}, {1: 70, 2: 30}, id="a canary that is ready first has its share"),
        pytest.param(BROKEN, ALL_PODS, {1: 90, 2: 10}, {1: 90, 2: 10}, id="it takes no further step"),
        pytest.param(BROKEN, ALL_PODS, {1: 70, 2: 30}, {1: 70, 2: 30}, id="and no more than its share"),
        pytest.param(BROKEN, ONE_POD, {1: 100}, {1: 100}, id="not with a part of its pods"),
        pytest.param(BROKEN, BROKEN, {1: 70, 2: 30}, {1: 70, 2: 30}, id="nobody is ready"),
        pytest.param(BROKEN, ALL_PODS, {3: 100}, {3: 70, 2: 30}, id="a former version that is down keeps the rest"),
        pytest.param(ONE_POD, ALL_PODS, {1: 100}, {1: 70, 2: 30}, id="a part of stable is no reason to wait"),
    ],
)
def test_where_stable_has_no_ready_pod_a_ready_canary_has_its_own_share_and_no_more(
    stable: Readiness, canary: Readiness, present: dict[int, int], decided: dict[int, int]
) -> None:
    assert decide_weights(1, 2, 30, {1: stable, 2: canary}, present) == decided


def test_while_a_former_version_answers_a_canary_does_not_go_before_stable() -> None:
    assert decide_weights(1, 2, 30, {1: BROKEN, 2: ALL_PODS, 3: ALL_PODS}, {3: 100}) == {3: 100}


@pytest.mark.parametrize(
    ("weight", "ready", "told"),
    [(90, 0, True), (90, 1, False), (0, 0, False)],
    ids=["all of them broke", "one is left", "without traffic"],
)
def test_a_version_with_traffic_and_no_ready_pod_is_a_warning_at_once(weight: int, ready: int, told: bool) -> None:
    def status(pods: int, message: str | None = None) -> Status:
        said = {"version": 1, "artifactRevision": "a", "phase": "Serving", "weight": weight, "readyReplicas": pods}
        return Status.model_validate({"versions": [said | ({"message": message} if message else {})]})

    crashed = status(ready, "triton ended with code 1: Signal (11) received.")
    found = [event for event in build_events(status(2), crashed) if event.reason == "NoReadyPods"]
    assert bool(found) is told
    for event in found:
        assert event.kind == "Warning"
        assert event.message == (
            "version 1 has 90 % of the traffic and no ready pod: triton ended with code 1: Signal (11) received."
        )
    assert not [event for event in build_events(crashed, crashed) if event.reason == "NoReadyPods"]


# --- rollouts by steps -----------------------------------------------------------------------------------------------------

ROLLOUTS = (
    [{"weight": 10, "hold": "Indefinite"}],
    [{"weight": 5, "hold": "1m"}, {"weight": 50, "hold": "30s"}, {"weight": 100}],
    [{"weight": 25, "hold": "10s"}, {"weight": 75, "hold": "10s"}, {"weight": 100}],
    [{"weight": 0, "hold": "10s"}, {"weight": 40, "hold": "Indefinite"}],
    [{"weight": 100}],
)
USUAL = (st.tuples(st.just("pass"), st.none()), st.tuples(st.just("well"), st.none()))
EVENTS = st.one_of(
    *USUAL * 4,
    st.tuples(st.just("traffic"), st.sampled_from(((1, None), (1, 2), (1, 3), (2, None), (2, 3), (2, 1), (3, 1)))),
    st.tuples(st.just("steps"), st.sampled_from(ROLLOUTS)),
    st.tuples(st.just("replicas"), st.sampled_from((2, 4, 10))),
    st.tuples(st.just("surge"), st.sampled_from((None, "WithinReplicas"))),
    st.tuples(st.just("mirror"), st.sampled_from((None, 50))),
    st.tuples(st.just("paused"), st.booleans()),
    st.tuples(st.just("runtime"), st.sampled_from(({}, {"image": "triton:2"}))),
    st.tuples(st.just("retry"), st.integers(1, 3)),
    st.tuples(st.just("requests"), st.sampled_from(((400, 0), (400, 400), (0, 0)))),
    st.tuples(st.just("pass"), st.none()),
    st.tuples(st.just("crash"), st.integers(0, 6)),
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.just("well"), st.none()),
    st.tuples(st.just("pods"), st.tuples(st.sampled_from((1, 2, 3)), st.integers(0, 10))),
    st.tuples(st.just("gateway"), st.booleans()),
    st.tuples(st.just("time"), st.sampled_from((1, 30, 400))),
    st.tuples(st.just("status lost"), st.none()),
)


class RolloutStory:
    """A world in which canaries go through steps, fail, and are committed anew at any moment."""

    def __init__(self) -> None:
        self.wish: dict[str, Any] = {"traffic": (1, None), "steps": ROLLOUTS[1], "replicas": 4, "runtime": {}}
        self.world = World(self._spec())

    def _spec(self) -> Any:
        wish = self.wish
        stable, canary = wish["traffic"]
        traffic: dict[str, Any] = {"stable": stable} | ({"canary": canary} if canary else {})
        if canary and wish.get("mirror"):
            traffic["mirror"] = {"percent": wish["mirror"]}
        rollout = {"steps": wish["steps"], "scaleDownDelay": "1m", "paused": wish.get("paused", False)}
        rollout |= {"surge": wish["surge"]} if wish.get("surge") else {}
        rollout |= {"retryAt": f"2026-01-01T00:00:0{wish['retry']}Z"} if wish.get("retry") else {}
        return spec(*VERSIONS, traffic=traffic, rollout=rollout, runtime={"replicas": wish["replicas"], **wish["runtime"]})

    def happen(self, what: str, detail: Any) -> None:
        world = self.world
        match what:
            case "requests" if world.plans:
                world.feed((3600, 0), detail)
            case "pass":
                world.step()
            case "crash":
                world.step(writes=detail)
                world.restart()
            case "restart":
                world.restart()
            case "well":
                world.go_well()
            case "pods" if detail[0] in world.servings:
                world.ready(detail[0], min(detail[1], world.servings[detail[0]].replicas))
            case "gateway":
                world.gateway_accepts = detail
            case "time":
                world.now += timedelta(seconds=detail)
            case "status lost":
                world.status = type(world.status)()
            case "traffic" | "steps" | "replicas" | "surge" | "mirror" | "paused" | "runtime" | "retry":
                self.wish[what] = detail
                world.spec, world.generation = self._spec(), world.generation + 1


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(EVENTS, max_size=80))
def test_any_rollout_keeps_the_invariants_and_comes_to_an_end(events: list[tuple[str, Any]]) -> None:
    """World asserts them at each write: the sum, two versions at most, nothing for the unready, pods for the traffic there is."""
    story = RolloutStory()
    for what, detail in events:
        story.happen(what, detail)
    story.happen("paused", False)
    story.happen("gateway", True)
    story.world.settle(passes=600)
    world, (stable, canary) = story.world, story.wish["traffic"]
    last = story.wish["steps"][-1]["weight"]
    out = {a.version for a in world.status.aborted}
    wanted = {stable: 100} if canary is None or canary in out else {stable: 100 - last, canary: last}
    assert world.weights == {v: w for v, w in wanted.items() if w}
    assert (world.ready_condition()[0] == "True") is (canary not in out)
    if canary is None:
        assert world.servings[stable].replicas == story.wish["replicas"]

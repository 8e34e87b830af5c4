"""The rollout of a canary, case by case: it goes forward on evidence, comes back by itself, and forgets nothing in a restart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from random import Random
from typing import Any

import pytest

from perch.api import Status
from perch.evidence import Gathered, Reading
from perch.observed import PodTrouble
from perch.plan import Apply
from perch.status import IN_TURN, build_events, format_time
from perch_exporter.contract import Accuracy, Tooling, Verdict

from .world import World, entry, spec

STEPS = [{"weight": 5, "hold": "2m"}, {"weight": 50, "hold": "5m"}, {"weight": 100}]


def rollout(**more: Any) -> dict[str, Any]:
    return {"steps": STEPS, "scaleDownDelay": "1m", **more}


def releasing(**more: Any) -> World:
    """Version 1 serves, and version 2 was just committed as its canary."""
    world = World(spec(1, 2))
    world.settle()
    commit(world, **more)
    return world


def commit(world: World, stable: int = 1, canary: int | None = 2, versions: tuple[int, ...] = (1, 2), **more: Any) -> None:
    top = {k: more.pop(k) for k in ("runtime", "routing") if k in more}
    traffic = {"stable": stable} | ({"canary": canary} if canary else {}) | more.pop("traffic", {})
    world.spec = spec(*versions, traffic=traffic, rollout=rollout(**more), **top)
    world.generation += 1


def until_accepted(world: World, weight: int) -> None:
    """Let pods and Gateway do well until the canary has this weight and the hold counts."""
    for _ in range(10):
        world.step()
        world.go_well()
        step = world.status.step
        if step is not None and step.weight == weight and step.accepted_at is not None:
            return
    raise AssertionError(f"never at {weight} %: {world.status.step} {world.weights} {world.ready_condition()}")


def message(world: World) -> str:
    condition = world.status.condition("Ready")
    assert condition is not None
    return condition.message


def go_through(world: World, seconds: int, **counts: Any) -> None:
    """Traffic in batches of 3 s, with a pass after each."""
    end = world.now + timedelta(seconds=seconds)
    while world.now < end:
        world.feed(**counts)
        world.step()


def measured(correct: int, samples: int = 1000, data: str = "d") -> Accuracy:
    return Accuracy(
        verdict=Verdict.PASSED, dataset_sha256=data * 64, samples=samples, correct=correct, checkpoint_correct=correct
    )


def compared(stable: Accuracy | None, canary: Accuracy | None, **gate: str) -> World:
    """Version 2 is listed with a limit on how far it may fall below version 1, and then committed as its canary."""
    data = {"uri": "s3://data/test.npz", "sha256": "d" * 64}
    second = entry(2, verification={"accuracy": {"dataset": data, "maximumDropFromStable": "0.01", **gate}})
    world = World(spec(1, 2, versions=[entry(1), second]))
    world.accuracies = {v: found for v, found in ((1, stable), (2, canary)) if found}
    world.settle()
    world.spec = spec(1, 2, versions=[entry(1), second], traffic={"stable": 1, "canary": 2}, rollout=rollout())
    world.generation += 1
    return world


# --- forward -------------------------------------------------------------------------------------------------------------


def test_a_canary_that_does_well_goes_through_its_steps_and_awaits_the_commit_that_finishes_the_release() -> None:
    world = releasing()
    world.settle()
    assert [w for w in world.written_weights if 2 in w] == [
        {1: 95, 2: 5},
        {1: 50, 2: 50},
        {1: 0, 2: 100},
        {2: 100},
    ]
    assert world.ready_condition() == ("True", "AwaitingPromotion")
    assert "commit traffic {stable: 2}" in message(world)
    assert set(world.servings) == {2}, "the former stable is scaled away after scaleDownDelay"


def test_the_commit_that_finishes_the_release_restarts_nothing_and_is_told_in_history() -> None:
    world = releasing()
    world.settle()
    rendered = list(world.rendered)
    commit(world, stable=2, canary=None)
    world.settle()
    assert world.rendered == rendered
    assert world.ready_condition() == ("True", "Serving")
    assert [(o.version, o.outcome) for o in world.status.history] == [(2, "Promoted")]
    assert world.status.step is None


def test_the_hold_counts_from_the_gateways_acceptance_not_from_the_write() -> None:
    world = releasing()
    world.gateway_accepts = False
    world.settle_pods()
    world.now += timedelta(hours=1)
    world.step()
    assert world.status.step is not None
    assert world.status.step.accepted_at is None
    assert world.ready_condition()[0] == "False"
    world.gateway_accepts = True
    until_accepted(world, 5)
    assert world.status.step.until is None or world.status.step.until > world.status.step.started_at
    go_through(world, 60)
    assert world.weights == {1: 95, 2: 5}


def test_no_hold_is_shortened_by_good_evidence_nor_by_the_clock_alone() -> None:
    world = releasing()
    until_accepted(world, 5)
    go_through(world, 110, canary=(1000, 0))
    assert world.weights == {1: 95, 2: 5}, "the evidence suffices, the time does not"
    other = releasing()
    until_accepted(other, 5)
    other.now += timedelta(days=1)
    other.step()
    assert other.weights == {1: 95, 2: 5}, "the time suffices, the evidence does not"


def test_status_tells_the_step_its_weight_since_when_until_when_and_why_it_waits() -> None:
    world = releasing()
    until_accepted(world, 5)
    world.step()
    step = world.status.step
    assert step is not None
    assert (step.index, step.weight) == (0, 5)
    assert step.accepted_at is not None
    assert step.until == (world.now + timedelta(minutes=2, seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert step.waiting_for is not None
    assert "until" in step.waiting_for
    assert world.ready_condition() == ("False", "Holding")


def test_a_weight_of_0_without_mirror_is_held_by_time_alone() -> None:
    world = releasing(steps=[{"weight": 0, "hold": "1m"}, {"weight": 100}])
    world.settle()
    assert world.weights == {2: 100}


def copies(world: World) -> list[str]:
    """Who is copied: `users`, or nobody in a `rehearsal`."""
    rules = world.route.spec["rules"] if world.route else []
    mirrored = [rule for rule in rules if any(part["type"] == "RequestMirror" for part in rule.get("filters", []))]
    return ["rehearsal" if "headers" in rule["matches"][0] else "users" for rule in mirrored]


def test_a_mirror_is_rehearsed_before_it_is_used_and_the_hold_counts_from_its_use() -> None:
    world = releasing(steps=[{"weight": 0, "hold": "1m"}, {"weight": 100}], traffic={"mirror": {"percent": 50}})
    seen = []
    for _ in range(12):
        world.step()
        if copies(world) and (not seen or seen[-1] != copies(world)):
            seen.append(copies(world))
        assert world.status.step is None or world.status.step.accepted_at is None or copies(world) == ["users", "users"]
        world.go_well()
    assert seen == [["rehearsal", "rehearsal"], ["users", "users"]]
    assert world.status.step is not None
    assert world.status.step.accepted_at is not None


def test_a_gateway_that_knows_no_mirror_costs_no_user_a_request_and_says_so() -> None:
    world = releasing(steps=[{"weight": 0, "hold": "1m"}, {"weight": 100}], traffic={"mirror": {"percent": 50}})
    for _ in range(12):
        world.step()
        assert "users" not in copies(world)
        refused = bool(copies(world))
        world.gateway_accepts = not refused
        world.go_well()
        if refused and world.route:
            world.route = replace(world.route, reason="UnsupportedValue", message="no such filter")
    assert world.weights == {1: 100}
    assert world.ready_condition() == ("False", "UnsupportedValue")
    assert "no such filter" in message(world)


@pytest.mark.parametrize(
    ("percent", "stable", "canary", "told"),
    [
        pytest.param(20, 950, 50 + 200, False, id="as many as were asked for"),
        pytest.param(20, 950, 50 + 1000, True, id="all of them"),
        pytest.param(50, 950, 50 + 1000, True, id="all, where half was asked for"),
        pytest.param(20, 95, 5 + 100, False, id="all of them, and too few to tell"),
        pytest.param(60, 950, 50 + 1000, False, id="all, where most were asked for"),
    ],
)
def test_a_gateway_that_ignores_a_mirrors_percent_is_told_of_once_in_a_step(
    percent: int, stable: int, canary: int, told: bool
) -> None:
    world = releasing(traffic={"mirror": {"percent": percent}})
    until_accepted(world, 5)
    go_through(world, 9 if stable > 100 else 3, stable=(stable, 0), canary=(canary, 0))
    events = [event for plan in world.plans for event in plan.events]
    assert [(e.kind, e.reason) for e in events] == [("Warning", "MirrorPercentExceeded")] * told
    if told:
        assert "about 100 of 100 requests are copied to version 2" in events[0].message
        assert f"traffic.mirror.percent is {percent}" in events[0].message


def test_a_gateway_that_takes_turns_is_told_of_in_an_event_and_a_condition() -> None:
    world = releasing(steps=[{"weight": 10, "hold": "Indefinite"}])
    until_accepted(world, 10)
    go_through(world, 3 * 45, stable=(270, 0), canary=(30, 0))
    events = [event for plan in world.plans for event in plan.events]
    assert [(e.kind, e.reason) for e in events] == [("Warning", "RequestsInTurn")]
    accepted = world.status.condition("TrafficAccepted")
    assert accepted is not None
    assert (accepted.status, accepted.message) == ("True", f"accepted; {IN_TURN}")
    assert world.ready_condition() == ("True", "SplitHeld")


def test_a_gateway_that_draws_lots_is_not_called_another_thing() -> None:
    world, chance = releasing(steps=[{"weight": 10, "hold": "Indefinite"}]), Random(1)
    until_accepted(world, 10)
    for _ in range(200):
        drawn = sum(chance.random() < 0.1 for _ in range(100))
        go_through(world, 3, stable=(100 - drawn, 0), canary=(drawn, 0))
    assert not [event for plan in world.plans for event in plan.events]
    assert world.status.evidence is not None
    assert not world.status.evidence.lots.in_turn


def test_a_fixed_split_is_ready_and_still_judged() -> None:
    world = releasing(steps=[{"weight": 10, "hold": "Indefinite"}])
    world.settle()
    assert world.ready_condition() == ("True", "SplitHeld")
    go_through(world, 30, canary=(50, 50))
    assert world.weights == {1: 100}
    assert world.ready_condition() == ("False", "ErrorRateHigher")


# --- pause, edit, restart --------------------------------------------------------------------------------------------------


def test_paused_holds_the_weight_where_it_is_and_still_aborts_on_an_alarm() -> None:
    world = releasing()
    until_accepted(world, 5)
    commit(world, paused=True)
    go_through(world, 600)
    assert world.weights == {1: 95, 2: 5}
    assert world.ready_condition() == ("True", "Paused")
    go_through(world, 30, canary=(50, 50))
    assert world.weights == {1: 100}


def test_paused_before_the_first_step_gives_the_canary_nothing() -> None:
    world = releasing(paused=True)
    world.settle()
    assert world.weights == {1: 100}
    assert world.ready_condition() == ("True", "Paused")
    commit(world)
    until_accepted(world, 5)


def at_50() -> World:
    world = releasing()
    until_accepted(world, 5)
    go_through(world, 150)
    until_accepted(world, 50)
    return world


def test_edited_steps_take_effect_from_the_present_weight_and_go_neither_back_nor_further_unjudged() -> None:
    world = at_50()
    rendered, written = list(world.rendered), len(world.written_weights)
    lower = [{"weight": 1, "hold": "1h"}, {"weight": 20, "hold": "1m"}]
    commit(world, steps=[*lower, {"weight": 60, "hold": "1m"}, {"weight": 100}])
    go_through(world, 50)
    assert world.weights == {1: 50, 2: 50}, "it stays until the hold of the step below, a minute, is over"
    go_through(world, 600)
    world.settle()
    assert [w.get(2, 0) for w in world.written_weights[written:]] == [60, 100, 100]
    assert world.rendered == rendered, "rollout restarts no pod"


@pytest.mark.parametrize(
    ("steps", "goes"),
    [
        pytest.param([{"weight": 60, "hold": "1m"}, {"weight": 100}], 60, id="all are above"),
        pytest.param([{"weight": 5, "hold": "Indefinite"}], 5, id="all are below"),
    ],
)
def test_edited_steps_between_which_the_present_weight_is_not_move_it(steps: list[dict[str, Any]], goes: int) -> None:
    world = at_50()
    commit(world, steps=steps)
    until_accepted(world, goes)
    evidence = world.status.evidence
    assert evidence is not None
    assert evidence.step_canary.requests == 0, "another weight is judged on requests of its own"


def test_a_shorter_hold_takes_effect_at_once() -> None:
    world = releasing()
    until_accepted(world, 5)
    go_through(world, 30)
    commit(world, steps=[{"weight": 5, "hold": "10s"}, {"weight": 100}])
    world.feed()
    world.step()
    assert world.status.step is not None
    assert world.status.step.weight == 100


def test_after_a_restart_the_step_goes_on_where_it_was_and_asks_for_fresh_evidence() -> None:
    world = releasing()
    until_accepted(world, 5)
    go_through(world, 60)
    seen = world.status.evidence
    world.restart()
    world.now += timedelta(minutes=10)
    world.gathering_since = world.now
    world.step()
    assert world.weights == {1: 95, 2: 5}, "the hold is over, but nobody looked meanwhile"
    assert seen is not None
    assert world.status.evidence is not None
    assert world.status.evidence.canary.requests == seen.canary.requests, "what was seen before is not forgotten"
    go_through(world, 57)
    assert world.weights == {1: 95, 2: 5}
    go_through(world, 9)
    assert world.status.step is not None
    assert world.status.step.weight == 50


def short_hold(**more: Any) -> World:
    """Just before the end of a hold of five seconds, on evidence that suffices."""
    world = releasing(steps=[{"weight": 5, "hold": "5s"}, {"weight": 100}], **more)
    until_accepted(world, 5)
    world.feed(canary=(1000, 0))
    world.step()
    assert world.weights == {1: 95, 2: 5}
    return world


def test_after_a_restart_a_short_hold_too_waits_for_evidence_of_its_own() -> None:
    """Counts of the former process, less than a minute old, pass by nobody's watch but its own."""
    world = short_hold()
    world.restart()
    decided = world.step()
    for _ in range(8):
        world.now += timedelta(seconds=2)
        assert decided.aim is not None
        world.gathered = Gathered(decided.aim.epoch, world.gathering_since)
        decided = world.step()
        assert world.weights == {1: 95, 2: 5}
    assert world.ready_condition() == ("False", "NoEvidence")
    assert "no counts have come since the operator began to look" in message(world)
    world.feed(canary=(1, 0))
    world.step()
    assert world.status.step is not None
    assert world.status.step.weight == 100


def test_after_a_restart_a_metric_too_is_read_anew() -> None:
    metrics = [{"name": "m", "query": "m", "max": "3"}]
    world = short_hold(analysis={"prometheus": {"address": "http://prometheus:9090", "metrics": metrics}})

    def read() -> None:
        assert world.gathered is not None
        world.gathered = replace(world.gathered, readings={"m": Reading("m", world.now, 1.0)})

    read()
    world.step()
    world.now += timedelta(seconds=2)
    world.restart()
    world.step()
    go_through(world, 12)
    assert world.weights == {1: 95, 2: 5}
    assert world.ready_condition() == ("False", "NoMetric")
    assert "metric m has not been read since the operator began to look" in message(world)
    read()
    world.step()
    assert world.status.step is not None
    assert world.status.step.weight == 100


def test_a_restart_does_not_keep_a_canary_without_requests_from_saying_so() -> None:
    world = releasing(steps=[{"weight": 5, "hold": "5s"}, {"weight": 100}])
    until_accepted(world, 5)
    world.restart()
    world.step()
    go_through(world, 15, canary=(0, 0))
    assert world.ready_condition() == ("False", "Inconclusive")
    assert "has answered 0 requests in this step and 300 are needed" in message(world)


def test_a_batch_is_taken_in_once_whether_or_not_the_status_write_succeeded() -> None:
    world = releasing()
    until_accepted(world, 5)
    world.feed()
    world.step(writes=0)
    world.step()
    world.step()
    assert world.status.evidence is not None
    assert world.status.evidence.canary.requests == 100


def test_counts_of_another_epoch_are_not_taken_in() -> None:
    world = releasing()
    until_accepted(world, 5)
    world.feed(canary=(100, 100))
    assert world.gathered is not None
    world.gathered = replace(world.gathered, epoch="former")
    world.step()
    assert world.weights == {1: 95, 2: 5}


# --- inconclusive ----------------------------------------------------------------------------------------------------------


def test_too_few_requests_pause_the_step_and_it_goes_on_by_itself_when_there_are_enough() -> None:
    """flagger#1353, #1035, #1011: low traffic fails releases, or passes them unseen."""
    world = releasing()
    until_accepted(world, 5)
    go_through(world, 200, canary=(1, 0))
    assert world.weights == {1: 95, 2: 5}
    assert world.ready_condition() == ("False", "Inconclusive")
    assert "300" in message(world), "it says how many are needed"
    go_through(world, 30, canary=(100, 0))
    assert world.status.step is not None
    assert world.status.step.weight == 50


def test_on_inconclusive_promote_goes_on_and_abort_goes_back() -> None:
    for policy, weight in (("Promote", 50), ("Abort", 0)):
        world = releasing(analysis={"onInconclusive": policy})
        until_accepted(world, 5)
        go_through(world, 130, canary=(1, 0))
        if weight:
            assert world.status.step is not None
            assert world.status.step.weight == weight
        else:
            assert world.weights == {1: 100}
            assert world.ready_condition() == ("False", "Inconclusive")


@pytest.mark.parametrize("policy", ["Pause", "Promote", "Abort"])
def test_where_no_evidence_can_be_had_the_weight_holds_and_after_the_deadline_it_stalls_but_never_moves(policy: str) -> None:
    world = releasing(analysis={"onInconclusive": policy})
    until_accepted(world, 5)
    world.feed()
    world.step()
    assert world.gathered is not None
    epoch = world.gathered.epoch
    world.gathered = replace(world.gathered, epoch=epoch, trouble="pod digits-v2-x does not answer: timeout")
    world.now += timedelta(minutes=3)
    world.step()
    assert world.ready_condition() == ("False", "NoEvidence")
    assert "digits-v2-x" in message(world)
    world.now += timedelta(minutes=11)
    world.step()
    assert world.status.condition("Stalled") is not None
    assert world.weights == {1: 95, 2: 5}


# --- back ------------------------------------------------------------------------------------------------------------------


def aborted() -> World:
    world = releasing()
    until_accepted(world, 5)
    go_through(world, 30, canary=(20, 20))
    return world


def test_an_alarm_takes_all_weight_in_one_write_and_says_why() -> None:
    world = releasing()
    until_accepted(world, 5)
    writes = len(world.written_weights)
    before = world.status
    world.feed(canary=(20, 20))
    world.step()
    assert world.written_weights[writes:] == [{1: 100, 2: 0}]
    assert world.ready_condition() == ("False", "ErrorRateHigher")
    assert [(a.version, a.reason) for a in world.status.aborted] == [(2, "ErrorRateHigher")]
    stalled, available = world.status.condition("Stalled"), world.status.condition("Available")
    assert stalled is not None
    assert available is not None
    assert available.status == "True"
    assert any(e.kind == "Warning" and e.reason == "ErrorRateHigher" for e in build_events(before, world.status))
    assert [(o.version, o.outcome) for o in world.status.history] == [(2, "Aborted")]


def test_an_aborted_canary_keeps_its_pods_for_inspection_then_they_go_and_it_stays_aborted() -> None:
    world = aborted()
    kept = f"Its pods are kept for inspection until {format_time(parse(world.status.aborted[0].time) + timedelta(minutes=30))}"
    world.go_well()
    world.step()
    world.now += timedelta(minutes=29)
    world.step()
    assert 2 in world.servings
    assert kept in message(world)
    world.now += timedelta(minutes=2)
    for _ in range(4):
        world.step()
        world.go_well()
    assert 2 not in world.servings
    assert "kept for inspection" not in message(world)
    assert world.ready_condition() == ("False", "ErrorRateHigher")
    assert world.weights == {1: 100}
    for _ in range(5):
        world.now += timedelta(days=1)
        assert world.step().actions == ()


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"retryAt": "2026-01-02T00:00:00Z"}, True),
        ({"runtime": {"image": "triton:2"}}, True),
        ({"runtime": {"replicas": 3}}, False),
        ({"steps": [{"weight": 1, "hold": "1m"}, {"weight": 100}]}, False),
        ({"scaleDownDelay": "2m"}, False),
    ],
)
def test_an_aborted_canary_is_tried_again_only_for_another_hash_or_when_retry_at_moves(
    change: dict[str, Any], again: bool
) -> None:
    world = aborted()
    commit(world, **change)
    for _ in range(8):
        world.step()
        world.go_well()
    assert (world.weights.get(2, 0) > 0) is again
    assert bool(world.status.aborted) is not again


def test_an_abort_survives_the_commit_that_ends_the_release_and_a_second_attempt_at_the_same_version() -> None:
    world = aborted()
    commit(world, canary=None)
    world.settle()
    assert world.ready_condition() == ("True", "Serving")
    commit(world)
    world.settle()
    assert world.weights == {1: 100}
    assert world.ready_condition() == ("False", "ErrorRateHigher")


def test_the_user_may_promote_an_aborted_version_all_the_same() -> None:
    world = aborted()
    commit(world, stable=2, canary=None)
    world.settle()
    assert world.weights == {2: 100}
    assert world.status.aborted == []


@pytest.mark.parametrize("writes", [0, 1])
def test_an_operator_that_dies_in_the_middle_of_an_abort_goes_on_with_it_and_not_with_the_rollout(writes: int) -> None:
    """What it had gathered is lost with it: nothing but the record speaks against the canary any more."""
    world = releasing()
    until_accepted(world, 5)
    world.feed(canary=(20, 20))
    world.step(writes=writes)
    world.restart()
    world.settle()
    assert [w.get(2, 0) for w in world.written_weights if 2 in w] == [5, 0]
    assert world.weights == {1: 100}
    assert world.ready_condition() == ("False", "ErrorRateHigher")


@pytest.mark.parametrize("reason", ["CrashLoop", "OutOfMemory", "GoldenMismatch"])
def test_pods_that_end_again_and_again_abort_with_their_own_words_before_a_user_saw_the_canary(reason: Any) -> None:
    world = releasing()
    world.step()
    world.go_well_except_pods()
    world.step()
    world.ready(2, 0, trouble=PodTrouble(reason, "exit code 137: out of what it needs"))
    world.step()
    assert world.ready_condition() == ("False", reason)
    assert "out of what it needs" in message(world)
    assert all(w.get(2, 0) == 0 for w in world.written_weights)


def test_a_canary_that_lost_readiness_loses_its_weight_at_once_and_is_aborted_when_it_does_not_recover() -> None:
    world = releasing()
    until_accepted(world, 5)
    go_through(world, 9)
    world.ready(2, 0, trouble=PodTrouble("NotReady", "triton answers 400"))
    world.step()
    assert world.weights == {1: 100}
    assert world.status.aborted == []
    world.now += timedelta(seconds=31)
    world.step()
    assert world.ready_condition() == ("False", "ReadinessLost")


def test_a_canary_that_recovers_in_time_gets_its_weight_back_and_holds_anew() -> None:
    world = releasing()
    until_accepted(world, 5)
    go_through(world, 60)
    world.ready(2, 0, trouble=PodTrouble("NotReady", "triton answers 400"))
    world.step()
    world.go_well()
    world.now += timedelta(seconds=10)
    world.ready(2, trouble=None)
    until_accepted(world, 5)
    assert world.status.step is not None
    assert world.status.step.accepted_at is not None
    go_through(world, 90)
    assert world.status.step.weight == 5


def test_a_canary_that_cannot_be_scheduled_harms_nobody_and_is_aborted_past_the_deadline_with_the_schedulers_words() -> None:
    world = World(spec(1, 2, runtime={"replicas": 2}))
    world.settle()
    commit(world, progressDeadline="5m", runtime={"replicas": 2})
    world.step()
    world.go_well_except_pods()
    world.step()
    said = "Unschedulable: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    world.ready(2, 0, words=said, trouble=PodTrouble("Unschedulable", said))
    world.step()
    assert world.ready_condition() == ("False", "Starting")
    assert "Insufficient nvidia.com/gpu" in message(world)
    world.now += timedelta(minutes=4)
    world.step()
    assert world.status.aborted == []
    world.now += timedelta(minutes=2)
    world.step()
    assert world.ready_condition() == ("False", "Unschedulable")
    assert "WithinReplicas" in message(world)
    assert world.weights == {1: 100}


@pytest.mark.parametrize(
    ("words", "helps"),
    [
        ("0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector.", False),
        ("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", True),
    ],
)
def test_a_plan_for_which_no_node_has_the_right_gpu_names_the_labels_and_not_a_way_out_that_is_none(
    words: str, helps: bool
) -> None:
    gpu = {"limits": {"nvidia.com/gpu": 1}}
    plans = {
        "versions": [entry(version, conversion={"target": "TensorRT"}) for version in (1, 2)],
        "builder": {"tensorrtImage": "perch-tensorrt:25.10", "resources": gpu},
        "runtime": {"image": "triton:25.10", "tensorrtVersion": "10.13.3.9", "resources": gpu, "replicas": 2},
    }
    world = World(spec(1, 2, **plans))
    world.tooling = Tooling(torch="2", onnx="1", onnxruntime="1", opset=18, tensorrt="10.13.3.9", compute_capability="9.0")
    world.settle()
    world.spec = spec(1, 2, traffic={"stable": 1, "canary": 2}, rollout=rollout(progressDeadline="5m"), **plans)
    world.generation += 1
    world.step()
    world.ready(2, 0, words=words, trouble=PodTrouble("Unschedulable", words))
    world.step()
    world.now += timedelta(minutes=6)
    world.step()
    assert world.ready_condition() == ("False", "Unschedulable")
    named = "nvidia.com/gpu.compute.major=9 and nvidia.com/gpu.compute.minor=0" in message(world)
    assert (named, "WithinReplicas" in message(world)) == (not helps, helps)


def test_stable_that_breaks_while_the_canary_is_well_moves_no_weight() -> None:
    world = releasing()
    until_accepted(world, 5)
    world.ready(1, 0)
    go_through(world, 300, stable=(0, 0), canary=(100, 0))
    assert world.weights == {1: 95, 2: 5}
    available = world.status.condition("Available")
    assert available is not None
    assert available.status == "False"


def starting() -> World:
    world = releasing()
    world.step()
    world.go_well_except_pods()
    world.step()
    return world


def unaccepted() -> World:
    world = releasing()
    until_accepted(world, 5)
    go_through(world, 130)
    world.gateway_accepts = False
    world.settle_pods()
    return world


def at_5(seconds: int = 9, canary: tuple[int, int] = (100, 0), **more: Any) -> World:
    world = releasing()
    until_accepted(world, 5)
    commit(world, **more)
    go_through(world, seconds, canary=canary)
    return world


def unseen() -> World:
    world = at_5()
    blind(world, 15)
    return world


def rolling() -> World:
    world = at_50()
    commit(world, runtime={"image": "triton:other"})
    world.step()
    return world


def complete() -> World:
    world = at_50()
    go_through(world, 310)
    until_accepted(world, 100)
    world.step()
    return world


@pytest.mark.parametrize(
    ("stuck", "reason"),
    [
        (starting, "Starting"),
        (unaccepted, "ShiftingTraffic"),
        (at_5, "Holding"),
        (lambda: at_5(300, (1, 0)), "Inconclusive"),
        (unseen, "NoEvidence"),
        (lambda: at_5(paused=True), "Paused"),
        (rolling, "RollingUpdate"),
        (aborted, "ErrorRateHigher"),
        (complete, "AwaitingPromotion"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_rollout_can_be_reverted_at_once_whatever_it_waits_for(stuck: Callable[[], World], reason: str) -> None:
    """argo-rollouts#3316, flagger#1588: stuck rollouts that cannot be rolled back."""
    world = stuck()
    assert world.ready_condition()[1] == reason
    commit(world, canary=None)
    world.step()
    assert world.weights == {1: 100}
    world.gateway_accepts = True
    world.settle()
    assert world.ready_condition() == ("True", "Serving")


# --- other commits in mid-rollout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "end"),
    [
        ({"canary": None}, {1: 100}),
        ({"stable": 2, "canary": None}, {2: 100}),
        ({"canary": 3}, {3: 100}),
        ({"stable": 2, "canary": 3}, {3: 100}),
        ({"stable": 3, "canary": None}, {3: 100}),
        ({"stable": 3, "canary": 2}, {2: 100}),
        ({"canary": 3, "paused": True}, {1: 100}),
    ],
)
@pytest.mark.parametrize("weight", [5, 50])
def test_a_new_spec_in_mid_rollout_wins_and_never_makes_it_three_way(
    change: dict[str, Any], end: dict[int, int], weight: int
) -> None:
    world = World(spec(1, 2, 3))
    world.settle()
    commit(world, versions=(1, 2, 3))
    until_accepted(world, 5)
    if weight == 50:
        go_through(world, 130)
        until_accepted(world, 50)
    commit(world, versions=(1, 2, 3), **change)
    world.settle()
    assert world.weights == end, "World asserts at each write: sum 100, two versions at most, none raised on an unready one"


def test_a_rollback_after_the_promotion_asks_for_no_analysis() -> None:
    """flagger#616: going back to a known-good version repeats the whole analysis."""
    world = releasing()
    world.settle()
    commit(world, stable=2, canary=None)
    world.step()
    commit(world, stable=1, canary=None)
    world.settle()
    assert world.weights == {1: 100}


def test_a_canary_that_dies_at_100_gives_the_traffic_back_even_when_stables_pods_have_gone() -> None:
    world = releasing()
    world.settle()
    assert set(world.servings) == {2}
    world.ready(2, 0, trouble=PodTrouble("CrashLoop", "segmentation fault"))
    world.step()
    assert world.status.aborted
    world.step()
    assert 1 in world.servings
    assert world.weights == {2: 100}, "nothing is ready: the last weights stay"
    world.ready(1)
    world.step()
    assert world.weights == {1: 100}


def test_an_edit_of_the_route_does_not_bring_back_a_stable_that_was_scaled_away() -> None:
    world = releasing()
    world.settle()
    world.gateway_accepts = False
    commit(world, routing={"parentRefs": [{"name": "gateway"}], "hostnames": ["other.example.com"]})
    for _ in range(3):
        world.step()
    assert set(world.servings) == {2}


# --- pods ------------------------------------------------------------------------------------------------------------------


def test_the_canarys_pods_follow_its_weight_and_stable_keeps_its_size() -> None:
    world = World(spec(1, 2, runtime={"replicas": 10}))
    world.settle()
    commit(world, runtime={"replicas": 10})
    until_accepted(world, 5)
    assert (world.servings[1].replicas, world.servings[2].replicas) == (10, 1)
    go_through(world, 125)
    assert world.status.step is not None
    assert world.status.step.weight == 50
    world.step()
    assert world.servings[2].replicas == 5
    assert world.weights == {1: 95, 2: 5}, "no weight before the pods for it are ready"
    until_accepted(world, 50)
    assert world.servings[1].replicas == 10


def test_surge_within_replicas_takes_the_canarys_pods_from_stables_and_shows_the_arithmetic() -> None:
    world = World(spec(1, 2, runtime={"replicas": 4}))
    world.settle()
    commit(world, runtime={"replicas": 4}, surge="WithinReplicas")
    until_accepted(world, 5)
    assert (world.servings[1].replicas, world.servings[2].replicas) == (3, 1)
    world.step()
    assert "3 of 4 pods are stable's, each has 32 % of the traffic where it would have 24 %" in message(world)
    world.settle()
    assert (world.weights, pods(world)) == ({2: 100}, {1: 1, 2: 3}), "one place is kept to come back to"
    commit(world, stable=2, canary=None, runtime={"replicas": 4}, surge="WithinReplicas")
    world.settle()
    assert (world.weights, pods(world)) == ({2: 100}, {2: 4})


def test_an_autoscaler_keeps_what_it_grew_through_rollout_and_runtime_change() -> None:
    """argo-rollouts#3849, #2857, #4607: autoscalers fight the canary."""
    scaling = {"minReplicas": 2, "maxReplicas": 10, "targetCPUUtilizationPercentage": 80}
    runtime = {"autoscaling": scaling, "resources": {"requests": {"cpu": 1}}}
    world = World(spec(1, 2, runtime=runtime))
    world.settle()
    assert world.autoscalers["digits-v1"]["minReplicas"] == 2
    world.servings[1] = replace(world.servings[1], replicas=8, ready=8, updated=8, total=8)
    world.settle()
    assert world.servings[1].replicas == 8
    commit(world, runtime=runtime)
    until_accepted(world, 5)
    assert world.autoscalers["digits-v1"]["minReplicas"] == 8, "its load moves to the canary: it may not shrink before the end"
    world.ready(2)
    commit(world, runtime=runtime | {"image": "triton:2"})
    world.servings[1] = replace(world.servings[1], resource_version="seen")
    decided = world.step()
    assert world.servings[1].replicas == 8, "a rendered Deployment names the pods that the autoscaler chose"
    (rendered,) = [a for a in decided.actions if isinstance(a, Apply) and a.body["metadata"]["name"] == "digits-v1"]
    assert rendered.resource_version == "seen", "and is not written where it has chosen others since"
    commit(world, runtime={"replicas": 2, "resources": {"requests": {"cpu": 1}}})
    world.step()
    assert world.autoscalers == {}


# --- metrics ---------------------------------------------------------------------------------------------------------------


def test_a_custom_metric_out_of_bounds_twice_aborts_and_one_without_a_value_holds() -> None:
    metrics = [{"name": "complaints", "query": "sum(complaints{v='{{canary}}'})", "max": "3"}]
    analysis = {"prometheus": {"address": "http://prometheus:9090", "metrics": metrics}}
    world = releasing(analysis=analysis)
    until_accepted(world, 5)
    decided = world.step()
    assert decided.aim is not None
    assert decided.aim.metrics == {"complaints": "sum(complaints{v='2'})"}

    def read(value: float | None) -> None:
        assert world.gathered is not None
        reading = Reading("complaints", world.now, value, None if value is not None else "no sample")
        world.gathered = replace(world.gathered, readings={"complaints": reading})

    while world.now < parse(world.status.step.until):  # type: ignore[union-attr, arg-type]
        world.feed()
        read(None)
        world.step()
    assert world.ready_condition() == ("False", "NoMetric")
    for _ in range(2):
        world.feed()
        read(4.0)
        world.step()
    assert world.ready_condition() == ("False", "MetricOutOfBounds")
    assert world.weights == {1: 100}


@pytest.mark.parametrize(("more", "seconds"), [({}, 60), ({"scrapeInterval": "15s"}, 15)])
def test_counters_of_prometheus_are_waited_for_until_a_scrape_has_seen_the_weight(more: dict[str, Any], seconds: int) -> None:
    counters = {"requests": "r{v='{{version}}'}", "failures": "f{v='{{version}}'}"}
    world = releasing(analysis={"prometheus": {"address": "http://prometheus:9090", **counters, **more}})
    until_accepted(world, 5)
    decided = world.step()
    assert decided.aim is not None
    assert decided.aim.behind == timedelta(seconds=seconds)
    world.gathered = Gathered(decided.aim.epoch, world.gathering_since)
    world.now = decided.aim.not_before + decided.aim.behind + timedelta(seconds=59)
    world.step()
    assert world.ready_condition() == ("False", "Holding"), "nothing could be seen before"
    world.now += timedelta(seconds=1)
    world.step()
    assert world.ready_condition() == ("False", "NoEvidence")


COUNTERS = {"address": "http://prometheus:9090", "requests": "r", "failures": "f"}


@pytest.mark.parametrize("rolls", [False, True])
def test_however_short_the_delay_stable_stays_until_a_canary_with_everything_has_been_counted(rolls: bool) -> None:
    wanted = {"steps": [{"weight": 100}], "scaleDownDelay": "0s", "analysis": {"prometheus": COUNTERS}}
    world = releasing(**wanted)
    until_accepted(world, 100)
    if rolls:
        commit(world, runtime={"env": [{"name": "A", "value": "b"}]}, **wanted)
        world.step()
        world.now += timedelta(minutes=4)
        world.step()
        world.ready(2)
        world.step()
    for _ in range(125):
        world.now += timedelta(seconds=1)
        world.step()
        world.go_well()
    well = copy.deepcopy(world)
    go_through(world, 6, canary=(1000, 500))
    assert [a.reason for a in world.status.aborted] == ["ErrorRateAboveMaximum"]
    assert world.weights == {1: 100}
    well.settle()
    assert set(well.servings) == {2}


def parse(text: str) -> Any:
    from perch.status import parse_time

    return parse_time(text)


def test_a_lost_status_replays_the_rollout_from_its_first_step() -> None:
    world = releasing()
    until_accepted(world, 5)
    go_through(world, 130)
    until_accepted(world, 50)
    world.status = Status()
    world.step()
    world.settle()
    assert world.weights == {2: 100}


# --- pods for the traffic that there is --------------------------------------------------------------------------------------


def ten(**more: Any) -> World:
    world = World(spec(1, 2, 3, runtime={"replicas": 10}))
    world.settle()
    commit(world, versions=(1, 2, 3), runtime={"replicas": 10}, **more)
    return world


def pods(world: World) -> dict[int, int]:
    return {version: serving.replicas for version, serving in world.servings.items()}


@pytest.mark.parametrize(("stable", "canary"), [(2, 1), (3, 1)])
def test_a_version_keeps_its_pods_until_its_traffic_has_gone_to_others(stable: int, canary: int) -> None:
    """What was stable becomes a canary: it needs pods for the share it has, not for the one it is to have."""
    world = ten()
    until_accepted(world, 5)
    commit(world, stable=stable, canary=canary, versions=(1, 2, 3), runtime={"replicas": 10})
    world.step()
    assert pods(world)[1] == 10
    world.settle()
    assert pods(world)[1] == 10, "version 1 has gone through the steps and has all the traffic again"
    assert world.weights == {1: 100}


def test_a_canary_without_stable_that_is_to_have_less_keeps_its_pods_until_stable_is_there() -> None:
    world = ten()
    world.settle()
    assert pods(world) == {2: 10}
    commit(world, versions=(1, 2, 3), runtime={"replicas": 10}, steps=[{"weight": 10, "hold": "Indefinite"}])
    world.step()
    assert pods(world) == {1: 10, 2: 10}
    world.settle()
    assert (world.weights, pods(world)) == ({1: 90, 2: 10}, {1: 10, 2: 1})


def scarce(**more: Any) -> World:
    steps = [{"weight": 25, "hold": "1m"}, {"weight": 75, "hold": "1h"}, {"weight": 100}]
    world = World(spec(1, 2, runtime={"replicas": 4}))
    world.settle()
    commit(world, runtime={"replicas": 4}, surge="WithinReplicas", steps=steps, **more)
    return world


def test_within_replicas_pods_move_half_way_before_the_traffic_and_never_exceed_the_number() -> None:
    world, seen = scarce(), []
    for _ in range(80):
        world.step()
        now = (world.weights.get(2, 0), pods(world).get(1, 0), pods(world).get(2, 0))
        if not seen or seen[-1] != now:
            seen.append(now)
        assert sum(pods(world).values()) <= 4
        world.go_well()
        world.feed((3600, 0), (400, 0), seconds=60)
    # The canary's share, stable's pods, the canary's pods.
    assert seen == [(0, 3, 1), (25, 3, 1), (25, 2, 2), (75, 2, 2), (75, 1, 3), (100, 1, 3)]


@pytest.mark.parametrize("how", ["abort", "revert", "revert without rollout"])
def test_within_replicas_stable_takes_all_with_the_pods_it_has_and_gets_the_others_at_once(how: str) -> None:
    """On a full cluster its other pods could not start before the canary's have gone, and these have all the traffic."""
    world = scarce()
    until_accepted(world, 25)
    go_through(world, 70)
    until_accepted(world, 75)
    world.step()
    world.go_well()
    assert pods(world) == {1: 1, 2: 3}
    if how == "abort":
        world.feed(canary=(100, 100))
    else:
        commit(world, canary=None, runtime={"replicas": 4}, surge="WithinReplicas")
        if how != "revert":
            world.spec = world.spec.model_copy(update={"rollout": None})
    world.step()
    assert world.weights == {1: 100}
    assert pods(world) == {1: 1, 2: 3}
    world.accept()
    world.now += timedelta(seconds=12)
    for _ in range(4):
        world.step()
        world.now += timedelta(seconds=12)
        world.accept()
    assert pods(world) == {1: 4}, "neither inspectFor nor scaleDownDelay keeps the places"


def test_an_abort_is_carried_out_by_whatever_pods_stable_has() -> None:
    world = ten(steps=[{"weight": 60, "hold": "1h"}, {"weight": 100}])
    until_accepted(world, 60)
    world.ready(1, 3)
    world.feed(canary=(100, 100))
    world.step()
    assert world.weights == {1: 100}


@pytest.mark.parametrize(("hung", "desperate"), [(1, False), (6, True)])
def test_a_pod_that_hangs_among_many_that_answer_does_not_send_everything_to_the_one_that_stable_has(
    hung: int, desperate: bool
) -> None:
    world = ten(steps=[{"weight": 60, "hold": "1h"}, {"weight": 100}])
    until_accepted(world, 60)
    assert world.servings[2].ready == 6
    world.ready(1, 1)
    go_through(world, 36, hung=tuple(f"digits-v2-{pod}/1" for pod in range(hung)))
    assert [a.reason for a in world.status.aborted] == ["Stalled"]
    assert world.weights == ({1: 100} if desperate else {1: 40, 2: 60})
    world.ready(1, 8)
    world.step()
    assert world.weights == {1: 100}


def test_an_abort_that_stable_cannot_take_says_so() -> None:
    world = ten(steps=[{"weight": 60, "hold": "1h"}, {"weight": 100}])
    until_accepted(world, 60)
    world.ready(1, 0)
    world.feed(stable=(0, 0), canary=(1000, 1000))
    world.ready(1, 0)
    world.feed(stable=(900, 0), canary=(1000, 1000))
    world.step()
    assert world.weights == {1: 40, 2: 60}
    assert "keeps 60 % of the traffic until enough pods of version 1 are ready" in message(world)
    world.ready(1, 1)
    world.step()
    assert world.weights == {1: 100}


def test_a_promotion_waits_for_half_of_the_pods_at_least_however_long_it_takes() -> None:
    world = ten()
    until_accepted(world, 5)
    commit(world, stable=2, canary=None, versions=(1, 2, 3), runtime={"replicas": 10})
    world.step()
    world.ready(2, 4, deadline_exceeded=True)
    world.step()
    assert world.weights == {1: 95, 2: 5}, "version 1's ten pods are well"
    world.ready(2, 5, deadline_exceeded=True)
    world.step()
    assert world.weights == {2: 100}


# --- always judged -----------------------------------------------------------------------------------------------------------


def test_a_canary_is_judged_while_its_next_step_waits_for_pods() -> None:
    world = ten()
    until_accepted(world, 5)
    go_through(world, 125)
    assert world.status.step is not None
    assert (world.status.step.weight, world.weights) == (50, {1: 95, 2: 5})
    world.accept()
    go_through(world, 9, canary=(50, 50))
    assert world.weights == {1: 100}
    assert world.ready_condition() == ("False", "ErrorRateHigher")


def test_a_canary_is_judged_while_the_gateway_does_not_answer() -> None:
    world = at_50()
    world.gateway_accepts = False
    commit(world, steps=[{"weight": 60, "hold": "1m"}, {"weight": 100}])
    for _ in range(3):
        world.step()
        world.go_well_except_pods()
    assert world.route is not None
    assert not world.route.accepted
    go_through(world, 30, canary=(500, 500))
    assert world.ready_condition() == ("False", "ErrorRateHigher")


def test_an_operator_that_started_just_before_the_end_of_a_hold_passes_nothing_on_anothers_evidence() -> None:
    world = releasing()
    until_accepted(world, 5)
    go_through(world, 117)
    world.now += timedelta(seconds=20)
    world.restart()
    world.step()
    assert world.weights == {1: 95, 2: 5}
    go_through(world, 57)
    assert world.weights == {1: 95, 2: 5}, "a minute of its own"
    go_through(world, 9)
    assert world.status.step is not None
    assert world.status.step.weight == 50


def test_an_abort_is_filed_against_the_runtime_that_ran_and_the_mended_one_is_tried() -> None:
    world = at_50()
    commit(world, runtime={"image": "triton:mended"})
    world.feed(canary=(100, 100))
    world.step()
    world.settle()
    assert world.weights == {2: 100}, "what the former pods did is not held against the mended ones"
    assert world.status.aborted == []


def test_another_runtime_is_judged_anew_from_the_step_it_is_at() -> None:
    world = at_50()
    go_through(world, 9, canary=(100, 1))
    commit(world, runtime={"image": "triton:other"})
    world.step()
    evidence, step = world.status.evidence, world.status.step
    assert evidence is not None
    assert step is not None
    assert (evidence.errors, evidence.canary.requests) == ([], 0)
    assert (step.weight, step.accepted_at, world.weights) == (50, None, {1: 50, 2: 50})
    world.settle()
    assert world.weights == {2: 100}


def blind(world: World, minutes: int) -> None:
    """The operator looks, and sees nothing."""
    assert world.gathered is not None
    world.gathered = replace(world.gathered, batches=(), trouble="pod digits-v2-a does not answer")
    for _ in range(minutes * 4):
        world.now += timedelta(seconds=15)
        world.step()


@pytest.mark.parametrize("steps", [[{"weight": 10, "hold": "Indefinite"}], [{"weight": 10, "hold": "24h"}, {"weight": 100}]])
def test_a_canary_that_cannot_be_seen_does_not_look_well(steps: list[dict[str, Any]]) -> None:
    world = releasing(steps=steps)
    until_accepted(world, 10)
    go_through(world, 30)
    blind(world, 2)
    assert world.ready_condition() == ("False", "NoEvidence")
    assert "does not answer" in message(world)
    assert world.status.condition("Stalled") is None
    blind(world, 12)
    assert world.status.condition("Stalled") is not None
    assert world.weights == {1: 90, 2: 10}
    go_through(world, 6)
    assert world.ready_condition()[1] in ("SplitHeld", "Holding")


# --- times -------------------------------------------------------------------------------------------------------------------


def test_a_short_loss_of_readiness_while_more_pods_start_is_a_short_one() -> None:
    world = ten()
    until_accepted(world, 5)
    go_through(world, 125)
    world.now += timedelta(minutes=2)
    world.step()
    world.ready(2, 0, trouble=PodTrouble("NotReady", "pod digits-v2-a: not ready"))
    world.step()
    world.now += timedelta(seconds=20)
    world.step()
    assert world.status.aborted == []
    world.now += timedelta(seconds=20)
    world.step()
    assert world.ready_condition() == ("False", "ReadinessLost")


def test_what_a_pod_did_before_the_retry_does_not_condemn_it() -> None:
    world = releasing()
    until_accepted(world, 5)
    crash = PodTrouble("CrashLoop", "pod digits-v2-a: triton crashes again and again", world.now)
    world.ready(2, 0, trouble=crash)
    world.step()
    assert world.ready_condition() == ("False", "CrashLoop")
    world.now += timedelta(minutes=1)
    commit(world, retryAt="2026-02-01T00:00:00Z")
    world.step()
    assert world.status.aborted == [], "it waits out its back-off"
    world.ready(2, 0, trouble=replace(crash, at=world.now + timedelta(seconds=9)))
    world.now += timedelta(seconds=10)
    world.step()
    assert world.ready_condition() == ("False", "CrashLoop")


def test_a_release_in_one_commit_that_was_aborted_and_reverted_is_still_aborted_when_it_comes_back() -> None:
    world = aborted()
    commit(world, canary=None, versions=(1,))
    world.settle()
    commit(world)
    world.settle()
    assert world.weights == {1: 100}
    assert world.ready_condition() == ("False", "ErrorRateHigher")


def test_the_deadline_of_a_canary_is_its_own_and_is_for_reaching_a_step() -> None:
    world = releasing(progressDeadline="1h")
    world.step()
    world.go_well_except_pods()
    world.step()
    world.ready(2, 0, deadline_exceeded=True)
    world.step()
    assert world.ready_condition() == ("False", "Starting"), "the Deployment's ten minutes are none of the rollout's"
    world = ten()
    world.settle()
    world.ready(2, 9, trouble=PodTrouble("Unschedulable", "pod digits-v2-a: no node"))
    for _ in range(60):
        world.step()
        world.now += timedelta(minutes=1)
    assert world.status.aborted == [], "it has reached its last step, and nine pods answer"
    assert world.ready_condition() == ("False", "Starting")


def test_nothing_is_mirrored_to_a_canary_that_has_everything() -> None:
    world = releasing(traffic={"mirror": {"percent": 50}})
    world.settle()
    assert world.weights == {2: 100}
    assert copies(world) == []


def test_an_aborted_canary_that_is_left_in_git_does_not_keep_stable_from_shrinking() -> None:
    scaling = {"minReplicas": 2, "maxReplicas": 10, "targetCPUUtilizationPercentage": 80}
    runtime = {"autoscaling": scaling, "resources": {"requests": {"cpu": 1}}}
    world = World(spec(1, 2, runtime=runtime))
    world.settle()
    commit(world, runtime=runtime, steps=[{"weight": 5, "hold": "1h"}, {"weight": 100}])
    until_accepted(world, 5)
    world.feed(canary=(100, 100))
    world.step()
    world.servings[1] = replace(world.servings[1], replicas=9, ready=9, updated=9, total=9)
    world.step()
    assert world.autoscalers["digits-v1"]["minReplicas"] == 2


# --- what a second review found ----------------------------------------------------------------------------------------------


def test_pods_of_an_aborted_runtime_get_no_traffic_in_the_name_of_the_mended_one() -> None:
    world = at_50()
    world.feed(canary=(100, 100))
    world.step()
    world.accept()
    commit(world, runtime={"image": "triton:mended"})
    for _ in range(5):
        world.step()
        world.accept()
        world.now += timedelta(minutes=1)
    assert world.weights == {1: 100}, "the mended pod is not there yet, the aborted one is"
    world.settle()
    assert world.weights == {2: 100}


def test_a_rolling_update_of_the_canary_that_never_ends_is_aborted_with_the_pods_words() -> None:
    world = at_50()
    commit(world, runtime={"image": "triton:other"})
    world.step()
    words = PodTrouble("Unschedulable", "pod digits-v2-b: no node")
    world.servings[2] = replace(world.servings[2], trouble=words, words="Unschedulable: no node")
    world.step()
    assert world.ready_condition() == ("False", "RollingUpdate")
    world.now += timedelta(minutes=11)
    world.step()
    assert world.ready_condition() == ("False", "Unschedulable")
    assert world.weights == {1: 100}


def test_a_promotion_from_a_split_waits_for_three_quarters_of_the_pods() -> None:
    world = ten(steps=[{"weight": 50, "hold": "Indefinite"}])
    until_accepted(world, 50)
    commit(world, stable=2, canary=None, versions=(1, 2, 3), runtime={"replicas": 10})
    world.step()
    assert (world.weights, pods(world)[2]) == ({1: 50, 2: 50}, 10)
    world.ready(2, 8)
    world.step()
    assert world.weights == {2: 100}


def test_an_abort_of_a_canary_that_answers_well_waits_for_stables_pods() -> None:
    world = ten(steps=[{"weight": 50, "hold": "10s"}, {"weight": 100}], analysis={"onInconclusive": "Abort"})
    until_accepted(world, 50)
    world.ready(1, 3)
    go_through(world, 21, stable=(1, 0), canary=(1, 0))
    assert world.ready_condition() == ("False", "Inconclusive")
    assert world.weights == {1: 50, 2: 50}
    assert "keeps 50 % of the traffic until enough pods of version 1 are ready" in message(world)
    world.ready(1, 8)
    world.step()
    assert world.weights == {1: 100}


def test_a_canary_is_judged_while_the_gateway_does_not_accept_its_last_step() -> None:
    world = unaccepted_100()
    assert world.route is not None
    assert not world.route.accepted
    go_through(world, 60, canary=(900, 900))
    assert world.ready_condition() == ("False", "ErrorRateHigher")


def unaccepted_100() -> World:
    """The last step is written, and the Gateway takes its time to accept it."""
    world = at_50()
    world.gateway_accepts = False
    for _ in range(120):
        world.feed()
        world.step()
        world.go_well()
    assert world.weights == {2: 100}
    return world


def test_a_canary_with_everything_is_not_taken_for_worse_than_stable_who_has_nothing_before_the_gateway_says_so() -> None:
    world = unaccepted_100()
    go_through(world, 30, stable=(0, 0), canary=(1000, 5))
    assert world.weights == {2: 100}
    go_through(world, 9, stable=(0, 0), canary=(1000, 500))
    assert world.ready_condition() == ("False", "ErrorRateAboveMaximum")


def test_more_replicas_are_no_reason_to_take_the_former_version_away_early() -> None:
    world = World(spec(1, 2, runtime={"replicas": 2}))
    world.settle()
    commit(world, stable=2, canary=None, runtime={"replicas": 2}, scaleDownDelay="1h")
    world.settle_pods()
    assert world.weights == {2: 100}
    commit(world, stable=2, canary=None, runtime={"replicas": 4}, scaleDownDelay="1h")
    for _ in range(4):
        world.step()
        world.go_well()
        world.now += timedelta(minutes=5)
    assert pods(world) == {1: 2, 2: 4}


def test_a_canary_is_judged_against_whoever_has_the_rest_while_the_new_stable_starts() -> None:
    world = ten(steps=[{"weight": 10, "hold": "1h"}, {"weight": 100}])
    until_accepted(world, 10)
    commit(world, stable=3, versions=(1, 2, 3), runtime={"replicas": 10}, steps=[{"weight": 10, "hold": "1h"}, {"weight": 100}])
    decided = world.step()
    assert world.weights == {1: 90, 2: 10}
    assert decided.aim is not None
    assert (decided.aim.stable, decided.aim.canary) == (1, 2)
    go_through(world, 9, canary=(50, 50))
    assert world.ready_condition()[1] == "ErrorRateHigher"


def test_a_write_of_the_route_that_moves_no_weight_does_not_begin_the_hold_anew() -> None:
    world = at_50()
    go_through(world, 30)
    step, evidence = world.status.step, world.status.evidence
    assert step is not None
    assert evidence is not None
    assert world.route is not None
    commit(world, routing={"parentRefs": [{"name": "gateway"}], "hostnames": ["other.example.com"]})
    world.feed()
    world.step()
    assert not world.route.accepted
    world.feed()
    world.step()
    world.accept()
    world.feed()
    world.step()
    assert world.status.step is not None
    assert world.status.step.accepted_at == step.accepted_at
    assert world.status.evidence is not None
    assert world.status.evidence.step_canary.requests > evidence.step_canary.requests


def test_an_abort_that_was_recorded_is_told_once_even_if_the_user_reverts_before_it_is_done() -> None:
    world = at_50()
    world.feed(canary=(100, 100))
    world.step(writes=0)
    commit(world, canary=None)
    world.settle()
    assert [o.outcome for o in world.status.history] == ["Aborted"]


# --- accuracy against stable ---------------------------------------------------------------------------------------------


def test_a_canary_that_is_less_accurate_than_its_limit_allows_never_gets_a_pod_or_traffic() -> None:
    world = compared(measured(980), measured(969))
    rendered = len(world.rendered)
    world.settle()
    assert world.ready_condition() == ("False", "AccuracyDropped")
    assert "has accuracy 0.9690 and version 1 0.9800: a drop of 0.0110" in message(world)
    assert all(2 not in weights for weights in world.written_weights)
    assert world.rendered[rendered:] == []
    (record,) = world.status.aborted
    assert (record.version, record.reason) == (2, "AccuracyDropped")


@pytest.mark.parametrize(
    ("stable", "canary", "silent"),
    [
        (measured(980), measured(970), True),
        (measured(980), measured(1000), True),
        (measured(980), measured(100, data="e"), False),
        (measured(980), measured(100, samples=100), False),
        (None, measured(100), False),
        (measured(980), None, False),
    ],
    ids=["exactly the limit", "better", "other data", "other samples", "stable not measured", "canary not measured"],
)
def test_a_canary_is_not_held_back_by_an_accuracy_within_its_limit_or_not_comparable(
    stable: Accuracy | None, canary: Accuracy | None, silent: bool
) -> None:
    world = compared(stable, canary)
    world.settle()
    assert world.ready_condition() == ("True", "AwaitingPromotion")
    said = [event.reason for plan in world.plans for event in plan.events if event.reason.startswith("Accuracy")]
    assert said == ([] if silent else ["AccuracyNotCompared"])


def test_where_the_user_said_warn_a_less_accurate_canary_goes_on_and_one_event_says_by_how_much() -> None:
    world = compared(measured(980), measured(500), onFailure="Warn")
    world.settle()
    assert world.ready_condition() == ("True", "AwaitingPromotion")
    (event,) = [event for plan in world.plans for event in plan.events if event.reason == "AccuracyDropped"]
    assert event.kind == "Warning"
    assert "a drop of 0.4800" in event.message


def test_an_export_that_missed_its_accuracy_with_a_warning_says_so_once_it_is_published() -> None:
    missed = measured(900).model_copy(update={"verdict": Verdict.FAILED})
    world = World(spec(1))
    world.accuracies = {1: missed}
    before, seen = world.status, []
    for _ in range(20):
        world.step()
        world.go_well()
        seen += build_events(before, world.status)
        before = world.status
    (event,) = [event for event in seen if event.reason == "AccuracyMissed"]
    assert (event.kind, "0.9000 on 1000 samples" in event.message) == ("Warning", True)
    assert world.status.versions[0].accuracy is not None

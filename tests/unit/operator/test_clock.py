"""Clocks jump, operators go and come back, and nothing happens for weeks: what was seen is neither lost nor invented."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .test_rollout import commit, go_through, releasing, until_accepted
from .world import World, spec

HELD = [{"weight": 50, "hold": "Indefinite"}]
JUMPS = (-86400, -3600, -300, -5, 0, 5, 300, 3600, 86400)


def held(weight: int = 50) -> World:
    world = releasing(steps=[{"weight": weight, "hold": "Indefinite"}])
    until_accepted(world, weight)
    go_through(world, 30)
    return world


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(jumps=st.lists(st.tuples(st.sampled_from(JUMPS), st.booleans(), st.integers(0, 5)), max_size=6))
def test_a_broken_canary_is_cut_off_within_a_few_looks_whatever_the_clock_does(jumps: list[tuple[int, bool, int]]) -> None:
    """Another operator may take over, too, whose clock is ahead or behind."""
    world = held()
    for seconds, restarts, looks in jumps:
        world.now += timedelta(seconds=seconds)
        if restarts:
            world.restart()
        world.step()
        go_through(world, 3 * looks)
    bad = 0
    while not world.status.aborted and bad < 6:
        world.feed((100, 0), (100, 100))
        world.step()
        bad += 1
    assert [a.reason for a in world.status.aborted] == ["ErrorRateHigher"], bad
    assert world.weights == {1: 100}


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(jumps=st.lists(st.tuples(st.sampled_from(JUMPS), st.integers(0, 5)), max_size=6), ready=st.booleans())
def test_no_healthy_canary_is_aborted_because_an_operator_with_another_clock_took_over(
    jumps: list[tuple[int, int]], ready: bool
) -> None:
    world = held() if ready else releasing(steps=HELD)
    for seconds, looks in jumps:
        world.now += timedelta(seconds=seconds)
        world.restart()
        world.step()
        go_through(world, 3 * looks)
    assert world.status.aborted == []


def test_time_in_which_nobody_watched_does_not_count_against_a_deadline() -> None:
    world = releasing(steps=HELD, progressDeadline="10m")
    world.settle_pods()
    world.servings[2] = replace(world.servings[2], ready=0)
    world.step()
    world.now += timedelta(minutes=11)
    world.restart()
    world.step()
    assert world.status.aborted == [], "the operator was away for eleven minutes"
    world.now += timedelta(minutes=11)
    world.step()
    assert [a.reason for a in world.status.aborted] == ["ProgressDeadlineExceeded"], "it watched for all of these"


def test_a_held_split_without_traffic_writes_nothing() -> None:
    world = held()
    world.feed((0, 0), (0, 0))
    world.step()
    before = world.status
    for _ in range(100):
        world.feed((0, 0), (0, 0))
        decided = world.step()
        assert decided.actions == ()
        assert world.status == before


@pytest.mark.parametrize("weight", [10, 50])
def test_counts_that_a_restarted_operator_gathers_are_taken_in_once_though_its_numbers_begin_anew(weight: int) -> None:
    world = held(weight)
    seen = world.status.evidence.canary.requests  # type: ignore[union-attr]
    world.restart()
    world.step()
    world.feed((100, 0), (7, 0))
    for _ in range(3):
        world.step()
    assert world.status.evidence.canary.requests == seen + 7  # type: ignore[union-attr]


def test_the_edited_spec_of_a_release_without_a_canary_asks_no_clock() -> None:
    world = World(spec(1, 2))
    world.settle()
    world.now -= timedelta(days=1)
    commit(world, stable=2, canary=None)
    for _ in range(10):
        world.step()
        world.go_well()
    assert world.weights == {2: 100}

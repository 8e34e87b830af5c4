"""What people read is true, about the thing in question, and names the way out."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from perch.observe import pod_trouble, pod_words
from perch.observed import PodTrouble
from perch.status import build_events
from perch_exporter.contract import Reason

from .test_rollout import commit, message, releasing, until_accepted
from .world import World, spec

STEPS = [{"weight": 20, "hold": "10m"}, {"weight": 100}]


def test_a_version_that_left_the_list_is_not_to_be_removed_from_it() -> None:
    world = World(spec(1, 2))
    world.settle()
    commit(world, stable=2, canary=None)
    world.settle_pods()
    commit(world, stable=2, canary=None, versions=(2,))
    for _ in range(5):
        world.step()
        world.go_well()
        assert 1 in world.servings, "it still drains"
        assert "remove it from spec.versions" not in message(world)


def test_history_tells_the_share_that_a_canary_had_and_not_the_one_it_was_to_get() -> None:
    world = releasing(steps=STEPS, paused=True)
    world.settle_pods()
    assert world.weights == {1: 100}
    commit(world, canary=None)
    world.step()
    assert world.status.history[0].message.startswith("at 0 %")
    world = releasing(steps=STEPS)
    until_accepted(world, 20)
    commit(world, canary=None)
    world.step()
    assert world.status.history[0].message.startswith("at 20 %")


@pytest.mark.parametrize(
    ("words", "replicas", "advised"),
    [
        pytest.param("0/3 nodes: 3 Insufficient nvidia.com/gpu", 4, True, id="stable's pods hold what is missing"),
        pytest.param("0/3 nodes: 3 Insufficient nvidia.com/gpu", 1, False, id="stable has one pod, which it keeps"),
        pytest.param("0/3 nodes: 3 had untolerated taint {gpu: x}", 4, False, id="no node of this kind would take it"),
        pytest.param("0/3 nodes: 3 didn't match Pod's node affinity/selector", 4, False, id="no node is like that"),
    ],
)
def test_surge_within_replicas_is_advised_only_where_it_can_help(words: str, replicas: int, advised: bool) -> None:
    world = World(spec(1, 2, runtime={"replicas": replicas}))
    world.settle()
    commit(world, steps=STEPS, runtime={"replicas": replicas}, progressDeadline="1m")
    for _ in range(4):
        world.step()
        world.go_well_except_pods()
    world.servings[2] = replace(world.servings[2], ready=0, trouble=PodTrouble("Unschedulable", words))
    for _ in range(5):
        world.now += timedelta(seconds=30)
        world.step()
    assert [a.reason for a in world.status.aborted] == ["Unschedulable"]
    assert ("WithinReplicas" in world.status.aborted[0].message) is advised


def test_what_serves_is_spoken_of_only_where_something_serves() -> None:
    world = World(spec(1))
    world.step()
    (name,) = world.jobs
    world.fail(name, Reason.CHECKSUM_MISMATCH)
    world.step()
    assert world.ready_condition() == ("False", "ExportFailed")
    assert "serves" not in message(world)
    world = World(spec(1))
    world.settle()
    commit(world, versions=(1, 2))
    world.step()
    world.fail(next(n for n in world.jobs if "-v2-" in n), Reason.CHECKSUM_MISMATCH)
    world.step()
    assert "What serves goes on serving" in message(world)


@pytest.mark.parametrize(("pods", "said"), [(1, "1 pod is starting"), (3, "3 pods are starting")])
def test_one_is_one_and_more_are_more(pods: int, said: str) -> None:
    world = World(spec(1, runtime={"replicas": pods}))
    events: list[str] = []
    for _ in range(4):
        before = world.status
        world.step()
        events += [event.message for event in build_events(before, world.status)]
        world.go_well_except_pods()
    assert f"version 1: {said}" in events
    assert f"0 of {pods} pod{'s are' if pods > 1 else ' is'} ready" in message(world)


def pod(triton: dict[str, Any], golden: dict[str, Any] | None = None) -> dict[str, Any]:
    containers = [{"name": "triton", **triton}, *([{"name": "golden", **golden}] if golden else [])]
    return {"metadata": {"name": "digits-v2-x"}, "status": {"phase": "Running", "containerStatuses": containers}}


def test_a_golden_check_that_runs_is_not_told_like_one_that_fails() -> None:
    running = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    said = pod_words(pod({"ready": True, "state": running}, {"ready": False, "state": running}))
    assert said == "Triton is ready and the golden check runs: kubectl logs digits-v2-x -c golden tells how far it is"


def test_an_end_that_was_asked_for_is_no_crash_in_words() -> None:
    ended = {"exitCode": 0, "reason": "Completed"}
    waiting = {"ready": False, "restartCount": 4, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}
    trouble = pod_trouble(pod({**waiting, "lastState": {"terminated": ended}}))
    assert trouble is not None
    assert trouble.reason == "CrashLoop"
    assert "liveness probe" in trouble.message
    assert "crashes" not in trouble.message

"""The way back: an abort, a revert and a rescue reach the route whatever else of a pass fails.

The API server refuses writes, builders raise, children cannot be read, and the newest commit may be the reason of it all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from perch.api import Spec, Status
from perch.builders.route import MOST_BACKENDS
from perch.cache import Cache
from perch.kube import DEPLOYMENT, JOB, POD, ROUTE
from perch.names import LABEL_COMPONENT, LABEL_OWNER, LABEL_VERSION
from perch.observe import observe
from perch.observed import JobState, PodTrouble
from perch.plan import Apply, Label, Plan, plan, plan_invalid
from perch.status import with_failures, with_faults

from .fake_api import Leader, Store, settle
from .test_rollout import commit, go_through, message, releasing, rollout, until_accepted
from .world import INSTALLATION, START, World, entry, spec

KINDS = ("Job", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "HTTPRoute")
BUILDERS = (
    "perch.plan.exports.build_export_job",
    "perch.plan.exports.build_export_policy",
    "perch.plan.servings.build_deployment",
    "perch.plan.servings.build_budget",
    "perch.plan.servings.build_service",
    "perch.plan.servings.build_autoscaler",
    "perch.plan.routing.build_route",
    "perch.plan.plan_retirement",
    "perch.plan.keep_services",
    "perch.plan.plan_removed",
    "perch.plan.sweep",
)
REFUSED = "apply HTTPRoute digits: spec.parentRefs: sectionName or port must be unique"
STEPS = [{"weight": 50, "hold": "10m"}, {"weight": 100}]


def is_known(world: World, action: Apply) -> bool:
    """Whether it is the route that the API server took already, but for its backends and their weights."""

    def rest(spec: Any) -> Any:
        return {**spec, "rules": [{**rule, "backendRefs": None} for rule in spec["rules"]]}

    route = world.route
    return action.body["kind"] == "HTTPRoute" and route is not None and rest(action.body["spec"]) == rest(route.spec)


def refusing(world: World, *kinds: str) -> Plan:
    """A pass in which the API server refuses every write of these kinds, but for the route's numbers."""
    decided = world.think()
    world.plans.append(decided)
    refusals = []
    if decided.first is not None:
        world.status = decided.first
    for action in decided.actions:
        if isinstance(action, Apply) and action.body["kind"] in kinds and not is_known(world, action):
            refusals.append(f"apply {action.body['kind']}")
            if action.fallback is not None:
                world._do(replace(action, body=action.fallback))
        else:
            world._do(action)
    status = decided.status or world.status
    if decided.faults:
        status = with_faults(status, decided.faults, world.now)
    if refusals:
        status = with_failures(status, refusals, world.now)
    world.status = Status.model_validate(status.model_dump(by_alias=True, mode="json"))
    return decided


def raising(names: set[str]) -> ExitStack:
    stack = ExitStack()
    for name in names:
        stack.enter_context(patch(name, side_effect=ValueError("port 70000 is out of range")))
    return stack


def in_mid_rollout() -> World:
    world = releasing(steps=STEPS)
    until_accepted(world, 50)
    go_through(world, 30)
    assert world.weights == {1: 50, 2: 50}
    return world


def revert(world: World) -> None:
    """Back to stable, in a commit that has a new host name and one more version, too."""
    routing = {"parentRefs": [{"name": "gateway"}], "hostnames": ["other.example.com"]}
    commit(world, canary=None, versions=(1, 2, 3), routing=routing, steps=STEPS)


def fail_everything(world: World) -> None:
    world.feed((150, 0), (150, 150))


def crash(world: World) -> None:
    world.servings[2] = replace(world.servings[2], ready=0, trouble=PodTrouble("CrashLoop", "code 139", world.now))


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.sets(st.sampled_from(KINDS)),
    broken=st.sets(st.sampled_from(BUILDERS)),
    happens=st.sampled_from((revert, fail_everything, crash)),
)
def test_every_abort_and_every_revert_reaches_the_route(
    kinds: set[str], broken: set[str], happens: Callable[[World], None]
) -> None:
    world = in_mid_rollout()
    with raising(broken):
        for _ in range(8):
            happens(world)
            refusing(world, *kinds)
            if world.weights == {1: 100}:
                break
    assert world.weights == {1: 100}


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(broken=st.sets(st.sampled_from(BUILDERS), min_size=1))
def test_a_part_that_raises_is_told_in_a_condition_and_what_served_goes_on(broken: set[str]) -> None:
    world = in_mid_rollout()
    commit(world, versions=(1, 2, 3), steps=STEPS, runtime={"replicas": 1, "image": "triton:2"})
    with raising(broken):
        decided = refusing(world)
        for _ in range(3):
            world.accept()
            decided = refusing(world)
    assert sum(world.weights.values()) == 100
    if decided.faults:
        assert world.ready_condition() == ("False", "InternalError")
        assert "port 70000 is out of range" in message(world)


def test_a_port_that_no_policy_can_hold_does_not_keep_a_canary_from_being_cut_off() -> None:
    world = World(spec(1, 2, builder={"networkPolicy": {}}))
    world.settle()
    asked = {"traffic": {"stable": 1, "canary": 2}, "rollout": rollout(steps=STEPS), "builder": {"networkPolicy": {}}}
    world.spec, world.generation = spec(1, 2, **asked), world.generation + 1
    until_accepted(world, 50)
    sound = spec(1, 2, 3, **asked)
    elsewhere = sound.versions[2].checkpoint.model_copy(update={"endpoint": "http://minio.other:70000"})
    wrong = sound.versions[2].model_copy(update={"checkpoint": elsewhere})
    world.spec, world.generation = sound.model_copy(update={"versions": [*sound.versions[:2], wrong]}), world.generation + 1
    go_through(world, 60, stable=(150, 0), canary=(150, 150))
    assert world.weights == {1: 100}


def test_a_route_that_is_refused_changes_its_weights_and_keeps_the_rest() -> None:
    world = in_mid_rollout()
    former = world.route
    assert former is not None
    twice = {"parentRefs": [{"name": "gateway"}, {"name": "gateway"}], "hostnames": ["digits.example.com"]}
    world.spec = world.spec.model_copy(update={"routing": world.spec.routing.model_validate(twice)})  # type: ignore[union-attr]
    world.generation += 1
    for _ in range(20):
        world.feed((150, 0), (150, 150))
        refusing(world, "HTTPRoute")
    assert [a.reason for a in world.status.aborted] == ["ErrorRateHigher"]
    assert world.weights == {1: 100}
    assert world.route is not None
    assert world.route.spec["parentRefs"] == former.spec["parentRefs"]
    assert world.ready_condition() == ("False", "ApplyFailed"), "the refusal is still told"


def test_an_abort_whose_weights_are_refused_says_where_the_traffic_stays_and_what_to_do() -> None:
    def refused() -> None:
        decided = world.think()
        world.plans.append(decided)
        others = [a for a in decided.actions if not (isinstance(a, Apply) and a.body["kind"] == "HTTPRoute")]
        for action in others:
            world._do(action)
        assert decided.status is not None
        world.status = with_failures(decided.status, ["apply HTTPRoute digits: denied by a policy"], world.now)

    def stalled() -> str:
        found = world.status.condition("Stalled")
        assert found is not None
        return found.message

    world = in_mid_rollout()
    crash(world)
    refused()
    assert "version 2 was aborted, Perch moves its 50 % of the traffic to version 1: code 139" in stalled()
    for _ in range(3):
        refused()
        assert (
            "version 2 was aborted, but still has 50 % of the traffic, because the HTTPRoute could not be written yet"
            in stalled()
        )
        assert "set the weights by hand: kubectl edit httproute digits" in stalled()
        assert "denied by a policy" in message(world)
    assert world.weights == {1: 50, 2: 50}
    for _ in range(2):
        world.step()
        world.accept()
    assert world.weights == {1: 100}
    assert "version 2 was aborted, the traffic goes to version 1: code 139" in stalled()
    assert "kubectl edit" not in stalled()


def test_a_route_holds_as_many_backends_as_gateway_api_takes_and_a_rollback_goes_through() -> None:
    def released(stable: int, *versions: int) -> None:
        world.spec = spec(*versions, stable=stable, rollout={"steps": [{"weight": 100}], "scaleDownDelay": "24h"})
        world.generation += 1
        for _ in range(8):
            world.step()
            world.go_well()
            assert world.route is None or len(world.route.weights) <= MOST_BACKENDS

    world = World(spec(1))
    released(1, 1)
    for version in range(2, 22):
        world.now += timedelta(hours=1)
        released(version, *range(max(1, version - 3), version + 1))
        assert world.weights == {version: 100}
    assert set(world.route.weights) == set(range(6, 22)), "the oldest left first"  # type: ignore[union-attr]
    released(19, *range(18, 22))
    assert world.weights == {19: 100}


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param({"hostnames": ["new.example.com"]}, id="another host name"),
        pytest.param({"parentRefs": [{"name": "does-not-exist"}]}, id="another Gateway"),
    ],
)
def test_a_pass_that_writes_the_route_is_never_called_ready(edit: dict[str, Any]) -> None:
    world = World(spec(1))
    world.settle()
    routing = {"parentRefs": [{"name": "gateway"}], "hostnames": ["digits.example.com"], **edit}
    world.spec, world.generation, world.gateway_accepts = spec(1, routing=routing), world.generation + 1, False
    for _ in range(3):
        world.step()
        assert world.ready_condition() == ("False", "ShiftingTraffic")
        accepted = world.status.condition("TrafficAccepted")
        assert accepted is not None
        assert accepted.status == "False"
    world.gateway_accepts = True
    world.settle()
    assert world.ready_condition() == ("True", "Serving")


@pytest.mark.parametrize("begun", [False, True], ids=["before its drain has begun", "while it drains"])
def test_a_draining_versions_service_that_somebody_deleted_is_made_again(begun: bool) -> None:
    class Unresolving(World):
        """A Gateway that calls a route unresolved where a backend's Service is missing."""

        def accept(self) -> None:
            super().accept()
            if self.route is not None and any(f"digits-v{v}" not in self.services for v in self.route.weights):
                self.route = replace(self.route, accepted=False, reason="BackendNotFound", message="Service not found")

    world = Unresolving(spec(1, 2))
    world.settle()
    world.spec, world.generation = spec(1, 2, stable=2), world.generation + 1
    for _ in range(12):
        world.step()
        known = world.status.of(1)
        if world.weights == {2: 100} and bool(known and known.drained_at) == begun:
            break
        world.go_well()
    world.services.pop("digits-v1")
    world.settle()
    assert set(world.servings) == {2}
    assert world.ready_condition() == ("True", "Serving")


@pytest.mark.parametrize("ahead", [0, 1, 3, 10, 600])
def test_a_crash_of_the_former_runtime_is_nothing_to_the_one_that_replaces_it_whatever_the_nodes_clock_says(ahead: int) -> None:
    world = releasing(steps=STEPS)
    until_accepted(world, 50)
    go_through(world, 9)
    killed = PodTrouble("OutOfMemory", "triton was killed", world.now + timedelta(seconds=ahead))
    world.servings[2] = replace(world.servings[2], ready=0, trouble=killed)
    commit(world, steps=STEPS, runtime={"resources": {"limits": {"memory": "8Gi"}}})
    for _ in range(20):
        world.step()
        world.now += timedelta(seconds=1)
    assert world.status.aborted == []
    assert world.status.history == []


def test_an_abort_is_found_again_by_what_it_was_recorded_with() -> None:
    world = in_mid_rollout()
    crash(world)
    for _ in range(10):
        world.step()
        world.now += timedelta(seconds=1)
    assert len(world.status.aborted) == 1
    assert len(world.status.history) == 1


@pytest.mark.parametrize("weight", [50, 100])
def test_a_number_used_again_for_other_content_moves_no_traffic_and_forgets_nothing(weight: int) -> None:
    world = releasing(steps=[{"weight": weight, "hold": "Indefinite"}] if weight < 100 else [{"weight": 100}])
    until_accepted(world, weight)
    go_through(world, 30)
    before = (world.weights, world.status.step and world.status.step.index, world.status.evidence)
    reuse_the_number(world)
    for _ in range(5):
        world.step()
    assert world.ready_condition() == ("False", "VersionReused")
    assert (world.weights, world.status.step and world.status.step.index, world.status.evidence) == before


def reuse_the_number(world: World) -> None:
    """Version 2 is put back with other content while pods of the former one run."""
    listed = [entry(1), entry(2, triton={"maxBatchSize": 4})]
    world.spec = world.spec.model_copy(update={"versions": spec(1, 2, versions=listed).versions})
    world.generation += 1


@pytest.mark.parametrize("happens", [fail_everything, crash])
def test_a_canary_that_is_held_is_judged_and_cut_off_when_it_fails(happens: Callable[[World], None]) -> None:
    world = in_mid_rollout()
    reuse_the_number(world)
    go_through(world, 30)
    assert world.weights == {1: 50, 2: 50}
    for _ in range(8):
        happens(world)
        world.step()
        world.accept()
    assert world.weights == {1: 100}
    assert [(a.version, a.reason) for a in world.status.aborted] == [
        (2, "ErrorRateHigher" if happens is fail_everything else "CrashLoop")
    ]
    for _ in range(5):
        world.feed((150, 0), (0, 0))
        world.step()
        world.accept()
    assert world.weights == {1: 100}, "and it stays out"
    assert len(world.status.aborted) == 1


def test_an_autoscaler_is_asked_for_no_more_than_its_maximum() -> None:
    scaling = {"autoscaling": {"minReplicas": 4, "maxReplicas": 4, "targetCPUUtilizationPercentage": 60}, "resources": {}}
    runtime = {**scaling, "resources": {"requests": {"cpu": "1"}}}
    mirror = {"stable": 1, "canary": 2, "mirror": {"percent": 50}}
    world = World(spec(1, 2, runtime=runtime))
    world.settle()
    world.spec = spec(1, 2, traffic=mirror, rollout={"steps": [{"weight": 90, "hold": "Indefinite"}]}, runtime=runtime)
    world.generation += 1
    for _ in range(5):
        world.step()
        world.go_well()
    assert world.autoscalers
    assert all(a["minReplicas"] <= a["maxReplicas"] for a in world.autoscalers.values())


class _Children(Cache):
    """Children as a watch would have brought them."""

    def __init__(self, **objects: list[dict[str, Any]]) -> None:
        super().__init__(cast(Any, None), (), lambda key: None, lambda: START)
        self.found = objects

    def children(self, kind: Any, owner: Any) -> dict[str, dict[str, Any]]:
        return {obj["metadata"]["name"]: obj for obj in self.found.get(kind.kind, [])}

    @property
    def gateway_api(self) -> bool:
        return True


def child(name: str, component: str = "triton", **body: Any) -> dict[str, Any]:
    labels = {LABEL_OWNER: "digits", LABEL_COMPONENT: component, LABEL_VERSION: "1"}
    owner = {"apiVersion": "serving.perch.dev/v1alpha1", "kind": "ModelDeployment", "name": "digits"}
    owner |= {"uid": "uid-1", "controller": True}
    return {"metadata": {"name": name, "labels": labels, "ownerReferences": [owner], "resourceVersion": "1"}, **body}


def test_a_child_that_cannot_be_read_hides_no_other() -> None:
    sound = child("digits-v1", spec={"replicas": 2, "template": {}}, status={"readyReplicas": 2})
    cache = _Children(
        **{
            DEPLOYMENT.kind: [sound, child("digits-v2", spec=None)],
            JOB.kind: [child("digits-v1-0123abcd", "export", status={"conditions": [None]})],
            ROUTE.kind: [child("digits", spec={"rules": 7})],
        }
    )
    seen = observe(cache, ("vision", "digits"), "uid-1")
    assert {v: (s.ready, s.readable) for v, s in seen.servings.items()} == {1: (2, True), 2: (0, False)}
    assert [(j.name, j.version, j.state) for j in seen.exports] == [("digits-v1-0123abcd", 1, JobState.RUNNING)]
    parts = {fault.part for fault in seen.unreadable}
    assert parts == {"reading Deployment digits-v2", "reading Job digits-v1-0123abcd", "reading HTTPRoute digits"}


def test_a_pod_that_cannot_be_read_hides_neither_its_version_nor_the_other_pods() -> None:
    owner = {"uid": "rs-1", "controller": True}
    odd = child("digits-v1-x", status={"phase": "Running", "conditions": [{}]})
    odd["metadata"]["ownerReferences"] = [owner]
    crashing = {"name": "triton", "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}
    sound = child("digits-v1-y", status={"phase": "Running", "containerStatuses": [crashing]})
    serving = child("digits-v1", spec={"replicas": 2, "template": {}}, status={"readyReplicas": 1})
    seen = observe(_Children(**{DEPLOYMENT.kind: [serving], POD.kind: [odd, sound]}), ("vision", "digits"), "uid-1")
    assert [fault.part for fault in seen.unreadable] == ["reading Pod digits-v1-x"]
    assert seen.servings[1].ready == 1
    trouble = seen.servings[1].trouble
    assert trouble is not None
    assert trouble.reason == "CrashLoop"


def test_a_route_whose_status_cannot_be_read_still_tells_its_weights() -> None:
    backends = [{"name": "digits-v1", "weight": 60}, {"name": "digits-v2", "weight": 40}]
    found = child("digits", "route", spec={"rules": [{"backendRefs": backends}]}, status={"parents": 7})
    found["metadata"] |= {"namespace": "vision", "generation": 1}
    seen = observe(_Children(**{ROUTE.kind: [found]}), ("vision", "digits"), "uid-1")
    assert seen.route is not None
    assert dict(seen.route.weights) == {1: 60, 2: 40}
    assert not seen.route.accepted


@pytest.mark.parametrize("version", [1, 2], ids=["stable", "the canary"])
def test_pods_whose_deployment_cannot_be_read_are_left_alone_and_keep_no_revert_waiting(version: int) -> None:
    world = in_mid_rollout()
    bare = replace(world.servings[version], revision="", serving_hash="", replicas=0, readable=False)
    world.servings[version] = bare
    rendered = list(world.rendered)
    for _ in range(3):
        world.step()
    assert world.weights == {1: 50, 2: 50}
    assert world.rendered == rendered, "nothing is rendered over what is not known"
    assert world.servings[version] == bare
    if version == 2:
        revert(world)
        for _ in range(3):
            world.step()
            world.accept()
        assert world.weights == {1: 100}


def test_children_are_known_by_their_owner_and_their_name_and_lost_labels_are_put_back() -> None:
    bare: dict[str, Any] = {"labels": None}
    serving = child("digits-v2", spec={"replicas": 1, "template": {}}, status={"readyReplicas": 1})
    job = child("digits-v1-0123abcd", "export", spec={}, status={})
    somebodys = child("digits-v2-copy", spec={"replicas": 1, "template": {}}, status={"readyReplicas": 1})
    for each in (serving, job, somebodys):
        each["metadata"] |= bare
    job["metadata"]["uid"] = "job-1"
    route = child("digits", "route", spec={"rules": []}, status={})
    route["metadata"] |= {"namespace": "vision", "generation": 1}
    route["metadata"]["labels"] = {LABEL_OWNER: "another"}
    found = {DEPLOYMENT.kind: [serving, somebodys], JOB.kind: [job], ROUTE.kind: [route]}
    seen = observe(_Children(**found), ("vision", "digits"), "uid-1")
    assert set(seen.servings) == {2}
    assert seen.servings[2].ready == 1
    assert [(j.version, j.revision) for j in seen.exports] == [(1, "0123abcd")]
    assert {(u.kind, u.name): u.labels[LABEL_COMPONENT] for u in seen.unlabelled} == {
        ("Deployment", "digits-v2"): "triton",
        ("Job", "digits-v1-0123abcd"): "export",
        ("HTTPRoute", "digits"): "route",
    }
    world = in_mid_rollout()
    decided = plan(
        world.identity, world.spec, world.status, replace(world.observe(), unlabelled=seen.unlabelled), INSTALLATION, world.now
    )
    assert {a.name for a in decided.actions if isinstance(a, Label)} == {"digits-v2", "digits-v1-0123abcd", "digits"}


def streams(world: World) -> str:
    """Who gets new streams."""
    assert world.route is not None
    for rule in world.route.spec["rules"]:
        if rule["matches"][0]["path"]["value"].endswith("/ModelStreamInfer") and "headers" not in rule["matches"][0]:
            (found,) = [b["name"] for b in rule["backendRefs"] if b["weight"]]
            return str(found)
    raise AssertionError("no rule for streams")


def test_streams_stay_with_stable_while_a_canary_shares_traffic_and_move_with_all_of_it() -> None:
    world = releasing(steps=[*STEPS[:1], {"weight": 100}])
    until_accepted(world, 50)
    assert streams(world) == "digits-v1"
    go_through(world, 700)
    until_accepted(world, 100)
    assert streams(world) == "digits-v2"
    commit(world, canary=None)
    world.step()
    assert (world.weights, streams(world)) == ({1: 100}, "digits-v1"), "a revert takes them along"


def test_a_route_of_a_former_release_is_rewritten_once_and_keeps_its_weights() -> None:
    world = in_mid_rollout()
    route = world.route
    assert route is not None
    former = [rule for rule in route.spec["rules"] if not rule["matches"][0]["path"]["value"].endswith("/ModelStreamInfer")]
    former[0] = {**former[0], "matches": [*former[0]["matches"], {"path": {"type": "Exact", "value": "/i.G/ModelStreamInfer"}}]}
    world.route = replace(route, spec={**route.spec, "rules": former}, accepted=True)
    world.step()
    world.accept()
    assert (world.weights, streams(world)) == ({1: 50, 2: 50}, "digits-v1")
    assert not [a for a in world.step().actions if isinstance(a, Apply) and a.body["kind"] == "HTTPRoute"]


def runtime(world: World, image: str, **more: Any) -> None:
    commit(world, steps=STEPS, runtime={"image": image}, **more)
    for _ in range(8):
        world.step()
        world.go_well()


@pytest.mark.parametrize("b_fails", [False, True], ids=["B was on trial", "B was aborted, too"])
def test_an_abort_stands_again_when_the_runtime_that_it_was_for_comes_back(b_fails: bool) -> None:
    world = in_mid_rollout()
    world.spec = world.spec.model_copy(update={"runtime": world.spec.runtime.model_copy(update={"image": "triton:a"})})
    go_through(world, 30)
    until_accepted(world, 50)
    crash(world)
    world.step()
    world.accept()
    assert world.weights == {1: 100}
    runtime(world, "triton:b")
    assert world.weights == {1: 50, 2: 50}, "another runtime is another canary"
    assert world.status.aborted == []
    if b_fails:
        crash(world)
        for _ in range(3):
            world.step()
            world.accept()
        assert world.weights == {1: 100}
    for image in ("triton:a", "triton:b", "triton:a"):
        runtime(world, image)
        stays_out = image == "triton:a" or b_fails
        assert (world.weights == {1: 100}) is stays_out
        assert bool(world.status.aborted) is stays_out
    assert len([h for h in world.status.history if h.outcome == "Aborted"]) == 1 + b_fails
    runtime(world, "triton:a", retryAt="2026-02-01T00:00:00Z")
    assert world.weights == {1: 50, 2: 50}
    assert [a.version for a in (*world.status.aborted, *world.status.aborted_before)] == [2] * b_fails


def test_no_more_aborts_are_remembered_than_a_history_holds() -> None:
    world = in_mid_rollout()
    for number in range(14):
        crash(world)
        for _ in range(3):
            world.step()
            world.accept()
        assert world.weights == {1: 100}
        runtime(world, f"triton:{number}")
        assert world.weights == {1: 50, 2: 50}
    assert len(world.status.aborted_before) == 10


@pytest.mark.parametrize("ahead", [-3600, -600, -1, 0, 1, 600, 3600])
def test_after_a_retry_only_new_crashes_count_whatever_the_nodes_clock_says(ahead: int) -> None:
    def node_says() -> Any:
        return world.now + timedelta(seconds=ahead)

    world = in_mid_rollout()
    pods = [
        PodTrouble("CrashLoop", f"pod digits-v2-{pod}: code 139", node_says() - timedelta(seconds=n))
        for n, pod in enumerate("ab")
    ]
    world.servings[2] = replace(world.servings[2], ready=0, trouble=pods[0], other_troubles=(pods[1],))
    world.step()
    world.accept()
    assert [a.reason for a in world.status.aborted] == ["CrashLoop"]
    world.now += timedelta(seconds=30)
    commit(world, steps=STEPS, retryAt="2026-02-01T00:00:00Z")
    for _ in range(5):
        world.now += timedelta(seconds=5)
        world.step()
    assert world.status.aborted == [], "both wait out their back-off"
    world.servings[2] = replace(world.servings[2], trouble=pods[1], other_troubles=())
    world.step()
    assert world.status.aborted == [], "the one that has got over it does not make the other one's end new"
    again = replace(pods[1], at=node_says())
    world.servings[2] = replace(world.servings[2], trouble=pods[0], other_troubles=(again,))
    world.step()
    assert [a.message for a in world.status.aborted] == [pods[1].message]


UNREADABLE = ("versions", "rollout", "runtime", "routing", "builder", "repository", "tomorrow")


def unread(world: World, part: str, **change: Any) -> Plan:
    """A pass over a spec of which this operator cannot read a part."""
    raw = world.spec.model_dump(mode="json", by_alias=True, exclude_none=True) | change
    raw[part] = [{"tomorrow": 1}] if part == "versions" else {"tomorrow": 1}
    with pytest.raises(ValidationError):
        Spec.model_validate(raw)
    why = f"spec.{part}.tomorrow: not known"
    decided = plan_invalid(world.identity, raw, why, world.status, world.observe(), INSTALLATION, world.now)
    world.plans.append(decided)
    for action in decided.actions:
        assert isinstance(action, Apply)
        assert is_known(world, action), "nothing but numbers is new"
        world._do(action)
    assert decided.status is not None
    world.status = Status.model_validate(decided.status.model_dump(by_alias=True, mode="json"))
    assert world.ready_condition() == ("False", "InvalidSpec")
    assert message(world).startswith(why)
    return decided


@pytest.mark.parametrize("part", [*UNREADABLE, "traffic"])
@pytest.mark.parametrize("happens", [fail_everything, crash])
def test_a_canary_is_cut_off_whatever_of_the_spec_cannot_be_read(part: str, happens: Callable[[World], None]) -> None:
    world = in_mid_rollout()
    unread(world, part)
    for _ in range(8):
        happens(world)
        unread(world, part)
        world.accept()
    assert world.weights == {1: 100}
    assert [a.version for a in world.status.aborted] == [2]
    assert "version 2 was aborted, the traffic goes to version 1" in message(world)
    for _ in range(3):
        world.step()
        world.accept()
    assert world.weights == {1: 100}, "and it stays out when the spec can be read again"
    assert len(world.status.history) == 1


@pytest.mark.parametrize("part", UNREADABLE)
def test_a_revert_is_done_whatever_else_of_the_spec_cannot_be_read(part: str) -> None:
    world = in_mid_rollout()
    for _ in range(2):
        unread(world, part, traffic={"stable": 1})
        world.accept()
    assert world.weights == {1: 100}
    assert [h.outcome for h in world.status.history] == ["Superseded"]
    accepted = world.status.condition("TrafficAccepted")
    assert accepted is not None
    assert accepted.status == "True"


@pytest.mark.parametrize("part", [*UNREADABLE, "traffic"])
def test_what_serves_goes_on_while_a_spec_cannot_be_read_and_the_rollout_after_it(part: str) -> None:
    world = in_mid_rollout()
    before = (world.status.step, world.status.evidence)
    unread(world, part)
    seen = world.status
    for _ in range(3):
        decided = unread(world, part)
        assert decided.actions == ()
        assert world.status == seen, "nothing is written when nothing changed"
    assert (world.weights, (world.status.step, world.status.evidence)) == ({1: 50, 2: 50}, before)
    assert "version 2 keeps 50 % and is judged" in message(world)
    go_through(world, 700)
    until_accepted(world, 100)
    assert world.weights == {2: 100}


def test_a_spec_that_cannot_be_read_gives_nobody_traffic_that_has_not_the_pods_for_it() -> None:
    world = releasing(steps=[{"weight": 20, "hold": "10m"}, {"weight": 100}], runtime={"replicas": 4})
    until_accepted(world, 20)
    for traffic in ({"stable": 2}, {"stable": 3}, {"stable": 2, "canary": 1}):
        unread(world, "builder", traffic=traffic)
        assert world.weights == {1: 80, 2: 20}


def test_a_first_spec_that_cannot_be_read_is_said() -> None:
    decided = unread(World(spec(1)), "traffic")
    assert decided.actions == ()


async def test_the_loop_cuts_a_canary_off_under_a_spec_that_it_cannot_read() -> None:
    store = Store()
    store.commit(spec(1, 2))
    leader = Leader(store, lambda: START)
    await settle(store, leader)
    store.commit(spec(1, 2, traffic={"stable": 1, "canary": 2}, rollout=rollout(steps=STEPS)))
    await settle(store, leader)
    assert store.weights[-1] == {"digits-v1": 50, "digits-v2": 50}
    written = store.get("ModelDeployment", "digits")
    store.put("ModelDeployment", "digits", {**written, "spec": {**written["spec"], "tomorrow": 1}})
    await settle(store, leader)
    assert store.weights[-1] == {"digits-v1": 50, "digits-v2": 50}
    store.crash(2, START)
    await leader.work(3)
    assert store.weights[-1] == {"digits-v1": 100}
    assert [a["reason"] for a in store.status["aborted"]] == ["CrashLoop"]
    (stalled,) = [c for c in store.status["conditions"] if c["type"] == "Stalled"]
    assert stalled["reason"] == "InvalidSpec"
    assert "version 2 was aborted" in stalled["message"]

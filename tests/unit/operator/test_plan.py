"""The planner, case by case."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from perch.api import Phase
from perch.names import FINALIZER, artifact_revision, cleanup_job_name, export_job_name
from perch.observe import route_facts
from perch.observed import Installation, JobState
from perch.plan import Apply, Delete, SetFinalizer, plan
from perch.plan.exports import BACKOFF
from perch.status import build_events, with_failures
from perch_exporter.contract import Accuracy, Parity, ParityTolerance, Reason, Tooling, Verdict

from .world import World, entry, spec


def job_of(world: World, version: int) -> str:
    listed = world.spec.entry(version)
    assert listed is not None
    return export_job_name("digits", version, artifact_revision(listed))


def running(*versions: int, **more: object) -> World:
    world = World(spec(*versions, **more))  # type: ignore[arg-type]
    world.settle()
    return world


def change(world: World, *versions: int, **more: object) -> None:
    world.spec = spec(*versions, **more)  # type: ignore[arg-type]
    world.generation += 1


def test_a_first_deploy_exports_then_starts_then_routes_in_that_order() -> None:
    world = World(spec(1))
    assert [a.body["kind"] for a in world.step().actions] == ["Job"]
    assert world.ready_condition() == ("False", "Exporting")
    world.go_well()
    assert [a.body["kind"] for a in world.step().actions] == ["Service", "Deployment"]
    world.step()
    assert world.ready_condition() == ("False", "Starting")
    assert world.route is None, "no traffic before the pods have proven themselves"
    world.go_well()
    assert [a.body["kind"] for a in world.step().actions] == ["HTTPRoute"]
    assert world.ready_condition()[0] == "False", "not Ready before the Gateway has accepted the route"
    world.settle()
    assert world.ready_condition() == ("True", "Serving")
    assert world.weights == {1: 100}


def test_every_listed_version_is_exported_but_only_those_in_traffic_run() -> None:
    world = running(1, 2, 3)
    assert [world.phase(v) for v in (1, 2, 3)] == [Phase.SERVING, Phase.PUBLISHED, Phase.PUBLISHED]
    assert set(world.servings) == {1}


def test_a_canary_gets_its_share_only_when_its_pods_are_ready() -> None:
    world = running(1, 2)
    change(world, 1, 2, canary=2, weight=10)
    world.step()
    world.step()
    assert world.weights == {1: 100}
    world.settle()
    assert world.weights == {1: 90, 2: 10}
    assert world.ready_condition() == ("True", "SplitHeld")


def test_a_promotion_restarts_no_pod_and_moves_all_traffic_in_one_write() -> None:
    world = running(1, 2, canary=2)
    rendered = list(world.rendered)
    writes = len(world.written_weights)
    change(world, 1, 2, stable=2)
    world.step()
    assert world.weights == {2: 100}
    assert world.rendered == rendered
    assert len(world.written_weights) == writes + 1
    assert world.route is not None
    assert world.route.weights == {1: 0, 2: 100}, "the former stable stays a backend until it is drained"


def test_a_revert_within_the_delay_is_one_write_and_starts_nothing() -> None:
    world = running(1, 2, canary=2)
    change(world, 1, 2, stable=2)
    world.step()
    world.go_well()
    world.step()
    rendered = list(world.rendered)
    change(world, 1, 2, stable=1)
    decided = world.step()
    assert world.weights == {1: 100}
    assert [a.body["kind"] for a in decided.actions] == ["HTTPRoute"]
    assert world.rendered == rendered


def test_a_revert_to_pods_that_are_gone_starts_them_first_and_traffic_stays_meanwhile() -> None:
    world = running(1, 2, stable=2)
    assert set(world.servings) == {2}
    change(world, 1, 2, stable=1)
    world.step()
    world.step()
    assert world.weights == {2: 100}
    assert world.phase(2) is Phase.DRAINING
    world.ready(1)
    world.step()
    assert world.weights == {1: 100}


def test_a_version_that_left_traffic_is_drained_then_out_of_the_route_then_gone() -> None:
    """contour#2151, envoy gateway#9075: swapping backends in a route can give 503, so both stay until one is drained."""
    world = running(1, 2)
    change(world, 1, 2, stable=2)
    while world.weights != {2: 100}:
        world.step()
        world.go_well()
    world.step()
    world.step()
    drained = world.now
    assert 1 in world.servings
    world.now = drained + timedelta(seconds=59)
    world.step()
    assert 1 in world.servings
    world.now = drained + timedelta(seconds=61)
    world.step()
    assert world.route is not None
    assert 1 not in world.route.weights
    assert 1 in world.servings, "the pods stay until the Gateway has accepted the route without them"
    world.go_well()
    world.step()
    assert 1 not in world.servings
    assert "digits-v1" not in world.services


def test_draining_does_not_begin_before_the_gateway_accepted_weight_0() -> None:
    world = running(1, 2, canary=2)
    world.gateway_accepts = False
    change(world, 1, 2, stable=2)
    for _ in range(3):
        world.step()
        world.now += timedelta(hours=1)
    world.step()
    assert 1 in world.servings
    assert world.route is not None
    assert 1 in world.route.weights, "proxies may still send to it: it stays a backend"
    assert world.ready_condition()[0] == "False"


def test_scaling_scales_and_renders_nothing() -> None:
    world = running(1)
    rendered = list(world.rendered)
    change(world, 1, runtime={"replicas": 3})
    world.settle()
    assert world.servings[1].replicas == 3
    assert world.rendered == rendered
    assert "digits-v1" in world.budgets
    change(world, 1, runtime={"replicas": 1})
    world.settle()
    assert world.budgets == {}, "a budget over one pod blocks every drain of its node"


def test_a_runtime_change_rolls_the_pods_and_is_not_ready_until_they_have() -> None:
    world = running(1)
    change(world, 1, runtime={"image": "triton:2"})
    world.step()
    world.step()
    assert world.rendered == ["digits-v1", "digits-v1"]
    assert world.ready_condition() == ("False", "RollingUpdate")
    assert world.weights == {1: 100}
    world.settle()
    assert world.ready_condition() == ("True", "Serving")


def test_a_new_pod_that_is_pending_beside_a_ready_former_one_is_no_finished_update() -> None:
    world = running(1)
    change(world, 1, runtime={"resources": {"limits": {"nvidia.com/gpu": 8}}})
    world.step()
    world.ready(1, 1, updated=1, total=2, words="Unschedulable: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")
    world.step()
    assert world.ready_condition() == ("False", "RollingUpdate")
    assert "Insufficient nvidia.com/gpu" in world.status.condition("Ready").message  # type: ignore[union-attr]


def test_a_canary_that_lost_all_pods_gets_no_traffic() -> None:
    world = running(1, 2, canary=2)
    world.ready(2, 0)
    world.step()
    assert world.weights == {1: 100}
    assert world.ready_condition() == ("False", "Starting")


def test_when_stable_lost_its_pods_the_canary_is_not_given_more() -> None:
    world = running(1, 2, canary=2)
    world.ready(1, 0)
    world.step()
    assert world.weights == {1: 90, 2: 10}
    available = world.status.condition("Available")
    assert available is not None
    assert available.status == "False"


def test_a_new_canary_replaces_the_old_one_which_is_drained_not_killed() -> None:
    world = running(1, 2, 3, canary=2)
    change(world, 1, 2, 3, canary=3)
    world.step()
    assert world.weights == {1: 100}
    assert 2 in world.servings
    world.go_well()
    world.step()
    world.go_well()
    world.step()
    assert world.weights == {1: 90, 3: 10}
    assert 2 in world.servings
    world.settle()
    assert 2 not in world.servings


def test_a_full_canary_awaits_its_promotion() -> None:
    world = running(1, 2, canary=2, weight=100)
    assert world.weights == {2: 100}
    assert world.ready_condition() == ("True", "AwaitingPromotion")


@pytest.mark.parametrize(
    "reason", [Reason.ACCESS_DENIED, Reason.BUCKET_NOT_FOUND, Reason.STORE_UNREACHABLE, Reason.OBJECT_NOT_FOUND]
)
def test_passing_trouble_is_retried_with_growing_delays_and_says_when(reason: Reason) -> None:
    world = World(spec(1))
    world.step()
    for attempt, delay in enumerate((*BACKOFF, BACKOFF[-1]), start=1):
        world.fail(job_of(world, 1), reason, "bucket models at http://s3: denied")
        decided = world.step()
        assert decided.wake_at == world.now + timedelta(seconds=delay)
        known = world.status.of(1)
        assert known is not None
        assert known.attempts == attempt
        assert world.ready_condition() == ("False", "ExportRetrying")
        assert "bucket models at http://s3: denied" in world.status.condition("Ready").message  # type: ignore[union-attr]
        world.step()
        assert job_of(world, 1) in world.jobs, "the failed Job stays for kubectl logs until the retry is due"
        world.now += timedelta(seconds=delay)
        world.step()
        assert job_of(world, 1) not in world.jobs
        world.step()
        assert job_of(world, 1) in world.jobs
    world.settle()
    assert world.ready_condition() == ("True", "Serving")


def test_a_job_that_its_deadline_ended_while_it_waited_says_what_it_waited_for() -> None:
    world = World(spec(1))
    world.step()
    name, full = job_of(world, 1), "Unschedulable: 0/3 nodes are available: 3 Insufficient memory"
    world.jobs[name] = replace(world.jobs[name], words=full)
    world.step()
    too_late = "it took longer than its 3600 s and was ended (DeadlineExceeded): raise builder.activeDeadlineSeconds"
    world.jobs[name] = replace(world.jobs[name], state=JobState.FAILED, words=too_late, late=True)
    for _ in range(3):
        world.step()
        message = world.status.condition("Ready").message  # type: ignore[union-attr]
        assert full in message
        assert "raise builder.activeDeadlineSeconds" not in message, "it would only wait longer"


def test_a_bad_checkpoint_stalls_and_is_not_retried_even_when_its_job_is_gone() -> None:
    world = World(spec(1))
    world.step()
    world.fail(job_of(world, 1), Reason.CHECKSUM_MISMATCH, "sha256 is ab, not cd")
    world.step()
    assert world.ready_condition() == ("False", "ExportFailed")
    assert world.status.condition("Stalled") is not None
    world.jobs.clear()
    world.now += timedelta(days=1)
    assert world.step().actions == ()
    assert world.step().wake_at is None


GPU = {"limits": {"nvidia.com/gpu": 1}}
TENSORRT: dict[str, Any] = {
    "versions": [entry(1, conversion={"target": "TensorRT"})],
    "builder": {"tensorrtImage": "perch-tensorrt:25.10", "resources": GPU},
    "runtime": {"image": "triton:25.10", "tensorrtVersion": "10.13.3.9", "resources": GPU},
}
BUILT = Tooling(torch="2.15.0", onnx="1.23.2", onnxruntime="1.31.1", opset=18, tensorrt="10.13.3.9", compute_capability="9.0")
REMEDIES = {
    "another image to build by": {"builder": {**TENSORRT["builder"], "tensorrtImage": "perch-tensorrt:25.12"}},
    "the version that the runtime has": {"runtime": {**TENSORRT["runtime"], "tensorrtVersion": "10.14.1.48"}},
    "more memory": {"builder": {**TENSORRT["builder"], "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "32Gi"}}}},
    "a node with a GPU": {"builder": {**TENSORRT["builder"], "nodeSelector": {"gpu": "yes"}}},
}


@pytest.mark.parametrize("stands", [True, False], ids=["its Job stands", "its Job is gone"])
@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_failure_that_builder_or_runtime_may_mend_is_tried_again_with_another(remedy: str, stands: bool) -> None:
    world = World(spec(1, **TENSORRT))
    world.step()
    world.fail(job_of(world, 1), Reason.TENSORRT_MISMATCH, "10.14.1.48, not 10.13.3.9")
    world.step()
    assert world.ready_condition() == ("False", "ExportFailed")
    if not stands:
        world.jobs.clear()
    change(world, 1, **TENSORRT | REMEDIES[remedy])
    world.step()
    if stands:
        assert not world.jobs, "the name is taken until the failed Job is gone"
        world.step()
    assert world.jobs[job_of(world, 1)].state is JobState.RUNNING
    assert world.phase(1) is Phase.EXPORTING
    world.fail(job_of(world, 1), Reason.TENSORRT_MISMATCH, "still not")
    world.step()
    assert world.ready_condition() == ("False", "ExportFailed")
    world.now += timedelta(days=1)
    assert world.step().actions == (), "and with nothing else no third time"


def test_an_upgrade_of_perch_tries_no_failed_export_again() -> None:
    world = World(spec(1, **TENSORRT))
    world.step()
    world.fail(job_of(world, 1), Reason.PARITY_FAILED)
    failed = world.step().status
    upgraded = Installation("test-cluster", "exporter:2", "artifacts:2", "triton:2", "Always")
    for _ in ("its Job stands", "its Job is gone"):
        decided = plan(world.identity, world.spec, world.status, world.observe(), upgraded, world.now)
        assert (decided.actions, decided.status) == ((), failed)
        world.jobs.clear()


def test_a_failed_export_that_is_to_be_tried_again_survives_the_operators_death() -> None:
    world = World(spec(1, **TENSORRT))
    world.step()
    world.fail(job_of(world, 1), Reason.TENSORRT_MISMATCH)
    world.step()
    change(world, 1, **TENSORRT | REMEDIES["more memory"])
    world.step(writes=1)
    assert not world.jobs, "the Job is deleted, and the status knows nothing of it"
    assert world.phase(1) is Phase.FAILED
    world.step(writes=1)
    assert world.jobs[job_of(world, 1)].state is JobState.RUNNING
    world.settle()
    known = world.status.of(1)
    assert known is not None
    assert (known.phase, known.export_hash, known.attempts) == (Phase.SERVING, None, 0)


def test_a_change_that_has_no_part_in_the_job_tries_no_failed_export_again() -> None:
    world = World(spec(1))
    world.step()
    world.fail(job_of(world, 1), Reason.CHECKSUM_MISMATCH)
    world.step()
    change(world, 1, runtime={"replicas": 3, "env": [{"name": "A", "value": "b"}]})
    assert world.step().actions == ()
    assert world.ready_condition() == ("False", "ExportFailed")


def test_a_running_export_is_left_alone_whatever_builder_says_meanwhile() -> None:
    world = World(spec(1))
    world.step()
    change(world, 1, builder={"nodeSelector": {"disk": "fast"}})
    assert not any(isinstance(action, Delete) for action in world.step().actions)


def test_the_next_failure_has_a_delay_of_its_own_also_where_the_status_of_its_start_was_lost() -> None:
    world = World(spec(1))
    world.step()
    world.fail(job_of(world, 1), Reason.ACCESS_DENIED)
    world.step()
    change(world, 1, builder={"nodeSelector": {"disk": "fast"}})
    world.step()
    world.step(writes=1)
    world.now += timedelta(minutes=10)
    world.fail(job_of(world, 1), Reason.ACCESS_DENIED)
    decided = world.step()
    assert decided.actions == ()
    assert decided.wake_at == world.now + timedelta(seconds=BACKOFF[0])
    world.now = decided.wake_at
    assert world.step().actions == (Delete("Job", job_of(world, 1)),)
    world.step()
    assert world.jobs[job_of(world, 1)].state is JobState.RUNNING


def test_passing_trouble_is_tried_again_at_once_where_the_job_would_be_another() -> None:
    world = World(spec(1))
    world.step()
    world.fail(job_of(world, 1), Reason.ACCESS_DENIED)
    world.step()
    change(world, 1, repository={"uri": "s3://models/prod", "credentialsSecretRef": {"name": "another"}})
    world.step()
    world.step()
    assert world.jobs[job_of(world, 1)].state is JobState.RUNNING
    known = world.status.of(1)
    assert known is not None
    assert known.attempts == 0


GATES = {
    "parity": Parity(
        verdict=Verdict.PASSED,
        samples=128,
        max_absolute_error=0.0123456,
        spread=12.3456,
        max_relative_error=0.001,
        top1_agreement=0.99949,
        cosine=0.99996,
    ),
    "tolerance": ParityTolerance(
        absolute_tolerance="5e-2", relative_tolerance="1e-2", minimum_top1_agreement="0.9", minimum_cosine="0.95"
    ),
    "accuracy": Accuracy(
        verdict=Verdict.PASSED,
        dataset_sha256="a" * 64,
        samples=1000,
        correct=979,
        checkpoint_correct=981,
        minimum="0.95",
        maximum_drop="0.01",
    ),
}
FIGURES = {
    "verdict": "Passed",
    "samples": 128,
    "maxAbsoluteError": "0.0123",
    "absoluteTolerance": "5e-2",
    "maxRelativeError": "0.001",
    "relativeTolerance": "1e-2",
    "spread": "12.3",
    "top1Agreement": "0.99949",
    "minimumTop1Agreement": "0.9",
    "cosine": "0.99996",
    "minimumCosine": "0.95",
    "minimumIou": None,
}


def test_the_gates_figures_limits_and_verdicts_stand_in_status_and_in_the_event() -> None:
    world = World(spec(1))
    world.gates = GATES
    world.step()
    world.finish(job_of(world, 1))
    before = world.status
    world.step()
    written = world.status.model_dump(by_alias=True, mode="json")["versions"][0]
    assert written["parity"] == FIGURES
    assert written["accuracy"] == {
        "accuracy": "0.9790",
        "checkpointAccuracy": "0.9810",
        "correct": 979,
        "samples": 1000,
        "datasetSha256": "a" * 64,
        "minimum": "0.95",
        "maximumDrop": "0.01",
        "verdict": "Passed",
    }
    told = next(event.message for event in build_events(before, world.status) if event.reason == "VersionPublished")
    assert told.endswith(
        "parity Passed at a relative error of 0.001 (allowed 1e-2), top-1 agreement 0.99949 (at least 0.9), "
        "cosine 0.99996 (at least 0.95), accuracy 0.9790 (Passed; the checkpoint's is 0.9810, at least 0.95, at most 0.01 below)"
    )


def test_of_detections_status_and_event_speak_of_partners_and_scores() -> None:
    world = World(spec(1))
    parity = Parity(verdict=Verdict.PASSED, samples=32, max_absolute_error=0.0004, spread=0.9, max_relative_error=0.003)
    world.gates = {"parity": parity, "tolerance": ParityTolerance(relative_tolerance="1e-2", minimum_iou="0.9")}
    world.step()
    world.finish(job_of(world, 1))
    before = world.status
    world.step()
    written = world.status.model_dump(by_alias=True, mode="json")["versions"][0]["parity"]
    assert (written["minimumIou"], written["maxRelativeError"], written["relativeTolerance"]) == ("0.9", "0.003", "1e-2")
    told = next(event.message for event in build_events(before, world.status) if event.reason == "VersionPublished")
    assert told.endswith(
        "parity Passed with 0.003 of the detections without a partner (allowed 1e-2), scores up to 0.0004 apart (allowed 1e-3)"
    )


def test_a_failed_gate_leaves_its_figures_and_limits_in_status_until_the_next_attempt() -> None:
    world = World(spec(1))
    world.step()
    world.gates = {**GATES, "parity": Parity(verdict=Verdict.FAILED, samples=16), "accuracy": None}
    world.fail(job_of(world, 1), Reason.PARITY_FAILED)
    world.step()
    known = world.status.of(1)
    assert known is not None
    assert known.parity is not None
    assert (known.parity.verdict, known.parity.max_absolute_error, known.parity.relative_tolerance) == (
        "Failed",
        "not finite",
        "1e-2",
    )
    assert known.accuracy is None
    change(world, 1, builder={"nodeSelector": {"disk": "fast"}})
    world.step()
    world.step()
    known = world.status.of(1)
    assert known is not None
    assert (known.phase, known.parity) == (Phase.EXPORTING, None)


def test_of_a_plan_the_accuracy_is_the_onnx_files_and_the_event_says_so() -> None:
    world = World(spec(1, **TENSORRT))
    world.gates, world.tooling = GATES, BUILT
    world.step()
    world.finish(job_of(world, 1))
    before = world.status
    world.step()
    told = next(event.message for event in build_events(before, world.status) if event.reason == "VersionPublished")
    assert told.endswith("measured on the ONNX file that the plan was built of")


def test_a_bad_canary_stalls_while_stable_goes_on_serving() -> None:
    world = running(1)
    change(world, 1, 2, canary=2)
    world.step()
    world.fail(job_of(world, 2), Reason.PARITY_FAILED)
    world.step()
    assert world.ready_condition() == ("False", "ExportFailed")
    assert world.weights == {1: 100}
    available = world.status.condition("Available")
    assert available is not None
    assert available.status == "True"


def test_a_bad_version_outside_traffic_does_not_make_the_whole_unready() -> None:
    world = running(1)
    change(world, 1, 2)
    world.step()
    world.fail(job_of(world, 2), Reason.PARITY_FAILED)
    world.step()
    assert world.phase(2) is Phase.FAILED
    assert world.ready_condition() == ("True", "Serving")


def test_a_finished_job_whose_words_are_lost_runs_again() -> None:
    world = World(spec(1))
    world.step()
    name = job_of(world, 1)
    world.finish(name)
    world.jobs[name] = type(world.jobs[name])(**{**vars(world.jobs[name]), "summary": None})
    world.step()
    assert name in world.jobs, "the pod's words may still be on their way"
    world.now += timedelta(seconds=20)
    world.step()
    assert name not in world.jobs
    world.settle()
    assert world.ready_condition() == ("True", "Serving")


def test_a_number_used_again_for_other_content_is_refused_while_its_former_pods_run() -> None:
    world = running(1, 2, canary=2)
    world.spec = spec(1, 2, canary=2, versions=[entry(1), entry(2, triton={"maxBatchSize": 4})])
    world.generation += 1
    former = world.servings[2]
    for _ in range(5):
        world.step()
        world.go_well()
    assert world.servings[2].serving_hash == former.serving_hash
    assert world.ready_condition() == ("False", "VersionReused")
    assert world.weights == {1: 90, 2: 10}, "what served goes on serving, as the message says"
    assert world.status.step is not None, "the rollout is not forgotten"


def test_a_plan_is_given_to_no_other_tensorrt_and_what_served_goes_on() -> None:
    runtime = TENSORRT["runtime"]
    asked = {name: TENSORRT[name] for name in ("versions", "builder")}
    world = World(spec(1, runtime=runtime, **asked))
    world.tooling = BUILT
    world.settle()
    assert world.ready_condition() == ("True", "Serving")
    known = world.status.of(1)
    assert known is not None
    assert known.tensorrt is not None
    assert (known.tensorrt.version, known.tensorrt.compute_capability) == ("10.13.3.9", "9.0")

    former = world.servings[1]
    world.spec = spec(1, runtime={**runtime, "image": "triton:25.12", "tensorrtVersion": "10.14.1.48"}, **asked)
    world.generation += 1
    world.settle()
    assert world.servings[1].serving_hash == former.serving_hash, "no pod is started on the other TensorRT"
    world.spec = spec(1, runtime={**runtime, "image": "triton:25.12", "tensorrtVersion": "10.14.1.48", "replicas": 3}, **asked)
    world.generation += 1
    world.settle()
    assert (world.servings[1].replicas, world.servings[1].serving_hash) == (3, former.serving_hash), "what there is scales still"
    assert world.weights == {1: 100}
    condition = world.status.condition("Ready")
    assert condition is not None
    assert (condition.status, condition.reason) == ("False", "TensorRTMismatch")
    assert "TensorRT 10.13.3.9" in condition.message
    assert "runtime.tensorrtVersion says 10.14.1.48" in condition.message

    world.spec = spec(1, runtime=runtime, **asked)
    world.generation += 1
    world.settle()
    assert world.ready_condition() == ("True", "Serving")


def test_a_plan_is_given_to_gpus_of_no_other_generation() -> None:
    label = "nvidia.com/gpu.compute.major"
    selects = {number: {**TENSORRT["runtime"], "nodeSelector": {label: number}} for number in ("8", "9")}
    world = World(spec(1, **TENSORRT | {"runtime": selects["9"]}))
    world.tooling = BUILT
    world.settle()
    rendered = next(
        action.body
        for decided in world.plans
        for action in decided.actions
        if isinstance(action, Apply) and action.body["kind"] == "Deployment"
    )
    terms = rendered["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert {"key": label, "operator": "In", "values": ["9"]} in terms["nodeSelectorTerms"][0]["matchExpressions"]

    former = world.servings[1]
    change(world, 1, **TENSORRT | {"runtime": selects["8"]})
    world.settle()
    assert world.servings[1].serving_hash == former.serving_hash
    condition = world.status.condition("Ready")
    assert condition is not None
    assert condition.reason == "GPUMismatch"
    assert f"compute capability 9.0 and runtime.nodeSelector asks for {label}=8" in condition.message


def test_a_lost_status_is_found_again_from_the_children() -> None:
    world = running(1, 2, canary=2)
    rendered = list(world.rendered)
    world.status = type(world.status)()
    world.step()
    world.settle()
    assert world.weights == {1: 90, 2: 10}
    assert world.rendered == rendered
    assert world.ready_condition() == ("True", "SplitHeld")


def test_without_routing_the_services_are_the_way_in() -> None:
    world = running(1, routing=None)
    assert world.route is None
    assert world.ready_condition() == ("True", "Serving")
    assert world.status.endpoint == "digits-v1.vision.svc"


def test_without_gateway_api_a_condition_says_so_and_the_services_still_work() -> None:
    world = World(spec(1), gateway_api=False)
    world.settle()
    assert world.ready_condition() == ("False", "GatewayAPIMissing")
    assert "digits-v1" in world.services
    available = world.status.condition("Available")
    assert available is not None
    assert available.status == "True"


def test_retain_needs_no_finalizer_so_a_deletion_cannot_hang() -> None:
    world = running(1)
    assert world.finalizers == ()
    world.deleting = True
    assert world.step().actions == ()


DELETE = {"uri": "s3://models/prod", "credentialsSecretRef": {"name": "s3"}, "deletionPolicy": "Delete"}


def test_delete_erases_every_artefact_and_then_lets_go() -> None:
    world = running(1, 2, repository=DELETE)
    assert world.finalizers == (FINALIZER,)
    world.jobs.clear()
    world.deleting = True
    jobs = [a.body["metadata"]["name"] for a in world.step().actions if isinstance(a, Apply)]
    assert sorted(jobs) == sorted(cleanup_job_name("digits", artifact_revision(e)) for e in world.spec.versions)
    assert world.step().actions == ()
    world.go_well()
    assert world.step().actions == (SetFinalizer(False),)


def test_a_running_export_is_stopped_before_its_artefact_is_erased() -> None:
    world = World(spec(1, repository=DELETE))
    world.step()
    world.deleting = True
    world.step()
    assert world.jobs == {}
    assert isinstance(world.step().actions[0], Apply)


def test_a_cleanup_that_fails_lets_go_and_says_what_is_left() -> None:
    world = running(1, repository=DELETE)
    world.jobs.clear()
    world.deleting = True
    world.step()
    world.fail(next(iter(world.jobs)), Reason.STORE_UNREACHABLE)
    decided = world.step()
    assert decided.actions[-1] == SetFinalizer(False)
    assert decided.events[0].reason == "ArtifactsLeft"
    assert "s3://models/prod/vision/digits/1-" in decided.events[0].message


def test_a_namespace_that_goes_takes_the_object_along() -> None:
    """kuberay#3388, tidb-operator#2888: cleanup Jobs cannot start in a terminating namespace."""
    world = running(1, repository=DELETE)
    world.jobs.clear()
    world.deleting = True
    world.namespace_terminating = True
    assert world.step().actions == (SetFinalizer(False),)


def test_a_version_that_left_the_spec_loses_its_children_and_with_delete_its_artefact() -> None:
    world = running(1, 2, canary=2, repository=DELETE)
    change(world, 1, repository=DELETE)
    world.step()
    assert world.weights == {1: 100}
    assert world.phase(2) is Phase.DRAINING
    world.settle()
    assert set(world.servings) == {1}
    assert world.status.of(2) is None


def test_retain_keeps_the_artefact_of_a_version_that_left() -> None:
    world = running(1, 2, canary=2)
    change(world, 1)
    world.settle()
    assert world.status.of(2) is None
    assert not any(name.endswith("-delete") for name in world.jobs)


def test_a_version_put_back_unchanged_while_it_is_erased_waits_and_is_exported_anew() -> None:
    world = running(1, 2, repository=DELETE)
    change(world, 1, repository=DELETE)
    world.step()
    world.step()
    assert world.phase(2) is Phase.DELETING
    change(world, 1, 2, repository=DELETE)
    world.step()
    assert job_of(world, 2) not in world.jobs
    world.settle()
    assert world.phase(2) is Phase.PUBLISHED
    assert job_of(world, 2) in world.jobs, "the erased artefact is exported again, not trusted"


def test_nothing_is_written_when_nothing_changed() -> None:
    world = running(1, 2)
    before = world.status
    world.now += timedelta(days=3)
    decided = world.step()
    assert decided.actions == ()
    assert decided.events == ()
    assert decided.wake_at is None
    assert world.status == before


def test_a_route_that_has_settled_is_not_written_again_for_what_the_server_or_others_add() -> None:
    """gatewayapi plugin #208, #203, #217, flagger#1857: permanent OutOfSync."""
    world = running(1, 2)
    assert world.route is not None
    found = copy.deepcopy(dict(world.route.spec)) | {"useDefaultGateways": "None"}
    for number, rule in enumerate(found["rules"]):
        rule["name"] = f"rule-{number}"
    metadata = {
        "generation": 3,
        "resourceVersion": "9",
        "namespace": "vision",
        "annotations": {"argocd.argoproj.io/tracking-id": "a"},
        "labels": {"app": "b"},
    }
    world.route = replace(route_facts({"metadata": metadata, "spec": found}, "digits"), accepted=True)
    assert world.step().actions == ()
    found["rules"].append({"matches": [{"path": {"type": "PathPrefix", "value": "/"}}]})
    assert len(world.step().actions) == 1, "a rule of somebody else's is taken away"


def test_an_operator_upgrade_with_other_defaults_renders_no_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    world = running(1, 2, canary=2)
    rendered = list(world.rendered)
    from perch.observed import Installation

    monkeypatch.setattr(
        "tests.unit.operator.world.INSTALLATION", Installation("test-cluster", "exporter:9", "artifacts:9", "triton:9")
    )
    decided = world.step()
    assert decided.actions == ()
    assert world.rendered == rendered


@pytest.mark.parametrize("gateway_api", [True, False])
def test_without_a_route_the_former_stable_stays_until_the_new_one_can_answer(gateway_api: bool) -> None:
    """No weights say who answers then: clients of the former version's Service must not lose it to one that never starts."""
    more = {} if not gateway_api else {"routing": None}
    world = World(spec(1, 2, **more), gateway_api=gateway_api)
    world.settle()
    change(world, 1, 2, stable=2, **more)
    for _ in range(5):
        world.step()
        world.now += timedelta(hours=1)
    assert set(world.servings) == {1, 2}
    world.settle()
    assert set(world.servings) == {2}


def test_a_removed_version_is_erased_only_when_nothing_of_its_export_runs_any_more() -> None:
    world = running(1, repository=DELETE)
    change(world, 1, 2, repository=DELETE)
    world.step()
    revision = artifact_revision(world.spec.versions[1])
    change(world, 1, repository=DELETE)
    world.lingering = {revision}
    for _ in range(3):
        world.step()
        assert cleanup_job_name("digits", revision) not in world.jobs, "the export could publish behind the cleanup's back"
    world.lingering = set()
    world.step()
    assert cleanup_job_name("digits", revision) in world.jobs


def test_a_removed_version_that_could_not_be_erased_leaves_a_warning() -> None:
    world = running(1, 2, repository=DELETE)
    world.jobs.clear()
    change(world, 1, repository=DELETE)
    world.step()
    world.fail(next(iter(world.jobs)), Reason.STORE_UNREACHABLE, "s3 is away")
    events = world.step().events
    assert [e.reason for e in events] == ["ArtifactsLeft"]
    assert "s3 is away" in events[0].message
    assert world.status.of(2) is None


def test_a_canary_that_is_ready_in_part_keeps_its_share_when_more_is_asked_for() -> None:
    world = running(1, 2, canary=2, weight=60, runtime={"replicas": 4})
    assert world.servings[2].replicas == 3
    world.ready(2, 1)
    change(world, 1, 2, canary=2, weight=75, runtime={"replicas": 4})
    world.step()
    assert world.weights == {1: 40, 2: 60}
    world.settle()
    assert world.weights == {1: 25, 2: 75}


def test_each_transition_is_told_once() -> None:
    world = running(1, 2)
    change(world, 1, 2, canary=2)
    told: list[str] = []
    for _ in range(8):
        before = world.status
        world.step()
        told += [e.reason for e in build_events(before, world.status)]
        world.go_well()
    assert told.count("VersionReady") == 1
    assert told.count("SplitHeld") == 1
    assert told[-1] == "SplitHeld"


def test_a_refused_write_is_what_the_conditions_and_events_speak_of() -> None:
    world = running(1)
    before = world.status
    after = with_failures(before, ["apply Deployment digits-v1: exceeded quota: gpus"], world.now)
    ready = after.condition("Ready")
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", "ApplyFailed")
    assert "exceeded quota" in ready.message
    assert after.condition("Available") == before.condition("Available")
    assert [e.reason for e in build_events(before, after)] == ["ApplyFailed"]
    assert build_events(after, with_failures(before, ["apply Deployment digits-v1: exceeded quota: gpus"], world.now)) == ()


def test_a_rollback_does_not_wait_for_the_last_pod_of_stable() -> None:
    """A missing GPU must not keep a bad canary in the traffic."""
    world = running(1, 2, canary=2, weight=50, runtime={"replicas": 10})
    world.ready(1, 9)
    change(world, 1, 2, runtime={"replicas": 10})
    world.step()
    assert world.weights == {1: 100}


def test_a_promotion_to_a_version_that_is_half_there_waits() -> None:
    world = running(1, 2, canary=2, weight=10, runtime={"replicas": 2})
    world.ready(2, 1)
    change(world, 1, 2, stable=2, runtime={"replicas": 2})
    world.step()
    assert world.weights == {1: 90, 2: 10}


def test_traffic_is_written_before_anything_else() -> None:
    world = running(1, 2, canary=2)
    change(world, 1, 2, 3)
    kinds = [a.body["kind"] for a in world.think().actions if isinstance(a, Apply)]
    assert kinds[0] == "HTTPRoute"
    assert "Job" in kinds


def test_another_secret_rolls_the_pods_which_could_not_be_started_again_with_the_former() -> None:
    world = running(1)
    rendered = len(world.rendered)
    change(world, 1, repository={"uri": "s3://models/prod", "credentialsSecretRef": {"name": "rotated"}})
    world.step()
    assert len(world.rendered) == rendered + 1


def test_a_service_whose_deployment_is_gone_is_swept() -> None:
    world = running(1, 2, canary=2)
    change(world, 1, 2)
    world.settle()
    world.services["digits-v2"] = {}
    world.budgets["digits-v2"] = {}
    world.step()
    assert set(world.services) == {"digits-v1"}
    assert world.budgets == {}


def test_a_deletion_that_cannot_be_cleaned_up_lets_go_after_a_while() -> None:
    world = running(1, repository=DELETE)
    world.deleting, world.deleting_since = True, world.now
    world.lingering = {artifact_revision(world.spec.versions[0])}
    decided = world.step()
    assert SetFinalizer(False) not in decided.actions
    assert decided.wake_at is not None
    world.now = decided.wake_at
    decided = world.step()
    assert decided.actions[-1] == SetFinalizer(False)
    assert [e.reason for e in decided.events] == ["ArtifactsLeft"]


def test_a_failed_job_whose_words_are_still_on_their_way_is_waited_for() -> None:
    world = World(spec(1))
    world.step()
    world.fail(job_of(world, 1), Reason.ACCESS_DENIED, "bucket models: denied")
    told = world.jobs[job_of(world, 1)]
    world.jobs[job_of(world, 1)] = type(told)(**{**vars(told), "summary": None})
    world.step()
    assert world.phase(1) is Phase.EXPORTING
    world.jobs[job_of(world, 1)] = told
    world.step()
    assert "bucket models: denied" in world.status.condition("Ready").message  # type: ignore[union-attr]


def test_retain_stops_an_erasure_that_is_under_way() -> None:
    world = running(1, 2, repository=DELETE)
    change(world, 1, repository=DELETE)
    world.step()
    assert any(name.endswith("-delete") for name in world.jobs)
    change(world, 1)
    world.step()
    assert not any(name.endswith("-delete") for name in world.jobs)


def test_a_number_used_again_has_its_former_artefact_erased_with_delete() -> None:
    world = running(1, 2, repository=DELETE)
    former = artifact_revision(world.spec.versions[1])
    world.spec = spec(1, 2, repository=DELETE, versions=[entry(1), entry(2, triton={"maxBatchSize": 4})])
    world.generation += 1
    world.step()
    assert cleanup_job_name("digits", former) in world.jobs

"""Faults under load that are quick to make; `make chaos` has all of them, with more of each.

One ModelDeployment of two pods serves them all, driven by the stage of `make chaos`. The Gateway retries nothing, but where a
test says so.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from chaos import crashes, scenarios
from chaos.stage import Stage, is_failed
from demo.load import Answer
from devcluster import Cluster


@pytest.fixture(scope="module")
def built(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(cluster, tmp_path_factory.mktemp("logs"), f"faults-{uuid.uuid4().hex[:6]}")
    stage.build()
    yield stage
    stage.tenant.delete(wait=False)
    stage.offer_gpus(cluster.gpus or 0)


@pytest.fixture
def stage(built: Stage) -> Stage:
    built.settle()
    built.wait_full(1)
    return built


def failed(stage: Stage) -> list[Answer]:
    answers = stage.answers()
    assert len(answers) > 200, "there was a load"
    return [answer for answer in answers if is_failed(answer)]


def test_a_deleted_pod_beside_a_second_one_loses_no_request(stage: Stage) -> None:
    victim = stage.pods(1)[0]["metadata"]
    with stage.under_load():
        stage.tenant.kubectl("delete", "pod", victim["name"], "--wait=false")
        stage.wait_replaced({victim["uid"]})
        stage.wait_full(1)
    assert failed(stage) == []


def test_without_its_store_a_model_serves_on_and_a_new_pod_waits_and_says_why(stage: Stage) -> None:
    with stage.under_load():
        scenarios.store_down(stage)
    assert failed(stage) == []


def test_a_triton_killed_beside_a_second_one_loses_no_request_where_the_gateway_retries(stage: Stage) -> None:
    with stage.retries(crashes.ALL), stage.under_load():
        crashes.kill_and_wait(stage, stage.pods(1)[0])
    assert failed(stage) == []

"""A short, repeatable run of `make fuzz`: what the API server accepts, Perch works with."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fuzz.explore import Attempt, attempts, try_attempt
from fuzz.server import Judge, prepare
from fuzz.trial import Finding
from tests.api.test_admission import LONG_DOMAIN, Change, changed, full_spec, put, valid_specs
from tests.apiserver import ApiServer

EXAMPLES = 200


@pytest.fixture(scope="module")
def judge(api: ApiServer) -> Judge:
    prepare(api)
    return Judge(api)


@pytest.mark.parametrize("spec", valid_specs(), ids=["keys", "identity", "detector and ONNX", "plan"])
def test_the_specs_to_begin_with_are_accepted_and_work(judge: Judge, spec: dict[str, Any]) -> None:
    assert judge.accepts(spec)
    judge.try_children(spec)


@settings(max_examples=EXAMPLES, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
@given(attempts(valid_specs()))
def test_whatever_is_accepted_works(judge: Judge, attempt: Attempt) -> None:
    try_attempt(judge, attempt)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(put("repository/endpoint", "http://s3:70000"), "the types refuse", id="types"),
        pytest.param(put("routing/parentRefs", [{"name": "a"}, {"name": "a"}]), "refuses HTTPRoute", id="route"),
        pytest.param(put("builder/resources/limits/memory", "1Mi"), "refuses Job", id="job"),
        pytest.param(put("runtime/tolerations/0/key", LONG_DOMAIN), "refuses Deployment", id="deployment"),
        pytest.param(put("versions/0/inputs/0/name", "logits"), "contract refuses it", id="contract"),
        pytest.param(put("traffic/stable", 9), "planner or builder", id="planner"),
    ],
)
def test_what_does_not_work_is_found(judge: Judge, change: Change, says: str) -> None:
    """The API server refuses these specs. Were it not for that, they would be findings."""
    spec = changed(full_spec(), change)
    assert not judge.accepts(spec)
    with pytest.raises(Finding, match=says):
        judge.try_children(spec)

"""The CRD itself: that the API server takes it without reserve, that it teaches, and that it is the one in the chart."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import apidocs
from perch.api import Spec
from perch.crd import build_crd, render
from tests.api.conftest import COLLECTION, conditions
from tests.api.test_admission import create, full_spec
from tests.apiserver import ApiServer

ROOT = Path(__file__).resolve().parents[2]
IN_CHART = ROOT / "charts/perch/files/modeldeployments.serving.perch.dev.yaml"
SERVING_EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.yaml") if "ModelDeployment" in path.read_text())


def schema() -> dict[str, Any]:
    found: dict[str, Any] = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def fields(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property below `node`, with its path."""
    for name, child in node.get("properties", {}).items():
        yield f"{path}.{name}", child
        yield from fields(child, f"{path}.{name}")
    for below in ("items", "additionalProperties"):
        if below in node:
            yield f"{path}[]", node[below]
            yield from fields(node[below], f"{path}[]")


SPEC_FIELDS = [(f"spec{path}", node) for path, node in fields(schema()["properties"]["spec"])]


def test_the_definition_is_established_and_structural(api: ApiServer) -> None:
    found = conditions(api)
    assert found["Established"]["status"] == "True"
    assert found["NamesAccepted"]["status"] == "True"
    assert "NonStructuralSchema" not in found, found


def test_the_definition_is_small_enough_for_client_side_apply() -> None:
    """kserve#3487: an annotation takes 262,144 bytes at most, and kubectl apply writes the whole object into one."""
    assert len(json.dumps(build_crd(), separators=(",", ":")).encode()) < 200_000


def test_the_file_in_the_chart_is_the_one_made_from_the_types() -> None:
    assert IN_CHART.read_text() == render(), "run: PYTHONPATH=operator python -m perch.crd > " + str(IN_CHART)
    linked = ROOT / "crds" / IN_CHART.name
    assert linked.resolve() == IN_CHART


def test_every_field_is_described() -> None:
    # Items of lists are told by their list, metadata by Kubernetes.
    named = [(path, node) for path, node in fields(schema()) if not path.endswith("[]") and path != ".metadata"]
    assert len(named) > 150
    assert [path for path, node in named if len(node.get("description", "")) < 8] == []


def test_everything_in_spec_is_bounded() -> None:
    """An unbounded list or text takes the CEL rules around it out of the API server's cost budget.

    Status is not: it has no rules, and the operator alone writes it.
    """
    for path, node in SPEC_FIELDS:
        kind = node.get("type")
        if kind == "string" and "enum" not in node:
            assert "maxLength" in node, path
        if kind == "array":
            assert "maxItems" in node, path
        if "additionalProperties" in node:
            assert "maxProperties" in node, path
        if kind == "integer" and not path.endswith("tolerationSeconds"):
            assert "minimum" in node, path
            assert "maximum" in node, path


def test_no_bare_regular_expression_is_shown_to_users() -> None:
    assert [path for path, node in SPEC_FIELDS if "pattern" in node] == []


def test_every_rule_says_what_to_do() -> None:
    rules = [(path, rule) for path, node in SPEC_FIELDS for rule in node.get("x-kubernetes-validations", [])]
    assert len(rules) > 40
    way_out = re.compile(
        r"\b(write|name|give|add|remove|set|lower|raise|order|drop|create|say|use|mend|choose|must have a limit)\b"
    )
    for path, rule in rules:
        assert way_out.search(rule["message"]), f"{path}: {rule['message']}"


def test_nothing_is_defaulted_by_the_server() -> None:
    assert "default:" not in render()


def test_the_reference_in_docs_is_made_from_the_definition() -> None:
    rendered = apidocs.render()
    assert apidocs.DOCUMENT.read_text() == rendered, "run: PYTHONPATH=operator python hack/apidocs.py"
    messages = [rule["message"] for _, node in SPEC_FIELDS for rule in node.get("x-kubernetes-validations", [])]
    assert [message for message in messages if apidocs.escape(message) not in rendered] == []


def test_explain_teaches_what_a_version_is(api: ApiServer) -> None:
    told = api.kubectl("explain", "modeldeployment.spec.versions").stdout
    for word in ("checkpoint", "architecture", "conversion", "verification", "triton", "-required-", "exported and gated"):
        assert word in told
    assert "sha256sum FILE" in api.kubectl("explain", "mdep.spec.versions.checkpoint.sha256").stdout


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("rollout.steps", ("goes forward on evidence", "a fixed split", "hold", "weight")),
        ("rollout", ("try again", "paused", "an alarm still aborts it", "Additional (default)", "kept for inspection")),
        ("rollout.analysis", ("no worse", "toleratedOdds", "3/maxErrorRate", "Pause (default)", "Guard-rail")),
        ("rollout.analysis.prometheus", ("In place of Triton's own counters", "{{service}}", "without credentials")),
        ("rollout.analysis.prometheus.metrics", ("{{window}}", "Lowest value that is well")),
        ("traffic", ("for testers", "its answers to them are dropped")),
        ("traffic.match.headers", ("gRPC metadata is a header too", "RE2")),
        ("runtime.autoscaling", ("Needs a metrics server", "Fewest pods of a version with all the traffic")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_explain_teaches_how_a_canary_goes_forward(api: ApiServer, field: str, words: tuple[str, ...]) -> None:
    # kubectl breaks lines where it likes.
    told = " ".join(api.kubectl("explain", f"mdep.spec.{field}").stdout.split())
    for word in words:
        assert word in told


def test_columns_short_name_and_category(api: ApiServer) -> None:
    assert create(api, "columns", full_spec()).is_success
    status = {
        "stable": 1,
        "canary": 2,
        "canaryWeight": 10,
        "endpoint": "digits.example.com",
        "artifact": "s3://models/prod/default/columns/1-0a1b2c3d",
        "conditions": [
            {
                "type": "Ready",
                "status": "True",
                "reason": "SplitHeld",
                "message": "10% of the traffic go to version 2 until Git changes it",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
        ],
    }
    answer = api.request("PATCH", f"{COLLECTION}/columns/status", {"status": status}, fieldValidation="Strict")
    assert answer.is_success, answer.text

    header, row = api.kubectl("get", "mdep", "columns").stdout.splitlines()
    assert header.split() == ["NAME", "READY", "STABLE", "CANARY", "WEIGHT", "REASON", "AGE"]
    assert row.split()[:6] == ["columns", "True", "1", "2", "10", "SplitHeld"]
    wide_header, wide_row = api.kubectl("get", "mdep", "columns", "-o", "wide").stdout.splitlines()
    assert wide_header.split()[-2:] == ["ENDPOINT", "ARTIFACT"]
    assert wide_row.split()[-2:] == [status["endpoint"], status["artifact"]]
    assert "modeldeployment.serving.perch.dev/columns" in api.kubectl("get", "perch", "-o", "name").stdout
    assert "modeldeployment.serving.perch.dev/columns" in api.kubectl("get", "all", "-o", "name").stdout
    api.kubectl("wait", "--for=condition=Ready", "mdep/columns", "--timeout=5s")


def test_status_is_written_only_through_its_subresource(api: ApiServer) -> None:
    assert create(api, "substatus", full_spec()).is_success
    api.request("PATCH", f"{COLLECTION}/substatus", {"status": {"stable": 7}})
    stored = api.request("PATCH", f"{COLLECTION}/substatus/status", {"spec": {"traffic": {"stable": 2}}}).json()
    assert "stable" not in stored.get("status", {})
    assert stored["spec"]["traffic"]["stable"] == 1


UNKNOWN = [
    ("spec.analysis", lambda spec: spec.update(analysis={})),
    ("spec.rollout.analysis.interval", lambda spec: spec["rollout"]["analysis"].update(interval="1m")),
    ("spec.rollout.steps[0].pause", lambda spec: spec["rollout"]["steps"][0].update(pause={})),
    ("spec.versions[0].triton.backend", lambda spec: spec["versions"][0]["triton"].update(backend="python")),
    ("spec.traffic.shadow", lambda spec: spec["traffic"].update(shadow=2)),
    ("spec.runtime.hostNetwork", lambda spec: spec["runtime"].update(hostNetwork=True)),
]


@pytest.mark.parametrize(("path", "add"), UNKNOWN, ids=[path for path, _ in UNKNOWN])
def test_an_unknown_field_is_refused_by_name(api: ApiServer, path: str, add: Any) -> None:
    """kubectl asks for strict validation by default. A client that does not has the field pruned, as the docs say."""
    spec = full_spec()
    add(spec)
    strict = create(api, "unknown", spec, dryRun="All")
    assert strict.status_code == 400, strict.text
    assert f'unknown field "{path}"' in strict.json()["message"]
    lenient = create(api, "unknown", spec, dryRun="All", fieldValidation="Ignore")
    assert lenient.is_success, lenient.text
    assert lenient.json()["spec"] == full_spec()
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        Spec.model_validate(spec)


def test_kubectl_refuses_an_unknown_field_without_being_asked(api: ApiServer) -> None:
    body = {"apiVersion": "serving.perch.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "typo"}}
    text = json.dumps({**body, "spec": {**full_spec(), "trafic": {}}})
    result = api.kubectl("apply", "-f", "-", text=text, check=False)
    assert result.returncode != 0
    assert 'unknown field "spec.trafic"' in result.stderr


def test_there_are_examples() -> None:
    assert len(SERVING_EXAMPLES) >= 3


@pytest.mark.parametrize("path", SERVING_EXAMPLES, ids=lambda path: path.name)
def test_examples_are_accepted_by_server_and_types(api: ApiServer, path: Path) -> None:
    for body in yaml.safe_load_all(path.read_text()):
        if body["kind"] == "ModelDeployment":
            name, spec = body["metadata"]["name"], body["spec"]
            answer = create(api, name, spec, dryRun="All")
            assert answer.is_success, answer.text
            assert answer.json()["spec"] == spec
            Spec.model_validate(spec)

"""Children as the API server stores them: a field that came back otherwise would look like somebody's edit at every pass."""

from __future__ import annotations

from typing import Any

import pytest

from perch.api import Spec
from perch.builders.autoscaler import build_autoscaler
from perch.builders.jobs import build_cleanup_job, build_export_job
from perch.builders.network import build_export_policy
from perch.builders.serving import build_budget, build_deployment, build_service
from perch.kube import APPLY, BY_KIND, Kube, as_yaml
from perch.names import FIELD_MANAGER, artifact_revision
from perch.observed import Identity, Installation, matches
from tests.api.test_admission import autoscaled_spec, full_spec
from tests.apiserver import ApiServer

IDENTITY = Identity("default", "children", "6f1c0c52-0000-4000-8000-000000000000", 1, "1")
INSTALLATION = Installation("test-cluster", "exporter:1", "artifacts:1", "triton:1")
QUANTITIES: list[int | str] = [
    *(1, 3, 1000, 1500, 2048, "1", "01.50", "0.1", "0.0001", "0.0000000001", "1.0001", "999999999999999", "1000000"),
    *("1m", "10m", "500m", "1000m", "1500m", "2000000m", "1k", "1.5k", "0.5k", "1000k", "1M", "1.25M", "3G", "1T", "2P", "1E"),
    *("1Ki", "0.5Ki", "0.1Ki", "1.5Ki", "1.0001Ki", "1024Ki", "1000Ki", "1536Mi", "1.5Mi", "1Gi", "0.5Gi", "1024Gi", "1Ti"),
    *("1Pi", "1Ei", "1.00000000001Ki"),
]  # fmt: skip


def apply(api: ApiServer, body: dict[str, Any], **parameters: str) -> dict[str, Any]:
    group = f"apis/{body['apiVersion']}" if "/" in body["apiVersion"] else f"api/{body['apiVersion']}"
    kind, name = BY_KIND[body["kind"]].plural, body["metadata"]["name"]
    answer = api.client.patch(
        f"/{group}/namespaces/default/{kind}/{name}",
        content=as_yaml(body),
        params={"fieldManager": FIELD_MANAGER, "force": "true", "fieldValidation": "Strict", **parameters},
        headers={"Content-Type": APPLY},
    )
    assert answer.is_success, answer.text
    stored: dict[str, Any] = answer.json()
    return stored


@pytest.mark.parametrize("quantity", QUANTITIES, ids=str)
def test_an_autoscaler_is_stored_as_it_was_built(api: ApiServer, quantity: int | str) -> None:
    asked = autoscaled_spec()
    asked["runtime"]["autoscaling"]["podMetrics"][0]["averageValue"] = quantity
    built = build_autoscaler(IDENTITY, Spec.model_validate(asked), 2, 1)
    stored = apply(api, built, dryRun="All")
    assert matches(built["spec"], stored["spec"]), stored["spec"]["metrics"]


def test_service_and_budget_are_stored_as_they_were_built(api: ApiServer) -> None:
    for built in (build_service(IDENTITY, 2), build_budget(IDENTITY, 2)):
        assert matches(built["spec"], apply(api, built, dryRun="All")["spec"])


@pytest.mark.parametrize("asked", [full_spec(), autoscaled_spec()], ids=["keys", "identity"])
def test_pods_and_jobs_with_everything_that_a_spec_can_say_are_valid(api: ApiServer, asked: dict[str, Any]) -> None:
    spec = Spec.model_validate(asked)
    for entry in spec.versions:
        revision = artifact_revision(entry)
        for built in (
            build_deployment(IDENTITY, spec, entry, revision, "sha256:" + "0" * 64, INSTALLATION),
            build_export_job(IDENTITY, spec, entry, revision, INSTALLATION),
            build_cleanup_job(IDENTITY, spec, entry.version, revision, INSTALLATION),
        ):
            assert apply(api, built, dryRun="All")["kind"] == built["kind"]


@pytest.mark.parametrize(
    "text", ["\U0001f426 perch", "bell \a", "escape \x1b[31m", "delete \x7f", "\x87", "\u2028", 'a \\ud83d "'], ids=ascii
)
async def test_whatever_characters_a_spec_holds_the_operator_writes_them(
    api: ApiServer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An apply is read as YAML, which takes fewer characters and escapes than JSON."""
    asked = full_spec()
    asked["versions"][1]["architecture"]["parameters"]["text"] = asked["runtime"]["env"][0]["value"] = text
    spec = Spec.model_validate(asked)
    entry = spec.versions[1]
    revision = artifact_revision(entry)
    job = build_export_job(IDENTITY, spec, entry, revision, INSTALLATION)
    deployment = build_deployment(IDENTITY, spec, entry, revision, "sha256:" + "0" * 64, INSTALLATION)
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
    kube = await Kube.connect()
    try:
        for built in (job, deployment):
            stored = await kube.apply(built)
            assert matches(built["spec"]["template"]["metadata"], stored["spec"]["template"]["metadata"])
            await kube.delete(BY_KIND[built["kind"]], "default", built["metadata"]["name"])
        triton = stored["spec"]["template"]["spec"]["containers"][0]
        assert {"name": "PLAIN", "value": text} in triton["env"]
    finally:
        await kube.close()


def test_a_network_policy_is_valid_and_stored_as_it_was_built(api: ApiServer) -> None:
    built = build_export_policy(IDENTITY, Spec.model_validate(autoscaled_spec()))
    assert len(built["spec"]["egress"]) == 4
    assert matches(built["spec"], apply(api, built, dryRun="All")["spec"])


def test_the_handover_to_an_autoscaler_keeps_the_pods_only_where_replicas_is_named(api: ApiServer) -> None:
    """A field that its only owner no longer names goes back to its default; once the autoscaler wrote it, it has another."""
    spec = Spec.model_validate(autoscaled_spec())
    entry = spec.versions[0]

    def body(pods: int | None) -> dict[str, Any]:
        revision = artifact_revision(entry)
        built = build_deployment(IDENTITY, spec, entry, revision, "sha256:" + "0" * 64, INSTALLATION, replicas=pods)
        if pods is None:
            del built["spec"]["replicas"]
        return built

    def scale(pods: int) -> None:
        path = "/apis/apps/v1/namespaces/default/deployments/children-v1/scale"
        assert api.request("PATCH", path, {"spec": {"replicas": pods}}, fieldManager="autoscaler").is_success

    assert apply(api, body(7))["spec"]["replicas"] == 7
    assert apply(api, body(7))["spec"]["replicas"] == 7
    assert apply(api, body(None))["spec"]["replicas"] == 1
    scale(9)
    assert apply(api, body(9))["spec"]["replicas"] == 9
    scale(4)
    assert apply(api, body(4))["spec"]["replicas"] == 4

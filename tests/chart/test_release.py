"""The life of a release on a real API server: install, upgrade, uninstall, and what stays of the CRD.

There are no controllers: that the pods run is for the end-to-end tests, that every object is accepted is seen here.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from devcluster import gobuild
from perch.crd import build_crd
from tests.api.conftest import COLLECTION, CRDS
from tests.api.test_admission import create, full_spec
from tests.apiserver import ApiServer
from tests.chart.conftest import CHART, Render
from tests.chart.test_template import EVERYTHING

CRD = f"{CRDS}/modeldeployments.serving.perch.dev"
NAMESPACE = "perch-system"


@pytest.fixture(autouse=True)
def clean(cluster: ApiServer) -> Any:
    yield
    for release in ("perch", "second"):
        cluster.helm("uninstall", release, "--namespace", NAMESPACE, check=False)
    cluster.kubectl("delete", "crd", "modeldeployments.serving.perch.dev", "--ignore-not-found", "--timeout=30s")


def install(cluster: ApiServer, *values: str, release: str = "perch", check: bool = True) -> Any:
    settings = [word for value in values for word in ("--set", value)]
    place = ("--namespace", NAMESPACE, "--create-namespace")
    return cluster.helm("upgrade", "--install", release, str(CHART), *place, *settings, check=check)


def stored(cluster: ApiServer, path: str) -> Any:
    answer = cluster.request("GET", path)
    return answer.json() if answer.is_success else None


def test_install_upgrade_and_uninstall_keep_the_crd_and_what_users_made(cluster: ApiServer) -> None:
    told = install(cluster)
    assert "kubectl explain modeldeployment.spec" in told.stdout
    cluster.wait_established("modeldeployments.serving.perch.dev")
    assert create(cluster, "digits", full_spec()).is_success
    before = stored(cluster, f"{COLLECTION}/digits")

    install(cluster, "replicas=2", "triton.image=other:1")
    deployment = stored(cluster, f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/perch")
    assert deployment["spec"]["replicas"] == 2
    assert stored(cluster, f"/apis/policy/v1/namespaces/{NAMESPACE}/poddisruptionbudgets/perch")

    cluster.helm("uninstall", "perch", "--namespace", NAMESPACE)
    assert stored(cluster, f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/perch") is None
    assert stored(cluster, "/apis/rbac.authorization.k8s.io/v1/clusterroles/perch-perch-system") is None
    assert stored(cluster, CRD)
    assert stored(cluster, f"{COLLECTION}/digits") == before

    install(cluster)
    assert stored(cluster, f"{COLLECTION}/digits") == before
    cluster.kubectl("delete", "mdep", "digits")


def test_an_upgrade_brings_the_new_crd(cluster: ApiServer) -> None:
    install(cluster)
    old: dict[str, Any] = {"spec": {"versions": [{**build_crd()["spec"]["versions"][0], "additionalPrinterColumns": []}]}}
    assert cluster.request("PATCH", CRD, old).is_success
    assert "additionalPrinterColumns" not in stored(cluster, CRD)["spec"]["versions"][0]
    install(cluster, "log.level=DEBUG")
    assert stored(cluster, CRD)["spec"]["versions"][0]["additionalPrinterColumns"]


def test_uninstall_takes_the_crd_along_when_told_so(cluster: ApiServer) -> None:
    told = install(cluster, "crds.keep=false")
    assert "deletes the CRD and with it every ModelDeployment" in told.stdout
    cluster.helm("uninstall", "perch", "--namespace", NAMESPACE, "--wait")
    assert stored(cluster, CRD) is None


def test_a_namespaced_release_installs_beside_a_crd_that_is_already_there(cluster: ApiServer) -> None:
    assert cluster.request("POST", CRDS, build_crd()).is_success
    cluster.kubectl("create", "namespace", "vision")
    values = ("crds.enabled=false", "clusterName=c", "watch.namespaces={vision}")
    told = install(cluster, *values, release="second")
    assert "watches vision" in told.stdout
    assert "crds.enabled=false" in told.stdout
    assert stored(cluster, "/apis/rbac.authorization.k8s.io/v1/namespaces/vision/roles/second-perch")
    assert stored(cluster, "/apis/rbac.authorization.k8s.io/v1/clusterroles/second-perch-perch-system") is None


@pytest.fixture
def gateway_api(cluster: ApiServer) -> None:
    """Gateway API's own CRDs, from Envoy Gateway's chart."""
    gobuild.extract_module_files(gobuild.ENVOY_GATEWAY, "charts/gateway-helm", cluster.folder / "build.log")
    crds = gobuild.module_files(gobuild.ENVOY_GATEWAY, "charts/gateway-helm/charts/crds/crds") / "gatewayapi-crds.yaml"
    cluster.kubectl("apply", "--server-side", "-f", str(crds))
    cluster.wait_established("gateways.gateway.networking.k8s.io")


@pytest.mark.parametrize("values", [{"replicas": 2}, EVERYTHING], ids=["two replicas", "everything that is optional"])
def test_every_rendered_object_passes_strict_validation(
    cluster: ApiServer, gateway_api: None, render: Render, values: dict[str, Any]
) -> None:
    """helm install itself lets unknown fields pass. The ServiceMonitor stays unvalidated: nothing here has its CRD."""
    cluster.kubectl("create", "namespace", NAMESPACE, check=False)
    objects = [body for body in render(values) if body["kind"] != "ServiceMonitor"]
    strictly = ("apply", "--server-side", "--validate=strict", "--dry-run=server", "-f", "-")
    told = cluster.kubectl(*strictly, text=yaml.safe_dump_all(objects)).stdout
    assert told.count("serverside-applied (server dry run)") == len(objects)
    assert ("Gateway" in {body["kind"] for body in objects}) == (values is EVERYTHING)
    wrong = [{**body, "spec": {**body["spec"], "listner": []}} for body in objects if body["kind"] in ("Gateway", "Deployment")]
    for body in wrong:
        refused = cluster.kubectl(*strictly, text=yaml.safe_dump(body), check=False)
        assert "spec.listner" in refused.stderr

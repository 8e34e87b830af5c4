"""What the chart renders, by sets of values: rights, protections, and which objects there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from perch.builders.serving import METRICS
from perch.crd import build_crd
from perch.kube import CHILDREN, POD
from perch.names import LABEL_COMPONENT, LABEL_MANAGED_BY, child_labels
from perch.settings import read_settings
from tests.chart.conftest import CHART, Helm, Render

NAMESPACED = {"watch": {"namespaces": ["vision", "speech"]}, "clusterName": "prod", "crds": {"enabled": False}}
EVERYTHING = {
    "replicas": 3,
    "image": {"repository": "localhost:5000/perch-operator", "tag": "1.2.3"},
    "imagePullSecrets": [{"name": "registry"}],
    "exporter": {"image": "localhost:5000/perch-exporter:1"},
    "artifacts": {"image": "localhost:5000/perch-artifacts:1"},
    "triton": {"image": "localhost:5000/triton:1"},
    "imagePullPolicy": "IfNotPresent",
    "clusterName": "prod",
    "serviceAccount": {"name": "operator", "annotations": {"a": "b"}},
    "log": {"level": "DEBUG", "format": "json"},
    "metrics": {"service": {"annotations": {"a": "b"}}, "serviceMonitor": {"create": True, "labels": {"release": "p"}}},
    "networkPolicy": {
        "from": [{"namespaceSelector": {}}],
        "apiServerPorts": [8443],
        "prometheus": {"ports": [9091], "to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]},
    },
    "gateway": {"create": True, "className": "envoy", "annotations": {"a": "b"}},
    "podAnnotations": {"a": "b"},
    "podLabels": {"a": "b"},
    "nodeSelector": {"a": "b"},
    "tolerations": [{"operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
    "priorityClassName": "system-cluster-critical",
    "fullnameOverride": "operator",
}
SETS = {"defaults": {}, "namespaced": NAMESPACED, "everything": EVERYTHING}
each_set = pytest.mark.parametrize("values", SETS.values(), ids=SETS)


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [body for body in objects if body["kind"] == kind]


def only(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = of_kind(objects, kind)
    return found


def container(objects: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return found


@each_set
def test_lint_finds_nothing(helm: Helm, values: dict[str, Any]) -> None:
    result = helm("lint", "--strict", values=values)
    assert result.returncode == 0, result.stdout + result.stderr


@each_set
def test_no_secret_and_no_wildcard_in_any_role(render: Render, values: dict[str, Any]) -> None:
    objects = render(values)
    roles = of_kind(objects, "Role") + of_kind(objects, "ClusterRole")
    assert len(roles) >= 2
    for role in roles:
        for rule in role["rules"]:
            assert set(rule) <= {"apiGroups", "resources", "resourceNames", "verbs"}
            assert "secrets" not in rule["resources"]
            for listed in rule.values():
                assert not [item for item in listed if "*" in item], rule
            # Rights over rights, over nodes' doors, or under another identity would be a way to cluster-admin.
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])
            assert not {"pods/exec", "pods/attach", "serviceaccounts/token", "roles", "clusterroles"} & set(rule["resources"])


def test_the_operator_may_write_no_spec_and_no_pod(render: Render) -> None:
    objects = render()
    for role in of_kind(objects, "ClusterRole") + of_kind(objects, "Role"):
        for rule in role["rules"]:
            if role["metadata"]["name"].endswith("-edit"):
                continue  # for users
            if rule["resources"] == ["modeldeployments"]:
                assert not {"update", "create", "delete", "deletecollection"} & set(rule["verbs"])
            if "pods" in rule["resources"]:
                assert set(rule["verbs"]) == {"get", "list", "watch"}


def test_the_operator_may_watch_all_kinds_of_children_and_write_all_but_pods(render: Render) -> None:
    """A kind that it may not list would keep it from starting."""
    (here,) = [role for role in of_kind(render(NAMESPACED), "Role") if role["metadata"]["namespace"] == "vision"]
    rights = {(rule["apiGroups"][0], resource): rule["verbs"] for rule in here["rules"] for resource in rule["resources"]}
    for kind in CHILDREN:
        group = kind.api_version.rpartition("/")[0]
        wanted = {"get", "list", "watch"} | (set() if kind is POD else {"create", "patch", "delete"})
        assert set(rights[group, kind.plural]) == wanted, kind


def test_kube_system_is_the_only_namespace_that_is_read(render: Render) -> None:
    rules = [rule for role in of_kind(render(), "ClusterRole") for rule in role["rules"] if "namespaces" in rule["resources"]]
    assert rules == [
        {"apiGroups": [""], "resources": ["namespaces"], "resourceNames": ["kube-system"], "verbs": ["get"]},
    ]


def test_a_namespaced_installation_has_no_cluster_objects_and_rights_only_where_it_watches(render: Render) -> None:
    objects = render(NAMESPACED)
    assert {body["kind"] for body in objects} == {
        "Deployment", "NetworkPolicy", "Role", "RoleBinding", "Service", "ServiceAccount",
    }  # fmt: skip
    places = sorted((body["metadata"]["namespace"], body["metadata"]["name"]) for body in of_kind(objects, "Role"))
    assert places == [("perch-system", "perch-lease"), ("speech", "perch"), ("vision", "perch")]
    for binding in of_kind(objects, "RoleBinding"):
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "perch", "namespace": "perch-system"}]
        assert binding["roleRef"]["kind"] == "Role"
        assert binding["roleRef"]["name"] == binding["metadata"]["name"]


def test_both_modes_give_the_same_rights_where_they_watch(render: Render) -> None:
    here = next(body for body in of_kind(render(NAMESPACED), "Role") if body["metadata"]["namespace"] == "vision")
    everywhere = next(body for body in of_kind(render(), "ClusterRole") if body["metadata"]["name"] == "perch-perch-system")
    assert [rule for rule in everywhere["rules"] if rule["resources"] != ["namespaces"]] == here["rules"]


@each_set
def test_the_operator_runs_confined(render: Render, values: dict[str, Any]) -> None:
    pod = only(render(values), "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 65532
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (operator,) = pod["containers"]
    assert operator["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "volumes"} & set(pod)
    assert operator["resources"]["limits"]["memory"]


@each_set
def test_the_environment_is_one_that_the_operator_can_read(render: Render, values: dict[str, Any]) -> None:
    env = {item["name"]: item.get("value", "from-the-pod") for item in container(render(values))["env"]}
    settings = read_settings(env)
    code = (Path(__file__).resolve().parents[2] / "operator/perch/settings.py").read_text()
    assert set(env) == set(re.findall(r"PERCH_[A-Z_]+", code)), "chart and operator speak of different variables"
    assert settings.namespaces == tuple(values.get("watch", {}).get("namespaces", ()))
    assert settings.cluster_name == values.get("clusterName", "")
    assert settings.triton_image
    assert settings.exporter_image
    assert settings.artifacts_image


def test_images_follow_the_release_unless_they_are_given(render: Render) -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    usual = container(render())
    assert usual["image"].endswith(f"/perch-operator:{version}")
    assert f"perch-exporter:{version}" in str(usual["env"])
    assert f"perch-artifacts:{version}" in str(usual["env"])
    given = container(render(EVERYTHING))
    assert given["image"] == "localhost:5000/perch-operator:1.2.3"
    for name in ("perch-exporter:1", "perch-artifacts:1", "triton:1"):
        assert f"localhost:5000/{name}" in str(given["env"])


def test_the_crd_is_the_generated_one_and_kept_by_default(render: Render) -> None:
    crd = only(render(), "CustomResourceDefinition")
    assert crd["spec"] == build_crd()["spec"]
    assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert "annotations" not in only(render({"crds": {"keep": False}}), "CustomResourceDefinition")["metadata"]
    assert of_kind(render({"crds": {"enabled": False}}), "CustomResourceDefinition") == []


def test_optional_objects_come_when_they_are_asked_for(render: Render) -> None:
    usual = {body["kind"] for body in render()}
    assert not {"PodDisruptionBudget", "ServiceMonitor", "Gateway"} & usual
    objects = render(EVERYTHING)
    assert only(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert only(objects, "Gateway")["spec"]["gatewayClassName"] == "envoy"
    monitor = only(objects, "ServiceMonitor")
    service = only(objects, "Service")
    assert monitor["metadata"]["labels"]["release"] == "p"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    none = render({"networkPolicy": {"create": False}, "metrics": {"service": {"create": False}}, "rbac": {"create": False}})
    assert {body["kind"] for body in none} == {"CustomResourceDefinition", "Deployment", "ServiceAccount"}
    slim = render({"rbac": {"aggregate": False}})
    assert [role["metadata"]["name"] for role in of_kind(slim, "ClusterRole")] == ["perch-perch-system"]


@each_set
def test_everything_that_selects_the_operators_pods_finds_them(render: Render, values: dict[str, Any]) -> None:
    objects = render(values)
    deployment = only(objects, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    assert deployment["selector"]["matchLabels"].items() <= labels
    assert only(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels
    assert only(objects, "Service")["spec"]["selector"].items() <= labels
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert budget["spec"]["selector"]["matchLabels"].items() <= labels


def test_the_network_policy_lets_the_operator_speak_with_dns_the_api_server_its_pods_and_prometheus_only(render: Render) -> None:
    policy = only(render(EVERYTHING), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == [
        {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
        {"ports": [{"port": 8443, "protocol": "TCP"}]},
        {
            "ports": [{"port": METRICS, "protocol": "TCP"}],
            "to": [
                {
                    "namespaceSelector": {},
                    "podSelector": {"matchLabels": {LABEL_MANAGED_BY: "perch", LABEL_COMPONENT: "triton"}},
                }
            ],
        },
        {"ports": [{"port": 9091, "protocol": "TCP"}], "to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]},
    ]
    assert policy["ingress"] == [
        {"ports": [{"port": "http", "protocol": "TCP"}], "from": [{"namespaceSelector": {}}]},
    ]


def test_prometheus_may_be_anywhere_by_default_and_nowhere_without_ports(render: Render) -> None:
    def ways_out(values: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = only(render(values), "NetworkPolicy")["spec"]["egress"]
        return found

    usual = ways_out({})
    assert usual[-1] == {"ports": [{"port": 9090, "protocol": "TCP"}]}
    assert ways_out({"networkPolicy": {"prometheus": {"ports": []}}}) == usual[:-1]


def test_the_network_policy_finds_triton_pods_as_they_are_labelled(render: Render) -> None:
    (peer,) = next(rule["to"] for rule in only(render(), "NetworkPolicy")["spec"]["egress"] if "to" in rule)
    assert peer["podSelector"]["matchLabels"].items() <= child_labels("digits", "triton", 1).items()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown value": ({"replica": 2}, "replica"),
    "an unknown nested value": ({"crds": {"install": True}}, "install"),
    "no replicas": ({"replicas": 0}, "replicas"),
    "replicas as text": ({"replicas": "2"}, "replicas"),
    "an unknown log level": ({"log": {"level": "TRACE"}}, "level"),
    "an unknown log format": ({"log": {"format": "logfmt"}}, "format"),
    "a tag in the repository": ({"image": {"repository": "perch:1"}}, "repository"),
    "an unknown pull policy": ({"imagePullPolicy": "Sometimes"}, "imagePullPolicy"),
    "no Triton image": ({"triton": {"image": ""}}, "triton"),
    "a namespace pattern": ({"watch": {"namespaces": ["team-*"]}, "clusterName": "c"}, "namespaces"),
    "a namespace twice": ({"watch": {"namespaces": ["a", "a"]}, "clusterName": "c"}, "namespaces"),
    "namespaces without clusterName": ({"watch": {"namespaces": ["a"]}}, "set any lasting name"),
    "a Gateway without class": ({"gateway": {"create": True}}, "kubectl get gatewayclass"),
    "a ServiceMonitor without Service": (
        {"metrics": {"service": {"create": False}, "serviceMonitor": {"create": True}}},
        "a ServiceMonitor selects a Service",
    ),
    "no ServiceAccount at all": ({"serviceAccount": {"create": False}}, "name an existing ServiceAccount"),
    "a port out of range": ({"networkPolicy": {"apiServerPorts": [70000]}}, "apiServerPorts"),
}


@pytest.mark.parametrize(("values", "says"), REFUSED.values(), ids=REFUSED)
def test_refused_values(helm: Helm, values: dict[str, Any], says: str) -> None:
    result = helm("template", "perch", values=values)
    assert result.returncode != 0
    assert says in result.stderr


def leaves(values: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        below = leaves(value, f"{path}{name}.") if isinstance(value, dict) and value else []
        found += below or [f"{path}{name}"]
    return found


def test_every_value_is_in_the_schema_with_a_comment_and_in_the_readme() -> None:
    text = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(text)
    readme = (CHART / "README.md").read_text()
    # Requests and limits are one value of the table, as they are one for Kubernetes.
    paths = leaves({**values, "resources": {}})
    assert len(paths) > 35
    assert [path for path in paths if f"| `{path}` |" not in readme] == []
    lines = text.splitlines()
    for path in paths:
        key = path.rsplit(".", 1)[-1]
        written = [number for number, line in enumerate(lines) if re.match(rf"\s*{key}:", line)]
        assert any(lines[number - 1].lstrip().startswith("#") for number in written), f"{path} has no comment"

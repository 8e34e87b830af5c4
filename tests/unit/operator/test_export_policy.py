"""The NetworkPolicy of export pods: whom it lets them reach, and that no pod starts without the one that was asked for."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from perch.builders.jobs import build_cleanup_job, build_export_job
from perch.builders.network import build_export_policy, endpoint_ports
from perch.names import LABEL_COMPONENT
from perch.observed import Identity
from tests.unit.operator.world import INSTALLATION, World, entry, spec

IDENTITY = Identity("vision", "digits", "uid-1", 1, "1")
STORAGE = "10.96.7.7"


def policy(*allow: dict[str, Any], **more: Any) -> dict[str, Any]:
    asked = spec(1, builder={"networkPolicy": {"allow": list(allow)} if allow else {}}, **more)
    built: dict[str, Any] = build_export_policy(IDENTITY, asked)["spec"]
    return built


def lets(found: dict[str, Any], address: str, port: int) -> bool:
    """As a network that enforces policies decides, for what is outside of the cluster."""
    return any(_to(rule, address) and _on(rule, port) for rule in found["egress"])


def _on(rule: dict[str, Any], port: int) -> bool:
    return "ports" not in rule or any(entry["port"] == port and entry["protocol"] == "TCP" for entry in rule["ports"])


def _to(rule: dict[str, Any], address: str) -> bool:
    place = ipaddress.ip_address(address)
    for peer in rule.get("to", [{"ipBlock": {"cidr": f"{place}"}}]):
        block = peer.get("ipBlock")
        if block and place in ipaddress.ip_network(block["cidr"]):
            return all(place not in ipaddress.ip_network(left_out) for left_out in block.get("except", []))
    return False


@pytest.mark.parametrize(
    ("address", "port", "passes"),
    [
        pytest.param("52.216.1.1", 443, True, id="a public store"),
        pytest.param("2600:1f60::1", 443, True, id="a public store by IPv6"),
        pytest.param("52.216.1.1", 22, False, id="another port of it"),
        pytest.param("169.254.169.254", 80, False, id="the metadata service"),
        pytest.param("169.254.169.254", 443, False, id="the metadata service on the store's port"),
        pytest.param("fd00:ec2::254", 443, False, id="the metadata service by IPv6"),
        pytest.param("168.63.129.16", 443, False, id="Azure's host"),
        pytest.param("10.96.0.1", 443, False, id="the API server"),
        pytest.param("172.31.255.1", 443, False, id="a private network"),
        pytest.param("192.168.1.1", 443, False, id="another private network"),
        pytest.param("100.64.3.4", 443, False, id="a carrier's network"),
        pytest.param(STORAGE, 9000, False, id="a store in a private network"),
        pytest.param("10.96.0.10", 53, True, id="DNS"),
    ],
)
def test_by_default_an_export_pod_reaches(address: str, port: int, passes: bool) -> None:
    assert lets(policy(), address, port) is passes


def test_what_is_listed_is_let_through_and_nothing_beside_it() -> None:
    found = policy({"cidr": f"{STORAGE}/32"}, {"namespace": "storage"})
    assert lets(found, STORAGE, 9000)
    assert not lets(found, "10.96.7.8", 9000)
    assert found["egress"][-1] == {"to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "storage"}}}]}


def test_the_ports_are_those_of_the_endpoints() -> None:
    away = entry(1)
    away["checkpoint"]["endpoint"] = "http://elsewhere:9000"
    repository = {"uri": "s3://models/prod", "credentialsSecretRef": {"name": "s3"}, "endpoint": "http://minio"}
    assert endpoint_ports(spec(1)) == [443]
    assert endpoint_ports(spec(1, repository=repository)) == [80]
    assert endpoint_ports(spec(1, versions=[away], repository=repository)) == [80, 9000]


def test_it_is_about_the_pods_of_exports_and_of_nothing_else() -> None:
    asked = spec(1, builder={"networkPolicy": {}})
    wanted = build_export_policy(IDENTITY, asked)["spec"]["podSelector"]["matchLabels"]
    export = build_export_job(IDENTITY, asked, asked.versions[0], "0123abcd", INSTALLATION)
    cleanup = build_cleanup_job(IDENTITY, asked, 1, "0123abcd", INSTALLATION)
    assert wanted.items() <= export["spec"]["template"]["metadata"]["labels"].items()
    assert cleanup["spec"]["template"]["metadata"]["labels"][LABEL_COMPONENT] != wanted[LABEL_COMPONENT]
    assert policy()["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy()


def test_no_export_starts_before_its_policy_is_there() -> None:
    world = World(spec(1, builder={"networkPolicy": {}}))
    world.step()
    assert list(world.policies) == ["digits-export"]
    assert not world.jobs
    known = world.status.of(1)
    assert known is not None
    assert "NetworkPolicy" in str(known.message)
    world.step()
    assert list(world.jobs)
    world.settle()
    assert world.ready_condition()[0] == "True"


def test_an_export_whose_policy_was_weakened_waits_until_it_is_put_right() -> None:
    world = World(spec(1, builder={"networkPolicy": {}}))
    world.step()
    world.policies["digits-export"] = {**world.policies["digits-export"], "egress": [{}]}
    world.step()
    assert not world.jobs
    assert world.policies["digits-export"]["egress"] != [{}]
    world.step()
    assert list(world.jobs)


def test_a_policy_that_is_no_longer_asked_for_goes() -> None:
    world = World(spec(1, builder={"networkPolicy": {}}))
    world.settle()
    world.spec = spec(1)
    world.settle()
    assert not world.policies


def test_none_is_made_where_none_is_asked_for() -> None:
    world = World(spec(1))
    world.step()
    assert not world.policies
    assert list(world.jobs)
    with pytest.raises(ValueError, match="networkPolicy"):
        build_export_policy(IDENTITY, spec(1))

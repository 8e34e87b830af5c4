"""Two ModelDeployments that want one host name on one Gateway: the one that has it keeps it, the other one says who has it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from perch.api import Routing
from perch.cache import Cache
from perch.names import child_labels
from perch.observe import claims, route_facts
from perch.observed import Claim
from perch.reconcile import Reconciler

from .world import INSTALLATION, World, entry, spec

KEY = ("vision", "digits")
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
GATEWAY = {"name": "gateway", "namespace": "gateways"}


def routing(*hosts: str, **ref: Any) -> Routing:
    return Routing.model_validate({"parentRefs": [{**GATEWAY, **ref}], "hostnames": list(hosts)})


def cached(*routes: tuple[str, str, list[str], dict[str, Any]]) -> Cache:
    """Routes of ModelDeployments `namespace/name` by the time of their creation."""
    cache = Cache(cast(Any, None), (), lambda _: None, lambda: NOON)
    for owner, created, hosts, ref in routes:
        namespace, name = owner.split("/")
        reference = {
            "kind": "ModelDeployment",
            "apiVersion": "serving.perch.dev/v1alpha1",
            "name": name,
            "uid": owner,
            "controller": True,
        }
        meta = {"name": name, "namespace": namespace, "uid": created, "resourceVersion": "1", "creationTimestamp": created}
        meta |= {"labels": child_labels(name, "route"), "ownerReferences": [reference]}
        body = {"parentRefs": [{**GATEWAY, **ref}], "hostnames": hosts, "rules": []}
        cache.absorb({"kind": "HTTPRoute", "apiVersion": "gateway.networking.k8s.io/v1", "metadata": meta, "spec": body})
    return cache


@pytest.mark.parametrize(
    ("hosts", "ref", "meets"),
    [
        pytest.param(["a.example.com"], {}, True, id="the same name"),
        pytest.param(["b.example.com", "a.example.com"], {}, True, id="the same name among others"),
        pytest.param(["b.example.com"], {}, False, id="another name"),
        pytest.param(["*.example.com"], {}, False, id="a wildcard, which an exact name comes before"),
        pytest.param(["a.example.com"], {"namespace": "others"}, False, id="another Gateway"),
        pytest.param(["a.example.com"], {"sectionName": "internal"}, False, id="another listener"),
        pytest.param(["a.example.com"], {"sectionName": "public"}, True, id="the same listener"),
        pytest.param(["a.example.com"], {"port": 80}, True, id="a port of any listener"),
    ],
)
def test_a_claim_is_a_route_for_the_same_name_on_the_same_listener(hosts: list[str], ref: dict[str, Any], meets: bool) -> None:
    cache = cached(("other/cats", "2026-01-01T00:00:00Z", hosts, ref))
    found = claims(cache, KEY, routing("a.example.com", sectionName="public"), {})
    assert [claim.owner for claim in found] == ["other/cats"] * meets
    assert all(claim.hostnames == {"a.example.com"} and not claim.held for claim in found)


def test_ones_own_route_is_no_claim_and_says_which_names_one_has() -> None:
    own = ("vision/digits", "2026-01-02T00:00:00Z", ["a.example.com"], {})
    other = ("other/cats", "2026-01-01T00:00:00Z", ["a.example.com", "b.example.com"], {})
    (claim,) = claims(cached(own, other), KEY, routing("a.example.com"), {})
    assert claim.held
    (claim,) = claims(cached(own, other), KEY, routing("b.example.com"), {})
    assert not claim.held


def test_a_route_that_was_deleted_a_moment_ago_leaves_its_names_to_nobody() -> None:
    there = {"spec": {"routing": {"parentRefs": [GATEWAY], "hostnames": ["a.example.com"]}}}
    routed, waits = (
        {"status": {"weights": {"desired": [{"version": 1, "weight": 100}]}}},
        {"status": {"weights": {"desired": []}}},
    )
    objects = {("vision", "old"): there | routed, ("vision", "new"): there | waits, ("vision", "unseen"): there}
    assert [claim.owner for claim in claims(cached(), KEY, routing("a.example.com"), objects)] == ["vision/old"]


def told(world: World) -> tuple[str, str, str]:
    found = world.status.condition("TrafficAccepted")
    assert found is not None
    return found.status, found.reason, found.message


CLAIM = Claim("other/cats", "2026-01-01T00:00:00Z", frozenset({"digits.example.com"}), held=False)


def test_who_comes_second_writes_no_route_says_who_was_first_and_follows_when_it_goes() -> None:
    world = World(spec(1), claims=(CLAIM,))
    world.settle()
    assert world.route is None
    assert world.ready_condition() == ("False", "HostnameConflict")
    assert told(world) == (
        "False",
        "HostnameConflict",
        "ModelDeployment other/cats has host name digits.example.com on the same Gateway already, and gets its requests: write "
        "another name into routing.hostnames here or there",
    )
    assert world.plans[-1].contests
    assert world.status.weights.desired == []
    world.claims = ()
    world.settle()
    assert world.ready_condition() == ("True", "Serving")
    assert world.weights == {1: 100}
    assert not world.plans[-1].contests


def test_whose_new_name_is_taken_keeps_its_former_ones_and_still_rolls_back() -> None:
    versions = [entry(1), entry(2)]
    steps = [{"weight": 50, "hold": "Indefinite"}]
    world = World(spec(1, 2, versions=versions))
    world.settle()
    world.spec = spec(1, 2, versions=versions, traffic={"stable": 1, "canary": 2}, rollout={"steps": steps})
    world.generation += 1
    world.settle()
    assert world.weights == {1: 50, 2: 50}
    taken = {"parentRefs": [{"name": "gateway"}], "hostnames": ["taken.example.com"]}
    world.claims = (replace(CLAIM, hostnames=frozenset({"taken.example.com"})),)
    world.spec = spec(1, 2, versions=versions, traffic={"stable": 1}, routing=taken)
    world.generation += 1
    world.settle()
    assert world.weights == {1: 100}
    assert world.route is not None
    assert world.route.spec["hostnames"] == ["digits.example.com"]
    assert told(world)[:2] == ("False", "HostnameConflict")


@pytest.mark.parametrize(("created", "mine"), [("2025-01-01T00:00:00Z", True), ("2027-01-01T00:00:00Z", False)])
def test_of_two_routes_with_one_name_the_older_one_is_the_gateways_choice(created: str, mine: bool) -> None:
    world = World(spec(1))
    world.settle()
    assert world.route is not None
    world.route = replace(world.route, created=created)
    world.claims = (replace(CLAIM, held=True),)
    world.settle()
    assert world.ready_condition() == (("True", "Serving") if mine else ("False", "HostnameConflict"))
    assert world.weights == {1: 100}, "its route is not taken from it: nobody would be served better"


def test_a_stranger_that_the_gateway_calls_in_the_way_is_named() -> None:
    world = World(spec(1))
    world.settle()
    assert world.route is not None
    world.route = replace(world.route, overlaps=("GRPCRoute shop/calls", "shop/front", "other/cats"))
    world.claims = (replace(CLAIM, created="2027-01-01T00:00:00Z", held=True),)
    world.route = replace(world.route, created="2025-01-01T00:00:00Z")
    world.settle()
    assert told(world) == (
        "False",
        "HostnameConflict",
        "the Gateway says that GRPCRoute shop/calls and HTTPRoute shop/front ask for the same requests, and the older route gets "
        "them: change the host name here or there",
    )


def test_what_a_gateway_says_of_overlaps_is_read() -> None:
    message = "Overlapping match conditions with route(s): GRPCRoute shop/calls, HTTPRoute shop/front, HTTPRoute other/cats"
    conditions = [{"type": "RouteRulesOverlap", "status": "True", "reason": "RouteRulesOverlap", "message": message}]
    body = {
        "metadata": {"name": "digits", "namespace": "vision", "generation": 1, "resourceVersion": "1", "creationTimestamp": "x"},
        "spec": {"parentRefs": [GATEWAY], "rules": []},
        "status": {"parents": [{"parentRef": GATEWAY, "conditions": conditions}]},
    }
    assert route_facts(body, "digits").overlaps == ("GRPCRoute shop/calls", "other/cats", "shop/front")
    conditions[0]["status"] = "False"
    assert route_facts(body, "digits").overlaps == ()


@pytest.mark.parametrize("deleted", [True, False], ids=["goes", "takes another name"])
async def test_who_waits_for_a_name_is_woken_when_the_other_one_goes_or_changes_and_not_by_its_status(deleted: bool) -> None:
    def other(generation: int) -> dict[str, Any]:
        meta = {"namespace": "other", "name": "cats", "uid": "u", "resourceVersion": str(generation), "generation": generation}
        return {"metadata": meta, "spec": {}}

    reconciler = Reconciler(cast(Any, None), INSTALLATION, (), lambda: NOON)
    reconciler.see(other(1), deleted=False)
    assert await reconciler.queue.take() == ("other", "cats")
    reconciler.queue.done(("other", "cats"))
    reconciler._contesting.add(KEY)
    reconciler.see(other(1), deleted=False)
    assert await reconciler.queue.take() == ("other", "cats")
    assert not reconciler.queue._waiting, "a status of the other one's says nothing of its names"
    reconciler.see(other(2), deleted=deleted)
    assert KEY in reconciler.queue._waiting

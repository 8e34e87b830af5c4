"""Two operators, one paused at any of its writes and resumed when the other has taken over: it undoes nothing of the other's."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest

from perch import kube, lease
from perch.kube import ApiError, Kube
from perch.lease import Lease, LeaseLostError

from .fake_api import KEY, Leader, Store, settle
from .test_rollout import rollout
from .world import START, spec

STEPS = [{"weight": 50, "hold": "10m"}, {"weight": 100}]
RELEASE = spec(1, 2, traffic={"stable": 1, "canary": 2}, rollout=rollout(steps=STEPS))


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


async def in_mid_rollout(clock: Clock) -> tuple[Store, Leader]:
    """Version 2 is a canary with half of the traffic."""
    store = Store()
    store.commit(spec(1, 2))
    leader = Leader(store, clock)
    await settle(store, leader)
    store.commit(RELEASE)
    await settle(store, leader)
    assert store.weights[-1] == {"digits-v1": 50, "digits-v2": 50}
    return store, leader


def crash(store: Store, clock: Clock) -> None:
    store.crash(2, clock.now)


def revert(store: Store, clock: Clock) -> None:
    store.commit(spec(1, 2))


def new_runtime(store: Store, clock: Clock) -> None:
    store.commit(spec(1, 2, runtime={"replicas": 3}))


def next_canary(store: Store, clock: Clock) -> None:
    store.commit(spec(1, 2, 3, traffic={"stable": 1, "canary": 3}, rollout=rollout(steps=STEPS)))


def time_passes(store: Store, clock: Clock) -> None:
    clock.now += timedelta(hours=2)


Happens = Callable[[Store, Clock], None]


@pytest.fixture(scope="module")
def stored() -> Store:
    return asyncio.run(in_mid_rollout(Clock()))[0]


async def paused_at(stored: Store, number: int, before: Happens, meanwhile: Happens) -> bool:
    """One operator is paused at so manieth write of the pass after `before`; the other takes over. False: it has fewer."""
    clock, store = Clock(), copy.deepcopy(stored)
    one = Leader(store, clock)
    before(store, clock)
    one.pause_at = one.writes + number
    late = asyncio.create_task(one.work(3))
    paused = asyncio.create_task(one.paused.wait())
    await asyncio.wait({late, paused}, return_when=asyncio.FIRST_COMPLETED)
    if late.done():
        paused.cancel()
        return False
    other = Leader(store, clock)
    meanwhile(store, clock)
    for _ in range(6):
        await other.work()
    expected = content(store, other)
    one.lost = True
    one.resumed.set()
    # It ends where it has more to write.
    with suppress(LeaseLostError):
        await late
    assert content(store, other) == expected
    return True


def content(store: Store, leader: Leader) -> dict[Any, Any]:
    """What this operator wrote, as it stands. A child that both have made is the same, whoever was last."""
    found = {place: store.objects.get(place, {}) for place in leader.wrote}
    return {place: copy.deepcopy((obj.get("spec"), obj.get("status"))) for place, obj in found.items()}


@pytest.mark.parametrize("meanwhile", [crash, revert, new_runtime, next_canary, time_passes])
@pytest.mark.parametrize("before", [crash, revert, new_runtime, next_canary, time_passes])
async def test_a_late_write_of_a_former_leader_undoes_nothing(stored: Store, before: Happens, meanwhile: Happens) -> None:
    number = 1
    while await paused_at(stored, number, before, meanwhile):
        number += 1
    assert number > 1 or before is time_passes, "nothing was written at all"


async def test_an_abort_reaches_the_route_though_no_status_can_be_written() -> None:
    clock = Clock()
    store, leader = await in_mid_rollout(clock)

    def refuse(what: str, body: Any) -> None:
        if what.endswith("status"):
            raise ApiError(422, "Invalid", "status: not today")

    leader.refuse = refuse
    store.crash(2, clock.now)
    await leader.work(3)
    assert store.weights[-1] == {"digits-v1": 100}
    assert "aborted" not in store.status or store.status["aborted"] == []
    leader.refuse = lambda what, body: None
    await leader.work(3)
    assert [a["version"] for a in store.status["aborted"]] == [2]


@pytest.mark.parametrize("trouble", [aiohttp.ClientError("reset"), TimeoutError(), ValueError("not JSON")])
async def test_a_write_without_an_answer_keeps_no_other_from_being_made(trouble: Exception) -> None:
    clock = Clock()
    store, leader = await in_mid_rollout(clock)

    def refuse(what: str, body: Any) -> None:
        if what == "apply Job":
            raise trouble

    leader.refuse = refuse
    store.commit(spec(1, 2, 3, runtime={"replicas": 4}))
    await leader.work()
    store.go_well()
    await leader.work(2)
    assert store.weights[-1] == {"digits-v1": 100}
    assert store.get("Deployment", "digits-v1")["spec"]["replicas"] == 4
    conditions = {c["type"]: c for c in store.status["conditions"]}
    assert conditions["Ready"]["reason"] == "ApplyFailed"


async def test_a_label_that_somebody_writes_meanwhile_costs_no_status() -> None:
    clock = Clock()
    store, leader = await in_mid_rollout(clock)
    store.crash(2, clock.now)
    leader.watch()
    found = store.get("ModelDeployment", KEY[1])
    store.put("ModelDeployment", KEY[1], {**found, "metadata": {**found["metadata"], "labels": {"team": "vision"}}})
    await leader.reconciler._guarded_pass(KEY)
    assert [a["version"] for a in store.status["aborted"]] == [2]
    assert store.get("ModelDeployment", KEY[1])["metadata"]["labels"] == {"team": "vision"}


async def test_a_status_of_another_release_keeps_what_can_be_read() -> None:
    clock = Clock()
    store, leader = await in_mid_rollout(clock)
    store.crash(2, clock.now)
    await leader.work(2)
    found = store.get("ModelDeployment", KEY[1])
    store.put("ModelDeployment", KEY[1], {**found, "status": {**found["status"], "step": {"odd": 1}, "history": [{}, 7]}})
    await leader.work(2)
    assert [a["version"] for a in store.status["aborted"]] == [2]
    assert store.weights[-1] == {"digits-v1": 100}


# --- the Lease -----------------------------------------------------------------------------------------------------------


class Silent:
    """A connection that notes how long each request may take, and answers nothing."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def call_api(self, *_: Any, _request_timeout: float, **__: Any) -> Any:
        self.seconds.append(_request_timeout)
        raise TimeoutError


async def test_no_write_lasts_longer_than_the_lease_whatever_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(lease, "_now", lambda: now.seconds)
    line = Silent()
    client = Kube(cast(Any, line))
    held = Lease(client, "leases", "perch", "me")
    held._renewed = 100.0
    client.seconds_to_write = held.seconds_to_write
    for passed in (0.0, 5.0, 9.9):
        now.seconds = 100.0 + passed
        for path in ("/api/v1/namespaces/leases-of-cars/services/x", "/apis/batch/v1/namespaces/a/jobs/leases"):
            with pytest.raises(TimeoutError):
                await client.request("PATCH", path, body={})
            assert passed + line.seconds[-1] < lease.DURATION_SECONDS
    with pytest.raises(TimeoutError):
        await client.request("GET", "/api/v1/namespaces/a/pods/x")
    assert line.seconds[-1] == kube.TIMEOUT_SECONDS
    now.seconds = 111.0
    sent = len(line.seconds)
    with pytest.raises(LeaseLostError):
        await client.request("PATCH", "/api/v1/namespaces/leases-of-cars/services/leases", body={})
    assert len(line.seconds) == sent, "nothing was sent"
    with pytest.raises(TimeoutError):
        await client.request("PUT", "/apis/coordination.k8s.io/v1/namespaces/leases/leases/perch", body={}, fenced=False)

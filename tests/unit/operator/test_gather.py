"""The gatherer against a local HTTP server that answers as Triton's pods and Prometheus do.

The fake server leaves out everything but the few counters and the one API call that are read: no other families, no labels of
other models, no evaluation of PromQL. Pods are loopback addresses; cache and gatherer are the real ones.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web

from perch import ask, gather, reconcile
from perch.cache import Cache, Key
from perch.counters import parse_counters
from perch.evidence import Aim, Gathered
from perch.gather import KEPT, Gatherer, PodSource
from perch.names import child_labels
from perch.plan import Plan
from tests.unit.operator.world import INSTALLATION, spec

KEY: Key = ("vision", "digits")
START = datetime(2026, 1, 1, tzinfo=UTC)
INTERVAL = 0.02
STABLE, CANARY = "127.0.1.1", "127.0.1.2"
OTHER_STABLE = "127.0.1.3"
PROMETHEUS = "127.0.1.9"
SECRET = "hunter2"

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def triton_text(version: int, success: int = 0, failure: int = 0, cancelled: int = 0, pending: int = 0) -> str:
    labels = f'model="digits",version="{version}"'
    failures = {"OTHER": 0, "BACKEND": failure, "CANCELED": cancelled, "REJECTED": 0}
    lines = [f"nv_inference_request_success{{{labels}}} {success}"]
    lines += [f'nv_inference_request_failure{{model="digits",reason="{r}",version="{version}"}} {n}' for r, n in failures.items()]
    lines += [f"nv_inference_request_duration_us{{{labels}}} {1000 * success}"]
    lines += [f"nv_inference_queue_duration_us{{{labels}}} {100 * success}"]
    lines += [f"nv_inference_pending_request_count{{{labels}}} {pending}"]
    return "\n".join(lines) + "\n"


def sample(value: object) -> dict[str, Any]:
    return {"status": "success", "data": {"resultType": "vector", "result": [{"metric": {}, "value": [1.0, str(value)]}]}}


@dataclass
class Server:
    """Answers on every loopback address that it was told to listen at."""

    port: int = 0
    texts: dict[str, str] = field(default_factory=dict)
    """What /metrics says, by address."""
    values: dict[str, Any] = field(default_factory=dict)
    """What Prometheus says, by query."""
    instead: dict[str, Answer] = field(default_factory=dict)
    """What an address does in place of all that."""
    asked: Counter[str] = field(default_factory=Counter)
    queries: list[dict[str, str]] = field(default_factory=list)

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        self.asked[str(request.url.host)] += 1
        if answer := self.instead.get(str(request.url.host)):
            return await answer(request)
        return web.Response(text=self.texts[str(request.url.host)])

    async def query(self, request: web.Request) -> web.StreamResponse:
        self.asked[str(request.url.host)] += 1
        self.queries.append(dict(request.query))
        if answer := self.instead.get(str(request.url.host)):
            return await answer(request)
        return web.json_response(self.values[request.query["query"]])


@asynccontextmanager
async def serving(*addresses: str) -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.add_routes([web.get("/metrics", server.metrics), web.get("/api/v1/query", server.query)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        for address in addresses:
            site = web.TCPSite(runner, address, server.port)
            await site.start()
            server.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        yield server
    finally:
        await runner.cleanup()


def pod(address: str, version: int, *, name: str = "", started: str = "containerd://1", **more: Any) -> dict[str, Any]:
    """A ready Triton pod. `more` replaces parts of it: labels, ready, leaving."""
    name = name or f"digits-v{version}-{address.rsplit('.', 1)[-1]}"
    metadata = {
        "namespace": KEY[0],
        "name": name,
        "uid": f"uid-{name}",
        "resourceVersion": str(time.monotonic_ns()),
        "labels": {**child_labels(KEY[1], "triton", version), **more.get("labels", {})},
    }
    if more.get("leaving"):
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    status = {
        "podIP": address,
        "conditions": [{"type": "Ready", "status": str(more.get("ready", True))}],
        "containerStatuses": [{"name": "golden"}, {"name": "triton", "containerID": started}],
    }
    return {"kind": "Pod", "metadata": metadata, "status": status}


@dataclass
class Clock:
    now: datetime = START
    tick: timedelta = timedelta()
    """How much time passes from one look at it to the next."""

    def __call__(self) -> datetime:
        self.now += self.tick
        return self.now


@dataclass
class Setting:
    """A running gatherer over two pods, stable's version 1 and the canary's version 2."""

    server: Server
    cache: Cache
    gatherer: Gatherer
    woken: Counter[Key]
    clock: Clock

    @property
    def gathered(self) -> Gathered:
        found = self.gatherer.gathered(KEY)
        assert found is not None
        return found

    async def looks(self, number: int = 2, address: str = CANARY) -> None:
        """Until so many more looks are over at least; one may have been under way already."""
        wanted = self.server.asked[address] + number + 1
        await until(lambda: self.server.asked[address] >= wanted)

    async def count(self, **counts: int) -> None:
        """The canary's counters go to these, and the gatherer has seen it."""
        self.server.texts[CANARY] = triton_text(2, **counts)
        await self.looks()


async def until(condition: Callable[[], Any], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.002)


def aim(epoch: str = "5", **more: Any) -> Aim:
    return Aim(**{"epoch": epoch, "model": "digits", "stable": 1, "canary": 2, "not_before": START, **more})


@pytest.fixture
async def setting() -> AsyncIterator[Setting]:
    async with serving(STABLE, CANARY, OTHER_STABLE, PROMETHEUS) as server:
        woken: Counter[Key] = Counter()
        cache = Cache(cast(Any, None), (), lambda key: None, lambda: START)
        clock = Clock()
        gatherer = Gatherer(cache, lambda key: woken.update([key]), clock, interval=INTERVAL, port=server.port)
        server.texts = {STABLE: triton_text(1), CANARY: triton_text(2), OTHER_STABLE: triton_text(1)}
        cache.absorb(pod(STABLE, 1))
        cache.absorb(pod(CANARY, 2))
        task = asyncio.create_task(gatherer.run())
        yield Setting(server, cache, gatherer, woken, clock)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def total(gathered: Gathered) -> tuple[int, int, int, int]:
    """Requests and failures of stable, and of the canary, over all batches."""
    batches = gathered.batches
    return (
        sum(b.stable.requests for b in batches),
        sum(b.stable.failures for b in batches),
        sum(b.canary.requests for b in batches),
        sum(b.canary.failures for b in batches),
    )


# --- pods ----------------------------------------------------------------------------------------------------------------


async def test_batches_hold_what_happened_since_the_first_look_and_wake_the_pass(setting: Setting) -> None:
    setting.server.texts |= {STABLE: triton_text(1, 1000, 10), CANARY: triton_text(2, 100, 50)}
    setting.gatherer.aim(KEY, aim())
    await setting.looks()
    assert total(setting.gathered) == (0, 0, 0, 0)
    woken = setting.woken[KEY]
    assert woken >= 1
    setting.server.texts |= {STABLE: triton_text(1, 1090, 11), CANARY: triton_text(2, 107, 53, cancelled=2, pending=4)}
    await setting.looks()
    assert total(setting.gathered) == (91, 1, 10, 3)
    assert sum(b.canary.cancellations for b in setting.gathered.batches) == 2
    assert setting.gathered.batches[-1].hung == ("digits-v2-2/containerd://1",)
    assert setting.woken[KEY] > woken
    assert setting.gathered.trouble is None


async def test_replicas_are_added_up(setting: Setting) -> None:
    setting.cache.absorb(pod(OTHER_STABLE, 1))
    setting.gatherer.aim(KEY, aim())
    await setting.looks()
    setting.server.texts |= {STABLE: triton_text(1, 5), OTHER_STABLE: triton_text(1, 7, 2)}
    await setting.looks()
    assert total(setting.gathered) == (14, 2, 0, 0)


@pytest.mark.parametrize(
    "other",
    [
        pod(OTHER_STABLE, 1, ready=False),
        pod(OTHER_STABLE, 1, leaving=True),
        pod(OTHER_STABLE, 3),
        pod(OTHER_STABLE, 1, labels=child_labels("digits", "export", 1)),
        pod("", 1, name="new"),
    ],
    ids=["not ready", "being deleted", "of another version", "an export", "without an address"],
)
async def test_a_pod_that_serves_neither_version_is_not_asked(setting: Setting, other: dict[str, Any]) -> None:
    setting.cache.absorb(other)
    setting.gatherer.aim(KEY, aim())
    await setting.looks()
    assert setting.gathered.batches
    assert setting.server.asked[OTHER_STABLE] == 0


async def test_nothing_is_asked_before_the_proxies_have_converged(setting: Setting) -> None:
    setting.gatherer.aim(KEY, aim(not_before=START + timedelta(seconds=2)))
    setting.gatherer.aim(("vision", "other"), aim())
    setting.cache.absorb(pod(STABLE, 1, name="other"))
    await until(lambda: setting.gatherer.gathered(("vision", "other")).trouble)  # type: ignore[union-attr]
    assert setting.server.asked[CANARY] == 0
    setting.clock.now += timedelta(seconds=2)
    await setting.looks()
    assert setting.gathered.batches


async def test_another_epoch_drops_the_batches_and_what_happened_in_between(setting: Setting) -> None:
    setting.gatherer.aim(KEY, aim("5"))
    await setting.looks()
    await setting.count(success=10)
    setting.clock.now += timedelta(seconds=30)
    setting.gatherer.aim(KEY, aim("50", not_before=setting.clock.now + timedelta(seconds=2)))
    assert setting.gathered == Gathered("50", START, (), {}, None)
    setting.server.texts[CANARY] = triton_text(2, 500, 400)
    setting.clock.now += timedelta(seconds=2)
    await setting.looks()
    await setting.count(success=501, failure=400)
    assert total(setting.gathered) == (0, 0, 1, 0)


async def test_the_same_aim_changes_nothing(setting: Setting) -> None:
    setting.gatherer.aim(KEY, aim(metrics={"x": "y"}, address="http://127.0.1.9:1"))
    await setting.looks()
    for success in range(1, 6):
        setting.server.texts[CANARY] = triton_text(2, success)
        setting.gatherer.aim(KEY, aim(metrics={"x": "y"}, address="http://127.0.1.9:1"))
        await setting.looks()
    assert total(setting.gathered) == (0, 0, 5, 0)


async def test_an_edited_metric_keeps_the_batches_of_the_epoch(setting: Setting) -> None:
    setting.gatherer.aim(KEY, aim())
    await setting.looks()
    await setting.count(success=10)
    setting.gatherer.aim(KEY, aim(metrics={"x": "y"}, address="http://127.0.1.9:1"))
    assert total(setting.gathered) == (0, 0, 10, 0)


async def test_another_canary_has_been_watched_since_now_only(setting: Setting) -> None:
    setting.gatherer.aim(KEY, aim())
    setting.clock.now += timedelta(seconds=30)
    setting.gatherer.aim(KEY, aim("5 of 3", canary=3))
    assert setting.gathered.since == START + timedelta(seconds=30)


async def test_no_aim_means_no_questions_and_nothing_gathered(setting: Setting) -> None:
    setting.gatherer.aim(KEY, aim())
    await setting.looks()
    setting.gatherer.aim(KEY, None)
    assert setting.gatherer.gathered(KEY) is None
    setting.gatherer.aim(("vision", "other"), aim())
    asked = setting.server.asked[CANARY]
    await until(lambda: setting.gatherer.gathered(("vision", "other")).trouble)  # type: ignore[union-attr]
    await asyncio.sleep(3 * INTERVAL)
    assert setting.server.asked[CANARY] <= asked + 1, "a question that was under way is all that may still come"


async def test_a_canary_with_all_the_traffic_is_looked_at_alone(setting: Setting) -> None:
    setting.gatherer.aim(KEY, aim("100", stable=None))
    await setting.looks()
    await setting.count(success=8, failure=2)
    assert total(setting.gathered) == (0, 0, 10, 2)
    assert setting.server.asked[STABLE] == 0


async def test_a_restarted_triton_costs_a_batch_and_no_more(setting: Setting) -> None:
    setting.server.texts[CANARY] = triton_text(2, 100, 90)
    setting.gatherer.aim(KEY, aim())
    await setting.looks()
    # More than before: the counter alone would not tell.
    setting.server.texts[CANARY] = triton_text(2, 200, 100)
    setting.cache.absorb(pod(CANARY, 2, started="containerd://2"))
    await setting.looks()
    assert total(setting.gathered) == (0, 0, 0, 0)
    await setting.count(success=203, failure=101)
    assert total(setting.gathered) == (0, 0, 4, 1)


async def test_a_pod_that_joins_costs_a_batch_and_no_more(setting: Setting) -> None:
    setting.gatherer.aim(KEY, aim())
    await setting.looks()
    setting.server.texts[OTHER_STABLE] = triton_text(1, 1000, 1000)
    setting.cache.absorb(pod(OTHER_STABLE, 1))
    await setting.looks()
    assert total(setting.gathered) == (0, 0, 0, 0)
    setting.server.texts[OTHER_STABLE] = triton_text(1, 1001, 1000)
    await setting.looks()
    assert total(setting.gathered) == (1, 0, 0, 0)


async def test_without_a_ready_pod_of_a_version_there_is_trouble_and_no_batch(setting: Setting) -> None:
    setting.cache.absorb(pod(CANARY, 2, ready=False))
    setting.gatherer.aim(KEY, aim())
    await until(lambda: setting.gathered.trouble)
    assert setting.gathered.trouble == "version 2 has no ready pod that could be asked for its counters"
    assert setting.woken[KEY] == 1
    assert setting.gathered.batches == ()


async def silent(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def failing(request: web.Request) -> web.StreamResponse:
    return web.Response(status=500, text=SECRET, reason=SECRET)


async def redirecting(request: web.Request) -> web.StreamResponse:
    return web.Response(status=302, headers={"Location": f"http://{OTHER_STABLE}:{request.url.port}{request.path_qs}"})


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"# nothing\n" * 1000)


async def gibberish(request: web.Request) -> web.StreamResponse:
    return web.Response(text=f"<html>{SECRET}</html>")


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (silent, "it did not answer within 0.05 s"),
        (failing, "it answered HTTP 500"),
        (redirecting, "it answered HTTP 302"),
        (endless, "it answered more than 128 KiB"),
        (gibberish, ""),
    ],
    ids=["silent", "failing", "redirecting", "endless", "gibberish"],
)
async def test_a_pod_that_gives_no_counters_is_named_and_makes_no_batch(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, does: Answer, says: str
) -> None:
    if does is silent:
        # Of the others none may run out of time on a busy machine: that would be another trouble.
        monkeypatch.setattr(ask, "POD_SECONDS", 0.05)
    setting.gatherer.aim(KEY, aim())
    await setting.looks()
    setting.server.instead[CANARY] = does
    await until(lambda: setting.gathered.trouble)
    assert str(setting.gathered.trouble).startswith(f"pod digits-v2-2, port {setting.server.port}: {says}")
    assert SECRET not in str(setting.gathered.trouble)
    batches, woken = setting.gathered.batches, setting.woken[KEY]
    setting.server.texts[CANARY] = triton_text(2, 6, 1)
    await setting.looks()
    assert setting.gathered.batches == batches
    assert setting.woken[KEY] == woken, "the same trouble again is no news"
    # Counters go on counting: nothing that happened meanwhile is lost.
    del setting.server.instead[CANARY]
    await until(lambda: setting.gathered.trouble is None)
    await setting.looks()
    assert total(setting.gathered) == (0, 0, 7, 1)


async def test_a_pod_that_takes_no_connections_is_named_with_the_number_of_others(setting: Setting) -> None:
    setting.cache.absorb(pod("127.0.1.100", 1))
    setting.cache.absorb(pod("127.0.1.101", 1))
    setting.gatherer.aim(KEY, aim())
    await until(lambda: setting.gathered.trouble)
    assert setting.gathered.trouble == f"pod digits-v1-100, port {setting.server.port}: it takes no connections (and 1 more)"


async def test_a_look_that_takes_too_long_is_left_out_and_nothing_that_happened_meanwhile_is_lost(setting: Setting) -> None:
    setting.gatherer.aim(KEY, aim())
    await setting.looks()
    setting.clock.tick = timedelta(seconds=0.3)
    await setting.count(success=6, failure=1)
    await until(lambda: setting.gathered.trouble)
    said = "asking 2 pods took 0.3 s: counters read more than 0.25 s apart cannot be compared"
    assert setting.gathered.trouble == said
    assert total(setting.gathered) == (0, 0, 0, 0)
    setting.clock.tick = timedelta()
    await until(lambda: setting.gathered.trouble is None)
    await setting.looks()
    assert total(setting.gathered) == (0, 0, 7, 1)


async def test_one_look_that_took_too_long_is_no_trouble_yet(setting: Setting) -> None:
    seconds = iter([0, 0, 3, 3.3, 6, 6.3, 9, 9.3, 12, 12, 15, 15.3])

    def clock() -> datetime:
        return START + timedelta(seconds=next(seconds))

    async with ask.open_session() as session:
        source = PodSource(session, setting.cache, KEY, aim(), clock, setting.server.port)
        assert await source.look() is None, "the baseline"
        setting.server.texts[CANARY] = triton_text(2, 6, 1)
        assert await source.look() is None
        for _ in range(2):
            with pytest.raises(ask.NoAnswerError):
                await source.look()
        batch = await source.look()
        assert batch is not None
        assert (batch.since, batch.until) == (START, START + timedelta(seconds=12))
        assert batch.canary.requests == 7
        assert await source.look() is None, "after a good one, the next is the first again"


async def test_a_long_text_is_parsed_beside_the_loop(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[int, threading.Thread] = {}

    def parse(text: str, model: str, version: int) -> Any:
        threads[version] = threading.current_thread()
        return parse_counters(text, model, version)

    monkeypatch.setattr(gather, "parse_counters", parse)
    setting.server.texts[CANARY] += "# " + 2 * gather.LARGE * "x" + "\n"
    setting.gatherer.aim(KEY, aim())
    await until(lambda: len(threads) == 2)
    assert threads[1] is threading.main_thread()
    assert threads[2] is not threading.main_thread()


async def test_times_are_whole_seconds_as_status_has_them(setting: Setting) -> None:
    """With fractions, what status has taken in already would look new, and be taken in again."""
    setting.clock.now += timedelta(seconds=20.7)
    setting.server.values = {"m": sample(1)}
    setting.gatherer.aim(KEY, prometheus_aim(setting, metrics={"m": "m"}))
    await until(lambda: setting.gathered.batches and setting.gathered.readings)
    found = setting.gathered
    times = (found.since, found.batches[0].since, found.batches[0].until, found.readings["m"].at)
    assert set(times) == {START + timedelta(seconds=20)}


async def test_an_answer_without_end_is_cut_off(setting: Setting) -> None:
    setting.server.texts[CANARY] += "# " + 100_000 * "x" + "\n"
    setting.gatherer.aim(KEY, aim())
    await setting.looks()
    assert setting.gathered.batches, "the control: much, but in bounds"
    setting.server.instead[CANARY] = endless
    await until(lambda: setting.gathered.trouble)


async def test_a_redirect_is_not_followed(setting: Setting) -> None:
    setting.server.texts[OTHER_STABLE] = triton_text(2)
    setting.server.instead[CANARY] = redirecting
    setting.gatherer.aim(KEY, aim())
    await setting.looks()
    assert setting.gathered.trouble
    assert setting.server.asked[OTHER_STABLE] == 0
    setting.cache.absorb(pod(OTHER_STABLE, 2, name="digits-v2-2"))
    await until(lambda: setting.gathered.batches)


async def test_what_no_pass_takes_in_is_kept_for_a_while_and_the_oldest_goes_first(
    setting: Setting,
) -> None:
    setting.gatherer._interval = 0.001
    setting.gatherer.aim(KEY, aim())
    await setting.looks()
    setting.clock.now += timedelta(seconds=1)
    await until(lambda: len(setting.gathered.batches) == KEPT and setting.gathered.batches[0].since > START, 30)


async def test_a_defect_concerns_its_own_rollout_only(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = ("vision", "other")
    for address, version in ((STABLE, 1), (CANARY, 2)):
        body = pod(address, version, name=f"other-{version}")
        body["metadata"]["labels"] = child_labels("other", "triton", version)
        setting.cache.absorb(body)

    def broken(text: str, model: str, version: int) -> Any:
        if model == "broken":
            raise ZeroDivisionError
        return parse_counters(text, model, version)

    monkeypatch.setattr(gather, "parse_counters", broken)
    setting.gatherer.aim(KEY, aim(model="broken"))
    setting.gatherer.aim(other, aim())
    await until(lambda: setting.gathered.trouble)
    await until(lambda: len(setting.gatherer.gathered(other).batches) > 5)  # type: ignore[union-attr]
    assert setting.gathered.trouble == "Perch failed to read it (ZeroDivisionError): its log says more"
    assert caplog.text.count("this is a defect of Perch") == 1


# --- Prometheus ----------------------------------------------------------------------------------------------------------

COUNTERS = {
    "requests": 'sum(requests{v="{{version}}",s="{{service}}"})',
    "failures": 'sum(failures{v="{{version}}",s="{{service}}"})',
}


def counters(stable: tuple[object, object], canary: tuple[object, object]) -> dict[str, Any]:
    found = {}
    for version, values in ((1, stable), (2, canary)):
        for name, value in zip(("requests", "failures"), values, strict=True):
            found[f'sum({name}{{v="{version}",s="digits-v{version}"}})'] = sample(value)
    return found


def prometheus_aim(setting: Setting, **more: Any) -> Aim:
    return aim(address=f"http://{PROMETHEUS}:{setting.server.port}", **more)


async def test_counters_of_prometheus_take_the_place_of_the_pods(setting: Setting) -> None:
    """triton server#7713, #8521: Triton counts error responses as successes; what stands before it need not."""
    setting.server.values = counters((1000, 10), (100, 50))
    setting.gatherer.aim(KEY, prometheus_aim(setting, **COUNTERS))
    await setting.looks(8, PROMETHEUS)
    setting.server.values = counters((1090, 11), (110, 53))
    await setting.looks(8, PROMETHEUS)
    assert total(setting.gathered) == (90, 1, 10, 3)
    assert setting.server.asked[CANARY] == 0
    assert setting.woken[KEY] >= 2
    assert {q["time"] for q in setting.server.queries} == {f"{START.timestamp():.3f}"}, "all four of one moment"


async def test_requests_of_the_former_weight_are_not_counted_however_old_the_last_scrape_is(setting: Setting) -> None:
    """Until START all of the canary's requests failed, from then on none does; Prometheus scraped half a minute ago."""
    behind = timedelta(seconds=30)

    async def lag(request: web.Request) -> web.StreamResponse:
        scraped = datetime.fromtimestamp(float(request.query["time"]), UTC) - behind
        seconds = (scraped - START).total_seconds()
        requests, failures = 10_000 + 10 * seconds, 5_000 + 10 * min(seconds, 0)
        return web.json_response(sample(requests if "requests" in request.query["query"] else failures))

    setting.server.instead[PROMETHEUS] = lag
    setting.gatherer.aim(KEY, prometheus_aim(setting, **COUNTERS, stable=None, behind=behind))

    def enough() -> bool:
        setting.clock.now += timedelta(seconds=0.5)
        return len(setting.gathered.batches) >= 10

    await until(enough)
    _, _, requests, failures = total(setting.gathered)
    assert requests > 0
    assert failures == 0


async def test_another_stable_beside_the_same_weight_waits_for_a_scrape_of_its_own(setting: Setting) -> None:
    more = {**COUNTERS, "behind": timedelta(seconds=30)}
    setting.server.values = counters((1000, 10), (100, 50))
    setting.gatherer.aim(KEY, prometheus_aim(setting, **COUNTERS))
    await setting.looks(4, PROMETHEUS)
    setting.clock.now += timedelta(hours=1)
    setting.gatherer.aim(KEY, prometheus_aim(setting, epoch="5 beside 3", **more))
    await asyncio.sleep(INTERVAL)  # what was under way may still be asked
    asked = len(setting.server.queries)
    setting.clock.now += timedelta(seconds=29)
    await asyncio.sleep(5 * INTERVAL)
    assert len(setting.server.queries) == asked
    setting.clock.now += timedelta(seconds=1)
    await setting.looks(4, PROMETHEUS)


async def test_a_series_that_vanishes_and_comes_back_with_its_history_is_no_news(setting: Setting) -> None:
    setting.server.values = counters((1000, 10), (100, 0))
    setting.gatherer.aim(KEY, prometheus_aim(setting, **COUNTERS))
    await setting.looks(8, PROMETHEUS)
    setting.server.values = counters((1090, 10), (0, 0))
    await until(lambda: setting.gathered.trouble)
    assert "fell to 0" in str(setting.gathered.trouble)
    setting.server.values = counters((1180, 10), (120, 0))
    await setting.looks(8, PROMETHEUS)
    assert total(setting.gathered) == (180, 0, 20, 0)


async def test_counters_of_a_canary_with_all_the_traffic_are_its_own(setting: Setting) -> None:
    setting.server.values = counters((1000, 10), (100, 50))
    setting.gatherer.aim(KEY, prometheus_aim(setting, **COUNTERS, stable=None))
    await setting.looks(4, PROMETHEUS)
    setting.server.values = counters((1090, 11), (110, 53))
    await setting.looks(4, PROMETHEUS)
    assert total(setting.gathered) == (0, 0, 10, 3)


async def test_a_counter_without_a_sample_is_no_evidence_and_is_named(setting: Setting) -> None:
    nothing = {"status": "success", "data": {"resultType": "vector", "result": []}}
    setting.server.values = counters((1000, 10), (100, 50)) | {'sum(failures{v="2",s="digits-v2"})': nothing}
    setting.gatherer.aim(KEY, prometheus_aim(setting, **COUNTERS))
    await until(lambda: setting.gathered.trouble)
    address = f"http://{PROMETHEUS}:{setting.server.port}"
    assert setting.gathered.trouble == (
        f"Prometheus at {address}, failures of version 2: the query yields 0 samples and must yield one: "
        "append 'or vector(0)' where nothing means zero"
    )
    assert setting.gathered.batches == ()


async def test_metrics_are_read_over_a_window_that_begins_with_the_weight(setting: Setting) -> None:
    setting.cache.absorb(pod(CANARY, 2, ready=False))
    setting.server.values = {"m[15s]": sample(0.25), "m[100s]": sample(0.5), "n": sample("NaN")}
    setting.gatherer.aim(KEY, prometheus_aim(setting, metrics={"a": "m[{{window}}]", "b": "n"}))
    await until(lambda: setting.gathered.trouble)
    assert setting.gathered.readings == {}, "the window would reach back beyond the change of weights"
    assert setting.server.asked[PROMETHEUS] == 0
    assert setting.woken[KEY] == 1
    setting.clock.now += timedelta(seconds=15.9)
    await until(lambda: setting.gathered.readings)
    found = setting.gathered.readings
    assert (found["a"].name, found["a"].value, found["a"].trouble) == ("a", 0.25, None)
    assert found["b"].value is None
    assert str(found["b"].trouble).endswith("the value is not finite")
    assert setting.woken[KEY] > 1
    setting.clock.now = START + timedelta(seconds=100)
    await until(lambda: setting.gathered.readings["a"].value == 0.5)
    assert setting.gathered.readings["a"].at == setting.clock.now


async def test_a_prometheus_that_hangs_keeps_nobody_from_the_pods(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.server.instead[PROMETHEUS] = silent
    setting.gatherer.aim(KEY, aim())
    for number in range(40):
        setting.gatherer.aim(("vision", f"other-{number}"), prometheus_aim(setting, **COUNTERS))
    await until(lambda: setting.server.asked[PROMETHEUS] >= 4 * gather.AT_ONCE)
    await setting.looks(5)
    assert setting.server.asked[PROMETHEUS] == 4 * gather.AT_ONCE


VALUES: dict[str, tuple[int, object, float | str]] = {
    "a scalar": (200, {"status": "success", "data": {"resultType": "scalar", "result": [1.0, "2.5"]}}, 2.5),
    "one sample": (200, sample("1e-3"), 0.001),
    "no sample": (
        200,
        {"status": "success", "data": {"resultType": "vector", "result": []}},
        "the query yields 0 samples and must yield one: append 'or vector(0)' where nothing means zero",
    ),
    "two samples": (
        200,
        {"status": "success", "data": {"resultType": "vector", "result": [{}, {}]}},
        "the query yields 2 samples and must yield one",
    ),
    "a range": (
        200,
        {"status": "success", "data": {"resultType": "matrix", "result": []}},
        "the query yields neither a scalar nor an instant vector",
    ),
    "not a number": (200, sample("NaN"), "the value is not finite"),
    "infinite": (200, sample("+Inf"), "the value is not finite"),
    "a bad query": (400, {"status": "error", "errorType": "bad_data", "error": SECRET}, "it answered HTTP 400, bad_data"),
    "an error type of its own": (422, {"status": "error", "errorType": SECRET}, "it answered HTTP 422"),
    "an error with a good status": (200, {"status": "error", "errorType": "timeout"}, "it answered HTTP 200, timeout"),
    "another service": (200, {"password": SECRET}, "it answered HTTP 200, and not as Prometheus does"),
    "a list": (200, [SECRET], "it answered HTTP 200, and not as Prometheus does"),
    "a text as value": (200, sample(SECRET), "it answered HTTP 200, and not as Prometheus does"),
    "an unhashable error type": (
        500,
        {"status": "error", "errorType": [SECRET]},
        "it answered HTTP 500, and not as Prometheus does",
    ),
    "a redirect's own text": (302, SECRET, "it answered HTTP 302, and not as Prometheus does"),
}


@pytest.mark.parametrize(("status", "body", "expected"), VALUES.values(), ids=VALUES)
def test_an_answer_of_prometheus_is_one_finite_number_or_trouble(status: int, body: object, expected: float | str) -> None:
    if isinstance(expected, float):
        assert ask.read_value(status, json.dumps(body).encode()) == expected
    else:
        with pytest.raises(ask.NoAnswerError) as raised:
            ask.read_value(status, json.dumps(body).encode())
        assert str(raised.value) == expected


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000])
def test_bytes_that_are_no_json_are_trouble(body: bytes) -> None:
    with pytest.raises(ask.NoAnswerError, match="not as Prometheus does"):
        ask.read_value(200, body)


@asynccontextmanager
async def raw(answer: bytes) -> AsyncIterator[int]:
    """A server that says this, whatever it is asked, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, PROMETHEUS, 0) as server:
        yield server.sockets[0].getsockname()[1]


def http(head: str, body: object) -> bytes:
    text = json.dumps(body)
    return f"HTTP/1.1 {head}\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n{text}".encode()


RAW: dict[str, tuple[bytes, str]] = {
    "another protocol": (f"SSH-2.0-{SECRET}\r\n".encode(), "it does not speak HTTP"),
    "a header that is none": (f"HTTP/1.1 200 OK\r\n{SECRET}\r\n\r\n".encode(), "it does not speak HTTP"),
    "nothing": (b"", "it broke the connection off"),
    "half of it": (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "it broke the connection off"),
    "a reason": (http(f"403 {SECRET}", {"error": SECRET}), "it answered HTTP 403"),
    "a redirect": (
        http(f"301 Moved\r\nLocation: http://127.0.0.1:1/{SECRET}", SECRET),
        "it answered HTTP 301, and not as Prometheus does",
    ),
    "a packed body": (
        http("200 OK\r\nContent-Encoding: gzip", SECRET),
        "it answered HTTP 200, and not as Prometheus does",
    ),
}


@pytest.mark.parametrize(("answer", "says"), RAW.values(), ids=RAW)
async def test_nothing_of_what_an_address_answers_is_repeated(answer: bytes, says: str) -> None:
    async with raw(answer) as port, ask.open_session() as session:
        with pytest.raises(ask.NoAnswerError) as raised:
            await ask.ask_prometheus(session, f"http://{PROMETHEUS}:{port}", "up")
        assert str(raised.value) == says
    async with raw(http("200 OK", sample(7))) as port, ask.open_session() as session:
        assert await ask.ask_prometheus(session, f"http://{PROMETHEUS}:{port}/prefix/", "up") == 7


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://127.0.1.9:99999", "it is no address"),
        ("http://a..b:9090", "it is no address"),
        (f"http://{'a' * 64}.example:9090", "it is no address"),
        ("http://127.0.1.100:9", "it takes no connections"),
    ],
)
async def test_an_address_that_leads_nowhere_is_trouble(address: str, says: str) -> None:
    async with ask.open_session() as session:
        with pytest.raises(ask.NoAnswerError) as raised:
            await ask.ask_prometheus(session, address, "up")
    assert str(raised.value) == says


async def test_no_cookie_is_kept_for_an_address() -> None:
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(http("200 OK\r\nSet-Cookie: a=b", sample(7)))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, ask.open_session() as session:
        port = server.sockets[0].getsockname()[1]
        for _ in range(2):
            assert await ask.ask_prometheus(session, f"http://localhost:{port}", "up") == 7
    assert len(heads) == 2
    assert b"cookie" not in heads[1].lower()


async def test_a_server_without_tls_is_not_asked_with_it(setting: Setting) -> None:
    async with ask.open_session() as session:
        with pytest.raises(ask.NoAnswerError, match="certificate is not trusted, or it speaks no TLS"):
            await ask.ask_prometheus(session, f"https://{PROMETHEUS}:{setting.server.port}", "up")


# --- its life ------------------------------------------------------------------------------------------------------------


async def test_aims_wait_for_the_gatherer_and_go_with_it() -> None:
    async with serving(STABLE, CANARY) as server:
        server.texts = {STABLE: triton_text(1), CANARY: triton_text(2)}
        cache = Cache(cast(Any, None), (), lambda key: None, lambda: START)
        cache.absorb(pod(STABLE, 1))
        cache.absorb(pod(CANARY, 2))
        gatherer = Gatherer(cache, lambda key: None, lambda: START, interval=INTERVAL, port=server.port)
        gatherer.aim(KEY, aim())
        task = asyncio.create_task(gatherer.run())
        await until(lambda: server.asked[CANARY] > 2)
        others = asyncio.all_tasks() - {task, asyncio.current_task()}
        assert any(t.get_name() == "evidence vision/digits" for t in others)
        task.cancel()
        gatherer.aim(KEY, aim("another"))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not any(t.get_name().startswith("evidence") for t in asyncio.all_tasks())
        gatherer.aim(KEY, None)


async def test_each_key_has_its_own_phase_of_the_interval() -> None:
    gatherer = Gatherer(Cache(cast(Any, None), (), print, lambda: START), print, lambda: START)
    now = asyncio.get_running_loop().time()
    turns = sorted((now + gatherer._pause(("vision", f"model-{n}"))) % 3.0 for n in range(50))
    assert all(1.0 <= gatherer._pause(("vision", f"model-{n}")) <= 4.0 for n in range(50))
    assert max(b - a for a, b in itertools.pairwise(turns)) < 0.5
    assert turns[-1] - turns[0] > 2


# --- the passes ----------------------------------------------------------------------------------------------------------


async def test_a_pass_sees_what_was_gathered_and_says_what_to_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = SimpleNamespace(requests=0)
    reconciler = reconcile.Reconciler(cast(Any, idle), INSTALLATION, (), lambda: START)
    obj = {
        "metadata": {"namespace": KEY[0], "name": KEY[1], "uid": "1", "resourceVersion": "1"},
        "spec": spec(1).model_dump(mode="json", by_alias=True, exclude_none=True),
    }
    seen: list[Gathered | None] = []
    wanted: list[Aim | None] = [aim(), aim("50"), None, aim()]

    def plan(identity: Any, spec: Any, status: Any, observed: Any, *rest: Any) -> Plan:
        seen.append(observed.gathered)
        return Plan(aim=wanted.pop(0))

    monkeypatch.setattr(reconcile, "plan", plan)
    monkeypatch.setattr(reconciler.cache, "unseen", lambda namespace: ())
    reconciler.see(obj, deleted=False)
    for _ in range(4):
        await reconciler._guarded_pass(KEY)
    assert [found and found.epoch for found in seen] == [None, "5", "50", None]
    reconciler.see(obj, deleted=True)
    assert reconciler.gatherer.gathered(KEY) is None

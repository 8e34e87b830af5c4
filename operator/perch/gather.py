"""Gathers evidence about canaries beside the passes: it asks, keeps the answers, and wakes the pass that judges them.

The planner says by an Aim what it wants gathered for a ModelDeployment and reads what there is as Gathered. Nothing is decided
here, and nothing is lost by a restart but the batches that no pass has taken in yet.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar

import aiohttp

from perch.ask import NoAnswerError, ask_pod, ask_prometheus, open_session
from perch.builders.serving import METRICS
from perch.cache import Cache, Key
from perch.counters import MAX_SKEW, CountersError, PodScrape, Scrape, Totals, counter_batch, difference, parse_counters, vanished
from perch.evidence import Aim, Batch, Gathered, Reading
from perch.kube import POD
from perch.names import LABEL_COMPONENT, LABEL_VERSION, serving_name

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 3.0
READ_EVERY = 5
"""Custom metrics are read at every so manieth interval: most of them look back over a window anyway."""
LEAST_WINDOW_SECONDS = 15
KEPT = 100
"""Batches kept for a pass that cannot take them in, the API server being away: five minutes of them.

Then the oldest go. To drop by age alone biases nothing. Merged with its successor, a batch that status has taken in already would
be counted twice or hide the other.
"""
AT_ONCE = 16
"""ModelDeployments whose pods, and as many whose Prometheus servers, are asked at one time."""
LARGE = 16 * 1024
"""A longer text than this many characters is parsed in a thread, so that it holds nothing else up: see `ask.POD_BYTES`."""


Answer = TypeVar("Answer")


def whole_seconds(moment: datetime) -> datetime:
    """As status has times: what it has taken in already is known by them."""
    return moment.replace(microsecond=0)


class Source(Protocol):
    async def look(self) -> Batch | None:
        """What happened since the last look; None at the first one, or where no honest difference can be made.

        Raises NoAnswerError or CountersError.
        """


@dataclass
class Watch:
    """A canary that is looked at."""

    aim: Aim
    since: datetime
    counts_from: datetime
    batches: deque[Batch] = field(default_factory=lambda: deque(maxlen=KEPT))
    readings: dict[str, Reading] = field(default_factory=dict)
    trouble: str | None = None
    seen_at: float | None = None
    """When a look last succeeded, by the event loop's clock, which never jumps."""
    expected_at: float | None = None
    """When the first look was due."""
    task: asyncio.Task[None] | None = None


class Gatherer:
    """One task per ModelDeployment with an aim. `changed` is called with its key when there is something new to judge."""

    def __init__(
        self,
        cache: Cache,
        changed: Callable[[Key], None],
        clock: Callable[[], datetime],
        *,
        interval: float = INTERVAL_SECONDS,
        port: int = METRICS,
    ) -> None:
        self._cache = cache
        self._changed = changed
        self._clock = clock
        self._interval = interval
        self._port = port
        self._watches: dict[Key, Watch] = {}
        self._life = uuid.uuid4().hex
        self._numbers = itertools.count(1)
        self._start: Callable[[Key, Watch], None] | None = None
        self._pods_turn = asyncio.Semaphore(AT_ONCE)
        self._prometheus_turn = asyncio.Semaphore(AT_ONCE)
        """Apart: a Prometheus server that hangs must not keep us from the pods of others."""

    def aim(self, key: Key, aim: Aim | None) -> None:
        """Gather this from now on; None: no more. The same aim again changes nothing, another epoch begins anew."""
        former = self._watches.get(key)
        if former is not None and former.aim == aim:
            return
        if former is not None:
            del self._watches[key]
            if former.task is not None:
                former.task.cancel()
        if aim is None:
            return
        same_canary = former is not None and former.aim.canary == aim.canary
        now, counts_from = self._clock(), aim.not_before + aim.behind
        watch = self._watches[key] = Watch(aim, former.since if former and same_canary else whole_seconds(now), counts_from)
        if former is not None and former.aim.epoch == aim.epoch:
            watch.batches, watch.counts_from = former.batches, max(counts_from, former.counts_from)
            watch.seen_at, watch.expected_at = former.seen_at, former.expected_at
        elif same_canary:
            # With the same weight another stable, or another share of copies, makes an epoch that began only now.
            watch.counts_from = max(counts_from, now + aim.behind)
        if self._start is not None:
            self._start(key, watch)

    def gathered(self, key: Key) -> Gathered | None:
        watch = self._watches.get(key)
        if watch is None:
            return None
        began = watch.seen_at if watch.seen_at is not None else watch.expected_at
        silent = timedelta(seconds=asyncio.get_running_loop().time() - began) if began is not None else timedelta()
        batches, readings = tuple(watch.batches), dict(watch.readings)
        return Gathered(watch.aim.epoch, watch.since, batches, readings, watch.trouble, watch.seen_at is not None, silent)

    async def run(self) -> None:
        """Work until cancelled. Aims that came before wait for it."""
        async with open_session() as session, asyncio.TaskGroup() as group:

            def start(key: Key, watch: Watch) -> None:
                watch.task = group.create_task(self._follow(session, key, watch), name=f"evidence {key[0]}/{key[1]}")

            for key, watch in self._watches.items():
                start(key, watch)
            self._start = start
            try:
                await asyncio.Event().wait()
            finally:
                # A worker that is being cancelled too may still aim.
                self._start = None

    async def _follow(self, session: aiohttp.ClientSession, key: Key, watch: Watch) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._count(session, key, watch))
            if watch.aim.metrics:
                group.create_task(self._read(session, key, watch))

    async def _count(self, session: aiohttp.ClientSession, key: Key, watch: Watch) -> None:
        aim = watch.aim
        source: Source
        if aim.requests is not None:
            source, turn = QuerySource(session, key[1], aim, self._clock), self._prometheus_turn
        else:
            source, turn = PodSource(session, self._cache, key, aim, self._clock, self._port), self._pods_turn
        await self._until(watch.counts_from)
        now = asyncio.get_running_loop().time
        watch.expected_at = watch.expected_at or now()
        while True:
            batch, trouble = None, None
            try:
                async with turn:
                    batch = await source.look()
            except (NoAnswerError, CountersError) as error:
                trouble = str(error)
            except Exception as error:
                trouble = _defect(key, error, known=watch.trouble)
            news = batch is not None or trouble != watch.trouble
            watch.trouble = trouble
            if batch is not None:
                since, until, watch.seen_at = whole_seconds(batch.since), whole_seconds(batch.until), now()
                counted = replace(batch, since=since, until=until, life=self._life, number=next(self._numbers))
                watch.batches.append(counted)
            if news:
                self._changed(key)
            await asyncio.sleep(self._pause(key))

    async def _read(self, session: aiohttp.ClientSession, key: Key, watch: Watch) -> None:
        # Sooner, the shortest window would reach back beyond the change of weights.
        await self._until(watch.aim.not_before + timedelta(seconds=LEAST_WINDOW_SECONDS))
        while True:
            async with self._prometheus_turn:
                readings = await asyncio.gather(*(self._read_one(session, key, watch, name) for name in watch.aim.metrics))
            watch.readings = {reading.name: reading for reading in readings}
            self._changed(key)
            await asyncio.sleep(self._interval * READ_EVERY)

    async def _read_one(self, session: aiohttp.ClientSession, key: Key, watch: Watch, name: str) -> Reading:
        now, aim = whole_seconds(self._clock()), watch.aim
        seconds = max(int((now - aim.not_before).total_seconds()), LEAST_WINDOW_SECONDS)
        query = aim.metrics[name].replace("{{window}}", f"{seconds}s")
        try:
            return Reading(name, now, await ask_prometheus(session, aim.address or "", query))
        except NoAnswerError as error:
            return Reading(name, now, None, f"Prometheus at {aim.address}: {error}")
        except Exception as error:
            known = watch.readings.get(name)
            return Reading(name, now, None, _defect(key, error, known=known.trouble if known else None))

    async def _until(self, moment: datetime) -> None:
        while (rest := (moment - self._clock()).total_seconds()) > 0:
            await asyncio.sleep(min(rest, self._interval))

    def _pause(self, key: Key) -> float:
        """Seconds to the key's next turn. Each key has its turns at a phase of its own, so that not all ask at the same moment.

        Never less than a third of the interval: batches are told apart by the second in which they end.
        """
        phase = zlib.crc32("/".join(key).encode()) / 2**32 * self._interval
        rest = self._interval - (asyncio.get_running_loop().time() - phase) % self._interval
        return rest if rest >= self._interval / 3 else rest + self._interval


@dataclass
class PodSource:
    """Triton's own counters, from every ready pod of both versions at once."""

    session: aiohttp.ClientSession
    cache: Cache
    key: Key
    aim: Aim
    clock: Callable[[], datetime]
    port: int
    before: Scrape | None = None
    skewed: int = 0
    """Looks in a row that took too long."""

    async def look(self) -> Batch | None:
        # The canary first: `difference` says why.
        asked = {version: self._ready(version) for version in (self.aim.canary, self.aim.stable) if version is not None}
        for version, pods in asked.items():
            if not pods:
                raise NoAnswerError(f"version {version} has no ready pod that could be asked for its counters")
        since = self.clock()
        texts = {version: await _all(self._ask(pod) for pod in pods) for version, pods in asked.items()}
        until = self.clock()
        found = [await self._parse(pod, v, text) for v in asked for pod, text in zip(asked[v], texts[v], strict=True)]
        scrape = Scrape(since, until, tuple(found))
        if scrape.skewed:
            self._note_skew(scrape)
            return None
        self.skewed = 0
        before, self.before = self.before, scrape
        return difference(before, scrape, self.aim.canary) if before is not None else None

    def _note_skew(self, scrape: Scrape) -> None:
        """A look that took too long tells nothing, and the one before still counts. Once is an accident, more is worth saying."""
        self.skewed += 1
        if self.skewed > 1:
            seconds, most = (scrape.until - scrape.since).total_seconds(), MAX_SKEW.total_seconds()
            raise NoAnswerError(
                f"asking {len(scrape.pods)} pods took {seconds:.1f} s: counters read more than {most} s apart cannot be compared"
            )

    def _ready(self, version: int) -> list[Mapping[str, Any]]:
        pods = self.cache.children(POD, self.key).values()
        return [pod for pod in pods if _serves(pod, version)]

    async def _ask(self, pod: Mapping[str, Any]) -> str:
        try:
            return await ask_pod(self.session, pod["status"]["podIP"], self.port)
        except NoAnswerError as error:
            raise self._blame(pod, error) from None

    async def _parse(self, pod: Mapping[str, Any], version: int, text: str) -> PodScrape:
        await asyncio.sleep(0)  # hundreds of pods are parsed one by one, others in between
        try:
            if len(text) > LARGE:
                counters = await asyncio.to_thread(parse_counters, text, self.aim.model, version)
            else:
                counters = parse_counters(text, self.aim.model, version)
        except CountersError as error:
            raise self._blame(pod, error) from None
        return PodScrape(_incarnation(pod), version, counters)

    def _blame(self, pod: Mapping[str, Any], error: Exception) -> NoAnswerError:
        return NoAnswerError(f"pod {pod['metadata']['name']}, port {self.port}: {error}")


@dataclass
class QuerySource:
    """Counters that Prometheus has of what a gateway, or somebody else, saw."""

    session: aiohttp.ClientSession
    name: str
    aim: Aim
    clock: Callable[[], datetime]
    before: Totals | None = None

    async def look(self) -> Batch | None:
        # All queries are about one moment, whenever they are answered.
        at = self.clock()
        asked = [(what, v) for v in (self.aim.stable, self.aim.canary) if v is not None for what in ("requests", "failures")]
        values = await _all(self._ask(what, version, at) for what, version in asked)
        without_stable = [0.0, 0.0] if self.aim.stable is None else []
        totals = Totals(at, *without_stable, *values)
        if self.before is not None and vanished(self.before, totals):
            raise NoAnswerError(f"Prometheus at {self.aim.address}: the requests of a version fell to 0")
        before, self.before = self.before, totals
        return counter_batch(before, self.before) if before is not None else None

    async def _ask(self, what: str, version: int, at: datetime) -> float:
        query = str(self.aim.requests if what == "requests" else self.aim.failures)
        query = query.replace("{{version}}", str(version)).replace("{{service}}", serving_name(self.name, version))
        try:
            return await ask_prometheus(self.session, str(self.aim.address), query, at)
        except NoAnswerError as error:
            raise NoAnswerError(f"Prometheus at {self.aim.address}, {what} of version {version}: {error}") from None


def _defect(key: Key, error: Exception, known: str | None) -> str:
    """An error that concerns one ModelDeployment only must not end the others'. It is logged once, not at every look."""
    said = f"Perch failed to read it ({type(error).__name__}): its log says more"
    if said != known:
        log.error("%s/%s: this is a defect of Perch: no evidence", *key, exc_info=error)
    return said


def _serves(pod: Mapping[str, Any], version: int) -> bool:
    labels, status = pod["metadata"]["labels"], pod.get("status", {})
    return (
        labels.get(LABEL_COMPONENT) == "triton"
        and labels.get(LABEL_VERSION) == str(version)
        and "deletionTimestamp" not in pod["metadata"]
        and bool(status.get("podIP"))
        and any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", []))
    )


def _incarnation(pod: Mapping[str, Any]) -> str:
    """The pod and the start of its Triton, as a PodScrape names them."""
    containers = pod["status"].get("containerStatuses", [])
    started = next((c.get("containerID", "") for c in containers if c["name"] == "triton"), "")
    return f"{pod['metadata']['name']}/{started}"


async def _all(questions: Iterable[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """All answers, asked for at once. Raises NoAnswerError of the first that did not come, with the number of others."""
    answers = await asyncio.gather(*questions, return_exceptions=True)
    troubles = [a for a in answers if isinstance(a, NoAnswerError)]
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, NoAnswerError):
            raise answer
    if troubles:
        others = f" (and {len(troubles) - 1} more)" if len(troubles) > 1 else ""
        raise NoAnswerError(f"{troubles[0]}{others}")
    return [a for a in answers if not isinstance(a, BaseException)]

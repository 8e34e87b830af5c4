"""The loop: a keyed queue woken by watch events and by the plans' own deadlines; a pass is observe, plan, execute, write status.

Level-triggered: a pass looks at how things stand, never at what changed. One ModelDeployment is never in two passes at once.
Nothing polls the API server: a settled ModelDeployment costs nothing until something of it changes or its next deadline comes.
While a canary is judged, `gather` asks its pods and wakes the passes that judge it.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from perch import metrics
from perch.api import Phase, Spec, Status
from perch.cache import Cache, Key, older
from perch.clock import SteadyClock
from perch.execute import NamespaceTerminatingError, Outcome, execute, post_events, write_status
from perch.gather import Gatherer
from perch.kube import MODEL_DEPLOYMENT, SILENCE, ApiError, Kube
from perch.lease import LeaseLostError
from perch.names import FINALIZER
from perch.observe import claims, observe
from perch.observed import Identity, Installation
from perch.plan import Plan, SetFinalizer, plan, plan_invalid, say_invalid
from perch.status import build_events, with_blindness, with_failures, with_faults

log = logging.getLogger(__name__)

WORKERS = 8
RETRY_SECONDS = (1, 2, 5, 10, 30)
REFUSED_RETRY_SECONDS = (2, 5, 15, 30)
STALE_RETRY_SECONDS = (0.2, 0.5, 1, 2, 5)
SAVES = 3
"""So often a status is written anew where something else of the object (a label, an annotation) changed meanwhile."""
DELAYS = {"error": RETRY_SECONDS, "refused": REFUSED_RETRY_SECONDS, "stale": STALE_RETRY_SECONDS}


class Queue:
    """Keys that wait for a pass, each at most once; and a heap of keys that wait for a time."""

    def __init__(self) -> None:
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._waiting: set[Key] = set()
        self._busy: set[Key] = set()
        self._again: set[Key] = set()
        self._heap: list[tuple[float, int, Key]] = []
        self._due: dict[Key, float] = {}
        self._count = itertools.count()
        self._heap_changed = asyncio.Event()

    def add(self, key: Key) -> None:
        """A pass over `key` will begin after now, even where one is under way."""
        if key in self._busy:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)
        metrics.QUEUE_DEPTH.set(len(self._waiting))

    def add_after(self, key: Key, seconds: float) -> None:
        """Wake `key` after so many seconds; its former deadline, if any, no longer counts."""
        due = asyncio.get_running_loop().time() + max(seconds, 0.05)
        self._due[key] = due
        heapq.heappush(self._heap, (due, next(self._count), key))
        self._heap_changed.set()

    def no_deadline(self, key: Key) -> None:
        self._due.pop(key, None)

    async def take(self) -> Key:
        key = await self._ready.get()
        self._waiting.discard(key)
        metrics.QUEUE_DEPTH.set(len(self._waiting))
        self._busy.add(key)
        return key

    def done(self, key: Key) -> None:
        self._busy.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    async def run_deadlines(self) -> None:
        """Move keys whose time has come to the queue. Runs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            while self._heap and self._heap[0][0] <= loop.time():
                due, _, key = heapq.heappop(self._heap)
                if self._due.get(key) == due:
                    del self._due[key]
                    self.add(key)
            pause = self._heap[0][0] - loop.time() if self._heap else None
            self._heap_changed.clear()
            try:
                await asyncio.wait_for(self._heap_changed.wait(), pause)
            except TimeoutError:
                continue


class Reconciler:
    """Holds the ModelDeployments that the watch brought, and runs passes over them."""

    def __init__(
        self, kube: Kube, installation: Installation, namespaces: tuple[str, ...], clock: Callable[[], datetime] | None = None
    ) -> None:
        self._kube = kube
        self._installation = installation
        self._clock = clock or SteadyClock()
        self._objects: dict[Key, dict[str, Any]] = {}
        self._errors: Counter[Key] = Counter()
        self.leading = False
        """Set once the Lease is held."""
        self.queue = Queue()
        self._contesting: set[Key] = set()
        """Those that want a host name of another one, and wait for it to go."""
        self.cache = Cache(kube, namespaces, self._wake, self._clock, self._wake_namespace)
        self.gatherer = Gatherer(self.cache, self.queue.add, self._clock)

    def see(self, obj: Mapping[str, Any], deleted: bool) -> None:
        """Take in an event of the ModelDeployment watch."""
        key = (obj["metadata"]["namespace"], obj["metadata"]["name"])
        if deleted:
            self._drop(key, obj["metadata"]["uid"])
            return
        known = self._objects.get(key)
        if known is None or not older(obj, known):
            self._objects[key] = dict(obj)
        self.queue.add(key)
        if known is not None and known["metadata"].get("generation") != obj["metadata"].get("generation"):
            self._wake_contesting()

    def _wake(self, owner: Key) -> None:
        """A child of the owner changed. It may be the route that others wait for."""
        self.queue.add(owner)
        self._wake_contesting()

    def _wake_contesting(self) -> None:
        for key in self._contesting:
            self.queue.add(key)

    def _wake_namespace(self, namespace: str | None) -> None:
        for key in self._objects:
            if namespace in (None, key[0]):
                self.queue.add(key)

    def _drop(self, key: Key, uid: str) -> None:
        """Forget an object that is gone. A new one of the same name, whose event may come first, stays."""
        if key in self._objects and self._objects[key]["metadata"]["uid"] == uid:
            del self._objects[key]
            self._errors.pop(key, None)
            self._contesting.discard(key)
            self._wake_contesting()
            self.queue.no_deadline(key)
            self.gatherer.aim(key, None)

    def _take_in(self, key: Key, obj: dict[str, Any]) -> None:
        """Take in what a write returned, unless the object went or was replaced while the answer was on its way."""
        known = self._objects.get(key)
        if known is not None and known["metadata"]["uid"] == obj["metadata"]["uid"] and not older(obj, known):
            self._objects[key] = obj

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.cache.run(), name="caches")
            group.create_task(self.queue.run_deadlines(), name="deadlines")
            group.create_task(self.gatherer.run(), name="evidence")
            for number in range(WORKERS):
                group.create_task(self._work(), name=f"worker {number}")

    async def _work(self) -> None:
        while True:
            key = await self.queue.take()
            try:
                await self._guarded_pass(key)
            finally:
                self.queue.done(key)

    async def _guarded_pass(self, key: Key) -> None:
        """A pass whose errors concern this one ModelDeployment only: they are logged, counted and tried again later."""
        with metrics.RECONCILE_SECONDS.time():
            try:
                await self._pass(key)
            except (ApiError, *SILENCE) as error:
                self._retry(key)
                log.warning("%s/%s: the API server did not take it, trying again: %s", *key, error)
            except LeaseLostError:
                raise
            except Exception:
                self._retry(key)
                log.exception("%s/%s: this is a defect of Perch; what serves is untouched", *key)
        metrics.API_REQUESTS.set(self._kube.requests)

    def _retry(self, key: Key) -> None:
        metrics.RECONCILES.labels("error").inc()
        self._errors[key] += 1
        self.queue.add_after(key, RETRY_SECONDS[min(self._errors[key], len(RETRY_SECONDS)) - 1])

    async def _pass(self, key: Key) -> None:
        obj = self._objects.get(key)
        if obj is None:
            return
        # The planner's times are whole seconds, as those in a status are.
        now = self._clock().replace(microsecond=0)
        identity = read_identity(obj)
        before = read_status(obj)
        if self.cache.unseen(key[0]):
            # What is not seen is not gone. The cache wakes the pass when it can see.
            if self.cache.trouble(key[0]):
                await self._tell(key, obj, before, Plan(status=before), Outcome(), now)
            return
        decided = self._decide(obj, identity, before, now)
        for fault in decided.faults:
            log.error("%s/%s: %s: this is a defect of Perch; the rest is carried out", *key, fault, exc_info=fault.error)
        seen: dict[str, Any] | None = obj
        if decided.actions:
            seen = await self._look(key, obj)
        if seen is not None and decided.first is not None:
            seen = await self._record(key, seen, decided.first)
        if seen is None:
            return
        identity = read_identity(seen)
        if identity.deleting_since is not None:
            # Before the finalizer goes: afterwards nobody would tell what was left.
            await post_events(self._kube, identity, decided.events, now)
        try:
            outcome = await execute(self._kube, self.cache, identity, decided.actions)
        except NamespaceTerminatingError:
            # Without the namespace no cleanup can run: let go, so that nothing hangs. Without a finalizer there is nothing to do.
            if identity.deleting_since is None or FINALIZER not in identity.finalizers:
                return
            decided = self._decide(obj, identity, before, now, namespace_terminating=True)
            await post_events(self._kube, identity, decided.events, now, namespace_terminating=True)
            outcome = await execute(self._kube, self.cache, identity, [a for a in decided.actions if isinstance(a, SetFinalizer)])
        if outcome.found:
            self.queue.add(key)
            return
        if outcome.owner is not None:
            seen = outcome.owner
            self._take_in(key, seen)
        if decided.status is not None and identity.deleting_since is None:
            await self._tell(key, seen, before, decided, outcome, now)
        if key in self._objects:
            self.gatherer.aim(key, decided.aim)
            (self._contesting.add if decided.contests else self._contesting.discard)(key)
        self._schedule(key, decided, outcome)

    async def _look(self, key: Key, seen: Mapping[str, Any]) -> dict[str, Any] | None:
        """The object as it is now; None where another pass is due: it is gone, replaced, or of another mind than it was `seen`.

        Looked at before acting, since a watch may have lost events. Another status is another operator's: what this one has
        decided from the former must not be written.
        """
        identity = read_identity(seen)
        try:
            live = await self._kube.get(MODEL_DEPLOYMENT, identity.namespace, identity.name)
        except ApiError as error:
            if error.status != 404:
                raise
            self._drop(key, identity.uid)
            return None
        found = read_identity(live)
        same = (found.uid, found.generation, live.get("status")) == (identity.uid, identity.generation, seen.get("status"))
        if same and (found.deleting_since is None) == (identity.deleting_since is None):
            return live
        self._objects[key] = live
        self.queue.add(key)
        return None

    async def _save(self, key: Key, seen: dict[str, Any], status: Status) -> dict[str, Any] | None:
        """Write the status in place of the one that was `seen`, and return the object; None where another pass is due."""
        for _ in range(SAVES):
            try:
                written = await write_status(self._kube, seen, status)
            except ApiError as error:
                if error.status == 404:
                    self._drop(key, seen["metadata"]["uid"])
                    return None
                if error.status != 409:
                    raise
            else:
                self._take_in(key, written)
                return written
            live = await self._look(key, seen)
            if live is None:
                return None
            seen = live
        self.queue.add(key)
        return None

    async def _record(self, key: Key, seen: dict[str, Any], status: Status) -> dict[str, Any] | None:
        """Write down an abort before it is done. Where the API server does not take it, the abort is done all the same."""
        try:
            return await self._save(key, seen, status)
        except (ApiError, *SILENCE) as error:
            log.warning("%s/%s: an abort is done that could not be recorded before: %s", *key, error)
            return seen

    async def _tell(self, key: Key, seen: dict[str, Any], before: Status, decided: Plan, outcome: Outcome, now: datetime) -> None:
        """Write the status if it changed, and post an event for each transition."""
        after = decided.status or before
        if decided.faults:
            after = with_faults(after, decided.faults, now)
        if outcome.refused:
            after = with_failures(after, outcome.refused, now)
        if trouble := self.cache.trouble(key[0]):
            after = with_blindness(after, trouble, now)
        if after != read_status(seen) and await self._save(key, seen, after) is None:
            outcome.stale = True
            return
        await post_events(self._kube, read_identity(seen), (*decided.events, *build_events(before, after)), now)

    def _decide(
        self, obj: Mapping[str, Any], identity: Identity, before: Status, now: datetime, *, namespace_terminating: bool = False
    ) -> Plan:
        key = (identity.namespace, identity.name)
        observed = replace(
            observe(self.cache, key, identity.uid),
            gathered=self.gatherer.gathered(key),
            watching_since=self.cache.watching_since(key[0]),
            namespace_terminating=namespace_terminating,
        )
        try:
            spec = Spec.model_validate(obj["spec"])
        except ValidationError as error:
            if identity.deleting_since is not None:
                return Plan((SetFinalizer(False),) if FINALIZER in identity.finalizers else (), before)
            why = say_invalid(error, "spec")
            return plan_invalid(identity, obj["spec"], why, before, observed, self._installation, now)
        observed = replace(observed, claims=claims(self.cache, key, spec.routing, self._objects))
        return plan(identity, spec, before, observed, self._installation, now)

    def _schedule(self, key: Key, decided: Plan, outcome: Outcome) -> None:
        waits = [(decided.wake_at - self._clock()).total_seconds()] if decided.wake_at else []
        trouble = "error" if decided.faults else "refused" if outcome.refused else "stale" if outcome.stale else None
        if trouble is not None:
            self._errors[key] += 1
            delays = DELAYS[trouble]
            waits.append(delays[min(self._errors[key], len(delays)) - 1])
        else:
            self._errors.pop(key, None)
        metrics.RECONCILES.labels(trouble or "done").inc()
        if waits:
            self.queue.add_after(key, min(waits))
        else:
            self.queue.no_deadline(key)

    def count(self) -> None:
        """Bring the gauges up to date; called when they are scraped."""
        phases: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for obj in self._objects.values():
            status = read_status(obj)
            phases.update(v.phase.value for v in status.versions)
            ready = status.condition("Ready")
            reasons[ready.reason if ready else "Unseen"] += 1
        for phase in Phase:
            metrics.VERSIONS.labels(phase.value).set(phases[phase.value])
        metrics.MODEL_DEPLOYMENTS.clear()
        for reason, number in reasons.items():
            metrics.MODEL_DEPLOYMENTS.labels(reason).set(number)
        metrics.API_REQUESTS.set(self._kube.requests)


def read_status(obj: Mapping[str, Any]) -> Status:
    """The status without what another release, or somebody's hand, wrote into it and this one cannot read.

    The rest stays: above all no canary that was aborted may be forgotten for another field's sake.
    """
    content = dict(obj.get("status") or {})
    try:
        return Status.model_validate(content)
    except ValidationError as error:
        log.warning("%s/%s: a part of status is left out: %s", obj["metadata"]["namespace"], obj["metadata"]["name"], error)
        wrong: dict[str, set[Any]] = {}
        for complaint in error.errors():
            field, *place = complaint["loc"]
            wrong.setdefault(str(field), set()).add(place[0] if place else None)
    for field, places in wrong.items():
        whole, entries = None in places, content[field]
        content[field] = None if whole or not isinstance(entries, list) else [e for i, e in enumerate(entries) if i not in places]
    return Status.model_validate({field: value for field, value in content.items() if value is not None})


def read_identity(obj: Mapping[str, Any]) -> Identity:
    metadata = obj["metadata"]
    return Identity(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 0),
        resource_version=metadata["resourceVersion"],
        finalizers=tuple(metadata.get("finalizers", ())),
        deleting_since=datetime.fromisoformat(metadata["deletionTimestamp"]) if "deletionTimestamp" in metadata else None,
    )

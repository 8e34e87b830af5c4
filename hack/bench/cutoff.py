"""How soon Perch takes a broken canary out on a whole cluster, what it answered until then, and how fast a good one goes on.

    python -m bench.cutoff --cluster NAME          # leaves the cluster running

The canary is one published model (`faults`): what is wrong with it, and how often, is chosen request by request. Each trial
commits it as the canary with another retryAt, under load, and reverts at its end. Cut off is when the Gateway has accepted the
route in which it has weight 0; the load's own record says what the canary answered until then and thereafter.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from numpy.typing import NDArray

from bench.journey import fresh, lenet_entry
from demo.digits import held_out
from demo.load import Load
from demo.manifests import deployment
from devcluster import Cluster
from devcluster.release import install
from devcluster.tenant import Tenant
from faults import Kind, Pixels, is_marked, mark
from faults.publish import publish
from perch.builders.serving import METRICS
from perch.counters import parse_counters
from perch.gather import INTERVAL_SECONDS
from perch.kube import MODEL_DEPLOYMENT, ROUTE, Kube
from perch.kube import Kind as Resource
from perch.observe import route_facts

NAME = "digits"
STABLE, PLAIN, BATCHING = 1, 2, 3
"""Versions. The last two are the same faulty model, of which the last batches dynamically."""
BATCH = 32
WEIGHT = 20
TRIALS = 3
LIMIT = 240.0
"""Seconds at the canary's weight after which a trial ends without a verdict."""
BEFORE, AFTER = 2.0, 3.0
"""Seconds of load on stable alone."""
IN_FLIGHT = 8
WAIT = 90.0
"""Seconds for whatever is not measured."""
SLOWER = 2.0
TURNS = (1, 2, 4, 6, 8, 10)
CALIBRATED = 5.0
"""Seconds of load for one look at how slow a marked request is."""
HOLD = 10
STEPS = range(10, 100, 10)
STEP_RATE = 100.0
END = {"weight": 100}


@dataclass(frozen=True)
class Case:
    name: str
    rate: float
    """Requests per second, of all versions."""
    share: float = 1.0
    """Of the requests, which the canary fails or is slow on."""
    kind: Kind = Kind.ERROR
    version: int = PLAIN
    analysis: dict[str, str] = field(default_factory=dict)


RATES = (5.0, 50.0, 200.0)
CASES = [
    *(Case(f"{share:.0%} fail", rate, share) for share in (1.0, 0.2, 0.05) for rate in RATES),
    *(Case(f"100% fail, batches of up to {BATCH}", rate, version=BATCHING) for rate in RATES),
    *(Case("slow", rate, kind=Kind.SLOW, analysis={"maxLatencyRatio": "1.5"}) for rate in RATES),
]


@dataclass(frozen=True)
class Seen:
    """The route at a moment, as a watch told it. Times are by time.monotonic()."""

    at: float
    weight: int
    """The canary's."""
    accepted: bool


class Watch:
    """What a ModelDeployment's route and its step went through, by watches of its namespace."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self.routes: list[Seen] = []
        self.until: dict[int, float] = {}
        """Ends of holds by the step's weight, as status says them last, by time.time()."""
        self._stop, self._started = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch()), daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        assert self._started.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)

    async def _watch(self) -> None:
        kube = await Kube.connect()
        looks = [(ROUTE, self._see_route), (MODEL_DEPLOYMENT, self._see_step)]
        tasks = [asyncio.create_task(self._follow(kube, kind, see)) for kind, see in looks]
        self._started.set()
        # A watch that ends by an error ends the thread: what is not seen must not pass for a canary that was not cut off.
        while not self._stop.is_set() and not any(task.done() for task in tasks):
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await kube.close()

    async def _follow(self, kube: Kube, kind: Resource, see: Callable[[dict[str, Any]], None]) -> None:
        while True:
            found, version = await kube.list(kind, self._namespace, {})
            for obj in found:
                see(obj)
            async for _, obj in kube.watch(kind, self._namespace, {}, version):
                if "spec" in obj:  # no bookmark
                    see(obj)

    def _see_route(self, obj: dict[str, Any]) -> None:
        route = route_facts(obj, NAME)
        canary = sum(weight for version, weight in route.weights.items() if version != STABLE)
        self.routes.append(Seen(time.monotonic(), canary, route.accepted))

    def _see_step(self, obj: dict[str, Any]) -> None:
        step = obj.get("status", {}).get("step") or {}
        if "until" in step:
            self.until[step["weight"]] = datetime.fromisoformat(step["until"]).timestamp()

    def when(self, weight: int, after: float, *, accepted: bool = True) -> float | None:
        """When the canary's weight was first this after that moment (and accepted)."""
        return next((s.at for s in self.routes if s.at > after and s.weight == weight and (s.accepted or not accepted)), None)

    def wait(self, weight: int, after: float, timeout: float) -> float | None:
        deadline = time.monotonic() + timeout
        while (found := self.when(weight, after)) is None and time.monotonic() < deadline:
            assert self._thread.is_alive(), "the watch broke off"
            time.sleep(0.1)
        return found


@dataclass(frozen=True)
class Trial:
    """Times are seconds since the canary's first request was sent; None where it was not cut off."""

    case: str
    asked_rate: float
    rate: float
    requests: int
    """Answered or failed by the canary, from first to last."""
    failed: int
    reason: str | None
    message: str | None
    first_failure: float | None
    written: float | None
    """The route has weight 0."""
    accepted: float | None
    last: float | None
    lost: int
    """Failed requests that the canary was not asked to fail."""
    load_average: float

    def of(self, case: Case) -> bool:
        return (self.case, self.asked_rate) == (case.name, case.rate)


class Bench:
    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.host = f"{NAME}.{tenant.namespace}.example.com"
        plain = {"maxBatchSize": BATCH}
        batching = {**plain, "dynamicBatching": {"maxQueueDelayMicroseconds": 500}}
        self.entries = [
            {**lenet_entry(tenant, STABLE), "triton": plain},
            {**lenet_entry(tenant, PLAIN), "triton": plain},
            {**lenet_entry(tenant, PLAIN), "version": BATCHING, "triton": batching},
        ]

    def set_up(self) -> None:
        for version in (PLAIN, BATCHING):
            publish(self.tenant, self._manifest(version, []), version)
        self.revert()

    def _manifest(self, canary: int | None, steps: list[dict[str, Any]], **analysis: str) -> dict[str, Any]:
        rollout = {
            # Longer than any trial: the canary's pods stand ready for the next one.
            "scaleDownDelay": "15m",
            "steps": steps or [END],
            "retryAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "analysis": analysis,
        }
        return deployment(self.tenant, self.entries, STABLE, canary, NAME, rollout=rollout)

    def revert(self) -> None:
        self.tenant.apply(self._manifest(None, []))
        self.tenant.wait_ready(NAME, "Serving")

    def load(self, rate: float, images: Pixels) -> Load:
        return Load(self.tenant.cluster.gateway_address(), self.host, NAME, grpc_rate=rate, images=images, in_flight=IN_FLIGHT)

    # -- a good canary

    def steps(self) -> dict[str, Any]:
        """A good canary goes through all steps; seconds above each hold."""
        steps = [{"weight": weight, "hold": f"{HOLD}s"} for weight in STEPS]
        with self.load(STEP_RATE, held_out()[0]) as load, Watch(self.tenant.namespace) as watch:
            began = time.monotonic()
            # 30 requests a step: what the hold has time for.
            self.tenant.apply(self._manifest(PLAIN, [*steps, END], maxErrorRate="0.1"))
            self.tenant.wait_ready(NAME, "AwaitingPromotion", WAIT + 3 * HOLD * len(steps))
        self.revert()
        wall = time.time() - time.monotonic()
        accepted = [watch.when(weight, began) for weight in (*STEPS, 100)]
        written = [watch.when(weight, began, accepted=False) for weight in (*STEPS, 100)]
        ends = [watch.until[weight] - wall for weight in STEPS]
        return {
            "transitions": len(ends),
            "seconds from the end of the hold to the next weight accepted": _spread(_minus(accepted[1:], ends)),
            "of it until the route was written": _spread(_minus(written[1:], ends)),
            "seconds between acceptances, less the hold": _spread(
                [gap - HOLD for gap in _minus(accepted[1:], [at or 0.0 for at in accepted[:-1]])]
            ),
            "requests": len(load.results()),
            "failed": sum(not answer.ok for answer in load.results()),
        }

    # -- a slow one

    def calibrate(self) -> tuple[int, dict[int, float]]:
        """The turns of a slow answer's loop that make it about SLOWER times as long as stable's, and the ratio at each tried."""
        self.tenant.apply(self._manifest(PLAIN, [{"weight": 50, "hold": "Indefinite"}]))
        self.tenant.wait_ready(NAME, "SplitHeld")
        ratios: dict[int, float] = {}
        for turns in TURNS:
            images = mark(held_out()[0], Kind.SLOW, turns=turns)
            before = self._mean_times()
            with self.load(RATES[1], images):
                time.sleep(CALIBRATED)
            stable, canary = (
                (now[0] - then[0]) / (now[1] - then[1]) for then, now in zip(before, self._mean_times(), strict=True)
            )
            ratios[turns] = round(canary / stable, 2)
        self.revert()
        # A line through all of them: single ones vary with whatever else the machine does.
        slope, start = np.polyfit(list(ratios), list(ratios.values()), 1)
        return max(1, round((SLOWER - start) / slope)), ratios

    def _mean_times(self) -> list[tuple[int, int]]:
        """Microseconds without the queue, and answers, of stable and the canary by their Tritons' own count."""
        found = []
        for version in (STABLE, PLAIN):
            (pod,) = self.tenant.list("pods", f"serving.perch.dev/component=triton,serving.perch.dev/version={version}")
            text = httpx.get(f"http://{pod['status']['podIP']}:{METRICS}/metrics").text
            counters = parse_counters(text, NAME, version)
            found.append((counters.request_microseconds - counters.queue_microseconds, counters.succeeded))
        return found

    # -- a broken one

    def trial(self, case: Case, turns: int, seed: int) -> Trial:
        # Never the same list twice: where a list comes around, the same images might go to the canary again and again.
        count = int(case.rate * (WAIT + LIMIT + BEFORE + AFTER))
        images = mark(held_out()[0], case.kind, share=case.share, count=count, turns=turns, seed=seed)
        began = time.monotonic()
        with self.load(case.rate, images) as load, Watch(self.tenant.namespace) as watch:
            # Trials follow each other's end, which is a look of the operator's: without chance all would meet its looks alike.
            time.sleep(BEFORE + random.Random(seed).uniform(0, INTERVAL_SECONDS))
            self.tenant.apply(self._manifest(case.version, [{"weight": WEIGHT, "hold": "1h"}, END], **case.analysis))
            shifted = watch.wait(WEIGHT, began, WAIT)
            assert shifted is not None, self.tenant.condition(NAME)
            accepted = watch.wait(0, shifted, LIMIT)
            if accepted is not None:
                time.sleep(AFTER)
        written = watch.when(0, shifted, accepted=False)
        found = [a for a in self.tenant.status(NAME).get("aborted", []) if a["version"] == case.version]
        aborted = found[0] if accepted is not None else {}
        load_average = os.getloadavg()[0]
        self.revert()
        return _tell(case, load, is_marked(images), (written, accepted), aborted, load_average)


def _tell(
    case: Case,
    load: Load,
    marked: NDArray[np.bool_],
    cut: tuple[float | None, float | None],
    aborted: dict[str, Any],
    load_average: float,
) -> Trial:
    answers = load.results()
    broken = [a for a in answers if not a.ok and case.kind is Kind.ERROR and marked[a.image]]
    canary = [*broken, *(a for a in answers if a.version == str(case.version))]
    first = min(a.sent for a in canary)

    def since(moment: float | None) -> float | None:
        return None if moment is None else round(moment - first, 2)

    written, accepted = cut
    return Trial(
        case=case.name,
        asked_rate=case.rate,
        rate=round(len(answers) / (max(a.answered for a in answers) - min(a.sent for a in answers)), 1),
        requests=len(canary),
        failed=len(broken),
        reason=aborted.get("reason"),
        message=aborted.get("message"),
        first_failure=since(min((a.sent for a in broken), default=None)),
        written=since(written),
        accepted=since(accepted),
        last=since(max(a.answered for a in canary)) if accepted else None,
        lost=sum(not a.ok for a in answers) - len(broken),
        load_average=round(load_average, 1),
    )


def _row(trials: list[Trial]) -> dict[str, Any]:
    """Trials of one case, each in its place in every list."""
    lists = ("rate", "requests", "failed", "reason", "first_failure", "accepted", "last", "lost", "load_average")
    same = {"case": trials[0].case, "asked_rate": trials[0].asked_rate}
    return same | {name: [getattr(trial, name) for trial in trials] for name in lists}


def _minus(later: list[float | None], earlier: list[float]) -> list[float]:
    return [a - b for a, b in zip(later, earlier, strict=True) if a is not None]


def _spread(values: list[float]) -> list[float]:
    """Median, least and most."""
    return [round(value, 2) for value in (statistics.median(values), min(values), max(values))]


def measure(cluster: Cluster) -> dict[str, Any]:
    os.environ["KUBECONFIG"] = str(cluster.kubeconfig)
    with fresh(cluster, "bench-cutoff") as tenant:
        bench = Bench(tenant)
        bench.set_up()
        turns, ratios = bench.calibrate()
        report: dict[str, Any] = {"times as long by turns of the loop": ratios, "turns": turns}
        report["from step to step"] = bench.steps()
        print(json.dumps(report), file=sys.stderr, flush=True)
        trials = []
        # All cases in turn, and then again: what disturbs the machine for a while disturbs no case alone.
        for seed, case in enumerate(CASES * TRIALS):
            trials.append(bench.trial(case, turns, seed))
            print(json.dumps(asdict(trials[-1])), file=sys.stderr, flush=True)
    report["cut off"] = [_row([trial for trial in trials if trial.of(case)]) for case in CASES]
    return report


def main(cluster: Annotated[str, typer.Option(help="the cluster's name")] = "bench") -> None:
    target = Cluster(cluster, gpus=0)
    target.up()
    install(target)
    print(json.dumps(measure(target), indent=1))


if __name__ == "__main__":
    typer.run(main)

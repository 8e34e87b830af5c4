"""Raises every kind of failure in a live canary and writes down what each counter said: `python -m faults.probe --cluster NAME`.

The figures go to docs/evidence.md, which this command writes as a whole; what Perch claims to notice must stand there.
"""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from demo.load import Load
from devcluster import Cluster
from devcluster.release import install
from faults import Kind, report
from faults.cases import CASES, Case, Play
from faults.client import PROTOCOLS, Client, Protocol, Request
from faults.counters import PENDING, Counts, Page, changes, fetch, read_triton
from faults.report import Findings, Golden, Row, Scrapes, Split
from faults.stage import CANARY, FAULTY, FILTERED, MODEL, NOBODY, ORPHANED, PLAIN, WEIGHTS, Backend, Stage
from perch.builders.serving import METRICS

EVIDENCE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"
SETTLED = 1.0
"""Seconds for which nothing may change before the counters are read."""
READY = "ready"
SPLIT_REQUESTS = 500
SCRAPES = 200
LOAD = 50.0
"""Requests per second while scrapes are timed under load."""


@dataclass
class Pending:
    """Reads a model's pending requests all the time, from a thread of its own."""

    url: str
    model: str
    version: str
    most: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Pending":
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            try:
                counts = read_triton(fetch(self.url).text, self.model, self.version)
            except httpx.HTTPError:
                continue
            self.most = max(self.most, counts.get(PENDING, 0))


def observe(stage: Stage, case: Case, protocol: Protocol) -> Row:
    client = stage.client(case.backend)
    play = Play(stage, client, protocol, case.model)
    envoy = stage.envoy()
    if case.backend is NOBODY:
        outcomes = case.act(play)
        return Row(case, protocol, outcomes, {}, None, False, changes(envoy, stage.envoy()), "")
    before, restarts = stage.triton(case.backend, case.model), _restarts(stage, case.backend)
    with Pending(f"http://{stage.address(case.backend)}:{METRICS}/metrics", case.model, case.backend.version) as pending:
        outcomes = case.act(play)
    client.close()
    if not case.lasting:
        stage.wait_ready(case.backend)
    after, pod = _settled(stage, case), _pod_words(stage, case.backend, restarts)
    anew = _restarts(stage, case.backend) > restarts
    triton = changes({} if anew else before, after)
    row = Row(case, protocol, outcomes, triton, pending.most, anew, changes(envoy, stage.envoy()), pod)
    if case.lasting or anew:  # the kubelet lets a container that dies again wait ever longer
        stage.restart(case.backend)
    return row


def _settled(stage: Stage, case: Case) -> Counts:
    """The counters when they have stood still for a while: a request that its client gave up may be computed on."""
    last, since = stage.triton(case.backend, case.model), time.monotonic()
    while time.monotonic() - since < SETTLED:
        time.sleep(0.05)
        now = stage.triton(case.backend, case.model)
        if now != last:
            last, since = now, time.monotonic()
    return last


def _container(stage: Stage, backend: Backend) -> dict[str, Any]:
    return next(c for c in stage.pod(backend)["status"]["containerStatuses"] if c["name"] == "triton")


def _restarts(stage: Stage, backend: Backend) -> int:
    return int(_container(stage, backend)["restartCount"])


def _pod_words(stage: Stage, backend: Backend, restarts: int) -> str:
    container = _container(stage, backend)
    ready = READY if container["ready"] else "not ready"
    again = container["restartCount"] - restarts
    if not again:
        return ready
    ended = container["lastState"].get("terminated", {})
    return f"restarted {again}× ({ended.get('reason')}, exit {ended.get('exitCode')})"


# -- what is measured besides


def golden(stage: Stage) -> Golden:
    """What the golden check itself leaves in the counters: of a pod that nobody has asked yet, and of a sidecar that comes back."""
    first = stage.triton(CANARY)
    for process in stage.processes(CANARY, "perch_exporter golden"):
        process.kill()
    stage.tenant.wait(lambda: stage.triton(CANARY), lambda now: now["success"] > first["success"], 120)
    again = changes(first, _settled(stage, CASES[0]))
    stage.wait_ready(CANARY)
    return Golden(first["success"], first["inferences"], again["success"])


def scrapes(stage: Stage) -> Scrapes:
    """How long a look at the counters takes, and how soon after an answer it shows it."""
    url = f"http://{stage.address(CANARY)}:{METRICS}/metrics"
    idle = [fetch(url) for _ in range(SCRAPES)]
    address, host = stage.cluster.gateway_address(), f"{FAULTY}.{stage.tenant.namespace}.example.com"
    with Load(address, host, MODEL, grpc_rate=LOAD, rest_rate=LOAD, in_flight=4):
        time.sleep(1)
        busy = [fetch(url) for _ in range(SCRAPES)]
    late = [_seconds_until_seen(stage, url, protocol) for protocol in PROTOCOLS for _ in range(SCRAPES // 4)]
    return Scrapes(idle, busy, stage.envoy_page(), late)


def _seconds_until_seen(stage: Stage, url: str, protocol: Protocol) -> float:
    """From the answer until a look that shows it began; 0 where the first look showed it."""
    client = stage.client(CANARY)
    before = _success(fetch(url))
    client.ask(protocol, Request(stage.image))
    answered = began = time.perf_counter()
    while _success(fetch(url)) == before:
        began = time.perf_counter()
    client.close()
    return began - answered


def _success(page: Page) -> float:
    return read_triton(page.text, MODEL, CANARY.version)["success"]


def split(stage: Stage, route: str) -> Split:
    """How a route's two backends share requests one after the other, and how the gateway's counters tell them apart."""
    client, before = stage.client(route=route), stage.envoy(route)
    answered = {p: [client.ask(p, Request(stage.image)).version for _ in range(SPLIT_REQUESTS)] for p in PROTOCOLS}
    counted = changes(before, stage.envoy(route))
    told = {p: _told(client, stage, p) for p in PROTOCOLS}
    client.close()
    return Split(
        {p: [turn for turn, version in enumerate(versions) if version == CANARY.version] for p, versions in answered.items()},
        SPLIT_REQUESTS,
        {name: value for name, value in counted.items() if name.endswith("upstream_rq 200")},
        stage.endpoints(route),
        told,
    )


def _told(client: Client, stage: Stage, protocol: Protocol) -> str | None:
    """What the header says on the first answer that failed: the faulty backend's."""
    request = Request(stage.marked(Kind.ERROR))
    failed = (outcome for outcome in iter(lambda: client.ask(protocol, request), None) if not outcome.ok)
    return next(failed).told


def main(
    cluster: Annotated[str, typer.Option(help="the cluster's name")] = "probe",
    only: Annotated[str, typer.Option(help="cases with these words; nothing is written then")] = "",
    keep: Annotated[bool, typer.Option(help="leave the namespace for a look")] = False,
) -> None:
    stage = Stage(_ready(cluster))
    try:
        stage.set_up()
        if only:
            for row in _rows(stage, [case for case in CASES if only in case.failure]):
                print(report.line(row))
            return
        found = Findings(
            versions=report.versions(stage.triton_version()),
            golden=golden(stage),
            rows=list(_rows(stage, CASES)),
            scrapes=scrapes(stage),
            splits={route: split(stage, route) for route in (PLAIN, FILTERED, ORPHANED)},
            canary_weight=WEIGHTS[FAULTY],
        )
        EVIDENCE.write_text(report.render(found))
    finally:
        if not keep:
            stage.tear_down()
    if missing := report.not_seen(found):
        sys.exit("said before and not seen now, so left out: " + "; ".join(missing))


def _ready(name: str) -> Cluster:
    cluster = Cluster(name)
    cluster.up()
    install(cluster)
    return cluster


def _rows(stage: Stage, cases: Iterable[Case]) -> Iterator[Row]:
    for case in cases:
        for protocol in case.protocols:
            row = observe(stage, case, protocol)
            print(report.line(row), file=sys.stderr, flush=True)
            yield row


if __name__ == "__main__":
    typer.run(main)

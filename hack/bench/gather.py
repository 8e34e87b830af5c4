"""What gathering evidence costs: CPU of a Gatherer that looks at many canaries, against a local server with real Triton text.

The server stands in for the pods, at a loopback address for each, and leaves out inference: its counters rise with every look.
It runs in a process of its own, so its CPU is not counted. Passes that judge the evidence are not part of this measurement.

    PYTHONPATH=operator:exporters:hack:. "$(hack/bootstrap)" -m bench.gather
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, cast

import psutil

from perch.ask import NoAnswerError, open_session
from perch.cache import Cache
from perch.clock import SteadyClock
from perch.counters import MAX_SKEW, parse_counters
from perch.evidence import Aim
from perch.gather import Gatherer, PodSource
from perch.names import child_labels

PODS = 2
"""Of either version, where many canaries are looked at."""

# As tritonserver 2.51 said it about one model on a machine without a GPU; the counts are filled in.
TEXT = """\
# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="digits",version="VERSION"} COUNT
# HELP nv_inference_request_failure Number of failed inference requests, all batch sizes
# TYPE nv_inference_request_failure counter
nv_inference_request_failure{model="digits",reason="OTHER",version="VERSION"} 0
nv_inference_request_failure{model="digits",reason="BACKEND",version="VERSION"} 0
nv_inference_request_failure{model="digits",reason="CANCELED",version="VERSION"} 0
nv_inference_request_failure{model="digits",reason="REJECTED",version="VERSION"} 0
# HELP nv_inference_count Number of inferences performed (does not include cached requests)
# TYPE nv_inference_count counter
nv_inference_count{model="digits",version="VERSION"} COUNT
# HELP nv_inference_exec_count Number of model executions performed (does not include cached requests)
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{model="digits",version="VERSION"} COUNT
# HELP nv_inference_request_duration_us Cumulative inference request duration in microseconds (includes cached requests)
# TYPE nv_inference_request_duration_us counter
nv_inference_request_duration_us{model="digits",version="VERSION"} COUNT626
# HELP nv_inference_queue_duration_us Cumulative inference queuing duration in microseconds (includes cached requests)
# TYPE nv_inference_queue_duration_us counter
nv_inference_queue_duration_us{model="digits",version="VERSION"} COUNT218
# HELP nv_inference_compute_input_duration_us Cumulative compute input duration in microseconds (does not include cached requests)
# TYPE nv_inference_compute_input_duration_us counter
nv_inference_compute_input_duration_us{model="digits",version="VERSION"} COUNT19
# HELP nv_inference_compute_infer_duration_us Cumulative compute inference duration in microseconds (does not include \
cached requests)
# TYPE nv_inference_compute_infer_duration_us counter
nv_inference_compute_infer_duration_us{model="digits",version="VERSION"} COUNT303
# HELP nv_inference_compute_output_duration_us Cumulative inference compute output duration in microseconds (does not include \
cached requests)
# TYPE nv_inference_compute_output_duration_us counter
nv_inference_compute_output_duration_us{model="digits",version="VERSION"} COUNT83
# HELP nv_inference_pending_request_count Instantaneous number of pending requests awaiting execution per-model.
# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{model="digits",version="VERSION"} 0
# HELP nv_pinned_memory_pool_total_bytes Pinned memory pool total memory size, in bytes
# TYPE nv_pinned_memory_pool_total_bytes gauge
nv_pinned_memory_pool_total_bytes 268435456
# HELP nv_pinned_memory_pool_used_bytes Pinned memory pool used memory size, in bytes
# TYPE nv_pinned_memory_pool_used_bytes gauge
nv_pinned_memory_pool_used_bytes 0
# HELP nv_cpu_utilization CPU utilization rate [0.0 - 1.0]
# TYPE nv_cpu_utilization gauge
nv_cpu_utilization 0.7409326424870466
# HELP nv_cpu_memory_total_bytes CPU total memory (RAM), in bytes
# TYPE nv_cpu_memory_total_bytes gauge
nv_cpu_memory_total_bytes 25276510208
# HELP nv_cpu_memory_used_bytes CPU used memory (RAM), in bytes
# TYPE nv_cpu_memory_used_bytes gauge
nv_cpu_memory_used_bytes 4236005376
"""


def text(version: int, count: int) -> str:
    return TEXT.replace("VERSION", str(version)).replace("COUNT", str(count))


def address(canary: int, version: int, number: int) -> str:
    return f"127.{version}.{canary}.{number + 1}"


def serve(addresses: list[tuple[str, int]], told: Connection) -> None:
    """Serve /metrics at (address, version), on one port of all; tells the port when it listens. Until it is terminated."""
    asyncio.run(_serve(addresses, told))


async def _serve(addresses: list[tuple[str, int]], told: Connection) -> None:
    port = 0
    for host, version in addresses:
        server = await asyncio.start_server(_answer(version), host, port)
        port = server.sockets[0].getsockname()[1]
    told.send(port)
    await asyncio.Event().wait()


def _answer(version: int) -> Any:
    looks = 1000

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal looks
        while True:
            try:
                await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                writer.close()
                return
            looks += 20
            body = text(version, looks).encode()
            head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)

    return answer


def pod(owner: str, host: str, version: int) -> dict[str, Any]:
    name = f"{owner}-{host}"
    return {
        "kind": "Pod",
        "metadata": {
            "namespace": "default",
            "name": name,
            "uid": name,
            "resourceVersion": "1",
            "labels": child_labels(owner, "triton", version),
        },
        "status": {
            "podIP": host,
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": "triton", "containerID": "containerd://1"}],
        },
    }


async def watch(canaries: int, port: int, seconds: float) -> dict[str, float]:
    woken: Counter[Any] = Counter()
    cache = Cache(cast(Any, None), (), print, SteadyClock())
    gatherer = Gatherer(cache, lambda key: woken.update([key]), lambda: datetime.now(UTC), port=port)
    for number in range(canaries):
        key = ("default", f"model-{number}")
        for version in (1, 2):
            for each in range(PODS):
                cache.absorb(pod(key[1], address(number, version, each), version))
        gatherer.aim(key, Aim("5", "digits", 1, 2, datetime.now(UTC) - timedelta(seconds=60)))
    task = asyncio.create_task(gatherer.run())
    await asyncio.sleep(10)  # connections are made, and the keys have found their phases
    before, cpu, began = woken.total(), time.process_time(), time.monotonic()
    late = await _latest(began + seconds)
    took, cpu = time.monotonic() - began, time.process_time() - cpu
    batches = woken.total() - before
    troubles = [g.trouble for g in map(gatherer.gathered, woken) if g and g.trouble]
    task.cancel()
    await asyncio.wait({task})
    assert not troubles, troubles[0]
    return {
        "canaries": canaries,
        "pods": canaries * 2 * PODS,
        "batches per minute": round(60 * batches / took, 1),
        "CPU seconds per minute": round(60 * cpu / took, 2),
        "longest stall of the loop, ms": round(1000 * late, 1),
        "MiB": round(psutil.Process().memory_info().rss / 2**20, 1),
    }


async def _latest(end: float) -> float:
    """The most by which a timer came late until then: how long others had to wait for the loop."""
    worst = 0.0
    while (now := time.monotonic()) < end:
        await asyncio.sleep(0.01)
        worst = max(worst, time.monotonic() - now - 0.01)
    return worst


def parse_seconds() -> float:
    """Seconds to parse one pod's text, the mean of many."""
    said, turns = text(2, 1000), 500
    began = time.perf_counter()
    for _ in range(turns):
        parse_counters(said, "digits", 2)
    return (time.perf_counter() - began) / turns


async def look(pods: int, port: int, looks: int = 30) -> dict[str, float]:
    """How far apart the pods of one look are read, so many of either version, and how many looks are lost by that."""
    cache = Cache(cast(Any, None), (), print, SteadyClock())
    for version in (1, 2):
        for each in range(pods):
            cache.absorb(pod("model", address(0, version, each), version))
    times: list[datetime] = []

    def clock() -> datetime:
        times.append(datetime.now(UTC))
        return times[-1]

    async with open_session() as session:
        source = PodSource(session, cache, ("default", "model"), Aim("5", "digits", 1, 2, datetime.now(UTC)), clock, port)
        for _ in range(looks):
            with suppress(NoAnswerError):
                await source.look()
            await asyncio.sleep(0.5)
    # The first look makes the connections.
    widths = [(end - begin).total_seconds() for begin, end in zip(times[2::2], times[3::2], strict=True)]
    return {
        "pods of either version": pods,
        "median ms": round(1000 * median(widths), 1),
        "worst ms": round(1000 * max(widths), 1),
        "lost": sum(width > MAX_SKEW.total_seconds() for width in widths),
        "of": len(widths),
    }


@contextmanager
def served(canaries: int, pods: int) -> Iterator[int]:
    """The port of a server that stands in for so many pods of either version of so many canaries."""
    addresses = [(address(n, version, each), version) for n in range(canaries) for version in (1, 2) for each in range(pods)]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(addresses, there), daemon=True)
    server.start()
    try:
        assert here.poll(30), "the server did not start"
        yield here.recv()
    finally:
        server.terminate()
        server.join()


def measure(canaries: int = 50, seconds: float = 60) -> dict[str, Any]:
    with served(canaries, PODS) as port:
        found: dict[str, Any] = asyncio.run(watch(canaries, port, seconds))
    found["ms to parse a pod's text"] = round(1000 * parse_seconds(), 3)
    found["looks"] = []
    for pods in (1, 10, 50, 100):
        with served(1, pods) as port:
            found["looks"].append(asyncio.run(look(pods, port)))
    return found


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))

"""A Triton that dies without a goodbye, beside a second one that lives: what the gateway's retries hide, and what not."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil

from chaos.stage import NAME, REPLICAS, Stage, expect
from demo import digits
from demo.load import Answer, grpc_client, infer

KILLS = 4
BATCH = 31
"""One less than a full batch, which Triton would not wait for: 97 KB."""
LARGE_IN_FLIGHT, LARGE_EVERY = 4, 0.05

SAFE = ("connect-failure", "refused-stream", "reset-before-request")
"""Only what never reached a Triton is asked again."""
ALL = ("connect-failure", "refused-stream", "reset")
"""What a dead Triton had begun, too."""


def triton_of(pod: dict[str, Any]) -> psutil.Process:
    """The Triton process of this pod, as this machine has it: what nothing inside of the container could do to it can be done."""
    uid = pod["metadata"]["uid"]
    found = [p for p in psutil.process_iter(["name"]) if p.info["name"] == "tritonserver" and uid in _cgroups(p.pid)]
    expect(len(found) == 1, f"one Triton in {pod['metadata']['name']}, not {len(found)}")
    return found[0]


def _cgroups(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""


def kill_tritons(stage: Stage) -> None:
    """One after the other, now of this pod, now of that, each when all are well again."""
    # New pods: the kubelet lets a container that was killed before wait longer each time.
    stage.serve(1, env={"MARK": "crash"})
    stage.wait_full(1)
    for number in range(KILLS):
        pods = sorted(stage.pods(1), key=lambda pod: str(pod["metadata"]["name"]))
        kill_and_wait(stage, pods[number % REPLICAS])


def kill_and_wait(stage: Stage, pod: dict[str, Any]) -> None:
    """Until Triton was started again in this pod, and all pods are ready."""
    before = restarts(stage)
    # SIGKILL: no goodbye, connections cut.
    triton_of(pod).kill()
    stage.wait(lambda: restarts(stage), lambda now: now > before, "it is started again")
    stage.wait_full(1)


def restarts(stage: Stage) -> int:
    return sum(status["restartCount"] for pod in stage.pods(1) for status in pod["status"]["containerStatuses"])


def killed_without_retries(stage: Stage) -> str:
    kill_tritons(stage)
    return lost(stage)


def killed_with_safe_retries(stage: Stage) -> str:
    with stage.retries(SAFE):
        kill_tritons(stage)
    return lost(stage)


def killed_with_retries(stage: Stage) -> str:
    with stage.retries(ALL):
        kill_tritons(stage)
    return lost(stage)


def killed_with_large_requests(stage: Stage) -> str:
    with stage.retries(ALL), large_requests(stage):
        kill_tritons(stage)
    return lost(stage)


def killed_with_large_requests_and_buffers(stage: Stage) -> str:
    with stage.retries(ALL, large=True), large_requests(stage):
        kill_tritons(stage)
    return lost(stage)


def lost(stage: Stage) -> str:
    return f"{KILLS} kills, {stage.failed() / KILLS:.1f} requests lost by each"


@contextmanager
def large_requests(stage: Stage) -> Iterator[None]:
    """Beside the other load: requests that are larger than what a proxy holds by default."""
    images = digits.held_out()[0][:BATCH]
    over = Event()

    def work() -> None:
        client = grpc_client(stage.cluster.gateway_address(), stage.host)
        while not over.wait(LARGE_EVERY):
            sent, version, error = time.monotonic(), None, None
            try:
                _, version = infer(client, NAME, images)
            except Exception as failure:  # whatever it was, a client would have been without an answer
                error = f"{type(failure).__name__}: {failure}"
            stage.others.append(Answer("grpc", 0, sent, time.monotonic(), version, None, error))

    workers: Sequence[Thread] = [Thread(target=work, daemon=True) for _ in range(LARGE_IN_FLIGHT)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        over.set()
        for worker in workers:
            worker.join()

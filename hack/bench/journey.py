"""How long a release takes on a whole cluster, what of it is Perch's own, and what the gateway costs.

Perch's own share of apply-to-answer is the time in which nobody else works: from apply to Job, from the Job's end to the
Deployment, from ready pods to the route.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import tritonclient.grpc

from demo import digits
from demo.load import Load, grpc_client
from demo.manifests import CHECKPOINTS, deployment, lenet
from devcluster import Cluster, images
from devcluster.tenant import Tenant
from perch.kube import DEPLOYMENT, JOB, ROUTE, Kind, Kube

IN_FLIGHT = 8
SECONDS = 10
PAIRS = 3


class Timeline:
    """When children of one ModelDeployment first were in a state, seen by watches: seconds by time.monotonic()."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self.times: dict[str, float] = {}
        self._stop = threading.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch()), daemon=True)

    def __enter__(self) -> Timeline:
        self._thread.start()
        assert self._started.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)

    async def _watch(self) -> None:
        kube = await Kube.connect()
        looks: list[tuple[Kind, Callable[[dict[str, Any]], list[str]]]] = [
            (JOB, self._job), (DEPLOYMENT, self._deployment), (ROUTE, lambda _: ["route written"]),
        ]  # fmt: skip
        tasks = [asyncio.create_task(self._follow(kube, kind, look)) for kind, look in looks]
        self._started.set()
        while not self._stop.is_set():
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await kube.close()

    async def _follow(self, kube: Kube, kind: Kind, look: Callable[[dict[str, Any]], list[str]]) -> None:
        _, version = await kube.list(kind, self._namespace, {})
        async for _, obj in kube.watch(kind, self._namespace, {}, version):
            if obj.get("spec"):
                for mark in look(obj):
                    self.times.setdefault(mark, time.monotonic())

    @staticmethod
    def _job(job: dict[str, Any]) -> list[str]:
        done = any(c["type"] == "Complete" for c in job.get("status", {}).get("conditions", []))
        return ["Job made", *(["Job done"] if done else [])]

    @staticmethod
    def _deployment(found: dict[str, Any]) -> list[str]:
        ready = found.get("status", {}).get("readyReplicas", 0) >= found["spec"]["replicas"]
        return ["Deployment made", *(["pods ready"] if ready else [])]


@contextmanager
def fresh(cluster: Cluster, name: str) -> Iterator[Tenant]:
    tenant = Tenant(cluster, name)
    tenant.delete()
    yield tenant.make()
    tenant.delete(wait=False)


def first_answer(cluster: Cluster, name: str, entry: Callable[[Tenant], dict[str, Any]], shape: list[int]) -> dict[str, float]:
    """Seconds from apply to the first gRPC answer through the gateway, and their parts."""
    with fresh(cluster, f"bench-{name}") as tenant, Timeline(tenant.namespace) as timeline:
        manifest = deployment(tenant, [entry(tenant)])
        began = time.monotonic()
        tenant.apply(manifest)
        applied = time.monotonic()
        client = grpc_client(cluster.gateway_address(), manifest["spec"]["routing"]["hostnames"][0])
        while not answers(client, shape):
            time.sleep(0.02)
            assert time.monotonic() - began < 300, tenant.status("digits")
        t = timeline.times | {"answer": time.monotonic()}
    return {
        "apply to first answer": t["answer"] - began,
        "kubectl apply itself": applied - began,
        "export Job": t["Job done"] - t["Job made"],
        "Deployment to ready": t["pods ready"] - t["Deployment made"],
        "route to answer": t["answer"] - t["route written"],
        "Perch's own share": max(t["Job made"] - applied, 0)
        + t["Deployment made"]
        - t["Job done"]
        + t["route written"]
        - t["pods ready"],
    }


def answers(client: Any, shape: list[int]) -> bool:
    try:
        ask(client, np.zeros([1, *shape], np.float32))
    except tritonclient.grpc.InferenceServerException:
        return False
    return True


def ask(client: Any, batch: Any) -> None:
    tensor = tritonclient.grpc.InferInput("image", batch.shape, "FP32")
    tensor.set_data_from_numpy(batch)
    client.infer("digits", [tensor], client_timeout=10)


def lenet_entry(tenant: Tenant, version: int = 1) -> dict[str, Any]:
    key = f"{tenant.namespace}/v{version}.pt"
    return lenet(version, key, tenant.upload(key, (CHECKPOINTS / f"v{version}.pt").read_bytes()))


def resnet_entry(tenant: Tenant) -> dict[str, Any]:
    code = (
        "import sys, torch, torchvision; torch.manual_seed(0); "
        "torch.save(torchvision.models.resnet18().state_dict(), sys.stdout.buffer)"
    )
    weights = subprocess.run([*images.exporter_python(), "-c", code], check=True, stdout=subprocess.PIPE).stdout
    key = f"{tenant.namespace}/resnet18.pt"
    return lenet(
        1, key, tenant.upload(key, weights), architecture={"name": "torchvision:resnet18"},
        inputs=[{"name": "image", "dataType": "FP32", "shape": [3, 224, 224]}],
        outputs=[{"name": "logits", "dataType": "FP32", "shape": [1000]}],
    )  # fmt: skip


def revert(cluster: Cluster) -> dict[str, float]:
    """Seconds from `kubectl apply` of the revert to the last answer of the canary, under load."""
    with fresh(cluster, "bench-revert") as tenant:
        entries = [lenet_entry(tenant, v) for v in (1, 2)]
        tenant.apply(deployment(tenant, entries, canary=2, rollout={"steps": [{"weight": 50, "hold": "Indefinite"}]}))
        tenant.wait_ready("digits", "SplitHeld")
        host = f"digits.{tenant.namespace}.example.com"
        took = []
        with Load(cluster.gateway_address(), host, "digits", grpc_rate=100) as load:
            for _ in range(3):
                time.sleep(2)
                began = time.monotonic()
                tenant.apply(deployment(tenant, entries))
                tenant.wait_ready("digits", "Serving")
                time.sleep(2)
                last = max(a.answered for a in load.results() if a.version == "2")
                took.append(last - began)
                tenant.apply(deployment(tenant, entries, canary=2, rollout={"steps": [{"weight": 50, "hold": "Indefinite"}]}))
                tenant.wait_ready("digits", "SplitHeld")
        failed = sum(not a.ok for a in load.results())
    return {"median": statistics.median(took), "worst": max(took), "requests": len(load.results()), "failed": failed}


def throughput(cluster: Cluster) -> dict[str, Any]:
    """Requests per second through the gateway against the same Triton directly, in turn, 8 in flight; the ratio of each pair."""
    result: dict[str, Any] = {}
    with fresh(cluster, "bench-throughput") as tenant:
        for name, entry, batch in (
            ("lenet5", lenet_entry, digits.held_out()[0][:1]),
            ("resnet18", resnet_entry, np.zeros([1, 3, 224, 224], np.float32)),
        ):
            manifest = deployment(tenant, [entry(tenant)], name="digits")
            tenant.apply(manifest)
            tenant.wait_ready("digits")
            address = tenant.get("service", "digits-v1")["spec"]["clusterIP"], 8001  # type: ignore[index]
            through = grpc_client(cluster.gateway_address(), manifest["spec"]["routing"]["hostnames"][0])
            direct = grpc_client(address, "direct")
            pairs = [(rate(through, batch), rate(direct, batch)) for _ in range(PAIRS)]
            result[name] = {
                "gateway/s": [round(a, 1) for a, _ in pairs],
                "direct/s": [round(b, 1) for _, b in pairs],
                "ratio": round(statistics.median(a / b for a, b in pairs), 3),
            }
            tenant.kubectl("delete", "mdep", "digits")
            tenant.wait(lambda: tenant.list("pods", "serving.perch.dev/component=triton"), lambda left: not left, 90)
    return result


def rate(client: Any, batch: Any) -> float:
    """Closed loop: IN_FLIGHT requests at once for SECONDS."""
    end = time.monotonic() + SECONDS

    def work(_: int) -> int:
        count = 0
        while time.monotonic() < end:
            ask(client, batch)
            count += 1
        return count

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        return sum(pool.map(work, range(IN_FLIGHT))) / SECONDS


def measure(cluster: Cluster) -> dict[str, Any]:
    os.environ["KUBECONFIG"] = str(cluster.kubeconfig)
    return {
        "lenet5": first_answer(cluster, "lenet", lenet_entry, [1, 28, 28]),
        "resnet18": first_answer(cluster, "resnet", resnet_entry, [3, 224, 224]),
        "revert to the last answer of the canary": revert(cluster),
        "throughput": throughput(cluster),
    }

"""What settled ModelDeployments cost: the operator's API requests per second and its memory.

Against a real API server without controllers: this program plays Job controller, kubelet and Gateway by writing the children's
status, since a hundred Triton pods do not fit the machine. The operator's process and all its traffic are real.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from tests.apiserver import running

from devcluster import gobuild
from perch.kube import DEPLOYMENT, JOB, MODEL_DEPLOYMENT, POD, ROUTE, Kube
from perch.names import SELECTOR
from perch_exporter.contract import Outcome, Summary

ROOT = Path(__file__).resolve().parents[2]
PORT = 18099


def measure(count: int = 100, seconds: int = 60) -> dict[str, float]:
    """Settle `count` ModelDeployments, then watch the operator for so many seconds."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as server:
        server.kubectl("apply", "--server-side", "-f", str(ROOT / "crds" / "modeldeployments.serving.perch.dev.yaml"))
        server.kubectl("apply", "--server-side", "-f", str(httproute_crd()))
        server.wait_established("modeldeployments.serving.perch.dev", "httproutes.gateway.networking.k8s.io")
        env = {
            **os.environ,
            "KUBECONFIG": str(server.kubeconfig),
            "PERCH_EXPORTER_IMAGE": "example.com/e:1",
            "PERCH_ARTIFACTS_IMAGE": "example.com/a:1",
            "PERCH_TRITON_IMAGE": "example.com/t:1",
            "PERCH_CLUSTER_NAME": "bench",
            "PERCH_HTTP_PORT": str(PORT),
            "PERCH_LOG_LEVEL": "WARNING",
        }
        os.environ["KUBECONFIG"] = str(server.kubeconfig)
        operator = subprocess.Popen([sys.executable, "-m", "perch"], env=env)
        try:
            took = asyncio.run(settle(count))
            before, began = requests(), time.monotonic()
            time.sleep(seconds)
            rate = (requests() - before) / (time.monotonic() - began)
            memory = psutil.Process(operator.pid).memory_info().rss / 2**20
        finally:
            operator.terminate()
            operator.wait()
    return {"count": count, "seconds to settle": took, "requests per second": rate, "MiB": memory}


def requests() -> float:
    text = httpx.get(f"http://127.0.0.1:{PORT}/metrics").text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("perch_api_requests "))


def httproute_crd() -> Path:
    """Gateway API's own CRD, from the Envoy Gateway chart of the development cluster."""
    return gobuild.module_files(gobuild.ENVOY_GATEWAY, "charts/gateway-helm/charts/crds/crds") / "gatewayapi-crds.yaml"


async def settle(count: int) -> float:
    """Create them, and answer for the controllers until all are Ready."""
    kube = await Kube.connect()
    manifest = yaml.safe_load((ROOT / "examples" / "digits.yaml").read_text())
    began = time.monotonic()
    try:
        for number in range(count):
            body = {**manifest, "metadata": {"name": f"model-{number}", "namespace": "default"}}
            await kube.create(MODEL_DEPLOYMENT, "default", body)
        while True:
            models, _ = await kube.list(MODEL_DEPLOYMENT, "default", {})
            if all(ready(m) for m in models):
                return time.monotonic() - began
            for job in (await kube.list(JOB, "default", {"labelSelector": SELECTOR}))[0]:
                if not job.get("status", {}).get("conditions"):
                    await finish(kube, job)
            for deployment in (await kube.list(DEPLOYMENT, "default", {"labelSelector": SELECTOR}))[0]:
                if not deployment.get("status", {}).get("readyReplicas"):
                    await start(kube, deployment)
            for route in (await kube.list(ROUTE, "default", {"labelSelector": SELECTOR}))[0]:
                if not accepted(route):
                    await accept(kube, route)
            await asyncio.sleep(0.5)
    finally:
        await kube.close()


def ready(model: dict[str, Any]) -> bool:
    conditions = model.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


async def finish(kube: Kube, job: dict[str, Any]) -> None:
    meta, template = job["metadata"], job["spec"]["template"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True}
    pod = {
        "metadata": {"name": meta["name"], "labels": template["metadata"]["labels"], "ownerReferences": [owner]},
        "spec": template["spec"],
    }
    await kube.create(POD, "default", {"apiVersion": "v1", "kind": "Pod", **pod})
    revision = meta["annotations"]["serving.perch.dev/artifact-revision"]
    summary = Summary(
        outcome=Outcome.PUBLISHED, artifact_uri=f"s3://models/{meta['name']}", artifact_digest=f"sha256:{revision * 8}"
    )
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ended = {"exitCode": 0, "reason": "Completed", "message": summary.to_json(), "startedAt": now, "finishedAt": now}
    status = {"phase": "Succeeded", "containerStatuses": [container("publish", {"terminated": ended})]}
    await kube.patch(POD, "default", meta["name"], {"status": status}, "status")
    conditions = [{"type": t, "status": "True", "lastTransitionTime": now} for t in ("SuccessCriteriaMet", "Complete")]
    done = {"succeeded": 1, "startTime": now, "completionTime": now, "conditions": conditions}
    await kube.patch(JOB, "default", meta["name"], {"status": done}, "status")


def container(name: str, state: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "image": "x", "imageID": "x", "ready": False, "restartCount": 0, "state": state}


async def start(kube: Kube, deployment: dict[str, Any]) -> None:
    meta, wanted = deployment["metadata"], deployment["spec"]["replicas"]
    counts = dict.fromkeys(("replicas", "readyReplicas", "updatedReplicas", "availableReplicas"), wanted)
    await kube.patch(
        DEPLOYMENT, "default", meta["name"], {"status": {"observedGeneration": meta["generation"], **counts}}, "status"
    )


def accepted(route: dict[str, Any]) -> bool:
    parents = route.get("status", {}).get("parents", [])
    return any(c["observedGeneration"] == route["metadata"]["generation"] for p in parents for c in p["conditions"])


async def accept(kube: Kube, route: dict[str, Any]) -> None:
    meta = route["metadata"]
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    conditions = [
        {
            "type": t,
            "status": "True",
            "reason": t,
            "message": "",
            "lastTransitionTime": now,
            "observedGeneration": meta["generation"],
        }
        for t in ("Accepted", "ResolvedRefs")
    ]
    parents = [
        {"parentRef": ref, "controllerName": "bench.perch.dev/gateway", "conditions": conditions}
        for ref in route["spec"]["parentRefs"]
    ]
    await kube.patch(ROUTE, "default", meta["name"], {"status": {"parents": parents}}, "status")


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))

"""Large bodies and answers through the gateway and past it. A form of 4 MiB ends a Triton that nobody protects: the control."""

from __future__ import annotations

import io
import json
import re
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import yaml
from PIL import Image

from demo.load import grpc_client
from demo.manifests import CHECKPOINTS, deployment, lenet
from devcluster.tenant import Tenant

from .test_pictures import NAMES

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """
import torch


class Means(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, image):
        return image.mean(dim=(2, 3)) * self.scale, image * self.scale
"""
FORM = "application/x-www-form-urlencoded"  # what curl -d and urllib say of every body
MEGABYTES = (3, 5, 16, 32)
SLOW = httpx.Timeout(60)


def means(tenant: Tenant) -> dict[str, Any]:
    """A network that answers with the mean of each plane, and with the planes: right answers to any size are known."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("means.py", SOURCE)
    header = json.dumps({"scale": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.0)
    keys = {name: f"{tenant.namespace}/{name}" for name in ("means.zip", "means.safetensors")}
    return {
        "version": 1,
        "checkpoint": {
            "uri": f"s3://checkpoints/{keys['means.safetensors']}",
            "format": "SafeTensors",
            "sha256": tenant.upload(keys["means.safetensors"], weights),
        },
        "architecture": {
            "entryPoint": "means:Means",
            "source": {
                "uri": f"s3://checkpoints/{keys['means.zip']}",
                "sha256": tenant.upload(keys["means.zip"], packed.getvalue()),
            },
        },
        "inputs": [{"name": "image", "dataType": "FP32", "shape": [3, -1, -1]}],
        "outputs": [
            {"name": "plane_means", "dataType": "FP32", "shape": [3]},
            {"name": "scaled_image", "dataType": "FP32", "shape": [3, -1, -1]},
        ],
        "triton": {"maxBatchSize": 1},
    }


RUNTIME = {"sharedMemorySize": "1Gi"}


def serve_means(tenant: Tenant) -> None:
    tenant.apply(deployment(tenant, [means(tenant)], name="means", runtime=RUNTIME, routing=routing(tenant, "means")))
    tenant.wait_ready("means", "Serving")


def serve_pictures(tenant: Tenant) -> None:
    key = f"{tenant.namespace}/v2.pt"
    sha = tenant.upload(key, (CHECKPOINTS / "v2.pt").read_bytes())
    pictures = {"preprocessing": {"decode": "L", "resize": [28, 28]}, "postprocessing": {"topK": 3, "softmax": True}}
    seen = lenet(1, key, sha, triton={"maxBatchSize": 8, "labels": NAMES}, **pictures)
    tenant.apply(deployment(tenant, [seen], name="seen", runtime=RUNTIME, routing=routing(tenant, "seen")))
    tenant.wait_ready("seen", "Serving")


def routing(tenant: Tenant, model: str) -> dict[str, Any]:
    gateway = {"name": "gateway", "namespace": "gateway-system"}
    return {"parentRefs": [gateway], "hostnames": [f"{model}.{tenant.namespace}.example.com"]}


def planes(megabytes: float, written_in: int) -> np.ndarray:
    """An image whose body takes so many bytes, at `written_in` bytes a number: quarters, which JSON writes in four."""
    side = int((megabytes * 1e6 / written_in / 3) ** 0.5)
    cells = np.arange(3 * side * side, dtype=np.float32) % 4
    image: np.ndarray = (1 + cells / 4).reshape(1, 3, side, side)
    return image


def as_json(image: np.ndarray) -> tuple[bytes, dict[str, str]]:
    data = ",".join(np.char.mod("%.2f", image.ravel()).tolist())
    head = {"name": "image", "datatype": "FP32", "shape": image.shape, "data": []}
    body = json.dumps({"inputs": [head], "outputs": [{"name": "plane_means"}]}).replace('"data": []', f'"data": [{data}]')
    return body.encode(), {}


def as_binary(image: np.ndarray) -> tuple[bytes, dict[str, str]]:
    tensor = {"name": "image", "datatype": "FP32", "shape": image.shape, "parameters": {"binary_data_size": image.nbytes}}
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "plane_means"}]}).encode()
    return head + image.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


WAYS = {"json": (as_json, 5), "binary": (as_binary, 4)}


def mean(address: str, host: str, way: str, megabytes: float, kind: str = FORM) -> tuple[np.ndarray, np.ndarray]:
    """What is answered, and what is right."""
    make, width = WAYS[way]
    image = planes(megabytes, width)
    body, headers = make(image)
    assert abs(len(body) - megabytes * 1e6) < 2e5
    url = f"http://{address}/v2/models/means/infer"
    answer = httpx.post(url, content=body, headers={"Host": host, "Content-Type": kind, **headers}, timeout=SLOW)
    assert answer.status_code == 200, answer.text[:500]
    return np.array(answer.json()["outputs"][0]["data"]), image.mean(axis=(2, 3), dtype=np.float64).ravel()


def pod(tenant: Tenant, model: str) -> dict[str, Any]:
    found = tenant.list("pods", f"serving.perch.dev/component=triton,serving.perch.dev/model-deployment={model}")
    return next(p for p in found if "deletionTimestamp" not in p["metadata"])


def restarts(tenant: Tenant, model: str) -> int:
    statuses = pod(tenant, model)["status"]["containerStatuses"]
    return sum(int(status["restartCount"]) for status in statuses)


def test_large_requests_and_answers_are_right_and_end_no_triton(tenant: Tenant) -> None:
    """triton server#5840, libevhtp#118: a POST of more than 4 MiB that calls itself a form ends the process."""
    serve_means(tenant)
    gateway = "{}:{}".format(*tenant.cluster.gateway_address())
    host = f"means.{tenant.namespace}.example.com"
    for megabytes in MEGABYTES:
        for way in WAYS:
            for kind in (FORM, "application/json"):
                found, right = mean(gateway, host, way, megabytes, kind)
                assert found == pytest.approx(right, rel=1e-4), (megabytes, way, kind)
    # Past the gateway nobody takes the Content-Type away: Triton's own stacks hold it.
    beside = f"{pod(tenant, 'means')['status']['podIP']}:8000"
    for way in WAYS:
        found, right = mean(beside, "", way, MEGABYTES[-1])
        assert found == pytest.approx(right, rel=1e-4), way
    # Not valid, and no reason to end either: a million levels of JSON, each of which takes some of the stack.
    refused = httpx.post(f"http://{gateway}/v2/models/means/infer", content=b"[" * 10**6, headers={"Host": host}, timeout=SLOW)
    assert refused.status_code in (400, 500), refused.text
    assert restarts(tenant, "means") == 0

    # An answer above gRPC's own limit of 4 MiB, by the client that README shows.
    client = grpc_client(tenant.cluster.gateway_address(), host)
    image = planes(6, 4)
    tensor = triton.InferInput("image", list(image.shape), "FP32").set_data_from_numpy(image)
    assert np.array_equal(client.infer("means", [tensor], client_timeout=60).as_numpy("scaled_image"), image)
    assert restarts(tenant, "means") == 0


def test_a_limit_of_the_gateways_own_refuses_larger_bodies_and_no_others(tenant: Tenant) -> None:
    """The policy stands in docs/exports.md."""
    serve_means(tenant)
    address, host = tenant.cluster.gateway_address(), f"means.{tenant.namespace}.example.com"
    (policy,) = re.findall(r"```yaml\n(\S*[^`]*BackendTrafficPolicy[^`]*)```", (ROOT / "docs" / "exports.md").read_text())
    wanted = yaml.safe_load(policy)
    wanted["metadata"]["namespace"] = tenant.namespace
    wanted["spec"] |= {"targetRefs": [{**wanted["spec"]["targetRefs"][0], "name": "means"}], "requestBuffer": {"limit": "4Mi"}}
    tenant.apply(wanted)
    url, small, large = "http://{}:{}/v2/models/means/infer".format(*address), *(as_json(planes(size, 5))[0] for size in (1, 5))

    def status(body: bytes) -> int:
        return httpx.post(url, content=body, headers={"Host": host}, timeout=SLOW).status_code

    tenant.wait(lambda: status(large), lambda code: code == 413)
    assert status(small) == 200
    image = planes(1, 4)
    tensor = triton.InferInput("image", list(image.shape), "FP32").set_data_from_numpy(image)
    answer = grpc_client(address, host).infer("means", [tensor], client_timeout=60)
    assert np.array_equal(answer.as_numpy("scaled_image"), image)


def test_a_photo_of_more_than_4_megabytes_is_answered_by_name(tenant: Tenant) -> None:
    serve_pictures(tenant)
    packed = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (1400, 1400, 3), np.uint8)).save(packed, "PNG")
    photo = packed.getvalue()
    assert len(photo) > 5e6
    host = f"seen.{tenant.namespace}.example.com"
    tensor = triton.InferInput("image", [1, 1], "BYTES").set_data_from_numpy(np.array([[photo]], np.object_))
    names = grpc_client(tenant.cluster.gateway_address(), host).infer("seen", [tensor], client_timeout=60).as_numpy("labels")
    # As curl --data-binary sends it, by the line in docs/exports.md.
    url = "http://{}:{}/v2/models/seen/infer".format(*tenant.cluster.gateway_address())
    headers = {"Host": host, "Content-Type": FORM, "Inference-Header-Content-Length": "0"}
    answer = httpx.post(url, content=photo, headers=headers, timeout=SLOW)
    assert answer.status_code == 200, answer.text
    assert names[0][0] in answer.content
    assert restarts(tenant, "seen") == 0


def test_without_protection_such_a_request_ends_triton_and_the_condition_says_by_which_signal(tenant: Tenant) -> None:
    """Else the tests above would say nothing."""
    serve_means(tenant)
    found = pod(tenant, "means")
    command = next(c["command"] for c in found["spec"]["containers"] if c["name"] == "triton")
    place = [c["name"] for c in found["spec"]["containers"]].index("triton")
    change = [{"op": "replace", "path": f"/spec/template/spec/containers/{place}/command", "value": command[3:]}]
    tenant.kubectl("patch", "deployment", "means-v1", "--type=json", "-p", json.dumps(change))
    tenant.kubectl("rollout", "status", "deployment", "means-v1", "--timeout=120s")
    beside = f"{pod(tenant, 'means')['status']['podIP']}:8000"
    right = mean(beside, "", "json", 3)
    assert right[0] == pytest.approx(right[1], rel=1e-4)
    deadline = time.monotonic() + 60
    while not (said := events(tenant)):  # the first end is a restart, from the second on the kubelet waits and says so
        assert time.monotonic() < deadline
        try:
            mean(beside, "", "json", 5)
            pytest.fail("it answered")
        except httpx.TransportError:
            time.sleep(1)
    assert "Signal (11) received" in said[0]


def events(tenant: Tenant) -> list[str]:
    """What is told of versions with traffic and no ready pod."""
    found = json.loads(tenant.kubectl("get", "events", "-o", "json", "--field-selector", "reason=NoReadyPods,type=Warning"))
    return [event["message"] for event in found["items"] if "Signal" in event["message"]]

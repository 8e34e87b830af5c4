"""Pictures in, labels out: PNG bytes by gRPC and by REST, through the gateway, answered by names."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from demo.digits import held_out
from demo.load import grpc_client
from demo.manifests import CHECKPOINTS, deployment, lenet
from devcluster.tenant import Tenant
from perch.counters import Counters, parse_counters

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TRITON = {
    "maxBatchSize": 32,
    "dynamicBatching": {
        "maxQueueDelayMicroseconds": 500,
        "priorityLevels": 2,
        "defaultPriorityLevel": 2,
        "defaultQueuePolicy": {"defaultTimeoutMicroseconds": 5_000_000, "maxQueueSize": 1000},
    },
    "labels": NAMES,
    "warmup": True,
    "responseCache": True,
    "configOverrides": 'parameters { key: "intra_op_thread_count" value { string_value: "2" } }',
}


def pictures(count: int) -> tuple[list[bytes], list[str]]:
    """Digits as PNGs of twice the size, and their names."""
    pixels, labels = held_out()
    out = []
    for image in pixels[:count, 0]:
        packed = io.BytesIO()
        Image.fromarray(np.round(image * 255).astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)).save(packed, "PNG")
        out.append(packed.getvalue())
    return out, [NAMES[label] for label in labels[:count]]


def ask(client: triton.InferenceServerClient, batch: list[bytes]) -> tuple[Any, Any]:
    tensor = triton.InferInput("image", [len(batch), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(batch, np.object_).reshape(-1, 1))
    answer = client.infer("digits", [tensor], client_timeout=20)
    return answer.as_numpy("labels"), answer.as_numpy("scores")


def curl(command: str) -> bytes:
    return subprocess.run(["bash", "-c", command], capture_output=True, check=True, timeout=30).stdout


def counters(tenant: Tenant) -> Counters:
    (pod,) = tenant.list("pods", "serving.perch.dev/component=triton")
    return parse_counters(httpx.get(f"http://{pod['status']['podIP']}:8002/metrics", timeout=10).text, "digits", 1)


def test_a_png_is_answered_by_names_over_both_protocols_and_a_bad_one_harms_no_other(tenant: Tenant, tmp_path: Path) -> None:
    key = f"{tenant.namespace}/v2.pt"
    sha = tenant.upload(key, (CHECKPOINTS / "v2.pt").read_bytes())
    entry = lenet(
        1, key, sha, triton=TRITON, preprocessing={"decode": "L", "resize": [28, 28]}, postprocessing={"topK": 3, "softmax": True}
    )
    tenant.apply(deployment(tenant, [entry]))
    tenant.wait_ready("digits", "Serving")
    assert tenant.status("digits")["versions"][0]["parity"]["verdict"] == "Passed"

    # gRPC, in batches: as right as the network is on tensors (98.0 % of the held-out digits).
    host = f"digits.{tenant.namespace}.example.com"
    client = grpc_client(tenant.cluster.gateway_address(), host)
    known, truth = pictures(96)
    answers = [ask(client, known[start : start + 32]) for start in range(0, len(known), 32)]
    labels, scores = (np.concatenate([answer[place] for answer in answers]) for place in (0, 1))
    assert labels.shape == scores.shape == (96, 3)
    right = np.mean([row[0].decode() == name for row, name in zip(labels, truth, strict=True)])
    assert right > 0.93
    assert (np.diff(scores, axis=1) <= 0).all()
    assert (scores.sum(axis=1) <= 1 + 1e-6).all()

    # REST, by the README's two lines.
    (tmp_path / "digit.png").write_bytes(known[0])
    url = "http://{}:{}/v2/models/digits/infer".format(*tenant.cluster.gateway_address())
    text = curl(
        f"""cd {tmp_path} && echo '{{"inputs": [{{"name": "image", "datatype": "BYTES", "shape": [1, 1], """
        f""""data": ["'$(base64 -w0 digit.png)'"]}}]}}' | curl -sS -H 'Host: {host}' -d @- {url}"""
    )
    outputs = {output["name"]: output["data"] for output in json.loads(text)["outputs"]}
    assert outputs["labels"] == [name.decode() for name in labels[0]]
    assert outputs["scores"] == pytest.approx(scores[0].tolist(), abs=1e-4)
    raw = curl(
        f"cd {tmp_path} && curl -sS -H 'Host: {host}' -H 'Inference-Header-Content-Length: 0' --data-binary @digit.png {url}"
    )
    assert labels[0][0] in raw

    # What is no picture is told so, alone, and is no failure of the version.
    before = counters(tenant)
    with pytest.raises(InferenceServerException, match="image 1: it is neither a JPEG nor a PNG"):
        ask(client, [known[0], b"GIF89a", known[1]])
    with pytest.raises(InferenceServerException, match="image 0: it cannot be read"):
        ask(client, [known[0][:-60]])
    body = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": ["no picture"]}]}
    answer = httpx.post(url, headers={"Host": host}, json=body, timeout=20)
    assert answer.status_code == 400, answer.text
    assert "image 0: it is neither a JPEG nor a PNG" in answer.json()["error"]
    again, _ = ask(client, known[:32])
    assert np.array_equal(again, labels[:32])
    after = counters(tenant)
    assert after.failed == before.failed == 0
    assert after.succeeded == before.succeeded + 1

"""One case on a cluster: a checkpoint into the bucket, a ModelDeployment, and a question whose answer torch gave before."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray

from demo import digits
from demo.load import grpc_client
from devcluster.tenant import SECRET, Tenant
from exports.cases import Case
from exports.make import ANSWERS, CALIBRATION, CHECKPOINT, PICTURE, Order, made, snake
from exports.report import Result
from perch_exporter import detections

_DIGITS = 128
LONGEST = 900
"""Seconds until an export must be Ready."""
LIMITS = {"FP32": 1e-3, "FP16": 0.15, "INT8": 0.75}
"""Of the difference from torch's answer, in standard deviations of that answer. The parity gate's own limits of FP16 and INT8 are
a third, of the spread, which is some three of them."""

SCORES, OVERLAP, ALONE = 1e-3, 0.9, 0.01
"""Of detections: how far scores may lie apart, how much boxes overlap, the share that may have no partner; as the parity gate."""

Tensors = dict[str, NDArray[Any]]


class Wrong(Exception):
    """The words that a user saw, or what was wrong with the answer."""


@dataclass(frozen=True)
class Served:
    """A case that is Ready."""

    folder: Path
    """What exports.make wrote."""
    address: str
    """Of its pod."""
    megabytes: float
    ready: float
    steps: dict[str, float]
    """Seconds of the Job's steps, by the exporter's own word."""


@contextmanager
def served(tenant: Tenant, case: Case, prefix: str) -> Iterator[Served]:
    """`prefix` of the repository is this run's own: what a former one published would be taken as it is. Raises Wrong."""
    with tempfile.TemporaryDirectory(prefix="perch-exports-", dir="/tmp") as name:
        folder = Path(name)
        made([_order(case, folder)])
        megabytes = (folder / CHECKPOINT).stat().st_size / 1e6
        try:
            tenant.apply(_model_deployment(tenant, case, folder, prefix))
            ready = _wait_ready(tenant, case)
            yield Served(folder, _pod(tenant, case, "triton")["status"]["podIP"], megabytes, ready, _step_seconds(tenant, case))
        except subprocess.CalledProcessError as error:  # kubectl apply was refused
            raise Wrong(" ".join(getattr(error, "__notes__", [str(error)]))) from error
        finally:
            _remove(tenant, case, prefix)


_TRUTHS = {"true": True, "false": False}
"""As a version writes them, and as Python has them."""


def play(tenant: Tenant, case: Case, prefix: str) -> Result:
    try:
        with served(tenant, case, prefix) as ready:
            told = _ASK[case.asked](tenant, case, ready)
    except Wrong as error:
        return Result(case, failed=str(error))
    return Result(case, ready.megabytes, ready.steps["convert"], ready.steps["prove"], ready.ready, told)


def _order(case: Case, folder: Path) -> Order:
    if case.asked in ("pictures", "features"):
        shutil.copyfile(_photograph(), folder / PICTURE)
    if case.weights:
        shutil.copyfile(case.weights, folder / "weights")
        np.savez(folder / CALIBRATION, image=digits.training()[0][:_DIGITS])
    return Order(
        folder=str(folder),
        network=case.network,
        form=case.form,
        inputs=case.inputs,
        outputs=[spec["name"] for spec in case.outputs],
        weights=str(folder / "weights") if case.weights else None,
        parameters={snake(name): _TRUTHS.get(str(value), value) for name, value in case.parameters.items()},
        layer=case.layer,
    )


def _photograph() -> Path:
    """One of the two that scikit-learn ships."""
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).with_name("images") / "china.jpg"


def _model_deployment(tenant: Tenant, case: Case, folder: Path, prefix: str) -> dict[str, Any]:
    s3 = tenant.cluster.s3

    def put(name: str, content: bytes) -> dict[str, str]:
        key = f"{prefix}/{case.slug}/{name}"
        return {"uri": f"s3://checkpoints/{key}", "sha256": tenant.upload(key, content)}

    entry = case.entry(put)
    entry["checkpoint"] |= put(CHECKPOINT, (folder / CHECKPOINT).read_bytes())
    if case.precision == "INT8":
        entry["conversion"]["calibration"] = put(CALIBRATION, (folder / CALIBRATION).read_bytes())
    return {
        "apiVersion": "serving.perch.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": case.slug, "namespace": tenant.namespace},
        "spec": {
            "repository": {
                "uri": f"s3://models/{prefix}",
                "endpoint": s3.endpoint,
                "region": s3.region,
                "credentialsSecretRef": {"name": SECRET},
            },
            "versions": [entry],
            "traffic": {"stable": 1},
            "runtime": {"terminationGracePeriodSeconds": 30},
            "routing": {"parentRefs": [{"name": "gateway", "namespace": "gateway-system"}], "hostnames": [_host(case)]},
        },
    }


def _host(case: Case) -> str:
    return f"{case.slug}.exports.example.com"


def _wait_ready(tenant: Tenant, case: Case) -> float:
    started = time.monotonic()

    def ended(_: object) -> bool:
        return any(tenant.condition(case.slug, kind).get("status") == "True" for kind in ("Ready", "Stalled"))

    try:
        tenant.wait(lambda: tenant.condition(case.slug), ended, LONGEST)
    except TimeoutError as error:
        raise Wrong(str(error)) from error
    condition = tenant.condition(case.slug)
    if condition["status"] != "True":
        raise Wrong(condition["message"])
    return time.monotonic() - started


def _step_seconds(tenant: Tenant, case: Case) -> dict[str, float]:
    """By the summary that publish left as its pod's last words."""
    pod = _pod(tenant, case, "export")
    (status,) = pod["status"]["containerStatuses"]
    seconds: dict[str, float] = json.loads(status["state"]["terminated"]["message"])["seconds"]
    return seconds


def _pod(tenant: Tenant, case: Case, component: str) -> dict[str, Any]:
    (pod,) = tenant.list("pods", f"serving.perch.dev/component={component},app.kubernetes.io/name={case.slug}")
    return pod


def _remove(tenant: Tenant, case: Case, prefix: str) -> None:
    """With all that it left in the store: the large ones are gigabytes. Its pods drain while the next case begins."""
    tenant.kubectl("delete", "modeldeployment", case.slug, "--ignore-not-found", "--wait=false")
    for bucket, folder in (("checkpoints", f"{prefix}/{case.slug}/"), ("models", f"{prefix}/{tenant.namespace}/{case.slug}/")):
        for key in tenant.keys(folder, bucket):
            tenant.store.delete_object(Bucket=bucket, Key=key)


# --- questions


def _ask_tensors(tenant: Tenant, case: Case, ready: Served) -> str:
    inputs, expected = _answers(ready.folder)
    answer = _infer(tenant, case, _tensors(case, inputs))
    apart = 0.0
    for name, right in expected.items():
        found = answer.as_numpy(name)
        if found.shape != right.shape or found.dtype != right.dtype:
            raise Wrong(f"{name} is {found.dtype} {found.shape}, torch's is {right.dtype} {right.shape}")
        if right.dtype.kind == "f":
            apart = max(apart, float(np.abs(found - right).max() / right.std()))
        elif not np.array_equal(found, right):
            raise Wrong(f"{name} is {found.ravel()}, torch's is {right.ravel()}")
    return _near(case, apart)


def _near(case: Case, apart: float) -> str:
    """In standard deviations of torch's answer."""
    if apart > LIMITS[case.precision]:
        raise Wrong(f"the answer is {apart:.2g} standard deviations from torch's, more than {LIMITS[case.precision]}")
    return f"{apart:.1g}"


def _tensors(case: Case, inputs: Tensors) -> list[Any]:
    tensors = []
    for spec in case.inputs:
        array = inputs[spec["name"]]
        tensor = triton.InferInput(spec["name"], list(array.shape), spec["dataType"])
        tensors.append(tensor.set_data_from_numpy(array))
    return tensors


def _ask_detections(tenant: Tenant, case: Case, ready: Served) -> str:
    inputs, expected = _answers(ready.folder)
    answer = _infer(tenant, case, _tensors(case, inputs))
    found = {name: answer.as_numpy(name) for name in expected}
    if any(found[name].shape != right.shape for name, right in expected.items()):
        raise Wrong(f"the answers have the shapes {[array.shape for array in found.values()]}")
    agreement = detections.compare(expected, found, SCORES, OVERLAP)
    told = f"{agreement.alone} of {agreement.asked} boxes alone"
    if not agreement.asked or agreement.share_alone > ALONE or agreement.score_error > SCORES:
        raise Wrong(f"{told}, scores of the others up to {agreement.score_error:.2g} apart")
    return told


def _ask_classes(tenant: Tenant, case: Case, ready: Served) -> str:
    """The three best classes, by names; asked twice, the second answer is the cache's."""
    inputs, expected = _answers(ready.folder)
    names, (right,) = case.more["triton"]["labels"], expected.values()
    image = inputs["image"]
    for _ in range(2):
        tensor = triton.InferInput("image", list(image.shape), "FP32").set_data_from_numpy(image)
        wanted = triton.InferRequestedOutput("logits", class_count=3)
        told = _infer(tenant, case, [tensor], [wanted]).as_numpy("logits")
        for row, scores in zip(told, right, strict=True):
            best = [tuple(text.decode().split(":")[1:]) for text in row]
            if best != [(str(number), names[number]) for number in np.argsort(-scores)[:3]]:
                raise Wrong(f"the best classes are {best}, by torch {np.argsort(-scores)[:3]}")
    metrics = httpx.get(f"http://{ready.address}:8002/metrics", timeout=10).text
    hits = [line for line in metrics.splitlines() if line.startswith("nv_cache_num_hits_per_model{")]
    if not any(float(line.split()[-1]) > 0 for line in hits):
        raise Wrong(f"the second question was not answered from the cache: {hits}")
    return "same names"


def _ask_pictures(tenant: Tenant, case: Case, ready: Served) -> str:
    _, expected = _answers(ready.folder)
    answer = _infer(tenant, case, [_picture(ready)])
    shares = np.exp(expected["logits"][0] - expected["logits"][0].max())
    shares /= shares.sum()
    best = np.argsort(-shares)[:5]
    labels, scores = [int(label) for label in answer.as_numpy("labels")[0]], answer.as_numpy("scores")[0]
    if labels != best.tolist():
        raise Wrong(f"the best classes are {labels}, by torch {best.tolist()}")
    return _near(case, float(np.abs(scores - shares[best]).max() / shares.std()))


def _ask_features(tenant: Tenant, case: Case, ready: Served) -> str:
    _, expected = _answers(ready.folder)
    found, right = _infer(tenant, case, [_picture(ready)]).as_numpy("features"), expected["features"]
    if found.shape != right.shape:
        raise Wrong(f"the features have shape {found.shape}, torch's {right.shape}")
    return _near(case, float(np.abs(found - right).max() / right.std()))


def _picture(ready: Served) -> Any:
    picture = triton.InferInput("image", [1, 1], "BYTES")
    return picture.set_data_from_numpy(np.array([[(ready.folder / PICTURE).read_bytes()]], np.object_))


_ASK: dict[str, Callable[[Tenant, Case, Served], str]] = {
    "tensors": _ask_tensors,
    "classes": _ask_classes,
    "pictures": _ask_pictures,
    "features": _ask_features,
    "detections": _ask_detections,
}
"""What is told in the table's column `apart`. Raise Wrong."""


def _answers(folder: Path) -> tuple[Tensors, Tensors]:
    with np.load(folder / ANSWERS) as file:
        groups: dict[str, Tensors] = {"inputs": {}, "outputs": {}}
        for key in file.files:
            group, _, name = key.partition("/")
            groups[group][name] = file[key]
    return groups["inputs"], groups["outputs"]


def _infer(tenant: Tenant, case: Case, inputs: list[Any], outputs: list[Any] | None = None) -> Any:
    client = grpc_client(tenant.cluster.gateway_address(), _host(case))
    try:
        return client.infer(case.slug, inputs, outputs=outputs, client_timeout=60)
    except triton.InferenceServerException as error:
        raise Wrong(f"the request failed: {error}") from error
    finally:
        client.close()

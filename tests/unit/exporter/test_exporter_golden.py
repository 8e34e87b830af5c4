"""The golden sidecar: Ready only while this server gives the checkpoint's answers.

The gate's states run against a stand-in for Triton; the wire runs against a small gRPC server that speaks Triton's own
protocol. A real Triton stands in the end-to-end tests.
"""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from exporter_builders import file_request, golden, hand_over
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from perch_exporter.contract import Location, Reason
from perch_exporter.download import download
from perch_exporter.failure import StepFailed
from perch_exporter.golden import Artifact, Gate, Readiness, TritonServer, run, serve
from perch_exporter.publish import publish
from perch_exporter.workspace import Workspace

ANSWERS = {array.tobytes(): row for array, row in zip(golden().inputs["image"], golden().outputs["logits"], strict=True)}


@pytest.fixture
def artifact_root(tmp_path: Path) -> Path:
    request = file_request(tmp_path, b"a checkpoint", triton={"maxBatchSize": 3})
    workspace = Workspace(tmp_path / "work")
    hand_over(workspace)
    summary = publish(request, workspace, {})
    assert summary.artifact_digest
    download(Location(uri=request.destination.uri), summary.artifact_digest, tmp_path / "pod", {})
    return tmp_path / "pod"


def test_a_server_that_builds_engines_is_asked_for_the_largest_batch_before_clients_can(tmp_path: Path) -> None:
    triton = {"maxBatchSize": 9, "accelerator": "TensorRT", "instanceKind": "GPU"}
    request = file_request(tmp_path, b"a checkpoint", triton=triton)
    workspace = Workspace(tmp_path / "work")
    hand_over(workspace)
    summary = publish(request, workspace, {})
    download(Location(uri=request.destination.uri), summary.artifact_digest or "", tmp_path / "pod", {})
    artifact = Artifact.load(tmp_path / "pod")
    assert artifact.builds_engines
    server = StandIn()
    assert look(Gate(artifact, server)).ready
    assert server.batches == [1] * 4 + [9]  # four samples, and as many of them as a batch holds


class StandIn:
    """Answers as the checkpoint did, plus an error; counts the batches that it was asked for."""

    def __init__(self) -> None:
        self.loaded, self.broken, self.error = True, False, 0.0
        self.batches: list[int] = []

    def is_ready(self) -> bool:
        if self.broken:
            raise InferenceServerException("connection refused")
        return self.loaded

    def infer(self, inputs: Any, outputs: list[str]) -> dict[str, Any]:
        if self.broken:
            raise InferenceServerException("connection reset")
        image = inputs["image"]
        self.batches.append(len(image))
        assert outputs == ["logits"]
        return {"logits": np.stack([ANSWERS[sample.tobytes()] for sample in image]) + np.float32(self.error)}


@pytest.fixture
def server() -> StandIn:
    return StandIn()


@pytest.fixture
def gate(artifact_root: Path, server: StandIn) -> Gate:
    return Gate(Artifact.load(artifact_root), server)


def look(gate: Gate) -> Readiness:
    gate.look()
    return gate.state


def test_before_the_first_look_it_is_not_ready(gate: Gate) -> None:
    assert not gate.state.ready


def test_right_answers_make_it_ready_alone_and_in_the_largest_batches(gate: Gate, server: StandIn) -> None:
    state = look(gate)
    assert state.ready
    assert "digits version 1 answers as its checkpoint does" in state.sentence
    assert server.batches == [1, 1, 1, 1, 3, 1], "maxBatchSize 3 must be respected"


def test_a_pass_is_not_repeated_while_the_model_stays(gate: Gate, server: StandIn) -> None:
    look(gate)
    server.error = 1e6
    assert look(gate).ready
    assert len(server.batches) == 6


def test_wrong_answers_keep_it_from_being_ready_and_the_figures_are_told(gate: Gate, server: StandIn) -> None:
    server.error = 20.0
    state = look(gate)
    assert not state.ready
    assert "does not answer as its checkpoint does: logits: largest error 20" in state.sentence
    server.error = 0.0
    assert not look(gate).ready, "a mismatch stands until the model goes and comes back"


def test_a_model_that_goes_away_and_comes_back_proves_itself_again(gate: Gate, server: StandIn) -> None:
    assert look(gate).ready
    server.loaded = False
    assert not look(gate).ready
    server.loaded, server.error = True, 20.0
    assert not look(gate).ready
    server.loaded = False
    look(gate)
    server.loaded, server.error = True, 0.0
    assert look(gate).ready


def test_a_server_that_does_not_answer_makes_it_not_ready_until_it_does(gate: Gate, server: StandIn) -> None:
    assert look(gate).ready
    server.broken = True
    state = look(gate)
    assert not state.ready
    assert "connection refused" in state.sentence
    server.broken = False
    assert look(gate).ready


def test_nan_answers_are_no_answers(gate: Gate, server: StandIn) -> None:
    server.error = float("nan")
    assert not look(gate).ready


def test_a_missing_artefact_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"manifest.json is not there"):
        Artifact.load(tmp_path)


class Wire(service_pb2_grpc.GRPCInferenceServiceServicer):
    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=(request.name, request.version) == ("digits", "1"))

    def ModelInfer(self, request: Any, context: Any) -> Any:
        image = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(list(request.inputs[0].shape))
        logits = np.stack([ANSWERS[sample.tobytes()] for sample in image])
        answer = service_pb2.ModelInferResponse(model_name="digits", model_version="1")
        answer.outputs.add(name="logits", datatype="FP32", shape=list(logits.shape))
        answer.raw_output_contents.append(logits.tobytes())
        return answer


@contextmanager
def serving(servicer: Wire, port: int = 0) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


@pytest.fixture
def wire() -> Iterator[str]:
    with serving(Wire()) as address:
        yield address


@pytest.mark.parametrize("output", [{"name": "logits", "shape": [1, 10]}, {"name": "other", "shape": [1, 10]}])
def test_an_answer_that_cannot_be_read_leaves_the_pod_not_ready_and_alive(output: dict[str, Any], artifact_root: Path) -> None:
    """A backend's fault, seen once: a shape of ten numbers, and no bytes."""

    class Faulty(Wire):
        def ModelInfer(self, request: Any, context: Any) -> Any:
            answer = service_pb2.ModelInferResponse(model_name="digits", model_version="1")
            answer.outputs.add(datatype="FP32", **output)
            answer.raw_output_contents.append(b"")
            return answer

    artifact = Artifact.load(artifact_root)
    with serving(Faulty()) as address:
        state = look(Gate(artifact, TritonServer(address, artifact.manifest.model_name, artifact.manifest.version)))
    assert not state.ready
    assert "its answer cannot be read" in state.sentence


def test_a_triton_that_comes_late_is_seen_soon(artifact_root: Path) -> None:
    """gRPC's own back-off would grow to two minutes while the port refuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    artifact = Artifact.load(artifact_root)
    gate = Gate(artifact, TritonServer(f"127.0.0.1:{port}", artifact.manifest.model_name, artifact.manifest.version))
    late = time.monotonic() + 6  # long enough for gRPC's default to wait several seconds between tries
    while time.monotonic() < late:
        assert not look(gate).ready
        time.sleep(0.1)
    with serving(Wire(), port):
        started = time.monotonic()
        while not look(gate).ready:
            assert time.monotonic() - started < 2
            time.sleep(0.1)


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode().strip()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode().strip()


def test_over_the_wire_and_http_the_pod_becomes_ready(artifact_root: Path, wire: str) -> None:
    artifact = Artifact.load(artifact_root)
    gate = Gate(artifact, TritonServer(wire, artifact.manifest.model_name, artifact.manifest.version))
    http = serve(gate, "127.0.0.1", 0)
    try:
        port = http.server_address[1]
        assert get(port, "/live") == (200, "the golden check is running")
        assert get(port, "/ready") == (503, "waiting for Triton to load the model")
        gate.look()
        status, sentence = get(port, "/ready")
        assert status == 200, sentence
        assert "\n" not in sentence
        assert get(port, "/metrics")[0] == 404
    finally:
        http.shutdown()


def test_a_server_that_is_not_there_leaves_the_pod_not_ready_and_alive(artifact_root: Path) -> None:
    artifact = Artifact.load(artifact_root)
    gate = Gate(artifact, TritonServer("127.0.0.1:1", artifact.manifest.model_name, artifact.manifest.version))
    state = look(gate)
    assert not state.ready
    assert "Triton does not answer" in state.sentence


def test_it_ends_when_told_to(artifact_root: Path, wire: str) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(artifact_root, wire, ("127.0.0.1", 0), stop))
    thread.start()
    stop.set()
    started = time.monotonic()
    thread.join(10)
    assert not thread.is_alive()
    assert time.monotonic() - started < 5


def test_a_mismatch_ends_the_sidecar_with_the_figures_as_its_last_words(artifact_root: Path) -> None:
    """A pod that is merely not ready tells nobody why; a termination message does."""

    class Wrong(Wire):
        def ModelInfer(self, request: Any, context: Any) -> Any:
            answer = super().ModelInfer(request, context)
            shifted = np.frombuffer(answer.raw_output_contents[0], np.float32) + 20
            answer.raw_output_contents[0] = shifted.astype(np.float32).tobytes()
            return answer

    with serving(Wrong()) as address, pytest.raises(StepFailed, match="does not answer as its checkpoint does") as failed:
        run(artifact_root, address, ("127.0.0.1", 0), threading.Event())
    assert failed.value.reason is Reason.GOLDEN_MISMATCH

"""Sidecar of every Triton pod: the pod is Ready only when *this* Triton gives the checkpoint's answers.

Replays the artefact's golden samples by gRPC and judges them by the parity rule with the manifest's own tolerance, so
a rescheduled pod, on whatever GPU, proves itself again. Holds no credentials and reads only what init checked.
"""

from __future__ import annotations

import http.server
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from perch_exporter.artifact import GOLDEN_KEY, PICTURES_KEY, parse_manifest
from perch_exporter.contract import NETWORK, Manifest, Reason, Verdict
from perch_exporter.download import local_path
from perch_exporter.failure import StepFailed, one_line
from perch_exporter.parity import Answers, judge
from perch_exporter.picture_check import PictureCheck
from perch_exporter.picture_samples import load_pictures
from perch_exporter.samples import Array, Golden, data_type_of, load_golden
from perch_exporter.triton_config import builds_engines, parse_config

log = logging.getLogger(__name__)

PERIOD_SECONDS = 1.0
_PROBE_TIMEOUT_SECONDS = 5.0
# The first inference on a GPU loads kernels and tunes them; it may take most of a minute.
_INFER_TIMEOUT_SECONDS = 120.0
# TensorRT as an accelerator builds an engine then, which takes minutes.
_BUILD_TIMEOUT_SECONDS = 1200.0

# While Triton starts, its port refuses; by default gRPC then waits longer and longer before it tries again, up to two
# minutes, in which a loaded model would go unseen.
_CHANNEL = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]


class Server(Protocol):
    """What the check needs of a Triton; both calls may raise InferenceServerException."""

    def is_ready(self) -> bool: ...

    def infer(self, inputs: Mapping[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Arrays of objects are bytes, all others FP32."""


@dataclass(frozen=True)
class Readiness:
    ready: bool
    sentence: str


@dataclass(frozen=True)
class Artifact:
    """What init brought: the manifest, the golden samples, and the batch size that Triton takes at most (0: any).

    `builds_engines`: Triton builds one where a batch is larger than any before, so the check asks for the largest there may be.
    """

    manifest: Manifest
    golden: Golden
    max_batch_size: int
    network: str
    """Triton's name of what takes the samples: behind an ensemble it is not the served name."""
    pictures: PictureCheck | None = None
    builds_engines: bool = False

    @classmethod
    def load(cls, root: Path) -> Artifact:
        path = root / Manifest.FILE_NAME
        if not path.exists():
            raise StepFailed(Reason.ARTIFACT_CORRUPT, f"{path} is not there; did the download run?")
        manifest = parse_manifest(path.read_bytes(), str(path))
        models = root / local_path("model/")
        pictured = PICTURES_KEY in manifest.files
        network = manifest.model_name + NETWORK if pictured else manifest.model_name
        config = parse_config((models / network / "config.pbtxt").read_text())
        golden = load_golden(root / local_path(GOLDEN_KEY))
        check = None
        if pictured:
            pictures = load_pictures(root / local_path(PICTURES_KEY), golden.samples)
            check = PictureCheck.load(models, manifest.model_name, pictures)
        return cls(manifest, golden, config.max_batch_size, network, check, builds_engines(config))


class TritonServer:
    def __init__(self, address: str, model: str, version: int, timeout: float = _INFER_TIMEOUT_SECONDS) -> None:
        self._client = triton.InferenceServerClient(address, channel_args=_CHANNEL)
        self._model, self._version, self._timeout = model, str(version), timeout

    def is_ready(self) -> bool:
        return bool(self._client.is_model_ready(self._model, self._version, client_timeout=_PROBE_TIMEOUT_SECONDS))

    def infer(self, inputs: Mapping[str, Any], outputs: list[str]) -> dict[str, Any]:
        tensors = []
        for name, array in inputs.items():
            tensor = triton.InferInput(name, list(array.shape), str(data_type_of(array) or "BYTES"))
            tensor.set_data_from_numpy(np.ascontiguousarray(array))
            tensors.append(tensor)
        answer = self._client.infer(
            self._model,
            tensors,
            model_version=self._version,
            outputs=[triton.InferRequestedOutput(name) for name in outputs],
            client_timeout=self._timeout,
        )
        try:
            arrays = {name: answer.as_numpy(name) for name in outputs}
        except (ValueError, TypeError) as error:
            raise InferenceServerException(f"its answer cannot be read: {error}") from error
        if missing := [name for name, array in arrays.items() if array is None]:
            raise InferenceServerException(f"its answer cannot be read: {', '.join(missing)} is not in it")
        return arrays


def check(artifact: Artifact, server: Server, front: Server | None = None) -> Readiness:
    """Replays every sample alone and in the largest batches that fit; raises InferenceServerException when cut off.

    `front`: the ensemble before the network, where there is one. It gets the pictures that the samples were made of.
    """
    golden = artifact.golden
    most = min(golden.samples, artifact.max_batch_size or golden.samples)
    runs = [(golden, batch) for batch in sorted({1, most})]
    if artifact.builds_engines and artifact.max_batch_size > golden.samples:
        runs[1:] = [(golden.repeated(artifact.max_batch_size), artifact.max_batch_size)]
    cases = [
        Answers(samples.outputs, _replay(samples, server, batch), f"{samples.samples} samples in batches of {batch}")
        for samples, batch in runs
    ]
    parity = judge(cases, artifact.manifest.tolerance)
    whose = f"{artifact.manifest.model_name} version {artifact.manifest.version}"
    if parity.verdict is Verdict.PASSED and artifact.pictures and front:
        wrong = artifact.pictures.check(artifact.golden, front.infer, most, artifact.manifest.tolerance)
        if wrong:
            return Readiness(False, f"{whose} does not answer to pictures as its checkpoint does: {wrong}")
    if parity.verdict is Verdict.PASSED:
        return Readiness(True, f"{whose} answers as its checkpoint does: {parity.message}")
    return Readiness(False, f"{whose} does not answer as its checkpoint does: {parity.message}")


def _replay(golden: Golden, server: Server, batch: int) -> dict[str, Array]:
    parts = [
        server.infer({name: array[start : start + batch] for name, array in golden.inputs.items()}, list(golden.outputs))
        for start in range(0, golden.samples, batch)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in golden.outputs}


@dataclass
class Gate:
    """Judged once each time the model becomes ready: a pass holds until the model goes away, and so does a mismatch."""

    artifact: Artifact
    server: Server
    front: Server | None = None
    _state: Readiness = Readiness(False, "waiting for Triton to load the model")
    _judged: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def state(self) -> Readiness:
        with self._lock:
            return self._state

    @property
    def mismatch(self) -> str | None:
        """What differs, where the model was judged and did not pass."""
        with self._lock:
            return self._state.sentence if self._judged and not self._state.ready else None

    def look(self) -> None:
        """One pass: is the model there, and has it proven itself since it came?"""
        try:
            if not all(server.is_ready() for server in (self.server, self.front) if server):
                self._set(Readiness(False, "waiting for Triton to load the model"), judged=False)
            elif not self._judged:
                self._set(check(self.artifact, self.server, self.front), judged=True)
        except InferenceServerException as error:
            self._set(Readiness(False, one_line(f"Triton does not answer: {error.message()}")), judged=False)

    def _set(self, state: Readiness, judged: bool) -> None:
        if state != self._state:
            log.info("%s: %s", "ready" if state.ready else "not ready", state.sentence)
        with self._lock:
            self._state, self._judged = state, judged


def serve(gate: Gate, host: str, port: int) -> http.server.HTTPServer:
    """Answers GET /ready (200 or 503, one sentence) and /live on a thread of its own, until shutdown() is called."""
    server = http.server.ThreadingHTTPServer((host, port), _handler(lambda: gate.state))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server


def _handler(state: Callable[[], Readiness]) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10  # seconds: a client that connects and says nothing must not hold a thread for ever

        def do_GET(self) -> None:
            if self.path == "/ready":
                now = state()
                self._answer(200 if now.ready else 503, now.sentence)
            elif self.path == "/live":
                self._answer(200, "the golden check is running")
            else:
                self._answer(404, "there are /ready and /live")

        def _answer(self, status: int, sentence: str) -> None:
            body = (sentence + "\n").encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes come every second; they are not worth a line each."""

    return Handler


def run(artifact_root: Path, address: str, listen: tuple[str, int], stop: threading.Event) -> None:
    """Until `stop` is set. Fails where the artefact cannot be read or the answers differ: waiting would not help.

    The failure is the termination message, which the operator shows; the kubelet starts the check again with growing delays.
    """
    artifact = Artifact.load(artifact_root)
    version = artifact.manifest.version
    timeout = _BUILD_TIMEOUT_SECONDS if artifact.builds_engines else _INFER_TIMEOUT_SECONDS
    front = TritonServer(address, artifact.manifest.model_name, version, timeout) if artifact.pictures else None
    gate = Gate(artifact, TritonServer(address, artifact.network, version, timeout), front)
    server = serve(gate, *listen)
    log.info("checking %s against %d golden samples", address, artifact.golden.samples)
    while not stop.is_set():
        gate.look()
        if gate.mismatch:
            server.shutdown()
            raise StepFailed(Reason.GOLDEN_MISMATCH, gate.mismatch)
        stop.wait(PERIOD_SECONDS)
    server.shutdown()

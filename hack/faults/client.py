"""Requests as a client sends them, right or wrong, with all that came back: tritonclient hides the status and the headers."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import grpc
import httpx
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from demo.load import INPUT
from faults import Pixels

Protocol = Literal["gRPC", "REST"]
PROTOCOLS: tuple[Protocol, ...] = ("gRPC", "REST")
PATIENCE = 15.0
"""Seconds that a client waits, where a case does not say."""
TOLD = "probe-backend"
"""The header of answers in which a filter of the route names the backend."""


@dataclass(frozen=True)
class Request:
    """One inference request; the defaults are right."""

    images: Pixels
    model: str = "digits"
    version: str = ""
    input: str = INPUT
    datatype: Literal["FP32", "INT64"] = "FP32"

    def tensor(self) -> NDArray[Any]:
        return self.images.astype(np.int64 if self.datatype == "INT64" else np.float32)


@dataclass(frozen=True)
class Outcome:
    status: str
    """`OK`, gRPC's name of the error, the HTTP status, or what the client did."""
    words: str = ""
    version: str | None = None
    """As the answer itself says."""
    told: str | None = None
    """Which backend answered, as a header from the route's filters says: on errors too."""

    @property
    def ok(self) -> bool:
        return self.status in ("OK", "200")


@dataclass
class Client:
    """Both protocols to one host name behind the gateway, or to a server itself. Thread-safe; `headers` go with each request."""

    address: str
    host: str
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = [("grpc.default_authority", self.host), ("grpc.enable_retries", 0)]
        self._channel = grpc.insecure_channel(self.address, options=options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
        self._rest = httpx.Client(base_url=f"http://{self.address}", headers={"Host": self.host, **self.headers}, limits=limits)

    def close(self) -> None:
        self._channel.close()
        self._rest.close()

    def ask(self, protocol: Protocol, request: Request, patience: float = PATIENCE) -> Outcome:
        """Sends it and waits so long: gRPC by a deadline, which the server learns; REST by closing the connection."""
        return self._ask_grpc(request, patience) if protocol == "gRPC" else self._ask_rest(request, patience)

    def leave(self, protocol: Protocol, request: Request, after: float) -> Outcome:
        """Sends it and gives it up after so many seconds, by gRPC's cancellation or by closing the connection."""
        if protocol == "REST":
            return self._ask_rest(request, after)
        call = self._stub.ModelInfer.future(_message(request), timeout=PATIENCE, metadata=self._metadata())
        try:
            call.result(timeout=after)
            return Outcome("OK")
        except grpc.FutureTimeoutError:
            call.cancel()
            return Outcome("cancelled")
        except grpc.RpcError as error:
            return _failed(error)

    def stream(self, requests: Sequence[Request]) -> list[Outcome]:
        """All of them over one gRPC stream, an answer for each: errors come inside of a stream that itself is in order."""
        answers = self._stub.ModelStreamInfer(iter(map(_message, requests)), timeout=PATIENCE, metadata=self._metadata())
        try:
            return [
                Outcome("error in the stream", answer.error_message) if answer.error_message else Outcome("OK")
                for answer in answers
            ]
        except grpc.RpcError as error:
            return [_failed(error)]

    def _metadata(self) -> list[tuple[str, str]]:
        return list(self.headers.items())

    def _ask_grpc(self, request: Request, patience: float) -> Outcome:
        try:
            answer, call = self._stub.ModelInfer.with_call(_message(request), timeout=patience, metadata=self._metadata())
        except grpc.RpcError as error:
            return _failed(error)
        return Outcome("OK", "", answer.model_version, _told(call.initial_metadata()))

    def _ask_rest(self, request: Request, patience: float) -> Outcome:
        version = f"/versions/{request.version}" if request.version else ""
        tensor = {
            "name": request.input,
            "datatype": request.datatype,
            "shape": list(request.images.shape),
            "data": request.tensor().ravel().tolist(),
        }
        try:
            answer = self._rest.post(f"/v2/models/{request.model}{version}/infer", json={"inputs": [tensor]}, timeout=patience)
        except httpx.TimeoutException:
            return Outcome("closed by the client")
        except httpx.HTTPError as error:
            return Outcome(type(error).__name__, str(error))
        told = answer.headers.get(TOLD)
        if answer.is_error:
            return Outcome(str(answer.status_code), answer.text, None, told)
        return Outcome(str(answer.status_code), "", answer.json()["model_version"], told)


def at_once(send: Callable[[], Outcome], count: int) -> list[Outcome]:
    """The same so many times, all in flight together."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: send(), range(count)))


def in_background(send: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def count(outcomes: Iterable[Outcome]) -> str:
    """`18 × INTERNAL, 2 × OK`"""
    return ", ".join(f"{number} × {status}" for status, number in Counter(outcome.status for outcome in outcomes).most_common())


def _message(request: Request) -> Any:
    message = service_pb2.ModelInferRequest(model_name=request.model, model_version=request.version)
    message.inputs.add(name=request.input, datatype=request.datatype, shape=list(request.images.shape))
    message.raw_input_contents.append(request.tensor().tobytes())
    return message


def _failed(error: Any) -> Outcome:
    metadata = (*(error.initial_metadata() or ()), *(error.trailing_metadata() or ()))
    return Outcome(error.code().name, error.details() or "", None, _told(metadata))


def _told(metadata: Iterable[Any]) -> str | None:
    return next((item.value for item in metadata if item.key == TOLD), None)

"""Load on a model behind the gateway, and a record of every answer: who gave it, when, and whether it came at all.

    with Load(cluster.gateway_address(), "digits.example.com", "digits", grpc_rate=100, rest_rate=10) as load:
        ...                                                  # whatever must not lose a request
    assert all(answer.ok for answer in load.results())
    count_by_version(load.results())                         # {"1": 812, "2": 88}

The demo, the end-to-end tests and the benchmarks use it. A failed request stays failed: gRPC's own retries are off, since they
would hide what is looked for. (The REST client replaces an idle connection that the server has closed, as HTTP clients do.)
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import numpy as np
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray

from demo import digits

Address = tuple[str, int]
Tensor = NDArray[np.float32]
Protocol = Literal["grpc", "rest"]
Ask = Callable[[Tensor], tuple[Tensor, str]]
"""Sends one batch; returns the output and the version that says it gave it."""

INPUT, OUTPUT = "image", "logits"
TIMEOUT = 10.0
"""Seconds until a request counts as failed."""


@dataclass(frozen=True)
class Answer:
    """What became of one request. Times are by time.monotonic()."""

    protocol: Protocol
    image: int
    """Index into the images."""
    sent: float
    answered: float
    version: str | None = None
    """As the answer itself says; None where there was none."""
    predicted: int | None = None
    """The class with the greatest output."""
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None


class Pace:
    """Gives out turns to the threads of one protocol: at most `rate` a second, also not to catch up, and `count` in all."""

    def __init__(self, rate: float, count: int | None, stopping: threading.Event) -> None:
        self._interval, self._count, self._stopping = 1 / rate, count, stopping
        self._lock = threading.Lock()
        self._begun, self._due = 0, time.monotonic()

    def turn(self) -> int | None:
        """Waits for the next turn and returns its number; None when there is no more."""
        with self._lock:
            if self._begun == self._count or self._stopping.wait(max(0.0, self._due - time.monotonic())):
                return None
            self._due = time.monotonic() + self._interval
            self._begun += 1
            return self._begun - 1


class Load:
    """Sends images one by one, over and over, from background threads of its own for each protocol, and keeps every Answer.

    A rate is in requests per second and never exceeded; 0 leaves a protocol out. A count bounds the requests of a protocol;
    without it they end with `stop`. The images are the held-out digits, if no others are given. `in_flight` is how many
    requests of a protocol may be under way at once: with 1 a server that does not answer stops the load until it times out.
    """

    def __init__(
        self,
        address: Address,
        hostname: str,
        model: str,
        *,
        grpc_rate: float = 0,
        rest_rate: float = 0,
        grpc_count: int | None = None,
        rest_count: int | None = None,
        images: Tensor | None = None,
        in_flight: int = 1,
    ) -> None:
        self._target = (address, hostname, model)
        self._images = digits.held_out()[0] if images is None else images
        self._answers: list[Answer] = []
        self._stopping = threading.Event()
        wanted: list[tuple[Protocol, float, int | None]] = [("grpc", grpc_rate, grpc_count), ("rest", rest_rate, rest_count)]
        self._threads = [
            threading.Thread(target=self._work, args=(protocol, pace), daemon=True, name=f"load-{protocol}-{number}")
            for protocol, pace in [(protocol, Pace(rate, count, self._stopping)) for protocol, rate, count in wanted if rate > 0]
            for number in range(in_flight)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wait(self, timeout: float) -> None:
        """Until every counted request has its outcome; raises TimeoutError with how many have."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            self.stop()
            raise TimeoutError(f"only {len(self._answers)} requests had ended after {timeout:.0f} s")

    def stop(self) -> None:
        """Begins no more requests, and waits for those under way."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(TIMEOUT + 5)

    def results(self) -> list[Answer]:
        """The outcomes so far, in the order in which they came."""
        return self._answers.copy()

    def __enter__(self) -> "Load":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _work(self, protocol: Protocol, pace: Pace) -> None:
        address, hostname, model = self._target
        # The REST client belongs to the thread that opens it.
        client = grpc_client(address, hostname) if protocol == "grpc" else rest_client(address)

        def ask(image: Tensor) -> tuple[Tensor, str]:
            return infer(client, model, image) if protocol == "grpc" else infer_rest(client, hostname, model, image)

        while (turn := pace.turn()) is not None:
            self._answers.append(self._ask(ask, protocol, turn % len(self._images)))
        client.close()

    def _ask(self, ask: Ask, protocol: Protocol, image: int) -> Answer:
        sent = time.monotonic()
        try:
            output, version = ask(self._images[image : image + 1])
        except Exception as error:  # whatever it was, a client would have been without an answer
            return Answer(protocol, image, sent, time.monotonic(), error=f"{type(error).__name__}: {error}")
        return Answer(protocol, image, sent, time.monotonic(), version, int(output.reshape(-1).argmax()))


def count_by_version(answers: Iterable[Answer]) -> dict[str, int]:
    return dict(sorted(Counter(answer.version for answer in answers if answer.version is not None).items()))


def grpc_client(address: Address, hostname: str) -> Any:
    """A client whose authority is the model's host name: that is what tells models apart behind one gateway."""
    # These replace the client's own, and gRPC by itself takes no answer above 4 MiB.
    options = [("grpc.default_authority", hostname), ("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0)]
    return tritonclient.grpc.InferenceServerClient("{}:{}".format(*address), channel_args=options)


def rest_client(address: Address) -> Any:
    """Good for the thread that makes it, and no other."""
    url = "{}:{}".format(*address)
    return tritonclient.http.InferenceServerClient(url, connection_timeout=TIMEOUT, network_timeout=TIMEOUT)


def infer(client: Any, model: str, images: Tensor) -> tuple[Tensor, str]:
    """One request by gRPC: images [N, ...] to the output and the version that answered."""
    tensor = tritonclient.grpc.InferInput(INPUT, list(images.shape), "FP32").set_data_from_numpy(images)
    result = client.infer(model, [tensor], client_timeout=TIMEOUT)
    return result.as_numpy(OUTPUT), result.get_response().model_version


def infer_rest(client: Any, hostname: str, model: str, images: Tensor) -> tuple[Tensor, str]:
    """The same by REST, with the host name as a header."""
    tensor = tritonclient.http.InferInput(INPUT, list(images.shape), "FP32").set_data_from_numpy(images)
    result = client.infer(model, [tensor], headers={"Host": hostname})
    return result.as_numpy(OUTPUT), result.get_response()["model_version"]

"""The load generator against a server of its own protocols: what it sends, how fast, and what it keeps of the outcome."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from demo.load import Answer, Load, count_by_version

IMAGES = np.zeros((3, 1, 28, 28), dtype=np.float32)
HOST = "digits.test"


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers class 7 as the version that `version` says; fails where that is None."""

    def __init__(self) -> None:
        self.version: str | None = "1"

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        if self.version is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
        logits = np.eye(10, dtype=np.float32)[[7]]
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, model_version=self.version)
        answer.outputs.add(name="logits", datatype="FP32", shape=[1, 10])
        answer.raw_output_contents.append(logits.tobytes())
        return answer


@pytest.fixture
def triton() -> Iterator[tuple[FakeTriton, tuple[str, int]]]:
    fake = FakeTriton()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield fake, ("127.0.0.1", port)
    server.stop(None)


@pytest.fixture
def rest() -> Iterator[tuple[list[str], tuple[str, int]]]:
    """A REST server that answers class 3 as version 2; yields the Host headers that it saw."""
    hosts: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            hosts.append(f"{self.headers['Host']} {self.path}")
            self.rfile.read(int(self.headers["Content-Length"]))
            output = {"name": "logits", "datatype": "FP32", "shape": [1, 10], "data": [0, 0, 0, 9, 0, 0, 0, 0, 0, 0]}
            body = json.dumps({"model_name": "digits", "model_version": "2", "outputs": [output]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hosts, ("127.0.0.1", server.server_port)
    server.shutdown()


def test_a_counted_load_sends_each_image_in_turn_and_keeps_every_answer(triton: tuple[FakeTriton, tuple[str, int]]) -> None:
    load = Load(triton[1], HOST, "digits", grpc_rate=500, grpc_count=7, images=IMAGES)
    load.start()
    load.wait(20)
    answers = load.results()
    assert [answer.image for answer in answers] == [0, 1, 2, 0, 1, 2, 0]
    assert all(answer.ok and answer.version == "1" and answer.predicted == 7 for answer in answers)
    assert all(answer.sent <= answer.answered for answer in answers)
    assert count_by_version(answers) == {"1": 7}


def test_rest_requests_carry_the_host_name_and_read_the_version(rest: tuple[list[str], tuple[str, int]]) -> None:
    hosts, address = rest
    load = Load(address, HOST, "digits", rest_rate=500, rest_count=4, images=IMAGES)
    load.start()
    load.wait(20)
    assert [(a.protocol, a.version, a.predicted) for a in load.results()] == [("rest", "2", 3)] * 4
    assert hosts == [f"{HOST} /v2/models/digits/infer"] * 4


def test_a_rate_is_never_exceeded(triton: tuple[FakeTriton, tuple[str, int]]) -> None:
    load = Load(triton[1], HOST, "digits", grpc_rate=100, grpc_count=31, images=IMAGES)
    started = time.monotonic()
    load.start()
    load.wait(20)
    # By the clock of the start: the moment at which a request is recorded as sent may lag behind its turn.
    assert all(answer.sent - started >= turn * 0.01 for turn, answer in enumerate(load.results()))


def test_a_refused_request_stays_failed_and_the_load_goes_on(triton: tuple[FakeTriton, tuple[str, int]]) -> None:
    fake, address = triton
    with Load(address, HOST, "digits", grpc_rate=200, images=IMAGES) as load:
        until(lambda: len(load.results()) >= 3)
        fake.version = None
        until(lambda: any(not answer.ok for answer in load.results()))
        fake.version = "2"
        until(lambda: load.results()[-1].version == "2")
    failed = [answer for answer in load.results() if not answer.ok]
    assert failed
    assert all(answer.version is None and answer.predicted is None and "draining" in (answer.error or "") for answer in failed)
    assert set(count_by_version(load.results())) == {"1", "2"}


def test_nothing_is_sent_after_stop(triton: tuple[FakeTriton, tuple[str, int]]) -> None:
    with Load(triton[1], HOST, "digits", grpc_rate=200, images=IMAGES) as load:
        until(lambda: bool(load.results()))
    stopped = time.monotonic()
    assert all(answer.sent < stopped for answer in load.results())
    assert not any(thread.name.startswith("load-") for thread in threading.enumerate())


def test_nobody_there_is_a_failure_of_every_request() -> None:
    load = Load(("127.0.0.1", 1), HOST, "digits", grpc_rate=100, rest_rate=100, grpc_count=2, rest_count=2, images=IMAGES)
    load.start()
    load.wait(30)
    assert [answer.ok for answer in load.results()] == [False] * 4


def test_a_load_that_does_not_end_says_how_far_it_came(triton: tuple[FakeTriton, tuple[str, int]]) -> None:
    load = Load(triton[1], HOST, "digits", grpc_rate=10, grpc_count=1000, images=IMAGES)
    load.start()
    with pytest.raises(TimeoutError, match=r"only \d+ requests had ended after 0 s"):
        load.wait(0.3)


def test_failed_answers_belong_to_no_version() -> None:
    assert count_by_version([Answer("grpc", 0, 0.0, 1.0, error="gone"), Answer("rest", 1, 0.0, 1.0, "2", 3)]) == {"2": 1}


def until(holds: Any) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)

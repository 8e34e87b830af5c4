"""The client that README shows, as it stands there, against a server of its protocol."""

import re
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from demo.load import grpc_client

README = (Path(__file__).parents[3] / "README.md").read_text()
ROWS = 6 * 2**18  # of four bytes: 6 MiB


class LargeAnswers(service_pb2_grpc.GRPCInferenceServiceServicer):
    def ModelInfer(self, request: Any, context: Any) -> Any:
        answer = service_pb2.ModelInferResponse(model_name=request.model_name)
        answer.outputs.add(name="mask", datatype="FP32", shape=[ROWS])
        answer.raw_output_contents.append(np.arange(ROWS, dtype=np.float32).tobytes())
        return answer


@pytest.fixture
def address() -> Any:
    server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.max_send_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(LargeAnswers(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def ask(client: Any) -> Any:
    tensor = tritonclient.grpc.InferInput("image", [1], "FP32")
    tensor.set_data_from_numpy(np.zeros(1, np.float32))
    return client.infer("resnet18", [tensor]).as_numpy("mask")


def test_readmes_client_gets_answers_above_4_mib(address: str) -> None:
    (code,) = re.findall(r"```python\n(client = tritonclient.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {"tritonclient": tritonclient}
    exec(code.replace("GATEWAY:80", address), names)
    assert (ask(names["client"]) == np.arange(ROWS)).all()


def test_the_demos_client_gets_answers_above_4_mib(address: str) -> None:
    host, port = address.split(":")
    assert (ask(grpc_client((host, int(port)), "digits.test")) == np.arange(ROWS)).all()


def test_channel_args_without_a_limit_of_their_own_would_not(address: str) -> None:
    client = tritonclient.grpc.InferenceServerClient(address, channel_args=[("grpc.default_authority", "digits.test")])
    with pytest.raises(tritonclient.grpc.InferenceServerException, match="larger than max"):
        ask(client)

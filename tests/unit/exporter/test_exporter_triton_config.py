"""config.pbtxt: what Triton's own protobuf reads back from it."""

from __future__ import annotations

from typing import Any

import pytest
from exporter_builders import request
from tritonclient.grpc import model_config_pb2 as pb

from perch_exporter.triton_config import build_config, parse_config


def config(**changes: Any) -> Any:
    return parse_config(build_config(request(**changes)))


def test_the_request_is_what_triton_reads() -> None:
    read = config(version=7, triton={"maxBatchSize": 32, "instanceCount": 2, "instanceKind": "GPU"})
    assert (read.name, read.backend, read.max_batch_size) == ("digits", "onnxruntime", 32)
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in read.input] == [("image", pb.TYPE_FP32, [1, 28, 28])]
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in read.output] == [("logits", pb.TYPE_FP32, [10])]
    assert list(read.version_policy.specific.versions) == [7]
    assert [(group.count, group.kind) for group in read.instance_group] == [(2, pb.ModelInstanceGroup.KIND_GPU)]
    assert not read.HasField("dynamic_batching")


def test_dynamic_batching_is_there_when_asked_for_even_with_nothing_in_it() -> None:
    assert config(triton={"maxBatchSize": 8, "dynamicBatching": {}}).HasField("dynamic_batching")
    batching = {"maxQueueDelayMicroseconds": 500, "preferredBatchSizes": [4, 8]}
    read = config(triton={"maxBatchSize": 8, "dynamicBatching": batching}).dynamic_batching
    assert (read.max_queue_delay_microseconds, list(read.preferred_batch_size)) == (500, [4, 8])


@pytest.mark.parametrize(("most", "dims"), [(8, [3, -1, -1]), (0, [-1, 3, -1, -1])])
def test_without_batching_the_batch_stands_in_the_dimensions(most: int, dims: list[int]) -> None:
    picture = {"name": "image", "dataType": "FP32", "shape": [3, -1, -1]}
    read = config(inputs=[picture], triton={"maxBatchSize": most})
    assert list(read.input[0].dims) == dims
    assert read.max_batch_size == most

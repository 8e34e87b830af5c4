"""config.pbtxt: what Triton's own protobuf reads back from it."""

from __future__ import annotations

from typing import Any

import pytest
from exporter_builders import request
from tritonclient.grpc import model_config_pb2 as pb

from perch_exporter.contract import DataType, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.triton_config import build_config, builds_engines, parse_config


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


def test_every_data_type_is_tritons_own() -> None:
    tensors = [{"name": f"t{data_type}", "dataType": data_type, "shape": [1]} for data_type in DataType]
    read = config(inputs=tensors)
    assert [pb.DataType.Name(tensor.data_type) for tensor in read.input] == [f"TYPE_{data_type}" for data_type in DataType]


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


def test_priorities_and_the_queues_policy_are_what_triton_reads() -> None:
    policy = {
        "timeoutAction": "Delay", "defaultTimeoutMicroseconds": 7, "allowTimeoutOverride": True, "maxQueueSize": 9
    }  # fmt: skip
    batching = {"priorityLevels": 3, "defaultPriorityLevel": 2, "defaultQueuePolicy": policy}
    read = config(triton={"maxBatchSize": 8, "dynamicBatching": batching}).dynamic_batching
    assert (read.priority_levels, read.default_priority_level) == (3, 2)
    queue = read.default_queue_policy
    assert (queue.timeout_action, queue.default_timeout_microseconds) == (pb.ModelQueuePolicy.DELAY, 7)
    assert (queue.allow_timeout_override, queue.max_queue_size) == (True, 9)


def test_without_a_policy_for_the_queue_none_is_written() -> None:
    assert not config(triton={"maxBatchSize": 8, "dynamicBatching": {}}).dynamic_batching.HasField("default_queue_policy")
    assert not config().HasField("response_cache")
    assert not config().model_warmup
    assert not config().output[0].label_filename


@pytest.mark.parametrize(
    ("most", "sizes", "dims"), [(1, [1], [3, 8, 8]), (8, [1, 8], [3, 8, 8]), (0, [0], [1, 3, 8, 8])]
)  # fmt: skip
def test_the_warm_up_runs_a_sample_alone_and_in_the_largest_batch(most: int, sizes: list[int], dims: list[int]) -> None:
    picture = {"name": "image", "dataType": "FP32", "shape": [3, -1, -1]}
    asked = request(inputs=[picture], triton={"maxBatchSize": most, "warmup": True})
    read = parse_config(build_config(asked, [(3, 8, 8)]))
    assert [warmup.batch_size for warmup in read.model_warmup] == sizes
    for warmup in read.model_warmup:
        sample = warmup.inputs["image"]
        assert (sample.data_type, list(sample.dims), sample.input_data_file) == (pb.TYPE_FP32, dims, "input-0")


def test_overrides_are_merged_and_a_list_takes_the_place_of_perchs_own() -> None:
    text = """
      dynamic_batching { max_queue_delay_microseconds: 9 }
      instance_group { count: 3 kind: KIND_CPU rate_limiter { priority: 2 } }
      optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" } } }
      parameters { key: "intra_op_thread_count" value { string_value: "2" } }
    """
    batching = {"maxQueueDelayMicroseconds": 5, "preferredBatchSizes": [4]}
    read = config(triton={"maxBatchSize": 8, "dynamicBatching": batching, "configOverrides": text})
    assert read.dynamic_batching.max_queue_delay_microseconds == 9
    assert list(read.dynamic_batching.preferred_batch_size) == [4]
    assert [(group.count, group.rate_limiter.priority) for group in read.instance_group] == [(3, 2)]
    assert read.optimization.execution_accelerators.gpu_execution_accelerator[0].name == "tensorrt"
    assert read.parameters["intra_op_thread_count"].string_value == "2"
    preferred = config(
        triton={
            "maxBatchSize": 8, "dynamicBatching": batching, "configOverrides": "dynamic_batching { preferred_batch_size: [2] }"
        }
    )  # fmt: skip
    assert list(preferred.dynamic_batching.preferred_batch_size) == [2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('name: "other"', "may not set name; it may set dynamic_batching"),
        ('parameters { key: "a" } backend: "python"', "may not set backend"),
        ('platform: "ensemble"', "may not set platform"),
        ("max_batch_size: 64", "may not set max_batch_size"),
        ('input { name: "x" }', "may not set input"),
        ('output { label_filename: "/etc/passwd" }', "may not set output"),
        ("version_policy { latest { num_versions: 2 } }", "may not set version_policy"),
        ('default_model_filename: "../../other"', "may not set default_model_filename"),
        ('model_warmup { inputs { key: "x" value { input_data_file: "/etc/passwd" } } }', "may not set model_warmup"),
        ('model_repository_agents { agents { name: "x" } }', "may not set model_repository_agents"),
        ('model_operations { op_library_filename: "x.so" }', "may not set model_operations"),
        ("ensemble_scheduling { }", "may not set ensemble_scheduling"),
        ("parameters { }\noptimisation { }", "2:1"),
        ("parameters {", "cannot be read"),
        ("dynamic_batching { }", "triton.maxBatchSize leaves no room"),
    ],
)
def test_overrides_are_refused(text: str, says: str) -> None:
    with pytest.raises(StepFailed) as failed:
        config(triton={"maxBatchSize": 1, "configOverrides": text})
    assert failed.value.reason is Reason.INVALID_REQUEST
    assert says in failed.value.message
    assert "triton.configOverrides" in failed.value.message


def test_tensorrt_as_an_accelerator_is_told_the_files_precision() -> None:
    triton = {"maxBatchSize": 8, "accelerator": "TensorRT", "instanceKind": "GPU"}
    read = config(triton=triton, conversion__precision="FP16")
    (accelerator,) = read.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert accelerator.parameters["precision_mode"] == "FP16"
    assert read.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert builds_engines(read)
    assert not builds_engines(config())

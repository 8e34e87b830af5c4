"""config.pbtxt, made from the request alone through Triton's own protobuf, so that no name can smuggle in a setting."""

from __future__ import annotations

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from perch_exporter.contract import ExportRequest, InstanceKind, TensorSpec

_KINDS = {
    InstanceKind.AUTO: pb.ModelInstanceGroup.KIND_AUTO,
    InstanceKind.CPU: pb.ModelInstanceGroup.KIND_CPU,
    InstanceKind.GPU: pb.ModelInstanceGroup.KIND_GPU,
}


def build_config(request: ExportRequest) -> str:
    """The text of config.pbtxt.

    Clients always send the batch as the first dimension. With maxBatchSize above 0 Triton adds it itself; with 0 it
    stands in `dims` as -1, and Triton hands any batch through without batching or bounding.
    """
    triton = request.triton
    batch = [] if triton.max_batch_size else [-1]
    config = pb.ModelConfig(
        name=request.model_name,
        backend="onnxruntime",
        max_batch_size=triton.max_batch_size,
        input=[pb.ModelInput(**_tensor(spec, batch)) for spec in request.inputs],
        output=[pb.ModelOutput(**_tensor(spec, batch)) for spec in request.outputs],
        instance_group=[pb.ModelInstanceGroup(count=triton.instance_count, kind=_KINDS[triton.instance_kind])],
        version_policy=pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=[request.version])),
    )
    if batching := triton.dynamic_batching:
        config.dynamic_batching.SetInParent()
        config.dynamic_batching.max_queue_delay_microseconds = batching.max_queue_delay_microseconds
        config.dynamic_batching.preferred_batch_size.extend(batching.preferred_batch_sizes or ())
    text: str = text_format.MessageToString(config)
    return text


def parse_config(text: str) -> pb.ModelConfig:
    return text_format.Parse(text, pb.ModelConfig())


def _tensor(spec: TensorSpec, batch: list[int]) -> dict[str, object]:
    return {"name": spec.name, "data_type": pb.TYPE_FP32, "dims": [*batch, *spec.shape]}

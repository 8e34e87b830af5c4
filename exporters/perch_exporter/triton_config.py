"""config.pbtxt, made from the request alone through Triton's own protobuf, so that no name can smuggle in a setting."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from perch_exporter.contract import DynamicBatching, ExportRequest, InstanceKind, Reason, Target, TensorSpec, TimeoutAction
from perch_exporter.failure import StepFailed

_KINDS = {
    InstanceKind.AUTO: pb.ModelInstanceGroup.KIND_AUTO,
    InstanceKind.CPU: pb.ModelInstanceGroup.KIND_CPU,
    InstanceKind.GPU: pb.ModelInstanceGroup.KIND_GPU,
}


_WORKSPACE_BYTES = 2**30
"""GPU memory that TensorRT may use while it builds an engine."""


_TIMEOUT_ACTIONS = {
    TimeoutAction.REJECT: pb.ModelQueuePolicy.REJECT,
    TimeoutAction.DELAY: pb.ModelQueuePolicy.DELAY,
}

OVERRIDABLE = ("dynamic_batching", "instance_group", "metric_tags", "optimization", "parameters", "response_cache")
"""What configOverrides may say. All else is Perch's own, loads code or files, or changes what the gates have proven."""

LABELS = "labels.txt"


def warmup_file(place: int) -> str:
    """Name of the raw sample of the input at `place`. A tensor's name could be none of a file."""
    return f"input-{place}"


def build_config(request: ExportRequest, sample_shapes: Sequence[Sequence[int]] | None = None) -> str:
    """The text of config.pbtxt. Raises InvalidRequest where configOverrides cannot be merged.

    Clients always send the batch as the first dimension. With maxBatchSize above 0 Triton adds it itself; with 0 it
    stands in `dims` as -1, and Triton hands any batch through without batching or bounding.
    `sample_shapes`: of one sample of each input, for the warm-up; the request's own where it names every size.
    """
    triton = request.triton
    batch = [] if triton.max_batch_size else [-1]
    config = pb.ModelConfig(
        name=request.network_name,
        backend="tensorrt" if request.conversion.target is Target.TENSOR_RT else "onnxruntime",
        max_batch_size=triton.max_batch_size,
        input=[pb.ModelInput(**tensor_of(spec, batch)) for spec in request.inputs],
        output=[pb.ModelOutput(**tensor_of(spec, batch)) for spec in request.outputs],
        instance_group=[pb.ModelInstanceGroup(count=triton.instance_count, kind=_KINDS[triton.instance_kind])],
        version_policy=pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=[request.version])),
    )
    if triton.accelerator is not None:
        config.optimization.execution_accelerators.gpu_execution_accelerator.add(
            name="tensorrt",
            parameters={
                # What the file's own precision needs; TensorRT lowers nothing by itself then, but for nodes of an FP16 file.
                "precision_mode": request.conversion.precision.value,
                "max_workspace_size_bytes": str(_WORKSPACE_BYTES),
            },
        )
    if triton.dynamic_batching:
        config.dynamic_batching.CopyFrom(_batching(triton.dynamic_batching))
    if triton.labels:
        config.output[0].label_filename = LABELS
    if triton.response_cache and request.preprocessing is None:  # else pictures are what is remembered
        config.response_cache.enable = True
    if triton.warmup:
        shapes = sample_shapes or [spec.shape for spec in request.inputs]
        config.model_warmup.extend(_warmup(request, shapes, size) for size in sorted({1, max(1, triton.max_batch_size)}))
    if triton.config_overrides:
        _merge(config, triton.config_overrides)
    text: str = text_format.MessageToString(config)
    return text


def builds_engines(config: pb.ModelConfig) -> bool:
    """Whether batches of sizes not seen before make Triton build, which takes minutes."""
    return bool(config.optimization.execution_accelerators.gpu_execution_accelerator)


def parse_config(text: str) -> pb.ModelConfig:
    return text_format.Parse(text, pb.ModelConfig())


def tensor_of(spec: TensorSpec, batch: Sequence[int] = ()) -> dict[str, object]:
    return {"name": spec.name, "data_type": pb.DataType.Value(f"TYPE_{spec.data_type}"), "dims": [*batch, *spec.shape]}


def _batching(asked: DynamicBatching) -> pb.ModelDynamicBatching:
    batching = pb.ModelDynamicBatching(
        max_queue_delay_microseconds=asked.max_queue_delay_microseconds,
        preferred_batch_size=asked.preferred_batch_sizes or (),
        priority_levels=asked.priority_levels or 0,
        default_priority_level=asked.default_priority_level or 0,
    )
    if policy := asked.default_queue_policy:
        batching.default_queue_policy.CopyFrom(
            pb.ModelQueuePolicy(
                timeout_action=_TIMEOUT_ACTIONS[policy.timeout_action or TimeoutAction.REJECT],
                default_timeout_microseconds=policy.default_timeout_microseconds or 0,
                allow_timeout_override=policy.allow_timeout_override,
                max_queue_size=policy.max_queue_size or 0,
            )
        )
    return batching


def _warmup(request: ExportRequest, shapes: Sequence[Sequence[int]], size: int) -> pb.ModelWarmup:
    """Where Triton batches, the file holds one sample and Triton repeats it; else the batch is a dimension like others."""
    batch = [] if request.triton.max_batch_size else [1]
    sample = {
        spec.name: pb.ModelWarmup.Input(
            data_type=pb.DataType.Value(f"TYPE_{spec.data_type}"), dims=[*batch, *shape], input_data_file=warmup_file(place)
        )
        for place, (spec, shape) in enumerate(zip(request.inputs, shapes, strict=True))
    }  # fmt: skip
    return pb.ModelWarmup(name=f"batch of {size}", batch_size=size if request.triton.max_batch_size else 0, inputs=sample)


def _merge(config: pb.ModelConfig, text: str) -> None:
    """A list of the overrides takes the place of Perch's own: two groups of instances, or every batch size, nobody means."""
    try:
        overrides = text_format.Parse(text, pb.ModelConfig())
    except (text_format.ParseError, UnicodeError) as error:
        raise _invalid(f"cannot be read (line:column): {error}") from error
    for field, _ in overrides.ListFields():
        if field.name not in OVERRIDABLE:
            raise _invalid(f"may not set {field.name}; it may set {', '.join(OVERRIDABLE)}")
    if overrides.HasField("dynamic_batching") and config.max_batch_size <= 1:
        raise _invalid("asks for dynamic_batching, and triton.maxBatchSize leaves no room for a batch")
    if overrides.instance_group:
        config.ClearField("instance_group")
    if overrides.dynamic_batching.preferred_batch_size:
        config.dynamic_batching.ClearField("preferred_batch_size")
    config.MergeFrom(overrides)


def _invalid(what: str) -> StepFailed:
    return StepFailed(Reason.INVALID_REQUEST, f"triton.configOverrides {what}")

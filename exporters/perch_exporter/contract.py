"""The contract between the operator and the exporter: what goes into an export Job and what comes out of it.

The operator writes `ExportRequest` and `DeleteRequest` and reads `Summary`; the exporter does the reverse. `Manifest`,
`Claim` and `Figures` travel between the exporter's own steps. Nothing here may import torch, numpy, an object store's
library or a Kubernetes client. JSON speaks camelCase, Python snake_case. A request's unknown field is refused: what is
asked for and not known is an error and never silently dropped. What is read back (`_Kept`) may be a newer release's, and
its unknown fields are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    StringConstraints,
    model_validator,
)
from pydantic.alias_generators import to_camel

SUMMARY_LIMIT = 3 * 1024
"""Most bytes of a summary: the kubelet cuts a termination message at 4 KiB, and 12 KiB over all containers of a pod."""

MANIFEST_LIMIT = 256 * 1024
"""Most bytes of a manifest that a reader takes in: it lists a handful of files."""


def _text(pattern: str, limit: int) -> StringConstraints:
    return StringConstraints(pattern=pattern, min_length=1, max_length=limit)


def _at_most_one(text: str) -> str:
    if Decimal(text) > 1:
        raise ValueError(f"{text} is more than 1, and this is a share")
    return text


# URIs and versions are plain ASCII without quotes or backslashes: they go into summaries, whose size must be bounded.
_URI = r"[A-Za-z0-9._~%!$&'()*+,;=:@/-]+$"
StoreUri = Annotated[str, _text(r"^(s3://[a-z0-9]|file:///)" + _URI, 1024)]
Endpoint = Annotated[str, _text(r"^https?://[A-Za-z0-9\[]" + _URI.replace("/-]", r"/\[\]-]"), 512)]
Region = Annotated[str, _text(r"^[a-z0-9-]+$", 64)]
Sha256 = Annotated[str, _text(r"^[0-9a-f]{64}$", 64)]
Digest = Annotated[str, _text(r"^sha256:[0-9a-f]{64}$", 71)]
Revision = Annotated[str, _text(r"^[0-9a-f]{8}$", 8)]
DnsName = Annotated[str, _text(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", 253)]
ModelName = Annotated[str, _text(r"^[A-Za-z0-9][A-Za-z0-9._-]*$", 128)]
TensorName = Annotated[str, _text(r"^[A-Za-z0-9_.:/][A-Za-z0-9_.:/-]*$", 128)]
"""Other frameworks' exports call tensors 495, images:0, gpu_0/data_0 or /fc/Gemm_output_0."""
ToolVersion = Annotated[str, _text(r"^[A-Za-z0-9.+_-]+$", 64)]
ComputeCapability = Annotated[str, _text(r"^[0-9]{1,2}\.[0-9]$", 4)]
ArtifactPath = Annotated[str, _text(r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$", 512)]
Share = Annotated[str, _text(r"^[0-9]+(\.[0-9]+)?([eE]-?[0-9]{1,2})?$", 32), AfterValidator(_at_most_one)]
"""From 0 to 1, as text."""

Tolerance = Annotated[str, _text(r"^[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?$", 32)]
"""A decimal number above 0, as text: JSON floats do not survive every client unchanged, and these are hashed."""

Version = Annotated[int, Field(ge=1, le=2**31 - 1)]
Figure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Contract(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )

    def to_json(self) -> str:
        """One line of JSON; fields that are not set are left out."""
        return self.model_dump_json(exclude_none=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Raises pydantic.ValidationError, which names every field that is wrong."""
        return cls.model_validate_json(text)


class _Kept(_Contract):
    """What outlives the release that wrote it. A release that is rolled back has to read what its successor published."""

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Ignores fields that this release does not know, those of its parts too; all else is refused as in a request."""
        return cls.model_validate_json(text, extra="ignore")


class Owner(_Contract):
    """Whose artefact it is. `cluster` is a lasting name of the cluster: the UID of its namespace kube-system, say."""

    cluster: DnsName
    namespace: DnsName
    name: DnsName

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name} of cluster {self.cluster}"


class Location(_Contract):
    """A place in an object store (`s3://bucket/key`) or, on a laptop, in the file system (`file:///path`)."""

    uri: StoreUri
    endpoint: Endpoint | None = None
    region: Region | None = None


class Object(Location):
    """One file that a request names: fetch brings it, and nothing parses a byte of it before its sha256 is right."""

    LIMIT: ClassVar[int] = 2**30
    """Most bytes, whatever the request says: a node's disk is shared."""

    sha256: Sha256


class Destination(Location):
    """The artefact's own full prefix: <repository>/<namespace>/<name>/<version>-<artifactRevision>."""


class CheckpointFormat(StrEnum):
    STATE_DICT = "StateDict"
    SAFE_TENSORS = "SafeTensors"
    TORCH_SCRIPT = "TorchScript"
    TORCH_EXPORT = "TorchExport"
    ONNX = "ONNX"

    @property
    def is_weights(self) -> bool:
        """Whether the file holds weights alone; else it is a whole network, and needs no architecture."""
        return self in (CheckpointFormat.STATE_DICT, CheckpointFormat.SAFE_TENSORS)


class Checkpoint(Object):
    LIMIT: ClassVar[int] = 20 * 2**30
    """Classical networks stay below 1 GiB."""

    format: CheckpointFormat
    state_dict_key: Annotated[str, _text(r"^[A-Za-z0-9_.-]+$", 128)] | None = None
    """Where a training checkpoint keeps the state dict."""
    trust_source: StrictBool = False
    """Whether the pickle may run code: it is the user's own, and convert's sandbox is what holds it."""

    @model_validator(mode="after")
    def _key_in_a_pickle(self) -> Self:
        if self.state_dict_key is not None and self.format is not CheckpointFormat.STATE_DICT:
            raise ValueError(f"stateDictKey is for format StateDict alone, not for {self.format}")
        return self

    @model_validator(mode="after")
    def _trust_in_a_pickle(self) -> Self:
        if self.trust_source and self.format is not CheckpointFormat.STATE_DICT:
            raise ValueError(f"trustSource is for format StateDict alone, which is a pickle; {self.format} is none")
        return self


DETECTORS = (
    "torchvision:fcos_resnet50_fpn",
    "torchvision:retinanet_resnet50_fpn",
    "torchvision:retinanet_resnet50_fpn_v2",
    "torchvision:ssd300_vgg16",
    "torchvision:ssdlite320_mobilenet_v3_large",
)
"""Networks that answer with boxes, labels and scores; `perch_exporter.detectors` exports them."""

MOST_DETECTIONS = 1000
"""In one image: whoever judges them compares each with each."""

ParameterValue = (
    StrictBool | StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)] | Annotated[StrictStr, Field(max_length=1024)]
)
ParameterName = Annotated[str, _text(r"^[A-Za-z_][A-Za-z0-9_]*$", 64)]
_PYTHON_NAME = r"[A-Za-z_][A-Za-z0-9_]*"


class Source(Object):
    """The user's own code: a wheel or a zip with packages at its top."""

    LIMIT: ClassVar[int] = 256 * 2**20


class Architecture(_Contract):
    """By name: `lenet5`, `zfnet`, or `torchvision:<name>`, whose parameters are in camelCase: numClasses for num_classes.

    Or the user's own: `entryPoint` is a factory in `source` (`package.module:factory`), called with the parameters as they are.
    `layer`: serve what this layer gives in place of the network's own answer.
    """

    name: Annotated[str, _text(r"^(lenet5|zfnet|torchvision:[a-z0-9_]+)$", 128)] | None = None
    entry_point: Annotated[str, _text(rf"^{_PYTHON_NAME}(\.{_PYTHON_NAME})*:{_PYTHON_NAME}(\.{_PYTHON_NAME})*$", 256)] | None = (
        None
    )
    source: Source | None = None
    layer: Annotated[str, _text(r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*$", 128)] | None = None
    parameters: Annotated[Mapping[ParameterName, ParameterValue], Field(max_length=32)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.name is None) == (self.entry_point is None):
            raise ValueError("give either name, for a network that is known here, or entryPoint, for one of your own")
        if (self.entry_point is None) != (self.source is None):
            raise ValueError("entryPoint and source go together: the factory, and the wheel or zip that holds it")
        if self.name is not None and (odd := [name for name in self.parameters if "_" in name or name[0].isupper()]):
            raise ValueError(f"parameters are in camelCase, such as numClasses, and not {', '.join(odd)}")
        return self

    def __str__(self) -> str:
        return str(self.name or self.entry_point)


class DataType(StrEnum):
    """Of tensors, as Triton names them."""

    FP32 = "FP32"
    FP16 = "FP16"
    INT64 = "INT64"
    INT32 = "INT32"
    UINT8 = "UINT8"
    BOOL = "BOOL"


class TensorSpec(_Contract):
    """One input or output as clients see it, without the batch dimension; -1 is a dimension of any size."""

    name: TensorName
    data_type: DataType
    shape: Annotated[tuple[Annotated[int, Field(ge=-1, le=2**20)], ...], Field(max_length=7)]

    @model_validator(mode="after")
    def _no_empty_dimension(self) -> Self:
        if 0 in self.shape:
            raise ValueError(f"{self.name}: a dimension is 1 or more, or -1 where it may have any size")
        return self

    @property
    def is_vector(self) -> bool:
        """Whether it is more than one fractional number for each sample: something that points somewhere."""
        return self.data_type in (DataType.FP32, DataType.FP16) and any(size != 1 for size in self.shape)

    @property
    def is_image(self) -> bool:
        """Whether it is a colour image of one size, channels first."""
        return self.data_type is DataType.FP32 and len(self.shape) == 3 and self.shape[0] == 3 and -1 not in self.shape


class Precision(StrEnum):
    """Of weights and compute. Clients send and get FP32 in any case."""

    FP32 = "FP32"
    FP16 = "FP16"
    INT8 = "INT8"


class DataSet(Object):
    """Real samples, with labels or without; `perch_exporter.datasets` reads them."""

    LIMIT: ClassVar[int] = 8 * 2**30


class Target(StrEnum):
    ONNX = "ONNX"
    TENSOR_RT = "TensorRT"
    """A plan: built on a GPU, for GPUs of its kind and for the one version of TensorRT that built it."""


class Conversion(_Contract):
    target: Target = Target.ONNX
    precision: Precision = Precision.FP32
    opset: Annotated[int, Field(ge=18, le=23)] | None = None
    calibration: DataSet | None = None

    @model_validator(mode="after")
    def _scales_from_samples(self) -> Self:
        if (self.precision is Precision.INT8) != (self.calibration is not None):
            raise ValueError("calibration is for precision INT8, which needs it: it has real samples to choose scales by")
        return self


class ParityLimits(_Contract):
    """What a request says of the tolerance; what it leaves out is by precision (`ExportRequest.tolerance`)."""

    absolute_tolerance: Tolerance | None = None
    relative_tolerance: Tolerance | None = None
    minimum_top1_agreement: Share | None = None
    minimum_cosine: Share | None = None

    @model_validator(mode="after")
    def _positive(self) -> Self:
        for name, value in (("absolute", self.absolute_tolerance), ("relative", self.relative_tolerance)):
            if value is not None and Decimal(value) <= 0:
                raise ValueError(f"{name}Tolerance {value} must be above 0: two FP32 programs never agree in every bit")
        return self


class ParityTolerance(_Contract):
    """How far the artefact's answers may lie from the checkpoint's; `perch_exporter.parity` states the exact rule."""

    absolute_tolerance: Tolerance = "1e-3"
    relative_tolerance: Tolerance = "1e-3"
    minimum_top1_agreement: Share | None = None
    """Of outputs that are one row of class scores for each sample; not judged where it is None."""
    minimum_cosine: Share | None = None
    """Between the two vectors of any sample, less the centre that all samples share; not judged where it is None."""
    minimum_iou: Share | None = None
    """Of detections, which are judged by another rule: the overlap at which two boxes are the same."""

    @property
    def absolute(self) -> float:
        return float(self.absolute_tolerance)

    @property
    def relative(self) -> float:
        return float(self.relative_tolerance)

    @property
    def top1(self) -> float:
        return float(self.minimum_top1_agreement or 0)

    @property
    def cosine(self) -> float:
        return float(self.minimum_cosine or 0)


# FP16: untrained networks of torchvision, conditioned worse than trained ones, came to 0.1 % to 3 % of the spread.
_DEFAULT_TOLERANCE = {
    Precision.FP32: ParityTolerance(),
    Precision.FP16: ParityTolerance(absolute_tolerance="5e-2", relative_tolerance="5e-2"),
    Precision.INT8: ParityTolerance(absolute_tolerance="0.25", relative_tolerance="0.25", minimum_top1_agreement="0.9"),
}


# Of a resnet18's features FP16 came to 0.99999 and INT8 to 0.98, untrained; trained, which is easier, to more.
_FEATURES_COSINE = {Precision.FP32: "0.999", Precision.FP16: "0.99", Precision.INT8: "0.95"}


# Which of two boxes survives hangs on a limit, so a few of a thousand may be others; the boxes themselves hardly move.
_DETECTIONS_TOLERANCE = {"relative_tolerance": "1e-2", "minimum_iou": "0.9"}


class OnFailure(StrEnum):
    BLOCK = "Block"
    WARN = "Warn"


class AccuracyGate(_Contract):
    """Top-1 accuracy on a labelled data set: at least `minimum`, and at most `maximum_drop` below the checkpoint's own."""

    dataset: DataSet
    minimum: Share | None = None
    maximum_drop: Share | None = None
    on_failure: OnFailure = OnFailure.BLOCK


class Verification(_Contract):
    samples: DataSet | None = None
    """Real samples for the parity gate, in place of made ones."""
    parity: ParityLimits = ParityLimits()
    accuracy: AccuracyGate | None = None


BatchSize = Annotated[int, Field(ge=1, le=65536)]


class TimeoutAction(StrEnum):
    REJECT = "Reject"
    DELAY = "Delay"


class QueuePolicy(_Contract):
    timeout_action: TimeoutAction | None = None
    default_timeout_microseconds: Annotated[int, Field(ge=1, le=3_600_000_000)] | None = None
    allow_timeout_override: bool = False
    max_queue_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


PriorityLevel = Annotated[int, Field(ge=1, le=64)]


class DynamicBatching(_Contract):
    max_queue_delay_microseconds: Annotated[int, Field(ge=0, le=60_000_000)] = 0
    preferred_batch_sizes: Annotated[tuple[BatchSize, ...], Field(max_length=16)] | None = None
    priority_levels: PriorityLevel | None = None
    default_priority_level: PriorityLevel | None = None
    default_queue_policy: QueuePolicy | None = None

    @model_validator(mode="after")
    def _a_default_among_the_levels(self) -> Self:
        levels, default = self.priority_levels, self.default_priority_level
        if (levels is None) != (default is None):
            raise ValueError("priorityLevels and defaultPriorityLevel belong together: give both, or neither")
        if levels is not None and default is not None and default > levels:
            raise ValueError(f"defaultPriorityLevel {default} is above priorityLevels {levels}")
        return self


class InstanceKind(StrEnum):
    AUTO = "AUTO"
    CPU = "CPU"
    GPU = "GPU"


Label = Annotated[str, _text(r"^[^\x00-\x1f\x7f]+$", 128)]
LABELS_LIMIT = 128 * 1024
"""Most bytes of all labels: the request is an annotation of the Job, and those have 256 KiB in all."""


class Accelerator(StrEnum):
    TENSOR_RT = "TensorRT"


class Triton(_Contract):
    """maxBatchSize 0: Triton neither batches nor bounds; clients send the batch as the first dimension either way."""

    max_batch_size: Annotated[int, Field(ge=0, le=65536)]
    dynamic_batching: DynamicBatching | None = None
    instance_count: Annotated[int, Field(ge=1, le=256)] = 1
    instance_kind: InstanceKind = InstanceKind.AUTO
    labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=1000)] | None = None
    warmup: bool = False
    response_cache: bool = False
    config_overrides: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Protobuf text; `perch_exporter.triton_config` says what may stand in it."""
    accelerator: Accelerator | None = None
    """Who runs the graph in onnxruntime's place, as far as it can. TensorRT builds its engines when the first request comes."""

    @model_validator(mode="after")
    def _labels_have_room(self) -> Self:
        size = sum(len(label.encode()) for label in self.labels or ())
        if size > LABELS_LIMIT:
            raise ValueError(f"labels take {size:,} bytes, more than {LABELS_LIMIT:,}: shorten them")
        return self

    @model_validator(mode="after")
    def _accelerated_on_a_gpu(self) -> Self:
        if self.accelerator is not None and self.instance_kind is not InstanceKind.GPU:
            raise ValueError(f"accelerator {self.accelerator} needs instanceKind GPU, not {self.instance_kind}")
        if self.accelerator is not None and self.max_batch_size == 0:
            raise ValueError("accelerator TensorRT needs maxBatchSize of 1 or more: engines are built up to a largest batch")
        return self

    @model_validator(mode="after")
    def _batching_has_room(self) -> Self:
        if self.dynamic_batching is None:
            return self
        if self.max_batch_size == 0:
            raise ValueError("dynamicBatching needs maxBatchSize of 1 or more: Triton batches nothing where it is 0")
        too_big = [size for size in self.dynamic_batching.preferred_batch_sizes or () if size > self.max_batch_size]
        if too_big:
            raise ValueError(f"preferredBatchSizes {too_big} are above maxBatchSize {self.max_batch_size}")
        return self


PREPROCESS, NETWORK, POSTPROCESS = "-preprocess", "-network", "-postprocess"
"""What the names of an ensemble's inner models end with; they begin with the served name."""

Side = Annotated[int, Field(ge=1, le=4096)]
Sides = Annotated[tuple[Side, ...], Field(min_length=1, max_length=2)]
Offset = Annotated[str, _text(r"^-?[0-9]+(\.[0-9]+)?([eE]-?[0-9]{1,2})?$", 24)]


class Preprocessing(_Contract):
    """Pictures in place of tensors, as torchvision's transforms make the ones of the others; `perch_exporter.pictures` does it.

    One number of `resize` is the shorter side, two are height and width; of `center_crop` one is both.
    """

    decode: Literal["RGB", "L"] = "RGB"
    resize: Sides | None = None
    center_crop: Sides | None = None
    interpolation: Literal["Bilinear", "Bicubic"] = "Bilinear"
    mean: Annotated[tuple[Offset, ...], Field(min_length=1, max_length=3)] | None = None
    std: Annotated[tuple[Tolerance, ...], Field(min_length=1, max_length=3)] | None = None
    layout: Literal["CHW", "HWC"] = "CHW"

    @model_validator(mode="after")
    def _a_mean_and_a_std_for_each_channel(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("preprocessing.mean and std belong together: give both, or neither")
        channels = 3 if self.decode == "RGB" else 1
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != channels:
                raise ValueError(f"preprocessing.{name} has {len(values)} numbers, and {self.decode} has {channels} channels")
        if any(Decimal(value) <= 0 for value in self.std or ()):
            raise ValueError("preprocessing.std divides, so its numbers are above 0")
        if self.resize is not None and len(self.resize) == 1 and self.center_crop is None:
            raise ValueError("resize by the shorter side leaves pictures of any length: add centerCrop, or give two numbers")
        return self

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of what comes out, where the network's input has this shape."""
        height, width = shape[:2] if self.layout == "HWC" else shape[-2:]
        return height, width

    def fits(self, shape: tuple[int, ...]) -> bool:
        if len(shape) != 3 or shape[2 if self.layout == "HWC" else 0] != (3 if self.decode == "RGB" else 1):
            return False
        sides = self.center_crop or self.resize
        wanted = self.size(shape)
        return -1 not in wanted and (sides is None or wanted == (sides if len(sides) == 2 else sides * 2))


class Postprocessing(_Contract):
    top_k: Annotated[int, Field(ge=1, le=1000)]
    softmax: bool = False


CHECKPOINT = "checkpoint"
SOURCE = "source"
"""Names of objects in the workspace."""

ACCURACY = "verification.accuracy.dataset"
SAMPLES = "verification.parity.samples"
CALIBRATION = "conversion.calibration"

Tensors = Annotated[tuple[TensorSpec, ...], Field(min_length=1, max_length=16)]


class ExportRequest(_Contract):
    schema_: Literal["perch.dev/export-request/v1"] = Field(default="perch.dev/export-request/v1", alias="schema")
    owner: Owner
    model_name: ModelName
    version: Version
    artifact_revision: Revision
    checkpoint: Checkpoint
    architecture: Architecture | None = None
    """None for a file that brings its own network."""
    inputs: Tensors
    outputs: Tensors
    conversion: Conversion = Conversion()
    verification: Verification = Verification()
    preprocessing: Preprocessing | None = None
    postprocessing: Postprocessing | None = None
    triton: Triton
    tensorrt_version: ToolVersion | None = None
    """Of the Triton that will serve a plan: the one that has to build it."""
    destination: Destination

    @property
    def network_name(self) -> str:
        """Triton's name of the network itself: behind an ensemble it is not what clients call."""
        return self.model_name if self.preprocessing is None else self.model_name + NETWORK

    @model_validator(mode="after")
    def _plan_has_bounds(self) -> Self:
        wants_plan = self.conversion.target is Target.TENSOR_RT
        if wants_plan != (self.tensorrt_version is not None):
            raise ValueError("tensorrtVersion is for target TensorRT, which needs it: a plan runs on the version that built it")
        if not wants_plan:
            return self
        if self.triton.accelerator is not None:
            raise ValueError("triton.accelerator is for ONNX files, and a TensorRT plan needs none")
        if self.triton.instance_kind is not InstanceKind.GPU or self.triton.max_batch_size == 0:
            raise ValueError("target TensorRT needs triton.instanceKind GPU and maxBatchSize of 1 or more")
        if open_ended := [tensor.name for tensor in self.inputs if -1 in tensor.shape]:
            raise ValueError(f"target TensorRT needs a size for each dimension of {open_ended[0]}: a plan is built for bounds")
        return self

    @property
    def for_tensorrt(self) -> bool:
        """Whether TensorRT reads the ONNX file, in one way or the other."""
        return self.conversion.target is Target.TENSOR_RT or self.triton.accelerator is Accelerator.TENSOR_RT

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [tensor.name for tensor in (*self.inputs, *self.outputs)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"inputs and outputs need names of their own; used twice: {', '.join(twice)}")
        return self

    @model_validator(mode="after")
    def _a_label_for_each_class(self) -> Self:
        labels = self.triton.labels
        if labels is not None and [tensor.shape for tensor in self.outputs] != [(len(labels),)]:
            raise ValueError(f"triton.labels has {len(labels)} names: the one output's shape must be [{len(labels)}]")
        return self

    @model_validator(mode="after")
    def _pictures_become_the_input(self) -> Self:
        if self.preprocessing is None:
            if self.postprocessing is not None:
                raise ValueError("postprocessing needs preprocessing: labels are answered to pictures")
            return self
        if len(self.inputs) != 1 or self.inputs[0].data_type is not DataType.FP32:
            raise ValueError("preprocessing makes one input of type FP32, and the network takes something else")
        if not self.preprocessing.fits(self.inputs[0].shape):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in self.inputs)
            raise ValueError(f"what preprocessing makes of a picture is not the one input that the network takes, {shapes}")
        if self.triton.max_batch_size == 0:
            raise ValueError("preprocessing needs maxBatchSize of 1 or more")
        if self.postprocessing is not None:
            classes = [tensor.shape for tensor in self.outputs]
            if self.outputs[0].data_type is not DataType.FP32:
                raise ValueError("postprocessing ranks scores of type FP32, and the network gives something else")
            if len(classes) != 1 or len(classes[0]) != 1 or classes[0][0] < self.postprocessing.top_k:
                raise ValueError(
                    f"postprocessing needs one output [classes] of at least topK {self.postprocessing.top_k} classes"
                )
        return self

    @model_validator(mode="after")
    def _one_network(self) -> Self:
        if (self.architecture is not None) != self.checkpoint.format.is_weights:
            raise ValueError(
                "architecture is for weights (StateDict, SafeTensors), and other formats are whole networks: give one of both"
            )
        if self.checkpoint.format is CheckpointFormat.ONNX and self.conversion.opset is not None:
            raise ValueError("conversion.opset is for an export, and an ONNX file is published as it is")
        return self

    @model_validator(mode="after")
    def _classes_to_judge(self) -> Self:
        if self.verification.accuracy is not None and len(self.outputs[0].shape) != 1:
            raise ValueError("verification.accuracy judges classes: the first output needs the shape [classes]")
        return self

    @model_validator(mode="after")
    def _vectors_to_compare(self) -> Self:
        if self.verification.parity.minimum_cosine is not None and not any(tensor.is_vector for tensor in self.outputs):
            raise ValueError(
                "verification.parity.minimumCosine compares vectors: it needs an output of more than one FP32 or FP16"
            )
        return self

    @property
    def detects(self) -> bool:
        return self.architecture is not None and self.architecture.name in DETECTORS

    @model_validator(mode="after")
    def _detections(self) -> Self:
        if not self.detects:
            return self
        if len(self.inputs) != 1 or not self.inputs[0].is_image:
            raise ValueError(f"{self.architecture} takes one input: FP32, of shape [3, height, width] with both stated")
        most = self.outputs[0].shape[0] if self.outputs[0].shape else 0
        wanted = [("boxes", DataType.FP32, (most, 4)), ("labels", DataType.INT64, (most,)), ("scores", DataType.FP32, (most,))]
        given = [(tensor.name, tensor.data_type, tensor.shape) for tensor in self.outputs]
        if given != wanted or not 1 <= most <= MOST_DETECTIONS:
            raise ValueError(
                f"{self.architecture} has the outputs boxes (FP32, [D, 4]), labels (INT64, [D]) and scores (FP32, [D]), in this "
                f"order, with D detections for each image, 1 to {MOST_DETECTIONS}"
            )
        if self.architecture and self.architecture.layer is not None:
            raise ValueError(f"architecture.layer is not for {self.architecture}, which answers with detections")
        if self.verification.parity.minimum_top1_agreement or self.verification.parity.minimum_cosine:
            raise ValueError(
                f"verification.parity.minimumTop1Agreement and minimumCosine are not for {self.architecture}, whose "
                "detections are judged one by one"
            )
        if self.conversion.precision is not Precision.FP32:
            raise ValueError(f"{self.architecture} is exported in FP32 alone, not in {self.conversion.precision}")
        if self.for_tensorrt:
            raise ValueError(f"TensorRT is not for {self.architecture}, which onnxruntime runs")
        return self

    @property
    def tolerance(self) -> ParityTolerance:
        """The limits that stand in the request, and for the rest those of the precision."""
        given: dict[str, Any] = self.verification.parity.model_dump(by_alias=False, exclude_none=True)
        if self.architecture is not None and self.architecture.layer is not None:
            # Features of a layer are no scores: which is the largest says nothing, and where they point says all.
            pointing = any(tensor.is_vector for tensor in self.outputs)
            cosine = _FEATURES_COSINE[self.conversion.precision] if pointing else None
            given = {"minimum_top1_agreement": None, "minimum_cosine": cosine} | given
        if self.detects:
            given = _DETECTIONS_TOLERANCE | given
        return _DEFAULT_TOLERANCE[self.conversion.precision].model_copy(update=given)

    def objects(self) -> dict[str, Object]:
        """What fetch brings, by its name in the workspace. All of it is read with the checkpoint's credentials."""
        source = self.architecture.source if self.architecture else None
        accuracy = self.verification.accuracy
        found: dict[str, Object | None] = {
            CHECKPOINT: self.checkpoint,
            SOURCE: source,
            CALIBRATION: self.conversion.calibration,
            SAMPLES: self.verification.samples,
            ACCURACY: accuracy.dataset if accuracy else None,
        }
        return {name: each for name, each in found.items() if each is not None}


class DeleteRequest(_Contract):
    schema_: Literal["perch.dev/delete-request/v1"] = Field(default="perch.dev/delete-request/v1", alias="schema")
    owner: Owner
    artifact_revision: Revision
    destination: Destination


class Verdict(StrEnum):
    PASSED = "Passed"
    FAILED = "Failed"
    UNPROVABLE = "Unprovable"


class Parity(_Contract):
    """The worst figures over all outputs and batch sizes; figures are absent where they are not finite.

    `spread` is that of the output with the largest absolute error.
    """

    verdict: Verdict
    message: Annotated[str, Field(max_length=4096)] = ""
    samples: Annotated[int, Field(ge=0)]
    max_absolute_error: Figure | None = None
    spread: Figure | None = None
    max_relative_error: Figure | None = None
    top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    cosine: Annotated[float, Field(ge=-1, le=1)] | None = None


class Confused(_Contract):
    """Samples of the class `label` that were taken for `predicted`, the most frequent pairs first."""

    label: Annotated[int, Field(ge=0)]
    predicted: Annotated[int, Field(ge=0)]
    count: Annotated[int, Field(ge=1)]


class Accuracy(_Contract):
    """Of how many samples the label is the artefact's first answer (`correct`), and of how many the checkpoint's."""

    verdict: Verdict
    message: Annotated[str, Field(max_length=1024)] = ""
    dataset_sha256: Sha256
    samples: Annotated[int, Field(ge=1)]
    correct: Annotated[int, Field(ge=0)]
    checkpoint_correct: Annotated[int, Field(ge=0)]
    confused: Annotated[tuple[Confused, ...], Field(max_length=20)] = ()
    minimum: Share | None = None
    maximum_drop: Share | None = None
    """The limits that it was judged by."""

    @property
    def brief(self) -> Accuracy:
        """Without the confused classes: a summary has no room for them."""
        return self.model_copy(update={"confused": ()})

    @model_validator(mode="after")
    def _within_the_samples(self) -> Self:
        if max(self.correct, self.checkpoint_correct) > self.samples:
            raise ValueError(f"more correct answers than the {self.samples} samples")
        return self


class Tooling(_Contract):
    torch: ToolVersion
    onnx: ToolVersion
    onnxruntime: ToolVersion
    opset: Annotated[int, Field(ge=1, le=99)]
    tensorrt: ToolVersion | None = None
    compute_capability: ComputeCapability | None = None
    """Of the GPU that a plan was built on, such as 9.0."""

    @model_validator(mode="after")
    def _a_gpu_for_a_plan(self) -> Self:
        if (self.tensorrt is None) != (self.compute_capability is None):
            raise ValueError("tensorrt and computeCapability belong together: a plan is bound to both")
        return self


class StepSeconds(_Contract):
    fetch: Seconds | None = None
    convert: Seconds | None = None
    prove: Seconds | None = None
    build: Seconds | None = None
    publish: Seconds | None = None


class Reference(_Contract):
    """What convert says of the checkpoint, for prove. It ran somebody's bytes: nothing is judged by this."""

    schema_: Literal["perch.dev/reference/v1"] = Field(default="perch.dev/reference/v1", alias="schema")
    torch: ToolVersion
    seconds: Seconds
    eager_seconds: Seconds
    """The checkpoint's time for the golden samples in one batch."""


class Figures(_Contract):
    """What prove has found, for publish, which judges the figures again."""

    schema_: Literal["perch.dev/figures/v1"] = Field(default="perch.dev/figures/v1", alias="schema")
    parity: Parity
    accuracy: Accuracy | None = None
    tooling: Tooling
    seconds: Seconds
    """Of convert."""
    prove_seconds: Seconds


class PlanFigures(_Contract):
    """What build has found of a TensorRT plan, for publish, which judges the parity again."""

    schema_: Literal["perch.dev/plan-figures/v1"] = Field(default="perch.dev/plan-figures/v1", alias="schema")
    parity: Parity
    tensorrt: ToolVersion
    compute_capability: ComputeCapability
    seconds: Seconds


class FileEntry(_Contract):
    sha256: Sha256
    size: Annotated[int, Field(ge=0)]


class Manifest(_Kept):
    """Written last, it makes an artefact visible; its own sha256 is the artefact's digest.

    It carries no time of its own making: equal content must have an equal digest (the object's own date tells when).
    """

    FILE_NAME: ClassVar[str] = "manifest.json"

    schema_: Literal["perch.dev/manifest/v1"] = Field(default="perch.dev/manifest/v1", alias="schema")
    owner: Owner
    model_name: ModelName
    version: Version
    artifact_revision: Revision
    checkpoint_sha256: Sha256
    files: Annotated[Mapping[ArtifactPath, FileEntry], Field(min_length=1, max_length=64)]
    parity: Parity
    tolerance: ParityTolerance
    accuracy: Accuracy | None = None
    tooling: Tooling

    def to_bytes(self) -> bytes:
        """The one true form, whose sha256 is the digest: sorted keys, so that equal content gives equal bytes."""
        content = self.model_dump(mode="json", exclude_none=True)
        return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()

    @property
    def size_bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())


class Claim(_Kept):
    """The first object of a prefix and the last to go: whose it is while there is no manifest, before or after."""

    FILE_NAME: ClassVar[str] = "claim.json"

    schema_: Literal["perch.dev/claim/v1"] = Field(default="perch.dev/claim/v1", alias="schema")
    owner: Owner
    artifact_revision: Revision


class Reason(StrEnum):
    """Why a step failed. Only the reasons in PASSING are worth another attempt with the same request."""

    INVALID_REQUEST = "InvalidRequest"
    CHECKSUM_MISMATCH = "ChecksumMismatch"
    OBJECT_TOO_LARGE = "ObjectTooLarge"
    CHECKPOINT_UNREADABLE = "CheckpointUnreadable"
    CHECKPOINT_MISMATCH = "CheckpointMismatch"
    UNSAFE_CHECKPOINT = "UnsafeCheckpoint"
    UNKNOWN_ARCHITECTURE = "UnknownArchitecture"
    INVALID_PARAMETERS = "InvalidParameters"
    SOURCE_REJECTED = "SourceRejected"
    ENTRY_POINT_FAILED = "EntryPointFailed"
    SHAPE_MISMATCH = "ShapeMismatch"
    DATASET_UNREADABLE = "DatasetUnreadable"
    EXPORT_FAILED = "ExportFailed"
    TENSORRT_MISMATCH = "TensorRTMismatch"
    PARITY_FAILED = "ParityFailed"
    PARITY_UNPROVABLE = "ParityUnprovable"
    ACCURACY_FAILED = "AccuracyFailed"
    OUTPUT_REJECTED = "OutputRejected"
    PREFIX_OWNED_BY_ANOTHER = "PrefixOwnedByAnother"
    ARTIFACT_CORRUPT = "ArtifactCorrupt"
    GOLDEN_MISMATCH = "GoldenMismatch"
    STORE_UNREACHABLE = "StoreUnreachable"
    STORE_REFUSED = "StoreRefused"
    ACCESS_DENIED = "AccessDenied"
    BUCKET_NOT_FOUND = "BucketNotFound"
    OBJECT_NOT_FOUND = "ObjectNotFound"
    UNEXPECTED = "Unexpected"

    @property
    def retryable(self) -> bool:
        return self in PASSING


PASSING = frozenset(
    {
        Reason.STORE_UNREACHABLE,
        Reason.STORE_REFUSED,
        Reason.ACCESS_DENIED,
        Reason.BUCKET_NOT_FOUND,
        Reason.OBJECT_NOT_FOUND,
        Reason.UNEXPECTED,
    }
)
"""What may go away without a change of the request: a bucket, an object, a right or a network that comes later."""

EXIT_DONE = 0
EXIT_CRASHED = 1
EXIT_PERMANENT = 3
EXIT_PASSING = 4


class Step(StrEnum):
    FETCH = "fetch"
    CONVERT = "convert"
    PROVE = "prove"
    BUILD = "build"
    PUBLISH = "publish"
    DOWNLOAD = "download"
    GOLDEN = "golden"
    DELETE = "delete"


class ErrorReport(_Contract):
    reason: Reason
    message: str
    retryable: bool
    step: Step


class Outcome(StrEnum):
    PUBLISHED = "Published"
    ALREADY_PUBLISHED = "AlreadyPublished"
    FAILED = "Failed"


class Summary(_Kept):
    """A step's termination message. `to_json` never gives more than SUMMARY_LIMIT bytes: it shortens the messages."""

    schema_: Literal["perch.dev/summary/v1"] = Field(default="perch.dev/summary/v1", alias="schema")
    outcome: Outcome
    artifact_uri: StoreUri | None = None
    artifact_digest: Digest | None = None
    size_bytes: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    parity: Parity | None = None
    tolerance: ParityTolerance | None = None
    """What parity was judged by."""
    accuracy: Accuracy | None = None
    tooling: Tooling | None = None
    seconds: StepSeconds | None = None
    error: ErrorReport | None = None

    @model_validator(mode="after")
    def _says_what_it_must(self) -> Self:
        if (self.outcome is Outcome.FAILED) != (self.error is not None):
            raise ValueError("error is there when, and only when, the outcome is Failed")
        if self.outcome is not Outcome.FAILED and (self.artifact_uri is None or self.artifact_digest is None):
            raise ValueError(f"{self.outcome} needs artifactUri and artifactDigest")
        return self

    def to_json(self) -> str:
        text = super().to_json()
        error_room, parity_room = 2 * SUMMARY_LIMIT, SUMMARY_LIMIT
        while len(text.encode()) > SUMMARY_LIMIT:
            # The figures' messages go first: where there is an error, its message says the same and more.
            error_room, parity_room = int(error_room * 0.8), int(parity_room * 0.6)
            text = self._shortened(error_room, parity_room).model_dump_json(exclude_none=True)
        return text

    def _shortened(self, error_room: int, parity_room: int) -> Summary:
        update: dict[str, Any] = {}
        if self.error:
            update["error"] = self.error.model_copy(update={"message": shorten(self.error.message, error_room)})
        if self.parity:
            update["parity"] = self.parity.model_copy(update={"message": shorten(self.parity.message, parity_room)})
        if self.accuracy:
            update["accuracy"] = self.accuracy.model_copy(update={"message": shorten(self.accuracy.message, parity_room)})
        return self.model_copy(update=update)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters: the beginning and the end, since the cause often stands last."""
    if len(text) <= limit:
        return text
    mark = " … "
    if limit <= len(mark):
        return ""
    head = (limit - len(mark)) * 2 // 3
    tail = limit - len(mark) - head
    return text[:head].rstrip() + mark + text[len(text) - tail :].lstrip()


DOCUMENTS: tuple[type[_Contract], ...] = (ExportRequest, DeleteRequest, Summary, Reference, Figures, PlanFigures, Manifest, Claim)


def json_schemas() -> dict[str, dict[str, Any]]:
    """JSON schema of each document by its schema name. Rules between fields stand in the validators alone."""
    return {str(document.model_fields["schema_"].default): document.model_json_schema(by_alias=True) for document in DOCUMENTS}

"""The ModelDeployment API as types: the one source of truth for the CRD (see `crd`) and for the operator.

Every field here is implemented; what is not implemented is not in the schema. Descriptions end up in `kubectl explain`.
Types are frozen and forbid unknown fields: an object written for a newer CRD is refused by name, never half understood.
Everything is bounded (lengths, item counts), so that the CEL rules stay within the API server's cost budget at 64 versions.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel

GROUP = "serving.perch.dev"
VERSION = "v1alpha1"
KIND = "ModelDeployment"
PLURAL = "modeldeployments"
MAX_VERSIONS = 64


def _rules(*rules: tuple[str, str] | tuple[str, str, str]) -> dict[str, Any]:
    """CEL rules as (rule, message[, fieldPath]) for `x-kubernetes-validations`."""
    out = []
    for rule in rules:
        entry = {"rule": rule[0], "message": rule[1]}
        if len(rule) == 3:
            entry["fieldPath"] = rule[2]
        out.append(entry)
    return {"x-kubernetes-validations": out}


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


def _refusal(message: str) -> dict[str, Any]:
    """What a human reads when a value does not match its pattern; `crd` makes a CEL rule of pattern and message.

    Without it the API server would show the bare regular expression.
    """
    return {"x-refusal": message}


_DNS_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"
_QUANTITY_REFUSAL = "write a quantity that is not negative, such as 2, 500m, 1.5 or 8Gi"
_S3_BUCKET = r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
_S3_SEGMENT = r"/[A-Za-z0-9!_.*'()=+@:-]+"
_NO_DOT_SEGMENTS = _rules(
    (r'!self.matches(r"/\.{1,2}(/|$)")', "the path may not have . or .. as a part: name the object directly"),
)
_POSITIVE = (
    r'!self.matches(r"^[0-9]+(\.[0-9]+)?([eE]-?[0-9]{1,2})?$") || double(self) > 0.0',
    "a tolerance of 0 is met by no export: give a small positive one such as 1e-4",
)

Quantity = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[str, Field(max_length=32, pattern=_QUANTITY)],
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": 32,
            **_rules((f'type(self) == string ? self.matches(r"{_QUANTITY}") : self >= 0', _QUANTITY_REFUSAL)),
        }
    ),
]
Name = Annotated[
    str,
    Field(
        max_length=253,
        pattern=rf"^{_DNS_LABEL}(\.{_DNS_LABEL})*$",
        json_schema_extra=_refusal("write the name of a Kubernetes object: lower-case letters, digits, '-' and '.'"),
    ),
]
NamespaceName = Annotated[
    str,
    Field(
        max_length=63,
        pattern=rf"^{_DNS_LABEL}$",
        json_schema_extra=_refusal("write the name of a namespace: lower-case letters, digits and '-'"),
    ),
]
Key = Annotated[
    str,
    Field(
        max_length=253,
        pattern=r"^[-._a-zA-Z0-9]+$",
        json_schema_extra=_refusal("write a key of the object's data: letters, digits, '-', '_' and '.'"),
    ),
]
LabelKey = Annotated[
    str,
    Field(
        max_length=317,
        pattern=rf"^({_DNS_LABEL}(\.{_DNS_LABEL})*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$",
        json_schema_extra=_refusal("write [domain/]name, such as nvidia.com/gpu or kubernetes.io/hostname"),
    ),
]
LabelValue = Annotated[
    str,
    Field(
        max_length=63,
        pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$",
        json_schema_extra=_refusal("write a label value: letters, digits, '-', '_' and '.', a letter or digit at both ends"),
    ),
]
S3Prefix = Annotated[
    str,
    Field(
        max_length=512,
        pattern=rf"{_S3_BUCKET}({_S3_SEGMENT})*$",
        json_schema_extra=_refusal(
            "write s3://<bucket>/<prefix> with no slash at the end, such as s3://models/prod; a server other than AWS goes "
            "into endpoint"
        )
        | _NO_DOT_SEGMENTS,
    ),
]
S3Object = Annotated[
    str,
    Field(
        max_length=512,
        pattern=rf"{_S3_BUCKET}({_S3_SEGMENT})+$",
        json_schema_extra=_refusal(
            "write s3://<bucket>/<object>, such as s3://checkpoints/digits/v1.pt; a server other than AWS goes into endpoint"
        )
        | _NO_DOT_SEGMENTS,
    ),
]
HttpUri = Annotated[
    str,
    Field(
        max_length=253,
        pattern=r"^https?://[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[1-9][0-9]{0,4})?$",
        json_schema_extra=_refusal("write http(s)://<host>[:<port>] with no path, such as http://s3.storage:9000"),
    ),
]
Region = Annotated[
    str,
    Field(
        max_length=63,
        pattern=r"^[a-z0-9-]+$",
        json_schema_extra=_refusal("write a region, such as us-east-1, or leave it out"),
    ),
]
Decimal = Annotated[
    str,
    Field(
        max_length=24,
        pattern=r"^[0-9]+(\.[0-9]+)?([eE]-?[0-9]{1,2})?$",
        json_schema_extra=_refusal('write a decimal number in quotes, such as "0.001" or "1e-3"'),
    ),
]
Duration = Annotated[
    str,
    Field(
        min_length=1,
        max_length=24,
        pattern=r"^([0-9]{1,5}h)?([0-9]{1,5}m)?([0-9]{1,5}s)?$",
        json_schema_extra=_refusal("write a duration in hours, minutes and seconds, such as 30s, 5m or 1h30m"),
    ),
]
TensorName = Annotated[
    str,
    Field(
        max_length=128,
        pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$",
        json_schema_extra=_refusal("write a tensor's name: a letter or '_' first, then letters, digits, '_', '.' and '-'"),
    ),
]
_REPOSITORY = r"[a-z0-9]+([._-]+[a-z0-9]+)*"
Image = Annotated[
    str,
    Field(
        max_length=512,
        pattern=r"^([a-zA-Z0-9]([-.a-zA-Z0-9]*[a-zA-Z0-9])?(:[0-9]{1,5})?/)?"
        rf"{_REPOSITORY}(/{_REPOSITORY})*(:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(@sha256:[0-9a-f]{{64}})?$",
        json_schema_extra=_refusal(
            "write an image as [registry/]repository[:tag][@sha256:digest], such as nvcr.io/nvidia/tritonserver:25.10-py3"
        ),
    ),
]
VersionNumber = Annotated[int, Field(ge=1, le=999_999_999, json_schema_extra={"format": "int32"})]


class LocalRef(Model):
    name: Name = Field(description="Name of the object, in the ModelDeployment's own namespace.")


class ConfigMapKeyRef(Model):
    name: Name = Field(description="Name of the ConfigMap, in the ModelDeployment's own namespace.")
    key: Key = Field(description="Key in the ConfigMap.")


class DeletionPolicy(StrEnum):
    RETAIN = "Retain"
    DELETE = "Delete"


class Repository(Model):
    """Triton's model repository: where artefacts are published, in an S3-compatible object store."""

    uri: S3Prefix = Field(
        description="Bucket and prefix, such as s3://models/prod. Artefacts go to "
        "<uri>/<namespace>/<name>/<version>-<artifactRevision>/. Immutable.",
    )
    endpoint: HttpUri | None = Field(
        None, description="URL of an S3-compatible server, such as http://s3.storage:9000. Omit for AWS. Immutable."
    )
    region: Region | None = Field(None, description="Region of the bucket; us-east-1 when omitted. Immutable.")
    credentials_secret_ref: LocalRef = Field(
        description="Secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in the same namespace. "
        "The operator never reads it; pods mount it.",
    )
    ca_bundle_config_map_ref: ConfigMapKeyRef | None = Field(
        None,
        description="ConfigMap key with a PEM bundle of the certificate authorities that the endpoint's TLS needs.",
    )
    deletion_policy: DeletionPolicy = Field(
        DeletionPolicy.RETAIN,
        description="What happens to published artefacts when their version leaves spec.versions or the ModelDeployment "
        "is deleted: Retain (default) keeps them; Delete erases those that their manifest says are ours.",
    )


class Checkpoint(Model):
    """A trained PyTorch checkpoint in an object store."""

    uri: S3Object = Field(description="The checkpoint object, such as s3://checkpoints/digits/v1.pt.")
    format: Literal["StateDict", "SafeTensors"] = Field(
        description="StateDict: torch.save(model.state_dict()), loaded with weights_only. SafeTensors: a .safetensors file."
    )
    sha256: str = Field(
        pattern=r"^[0-9a-f]{64}$",
        max_length=80,
        json_schema_extra=_refusal("write the 64 lower-case hex digits that `sha256sum FILE` prints"),
        description="SHA-256 of the object, 64 lower-case hex digits (sha256sum FILE). Checked before a byte is parsed.",
    )
    endpoint: HttpUri | None = Field(None, description="Another S3 endpoint than repository.endpoint, if it lies elsewhere.")
    region: Region | None = Field(None, description="Region, if not repository.region.")
    credentials_secret_ref: LocalRef | None = Field(
        None, description="Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, if not the repository's."
    )


class ArchitectureParameters(Model):
    num_classes: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        json_schema_extra={"format": "int32"},
        description="Number of classes of the last layer.",
    )


class Architecture(Model):
    """The network whose weights the checkpoint holds."""

    name: str = Field(
        max_length=128,
        pattern=r"^(lenet5|torchvision:[a-z][a-z0-9_]*)$",
        json_schema_extra=_refusal("name an architecture: lenet5, or torchvision:<name>, such as torchvision:resnet18"),
        description="lenet5, or torchvision:<name> for torchvision's classification models, such as torchvision:resnet18.",
    )
    parameters: ArchitectureParameters | None = Field(None, description="Arguments of the network's constructor.")


Dimension = Annotated[int, Field(ge=-1, le=65536, json_schema_extra={"format": "int32"})]


class Tensor(Model):
    name: TensorName = Field(description="Name of the tensor, as clients use it.")
    data_type: Literal["FP32"] = Field(description="Triton data type.")
    shape: list[Dimension] = Field(
        min_length=1,
        max_length=7,
        description="Shape without the batch dimension, such as [1, 28, 28]; -1 is a dynamic dimension.",
        json_schema_extra=_rules(
            ("self.all(d, d != 0)", "a dimension of 0 holds no data; give a positive size, or -1 for a dynamic one"),
        ),
    )


class Conversion(Model):
    """What the checkpoint is exported to."""

    target: Literal["ONNX"] = Field("ONNX", description="Format of the artefact. ONNX is the default.")
    precision: Literal["FP32"] = Field("FP32", description="Precision of the weights. FP32 is the default.")
    opset: int | None = Field(
        None,
        ge=18,
        le=23,
        json_schema_extra={"format": "int32"},
        description="ONNX opset; the exporter's default when omitted.",
    )


class Parity(Model):
    """How near the artefact's answers must be to the checkpoint's. Both bounds must hold."""

    absolute_tolerance: Decimal | None = Field(
        None,
        description='Greatest absolute difference, a decimal string; "1e-3" if omitted.',
        json_schema_extra=_rules(_POSITIVE),
    )
    relative_tolerance: Decimal | None = Field(
        None,
        description='Greatest difference relative to the spread of the outputs, a decimal string; "1e-3" if omitted.',
        json_schema_extra=_rules(_POSITIVE),
    )


class Verification(Model):
    """The gates that a version must pass before it is published."""

    parity: Parity | None = Field(None, description="Answers of the artefact against answers of the checkpoint.")


class DynamicBatching(Model):
    max_queue_delay_microseconds: int | None = Field(
        None,
        ge=0,
        le=10_000_000,
        json_schema_extra={"format": "int32"},
        description="Longest wait for a batch to fill, µs.",
    )
    preferred_batch_sizes: list[Annotated[int, Field(ge=1, le=4096, json_schema_extra={"format": "int32"})]] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description="Batch sizes that Triton tries to form.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )


class TritonModel(Model):
    """The model's config.pbtxt."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "!has(self.dynamicBatching) || !has(self.maxBatchSize) || self.maxBatchSize > 1",
                "dynamicBatching needs maxBatchSize above 1: raise maxBatchSize or remove dynamicBatching",
                ".dynamicBatching",
            ),
            (
                "!has(self.dynamicBatching) || !has(self.dynamicBatching.preferredBatchSizes) || "
                "self.dynamicBatching.preferredBatchSizes.all(b, b <= (has(self.maxBatchSize) ? self.maxBatchSize : 8))",
                "no preferred size may exceed maxBatchSize (8 when omitted): lower the size or raise maxBatchSize",
                ".dynamicBatching.preferredBatchSizes",
            ),
        )
    )
    max_batch_size: int = Field(
        8, ge=1, le=4096, json_schema_extra={"format": "int32"}, description="Largest batch; 8 if omitted."
    )
    dynamic_batching: DynamicBatching | None = Field(None, description="Let Triton join single requests to batches.")
    instance_count: int = Field(
        1, ge=1, le=64, json_schema_extra={"format": "int32"}, description="Model instances per device; 1 if omitted."
    )


class Version(Model):
    """One version of the model: its checkpoint, and how it is exported and served. Immutable while it is listed."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "self == oldSelf",
                "an entry of spec.versions is immutable while it is listed: add an entry with a new version number instead",
            ),
        )
    )
    version: VersionNumber = Field(description="Triton's version number, which clients see. Give each new checkpoint a new one.")
    checkpoint: Checkpoint = Field(description="The trained weights.")
    architecture: Architecture = Field(description="The network that the weights belong to.")
    inputs: list[Tensor] = Field(min_length=1, max_length=1, description="Input tensors; one for image classifiers.")
    outputs: list[Tensor] = Field(min_length=1, max_length=1, description="Output tensors; one for image classifiers.")
    conversion: Conversion = Field(Conversion(), description="What the checkpoint is exported to; ONNX in FP32 if omitted.")
    verification: Verification = Field(Verification(), description="Gates before publication. Parity is always judged.")
    triton: TritonModel = Field(TritonModel(), description="Batching and instances, for the model's config.pbtxt.")


class Traffic(Model):
    """Which versions answer clients. A release adds `canary`; a promotion moves it to `stable`; a rollback is the revert."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "!has(self.canary) || self.canary != self.stable",
                "canary is the same version as stable: name another version, or remove canary",
                ".canary",
            ),
        )
    )
    stable: VersionNumber = Field(description="The version that all clients get, or all but the canary's share.")
    canary: VersionNumber | None = Field(None, description="The version on trial, which gets the weight of rollout.steps.")


class Step(Model):
    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "self.weight == 100 || has(self.hold)",
                "hold is required below weight 100: add hold: Indefinite",
                ".hold",
            ),
        )
    )
    weight: int = Field(
        ge=0,
        le=100,
        json_schema_extra={"format": "int32"},
        description="Percent of the requests that go to the canary.",
    )
    hold: str | None = Field(
        None,
        max_length=24,
        pattern="^Indefinite$",
        description="How long this weight is held. Only Indefinite in this release: the split stays until Git changes it.",
        json_schema_extra=_refusal(
            "only Indefinite is supported in this release: write hold: Indefinite, and change the weight in Git when it is time"
        ),
    )


class Rollout(Model):
    """How the canary's share of traffic is set."""

    steps: list[Step] = Field(
        min_length=1,
        max_length=16,
        description="[{weight: 10, hold: Indefinite}] is a fixed 90/10 split; [{weight: 100}] gives the canary everything "
        "as soon as it is ready.",
        json_schema_extra=_rules(
            (
                "self.map(s, s.weight).isSorted() && self.all(a, self.exists_one(b, b.weight == a.weight))",
                "weights must ascend, each higher than the one before: order the steps and drop duplicates",
            ),
            (
                "self.all(a, !has(a.hold) || self.all(b, b.weight <= a.weight))",
                "a step held Indefinite is never left, so it must be the last one: remove the steps after it",
            ),
        ),
    )
    scale_down_delay: Duration = Field(
        "5m",
        description="How long the pods of a version stay after its last traffic, such as 5m or 1h: a revert within "
        "this time is immediate. 5m if omitted.",
    )


_RESOURCE_NAMES = (
    "self.all(k, k in ['cpu', 'memory', 'ephemeral-storage'] || k.startsWith('hugepages-') || k.contains('/'))",
    "a resource is cpu, memory, ephemeral-storage, hugepages-<size>, or has a domain: write nvidia.com/gpu for a GPU",
)
_WHOLE_DEVICES = (
    "self.all(k, !k.contains('/') || (type(self[k]) == string ? self[k].matches('^[0-9]+$') : true))",
    "an extended resource such as nvidia.com/gpu is counted in whole devices: write 1, 2, …",
)


class Resources(Model):
    """Compute resources. GPUs are extended resources: nvidia.com/gpu in limits."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "!has(self.requests) || self.requests.all(k, !k.contains('/') || (has(self.limits) && k in self.limits && "
                "self.limits[k] == self.requests[k]))",
                "an extended resource such as nvidia.com/gpu must have a limit equal to its request: set it in limits",
            ),
            (
                "!has(self.requests) || !has(self.limits) || self.requests.all(k, k.contains('/') || !(k in self.limits) || "
                "!isQuantity(string(self.requests[k])) || !isQuantity(string(self.limits[k])) || "
                "quantity(string(self.requests[k])).compareTo(quantity(string(self.limits[k]))) <= 0)",
                "a request is greater than its limit: lower the request or raise the limit",
                ".requests",
            ),
        )
    )
    limits: dict[LabelKey, Quantity] | None = Field(
        None,
        max_length=16,
        description="Upper bounds, such as {nvidia.com/gpu: 1}.",
        json_schema_extra=_rules(_RESOURCE_NAMES, _WHOLE_DEVICES),
    )
    requests: dict[LabelKey, Quantity] | None = Field(
        None,
        max_length=16,
        description="What the scheduler reserves; the limits if omitted.",
        json_schema_extra=_rules(_RESOURCE_NAMES, _WHOLE_DEVICES),
    )


class Toleration(Model):
    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "has(self.key) || (has(self.operator) && self.operator == 'Exists')",
                "a toleration without key tolerates every taint: say so with operator: Exists, or name the key",
                ".key",
            ),
            (
                "!has(self.value) || !has(self.operator) || self.operator == 'Equal'",
                "operator Exists takes no value: remove value, or use operator: Equal",
                ".value",
            ),
            (
                "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
                "tolerationSeconds belongs to effect NoExecute: set effect: NoExecute, or remove tolerationSeconds",
                ".tolerationSeconds",
            ),
        )
    )
    key: LabelKey | None = Field(None, description="Taint key; omitted with operator Exists, it matches all.")
    operator: Literal["Exists", "Equal"] | None = Field(None, description="Equal if omitted.")
    value: LabelValue | None = Field(None, description="Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(None, description="All effects if omitted.")
    toleration_seconds: int | None = Field(
        None, json_schema_extra={"format": "int64"}, description="How long a NoExecute taint is tolerated, seconds."
    )


_VALUES_FIT = (
    "self.operator in ['In', 'NotIn'] ? (has(self.values) && self.values.size() > 0) : "
    "self.operator in ['Gt', 'Lt'] ? (has(self.values) && self.values.size() == 1) : "
    "(!has(self.values) || self.values.size() == 0)",
    "In and NotIn need values, Gt and Lt exactly one, Exists and DoesNotExist none: mend values",
    ".values",
)


class LabelRequirement(Model):
    model_config = ConfigDict(json_schema_extra=_rules(_VALUES_FIT))
    key: LabelKey = Field(description="Label key.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"] = Field(description="Relation of key and values.")
    values: list[LabelValue] | None = Field(None, max_length=64, description="Label values.")


class NodeRequirement(Model):
    model_config = ConfigDict(json_schema_extra=_rules(_VALUES_FIT))
    key: LabelKey = Field(description="Label key; for matchFields, metadata.name.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field(description="Relation of key and values.")
    values: list[LabelValue] | None = Field(None, max_length=64, description="Values; one whole number for Gt and Lt.")


class LabelSelector(Model):
    match_labels: dict[LabelKey, LabelValue] | None = Field(None, max_length=32, description="Labels that must match.")
    match_expressions: list[LabelRequirement] | None = Field(None, max_length=16, description="Requirements that must hold.")


class NodeSelectorTerm(Model):
    match_expressions: list[NodeRequirement] | None = Field(None, max_length=16, description="By node labels.")
    match_fields: list[NodeRequirement] | None = Field(None, max_length=16, description="By node fields.")


class NodeSelector(Model):
    node_selector_terms: list[NodeSelectorTerm] = Field(min_length=1, max_length=16, description="Any of these must match.")


class PreferredSchedulingTerm(Model):
    weight: int = Field(ge=1, le=100, json_schema_extra={"format": "int32"}, description="Weight of the preference.")
    preference: NodeSelectorTerm = Field(description="Nodes that are preferred.")


class NodeAffinity(Model):
    required_during_scheduling_ignored_during_execution: NodeSelector | None = Field(None, description="Nodes that are required.")
    preferred_during_scheduling_ignored_during_execution: list[PreferredSchedulingTerm] | None = Field(
        None, max_length=16, description="Nodes that are preferred."
    )


class PodAffinityTerm(Model):
    topology_key: LabelKey = Field(description="Node label that defines one place, such as kubernetes.io/hostname.")
    label_selector: LabelSelector | None = Field(None, description="Pods that are meant.")
    namespaces: list[NamespaceName] | None = Field(None, max_length=16, description="Their namespaces; the own one if omitted.")


class WeightedPodAffinityTerm(Model):
    weight: int = Field(ge=1, le=100, json_schema_extra={"format": "int32"}, description="Weight of the preference.")
    pod_affinity_term: PodAffinityTerm = Field(description="The preferred term.")


class PodAffinity(Model):
    required_during_scheduling_ignored_during_execution: list[PodAffinityTerm] | None = Field(
        None, max_length=8, description="Terms that are required."
    )
    preferred_during_scheduling_ignored_during_execution: list[WeightedPodAffinityTerm] | None = Field(
        None, max_length=8, description="Terms that are preferred."
    )


class Affinity(Model):
    node_affinity: NodeAffinity | None = Field(None, description="Which nodes.")
    pod_affinity: PodAffinity | None = Field(None, description="Near which pods.")
    pod_anti_affinity: PodAffinity | None = Field(None, description="Away from which pods.")


class EnvValueSource(Model):
    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "has(self.configMapKeyRef) != has(self.secretKeyRef)",
                "valueFrom takes exactly one source: name either configMapKeyRef or secretKeyRef",
            ),
        )
    )
    config_map_key_ref: ConfigMapKeyRef | None = Field(None, description="Key of a ConfigMap.")
    secret_key_ref: ConfigMapKeyRef | None = Field(None, description="Key of a Secret.")


class EnvVar(Model):
    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "!(has(self.value) && has(self.valueFrom))",
                "value and valueFrom exclude each other: remove one",
                ".valueFrom",
            ),
        )
    )
    name: str = Field(
        max_length=253,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Name of the variable.",
        json_schema_extra=_refusal("write the name of a variable: a letter or '_' first, then letters, digits and '_'"),
    )
    value: str | None = Field(None, max_length=4096, description="Its value.")
    value_from: EnvValueSource | None = Field(None, description="Where its value comes from.")


# A pod template with a name twice could not be applied; the API server refuses it here, where the user sees it.
_BY_NAME: dict[str, Any] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}


class Runtime(Model):
    """How Triton's pods run. Mutable: a change rolls the pods without a lost request; replicas only scales."""

    image: Image | None = Field(
        None,
        description="Triton image, such as nvcr.io/nvidia/tritonserver:25.10-py3; the chart's triton.image if omitted.",
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="Kubernetes' default if omitted."
    )
    replicas: int = Field(
        1,
        ge=1,
        le=1000,
        json_schema_extra={"format": "int32"},
        description="Pods per version in traffic; 1 if omitted.",
    )
    resources: Resources | None = Field(None, description="Resources of the Triton container.")
    node_selector: dict[LabelKey, LabelValue] | None = Field(None, max_length=32, description="Node labels that are required.")
    tolerations: list[Toleration] | None = Field(None, max_length=32, description="Taints that are tolerated.")
    affinity: Affinity | None = Field(None, description="Scheduling constraints.")
    env: list[EnvVar] | None = Field(
        None, max_length=64, description="Environment of the Triton container.", json_schema_extra=_BY_NAME
    )
    image_pull_secrets: list[LocalRef] | None = Field(
        None, max_length=8, description="Secrets for pulling the images.", json_schema_extra=_BY_NAME
    )
    service_account_name: Name | None = Field(None, description="ServiceAccount of the pods; its token is never mounted.")
    runtime_class_name: Name | None = Field(None, description="RuntimeClass of the pods, such as nvidia.")
    termination_grace_period_seconds: int = Field(
        60,
        ge=30,
        le=3600,
        json_schema_extra={"format": "int64"},
        description="Time for a pod to end: 15 s for proxies to turn away, then Triton finishes what it has. "
        "60 if omitted, at least 30.",
    )
    shared_memory_size: Quantity = Field("256Mi", description="Size of /dev/shm, in memory; 256Mi if omitted.")


class Builder(Model):
    """How export Jobs run. Mutable; a change concerns later Jobs only."""

    resources: Resources | None = Field(
        None, description="Resources of the convert container; memory limit 8Gi if omitted. nvidia.com/gpu is optional."
    )
    node_selector: dict[LabelKey, LabelValue] | None = Field(None, max_length=32, description="Node labels that are required.")
    tolerations: list[Toleration] | None = Field(None, max_length=32, description="Taints that are tolerated.")
    image_pull_secrets: list[LocalRef] | None = Field(
        None, max_length=8, description="Secrets for pulling the images.", json_schema_extra=_BY_NAME
    )
    active_deadline_seconds: int = Field(
        3600,
        ge=30,
        le=86400,
        json_schema_extra={"format": "int32"},
        description="Longest time for one export, seconds; 3600 if omitted.",
    )


class ParentRef(Model):
    name: Name = Field(description="Name of the Gateway.")
    namespace: NamespaceName | None = Field(None, description="Its namespace; the own one if omitted.")
    section_name: Name | None = Field(None, description="One listener of the Gateway; all if omitted.")
    port: int | None = Field(None, ge=1, le=65535, json_schema_extra={"format": "int32"}, description="One port of the Gateway.")


Hostname = Annotated[
    str,
    Field(
        max_length=253,
        pattern=rf"^(\*\.)?{_DNS_LABEL}(\.{_DNS_LABEL})*$",
        json_schema_extra=_refusal("write a host name in lower case, with no scheme, port or path, such as digits.example.com"),
    ),
]


class Routing(Model):
    """One HTTPRoute for gRPC and REST, attached to these Gateways."""

    parent_refs: list[ParentRef] = Field(min_length=1, max_length=8, description="Gateways that carry the traffic.")
    hostnames: list[Hostname] = Field(
        min_length=1,
        max_length=16,
        description="Host names of this model. Required: gRPC paths carry no model name, so the host name tells models apart.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )


class Spec(Model):
    """Desired state of one model, every version of it that may serve."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "self.versions.exists(v, v.version == self.traffic.stable)",
                "traffic.stable names a version that is not in spec.versions: add the entry, or name one that is listed",
                ".traffic.stable",
            ),
            (
                "!has(self.traffic.canary) || self.versions.exists(v, v.version == self.traffic.canary)",
                "traffic.canary names a version that is not in spec.versions: add the entry, or name one that is listed",
                ".traffic.canary",
            ),
            (
                "!has(self.traffic.canary) || has(self.rollout)",
                "traffic.canary needs rollout.steps: say what share it gets, such as [{weight: 10, hold: Indefinite}]",
                ".rollout",
            ),
            (
                "!has(self.traffic.canary) || has(self.routing)",
                "traffic.canary needs routing: without a Gateway no traffic can be split; add routing.parentRefs and hostnames",
                ".routing",
            ),
            (
                "has(self.modelName) == has(oldSelf.modelName) && (!has(self.modelName) || self.modelName == oldSelf.modelName)",
                "modelName is immutable, clients call it: create another ModelDeployment for another name",
                ".modelName",
            ),
            (
                "self.repository.uri == oldSelf.repository.uri && "
                "has(self.repository.endpoint) == has(oldSelf.repository.endpoint) && "
                "(!has(self.repository.endpoint) || self.repository.endpoint == oldSelf.repository.endpoint) && "
                "has(self.repository.region) == has(oldSelf.repository.region) && "
                "(!has(self.repository.region) || self.repository.region == oldSelf.repository.region)",
                "repository.uri, endpoint and region are immutable, pods read artefacts there: create another ModelDeployment",
                ".repository",
            ),
        )
    )
    model_name: str | None = Field(
        None,
        max_length=63,
        pattern=r"^[a-zA-Z0-9]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?$",
        json_schema_extra=_refusal("write a model name: letters, digits, '-', '_' and '.', a letter or digit at both ends"),
        description="What clients call: the model's name in Triton. metadata.name if omitted. Immutable.",
    )
    repository: Repository = Field(description="Triton's model repository: where artefacts are published.")
    versions: list[Version] = Field(
        min_length=1,
        max_length=MAX_VERSIONS,
        description="Every version that may serve. Each is exported and gated; only those in traffic run. To make room, "
        "remove the oldest.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["version"]},
    )
    traffic: Traffic = Field(description="Which versions answer clients.")
    rollout: Rollout | None = Field(None, description="How the canary's share is set; required with traffic.canary.")
    runtime: Runtime = Field(Runtime(), description="How Triton's pods run.")
    builder: Builder = Field(Builder(), description="How export Jobs run.")
    routing: Routing | None = Field(
        None,
        description="Gateway and host names. Without it the versions' own Services <name>-v<version> are the way in.",
    )

    def entry(self, version: int) -> Version | None:
        return next((v for v in self.versions if v.version == version), None)


# --- status ------------------------------------------------------------------------------------------------------------


class Phase(StrEnum):
    """Where one version stands. Derived; conditions are the truth."""

    EXPORTING = "Exporting"
    FAILED = "Failed"
    PUBLISHED = "Published"
    STARTING = "Starting"
    SERVING = "Serving"
    DRAINING = "Draining"
    DELETING = "Deleting"


class StatusModel(BaseModel):
    """Status is written by the operator alone; unknown fields of another release are ignored, not refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)


Int32 = Annotated[int, Field(json_schema_extra={"format": "int32"})]
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class Condition(StatusModel):
    type: str = Field(description="Ready, Reconciling, Stalled, Available or TrafficAccepted.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(description="Why, in one word.")
    message: str = Field(description="Why, and what to do next.")
    observed_generation: int = Field(
        0, json_schema_extra={"format": "int64"}, description="Generation of spec that it speaks of."
    )
    last_transition_time: Time = Field(description="When status last changed.")


class ParityStatus(StatusModel):
    max_absolute_error: str = Field(description="Greatest absolute difference found.")
    max_relative_error: str = Field(description="Greatest difference found, relative to the outputs' spread.")
    verdict: str = Field(description="Passed or Failed.")


class VersionStatus(StatusModel):
    version: Int32 = Field(description="Version number.")
    artifact_revision: str = Field(description="Hash of the entry in spec.versions: names the artefact's prefix.")
    phase: Phase = Field(description="Exporting, Failed, Published, Starting, Serving, Draining or Deleting.")
    artifact_uri: str | None = Field(None, description="Where the artefact is published.")
    artifact_digest: str | None = Field(None, description="SHA-256 of the artefact's manifest.json, which pods check.")
    serving_hash: str | None = Field(None, description="Hash of artefact and runtime that the pods run.")
    parity: ParityStatus | None = Field(None, description="Figures of the parity gate.")
    replicas: Int32 = Field(0, description="Pods wanted.")
    ready_replicas: Int32 = Field(0, description="Pods ready.")
    weight: Int32 = Field(0, description="Percent of the traffic.")
    attempts: Int32 = Field(0, description="Exports that failed for a passing reason.")
    retry_at: Time | None = Field(None, description="When the export is tried again.")
    drained_at: Time | None = Field(None, description="When the version got its last traffic.")
    message: str | None = Field(None, description="What the children say.")


class Weights(StatusModel):
    version: Int32 = Field(description="Version number.")
    weight: Int32 = Field(description="Percent of the traffic.")


class WeightStatus(StatusModel):
    desired: list[Weights] = Field(default_factory=list, description="What the route says.")
    accepted: list[Weights] = Field(default_factory=list, description="What the Gateway has accepted.")


class Status(StatusModel):
    """Observed state, written by the operator. Conditions are the truth; the rest tells them in figures."""

    observed_generation: int = Field(0, json_schema_extra={"format": "int64"}, description="Generation of spec that was read.")
    stable: Int32 | None = Field(None, description="The stable version.")
    canary: Int32 | None = Field(None, description="The canary, if there is one.")
    canary_weight: Int32 | None = Field(None, description="Percent of the traffic that the canary gets.")
    endpoint: str | None = Field(None, description="Host name of the model, or the stable version's Service.")
    artifact: str | None = Field(None, description="Artefact of the stable version.")
    weights: WeightStatus = Field(WeightStatus(), description="Traffic by version.")
    versions: list[VersionStatus] = Field(default_factory=list, description="State of each version.")
    conditions: list[Condition] = Field(
        default_factory=list, description="Ready, Reconciling, Stalled, Available, TrafficAccepted."
    )

    def of(self, version: int) -> VersionStatus | None:
        return next((v for v in self.versions if v.version == version), None)

    def condition(self, kind: str) -> Condition | None:
        return next((c for c in self.conditions if c.type == kind), None)

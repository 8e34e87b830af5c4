"""The ModelDeployment API as types: the one source of truth for the CRD (see `crd`) and for the operator.

Every field here is implemented; what is not implemented is not in the schema. Descriptions end up in `kubectl explain`.
Types are frozen and forbid unknown fields: an object written for a newer CRD is refused by name, never half understood.
Everything is bounded (lengths, item counts), so that the CEL rules stay within the API server's cost budget at 64 versions.
"""

from __future__ import annotations

import hashlib
import re
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel

from perch_exporter.contract import DETECTORS

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


_DECIMAL = r"^[0-9]+(\.[0-9]+)?([eE]-?[0-9]{1,2})?$"
_SIGNED_DECIMAL = r"^-?[0-9]+(\.[0-9]+)?([eE]-?[0-9]{1,2})?$"
_DURATION = r"^([0-9]{1,5}h)?([0-9]{1,5}m)?([0-9]{1,5}s)?$"
_LENGTH = r"^([0-9]{1,5}h([0-9]{1,5}m)?([0-9]{1,5}s)?|[0-9]{1,5}m([0-9]{1,5}s)?|[0-9]{1,5}s)$"
"""A duration that is not empty."""
_DNS_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_HOST_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_HOST = r"[A-Za-z0-9]([-A-Za-z0-9]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([-A-Za-z0-9]{0,61}[A-Za-z0-9])?)*"
_PORT = r"(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?"
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"
_QUANTITY_REFUSAL = "write a quantity that is not negative, such as 2, 500m, 1.5 or 8Gi"
_S3_BUCKET = r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
_S3_SEGMENT = r"/[A-Za-z0-9!_.*'()=+@:-]+"
_NO_DOT_SEGMENTS = _rules(
    (r'!self.matches(r"/\.{1,2}(/|$)")', "the path may not have . or .. as a part: name the object directly"),
    (
        r'!self.matches(r"^s3://([^/]*(\.\.|\.-|-\.)|[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+(/|$))")',
        "S3 has no bucket of this name: the parts between dots begin and end in a letter or digit, and it is no IP address",
    ),
)
_OCTET = r"(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])"
_REACHABLE = (
    (
        rf'!self.matches(r"^https?://[0-9.]+(:|/|$)") || self.matches(r"^https?://{_OCTET}([.]{_OCTET}){{3}}(:|/|$)")',
        "this is neither a host name nor an address of four numbers from 0 to 255: write one",
    ),
    (
        '!self.matches(r"^https?://([Ll][Oo][Cc][Aa][Ll][Hh][Oo][Ss][Tt]|127[.]|0[.])")',
        "this is the address of the pod that asks, where no such server runs: write the name of the server's Service or host",
    ),
    (
        '!self.matches(r"^https?://(169[.]254[.]|metadata[.]google[.]internal(:|/|$))")',
        "this is the cloud's metadata service, which hands out credentials: write the address of the server that is meant",
    ),
)
_MONTHS = (
    "!self.matches('^[0-9]{4}-(02-3|(04|06|09|11)-31)')",
    "the month has no such day: write a day that there is, or the time now",
)
_PIXELS = "the pixels that it is for are from 0 to 1: divide a number for pixels from 0 to 255 by 255"


def _decimal(condition: str, message: str) -> tuple[str, str]:
    """A CEL rule about the number in a decimal string; the pattern refuses what is no number."""
    return rf'!self.matches(r"{_DECIMAL}") || ({condition.replace("self", "double(self)")})', message


def _lasts(least: str, most: str, message: str) -> tuple[str, str]:
    """A CEL rule about the length of a duration; the pattern refuses what is none."""
    length = f"duration(self) >= duration('{least}') && duration(self) <= duration('{most}')"
    return rf'self.size() == 0 || !self.matches(r"{_DURATION}") || ({length})', message


def _quantity(*rules: tuple[str, str]) -> dict[str, Any]:
    return {
        "x-kubernetes-int-or-string": True,
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "maxLength": 32,
        **_rules((f'type(self) == string ? self.matches(r"{_QUANTITY}") : self >= 0', _QUANTITY_REFUSAL), *rules),
    }


_TOLERANCE = _rules(
    _decimal("self > 0.0", "a tolerance of 0 is met by no export: give a small positive one such as 1e-4"),
    _decimal("self <= 1.0", "a tolerance above 1, which is the spread of the outputs, accepts any answer: give one such as 1e-3"),
)

Quantity = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[str, Field(max_length=32, pattern=_QUANTITY)],
    WithJsonSchema(_quantity()),
]
Size = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[str, Field(max_length=32, pattern=_QUANTITY)],
    WithJsonSchema(
        _quantity(
            (
                "!isQuantity(string(self)) || (quantity(string(self)).compareTo(quantity('1Mi')) >= 0 && "
                "quantity(string(self)).compareTo(quantity('16Ti')) <= 0)",
                "this is a number of bytes, from 1Mi to 16Ti: write it with its unit, such as 256Mi",
            )
        )
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
        json_schema_extra=_refusal("write a key of the object's data: letters, digits, '-', '_' and '.'")
        | _rules(("self != '.' && !self.startsWith('..')", "a key may not be . and may not begin with ..: name another key")),
    ),
]
LabelKey = Annotated[
    str,
    Field(
        max_length=317,
        pattern=rf"^({_DNS_LABEL}(\.{_DNS_LABEL})*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$",
        json_schema_extra=_refusal("write [domain/]name, such as nvidia.com/gpu or kubernetes.io/hostname")
        | _rules(("self.indexOf('/') <= 253", "the part before / is a domain: give one of at most 253 characters")),
    ),
]
_SHORT_DOMAINS = (
    "self.all(k, k.indexOf('/') <= 253)",
    "the part of a key before / is a domain: give one of at most 253 characters",
)
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
_EMPTY = hashlib.sha256().hexdigest()
Sha256 = Annotated[
    str,
    Field(
        max_length=80,
        pattern=r"^[0-9a-f]{64}$",
        json_schema_extra=_refusal("write the 64 lower-case hex digits that `sha256sum FILE` prints")
        | _rules((f"self != '{_EMPTY}'", "this is the digest of an empty file: upload the file again, and give its digest")),
    ),
]
HttpUri = Annotated[
    str,
    Field(
        max_length=253,
        pattern=rf"^https?://{_HOST}{_PORT}$",
        json_schema_extra=_refusal(
            "write http(s)://<host>[:<port>] with no path and a port from 1 to 65535, such as http://s3.storage:9000"
        )
        | _rules(*_REACHABLE),
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
        pattern=_DECIMAL,
        json_schema_extra=_refusal('write a decimal number in quotes, such as "0.001" or "1e-3"'),
    ),
]
SignedDecimal = Annotated[
    str,
    Field(
        max_length=24,
        pattern=_SIGNED_DECIMAL,
        json_schema_extra=_refusal('write a decimal number in quotes, such as "0.95" or "-1.5"'),
    ),
]
Duration = Annotated[
    str,
    Field(
        min_length=1,
        max_length=24,
        pattern=_DURATION,
        json_schema_extra=_refusal("write a duration in hours, minutes and seconds, such as 30s, 5m or 1h30m"),
    ),
]
TensorName = Annotated[
    str,
    Field(
        max_length=128,
        pattern=r"^[A-Za-z0-9_.:/][A-Za-z0-9_.:/-]*$",
        json_schema_extra=_refusal(
            "write a tensor's name of letters, digits, '_', '.', ':', '/' and '-', which is not the first"
        ),
    ),
]
_REPOSITORY = r"[a-z0-9]+([._-]+[a-z0-9]+)*"
Image = Annotated[
    str,
    Field(
        max_length=512,
        pattern=r"^([a-zA-Z0-9]([-.a-zA-Z0-9]*[a-zA-Z0-9])?"
        rf"{_PORT}/)?{_REPOSITORY}(/{_REPOSITORY})*(:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(@sha256:[0-9a-f]{{64}})?$",
        json_schema_extra=_refusal(
            "write an image as [registry/]repository[:tag][@sha256:digest], such as nvcr.io/nvidia/tritonserver:25.10-py3"
        ),
    ),
]
# Two rules: each has a cost budget of its own, and there may be 1000 labels.
Label = Annotated[
    str,
    Field(
        min_length=1,
        max_length=128,
        json_schema_extra=_rules(
            (r"!self.matches(r'\p{Cc}')", "write a class's name on one line, without tabs and other controls"),
            ("bytes(self).size() <= 128", "a class's name takes at most 128 bytes: write a shorter one"),
        ),
    ),
]
# A pod template with a name twice could not be applied; the API server refuses it here, where the user sees it.
_BY_NAME: dict[str, Any] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
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

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "has(self.credentialsSecretRef) != has(self.serviceAccountName)",
                "pods need one way to the store: give credentialsSecretRef, or serviceAccountName for workload identity",
                ".credentialsSecretRef",
            ),
        )
    )

    uri: S3Prefix = Field(
        description="Bucket and prefix, such as s3://models/prod. Artefacts go to "
        "<uri>/<namespace>/<name>/<version>-<artifactRevision>/. Immutable.",
    )
    endpoint: HttpUri | None = Field(
        None, description="URL of an S3-compatible server, such as http://s3.storage:9000. Omit for AWS. Immutable."
    )
    region: Region | None = Field(None, description="Region of the bucket; us-east-1 when omitted. Immutable.")
    credentials_secret_ref: LocalRef | None = Field(
        None,
        description="Secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_SESSION_TOKEN where the "
        "credentials are temporary, in the same namespace. The operator never reads it; pods mount it.",
    )
    service_account_name: Name | None = Field(
        None,
        description="ServiceAccount, in place of a Secret, that AWS gives a role (IRSA or EKS Pod Identity). All pods run under "
        "it; fetch, publish, download and delete have the role, and no other container has. See docs/security.md.",
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

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "!has(self.stateDictKey) || self.format == 'StateDict'",
                "remove stateDictKey, or say format: StateDict: a SafeTensors file holds tensors and nothing around them",
                ".stateDictKey",
            ),
            (
                "!has(self.trustSource) || !self.trustSource || self.format == 'StateDict'",
                "remove trustSource, or say format: StateDict, the one format that is a pickle",
                ".trustSource",
            ),
        )
    )
    uri: S3Object = Field(description="The checkpoint object, such as s3://checkpoints/digits/v1.pt.")
    format: Literal["StateDict", "SafeTensors", "TorchScript", "TorchExport", "ONNX"] = Field(
        description="StateDict: torch.save(model.state_dict()), loaded with weights_only. SafeTensors: a .safetensors file. "
        "Whole networks, which need no architecture: TorchScript (torch.jit.save), TorchExport (torch.export.save, with a "
        "dynamic batch), and ONNX, a model in one file, which is checked and published as it is."
    )
    sha256: Sha256 = Field(
        description="SHA-256 of the object, 64 lower-case hex digits (sha256sum FILE). Checked before a byte is parsed.",
    )
    state_dict_key: str | None = Field(
        None,
        max_length=128,
        pattern=r"^[A-Za-z0-9_.-]+$",
        json_schema_extra=_refusal("write the key under which the training checkpoint keeps the state dict, such as state_dict"),
        description="Where the file is a whole training checkpoint: the key under which it keeps the state dict, such as "
        "state_dict or model. Tensors, plain containers and plain data are read; anything else in the file is refused.",
    )
    trust_source: bool = Field(
        False,
        description="Let this file run code while it is read, for format StateDict: a whole pickled model, or tensors beside "
        "objects of your own classes (architecture.source can bring them). Say so of files that you made yourself, of no others. "
        "It happens in the convert container, without credentials and without a token. Of a model the weights are taken; "
        "the network is that of architecture. False if omitted: only tensors and plain containers are read.",
    )
    endpoint: HttpUri | None = Field(None, description="Another S3 endpoint than repository.endpoint, if it lies elsewhere.")
    region: Region | None = Field(None, description="Region, if not repository.region.")
    credentials_secret_ref: LocalRef | None = Field(
        None,
        description="Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where they are temporary, AWS_SESSION_TOKEN, if "
        "not the repository's credentials or identity.",
    )


class Source(Model):
    """Code of your own, in an object store; it is reached as the checkpoint is, by the same endpoint and credentials."""

    uri: S3Object = Field(
        description="A wheel, or a zip with the package at its top, such as s3://code/nets-1.2-py3-none-any.whl."
    )
    sha256: Sha256 = Field(description="SHA-256 of the object, 64 lower-case hex digits (sha256sum FILE).")


ParameterName = Annotated[
    str,
    Field(
        max_length=64,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        json_schema_extra=_refusal("write the name of a parameter: letters, digits and '_'"),
    ),
]
ParameterValue = Annotated[
    int | Annotated[str, Field(max_length=256)],
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": 256,
        }
    ),
]
_PYTHON_PATH = r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*"


class Architecture(Model):
    """The network whose weights the checkpoint holds: one that Perch knows by name, or one of your own by entryPoint."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "has(self.name) != has(self.entryPoint)",
                "give either name, for a network that Perch knows, or entryPoint and source, for one of your own",
            ),
            (
                "has(self.entryPoint) == has(self.source)",
                "entryPoint and source go together: give both, the factory and the wheel or zip that holds it",
                ".source",
            ),
            (
                "!has(self.name) || !has(self.parameters) || self.parameters.all(key, key.matches('^[a-z][A-Za-z0-9]*$'))",
                "parameters of a network known by name are in camelCase: write numClasses for num_classes",
                ".parameters",
            ),
            (
                "!has(self.name) || !(self.name in ['torchvision:googlenet', 'torchvision:inception_v3']) || "
                "(has(self.parameters) && 'transformInput' in self.parameters)",
                "this network needs parameters.transformInput, since the checkpoint does not say it and every answer depends on "
                'it: "true" if the training began from ImageNet\'s weights (torchvision sets it then), "false" if not',
                ".parameters",
            ),
        )
    )
    name: str | None = Field(
        None,
        max_length=128,
        pattern=r"^(lenet5|zfnet|torchvision:[a-z][a-z0-9_]*)$",
        json_schema_extra=_refusal("name an architecture: lenet5, zfnet, or torchvision:<name>, such as torchvision:resnet18"),
        description="lenet5, zfnet, or torchvision:<name>, such as torchvision:resnet18: torchvision's classification models, "
        "and of its detection models ssdlite320_mobilenet_v3_large, ssd300_vgg16, retinanet_resnet50_fpn (also _v2) and "
        "fcos_resnet50_fpn.",
    )
    entry_point: str | None = Field(
        None,
        max_length=256,
        pattern=rf"^{_PYTHON_PATH}:{_PYTHON_PATH}$",
        json_schema_extra=_refusal("write <package.module>:<factory>, such as nets.model:build"),
        description="A factory of your own, as <package.module>:<factory>: called with the parameters, it returns the "
        "torch.nn.Module whose state dict the checkpoint is. It runs in the export Job's sandbox alone.",
    )
    source: Source | None = Field(None, description="What holds entryPoint.")
    parameters: dict[ParameterName, ParameterValue] | None = Field(
        None,
        max_length=32,
        description="Arguments of the network's constructor: in camelCase for a network known by name, such as numClasses: 10; "
        "as the factory calls them for an entryPoint. A number with a fraction, true and false are written in quotes, "
        'such as "0.5" or "true", and mean what they say; a text that looks like one is quoted twice, such as \'"true"\'.',
        json_schema_extra=_rules(
            (
                "!('numClasses' in self) || (type(self['numClasses']) == int && self['numClasses'] >= 1 && "
                "self['numClasses'] <= 1000000)",
                "numClasses is a number of classes: write a whole number, 1 or more, without quotes",
            ),
        ),
    )
    layer: str | None = Field(
        None,
        max_length=128,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*$",
        json_schema_extra=_refusal("write a layer's name as the network has it, such as flatten or features.12"),
        description="Serve what this layer gives, in place of the network's answer: features of an image, to search by. Named as "
        "torchvision's feature extraction names the layers, such as flatten for ResNets.",
    )


Dimension = Annotated[int, Field(ge=-1, le=65536, json_schema_extra={"format": "int32"})]


def _bytes(tensor: str) -> str:
    """A CEL expression: bytes of one sample, as a double, which does not overflow. A dynamic dimension counts as 224."""
    sizes = (
        f"({tensor}.shape.size() > {n} ? ({tensor}.shape[{n}] < 0 ? 224.0 : double({tensor}.shape[{n}])) : 1.0)" for n in range(7)
    )
    width = f"({tensor}.dataType == 'INT64' ? 8.0 : {tensor}.dataType in ['FP32', 'INT32'] ? 4.0 : 2.0)"
    return " * ".join((width, *sizes))


_MIB = 2**20


class Tensor(Model):
    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                f"{_bytes('self')} <= {256.0 * _MIB}",
                "one sample of this tensor takes more than 256 MiB: give it a smaller shape",
                ".shape",
            ),
        )
    )
    name: TensorName = Field(description="Name of the tensor, as clients use it.")
    data_type: Literal["FP32", "FP16", "INT64", "INT32", "UINT8", "BOOL"] = Field(description="Data type, as Triton names it.")
    shape: list[Dimension] = Field(
        min_length=1,
        max_length=7,
        description="Shape without the batch dimension, such as [1, 28, 28]; -1 is a dynamic dimension.",
        json_schema_extra=_rules(
            ("self.all(d, d != 0)", "a dimension of 0 holds no data; give a positive size, or -1 for a dynamic one"),
        ),
    )


_SHARE = r"^(0([.][0-9]{1,9})?|1([.]0{1,9})?)$"
_SHARE_REFUSAL = 'write a share from 0 to 1 in quotes, such as "0.95"'
Share = Annotated[
    str,
    Field(
        max_length=12,
        pattern=_SHARE,
        json_schema_extra=_refusal(_SHARE_REFUSAL),
    ),
]


class DataSet(Model):
    """Samples with labels in an object store, reached with the checkpoint's endpoint and credentials."""

    uri: S3Object = Field(
        description="An npz file with one array for each input ([samples, *shape], in the input's data type) and, where labels "
        "are needed, one named labels (whole numbers from 0, [samples])."
    )
    sha256: Sha256 = Field(description="SHA-256 of the object, 64 lower-case hex digits (sha256sum FILE).")


class Conversion(Model):
    """What the checkpoint is exported to."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "(has(self.precision) && self.precision == 'INT8') == has(self.calibration)",
                "precision INT8 and calibration go together: give both, since INT8 chooses its scales by real samples, or remove "
                "calibration, since no other precision reads any",
                ".calibration",
            ),
        )
    )
    target: Literal["ONNX", "TensorRT"] = Field(
        "ONNX",
        description="Format of the artefact. ONNX is the default. TensorRT: a plan, built of the ONNX file in the export Job on "
        "a GPU of the kind that will serve, by the TensorRT that will serve. Needs builder.tensorrtImage, runtime.image, "
        "runtime.tensorrtVersion and a GPU in both.",
    )
    precision: Literal["FP32", "FP16", "INT8"] = Field(
        "FP32",
        description="Precision of weights and compute; inputs and outputs are FP32 in any case. FP32 is the default. FP16: half "
        "precision, but for operations and nodes that need FP32; for GPUs, on CPUs it is slower than FP32. INT8: static "
        "quantization (QDQ, a scale for each channel of the weights), for CPUs with VNNI; needs calibration.",
    )
    calibration: DataSet | None = Field(
        None,
        description="Samples that INT8 chooses its scales by, 16 or more, some hundred are better; labels are not needed. "
        "Required for INT8.",
    )
    opset: int | None = Field(
        None,
        ge=18,
        le=23,
        json_schema_extra={"format": "int32"},
        description="ONNX opset; the exporter's default when omitted.",
    )


class Parity(Model):
    """How near the artefact's answers must be to the checkpoint's. All bounds must hold."""

    absolute_tolerance: Decimal | None = Field(
        None,
        description='Greatest absolute difference, a decimal string; if omitted "1e-3" for FP32, "5e-2" FP16, "0.25" INT8.',
        json_schema_extra=_TOLERANCE,
    )
    relative_tolerance: Decimal | None = Field(
        None,
        description="Greatest difference relative to the spread of the outputs, a decimal string; if omitted as for "
        "absoluteTolerance.",
        json_schema_extra=_TOLERANCE,
    )
    minimum_top1_agreement: Share | None = Field(
        None,
        description="Least share of samples for which artefact and checkpoint put the same class first, a decimal string from 0 "
        'to 1; if omitted "0.9" for INT8, and not judged otherwise. For outputs that are scores, [classes]: where INT8 serves '
        'features of an ONNX file, write "0".',
    )
    minimum_cosine: Share | None = Field(
        None,
        description="Least cosine between artefact's and checkpoint's vectors for any sample, less their common centre, a "
        'decimal string from 0 to 1; if omitted with architecture.layer "0.999" for FP32, "0.99" FP16, "0.95" INT8, else not '
        "judged. For any output that is a vector.",
    )
    samples: DataSet | None = Field(
        None,
        description="Real samples to compare on, in place of made ones; labels are not needed. If omitted, those of "
        "verification.accuracy, where there are any.",
    )


class Accuracy(Model):
    """Share of a labelled data set's samples that get their label as the first answer (top-1)."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "has(self.minimum) || has(self.maximumDrop) || has(self.maximumDropFromStable)",
                "no limit is given: give minimum, maximumDrop or maximumDropFromStable",
            ),
            (
                f"!has(self.minimum) || !self.minimum.matches('{_SHARE}') || double(self.minimum) > 0.0",
                "a minimum of 0 accepts any artefact: give a share above 0; to measure only, add onFailure: Warn",
                ".minimum",
            ),
            *(
                (
                    f"!has(self.{drop}) || !self.{drop}.matches('{_SHARE}') || double(self.{drop}) < 1.0",
                    "a drop of 1 accepts any artefact: give a share below 1; to measure only, add onFailure: Warn",
                    f".{drop}",
                )
                for drop in ("maximumDrop", "maximumDropFromStable")
            ),
        )
    )
    dataset: DataSet = Field(description="The labelled data set.")
    minimum: Share | None = Field(None, description='Least accuracy of the artefact, a decimal string such as "0.95".')
    maximum_drop: Share | None = Field(
        None, description='How far the artefact may fall below its own checkpoint, a decimal string such as "0.01".'
    )
    maximum_drop_from_stable: Share | None = Field(
        None,
        description="How far the artefact may fall below the stable version when it becomes the canary, a decimal string. "
        "Compared where both saw the same data set, by its sha256; a larger drop aborts the canary before it has any traffic.",
    )
    on_failure: Literal["Block", "Warn"] = Field(
        "Block", description="What a missed limit does: Block (default), or Warn with an event and go on."
    )


class Verification(Model):
    """The gates that a version must pass before it is published."""

    parity: Parity | None = Field(None, description="Answers of the artefact against answers of the checkpoint.")
    accuracy: Accuracy | None = Field(None, description="Answers of the artefact against labels.")


class QueuePolicy(Model):
    """What becomes of requests that wait in Triton's queue."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            *(
                (
                    f"{unset} || has(self.defaultTimeoutMicroseconds)",
                    f"{field} is about a time in the queue, and none is set: add defaultTimeoutMicroseconds, or remove {field}",
                    f".{field}",
                )
                for field, unset in (
                    ("timeoutAction", "!has(self.timeoutAction)"),
                    ("allowTimeoutOverride", "!has(self.allowTimeoutOverride) || !self.allowTimeoutOverride"),
                )
            ),
        )
    )

    timeout_action: Literal["Reject", "Delay"] | None = Field(
        None,
        description="What happens to a request whose time is up: Reject (default) answers an error, Delay lets all others go "
        "before it.",
    )
    default_timeout_microseconds: int | None = Field(
        None,
        ge=1,
        le=3_600_000_000,
        json_schema_extra={"format": "int64"},
        description="Longest time in the queue, µs; without an end if omitted.",
    )
    allow_timeout_override: bool = Field(False, description="Let a request ask for a shorter time than that, by its timeout.")
    max_queue_size: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        json_schema_extra={"format": "int32"},
        description="Most requests in the queue; one more is answered by an error at once. Not bounded if omitted.",
    )


Side = Annotated[int, Field(ge=1, le=4096, json_schema_extra={"format": "int32"})]
_CHANNELS = "(has(self.decode) && self.decode == 'L' ? 1 : 3)"


_MEAN = (
    rf'!self.matches(r"{_SIGNED_DECIMAL}") || (double(self) >= -10.0 && double(self) <= 10.0)',
    f"give a mean from -10 to 10; {_PIXELS}",
)
_STD = (
    _decimal("self > 0.0", 'std divides: give a number above 0, such as "0.229"'),
    _decimal("self == 0.0 || self >= 1e-4 && self <= 1e4", f"give a std from 1e-4 to 1e4; {_PIXELS}"),
)


class Preprocessing(Model):
    """From a picture's bytes to the network's tensor, as torchvision's transforms do it in training."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "has(self.mean) == has(self.std)",
                "mean and std belong together: give both, or neither",
                ".mean",
            ),
            (
                f"!has(self.mean) || self.mean.size() == {_CHANNELS}",
                "give one mean for each channel: three for RGB, one for L",
                ".mean",
            ),
            (
                f"!has(self.std) || self.std.size() == {_CHANNELS}",
                "give one std for each channel: three for RGB, one for L",
                ".std",
            ),
            (
                "!has(self.resize) || self.resize.size() == 2 || has(self.centerCrop)",
                "resize by the shorter side leaves pictures of any length: add centerCrop, or give resize two numbers",
                ".centerCrop",
            ),
            (
                "!has(self.resize) || !has(self.centerCrop) || (self.resize.size() == 1 ? "
                "self.centerCrop.exists(side, side <= self.resize[0]) : self.centerCrop[0] <= self.resize[0] && "
                "self.centerCrop[self.centerCrop.size() - 1] <= self.resize[1])",
                "centerCrop is larger than what resize leaves, and the rest would be black: lower it, or raise resize",
                ".centerCrop",
            ),
            (
                "!has(self.interpolation) || has(self.resize)",
                "interpolation is about resize: add resize, or remove interpolation",
                ".interpolation",
            ),
        )
    )
    decode: Literal["RGB", "L"] | None = Field(None, description="Colours of the tensor: RGB (default), or L for grey.")
    resize: list[Side] | None = Field(
        None,
        min_length=1,
        max_length=2,
        description="As torchvision's Resize: one number is the shorter side, two are height and width. Not resized if omitted.",
    )
    center_crop: list[Side] | None = Field(
        None,
        min_length=1,
        max_length=2,
        description="As torchvision's CenterCrop: one number for a square, or height and width. Not cropped if omitted.",
    )
    interpolation: Literal["Bilinear", "Bicubic"] | None = Field(
        None, description="How resize weighs pixels; Bilinear, as torchvision's Resize, if omitted."
    )
    mean: list[Annotated[SignedDecimal, Field(json_schema_extra=_rules(_MEAN))]] | None = Field(
        None,
        min_length=1,
        max_length=3,
        description="As torchvision's Normalize, for pixels from 0 to 1: one for each channel, such as "
        '["0.485", "0.456", "0.406"].',
    )
    std: list[Annotated[Decimal, Field(json_schema_extra=_rules(*_STD))]] | None = Field(
        None, min_length=1, max_length=3, description='One for each channel, such as ["0.229", "0.224", "0.225"].'
    )
    layout: Literal["CHW", "HWC"] | None = Field(
        None, description="Order of the tensor's dimensions; CHW, as PyTorch has it, if omitted."
    )


class Postprocessing(Model):
    """From the network's output to the names of the best classes."""

    top_k: int = Field(
        ge=1, le=1000, json_schema_extra={"format": "int32"}, description="How many classes are answered, the best first."
    )
    softmax: bool = Field(False, description="Turn the network's output into shares of one: for networks that give logits.")


class DynamicBatching(Model):
    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "has(self.priorityLevels) == has(self.defaultPriorityLevel)",
                "priorityLevels and defaultPriorityLevel belong together: give both, or neither",
                ".priorityLevels",
            ),
            (
                "!has(self.priorityLevels) || !has(self.defaultPriorityLevel) || "
                "self.defaultPriorityLevel <= self.priorityLevels",
                "defaultPriorityLevel is one of the levels 1 to priorityLevels: lower it",
                ".defaultPriorityLevel",
            ),
            (
                "!has(self.maxQueueDelayMicroseconds) || !has(self.defaultQueuePolicy) || "
                "!has(self.defaultQueuePolicy.defaultTimeoutMicroseconds) || "
                "self.defaultQueuePolicy.defaultTimeoutMicroseconds > self.maxQueueDelayMicroseconds",
                "a request that waits for its batch is out of time before the batch is full: raise defaultTimeoutMicroseconds "
                "above maxQueueDelayMicroseconds, or lower the delay",
                ".defaultQueuePolicy",
            ),
            (
                "!has(self.preferredBatchSizes) || !has(self.defaultQueuePolicy) || "
                "!has(self.defaultQueuePolicy.maxQueueSize) || "
                "self.preferredBatchSizes.all(b, b <= self.defaultQueuePolicy.maxQueueSize)",
                "no batch is larger than the queue that it is made of: raise maxQueueSize, or lower the preferred size",
                ".defaultQueuePolicy",
            ),
        )
    )
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
    priority_levels: int | None = Field(
        None,
        ge=1,
        le=64,
        json_schema_extra={"format": "int32"},
        description="How many priorities a request may ask for, by its priority; 1 goes first. One for all if omitted.",
    )
    default_priority_level: int | None = Field(
        None,
        ge=1,
        le=64,
        json_schema_extra={"format": "int32"},
        description="Priority of a request that asks for none. Required with priorityLevels.",
    )
    default_queue_policy: QueuePolicy | None = Field(None, description="How long requests may wait, and how many.")


BATCHING = re.compile(r"\b(dynamic_batching|sequence_batching)\b")
"""What makes Triton join requests, in config.pbtxt."""


def _protobuf_text(fields: str, depth: int) -> str:
    """A regular expression for protobuf text of these fields, all of them messages. It stands in CEL between three quotes.

    Names, numbers, strings and brackets that close what was opened, to this depth; which fields a message has is Triton's to say.
    """
    flat = r"""[+-.:;\w\s]|#.*|"(\\.|[^"\\])*"|'[^']*'"""
    below = flat
    for _ in range(depth - 1):
        below = rf"{flat}|[{{\[]({below})*[}}\]]"
    return rf"^([\s,;]|#.*|({fields})\s*:?\s*[{{\[]({below})*[}}\]])+$"


_OVERRIDES = _protobuf_text("dynamic_batching|instance_group|metric_tags|optimization|parameters|response_cache", depth=5)


class TritonModel(Model):
    """The model's config.pbtxt."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "!has(self.accelerator) || !has(self.instanceKind) || self.instanceKind != 'CPU'",
                "accelerator TensorRT runs on a GPU alone: give instanceKind GPU or leave it out, or remove the accelerator",
                ".instanceKind",
            ),
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
            (
                "!has(self.configOverrides) || !self.configOverrides.matches('response_cache') || "
                "(has(self.responseCache) && self.responseCache)",
                "Triton is started without a cache: set responseCache: true, and remove response_cache from configOverrides",
                ".configOverrides",
            ),
            (
                "!has(self.configOverrides) || !self.configOverrides.matches('dynamic_batching') || "
                "!has(self.maxBatchSize) || self.maxBatchSize > 1",
                "dynamic_batching needs maxBatchSize above 1: raise maxBatchSize, or remove dynamic_batching",
                ".configOverrides",
            ),
            (
                "!has(self.configOverrides) || !self.configOverrides.matches('KIND_CPU') || !has(self.accelerator)",
                "accelerator TensorRT runs on a GPU alone: remove KIND_CPU, or remove the accelerator",
                ".configOverrides",
            ),
            (
                "!has(self.configOverrides) || !self.configOverrides.contains('instance_group') || "
                "!has(self.instanceCount) && !has(self.instanceKind)",
                "instance_group of configOverrides takes the place of instanceCount and instanceKind: remove these, or the group",
                ".configOverrides",
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
    instance_kind: Literal["AUTO", "CPU", "GPU"] = Field(
        "AUTO",
        description="Where the instances run. AUTO (default): on the pod's GPUs, or on the CPU where it has none.",
    )
    labels: list[Label] | None = Field(
        None,
        min_length=1,
        max_length=1000,
        description="Names of the classes, in the order of the output, for Triton's classification extension and for "
        "postprocessing. As many as the output's last dimension says.",
    )
    warmup: bool = Field(
        False,
        description="Run a sample alone, and in a batch of maxBatchSize, before the model is ready: else the first requests pay "
        "for what libraries load and tune.",
    )
    response_cache: bool = Field(
        False,
        description="Answer a request that equals an earlier one from memory; runtime.responseCacheMebibytes bounds it.",
    )
    config_overrides: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="More of Triton's config.pbtxt, as protobuf text, merged into what Perch writes: dynamic_batching, "
        "instance_group, metric_tags, optimization, parameters and response_cache. A list takes the place of Perch's own.",
        json_schema_extra=_rules(
            (
                r'!self.matches(r"^\s*(name|platform|backend|version_policy|max_batch_size|input|output)\s*[:{<]")',
                "name, backend, input, output and the like are written by Perch from the version's own fields: remove them",
            ),
            (
                f'self.matches(r"""{_OVERRIDES}""")',
                "write protobuf text of these fields alone, and close each bracket: dynamic_batching, instance_group, "
                "metric_tags, optimization, parameters, response_cache",
            ),
            (
                r"""!self.matches(r'["\x27]\s*:')""",
                'protobuf text is no JSON: write names without quotes, such as key: "x"',
            ),
            (
                r'!self.matches(r"(^|[^A-Za-z0-9_])passive([^A-Za-z0-9_]|$)")',
                "passive instances answer no request: remove passive",
            ),
            (
                r'!self.matches(r"(^|[^A-Za-z0-9_])count\s*:\s*(-|0*([1-9][0-9]{2,}|6[5-9]|[7-9][0-9])|0+([^0-9]|$))")',
                "a group has 1 to 64 instances: give such a count",
            ),
            (
                "!self.contains('KIND_MODEL')",
                "KIND_MODEL is not for this backend: write KIND_GPU or KIND_CPU, or use instanceKind",
            ),
            (
                "!self.contains('gpu_execution_accelerator')",
                "remove gpu_execution_accelerator, and use triton.accelerator for TensorRT: each pod then proves a whole batch",
            ),
        ),
    )
    accelerator: Literal["TensorRT"] | None = Field(
        None,
        description="TensorRT: Triton's ONNX backend hands the network to TensorRT on the GPU, in the file's precision. Each pod "
        "builds its engines when it starts, for minutes, and is ready after. Needs a GPU, or a share of one, in "
        "runtime.resources.limits or by a claim.",
    )

    @property
    def batches(self) -> bool:
        """Whether Triton may execute several requests as one: as the served config.pbtxt says, wherever it was written."""
        return self.dynamic_batching is not None or bool(BATCHING.search(self.config_overrides or ""))


_BATCH = "(has(self.triton) && has(self.triton.maxBatchSize) ? double(self.triton.maxBatchSize) : 8.0)"
_FOR_TENSORRT = (
    "(has(self.triton) && has(self.triton.accelerator) || "
    "has(self.conversion) && has(self.conversion.target) && self.conversion.target == 'TensorRT')"
)
_NO_DETECTOR = f"!has(self.architecture) || !has(self.architecture.name) || !(self.architecture.name in {list(DETECTORS)})"
_CROP, _RESIZE = "self.preprocessing.centerCrop", "self.preprocessing.resize"
_LAST = "has(self.preprocessing.layout) && self.preprocessing.layout == 'HWC'"
_HEIGHT, _WIDTH, _DEPTH = (f"i.shape[{_LAST} ? {last} : {first}]" for last, first in ((0, 1), (1, 2), (2, 0)))


_OTHER_OBJECTS = tuple(
    f"({' && '.join(f'has(self.{part})' for part in parents)} ? self.{parents[-1]}.uri : '')"
    for parents in (
        ("architecture", "architecture.source"),
        ("conversion", "conversion.calibration"),
        ("verification", "verification.parity", "verification.parity.samples"),
        ("verification", "verification.accuracy", "verification.accuracy.dataset"),
    )
)


class Version(Model):
    """One version of the model: its checkpoint, and how it is exported and served. Immutable while it is listed."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "self == oldSelf",
                "an entry of spec.versions is immutable while it is listed: add an entry with a new version number instead",
            ),
            (
                "has(self.architecture) || !(self.checkpoint.format in ['StateDict', 'SafeTensors'])",
                "name the architecture whose weights the checkpoint holds: StateDict and SafeTensors bring none of their own",
                ".architecture",
            ),
            (
                "!has(self.triton) || !has(self.triton.labels) || self.outputs.all(o, o.shape.size() == 1 && "
                "o.shape[0] == self.triton.labels.size())",
                "triton.labels are the classes of the one output: give as many as its shape says, which must be [classes]",
                ".triton.labels",
            ),
            (
                "has(self.preprocessing) || !has(self.postprocessing)",
                "postprocessing answers to pictures: add preprocessing, or remove postprocessing",
                ".postprocessing",
            ),
            (
                "!has(self.postprocessing) || self.outputs.size() == 1 && "
                "self.outputs.all(o, o.dataType == 'FP32' && o.shape.size() == 1 && o.shape[0] >= self.postprocessing.topK)",
                "postprocessing ranks one output of FP32 and shape [classes]: give outputs such a one, and a topK of at most its "
                "classes",
                ".postprocessing",
            ),
            (
                "!has(self.preprocessing) || self.inputs.size() == 1 && self.inputs.all(i, i.dataType == 'FP32' && "
                f"i.shape.size() == 3 && {_DEPTH} == "
                "(has(self.preprocessing.decode) && self.preprocessing.decode == 'L' ? 1 : 3))",
                "preprocessing makes one tensor of FP32, of 3 channels (decode: RGB) or 1 (L), first in its shape (layout: CHW) "
                "or last (HWC): set decode and layout so that they fit the input's shape",
                ".preprocessing",
            ),
            (
                f"!has(self.preprocessing) || self.inputs.all(i, i.shape.size() != 3 || (has({_CROP}) ? "
                f"{_HEIGHT} == {_CROP}[0] && {_WIDTH} == {_CROP}[{_CROP}.size() - 1] : has({_RESIZE}) ? "
                f"{_HEIGHT} == {_RESIZE}[0] && {_WIDTH} == {_RESIZE}[{_RESIZE}.size() - 1] : {_HEIGHT} > 0 && {_WIDTH} > 0))",
                "preprocessing makes tensors of the size of centerCrop, or of resize: give the input's shape these sizes",
                ".preprocessing",
            ),
            (
                f"{_NO_DETECTOR} || self.inputs.size() == 1 && self.inputs.all(i, i.dataType == 'FP32' && i.shape.size() == 3 && "
                "i.shape[0] == 3 && i.shape[1] > 0 && i.shape[2] > 0)",
                "a detection model takes one image: give one input, FP32, of shape [3, height, width], both above 0",
                ".inputs",
            ),
            (
                f"{_NO_DETECTOR} || self.outputs.map(o, o.name) == ['boxes', 'labels', 'scores'] && "
                "self.outputs.map(o, o.dataType) == ['FP32', 'INT64', 'FP32'] && self.outputs[0].shape.size() == 2 && "
                "self.outputs[0].shape[1] == 4 && self.outputs[0].shape[0] > 0 && self.outputs[0].shape[0] <= 1000 && "
                "self.outputs[1].shape == [self.outputs[0].shape[0]] && self.outputs[2].shape == [self.outputs[0].shape[0]]",
                "a detection model gives boxes (FP32, [D, 4]), labels (INT64, [D]) and scores (FP32, [D]): name these outputs in "
                "this order, with D detections for each image, at most 1000",
                ".outputs",
            ),
            (
                f"{_NO_DETECTOR} || !has(self.architecture.layer)",
                "remove layer: a detection model is served whole",
                ".architecture.layer",
            ),
            (
                f"{_NO_DETECTOR} || !has(self.conversion) || !has(self.conversion.precision) || "
                "self.conversion.precision == 'FP32'",
                "a detection model is exported in FP32 alone: remove conversion.precision",
                ".conversion.precision",
            ),
            (
                f"{_NO_DETECTOR} || !has(self.conversion) || !has(self.conversion.target) || self.conversion.target == 'ONNX'",
                "a detection model is run by onnxruntime: remove conversion.target",
                ".conversion.target",
            ),
            (
                f"{_NO_DETECTOR} || !has(self.verification) || !has(self.verification.parity) || "
                "!has(self.verification.parity.minimumTop1Agreement) && !has(self.verification.parity.minimumCosine)",
                "detections are judged one by one: remove minimumTop1Agreement and minimumCosine",
                ".verification.parity",
            ),
            (
                "!has(self.verification) || !has(self.verification.parity) || !has(self.verification.parity.minimumCosine) || "
                "self.outputs.exists(o, o.dataType in ['FP32', 'FP16'] && o.shape.exists(d, d != 1))",
                "no output is a vector of FP32 or FP16, which alone have a cosine: remove minimumCosine",
                ".verification.parity",
            ),
            (
                "!has(self.verification) || !has(self.verification.parity) || !has(self.verification.parity.minimumCosine) || "
                "!self.verification.parity.minimumCosine.matches('^0([.]0*)?$')",
                'a cosine of 0 accepts nearly any answer: give one above 0, such as "0.9", or remove it',
                ".verification.parity",
            ),
            (
                "!has(self.verification) || !has(self.verification.parity) || "
                "!has(self.verification.parity.minimumTop1Agreement) || "
                "self.verification.parity.minimumTop1Agreement.matches('^0([.]0*)?$') || "
                "self.outputs.exists(o, o.shape.size() == 1 && o.shape[0] != 1)",
                "no output is a row of [classes], which alone have a first one: remove minimumTop1Agreement",
                ".verification.parity",
            ),
            (
                "!has(self.verification) || !has(self.verification.accuracy) || self.outputs[0].shape != [1]",
                "the only class is always the right one: give the first output more classes, or remove accuracy",
                ".verification.accuracy",
            ),
            (
                f"[{', '.join(_OTHER_OBJECTS)}].all(uri, uri != self.checkpoint.uri)",
                "a data set or a source names the checkpoint itself: name its own object",
                ".checkpoint.uri",
            ),
            (
                f"self.inputs.all(i, {_bytes('i')} * {_BATCH} <= {4096.0 * _MIB})",
                "one batch of an input takes more than 4 GiB: lower triton.maxBatchSize, or give the input a smaller shape",
                ".inputs",
            ),
            (
                f"{_NO_DETECTOR} || !has(self.triton) || !has(self.triton.accelerator)",
                "remove accelerator: a detection model is run by onnxruntime itself",
                ".triton.accelerator",
            ),
            (
                "!has(self.architecture) || self.checkpoint.format in ['StateDict', 'SafeTensors']",
                "remove architecture: a file of this format is a whole network",
                ".architecture",
            ),
            (
                f"!{_FOR_TENSORRT} || {_BATCH} <= 1024.0",
                "TensorRT builds for, and each pod proves, a whole batch: lower triton.maxBatchSize to at most 1024",
                ".triton.maxBatchSize",
            ),
            (
                "self.inputs.all(input, !self.outputs.exists(output, output.name == input.name))",
                "give each tensor a name of its own: an input and an output have the same",
                ".outputs",
            ),
            (
                "self.checkpoint.format != 'ONNX' || !has(self.conversion) || !has(self.conversion.opset)",
                "remove conversion.opset: a file of format ONNX is published as it is",
                ".conversion",
            ),
            (
                "!has(self.verification) || !has(self.verification.accuracy) || self.outputs[0].shape.size() == 1",
                "accuracy judges classes: give the first output the shape [classes], or remove accuracy",
                ".verification.accuracy",
            ),
            (
                "!has(self.conversion) || !has(self.conversion.target) || self.conversion.target != 'TensorRT' || "
                "self.inputs.all(i, i.shape.all(d, d != -1))",
                "give each dimension of the inputs a size: a TensorRT plan is built for bounds, and only the batch has some",
                ".inputs",
            ),
            (
                "!has(self.conversion) || !has(self.conversion.target) || self.conversion.target != 'TensorRT' || "
                "!has(self.triton) || !has(self.triton.accelerator)",
                "remove triton.accelerator: it is for ONNX files, and a TensorRT plan needs none",
                ".triton.accelerator",
            ),
            (
                "!has(self.conversion) || !has(self.conversion.target) || self.conversion.target != 'TensorRT' || "
                "!has(self.triton) || !has(self.triton.instanceKind) || self.triton.instanceKind != 'CPU'",
                "conversion.target TensorRT runs on a GPU alone: give instanceKind GPU or leave it out",
                ".triton.instanceKind",
            ),
        )
    )
    version: VersionNumber = Field(description="Triton's version number, which clients see. Give each new checkpoint a new one.")
    checkpoint: Checkpoint = Field(description="The trained weights.")
    architecture: Architecture | None = Field(
        None,
        description="The network that the weights belong to. Required for StateDict and SafeTensors, and for no other format.",
    )
    inputs: list[Tensor] = Field(
        min_length=1,
        max_length=16,
        description="Input tensors, in the order of the network's arguments; one for image classifiers.",
        json_schema_extra=_BY_NAME,
    )
    outputs: list[Tensor] = Field(
        min_length=1,
        max_length=16,
        description="Output tensors, in the order of the network's answer; one for image classifiers.",
        json_schema_extra=_BY_NAME,
    )
    conversion: Conversion = Field(Conversion(), description="What the checkpoint is exported to; ONNX in FP32 if omitted.")
    verification: Verification = Field(Verification(), description="Gates before publication. Parity is always judged.")
    preprocessing: Preprocessing | None = Field(
        None,
        description="Let clients send pictures (JPEG or PNG) as the tensor image, of type BYTES, and make the network's input of "
        "them. inputs still says what the network takes.",
    )
    postprocessing: Postprocessing | None = Field(
        None,
        description="Answer pictures by names (labels, of type BYTES) and scores (scores, FP32) of the best classes in place of "
        "outputs. Names are triton.labels, or the numbers of the classes.",
    )
    triton: TritonModel = Field(TritonModel(), description="Batching and instances, for the model's config.pbtxt.")


_UNMATCHABLE = [
    *("host", "connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te", "trailer"),
    *("trailers", "transfer-encoding", "upgrade", "http2-settings", "expect", "content-length", "content-type"),
]


class HeaderMatch(Model):
    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                # A gateway would drop the rule, and testers would get stable's answers without a word. Whether 'x' matches does
                # not matter: CEL has to compile the expression to know, and refuses with this message where that fails.
                "!has(self.type) || self.type != 'RegularExpression' || 'x'.matches(self.value) in [true, false]",
                "this is no regular expression of RE2: correct it, or use type: Exact",
                ".value",
            ),
        )
    )
    name: str = Field(
        max_length=256,
        pattern=r"^[A-Za-z0-9!#$%&'*+\-.^_`|~]+$",
        description="Name of the header, in upper or lower case alike; gRPC metadata is a header too.",
        json_schema_extra=_refusal("write the name of an HTTP header, such as x-canary")
        | _rules(
            (
                f"!(self.lowerAscii() in {_UNMATCHABLE}) && !self.lowerAscii().startsWith('x-envoy-') && "
                "!self.lowerAscii().startsWith('x-perch-') && "
                "!self.lowerAscii().startsWith('grpc-')",
                "Host, headers about the connection, and those of gRPC, gateways and Perch do not tell who asks: match a "
                "header of your own, such as x-canary (for a host, use routing.hostnames)",
            ),
        ),
    )
    value: str = Field(
        max_length=1024,
        pattern=r"^[!-~]+([\t ]?[!-~]+)*$",
        description="Value of the header, or a regular expression (RE2) for all of it.",
        json_schema_extra=_refusal("write a header's value: visible ASCII characters, words parted by one space"),
    )
    type: Literal["Exact", "RegularExpression"] | None = Field(None, description="How value is compared; Exact if omitted.")


class TrafficMatch(Model):
    headers: list[HeaderMatch] = Field(
        min_length=1,
        max_length=8,
        description="All of them must match.",
        json_schema_extra=_BY_NAME
        | _rules(
            (
                "self.all(a, self.exists_one(b, b.name.lowerAscii() == a.name.lowerAscii()))",
                "upper and lower case are the same in a header's name, and gateways heed the first of two: name each header once",
            ),
        ),
    )


class TrafficMirror(Model):
    percent: int = Field(
        ge=1, le=100, json_schema_extra={"format": "int32"}, description="Percent of all requests that are copied to the canary."
    )


class Traffic(Model):
    """Which versions answer clients. A release adds `canary`; a promotion moves it to `stable`; a rollback is the revert."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "!has(self.canary) || self.canary != self.stable",
                "canary is the same version as stable: name another version, or remove canary",
                ".canary",
            ),
            (
                "has(self.canary) || !has(self.match)",
                "match sends requests to the canary: name traffic.canary, or remove match",
                ".match",
            ),
            (
                "has(self.canary) || !has(self.mirror)",
                "mirror copies requests to the canary: name traffic.canary, or remove mirror",
                ".mirror",
            ),
        )
    )
    stable: VersionNumber = Field(description="The version that all clients get, or all but the canary's share.")
    canary: VersionNumber | None = Field(None, description="The version on trial, which gets the weight of rollout.steps.")
    match: TrafficMatch | None = Field(
        None, description="Requests that always go to the canary, once it is ready, whatever its weight: for testers."
    )
    mirror: TrafficMirror | None = Field(
        None,
        description="Requests that are copied to the canary besides; its answers to them are dropped, its failures are judged.",
    )


class Step(Model):
    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "self.weight == 100 || has(self.hold)",
                "hold is required below weight 100: say how long, such as hold: 5m, or hold: Indefinite for a fixed split",
                ".hold",
            ),
            (
                "self.weight < 100 || !has(self.hold)",
                "weight 100 ends the rollout and is not held: remove hold (rollout.scaleDownDelay says how long stable's pods "
                "stay)",
                ".hold",
            ),
        )
    )
    weight: int = Field(
        ge=0,
        le=100,
        json_schema_extra={"format": "int32"},
        description="Percent of the requests that go to the canary. 0: only what traffic.match and traffic.mirror send it.",
    )
    hold: str | None = Field(
        None,
        max_length=24,
        pattern=r"^(Indefinite|([0-9]{1,5}h)?([0-9]{1,5}m)?([0-9]{1,5}s)?)$",
        min_length=1,
        description="How long this weight is held at least, such as 5m, before the evidence decides; Indefinite: until Git "
        "changes it (a fixed split). Required below 100.",
        json_schema_extra=_refusal("write a duration such as 30s, 5m or 1h30m, or Indefinite")
        | _rules(
            (
                "self == 'Indefinite' || " + _lasts("0s", "720h", "")[0],
                "a weight is held for 720h at most: give less, or hold: Indefinite",
            )
        ),
    )


class OnInconclusive(StrEnum):
    PAUSE = "Pause"
    PROMOTE = "Promote"
    ABORT = "Abort"


def _number(low: str, high: str, message: str) -> tuple[str, str]:
    """A CEL rule that bounds a decimal string; the pattern refuses what is no number."""
    return (
        f'!self.matches(r"^[0-9]+(\\.[0-9]+)?([eE]-?[0-9]{{1,2}})?$") || (double(self) {low} && double(self) {high})',
        message,
    )


_VARIABLES = "namespace|name|model|stable|canary|stableService|canaryService"


def _known_variables(more: str) -> tuple[str, str]:
    """A CEL rule: what stands in {{…}} is a variable that Perch fills in; else Prometheus would be sent the braces."""
    names = f"{_VARIABLES}|{more}"
    return (
        rf'self.matches(r"^([^{{]|\{{[^{{]|\{{\{{({names})\}}\}})*$")',
        f"a variable is not one of {{{{{names.replace('|', '}}, {{')}}}}}: name one of these",
    )


_COUNTER = _rules(
    _known_variables("version|service"),
    (
        "self.contains('{{version}}') || self.contains('{{service}}')",
        "the query is the same for both versions: name {{version}} or {{service}} in it",
    ),
)


class MetricQuery(Model):
    """A custom metric of the canary with a bound: a guard-rail beside the judge's statistics."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            ("has(self.min) || has(self.max)", "a metric without a bound decides nothing: give min, max or both"),
            (
                f'!has(self.min) || !has(self.max) || !self.min.matches(r"{_SIGNED_DECIMAL}") || '
                f'!self.max.matches(r"{_SIGNED_DECIMAL}") || double(self.min) <= double(self.max)',
                "no value is both above min and below max: lower min or raise max",
                ".min",
            ),
        )
    )
    name: Name = Field(description="Name of the metric, for messages.")
    query: str = Field(
        min_length=1,
        max_length=2048,
        description="PromQL that yields one value. Variables: {{namespace}}, {{name}}, {{model}}, {{stable}}, {{canary}} "
        "(version numbers), {{stableService}}, {{canaryService}}, {{window}} (time since the step's weight was accepted, such as "
        "95s).",
        json_schema_extra=_rules(
            _known_variables("window"), (r"self.matches(r'\S')", "the query is blank: write PromQL that yields one value")
        ),
    )
    min: SignedDecimal | None = Field(None, description="Lowest value that is well, a decimal string.")
    max: SignedDecimal | None = Field(None, description="Highest value that is well, a decimal string.")


class PrometheusAnalysis(Model):
    """Evidence from a Prometheus server, or from what speaks its HTTP API."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "has(self.requests) == has(self.failures)",
                "requests and failures belong together: give both counters, or neither",
            ),
            (
                "has(self.requests) || has(self.metrics)",
                "nothing is asked of Prometheus: give requests and failures, or metrics",
            ),
            (
                "has(self.requests) || has(self.failures) || !has(self.scrapeInterval)",
                "scrapeInterval is about requests and failures: give these too, or leave it out",
            ),
            (
                "!has(self.requests) || !has(self.failures) || self.requests != self.failures",
                "requests and failures are the same query, so that each request would be a failed one: give each its own",
                ".failures",
            ),
        )
    )
    address: str = Field(
        max_length=253,
        pattern=rf"^https?://{_HOST}{_PORT}(/[A-Za-z0-9._~-]+)*$",
        json_schema_extra=_refusal(
            "write http(s)://<host>[:<port>][/<path>] with a port from 1 to 65535, such as http://prometheus.monitoring:9090"
        )
        | _rules(*_REACHABLE),
        description="URL of the server, such as http://prometheus.monitoring:9090. The operator asks it, without credentials.",
    )
    requests: str | None = Field(
        None,
        min_length=1,
        max_length=2048,
        description="PromQL of a counter: all requests that version {{version}} (Service {{service}}) was sent so far, failed "
        'ones too, such as sum(my_requests_total{service="{{service}}"}). In place of Triton\'s own counters.',
        json_schema_extra=_COUNTER,
    )
    failures: str | None = Field(
        None,
        min_length=1,
        max_length=2048,
        description="PromQL of a counter: the failed ones among them.",
        json_schema_extra=_COUNTER,
    )
    scrape_interval: Duration | None = Field(
        None,
        description="The longest interval at which the series of requests and failures are scraped; 60s if omitted. Counting "
        "begins so long after a weight is in place.",
        json_schema_extra=_rules(_lasts("1s", "1h", "Prometheus scrapes every 1s to 1h: give the interval of these series")),
    )
    metrics: list[MetricQuery] | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="Custom metrics with bounds.",
        json_schema_extra=_BY_NAME,
    )


class Analysis(Model):
    """How the canary is judged while it has traffic. See docs/rollouts.md."""

    alpha: Decimal | None = Field(
        None,
        description="Probability that a canary which is no worse is aborted, over the whole rollout, a decimal string; "
        '"0.05" if omitted.',
        json_schema_extra=_rules(
            _number(">= 1e-9", "<= 0.5", 'alpha is a probability: give one from 1e-9 to 0.5, such as "0.05"')
        ),
    )
    tolerated_odds: Decimal | None = Field(
        None,
        description='How many times as often as stable the canary may fail, a decimal string; "1.1" if omitted.',
        json_schema_extra=_rules(_number(">= 1.0", "<= 100.0", 'give 1 ("no worse") to 100, such as "1.1"')),
    )
    max_error_rate: Decimal | None = Field(
        None,
        description='Share of failed requests, a decimal string; "0.01" if omitted. A canary that exceeds it at weight 100 is '
        "aborted; below, only stable is compared with. A step passes with at least 3/maxErrorRate canary requests and no alarm.",
        json_schema_extra=_rules(
            _number(
                ">= 0.000001",
                "<= 0.2",
                'give a share from 0.000001 (3,000,000 requests a step) to 0.2 (15 requests a step), such as "0.01"',
            )
        ),
    )
    max_latency_ratio: Decimal | None = Field(
        None,
        description='Guard-rail: mean time of a canary request against stable\'s, without the time in the queue, such as "1.5". '
        "Not judged if omitted.",
        json_schema_extra=_rules(_number("> 1.0", "<= 1000.0", 'give a ratio above 1 and at most 1000, such as "1.5"')),
    )
    stall_after: Duration | None = Field(
        None,
        description="A canary with a pod that has requests pending and completes none for so long is aborted; 30s if omitted.",
        json_schema_extra=_rules(
            _lasts("5s", "1h", "a pod may be busy with one batch for seconds: give 5s to 1h, above the longest request")
        ),
    )
    on_inconclusive: OnInconclusive | None = Field(
        None,
        description="What follows at the end of a hold where there was too little evidence: Pause (default) holds the weight "
        "until there is enough; Promote goes on; Abort goes back.",
    )
    prometheus: PrometheusAnalysis | None = Field(None, description="Evidence from Prometheus, beside or in place of Triton's.")


class Rollout(Model):
    """How the canary's share of traffic grows, what it is judged by, and how it comes back."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "!has(self.analysis) || !has(self.analysis.onInconclusive) || self.analysis.onInconclusive != 'Promote' || "
                "self.steps.all(s, !has(s.hold) || s.hold.size() == 0 || s.hold == 'Indefinite' || "
                f"!s.hold.matches(r\"{_DURATION}\") || duration(s.hold) >= duration('10s'))",
                "onInconclusive: Promote with a hold below 10s promotes a canary that nobody judged: hold each step for 10s or "
                "more, or use onInconclusive: Pause",
                ".steps",
            ),
            (
                "!has(self.analysis) || !has(self.analysis.onInconclusive) || self.analysis.onInconclusive != 'Promote' || "
                "!has(self.analysis.prometheus) || !has(self.analysis.prometheus.requests) || "
                "has(self.analysis.prometheus.scrapeInterval) && "
                f'!self.analysis.prometheus.scrapeInterval.matches(r"{_LENGTH}") || '
                f"self.steps.all(s, !has(s.hold) || s.hold == 'Indefinite' || !s.hold.matches(r\"{_LENGTH}\") || "
                "duration(s.hold) > duration(has(self.analysis.prometheus.scrapeInterval) ? "
                "self.analysis.prometheus.scrapeInterval : '60s'))",
                "counting begins one scrapeInterval (60s if omitted) after a weight is in place, and onInconclusive: Promote "
                "would promote a canary that nobody judged: hold each step for longer, or use onInconclusive: Pause",
                ".steps",
            ),
        )
    )
    steps: list[Step] = Field(
        min_length=1,
        max_length=16,
        description="[{weight: 5, hold: 2m}, {weight: 50, hold: 5m}, {weight: 100}] goes forward on evidence; "
        "[{weight: 10, hold: Indefinite}] is a fixed 90/10 split; [{weight: 100}] gives the canary everything as soon as it is "
        "ready.",
        json_schema_extra=_rules(
            (
                "self.map(s, s.weight).isSorted() && self.all(a, self.exists_one(b, b.weight == a.weight))",
                "weights must ascend, each higher than the one before: order the steps and drop duplicates",
            ),
            (
                "self.all(a, !has(a.hold) || a.hold != 'Indefinite' || self.all(b, b.weight <= a.weight))",
                "a step held Indefinite is never left, so it must be the last one: remove the steps after it",
            ),
            (
                "self.exists(s, s.weight == 100 || (has(s.hold) && s.hold == 'Indefinite'))",
                "the last step must say how the rollout ends: {weight: 100}, or hold: Indefinite",
            ),
        ),
    )
    paused: bool = Field(
        False, description="Hold the canary's weight where it is. Its requests are judged on; an alarm still aborts it."
    )
    retry_at: str | None = Field(
        None,
        max_length=35,
        pattern=r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?"
        r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$",
        json_schema_extra=_refusal('write a time as RFC 3339 has it, in quotes, such as "2026-01-31T12:00:00Z"')
        | _rules(_MONTHS),
        description="Any time; changing it lets an aborted canary try again.",
    )
    progress_deadline: Duration = Field(
        "10m",
        description="How long the canary's pods may take to become ready before it is aborted, such as 10m; 10m if omitted.",
        json_schema_extra=_rules(
            _lasts("15s", "168h", "a pod pulls images, downloads, loads and proves itself: give 15s to 168h, such as 10m")
        ),
    )
    scale_down_delay: Duration = Field(
        "5m",
        description="How long the pods of a version stay after its last traffic, such as 5m or 1h: a revert within "
        "this time is immediate. 5m if omitted.",
        json_schema_extra=_rules(_lasts("0s", "720h", "pods without traffic hold their GPUs: give 720h at most")),
    )
    inspect_for: Duration = Field(
        "30m",
        description="How long the pods of an aborted canary are kept for inspection, without traffic; 30m if omitted.",
        json_schema_extra=_rules(_lasts("0s", "720h", "pods without traffic hold their GPUs: give 720h at most")),
    )
    surge: Literal["Additional", "WithinReplicas"] | None = Field(
        None,
        description="Additional (default): the canary's pods come on top of runtime.replicas. WithinReplicas: both versions "
        "together run no more than runtime.replicas pods; stable gives up a pod for each of the canary's, down to one.",
    )
    analysis: Analysis = Field(Analysis(), description="How the canary is judged. It always is, while it shares traffic.")


_RESOURCE_NAMES = (
    "self.all(k, k in ['cpu', 'memory', 'ephemeral-storage'] || k.startsWith('hugepages-') || k.contains('/'))",
    "a resource is cpu, memory, ephemeral-storage, hugepages-<size>, or has a domain: write nvidia.com/gpu for a GPU",
)
_RESOURCE_DOMAINS = (
    "self.all(k, !k.contains('/') || (k.indexOf('/') <= 244 && !k.startsWith('requests.') && !k.contains('kubernetes.io/')))",
    "no device has such a name: write the one that the node's allocatable shows, such as nvidia.com/gpu",
)
_BYTES_HAVE_UNITS = (
    "['memory', 'ephemeral-storage'].all(k, !(k in self) || !isQuantity(string(self[k])) || "
    "quantity(string(self[k])).compareTo(quantity('1Mi')) >= 0)",
    "memory and ephemeral-storage are numbers of bytes, 1Mi or more: write them with their unit, such as 8Gi",
)
_BYTES_FIT_A_NODE = (
    "['memory', 'ephemeral-storage'].all(k, !(k in self) || !isQuantity(string(self[k])) || "
    "quantity(string(self[k])).compareTo(quantity('1Pi')) <= 0)",
    "no node has more than 1Pi of memory or ephemeral-storage, and the pod would wait for ever: give what it needs, such as 8Gi",
)
_SOME_TIME = (
    "!('cpu' in self) || !isQuantity(string(self['cpu'])) || quantity(string(self['cpu'])).compareTo(quantity('100m')) >= 0",
    "a program with less than a tenth of a core does not start in time: give a limit of 100m or more, or remove it",
)
_SOME_CPU = (
    "!('cpu' in self) || !isQuantity(string(self['cpu'])) || (quantity(string(self['cpu'])).compareTo(quantity('1m')) >= 0 && "
    "quantity(string(self['cpu'])).compareTo(quantity('10k')) <= 0)",
    "cpu is a number of cores, 1m or more: write such as 500m, 1.5 or 8, or remove it",
)
_HUGE_PAGES = (
    "self.all(k, !k.startsWith('hugepages-') || k.matches('^hugepages-[1-9][0-9]{0,3}(Ki|Mi|Gi)$') && "
    "isQuantity(string(self[k])) && quantity(string(self[k])).isInteger() && "
    "quantity(string(self[k])).asInteger() % quantity(k.substring(10)).asInteger() == 0)",
    "huge pages are given by their size, and in whole pages: write such as {hugepages-2Mi: 64Mi}",
)
_RESOURCE_RULES = (
    *(_RESOURCE_NAMES, _SHORT_DOMAINS, _RESOURCE_DOMAINS),
    *(_BYTES_HAVE_UNITS, _BYTES_FIT_A_NODE, _SOME_CPU, _HUGE_PAGES),
)
_WHOLE_DEVICES = (
    "self.all(k, !k.contains('/') || (type(self[k]) == string ? self[k].matches('^[0-9]{1,9}$') : self[k] <= 999999999))",
    "an extended resource such as nvidia.com/gpu is counted in whole devices: write 1, 2, …",
)


def _least_memory(least: str, who: str) -> tuple[str, str, str]:
    """A CEL rule: the memory limit is one that the program can start with."""
    memory = "self.resources.limits['memory']"
    return (
        "!has(self.resources) || !has(self.resources.limits) || !('memory' in self.resources.limits) || "
        f"!isQuantity(string({memory})) || quantity(string({memory})).compareTo(quantity('{least}')) >= 0",
        f"{who} does not start in less memory than {least}: raise the limit, or remove it",
        ".resources.limits",
    )


def _within(field: str, limit: str) -> tuple[str, str, str]:
    """A CEL rule: a volume of the pod is no larger than the limit that counts what is in it."""
    most = f"self.resources.limits['{limit}']"
    return (
        f"!has(self.{field}) || !has(self.resources) || !has(self.resources.limits) || !('{limit}' in self.resources.limits) || "
        f"!isQuantity(string(self.{field})) || !isQuantity(string({most})) || "
        f"quantity(string(self.{field})).compareTo(quantity(string({most}))) <= 0",
        f"what is written there counts as {limit}, and resources.limits has less: lower {field}, or raise the limit",
        f".{field}",
    )


class ClaimUse(Model):
    name: NamespaceName = Field(description="Name of an entry of resourceClaims.")
    request: NamespaceName | None = Field(None, description="One request of the claim; all of its devices if omitted.")


class Resources(Model):
    """Compute resources. GPUs are extended resources: nvidia.com/gpu in limits."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "!has(self.requests) || self.requests.all(k, !k.contains('/') && !k.startsWith('hugepages-') || "
                "(has(self.limits) && k in self.limits && string(self.limits[k]) == string(self.requests[k])))",
                "an extended resource such as nvidia.com/gpu, and huge pages, must have a limit equal to the request: set it in "
                "limits",
            ),
            (
                "!(has(self.limits) && self.limits.exists(k, k.startsWith('hugepages-'))) || "
                "has(self.limits) && ('cpu' in self.limits || 'memory' in self.limits) || "
                "has(self.requests) && ('cpu' in self.requests || 'memory' in self.requests)",
                "huge pages come with cpu or memory: set one of these too",
                ".limits",
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
        json_schema_extra=_rules(*_RESOURCE_RULES, _WHOLE_DEVICES, _SOME_TIME),
    )
    requests: dict[LabelKey, Quantity] | None = Field(
        None,
        max_length=16,
        description="What the scheduler reserves; the limits if omitted.",
        json_schema_extra=_rules(*_RESOURCE_RULES, _WHOLE_DEVICES),
    )
    claims: list[ClaimUse] | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="Devices by dynamic resource allocation, of those in resourceClaims beside resources.",
        json_schema_extra=_BY_NAME,
    )


class PodResourceClaim(Model):
    """A claim of each pod for devices (dynamic resource allocation, resource.k8s.io)."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "has(self.resourceClaimName) != has(self.resourceClaimTemplateName)",
                "give resourceClaimTemplateName, where each pod has devices of its own, or resourceClaimName, where all share",
            ),
        )
    )
    name: NamespaceName = Field(description="What resources.claims calls it.")
    resource_claim_name: Name | None = Field(None, description="A ResourceClaim that all pods share.")
    resource_claim_template_name: Name | None = Field(
        None, description="A ResourceClaimTemplate: each pod has a claim made from it, of its own."
    )


_USED_CLAIMS = "has(self.resources) && has(self.resources.claims)"
_CLAIMS_MESSAGE = "resources.claims and resourceClaims name the same claims: give both the same names, or remove both"
_CLAIMS_FIT = (
    (f"({_USED_CLAIMS}) == has(self.resourceClaims)", _CLAIMS_MESSAGE, ".resourceClaims"),
    (
        f"!({_USED_CLAIMS}) || !has(self.resourceClaims) || self.resources.claims.size() == self.resourceClaims.size() && "
        "self.resources.claims.all(c, self.resourceClaims.exists(r, r.name == c.name))",
        _CLAIMS_MESSAGE,
        ".resourceClaims",
    ),
)
_FOREIGN_LABELS = _rules(
    _SHORT_DOMAINS,
    (
        f"self.all(k, !k.startsWith('{GROUP}/') && !k.startsWith('app.kubernetes.io/') && !k.startsWith('batch.kubernetes.io/') "
        "&& !(k in ['controller-uid', 'job-name', 'pod-template-hash']))",
        "Perch and Kubernetes set labels of this domain themselves: choose a key of another domain",
    ),
)


class TopologySpread(Model):
    """How evenly the pods of a version are spread. Perch adds the selector: the pods of that version, old and new ones apart."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "!has(self.minDomains) || self.whenUnsatisfiable == 'DoNotSchedule'",
                "minDomains is for whenUnsatisfiable: DoNotSchedule alone: remove it, or set DoNotSchedule",
                ".minDomains",
            ),
        )
    )
    topology_key: LabelKey = Field(description="Node label that defines one place, such as topology.kubernetes.io/zone.")
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = Field(
        description="What happens to a pod that would make it uneven."
    )
    max_skew: int = Field(
        ge=1, le=1000, json_schema_extra={"format": "int32"}, description="How many pods one place may have more than another."
    )
    min_domains: int | None = Field(
        None, ge=1, le=1000, json_schema_extra={"format": "int32"}, description="How many places there are at least."
    )
    node_affinity_policy: Literal["Honor", "Ignore"] | None = Field(
        None, description="Whether nodes that the pod may not use count; Honor (they do not) if omitted."
    )
    node_taints_policy: Literal["Honor", "Ignore"] | None = Field(
        None, description="Whether nodes with taints that are not tolerated count; Ignore (they do) if omitted."
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
        None, ge=0, json_schema_extra={"format": "int64"}, description="How long a NoExecute taint is tolerated, seconds."
    )


_VALUES_FIT = (
    "self.operator in ['In', 'NotIn'] ? (has(self.values) && self.values.size() > 0) : "
    "self.operator in ['Gt', 'Lt'] ? (has(self.values) && self.values.size() == 1) : "
    "(!has(self.values) || self.values.size() == 0)",
    "In and NotIn need values, Gt and Lt exactly one, Exists and DoesNotExist none: write such values",
    ".values",
)


class LabelRequirement(Model):
    model_config = ConfigDict(json_schema_extra=_rules(_VALUES_FIT))
    key: LabelKey = Field(description="Label key.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"] = Field(description="Relation of key and values.")
    values: list[LabelValue] | None = Field(None, max_length=64, description="Label values.")


class NodeRequirement(Model):
    model_config = ConfigDict(
        json_schema_extra=_rules(
            _VALUES_FIT,
            (
                "!(self.operator in ['Gt', 'Lt']) || !has(self.values) || self.values.all(v, v.matches('^[0-9]{1,18}$'))",
                'Gt and Lt compare whole numbers: give one, such as "8"',
                ".values",
            ),
        )
    )
    key: LabelKey = Field(description="Label key.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field(description="Relation of key and values.")
    values: list[LabelValue] | None = Field(None, max_length=64, description="Values; one whole number for Gt and Lt.")


class NodeFieldRequirement(Model):
    key: Literal["metadata.name"] = Field(description="metadata.name, the one field that the scheduler knows.")
    operator: Literal["In", "NotIn"] = Field(description="Relation of key and values.")
    values: list[Name] = Field(min_length=1, max_length=1, description="The name of one node.")


class LabelSelector(Model):
    match_labels: dict[LabelKey, LabelValue] | None = Field(
        None, max_length=32, description="Labels that must match.", json_schema_extra=_rules(_SHORT_DOMAINS)
    )
    match_expressions: list[LabelRequirement] | None = Field(None, max_length=16, description="Requirements that must hold.")


class NodeSelectorTerm(Model):
    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "has(self.matchExpressions) && self.matchExpressions.size() > 0 || "
                "has(self.matchFields) && self.matchFields.size() > 0",
                "a term that asks for nothing matches no node: add matchExpressions or matchFields, or remove the term",
            ),
        )
    )
    match_expressions: list[NodeRequirement] | None = Field(None, max_length=16, description="By node labels.")
    match_fields: list[NodeFieldRequirement] | None = Field(None, max_length=16, description="By node fields.")


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
    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "has(self.labelSelector)",
                "a term without labelSelector means no pod: add one ({} means every pod), or remove the term",
                ".labelSelector",
            ),
        )
    )
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
            (
                "has(self.value) || has(self.valueFrom)",
                "the variable has no value: give value or valueFrom",
                ".value",
            ),
        )
    )
    name: str = Field(
        max_length=253,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Name of the variable.",
        json_schema_extra=_refusal("write the name of a variable: a letter or '_' first, then letters, digits and '_'"),
    )
    value: str | None = Field(
        None,
        max_length=4096,
        description="Its value.",
        json_schema_extra=_rules((r"!self.matches(r'\x00')", "a variable cannot hold the character 0: remove it")),
    )
    value_from: EnvValueSource | None = Field(None, description="Where its value comes from.")


class PodMetric(Model):
    """A metric of the pods themselves, served by a custom metrics API such as prometheus-adapter's."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "type(self.averageValue) == string ? "
                "(!isQuantity(self.averageValue) || quantity(self.averageValue).isGreaterThan(quantity('0'))) : "
                "self.averageValue > 0",
                "pods are never down to nothing: give an average above 0",
                ".averageValue",
            ),
        )
    )
    name: str = Field(
        max_length=253,
        pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]*$",
        description="Name of the metric, such as nv_inference_pending_request_count.",
        json_schema_extra=_refusal("write the name of a metric, such as nv_inference_pending_request_count"),
    )
    average_value: Quantity = Field(description="What the pods should have on average.")


class Autoscaling(Model):
    """A HorizontalPodAutoscaler for each version in traffic."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "self.minReplicas <= self.maxReplicas",
                "minReplicas is greater than maxReplicas: lower one or raise the other",
                ".minReplicas",
            ),
            (
                "has(self.targetCPUUtilizationPercentage) || has(self.podMetrics)",
                "the autoscaler needs something to go by: give targetCPUUtilizationPercentage, podMetrics or both",
            ),
        )
    )
    min_replicas: int = Field(
        ge=1, le=1000, json_schema_extra={"format": "int32"}, description="Fewest pods of a version with all the traffic."
    )
    max_replicas: int = Field(ge=1, le=1000, json_schema_extra={"format": "int32"}, description="Most pods of a version.")
    target_cpu_utilization_percentage: int | None = Field(
        None,
        alias="targetCPUUtilizationPercentage",
        ge=1,
        le=1000,
        json_schema_extra={"format": "int32"},
        description="CPU use that is aimed at, percent of resources.requests.cpu. Needs a metrics server.",
    )
    pod_metrics: list[PodMetric] | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="Metrics of the pods that are aimed at. Needs a custom metrics API.",
        json_schema_extra=_BY_NAME,
    )


class Runtime(Model):
    """How Triton's pods run. Mutable: a change rolls the pods without a lost request; replicas only scales."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "!has(self.autoscaling) || !has(self.replicas)",
                "replicas and autoscaling exclude each other: remove replicas, autoscaling.minReplicas takes its place",
                ".replicas",
            ),
            (
                "!has(self.autoscaling) || !has(self.autoscaling.targetCPUUtilizationPercentage) || "
                "(has(self.resources) && ((has(self.resources.requests) && 'cpu' in self.resources.requests) || "
                "(has(self.resources.limits) && 'cpu' in self.resources.limits)))",
                "the autoscaler measures CPU use against the request: set resources.requests.cpu",
                ".autoscaling",
            ),
            *_CLAIMS_FIT,
            (
                "!has(self.responseCacheMebibytes) || !has(self.resources) || !has(self.resources.limits) || "
                "!('memory' in self.resources.limits) || !isQuantity(string(self.resources.limits['memory'])) || "
                "quantity(string(self.resources.limits['memory'])).asApproximateFloat() > "
                "double(self.responseCacheMebibytes) * 1048576.0",
                "the response cache is larger than resources.limits.memory: lower it, or raise the limit",
                ".responseCacheMebibytes",
            ),
            _least_memory("64Mi", "Triton"),
            _within("sharedMemorySize", "memory"),
            _within("temporaryStorageSize", "ephemeral-storage"),
        )
    )
    image: Image | None = Field(
        None,
        description="Triton image, such as nvcr.io/nvidia/tritonserver:25.10-py3; the chart's triton.image if omitted. Where you "
        "do not trust every client take 26.05 or later: one request of deeply nested JSON ends older releases, and one of many "
        "chunks those before 25.07.",
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="Kubernetes' default if omitted."
    )
    tensorrt_version: str | None = Field(
        None,
        max_length=32,
        pattern=r"^[0-9]+(\.[0-9]+){2,3}$",
        json_schema_extra=_refusal("write TensorRT's whole version, such as 10.13.3.9"),
        description="Version of TensorRT in image, such as 10.13.3.9: NVIDIA's release notes of the image have it. A version "
        "whose conversion.target is TensorRT is served by the version that built it; with another its pods stay as they are.",
    )
    replicas: int = Field(
        1,
        ge=1,
        le=1000,
        json_schema_extra={"format": "int32"},
        description="Pods of a version with all the traffic; 1 if omitted. A canary has its share of them, rounded up.",
    )
    autoscaling: Autoscaling | None = Field(
        None, description="Let a HorizontalPodAutoscaler choose the pods of each version, in place of replicas."
    )
    resources: Resources | None = Field(None, description="Resources of the Triton container.")
    labels: dict[LabelKey, LabelValue] | None = Field(
        None,
        max_length=16,
        description="Labels of the Deployments and their pods besides Perch's own, such as {kueue.x-k8s.io/queue-name: gpus}.",
        json_schema_extra=_FOREIGN_LABELS,
    )
    priority_class_name: Name | None = Field(None, description="PriorityClass of the pods.")
    resource_claims: list[PodResourceClaim] | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="Claims for devices, which resources.claims uses: dynamic resource allocation.",
        json_schema_extra=_BY_NAME,
    )
    topology_spread_constraints: list[TopologySpread] | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="How the pods of a version are spread over zones, nodes or other places.",
        json_schema_extra={
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["topologyKey", "whenUnsatisfiable"],
        },
    )
    node_selector: dict[LabelKey, LabelValue] | None = Field(
        None, max_length=32, description="Node labels that are required.", json_schema_extra=_rules(_SHORT_DOMAINS)
    )
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
    shared_memory_size: Size = Field("256Mi", description="Size of /dev/shm, in memory; 256Mi if omitted.")
    temporary_storage_size: Size = Field(
        "10Gi",
        description="Most that the pod may write to /tmp, on the node's disk; 10Gi if omitted. The kubelet evicts a pod that "
        "writes more.",
    )
    response_cache_mebibytes: int = Field(
        64,
        ge=1,
        le=65536,
        json_schema_extra={"format": "int32"},
        description="Memory of Triton's response cache in MiB, for versions with triton.responseCache; 64 if omitted.",
    )


_METADATA = ["169.254.169.254", "169.254.170.2", "168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254"]
"""AWS, GCP and Azure; ECS; Azure's host; Alibaba; Oracle; AWS by IPv6. Not EKS Pod Identity's 169.254.170.23, which pods need."""


class Egress(Model):
    """Where export pods may connect to, besides public addresses."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            ("has(self.cidr) != has(self.namespace)", "give one of both: cidr, or namespace"),
        )
    )
    cidr: str | None = Field(
        None,
        min_length=1,
        max_length=43,
        json_schema_extra=_rules(
            ("isCIDR(self)", "write a range of addresses, such as 10.20.0.7/32"),
            (
                "!isCIDR(self) || cidr(self).prefixLength() >= 8",
                "so large a range takes the policy's meaning away: write what the exports need, in ranges of /8 or smaller",
            ),
            (
                f"!isCIDR(self) || !{_METADATA}.exists(ip, cidr(self).containsIP(ip))",
                "this range holds the cloud's metadata service, which hands out credentials: write smaller ranges without it",
            ),
        ),
        description="Addresses outside the cluster, such as 10.20.0.7/32. For a server within it name its namespace: a policy is "
        "not asked about a Service's own address.",
    )
    namespace: NamespaceName | None = Field(None, description="All pods of this namespace, such as the object store's.")


class NetworkPolicy(Model):
    """What the pods of export Jobs may reach: DNS, public addresses on the ports of the spec's endpoints, and what is listed."""

    allow: list[Egress] | None = Field(
        None,
        max_length=32,
        description="What is allowed besides, on any port: an object store in the cluster or in a private network.",
    )


class Builder(Model):
    """How export Jobs run. Mutable; a change concerns later Jobs, and an export that had failed is tried again at once."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            *_CLAIMS_FIT,
            (
                "!has(self.resources) || !has(self.resources.requests) || !('memory' in self.resources.requests) || "
                "(has(self.resources.limits) && 'memory' in self.resources.limits) || "
                "!isQuantity(string(self.resources.requests['memory'])) || "
                "quantity(string(self.resources.requests['memory'])).compareTo(quantity('8Gi')) <= 0",
                "the request is greater than the memory limit, which is 8Gi if omitted: set resources.limits.memory",
                ".resources",
            ),
            _least_memory("128Mi", "PyTorch"),
        )
    )

    tensorrt_image: Image | None = Field(
        None,
        description="Image that builds TensorRT plans: Perch's perch-tensorrt, made from NVIDIA's TensorRT image of the same "
        "release as runtime.image. Required where a version's conversion.target is TensorRT.",
    )
    resources: Resources | None = Field(
        None,
        description="Resources of the containers that convert, prove and build; memory limit 8Gi if omitted. nvidia.com/gpu is "
        "needed for conversion.target TensorRT alone.",
    )
    labels: dict[LabelKey, LabelValue] | None = Field(
        None,
        max_length=16,
        description="Labels of export Jobs and their pods besides Perch's own, such as {kueue.x-k8s.io/queue-name: gpus}.",
        json_schema_extra=_FOREIGN_LABELS,
    )
    priority_class_name: Name | None = Field(None, description="PriorityClass of the pods.")
    resource_claims: list[PodResourceClaim] | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="Claims for devices, which resources.claims uses: dynamic resource allocation.",
        json_schema_extra=_BY_NAME,
    )
    runtime_class_name: Name | None = Field(None, description="RuntimeClass of the Job's pod, such as nvidia.")
    node_selector: dict[LabelKey, LabelValue] | None = Field(
        None, max_length=32, description="Node labels that are required.", json_schema_extra=_rules(_SHORT_DOMAINS)
    )
    tolerations: list[Toleration] | None = Field(None, max_length=32, description="Taints that are tolerated.")
    image_pull_secrets: list[LocalRef] | None = Field(
        None, max_length=8, description="Secrets for pulling the images.", json_schema_extra=_BY_NAME
    )
    active_deadline_seconds: int = Field(
        3600,
        ge=60,
        le=86400,
        json_schema_extra={"format": "int32"},
        description="Longest time for one export, seconds, at least 60; 3600 if omitted.",
    )
    network_policy: NetworkPolicy | None = Field(
        None,
        description="Make a NetworkPolicy for the pods of export Jobs, which run your checkpoint and code: no private addresses "
        "and no metadata service except what allow lists. It needs a network that enforces policies. None is made if omitted; "
        "networkPolicy: {} is enough where the object store has a public address.",
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
        pattern=rf"^(\*\.)?{_HOST_LABEL}(\.{_HOST_LABEL})*$",
        json_schema_extra=_refusal("write a host name in lower case, with no scheme, port or path, such as digits.example.com")
        | _rules(
            (
                r"!self.matches('^([*][.])?([0-9]+[.])*[0-9]+$')",
                "an IP address is no host name: write a name, such as digits.example.com",
            )
        ),
    ),
]


class Routing(Model):
    """One HTTPRoute for gRPC and REST, attached to these Gateways."""

    parent_refs: list[ParentRef] = Field(
        min_length=1,
        max_length=8,
        description="Gateways that carry the traffic.",
        json_schema_extra=_rules(
            (
                "self.all(a, self.exists_one(b, b.name == a.name && has(b.__namespace__) == has(a.__namespace__) && "
                "(!has(a.__namespace__) || b.__namespace__ == a.__namespace__) && "
                "(!has(a.sectionName) || !has(b.sectionName) || a.sectionName == b.sectionName)))",
                "a Gateway, or a listener of it, is named twice: name it once, or give each entry a sectionName of its own",
            ),
        ),
    )
    hostnames: list[Hostname] = Field(
        min_length=1,
        max_length=16,
        description="Host names of this model. Required: gRPC paths carry no model name, so the host name tells models apart.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )


def _has_gpu(part: str) -> str:
    """A CEL expression: the containers of `part` have a GPU, whatever its resource is called, or a claimed device."""
    limits, resources = f"{part}.resources.limits", f"{part}.resources"
    return (
        f"has({part}) && has({resources}) && (has({resources}.claims) && {resources}.claims.size() > 0 || has({limits}) && "
        f"{limits}.exists(k, (k.startsWith('nvidia.com/') || k.contains('/') && k.contains('gpu')) && "
        f"string({limits}[k]).matches('[1-9]')))"
    )


_ANY_PLAN = "self.versions.exists(v, has(v.conversion) && has(v.conversion.target) && v.conversion.target == 'TensorRT')"


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
                "!has(self.traffic.match) || !has(self.rollout) || "
                "(self.rollout.steps.all(s, s.weight == 0) && !has(self.traffic.mirror)) || "
                "(has(self.rollout.analysis) && has(self.rollout.analysis.prometheus) && "
                "has(self.rollout.analysis.prometheus.requests))",
                "traffic.match chooses who asks the canary, and Triton's counters cannot tell these requests from those that are "
                "judged: test with steps [{weight: 0, hold: Indefinite}] and no mirror, and remove match before the steps begin; "
                "or give rollout.analysis.prometheus.requests and failures that leave them out",
                ".traffic.match",
            ),
            (
                f"({_has_gpu('self.builder')} && has(self.builder.tensorrtImage)) || !{_ANY_PLAN}",
                "conversion.target TensorRT is built on a GPU by TensorRT's own tools: set builder.tensorrtImage, and "
                "builder.resources.limits to {nvidia.com/gpu: 1}, or what a share of a GPU is called there",
                ".builder",
            ),
            (
                f"({_has_gpu('self.runtime')} && has(self.runtime.image) && has(self.runtime.tensorrtVersion)) || !{_ANY_PLAN}",
                "conversion.target TensorRT runs on a GPU, on the version of TensorRT that built it: set runtime.image, "
                "runtime.tensorrtVersion, and runtime.resources.limits to {nvidia.com/gpu: 1}, or what a share of a GPU is "
                "called there",
                ".runtime",
            ),
            (
                f"({_has_gpu('self.runtime')}) || !self.versions.exists(v, has(v.triton) && has(v.triton.accelerator))",
                "triton.accelerator TensorRT runs on a GPU alone: set runtime.resources.limits to {nvidia.com/gpu: 1}, or what a "
                "share of a GPU is called there, or remove the accelerator",
                ".runtime",
            ),
            (
                # Of versions in traffic alone: whatever else is listed, the revert that takes one out passes.
                f"({_has_gpu('self.runtime')}) || has(self.runtime) && has(self.runtime.env) && "
                "self.runtime.env.exists(e, e.name == 'NVIDIA_VISIBLE_DEVICES') || !self.versions.exists(v, "
                "(v.version == self.traffic.stable || has(self.traffic.canary) && v.version == self.traffic.canary) && "
                "has(v.triton) && (has(v.triton.instanceKind) && v.triton.instanceKind == 'GPU' || "
                "has(v.triton.configOverrides) && v.triton.configOverrides.contains('KIND_GPU')))",
                "instances on a GPU need one: set runtime.resources.limits to {nvidia.com/gpu: 1}, or what a share of a GPU is "
                "called there, or remove triton.instanceKind: GPU",
                ".runtime",
            ),
            (
                "!has(self.rollout) || !has(self.rollout.surge) || self.rollout.surge != 'WithinReplicas' || "
                "(has(self.runtime) && has(self.runtime.replicas) && self.runtime.replicas > 1)",
                "surge: WithinReplicas takes the canary's pods from stable's: raise runtime.replicas to 2 or more (an autoscaler "
                "has no fixed number to share), or remove surge",
                ".rollout.surge",
            ),
            (
                "!has(self.repository.serviceAccountName) || !has(self.runtime) || !has(self.runtime.serviceAccountName) || "
                "self.runtime.serviceAccountName == self.repository.serviceAccountName",
                "a pod runs under one ServiceAccount: remove runtime.serviceAccountName, or name the one of the repository",
                ".runtime.serviceAccountName",
            ),
            (
                "!has(self.repository.serviceAccountName) || has(self.builder) && has(self.builder.networkPolicy) || "
                "self.versions.all(v, v.checkpoint.format != 'TorchScript' && "
                "(!has(v.checkpoint.trustSource) || !v.checkpoint.trustSource) && "
                "(!has(v.architecture) || !has(v.architecture.entryPoint)))",
                "entryPoint, TorchScript and trustSource run code of your own in a pod that has an identity, which some clouds "
                "hand to any container that asks their metadata service: set builder.networkPolicy, which closes it, or use "
                "repository.credentialsSecretRef",
                ".repository.serviceAccountName",
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
    ABORTED = "Aborted"
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
    """Figures and limits of the gate, of a failed one too. What is not judged is left out; an error may be "not finite"."""

    verdict: str = Field(description="Passed, Failed or Unprovable.")
    samples: Int32 | None = Field(None, description="Samples compared.")
    max_absolute_error: str = Field(description="Greatest absolute difference found; of detections, of their scores.")
    absolute_tolerance: str | None = Field(None, description="Its limit, times the spread where that is above 1.")
    max_relative_error: str = Field(
        description="Greatest difference found, relative to the spread; share of integers that differ, of detections without a "
        "partner."
    )
    relative_tolerance: str | None = Field(None, description="Its limit.")
    spread: str | None = Field(
        None, description="How far the checkpoint's answers lie apart; share of detections that the next sample lacks."
    )
    top1_agreement: str | None = Field(None, description="Share of samples with the same class first.")
    minimum_top1_agreement: str | None = Field(None, description="Its limit.")
    cosine: str | None = Field(None, description="Smallest between the vectors of one sample.")
    minimum_cosine: str | None = Field(None, description="Its limit.")
    minimum_iou: str | None = Field(None, description="Overlap at which detections are partners; given where these are judged.")


class AccuracyStatus(StatusModel):
    """Figures and limits of the gate, of a failed one too. A TensorRT plan's are those of the ONNX file it is built of."""

    accuracy: str = Field(description="Share of the data set's samples with the right first answer.")
    checkpoint_accuracy: str = Field(description="The same of the checkpoint.")
    correct: Int32 = Field(description="Samples with the right first answer.")
    samples: Int32 = Field(description="Samples of the data set.")
    dataset_sha256: str = Field(description="SHA-256 of the data set.")
    minimum: str | None = Field(None, description="Limit of accuracy.")
    maximum_drop: str | None = Field(None, description="Limit of the drop below the checkpoint.")
    verdict: str = Field(description="Passed or Failed; with onFailure: Warn a failed one is published.")


class TensorRTStatus(StatusModel):
    version: str = Field(description="TensorRT that built the plan, and that alone can serve it.")
    compute_capability: str = Field(description="Of the GPU that it was built on, such as 9.0: pods run on such nodes alone.")


class VersionStatus(StatusModel):
    version: Int32 = Field(description="Version number.")
    artifact_revision: str = Field(description="Hash of the entry in spec.versions: names the artefact's prefix.")
    phase: Phase = Field(description="Exporting, Failed, Published, Starting, Serving, Draining, Aborted or Deleting.")
    artifact_uri: str | None = Field(None, description="Where the artefact is published.")
    artifact_digest: str | None = Field(None, description="SHA-256 of the artefact's manifest.json, which pods check.")
    serving_hash: str | None = Field(None, description="Hash of artefact and runtime that the pods run.")
    parity: ParityStatus | None = Field(None, description="The parity gate.")
    accuracy: AccuracyStatus | None = Field(None, description="The accuracy gate; of a TensorRT plan, of its ONNX file.")
    tensorrt: TensorRTStatus | None = Field(None, description="What a TensorRT plan is bound to.")
    replicas: Int32 = Field(0, description="Pods wanted.")
    ready_replicas: Int32 = Field(0, description="Pods ready.")
    weight: Int32 = Field(0, description="Percent of the traffic.")
    attempts: Int32 = Field(0, description="Exports that failed for a passing reason.")
    retry_at: Time | None = Field(None, description="When the export is tried again.")
    export_hash: str | None = Field(None, description="Hash of the Job that failed: with another the export is tried again.")
    drained_at: Time | None = Field(None, description="When the version got its last traffic.")
    message: str | None = Field(None, description="What the children say.")


class Weights(StatusModel):
    version: Int32 = Field(description="Version number.")
    weight: Int32 = Field(description="Percent of the traffic.")


class WeightStatus(StatusModel):
    desired: list[Weights] = Field(default_factory=list, description="What the route says.")
    accepted: list[Weights] = Field(default_factory=list, description="What the Gateway has accepted.")


class StepStatus(StatusModel):
    """Where the rollout of the present canary stands. Times are absolute: a restarted operator goes on where it was."""

    version: Int32 = Field(description="The canary.")
    artifact_revision: str = Field(description="Its artefact.")
    index: Int32 = Field(description="Number of the step in rollout.steps, from 0.")
    weight: Int32 = Field(description="Percent of the traffic that this step asks for.")
    started_at: Time = Field(description="When the step began.")
    accepted_at: Time | None = Field(None, description="When the Gateway had accepted its weight: the hold counts from here.")
    until: Time | None = Field(
        None, description="When the hold ends, at the earliest; none while it is not counted or Indefinite."
    )
    unready_since: Time | None = Field(
        None, description="Since when the step waits for pods of the canary; none once the Gateway has accepted its weight."
    )
    unable_since: Time | None = Field(None, description="Since when the canary, which had traffic, has no ready pod.")
    waiting_for: str | None = Field(None, description="What the next step waits for.")


Count = Annotated[int, Field(json_schema_extra={"format": "int64"})]
Real = Annotated[float, Field(json_schema_extra={"format": "double"})]


class Tally(StatusModel):
    """What became of the requests of one version."""

    requests: Count = Field(0, description="Requests answered or failed; rejected and cancelled ones not counted.")
    failures: Count = Field(0, description="Failed ones among them, by an error of the model's.")
    rejections: Count = Field(0, description="Requests that waited in the queue for longer than its policy allows.")
    cancellations: Count = Field(0, description="Requests that their clients cancelled.")
    executions: Count = Field(0, description="Executions, each of one request or a batch; 0 where they are not counted.")
    failed_executions: Count = Field(0, description="Executions that failed, at least.")
    request_microseconds: Count = Field(0, description="Time of all requests together, µs.")
    queue_microseconds: Count = Field(0, description="Part of it spent in the queue, µs.")


class MetricStatus(StatusModel):
    name: str = Field(description="Name of the metric.")
    value: str | None = Field(None, description="Its last value; none where Prometheus gave none.")
    at: Time = Field(description="When it was asked for.")
    violations: Int32 = Field(0, description="Readings out of bounds in a row.")
    message: str | None = Field(None, description="Why there is no value, or what bound it violates.")


class HungPod(StatusModel):
    """A pod of the canary's that has requests pending and completes none."""

    pod: str = Field(description="Name, and which start of its Triton.")
    since: Time = Field(description="Since when.")
    seconds: Int32 = Field(0, description="For how long it was watched and hung, while stable did not.")


class Lots(StatusModel):
    """How much the canary's share of the requests varies from look to look."""

    looks: Int32 = Field(0, description="Looks since the last answer.")
    variance: Real = Field(0.0, description="Their squared deviations, in units of what lots would give.")
    in_turn: bool = Field(False, description="It varies less than lots would let it: the Gateway takes turns.")


class Evidence(StatusModel):
    """What the judge has seen of the present canary. A restarted operator goes on from here."""

    serving_hash: str | None = Field(
        None, description="Hash of artefact and runtime that are judged: with another, all begins anew."
    )
    crashes_before: list[Time] = Field(
        default_factory=list, description="When the canary's pods had crashed before this trial, by their nodes' clocks."
    )
    weight: Int32 | None = Field(None, description="The canary's weight that requests are counted at; none where none are.")
    counted_since: Time | None = Field(None, description="Since when it has this weight.")
    since: Time | None = Field(None, description="Since when the running operator gathers.")
    last_at: Time | None = Field(None, description="Until when counts are included.")
    life: str | None = Field(None, description="Which start of the operator gathered the last counts.")
    number: Count = Field(0, description="The last look of that life that is included.")
    stable: Tally = Field(Tally(), description="Stable's requests beside the canary, over all steps.")
    canary: Tally = Field(Tally(), description="The canary's requests, over all steps.")
    step_stable: Tally = Field(Tally(), description="Stable's requests in this step.")
    step_canary: Tally = Field(Tally(), description="The canary's requests in this step.")
    errors: list[Real] = Field(default_factory=list, description="Log likelihood ratios of the grid of relative error odds.")
    bound: list[Real] = Field(default_factory=list, description="Log likelihood ratios of the grid above maxErrorRate.")
    latency: list[Real] = Field(default_factory=list, description="Log likelihood ratios of who is the slower one.")
    slow_stable: Tally = Field(Tally(), description="Stable's requests since the last comparison of times.")
    slow_canary: Tally = Field(Tally(), description="The canary's requests since the last comparison of times.")
    lots: Lots = Field(Lots(), description="Whether requests are assigned by lot, by how much the canary's share varies.")
    hung: list[HungPod] = Field(default_factory=list, description="The canary's pods that hang, the longest first, up to 8.")
    needed: Int32 = Field(0, description="Canary requests that this step needs.")
    metrics: list[MetricStatus] = Field(default_factory=list, description="Custom metrics.")
    trouble: str | None = Field(None, description="Why evidence is missing.")


class Aborted(StatusModel):
    """A canary that was taken out. It is not tried again until its hash changes or rollout.retryAt moves, nor when it has its
    former hash again."""

    version: Int32 = Field(description="Version number.")
    artifact_revision: str = Field(description="Its artefact.")
    serving_hash: str = Field(description="Hash of artefact and runtime that were judged.")
    reason: str = Field(description="Why, in one word.")
    message: str = Field(description="Why, with the figures or the pod's own words.")
    time: Time = Field(description="When it was taken out.")
    retry_at: str | None = Field(None, description="What rollout.retryAt said then.")


class Outcome(StatusModel):
    """How a rollout ended."""

    version: Int32 = Field(description="The canary.")
    outcome: Literal["Promoted", "Aborted", "Superseded"] = Field(description="Promoted, Aborted or Superseded.")
    time: Time = Field(description="When it ended.")
    message: str = Field(description="In a sentence.")


class Status(StatusModel):
    """Observed state, written by the operator. Conditions are the truth; the rest tells them in figures."""

    observed_generation: int = Field(0, json_schema_extra={"format": "int64"}, description="Generation of spec that was read.")
    stable: Int32 | None = Field(None, description="The stable version.")
    canary: Int32 | None = Field(None, description="The canary, if there is one.")
    canary_weight: Int32 | None = Field(None, description="Percent of the traffic that the canary gets.")
    endpoint: str | None = Field(None, description="Host name of the model, or the stable version's Service.")
    artifact: str | None = Field(None, description="Artefact of the stable version.")
    weights: WeightStatus = Field(WeightStatus(), description="Traffic by version.")
    sharing_places: bool = Field(False, description="Versions run on each other's places (surge: WithinReplicas).")
    step: StepStatus | None = Field(None, description="Where the rollout of the canary stands.")
    evidence: Evidence | None = Field(None, description="What the canary is judged by.")
    aborted: list[Aborted] = Field(default_factory=list, description="Canaries that were taken out, by version.")
    aborted_before: list[Aborted] = Field(
        default_factory=list,
        description="Canaries that were taken out and have another runtime or content now. With the former one they stay out.",
    )
    history: list[Outcome] = Field(default_factory=list, description="The last ten rollouts, the newest first.")
    versions: list[VersionStatus] = Field(default_factory=list, description="State of each version.")
    conditions: list[Condition] = Field(
        default_factory=list, description="Ready, Reconciling, Stalled, Available, TrafficAccepted."
    )

    def of(self, version: int) -> VersionStatus | None:
        return next((v for v in self.versions if v.version == version), None)

    def condition(self, kind: str) -> Condition | None:
        return next((c for c in self.conditions if c.type == kind), None)

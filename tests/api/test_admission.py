"""What the API server refuses, each case by the sentence that describes it, and what it lets pass.

Refusals must help a tired human: every case names the field as the API server prints it, and words of the way out.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import ValidationError

from perch.api import GROUP, KIND, MAX_VERSIONS, VERSION, Spec
from tests.apiserver import ApiServer

COLLECTION = f"/apis/{GROUP}/{VERSION}/namespaces/default/modeldeployments"
Change = Callable[[dict[str, Any]], object]


def entry(version: int) -> dict[str, Any]:
    return {
        "version": version,
        "checkpoint": {
            "uri": f"s3://checkpoints/digits/v{version}.pt",
            "format": "StateDict",
            "sha256": f"{version:064x}",
            "endpoint": "https://s3.elsewhere",
            "region": "eu-west-1",
            "credentialsSecretRef": {"name": "checkpoints"},
        },
        "architecture": {"name": "lenet5", "parameters": {"numClasses": 10}},
        "inputs": [{"name": "image", "dataType": "FP32", "shape": [1, 28, 28]}],
        "outputs": [{"name": "logits", "dataType": "FP32", "shape": [10]}],
        "conversion": {"target": "ONNX", "precision": "FP32", "opset": 20},
        "verification": {"parity": {"absoluteTolerance": "1e-3", "relativeTolerance": "0.001"}},
        "triton": {
            "maxBatchSize": 32,
            "dynamicBatching": {"maxQueueDelayMicroseconds": 500, "preferredBatchSizes": [8, 16]},
            "instanceCount": 2,
        },
    }


def full_spec(versions: int = 2) -> dict[str, Any]:
    """A spec with every field set."""
    requirement = {"key": "zone", "operator": "In", "values": ["a", "b"]}
    selector = {"matchLabels": {"app": "other"}, "matchExpressions": [requirement]}
    pods = {"topologyKey": "kubernetes.io/hostname", "namespaces": ["vision"], "labelSelector": selector}
    near = {
        "requiredDuringSchedulingIgnoredDuringExecution": [pods],
        "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "podAffinityTerm": pods}],
    }
    nodes = {
        "matchExpressions": [{"key": "memory", "operator": "Gt", "values": ["7"]}],
        "matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n"]}],
    }
    resources = {
        "limits": {"nvidia.com/gpu": 1, "memory": "8Gi"},
        "requests": {"nvidia.com/gpu": 1, "memory": "4Gi", "cpu": "500m"},
    }
    scheduling = {
        "resources": resources,
        "nodeSelector": {"nvidia.com/gpu.present": "true"},
        "tolerations": [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60},
            {"key": "team", "value": "vision"},
            {"operator": "Exists"},
        ],
        "imagePullSecrets": [{"name": "registry"}],
    }
    return {
        "modelName": "digits",
        "repository": {
            "uri": "s3://models/prod",
            "endpoint": "http://s3.storage:9000",
            "region": "us-east-1",
            "credentialsSecretRef": {"name": "s3-credentials"},
            "caBundleConfigMapRef": {"name": "ca", "key": "ca.pem"},
            "deletionPolicy": "Delete",
        },
        "versions": [entry(number) for number in range(1, versions + 1)],
        "traffic": {"stable": 1, "canary": 2},
        "rollout": {"steps": [{"weight": 10, "hold": "Indefinite"}], "scaleDownDelay": "1h30m"},
        "runtime": {
            **scheduling,
            "image": "nvcr.io/nvidia/tritonserver:25.10-py3",
            "imagePullPolicy": "IfNotPresent",
            "replicas": 2,
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [nodes]},
                    "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": nodes}],
                },
                "podAffinity": near,
                "podAntiAffinity": near,
            },
            "env": [
                {"name": "PLAIN", "value": "x"},
                {"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
                {"name": "CONFIG", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}},
            ],
            "serviceAccountName": "triton",
            "runtimeClassName": "nvidia",
            "terminationGracePeriodSeconds": 90,
            "sharedMemorySize": "1Gi",
        },
        "builder": {**scheduling, "activeDeadlineSeconds": 1800},
        "routing": {
            "parentRefs": [{"name": "gateway", "namespace": "gateways", "sectionName": "http", "port": 80}],
            "hostnames": ["digits.example.com", "*.digits.example.com"],
        },
    }


def parts_of(path: str) -> list[Any]:
    """A path such as versions/0/version: numbers are indexes of lists, ~ stands for a slash within a key."""
    return [int(part) if part.isdigit() else part.replace("~", "/") for part in path.split("/")]


def put(path: str, value: Any) -> Change:
    *way, last = parts_of(path)

    def change(spec: dict[str, Any]) -> None:
        target: Any = spec
        for part in way:
            target = target[part]
        target[last] = value

    return change


def drop(path: str) -> Change:
    *way, last = parts_of(path)

    def change(spec: dict[str, Any]) -> None:
        target: Any = spec
        for part in way:
            target = target[part]
        del target[last]

    return change


def both(*changes: Change) -> Change:
    def change(spec: dict[str, Any]) -> None:
        for each in changes:
            each(spec)

    return change


@dataclass(frozen=True)
class Refusal:
    sentence: str
    change: Change
    field: str
    says: str
    by_types: bool = True
    """The pydantic types refuse it too; rules between fields are the API server's alone."""


V = "spec.versions[0]"
REFUSED_WHEN_CREATED = [
    # --- traffic and rollout ---
    Refusal("stable is not listed", put("traffic/stable", 9), "spec.traffic.stable", "add the entry", False),
    Refusal("canary is not listed", put("traffic/canary", 9), "spec.traffic.canary", "add the entry", False),
    Refusal("canary is stable", put("traffic/canary", 1), "spec.traffic.canary", "name another version", False),
    Refusal("a canary has no rollout", drop("rollout"), "spec.rollout", "such as [{weight: 10, hold: Indefinite}]", False),
    Refusal("a canary has no routing", drop("routing"), "spec.routing", "add routing.parentRefs", False),
    Refusal("there is no stable", drop("traffic/stable"), "spec.traffic.stable", "Required value"),
    Refusal("there is no traffic", drop("traffic"), "spec.traffic", "Required value"),
    Refusal(
        "weights descend",
        put("rollout/steps", [{"weight": 100}, {"weight": 10, "hold": "Indefinite"}]),
        "spec.rollout.steps",
        "weights must ascend",
        False,
    ),
    Refusal(
        "two steps have one weight",
        put("rollout/steps", [{"weight": 100}, {"weight": 100}]),
        "spec.rollout.steps",
        "drop duplicates",
        False,
    ),
    Refusal(
        "a weight is above 100", put("rollout/steps/0/weight", 101), "spec.rollout.steps[0].weight", "less than or equal to 100"
    ),
    Refusal(
        "a weight is below 0", put("rollout/steps/0/weight", -1), "spec.rollout.steps[0].weight", "greater than or equal to 0"
    ),
    Refusal("a weight is a fraction", put("rollout/steps/0/weight", 0.5), "spec.rollout.steps[0].weight", "integer"),
    Refusal(
        "a step below 100 has no hold", drop("rollout/steps/0/hold"), "spec.rollout.steps[0].hold", "add hold: Indefinite", False
    ),
    Refusal(
        "a hold is timed, which this release does not do",
        put("rollout/steps/0/hold", "5m"),
        "spec.rollout.steps[0].hold",
        "write hold: Indefinite",
    ),
    Refusal(
        "a step follows one that is never left",
        put("rollout/steps", [{"weight": 10, "hold": "Indefinite"}, {"weight": 100}]),
        "spec.rollout.steps",
        "remove the steps after it",
        False,
    ),
    Refusal("there are no steps", put("rollout/steps", []), "spec.rollout.steps", "at least 1 items"),
    Refusal(
        "there are too many steps",
        put("rollout/steps", [{"weight": n, "hold": "Indefinite"} for n in range(17)]),
        "spec.rollout.steps",
        "at most 16 items",
    ),
    Refusal("a delay has no unit", put("rollout/scaleDownDelay", "300"), "spec.rollout.scaleDownDelay", "such as 30s"),
    Refusal("a delay is negative", put("rollout/scaleDownDelay", "-5m"), "spec.rollout.scaleDownDelay", "such as 30s"),
    # --- routing ---
    Refusal("routing has no hostnames", drop("routing/hostnames"), "spec.routing.hostnames", "Required value"),
    Refusal("the list of hostnames is empty", put("routing/hostnames", []), "spec.routing.hostnames", "at least 1 items"),
    Refusal(
        "a hostname carries a scheme",
        put("routing/hostnames/0", "https://digits.example.com"),
        "spec.routing.hostnames[0]",
        "no scheme",
    ),
    Refusal(
        "a hostname carries a port", put("routing/hostnames/0", "digits.example.com:80"), "spec.routing.hostnames[0]", "port"
    ),
    Refusal(
        "a hostname is in upper case", put("routing/hostnames/0", "Digits.example.com"), "spec.routing.hostnames[0]", "lower case"
    ),
    Refusal(
        "a hostname stands twice",
        put("routing/hostnames/1", "digits.example.com"),
        "spec.routing.hostnames[1]",
        "Duplicate",
        False,
    ),
    Refusal("there is no Gateway", put("routing/parentRefs", []), "spec.routing.parentRefs", "at least 1 items"),
    Refusal(
        "a Gateway's port is 0",
        put("routing/parentRefs/0/port", 0),
        "spec.routing.parentRefs[0].port",
        "greater than or equal to 1",
    ),
    Refusal(
        "a Gateway's namespace has a dot",
        put("routing/parentRefs/0/namespace", "a.b"),
        "spec.routing.parentRefs[0].namespace",
        "name of a namespace",
    ),
    # --- repository ---
    Refusal(
        "the repository is not S3",
        put("repository/uri", "https://models/prod"),
        "spec.repository.uri",
        "write s3://<bucket>/<prefix>",
    ),
    Refusal(
        "the repository ends in a slash", put("repository/uri", "s3://models/prod/"), "spec.repository.uri", "no slash at the end"
    ),
    Refusal("the repository names no bucket", put("repository/uri", "s3:///prod"), "spec.repository.uri", "s3://<bucket>"),
    Refusal("the bucket is in upper case", put("repository/uri", "s3://Models/prod"), "spec.repository.uri", "s3://<bucket>"),
    Refusal(
        "the repository climbs up",
        put("repository/uri", "s3://models/../other"),
        "spec.repository.uri",
        "may not have . or ..",
        False,
    ),
    Refusal("the repository is too long", put("repository/uri", "s3://models/" + "a" * 512), "spec.repository.uri", "512"),
    Refusal(
        "the endpoint has no scheme",
        put("repository/endpoint", "s3.storage:9000"),
        "spec.repository.endpoint",
        "http(s)://<host>",
    ),
    Refusal(
        "the endpoint has a path",
        put("repository/endpoint", "http://s3.storage:9000/models"),
        "spec.repository.endpoint",
        "no path",
    ),
    Refusal(
        "the endpoint carries a password",
        put("repository/endpoint", "http://u:p@s3.storage:9000"),
        "spec.repository.endpoint",
        "http(s)://<host>",
    ),
    Refusal("the region has a space", put("repository/region", "us east"), "spec.repository.region", "such as us-east-1"),
    Refusal(
        "there are no credentials",
        drop("repository/credentialsSecretRef"),
        "spec.repository.credentialsSecretRef",
        "Required value",
    ),
    Refusal(
        "the credentials' Secret has no possible name",
        put("repository/credentialsSecretRef/name", "S3_Credentials"),
        "spec.repository.credentialsSecretRef.name",
        "name of a Kubernetes object",
    ),
    Refusal(
        "the deletion policy is unknown",
        put("repository/deletionPolicy", "Orphan"),
        "spec.repository.deletionPolicy",
        'supported values: "Retain", "Delete"',
    ),
    Refusal("the model's name has a slash", put("modelName", "vision/digits"), "spec.modelName", "write a model name"),
    # --- versions ---
    Refusal("there are no versions", put("versions", []), "spec.versions", "at least 1 items"),
    Refusal("there are 65 versions", put("versions", [entry(n) for n in range(1, 66)]), "spec.versions", "at most 64 items"),
    Refusal("two versions have one number", put("versions/1/version", 1), "spec.versions[1]", "Duplicate value", False),
    Refusal(
        "a version is 0",
        both(put("versions/0/version", 0), put("traffic/stable", 0)),
        f"{V}.version",
        "greater than or equal to 1",
    ),
    Refusal(
        "a version is too great for a Service's name",
        put("versions/1/version", 10**9),
        "spec.versions[1].version",
        "less than or equal to 999999999",
    ),
    Refusal(
        "a checkpoint has no object",
        put("versions/0/checkpoint/uri", "s3://checkpoints"),
        f"{V}.checkpoint.uri",
        "s3://<bucket>/<object>",
    ),
    Refusal(
        "a checkpoint is a local file", put("versions/0/checkpoint/uri", "file:///v1.pt"), f"{V}.checkpoint.uri", "write s3://"
    ),
    Refusal(
        "a checkpoint has a space",
        put("versions/0/checkpoint/uri", "s3://checkpoints/v 1.pt"),
        f"{V}.checkpoint.uri",
        "write s3://",
    ),
    Refusal(
        "a checkpoint climbs up",
        put("versions/0/checkpoint/uri", "s3://checkpoints/a/.."),
        f"{V}.checkpoint.uri",
        "may not have . or ..",
        False,
    ),
    Refusal("a checkpoint has no sha256", drop("versions/0/checkpoint/sha256"), f"{V}.checkpoint.sha256", "Required value"),
    Refusal("a sha256 is short", put("versions/0/checkpoint/sha256", "abc"), f"{V}.checkpoint.sha256", "sha256sum FILE"),
    Refusal(
        "a sha256 is in upper case",
        put("versions/0/checkpoint/sha256", "A" * 64),
        f"{V}.checkpoint.sha256",
        "64 lower-case hex digits",
    ),
    Refusal(
        "a sha256 has a prefix",
        put("versions/0/checkpoint/sha256", f"sha256:{'a' * 64}"),
        f"{V}.checkpoint.sha256",
        "64 lower-case hex digits",
    ),
    Refusal(
        "a checkpoint is TorchScript",
        put("versions/0/checkpoint/format", "TorchScript"),
        f"{V}.checkpoint.format",
        'supported values: "StateDict", "SafeTensors"',
    ),
    Refusal(
        "an architecture is unknown",
        put("versions/0/architecture/name", "resnet18"),
        f"{V}.architecture.name",
        "torchvision:<name>",
    ),
    Refusal(
        "a model has no classes",
        put("versions/0/architecture/parameters/numClasses", 0),
        f"{V}.architecture.parameters.numClasses",
        "greater than or equal to 1",
    ),
    Refusal(
        "a target is TensorRT, which this release does not do",
        put("versions/0/conversion/target", "TensorRT"),
        f"{V}.conversion.target",
        'supported values: "ONNX"',
    ),
    Refusal(
        "a precision is INT8, which this release does not do",
        put("versions/0/conversion/precision", "INT8"),
        f"{V}.conversion.precision",
        'supported values: "FP32"',
    ),
    Refusal(
        "a precision is FP16, which this release does not do",
        put("versions/0/conversion/precision", "FP16"),
        f"{V}.conversion.precision",
        'supported values: "FP32"',
    ),
    Refusal(
        "an opset is too old", put("versions/0/conversion/opset", 11), f"{V}.conversion.opset", "greater than or equal to 18"
    ),
    Refusal(
        "a tensor has a dimension of 0",
        put("versions/0/inputs/0/shape", [1, 0, 28]),
        f"{V}.inputs[0].shape",
        "-1 for a dynamic one",
        False,
    ),
    Refusal(
        "a tensor has a dimension of -2",
        put("versions/0/inputs/0/shape", [-2]),
        f"{V}.inputs[0].shape[0]",
        "greater than or equal to -1",
    ),
    Refusal("a tensor has 9 dimensions", put("versions/0/inputs/0/shape", [1] * 9), f"{V}.inputs[0].shape", "at most 7 items"),
    Refusal("a tensor has no dimensions", put("versions/0/outputs/0/shape", []), f"{V}.outputs[0].shape", "at least 1 items"),
    Refusal(
        "a tensor is of another type",
        put("versions/0/inputs/0/dataType", "UINT8"),
        f"{V}.inputs[0].dataType",
        'supported values: "FP32"',
    ),
    Refusal(
        "a tensor's name has a space",
        put("versions/0/inputs/0/name", "the image"),
        f"{V}.inputs[0].name",
        "write a tensor's name",
    ),
    Refusal(
        "a model has two inputs",
        lambda s: s["versions"][0]["inputs"].append({"name": "b", "dataType": "FP32", "shape": [1]}),
        f"{V}.inputs",
        "at most 1 item",
    ),
    Refusal("a model has no outputs", put("versions/0/outputs", []), f"{V}.outputs", "at least 1 items"),
    Refusal(
        "a tolerance is a number, not a decimal string",
        put("versions/0/verification/parity/absoluteTolerance", 0.001),
        f"{V}.verification.parity.absoluteTolerance",
        "must be of type string",
    ),
    Refusal(
        "a tolerance is no decimal",
        put("versions/0/verification/parity/absoluteTolerance", "1/1000"),
        f"{V}.verification.parity.absoluteTolerance",
        'such as "0.001"',
    ),
    Refusal(
        "a tolerance is 0",
        put("versions/0/verification/parity/absoluteTolerance", "0.00"),
        f"{V}.verification.parity.absoluteTolerance",
        "give a small positive one",
        False,
    ),
    Refusal(
        "a relative tolerance is 0",
        put("versions/0/verification/parity/relativeTolerance", "0e5"),
        f"{V}.verification.parity.relativeTolerance",
        "give a small positive one",
        False,
    ),
    Refusal(
        "a tolerance is negative",
        put("versions/0/verification/parity/relativeTolerance", "-1e-3"),
        f"{V}.verification.parity.relativeTolerance",
        "write a decimal number",
    ),
    Refusal(
        "requests of one item are batched",
        put("versions/0/triton/maxBatchSize", 1),
        f"{V}.triton.dynamicBatching",
        "raise maxBatchSize",
        False,
    ),
    Refusal(
        "a preferred batch is above the largest",
        put("versions/0/triton/maxBatchSize", 8),
        f"{V}.triton.dynamicBatching.preferredBatchSizes",
        "lower the size or raise maxBatchSize",
        False,
    ),
    Refusal(
        "a preferred batch is above the default largest",
        drop("versions/0/triton/maxBatchSize"),
        f"{V}.triton.dynamicBatching.preferredBatchSizes",
        "8 when omitted",
        False,
    ),
    Refusal(
        "a batch size is 0", put("versions/0/triton/maxBatchSize", 0), f"{V}.triton.maxBatchSize", "greater than or equal to 1"
    ),
    Refusal(
        "there are no instances",
        put("versions/0/triton/instanceCount", 0),
        f"{V}.triton.instanceCount",
        "greater than or equal to 1",
    ),
    # --- runtime and builder ---
    Refusal("an image has a space", put("runtime/image", "triton server:1"), "spec.runtime.image", "[registry/]repository[:tag]"),
    Refusal("an image's digest is cut off", put("runtime/image", "triton@sha256:12"), "spec.runtime.image", "[@sha256:digest]"),
    Refusal(
        "a pull policy is unknown",
        put("runtime/imagePullPolicy", "Sometimes"),
        "spec.runtime.imagePullPolicy",
        'supported values: "Always"',
    ),
    Refusal("there are no replicas", put("runtime/replicas", 0), "spec.runtime.replicas", "greater than or equal to 1"),
    Refusal(
        "pods have no time to end",
        put("runtime/terminationGracePeriodSeconds", 5),
        "spec.runtime.terminationGracePeriodSeconds",
        "greater than or equal to 30",
    ),
    Refusal(
        "a quantity has an unknown unit",
        put("runtime/resources/limits/memory", "8GB"),
        "spec.runtime.resources.limits[memory]",
        "such as 2, 500m, 1.5 or 8Gi",
    ),
    Refusal(
        "a quantity is negative",
        put("runtime/resources/limits/memory", -1),
        "spec.runtime.resources.limits[memory]",
        "not negative",
    ),
    Refusal(
        "shared memory is no quantity",
        put("runtime/sharedMemorySize", "much"),
        "spec.runtime.sharedMemorySize",
        "write a quantity",
    ),
    Refusal(
        "a GPU is requested without limit",
        drop("runtime/resources/limits/nvidia.com~gpu"),
        "spec.runtime.resources",
        "set it in limits",
        False,
    ),
    Refusal(
        "half a GPU is asked for",
        both(put("runtime/resources/limits/nvidia.com~gpu", "500m"), drop("runtime/resources/requests")),
        "spec.runtime.resources.limits",
        "whole devices",
        False,
    ),
    Refusal(
        "a GPU is called gpu",
        put("runtime/resources/limits/gpu", 1),
        "spec.runtime.resources.limits",
        "write nvidia.com/gpu",
        False,
    ),
    Refusal(
        "a request exceeds its limit",
        put("builder/resources/requests/memory", "9Gi"),
        "spec.builder.resources.requests",
        "lower the request",
        False,
    ),
    Refusal(
        "a resource's name is no name",
        put("builder/resources/limits/nvidia.com~gpu!", 1),
        "spec.builder.resources.limits",
        "write [domain/]name",
    ),
    Refusal(
        "a node label has a bad key",
        put("runtime/nodeSelector", {"a b": "c"}),
        "spec.runtime.nodeSelector",
        "write [domain/]name",
    ),
    Refusal(
        "a node label has a bad value",
        put("runtime/nodeSelector", {"a": "b c"}),
        "spec.runtime.nodeSelector[a]",
        "write a label value",
    ),
    Refusal(
        "a toleration names nothing",
        put("runtime/tolerations/2", {}),
        "spec.runtime.tolerations[2].key",
        "operator: Exists",
        False,
    ),
    Refusal(
        "a toleration for any value has a value",
        put("runtime/tolerations/0/value", "x"),
        "spec.runtime.tolerations[0].value",
        "remove value",
        False,
    ),
    Refusal(
        "a lasting effect is tolerated for a time",
        drop("builder/tolerations/0/effect"),
        "spec.builder.tolerations[0].tolerationSeconds",
        "set effect: NoExecute",
        False,
    ),
    Refusal(
        "an affinity says In without values",
        drop(
            "runtime/affinity/podAffinity/requiredDuringSchedulingIgnoredDuringExecution/0/labelSelector/matchExpressions/0/values"
        ),
        "labelSelector.matchExpressions[0].values",
        "need values",
        False,
    ),
    Refusal(
        "a variable has value and valueFrom",
        put("runtime/env/1/value", "x"),
        "spec.runtime.env[1].valueFrom",
        "remove one",
        False,
    ),
    Refusal("a variable stands twice", put("runtime/env/1/name", "PLAIN"), "spec.runtime.env[1]", "Duplicate value", False),
    Refusal(
        "a variable comes from nowhere",
        put("runtime/env/1/valueFrom", {}),
        "spec.runtime.env[1].valueFrom",
        "name either configMapKeyRef or secretKeyRef",
        False,
    ),
    Refusal("a variable's name has a dash", put("runtime/env/0/name", "A-B"), "spec.runtime.env[0].name", "name of a variable"),
    Refusal(
        "an export has no time",
        put("builder/activeDeadlineSeconds", 1),
        "spec.builder.activeDeadlineSeconds",
        "greater than or equal to 30",
    ),
]

REFUSED_NAMES = [
    ("a name is longer than 40", "a" * 41),
    ("a name starts with a digit", "1digits"),
    ("a name has a dot", "digits.v1"),
]

REFUSED_WHEN_CHANGED = [
    Refusal(
        "a checkpoint is changed in place",
        put("versions/0/checkpoint/uri", "s3://checkpoints/digits/v9.pt"),
        V,
        "add an entry with a new version number",
    ),
    Refusal(
        "a sha256 is changed in place",
        put("versions/1/checkpoint/sha256", "f" * 64),
        "spec.versions[1]",
        "add an entry with a new version number",
    ),
    Refusal(
        "an architecture is changed in place", put("versions/0/architecture/name", "torchvision:resnet18"), V, "add an entry"
    ),
    Refusal("a batch size is changed in place", put("versions/0/triton/maxBatchSize", 64), V, "add an entry"),
    Refusal("batching is removed in place", drop("versions/0/triton/dynamicBatching"), V, "add an entry"),
    Refusal(
        "a tolerance is changed in place", put("versions/0/verification/parity/absoluteTolerance", "1e-2"), V, "add an entry"
    ),
    Refusal("a shape is changed in place", put("versions/0/inputs/0/shape", [1, 32, 32]), V, "add an entry"),
    Refusal(
        "an entry is changed and moved",
        both(put("versions/0/triton/instanceCount", 9), lambda s: s["versions"].reverse()),
        "spec.versions[1]",
        "add an entry",
    ),
    Refusal("the model's name is changed", put("modelName", "digits2"), "spec.modelName", "create another ModelDeployment"),
    Refusal("the model's name is removed", drop("modelName"), "spec.modelName", "create another ModelDeployment"),
    Refusal(
        "the repository's URI is changed",
        put("repository/uri", "s3://models/other"),
        "spec.repository",
        "create another ModelDeployment",
    ),
    Refusal(
        "the repository's endpoint is changed",
        put("repository/endpoint", "http://s3.other:9000"),
        "spec.repository",
        "create another ModelDeployment",
    ),
    Refusal(
        "the repository's endpoint is removed", drop("repository/endpoint"), "spec.repository", "create another ModelDeployment"
    ),
    Refusal(
        "the repository's region is changed",
        put("repository/region", "eu-west-1"),
        "spec.repository",
        "create another ModelDeployment",
    ),
    Refusal("stable's entry is removed", lambda s: s["versions"].pop(0), "spec.traffic.stable", "add the entry"),
    Refusal("canary's entry is removed", lambda s: s["versions"].pop(1), "spec.traffic.canary", "add the entry"),
]

ALLOWED_CHANGES: list[tuple[str, Change]] = [
    ("an entry is added", lambda s: s["versions"].append(entry(3))),
    ("an entry out of traffic is removed", both(drop("traffic/canary"), lambda s: s["versions"].pop(1))),
    ("entries are put in another order", lambda s: s["versions"].reverse()),
    ("the canary is promoted", both(put("traffic/stable", 2), drop("traffic/canary"))),
    ("stable and canary change places", put("traffic", {"stable": 2, "canary": 1})),
    ("the split changes", put("rollout/steps/0/weight", 50)),
    ("the canary gets everything", put("rollout/steps", [{"weight": 100}])),
    (
        "the runtime changes",
        both(put("runtime/replicas", 3), put("runtime/image", "localhost:5000/triton:1"), drop("runtime/env")),
    ),
    ("the builder changes", drop("builder")),
    ("the routing changes", put("routing/hostnames", ["other.example.com"])),
    ("the routing goes with the canary", both(drop("routing"), drop("traffic/canary"), drop("rollout"))),
    ("credentials move to another Secret", put("repository/credentialsSecretRef/name", "other")),
    ("the deletion policy changes", put("repository/deletionPolicy", "Retain")),
]


def by_sentence(case: Refusal) -> str:
    return case.sentence


_names = (f"digits-{number}" for number in itertools.count())


@pytest.fixture
def name() -> str:
    return next(_names)


@pytest.fixture
def existing(api: ApiServer, name: str) -> Iterator[dict[str, Any]]:
    """A stored ModelDeployment with every field set."""
    answer = create(api, name, full_spec())
    assert answer.is_success, answer.text
    yield answer.json()
    api.request("DELETE", f"{COLLECTION}/{name}")


def create(api: ApiServer, name: str, spec: dict[str, Any], **parameters: str) -> Any:
    body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "metadata": {"name": name}, "spec": spec}
    return api.request("POST", COLLECTION, body, **{"fieldValidation": "Strict", **parameters})


def changed(spec: dict[str, Any], change: Change) -> dict[str, Any]:
    result = copy.deepcopy(spec)
    change(result)
    return result


def assert_refused(answer: Any, field: str, says: str) -> None:
    assert answer.status_code == 422, f"not refused as invalid: {answer.status_code} {answer.text[:500]}"
    causes = answer.json()["details"]["causes"]
    fitting = [cause["message"] for cause in causes if cause["field"].endswith(field)]
    assert fitting, f"no cause names {field}: {[(cause['field'], cause['message']) for cause in causes]}"
    assert any(says in message for message in fitting), f"{field} does not say {says!r}: {fitting}"
    for cause in causes:
        assert "should match" not in cause["message"], f"a bare regular expression is shown: {cause}"
        assert "rule evaluation error" not in cause["message"], f"a rule breaks instead of refusing: {cause}"


def test_a_spec_with_every_field_and_64_versions_is_accepted_within_the_cost_budget(api: ApiServer, name: str) -> None:
    answer = create(api, name, full_spec(versions=MAX_VERSIONS), dryRun="All")
    assert answer.is_success, answer.text
    Spec.model_validate(answer.json()["spec"])


def test_the_full_spec_of_these_tests_leaves_no_field_out() -> None:
    """Else a field could lose its bounds or its meaning unseen."""
    given = Spec.model_validate(full_spec())
    unset = list(_unset_fields(given))
    assert unset == []


def _unset_fields(model: Any, path: str = "spec") -> Iterator[str]:
    # Lists may be uneven (a toleration without key): a field counts as set when any item of the list has it.
    for field in type(model).model_fields:
        value = getattr(model, field)
        items = value if isinstance(value, list) else [value]
        models = [item for item in items if hasattr(item, "model_fields_set")]
        if field not in model.model_fields_set:
            yield f"{path}.{field}"
        yield from _missing_everywhere([list(_unset_fields(item, f"{path}.{field}")) for item in models])


def _missing_everywhere(unset: list[list[str]]) -> list[str]:
    return [path for path in unset[0] if all(path in others for others in unset)] if unset else []


@pytest.mark.parametrize("case", REFUSED_WHEN_CREATED, ids=by_sentence)
def test_refused_when_created(api: ApiServer, name: str, case: Refusal) -> None:
    answer = create(api, name, changed(full_spec(), case.change), dryRun="All")
    assert_refused(answer, case.field, case.says)


@pytest.mark.parametrize("case", [case for case in REFUSED_WHEN_CREATED if case.by_types], ids=by_sentence)
def test_refused_by_the_types_too(case: Refusal) -> None:
    with pytest.raises(ValidationError):
        Spec.model_validate(changed(full_spec(), case.change))


@pytest.mark.parametrize("bad", [pytest.param(bad, id=sentence) for sentence, bad in REFUSED_NAMES])
def test_a_name_that_no_service_could_have_is_refused(api: ApiServer, bad: str) -> None:
    answer = create(api, bad, full_spec(), dryRun="All")
    assert answer.status_code == 422, answer.text
    assert "at most 40 characters" in answer.json()["message"]
    assert "choose another name" in answer.json()["message"]


def test_a_name_of_40_characters_is_accepted(api: ApiServer) -> None:
    assert create(api, "a" * 40, full_spec(), dryRun="All").is_success


@pytest.mark.parametrize("case", REFUSED_WHEN_CHANGED, ids=by_sentence)
def test_refused_when_changed(api: ApiServer, existing: dict[str, Any], case: Refusal) -> None:
    body = {**existing, "spec": changed(existing["spec"], case.change)}
    answer = api.request("PUT", f"{COLLECTION}/{existing['metadata']['name']}", body, dryRun="All")
    assert_refused(answer, case.field, case.says)


def test_a_model_name_cannot_be_added_later(api: ApiServer, name: str) -> None:
    stored = create(api, name, changed(full_spec(), drop("modelName"))).json()
    answer = api.request("PATCH", f"{COLLECTION}/{name}", {"spec": {"modelName": "digits"}})
    assert_refused(answer, "spec.modelName", "create another ModelDeployment")
    assert api.request("GET", f"{COLLECTION}/{name}").json()["spec"] == stored["spec"]


@pytest.mark.parametrize("change", [pytest.param(change, id=sentence) for sentence, change in ALLOWED_CHANGES])
def test_allowed_when_changed(api: ApiServer, existing: dict[str, Any], change: Change) -> None:
    body = {**existing, "spec": changed(existing["spec"], change)}
    answer = api.request("PUT", f"{COLLECTION}/{existing['metadata']['name']}", body)
    assert answer.is_success, answer.text
    assert answer.json()["spec"] == body["spec"]
    Spec.model_validate(answer.json()["spec"])


def test_nothing_is_added_to_what_the_user_wrote(api: ApiServer, name: str) -> None:
    """Defaults belong to the operator: filled in by the server, they would show as drift in GitOps tools."""
    small = {
        "repository": {"uri": "s3://models", "credentialsSecretRef": {"name": "s"}},
        "versions": [{key: entry(1)[key] for key in ("version", "checkpoint", "architecture", "inputs", "outputs")}],
        "traffic": {"stable": 1},
    }
    answer = create(api, name, small)
    assert answer.is_success, answer.text
    assert answer.json()["spec"] == small


def test_there_are_many_more_than_forty_refusals() -> None:
    assert len(REFUSED_WHEN_CREATED) + len(REFUSED_NAMES) + len(REFUSED_WHEN_CHANGED) >= 40
    sentences = [case.sentence for case in [*REFUSED_WHEN_CREATED, *REFUSED_WHEN_CHANGED]]
    assert len(sentences) == len(set(sentences))

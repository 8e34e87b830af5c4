"""What the API server refuses, each case by the sentence that describes it, and what it lets pass.

Refusals must help a tired human: every case names the field as the API server prints it, and words of the way out.
"""

from __future__ import annotations

import copy
import itertools
import re
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
            "stateDictKey": "state_dict",
            "trustSource": False,
            "endpoint": "https://s3.elsewhere",
            "region": "eu-west-1",
            "credentialsSecretRef": {"name": "checkpoints"},
        },
        "architecture": {"name": "lenet5", "parameters": {"numClasses": 10}, "layer": "f6"},
        "inputs": [{"name": "image", "dataType": "FP32", "shape": [1, 28, 28]}],
        "outputs": [{"name": "logits", "dataType": "FP32", "shape": [10]}],
        "conversion": {
            "target": "ONNX",
            "precision": "INT8",
            "opset": 20,
            "calibration": {"uri": "s3://checkpoints/digits/calibration.npz", "sha256": "c" * 64},
        },
        "verification": {
            "parity": {
                "absoluteTolerance": "1e-3",
                "relativeTolerance": "0.001",
                "minimumTop1Agreement": "0.95",
                "minimumCosine": "0.9",
                "samples": {"uri": "s3://data/digits/some.npz", "sha256": "e" * 64},
            },
            "accuracy": {
                "dataset": {"uri": "s3://data/digits/test.npz", "sha256": "d" * 64},
                "minimum": "0.95",
                "maximumDrop": "0.01",
                "maximumDropFromStable": "0",
                "onFailure": "Warn",
            },
        },
        "preprocessing": {
            "decode": "L",
            "resize": [32],
            "centerCrop": [28, 28],
            "interpolation": "Bicubic",
            "mean": ["-0.5"],
            "std": ["0.5"],
            "layout": "CHW",
        },
        "postprocessing": {"topK": 3, "softmax": True},
        "triton": {
            "maxBatchSize": 32,
            "dynamicBatching": {
                "maxQueueDelayMicroseconds": 500,
                "preferredBatchSizes": [8, 16],
                "priorityLevels": 2,
                "defaultPriorityLevel": 2,
                "defaultQueuePolicy": {
                    "timeoutAction": "Delay",
                    "defaultTimeoutMicroseconds": 1000,
                    "allowTimeoutOverride": True,
                    "maxQueueSize": 100,
                },
            },
            "instanceCount": 2,
            "instanceKind": "GPU",
            "labels": [f"digit {n}" for n in range(10)],
            "warmup": True,
            "responseCache": True,
            "configOverrides": 'parameters { key: "intra_op_thread_count" value { string_value: "2" } }',
            "accelerator": "TensorRT",
        },
    }


def less_triton(whole: dict[str, Any], *without: str) -> dict[str, Any]:
    """The entry, less these fields of triton."""
    return {**whole, "triton": {key: value for key, value in whole["triton"].items() if key not in without}}


def own_entry(version: int) -> dict[str, Any]:
    """A version with a network of the user's own, which excludes one known by name."""
    architecture = {
        "entryPoint": "nets.model:build",
        "source": {"uri": "s3://code/nets.zip", "sha256": f"{version:064x}"},
        "parameters": {
            "classes": 10,
            "hidden_size": 2**40,
            "dropout": "0.5",
            "Act": "relu",
            "residual": "true",
            "text": '"true"',
        },
        "layer": "flatten",
    }
    return {**entry(version), "architecture": architecture}


def onnx_entry(version: int) -> dict[str, Any]:
    whole = entry(version)
    checkpoint = {**whole["checkpoint"], "format": "ONNX"}
    del checkpoint["stateDictKey"], whole["architecture"], whole["conversion"]
    return {**whole, "checkpoint": checkpoint}


def detector_entry(version: int) -> dict[str, Any]:
    """A detection model, which excludes what is for class scores alone."""
    whole = entry(version)
    del whole["conversion"], whole["verification"]["accuracy"], whole["postprocessing"]
    del whole["triton"]["labels"], whole["triton"]["accelerator"]
    del whole["verification"]["parity"]["minimumTop1Agreement"], whole["verification"]["parity"]["minimumCosine"]
    return {
        **whole,
        "architecture": {"name": "torchvision:ssdlite320_mobilenet_v3_large", "parameters": {"detectionsPerImg": 50}},
        "inputs": [{"name": "image", "dataType": "FP32", "shape": [3, 320, 320]}],
        "outputs": [
            {"name": "boxes", "dataType": "FP32", "shape": [50, 4]},
            {"name": "labels", "dataType": "INT64", "shape": [50]},
            {"name": "scores", "dataType": "FP32", "shape": [50]},
        ],
        "preprocessing": {"resize": [320, 320]},
    }


def metric(name: str) -> dict[str, Any]:
    query = 'quantile_over_time(0.9, latency{namespace="{{namespace}}", service="{{canaryService}}"}[{{window}}])'
    return {"name": name, "query": query, "max": "-1.5e-3"}


def autoscaled_spec() -> dict[str, Any]:
    """A spec with what excludes fields of `full_spec`."""
    scaling = {
        "minReplicas": 2,
        "maxReplicas": 10,
        "targetCPUUtilizationPercentage": 80,
        "podMetrics": [{"name": "nv_inference_pending_request_count", "averageValue": "500m"}],
    }
    return changed(
        full_spec(),
        both(
            both(drop("runtime/replicas"), drop("rollout/surge"), put("runtime/autoscaling", scaling)),
            both(drop("repository/credentialsSecretRef"), put("repository/serviceAccountName", "triton")),
        ),
    )


def full_spec(versions: int = 2) -> dict[str, Any]:
    """A spec with every field set, but for those that exclude others."""
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
        "claims": [{"name": "gpu", "request": "half"}, {"name": "network"}],
    }
    scheduling = {
        "resources": resources,
        "resourceClaims": [
            {"name": "gpu", "resourceClaimTemplateName": "gpu-half"},
            {"name": "network", "resourceClaimName": "shared-network"},
        ],
        "labels": {"kueue.x-k8s.io/queue-name": "gpus"},
        "priorityClassName": "serving",
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
        "versions": [(entry if number % 2 else own_entry)(number) for number in range(1, versions + 1)],
        "traffic": {
            "stable": 1,
            "canary": 2,
            "match": {"headers": [{"name": "x-canary", "value": "yes|please", "type": "RegularExpression"}]},
            "mirror": {"percent": 10},
        },
        "rollout": {
            "steps": [{"weight": 5, "hold": "90s"}, {"weight": 50, "hold": "1h30m"}, {"weight": 100}],
            "paused": True,
            "retryAt": "2026-01-31T12:00:00Z",
            "progressDeadline": "15m",
            "scaleDownDelay": "1h30m",
            "inspectFor": "0s",
            "surge": "WithinReplicas",
            "analysis": {
                "alpha": "0.01",
                "toleratedOdds": "1.5",
                "maxErrorRate": "1e-3",
                "maxLatencyRatio": "1.5",
                "stallAfter": "1m",
                "onInconclusive": "Promote",
                "prometheus": {
                    "address": "http://prometheus.monitoring:9090/tenant-1",
                    "requests": 'sum(requests_total{service="{{service}}", via!="test"})',
                    "failures": 'sum(requests_total{service="{{service}}", via!="test", code=~"5.."})',
                    "scrapeInterval": "15s",
                    "metrics": [metric("latency"), {**metric("agreement"), "min": "0.9", "max": "1"}],
                },
            },
        },
        "runtime": {
            **scheduling,
            "image": "nvcr.io/nvidia/tritonserver:25.10-py3",
            "tensorrtVersion": "10.13.3.9",
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
            "topologySpreadConstraints": [
                {
                    "topologyKey": "topology.kubernetes.io/zone",
                    "whenUnsatisfiable": "DoNotSchedule",
                    "maxSkew": 1,
                    "minDomains": 2,
                    "nodeAffinityPolicy": "Honor",
                    "nodeTaintsPolicy": "Honor",
                },
                {"topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway", "maxSkew": 2},
            ],
            "serviceAccountName": "triton",
            "runtimeClassName": "nvidia",
            "terminationGracePeriodSeconds": 90,
            "sharedMemorySize": "1Gi",
            "temporaryStorageSize": "2Gi",
            "responseCacheMebibytes": 256,
        },
        "builder": {
            **copy.deepcopy(scheduling),
            "tensorrtImage": "registry.example.com/perch-tensorrt:25.10",
            "runtimeClassName": "nvidia",
            "activeDeadlineSeconds": 1800,
            "networkPolicy": {"allow": [{"cidr": "10.20.0.7/32"}, {"namespace": "storage"}]},
        },
        "routing": {
            "parentRefs": [{"name": "gateway", "namespace": "gateways", "sectionName": "http", "port": 80}],
            "hostnames": ["digits.example.com", "*.digits.example.com"],
        },
    }


def valid_specs() -> list[dict[str, Any]]:
    """Specs that together hold every field, in every form of a version."""
    others = changed(full_spec(), both(put("versions/0", detector_entry(1)), put("versions/1", onnx_entry(2))))
    return [full_spec(), autoscaled_spec(), others, changed(full_spec(), PLAN)]


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


NO_CANARY = both(drop("traffic/canary"), drop("traffic/match"), drop("traffic/mirror"))
NO_PROMETHEUS = drop("rollout/analysis/prometheus")
SPREAD = "spec.runtime.topologySpreadConstraints"
ANALYSIS, PROMETHEUS = "spec.rollout.analysis", "spec.rollout.analysis.prometheus"


def scaled(change: Change) -> Change:
    """The change, made to a spec with an autoscaler."""

    def made(spec: dict[str, Any]) -> None:
        spec.clear()
        spec.update(autoscaled_spec())
        change(spec)

    return made


def rules_of(headers: list[tuple[str, str, str]]) -> Change:
    return put("traffic/match/headers", [{"name": name, "value": value, "type": kind} for name, value, kind in headers])


NO_GPU = both(
    *(
        drop(f"{part}/resources/{kind}/nvidia.com~gpu")
        for part, kind in itertools.product(("runtime", "builder"), ("limits", "requests"))
    )
)
NO_CLAIMS = both(*(both(drop(f"{part}/resources/claims"), drop(f"{part}/resourceClaims")) for part in ("runtime", "builder")))


def gpu(name: str, count: int | str) -> Change:
    """Of both parts, by this name alone."""
    limits = both(*(put(f"{part}/resources/limits/{name}", count) for part in ("runtime", "builder")))
    return both(NO_GPU, NO_CLAIMS, limits)


PLAN = both(drop("versions/0/triton/accelerator"), put("versions/0/conversion/target", "TensorRT"))


def of_a_detector(change: Change) -> Change:
    """The change, made to a spec whose first version is a detection model."""
    return both(put("versions/0", detector_entry(1)), change)


@dataclass(frozen=True)
class Refusal:
    sentence: str
    change: Change
    field: str
    says: str
    by_types: bool = True
    """The pydantic types refuse it too; rules between fields are the API server's alone."""


V = "spec.versions[0]"
TRITON, PARITY = f"{V}.triton", f"{V}.verification.parity"
OVERRIDES, QUEUE = f"{TRITON}.configOverrides", f"{TRITON}.dynamicBatching.defaultQueuePolicy"
LONG_DOMAIN = "a." * 127 + "b/c"
EMPTY_FILE = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
PODS = "runtime/affinity/podAffinity/requiredDuringSchedulingIgnoredDuringExecution/0"
NODES = "runtime/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms/0"
NO_ACCELERATOR = drop("versions/0/triton/accelerator")


def field_of(path: str) -> str:
    """A path of `put` as the API server prints it."""
    return "spec." + re.sub(r"\.(\d+)", r"[\1]", path.replace("/", "."))


def overridden(text: str) -> Change:
    """With these overrides and with no field whose place they take."""
    rest = both(*(drop(f"versions/0/triton/{field}") for field in ("instanceCount", "instanceKind", "accelerator")))
    return both(rest, put("versions/0/triton/configOverrides", text))


def checkpoint_is(path: str) -> Change:
    """The object at `path` is the checkpoint of the second version, whose architecture has a source."""
    return put(f"versions/1/{path}", "s3://checkpoints/digits/v2.pt")


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
        "a step below 100 has no hold",
        drop("rollout/steps/0/hold"),
        "spec.rollout.steps[0].hold",
        "say how long, such as hold: 5m",
        False,
    ),
    Refusal(
        "a hold has no unit", put("rollout/steps/0/hold", "90"), "spec.rollout.steps[0].hold", "such as 30s, 5m or 1h30m, or"
    ),
    Refusal("a hold is empty", put("rollout/steps/0/hold", ""), "spec.rollout.steps[0].hold", "at least 1 chars"),
    Refusal("a hold is misspelt", put("rollout/steps/0/hold", "indefinite"), "spec.rollout.steps[0].hold", "or Indefinite"),
    Refusal(
        "the step at 100 is held",
        put("rollout/steps/2/hold", "5m"),
        "spec.rollout.steps[2].hold",
        "remove hold (rollout.scaleDownDelay",
        False,
    ),
    Refusal(
        "the steps end nowhere",
        lambda s: s["rollout"]["steps"].pop(),
        "spec.rollout.steps",
        "{weight: 100}, or hold: Indefinite",
        False,
    ),
    Refusal("paused is a word", put("rollout/paused", "yes"), "spec.rollout.paused", "must be of type boolean", False),
    Refusal("retryAt is a date", put("rollout/retryAt", "2026-01-31"), "spec.rollout.retryAt", "write a time as RFC 3339"),
    Refusal(
        "a canary has no time to start",
        put("rollout/progressDeadline", "0m0s"),
        "spec.rollout.progressDeadline",
        "give 15s to 168h",
        False,
    ),
    Refusal("a deadline has a fraction", put("rollout/progressDeadline", "1.5h"), "spec.rollout.progressDeadline", "such as 30s"),
    Refusal(
        "inspection is for days", put("rollout/inspectFor", "2d"), "spec.rollout.inspectFor", "in hours, minutes and seconds"
    ),
    Refusal(
        "a surge is unknown",
        put("rollout/surge", "25%"),
        "spec.rollout.surge",
        'supported values: "Additional", "WithinReplicas"',
    ),
    Refusal(
        "a canary is to run on the pods of a single replica",
        put("runtime/replicas", 1),
        "spec.rollout.surge",
        "raise runtime.replicas to 2 or more",
        False,
    ),
    Refusal(
        "a canary is to run on an autoscaler's pods",
        scaled(put("rollout/surge", "WithinReplicas")),
        "spec.rollout.surge",
        "an autoscaler has no fixed number to share), or remove surge",
        False,
    ),
    # --- what traffic goes to the canary besides ---
    Refusal(
        "requests are matched and there is no canary", drop("traffic/canary"), "spec.traffic.match", "name traffic.canary", False
    ),
    Refusal(
        "requests are mirrored and there is no canary",
        both(drop("traffic/canary"), drop("traffic/match")),
        "spec.traffic.mirror",
        "or remove mirror",
        False,
    ),
    Refusal(
        "a port is none",
        put("repository/endpoint", "http://s3.storage:70000"),
        "spec.repository.endpoint",
        "a port from 1 to 65535",
    ),
    Refusal(
        "a checkpoint's port is none",
        put("versions/0/checkpoint/endpoint", "http://s3.storage:65536"),
        "spec.versions[0].checkpoint.endpoint",
        "a port from 1 to 65535",
    ),
    Refusal(
        "Prometheus' port is none",
        put("rollout/analysis/prometheus/address", "http://prometheus:99999"),
        "spec.rollout.analysis.prometheus.address",
        "a port from 1 to 65535",
    ),
    Refusal(
        "a Gateway is named twice",
        put("routing/parentRefs", [{"name": "a"}, {"name": "a"}]),
        "spec.routing.parentRefs",
        "is named twice: name it once",
        False,
    ),
    Refusal(
        "a host is an address",
        put("routing/hostnames", ["10.0.0.1"]),
        "spec.routing.hostnames[0]",
        "an IP address is no host name",
        False,
    ),
    Refusal(
        "a canary must be ready in a second",
        put("rollout/progressDeadline", "1s"),
        "spec.rollout.progressDeadline",
        "give 15s to 168h",
        False,
    ),
    Refusal(
        "a pod hangs after a second",
        put("rollout/analysis/stallAfter", "1s"),
        "spec.rollout.analysis.stallAfter",
        "give 5s to 1h",
        False,
    ),
    Refusal(
        "any answer is near enough",
        put("versions/0/verification/parity/absoluteTolerance", "9e99"),
        "spec.versions[0].verification.parity.absoluteTolerance",
        "a tolerance above 1",
        False,
    ),
    Refusal(
        "any answer is relatively near enough",
        put("versions/0/verification/parity/relativeTolerance", "2"),
        "spec.versions[0].verification.parity.relativeTolerance",
        "a tolerance above 1",
        False,
    ),
    Refusal(
        "four requests pass a step",
        put("rollout/analysis/maxErrorRate", "0.999999"),
        "spec.rollout.analysis.maxErrorRate",
        "give a share from 0.000001",
        False,
    ),
    Refusal(
        "a batch is in thousandths of a byte",
        put("runtime/sharedMemorySize", "1m"),
        "spec.runtime.sharedMemorySize",
        "write it with its unit, such as 256Mi",
        False,
    ),
    Refusal(
        "temporary storage is a number without a unit",
        put("runtime/temporaryStorageSize", 10),
        "spec.runtime.temporaryStorageSize",
        "write it with its unit, such as 256Mi",
        False,
    ),
    Refusal(
        "an export has half a minute",
        put("builder/activeDeadlineSeconds", 30),
        "spec.builder.activeDeadlineSeconds",
        "greater than or equal to 60",
    ),
    Refusal(
        "overrides are no fields",
        put("versions/0/triton/configOverrides", "}{"),
        "spec.versions[0].triton.configOverrides",
        "write protobuf text of these fields alone",
        False,
    ),
    Refusal(
        "instances are passive",
        put("versions/0/triton/configOverrides", "instance_group [{ passive: true }]"),
        "spec.versions[0].triton.configOverrides",
        "passive instances answer no request",
        False,
    ),
    Refusal(
        "a policy allows everything",
        put("builder/networkPolicy/allow", [{"cidr": "0.0.0.0/0"}]),
        "spec.builder.networkPolicy.allow[0].cidr",
        "takes the policy's meaning away",
        False,
    ),
    Refusal(
        "a policy allows the cloud's metadata service",
        put("builder/networkPolicy/allow", [{"cidr": "169.254.0.0/16"}]),
        "spec.builder.networkPolicy.allow[0].cidr",
        "metadata service",
        False,
    ),
    Refusal(
        "a sample is larger than memory",
        put("versions/0/inputs/0/shape", [3, 65536, 65536]),
        "spec.versions[0].inputs[0].shape",
        "more than 256 MiB",
        False,
    ),
    Refusal(
        "a time has a month of none",
        put("rollout/retryAt", "2026-13-01T00:00:00Z"),
        "spec.rollout.retryAt",
        "write a time as RFC 3339 has it",
    ),
    Refusal(
        "requests are told apart by their host",
        rules_of([("Host", "a", "Exact")]),
        "spec.traffic.match.headers[0].name",
        "match a header of your own",
        False,
    ),
    Refusal(
        "a canary that nobody judged is promoted",
        both(put("rollout/steps/0/hold", "0s"), put("rollout/analysis/onInconclusive", "Promote")),
        "spec.rollout.steps",
        "hold each step for 10s or more",
        False,
    ),
    Refusal("nothing is mirrored", put("traffic/mirror/percent", 0), "spec.traffic.mirror.percent", "greater than or equal to 1"),
    Refusal(
        "more than all is mirrored",
        put("traffic/mirror/percent", 101),
        "spec.traffic.mirror.percent",
        "less than or equal to 100",
    ),
    Refusal("mirror has no percent", put("traffic/mirror", {}), "spec.traffic.mirror.percent", "Required value"),
    Refusal("no header is matched", rules_of([]), "spec.traffic.match.headers", "at least 1 items"),
    Refusal(
        "nine headers are matched",
        rules_of([(f"x-{n}", "yes", "Exact") for n in range(9)]),
        "spec.traffic.match.headers",
        "at most 8 items",
    ),
    Refusal(
        "a header stands twice",
        rules_of([("x-canary", "a", "Exact"), ("x-canary", "b", "Exact")]),
        "spec.traffic.match.headers[1]",
        "Duplicate value",
        False,
    ),
    Refusal(
        "a header stands twice in another case",
        rules_of([("x-canary", "a", "Exact"), ("X-Canary", "b", "Exact")]),
        "spec.traffic.match.headers",
        "name each header once",
        False,
    ),
    Refusal(
        "a header's name has a colon",
        rules_of([(":path", "/", "Exact")]),
        "spec.traffic.match.headers[0].name",
        "such as x-canary",
    ),
    Refusal("a header has no value", rules_of([("x", "", "Exact")]), "spec.traffic.match.headers[0].value", "visible ASCII"),
    Refusal(
        "a header's value ends in a space",
        rules_of([("x", "a ", "Exact")]),
        "spec.traffic.match.headers[0].value",
        "parted by one space",
    ),
    Refusal(
        "a header is compared by prefix",
        rules_of([("x", "a", "Prefix")]),
        "spec.traffic.match.headers[0].type",
        '"RegularExpression"',
    ),
    Refusal(
        "a header's value is no regular expression",
        rules_of([("x", "[a-", "RegularExpression")]),
        "spec.traffic.match.headers[0]",
        "correct it, or use type: Exact",
        False,
    ),
    Refusal(
        "testers' requests would be judged with the others",
        NO_PROMETHEUS,
        "spec.traffic.match",
        "remove match before the steps begin",
        False,
    ),
    Refusal(
        "testers' requests would be judged with those that are mirrored",
        both(NO_PROMETHEUS, put("rollout/steps", [{"weight": 0, "hold": "Indefinite"}])),
        "spec.traffic.match",
        "and no mirror",
        False,
    ),
    # --- analysis ---
    Refusal("alpha is a number", put("rollout/analysis/alpha", 0.05), f"{ANALYSIS}.alpha", "must be of type string"),
    Refusal("alpha is a percentage", put("rollout/analysis/alpha", "5%"), f"{ANALYSIS}.alpha", 'such as "0.001"'),
    Refusal("alpha is 0", put("rollout/analysis/alpha", "0.0"), f"{ANALYSIS}.alpha", "give one from 1e-9 to 0.5", False),
    Refusal("alpha is 1", put("rollout/analysis/alpha", "1"), f"{ANALYSIS}.alpha", "give one from 1e-9 to 0.5", False),
    Refusal(
        "the canary must fail less than stable",
        put("rollout/analysis/toleratedOdds", "0.9"),
        f"{ANALYSIS}.toleratedOdds",
        'give 1 ("no worse") to 100',
        False,
    ),
    Refusal(
        "all requests may fail",
        put("rollout/analysis/maxErrorRate", "1"),
        f"{ANALYSIS}.maxErrorRate",
        "give a share from 0.000001",
        False,
    ),
    Refusal(
        "no request may fail",
        put("rollout/analysis/maxErrorRate", "0"),
        f"{ANALYSIS}.maxErrorRate",
        "give a share from 0.000001",
        False,
    ),
    Refusal(
        "the canary must be faster than stable",
        put("rollout/analysis/maxLatencyRatio", "1"),
        f"{ANALYSIS}.maxLatencyRatio",
        "give a ratio above 1",
        False,
    ),
    Refusal(
        "a request in flight is a stall",
        put("rollout/analysis/stallAfter", "0s"),
        f"{ANALYSIS}.stallAfter",
        "give 5s to 1h",
        False,
    ),
    Refusal(
        "too little evidence has an unknown end",
        put("rollout/analysis/onInconclusive", "Retry"),
        f"{ANALYSIS}.onInconclusive",
        'supported values: "Pause", "Promote", "Abort"',
    ),
    Refusal(
        "Prometheus has no scheme",
        put("rollout/analysis/prometheus/address", "prometheus:9090"),
        f"{PROMETHEUS}.address",
        "write http(s)://<host>",
    ),
    Refusal(
        "Prometheus' address carries a password",
        put("rollout/analysis/prometheus/address", "http://u:p@prometheus:9090"),
        f"{PROMETHEUS}.address",
        "write http(s)://<host>",
    ),
    Refusal(
        "Prometheus' address carries a query",
        put("rollout/analysis/prometheus/address", "http://prometheus:9090/?a=b"),
        f"{PROMETHEUS}.address",
        "[/<path>]",
    ),
    Refusal(
        "Prometheus is asked nothing",
        put("rollout/analysis/prometheus", {"address": "http://p"}),
        PROMETHEUS,
        "or metrics",
        False,
    ),
    Refusal(
        "failures are counted and requests are not",
        drop("rollout/analysis/prometheus/requests"),
        PROMETHEUS,
        "give both counters, or neither",
        False,
    ),
    Refusal(
        "an interval of scraping without a counter that is scraped",
        both(drop("rollout/analysis/prometheus/requests"), drop("rollout/analysis/prometheus/failures")),
        PROMETHEUS,
        "scrapeInterval is about requests and failures",
        False,
    ),
    Refusal(
        "counters are scraped all the time",
        put("rollout/analysis/prometheus/scrapeInterval", "0s"),
        f"{PROMETHEUS}.scrapeInterval",
        "Prometheus scrapes every 1s to 1h",
        False,
    ),
    Refusal(
        "both versions have the same requests",
        put("rollout/analysis/prometheus/requests", "sum(requests_total)"),
        f"{PROMETHEUS}.requests",
        "name {{version}} or {{service}} in it",
        False,
    ),
    Refusal(
        "both versions have the same failures",
        put("rollout/analysis/prometheus/failures", "sum(failures_total)"),
        f"{PROMETHEUS}.failures",
        "name {{version}} or {{service}} in it",
        False,
    ),
    Refusal(
        "a counter's query has a window",
        put("rollout/analysis/prometheus/requests", "increase(requests_total{v='{{version}}'}[{{window}}])"),
        f"{PROMETHEUS}.requests",
        "{{canaryService}}, {{version}}, {{service}}: name one of these",
        False,
    ),
    Refusal(
        "a metric's query has a misspelt variable",
        put("rollout/analysis/prometheus/metrics/0/query", "latency{service='{{canaryservice}}'}"),
        f"{PROMETHEUS}.metrics[0].query",
        "{{canaryService}}, {{window}}: name one of these",
        False,
    ),
    Refusal(
        "a metric has no query",
        put("rollout/analysis/prometheus/metrics/0/query", ""),
        f"{PROMETHEUS}.metrics[0].query",
        "at least 1 chars",
    ),
    Refusal(
        "a metric has no bound",
        drop("rollout/analysis/prometheus/metrics/0/max"),
        f"{PROMETHEUS}.metrics[0]",
        "give min, max or both",
        False,
    ),
    Refusal(
        "a metric's bounds leave nothing between them",
        put("rollout/analysis/prometheus/metrics/1/min", "1.1"),
        f"{PROMETHEUS}.metrics[1].min",
        "lower min or raise max",
        False,
    ),
    Refusal(
        "a metric's bound is no number",
        put("rollout/analysis/prometheus/metrics/0/max", "NaN"),
        f"{PROMETHEUS}.metrics[0].max",
        'such as "0.95" or "-1.5"',
    ),
    Refusal(
        "a metric stands twice",
        put("rollout/analysis/prometheus/metrics/1/name", "latency"),
        f"{PROMETHEUS}.metrics[1]",
        "Duplicate value",
        False,
    ),
    Refusal(
        "there are nine metrics",
        put("rollout/analysis/prometheus/metrics", [metric(f"m{n}") for n in range(9)]),
        f"{PROMETHEUS}.metrics",
        "at most 8 items",
    ),
    # --- autoscaling ---
    Refusal(
        "replicas are given beside an autoscaler",
        scaled(put("runtime/replicas", 2)),
        "spec.runtime.replicas",
        "autoscaling.minReplicas takes its place",
        False,
    ),
    Refusal(
        "an autoscaler goes by nothing",
        scaled(both(drop("runtime/autoscaling/podMetrics"), drop("runtime/autoscaling/targetCPUUtilizationPercentage"))),
        "spec.runtime.autoscaling",
        "give targetCPUUtilizationPercentage, podMetrics or both",
        False,
    ),
    Refusal(
        "an autoscaler's least is above its most",
        scaled(put("runtime/autoscaling/maxReplicas", 1)),
        "spec.runtime.autoscaling.minReplicas",
        "lower one or raise the other",
        False,
    ),
    Refusal(
        "an autoscaler may take all pods away",
        scaled(put("runtime/autoscaling/minReplicas", 0)),
        "spec.runtime.autoscaling.minReplicas",
        "greater than or equal to 1",
    ),
    Refusal(
        "CPU use is measured against no request",
        scaled(drop("runtime/resources/requests/cpu")),
        "spec.runtime.autoscaling",
        "set resources.requests.cpu",
        False,
    ),
    Refusal(
        "an autoscaler aims at 0",
        scaled(put("runtime/autoscaling/podMetrics/0/averageValue", "0m")),
        "spec.runtime.autoscaling.podMetrics[0].averageValue",
        "give an average above 0",
        False,
    ),
    Refusal(
        "an autoscaler aims at a number that is 0",
        scaled(put("runtime/autoscaling/podMetrics/0/averageValue", 0)),
        "spec.runtime.autoscaling.podMetrics[0].averageValue",
        "give an average above 0",
        False,
    ),
    Refusal(
        "a metric of the pods has a dash",
        scaled(put("runtime/autoscaling/podMetrics/0/name", "pending-requests")),
        "spec.runtime.autoscaling.podMetrics[0].name",
        "write the name of a metric",
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
        "or serviceAccountName for workload identity",
        False,
    ),
    Refusal(
        "there are credentials and an identity",
        put("repository/serviceAccountName", "triton"),
        "spec.repository.credentialsSecretRef",
        "pods need one way to the store",
        False,
    ),
    Refusal(
        "a pod has two identities",
        scaled(put("repository/serviceAccountName", "store")),
        "spec.runtime.serviceAccountName",
        "a pod runs under one ServiceAccount",
        False,
    ),
    *(
        Refusal(
            f"{sentence} runs beside an identity",
            scaled(both(drop("builder/networkPolicy"), change)),
            "spec.repository.serviceAccountName",
            "set builder.networkPolicy",
            False,
        )
        for sentence, change in (
            ("a network of the user's own", put("versions/0/checkpoint/trustSource", False)),
            ("a pickle that is trusted", both(put("versions/1", entry(2)), put("versions/0/checkpoint/trustSource", True))),
        )
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
        "a checkpoint is a pickled module",
        put("versions/0/checkpoint/format", "Pickle"),
        f"{V}.checkpoint.format",
        'supported values: "StateDict", "SafeTensors", "TorchScript", "TorchExport", "ONNX"',
    ),
    *(
        Refusal(
            f"a {form} program has an architecture",
            both(put("versions/0/checkpoint/format", form), drop("versions/0/checkpoint/stateDictKey")),
            f"{V}.architecture",
            "a file of this format is a whole network",
            False,
        )
        for form in ("TorchScript", "TorchExport")
    ),
    Refusal(
        "weights have no architecture",
        drop("versions/0/architecture"),
        f"{V}.architecture",
        "name the architecture whose weights",
        False,
    ),
    Refusal(
        "an ONNX file has an architecture",
        both(put("versions/0/checkpoint/format", "ONNX"), drop("versions/0/checkpoint/stateDictKey")),
        f"{V}.architecture",
        "a file of this format is a whole network",
        False,
    ),
    Refusal(
        "an ONNX file is to have another opset",
        both(
            put("versions/0/checkpoint/format", "ONNX"),
            both(drop("versions/0/checkpoint/stateDictKey"), drop("versions/0/architecture")),
        ),
        f"{V}.conversion",
        "published as it is",
        False,
    ),
    Refusal(
        "a SafeTensors file has a stateDictKey",
        put("versions/0/checkpoint/format", "SafeTensors"),
        f"{V}.checkpoint.stateDictKey",
        "a SafeTensors file holds tensors",
        False,
    ),
    Refusal(
        "a SafeTensors file is trusted",
        both(
            put("versions/0/checkpoint/format", "SafeTensors"),
            both(drop("versions/0/checkpoint/stateDictKey"), put("versions/0/checkpoint/trustSource", True)),
        ),
        f"{V}.checkpoint.trustSource",
        "the one format that is a pickle",
        False,
    ),
    Refusal(
        "a stateDictKey is a path",
        put("versions/0/checkpoint/stateDictKey", "model/weights"),
        f"{V}.checkpoint.stateDictKey",
        "such as state_dict",
    ),
    *(
        Refusal(f"a detection model {sentence}", of_a_detector(change), f"{V}.{field}", says, False)
        for sentence, change, field, says in (
            (
                "becomes a TensorRT plan",
                put("versions/0/conversion", {"target": "TensorRT"}),
                "conversion.target",
                "remove conversion.target",
            ),
            (
                "has inputs of any size",
                both(put("versions/0/inputs/0/shape", [3, -1, 320]), drop("versions/0/preprocessing")),
                "inputs",
                "both above 0",
            ),
            ("takes FP16", put("versions/0/inputs/0/dataType", "FP16"), "inputs", "takes one image"),
            ("has no labels", drop("versions/0/outputs/1"), "outputs", "name these outputs"),
            ("has outputs in another order", lambda s: s["versions"][0]["outputs"].reverse(), "outputs", "in this order"),
            ("has labels of another type", put("versions/0/outputs/1/dataType", "INT32"), "outputs", "labels (INT64"),
            ("has boxes of five numbers", put("versions/0/outputs/0/shape", [50, 5]), "outputs", "boxes (FP32, [D, 4])"),
            ("has fewer scores than boxes", put("versions/0/outputs/2/shape", [49]), "outputs", "scores (FP32, [D])"),
            (
                "has too many boxes",
                lambda s: [tensor["shape"].__setitem__(0, 1001) for tensor in s["versions"][0]["outputs"]],
                "outputs",
                "at most 1000",
            ),
            ("is cut at a layer", put("versions/0/architecture/layer", "head"), "architecture.layer", "served whole"),
            ("is exported in FP16", put("versions/0/conversion", {"precision": "FP16"}), "conversion.precision", "FP32 alone"),
            ("is accelerated", put("versions/0/triton/accelerator", "TensorRT"), "triton.accelerator", "remove accelerator"),
        )
    ),
    Refusal("a layer is no name", put("versions/0/architecture/layer", "layer 4"), f"{V}.architecture.layer", "such as flatten"),
    Refusal(
        "an architecture is unknown",
        put("versions/0/architecture/name", "resnet18"),
        f"{V}.architecture.name",
        "torchvision:<name>",
    ),
    Refusal(
        "a model has no classes",
        put("versions/0/architecture/parameters/numClasses", 0),
        f"{V}.architecture.parameters",
        "write a whole number, 1 or more",
        False,
    ),
    Refusal(
        "a number of classes is in quotes",
        put("versions/0/architecture/parameters/numClasses", "10"),
        f"{V}.architecture.parameters",
        "without quotes",
        False,
    ),
    Refusal(
        "a parameter is a fraction without quotes",
        put("versions/0/architecture/parameters/dropout", 0.5),
        f"{V}.architecture.parameters.dropout",
        "integer,string",
    ),
    Refusal(
        "a parameter is a list",
        put("versions/0/architecture/parameters/sizes", [1, 2]),
        f"{V}.architecture.parameters.sizes",
        "integer,string",
    ),
    Refusal(
        "a parameter is a long text",
        put("versions/0/architecture/parameters/text", "x" * 257),
        f"{V}.architecture.parameters.text",
        "Too long",
    ),
    Refusal(
        "there are 33 parameters",
        put("versions/0/architecture/parameters", {f"p{number}": 1 for number in range(33)}),
        f"{V}.architecture.parameters",
        "at most 32",
    ),
    Refusal(
        "a parameter's name has a dash",
        put("versions/1/architecture/parameters/hidden-size", 1),
        "spec.versions[1].architecture.parameters",
        "in each key write the name of a parameter",
    ),
    Refusal(
        "a parameter of a known network is in snake_case",
        put("versions/0/architecture/parameters/num_classes", 10),
        f"{V}.architecture.parameters",
        "are in camelCase",
        False,
    ),
    Refusal(
        "a network that may transform its input, and not said whether it does",
        put("versions/0/architecture", {"name": "torchvision:googlenet", "parameters": {"numClasses": 10}}),
        f"{V}.architecture.parameters",
        'needs parameters.transformInput, since the checkpoint does not say it and every answer depends on it: "true" if',
        False,
    ),
    Refusal(
        "an architecture has neither name nor entryPoint",
        drop("versions/0/architecture/name"),
        f"{V}.architecture",
        "give either name",
        False,
    ),
    Refusal(
        "an architecture has name and entryPoint",
        put("versions/1/architecture/name", "lenet5"),
        "spec.versions[1].architecture",
        "give either name",
        False,
    ),
    Refusal(
        "an entryPoint has no source",
        drop("versions/1/architecture/source"),
        "spec.versions[1].architecture.source",
        "go together",
        False,
    ),
    Refusal(
        "a known network has a source",
        put("versions/0/architecture/source", {"uri": "s3://code/nets.zip", "sha256": "0" * 64}),
        f"{V}.architecture.source",
        "go together",
        False,
    ),
    Refusal(
        "an entryPoint is a path",
        put("versions/1/architecture/entryPoint", "nets/model.py"),
        "spec.versions[1].architecture.entryPoint",
        "such as nets.model:build",
    ),
    Refusal(
        "a source comes by http",
        put("versions/1/architecture/source/uri", "https://pypi.example/nets.whl"),
        "spec.versions[1].architecture.source.uri",
        "write s3://",
    ),
    Refusal(
        "a source has no sha256",
        drop("versions/1/architecture/source/sha256"),
        "spec.versions[1].architecture.source.sha256",
        "Required value",
    ),
    Refusal(
        "a target is one that Triton does not have",
        put("versions/0/conversion/target", "CoreML"),
        f"{V}.conversion.target",
        'supported values: "ONNX", "TensorRT"',
    ),
    Refusal(
        "a plan is to be built by nothing",
        both(PLAN, drop("builder/tensorrtImage")),
        "spec.builder",
        "set builder.tensorrtImage",
        False,
    ),
    Refusal(
        "a plan is to be built on no GPU",
        both(PLAN, both(NO_GPU, NO_CLAIMS)),
        "spec.builder",
        "builder.resources.limits to {nvidia.com/gpu: 1}",
        False,
    ),
    Refusal(
        "a plan is to be served by whatever the chart names",
        both(PLAN, drop("runtime/image")),
        "spec.runtime",
        "set runtime.image, runtime.tensorrtVersion",
        False,
    ),
    Refusal(
        "nobody says which TensorRT serves a plan",
        both(PLAN, drop("runtime/tensorrtVersion")),
        "spec.runtime",
        "set runtime.image, runtime.tensorrtVersion",
        False,
    ),
    Refusal(
        "a TensorRT version is half a version",
        put("runtime/tensorrtVersion", "10.13"),
        "spec.runtime.tensorrtVersion",
        "such as 10.13.3.9",
    ),
    Refusal(
        "a plan is accelerated",
        both(PLAN, put("versions/0/triton/accelerator", "TensorRT")),
        f"{V}.triton.accelerator",
        "a TensorRT plan needs none",
        False,
    ),
    Refusal(
        "a plan is to run on a CPU",
        both(PLAN, put("versions/0/triton/instanceKind", "CPU")),
        f"{V}.triton.instanceKind",
        "conversion.target TensorRT runs on a GPU alone",
        False,
    ),
    Refusal(
        "a plan has inputs of any size",
        both(PLAN, put("versions/0/inputs/0/shape", [1, -1, 28])),
        f"{V}.inputs",
        "give each dimension of the inputs a size",
        False,
    ),
    Refusal(
        "a precision is one that no backend has",
        put("versions/0/conversion/precision", "INT4"),
        f"{V}.conversion.precision",
        'supported values: "FP32", "FP16", "INT8"',
    ),
    Refusal(
        "INT8 has nothing to be calibrated by",
        both(put("versions/0/conversion/precision", "INT8"), drop("versions/0/conversion/calibration")),
        f"{V}.conversion.calibration",
        "give both, since INT8 chooses",
        False,
    ),
    Refusal(
        "a calibration set is given and nothing is calibrated",
        put("versions/0/conversion/precision", "FP16"),
        f"{V}.conversion.calibration",
        "or remove calibration",
        False,
    ),
    Refusal(
        "a calibration set has no sha256",
        drop("versions/0/conversion/calibration/sha256"),
        f"{V}.conversion.calibration.sha256",
        "Required value",
    ),
    Refusal(
        "more samples than all should agree",
        put("versions/0/verification/parity/minimumTop1Agreement", "1.5"),
        f"{V}.verification.parity.minimumTop1Agreement",
        "a share from 0 to 1",
    ),
    Refusal(
        "a cosine that no two vectors have",
        put("versions/0/verification/parity/minimumCosine", "1.5"),
        f"{V}.verification.parity.minimumCosine",
        "a share from 0 to 1",
    ),
    Refusal(
        "an accelerator has no GPU to run on",
        both(NO_GPU, NO_CLAIMS),
        "spec.runtime",
        "or remove the accelerator",
        False,
    ),
    Refusal(
        "an accelerator's instances are on the CPU",
        put("versions/0/triton/instanceKind", "CPU"),
        f"{V}.triton.instanceKind",
        "or remove the accelerator",
        False,
    ),
    Refusal(
        "an accelerator is one that runs on CPUs",
        put("versions/0/triton/accelerator", "OpenVINO"),
        f"{V}.triton.accelerator",
        'supported values: "TensorRT"',
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
        put("versions/0/inputs/0/dataType", "BYTES"),
        f"{V}.inputs[0].dataType",
        'supported values: "FP32", "FP16", "INT64"',
    ),
    Refusal(
        "a tensor's name has a space",
        put("versions/0/inputs/0/name", "the image"),
        f"{V}.inputs[0].name",
        "write a tensor's name",
    ),
    Refusal(
        "a model has 17 inputs",
        put("versions/0/inputs", [{"name": f"t{number}", "dataType": "FP32", "shape": [1]} for number in range(17)]),
        f"{V}.inputs",
        "at most 16 items",
    ),
    Refusal(
        "two inputs have one name",
        lambda s: s["versions"][0]["inputs"].append({"name": "image", "dataType": "FP32", "shape": [1]}),
        f"{V}.inputs[1]",
        "Duplicate value",
        False,
    ),
    Refusal(
        "an output has the name of an input",
        put("versions/0/outputs/0/name", "image"),
        f"{V}.outputs",
        "give each tensor a name of its own",
        False,
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
        "an accuracy has no limit",
        put("versions/0/verification/accuracy", {"dataset": {"uri": "s3://data/test.npz", "sha256": "d" * 64}}),
        f"{V}.verification.accuracy",
        "give minimum, maximumDrop or maximumDropFromStable",
        False,
    ),
    Refusal(
        "an accuracy has no data set",
        drop("versions/0/verification/accuracy/dataset"),
        f"{V}.verification.accuracy.dataset",
        "Required value",
    ),
    Refusal(
        "an accuracy is a percentage",
        put("versions/0/verification/accuracy/minimum", "95"),
        f"{V}.verification.accuracy.minimum",
        "a share from 0 to 1",
    ),
    Refusal(
        "an allowed drop is negative",
        put("versions/0/verification/accuracy/maximumDrop", "-0.01"),
        f"{V}.verification.accuracy.maximumDrop",
        "a share from 0 to 1",
    ),
    Refusal(
        "accuracy is asked of a network that gives no classes",
        put("versions/0/outputs/0/shape", [10, 7, 7]),
        f"{V}.verification.accuracy",
        "give the first output the shape [classes]",
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
        "levels of priority have no default",
        drop("versions/0/triton/dynamicBatching/defaultPriorityLevel"),
        f"{V}.triton.dynamicBatching.priorityLevels",
        "give both, or neither",
        False,
    ),
    Refusal(
        "the default priority is no level",
        put("versions/0/triton/dynamicBatching/defaultPriorityLevel", 3),
        f"{V}.triton.dynamicBatching.defaultPriorityLevel",
        "lower it",
        False,
    ),
    Refusal(
        "a queue ends in a way that Triton does not know",
        put("versions/0/triton/dynamicBatching/defaultQueuePolicy/timeoutAction", "Drop"),
        f"{V}.triton.dynamicBatching.defaultQueuePolicy.timeoutAction",
        '"Reject", "Delay"',
    ),
    Refusal(
        "a queue has no room",
        put("versions/0/triton/dynamicBatching/defaultQueuePolicy/maxQueueSize", 0),
        f"{V}.triton.dynamicBatching.defaultQueuePolicy.maxQueueSize",
        "greater than or equal to 1",
    ),
    Refusal(
        "instances run on what is not there",
        put("versions/0/triton/instanceKind", "TPU"),
        f"{V}.triton.instanceKind",
        '"AUTO", "CPU", "GPU"',
    ),
    Refusal(
        "a class has no label",
        lambda s: s["versions"][0]["triton"]["labels"].pop(),
        f"{V}.triton.labels",
        "give as many as its shape says",
        False,
    ),
    Refusal(
        "a label has two lines",
        put("versions/0/triton/labels/3", "cat\ndog"),
        f"{V}.triton.labels[3]",
        "on one line",
        False,
    ),
    Refusal("a label is empty", put("versions/0/triton/labels/3", ""), f"{V}.triton.labels[3]", "at least 1 chars"),
    Refusal(
        "there are more than 1000 labels",
        put("versions/0/triton/labels", [str(n) for n in range(1001)]),
        f"{V}.triton.labels",
        "at most 1000 items",
    ),
    Refusal(
        "overrides begin with what is Perch's own",
        put("versions/0/triton/configOverrides", '\n backend: "python"'),
        f"{V}.triton.configOverrides",
        "remove them",
        False,
    ),
    Refusal(
        "overrides are a book",
        put("versions/0/triton/configOverrides", "#" * 4097),
        f"{V}.triton.configOverrides",
        "may not be more than 4096",
    ),
    # --- pictures in, labels out ---
    Refusal(
        "labels are answered to tensors",
        drop("versions/0/preprocessing"),
        f"{V}.postprocessing",
        "add preprocessing, or remove",
        False,
    ),
    Refusal(
        "there are fewer classes than are asked for",
        put("versions/0/postprocessing/topK", 11),
        f"{V}.postprocessing",
        "a topK of at most its classes",
        False,
    ),
    Refusal(
        "an output is no row of classes",
        both(put("versions/0/outputs/0/shape", [10, 1]), drop("versions/0/triton/labels")),
        f"{V}.postprocessing",
        "one output of FP32 and shape [classes]",
        False,
    ),
    Refusal(
        "pictures are made for a network that takes whole numbers",
        put("versions/0/inputs/0/dataType", "UINT8"),
        f"{V}.preprocessing",
        "one tensor of FP32",
        False,
    ),
    Refusal(
        "whole numbers are ranked",
        put("versions/0/outputs/0/dataType", "INT64"),
        f"{V}.postprocessing",
        "one output of FP32",
        False,
    ),
    Refusal(
        "colours do not fit the input's channels",
        both(
            put("versions/0/preprocessing/decode", "RGB"),
            drop("versions/0/preprocessing/mean"),
            drop("versions/0/preprocessing/std"),
        ),
        f"{V}.preprocessing",
        "set decode and layout",
        False,
    ),
    Refusal(
        "the layout does not fit the input's shape",
        put("versions/0/preprocessing/layout", "HWC"),
        f"{V}.preprocessing",
        "set decode and layout",
        False,
    ),
    Refusal(
        "pictures become a tensor of two dimensions",
        put("versions/0/inputs/0/shape", [28, 28]),
        f"{V}.preprocessing",
        "set decode and layout",
        False,
    ),
    Refusal(
        "the crop is not the input's size",
        put("versions/0/preprocessing/centerCrop", [28, 27]),
        f"{V}.preprocessing",
        "give the input's shape these sizes",
        False,
    ),
    Refusal(
        "a square crop is not the input's size",
        put("versions/0/preprocessing/centerCrop", [27]),
        f"{V}.preprocessing",
        "give the input's shape these sizes",
        False,
    ),
    Refusal(
        "pictures are resized to another size than the input's",
        both(drop("versions/0/preprocessing/centerCrop"), put("versions/0/preprocessing/resize", [28, 32])),
        f"{V}.preprocessing",
        "give the input's shape these sizes",
        False,
    ),
    Refusal(
        "pictures of any size go to a network of any size",
        both(
            drop("versions/0/preprocessing/centerCrop"),
            drop("versions/0/preprocessing/resize"),
            put("versions/0/inputs/0/shape", [1, -1, -1]),
        ),
        f"{V}.preprocessing",
        "give the input's shape these sizes",
        False,
    ),
    Refusal(
        "pictures are left as long as they are",
        drop("versions/0/preprocessing/centerCrop"),
        f"{V}.preprocessing.centerCrop",
        "add centerCrop",
        False,
    ),
    Refusal("a mean has no std", drop("versions/0/preprocessing/std"), f"{V}.preprocessing.mean", "give both", False),
    Refusal(
        "grey has three means",
        put("versions/0/preprocessing/mean", ["0", "0", "0"]),
        f"{V}.preprocessing.mean",
        "three for RGB, one for L",
        False,
    ),
    Refusal(
        "grey has three stds",
        put("versions/0/preprocessing/std", ["1", "1", "1"]),
        f"{V}.preprocessing.std",
        "three for RGB, one for L",
        False,
    ),
    Refusal(
        "pixels are divided by 0",
        put("versions/0/preprocessing/std", ["0.0"]),
        f"{V}.preprocessing.std[0]",
        "give a number above 0",
        False,
    ),
    Refusal("a mean is a number", put("versions/0/preprocessing/mean", [0.5]), f"{V}.preprocessing.mean[0]", "type string"),
    Refusal(
        "pictures are weighed in a way that is not known",
        put("versions/0/preprocessing/interpolation", "Lanczos"),
        f"{V}.preprocessing.interpolation",
        '"Bilinear", "Bicubic"',
    ),
    Refusal(
        "a response cache has no room",
        put("runtime/responseCacheMebibytes", 0),
        "spec.runtime.responseCacheMebibytes",
        "greater than or equal to 1",
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
    *(
        Refusal(sentence, both(gpu("nvidia.com~gpu", count), change), field, says, False)
        for sentence, count, change, field, says in (
            ("an accelerator has 0 GPUs", 0, both(), "spec.runtime", "or remove the accelerator"),
            ("an accelerator has 0 GPUs in quotes", "0", both(), "spec.runtime", "or remove the accelerator"),
            ("a plan is to be built on 0 GPUs", 0, PLAN, "spec.builder", "or what a share of a GPU is called there"),
            ("a plan is to run on 0 GPUs", 0, PLAN, "spec.runtime", "set runtime.image, runtime.tensorrtVersion"),
        )
    ),
    *(
        Refusal(
            f"resources of runtime {sentence}",
            put(f"runtime/resources/{path}", value),
            "spec.runtime.resources" + at,
            says,
            False,
        )
        for sentence, path, value, at, says in (
            ("limit memory to 8 bytes", "limits/memory", 8, ".limits", "write them with their unit, such as 8Gi"),
            ("limit memory to milli-bytes", "limits/memory", "8192m", ".limits", "write them with their unit, such as 8Gi"),
            ("limit memory to nothing", "limits/memory", 0, ".limits", "write them with their unit, such as 8Gi"),
            ("ask for a disk of 10 bytes", "requests/ephemeral-storage", "10", ".requests", "with their unit, such as 8Gi"),
            ("limit CPU to nothing", "limits/cpu", 0, ".limits", "cpu is a number of cores"),
            ("ask for no CPU", "requests/cpu", "0m", ".requests", "cpu is a number of cores"),
            ("ask for gibi-cores", "requests/cpu", "8Gi", ".requests", "cpu is a number of cores"),
            ("have huge pages of no size", "limits/hugepages-", "1Gi", ".limits", "given by their size, and in whole pages"),
            ("have huge pages of words", "limits/hugepages-big", "1Gi", ".limits", "given by their size, and in whole pages"),
            ("have half a huge page", "limits/hugepages-2Mi", "3Mi", ".limits", "given by their size, and in whole pages"),
            ("have a device of Kubernetes' own", "limits/kubernetes.io~gpu", 1, ".limits", "no device has such a name"),
            ("have a quota's device", "limits/requests.nvidia.com~gpu", 1, ".limits", "no device has such a name"),
            ("have a device of a long domain", f"limits/{'a.' * 123}b~gpu", 1, ".limits", "no device has such a name"),
            ("have a billion devices", "limits/x.com~y", 10**9, ".limits", "counted in whole devices"),
        )
    ),
    Refusal(
        "huge pages are limited and not asked for alike",
        both(put("runtime/resources/limits/hugepages-2Mi", "4Mi"), put("runtime/resources/requests/hugepages-2Mi", "2Mi")),
        "spec.runtime.resources",
        "must have a limit equal to the request",
        False,
    ),
    Refusal(
        "there are huge pages and neither cpu nor memory",
        both(put("runtime/resources/limits", {"hugepages-2Mi": "4Mi", "nvidia.com/gpu": 1}), drop("runtime/resources/requests")),
        "spec.runtime.resources.limits",
        "huge pages come with cpu or memory",
        False,
    ),
    Refusal(
        "CPU use is measured against a limit of nothing",
        scaled(both(drop("runtime/resources/requests/cpu"), put("runtime/resources/limits/cpu", "0"))),
        "spec.runtime.resources.limits",
        "cpu is a number of cores",
        False,
    ),
    Refusal(
        "a cache is larger than memory",
        put("runtime/responseCacheMebibytes", 8192),
        "spec.runtime.responseCacheMebibytes",
        "raise the limit",
        False,
    ),
    Refusal(
        "an export asks for more memory than the default limit",
        put("builder/resources", {"requests": {"memory": "16Gi"}}),
        "spec.builder.resources",
        "which is 8Gi if omitted",
        False,
    ),
    # --- labels, claims, spreading ---
    *(
        Refusal(f"{part} {sentence}", put(f"{part}/labels", {key: "x"}), f"spec.{part}.labels", says, by_types)
        for part in ("runtime", "builder")
        for sentence, key, says, by_types in (
            ("sets a label of Perch's", "serving.perch.dev/version", "choose a key of another domain", False),
            ("sets the label of the owner", "app.kubernetes.io/managed-by", "choose a key of another domain", False),
            ("sets a label of Jobs", "batch.kubernetes.io/job-name", "choose a key of another domain", False),
            ("sets the hash of a pod template", "pod-template-hash", "choose a key of another domain", False),
            ("has a label of two slashes", "a/b/c", "write [domain/]name", True),
            ("has a label of a long domain", f"{'a.' * 128}b/c", "at most 253 characters", False),
        )
    ),
    *(
        Refusal(f"{part} {sentence}", put(f"{part}/{path}", value), f"spec.{part}.{at}", says, by_types)
        for part in ("runtime", "builder")
        for sentence, path, value, at, says, by_types in (
            (
                "has a priority of no name",
                "priorityClassName",
                "High Priority",
                "priorityClassName",
                "name of a Kubernetes",
                True,
            ),
            (
                "uses a claim that is not there",
                "resources/claims/0/name",
                "other",
                "resourceClaims",
                "give both the same names",
                False,
            ),
            (
                "has a claim that is not used",
                "resources/claims",
                [{"name": "gpu"}],
                "resourceClaims",
                "give both the same names",
                False,
            ),
            (
                "has claims without a use",
                "resources",
                {"limits": {"nvidia.com/gpu": 1}},
                "resourceClaims",
                "or remove both",
                False,
            ),
            (
                "has a claim from two places",
                "resourceClaims/0/resourceClaimName",
                "mine",
                "resourceClaims[0]",
                "give resourceClaimTemplateName",
                False,
            ),
            ("has a claim from nowhere", "resourceClaims/0", {"name": "gpu"}, "resourceClaims[0]", "where all share", False),
            ("has a claim twice", "resourceClaims/1/name", "gpu", "resourceClaims[1]", "Duplicate value", False),
        )
    ),
    *(
        Refusal(
            f"pods are spread {sentence}",
            put(f"runtime/topologySpreadConstraints/{path}", value),
            f"{SPREAD}{at}",
            says,
            by_types,
        )
        for sentence, path, value, at, says, by_types in (
            ("by no skew", "0/maxSkew", 0, "[0].maxSkew", "greater than or equal to 1", True),
            ("over no domains", "0/minDomains", 0, "[0].minDomains", "greater than or equal to 1", True),
            ("over domains that do not matter", "1/minDomains", 2, "[1].minDomains", "set DoNotSchedule", False),
            ("in a way that is not known", "0/whenUnsatisfiable", "Evict", "[0].whenUnsatisfiable", '"ScheduleAnyway"', True),
            (
                "twice alike",
                "1",
                {"topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule", "maxSkew": 2},
                "[1]",
                "Duplicate value",
                False,
            ),
        )
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
        "an address is no range",
        put("builder/networkPolicy/allow/0/cidr", "10.20.0.7"),
        "spec.builder.networkPolicy.allow[0].cidr",
        "such as 10.20.0.7/32",
        False,
    ),
    Refusal(
        "a range and a namespace are one entry",
        put("builder/networkPolicy/allow/0/namespace", "storage"),
        "spec.builder.networkPolicy.allow[0]",
        "give one of both",
        False,
    ),
    Refusal(
        "nothing in particular is allowed",
        put("builder/networkPolicy/allow/0", {}),
        "spec.builder.networkPolicy.allow[0]",
        "give one of both",
        False,
    ),
    Refusal(
        "an export has no time",
        put("builder/activeDeadlineSeconds", 1),
        "spec.builder.activeDeadlineSeconds",
        "greater than or equal to 60",
    ),
    # --- found by make fuzz, and of the kinds that it found ---
    *(
        Refusal(f"{sentence}", put(path, url), field_of(path), says, False)
        for sentence, path, url, says in (
            ("the repository is the pod itself", "repository/endpoint", "http://localhost:9000", "the pod that asks"),
            ("a checkpoint is in the pod itself", "versions/0/checkpoint/endpoint", "http://127.0.0.1:9000", "the pod that asks"),
            ("a server has no address", "repository/endpoint", "http://0.0.0.0:9000", "the pod that asks"),
            ("an address has too great a number", "repository/endpoint", "http://10.0.0.256", "numbers from 0 to 255"),
            ("an address has three numbers", "versions/0/checkpoint/endpoint", "http://10.0.1", "of four numbers"),
            (
                "the operator asks itself",
                "rollout/analysis/prometheus/address",
                "http://LocalHost:9090",
                "the pod that asks",
            ),
            (
                "the operator asks the cloud for credentials",
                "rollout/analysis/prometheus/address",
                "http://169.254.169.254/latest",
                "the cloud's metadata service",
            ),
            (
                "the store is the cloud's metadata service",
                "repository/endpoint",
                "http://metadata.google.internal",
                "the cloud's metadata service",
            ),
        )
    ),
    *(
        Refusal(f"{sentence} is an empty file", put(f"{path}/sha256", EMPTY_FILE), f"{field_of(path)}.sha256", "upload", False)
        for sentence, path in (
            ("a checkpoint", "versions/0/checkpoint"),
            ("a source", "versions/1/architecture/source"),
            ("a data set", "versions/0/verification/accuracy/dataset"),
        )
    ),
    *(
        Refusal(f"the checkpoint is {sentence}", checkpoint_is(path), "spec.versions[1].checkpoint.uri", "its own object", False)
        for sentence, path in (
            ("its own source", "architecture/source/uri"),
            ("its own calibration set", "conversion/calibration/uri"),
            ("its own samples", "verification/parity/samples/uri"),
            ("its own data set", "verification/accuracy/dataset/uri"),
        )
    ),
    *(
        Refusal(
            f"a detection model is judged by {gate}",
            of_a_detector(put(f"versions/0/verification/parity/{gate}", "0.9")),
            PARITY,
            "detections are judged one by one",
            False,
        )
        for gate in ("minimumTop1Agreement", "minimumCosine")
    ),
    Refusal(
        "whole numbers have a cosine",
        both(put("versions/0/outputs/0/dataType", "INT64"), drop("versions/0/postprocessing")),
        PARITY,
        "remove minimumCosine",
        False,
    ),
    Refusal(
        "one number has a cosine",
        both(
            put("versions/0/outputs/0/shape", [1]),
            put("versions/0/triton/labels", ["digit"]),
            put("versions/0/postprocessing/topK", 1),
        ),
        PARITY,
        "remove minimumCosine",
        False,
    ),
    Refusal(
        "a map of features has a first class",
        both(
            put("versions/0/outputs/0/shape", [10, 7, 7]),
            drop("versions/0/verification/accuracy"),
            drop("versions/0/postprocessing"),
            drop("versions/0/triton/labels"),
        ),
        PARITY,
        "remove minimumTop1Agreement",
        False,
    ),
    Refusal(
        "the only class is always right",
        both(
            put("versions/0/outputs/0/shape", [1]),
            put("versions/0/triton/labels", ["digit"]),
            put("versions/0/postprocessing/topK", 1),
        ),
        f"{V}.verification.accuracy",
        "give the first output more classes",
        False,
    ),
    Refusal(
        "a batch takes 12 GiB",
        both(
            NO_ACCELERATOR,
            drop("versions/0/preprocessing"),
            drop("versions/0/postprocessing"),
            put("versions/0/inputs/0/shape", [3, 512, 512]),
            put("versions/0/triton/maxBatchSize", 4096),
        ),
        f"{V}.inputs",
        "lower triton.maxBatchSize",
        False,
    ),
    Refusal(
        "a batch of the usual size is too large",
        both(
            drop("versions/1/preprocessing"),
            drop("versions/1/postprocessing"),
            put("versions/1/inputs/0/shape", [1, 8192, 8192]),
            put("versions/1/triton/maxBatchSize", 32),
        ),
        "spec.versions[1].inputs",
        "more than 4 GiB",
        False,
    ),
    *(
        Refusal(f"a label has {sentence}", put("versions/0/triton/labels/3", label), f"{TRITON}.labels[3]", says, False)
        for sentence, label, says in (
            ("a tab", "cat\tdog", "without tabs"),
            ("a carriage return", "cat\r", "without tabs"),
            ("an escape", "\x1b[31mcat", "without tabs"),
            ("a control of the second kind", "cat\x87", "without tabs"),
            ("128 letters of three bytes", "\u732b" * 128, "at most 128 bytes"),
        )
    ),
    Refusal(
        "a crop is larger than the picture",
        both(put("versions/0/preprocessing/resize", [16]), put("versions/0/preprocessing/centerCrop", [28])),
        f"{V}.preprocessing.centerCrop",
        "lower it, or raise resize",
        False,
    ),
    Refusal(
        "a crop is wider than the picture",
        put("versions/0/preprocessing/resize", [32, 24]),
        f"{V}.preprocessing.centerCrop",
        "lower it, or raise resize",
        False,
    ),
    Refusal(
        "pixels are weighed for no resize",
        drop("versions/0/preprocessing/resize"),
        f"{V}.preprocessing.interpolation",
        "add resize, or remove interpolation",
        False,
    ),
    *(
        Refusal(f"a queue {sentence}", change, field, says, False)
        for sentence, change, field, says in (
            (
                "rejects what is late, and nothing is ever late",
                put("versions/0/triton/dynamicBatching/defaultQueuePolicy", {"timeoutAction": "Reject"}),
                f"{QUEUE}.timeoutAction",
                "add defaultTimeoutMicroseconds, or remove timeoutAction",
            ),
            (
                "lets requests shorten no time",
                put("versions/0/triton/dynamicBatching/defaultQueuePolicy", {"allowTimeoutOverride": True}),
                f"{QUEUE}.allowTimeoutOverride",
                "add defaultTimeoutMicroseconds, or remove allowTimeoutOverride",
            ),
            (
                "rejects before a batch is full",
                put("versions/0/triton/dynamicBatching/maxQueueDelayMicroseconds", 1000),
                QUEUE,
                "raise defaultTimeoutMicroseconds",
            ),
            (
                "is smaller than a batch",
                put("versions/0/triton/dynamicBatching/defaultQueuePolicy/maxQueueSize", 15),
                QUEUE,
                "raise maxQueueSize",
            ),
        )
    ),
    *(
        Refusal(f"overrides {sentence}", overridden(text), OVERRIDES, says, False)
        for sentence, text, says in (
            ("leave a bracket open", 'parameters { key: "a" value { string_value: "2" }', "close each bracket"),
            ("close what is not open", "optimization { cuda { graphs: true } } }", "close each bracket"),
            ("leave a text open", 'parameters { key: "a }', "close each bracket"),
            ("are assignments", "parameters = { }", "write protobuf text"),
            ("are code", "optimization { graphs(true) }", "write protobuf text"),
            ("go on with a field of Perch's", 'parameters { } backend: "python"', "of these fields alone"),
            ("go on with another field", "parameters { } model_warmup [{ batch_size: 1 }]", "of these fields alone"),
            ("end in words", "parameters { } and so on", "of these fields alone"),
            ("are JSON", 'parameters {"key": "a"}', "protobuf text is no JSON"),
            ("are a number", "parameters: 1", "write protobuf text"),
            (
                "bring an accelerator that nobody proves",
                'optimization { execution_accelerators { gpu_execution_accelerator: [{ name: "tensorrt" }] } }',
                "use triton.accelerator",
            ),
        )
    ),
    Refusal(
        "a number of instances is given twice",
        put("versions/0/triton/configOverrides", "instance_group [{ count: 2 }]"),
        OVERRIDES,
        "takes the place of instanceCount and instanceKind",
        False,
    ),
    Refusal(
        "instances are on a GPU that there is not",
        both(NO_GPU, NO_CLAIMS, NO_ACCELERATOR, drop("versions/1/triton/accelerator")),
        "spec.runtime",
        "or remove triton.instanceKind: GPU",
        False,
    ),
    Refusal(
        "overrides are for a GPU that there is not",
        both(
            both(NO_GPU, NO_CLAIMS, drop("versions/1/triton/accelerator"), put("versions/1/triton/instanceKind", "AUTO")),
            overridden("instance_group [{ kind: KIND_GPU }]"),
        ),
        "spec.runtime",
        "instances on a GPU need one",
        False,
    ),
    Refusal(
        "requests are told apart by Perch's own header",
        rules_of([("X-Perch-Rehearsal", "a", "Exact")]),
        "spec.traffic.match.headers[0].name",
        "match a header of your own",
        False,
    ),
    *(
        Refusal(f"{sentence} for years", put(f"rollout/{path}", "99999h"), field_of(f"rollout/{path}"), says, False)
        for sentence, path, says in (
            ("a weight is held", "steps/0/hold", "give less, or hold: Indefinite"),
            ("pods of a former version stay", "scaleDownDelay", "give 720h at most"),
            ("pods of an aborted canary stay", "inspectFor", "give 720h at most"),
        )
    ),
    *(
        Refusal(f"a time is {day}", put("rollout/retryAt", f"2026-{day}T00:00:00Z"), "spec.rollout.retryAt", "no such day", False)
        for day in ("02-30", "04-31")
    ),
    Refusal(
        "a canary is promoted before its first count",
        put("rollout/analysis/prometheus/scrapeInterval", "90s"),
        "spec.rollout.steps",
        "hold each step for longer",
        False,
    ),
    Refusal(
        "a canary is promoted before its first count of the usual interval",
        both(drop("rollout/analysis/prometheus/scrapeInterval"), put("rollout/steps/0/hold", "1m")),
        "spec.rollout.steps",
        "hold each step for longer",
        False,
    ),
    Refusal(
        "each request is a failed one",
        lambda s: s["rollout"]["analysis"]["prometheus"].update(failures=s["rollout"]["analysis"]["prometheus"]["requests"]),
        f"{PROMETHEUS}.failures",
        "give each its own",
        False,
    ),
    Refusal(
        "a metric asks for nothing",
        put("rollout/analysis/prometheus/metrics/0/query", " "),
        f"{PROMETHEUS}.metrics[0].query",
        "write PromQL",
        False,
    ),
    Refusal(
        "Triton has a mebibyte",
        both(drop("runtime/resources/requests/memory"), put("runtime/resources/limits/memory", "1Mi")),
        "spec.runtime.resources.limits",
        "raise the limit",
        False,
    ),
    Refusal(
        "an export has a few mebibytes",
        both(drop("builder/resources/requests/memory"), put("builder/resources/limits/memory", "64Mi")),
        "spec.builder.resources.limits",
        "PyTorch does not start",
        False,
    ),
    *(
        Refusal(
            f"{part} asks for an exabyte of {resource}",
            put(f"{part}/resources/limits/{resource}", "1E"),
            f"spec.{part}.resources.limits",
            "no node has more",
            False,
        )
        for part, resource in (("runtime", "memory"), ("builder", "ephemeral-storage"))
    ),
    Refusal(
        "Triton has a thousandth of a core",
        both(drop("runtime/resources/requests/cpu"), put("runtime/resources/limits/cpu", "1m")),
        "spec.runtime.resources.limits",
        "does not start in time",
        False,
    ),
    Refusal(
        "shared memory is larger than all memory",
        put("runtime/sharedMemorySize", "9Gi"),
        "spec.runtime.sharedMemorySize",
        "lower sharedMemorySize, or raise the limit",
        False,
    ),
    Refusal(
        "temporary files take more than all files",
        put("runtime/resources/limits/ephemeral-storage", "1Gi"),
        "spec.runtime.temporaryStorageSize",
        "lower temporaryStorageSize, or raise the limit",
        False,
    ),
    Refusal(
        "a variable has no value",
        drop("runtime/env/0/value"),
        "spec.runtime.env[0].value",
        "give value or valueFrom",
        False,
    ),
    Refusal(
        "a variable holds the character 0",
        put("runtime/env/0/value", "a\x00b"),
        "spec.runtime.env[0].value",
        "the character 0: remove it",
        False,
    ),
    Refusal(
        "vectors may point anywhere",
        put("versions/0/verification/parity/minimumCosine", "0.0"),
        PARITY,
        "give one above 0",
        False,
    ),
    Refusal(
        "pods are to be near no pod",
        drop(f"{PODS}/labelSelector"),
        f"{field_of(PODS)}.labelSelector",
        "{} means every pod",
        False,
    ),
    *(
        Refusal(f"{sentence} has a domain that none is", change, field_of(path), "at most 253 characters", False)
        for sentence, change, path in (
            ("a taint", put("builder/tolerations/0/key", LONG_DOMAIN), "builder/tolerations/0/key"),
            ("a place of pods", put(f"{PODS}/topologyKey", LONG_DOMAIN), f"{PODS}/topologyKey"),
            ("a label of nodes", put(f"{NODES}/matchExpressions/0/key", LONG_DOMAIN), f"{NODES}/matchExpressions/0/key"),
            (
                "a label of pods",
                put(f"{PODS}/labelSelector/matchLabels", {LONG_DOMAIN: "a"}),
                f"{PODS}/labelSelector/matchLabels",
            ),
        )
    ),
    *(
        Refusal(
            f"a policy allows {address}",
            put("builder/networkPolicy/allow", [{"cidr": address}]),
            "spec.builder.networkPolicy.allow[0].cidr",
            "metadata service",
            False,
        )
        for address in ("100.100.100.200/32", "168.63.129.16/32", "169.254.170.0/24")
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
    Refusal("a parameter is changed in place", put("versions/0/architecture/parameters/numClasses", 11), V, "add an entry"),
    Refusal(
        "a text parameter is changed in place",
        put("versions/1/architecture/parameters/dropout", "0.6"),
        "spec.versions[1]",
        "add an entry",
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
    ("an ONNX file is added", lambda s: s["versions"].append(onnx_entry(3))),
    ("a detection model is added", lambda s: s["versions"].append(detector_entry(3))),
    ("an entry out of traffic is removed", both(NO_CANARY, lambda s: s["versions"].pop(1))),
    ("entries are put in another order", lambda s: s["versions"].reverse()),
    ("the canary is promoted", both(NO_CANARY, put("traffic/stable", 2))),
    ("stable and canary change places", put("traffic", {"stable": 2, "canary": 1})),
    ("a step's weight changes", put("rollout/steps/0/weight", 10)),
    ("the canary gets everything", put("rollout/steps", [{"weight": 100}])),
    ("the split is fixed", put("rollout/steps", [{"weight": 10, "hold": "Indefinite"}])),
    ("the last of the steps is a fixed split", put("rollout/steps/2", {"weight": 80, "hold": "Indefinite"})),
    ("a step moves on at once", both(put("rollout/steps/0/hold", "0s"), put("rollout/analysis/onInconclusive", "Pause"))),
    ("the rollout goes on", put("rollout/paused", False)),
    ("an aborted canary is tried again", put("rollout/retryAt", "2026-02-01T08:30:00.5+01:00")),
    ("the canary is judged by the defaults", both(drop("rollout/analysis"), drop("traffic/match"))),
    (
        "testers come first",
        both(NO_PROMETHEUS, drop("traffic/mirror"), put("rollout/steps", [{"weight": 0, "hold": "Indefinite"}])),
    ),
    ("copies come first", both(NO_PROMETHEUS, drop("traffic/match"), put("rollout/steps/0/weight", 0))),
    ("two headers are matched", rules_of([("x-canary", "a b", "Exact"), ("X-Team", "vision", "Exact")])),
    (
        "the analysis is as strict as can be",
        both(
            drop("traffic/match"),
            put(
                "rollout/analysis", {"alpha": "1e-9", "toleratedOdds": "1", "maxErrorRate": "0.000001", "maxLatencyRatio": "1.01"}
            ),
        ),
    ),
    (
        "the analysis is as lax as can be",
        both(
            drop("traffic/match"),
            put("rollout/analysis", {"alpha": "0.5", "toleratedOdds": "100", "maxErrorRate": "0.2", "maxLatencyRatio": "1000"}),
        ),
    ),
    (
        "only metrics come from Prometheus",
        both(
            *(drop(f"rollout/analysis/prometheus/{field}") for field in ("requests", "failures", "scrapeInterval")),
            drop("traffic/match"),
        ),
    ),
    ("a metric may be one value only", put("rollout/analysis/prometheus/metrics/1/min", "1")),
    ("the canary surges", both(put("rollout/surge", "Additional"), put("runtime/replicas", 1))),
    *(
        (f"TensorRT runs on {name}", both(gpu(name.replace("/", "~"), 1), change))
        for name in ("nvidia.com/gpu.shared", "nvidia.com/mig-1g.10gb", "nvidia.com/a100", "example.com/vgpu")
        for change in (both(),)
    ),
    ("TensorRT runs on a device that is claimed", NO_GPU),
    (
        "a version for GPUs is listed, and none is in traffic",
        both(
            both(NO_GPU, NO_CLAIMS, NO_CANARY, lambda s: s["versions"].pop(0)),
            lambda s: s["versions"].extend(
                [less_triton(entry(3), "accelerator"), less_triton(entry(4), "accelerator", "instanceKind")]
            ),
            put("traffic/stable", 4),
            lambda s: s["versions"].pop(0),
        ),
    ),
    (
        "a GPU is seen by the container runtime alone",
        both(
            both(NO_GPU, NO_CLAIMS, NO_CANARY),
            put("versions", [less_triton(entry(3), "accelerator")]),
            put("traffic/stable", 3),
            lambda s: s["runtime"]["env"].append({"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}),
        ),
    ),
    (
        "labels, priority and spreading go",
        both(drop("runtime/labels"), drop("runtime/priorityClassName"), drop(SPREAD[5:].replace(".", "/"))),
    ),
    ("an autoscaler takes over", scaled(put("routing/parentRefs/0/port", 80))),
    (
        "an autoscaler goes by CPU alone, measured against the limit",
        scaled(
            both(
                both(drop("runtime/autoscaling/podMetrics"), drop("runtime/resourceClaims")),
                put("runtime/resources", {"limits": {"cpu": 1, "nvidia.com/gpu": 1}}),
            )
        ),
    ),
    (
        "an autoscaler goes by a metric alone",
        scaled(
            both(
                both(drop("runtime/autoscaling/targetCPUUtilizationPercentage"), drop("runtime/resourceClaims")),
                put("runtime/resources", {"limits": {"nvidia.com/gpu": 1}}),
            )
        ),
    ),
    (
        "the runtime changes",
        both(put("runtime/replicas", 3), put("runtime/image", "localhost:5000/triton:1"), drop("runtime/env")),
    ),
    ("the builder changes", drop("builder")),
    ("the routing changes", put("routing/hostnames", ["other.example.com"])),
    ("the routing goes with the canary", both(NO_CANARY, drop("routing"), drop("rollout"))),
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


def largest(spec: dict[str, Any]) -> None:
    """Every list of the rollout and of the traffic at its full length, and what costs most to check at its own."""
    for version in spec["versions"]:
        tensors = [{"name": f"t{n}".ljust(127, "x"), "dataType": "INT64", "shape": [1] * 7} for n in range(32)]
        # Pictures and names of classes are for one input and one output.
        del version["preprocessing"], version["postprocessing"], version["triton"]["labels"]
        version |= {"inputs": tensors[:16], "outputs": [tensors[16] | {"shape": [10]}, *tensors[17:]]}
        del version["triton"]["accelerator"], version["verification"]["parity"]["minimumCosine"]
        del version["triton"]["instanceCount"], version["triton"]["instanceKind"]
        version["triton"]["configOverrides"] = "instance_group [{ count: 1 }]\n".ljust(4096, "#")
        version["conversion"]["target"] = "TensorRT"
        version["architecture"]["parameters"] = {f"p{n}".ljust(64, "x"): "x" * 256 for n in range(32)}
    spec["rollout"]["steps"] = [{"weight": n, "hold": "00010h00010m00010s"} for n in range(15)] + [{"weight": 100}]
    value = "(a|b)*" * 170
    rules_of([(f"x-{n}".ljust(256, "x"), value, "RegularExpression") for n in range(8)])(spec)
    query = "{{service}}+" * 170
    spec["rollout"]["analysis"]["prometheus"] |= {"requests": query, "failures": f"{query[:-1]}-"}
    spec["rollout"]["analysis"]["prometheus"]["metrics"] = [
        {"name": f"m{n}", "query": "{{stable}}+" * 186, "min": "-1e-99", "max": "1"} for n in range(8)
    ]


@pytest.mark.parametrize("change", [pytest.param(lambda _: None, id="usual"), pytest.param(largest, id="largest")])
def test_a_spec_with_every_field_and_64_versions_is_accepted_within_the_cost_budget(
    api: ApiServer, name: str, change: Change
) -> None:
    answer = create(api, name, changed(full_spec(versions=MAX_VERSIONS), change))
    assert answer.is_success, answer.text
    Spec.model_validate(answer.json()["spec"])
    # The rules about changes have costs of their own.
    answer = api.request("PUT", f"{COLLECTION}/{name}", answer.json())
    assert answer.is_success, answer.text


def test_the_full_specs_of_these_tests_leave_no_field_out() -> None:
    """Else a field could lose its bounds or its meaning unseen."""
    unset = [set(_unset_fields(Spec.model_validate(spec))) for spec in (full_spec(), autoscaled_spec())]
    assert unset == [
        {"spec.runtime.autoscaling", "spec.repository.service_account_name"},
        {"spec.runtime.replicas", "spec.rollout.surge", "spec.repository.credentials_secret_ref"},
    ]


def test_an_autoscaled_spec_is_accepted(api: ApiServer, name: str) -> None:
    answer = create(api, name, autoscaled_spec(), dryRun="All")
    assert answer.is_success, answer.text
    assert answer.json()["spec"] == autoscaled_spec()


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

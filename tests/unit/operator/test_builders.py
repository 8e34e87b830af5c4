"""What is built for the API server: routes by header and with copies, autoscalers, and what an upgrade must leave as it is."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import replace
from typing import Any

import pytest

from perch.api import HeaderMatch, Routing, Runtime, Spec, Version
from perch.builders.autoscaler import build_autoscaler, canonical
from perch.builders.jobs import build_cleanup_job, build_export_job, build_export_request
from perch.builders.route import (
    GRPC_METHODS,
    WITHOUT_TYPE,
    build_route,
    is_current,
    must_rehearse,
    read_weights,
    rest_paths,
)
from perch.builders.serving import START, build_deployment
from perch.names import artifact_revision, serving_hash
from perch.observed import Identity, RouteFacts
from perch_exporter import contract
from tests.api.test_admission import autoscaled_spec, full_spec
from tests.unit.operator.world import INSTALLATION, entry, spec

IDENTITY = Identity("vision", "digits", "uid-1", 1, "1")
ROUTING = Routing.model_validate({"parentRefs": [{"name": "gateway"}], "hostnames": ["digits.example.com"]})
TESTERS = (HeaderMatch(name="x-canary", value="yes"), HeaderMatch(name="X-Team", value="v.*", type="RegularExpression"))


def route(**more: Any) -> dict[str, Any]:
    built: dict[str, Any] = build_route(IDENTITY, ROUTING, "digits", {1: 90, 2: 10}, **{"streams": 1} | more)["spec"]
    return built


def autoscaled(**more: Any) -> Spec:
    return spec(1, runtime={"autoscaling": {"minReplicas": 2, "maxReplicas": 9, **more}})


def test_a_plain_route_is_what_it_always_was() -> None:
    """Else an upgrade of the operator rewrites every route that serves."""
    content = json.dumps(route(), sort_keys=True)
    assert hashlib.sha256(content.encode()).hexdigest() == "0db7d8c3c248e6f2f2015035395395dc268fc7b300cb3092c3391a797c5519fc"


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"headers": (2, TESTERS)}, id="headers"),
        pytest.param({"mirror": (2, 30)}, id="copies"),
        pytest.param({"headers": (2, TESTERS), "mirror": (2, 30)}, id="both"),
        pytest.param({"mirror": (2, 30), "rehearsal": True}, id="rehearsed copies"),
    ],
)
def test_weights_are_read_whatever_else_stands_in_the_route(more: dict[str, Any]) -> None:
    built = route(**more)
    for rules in (built["rules"], built["rules"][::-1]):
        assert read_weights({**built, "rules": rules}, "digits") == {1: 90, 2: 10}


def test_a_route_with_no_weights_has_none() -> None:
    by_header = route(headers=(2, TESTERS))["rules"][3:]
    assert read_weights({"rules": by_header}, "digits") == {}
    assert read_weights({}, "digits") == {}


@pytest.mark.parametrize("streams", [1, 2])
def test_streams_all_go_to_one_version_and_every_other_request_is_shared(streams: int) -> None:
    rules = route(streams=streams)["rules"]
    by_path = {match["path"]["value"]: rule for rule in rules for match in rule["matches"]}
    stream = by_path.pop("/inference.GRPCInferenceService/ModelStreamInfer")
    assert {b["name"]: b["weight"] for b in stream["backendRefs"]} == {f"digits-v{v}": 100 * (v == streams) for v in (1, 2)}
    assert {b["port"] for b in stream["backendRefs"]} == {8001}
    assert "filters" not in stream
    for rule in by_path.values():
        assert [b["weight"] for b in rule["backendRefs"]] == [90, 10]
    assert read_weights({"rules": rules}, "digits") == {1: 90, 2: 10}


def test_requests_with_the_headers_go_to_the_canary_alone_by_each_path_of_both_protocols() -> None:
    rules = route(headers=(2, TESTERS))["rules"]
    assert rules[:3] == route()["rules"]
    paths, ports = [], []
    for rule in rules[3:]:
        (backend,) = rule["backendRefs"]
        assert backend["name"] == "digits-v2"
        assert rule.get("filters", []) == ([WITHOUT_TYPE] if backend["port"] == 8000 else [])
        assert rule["timeouts"] == {"request": "0s"}
        ports.append(backend["port"])
        for match in rule["matches"]:
            paths.append(match["path"]["value"])
            assert match["headers"] == [
                {"name": "x-canary", "value": "yes", "type": "Exact"},
                {"name": "X-Team", "value": "v.*", "type": "RegularExpression"},
            ]
    assert ports == [8001, 8000]
    assert paths == [f"/inference.GRPCInferenceService/{method}" for method in (*GRPC_METHODS, "ModelStreamInfer")] + list(
        rest_paths("digits")
    )


def test_copies_are_made_of_the_weighted_requests_of_both_protocols_and_of_no_others() -> None:
    rules = route(headers=(2, TESTERS), mirror=(2, 30))["rules"]
    assert [rule.get("filters") for rule in rules] == [
        [
            *([WITHOUT_TYPE] if port == 8000 else []),
            {
                "type": "RequestMirror",
                "requestMirror": {
                    "backendRef": {"group": "", "kind": "Service", "name": "digits-v2", "port": port},
                    "percent": 30,
                },
            },
        ]
        for port in (8001, 8000)
    ] + [None, None, [WITHOUT_TYPE]]
    plain = [{k: v for k, v in rule.items() if k != "filters"} for rule in route()["rules"]]
    assert [{k: v for k, v in rule.items() if k != "filters"} for rule in rules[:3]] == plain


def test_no_rest_request_says_its_type_to_triton_whose_library_ends_at_a_form_of_4_mib() -> None:
    """triton server#5840, libevhtp#118. gRPC requests keep theirs, without which they are none."""
    rules = route(headers=(2, TESTERS), mirror=(2, 30), rehearsal=True)["rules"]
    for rule in rules:
        removed = [f["requestHeaderModifier"] for f in rule.get("filters", []) if f["type"] == "RequestHeaderModifier"]
        rest = rule["backendRefs"][0]["port"] == 8000
        assert removed == ([{"remove": ["Content-Type"]}] if rest else [])
    assert len(rules) == 7


def test_rehearsed_copies_stand_in_rules_that_no_request_meets() -> None:
    rules = route(headers=(2, TESTERS), mirror=(2, 30), rehearsal=True)["rules"]
    assert rules[:5] == route(headers=(2, TESTERS))["rules"]
    for rule, used in zip(rules[5:], route(mirror=(2, 30))["rules"][:2], strict=True):
        assert rule["filters"] == used["filters"]
        (match,) = rule["matches"]
        assert match == {
            **used["matches"][0],
            "headers": [{"type": "Exact", "name": "x-perch-rehearsal", "value": "uid-1"}],
        }


@pytest.mark.parametrize(
    ("change", "current"),
    [
        pytest.param({}, True, id="nothing"),
        pytest.param({"name": "rule-0"}, True, id="a default of another release of the Gateway API"),
        pytest.param({"filters": []}, False, id="the Content-Type is not taken away"),
        pytest.param({"filters": route(mirror=(2, 30))["rules"][0]["filters"]}, False, id="copies that are wanted no more"),
        pytest.param({"sessionPersistence": {"sessionName": "a"}}, False, id="somebody's session persistence"),
        pytest.param({"timeouts": {"request": "5s"}}, False, id="somebody's time limit"),
        pytest.param({"filters": [{"type": "RequestHeaderModifier"}]}, False, id="somebody's filter"),
    ],
)
def test_a_route_is_current_where_nothing_in_it_was_not_asked_for(change: dict[str, Any], current: bool) -> None:
    """gatewayapi plugin #217, flagger#1857: foreign filters and rules stripped; docs/rollouts.md says which.
    envoy gateway#9775: consistent hashing ignores weights.
    """
    found = route()
    found["rules"][1] |= change
    assert is_current(route(), found) is current


def test_copies_that_are_as_asked_for_are_current() -> None:
    assert is_current(route(mirror=(2, 30)), route(mirror=(2, 30)))
    assert not is_current(route(mirror=(2, 31)), route(mirror=(2, 30)))
    assert not is_current(route(), route(headers=(2, TESTERS)))


def seen(accepted: bool, reason: str, **more: Any) -> RouteFacts:
    return RouteFacts({1: 90, 2: 10}, route(**more), "1", accepted, reason, "")


REHEARSED, IN_USE = {"mirror": (2, 30), "rehearsal": True}, {"mirror": (2, 30)}


@pytest.mark.parametrize(
    ("found", "rehearses"),
    [
        pytest.param(None, True, id="no route yet"),
        pytest.param(seen(True, "Accepted"), True, id="the route asks for no copies yet"),
        pytest.param(seen(True, "Accepted", headers=(2, TESTERS)), True, id="the route has testers' rules only"),
        pytest.param(seen(False, "AwaitingGateway", **REHEARSED), True, id="the Gateway has not answered the rehearsal"),
        pytest.param(seen(False, "UnsupportedValue", **REHEARSED), True, id="the Gateway knows no mirrors"),
        pytest.param(seen(True, "Accepted", **REHEARSED), False, id="the Gateway knows mirrors"),
        pytest.param(seen(True, "Accepted", **IN_USE), False, id="copies are made"),
        pytest.param(seen(False, "AwaitingGateway", **IN_USE), False, id="copies are made and the weights just changed"),
        pytest.param(seen(False, "UnsupportedValue", **IN_USE), True, id="the Gateway was replaced by one that knows no mirrors"),
    ],
)
def test_copies_are_rehearsed_until_the_gateway_has_shown_that_it_knows_them(found: RouteFacts | None, rehearses: bool) -> None:
    assert must_rehearse(found) is rehearses


def test_an_autoscaler_scales_its_own_version_between_the_minimum_it_is_given_and_the_users_maximum() -> None:
    built = build_autoscaler(
        IDENTITY,
        autoscaled(
            targetCPUUtilizationPercentage=80,
            podMetrics=[{"name": "nv_inference_pending_request_count", "averageValue": "0.5"}, {"name": "b", "averageValue": 3}],
        ),
        2,
        1,
    )
    meta = built["metadata"]
    assert (meta["name"], meta["ownerReferences"][0]["uid"]) == ("digits-v2", "uid-1")
    assert meta["labels"]["serving.perch.dev/version"] == "2"
    assert built["spec"] == {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "digits-v2"},
        "minReplicas": 1,
        "maxReplicas": 9,
        "metrics": [
            {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}},
            pods("nv_inference_pending_request_count", "500m"),
            pods("b", "3"),
        ],
    }


def pods(name: str, average: str) -> dict[str, Any]:
    return {"type": "Pods", "pods": {"metric": {"name": name}, "target": {"type": "AverageValue", "averageValue": average}}}


def test_an_autoscaler_by_metrics_alone_does_not_speak_of_cpu() -> None:
    built = build_autoscaler(IDENTITY, autoscaled(podMetrics=[{"name": "a", "averageValue": "1"}]), 1, 2)
    assert built["spec"]["metrics"] == [pods("a", "1")]


def test_a_spec_without_autoscaling_has_no_autoscaler() -> None:
    with pytest.raises(ValueError, match="not set"):
        build_autoscaler(IDENTITY, spec(1), 1, 1)


@pytest.mark.parametrize(
    ("written", "stored"),
    # tests/api holds these against a real API server.
    [("1000", "1k"), ("1500", "1500"), ("0.25", "250m"), ("1500m", "1500m"), ("1024Ki", "1Mi"), ("0.5Ki", "512"), ("00", "0")],
)
def test_quantities_are_written_as_the_server_stores_them(written: str, stored: str) -> None:
    assert canonical(written) == stored


def test_a_deployment_always_names_its_replicas() -> None:
    asked = spec(1, runtime={"replicas": 3})
    for given, written in ((None, 3), (5, 5), (1, 1)):
        assert deployment(asked, replicas=given)["spec"]["replicas"] == written
    assert deployment(asked)["spec"]["replicas"] == 3


def test_pods_carry_the_hash_of_what_they_serve_and_a_number_of_replicas_changes_no_template() -> None:
    built = deployment(spec(1), replicas=4)
    content = built["metadata"]["annotations"]["serving.perch.dev/serving-hash"]
    assert built["spec"]["template"]["metadata"]["annotations"] == {"serving.perch.dev/serving-hash": content}
    others = (deployment(spec(1), replicas=9), deployment(autoscaled(targetCPUUtilizationPercentage=80)))
    assert all(other["spec"]["template"] == built["spec"]["template"] for other in others)


MAJOR, MINOR = "nvidia.com/gpu.compute.major", "nvidia.com/gpu.compute.minor"
GENERATION = [{"key": MAJOR, "operator": "In", "values": ["9"]}, {"key": MINOR, "operator": "In", "values": ["0"]}]
ZONE = {"key": "zone", "operator": "In", "values": ["a"]}
NODE = {"key": "metadata.name", "operator": "In", "values": ["a"]}
PREFERRED = [{"weight": 1, "preference": {"matchExpressions": [ZONE]}}]
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def required(*terms: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"nodeAffinity": {**more, REQUIRED: {"nodeSelectorTerms": list(terms)}}}


@pytest.mark.parametrize(
    ("asked", "rendered"),
    [
        pytest.param(None, required({"matchExpressions": GENERATION}), id="none"),
        pytest.param(
            required({"matchExpressions": [ZONE]}, {"matchFields": [NODE]}),
            required({"matchExpressions": [ZONE, *GENERATION]}, {"matchFields": [NODE], "matchExpressions": GENERATION}),
            id="either of two kinds of nodes",
        ),
        pytest.param(
            {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": PREFERRED}},
            required({"matchExpressions": GENERATION}, preferredDuringSchedulingIgnoredDuringExecution=PREFERRED),
            id="a preference",
        ),
        pytest.param(required({}), required({}), id="no node at all"),
        pytest.param(
            {"podAntiAffinity": {REQUIRED: [{"topologyKey": "zone"}]}},
            {"podAntiAffinity": {REQUIRED: [{"topologyKey": "zone"}]}, **required({"matchExpressions": GENERATION})},
            id="other pods",
        ),
    ],
)
def test_a_plan_needs_nodes_of_its_gpu_generation_beside_what_the_affinity_asks_for(
    asked: dict[str, Any] | None, rendered: dict[str, Any]
) -> None:
    wanted = spec(1, runtime={"affinity": asked} if asked else {})
    assert deployment(wanted, compute_capability="9.0")["spec"]["template"]["spec"]["affinity"] == rendered
    assert deployment(wanted)["spec"]["template"]["spec"].get("affinity") == asked, "what is no plan runs anywhere"


def deployment(asked: Spec, **more: Any) -> dict[str, Any]:
    entry = asked.versions[0]
    return build_deployment(IDENTITY, asked, entry, artifact_revision(entry), "sha256:" + "0" * 64, INSTALLATION, **more)


# --- export requests ---------------------------------------------------------------------------------------------------------

SOURCE = {"uri": "s3://code/nets.zip", "sha256": "b" * 64}


def architecture(written: dict[str, Any], **checkpoint: Any) -> contract.Architecture:
    asked = spec(1)
    entry = asked.versions[0]
    changed = entry.model_dump(by_alias=True) | {"architecture": written}
    changed["checkpoint"] |= checkpoint
    made = build_export_request(IDENTITY, asked, Version.model_validate(changed), "0123abcd", INSTALLATION).architecture
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("written", "meant"),
    [(10, 10), ("relu", "relu"), ("0.5", 0.5), ("1e-3", 0.001), ("true", True), ("false", False), ("10", 10), ('"10"', "10"),
     ('"true"', "true"), ("True", "True"), ("", ""), ("null", "null"), ("[1]", "[1]"), ("NaN", "NaN"), ("1e999", "1e999"),
     ("-Infinity", "-Infinity")],
)  # fmt: skip
def test_a_parameter_means_what_is_written(written: int | str, meant: Any) -> None:
    (value,) = architecture({"name": "lenet5", "parameters": {"p": written}}).parameters.values()
    assert (value, type(value)) == (meant, type(meant))


def test_a_source_is_reached_as_the_checkpoint_is() -> None:
    own = {"entryPoint": "nets:build", "source": SOURCE, "parameters": {"hidden_size": 3}}
    made = architecture(own, endpoint="http://elsewhere:9000", region="eu-west-1")
    assert made.source is not None
    assert (made.source.endpoint, made.source.region) == ("http://elsewhere:9000", "eu-west-1")
    assert made.source.sha256 == SOURCE["sha256"]
    assert dict(made.parameters) == {"hidden_size": 3}


def test_revisions_of_entries_that_were_published_stay() -> None:
    """Else an upgrade of the operator exports every model again."""
    entry = {
        "version": 7,
        "checkpoint": {"uri": "s3://checkpoints/plants/v7.pt", "format": "StateDict", "sha256": "a" * 64},
        "architecture": {"name": "torchvision:resnet50", "parameters": {"numClasses": 37}},
        "inputs": [{"name": "image", "dataType": "FP32", "shape": [3, 224, 224]}],
        "outputs": [{"name": "logits", "dataType": "FP32", "shape": [37]}],
    }
    assert artifact_revision(Version.model_validate(entry)) == "44b7169a"


def test_a_response_cache_is_there_for_the_versions_that_ask_for_it_and_rolls_no_others() -> None:
    entry = spec(1).versions[0].model_dump(mode="json", by_alias=True, exclude_defaults=True)
    cached = spec(1, versions=[{**entry, "triton": {"responseCache": True}}], runtime={"responseCacheMebibytes": 2})

    def flags(asked: Spec) -> list[str]:
        command = deployment(asked)["spec"]["template"]["spec"]["containers"][0]["command"]
        return [word for word in command if "cache" in word]

    assert flags(cached) == ["--cache-config=local,size=2097152"]
    assert flags(spec(1)) == []
    explicit = spec(1, runtime={"responseCacheMebibytes": 64})
    assert serving_hash("r", "d", explicit) == serving_hash("r", "d", spec(1)), "the default, written out, rolls nothing"


def test_every_field_of_triton_reaches_the_exporter() -> None:
    entry = spec(1).versions[0].model_dump(mode="json", by_alias=True, exclude_defaults=True)
    triton = {
        "maxBatchSize": 4,
        "dynamicBatching": {
            "maxQueueDelayMicroseconds": 1, "preferredBatchSizes": [2], "priorityLevels": 2, "defaultPriorityLevel": 1,
            "defaultQueuePolicy": {
                "timeoutAction": "Delay", "defaultTimeoutMicroseconds": 3, "allowTimeoutOverride": True, "maxQueueSize": 4
            },
        },
        "instanceCount": 2, "instanceKind": "CPU", "labels": ["x"] * 10, "warmup": True, "responseCache": True,
        "configOverrides": "parameters { }",
    }  # fmt: skip
    asked = spec(1, versions=[{**entry, "triton": triton}])
    request = build_export_request(IDENTITY, asked, asked.versions[0], "0123abcd", INSTALLATION)
    assert json.loads(request.triton.to_json()) == triton


def test_every_field_of_pictures_reaches_the_exporter() -> None:
    entry = spec(1).versions[0].model_dump(mode="json", by_alias=True, exclude_defaults=True)
    entry |= {
        "inputs": [{"name": "image", "dataType": "FP32", "shape": [28, 28, 3]}],
        "preprocessing": {
            "decode": "RGB", "resize": [32], "centerCrop": [28], "interpolation": "Bicubic",
            "mean": ["0.4", "0.5", "-0.6"], "std": ["0.1", "0.2", "1e-3"], "layout": "HWC",
        },
        "postprocessing": {"topK": 3, "softmax": True},
    }  # fmt: skip
    asked = spec(1, versions=[entry])
    request = build_export_request(IDENTITY, asked, asked.versions[0], "0123abcd", INSTALLATION)
    assert request.preprocessing is not None
    assert request.postprocessing is not None
    assert json.loads(request.preprocessing.to_json()) == entry["preprocessing"]
    assert json.loads(request.postprocessing.to_json()) == entry["postprocessing"]


@pytest.mark.parametrize(
    ("given", "asked", "limited"),
    [
        ({}, {"cpu": "500m", "memory": "1Gi"}, {"memory": "8Gi"}),
        ({"limits": {"memory": "400Mi"}}, {"cpu": "500m", "memory": "400Mi"}, {"memory": "400Mi"}),
        ({"limits": {"memory": "16Gi", "cpu": "0.25"}}, {"cpu": "0.25", "memory": "1Gi"}, {"memory": "16Gi", "cpu": "0.25"}),
        ({"requests": {"memory": "2Gi"}, "limits": {"memory": "3G"}}, {"cpu": "500m", "memory": "2Gi"}, {"memory": "3G"}),
    ],
    ids=["nothing is said", "a small limit", "a large limit and few cores", "a request of the user's own"],
)
def test_convert_never_asks_for_more_than_its_limit(given: Any, asked: Any, limited: Any) -> None:
    builder = {"resources": given} if given else {}
    asked_for = spec(1, builder=builder)
    identity, entry = Identity("vision", "digits", "uid-1", 1, "1"), asked_for.versions[0]
    pod = build_export_job(identity, asked_for, entry, "0123abcd", INSTALLATION)["spec"]["template"]["spec"]
    found = {c["name"]: c["resources"] for c in pod["initContainers"]}
    assert found["convert"] == found["prove"] == {"requests": asked, "limits": limited}


def plans(**more: Any) -> Spec:
    """One version whose target is a TensorRT plan, and all that this needs."""
    gpu = {"limits": {"nvidia.com/gpu": 1}}
    runtime = {"image": "nvcr.io/nvidia/tritonserver:25.10-py3", "tensorrtVersion": "10.13.3.9", "resources": gpu}
    builder = {"tensorrtImage": "registry.example.com/perch-tensorrt:25.10", "resources": gpu, "runtimeClassName": "nvidia"}
    return spec(1, versions=[entry(1, conversion={"target": "TensorRT"})], runtime=runtime, builder=builder, **more)


def export_job(asked: Spec) -> dict[str, Any]:
    return build_export_job(IDENTITY, asked, asked.versions[0], artifact_revision(asked.versions[0]), INSTALLATION)


def test_a_plan_is_built_between_prove_and_publish_on_a_gpu_and_without_credentials() -> None:
    pod = export_job(plans())["spec"]["template"]["spec"]
    assert [container["name"] for container in pod["initContainers"]] == ["fetch", "convert", "prove", "build"]
    build = pod["initContainers"][3]
    assert build["image"] == "registry.example.com/perch-tensorrt:25.10"
    assert build["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert [variable["name"] for variable in build["env"]] == ["HOME"]
    assert {mount["name"]: mount.get("readOnly", False) for mount in build["volumeMounts"]} == {
        "request": True,
        "tmp": False,
        "state": True,
        "output": True,
        "plan": False,
    }
    (publish,) = pod["containers"]
    assert {mount["name"]: mount.get("readOnly", False) for mount in publish["volumeMounts"]}["plan"] is True
    assert "plan" in [volume["name"] for volume in pod["volumes"]]
    assert pod["runtimeClassName"] == "nvidia"


def test_where_no_plan_is_asked_for_nothing_of_it_is_in_the_job() -> None:
    pod = export_job(spec(1))["spec"]["template"]["spec"]
    assert [container["name"] for container in pod["initContainers"]] == ["fetch", "convert", "prove"]
    (publish,) = pod["containers"]
    assert "plan" not in [part["name"] for part in (*pod["volumes"], *publish["volumeMounts"])]


def test_a_killed_export_ends_its_job_and_an_evicted_one_is_made_again() -> None:
    asked_for = spec(1)
    job = build_export_job(IDENTITY, asked_for, asked_for.versions[0], "0123abcd", INSTALLATION)["spec"]
    evicted, ended = job["podFailurePolicy"]["rules"]
    # The order matters: an evicted container has exit code 137 too.
    assert evicted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert ended == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [3, 4, 137]}}


def test_an_export_is_bounded_in_time_memory_and_disk_in_every_container() -> None:
    asked_for = spec(1)
    job = build_export_job(IDENTITY, asked_for, asked_for.versions[0], "0123abcd", INSTALLATION)["spec"]
    pod = job["template"]["spec"]
    assert job["activeDeadlineSeconds"] == 3600
    containers = [*pod["initContainers"], *pod["containers"]]
    assert [c["name"] for c in containers] == ["fetch", "convert", "prove", "publish"]
    assert all("memory" in c["resources"]["limits"] for c in containers)
    assert all("sizeLimit" in v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v)
    assert {v["name"] for v in pod["volumes"]} == {"request", "tmp", "checkpoint", "state", "output", "proof"}


# --- everything that a spec says of pods ---------------------------------------------------------------------------------------

FULL = full_spec()
RUNTIME = FULL["runtime"]
ALWAYS = replace(INSTALLATION, image_pull_policy="Always")
ARTIFACT_DIGEST = "sha256:" + "0" * 64

POD_SECURITY = {
    "runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip
CONFINED = {
    "securityContext": {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    },
    "terminationMessagePolicy": "FallbackToLogsOnError",
}  # fmt: skip
SLIM = {"image": "artifacts:1", "imagePullPolicy": "Always", **CONFINED}
TMP = {"name": "tmp", "mountPath": "/tmp"}
STORE_KEYS: dict[str, dict[str, Any]] = {
    "AWS_ACCESS_KEY_ID": {},
    "AWS_SECRET_ACCESS_KEY": {},
    "AWS_SESSION_TOKEN": {"optional": True},
}
REPOSITORY_KEYS = [
    {"name": key, "valueFrom": {"secretKeyRef": {"name": "s3-credentials", "key": key, **more}}}
    for key, more in STORE_KEYS.items()
]
CHECKPOINT_KEYS = [
    {"name": f"CHECKPOINT_{key}", "valueFrom": {"secretKeyRef": {"name": "checkpoints", "key": key, **more}}}
    for key, more in STORE_KEYS.items()
]
CA_ENV = {"name": "AWS_CA_BUNDLE", "value": "/perch/ca/bundle.pem"}
CA_MOUNT = {"name": "ca", "mountPath": "/perch/ca", "readOnly": True}
CA_VOLUME = {"name": "ca", "configMap": {"name": "ca", "items": [{"key": "ca.pem", "path": "bundle.pem"}]}}


def probe(path: str, port: int, period: int, timeout: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period, "timeoutSeconds": timeout, "failureThreshold": failures,
    }  # fmt: skip


def test_a_version_runs_as_runtime_says_confined_proven_and_with_time_to_end() -> None:
    """The whole Deployment, so that no key can be lost: one that is would be a field that is accepted and ignored, or a
    protection that is gone."""
    asked = Spec.model_validate(FULL)
    entry = asked.versions[0]
    revision = artifact_revision(entry)
    hashed = {"serving.perch.dev/serving-hash": serving_hash(revision, ARTIFACT_DIGEST, asked)}
    chosen = {"serving.perch.dev/model-deployment": "digits", "serving.perch.dev/version": "1"}
    chosen |= {"serving.perch.dev/component": "triton"}
    labels = {**chosen, "app.kubernetes.io/name": "digits", "app.kubernetes.io/managed-by": "perch", **RUNTIME["labels"]}
    served = {"name": "artifact", "mountPath": "/perch/artifact", "readOnly": True}
    leave = {"preStop": {"sleep": {"seconds": 15}}}
    download = {
        "name": "download",
        **SLIM,
        "command": [
            "python3", "-m", "perch_exporter", "download", "--uri", f"s3://models/prod/vision/digits/1-{revision}",
            "--endpoint", "http://s3.storage:9000", "--region", "us-east-1",
            "--digest", ARTIFACT_DIGEST, "--target", "/perch/artifact",
        ],
        "env": [*REPOSITORY_KEYS, CA_ENV],
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
        "volumeMounts": [{"name": "artifact", "mountPath": "/perch/artifact"}, TMP, CA_MOUNT],
    }  # fmt: skip
    restricted = "shared-memory,model-repository,trace,logging:perch=uid-1"
    triton = {
        "name": "triton",
        "image": RUNTIME["image"],
        "imagePullPolicy": RUNTIME["imagePullPolicy"],
        **CONFINED,
        "command": [
            "sh", "-c", START, "tritonserver", "--model-repository=/perch/artifact/models", "--model-control-mode=none",
            "--strict-readiness=true", "--exit-on-error=true",
            "--exit-timeout-secs=70",  # of 90 seconds of grace, 15 are slept before and 5 spared
            f"--grpc-restricted-protocol={restricted}", f"--http-restricted-api={restricted}",
            "--cache-config=local,size=268435456",
        ],
        "env": [{"name": "NVIDIA_TF32_OVERRIDE", "value": "0"}, *RUNTIME["env"]],
        "ports": [
            {"name": name, "containerPort": port, "protocol": "TCP"}
            for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002))
        ],
        "resources": RUNTIME["resources"],
        "startupProbe": probe("/v2/models/digits/ready", 8000, 2, 2, 450),  # progressDeadline is 15m
        "readinessProbe": probe("/v2/models/digits/ready", 8000, 5, 5, 3),
        "livenessProbe": probe("/v2/health/live", 8000, 10, 10, 6),
        "lifecycle": leave,
        "volumeMounts": [served, {"name": "shm", "mountPath": "/dev/shm"}, TMP],
    }  # fmt: skip
    golden = {
        "name": "golden",
        **SLIM,
        "command": [
            "python3", "-m", "perch_exporter", "golden", "--artifact", "/perch/artifact", "--grpc", "127.0.0.1:8001",
            "--listen", "0.0.0.0:8003",
        ],
        "ports": [{"name": "golden", "containerPort": 8003, "protocol": "TCP"}],
        "resources": {"requests": {"cpu": "10m", "memory": "96Mi"}, "limits": {"memory": "512Mi"}},
        "readinessProbe": probe("/ready", 8003, 2, 5, 2),
        "livenessProbe": probe("/live", 8003, 20, 10, 3),
        "lifecycle": leave,
        "volumeMounts": [served, TMP],
    }  # fmt: skip
    placed = ("nodeSelector", "tolerations", "affinity", "imagePullSecrets", "serviceAccountName", "runtimeClassName",
              "terminationGracePeriodSeconds", "priorityClassName", "resourceClaims")  # fmt: skip
    own_pods = {"labelSelector": {"matchLabels": chosen}, "matchLabelKeys": ["pod-template-hash"]}
    pod = {
        **{key: RUNTIME[key] for key in placed},
        "topologySpreadConstraints": [{**constraint, **own_pods} for constraint in RUNTIME["topologySpreadConstraints"]],
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": POD_SECURITY,
        "initContainers": [download],
        "containers": [triton, golden],
        "volumes": [
            {"name": "artifact", "emptyDir": {"sizeLimit": "50Gi"}},
            {"name": "tmp", "emptyDir": {"sizeLimit": RUNTIME["temporaryStorageSize"]}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": RUNTIME["sharedMemorySize"]}},
            CA_VOLUME,
        ],
    }
    assert build_deployment(IDENTITY, asked, entry, revision, ARTIFACT_DIGEST, ALWAYS) == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": "digits-v1",
            "namespace": "vision",
            "labels": labels,
            "annotations": {"serving.perch.dev/artifact-revision": revision, **hashed},
            "ownerReferences": [
                {
                    "apiVersion": "serving.perch.dev/v1alpha1", "kind": "ModelDeployment", "name": "digits", "uid": "uid-1",
                    "controller": True, "blockOwnerDeletion": False,
                }
            ],
        },
        "spec": {
            "replicas": RUNTIME["replicas"],
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": 900,
            "selector": {"matchLabels": chosen},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {"metadata": {"labels": labels, "annotations": hashed}, "spec": pod},
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("soft", "hard", "stack", "told"),
    [
        pytest.param("8192", "unlimited", "262144", False, id="as containers are started"),
        pytest.param("unlimited", "unlimited", "262144", False, id="without a limit threads would get 2 MiB"),
        pytest.param("8192", "262144", "262144", False, id="just enough"),
        pytest.param("8192", "65536", "65536", True, id="a hard limit below"),
        pytest.param("8192", "8192", "8192", True, id="a hard limit that leaves nothing"),
    ],
)
def test_triton_starts_with_a_stack_that_holds_large_bodies(soft: str, hard: str, stack: str, told: bool) -> None:
    """The shell itself, without Triton: the limit that a program has which is started this way, and its arguments."""
    command = containers(deployment(spec(1)))["triton"]["command"]
    assert command[:2] == ["sh", "-c"]
    assert command[3] == "tritonserver"
    asked = ["sh", "-c", 'ulimit -s; ulimit -H -s; echo "$@"', "x", "a b", "--c"]
    found = subprocess.run(
        ["bash", "-c", f'ulimit -S -s {soft} && ulimit -H -s {hard} && exec "$0" "$@"', *command[:3], *asked],
        capture_output=True, text=True, check=True, preexec_fn=lose_privileges,
    )  # fmt: skip
    assert found.stdout.split("\n")[:3] == [stack, hard, "a b --c"]
    assert ("The hard limit on a thread's stack is" in found.stderr) is told
    assert not told or f"{hard} KiB here" in found.stderr


def lose_privileges() -> None:
    """As in the pod: root could raise a hard limit."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setuid(65532)


IMAGES = [{"name": "image", "dataType": "FP32", "shape": [3, 224, 224]}]


@pytest.mark.parametrize(
    ("more", "mebibytes", "used"),
    [
        pytest.param({}, 512, 0, id="all golden samples at once"),
        pytest.param({"inputs": IMAGES, "triton": {"maxBatchSize": 256}}, 512, 0, id="a batch is no larger than the samples"),
        pytest.param({"inputs": IMAGES, "triton": {"maxBatchSize": 8, "accelerator": "TensorRT"}}, 512, 0, id="a small engine"),
        pytest.param({"inputs": IMAGES, "triton": {"maxBatchSize": 128, "accelerator": "TensorRT"}}, 848, 459, id="128"),
        pytest.param({"inputs": IMAGES, "triton": {"maxBatchSize": 256, "accelerator": "TensorRT"}}, 1440, 827, id="256"),
        pytest.param(
            {
                "inputs": [{"name": "image", "dataType": "UINT8", "shape": [3, -1, -1]}],
                "outputs": [{"name": "mask", "dataType": "INT64", "shape": [224, 224]}],
                "triton": {"maxBatchSize": 256, "accelerator": "TensorRT"},
            },
            1336,
            0,
            id="answers count too",
        ),
    ],
)
def test_the_golden_check_may_have_the_memory_that_its_largest_batch_takes(
    more: dict[str, Any], mebibytes: int, used: int
) -> None:
    """`used`: measured in MiB where a Triton that builds engines was asked for its largest batch."""
    asked = spec(
        1,
        versions=[entry(1, **more)],
        runtime={"resources": {"limits": {"nvidia.com/gpu": 1}}},
    )
    golden = containers(deployment(asked))["golden"]
    assert golden["resources"]["limits"] == {"memory": f"{mebibytes}Mi"}
    assert mebibytes > used


@pytest.mark.parametrize(("deadline", "seconds"), [(None, 600), ("2m", 600), ("10m", 600), ("30m", 1800), ("1h1s", 3601)])
def test_a_model_may_load_as_long_as_a_rollout_waits_for_it(deadline: str | None, seconds: int) -> None:
    rollout = {"rollout": {"steps": [{"weight": 100}]} | ({"progressDeadline": deadline} if deadline else {})}
    built = deployment(spec(1, **rollout))
    startup = containers(built)["triton"]["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= seconds
    assert built["spec"]["progressDeadlineSeconds"] == seconds


def test_nothing_that_a_pod_writes_is_without_a_bound() -> None:
    """Its root is read-only, so what it writes lies in these. The kubelet evicts a pod that writes more."""
    built = deployment(spec(1))
    sizes = {v["name"]: v["emptyDir"]["sizeLimit"] for v in built["spec"]["template"]["spec"]["volumes"] if "emptyDir" in v}
    assert sizes == {"artifact": "50Gi", "tmp": "10Gi", "shm": "256Mi"}
    assert all(c["securityContext"]["readOnlyRootFilesystem"] for c in containers(built).values())


def test_no_field_of_runtime_is_missing_from_the_spec_that_the_pods_are_made_of() -> None:
    """Else the test above would not look at it. A version of TensorRT is the planner's, an autoscaler takes replicas' place."""
    assert {field.alias or name for name, field in Runtime.model_fields.items()} - set(RUNTIME) == {"autoscaling"}


def containers(workload: dict[str, Any]) -> dict[str, dict[str, Any]]:
    pod = workload["spec"]["template"]["spec"]
    return {each["name"]: each for each in (*pod.get("initContainers", []), *pod["containers"])}


def test_a_job_runs_where_builder_says_and_as_confined_as_a_pod_that_serves() -> None:
    builder = FULL["builder"]
    job = export_job(Spec.model_validate(FULL))
    pod = job["spec"]["template"]["spec"]
    for key in ("nodeSelector", "tolerations", "imagePullSecrets", "runtimeClassName", "priorityClassName", "resourceClaims"):
        assert pod[key] == builder[key], key
    for labelled in (job, job["spec"]["template"]):
        assert builder["labels"].items() <= labelled["metadata"]["labels"].items()
    assert job["spec"]["activeDeadlineSeconds"] == builder["activeDeadlineSeconds"]
    assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"], pod["restartPolicy"]) == (False, False, "Never")
    assert pod["securityContext"] == POD_SECURITY
    for name, container in containers(job).items():
        assert CONFINED.items() <= container.items(), name
    assert containers(job)["convert"]["resources"] == builder["resources"]


def test_a_checkpoints_own_credentials_are_fetchs_alone_beside_the_repositorys() -> None:
    found = {name: [v for v in c.get("env", []) if "AWS" in v["name"]] for name, c in containers(export_job(full())).items()}
    assert found == {
        "fetch": [*REPOSITORY_KEYS, CA_ENV, *CHECKPOINT_KEYS],
        "convert": [],
        "prove": [],
        "publish": [*REPOSITORY_KEYS, CA_ENV],
    }


def test_a_cleanup_waits_in_no_queue_and_for_no_device() -> None:
    """A queue that suspends Jobs would suspend its deadline too, and with it the deletion."""
    cleanup = build_cleanup_job(IDENTITY, full(), 1, "0123abcd", INSTALLATION)
    assert "kueue.x-k8s.io/queue-name" not in json.dumps(cleanup)
    assert "resourceClaims" not in json.dumps(cleanup)
    assert cleanup["spec"]["template"]["spec"]["priorityClassName"] == "serving"


def test_an_identity_takes_the_keys_place_and_reaches_only_containers_that_speak_with_the_store() -> None:
    asked = Spec.model_validate(autoscaled_spec())
    cleanup = build_cleanup_job(IDENTITY, asked, 1, "0123abcd", INSTALLATION)
    for made, trusted in ((export_job(asked), {"fetch", "publish"}), (cleanup, {"delete"}), (deployment(asked), {"download"})):
        template = made["spec"]["template"]
        assert template["spec"]["serviceAccountName"] == "triton"
        assert template["spec"]["automountServiceAccountToken"] is False
        skipped = set(template["metadata"]["annotations"]["eks.amazonaws.com/skip-containers"].split(","))
        assert set(containers(made)) - skipped == trusted
        assert "s3-credentials" not in json.dumps(made)
    plan = export_job(plans(repository={"uri": "s3://models/prod", "serviceAccountName": "store"}))
    assert plan["spec"]["template"]["spec"]["serviceAccountName"] == "store"
    assert "build" in plan["spec"]["template"]["metadata"]["annotations"]["eks.amazonaws.com/skip-containers"].split(",")


def test_a_change_of_identity_rolls_the_pods() -> None:
    def hashed(repository: dict[str, Any]) -> str:
        return serving_hash("0123abcd", ARTIFACT_DIGEST, spec(1, repository={"uri": "s3://models/prod", **repository}))

    found = {
        hashed({"credentialsSecretRef": {"name": "a"}}),
        hashed({"serviceAccountName": "a"}),
        hashed({"serviceAccountName": "b"}),
    }
    assert len(found) == 3


def test_the_stores_authorities_are_mounted_where_the_store_is_spoken_with_and_nowhere_else() -> None:
    asked = full()
    cleanup = build_cleanup_job(IDENTITY, asked, 1, "0123abcd", INSTALLATION)
    serving = deployment(asked)
    for made, speaking in ((export_job(asked), {"fetch", "publish"}), (cleanup, {"delete"}), (serving, {"download"})):
        assert CA_VOLUME in made["spec"]["template"]["spec"]["volumes"]
        assert {name for name, c in containers(made).items() if CA_MOUNT in c["volumeMounts"]} == speaking
        assert {name for name, c in containers(made).items() if CA_ENV in c.get("env", [])} == speaking
    plain = full(repository={key: value for key, value in FULL["repository"].items() if key != "caBundleConfigMapRef"})
    assert "AWS_CA_BUNDLE" not in json.dumps([export_job(plain), deployment(plain)])
    assert '"ca"' not in json.dumps([export_job(plain), deployment(plain)])


def full(**more: Any) -> Spec:
    return Spec.model_validate({**FULL, **more})

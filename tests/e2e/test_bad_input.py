"""Bad input gets a sentence that names what and where, and loses nothing that served before."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from typing import Any

from demo.digits import held_out
from demo.load import grpc_client, infer
from demo.manifests import CHECKPOINTS, deployment, lenet, upload_digits
from devcluster.tenant import SECRET, Tenant


class Evil:
    """A pickle that writes a file when it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /perch/work/output/model.onnx /tmp/evil; env > /perch/work/output/env",)


def malicious(good: bytes) -> bytes:
    """The good checkpoint with its pickle replaced."""
    source, target = zipfile.ZipFile(io.BytesIO(good)), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as out:
        for item in source.infolist():
            content = source.read(item)
            if item.filename.endswith("data.pkl"):
                content = pickle.dumps(Evil())
            out.writestr(item.filename, content)
    return target.getvalue()


def versions(tenant: Tenant) -> dict[int, dict[str, Any]]:
    return {v["version"]: v for v in tenant.status("digits").get("versions", [])}


def test_each_bad_checkpoint_is_refused_with_its_own_sentence_while_stable_serves(tenant: Tenant) -> None:
    good = (CHECKPOINTS / "v2.pt").read_bytes()
    entries = upload_digits(tenant)[:1]

    def add(version: int, name: str, content: bytes, **more: Any) -> None:
        key = f"{tenant.namespace}/{name}.pt"
        sha = tenant.upload(key, content)
        entries.append(lenet(version, key, more.pop("sha256", sha), **more))

    add(2, "corrupt", good[: len(good) // 2])
    add(3, "classes", good, architecture={"name": "lenet5", "parameters": {"numClasses": 7}},
        outputs=[{"name": "logits", "dataType": "FP32", "shape": [7]}])  # fmt: skip
    add(4, "malicious", malicious(good))
    add(5, "sha", good, sha256="ab" * 32)
    add(6, "other", good, architecture={"name": "torchvision:resnet18"})
    tenant.apply(deployment(tenant, entries))
    tenant.wait_ready("digits", "Serving", timeout=300)
    wanted = {
        2: "CheckpointUnreadable",
        3: "CheckpointMismatch",
        4: "UnsafeCheckpoint",
        5: "ChecksumMismatch",
        6: "CheckpointMismatch",
    }
    found = tenant.wait(lambda: versions(tenant), lambda seen: all(seen.get(v, {}).get("phase") == "Failed" for v in wanted), 300)
    for version, reason in wanted.items():
        assert reason in found[version]["message"], found[version]["message"]
        assert "retryAt" not in found[version], "what is wrong for good is not tried again"
    assert "7" in found[3]["message"]
    assert "10" in found[3]["message"]
    assert "safetensors" in found[4]["message"].lower()
    assert found[1]["phase"] == "Serving"
    published = [key for key in tenant.keys(f"e2e/{tenant.namespace}/digits/4-") if key.endswith("manifest.json")]
    assert not published
    events = tenant.kubectl("get", "events", "--field-selector=reason=ExportFailed")
    assert "UnsafeCheckpoint" in events

    # As a canary it stalls the release, says why, and takes nothing from stable.
    tenant.apply(deployment(tenant, entries, canary=4))
    stalled = tenant.wait_reason("digits", "ExportFailed", kind="Stalled")
    assert "UnsafeCheckpoint" in stalled["message"]
    assert tenant.condition("digits", "Available")["status"] == "True"


def test_a_store_that_refuses_is_named_and_the_export_succeeds_once_it_is_mended(tenant: Tenant) -> None:
    s3 = tenant.cluster.s3
    bucket = f"{tenant.namespace}-late"
    entries = upload_digits(tenant)[:1]
    repository = {
        "uri": f"s3://{bucket}/models", "endpoint": s3.endpoint, "region": s3.region, "credentialsSecretRef": {"name": "wrong"},
    }  # fmt: skip
    tenant.apply(deployment(tenant, entries, repository=repository, routing=None, rollout=None))
    condition = tenant.wait(lambda: tenant.condition("digits"), lambda c: 'secret "wrong" not found' in c.get("message", ""), 60)
    assert condition["reason"] == "Exporting"

    bad = {
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "wrong", "namespace": tenant.namespace},
        "stringData": {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"},
    }  # fmt: skip
    tenant.apply(bad)
    condition = tenant.wait_reason("digits", "ExportRetrying", timeout=120)
    for word in ("nobody", s3.endpoint, "AccessDenied"):
        assert word in condition["message"], condition["message"]

    bad["stringData"] = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    tenant.apply(bad)
    condition = tenant.wait(lambda: tenant.condition("digits"), lambda c: "BucketNotFound" in c.get("message", ""), 120)
    assert bucket in condition["message"]

    tenant.make_bucket(bucket)
    tenant.wait_ready("digits", timeout=240)
    assert any(key.endswith("manifest.json") for key in tenant.keys(bucket=bucket))


def test_a_gateway_that_does_not_exist_is_named_and_the_service_answers(tenant: Tenant) -> None:
    entries = upload_digits(tenant)[:1]
    routing = {"parentRefs": [{"name": "nowhere"}], "hostnames": ["digits.example.org"]}
    tenant.apply(deployment(tenant, entries, routing=routing))
    tenant.wait(lambda: tenant.condition("digits", "Available"), lambda c: c.get("status") == "True", 240)
    accepted = tenant.wait(lambda: tenant.condition("digits", "TrafficAccepted"), lambda c: "nowhere" in c.get("message", ""), 60)
    assert accepted["status"] == "False"
    assert tenant.condition("digits")["status"] == "False"
    service = tenant.get("service", "digits-v1")
    assert service is not None
    client = grpc_client((service["spec"]["clusterIP"], 8001), "digits.example.org")
    assert infer(client, "digits", held_out()[0][:1])[1] == "1"


def test_a_gpu_that_is_not_there_is_told_in_the_schedulers_words_and_stable_is_untouched(tenant: Tenant) -> None:
    entries = upload_digits(tenant)[:1]
    tenant.apply(deployment(tenant, entries))
    tenant.wait_ready("digits")
    greedy = {"terminationGracePeriodSeconds": 30, "resources": {"limits": {"nvidia.com/gpu": 8}}}
    tenant.apply(deployment(tenant, entries, runtime=greedy))
    condition = tenant.wait(lambda: tenant.condition("digits"), lambda c: "Unschedulable" in c.get("message", ""), 60)
    assert "Insufficient nvidia.com/gpu" in condition["message"]
    assert condition["status"] == "False"
    assert tenant.condition("digits", "Available")["status"] == "True"
    assert tenant.status("digits")["weights"]["accepted"] == [{"version": 1, "weight": 100}]
    # The node has one: asking for that one is served.
    tenant.apply(deployment(tenant, entries, runtime={**greedy, "resources": {"limits": {"nvidia.com/gpu": 1}}}))
    tenant.wait_ready("digits")


def test_tampered_bytes_never_serve(tenant: Tenant) -> None:
    """kserve#5789: an artefact that is not what passed its gates fails the pod before Triton sees it."""
    entries = upload_digits(tenant)[:1]
    tenant.apply(deployment(tenant, entries))
    tenant.wait_ready("digits")
    prefix = f"e2e/{tenant.namespace}/digits/1-"
    model = next(key for key in tenant.keys(prefix) if key.endswith("model.onnx"))
    original = tenant.store.get_object(Bucket="models", Key=model)["Body"].read()
    tenant.upload(model, original[:-1] + bytes([original[-1] ^ 1]), bucket="models")
    runtime = {"terminationGracePeriodSeconds": 30, "env": [{"name": "MARK", "value": "2"}]}
    tenant.apply(deployment(tenant, entries, runtime=runtime))
    condition = tenant.wait(lambda: tenant.condition("digits"), lambda c: "ArtifactCorrupt" in c.get("message", ""), 120)
    assert "model.onnx" in condition["message"]
    assert tenant.condition("digits", "Available")["status"] == "True", "the proven pod goes on serving"
    assert SECRET not in condition["message"]


def test_a_model_that_answers_otherwise_than_its_checkpoint_never_becomes_ready_and_says_by_how_much(tenant: Tenant) -> None:
    """The last gate on its own: even where the digest is forged too, the golden check in the pod stands in the way."""
    entries = upload_digits(tenant)
    tenant.apply(deployment(tenant, entries, routing=None, rollout=None))
    tenant.wait_ready("digits")
    found = tenant.wait(lambda: versions(tenant), lambda seen: all(seen.get(v, {}).get("artifactDigest") for v in (1, 2)), 120)
    one, two = (found[v]["artifactUri"].removeprefix("s3://models/") for v in (1, 2))

    def read(key: str) -> bytes:
        return tenant.store.get_object(Bucket="models", Key=key)["Body"].read()

    swapped = read(f"{one}/model/digits/1/model.onnx")
    manifest = json.loads(read(f"{two}/manifest.json"))
    manifest["files"]["model/digits/2/model.onnx"] = {"sha256": hashlib.sha256(swapped).hexdigest(), "size": len(swapped)}
    forged = json.dumps(manifest).encode()
    tenant.upload(f"{two}/model/digits/2/model.onnx", swapped, bucket="models")
    digest = "sha256:" + tenant.upload(f"{two}/manifest.json", forged, bucket="models")
    patch = [{"op": "replace", "path": "/status/versions/1/artifactDigest", "value": digest}]
    tenant.kubectl("patch", "mdep", "digits", "--subresource=status", "--type=json", "-p", json.dumps(patch))

    tenant.apply(deployment(tenant, entries, stable=2, routing=None, rollout=None))
    condition = tenant.wait(lambda: tenant.condition("digits"), lambda c: "GoldenMismatch" in c.get("message", ""), 120)
    assert "largest error" in condition["message"], condition["message"]
    assert condition["status"] == "False"
    pods = tenant.list("pods", "serving.perch.dev/component=triton,serving.perch.dev/version=1")
    assert pods, "the former stable stays while the new one cannot answer"

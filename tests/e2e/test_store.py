"""The exporter's store against a real S3 server: what botocore's Stubber cannot show."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from devcluster.tenant import MODELS, Tenant
from perch_exporter.contract import Location
from perch_exporter.store import Credentials, open_store


def test_a_file_of_several_parts_arrives_whole_and_comes_back(tenant: Tenant, tmp_path: Path) -> None:
    s3, prefix = tenant.cluster.s3, f"e2e/{tenant.namespace}"
    place = Location(uri=f"s3://{MODELS}/{prefix}", endpoint=s3.host_endpoint, region=s3.region)
    store = open_store(place, Credentials("AWS_ACCESS_KEY_ID", s3.access_key, s3.secret_key))
    source, back = tmp_path / "model.onnx", tmp_path / "back"
    source.write_bytes(content := random.Random(0).randbytes(2 * 16 * 2**20 + 7))
    store.upload(source, "model.onnx")
    assert store.sizes() == {"model.onnx": len(content)}
    # S3's mark of an object that was put together of so many parts.
    assert tenant.store.head_object(Bucket=MODELS, Key=f"{prefix}/model.onnx")["ETag"].strip('"').endswith("-3")
    store.download("model.onnx", back, len(content))
    assert hashlib.sha256(back.read_bytes()).digest() == hashlib.sha256(content).digest()

"""A namespace of a development cluster in which ModelDeployments live: its Secret, buckets and objects, and waiting for them."""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import boto3
import yaml
from botocore.config import Config
from botocore.exceptions import ClientError

from devcluster.cluster import Cluster

SECRET = "s3-credentials"
CHECKPOINTS = "checkpoints"
MODELS = "models"


class Tenant:
    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace

    def make(self) -> "Tenant":
        """The namespace, the store's credentials in it, and the two buckets. What is there already is left."""
        s3 = self.cluster.s3
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": SECRET, "namespace": self.namespace},
            "stringData": {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key},
        }
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}}
        self.apply(namespace)
        self.apply(secret)
        for bucket in (CHECKPOINTS, MODELS):
            self.make_bucket(bucket)
        return self

    @property
    def store(self) -> Any:
        """A boto3 client of the cluster's S3 server, from this machine."""
        s3 = self.cluster.s3
        return boto3.client(
            "s3",
            endpoint_url=s3.host_endpoint,
            aws_access_key_id=s3.access_key,
            aws_secret_access_key=s3.secret_key,
            region_name=s3.region,
            config=Config(s3={"addressing_style": "path"}, connect_timeout=5, read_timeout=30),
        )

    def make_bucket(self, bucket: str) -> None:
        try:
            self.store.create_bucket(Bucket=bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise

    def upload(self, key: str, content: bytes, bucket: str = CHECKPOINTS) -> str:
        """Put an object; returns its sha256 in hex."""
        self.store.put_object(Bucket=bucket, Key=key, Body=content)
        return hashlib.sha256(content).hexdigest()

    def keys(self, prefix: str = "", bucket: str = MODELS) -> list[str]:
        pages = self.store.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def apply(self, manifest: dict[str, Any] | str) -> None:
        """`kubectl apply`, strictly validated; an object or YAML text, in this namespace unless it names another."""
        text = manifest if isinstance(manifest, str) else yaml.safe_dump(manifest)
        self.cluster.kubectl("apply", "-f", "-", input=text)

    def kubectl(self, *arguments: str, check: bool = True) -> str:
        return self.cluster.kubectl("-n", self.namespace, *arguments, check=check).stdout

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        text = self.kubectl("get", kind, name, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def list(self, kind: str, selector: str = "") -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = json.loads(self.kubectl("get", kind, "-l", selector, "-o", "json"))["items"]
        return items

    def status(self, name: str) -> dict[str, Any]:
        found = self.get("modeldeployment", name)
        return (found or {}).get("status") or {}

    def condition(self, name: str, kind: str = "Ready") -> dict[str, Any]:
        """The condition, if it speaks of the newest generation, else nothing: an older one is not about what was applied."""
        found = self.get("modeldeployment", name) or {}
        conditions = (found.get("status") or {}).get("conditions", [])
        current = [c for c in conditions if c.get("observedGeneration") == found["metadata"]["generation"]]
        return next((c for c in current if c["type"] == kind), {})

    def wait_ready(self, name: str, reason: str | None = None, timeout: float = 240) -> dict[str, Any]:
        """Wait until Ready is True (for this reason); returns the condition."""
        found: dict[str, Any] = self.wait(
            lambda: self.condition(name),
            lambda c: c.get("status") == "True" and reason in (None, c.get("reason")),
            timeout,
        )
        return found

    def wait_reason(self, name: str, reason: str, kind: str = "Ready", timeout: float = 240) -> dict[str, Any]:
        found: dict[str, Any] = self.wait(lambda: self.condition(name, kind), lambda c: c.get("reason") == reason, timeout)
        return found

    def wait(self, look: Callable[[], Any], good: Callable[[Any], bool], timeout: float = 60, every: float = 0.5) -> Any:
        """Look until it is good; raises TimeoutError with what was seen last."""
        deadline = time.monotonic() + timeout
        while True:
            seen = look()
            if good(seen):
                return seen
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout} s in namespace {self.namespace}; last seen: {seen}")
            time.sleep(every)

    def delete(self, wait: bool = True) -> None:
        self.cluster.kubectl("delete", "namespace", self.namespace, "--ignore-not-found", f"--wait={str(wait).lower()}")

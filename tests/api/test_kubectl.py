"""What users send by kubectl, against the real API server: anchors, and manifests that have grown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.api.conftest import COLLECTION
from tests.apiserver import ApiServer
from tests.unit.operator.world import entry

EXAMPLES = Path(__file__).parents[2] / "examples"
LABELS = [f"class {number:04} of a thousand" for number in range(1000)]


@pytest.fixture
def applied(api: ApiServer) -> Iterator[list[str]]:
    """Names to delete afterwards."""
    names: list[str] = []
    yield names
    for name in names:
        api.request("DELETE", f"{COLLECTION}/{name}")


def test_anchors_are_stored_written_out_and_a_release_is_one_line_more(api: ApiServer, applied: list[str]) -> None:
    text = (EXAMPLES / "digits-anchors.yaml").read_text().replace("namespace: vision", "namespace: default")
    applied.append("digits-anchors")
    api.kubectl("apply", "-f", "-", text=text)
    plain = yaml.safe_load((EXAMPLES / "digits.yaml").read_text())["spec"]["versions"]
    assert api.request("GET", f"{COLLECTION}/digits-anchors").json()["spec"]["versions"] == plain
    line = next(line for line in text.splitlines() if "version: 2" in line)
    api.kubectl("apply", "-f", "-", text=text.replace(line, f"{line}\n{line.replace('version: 2', 'version: 3')}"))
    stored = api.request("GET", f"{COLLECTION}/digits-anchors").json()["spec"]["versions"]
    assert stored[:2] == plain
    assert stored[2] == {**plain[1], "version": 3}


def labelled(versions: int) -> dict[str, Any]:
    outputs = [{"name": "logits", "dataType": "FP32", "shape": [1000]}]
    return {
        "apiVersion": "serving.perch.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": "labelled"},
        "spec": {
            "repository": {"uri": "s3://models/prod", "credentialsSecretRef": {"name": "s3"}},
            "versions": [
                entry(version, outputs=outputs, triton={"maxBatchSize": 8, "labels": LABELS})
                for version in range(1, versions + 1)
            ],
            "traffic": {"stable": 1},
            "routing": {"parentRefs": [{"name": "gateway"}], "hostnames": ["labelled.example.com"]},
        },
    }


def test_what_client_side_apply_cannot_hold_server_side_apply_can(api: ApiServer, applied: list[str]) -> None:
    """Client-side apply keeps the whole manifest in an annotation, and annotations hold 256 KiB."""
    applied.append("labelled")
    small, large = (json.dumps(labelled(versions)) for versions in (2, 13))
    api.kubectl("apply", "-f", "-", text=small)
    refused = api.kubectl("apply", "-f", "-", text=large, check=False)
    assert "metadata.annotations: Too long" in refused.stderr
    api.kubectl("apply", "--server-side", "-f", "-", text=large)
    assert len(api.request("GET", f"{COLLECTION}/labelled").json()["spec"]["versions"]) == 13

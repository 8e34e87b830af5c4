"""One API server with the CRD for all tests of this folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from perch.api import GROUP, PLURAL, VERSION
from perch.crd import build_crd
from tests.apiserver import ApiServer, running

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
COLLECTION = f"/apis/{GROUP}/{VERSION}/namespaces/default/{PLURAL}"


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A real API server where the CRD is established and ModelDeployments can be written."""
    with running(tmp_path_factory.mktemp("apiserver")) as server:
        answer = server.request("POST", CRDS, build_crd())
        assert answer.is_success, yaml.safe_dump(answer.json())
        deadline = time.monotonic() + 30
        while not server.request("GET", COLLECTION).is_success:
            assert time.monotonic() < deadline, conditions(server)
            time.sleep(0.1)
        yield server


def conditions(server: ApiServer) -> dict[str, Any]:
    crd = server.request("GET", f"{CRDS}/{PLURAL}.{GROUP}").json()
    return {condition["type"]: condition for condition in crd.get("status", {}).get("conditions", [])}

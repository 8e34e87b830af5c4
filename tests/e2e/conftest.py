"""A whole real cluster with Perch on it, once for all end-to-end tests; a namespace of its own for each test that asks for one.

PERCH_TEST_CLUSTER names the cluster (default: test). PERCH_KEEP_CLUSTER=1 leaves it running for a look afterwards.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from devcluster import Cluster
from devcluster.release import NAMESPACE, install
from devcluster.tenant import Tenant

from .judged import Judged


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(os.environ.get("PERCH_TEST_CLUSTER", "test"), gpus=1)
    try:
        cluster.up()
        install(cluster)
        yield cluster
    finally:
        if not os.environ.get("PERCH_KEEP_CLUSTER"):
            cluster.down()


@pytest.fixture
def tenant(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Tenant]:
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[5:40].strip("-")
    # A name of its own in each run: on a cluster that was kept, the buckets remember what a former run published.
    name = f"{words}-{uuid.uuid4().hex[:6]}"
    tenant = Tenant(cluster, name).make()
    yield tenant
    if request.node.stash.get(FAILED, False):
        explain(tenant)
    tenant.delete(wait=False)


@pytest.fixture(scope="session")
def built_to_be_judged(cluster: Cluster) -> Iterator[Judged]:
    tenant = Tenant(cluster, f"judged-{uuid.uuid4().hex[:6]}").make()
    yield Judged.build(tenant)
    tenant.delete(wait=False)


@pytest.fixture
def judged(built_to_be_judged: Judged, request: pytest.FixtureRequest) -> Iterator[Judged]:
    built_to_be_judged.serve()
    yield built_to_be_judged
    if request.node.stash.get(FAILED, False):
        explain(built_to_be_judged.tenant)


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    report = yield
    if report.when == "call" and report.failed:
        item.stash[FAILED] = True
    return report


def explain(tenant: Tenant) -> None:
    """What a person would look at first, printed into the report of a failed test."""
    print(tenant.kubectl("get", "mdep,jobs,pods,httproutes", "-o", "wide", check=False))
    print(tenant.kubectl("get", "mdep", "-o", "yaml", check=False))
    print(tenant.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False)[-6000:])
    logs = tenant.cluster.kubectl("-n", NAMESPACE, "logs", "-l", "app.kubernetes.io/name=perch", "--tail=80", check=False)
    print(logs.stdout)

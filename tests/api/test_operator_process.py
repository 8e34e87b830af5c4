"""The operator's own process against a real API server without controllers: missing CRDs, kills, the Lease, its metrics."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.apiserver import ApiServer, running

ROOT = Path(__file__).resolve().parents[2]
CRD = ROOT / "crds" / "modeldeployments.serving.perch.dev.yaml"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server without Perch's CRD and without Gateway API."""
    with running(tmp_path_factory.mktemp("bare")) as server:
        yield server


class Operator:
    def __init__(self, server: ApiServer, folder: Path, name: str, **settings: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.name = name
        self.log = folder / f"{name}.log"
        env = {
            "KUBECONFIG": str(server.kubeconfig),
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": f"{ROOT}/operator:{ROOT}/exporters",
            "PERCH_EXPORTER_IMAGE": "example.com/exporter:1",
            "PERCH_ARTIFACTS_IMAGE": "example.com/artifacts:1",
            "PERCH_TRITON_IMAGE": "example.com/triton:1",
            "PERCH_POD_NAME": name,
            "PERCH_HTTP_PORT": str(self.port),
            "PERCH_CLUSTER_NAME": "test",
            **settings,
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "perch"], env=env, stdout=log, stderr=log)

    def end(self, how: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            os.kill(self.process.pid, how)
        return self.process.wait(20)

    def metric(self, name: str, **labels: str) -> float | None:
        """The sample of this name and these labels; None where there is none (yet)."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return next((sample.value for sample in samples if (sample.name, sample.labels) == (name, labels)), None)

    def says(self, text: str) -> bool:
        return text in self.log.read_text()


@pytest.fixture
def start(bare: ApiServer, tmp_path: Path) -> Iterator[Callable[[str], Operator]]:
    with ExitStack() as stack:

        def begin(name: str) -> Operator:
            operator = Operator(bare, tmp_path, name)
            stack.callback(operator.end)
            return operator

        yield begin


def eventually(look: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)
    return seen


@contextmanager
def model(server: ApiServer, name: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """The digits example under this name in namespace default; yields a look at it."""
    manifest = yaml.safe_load((ROOT / "examples" / "digits.yaml").read_text())
    manifest["metadata"] = {"name": name, "namespace": "default"}
    server.kubectl("apply", "-f", "-", text=yaml.safe_dump(manifest))
    yield lambda: json.loads(server.kubectl("get", "mdep", name, "-o", "json").stdout)
    server.kubectl("delete", "mdep", name, "--timeout=20s")


def holder(server: ApiServer) -> str:
    lease = server.kubectl("get", "lease", "perch", "-o", "jsonpath={.spec.holderIdentity}", check=False)
    return lease.stdout


def condition(obj: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((c for c in obj.get("status", {}).get("conditions", []) if c["type"] == kind), {})


def test_an_operator_that_starts_before_its_crd_waits_says_so_and_then_works(
    bare: ApiServer, start: Callable[[str], Operator]
) -> None:
    operator = start("early")
    eventually(lambda: operator.says("install the CRD modeldeployments.serving.perch.dev"), "it names the missing CRD")
    assert httpx.get(f"http://127.0.0.1:{operator.port}/healthz").status_code == 200
    bare.kubectl("apply", "--server-side", "-f", str(CRD))
    bare.wait_established("modeldeployments.serving.perch.dev")
    with model(bare, "early") as look:
        eventually(lambda: condition(look(), "Ready"), "it works once the CRD is there")
        assert condition(look(), "Ready")["reason"] == "Exporting"
        # Gateway API is missing too, which is told and hurts nothing else.
        missing = eventually(lambda: condition(look(), "TrafficAccepted"), "traffic is judged")
        assert missing["reason"] == "GatewayAPIMissing"
        eventually(lambda: operator.metric("perch_versions", phase="Exporting") == 2, "both versions are counted")
        jobs = json.loads(bare.kubectl("get", "jobs", "-o", "json").stdout)["items"]
        assert {j["metadata"]["ownerReferences"][0]["uid"] for j in jobs} == {look()["metadata"]["uid"]}
    assert operator.end() == 0


def test_the_lease_lets_one_act_a_goodbye_hands_over_at_once_and_a_kill_within_its_duration(
    bare: ApiServer, start: Callable[[str], Operator]
) -> None:
    bare.kubectl("apply", "--server-side", "-f", str(CRD))
    one = start("one")
    eventually(lambda: holder(bare) == "one", "the first takes the Lease")
    two = start("two")
    eventually(lambda: two.says("standing by: one holds"), "the second stands by")
    began = time.monotonic()
    one.end()
    eventually(lambda: holder(bare) == "two", "a released Lease is taken", 10)
    released = time.monotonic() - began
    three = start("three")
    eventually(lambda: three.says("standing by: two holds"), "the third stands by")
    began = time.monotonic()
    two.end(signal.SIGKILL)
    eventually(lambda: holder(bare) == "three", "a Lease runs out", 25)
    print(f"takeover: {released:.1f} s after SIGTERM, {time.monotonic() - began:.1f} s after SIGKILL")


def test_what_it_does_and_what_fails_is_counted_by_the_one_that_acts(bare: ApiServer, start: Callable[[str], Operator]) -> None:
    bare.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRD))
    acting = start("acting")
    eventually(lambda: holder(bare) == "acting", "it takes the Lease", 25)
    standby = start("standby")
    eventually(lambda: standby.says("standing by: acting holds"), "the other stands by")
    strict = yaml.safe_load(CRD.read_text())
    schema = strict["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    schema["x-kubernetes-validations"] = [{"rule": "!has(self.observedGeneration)", "message": "not today"}]
    with model(bare, "counted") as look:
        eventually(lambda: condition(look(), "Ready"), "it is looked at")
        assert (acting.metric("perch_leader"), standby.metric("perch_leader")) == (1, 0)
        done = eventually(lambda: acting.metric("perch_reconciles_total", result="done"), "a pass is counted")
        assert eventually(lambda: acting.metric("perch_reconcile_duration_seconds_count"), "and timed") >= done
        assert acting.metric("perch_reconciles_total", result="error") is None
        assert standby.metric("perch_reconcile_duration_seconds_count") == 0

        # No status can be written now, which no condition can say.
        bare.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", text=yaml.safe_dump(strict))

        another = itertools.count(30)

        def failed() -> float | None:
            changed = json.dumps({"spec": {"runtime": {"terminationGracePeriodSeconds": next(another)}}})
            bare.kubectl("patch", "mdep", "counted", "--type=merge", "-p", changed)
            return acting.metric("perch_reconciles_total", result="error")

        eventually(failed, "a pass that failed is counted")
        assert acting.says("not today")
        bare.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRD))
        eventually(lambda: look()["status"]["observedGeneration"] == look()["metadata"]["generation"], "it goes on by itself", 60)


def test_an_operator_whose_lease_was_taken_exits_and_says_why(bare: ApiServer, start: Callable[[str], Operator]) -> None:
    bare.kubectl("apply", "--server-side", "-f", str(CRD))
    robbed = start("robbed")
    eventually(lambda: holder(bare) == "robbed", "it takes the Lease", 25)
    bare.kubectl("patch", "lease", "perch", "--type=merge", "-p", '{"spec":{"holderIdentity":"thief"}}')
    eventually(lambda: robbed.process.poll() is not None, "it exits", 20)
    assert robbed.process.returncode == 1
    assert robbed.says("taken by another")
    bare.kubectl("delete", "lease", "perch")


def test_a_spec_of_a_newer_release_is_refused_by_name_and_nothing_is_touched(
    bare: ApiServer, start: Callable[[str], Operator]
) -> None:
    """The CRD of tomorrow admits a field that this operator does not know: a condition names it, nothing is ignored."""
    newer = yaml.safe_load(CRD.read_text())
    schema = newer["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["rollout"]
    schema["properties"]["tomorrow"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    bare.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", text=yaml.safe_dump(newer))
    start("newer")
    with model(bare, "newer") as look:
        eventually(lambda: condition(look(), "Ready").get("reason") == "Exporting", "the plain spec is taken")

        def patched() -> bool:
            patch = '{"spec":{"rollout":{"steps":[{"weight":100}],"tomorrow":{"x":1}}}}'
            bare.kubectl("patch", "mdep", "newer", "--type=merge", "-p", patch)
            return "tomorrow" in look()["spec"].get("rollout", {})

        eventually(patched, "the newer schema is served")
        told = eventually(lambda: condition(look(), "Stalled"), "it is refused")
        assert told["reason"] == "InvalidSpec"
        assert "tomorrow" in told["message"]
        assert json.loads(bare.kubectl("get", "jobs", "-o", "json").stdout)["items"], "what there was is still there"
    bare.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRD))

"""What every scenario is played on: one cluster, one ModelDeployment with two versions of two pods each, and load on it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from chaos.outside import Outside
from chaos.proxy import Policies, reached
from demo import checkpoints
from demo.load import Answer, Load
from demo.manifests import deployment, upload_digits
from devcluster import Cluster
from devcluster.paths import MANIFESTS
from devcluster.release import NAMESPACE
from devcluster.tenant import Tenant
from faults import Kind
from faults.publish import publish
from perch.builders.serving import GRPC, HTTP
from perch.names import ANNOTATION_SERVING_HASH

NAME = "digits"
REPLICAS = 2
GPUS = 8
"""What the node offers: room for two versions in the middle of a rolling update. Each pod asks for one."""
QUEUE_DELAY = 20_000
"""Microseconds that Triton waits for a batch to fill: so that a fault always meets requests that are under way."""
GRPC_RATE, REST_RATE = 30.0, 10.0
IN_FLIGHT = 4
"""Requests of one protocol under way at once: one that hangs must not stop the others from being counted."""
BUFFER, LARGE_BUFFER = 32 * 1024, 4 * 1024 * 1024
"""Bytes that the proxy keeps of a connection: its default, and what hack/manifests/retries.yaml asks for."""
CANARY_WEIGHT = 50
SLOW, TURNS = 3, 50
"""A third version, of the second one's checkpoint: right, and some twenty milliseconds slower than it."""
PATIENCE = 300.0
"""Seconds for a change to be done. Two cores may be busy with much else."""


class Broken(Exception):
    """Something other than a request was not as it should be."""


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


class Stage:
    def __init__(self, cluster: Cluster, logs: Path, namespace: str = "chaos") -> None:
        self.cluster = cluster
        self.logs = logs
        self.tenant = Tenant(cluster, namespace)
        self.host = f"{NAME}.{namespace}.example.com"
        self.route = f"{namespace}/{NAME}"
        self.entries: list[dict[str, Any]] = []
        self.load: Load
        """The one that runs while a scenario does."""
        self.others: list[Answer] = []
        """Outcomes of requests that a scenario sends by itself."""

    # -- setting up

    def build(self) -> None:
        """The ModelDeployment, anew: what an earlier run left goes first."""
        self.tenant.delete()
        self.tenant.make()
        self.entries = upload_digits(self.tenant)
        for entry in self.entries:
            entry["triton"]["dynamicBatching"]["maxQueueDelayMicroseconds"] = QUEUE_DELAY
        self.entries.append({**self.entries[1], "version": SLOW})
        publish(self.tenant, deployment(self.tenant, self.entries, name=NAME), SLOW, always=Kind.SLOW, turns=TURNS)
        self.forget_retries()
        self.settle()
        published = {"Published", "Serving"}
        self.wait(self._phases, lambda phases: set(phases) <= published, "all versions are exported")

    def settle(self) -> None:
        """The state in which every scenario begins: version 1 has all traffic and all its pods, everything else runs."""
        self.offer_gpus(GPUS)
        self.serve(1)

    @contextmanager
    def under_load(self) -> Iterator[None]:
        self.others = []
        target = (self.cluster.gateway_address(), self.host, NAME)
        self.load = Load(*target, grpc_rate=GRPC_RATE, rest_rate=REST_RATE, in_flight=IN_FLIGHT)
        with self.load:
            time.sleep(2)
            yield
            time.sleep(2)

    # -- what the user does

    def apply(self, stable: int, canary: int | None = None, env: dict[str, str] | None = None, **rollout: Any) -> None:
        """`rollout`: what it says, if not a split that is held."""
        runtime: dict[str, Any] = {
            "replicas": REPLICAS,
            "terminationGracePeriodSeconds": 30,
            "resources": {"limits": {"nvidia.com/gpu": 1}},
        }
        if env:
            runtime["env"] = [{"name": name, "value": value} for name, value in env.items()]
        rollout = {"steps": [{"weight": CANARY_WEIGHT, "hold": "Indefinite"}], "scaleDownDelay": "10s"} | rollout
        self.tenant.apply(deployment(self.tenant, self.entries, stable, canary, NAME, runtime=runtime, rollout=rollout))

    def serve(self, stable: int, canary: int | None = None, env: dict[str, str] | None = None, **rollout: Any) -> None:
        """Apply, and wait until it is so."""
        self.apply(stable, canary, env, **rollout)
        self.wait_served(canary is not None)

    def wait_served(self, split: bool, timeout: float = PATIENCE) -> None:
        self.tenant.wait_ready(NAME, "SplitHeld" if split else "Serving", timeout)

    # -- what is there

    def wait(
        self, look: Callable[[], Any], good: Callable[[Any], bool], what: str, timeout: float = PATIENCE, every: float = 0.5
    ) -> Any:
        try:
            return self.tenant.wait(look, good, timeout, every)
        except TimeoutError as error:
            raise Broken(f"not so: {what}: {error}") from error

    def pods(self, version: int | None = None) -> list[dict[str, Any]]:
        """Triton pods, of one version or all, those that are going too."""
        selector = "serving.perch.dev/component=triton" + (f",serving.perch.dev/version={version}" if version else "")
        return self.tenant.list("pods", selector)

    def uids(self, version: int | None = None) -> set[str]:
        return {pod["metadata"]["uid"] for pod in self.pods(version)}

    def wait_gone(self, version: int, timeout: float = PATIENCE) -> None:
        """Until this version has no pod any more, not even one that is going."""
        self.wait(lambda: self.pods(version), lambda left: not left, f"version {version} is scaled away", timeout)

    def wait_replaced(self, uids: set[str]) -> None:
        self.wait(lambda: self.uids() & uids, lambda left: not left, "the former pods are gone")

    def wait_full(self, version: int) -> None:
        """Until the version has all its pods, ready, and none that is going, and the proxies know them."""
        ready = [True] * REPLICAS
        self.wait(lambda: [is_ready(pod) for pod in self.pods(version)], lambda seen: seen == ready, "all pods are ready")
        wanted = {f"{pod['status']['podIP']}:{port}" for pod in self.pods(version) for port in (GRPC, HTTP)}
        with reached(self.cluster) as proxy:
            self.wait(lambda: proxy.endpoints(self.route), wanted.issubset, f"the proxy knows {wanted}")

    def condition(self, kind: str = "Ready") -> dict[str, Any]:
        return self.tenant.condition(NAME, kind)

    def state(self) -> dict[str, Any]:
        """All that a release leaves behind, without times and counters: the same whatever happened on the way."""
        status = self.tenant.status(NAME)
        told = ("version", "phase", "artifactDigest", "servingHash", "replicas", "readyReplicas", "weight")
        rules = (self.tenant.get("httproute", NAME) or {}).get("spec", {}).get("rules", [])
        return {
            "conditions": sorted([c["type"], c["status"], c["reason"]] for c in status.get("conditions", [])),
            "weights": status.get("weights"),
            "versions": [{key: v.get(key) for key in told} for v in status.get("versions", [])],
            "backends": [[[b["name"], b["port"], b["weight"]] for b in rule["backendRefs"]] for rule in rules],
            "deployments": {
                d["metadata"]["name"]: [d["spec"]["replicas"], d["metadata"]["annotations"][ANNOTATION_SERVING_HASH]]
                for d in self._children("deployments")
            },
            "services": [s["metadata"]["name"] for s in self._children("services")],
            "budgets": [b["metadata"]["name"] for b in self._children("poddisruptionbudgets")],
        }

    def answers(self) -> list[Answer]:
        return [*self.load.results(), *self.others]

    def failed(self) -> int:
        """Requests so far that had no answer, or one that is not the checkpoint's."""
        return sum(map(is_failed, self.answers()))

    # -- what is done to it

    def offer_gpus(self, number: int) -> None:
        """Makes the node have so many, as if others took the rest."""
        node = self.cluster.kubectl("get", "nodes", "-o", "jsonpath={.items[0].metadata.name}").stdout
        key = "nvidia.com~1gpu"
        patch = [{"op": "add", "path": f"/status/{part}/{key}", "value": str(number)} for part in ("capacity", "allocatable")]
        self.cluster.kubectl("patch", "node", node, "--subresource=status", "--type=json", "-p", json.dumps(patch))

    @contextmanager
    def retries(self, triggers: Sequence[str], *, large: bool = False) -> Iterator[None]:
        """The Gateway asks again for these reasons, as hack/manifests/retries.yaml has it; `large`: large requests too."""
        policy, buffers = yaml.safe_load_all((MANIFESTS / "retries.yaml").read_text())
        policy["spec"]["retry"]["retryOn"]["triggers"] = list(triggers)
        for each in (policy, *([buffers] if large else [])):
            self.cluster.kubectl("apply", "--server-side", "-f", "-", input=yaml.safe_dump(each))
        self._wait_policies("round_robin", set(triggers), LARGE_BUFFER if large else BUFFER)
        try:
            yield
        finally:
            self.forget_retries()
            self._wait_policies("least_request", set(), BUFFER)

    def forget_retries(self) -> None:
        self.cluster.kubectl("delete", "--ignore-not-found", "-f", str(MANIFESTS / "retries.yaml"))

    def _wait_policies(self, balancing: str, retry_on: set[str], buffer: int) -> None:
        """Until the proxy does so, whatever the policies' status says."""
        wanted = Policies(frozenset([balancing]), frozenset(retry_on), frozenset([buffer]))
        with reached(self.cluster) as proxy:
            self.wait(lambda: proxy.policies(self.route), lambda seen: seen == wanted, f"the proxy has taken in: {wanted}")

    @contextmanager
    def without(self, component: str) -> Iterator[None]:
        """One of the cluster's components is killed, and started again afterwards."""
        self.cluster.stop_component(component, kill=True)
        try:
            yield
        finally:
            self.cluster.start_component(component)

    @contextmanager
    def operator_away(self) -> Iterator[None]:
        """The operator inside the cluster is scaled to nothing, for one outside."""
        self._scale_operator(0)
        try:
            yield
        finally:
            self._scale_operator(1)

    def operator_outside(self, *, kill: bool) -> Outside:
        return Outside(self.cluster, self.logs / f"operator-{'killed' if kill else 'spared'}.log", kill=kill)

    # -- parts

    def _phases(self) -> list[str]:
        return [v["phase"] for v in self.tenant.status(NAME).get("versions", [])]

    def _children(self, kind: str) -> list[dict[str, Any]]:
        found = self.tenant.list(kind, f"serving.perch.dev/model-deployment={NAME}")
        return sorted(found, key=lambda child: str(child["metadata"]["name"]))

    def _scale_operator(self, replicas: int) -> None:
        deployed = ["-n", NAMESPACE]
        self.cluster.kubectl(*deployed, "scale", "deployment/perch", f"--replicas={replicas}")
        if replicas:
            self.cluster.kubectl(*deployed, "rollout", "status", "deployment/perch", "--timeout=180s")
        else:
            self.cluster.kubectl(*deployed, "wait", "--for=delete", "pods", "-l", "app.kubernetes.io/name=perch", "--timeout=90s")


def rfc3339_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def is_failed(answer: Answer) -> bool:
    return not answer.ok or answer.predicted not in (None, told(answer))


def told(answer: Answer) -> int:
    """What the checkpoint of the version that answered says of this image, by the training's own record."""
    version = int(answer.version or 0)
    return int(_records()[2 if version == SLOW else version].predictions[answer.image])


_records = cache(checkpoints.records)


def is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", [])
    return "deletionTimestamp" not in pod["metadata"] and any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

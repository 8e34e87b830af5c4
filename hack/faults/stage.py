"""Where the probe plays: a sound and a faulty model served by Perch, a Triton of its own for what ONNX cannot do, and routes.

Perch serves the faulty model as the one version of a ModelDeployment, and the probe's own routes make it a canary: as the canary
of a rollout it would be judged and aborted in the middle of the probe, as it should. Routed is what Perch routes. A request
with the header `probe: canary` goes to the faulty model, so that its number is known.
"""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from demo import digits
from demo.manifests import CHECKPOINTS, deployment, lenet
from devcluster import Cluster
from devcluster.tenant import Tenant
from faults import Kind, Pixels, mark
from faults.client import TOLD, Client
from faults.counters import Counts, Page, fetch, read_envoy, read_triton, samples
from faults.publish import publish
from perch.builders.route import GRPC_METHODS, GRPC_SERVICE, STREAM, rest_paths
from perch.builders.serving import GRPC, HTTP, METRICS

MODELS = Path(__file__).with_name("models")
OWN_MODELS = tuple(sorted(folder.name for folder in MODELS.iterdir() if folder.is_dir()))
MODEL = "digits"
SOUND, FAULTY, OWN, EMPTY = "sound", "faulty", "own", "empty"
VERSIONS = {SOUND: 1, FAULTY: 2}
MEMORY = "1Gi"
"""The limit of a Triton container; the fault OOM takes four times as much."""
ENVOY_STATS = 19001
CHOSEN, PLAIN, FILTERED, ORPHANED = "chosen", "plain", "filtered", "orphaned"
"""The routes: by header; 90 to 10 as Perch splits; the same with a filter on each backend; the same, but a canary without pods."""
HEADER = "probe"
WEIGHTS = {SOUND: 90, FAULTY: 10}
TRITON = "serving.perch.dev/component=triton"
PROXY = "gateway.envoyproxy.io/owning-gateway-name=gateway"
GATEWAY = {"name": "gateway", "namespace": "gateway-system"}
TELEMETRY = {"spec": {"telemetry": {"metrics": {"enableGRPCStats": True, "enablePerEndpointStats": True}}}}
"""Settings of the EnvoyProxy that are off by default."""


@dataclass(frozen=True)
class Backend:
    """What answers behind the probe's route, and which pod it is."""

    name: str
    """Also the value of the header that leads there."""
    version: str
    selector: str


STABLE = Backend(SOUND, "1", f"{TRITON},serving.perch.dev/model-deployment={SOUND}")
CANARY = Backend(FAULTY, "2", f"{TRITON},serving.perch.dev/model-deployment={FAULTY}")
PYTHON = Backend(OWN, "1", f"app={OWN}")
NOBODY = Backend(EMPTY, "1", f"app={EMPTY}")


class Stage:
    """A namespace with a name of its own for each run: the buckets remember what a former run published."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.tenant = Tenant(cluster, f"probe-{uuid.uuid4().hex[:6]}")
        self.image: Pixels = digits.held_out()[0][:1]

    # -- set-up

    def set_up(self) -> None:
        self.tenant.make()
        self.cluster.kubectl(
            "patch", "envoyproxy/perch", "--namespace=gateway-system", "--type=merge", f"-p={json.dumps(TELEMETRY)}"
        )
        for name, version in VERSIONS.items():
            manifest = self._model_deployment(name, version)
            if name == FAULTY:
                publish(self.tenant, manifest, version)
            self.tenant.apply(manifest)
        for manifest in (*self._own_triton(), *self._routes()):
            self.tenant.apply(manifest)
        for name in VERSIONS:
            self.tenant.wait_ready(name)
        self.tenant.kubectl("rollout", "status", f"deployment/{OWN}", "--timeout=120s")

    def tear_down(self) -> None:
        self.tenant.delete(wait=False)

    def _model_deployment(self, name: str, version: int) -> dict[str, Any]:
        key = f"{self.tenant.namespace}/{name}.pt"
        sha256 = self.tenant.upload(key, (CHECKPOINTS / f"v{version}.pt").read_bytes())
        runtime = {"terminationGracePeriodSeconds": 30, "resources": {"limits": {"memory": MEMORY}}}
        return deployment(self.tenant, [lenet(version, key, sha256)], stable=version, name=name, modelName=MODEL, runtime=runtime)

    def _own_triton(self) -> list[dict[str, Any]]:
        """A Deployment with its Service, and a Service without pods."""
        files = {str(path.relative_to(MODELS)): path.read_text() for path in MODELS.rglob("*.p*") if path.is_file()}
        items = [{"key": path.replace("/", "."), "path": path} for path in files]
        pod = {
            "terminationGracePeriodSeconds": 5,
            "containers": [
                {
                    "name": "triton",
                    "image": self.cluster.images["perch-tritonserver-cpu"],
                    "imagePullPolicy": "IfNotPresent",
                    # Triton takes the links that a mounted ConfigMap has in it for models: it gets a copy.
                    "command": ["sh", "-c", "cp -rL /config/[a-z]* /models && exec tritonserver --model-repository=/models"],
                    "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": HTTP}, "periodSeconds": 1},
                    "volumeMounts": [
                        {"name": "config", "mountPath": "/config"},
                        {"name": "models", "mountPath": "/models"},
                        {"name": "shm", "mountPath": "/dev/shm"},
                    ],
                }
            ],
            "volumes": [
                {"name": "config", "configMap": {"name": OWN, "items": items}},
                {"name": "models", "emptyDir": {}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
            ],
            "securityContext": {"fsGroup": 65532},
        }
        ports = [
            {"name": "http", "port": HTTP, "appProtocol": "http"},
            {"name": "grpc", "port": GRPC, "appProtocol": "kubernetes.io/h2c"},
        ]
        template = {"metadata": {"labels": {"app": OWN}}, "spec": pod}
        return [
            self._object("v1", "ConfigMap", OWN, data={path.replace("/", "."): text for path, text in files.items()}),
            self._object("apps/v1", "Deployment", OWN, spec={"selector": {"matchLabels": {"app": OWN}}, "template": template}),
            *(self._object("v1", "Service", name, spec={"selector": {"app": name}, "ports": ports}) for name in (OWN, EMPTY)),
        ]

    def _routes(self) -> list[dict[str, Any]]:
        split = {f"{name}-v{VERSIONS[name]}": weight for name, weight in WEIGHTS.items()}
        chosen = {FAULTY: f"{FAULTY}-v{VERSIONS[FAULTY]}", OWN: OWN, EMPTY: EMPTY}
        rules = {
            CHOSEN: [rule for header, service in chosen.items() for rule in _rules({service: 100}, header)],
            PLAIN: _rules(split),
            FILTERED: _rules(split, filters=True),
            ORPHANED: _rules({f"{SOUND}-v{VERSIONS[SOUND]}": WEIGHTS[SOUND], EMPTY: WEIGHTS[FAULTY]}),
        }
        return [
            self._object(
                "gateway.networking.k8s.io/v1", "HTTPRoute", name,
                spec={"parentRefs": [GATEWAY], "hostnames": [self._host(name)], "rules": rules[name]},
            )
            for name in rules
        ]  # fmt: skip

    def _object(self, version: str, kind: str, name: str, **content: Any) -> dict[str, Any]:
        return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": self.tenant.namespace}, **content}

    def _host(self, route: str) -> str:
        return f"{route}-route.{self.tenant.namespace}.example.com"

    # -- asking

    def client(self, backend: Backend | None = None, route: str = CHOSEN) -> Client:
        address = "{}:{}".format(*self.cluster.gateway_address())
        return Client(address, self._host(route), {HEADER: backend.name} if backend else {})

    def marked(self, kind: Kind, **how: Any) -> Pixels:
        return mark(self.image, kind, **how)

    # -- looking

    def triton_page(self, backend: Backend) -> Page:
        return fetch(f"http://{self.address(backend)}:{METRICS}/metrics")

    def triton(self, backend: Backend, model: str = MODEL) -> Counts:
        return read_triton(self.triton_page(backend).text, model, backend.version)

    def envoy_page(self) -> Page:
        selector = ["--namespace=envoy-gateway-system", "--selector", PROXY]
        address = self.cluster.kubectl("get", "pods", *selector, "-o", "jsonpath={.items[0].status.podIP}").stdout
        return fetch(f"http://{address}:{ENVOY_STATS}/stats/prometheus")

    def envoy(self, route: str = CHOSEN) -> Counts:
        return read_envoy(self.envoy_page().text, self.clusters(route))

    def endpoints(self, route: str) -> dict[str, float]:
        """Good answers by backend of a route, as Envoy's statistics of single endpoints say."""
        names = {self.address(CANARY): FAULTY, self.address(STABLE): SOUND}
        found: dict[str, float] = {}
        for name, labels, value in samples(self.envoy_page().text):
            if name == "envoy_cluster_endpoint_rq_success" and labels["envoy_cluster_name"].startswith(self.clusters(route)):
                backend = names[labels["envoy_endpoint_address"].rsplit(":", 1)[0]]
                found[backend] = found.get(backend, 0) + value
        return found

    def clusters(self, route: str) -> str:
        """How the names of a route's clusters begin."""
        return f"httproute/{self.tenant.namespace}/{route}/"

    def triton_version(self) -> str:
        return str(httpx.get(f"http://{self.address(CANARY)}:{HTTP}/v2", timeout=5).json()["version"])

    def pod(self, backend: Backend) -> dict[str, Any]:
        """The one pod of the backend that is not being deleted."""
        living = [p for p in self.tenant.list("pods", backend.selector) if "deletionTimestamp" not in p["metadata"]]
        if len(living) != 1:
            raise LookupError(f"{backend.name} has {len(living)} pods, not one")
        return living[0]

    def address(self, backend: Backend) -> str:
        return str(self.pod(backend)["status"]["podIP"])

    def processes(self, backend: Backend, program: str) -> list[psutil.Process]:
        """Processes of the backend's pod on this machine, by a part of their program's name."""
        uid = self.pod(backend)["metadata"]["uid"]
        return [
            p for p in psutil.process_iter(["cmdline"]) if program in " ".join(p.info["cmdline"] or [])[:80] and _in_pod(p, uid)
        ]

    # -- back in order

    def restart(self, backend: Backend) -> None:
        """Another pod in its place, at once, and answers from it."""
        self.tenant.kubectl("delete", "pod", self.pod(backend)["metadata"]["name"], "--grace-period=0", "--force")
        self.wait_ready(backend)

    def wait_ready(self, backend: Backend) -> None:
        """Until the server answers and the pod is Ready: for a second after a crash the pod still says that it is."""
        self.tenant.wait(lambda: self._answers(backend), bool, 180)
        self.tenant.wait(lambda: self._is_ready(backend), bool, 180)

    def _answers(self, backend: Backend) -> bool:
        try:
            return bool(self.triton_page(backend).text)
        except (httpx.HTTPError, KeyError, LookupError):  # not there, without an address, two of them
            return False

    def _is_ready(self, backend: Backend) -> bool:
        conditions = self.pod(backend)["status"].get("conditions", [])
        return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _rules(weights: dict[str, int], header: str | None = None, filters: bool = False) -> list[dict[str, Any]]:
    """gRPC's rule and REST's, as Perch makes them."""
    grpc = [f"{GRPC_SERVICE}/{GRPC_METHODS[0]}", STREAM]
    rest = [rest_paths(model)[0] for model in (MODEL, *OWN_MODELS)]
    match = {"headers": [{"name": HEADER, "value": header}]} if header else {}

    def backend(name: str, weight: int, port: int) -> dict[str, Any]:
        say = {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": TOLD, "value": name}]}}
        return {"name": name, "port": port, "weight": weight, **({"filters": [say]} if filters else {})}

    return [
        {
            "matches": [{"path": {"type": "Exact", "value": path}, **match} for path in paths],
            "backendRefs": [backend(name, weight, port) for name, weight in weights.items()],
            "timeouts": {"request": "0s"},
        }
        for port, paths in ((GRPC, grpc), (HTTP, rest))
    ]


def _in_pod(process: psutil.Process, uid: str) -> bool:
    try:
        return uid in Path(f"/proc/{process.pid}/cgroup").read_text()
    except OSError:
        return False

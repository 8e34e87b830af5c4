"""What every cluster carries besides Kubernetes: an S3 server, Envoy Gateway with its Gateway, Prometheus (and DNS).

The manifests in hack/manifests name public images; a native cluster puts its local ones in their place.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from devcluster import gobuild
from devcluster.clients import Clients
from devcluster.paths import MANIFESTS
from devcluster.progress import Progress

_CHART = "charts/gateway-helm"

S3_ACCESS_KEY = "perch"
S3_SECRET_KEY = "perch-development"
S3_REGION = "us-east-1"
GATEWAY_PORT, S3_PORT, PROMETHEUS_PORT = 30080, 30900, 30909
"""Node ports, as the manifests say."""

PUBLIC_IMAGES = {
    "coredns": "coredns/coredns",
    "versitygw": "ghcr.io/versity/versitygw:v1.8.0",
    "prometheus": "prom/prometheus:v3.15.0",
    "envoy": "docker.io/envoyproxy/envoy:distroless-v1.39.1",
    "envoy-gateway": f"docker.io/envoyproxy/gateway:{gobuild.ENVOY_GATEWAY.version}",
}

DEPLOYMENTS = {
    "s3": ("storage", "s3"),
    "prometheus": ("monitoring", "prometheus"),
    "envoy-gateway": ("envoy-gateway-system", "envoy-gateway"),
    "coredns": ("kube-system", "coredns"),
}
"""Components that are Deployments, which fault tests may scale to nothing and back: namespace and name."""

SELECTORS = {
    "s3": "app=s3",
    "prometheus": "app=prometheus",
    "envoy-gateway": "control-plane=envoy-gateway",
    "coredns": "k8s-app=kube-dns",
}
"""The labels of these Deployments' pods."""


@dataclass(frozen=True)
class Addons:
    """Installs the addons through kubectl and helm; whatever is there already is left as it is."""

    clients: Clients
    images: Mapping[str, str]
    """References by name as in PUBLIC_IMAGES; what is missing stays public."""
    values: Mapping[str, str]
    """What stands for ${NAME} in the manifests."""

    def logged(self, log: Path) -> "Addons":
        """The same, with what kubectl and helm print in a step's log."""
        return replace(self, clients=self.clients.logged(log))

    def manifest(self, name: str) -> str:
        """A manifest of hack/manifests with this cluster's values and images."""
        text = (MANIFESTS / f"{name}.yaml").read_text()
        everything = {"ENVOY_GATEWAY_IMAGE": PUBLIC_IMAGES["envoy-gateway"], **self.values}
        for key, value in everything.items():
            text = text.replace("${" + key + "}", value)
        for image, public in PUBLIC_IMAGES.items():
            text = text.replace(public, self.images.get(image, public))
        return text

    def digest(self, names: Sequence[str]) -> str:
        """A hash of all that would be applied."""
        parts = [gobuild.ENVOY_GATEWAY.version, *[self.manifest(name) for name in names]]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def apply(self, name: str) -> None:
        self.clients.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=self.manifest(name))

    def install_envoy_gateway(self) -> None:
        """Installs Envoy Gateway and the Gateway API's CRDs from Envoy Gateway's own chart, as its module has it."""
        release = ["envoy-gateway", "--namespace", "envoy-gateway-system"]
        told = self.clients.helm("status", *release, "--output", "json", check=False)
        if told.returncode == 0 and '"status":"deployed"' not in told.stdout:
            self.clients.helm("uninstall", *release, "--wait")  # an interrupted installation blocks the next one
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(temporary) / "gateway-helm"
            shutil.copytree(_chart(), copy)
            (copy / "values.yaml").write_text((copy / "values.tmpl.yaml").read_text())
            values = Path(temporary) / "values.yaml"
            values.write_text(self.manifest("envoy-gateway-values"))
            self.clients.helm("upgrade", "--install", *release, copy, "--create-namespace", "--values", values, "--timeout=5m")

    def wait(self, names: Sequence[str]) -> None:
        """Waits until these Deployments (by component name) have their pods, and until the Gateway takes traffic."""
        for component in names:
            namespace, deployment = DEPLOYMENTS[component]
            self.clients.kubectl("-n", namespace, "rollout", "status", f"deployment/{deployment}", "--timeout=180s")
        in_gateway = ["-n", "gateway-system"]
        self.clients.kubectl(*in_gateway, "wait", "--for=condition=Programmed", "gateway/gateway", "--timeout=180s")


def prepare_chart(progress: Progress) -> None:
    """Has Envoy Gateway's chart, which lies in its Go module, in the cache."""
    if not _chart().is_dir():
        with progress.step("Envoy Gateway's chart") as log:
            gobuild.extract_module_files(gobuild.ENVOY_GATEWAY, _CHART, log)


def _chart() -> Path:
    return gobuild.module_files(gobuild.ENVOY_GATEWAY, _CHART)


def replicas_command(component: str, replicas: int) -> list[str]:
    """kubectl's arguments that stop (0) or start (1) a component that is a Deployment."""
    namespace, deployment = DEPLOYMENTS[component]
    return ["-n", namespace, "scale", f"deployment/{deployment}", f"--replicas={replicas}"]

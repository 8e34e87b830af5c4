"""A cluster by kind, where a Docker engine answers. THIS PATH HAS NOT RUN YET on any machine of ours.

The same manifests as the native cluster's, with the public images they name; Perch's own images are built by docker and
loaded with `kind load`. kind brings DNS, and a CNI that enforces NetworkPolicies.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

from devcluster import addons, gobuild, images
from devcluster.clients import Clients
from devcluster.commands import StepError, capture, run
from devcluster.paths import HACK, clusters_dir
from devcluster.progress import Progress
from devcluster.record import Record

_CONFIG = HACK / "kind" / "cluster.yaml"
_MANIFESTS = ("storage", "prometheus", "gateway")
_COMPONENTS = ("s3", "prometheus", "envoy-gateway", "coredns")


def is_wanted() -> bool:
    """What PERCH_BACKEND says, `kind` or `native`; without it, kind where a Docker engine answers."""
    wanted = os.environ.get("PERCH_BACKEND", "")
    if wanted not in ("", "kind", "native"):
        raise StepError(f"PERCH_BACKEND is {wanted!r}; it may be kind, native, or not set")
    return wanted == "kind" or (not wanted and _engine_answers())


def _engine_answers() -> bool:
    """Whether a Docker engine runs here; the client alone is not enough."""
    try:
        asked = subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0


def _programs() -> list[gobuild.Group]:
    """What has to be built: kubectl comes with all of Kubernetes, so only where the machine has none."""
    return [gobuild.KIND, gobuild.HELM, *([] if shutil.which("kubectl") else [gobuild.KUBERNETES])]


class KindCluster:
    """One kind cluster, by name; the same face as NativeCluster."""

    def __init__(self, name: str) -> None:
        self.folder = clusters_dir() / name
        self.kubeconfig = self.folder / "kubeconfig"
        self.record = Record(self.folder / "record.json")
        self._kind_name = f"perch-{name}"
        self._node = f"{self._kind_name}-control-plane"

    def address(self, node_port: int) -> tuple[str, int]:
        host, _, port = capture(["docker", "port", self._node, f"{node_port}/tcp"]).splitlines()[0].rpartition(":")
        return host, int(port)

    def exec_prefix(self) -> list[str]:
        return []

    def program_folders(self) -> list[Path]:
        return [gobuild.target(group) for group in _programs()]

    def components(self) -> dict[str, bool]:
        return {self._node: self._exists()}

    def up(self, progress: Progress, gpus: int | None) -> None:
        progress.note(
            "a Docker engine answers: this makes a kind cluster, which has never been run; PERCH_BACKEND=native avoids it"
        )
        gobuild.build_missing(_programs(), progress)
        addons.prepare_chart(progress)
        gobuild.discard_build_cache()
        with progress.step("kind") as log:
            if not self._exists():
                made = [f"--name={self._kind_name}", f"--kubeconfig={self.kubeconfig}"]
                run([self._kind, "create", "cluster", f"--config={_CONFIG}", "--wait=180s", *made], log=log)
        references = images.references()
        for name, reference in references.items():
            with progress.step(f"image {name}") as log:
                images.build_with_docker(name, log)
                run([self._kind, "load", "docker-image", reference, f"--name={self._kind_name}"], log=log, timeout=1800)
        self.record.update(images=references)
        clients = Clients(self.kubeconfig, self.program_folders())
        number = self.record.read().get("gpus", 0) if gpus is None else gpus
        with progress.step("node") as log:
            clients.logged(log).patch_node_resource(self._node, "nvidia.com/gpu", number)
        self.record.update(gpus=number)
        values = {
            "S3_DATA": "/var/lib/perch-s3",
            "S3_ACCESS_KEY": addons.S3_ACCESS_KEY,
            "S3_SECRET_KEY": addons.S3_SECRET_KEY,
            "S3_REGION": addons.S3_REGION,
        }
        with progress.step("addons") as log:
            installer = addons.Addons(clients.logged(log), {}, values)
            installer.install_envoy_gateway()
            for name in _MANIFESTS:
                installer.apply(name)
            installer.wait(_COMPONENTS)

    def down(self, progress: Progress) -> None:
        if not self._exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        gobuild.build_missing([gobuild.KIND], progress)
        with progress.step("kind") as log:
            run([self._kind, "delete", "cluster", f"--name={self._kind_name}"], log=log)
        shutil.rmtree(self.folder, ignore_errors=True)

    def stop_component(self, component: str, *, kill: bool) -> None:
        act = "killed" if kill else "stopped"
        raise StepError(f"{component} can't be {act} in a kind cluster, where the node's processes are one container's")

    def start_component(self, component: str) -> None:
        raise StepError(f"{component} can't be started in a kind cluster, where the node's processes are one container's")

    @property
    def _kind(self) -> str:
        return str(gobuild.target(gobuild.KIND) / "kind")

    def _exists(self) -> bool:
        told = capture(["docker", "ps", "--all", "--format={{json .Names}}", f"--filter=name=^{self._node}$"])
        return any(json.loads(line) == self._node for line in told.splitlines())

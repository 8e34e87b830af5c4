"""The one object that tests, the demo and the command line use; behind it a native cluster, or kind."""

import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from devcluster import addons, kind
from devcluster.clients import Clients
from devcluster.commands import Argument, StepError
from devcluster.native import NativeCluster
from devcluster.paths import clusters_dir
from devcluster.privileges import require_root
from devcluster.progress import Progress


@dataclass(frozen=True)
class S3Info:
    """The cluster's S3 server, from both sides, and its one user."""

    endpoint: str
    """For pods."""
    host_endpoint: str
    """For programs on this machine."""
    access_key: str
    secret_key: str
    region: str


class Cluster:
    """A cluster by name. Making the object does nothing; `up` may be called at any time, from any state.

    `gpus` is how many nvidia.com/gpu the node offers; None leaves that as it is (0 in a new cluster).
    """

    def __init__(self, name: str = "perch", gpus: int | None = None) -> None:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,28}[a-z0-9])?", name):
            raise ValueError(f"a cluster's name is 1 to 30 lower-case letters, digits and dashes, not {name!r}")
        self.name = name
        self.gpus = gpus

    @cached_property
    def _backend(self) -> "NativeCluster | kind.KindCluster":
        return kind.KindCluster(self.name) if kind.is_wanted() else NativeCluster(self.name)

    def up(self) -> None:
        """Makes the cluster, or finishes or repairs it; returns when everything in it is ready."""
        self._require_root()
        with Progress(self._backend.folder / "logs") as progress, progress.locked(self._lock, self.name):
            self._backend.up(progress, self.gpus)

    def down(self) -> None:
        """Removes everything that `up` made, and only that. Does nothing where nothing is."""
        self._require_root()
        with Progress(clusters_dir() / ".logs" / self.name) as progress, progress.locked(self._lock, self.name):
            self._backend.down(progress)

    @property
    def kubeconfig(self) -> Path:
        return self._backend.kubeconfig

    def env(self) -> dict[str, str]:
        """KUBECONFIG, and PATH with the cache's kubectl and helm first."""
        return self._clients.env()

    def kubectl(self, *arguments: Argument, input: str | None = None, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Runs kubectl against this cluster; what it prints is in the result, or in the notes of the error."""
        return self._clients.kubectl(*arguments, input=input, check=check)

    def helm(self, *arguments: Argument, input: str | None = None, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return self._clients.helm(*arguments, input=input, check=check)

    @property
    def images(self) -> dict[str, str]:
        """References in this cluster of Perch's images, by name."""
        return dict(self._backend.record.read().get("images", {}))

    @property
    def s3(self) -> S3Info:
        return S3Info(
            endpoint="http://s3.storage.svc:9000",
            host_endpoint=self._url(addons.S3_PORT),
            access_key=addons.S3_ACCESS_KEY,
            secret_key=addons.S3_SECRET_KEY,
            region=addons.S3_REGION,
        )

    def gateway_address(self) -> tuple[str, int]:
        """Where this machine reaches the Gateway's HTTP listener."""
        return self._backend.address(addons.GATEWAY_PORT)

    def prometheus_url(self) -> str:
        return self._url(addons.PROMETHEUS_PORT)

    def exec_prefix(self) -> list[str]:
        """Words to put before a command so that it runs in the cluster's network namespace; none with kind."""
        return self._backend.exec_prefix()

    def components(self) -> dict[str, bool]:
        """The node's processes, and whether each runs."""
        return self._backend.components()

    def stop_component(self, component: str, *, kill: bool = False) -> None:
        """For fault tests: ends a process of the node, or scales an addon to nothing, and waits until it is gone.

        Processes: etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kube-proxy, containerd.
        Addons: s3, prometheus, envoy-gateway, coredns. `kill` uses SIGKILL, or deletes pods without grace.
        """
        if component in addons.DEPLOYMENTS:
            namespace, _ = addons.DEPLOYMENTS[component]
            pods = ["-n", namespace, "delete", "pods", "-l", addons.SELECTORS[component]]
            self.kubectl(*addons.replicas_command(component, 0))
            self.kubectl(*pods, "--ignore-not-found", "--wait", *(["--grace-period=0", "--force"] if kill else []))
        else:
            self._require_root()
            self._backend.stop_component(component, kill=kill)

    def start_component(self, component: str) -> None:
        """Starts what `stop_component` stopped; an addon is waited for until it is ready."""
        if component in addons.DEPLOYMENTS:
            namespace, deployment = addons.DEPLOYMENTS[component]
            self.kubectl(*addons.replicas_command(component, 1))
            self.kubectl("-n", namespace, "rollout", "status", f"deployment/{deployment}", "--timeout=120s")
        else:
            self._require_root()
            self._backend.start_component(component)

    @property
    def _clients(self) -> Clients:
        return Clients(self._backend.kubeconfig, self._backend.program_folders())

    def _url(self, node_port: int) -> str:
        host, port = self._backend.address(node_port)
        return f"http://{host}:{port}"

    def _require_root(self) -> None:
        if isinstance(self._backend, NativeCluster):
            require_root(f"cluster {self.name}, made of processes of this machine,")

    @property
    def _lock(self) -> Path:
        return clusters_dir() / f".{self.name}.lock"


def names() -> list[str]:
    """The clusters that there are, or were begun."""
    folder = clusters_dir()
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")) if folder.exists() else []


__all__ = ["Cluster", "S3Info", "StepError", "names"]

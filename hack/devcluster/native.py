"""A cluster without a container engine: every component a process of this machine, in a network namespace of its own.

`up` looks at what stands and adds what is missing, so it starts, repairs and finishes alike. What it makes is the
cluster's folder, its run folder, its root for containerd, its processes, cgroup, mounts, namespace and interface;
`down` removes these and nothing else.
"""

import shutil
import time
from pathlib import Path

from devcluster import addon_images, addons, cgroup, containerd, debian, gobuild, images, network
from devcluster.certificates import Authority
from devcluster.clients import Clients
from devcluster.commands import StepError, run
from devcluster.containerd import Containerd, GoldenStore
from devcluster.control_plane import ControlPlane
from devcluster.node import Node
from devcluster.paths import cache_dir, clusters_dir
from devcluster.privileges import hand_over
from devcluster.processes import Processes
from devcluster.progress import Progress
from devcluster.record import Record

_MANIFESTS = ("coredns", "storage", "prometheus", "gateway")
_COMPONENTS = (
    "etcd",
    "containerd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
)


class NativeCluster:
    """One native cluster, by name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = clusters_dir() / name
        self.record = Record(self.folder / "record.json")
        self.processes = Processes(self.folder, self.folder / "logs")
        self.kubeconfig = self.folder / "kubeconfig"
        self._run = Path("/run/perch") / name
        self._containerd_root = containerd.cluster_root(name)

    # -- what others ask

    @property
    def network(self) -> network.Network:
        claimed = network.claimed(clusters_dir(), self.name)
        if claimed is None:
            raise StepError(f"there is no cluster {self.name}; `python -m devcluster up --name {self.name}` makes it")
        return claimed

    def address(self, node_port: int) -> tuple[str, int]:
        return self.network.node_address, node_port

    def exec_prefix(self) -> list[str]:
        return self.network.inside

    def program_folders(self) -> list[Path]:
        return [gobuild.target(gobuild.KUBERNETES), gobuild.target(gobuild.HELM)]

    def components(self) -> dict[str, bool]:
        """Which of the node's processes run."""
        return {component: self.processes.alive(component) for component in _COMPONENTS}

    def stop_component(self, component: str, *, kill: bool) -> None:
        self.processes.stop(component, kill=kill)

    def start_component(self, component: str) -> None:
        if component == "kubelet":
            self._start_kubelet(self.processes.log("node"))
        else:
            self._start(component)
        if component == "kube-apiserver":
            self._wait_for_apiserver()

    # -- up

    def up(self, progress: Progress, gpus: int | None) -> None:
        offered = self.record.read().get("gpus", 0) if gpus is None else gpus
        debian.install_missing(progress)
        self._build_programs(progress)
        addon_references, perch_references = self._prepare_images(progress)
        if not self._stands():
            with progress.step("clear away what an earlier run left") as log:
                self._clear(log)
        with progress.step("network and image store") as log:
            self._begin(log)
            self.record.update(images=perch_references, addon_images=addon_references)
            self._bring_images({**addon_references, **perch_references}, log)
        with progress.step("control plane"):  # each component has a log of its own
            for component in ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"):
                self._start(component)
            self._wait_for_apiserver()
        with progress.step("node") as log:
            self.record.update(gpus=offered)
            self._start("kube-proxy")
            self._start_kubelet(log)
        self._install_addons(progress, addon_references)

    def _build_programs(self, progress: Progress) -> None:
        gobuild.build_missing(gobuild.GROUPS, progress)
        addons.prepare_chart(progress)
        gobuild.discard_build_cache()

    def _prepare_images(self, progress: Progress) -> tuple[dict[str, str], dict[str, str]]:
        """Has every image in the golden store; returns the references of the addons' images and of Perch's own."""
        archives = cache_dir() / "archives"
        archives.mkdir(parents=True, exist_ok=True)
        log = archives / "packages.log"
        addon_references, perch_references = addon_images.references(log), images.references()
        for name, reference in {**addon_references, **perch_references}.items():
            # Two clusters that start at once build an image once; clones need not wait for a build.
            with progress.locked(archives / f".{name}.lock", f"image {name}"):
                if reference in containerd.golden_references():
                    continue
                with progress.step(f"image {name}") as log:
                    if name in perch_references:
                        archive = images.build(name, log, containerd.golden_blobs())
                    else:
                        archive = archives / f"{name}.tar"
                        addon_images.build(name, reference, archive, log)
                    with GoldenStore(log) as store:
                        store.add(reference, archive)
                    archive.unlink()
        return addon_references, perch_references

    def _stands(self) -> bool:
        """Whether what is there was made since the machine started, and has its namespace: `up` can go on with it."""
        try:
            same_boot = (self.folder / "boot-id").read_text() == _boot_id()
        except FileNotFoundError:
            return False
        claimed = network.claimed(clusters_dir(), self.name)
        return same_boot and claimed is not None and claimed.exists()

    def _begin(self, log: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in ("logs", "kubeconfigs", "s3"):
            (self.folder / folder).mkdir(exist_ok=True)
        self._run.mkdir(parents=True, exist_ok=True)
        network.claim(clusters_dir(), self.name).create(log)
        cgroup.create(self.network.namespace)
        (self.folder / "boot-id").write_text(_boot_id())
        self._control_plane().kubeconfig("admin", "admin", "system:masters").replace(self.kubeconfig)
        hand_over(self.kubeconfig)

    def _bring_images(self, references: dict[str, str], log: Path) -> None:
        if not self._containerd_root.exists():
            with GoldenStore(log) as store:
                store.clone(self._containerd_root)
        self._start("containerd")
        missing = set(references.values()) - self._containerd().images()
        if missing:
            with GoldenStore(log) as store:
                for reference in sorted(missing):
                    store.transfer(reference, self._containerd())

    def _wait_for_apiserver(self) -> None:
        deadline = time.monotonic() + 90
        while self._clients().kubectl("get", "--raw=/readyz", check=False).returncode != 0:
            for component in ("etcd", "kube-apiserver"):
                self.processes.require(component)
            if time.monotonic() > deadline:
                raise StepError(f"kube-apiserver is not ready after 90 s; its log is {self.processes.log('kube-apiserver')}")
            time.sleep(0.1)

    def _start_kubelet(self, log: Path) -> None:
        """Starts the kubelet, and makes its node offer nvidia.com/gpu: an extended resource needs no device."""
        clients, node = self._clients().logged(log), self.network.namespace
        self._start("kubelet")
        clients.wait_for_node(node)
        clients.patch_node_resource(node, "nvidia.com/gpu", self.record.read()["gpus"])

    def _install_addons(self, progress: Progress, references: dict[str, str]) -> None:
        clients = self._clients()
        values = {
            "DNS_ADDRESS": self.network.dns_address,
            "S3_DATA": str(self.folder / "s3"),
            "S3_ACCESS_KEY": addons.S3_ACCESS_KEY,
            "S3_SECRET_KEY": addons.S3_SECRET_KEY,
            "S3_REGION": addons.S3_REGION,
        }
        installer = addons.Addons(clients, references, values)
        digest = installer.digest([*_MANIFESTS, "envoy-gateway-values"])
        if self.record.read().get("addons") != digest:
            with progress.step("DNS, S3 server, Prometheus") as log:
                for name in ("coredns", "storage", "prometheus"):
                    installer.logged(log).apply(name)
            with progress.step("Envoy Gateway") as log:
                installer.logged(log).install_envoy_gateway()
                installer.logged(log).apply("gateway")
            self.record.update(addons=digest)
        with progress.step("addons are ready") as log:
            for component in addons.DEPLOYMENTS:
                clients.logged(log).kubectl(*addons.replicas_command(component, 1))
            installer.logged(log).wait(list(addons.DEPLOYMENTS))

    # -- down

    def down(self, progress: Progress) -> None:
        with progress.step(f"remove cluster {self.name}") as log:
            self._clear(log)
            network.release(clusters_dir(), self.name)

    def _clear(self, log: Path) -> None:
        """Removes whatever of this cluster is there, in whatever state; the folder last, so that it can be repeated."""
        self.processes.stop(kill=True)
        claimed = network.claimed(clusters_dir(), self.name)
        if claimed is not None:
            cgroup.remove(claimed.namespace)
        for point in _mounts_below(self._run, self._containerd_root, self.folder):
            run(["umount", "--lazy", point], log=log)
        self._remove_traces_elsewhere()
        if claimed is not None:
            claimed.remove(log)
        for folder in (self._containerd_root, self._run, self.folder):
            if folder.exists():
                shutil.rmtree(folder)

    def _remove_traces_elsewhere(self) -> None:
        """Files that the shims, the CNI library and the kubelet keep in places of their own choice."""
        for address in self._run.glob("containerd/io.containerd.runtime.v2.task/k8s.io/*/address"):
            Path(address.read_text().removeprefix("unix://")).unlink(missing_ok=True)
        for sandbox in self._containerd_root.glob("io.containerd.grpc.v1.cri/sandboxes/*"):
            for result in Path("/var/lib/cni/results").glob(f"*-{sandbox.name}-*"):
                result.unlink()
        for link in Path("/var/log/containers").glob("*.log"):
            if link.is_symlink() and link.readlink().is_relative_to(self.folder):
                link.unlink()

    # -- parts

    def _start(self, component: str) -> None:
        if self.processes.alive(component):
            return
        control_plane, node = self._control_plane(), self._node()
        if component == "containerd":
            config = self.folder / "containerd.toml"
            config.write_text(self._containerd().config(node.cri_config(self.record.read()["addon_images"]["pause"])))
            self.processes.start(component, self._containerd_command(config), path=self._containerd().path())
            self._containerd().wait(self.processes)
            return
        commands = {
            "etcd": control_plane.etcd,
            "kube-apiserver": control_plane.apiserver,
            "kube-controller-manager": control_plane.controller_manager,
            "kube-scheduler": control_plane.scheduler,
            "kubelet": node.kubelet,
            "kube-proxy": node.proxy,
        }
        if component not in commands:
            raise StepError(
                f"there is no component {component}; those there are: {', '.join([*_COMPONENTS, *addons.DEPLOYMENTS])}"
            )
        self.processes.start(component, commands[component](), path=debian.path_with_sbin())

    def _containerd_command(self, config: Path) -> list[str | Path]:
        return [*self.network.inside, *self._containerd().command(config)]

    def _containerd(self) -> Containerd:
        return Containerd(containerd.programs(self.folder / "logs" / "packages.log"), self._containerd_root, self._run)

    def _authority(self) -> Authority:
        return Authority(self.folder / "pki")

    def _control_plane(self) -> ControlPlane:
        etcd, kubernetes = gobuild.target(gobuild.ETCD), gobuild.target(gobuild.KUBERNETES)
        return ControlPlane(self.folder, self.network, self._authority(), etcd, kubernetes)

    def _node(self) -> Node:
        programs = gobuild.target(gobuild.KUBERNETES)
        return Node(self.folder, self.network, self._authority(), programs, self._run / "containerd.sock")

    def _clients(self) -> Clients:
        return Clients(self.kubeconfig, self.program_folders())


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def _mounts_below(*folders: Path) -> list[str]:
    """Mount points inside these folders, innermost first."""
    points = [line.split()[4].replace("\\040", " ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    inside = [point for point in points if any(Path(point).is_relative_to(folder) for folder in folders)]
    return sorted(inside, key=len, reverse=True)

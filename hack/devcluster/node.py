"""Configuration of the one node: containerd's CRI part, the pods' network, kubelet, kube-proxy."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from devcluster.certificates import Authority
from devcluster.commands import Argument
from devcluster.network import Network

CNI_PLUGINS = Path("/usr/lib/cni")


@dataclass(frozen=True)
class Node:
    """The node's own files, all in the cluster's folder."""

    folder: Path
    network: Network
    authority: Authority
    kubernetes_programs: Path
    containerd_socket: Path

    @property
    def name(self) -> str:
        return self.network.namespace

    @property
    def pod_logs(self) -> Path:
        return self.folder / "pod-logs"

    def cri_config(self, pause_image: str) -> str:
        """The CRI part of containerd's configuration."""
        networks = self.folder / "cni"
        networks.mkdir(exist_ok=True)
        (networks / "10-pods.conflist").write_text(json.dumps(self._pod_network(), indent=2))
        return f"""[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause_image}"
  # Without CAP_SYS_RESOURCE nobody may lower an oom score, and no pod would start.
  restrict_oom_score_adj = true
  # Else the pods' network namespaces lie among the machine's own.
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      Root = "{self.containerd_socket.parent}/runc"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PLUGINS}"
    conf_dir = "{networks}"
"""

    def _pod_network(self) -> dict[str, object]:
        # A veth pair with a route for each pod, as kind does it: with a bridge, answers of a service's pod to a pod
        # beside it would pass below the rules that translate the service's address back.
        addresses = {
            "type": "host-local",
            "dataDir": str(self.folder / "cni-addresses"),
            "ranges": [[{"subnet": self.network.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        return {
            "cniVersion": "1.0.0",
            "name": self.network.namespace,
            "plugins": [
                {"type": "ptp", "ipMasq": False, "ipam": addresses},
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }

    def kubelet(self) -> list[Argument]:
        # Pods with dnsPolicy Default get this; there is no way out of the cluster for a name server to be useful.
        resolv_conf = self.folder / "resolv.conf"
        resolv_conf.write_text("options ndots:1\n")
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self.authority.certificate)},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": f"unix://{self.containerd_socket}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.name}",
            "failCgroupV1": False,
            "cpuManagerPolicy": "none",
            "failSwapOn": False,
            "localStorageCapacityIsolation": False,
            "evictionHard": {
                "memory.available": "100Mi",
                "nodefs.available": "1%",
                "nodefs.inodesFree": "1%",
                "imagefs.available": "1%",
            },
            "imageGCHighThresholdPercent": 100,  # off: an image that is gone could not be pulled again
            "maxPods": 250,
            "podsPerCore": 0,
            "registryPullQPS": 0,
            "kubeAPIQPS": 100,
            "kubeAPIBurst": 200,
            "syncFrequency": "10s",
            "clusterDNS": [self.network.dns_address],
            "clusterDomain": "cluster.local",
            "resolvConf": str(resolv_conf),
            "podLogsDir": str(self.pod_logs),
            "volumePluginDir": str(self.folder / "volume-plugins"),
            "makeIPTablesUtilChains": False,
            "oomScoreAdj": 0,
        }
        kubeconfig = self._kubeconfig("kubelet", f"system:node:{self.name}", "system:nodes")
        return [
            *self.network.inside,
            self.kubernetes_programs / "kubelet",
            f"--config={self._written('kubelet', config)}",
            f"--kubeconfig={kubeconfig}",
            f"--hostname-override={self.name}",
            f"--node-ip={self.network.node_address}",
            f"--root-dir={self.folder / 'kubelet'}",
            f"--cert-dir={self.folder / 'kubelet-certificates'}",
        ]

    def proxy(self) -> list[Argument]:
        config = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clusterCIDR": self.network.pods,
            "hostnameOverride": self.name,
            "clientConnection": {"kubeconfig": str(self._kubeconfig("kube-proxy", "system:kube-proxy"))},
            # 0 leaves the machine's settings alone; they are not the namespace's own.
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            "oomScoreAdj": 0,
        }
        program = self.kubernetes_programs / "kube-proxy"
        return [*self.network.inside, program, f"--config={self._written('kube-proxy', config)}"]

    def _kubeconfig(self, name: str, user: str, group: str = "") -> Path:
        server = f"https://{self.network.node_address}:6443"
        client = self.authority.client(name, user, group)
        return self.authority.kubeconfig(self.folder / "kubeconfigs" / f"{name}.yaml", server, client)

    def _written(self, name: str, config: dict[str, object]) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

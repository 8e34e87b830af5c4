"""Command lines of the control plane: etcd, kube-apiserver, kube-controller-manager, kube-scheduler."""

from dataclasses import dataclass
from pathlib import Path

from devcluster.certificates import Authority
from devcluster.commands import Argument
from devcluster.network import Network

_ETCD = "http://127.0.0.1:2379"  # the namespace's own loopback: neither pods nor the machine get there


@dataclass(frozen=True)
class ControlPlane:
    """What the four processes need to know; the commands run inside the cluster's namespace."""

    folder: Path
    network: Network
    authority: Authority
    etcd_programs: Path
    kubernetes_programs: Path

    @property
    def server(self) -> str:
        return f"https://{self.network.node_address}:6443"

    def kubeconfig(self, name: str, user: str, group: str = "") -> Path:
        client = self.authority.client(name, user, group)
        return self.authority.kubeconfig(self.folder / "kubeconfigs" / f"{name}.yaml", self.server, client)

    def etcd(self) -> list[Argument]:
        return [
            *self.network.inside,
            self.etcd_programs / "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={_ETCD}",
            f"--advertise-client-urls={_ETCD}",
            "--listen-peer-urls=http://127.0.0.1:2380",
            # A development cluster may lose its last second when the machine loses power, and writes fast for that.
            "--unsafe-no-fsync",
        ]

    def apiserver(self) -> list[Argument]:
        hosts = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
        hosts += ["localhost", "127.0.0.1", self.network.node_address, self.network.api_service_address]
        certificate, key = self.authority.server("kube-apiserver", hosts)
        kubelet_certificate, kubelet_key = self.authority.client("apiserver-kubelet", "apiserver-kubelet", "system:masters")
        service_account_key = self.authority.signing_key("service-accounts")
        return [
            *self.network.inside,
            self.kubernetes_programs / "kube-apiserver",
            f"--advertise-address={self.network.node_address}",
            "--secure-port=6443",
            f"--etcd-servers={_ETCD}",
            f"--service-cluster-ip-range={self.network.services}",
            f"--client-ca-file={self.authority.certificate}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            f"--kubelet-client-certificate={kubelet_certificate}",
            f"--kubelet-client-key={kubelet_key}",
            # Otherwise `kubectl logs` looks the node's name up in the machine's DNS.
            "--kubelet-preferred-address-types=InternalIP",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={service_account_key}",
            f"--service-account-signing-key-file={service_account_key}",
        ]

    def controller_manager(self) -> list[Argument]:
        kubeconfig = self.kubeconfig("kube-controller-manager", "system:kube-controller-manager")
        return [
            *self.network.inside,
            self.kubernetes_programs / "kube-controller-manager",
            f"--kubeconfig={kubeconfig}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            "--use-service-account-credentials=true",
            f"--root-ca-file={self.authority.certificate}",
            f"--service-account-private-key-file={self.authority.signing_key('service-accounts')}",
        ]

    def scheduler(self) -> list[Argument]:
        kubeconfig = self.kubeconfig("kube-scheduler", "system:kube-scheduler")
        return [
            *self.network.inside,
            self.kubernetes_programs / "kube-scheduler",
            f"--kubeconfig={kubeconfig}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
        ]

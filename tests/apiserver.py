"""A real etcd and a real kube-apiserver for the tests of API and chart: what they refuse, users see refused.

No controllers, no kubelet: objects are stored, validated and served, nothing acts on them. The programs are those of the
development cluster, from its cache.
"""

from __future__ import annotations

import json
import secrets
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from devcluster.certificates import Authority
from devcluster.gobuild import ETCD, HELM, KUBERNETES, build

OPERATOR = "operator"
START_SECONDS = 60
ESTABLISHED_SECONDS = 60


@dataclass(frozen=True)
class ApiServer:
    """A running API server, and how to speak with it: directly, with kubectl, with helm."""

    url: str
    kubeconfig: Path
    client: httpx.Client
    folder: Path
    operator_kubeconfig: Path

    def request(self, method: str, path: str, body: Any = None, **parameters: str) -> httpx.Response:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        return self.client.request(method, path, json=body, params=parameters, headers={"Content-Type": kind})

    def kubectl(self, *arguments: str, text: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._run([build(KUBERNETES, self.folder / "build.log") / "kubectl", *arguments], text, check)

    def wait_established(self, *crds: str) -> None:
        """`kubectl wait` and a jsonpath filter both fail where a new CRD has no conditions at all yet."""
        end = time.monotonic() + ESTABLISHED_SECONDS
        for crd in crds:
            look = ("get", "crd", crd, "-o", 'jsonpath={.status.conditions[?(@.type=="Established")].status}')
            while self.kubectl(*look, check=False).stdout != "True":
                if time.monotonic() > end:
                    raise AssertionError(f"{crd} is not established")
                time.sleep(0.2)

    def helm(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._run([helm_command(self.folder), *arguments], None, check)

    def _run(self, command: list[str | Path], text: str | None, check: bool) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            command,
            env={"KUBECONFIG": str(self.kubeconfig), "HOME": str(self.folder), "PATH": "/usr/bin:/bin"},
            input=text,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if check and result.returncode:
            raise AssertionError(f"{' '.join(map(str, command))} ended with {result.returncode}:\n{result.stderr}")
        return result


def helm_command(folder: Path) -> Path:
    """The helm of the development cluster; `folder` takes the log if it has to be built first."""
    return build(HELM, folder / "build.log") / "helm"


@contextmanager
def running(folder: Path, authorization: str = "AlwaysAllow") -> Iterator[ApiServer]:
    """Starts both in `folder`, waits until they answer, and ends them afterwards, whatever happened.

    With `authorization` RBAC the user that `ApiServer` speaks for may do everything, and `operator_kubeconfig` is of one that may
    do what it is given.
    """
    etcd = build(ETCD, folder / "build.log") / "etcd"
    kube_apiserver = build(KUBERNETES, folder / "build.log") / "kube-apiserver"
    etcd_port, peer_port, port = _free_ports(3)
    token, operators = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    tokens = folder / "tokens.csv"
    tokens.touch(mode=0o600)
    tokens.write_text(f"{token},tester,tester,system:masters\n{operators},{OPERATOR},{OPERATOR},\n")
    key = Authority(folder / "pki").signing_key("service-accounts")
    with ExitStack() as stack:
        client_url = f"http://127.0.0.1:{etcd_port}"
        peer_url = f"http://127.0.0.1:{peer_port}"
        stack.enter_context(
            _process(
                [
                    etcd,
                    f"--data-dir={folder / 'etcd'}",
                    f"--listen-client-urls={client_url}",
                    f"--advertise-client-urls={client_url}",
                    f"--listen-peer-urls={peer_url}",
                    f"--initial-advertise-peer-urls={peer_url}",
                    f"--initial-cluster=default={peer_url}",
                    "--unsafe-no-fsync",
                ],
                folder / "etcd.log",
            )
        )
        api = stack.enter_context(
            _process(
                [
                    kube_apiserver,
                    f"--etcd-servers={client_url}",
                    "--bind-address=127.0.0.1",
                    f"--secure-port={port}",
                    f"--cert-dir={folder / 'certificates'}",
                    f"--token-auth-file={tokens}",
                    f"--authorization-mode={authorization}",
                    "--service-account-issuer=https://kubernetes.default.svc",
                    f"--service-account-key-file={key}",
                    f"--service-account-signing-key-file={key}",
                    "--service-cluster-ip-range=10.0.0.0/24",
                    "--endpoint-reconciler-type=none",
                    # No controller is there to make the ServiceAccounts that this plugin would wait for.
                    "--disable-admission-plugins=ServiceAccount",
                ],
                folder / "kube-apiserver.log",
            )
        )
        certificate = folder / "certificates" / "apiserver.crt"
        url = f"https://127.0.0.1:{port}"
        client = _when_ready(api, url, token, certificate, folder / "kube-apiserver.log")
        stack.callback(client.close)
        kubeconfig = _kubeconfig(folder / "kubeconfig", url, token, certificate)
        confined = _kubeconfig(folder / "operator-kubeconfig", url, operators, certificate)
        yield ApiServer(url, kubeconfig, client, folder, confined)


@contextmanager
def _process(command: list[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()  # the data is thrown away; a graceful end of kube-apiserver takes many seconds
        process.wait(timeout=10)


def _when_ready(process: subprocess.Popen[bytes], url: str, token: str, certificate: Path, log: Path) -> httpx.Client:
    deadline = time.monotonic() + START_SECONDS
    client: httpx.Client | None = None
    while time.monotonic() < deadline and process.poll() is None:
        if certificate.exists():
            try:
                client = client or httpx.Client(
                    base_url=url,
                    verify=ssl.create_default_context(cafile=str(certificate)),
                    headers={"Authorization": f"Bearer {token}"},
                    timeout=30,
                    trust_env=False,
                )
                namespace = client.get("/api/v1/namespaces/default")
                if client.get("/readyz").is_success and namespace.is_success:
                    return client
            except (httpx.TransportError, ssl.SSLError):
                pass  # not listening yet, or the certificate is half written
        time.sleep(0.1)
    raise AssertionError(f"kube-apiserver is not ready; its log ends:\n{log.read_text()[-3000:]}")


def _kubeconfig(path: Path, url: str, token: str, certificate: Path) -> Path:
    path.touch(mode=0o600)
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": url, "certificate-authority": str(certificate)}}],
                "users": [{"name": "u", "user": {"token": token}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "c",
            }
        )
    )
    return path


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback interface; held together while choosing, so that no two are the same."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]

"""The NetworkPolicy of a ModelDeployment's export pods, where `builder.networkPolicy` asks for one.

convert runs somebody's bytes and needs no network; but a policy is for a whole pod, and fetch and publish beside it must reach
the object store. So the pod may look names up, reach public addresses on the ports of the spec's endpoints, and what the user
lists. It may not reach private networks, where the cluster is, and the addresses where clouds hand out credentials.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from perch.api import Egress, Spec
from perch.builders import build_metadata
from perch.names import LABEL_COMPONENT, LABEL_OWNER, child_labels, export_policy_name
from perch.observed import Identity

NOT_PUBLIC = {
    "0.0.0.0/0": [
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared between carriers; some clouds' pods and metadata
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's host
        "169.254.0.0/16",  # link-local, and the metadata service of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # Oracle's metadata
        "192.168.0.0/16",
    ],
    "::/0": ["::1/128", "64:ff9b::/96", "fc00::/7", "fe80::/10"],
}
"""64:ff9b::/96 leads to any address of IPv4, the private ones too, where the network translates."""


def build_export_policy(identity: Identity, spec: Spec) -> dict[str, Any]:
    """Raises ValueError where the spec asks for none."""
    asked = spec.builder.network_policy
    if asked is None:
        raise ValueError("builder.networkPolicy is not set")
    egress: list[dict[str, Any]] = [
        {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
        {
            "to": [{"ipBlock": {"cidr": everything, "except": private}} for everything, private in NOT_PUBLIC.items()],
            "ports": [{"port": port, "protocol": "TCP"} for port in endpoint_ports(spec)],
        },
    ]
    # On any port: behind a Service pods listen on others than the endpoint's, and those are what a policy sees.
    egress += [{"to": [_peer(allowed)]} for allowed in asked.allow or []]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": build_metadata(identity, export_policy_name(identity.name), child_labels(identity.name, "export")),
        "spec": {
            "podSelector": {"matchLabels": {LABEL_OWNER: identity.name, LABEL_COMPONENT: "export"}},
            # Nobody has to reach them: an ingress without rules lets nobody in.
            "policyTypes": ["Ingress", "Egress"],
            "egress": egress,
        },
    }


def endpoint_ports(spec: Spec) -> list[int]:
    """Of the object stores that the spec names; 443 is AWS'."""
    endpoints = {spec.repository.endpoint}
    endpoints |= {entry.checkpoint.endpoint or spec.repository.endpoint for entry in spec.versions}
    return sorted({_port(endpoint) for endpoint in endpoints})


def _port(endpoint: str | None) -> int:
    parts = urlsplit(endpoint or "https://")
    return parts.port or (443 if parts.scheme == "https" else 80)


def _peer(allowed: Egress) -> dict[str, Any]:
    if allowed.cidr is not None:
        return {"ipBlock": {"cidr": allowed.cidr}}
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": allowed.namespace}}}

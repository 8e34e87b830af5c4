"""What the Gateway's proxy has taken in, asked of Envoy itself. That a policy is accepted says nothing of it.

Envoy goes on with a cluster's former settings until it has warmed the new ones up: until endpoints come anew, or 15 s are over.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from devcluster import Cluster

ADMIN = 19000
"""Envoy's administration, on the pod's loopback only."""
GATEWAY = "gateway.envoyproxy.io/owning-gateway-name=gateway"


@dataclass(frozen=True)
class Policies:
    """What is in effect, of everything that is asked about: one kind of balancing means all of it."""

    balancing: frozenset[str]
    """Such as least_request."""
    retry_on: frozenset[str]
    buffers: frozenset[int]
    """Bytes that the listeners keep of a connection."""


class Proxy:
    """One Envoy, by its administration's address on this machine."""

    def __init__(self, url: str) -> None:
        self._url = url

    def endpoints(self, route: str) -> set[str]:
        """Addresses, with ports, behind the HTTPRoute `namespace/name`."""
        answer = httpx.get(f"{self._url}/clusters", params={"format": "json"}, timeout=10).raise_for_status()
        mine = [c for c in answer.json()["cluster_statuses"] if _is_of(c, route)]
        hosts = [host["address"]["socket_address"] for cluster in mine for host in cluster.get("host_statuses", [])]
        return {f"{host['address']}:{host['port_value']}" for host in hosts}

    def policies(self, route: str) -> Policies:
        """How it asks the pods behind the HTTPRoute `namespace/name`. Clusters that are still warming up do not count."""
        clusters = [c["cluster"] for c in self._dump("dynamic_active_clusters") if _is_of(c["cluster"], route)]
        hosts = [h for c in self._dump("dynamic_route_configs") for h in c["route_config"].get("virtual_hosts", [])]
        routes = [r for host in hosts for r in host["routes"] if _is_of(r, route)]
        listeners = [entry["active_state"]["listener"] for entry in self._dump("dynamic_listeners") if "active_state" in entry]
        chosen = [p["typed_extension_config"]["name"] for c in clusters for p in c["load_balancing_policy"]["policies"]]
        retried = [r["route"].get("retry_policy", {}).get("retry_on", "") for r in routes if "route" in r]
        return Policies(
            balancing=frozenset(name.rpartition(".")[2] for name in chosen),
            retry_on=frozenset(trigger for text in retried for trigger in text.split(",") if trigger),
            buffers=frozenset(
                int(x["per_connection_buffer_limit_bytes"]) for x in listeners if "per_connection_buffer_limit_bytes" in x
            ),
        )

    def _dump(self, resource: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self._url}/config_dump", params={"resource": resource}, timeout=10).raise_for_status()
        found: list[dict[str, Any]] = answer.json().get("configs", [])
        return found


def _is_of(entry: Mapping[str, Any], route: str) -> bool:
    return str(entry.get("name", "")).startswith(f"httproute/{route}/")


@contextmanager
def reached(cluster: Cluster) -> Iterator[Proxy]:
    """The only Envoy of the development cluster's Gateway, by way of the API server."""
    namespace = ("-n", "envoy-gateway-system")
    (pod,) = cluster.kubectl(*namespace, "get", "pods", "-l", GATEWAY, "-o", "name").stdout.split()
    forward = subprocess.Popen(
        ["kubectl", *namespace, "port-forward", pod, f":{ADMIN}"],
        env={**os.environ, **cluster.env()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert forward.stdout is not None
        # Forwarding from 127.0.0.1:40123 -> 19000
        said = forward.stdout.readline()
        yield Proxy(f"http://{said.split()[2]}")
    finally:
        forward.terminate()
        forward.wait(10)

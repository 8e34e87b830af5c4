"""The one HTTPRoute of a ModelDeployment: gRPC and REST on one hostname, both weights in one write.

Exposed are inference, readiness and metadata of this model: exact gRPC methods (a method's path carries no model name, the host
name does) and exact REST paths. Triton's shared-memory, trace, logging, statistics and repository calls are not routed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perch.api import Routing
from perch.builders import build_metadata
from perch.builders.serving import GRPC, HTTP
from perch.names import child_labels, serving_name, version_of
from perch.observed import Identity

GRPC_SERVICE = "/inference.GRPCInferenceService"
GRPC_METHODS = (
    "ModelInfer",
    "ModelStreamInfer",
    "ModelReady",
    "ModelMetadata",
    "ModelConfig",
    "ServerLive",
    "ServerReady",
    "ServerMetadata",
)


def rest_paths(model: str) -> tuple[str, ...]:
    return (
        f"/v2/models/{model}/infer",
        f"/v2/models/{model}/ready",
        f"/v2/models/{model}/config",
        f"/v2/models/{model}",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2",
    )


def build_route(identity: Identity, routing: Routing, model: str, weights: Mapping[int, int]) -> dict[str, Any]:
    """`weights`: percent by version, summing to 100; versions with 0 stay as backends until they are drained."""

    def rule(paths: list[str], port: int) -> dict[str, Any]:
        return {
            "matches": [{"path": {"type": "Exact", "value": path}} for path in paths],
            "backendRefs": [
                {
                    "group": "",
                    "kind": "Service",
                    "name": serving_name(identity.name, version),
                    "port": port,
                    "weight": weight,
                }
                for version, weight in sorted(weights.items())
            ],
            # A stream lives as long as its client wants: no limit of the gateway's own.
            "timeouts": {"request": "0s"},
        }

    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": build_metadata(identity, identity.name, child_labels(identity.name, "route")),
        "spec": {
            "parentRefs": [
                {
                    "group": "gateway.networking.k8s.io",
                    "kind": "Gateway",
                    **ref.model_dump(mode="json", by_alias=True, exclude_none=True),
                }
                for ref in routing.parent_refs
            ],
            "hostnames": list(routing.hostnames),
            "rules": [
                rule([f"{GRPC_SERVICE}/{method}" for method in GRPC_METHODS], GRPC),
                rule(list(rest_paths(model)), HTTP),
            ],
        },
    }


def read_weights(spec: Mapping[str, Any], name: str) -> dict[int, int]:
    """Percent by version from a route's spec, the reverse of `build_route`. Backends that are not ours are left out."""
    weights: dict[int, int] = {}
    for rule in spec.get("rules", [])[:1]:
        for backend in rule.get("backendRefs", []):
            version = version_of(name, backend.get("name", ""))
            if version is not None:
                weights[version] = int(backend.get("weight", 1))
    return weights

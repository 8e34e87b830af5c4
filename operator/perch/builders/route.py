"""The one HTTPRoute of a ModelDeployment: gRPC and REST on one hostname, both weights in one write.

Exposed are inference, readiness and metadata of this model: exact gRPC methods (a method's path carries no model name, the host
name does) and exact REST paths. Triton's shared-memory, trace, logging, statistics and repository calls are not routed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perch.api import HeaderMatch, Routing
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


def build_route(
    identity: Identity,
    routing: Routing,
    model: str,
    weights: Mapping[int, int],
    *,
    headers: tuple[int, Sequence[HeaderMatch]] | None = None,
    mirror: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """`weights`: percent by version, summing to 100; versions with 0 stay as backends until they are drained.

    `headers`: a version, and the headers whose requests all go to it. `mirror`: a version, and the percent of the other requests
    that are copied to it. The Services of both must be there: gateways answer 500 to all requests of a rule that names another.
    """
    grpc = [f"{GRPC_SERVICE}/{method}" for method in GRPC_METHODS]
    rest = rest_paths(model)

    def backend(version: int, port: int) -> dict[str, Any]:
        return {"group": "", "kind": "Service", "name": serving_name(identity.name, version), "port": port}

    def weighted(paths: Iterable[str], port: int) -> dict[str, Any]:
        rule = {
            "matches": [{"path": path} for path in _exact(paths)],
            "backendRefs": [{**backend(version, port), "weight": weight} for version, weight in sorted(weights.items())],
            # A stream lives as long as its client wants: no limit of the gateway's own.
            "timeouts": {"request": "0s"},
        }
        if mirror is not None:
            version, percent = mirror
            copies = {"backendRef": backend(version, port), "percent": percent}
            rule["filters"] = [{"type": "RequestMirror", "requestMirror": copies}]
        return rule

    def by_header(paths: Iterable[str], port: int, version: int, wanted: Sequence[HeaderMatch]) -> dict[str, Any]:
        matched = [{"type": "Exact", **h.model_dump(mode="json", exclude_none=True)} for h in wanted]
        return {
            "matches": [{"path": path, "headers": matched} for path in _exact(paths)],
            "backendRefs": [{**backend(version, port), "weight": 1}],
            "timeouts": {"request": "0s"},
        }

    rules = [weighted(grpc, GRPC), weighted(rest, HTTP)]
    if headers is not None:
        # Of two rules with the same exact path, gateways take the one with more headers, whichever comes first.
        rules += [by_header(grpc, GRPC, *headers), by_header(rest, HTTP, *headers)]
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
            "rules": rules,
        },
    }


def _exact(paths: Iterable[str]) -> list[dict[str, str]]:
    return [{"type": "Exact", "value": path} for path in paths]


def read_weights(spec: Mapping[str, Any], name: str) -> dict[int, int]:
    """Percent by version from a route's spec, the reverse of `build_route`. Backends that are not ours are left out.

    The weights of gRPC and REST are the same, so the first rule that asks for no header tells them.
    """
    weighted = [rule for rule in spec.get("rules", []) if not any(match.get("headers") for match in rule.get("matches", []))]
    weights: dict[int, int] = {}
    for backend in weighted[0].get("backendRefs", []) if weighted else []:
        version = version_of(name, backend.get("name", ""))
        if version is not None:
            weights[version] = int(backend.get("weight", 1))
    return weights

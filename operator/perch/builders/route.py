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
from perch.observed import Identity, RouteFacts, matches

GRPC_SERVICE = "/inference.GRPCInferenceService"
STREAM = f"{GRPC_SERVICE}/ModelStreamInfer"
GRPC_METHODS = (
    "ModelInfer",
    "ModelReady",
    "ModelMetadata",
    "ModelConfig",
    "ServerLive",
    "ServerReady",
    "ServerMetadata",
)
MIRROR = "RequestMirror"
REHEARSAL_HEADER = "x-perch-rehearsal"
MOST_BACKENDS = 16
"""Backends of a rule, by Gateway API."""
WITHOUT_TYPE = {"type": "RequestHeaderModifier", "requestHeaderModifier": {"remove": ["Content-Type"]}}
"""Of REST requests. Triton does not read it, and its HTTP library parses the body of a form on a thread's stack, where 4 MiB end
the process (see `serving.START`); curl calls every body a form. Every implementation of the Gateway API has this filter."""
NEVER_DEFAULTED = ("filters", "sessionPersistence", "retry")
"""Parts of a rule that no API server fills in: what stands there and was not asked for is a former wish, or somebody's edit."""


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
    streams: int,
    headers: tuple[int, Sequence[HeaderMatch]] | None = None,
    mirror: tuple[int, int] | None = None,
    rehearsal: bool = False,
) -> dict[str, Any]:
    """`weights`: percent by version, summing to 100; versions with 0 stay as backends until they are drained.

    `streams`: the version that new streams go to. They are not shared: a stream stays on its pod, so of a thousand requests in
    one stream one thing was drawn by lot, and a sender of bad ones would look like a bad version.

    `headers`: a version, and the headers whose requests all go to it. `mirror`: a version, and the percent of the other requests
    that are copied to it. The Services of both must be there: gateways answer 500 to all requests of a rule that names another.
    `rehearsal`: the copies stand in rules of their own that no request meets, see `must_rehearse`.
    """
    grpc = [f"{GRPC_SERVICE}/{method}" for method in GRPC_METHODS]
    rest = rest_paths(model)

    def shared(paths: Iterable[str], port: int, shares: Mapping[int, int]) -> dict[str, Any]:
        return {
            "matches": [{"path": path} for path in _exact(paths)],
            "backendRefs": [
                {**_backend(identity, version, port), "weight": weight} for version, weight in sorted(shares.items())
            ],
            # A stream lives as long as its client wants: no limit of the gateway's own.
            "timeouts": {"request": "0s"},
            **changed(port),
        }

    def weighted(paths: Iterable[str], port: int) -> dict[str, Any]:
        rule = shared(paths, port, weights)
        return rule if mirror is None or rehearsal else mirrored(rule, port, *mirror)

    def changed(port: int) -> dict[str, Any]:
        return {"filters": [WITHOUT_TYPE]} if port == HTTP else {}

    def mirrored(rule: dict[str, Any], port: int, version: int, percent: int) -> dict[str, Any]:
        copies = {"backendRef": _backend(identity, version, port), "percent": percent}
        return {**rule, "filters": [*rule.get("filters", []), {"type": MIRROR, "requestMirror": copies}]}

    def by_header(paths: Iterable[str], port: int, version: int, wanted: Sequence[HeaderMatch]) -> dict[str, Any]:
        # The server would add the type where it is left out, and the next pass would take that for somebody's edit.
        matched = [{"type": "Exact", **h.model_dump(mode="json", exclude_none=True)} for h in wanted]
        return {
            "matches": [{"path": path, "headers": matched} for path in _exact(paths)],
            "backendRefs": [{**_backend(identity, version, port), "weight": 1}],
            "timeouts": {"request": "0s"},
            **changed(port),
        }

    one_has_all = {version: 100 if version == streams else 0 for version in weights}
    rules = [weighted(grpc, GRPC), weighted(rest, HTTP), shared([STREAM], GRPC, one_has_all)]
    if headers is not None:
        # Of two rules with the same exact path, gateways take the one with more headers, whichever comes first.
        rules += [by_header([*grpc, STREAM], GRPC, *headers), by_header(rest, HTTP, *headers)]
    if mirror is not None and rehearsal:
        nobody = [HeaderMatch(name=REHEARSAL_HEADER, value=identity.uid)]
        rules += [mirrored(by_header(p[:1], port, mirror[0], nobody), port, *mirror) for p, port in ((grpc, GRPC), (rest, HTTP))]
    gateway = {"group": "gateway.networking.k8s.io", "kind": "Gateway"}
    parents = [{**gateway, **ref.model_dump(mode="json", by_alias=True, exclude_none=True)} for ref in routing.parent_refs]
    return _route(identity, parents, list(routing.hostnames), rules)


def build_weights_only(
    identity: Identity, weights: Mapping[int, int], found: Mapping[str, Any], *, streams: int, keep: bool
) -> dict[str, Any]:
    """The route as it stands in the cluster (`found`, its spec) with other weights: nothing of it is new but numbers, so the API
    server takes it whatever it refuses of the present spec, or of the rules that this release builds. An abort and a revert go
    this way then.

    `keep`: what stands there of header rules and mirrors stays; else it goes, for it leads to a canary on trial.
    """
    one_has_all = {version: 100 if version == streams else 0 for version in weights}

    def numbered(rule: Mapping[str, Any]) -> Mapping[str, Any]:
        refs = rule.get("backendRefs", [])
        known = {version_of(identity.name, ref.get("name", "")): ref for ref in refs}
        ours = [ref for version, ref in known.items() if version is not None]
        if not ours:
            return rule
        shares = one_has_all if _paths(rule) == (STREAM,) else weights
        refs = {v: known.get(v) or _backend(identity, v, ours[0]["port"]) for v in shares}
        numbers = [{**refs[v], "weight": share} for v, share in sorted(shares.items())]
        kept = [part for part in rule.get("filters", []) if keep or part.get("type") != MIRROR]
        return {**rule, "backendRefs": numbers, **({"filters": kept} if "filters" in rule else {})}

    found_rules = found.get("rules", [])
    rules = [rule if _headers(rule) else numbered(rule) for rule in found_rules if keep or not _headers(rule)]
    return _route(identity, found.get("parentRefs", []), found.get("hostnames", []), rules)


def _backend(identity: Identity, version: int, port: int) -> dict[str, Any]:
    return {"group": "", "kind": "Service", "name": serving_name(identity.name, version), "port": port}


def _route(identity: Identity, parents: Sequence[Any], hostnames: Sequence[str], rules: Sequence[Any]) -> dict[str, Any]:
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": build_metadata(identity, identity.name, child_labels(identity.name, "route")),
        "spec": {"parentRefs": parents, "hostnames": hostnames, "rules": rules},
    }


def _paths(rule: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(match.get("path", {}).get("value", "") for match in rule.get("matches", []))


def _headers(rule: Mapping[str, Any]) -> bool:
    """Whether a rule is for requests with certain headers only."""
    return any(match.get("headers") for match in rule.get("matches", []))


def _exact(paths: Iterable[str]) -> list[dict[str, str]]:
    return [{"type": "Exact", "value": path} for path in paths]


def is_current(built: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether the route's spec stands as it was built. Copies that are asked for no more count, and so does session persistence
    that somebody added: requests that stick to a version are not assigned at random, and a canary could not be judged by them.
    """

    def extra(wanted: Mapping[str, Any], rule: Mapping[str, Any]) -> bool:
        return any(rule.get(part) and part not in wanted for part in NEVER_DEFAULTED)

    return matches(built, found) and not any(
        extra(wanted, rule) or any(map(extra, wanted.get("backendRefs", []), rule.get("backendRefs", [])))
        for wanted, rule in zip(built["rules"], found["rules"], strict=True)
    )


def makes_copies(spec: Mapping[str, Any]) -> bool:
    """Whether requests of users are copied: a rehearsal copies none."""
    return any(_mirrors(rule) and not _headers(rule) for rule in spec.get("rules", []))


def _mirrors(rule: Mapping[str, Any]) -> bool:
    return any(part.get("type") == MIRROR for part in rule.get("filters", []))


def must_rehearse(route: RouteFacts | None) -> bool:
    """Whether copies are asked for in rules that no request meets, until the Gateway has shown that it knows them.

    Mirrors are an optional part of the Gateway API, and to all requests of a rule with a filter that it does not know a Gateway
    answers 500 (Envoy Gateway 1.9, tried; it drops the rule, calls the route accepted and PartiallyInvalid, and its GatewayClass
    does not say what it knows). Refused in rules of its own, the filter costs nobody a request.
    """
    if route is None:
        return True
    if not any(map(_mirrors, route.spec.get("rules", []))):
        return True
    if route.accepted:
        return False
    # In use and refused: back to the rehearsal. Of an answer that is still to come nothing follows.
    return not makes_copies(route.spec) or route.reason != "AwaitingGateway"


def read_weights(spec: Mapping[str, Any], name: str) -> dict[int, int]:
    """Percent by version from a route's spec, the reverse of `build_route`. Backends that are not ours are left out.

    The weights of gRPC and REST are the same, so the first rule tells them that asks for no header and is not that of streams.
    """
    weighted = [rule for rule in spec.get("rules", []) if not _headers(rule) and _paths(rule) != (STREAM,)]
    weights: dict[int, int] = {}
    for backend in weighted[0].get("backendRefs", []) if weighted else []:
        version = version_of(name, backend.get("name", ""))
        if version is not None:
            weights[version] = int(backend.get("weight", 1))
    return weights

"""The one place that talks to the API server: plain dicts in and out, server-side apply, bounded waits.

Built on kubernetes_asyncio's client for its authentication (kubeconfigs, in-cluster tokens and their renewal) and TLS.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from kubernetes_asyncio import client, config, watch

from perch.api import GROUP, KIND, PLURAL, VERSION
from perch.foreign import clean
from perch.names import FIELD_MANAGER

TIMEOUT_SECONDS = 20
APPLY = "application/apply-patch+yaml; charset=utf-8"
WATCH_SECONDS = 290
"""A watch ends on the server's side after this time and goes on where it was: no silent freeze lasts longer."""


@dataclass(frozen=True)
class Kind:
    """A resource as its URL names it."""

    kind: str
    api_version: str
    plural: str

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        root = f"/api/{self.api_version}" if "/" not in self.api_version else f"/apis/{self.api_version}"
        parts = [root]
        if namespace is not None:
            parts.append(f"namespaces/{namespace}")
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/".join(parts)


MODEL_DEPLOYMENT = Kind(KIND, f"{GROUP}/{VERSION}", PLURAL)
JOB = Kind("Job", "batch/v1", "jobs")
DEPLOYMENT = Kind("Deployment", "apps/v1", "deployments")
SERVICE = Kind("Service", "v1", "services")
POD = Kind("Pod", "v1", "pods")
BUDGET = Kind("PodDisruptionBudget", "policy/v1", "poddisruptionbudgets")
AUTOSCALER = Kind("HorizontalPodAutoscaler", "autoscaling/v2", "horizontalpodautoscalers")
ROUTE = Kind("HTTPRoute", "gateway.networking.k8s.io/v1", "httproutes")
POLICY = Kind("NetworkPolicy", "networking.k8s.io/v1", "networkpolicies")
EVENT = Kind("Event", "v1", "events")
NAMESPACE = Kind("Namespace", "v1", "namespaces")
CHILDREN = (JOB, DEPLOYMENT, SERVICE, POD, BUDGET, AUTOSCALER, ROUTE, POLICY)
BY_KIND = {kind.kind: kind for kind in (*CHILDREN, MODEL_DEPLOYMENT)}


Selector = Mapping[str, str]
"""`labelSelector`, `fieldSelector`, or both."""
SILENCE = (aiohttp.ClientError, TimeoutError, OSError)
"""What a request raises that got no answer."""


class ApiError(Exception):
    """The API server's refusal, with its own words."""

    def __init__(self, status: int, reason: str, message: str, causes: tuple[str, ...] = ()) -> None:
        super().__init__(f"{message} ({status} {reason})")
        self.status = status
        self.reason = reason
        self.message = message
        self.causes = causes


def refusal(status: int, text: str) -> ApiError:
    try:
        body = json.loads(text)
    except ValueError:
        return ApiError(status, "Unreadable", clean(text))
    causes = tuple(c.get("reason", "") for c in (body.get("details") or {}).get("causes") or ())
    return ApiError(status, body.get("reason", ""), clean(body.get("message", text)), causes)


def as_yaml(content: Mapping[str, Any]) -> bytes:
    """JSON that a reader of YAML takes too, for that is how the API server reads what is applied.

    YAML knows no surrogates, by which JSON escapes an emoji in a class's name, and no bare control characters.
    """
    text = json.dumps(content, ensure_ascii=False)
    return re.sub("[\x7f-\uffff]", lambda found: f"\\u{ord(found[0]):04x}", text).encode()


class Kube:
    """Requests to one API server. Raises ApiError for a refusal and aiohttp.ClientError or TimeoutError for a silence."""

    def __init__(self, api: client.ApiClient) -> None:
        self.api = api
        self.requests = 0
        self.seconds_to_write: Callable[[], float] = lambda: TIMEOUT_SECONDS
        """How long a write that begins now may take. Raises where this process may no longer act."""

    @classmethod
    async def connect(cls) -> Kube:
        """From the pod's service account, or else from KUBECONFIG."""
        settings = client.Configuration()
        # Every watch holds a connection for good: a bound would starve the other requests, the Lease's among them.
        settings.connection_pool_maxsize = 0
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException:
            # The client reads the variable when it is imported, which is too early for those who set it later.
            await config.load_kube_config(config_file=os.environ.get("KUBECONFIG"), client_configuration=settings)
        return cls(client.ApiClient(settings))

    async def close(self) -> None:
        await self.api.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        fenced: bool = True,
    ) -> dict[str, Any]:
        """One request, answered within TIMEOUT_SECONDS or not at all.

        `fenced`: a write is sent only while the Lease is held, and given up before another process can hold it. False for the
        writes of the Lease itself.
        """
        seconds: float = TIMEOUT_SECONDS
        if method != "GET" and fenced:
            seconds = min(seconds, self.seconds_to_write())
        self.requests += 1
        response = await self._send(method, path, list((query or {}).items()), body, content_type, seconds)
        text = await response.text()
        if response.status >= 400:
            raise refusal(response.status, text)
        content: dict[str, Any] = json.loads(text)
        return content

    async def _send(
        self, method: str, path: str, query: list[tuple[str, str]], body: Any, content_type: str, timeout: Any
    ) -> aiohttp.ClientResponse:
        response: aiohttp.ClientResponse = await self.api.call_api(
            path,
            method,
            query_params=query,
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=timeout,
        )
        return response

    async def get(self, kind: Kind, namespace: str | None, name: str) -> dict[str, Any]:
        return await self.request("GET", kind.path(namespace, name))

    async def apply(self, body: Mapping[str, Any], resource_version: str | None = None) -> dict[str, Any]:
        """Server-side apply under Perch's one field manager; with `resource_version` a conflict raises ApiError 409."""
        kind = BY_KIND[body["kind"]]
        metadata = dict(body["metadata"])
        if resource_version is not None:
            metadata["resourceVersion"] = resource_version
        return await self.request(
            "PATCH",
            kind.path(metadata["namespace"], metadata["name"]),
            query={"fieldManager": FIELD_MANAGER, "force": "true"},
            body=as_yaml({**body, "metadata": metadata}),
            content_type=APPLY,
        )

    async def patch(
        self, kind: Kind, namespace: str, name: str, body: Mapping[str, Any], subresource: str | None = None
    ) -> dict[str, Any]:
        """JSON merge patch. A resourceVersion in the body is a precondition."""
        return await self.request(
            "PATCH",
            kind.path(namespace, name, subresource),
            query={"fieldManager": FIELD_MANAGER},
            body=body,
            content_type="application/merge-patch+json",
        )

    async def create(self, kind: Kind, namespace: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self.request("POST", kind.path(namespace), query={"fieldManager": FIELD_MANAGER}, body=body)

    async def delete(self, kind: Kind, namespace: str, name: str, known: Mapping[str, Any] | None = None) -> None:
        """Delete with background propagation; what is gone already is no error.

        Where the object is `known`, only that very object goes, in that very state: ApiError 409 if it has changed since.
        """
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if known is not None:
            metadata = known["metadata"]
            options["preconditions"] = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
        try:
            await self.request("DELETE", kind.path(namespace, name), body=options)
        except ApiError as error:
            if error.status != 404:
                raise

    async def list(self, kind: Kind, namespace: str | None, selector: Selector) -> tuple[list[dict[str, Any]], str]:
        """All objects of a kind that the selector takes, and the resourceVersion to watch from."""
        items: list[dict[str, Any]] = []
        query = {**selector, "limit": "500"}
        while True:
            page = await self.request("GET", kind.path(namespace), query=query)
            items += page.get("items", [])
            after = page["metadata"].get("continue")
            if not after:
                return items, page["metadata"]["resourceVersion"]
            query["continue"] = after

    async def watch(
        self, kind: Kind, namespace: str | None, selector: Selector, resource_version: str
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Changes since `resource_version`, bookmarks included, until the server ends it. Raises ApiError(410) when too old."""

        async def open_stream(**params: Any) -> aiohttp.ClientResponse:
            self.requests += 1
            query = [
                ("watch", "true"),
                *selector.items(),
                ("allowWatchBookmarks", "true"),
                ("resourceVersion", str(params["resource_version"])),
                ("timeoutSeconds", str(WATCH_SECONDS)),
            ]
            timeout = aiohttp.ClientTimeout(sock_connect=TIMEOUT_SECONDS, sock_read=WATCH_SECONDS + TIMEOUT_SECONDS)
            response = await self._send("GET", kind.path(namespace), query, None, "application/json", timeout)
            if response.status >= 400:
                raise refusal(response.status, await response.text())
            return response

        try:
            async with watch.Watch(return_type="object") as stream:
                async for event in stream.stream(open_stream, resource_version=resource_version, timeout_seconds=WATCH_SECONDS):
                    yield event["type"], event["raw_object"]
        except client.ApiException as error:
            raise ApiError(error.status or 500, str(error.reason), str(error.reason)) from error

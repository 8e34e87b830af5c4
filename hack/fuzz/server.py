"""The API server that has the last word: on specs, and on the children that are built for them. Nothing is stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.apiserver import ApiServer

from devcluster import gobuild
from fuzz.trial import Finding, children
from perch.api import GROUP, KIND, VERSION
from perch.kube import APPLY, BY_KIND, as_yaml
from perch.names import FIELD_MANAGER

NAMESPACE = "vision"
"""Where the planner's `World` lives."""
_CHART = "charts/gateway-helm"
_ROUTES = "httproutes.gateway.networking.k8s.io"


def prepare(api: ApiServer) -> None:
    """The namespace and the Gateway API, out of Envoy Gateway's chart."""
    gobuild.extract_module_files(gobuild.ENVOY_GATEWAY, _CHART, api.folder / "build.log")
    crds = gobuild.module_files(gobuild.ENVOY_GATEWAY, _CHART) / "charts/crds/crds/gatewayapi-crds.yaml"
    api.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(crds))
    api.wait_established(_ROUTES)
    api.kubectl("apply", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}))


class Judge:
    """Tries specs on one API server. What it accepted once it is not asked for again."""

    def __init__(self, api: ApiServer) -> None:
        self.api = api
        self.known: set[str] = set()

    def accepts(self, spec: dict[str, Any]) -> bool:
        """Whether a ModelDeployment with this spec would be stored."""
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{NAMESPACE}/modeldeployments"
        body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "metadata": {"name": "digits"}, "spec": spec}
        answer = self.api.request("POST", path, body, dryRun="All", fieldValidation="Strict")
        if answer.is_success:
            return True
        if answer.status_code >= 500 or "evaluation error" in answer.text or "should match" in answer.text:
            raise Finding(f"the API server does not say what is wrong: {answer.status_code} {answer.text[:2000]}")
        return False

    def try_children(self, spec: dict[str, Any]) -> None:
        """Raises Finding where an accepted spec leads to an error, or to an object that the API server refuses."""
        for body in children(spec):
            text = json.dumps(body, sort_keys=True)
            if text not in self.known:
                self._apply(body)
                self.known.add(text)

    def _apply(self, body: Mapping[str, Any]) -> None:
        version = body["apiVersion"]
        group, name = f"apis/{version}" if "/" in version else f"api/{version}", body["metadata"]["name"]
        answer = self.api.client.patch(
            f"/{group}/namespaces/{NAMESPACE}/{BY_KIND[body['kind']].plural}/{name}",
            content=as_yaml(body),
            params={"fieldManager": FIELD_MANAGER, "force": "true", "fieldValidation": "Strict", "dryRun": "All"},
            headers={"Content-Type": APPLY},
        )
        if not answer.is_success:
            raise Finding(f"the API server refuses {body['kind']} {name}: {answer.json().get('message', answer.text)}")

"""One ModelDeployment whose canaries are judged by several tests. Version 2 fails where a request asks for it, version 3 is slow
whatever it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from demo.manifests import deployment, upload_digits
from devcluster.tenant import Tenant
from faults import Kind
from faults.publish import publish

FAULTY, SLOW = 2, 3
TURNS = 24
"""Of the slow answer's loop: many times as long as a sound answer, and not so long that a core is busy with it."""
PROMETHEUS = "http://prometheus.monitoring"
STEPS = [{"weight": 20, "hold": "10s"}, {"weight": 60, "hold": "5s"}, {"weight": 100}]
ANALYSIS = {"maxErrorRate": "0.1"}
"""30 canary requests a step: what a test has time for."""


def rollout(**more: Any) -> dict[str, Any]:
    return {"steps": STEPS, "scaleDownDelay": "10s", "analysis": ANALYSIS, **more}


@dataclass
class Judged:
    tenant: Tenant
    entries: list[dict[str, Any]]
    trial: int = 0
    """An aborted canary is tried again by the next test."""

    @classmethod
    def build(cls, tenant: Tenant) -> Judged:
        entries = upload_digits(tenant)
        entries.append({**entries[1], "version": SLOW})
        manifest = deployment(tenant, entries)
        publish(tenant, manifest, FAULTY)
        publish(tenant, manifest, SLOW, always=Kind.SLOW, turns=TURNS)
        return cls(tenant, entries)

    def serve(self) -> None:
        """Version 1 alone."""
        self.trial += 1
        self.tenant.apply(deployment(self.tenant, self.entries))
        self.tenant.wait_ready("digits", "Serving")

    def commit(self, canary: int, traffic: dict[str, Any] | None = None, **more: Any) -> None:
        self.tenant.apply(
            deployment(
                self.tenant,
                self.entries,
                traffic={"stable": 1, "canary": canary, **(traffic or {})},
                rollout=rollout(retryAt=f"2026-01-01T00:00:{self.trial:02}Z", **more),
            )
        )

    def step(self) -> dict[str, Any]:
        return self.tenant.status("digits").get("step") or {}

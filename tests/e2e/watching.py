"""The route's weights as they change, from the API server's own watch: no write is missed, however short it stood."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from threading import Thread

from devcluster.tenant import Tenant

_RULES = '{.spec.rules}{"\\n"}'
"""One line of JSON for each event. (A `range` prints the first event only.)"""


@dataclass
class Watch:
    """Of the HTTPRoute `name` while the context lasts."""

    tenant: Tenant
    name: str = "digits"
    seen: list[dict[int, int]] = field(default_factory=list)
    """Percent by version, one entry for each change of the route's weights; of rules that differ, one for each."""
    unready: list[str] = field(default_factory=list)
    """Each weight that rose on a version without a ready pod."""

    def __enter__(self) -> Watch:
        command = ["kubectl", "-n", self.tenant.namespace, "get", "httproutes", f"--field-selector=metadata.name={self.name}"]
        self._process = subprocess.Popen(
            [*command, "--watch", "-o", f"jsonpath={_RULES}"],
            env={**os.environ, **self.tenant.cluster.env()},
            stdout=subprocess.PIPE,
            text=True,
        )
        self._thread = Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._thread.join(10)
        self._process.wait(10)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            for rule in json.loads(line):
                if not any("headers" in match for match in rule["matches"]):
                    self._take({int(b["name"].rsplit("-v", 1)[1]): b["weight"] for b in rule["backendRefs"]})

    def _take(self, weights: dict[int, int]) -> None:
        before = self.seen[-1] if self.seen else {}
        if weights == before:
            return
        self.seen.append(weights)
        for version, weight in weights.items():
            if weight > before.get(version, 0):
                deployment = self.tenant.get("deployment", f"{self.name}-v{version}") or {}
                if not deployment.get("status", {}).get("readyReplicas"):
                    self.unready.append(f"{weight} % on version {version}")

    def check(self) -> None:
        """What must hold whatever happens."""
        assert self.seen
        assert self.unready == []
        for weights in self.seen:
            assert sum(weights.values()) == 100, self.seen
            assert len([w for w in weights.values() if w]) <= 2, self.seen

    def shares(self, version: int) -> list[int]:
        """The version's weight, change by change."""
        shares: list[int] = []
        for weights in self.seen:
            share = weights.get(version, 0)
            if not shares or shares[-1] != share:
                shares.append(share)
        return shares

"""The route's weights as they change, and the pods behind them, from the API server's own watches: no write is missed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Thread

from devcluster.tenant import Tenant
from perch.builders.route import STREAM

_ROUTES = '{.metadata.resourceVersion}{" "}{.metadata.name}{" "}{.spec.rules}{"\\n"}'
_DEPLOYMENTS = '{.metadata.resourceVersion}{" "}{.metadata.name}{" "}{.status.readyReplicas}{"\\n"}'
"""One line for each event. (A `range` prints the first event only.)"""


@dataclass
class Watch:
    """Of the HTTPRoute `name` and the Deployments of its versions, while the context lasts."""

    tenant: Tenant
    name: str = "digits"
    changes: list[tuple[int, dict[int, int]]] = field(default_factory=list)
    """Resource version, and percent by version: one entry for each change of the route's weights, or for each rule."""
    streams: list[tuple[int, dict[int, int]]] = field(default_factory=list)
    """The same of the rule for streams, which all go to one version."""
    ready: list[tuple[int, str, int]] = field(default_factory=list)
    """Resource version, Deployment, its ready pods. One etcd counts the versions of all resources: they tell what came first."""

    def __enter__(self) -> Watch:
        self._watches = [
            self._follow("httproutes", _ROUTES, self._take_route),
            self._follow("deployments", _DEPLOYMENTS, self._take_deployment),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for process, thread in self._watches:
            process.terminate()
            thread.join(10)
            process.wait(10)

    def _follow(self, kind: str, columns: str, take: Callable[[int, str, str], None]) -> tuple[subprocess.Popen[str], Thread]:
        process = subprocess.Popen(
            ["kubectl", "-n", self.tenant.namespace, "get", kind, "--watch", "-o", f"jsonpath={columns}"],
            env={**os.environ, **self.tenant.cluster.env()},
            stdout=subprocess.PIPE,
            text=True,
        )

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                version, name, rest = line.rstrip("\n").split(" ", 2)
                take(int(version), name, rest)

        thread = Thread(target=read, daemon=True)
        thread.start()
        return process, thread

    def _take_deployment(self, revision: int, name: str, ready: str) -> None:
        self.ready.append((revision, name, int(ready or 0)))

    def _take_route(self, revision: int, name: str, rules: str) -> None:
        for rule in json.loads(rules) if name == self.name else []:
            if any("headers" in match for match in rule["matches"]):
                continue
            weights = {int(b["name"].rsplit("-v", 1)[1]): b["weight"] for b in rule["backendRefs"]}
            if [match["path"]["value"] for match in rule["matches"]] == [STREAM]:
                if not self.streams or weights != self.streams[-1][1]:
                    self.streams.append((revision, weights))
                continue
            if not self.changes or weights != self.changes[-1][1]:
                self.changes.append((revision, weights))

    def check(self) -> None:
        """What must hold whatever happens. The first weights are those that stood when the watch began."""
        assert self.changes
        for _, weights in self.changes:
            assert sum(weights.values()) == 100, self.changes
            assert len([w for w in weights.values() if w]) <= 2, self.changes
        assert self.streams
        for _, weights in self.streams:
            assert sorted(weights.values())[-1] == sum(weights.values()) == 100, self.streams
        for (_, before), (revision, weights) in (*pairwise(self.changes), *pairwise(self.streams)):
            for version, weight in weights.items():
                if weight > before.get(version, 0):
                    assert self._ready_at(revision, version) > 0, f"{weight} % on version {version}: {self.changes}, {self.ready}"

    def _ready_at(self, revision: int, version: int) -> int:
        """Ready pods of the version when the API server had come to this revision."""
        known = [(at, ready) for at, name, ready in self.ready if name == f"{self.name}-v{version}" and at < revision]
        return max(known)[1] if known else 0

    def shares(self, version: int) -> list[int]:
        """The version's weight, change by change."""
        shares: list[int] = []
        for _, weights in self.changes:
            share = weights.get(version, 0)
            if not shares or shares[-1] != share:
                shares.append(share)
        return shares

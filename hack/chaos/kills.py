"""The operator killed at every write of whole journeys: each of its lives ends at its first write, until none is left to make."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

from chaos.stage import SLOW, Stage, expect, rfc3339_now
from demo.manifests import deployment

PATIENCE = 600.0
"""Seconds for a journey of so many lives, each of which begins with a new Python and new watches."""
MORTAL = "mortal"
"""A ModelDeployment that is made and deleted on the way."""
WRITTEN = {
    "PATCH modeldeployments", "PATCH modeldeployments/status", "PATCH jobs", "PATCH deployments", "PATCH services",
    "PATCH httproutes", "PATCH poddisruptionbudgets", "PATCH horizontalpodautoscalers", "PATCH networkpolicies",
    "DELETE deployments", "DELETE services", "DELETE poddisruptionbudgets",
}  # fmt: skip
"""What these journeys write at least: an operator that was never killed at one of these was not killed at every write."""


def kill_at_every_write(stage: Stage) -> str:
    # While there is an operator yet: what the scenario before has left is its to take away.
    stage.wait_gone(2)
    journeys: dict[str, Callable[[Stage], None]] = {
        "release": lambda stage: release(stage, 1),
        "next release": lambda stage: release(stage, 2),
        "revert": revert,
        "abort": abort,
        "runtime": change_runtime,
        "first deploy and deletion": whole_life,
    }
    with stage.operator_away():
        first = stage.state()
        # What an undisturbed release to version 2 leaves behind, and the way back.
        with stage.operator_outside(kill=False):
            release(stage, 1)
            second = stage.state()
            release(stage, 2)
        met: Counter[str] = Counter()
        lost: list[str] = []
        for name, journey in journeys.items():
            failed = stage.failed()
            wanted = second if name == "release" else first
            with stage.operator_outside(kill=True) as operator:
                journey(stage)
                reaches(stage, wanted, f"the state of an undisturbed {name}")
            # Orderly ends are ours: the last life of each journey.
            expect(set(operator.deaths) == {-signal.SIGKILL}, f"each life ended by its kill: {set(operator.deaths)}")
            met.update(map(kind, operator.writes()))
            if stage.failed() > failed:
                lost.append(f"{stage.failed() - failed} lost in {name}")
    missing = WRITTEN - set(met)
    expect(not missing, f"killed at every kind of write, but not at {', '.join(sorted(missing))}")
    kinds = ", ".join(f"{count} at {write}" for write, count in sorted(met.items()))
    return "; ".join([f"{met.total()} kills: {kinds}; each time the same state was reached as without", *lost])


def reaches(stage: Stage, wanted: dict[str, Any], what: str) -> None:
    stage.wait(stage.state, lambda state: state == wanted, what, 60)


def release(stage: Stage, stable: int) -> None:
    """The other version becomes the canary, is promoted, and the former one goes."""
    other = 3 - stable
    stage.apply(stable, canary=other)
    stage.wait_served(split=True, timeout=PATIENCE)
    stage.apply(other)
    stage.wait_served(split=False, timeout=PATIENCE)
    stage.wait_gone(stable, timeout=PATIENCE)


def revert(stage: Stage) -> None:
    """In mid-rollout."""
    stage.apply(1, canary=2)
    stage.wait_served(split=True, timeout=PATIENCE)
    stage.apply(1)
    stage.wait_served(split=False, timeout=PATIENCE)
    stage.wait_gone(2, timeout=PATIENCE)


def abort(stage: Stage) -> None:
    """Of a slow canary, whose pods go after inspectFor; then the commit that ends the release."""
    steps = [{"weight": 20, "hold": "1h"}, {"weight": 100}]
    stage.apply(1, canary=SLOW, steps=steps, analysis={"maxLatencyRatio": "1.5"}, inspectFor="10s", retryAt=rfc3339_now())
    stage.wait(stage.condition, lambda c: c.get("reason") == "LatencyHigher", "it is aborted", PATIENCE)
    stage.wait_gone(SLOW, timeout=PATIENCE)
    stage.apply(1)
    stage.wait_served(split=False, timeout=PATIENCE)


def change_runtime(stage: Stage) -> None:
    """And back."""
    for env in ({"MARK": "killed"}, None):
        former = stage.uids(1)
        stage.apply(1, env=env)
        stage.wait_served(split=False, timeout=PATIENCE)
        stage.wait_replaced(former)


def whole_life(stage: Stage) -> None:
    """Of another ModelDeployment, with every kind of child: exported, served, and deleted with its artefact."""
    tenant = stage.tenant
    scaling = {"minReplicas": 2, "maxReplicas": 3, "targetCPUUtilizationPercentage": 80}
    runtime = {"terminationGracePeriodSeconds": 30, "resources": {"requests": {"cpu": "20m"}}, "autoscaling": scaling}
    builder = {"networkPolicy": {"allow": [{"namespace": "storage"}]}}
    manifest = deployment(tenant, stage.entries[:1], name=MORTAL, runtime=runtime, builder=builder)
    manifest["spec"]["repository"]["deletionPolicy"] = "Delete"
    tenant.apply(manifest)
    tenant.wait_ready(MORTAL, timeout=PATIENCE)
    prefix = f"e2e/{tenant.namespace}/{MORTAL}/"
    expect(bool(tenant.keys(prefix)), "its artefact is published")
    tenant.kubectl("delete", "modeldeployment", MORTAL, f"--timeout={PATIENCE:.0f}s")
    expect(not tenant.keys(prefix), "its artefact is erased")
    kinds = "deployments,services,jobs,hpa,pdb,networkpolicies,httproutes"
    children = ("get", kinds, "-l", f"serving.perch.dev/model-deployment={MORTAL}", "-o", "name")
    stage.wait(lambda: tenant.kubectl(*children), lambda names: not names, "its children are gone")


def kind(write: str) -> str:
    """Of a write, as `PATCH deployments`."""
    method, path = write.split()
    plural, _, rest = path.partition("/namespaces/")[2].partition("/")[2].partition("/")
    return f"{method} {plural}{'/status' if rest.endswith('/status') else ''}"

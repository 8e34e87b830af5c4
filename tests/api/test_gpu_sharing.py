"""The manifests of docs/gpu-sharing.md, and the pods that Perch builds from them, by the API server's own dry run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from perch.api import Spec
from perch.builders.serving import build_deployment
from perch.names import artifact_revision
from tests.apiserver import ApiServer
from tests.unit.operator.world import World, spec

from .test_admission import full_spec
from .test_children import IDENTITY, INSTALLATION, apply

PAGE = (Path(__file__).parents[2] / "docs" / "gpu-sharing.md").read_text()
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
OBJECTS = [block for block in BLOCKS if "kind" in block]
RUNTIMES = [block["runtime"] for block in BLOCKS if "runtime" in block]


def test_the_page_shows_each_way() -> None:
    assert len(OBJECTS) == 4
    shares = [set(r["resources"]["limits"]) | {c["name"] for c in r["resources"].get("claims", [])} for r in RUNTIMES]
    assert [share - {"memory"} for share in shares] == [
        {"nvidia.com/mig-1g.10gb"},
        *[{"nvidia.com/gpu.shared"}] * 2,
        *[{"gpu"}] * 2,
    ]


@pytest.mark.parametrize("body", OBJECTS, ids=lambda body: body["metadata"]["name"])
def test_what_an_administrator_applies_is_valid(api: ApiServer, body: dict[str, Any]) -> None:
    result = api.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", text=json.dumps(body), check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: "-".join(runtime["resources"]["limits"]).replace("/", "."))
def test_a_model_that_asks_for_a_share_is_accepted_and_its_pods_are_valid(api: ApiServer, runtime: dict[str, Any]) -> None:
    asked = {**full_spec(), "runtime": {**runtime, "tensorrtVersion": "10.13.3.9"}}
    body = {"apiVersion": "serving.perch.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "shared"}, "spec": asked}
    result = api.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", text=json.dumps(body), check=False)
    assert result.returncode == 0, result.stderr
    model = Spec.model_validate(asked)
    entry = model.versions[0]
    built = build_deployment(IDENTITY, model, entry, artifact_revision(entry), "sha256:" + "0" * 64, INSTALLATION)
    stored = apply(api, built, dryRun="All")
    (triton,) = [c for c in stored["spec"]["template"]["spec"]["containers"] if c["name"] == "triton"]
    limits = runtime["resources"]["limits"]
    assert {name: triton["resources"]["limits"][name] for name in limits} == {n: str(v) for n, v in limits.items()}
    assert triton["resources"].get("claims") == runtime["resources"].get("claims")
    assert stored["spec"]["template"]["spec"].get("resourceClaims") == runtime.get("resourceClaims")


@pytest.mark.parametrize(("surge", "most"), [("Additional", 8), ("WithinReplicas", 4)])
@pytest.mark.parametrize("weight", [5, 30, 100])
def test_a_release_needs_as_many_pods_as_the_page_says(surge: str, most: int, weight: int) -> None:
    """R = 4: R and ceil(R × w / 100) for the canary, or R in all."""
    runtime = {"replicas": 4}
    world = World(spec(1, 2, runtime=runtime))
    world.settle()
    steps = [{"weight": weight, "hold": "Indefinite"}] if weight < 100 else [{"weight": 100}]
    traffic, rollout = {"stable": 1, "canary": 2}, {"steps": steps, "surge": surge, "scaleDownDelay": "1h"}
    world.spec = spec(1, 2, traffic=traffic, rollout=rollout, runtime=runtime)
    world.generation += 1
    seen = 0
    for _ in range(60):
        world.step()
        seen = max(seen, sum(serving.replicas for serving in world.servings.values()))
        world.go_well()
        world.feed()
    canary = {5: 1, 30: 2, 100: 4}[weight]
    assert seen == min(most, 4 + canary)

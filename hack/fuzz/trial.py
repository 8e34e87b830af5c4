"""What Perch makes of an accepted spec: types, planner and builders, through a release and its revert.

Nothing here asks for a verdict on the spec: whoever calls gets every child that was built, or a `Finding`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from pydantic import ValidationError
from tests.unit.operator.world import INSTALLATION, World

from perch.api import Phase, Spec
from perch.builders.serving import build_deployment
from perch.names import artifact_revision
from perch.plan import Apply
from perch_exporter.contract import Tooling

_PASSES = 8
_PLAN = {"tensorrt": "10.13.3.9", "compute_capability": "9.0"}


class Finding(Exception):
    """An accepted spec with which something does not work."""


def children(accepted: dict[str, Any]) -> list[Mapping[str, Any]]:
    """Every object that is written for this spec while all goes well, and while it is taken back.

    Raises Finding where the types refuse it, where a part of the planner or a builder raises, or where stable does not get all
    traffic back.
    """
    try:
        spec = Spec.model_validate(accepted)
    except ValidationError as error:
        raise Finding(f"the types refuse what the API server accepts: {error}") from error
    try:
        return [*_written(spec), *_deployments(spec)]
    except Finding:
        raise
    except Exception as error:
        raise Finding(f"planner or builder: {type(error).__name__}: {error}") from error


def _written(spec: Spec) -> Iterator[Mapping[str, Any]]:
    plan = any(entry.conversion.target == "TensorRT" for entry in spec.versions)
    tooling = Tooling(torch="2.9.0", onnx="1.19.0", onnxruntime="1.23.0", opset=20, **(_PLAN if plan else {}))
    world = World(spec, tooling=tooling)
    yield from _passes(world)
    traffic = spec.traffic.model_copy(update={"canary": None, "match": None, "mirror": None})
    world.spec, world.generation = spec.model_copy(update={"traffic": traffic}), 2
    yield from _passes(world)
    if spec.routing is not None and world.weights != {spec.traffic.stable: 100}:
        raise Finding(f"after the revert the weights are {world.weights}")


def _passes(world: World) -> Iterator[Mapping[str, Any]]:
    for _ in range(_PASSES):
        decided = world.step()
        for fault in decided.faults:
            raise Finding(f"a part of the planner fails: {fault}") from fault.error
        yield from (action.body for action in decided.actions if isinstance(action, Apply))
        for known in world.status.versions:
            if known.phase is Phase.FAILED:
                raise Finding(f"the exporter's contract refuses it: {known.message}")
        world.go_well()
        world.now += timedelta(seconds=30)


def _deployments(spec: Spec) -> Iterator[dict[str, Any]]:
    """Of versions out of traffic too: the next commit may name them."""
    for entry in spec.versions:
        digest = "sha256:" + "0" * 64
        capability = "9.0" if entry.conversion.target == "TensorRT" else None
        yield build_deployment(
            World(spec).identity, spec, entry, artifact_revision(entry), digest, INSTALLATION, compute_capability=capability
        )

"""The Triton pods of each version: which run, how many, and how they stand."""

from __future__ import annotations

from collections.abc import Mapping

from perch.api import Phase, Version, VersionStatus
from perch.builders.autoscaler import build_autoscaler
from perch.builders.serving import build_budget, build_deployment, build_service
from perch.names import gpu_labels, serving_hash, serving_name, version_of
from perch.observed import ServingFacts, matches
from perch.plan.context import Apply, Context, Delete, Scale
from perch.status import VersionFacts
from perch.traffic import NOT_READY, Readiness


def wanted_hash(ctx: Context, exported: VersionStatus) -> str:
    return serving_hash(exported.artifact_revision, exported.artifact_digest or "", ctx.spec)


def conflicts(ctx: Context, exported: VersionStatus) -> bool:
    """Whether pods of this number still run another content: the entry was removed and put back changed."""
    serving = ctx.observed.servings.get(exported.version)
    return serving is not None and serving.readable and serving.revision != exported.artifact_revision


def foreign_plan(ctx: Context, exported: VersionStatus) -> tuple[str, str] | None:
    """Why the artefact may not be given to this runtime (reason and message): a plan of another TensorRT or for other GPUs.

    Of the nodes the planner knows what nodeSelector says; the pods ask the scheduler for the right ones in any case.
    """
    built, runs = exported.tensorrt, ctx.spec.runtime.tensorrt_version
    if built is None:
        return None
    if built.version == runs:
        return _other_gpu(ctx, exported.version, built.compute_capability)
    return "TensorRTMismatch", (
        f"version {exported.version} is a plan of TensorRT {built.version} (compute capability {built.compute_capability}) and "
        f"runtime.tensorrtVersion says {runs or 'nothing'}: a plan runs on the version that built it alone. Set runtime.image "
        "and tensorrtVersion back, or list the checkpoint under a new version number, to be built by the runtime's TensorRT"
    )


def _other_gpu(ctx: Context, version: int, capability: str) -> tuple[str, str] | None:
    asked = ctx.spec.runtime.node_selector or {}
    for label, needed in gpu_labels(capability).items():
        if asked.get(label, needed) != needed:
            return "GPUMismatch", (
                f"version {version} is a plan for GPUs of compute capability {capability} and runtime.nodeSelector asks for "
                f"{label}={asked[label]}: a plan runs on GPUs like the one that built it. Set nodeSelector back, or list the "
                "checkpoint under a new version number, to be built on such a GPU (builder.nodeSelector)"
            )
    return None


def readiness(serving: ServingFacts | None, wanted: int) -> Readiness:
    """How a version stands against the number of pods that its next share of traffic needs."""
    if serving is None:
        return NOT_READY
    return Readiness(
        full=serving.current and serving.replicas >= wanted and serving.ready >= wanted > 0,
        able=serving.ready > 0,
        most=wanted > 0 and 4 * serving.ready >= 3 * wanted,
        settled=serving.deadline_exceeded and wanted > 0 and 2 * serving.ready >= wanted,
    )


def plan_serving(ctx: Context, entry: Version, exported: VersionStatus, wanted: int | None) -> VersionFacts:
    """Run a version with `wanted` pods once it is published, or with None leave it alone; report how it stands."""
    serving = ctx.observed.servings.get(entry.version)
    conflict, foreign = conflicts(ctx, exported), foreign_plan(ctx, exported)
    unreadable = serving is not None and not serving.readable
    blocked = conflict or unreadable or (foreign is not None and serving is None)
    if wanted is not None and exported.artifact_digest is not None and not blocked:
        _apply_serving(ctx, entry, exported, serving, wanted, frozen=foreign is not None)
    return report_serving(ctx, entry, exported, wanted)


def report_serving(ctx: Context, entry: Version, exported: VersionStatus, wanted: int | None) -> VersionFacts:
    """How a listed version stands."""
    serving = ctx.observed.servings.get(entry.version)
    conflict, foreign = conflicts(ctx, exported), foreign_plan(ctx, exported)
    if serving is None or conflict:
        starting = wanted is not None and exported.phase is Phase.PUBLISHED and not conflict and not foreign
        update = {
            "phase": Phase.STARTING if starting else exported.phase,
            "replicas": wanted if starting else 0,
            "ready_replicas": 0,
            "serving_hash": None,
            "drained_at": None,
        }
        # Pods of the former content keep the traffic that they have, and gain none.
        former = Readiness(able=serving is not None and serving.able)
        return VersionFacts(exported.model_copy(update=update), former, conflict=conflict, foreign=foreign)
    ready = readiness(serving, serving.replicas if wanted is None else wanted)
    phase = Phase.SERVING if ready.full else Phase.STARTING
    return VersionFacts(
        exported.model_copy(
            update={
                "phase": phase if wanted is not None else Phase.DRAINING,
                "serving_hash": serving.serving_hash,
                "replicas": serving.replicas,
                "ready_replicas": serving.ready,
                "message": serving.words if not serving.rolled else None,
                "drained_at": None,
            }
        ),
        readiness=ready,
        rolled=serving.rolled and serving.serving_hash == wanted_hash(ctx, exported),
        deadline_exceeded=serving.deadline_exceeded,
        foreign=foreign,
    )


def _apply_serving(
    ctx: Context, entry: Version, exported: VersionStatus, serving: ServingFacts | None, wanted: int, *, frozen: bool
) -> None:
    """`frozen`: the pods that there are may be scaled, but not brought to the present runtime."""
    name = serving_name(ctx.identity.name, entry.version)
    service = build_service(ctx.identity, entry.version)
    if not matches(service["spec"], ctx.observed.services.get(name)):
        ctx.actions.append(Apply(service))
    scaled = ctx.spec.runtime.autoscaling is not None
    # Beside an autoscaler the pods that it chose are named again: an apply that leaves `replicas` out would reset it to 1.
    replicas = serving.replicas if scaled and serving is not None else wanted
    if serving is None or (serving.serving_hash != wanted_hash(ctx, exported) and not frozen):
        body = build_deployment(
            ctx.identity,
            ctx.spec,
            entry,
            exported.artifact_revision,
            exported.artifact_digest or "",
            ctx.installation,
            replicas=replicas,
            compute_capability=exported.tensorrt.compute_capability if exported.tensorrt else None,
        )
        # Had the autoscaler chosen others meanwhile, its choice would be undone: then this pass fails and the next one knows it.
        ctx.actions.append(Apply(body, serving.resource_version if scaled and serving is not None else None))
    elif serving.replicas != replicas:
        ctx.actions.append(Scale(name, replicas))
    if scaled:
        autoscaler = build_autoscaler(ctx.identity, ctx.spec, entry.version, wanted)
        if not matches(autoscaler["spec"], ctx.observed.autoscalers.get(name)):
            ctx.actions.append(Apply(autoscaler))
    elif name in ctx.observed.autoscalers:
        ctx.actions.append(Delete("HorizontalPodAutoscaler", name))
    budget = build_budget(ctx.identity, entry.version)
    if wanted > 1 and not matches(budget["spec"], ctx.observed.budgets.get(name)):
        ctx.actions.append(Apply(budget))
    if wanted == 1 and name in ctx.observed.budgets:
        # A budget over one pod would block every drain of its node.
        ctx.actions.append(Delete("PodDisruptionBudget", name))


def keep_services(ctx: Context, weights: Mapping[int, int]) -> None:
    """Every version that the route names, or is about to, has its Service, one that drains too.

    A Gateway that misses one calls the whole route unresolved, and nothing would ever be drained.
    """
    for version in sorted({*ctx.present, *weights}):
        service = build_service(ctx.identity, version)
        name = service["metadata"]["name"]
        going = Delete("Service", name) in ctx.actions
        if not going and Apply(service) not in ctx.actions and not matches(service["spec"], ctx.observed.services.get(name)):
            ctx.actions.append(Apply(service))


def remove_serving(ctx: Context, version: int) -> None:
    name = serving_name(ctx.identity.name, version)
    for kind, names in _beside(ctx):
        if name in names:
            ctx.actions.append(Delete(kind, name))
    ctx.actions.extend((Delete("Deployment", name), Delete("Service", name)))


def sweep(ctx: Context, running: set[int]) -> None:
    """What stands beside pods that are gone: left where the operator died between two deletes."""
    kept = running | set(ctx.observed.servings) | set(ctx.present)
    for kind, names in (("Service", ctx.observed.services), *_beside(ctx)):
        for name in names:
            version = version_of(ctx.identity.name, name)
            if version is not None and version not in kept:
                ctx.actions.append(Delete(kind, name))


def _beside(ctx: Context) -> tuple[tuple[str, set[str]], ...]:
    return (
        ("PodDisruptionBudget", set(ctx.observed.budgets)),
        ("HorizontalPodAutoscaler", set(ctx.observed.autoscalers)),
    )

"""Step of a Job whose target is TensorRT, after prove: a plan of convert's ONNX file, and the proof that it answers alike.

Runs in an image with NVIDIA's tensorrt and no torch, on a GPU of the kind that will serve, without credentials. The network is
strongly typed: each layer computes in the type that the ONNX file gives it, so FP16 and INT8 are what convert made of it and
TensorRT lowers nothing by itself. TensorRT 10 knows that as a flag, 11 nothing else; both are spoken here.

convert's output is read only, and so is what prove found of it. publish judges the figures again, and the golden check each pod.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perch_exporter.contract import ExportRequest, PlanFigures, Reason, TensorSpec, Triton, Verdict
from perch_exporter.cuda import Cuda
from perch_exporter.failure import Judged, StepFailed
from perch_exporter.handover import TIMING_LIMIT, handed_over, inspect
from perch_exporter.parity import Answers, judge
from perch_exporter.samples import Array, Golden, Tensors, joined, load_golden
from perch_exporter.workspace import GOLDEN, MODEL, PLAN, PLAN_FIGURES, TIMING, Workspace, timing_file

log = logging.getLogger(__name__)

_WORKSPACE_BYTES = 4 * 2**30
_UNEVEN_BATCH = 3


@dataclass(frozen=True)
class Profile:
    """Sizes of one input, batch first, that TensorRT builds for: it runs from `least` to `most` and is tuned for `usual`."""

    name: str
    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]


def profiles(inputs: Sequence[TensorSpec], triton: Triton) -> list[Profile]:
    """Batches of 1 to maxBatchSize, tuned for the largest preferred size, or for half of the most."""
    preferred = triton.dynamic_batching.preferred_batch_sizes if triton.dynamic_batching else None
    usual = max(preferred) if preferred else max(1, triton.max_batch_size // 2)
    return [Profile(spec.name, (1, *spec.shape), (usual, *spec.shape), (triton.max_batch_size, *spec.shape)) for spec in inputs]


def build(request: ExportRequest, workspace: Workspace) -> None:
    """Writes model.plan and plan.json. Raises StepFailed."""
    started = time.monotonic()
    inspect(workspace.output, handed_over(request), "convert")
    trt = _tensorrt()
    check_version(trt.__version__, request.tensorrt_version or "")
    cuda = Cuda.load()
    capability = cuda.compute_capability()
    log.info("building with TensorRT %s for compute capability %s", trt.__version__, capability)
    logger = _logger(trt)
    before = _former(workspace, trt.__version__, capability)
    content, timings = build_plan(trt, logger, workspace.output / MODEL, profiles(request.inputs, request.triton), before)
    workspace.plan.mkdir(parents=True, exist_ok=True)
    (workspace.plan / PLAN).write_bytes(content)
    _keep(timings, workspace)
    log.info("a plan of %d bytes after %.1f s", len(content), time.monotonic() - started)

    golden = load_golden(workspace.output / GOLDEN)
    engine = trt.Runtime(logger).deserialize_cuda_engine(content)
    if engine is None:
        raise StepFailed(Reason.EXPORT_FAILED, f"TensorRT {trt.__version__} does not load the plan that it built")
    check_types(trt, engine, golden)
    parity = judge(
        [_case(engine, cuda, golden, batch) for batch in batches(golden.samples, request.triton.max_batch_size)],
        request.tolerance,
    )
    log.info("parity %s: %s", parity.verdict, parity.message)
    if parity.verdict is not Verdict.PASSED:
        reason = Reason.PARITY_UNPROVABLE if parity.verdict is Verdict.UNPROVABLE else Reason.PARITY_FAILED
        words = f"the TensorRT plan does not answer as the checkpoint does: {parity.message}"
        raise StepFailed(reason, words, Judged(parity, request.tolerance))
    seconds = round(time.monotonic() - started, 3)
    figures = PlanFigures(parity=parity, tensorrt=trt.__version__, compute_capability=capability, seconds=seconds)
    (workspace.plan / PLAN_FIGURES).write_text(figures.to_json())


def _former(workspace: Workspace, version: str, capability: str) -> bytes:
    """The timings of former builds, as fetch brought them."""
    path = workspace.timings / timing_file(version, capability)
    return path.read_bytes() if path.exists() else b""


def _keep(timings: bytes, workspace: Workspace) -> None:
    if 0 < len(timings) <= TIMING_LIMIT:
        (workspace.plan / TIMING).write_bytes(timings)
    else:
        log.info("timings of %d bytes are not kept", len(timings))


def check_version(built_by: str, served_by: str) -> None:
    if built_by != served_by:
        raise StepFailed(
            Reason.TENSORRT_MISMATCH,
            f"builder.tensorrtImage has TensorRT {built_by} and runtime.tensorrtVersion says {served_by}: a plan runs on the "
            "version that built it alone; name images of one release of NVIDIA's in both, and its version",
        )


def batches(samples: int, most: int) -> list[int]:
    return sorted({1, min(_UNEVEN_BATCH, most), min(samples, most)})


def build_plan(trt: Any, logger: Any, model: Path, wanted: Sequence[Profile], timings: bytes = b"") -> tuple[bytes, bytes]:
    """The serialized plan, and the timing cache, which goes on from `timings`. Raises ExportFailed with what TensorRT's parser or
    builder complains about."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        errors = "; ".join(str(parser.get_error(place).desc()) for place in range(min(parser.num_errors, 3)))
        raise StepFailed(Reason.EXPORT_FAILED, f"TensorRT {trt.__version__} does not read the ONNX file: {errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
    # FP32 is taken at its word here as in the pods: TF32 would round its products.
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for one in wanted:
        profile.set_shape(one.name, one.least, one.usual, one.most)
    config.add_optimization_profile(profile)
    if not _set_timings(config, timings):
        log.info("the timings of former builds are not TensorRT's, or another GPU's: all is measured anew")
        _set_timings(config, b"")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        said = "; ".join(logger.errors[-3:]) or "without a word"
        raise StepFailed(Reason.EXPORT_FAILED, f"TensorRT {trt.__version__} cannot build the plan: {said}")
    measured = config.get_timing_cache()
    return bytes(plan), bytes(measured.serialize()) if measured else b""


def _set_timings(config: Any, content: bytes) -> bool:
    """TensorRT refuses what it cannot read by None, and another GPU's by False."""
    cache = config.create_timing_cache(content)
    return cache is not None and bool(config.set_timing_cache(cache, ignore_mismatch=False))


def check_types(trt: Any, engine: Any, golden: Golden) -> None:
    """Tensors are handed over as bytes, so the plan has to mean by them what the golden samples do."""
    for name, array in (*golden.inputs.items(), *golden.outputs.items()):
        found = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
        if found != array.dtype:
            raise StepFailed(Reason.EXPORT_FAILED, f"{name} is {array.dtype}, and TensorRT {trt.__version__} makes it {found}")


def _case(engine: Any, cuda: Cuda, golden: Golden, batch: int) -> Answers:
    parts = [
        _run(engine, cuda, {name: array[start : start + batch] for name, array in golden.inputs.items()}, golden.outputs)
        for start in range(0, golden.samples, batch)
    ]
    return Answers(golden.outputs, joined(parts), f"{golden.samples} samples in batches of {batch} by the plan")


def _run(engine: Any, cuda: Cuda, inputs: Tensors, outputs: Tensors) -> dict[str, Array]:
    context = engine.create_execution_context()
    with cuda.memory() as memory:
        for name, array in inputs.items():
            context.set_input_shape(name, array.shape)
            context.set_tensor_address(name, memory.upload(np.ascontiguousarray(array)))
        places = {}
        for name, reference in outputs.items():
            shape = tuple(context.get_tensor_shape(name))
            if -1 in shape:
                raise StepFailed(
                    Reason.EXPORT_FAILED, f"the size of {name} depends on what the input holds, which a plan cannot serve"
                )
            places[name] = (shape, memory.allocate(reference.itemsize * int(np.prod(shape))))
            context.set_tensor_address(name, places[name][1])
        if not context.execute_async_v3(memory.stream):
            raise StepFailed(Reason.EXPORT_FAILED, "the plan does not run on the GPU that built it")
        memory.wait()
        return {name: memory.download(place, shape, outputs[name].dtype) for name, (shape, place) in places.items()}


def _tensorrt() -> Any:
    try:
        import tensorrt
    except ImportError as error:
        raise StepFailed(
            Reason.EXPORT_FAILED,
            f"builder.tensorrtImage has no tensorrt for Python ({error}): build it as exporters/README.md says",
        ) from error
    return tensorrt


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Passes TensorRT's warnings and errors on, and keeps the errors for the sentence that a failure ends in."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
                log.error("TensorRT: %s", message)
            elif severity == trt.ILogger.WARNING:
                log.warning("TensorRT: %s", message)

    return Logger()

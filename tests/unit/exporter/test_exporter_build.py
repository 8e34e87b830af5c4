"""TensorRT plans as far as they can be tried without a GPU: what is asked of TensorRT, what is said when it fails, and the gate.

The stand-in below has the names, arguments and answers of the real package, compared with the bindings of 10.13 and 11.4 by hand.
"""

from __future__ import annotations

import ctypes
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import PICTURES, REVISION, file_request, golden, hand_over, request, wheel_folder

from perch_exporter import build as module
from perch_exporter.artifact import plan_key
from perch_exporter.build import Profile, batches, build, check_version, profiles
from perch_exporter.contract import ExportRequest, Manifest, Outcome, Parity, PlanFigures, Reason, Verdict
from perch_exporter.cuda import Cuda
from perch_exporter.failure import StepFailed
from perch_exporter.fetch import fetch
from perch_exporter.handover import TIMING_LIMIT
from perch_exporter.model_files import build_model_files
from perch_exporter.publish import publish
from perch_exporter.triton_config import parse_config
from perch_exporter.workspace import MODEL_DATA, PLAN, PLAN_FIGURES, TIMING, Workspace

VERSION = "10.13.3.9"
GPU = {"maxBatchSize": 8, "instanceKind": "GPU"}
PLAN_OF = {"conversion__target": "TensorRT", "tensorrtVersion": VERSION, "triton": GPU}


def test_for_a_plan_and_for_the_accelerator_the_file_is_made_as_tensorrt_reads_it() -> None:
    assert request(**PLAN_OF).for_tensorrt
    assert request(triton=GPU | {"accelerator": "TensorRT"}).for_tensorrt
    assert not request(triton=GPU).for_tensorrt


PROFILES = [
    ("half of the most is usual", {"maxBatchSize": 32}, (1, 16, 32)),
    ("one at a time is one at a time", {"maxBatchSize": 1}, (1, 1, 1)),
    ("an odd half is rounded down", {"maxBatchSize": 7}, (1, 3, 7)),
    (
        "the largest preferred size is usual",
        {"maxBatchSize": 32, "dynamicBatching": {"preferredBatchSizes": [4, 24, 8]}},
        (1, 24, 32),
    ),
    ("batching without preferences is tuned for half", {"maxBatchSize": 8, "dynamicBatching": {}}, (1, 4, 8)),
]


@pytest.mark.parametrize(("triton", "sizes"), [case[1:] for case in PROFILES], ids=[case[0] for case in PROFILES])
def test_a_profile_has_every_size(triton: dict[str, Any], sizes: tuple[int, ...]) -> None:
    asked = request(triton=triton)
    (found,) = profiles(asked.inputs, asked.triton)
    assert found == Profile("image", *((size, 1, 28, 28) for size in sizes))


@pytest.mark.parametrize(("samples", "most", "asked"), [(16, 32, [1, 3, 16]), (16, 8, [1, 3, 8]), (4, 1, [1]), (4, 2, [1, 2])])
def test_the_plan_is_asked_in_batches_of_several_sizes(samples: int, most: int, asked: list[int]) -> None:
    assert batches(samples, most) == asked


def test_a_builder_of_another_version_is_refused_with_both_versions() -> None:
    check_version(VERSION, VERSION)
    with pytest.raises(StepFailed, match=r"has TensorRT 10.11.0.33 and runtime.tensorrtVersion says 10.13.3.9") as caught:
        check_version("10.11.0.33", VERSION)
    assert caught.value.reason is Reason.TENSORRT_MISMATCH


class Library:
    """The CUDA runtime, with the machine's own memory for the device's. Counts what is not freed."""

    def __init__(self) -> None:
        self.places: dict[int, Any] = {}
        self.fails: dict[str, int] = {}
        self.cudaGetErrorString = Words()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name not in self.fails:
                getattr(self, "do_" + name)(*arguments)
            return self.fails.get(name, 0)

        return call

    def do_cudaDeviceGetAttribute(self, place: Any, attribute: int, device: int) -> None:
        place._obj.value = {75: 9, 76: 0}[attribute]

    def do_cudaStreamCreate(self, place: Any) -> None:
        place._obj.value = 7

    def do_cudaMalloc(self, place: Any, size: Any) -> None:
        memory = ctypes.create_string_buffer(size.value)
        place._obj.value = ctypes.addressof(memory)
        self.places[place._obj.value] = memory

    def do_cudaFree(self, place: Any) -> None:
        del self.places[place.value]

    def do_cudaMemcpy(self, target: Any, source: Any, size: Any, direction: int) -> None:
        ctypes.memmove(target, source, size.value)

    def do_cudaStreamSynchronize(self, stream: Any) -> None:
        assert stream.value == 7

    do_cudaStreamDestroy = do_cudaStreamSynchronize


class Words:
    def __call__(self, code: int) -> bytes:
        return b"no CUDA-capable device is detected"


class Context:
    def __init__(self, trt: Any) -> None:
        self.trt, self.shape, self.addresses = trt, (), {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.trt.profile[name][0] <= shape <= self.trt.profile[name][2]
        self.shape = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shape[0], -1 if self.trt.open_ended else 10)

    def execute_async_v3(self, stream_handle: int) -> bool:
        count = self.shape[0]
        image = np.ctypeslib.as_array((ctypes.c_float * (count * 784)).from_address(self.addresses["image"]))
        weights = np.random.default_rng(0).standard_normal((784, 10)).astype(np.float32)
        answer = (image.reshape(count, 784) @ weights * self.trt.factor).astype(np.float32)
        ctypes.memmove(self.addresses["logits"], answer.ctypes.data, answer.nbytes)
        return True


def tensorrt(**behaviour: Any) -> Any:
    """The package, as far as build.py knows it."""
    trt = types.SimpleNamespace(
        __version__=VERSION,
        profile={},
        factor=1.0,
        parses=True,
        plan=b"a plan",
        flags=None,
        cleared=[],
        timings=[],
        measured=b"timings",
        open_ended=False,
        types={"image": "FLOAT", "logits": "FLOAT"},
        nptype={"FLOAT": np.float32, "HALF": np.float16}.__getitem__,
    )
    vars(trt).update(behaviour)

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> str:
            trt.flags = flags
            return "network"

        def create_builder_config(self) -> Any:
            def set_timing_cache(cache: Any, ignore_mismatch: bool) -> bool:
                assert not ignore_mismatch
                trt.timings.append(cache.content)
                return cache.content != b"timings of another GPU"

            def create_timing_cache(content: bytes) -> Any:
                return None if content == b"no cache" else types.SimpleNamespace(content=content)

            return types.SimpleNamespace(
                set_memory_pool_limit=lambda pool, size: None,
                clear_flag=trt.cleared.append,
                add_optimization_profile=lambda one: 0,
                create_timing_cache=create_timing_cache,
                set_timing_cache=set_timing_cache,
                get_timing_cache=lambda: types.SimpleNamespace(serialize=lambda: trt.measured),
            )

        def create_optimization_profile(self) -> Any:
            def set_shape(name: str, least: Any, usual: Any, most: Any) -> None:
                trt.profile[name] = (least, usual, most)

            return types.SimpleNamespace(set_shape=set_shape)

        def build_serialized_network(self, network: str, config: Any) -> Any:
            if trt.plan is None:
                self.logger.log(ILogger.ERROR, "no tactic for node_Conv_3")
            return trt.plan

    class OnnxParser:
        num_errors = 1

        def __init__(self, network: str, logger: Any) -> None: ...

        def parse_from_file(self, model: str) -> bool:
            assert Path(model).name == "model.onnx"
            return bool(trt.parses)

        def get_error(self, index: int) -> Any:
            return types.SimpleNamespace(desc=lambda: "no importer for SoftSign")

    class Runtime:
        def __init__(self, logger: Any) -> None: ...

        def deserialize_cuda_engine(self, content: bytes) -> Any:
            if content != b"a plan":
                return None
            return types.SimpleNamespace(create_execution_context=lambda: Context(trt), get_tensor_dtype=trt.types.__getitem__)

    trt.ILogger, trt.Builder, trt.OnnxParser, trt.Runtime = ILogger, Builder, OnnxParser, Runtime
    trt.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
    trt.MemoryPoolType = types.SimpleNamespace(WORKSPACE="workspace")
    trt.BuilderFlag = types.SimpleNamespace(TF32="tf32")
    return trt


@pytest.fixture
def asked(tmp_path: Path) -> ExportRequest:
    return file_request(tmp_path, b"a checkpoint", **PLAN_OF)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "work")
    hand_over(made, golden(16))
    return made


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(Cuda, "load", lambda: Cuda(made))
    return made


def built(asked: ExportRequest, workspace: Workspace, trt: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_tensorrt", lambda: trt)
        build(asked, workspace)


def test_a_plan_is_built_proven_and_published_in_place_of_the_onnx_file(
    asked: ExportRequest, workspace: Workspace, library: Library
) -> None:
    trt = tensorrt()
    built(asked, workspace, trt)
    assert trt.flags == 2, "strongly typed"
    assert trt.cleared == ["tf32"]
    assert trt.profile == {"image": ((1, 1, 28, 28), (4, 1, 28, 28), (8, 1, 28, 28))}
    assert library.places == {}, "all memory is freed"
    assert sorted(path.name for path in workspace.plan.iterdir()) == [PLAN, PLAN_FIGURES, TIMING]
    assert not (workspace.output / PLAN).exists()

    summary = publish(asked, workspace, {})
    assert summary.outcome is Outcome.PUBLISHED
    prefix = Path(asked.destination.uri.removeprefix("file://"))
    manifest = Manifest.from_json((prefix / "manifest.json").read_bytes())
    for written in (summary, manifest):
        assert written.parity is not None
        assert written.tooling is not None
        assert "by the plan" in written.parity.message
        assert (written.tooling.tensorrt, written.tooling.compute_capability) == (VERSION, "9.0")
        assert written.tooling.torch == "2.15.0+cpu"
    assert summary.seconds is not None
    assert summary.seconds.build is not None
    assert (prefix / "model/digits/1/model.plan").read_bytes() == b"a plan"
    assert [key for key in manifest.files if "onnx" in key] == []
    assert parse_config((prefix / "model/digits/config.pbtxt").read_text()).backend == "tensorrt"


def test_weights_beside_the_onnx_file_are_in_the_plan_and_not_published_again(
    asked: ExportRequest, workspace: Workspace, library: Library
) -> None:
    (workspace.output / MODEL_DATA).write_bytes(b"weights")
    built(asked, workspace, tensorrt())
    publish(asked, workspace, {})
    prefix = Path(asked.destination.uri.removeprefix("file://"))
    assert sorted(path.name for path in (prefix / "model/digits/1").iterdir()) == [PLAN]


def timing_file(asked: ExportRequest) -> Path:
    return Path(asked.destination.uri.removeprefix("file://")).parent / "timing" / f"{VERSION}-9.0.cache"


def test_the_next_build_goes_on_from_the_timings_of_the_last(
    asked: ExportRequest, workspace: Workspace, library: Library
) -> None:
    fetch(asked, workspace, {})
    trt = tensorrt()
    built(asked, workspace, trt)
    assert trt.timings == [b""], "none were there"
    publish(asked, workspace, {})
    assert timing_file(asked).read_bytes() == b"timings"
    manifest = Manifest.from_json((timing_file(asked).parents[1] / f"1-{REVISION}" / "manifest.json").read_bytes())
    assert not any("timing" in key for key in manifest.files), "no part of the artefact"

    for name in ("10.11.0.33-9.0.cache", f"{VERSION}-9.0.cache.partial", f"{VERSION}-9.0/x.cache"):
        other = timing_file(asked).parent / name
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(b"something else")
    asked = asked.model_copy(update={"destination": asked.destination.model_copy(update={"uri": asked.destination.uri + "9"})})
    trt = tensorrt(measured=b"more timings")
    fetch(asked, workspace, {})
    assert [path.name for path in workspace.timings.iterdir()] == [f"{VERSION}-9.0.cache"]
    built(asked, workspace, trt)
    assert trt.timings == [b"timings"]
    publish(asked, workspace, {})
    assert timing_file(asked).read_bytes() == b"more timings"


TIMINGS = [
    ("is no cache", b"no cache", [b""]),
    ("is another GPU's", b"timings of another GPU", [b"timings of another GPU", b""]),
    ("is empty", b"", [b""]),
    ("is too large", b"x" * (TIMING_LIMIT + 1), [b""]),
]


@pytest.mark.parametrize(("content", "tried"), [case[1:] for case in TIMINGS], ids=[case[0] for case in TIMINGS])
def test_a_build_measures_anew_where_what_lies_in_the_place_of_timings(
    content: bytes, tried: list[bytes], asked: ExportRequest, workspace: Workspace, library: Library
) -> None:
    timing_file(asked).parent.mkdir(parents=True)
    timing_file(asked).write_bytes(content)
    fetch(asked, workspace, {})
    trt = tensorrt()
    built(asked, workspace, trt)
    assert trt.timings == tried
    publish(asked, workspace, {})
    assert timing_file(asked).read_bytes() == b"timings"


@pytest.mark.parametrize("measured", [b"", b"x" * (TIMING_LIMIT + 1)], ids=["nothing", "too much"])
def test_a_build_that_measured_what_is_not_kept_is_published(
    measured: bytes, asked: ExportRequest, workspace: Workspace, library: Library
) -> None:
    built(asked, workspace, tensorrt(measured=measured))
    assert publish(asked, workspace, {}).outcome is Outcome.PUBLISHED
    assert not timing_file(asked).exists()


def test_a_store_that_keeps_no_timings_ends_nothing(asked: ExportRequest, workspace: Workspace, library: Library) -> None:
    timing_file(asked).parent.parent.mkdir(parents=True)
    timing_file(asked).parent.write_bytes(b"a file in the place of the folder")
    fetch(asked, workspace, {})
    built(asked, workspace, tensorrt())
    assert publish(asked, workspace, {}).outcome is Outcome.PUBLISHED


def test_behind_pictures_the_network_is_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCH_PILLOW_WHEELS", str(wheel_folder(tmp_path / "wheels")))
    asked = request(**PLAN_OF | PICTURES | {"triton": PICTURES["triton"] | {"instanceKind": "GPU"}})
    made = build_model_files(asked, golden(16))
    network = parse_config(made["model/digits-network/config.pbtxt"].decode())
    assert (network.backend, network.name) == ("tensorrt", "digits-network")
    assert network.instance_group[0].kind == network.instance_group[0].KIND_GPU
    assert plan_key(asked) == "model/digits-network/1/model.plan"
    front = parse_config(made["model/digits/config.pbtxt"].decode())
    assert [step.model_name for step in front.ensemble_scheduling.step][1] == "digits-network"


@pytest.mark.parametrize("data_type", [np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_])
def test_memory_of_the_device_gives_back_every_data_type(data_type: type, library: Library) -> None:
    array = np.arange(6).reshape(2, 3).astype(data_type)
    with Cuda.load().memory() as memory:
        back = memory.download(memory.upload(array), array.shape, array.dtype)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


FAILURES = [
    ("the builder has another version", {"__version__": "11.4.0.106"}, {}, Reason.TENSORRT_MISMATCH, "11.4.0.106 .* 10.13.3.9"),
    (
        "the parser knows an operator not",
        {"parses": False},
        {},
        Reason.EXPORT_FAILED,
        "does not read .* no importer for SoftSign",
    ),
    ("nothing can be built", {"plan": None}, {}, Reason.EXPORT_FAILED, "cannot build the plan: no tactic for node_Conv_3"),
    ("the plan does not load", {"plan": b"half a"}, {}, Reason.EXPORT_FAILED, "does not load the plan"),
    ("the plan answers otherwise", {"factor": 1.1}, {}, Reason.PARITY_FAILED, "plan does not answer as the checkpoint"),
    (
        "an output is of another type",
        {"types": {"image": "FLOAT", "logits": "HALF"}},
        {},
        Reason.EXPORT_FAILED,
        "logits is float32, and TensorRT 10.13.3.9 makes it float16",
    ),
    (
        "the size of an output is known when it is there",
        {"open_ended": True},
        {},
        Reason.EXPORT_FAILED,
        "size of logits depends on",
    ),
    ("there is no GPU", {}, {"cudaDeviceGetAttribute": 100}, Reason.EXPORT_FAILED, "no CUDA-capable device .*builder.resources"),
    ("memory runs out", {}, {"cudaMalloc": 2}, Reason.EXPORT_FAILED, "cudaMalloc failed"),
]


@pytest.mark.parametrize(
    ("behaviour", "fails", "reason", "says"), [case[1:] for case in FAILURES], ids=[case[0] for case in FAILURES]
)
def test_no_plan_comes_out_when(
    behaviour: dict[str, Any], fails: dict[str, int], reason: Reason, says: str,
    asked: ExportRequest, workspace: Workspace, library: Library,
) -> None:  # fmt: skip
    library.fails = fails
    with pytest.raises(StepFailed, match=says) as caught:
        built(asked, workspace, tensorrt(**behaviour))
    assert caught.value.reason is reason
    assert not (workspace.plan / PLAN_FIGURES).exists()


def test_what_convert_left_is_looked_at_before_tensorrt_reads_it(
    asked: ExportRequest, workspace: Workspace, library: Library
) -> None:
    elsewhere = workspace.root / "elsewhere"
    (workspace.output / "model.onnx").rename(elsewhere)
    (workspace.output / "model.onnx").symlink_to(elsewhere)
    with pytest.raises(StepFailed, match=r"what convert handed over is refused: model\.onnx is not a regular file"):
        built(asked, workspace, tensorrt())


def plan_figures(**changes: Any) -> bytes:
    passed = Parity(verdict=Verdict.PASSED, samples=16, max_absolute_error=0.0, max_relative_error=0.0, spread=1.0)
    known = {"parity": passed, "tensorrt": VERSION, "compute_capability": "9.0", "seconds": 1.0}
    return PlanFigures(**(known | changes)).to_json().encode()


TOO_FAR = Parity(verdict=Verdict.PASSED, samples=16, max_absolute_error=0.5, max_relative_error=0.5, spread=1.0)
FORGED: list[tuple[str, dict[str, bytes], str]] = [
    ("build did not run", {}, "did build run"),
    ("the plan is missing", {PLAN_FIGURES: plan_figures()}, r"missing \['model.plan'\]"),
    ("the figures are missing", {PLAN: b"a plan"}, r"missing \['plan.json'\]"),
    ("there is more", {PLAN: b"a plan", PLAN_FIGURES: plan_figures(), "run.sh": b"x"}, r"unexpected \['run.sh'\]"),
    ("the plan is empty", {PLAN: b"", PLAN_FIGURES: plan_figures()}, "model.plan has 0 bytes"),
    ("the figures are none", {PLAN: b"a plan", PLAN_FIGURES: b"{}"}, "plan.json: .*Field required"),
    (
        "another TensorRT built it",
        {PLAN: b"a plan", PLAN_FIGURES: plan_figures(tensorrt="11.4.0")},
        "TensorRT 11.4.0's, and 10.13",
    ),
    ("the figures say passed and are not", {PLAN: b"a plan", PLAN_FIGURES: plan_figures(parity=TOO_FAR)}, "figures do not pass"),
    (
        "the verdict is another",
        {PLAN: b"a plan", PLAN_FIGURES: plan_figures(parity=TOO_FAR.model_copy(update={"verdict": Verdict.FAILED}))},
        "figures do not pass",
    ),
]


@pytest.mark.parametrize(("files", "says"), [case[1:] for case in FORGED], ids=[case[0] for case in FORGED])
def test_publish_takes_no_plan_where(files: dict[str, bytes], says: str, asked: ExportRequest, workspace: Workspace) -> None:
    for name, content in files.items():
        workspace.plan.mkdir(exist_ok=True)
        (workspace.plan / name).write_bytes(content)
    with pytest.raises(StepFailed, match=f"what build handed over is refused: .*{says}") as caught:
        publish(asked, workspace, {})
    assert caught.value.reason is Reason.OUTPUT_REJECTED
    assert not Path(asked.destination.uri.removeprefix("file://")).exists()


REFUSED = [
    ("nobody says which version serves", {"conversion__target": "TensorRT", "triton": GPU}, "needs it"),
    ("a version is given for an ONNX file", {"tensorrtVersion": VERSION}, "tensorrtVersion is for target TensorRT"),
    ("the model runs on any device", PLAN_OF | {"triton": {"maxBatchSize": 8}}, "instanceKind GPU"),
    ("the batch has no bound", PLAN_OF | {"triton": GPU | {"maxBatchSize": 0}}, "maxBatchSize of 1 or more"),
    ("it is accelerated", PLAN_OF | {"triton": GPU | {"accelerator": "TensorRT"}}, "a TensorRT plan needs none"),
    (
        "an input has any size",
        PLAN_OF | {"inputs": [{"name": "image", "dataType": "FP32", "shape": [1, -1, 28]}]},
        "size for each dimension of image",
    ),
]


@pytest.mark.parametrize(("changes", "says"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_request_for_a_plan_is_refused_when(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        request(**changes)

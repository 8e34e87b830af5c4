"""A version that takes pictures: an ensemble of the served name, and behind it preprocessing, the network and postprocessing.

Everything here is made by publish from the request: config.pbtxt of each, the text of the two Python models, and Pillow's wheels
out of the image that publish runs in. See `pictures` for what the preprocessing does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

import perch_exporter
from perch_exporter.contract import POSTPROCESS, PREPROCESS, ExportRequest, Postprocessing, Preprocessing, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.ranking import Ranking
from perch_exporter.triton_config import LABELS, tensor_of

IMAGE, LABEL_NAMES, SCORES = "image", "labels", "scores"
"""Tensors that clients see: bytes of a picture in, [topK] names and scores out."""

_SOURCE = Path(perch_exporter.__file__).parent
_WHEELS_VARIABLE, _WHEELS = "PERCH_PILLOW_WHEELS", Path("/opt/perch/wheels")


def build_ensemble_files(request: ExportRequest, asked: Preprocessing) -> dict[str, bytes]:
    """Content by key of all models but the network. Raises InvalidRequest where there are no wheels to send along."""
    name, version = request.model_name, request.version
    front, back = f"model/{name}{PREPROCESS}", f"model/{name}{POSTPROCESS}"
    files = {
        f"model/{name}/config.pbtxt": _text(_ensemble(request)),
        # Triton loads a version whose folder is there, and an object store has no empty folders.
        f"model/{name}/{version}/ensemble": b"An ensemble has no file of its own.\n",
        f"{front}/config.pbtxt": _text(_front(request, asked)),
        f"{front}/{version}/model.py": _code("triton_models/preprocess.py"),
        f"{front}/{version}/perch_exporter/pictures.py": _code("pictures.py"),
    }
    files |= {f"{front}/wheels/{path.name}": path.read_bytes() for path in find_wheels()}
    if request.postprocessing:
        files[f"{back}/config.pbtxt"] = _text(_back(request, request.postprocessing))
        files[f"{back}/{version}/model.py"] = _code("triton_models/postprocess.py")
        files[f"{back}/{version}/perch_exporter/ranking.py"] = _code("ranking.py")
        if request.triton.labels:
            files[f"{back}/{LABELS}"] = label_file(request.triton.labels)
    return files


def find_wheels() -> list[Path]:
    folder = Path(os.environ.get(_WHEELS_VARIABLE, _WHEELS))
    found = sorted(folder.glob("pillow-*.whl"))
    if not found:
        raise StepFailed(
            Reason.INVALID_REQUEST,
            f"preprocessing needs Pillow's wheels to send along, and {folder} has none; the perch-artifacts image has them, and "
            f"elsewhere `pip download --no-deps pillow` fills a folder for {_WHEELS_VARIABLE} to name",
        )
    return found


def label_file(labels: tuple[str, ...]) -> bytes:
    return "".join(f"{label}\n" for label in labels).encode()


def ranking_of(asked: Postprocessing, labels: tuple[str, ...] | None) -> Ranking:
    return Ranking(softmax=asked.softmax, top=asked.top_k, labels=labels or ())


def _ensemble(request: ExportRequest) -> pb.ModelConfig:
    (tensor,) = request.inputs
    version = request.version
    steps = [
        _step(request.model_name + PREPROCESS, version, {IMAGE: IMAGE}, {tensor.name: "network input"}),
        _step(
            request.network_name,
            version,
            {tensor.name: "network input"},
            {spec.name: f"network {spec.name}" if request.postprocessing else spec.name for spec in request.outputs},
        ),
    ]
    if request.postprocessing:
        output = request.outputs[0].name
        names = {LABEL_NAMES: LABEL_NAMES, SCORES: SCORES}
        steps.append(_step(request.model_name + POSTPROCESS, version, {output: f"network {output}"}, names))
        outputs = _ranked(request.postprocessing)
    else:
        outputs = [pb.ModelOutput(**tensor_of(spec)) for spec in request.outputs]
    config = pb.ModelConfig(
        name=request.model_name,
        platform="ensemble",
        max_batch_size=request.triton.max_batch_size,
        input=[_image()],
        output=outputs,
        version_policy=_only(version),
        ensemble_scheduling=pb.ModelEnsembling(step=steps),
    )
    if request.triton.response_cache:
        config.response_cache.enable = True
    return config


def _front(request: ExportRequest, asked: Preprocessing) -> pb.ModelConfig:
    (tensor,) = request.inputs
    recipe = {"preprocessing": json.loads(asked.to_json()), "shape": tensor.shape}
    output = pb.ModelOutput(name=tensor.name, data_type=pb.TYPE_FP32, dims=tensor.shape)
    return _python(request, PREPROCESS, [_image()], [output], "recipe", recipe)


def _back(request: ExportRequest, asked: Postprocessing) -> pb.ModelConfig:
    (tensor,) = request.outputs
    ranking = {"softmax": asked.softmax, "topK": asked.top_k}
    scores = pb.ModelInput(name=tensor.name, data_type=pb.TYPE_FP32, dims=tensor.shape)
    return _python(request, POSTPROCESS, [scores], _ranked(asked), "ranking", ranking)


def _python(
    request: ExportRequest,
    suffix: str,
    inputs: list[pb.ModelInput],
    outputs: list[pb.ModelOutput],
    parameter: str,
    value: Mapping[str, object],
) -> pb.ModelConfig:
    """Requests that come together are handed over together, without a wait: their pictures are then prepared side by side."""
    config = pb.ModelConfig(
        name=request.model_name + suffix,
        backend="python",
        max_batch_size=request.triton.max_batch_size,
        input=inputs,
        output=outputs,
        instance_group=[pb.ModelInstanceGroup(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)],
        version_policy=_only(request.version),
        parameters={parameter: pb.ModelParameter(string_value=json.dumps(value))},
    )
    config.dynamic_batching.SetInParent()
    return config


def _image() -> pb.ModelInput:
    return pb.ModelInput(name=IMAGE, data_type=pb.TYPE_STRING, dims=[1])


def _ranked(asked: Postprocessing) -> list[pb.ModelOutput]:
    return [
        pb.ModelOutput(name=LABEL_NAMES, data_type=pb.TYPE_STRING, dims=[asked.top_k]),
        pb.ModelOutput(name=SCORES, data_type=pb.TYPE_FP32, dims=[asked.top_k]),
    ]


def _step(model: str, version: int, inputs: dict[str, str], outputs: dict[str, str]) -> pb.ModelEnsembling.Step:
    return pb.ModelEnsembling.Step(model_name=model, model_version=version, input_map=inputs, output_map=outputs)


def _only(version: int) -> pb.ModelVersionPolicy:
    return pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=[version]))


def _text(config: pb.ModelConfig) -> bytes:
    text: str = text_format.MessageToString(config)
    return text.encode()


def _code(name: str) -> bytes:
    return (_SOURCE / name).read_bytes()

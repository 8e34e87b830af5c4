"""The contract: what it refuses, that both languages of it agree, and that a summary always fits."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
from exporter_builders import document, request
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from perch_exporter import contract
from perch_exporter.contract import ErrorReport, ExportRequest, Outcome, Parity, ParityTolerance, Reason, Step, Summary, Verdict

SOURCE = {"uri": "s3://code/nets.zip", "sha256": "b" * 64}
SAMPLES = {"uri": "s3://checkpoints/samples.npz", "sha256": "b" * 64}

SCORE = {"name": "score", "dataType": "FP32", "shape": [1]}
TENSOR = {"name": "image", "dataType": "FP32", "shape": [3, 320, 320]}


def boxes(most: int) -> list[dict[str, Any]]:
    return [
        {"name": "boxes", "dataType": "FP32", "shape": [most, 4]},
        {"name": "labels", "dataType": "INT64", "shape": [most]},
        {"name": "scores", "dataType": "FP32", "shape": [most]},
    ]


BOXES = boxes(300)
DETECTOR: dict[str, Any] = {
    "architecture": {"name": "torchvision:ssdlite320_mobilenet_v3_large", "parameters": {"numClasses": 7}},
    "inputs": [TENSOR],
    "outputs": BOXES,
}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("an unknown field", {"batchSize": 3}, "batchSize"),
    ("an unknown field further down", {"triton__maxBatch": 3}, "maxBatch"),
    ("another schema", {"schema": "perch.dev/export-request/v2"}, "schema"),
    ("a checkpoint by http", {"checkpoint__uri": "http://host/v1.pt"}, "checkpoint.uri"),
    ("a URI with a quote", {"checkpoint__uri": 's3://b/"x'}, "checkpoint.uri"),
    ("a URI with a line break at its end", {"destination__uri": "s3://b/x\n"}, "destination.uri"),
    ("a short sha256", {"checkpoint__sha256": "ab"}, "checkpoint.sha256"),
    ("an upper-case sha256", {"checkpoint__sha256": "A" * 64}, "checkpoint.sha256"),
    ("an unknown checkpoint format", {"checkpoint__format": "Pickle"}, "checkpoint.format"),
    ("an architecture from elsewhere", {"architecture__name": "timm:resnet18"}, "architecture.name"),
    ("a parameter in snake_case", {"architecture__parameters": {"num_classes": 10}}, "are in camelCase"),
    ("a list as a parameter", {"architecture__parameters": {"sizes": [1]}}, "architecture.parameters"),
    ("a parameter that is no number", {"architecture__parameters": {"rate": float("nan")}}, "architecture.parameters"),
    ("no network", {"architecture": {}}, "give either name"),
    ("two networks", {"architecture__entryPoint": "nets:build", "architecture__source": SOURCE}, "give either name"),
    ("a source beside a name", {"architecture__source": SOURCE}, "go together"),
    ("an entry point without a source", {"architecture": {"entryPoint": "nets:build"}}, "go together"),
    ("an entry point that is a path", {"architecture": {"entryPoint": "../nets.py:build", "source": SOURCE}}, "entryPoint"),
    ("a program with an architecture", {"checkpoint__format": "TorchScript"}, "whole networks"),
    ("weights without an architecture", {"architecture": None}, "architecture is for weights"),
    ("a model name that climbs", {"modelName": "../x"}, "modelName"),
    ("a model name of two lines", {"modelName": "a\nb"}, "modelName"),
    ("version 0", {"version": 0}, "version"),
    ("a long revision", {"artifactRevision": "0123abcd0"}, "artifactRevision"),
    ("another data type", {"inputs": [{"name": "x", "dataType": "BYTES", "shape": [1]}]}, "inputs.0.dataType"),
    ("a dimension of 0", {"inputs": [{"name": "x", "dataType": "FP32", "shape": [0]}]}, "dimension is 1 or more"),
    ("a dimension of -2", {"inputs": [{"name": "x", "dataType": "FP32", "shape": [-2]}]}, "inputs.0.shape.0"),
    ("no inputs", {"inputs": []}, "inputs"),
    ("one name twice", {"outputs": [{"name": "image", "dataType": "FP32", "shape": [10]}]}, "used twice: image"),
    ("an old opset", {"conversion__opset": 11}, "conversion.opset"),
    ("an unknown precision", {"conversion__precision": "INT4"}, "conversion.precision"),
    ("INT8 without samples", {"conversion__precision": "INT8"}, "calibration is for precision INT8, which needs it"),
    ("samples without INT8", {"conversion": {"calibration": SAMPLES}}, "calibration is for precision INT8"),
    ("an agreement above 1", {"verification__parity__minimumTop1Agreement": "1.01"}, "more than 1"),
    ("a cosine of one number", {"outputs": [SCORE], "verification__parity__minimumCosine": "0.9"}, "minimumCosine compares"),
    ("a cosine of detections", {**DETECTOR, "verification__parity__minimumCosine": "0.9"}, "judged one by one"),
    ("an agreement of detections", {**DETECTOR, "verification__parity__minimumTop1Agreement": "0.9"}, "judged one by one"),
    ("a tolerance of 0", {"verification__parity__absoluteTolerance": "0.0"}, "above 0"),
    ("a tolerance as a number", {"verification__parity__absoluteTolerance": 0.1}, "absoluteTolerance"),
    ("a tolerance that is no number", {"verification__parity__relativeTolerance": "nan"}, "relativeTolerance"),
    ("batching where nothing is batched", {"triton": {"maxBatchSize": 0, "dynamicBatching": {}}}, "maxBatchSize"),
    (
        "a preferred batch above the largest",
        {"triton": {"maxBatchSize": 4, "dynamicBatching": {"preferredBatchSizes": [2, 8]}}},
        r"\[8\] are above maxBatchSize 4",
    ),
    (
        "levels of priority without a default",
        {"triton": {"maxBatchSize": 4, "dynamicBatching": {"priorityLevels": 2}}},
        "belong together",
    ),
    (
        "a default priority that is no level",
        {"triton": {"maxBatchSize": 4, "dynamicBatching": {"priorityLevels": 2, "defaultPriorityLevel": 3}}},
        "3 is above priorityLevels 2",
    ),
    ("a class without a label", {"triton__labels": ["0"]}, r"shape must be \[1\]"),
    ("a label of two lines", {"triton__labels": ["a\nb"] * 10}, "triton.labels.0"),
    (
        "labels that fit no annotation",
        {
            "triton__labels": ["ü" * 128] * 1000,
            "outputs": [{"name": "logits", "dataType": "FP32", "shape": [1000]}],
        },
        "labels take 256,000 bytes",
    ),
    ("labels in place of tensors, of tensors", {"postprocessing": {"topK": 1}}, "postprocessing needs preprocessing"),
    ("pictures in colour for a grey network", {"preprocessing": {"resize": [28, 28]}}, r"not the one input .*\[1, 28, 28\]"),
    ("a crop of another size", {"preprocessing": {"decode": "L", "centerCrop": [27]}}, "not the one input"),
    ("the shorter side alone", {"preprocessing": {"decode": "L", "resize": [28]}}, "add centerCrop"),
    ("a mean without a std", {"preprocessing": {"decode": "L", "resize": [28, 28], "mean": ["0"]}}, "belong together"),
    (
        "three means of grey",
        {"preprocessing": {"decode": "L", "resize": [28, 28], "mean": ["0"] * 3, "std": ["1"] * 3}},
        "mean has 3 numbers, and L has 1 channels",
    ),
    (
        "a std of 0",
        {"preprocessing": {"decode": "L", "resize": [28, 28], "mean": ["0"], "std": ["0"]}},
        "above 0",
    ),
    (
        "more classes than there are",
        {"preprocessing": {"decode": "L", "resize": [28, 28]}, "postprocessing": {"topK": 11}},
        "at least topK 11 classes",
    ),
    (
        "pictures that Triton does not batch",
        {"preprocessing": {"decode": "L", "resize": [28, 28]}, "triton": {"maxBatchSize": 0}},
        "maxBatchSize of 1 or more",
    ),
    (
        "pictures for an input of any size",
        {
            "preprocessing": {"decode": "L"},
            "inputs": [{"name": "image", "dataType": "FP32", "shape": [1, -1, -1]}],
        },
        "not the one input",
    ),
    ("a detector with pictures of any size", {**DETECTOR, "inputs": [TENSOR | {"shape": [3, -1, 320]}]}, "takes one input"),
    ("a detector with grey pictures", {**DETECTOR, "inputs": [TENSOR | {"shape": [1, 320, 320]}]}, "takes one input"),
    ("a detector without labels", {**DETECTOR, "outputs": BOXES[::2]}, "has the outputs boxes .* labels .* scores"),
    ("a detector's outputs in another order", {**DETECTOR, "outputs": BOXES[::-1]}, "in this order"),
    ("a detector of very many boxes", {**DETECTOR, "outputs": boxes(1001)}, "1 to 1000"),
    ("a detector's layer", {**DETECTOR, "architecture__layer": "head"}, "layer is not for torchvision:ssdlite320"),
    ("a detector in FP16", {**DETECTOR, "conversion__precision": "FP16"}, "exported in FP32 alone, not in FP16"),
    ("an accelerated detector", {**DETECTOR, "triton__accelerator": "TensorRT", "triton__instanceKind": "GPU"}, "not for"),
    ("no instances", {"triton__instanceCount": 0}, "triton.instanceCount"),
    ("an accelerator on any device", {"triton__accelerator": "TensorRT"}, "needs instanceKind GPU, not AUTO"),
    (
        "an accelerator with batches of any size",
        {"triton": {"maxBatchSize": 0, "accelerator": "TensorRT", "instanceKind": "GPU"}},
        "needs maxBatchSize of 1 or more",
    ),
    ("an unknown kind of instance", {"triton__instanceKind": "TPU"}, "triton.instanceKind"),
]


@pytest.mark.parametrize(("changes", "says"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_request_is_refused_for(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ExportRequest.from_json(json.dumps(document(**changes)))


def test_a_good_request_survives_the_way_through_json_and_its_schema() -> None:
    once = request(
        architecture__parameters={"numClasses": 10, "transform": True, "dropout": 0.5, "norm": "batch"},
        triton={"maxBatchSize": 8, "dynamicBatching": {"maxQueueDelayMicroseconds": 5, "preferredBatchSizes": [4, 8]}},
    )
    again = ExportRequest.from_json(once.to_json())
    assert again == once
    assert [type(value) for value in again.architecture.parameters.values()] == [int, bool, float, str]
    jsonschema.validate(json.loads(once.to_json()), contract.json_schemas()["perch.dev/export-request/v1"])


def test_defaults_are_filled_in_and_stand_in_the_json() -> None:
    content = json.loads(request().to_json())
    assert content["verification"] == {"parity": {}}
    assert content["conversion"] == {"target": "ONNX", "precision": "FP32"}
    assert content["triton"]["instanceKind"] == "AUTO"


def test_tolerances_that_the_request_leaves_out_are_those_of_its_precision() -> None:
    assert request().tolerance == ParityTolerance(absolute_tolerance="1e-3", relative_tolerance="1e-3")
    half = request(conversion__precision="FP16", verification__parity__relativeTolerance="1e-3")
    assert half.tolerance == ParityTolerance(absolute_tolerance="5e-2", relative_tolerance="1e-3")


def test_detections_are_matched_in_place_of_compared() -> None:
    tolerance = ExportRequest.from_json(json.dumps(document(**DETECTOR))).tolerance
    assert (tolerance.minimum_iou, tolerance.relative, tolerance.absolute) == ("0.9", 0.01, 0.001)
    own = document(**DETECTOR, verification__parity={"relativeTolerance": "0.05"})
    assert ExportRequest.from_json(json.dumps(own)).tolerance.relative == 0.05
    assert ExportRequest.from_json(json.dumps(document())).tolerance.minimum_iou is None


def test_top1_agreement_is_asked_of_int8_where_outputs_are_scores() -> None:
    conversion = {"precision": "INT8", "calibration": SAMPLES}
    assert request(conversion=conversion).tolerance == ParityTolerance(
        absolute_tolerance="0.25", relative_tolerance="0.25", minimum_top1_agreement="0.9"
    )
    assert request(conversion=conversion, architecture__layer="f6").tolerance.minimum_top1_agreement is None
    asked = request(conversion=conversion, architecture__layer="f6", verification__parity__minimumTop1Agreement="0.5")
    assert asked.tolerance.minimum_top1_agreement == "0.5"


def test_a_cosine_is_asked_of_features_by_precision() -> None:
    int8 = {"precision": "INT8", "calibration": SAMPLES}
    layer = {"architecture__layer": "f6"}
    assert request(**layer).tolerance.minimum_cosine == "0.999"
    assert request(**layer, conversion__precision="FP16").tolerance.minimum_cosine == "0.99"
    assert request(**layer, conversion=int8).tolerance.minimum_cosine == "0.95"
    assert request(**layer, verification__parity__minimumCosine="0.5").tolerance.minimum_cosine == "0.5"
    assert request(**layer, outputs=[SCORE]).tolerance.minimum_cosine is None, "one number points nowhere"
    assert request(conversion=int8).tolerance.minimum_cosine is None
    assert request(verification__parity__minimumCosine="0.5").tolerance.minimum_cosine == "0.5", "of any vector, where asked for"


def test_fetch_brings_the_samples_beside_the_checkpoint() -> None:
    asked = request(conversion={"precision": "INT8", "calibration": SAMPLES})
    assert {name: wanted.uri for name, wanted in asked.objects().items()} == {
        "checkpoint": "s3://checkpoints/v1.pt",
        "conversion.calibration": "s3://checkpoints/samples.npz",
    }


def test_the_contract_imports_nothing_heavy() -> None:
    """The operator imports it, and its image has none of these."""
    heavy = ["torch", "numpy", "boto3", "botocore", "tritonclient", "typer"]
    code = f"import sys, perch_exporter.contract; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_path())
    assert found.stdout.strip() == "[]"


def _path() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(path for path in sys.path if path)}


def test_retryable_reasons_are_those_that_time_may_mend() -> None:
    assert {reason for reason in Reason if reason.retryable} == {
        Reason.STORE_UNREACHABLE,
        Reason.STORE_REFUSED,
        Reason.ACCESS_DENIED,
        Reason.BUCKET_NOT_FOUND,
        Reason.OBJECT_NOT_FOUND,
        Reason.UNEXPECTED,
    }


# No lone surrogates: StepFailed's one_line() takes them away, tested with the command line.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4096)
URI = "s3://" + "b" * 1019
LONG = "0." + "9" * 30


@settings(deadline=None)  # the machine may be busy
@given(message=TEXT, parity=TEXT, stretch=st.integers(1, 4), full=st.booleans())
def test_a_summary_always_fits_and_stays_json_of_its_schema(message: str, parity: str, stretch: int, full: bool) -> None:
    summary = Summary(
        outcome=Outcome.FAILED,
        artifact_uri=URI if full else None,
        artifact_digest="sha256:" + "0" * 64,
        size_bytes=2**63 - 1,
        parity=Parity(
            verdict=Verdict.FAILED,
            message=parity,
            samples=16,
            max_absolute_error=1e308,
            max_relative_error=1e-308,
            spread=1 / 3,
            top1_agreement=1 / 3,
            cosine=-1 / 3,
        ),
        tolerance=ParityTolerance(
            absolute_tolerance=LONG, relative_tolerance=LONG, minimum_top1_agreement=LONG, minimum_cosine=LONG, minimum_iou=LONG
        ),
        accuracy=contract.Accuracy(
            verdict=Verdict.FAILED,
            message=parity[:1024],
            dataset_sha256="a" * 64,
            samples=10**9,
            correct=10**9,
            checkpoint_correct=10**9,
            minimum=LONG,
            maximum_drop=LONG,
        ),
        tooling=contract.Tooling(torch="1" * 64, onnx="1" * 64, onnxruntime="1" * 64, opset=18),
        seconds=contract.StepSeconds(fetch=1 / 3, convert=1 / 3, publish=1 / 3),
        error=ErrorReport(reason=Reason.PARITY_FAILED, message=message * stretch, retryable=False, step=Step.CONVERT),
    )
    text = summary.to_json()
    assert len(text.encode()) <= contract.SUMMARY_LIMIT
    jsonschema.validate(json.loads(text), contract.json_schemas()["perch.dev/summary/v1"])
    read = Summary.from_json(text)
    assert read.error is not None
    if len(summary.model_dump_json(exclude_none=True).encode()) <= contract.SUMMARY_LIMIT:
        assert read == summary
    else:
        assert read.error.message[:50] == message[: len(read.error.message[:50])]


def test_a_shortened_message_keeps_its_beginning_and_its_end() -> None:
    text = contract.shorten("begin " + "x" * 5000 + " end", 100)
    assert text.startswith("begin ")
    assert text.endswith(" end")
    assert len(text) <= 100


@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("a failure without an error", {"outcome": "Failed"}),
        ("a success with an error", {"outcome": "Published", "error": {"reason": "Unexpected"}}),
        ("a success without a digest", {"outcome": "Published", "artifactUri": "s3://b/x"}),
    ],
)
def test_a_summary_is_refused_that_is(what: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Summary.from_json(json.dumps(fields))


def published() -> dict[str, Any]:
    owner = {"cluster": "c", "namespace": "vision", "name": "digits"}
    parity = Parity(verdict=Verdict.PASSED, samples=8, max_absolute_error=0, max_relative_error=0, spread=1)
    accuracy = contract.Accuracy(
        verdict=Verdict.PASSED,
        dataset_sha256="a" * 64,
        samples=9,
        correct=8,
        checkpoint_correct=8,
        confused=(contract.Confused(label=1, predicted=2, count=1),),
    )
    gates = {"parity": parity, "tolerance": ParityTolerance(), "accuracy": accuracy}
    tooling = contract.Tooling(torch="1", onnx="1", onnxruntime="1", opset=18)
    manifest = contract.Manifest(
        owner=contract.Owner(**owner),
        model_name="digits",
        version=1,
        artifact_revision="0" * 8,
        checkpoint_sha256="a" * 64,
        files={"model/digits/1/model.onnx": contract.FileEntry(sha256="a" * 64, size=1)},
        tooling=tooling,
        **gates,
    )
    summary = Summary(
        outcome=Outcome.FAILED,
        tooling=tooling,
        seconds=contract.StepSeconds(fetch=1),
        error=ErrorReport(reason=Reason.PARITY_FAILED, message="", retryable=False, step=Step.PROVE),
        **gates,
    )
    claim = contract.Claim(owner=contract.Owner(**owner), artifact_revision="0" * 8)
    return {"manifest": manifest, "summary": summary, "claim": claim}


def everywhere(part: Any, known: Any) -> Any:
    """The JSON with a field more in every object that is one of the contract's."""
    if isinstance(known, BaseModel):
        fields = {field.alias or name: getattr(known, name) for name, field in type(known).model_fields.items()}
        return {"ofTomorrow": {"x": 1}} | {name: everywhere(value, fields[name]) for name, value in part.items()}
    if isinstance(known, dict):
        return {name: everywhere(value, known[name]) for name, value in part.items()}
    if isinstance(known, tuple):
        return [everywhere(value, one) for value, one in zip(part, known, strict=True)]
    return part


@pytest.mark.parametrize("document", ["manifest", "summary", "claim"])
def test_what_a_newer_release_published_is_read_without_the_fields_that_it_added_on_any_level(document: str) -> None:
    known = published()[document]
    newer = json.dumps(everywhere(json.loads(known.to_json()), known))
    assert newer.count("ofTomorrow") == {"manifest": 8, "summary": 8, "claim": 2}[document]
    assert type(known).from_json(newer) == known


@pytest.mark.parametrize("bound", [{"tensorrt": "10.13.3.9"}, {"compute_capability": "9.0"}])
def test_a_plan_is_bound_to_a_tensorrt_and_a_gpu_or_it_is_none(bound: dict[str, str]) -> None:
    tools = {"torch": "1", "onnx": "1", "onnxruntime": "1", "opset": 18}
    contract.Tooling(**tools, tensorrt="10.13.3.9", compute_capability="9.0")
    with pytest.raises(ValidationError, match="belong together"):
        contract.Tooling(**tools, **bound)


def test_a_request_to_delete_with_an_unknown_field_is_refused_also_in_a_part_that_manifests_have_too() -> None:
    asked = {
        "owner": {"cluster": "c", "namespace": "vision", "name": "digits"},
        "artifactRevision": "0" * 8,
        "destination": {"uri": "s3://b/x"},
    }
    contract.DeleteRequest.from_json(json.dumps(asked))
    with pytest.raises(ValidationError, match="ofTomorrow"):
        contract.DeleteRequest.from_json(json.dumps(asked | {"owner": {**asked["owner"], "ofTomorrow": 1}}))


@pytest.mark.parametrize("path", ["../x", "/x", "a/../b", "a//b", "a/", ".hidden", "a\\b", "a b", ""])
def test_a_manifest_names_no_file_outside_its_prefix(path: str) -> None:
    entry = contract.FileEntry(sha256="a" * 64, size=1)
    adapter = TypeAdapter(dict[contract.ArtifactPath, contract.FileEntry])
    adapter.validate_python({"model/digits/1/model.onnx": entry})
    with pytest.raises(ValidationError):
        adapter.validate_python({path: entry})


def test_a_request_names_its_objects_each_with_its_own_limit() -> None:
    own = request(architecture={"entryPoint": "nets.model:build", "source": SOURCE, "parameters": {"hidden_size": 3}})
    assert {name: (place.uri, place.LIMIT) for name, place in own.objects().items()} == {
        "checkpoint": ("s3://checkpoints/v1.pt", 20 * 2**30),
        "source": ("s3://code/nets.zip", 256 * 2**20),
    }
    assert list(request().objects()) == ["checkpoint"]

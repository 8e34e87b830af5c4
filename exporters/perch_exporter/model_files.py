"""What Triton's model folder holds besides the network: made here, from the request and the golden samples alone.

publish calls it, in the slim image. Nothing of it is convert's work, so nothing of it has to be believed.
"""

from __future__ import annotations

from perch_exporter.artifact import config_key
from perch_exporter.contract import ExportRequest
from perch_exporter.ensemble import build_ensemble_files, find_wheels, label_file
from perch_exporter.samples import Golden
from perch_exporter.triton_config import LABELS, build_config, warmup_file


def build_model_files(request: ExportRequest, golden: Golden) -> dict[str, bytes]:
    """Content by key: config.pbtxt, and where the version asks for them the labels and the warm-up's samples."""
    samples = [golden.inputs[spec.name][0] for spec in request.inputs]
    files = {config_key(request): build_config(request, [sample.shape for sample in samples]).encode()}
    folder = config_key(request).rpartition("/")[0]
    if request.triton.labels:
        files[f"{folder}/{LABELS}"] = label_file(request.triton.labels)
    if request.triton.warmup:
        files |= {f"{folder}/warmup/{warmup_file(place)}": sample.tobytes() for place, sample in enumerate(samples)}
    if request.preprocessing:
        files |= build_ensemble_files(request, request.preprocessing)
    return files


def check_request(request: ExportRequest) -> None:
    """Raises StepFailed for what `build_model_files` would refuse at the end of the Job."""
    build_config(request)
    if request.preprocessing:
        find_wheels()

"""Triton's preprocessing model: pictures in, the network's tensors out. Published as model.py, never imported by the exporter.

Triton's images have numpy and no image library, so Pillow's wheels for each Python travel beside this file. The one that fits is
unpacked when the model is loaded. A picture that cannot be read fails its own request and no other.
"""

import json
import os
import platform
import shutil
import sys
import tempfile
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

_THREADS = 4
"""Pictures at one time, where there are as many cores: Pillow decodes and resizes without Python's lock."""


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.folder = unpack(Path(__file__).resolve().parent.parent / "wheels")
        sys.path.insert(0, self.folder)
        from perch_exporter import pictures

        config = json.loads(args["model_config"])
        settings = json.loads(config["parameters"]["recipe"]["string_value"])
        self.output = config["output"][0]["name"]
        self.pictures = pictures
        self.recipe = pictures.Recipe.from_fields(settings["preprocessing"], settings["shape"])
        threads = min(_THREADS, len(os.sched_getaffinity(0)))
        self.pool, self.budget = ThreadPoolExecutor(threads), pictures.Budget(threads)

    def execute(self, requests: list[Any]) -> list[Any]:
        waiting = [[self.submit(bytes(content)) for content in contents(request)] for request in requests]
        return [self.answer(pictures) for pictures in waiting]

    def submit(self, content: bytes) -> "Future[Any]":
        return self.pool.submit(self.pictures.prepare, content, self.recipe, self.budget)

    def answer(self, waiting: "list[Future[Any]]") -> Any:
        tensors = []
        try:
            for picture in waiting:
                tensors.append(picture.result())
            return pb_utils.InferenceResponse([pb_utils.Tensor(self.output, np.stack(tensors))])
        except Exception as error:
            for other in waiting:
                other.cancel()
            what = error if isinstance(error, self.pictures.PictureError) else f"it cannot be read: {error!r}"
            words = f"image {len(tensors)}: {what}"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(words, pb_utils.TritonError.INVALID_ARG))

    def finalize(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def contents(request: Any) -> Any:
    return pb_utils.get_input_tensor_by_name(request, "image").as_numpy().ravel()


def unpack(wheels: Path) -> str:
    """A folder with the Pillow that fits this Python."""
    tag = "cp{}{}".format(*sys.version_info)
    fitting = sorted(wheels.glob(f"pillow-*-{tag}-{tag}-*_{platform.machine()}.whl"))
    if not fitting:
        there = ", ".join(sorted(path.name for path in wheels.iterdir()))
        raise pb_utils.TritonModelException(
            f"this artefact carries no Pillow for {tag} on {platform.machine()}, which this Triton image runs; it has {there}"
        )
    folder = tempfile.mkdtemp(prefix="perch-pillow-")
    with zipfile.ZipFile(fitting[0]) as wheel:
        wheel.extractall(folder)
    return folder

"""Triton's postprocessing model: the network's output in, the best classes' names and scores out. Published as model.py."""

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from perch_exporter.ranking import Ranking, rank


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        settings = json.loads(config["parameters"]["ranking"]["string_value"])
        names = Path(__file__).resolve().parent.parent / "labels.txt"
        labels = names.read_text(encoding="utf-8").split("\n")[:-1] if names.exists() else []
        self.input = config["input"][0]["name"]
        self.ranking = Ranking(softmax=settings["softmax"], top=settings["topK"], labels=labels)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(pb_utils.get_input_tensor_by_name(request, self.input).as_numpy()) for request in requests]

    def answer(self, outputs: Any) -> Any:
        labels, scores = rank(outputs, self.ranking)
        return pb_utils.InferenceResponse([pb_utils.Tensor("labels", labels), pb_utils.Tensor("scores", scores)])

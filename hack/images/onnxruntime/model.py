"""Triton's `onnxruntime` backend for the development image, over the onnxruntime wheel and Triton's Python backend.

Triton loads this file for every model with `backend: "onnxruntime"`, once in a process for each instance, and hands it
batches of requests. Models and config.pbtxt are the same that NVIDIA's own onnxruntime backend serves in production. Of
that backend's parameters it knows `intra_op_thread_count`; other parameters of its are refused, not ignored.
"""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

TYPES = {
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_BOOL": "tensor(bool)",
}
THREADS = "intra_op_thread_count"


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        """Perch's configs are whole. A config that says nothing of its tensors fails in `initialize`."""
        return auto_complete_model_config

    def initialize(self, args):
        self.config = json.loads(args["model_config"])
        file = Path(pb_utils.get_model_dir(), self.config["default_model_filename"] or "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads(self.config)
        options.inter_op_num_threads = 1
        # Instances, the server and the other pods of a small node share its cores: a waiting thread sleeps.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        check("input", self.config["input"], self.session.get_inputs())
        check("output", self.config["output"], self.session.get_outputs())
        self.outputs = [output["name"] for output in self.config["output"]]

    def execute(self, requests):
        """One answer for each request, in order. Requests are run together where the model batches."""
        if not self.config["max_batch_size"]:
            return [answer for request in requests for answer in self.run([request])]
        # Triton batches requests of unlike shapes too, as long as each fits the config: these do not go together.
        groups = {}
        for index, request in enumerate(requests):
            groups.setdefault(tuple(tuple(tensor.shape()[1:]) for tensor in sorted_inputs(request)), []).append(index)
        answers = [None] * len(requests)
        for indices in groups.values():
            for index, answer in zip(indices, self.run([requests[i] for i in indices]), strict=True):
                answers[index] = answer
        return answers

    def run(self, requests):
        batches = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
        sizes = [len(next(iter(batch.values()))) for batch in batches]
        feed = batches[0] if len(batches) == 1 else {n: np.concatenate([b[n] for b in batches]) for n in batches[0]}
        # What onnxruntime raises goes on to Triton: the whole batch fails and is counted as failed, as with the real backend. An
        # error returned as a response would be counted as a success (triton server#7713).
        results = self.session.run(self.outputs, feed)
        ends = np.cumsum(sizes)[:-1]
        parts = [results] if len(requests) == 1 else zip(*(np.split(r, ends) for r in results), strict=True)
        return [self.answer(request, part) for request, part in zip(requests, parts, strict=True)]

    def answer(self, request, values):
        wanted = set(request.requested_output_names())
        named = zip(self.outputs, values, strict=True)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in named if name in wanted])


def sorted_inputs(request):
    return sorted(request.inputs(), key=lambda tensor: tensor.name())


def threads(config):
    """Threads of one instance: the parameter, or its share of the cores that this process may use."""
    parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
    unknown = set(parameters) - {THREADS}
    if unknown:
        raise pb_utils.TritonModelException(f"this backend knows no parameter {', '.join(sorted(unknown))}; remove it")
    instances = sum(group["count"] for group in config["instance_group"])
    return int(parameters.get(THREADS, 0)) or max(1, len(os.sched_getaffinity(0)) // max(1, instances))


def check(kind, configured, actual):
    """The config's tensors must be the model's, by name and data type, or the model is not loaded."""
    config_side = Counter((tensor["name"], TYPES.get(tensor["data_type"], tensor["data_type"])) for tensor in configured)
    model_side = Counter((tensor.name, tensor.type) for tensor in actual)
    missing, extra = config_side - model_side, model_side - config_side if kind == "input" else Counter()
    if missing or extra:
        raise pb_utils.TritonModelException(
            f"config.pbtxt and model.onnx disagree on the {kind}s: config.pbtxt has {listed(config_side)},"
            f" model.onnx has {listed(model_side)}"
        )


def listed(tensors):
    return ", ".join(f"{name} {kind}" for name, kind in sorted(tensors))

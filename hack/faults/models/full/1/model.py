"""Takes its time, so that a queue forms; the config says what becomes of those who wait."""

# mypy: ignore-errors

import time

import numpy as np
import triton_python_backend_utils as pb_utils

SECONDS = 0.3


class TritonPythonModel:
    def execute(self, requests):
        time.sleep(SECONDS)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("logits", np.zeros((1, 10), np.float32))]) for _ in requests]

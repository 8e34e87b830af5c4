"""Answers every request with an error, as a Python model should: a response of its own for each, that carries the error."""

# mypy: ignore-errors

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse(error=pb_utils.TritonError("an error response")) for _ in requests]

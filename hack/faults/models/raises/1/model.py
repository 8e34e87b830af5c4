"""Raises an exception instead of answering."""

# mypy: ignore-errors


class TritonPythonModel:
    def execute(self, requests):
        raise RuntimeError("an exception of the model's own")

"""Running an ONNX file on the CPU. Needs onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from perch_exporter.samples import Array, Tensors, in_batches


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def ask(session: onnxruntime.InferenceSession, names: Sequence[str], inputs: Tensors, batch: int) -> dict[str, Array]:
    """The answers to any number of samples, asked in batches."""
    return in_batches(lambda part: dict(zip(names, session.run(names, part), strict=True)), inputs, batch)

"""Running an ONNX file on the CPU. Needs onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from perch_exporter.samples import Array, Tensors, in_batches


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """The answers do not depend on the CPU: without VNNI, 8-bit products would saturate, and a sound INT8 export would be refused
    by the node that its Job came to. What serves on such a CPU is held back by its own golden check."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def ask(session: onnxruntime.InferenceSession, names: Sequence[str], inputs: Tensors, batch: int) -> dict[str, Array]:
    """The answers to any number of samples, asked in batches."""
    return in_batches(lambda part: dict(zip(names, session.run(names, part), strict=True)), inputs, batch)

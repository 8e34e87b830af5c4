"""Images per second of a network in FP32, FP16 and INT8, by onnxruntime alone: `python -m bench.precision [network…]`.

The exporter's own code makes the files, in its image's environment, from untrained weights: speed does not depend on them.
The three are asked in turn, round by round, so that a machine which others use too slows all of them alike.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, THREADS, ROUNDS = 8, 2, 12
SIZE = 224
NETWORKS = ("resnet18", "resnet50", "vgg16")


def main(networks: list[str]) -> int:
    from devcluster import images

    python = images.exporter_python(Path(sysconfig.get_paths()["purelib"]))
    command = [*python, str(Path(__file__).resolve()), *(networks or NETWORKS)]
    return subprocess.run(list(map(str, command)), check=False).returncode


def measure(name: str) -> None:
    import numpy as np

    from perch_exporter.contract import Conversion, DataSet, Precision
    from perch_exporter.precision import lower_precision

    images = np.random.default_rng(0).standard_normal((32, 3, SIZE, SIZE)).astype(np.float32)
    calibration = DataSet(uri="file:///samples.npz", sha256="0" * 64)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "FP32.onnx"
        export(name, images[:2], whole)
        sessions = {"FP32": session(whole)}
        sizes = {"FP32": whole.stat().st_size}
        for precision, samples in ((Precision.FP16, None), (Precision.INT8, calibration)):
            path = Path(folder) / f"{precision}.onnx"
            path.write_bytes(whole.read_bytes())
            started = time.monotonic()
            lower_precision(Conversion(precision=precision, calibration=samples), path, {"image": images})
            print(f"{name}: {precision} made in {time.monotonic() - started:.1f} s", flush=True)
            sessions[precision.value], sizes[precision.value] = session(path), path.stat().st_size
    best = dict.fromkeys(sessions, 0.0)
    for _ in range(ROUNDS):
        for precision_name, running in sessions.items():
            started = time.monotonic()
            running.run(None, {"image": images[:BATCH]})
            best[precision_name] = max(best[precision_name], BATCH / (time.monotonic() - started))
    for precision_name, rate in best.items():
        ratio, share = rate / best["FP32"], sizes[precision_name] / sizes["FP32"]
        print(f"{name}: {precision_name} {rate:.1f} images/s, {ratio:.2f} times FP32, file {share:.2f} of it", flush=True)


def export(name: str, images: Any, path: Path) -> None:
    import torch
    import torchvision

    model = torchvision.models.get_model(name, weights=None).eval()
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        model, (torch.from_numpy(images),), dynamo=True, input_names=["image"], dynamic_shapes=(batch,), opset_version=18,
        verbose=False,
    )  # fmt: skip
    program.save(path, external_data=False)


def session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    # Started twice: by hand, and by itself in the environment that has torch.
    try:
        import torch  # noqa: F401
    except ImportError:
        sys.exit(main(sys.argv[1:]))
    print(f"batches of {BATCH}, {THREADS} threads, the best of {ROUNDS} rounds", flush=True)
    for network in sys.argv[1:]:
        measure(network)

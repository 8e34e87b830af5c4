"""What an export costs beside a bare torch.onnx.export: `python -m bench.exports [network…]`. No cluster.

Every measurement is a process of its own in the exporter image's environment, the kinds in turn, so that a machine which others
use too slows all alike. Ours are the Job's own commands over a folder: convert, prove, and publish, which hands over (its checks,
digests and the copy into a repository on this disk; what a network takes is not measured). Seconds are those after imports, as
the steps count them. The bare one builds the same network with the same weights and has torch write it: in the form that ours has
(weights above `onnx_file.BESIDE` in a file beside), and once more into one file, which takes torch long for large ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

ROUNDS = 3
NETWORKS = ("lenet5", "torchvision:resnet18", "torchvision:resnet50", "torchvision:vgg16", "torchvision:inception_v3")
STEPS = ("convert", "prove", "publish")
SUMMARY = "summary.json"
_SHAPES = {"lenet5": [1, 28, 28], "torchvision:inception_v3": [3, 299, 299]}


def main(networks: list[str]) -> int:
    from devcluster import images

    python = images.exporter_python(Path(sysconfig.get_paths()["purelib"]))
    command = [*python, str(Path(__file__).resolve()), "measure", *(networks or NETWORKS)]
    return subprocess.run(list(map(str, command)), check=False, env={**os.environ, "HOME": "/tmp"}).returncode


def measure(network: str) -> None:
    with tempfile.TemporaryDirectory(prefix="perch-bench-", dir="/tmp") as name:
        folder = Path(name)
        _run("make", network, name)
        size = (folder / "checkpoint").stat().st_size
        bare, whole, ours, ratios, first_lines, peaks = [], [], [], [], [], []
        for number in range(ROUNDS):
            out = _run("bare", network, name, "alike")
            bare.append(float(out.text.split()[-1]))
            whole.append(float(_run("bare", network, name, "whole").text.split()[-1]))
            work, request = folder / f"work-{number}", folder / "request.json"
            request.write_text(json.dumps(_request(network, folder, number)))
            steps = {step: _step(step, request, work) for step in ("fetch", "convert", "prove", "publish")}
            seconds = json.loads((work / SUMMARY).read_text())["seconds"]
            ours.append(tuple(seconds[step] for step in STEPS))
            ratios.append(sum(ours[-1]) / bare[-1])
            first_lines.append(steps["convert"].first_line)
            peaks.append((steps["convert"].peak, steps["prove"].peak, out.peak))
            shutil.rmtree(work)
        again = folder / "again"
        republished = {step: _step(step, request, again).seconds for step in ("fetch", "convert", "prove", "publish")}
    told = ", ".join(f"{step} {statistics.median(each):.2f} s" for step, each in zip(STEPS, zip(*ours, strict=True), strict=True))
    print(
        f"{network}: checkpoint {size / 1e6:.1f} MB; bare {statistics.median(bare):.2f} s, into one file "
        f"{statistics.median(whole):.2f} s; {told}, ratio to bare {statistics.median(ratios):.2f} ({min(ratios):.2f}-"
        f"{max(ratios):.2f}); peak of convert {_peak(peaks, 0)}, prove {_peak(peaks, 1)}, bare {_peak(peaks, 2)} MB; first line "
        f"of convert {statistics.median(first_lines):.2f} s after its start; published already: "
        + ", ".join(f"{step} {seconds:.2f} s" for step, seconds in republished.items()),
        flush=True,
    )


def _peak(peaks: list[tuple[float, float, float]], place: int) -> str:
    return f"{statistics.median(peak[place] for peak in peaks):.0f}"


def _request(network: str, folder: Path, number: int) -> dict[str, Any]:
    checkpoint = folder / "checkpoint"
    return {
        "schema": "perch.dev/export-request/v1",
        "owner": {"cluster": "bench", "namespace": "bench", "name": "bench"},
        "modelName": "bench",
        "version": 1,
        "artifactRevision": f"0123abc{number}",
        "checkpoint": {
            "uri": checkpoint.as_uri(),
            "format": "StateDict",
            "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        },
        "architecture": {"name": network, "parameters": {"transformInput": False} if network.endswith("inception_v3") else {}},
        "inputs": [{"name": "image", "dataType": "FP32", "shape": _shape(network)}],
        "outputs": [{"name": "logits", "dataType": "FP32", "shape": [10 if network == "lenet5" else 1000]}],
        "triton": {"maxBatchSize": 8},
        "destination": {"uri": (folder / "repository" / "bench" / "bench" / f"1-0123abc{number}").as_uri()},
    }


def _shape(network: str) -> list[int]:
    return _SHAPES.get(network, [3, 224, 224])


class _Ended:
    def __init__(self, text: str, seconds: float, first_line: float, peak: float) -> None:
        self.text, self.seconds, self.first_line, self.peak = text, seconds, first_line, peak


def _step(step: str, request: Path, workspace: Path) -> _Ended:
    workspace.mkdir(exist_ok=True)
    arguments = ["-m", "perch_exporter", step, "--request", str(request), "--workspace", str(workspace)]
    arguments += ["--termination-log", str(workspace / SUMMARY)] if step == "publish" else []
    return _spawn([sys.executable, *arguments])


def _run(*arguments: str) -> _Ended:
    return _spawn([sys.executable, __file__, *arguments])


def _spawn(command: list[str]) -> _Ended:
    """Peak is the process's own resident memory in MB, mapped files included."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = process.stdout.readline()
    first_line = time.monotonic() - started
    text = first + process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}: {text[-2000:]}")
    return _Ended(text, time.monotonic() - started, first_line, usage.ru_maxrss / 1e3)


def make(network: str, folder: str) -> None:
    from exports.make import Order, carry_out

    spec = {"name": "image", "dataType": "FP32", "shape": _shape(network)}
    order = Order(folder, network, "StateDict", [spec], ["logits"])
    carry_out(json.dumps([vars(order)]))


def bare(network: str, folder: str, form: str) -> None:
    import torch
    import torchvision

    from perch_exporter.architectures import LeNet5
    from perch_exporter.onnx_file import BESIDE

    if network == "lenet5":
        model: Any = LeNet5()
    else:
        name = network.removeprefix("torchvision:")
        more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **more)
    model.load_state_dict(torch.load(Path(folder) / "checkpoint", weights_only=True))
    model.eval()
    beside = form == "alike" and sum(tensor.nbytes for tensor in model.state_dict().values()) > BESIDE
    sample = torch.randn(2, *_shape(network))
    started = time.monotonic()
    torch.onnx.export(
        model, (sample,), Path(folder) / "bare.onnx", dynamo=True, input_names=["image"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), opset_version=18, external_data=beside, verbose=False,
    )  # fmt: skip
    print(time.monotonic() - started)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    action, *words = sys.argv[1:] or ["all"]
    if action == "measure":
        print(f"{ROUNDS} rounds, medians; load average at the start {os.getloadavg()[0]:.1f}", flush=True)
        for word in words:
            measure(word)
    elif action == "make":
        make(*words)
    elif action == "bare":
        bare(*words)
    else:
        sys.exit(main(sys.argv[1:]))

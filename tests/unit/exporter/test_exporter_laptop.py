"""`export` and `report` as a laptop runs them: every step in a row, one that passes its gates and one that does not."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from exporter_builders import file_request

from perch_exporter.contract import EXIT_PERMANENT, ExportRequest, Outcome, Reason, Summary, Target, Verdict

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the exporter image's environment: torch is not installed here")

from perch_exporter.architectures import LeNet5  # noqa: E402

KEY = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret"}


@pytest.fixture
def asked(tmp_path: Path) -> ExportRequest:
    """A LeNet-5 and a labelled set of which it gets all but the first four of 32 right."""
    torch.manual_seed(0)
    model = LeNet5().eval()
    torch.save(model.state_dict(), tmp_path / "v1.pt")
    images = np.random.default_rng(0).standard_normal((32, 1, 28, 28)).astype(np.float32)
    with torch.inference_mode():
        told = model(torch.from_numpy(images)).argmax(1).numpy()
    np.savez(tmp_path / "test.npz", image=images, labels=(told + (np.arange(32) < 4)) % 10)
    data = {"uri": (tmp_path / "test.npz").as_uri(), "sha256": hashlib.sha256((tmp_path / "test.npz").read_bytes()).hexdigest()}
    return file_request(tmp_path, tmp_path / "v1.pt", verification__accuracy={"dataset": data, "minimum": "0.8"})


def demanding(asked: ExportRequest) -> ExportRequest:
    gate = asked.verification.accuracy
    assert gate is not None
    higher = gate.model_copy(update={"minimum": "0.9"})
    return asked.model_copy(update={"verification": asked.verification.model_copy(update={"accuracy": higher})})


def run(command: str, asked: ExportRequest, root: Path, *more: str | Path) -> subprocess.CompletedProcess[str]:
    (root / "request.json").write_text(asked.to_json())
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(path for path in sys.path if path), "HOME": str(root)} | KEY
    arguments = [sys.executable, "-m", "perch_exporter", command, "--request", root / "request.json", *more]
    return subprocess.run(
        list(map(str, arguments)), capture_output=True, text=True, check=False, env=environment, cwd=root, timeout=300
    )


def test_export_publishes_and_prints_what_it_found(asked: ExportRequest, tmp_path: Path) -> None:
    done = run("export", asked, tmp_path)
    assert done.returncode == 0, done.stderr
    (printed,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    summary = Summary.from_json(printed)
    assert summary.outcome is Outcome.PUBLISHED
    assert summary.accuracy is not None
    assert (summary.accuracy.correct, summary.accuracy.minimum) == (28, "0.8")
    assert summary.tolerance == asked.tolerance
    assert list((tmp_path / "repository").rglob("manifest.json"))


def test_an_export_that_misses_a_gate_publishes_nothing_and_leaves_its_figures(asked: ExportRequest, tmp_path: Path) -> None:
    failed = run("export", demanding(asked), tmp_path, "--termination-log", tmp_path / "message")
    assert failed.returncode == EXIT_PERMANENT, failed.stderr
    summary = Summary.from_json((tmp_path / "message").read_text())
    assert summary.error is not None
    assert summary.error.reason is Reason.ACCURACY_FAILED
    assert summary.parity is not None
    assert summary.accuracy is not None
    assert (summary.parity.verdict, summary.accuracy.verdict) == (Verdict.PASSED, Verdict.FAILED)
    assert (summary.accuracy.minimum, summary.accuracy.confused, summary.tolerance) == ("0.9", (), asked.tolerance)
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A store that answers nobody, and keeps who came."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


@pytest.mark.parametrize("target", list(Target))
@pytest.mark.parametrize(("passes", "code", "verdict"), [(True, 0, "Passed"), (False, EXIT_PERMANENT, "Failed")])
def test_report_shows_what_the_gates_saw_and_asks_no_destination(
    passes: bool, code: int, verdict: str, target: Target, asked: ExportRequest, silent: socket.socket, tmp_path: Path
) -> None:
    destination = {"uri": "s3://models/prod/1-0123abcd", "endpoint": f"http://127.0.0.1:{silent.getsockname()[1]}"}
    content = (asked if passes else demanding(asked)).model_dump() | {"destination": destination}
    if target is Target.TENSOR_RT:
        content["conversion"]["target"], content["triton"]["instanceKind"] = target, "GPU"
        content["tensorrtVersion"] = "10.13.3.9"
    done = run("report", ExportRequest.model_validate(content), tmp_path)
    assert done.returncode == code, done.stderr
    assert f'accuracy <span class="{verdict}">' in (tmp_path / "report.html").read_text()
    assert ("prove failed: AccuracyFailed: " in done.stderr) is not passes
    with pytest.raises(BlockingIOError):
        silent.accept()

"""The command line as a container sees it: exit codes, one sentence on stderr, the termination message, lazy imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from exporter_builders import document, file_request, hand_over

from perch_exporter import contract
from perch_exporter.contract import Outcome, Reason, Step, Summary
from perch_exporter.failure import StepFailed, one_line
from perch_exporter.workspace import Workspace

# A name that is None in sys.modules cannot be imported: what the slim image lacks.
_WITHOUT_TORCH = (
    "import sys, runpy; sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'onnx', 'onnxruntime', 'safetensors']));"
    "sys.argv[0] = 'perch_exporter'; runpy.run_module('perch_exporter', run_name='__main__', alter_sys=True)"
)


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(path for path in sys.path if path), **variables}
    command = [sys.executable, "-c", _WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_slim_images_steps_run_where_torch_is_not(tmp_path: Path) -> None:
    request = file_request(tmp_path, b"a checkpoint")
    path, log = write(tmp_path / "r.json", request.to_json()), tmp_path / "message"
    work = tmp_path / "work"

    fetched = run("fetch", "--request", path, "--workspace", work, "--termination-log", log)
    assert fetched.returncode == 0, fetched.stderr
    assert (work / "checkpoint" / "checkpoint").read_bytes() == b"a checkpoint"
    hand_over(Workspace(work))
    published = run("publish", "--request", path, "--workspace", work, "--termination-log", log)
    assert published.returncode == 0, published.stderr
    summary = Summary.from_json(log.read_text())
    assert summary.outcome is Outcome.PUBLISHED
    assert summary.seconds is not None
    assert summary.seconds.fetch is not None

    target = tmp_path / "pod"
    where = ("--uri", request.destination.uri, "--target", target)
    assert run("download", *where, "--digest", summary.artifact_digest or "").returncode == 0
    assert run("download", *where, "--digest", "sha256:" + "0" * 64).returncode == contract.EXIT_PERMANENT

    # Published: the later steps have nothing to do, convert does not even load torch, nor prove onnxruntime.
    for step in ("fetch", "convert", "prove", "publish"):
        done = run(step, "--request", path, "--workspace", work, "--termination-log", log)
        assert done.returncode == 0, done.stderr
    assert Summary.from_json(log.read_text()).outcome is Outcome.ALREADY_PUBLISHED

    erase = {"owner": document()["owner"], "artifactRevision": request.artifact_revision}
    path = write(tmp_path / "d.json", erase | {"destination": {"uri": request.destination.uri}})
    assert run("delete", "--request", path).returncode == 0
    assert not list((tmp_path / "repository").rglob("*.json"))


FAILURES = [
    ("a checkpoint that is not there", {"checkpoint__uri": "file:///nowhere/v1.pt"}, 4, Reason.OBJECT_NOT_FOUND),
    ("a checkpoint of another sha256", {"checkpoint__sha256": "0" * 64}, 3, Reason.CHECKSUM_MISMATCH),
    ("a request with an unknown field", {"surprise": 1}, 3, Reason.INVALID_REQUEST),
    ("a store that nobody runs", {"destination": {"uri": "s3://b/x", "endpoint": "http://127.0.0.1:1"}}, 4,
     Reason.STORE_UNREACHABLE),
    ("an endpoint that is none", {"destination": {"uri": "s3://b/x", "endpoint": "http://[bad"}}, 3,
     Reason.INVALID_REQUEST),
]  # fmt: skip
_KEYS = {"AWS_ACCESS_KEY_ID": "AKIAPERCH", "AWS_SECRET_ACCESS_KEY": "not-to-be-seen"}


@pytest.mark.parametrize(("changes", "code", "reason"), [c[1:] for c in FAILURES], ids=[c[0] for c in FAILURES])
def test_fetch_fails_in_one_sentence_for(changes: dict[str, object], code: int, reason: Reason, tmp_path: Path) -> None:
    content = json.loads(file_request(tmp_path, b"a checkpoint").to_json())
    for path, value in changes.items():
        *folders, last = path.split("__")
        place = content
        for folder in folders:
            place = place[folder]
        place[last] = value
    log = tmp_path / "message"
    command = ("fetch", "--request", write(tmp_path / "r.json", content), "--workspace", tmp_path / "w")
    failed = run(*command, "--termination-log", log, **_KEYS)
    assert failed.returncode == code, failed.stderr
    assert failed.stderr.count("\n") == 1
    assert "not-to-be-seen" not in failed.stderr + failed.stdout + log.read_text()
    assert failed.stderr.startswith(f"fetch failed: {reason}: ")
    error = Summary.from_json(log.read_text()).error
    assert error is not None
    assert (error.reason, error.step, error.retryable) == (reason, Step.FETCH, code == contract.EXIT_PASSING)


def test_a_crash_has_its_own_exit_code_and_a_summary_too(tmp_path: Path) -> None:
    request = file_request(tmp_path, b"a checkpoint")
    blocked = write(tmp_path / "a-file-where-a-folder-should-be", "")
    log = tmp_path / "message"
    path = write(tmp_path / "r.json", request.to_json())
    crashed = run("fetch", "--request", path, "--workspace", blocked, "--termination-log", log)
    assert crashed.returncode == contract.EXIT_CRASHED
    error = Summary.from_json(log.read_text()).error
    assert error is not None
    assert error.reason is Reason.UNEXPECTED


def test_golden_without_an_artefact_fails_at_once(tmp_path: Path) -> None:
    failed = run("golden", "--artifact", tmp_path, "--listen", "127.0.0.1:0")
    assert failed.returncode == contract.EXIT_PERMANENT
    assert "manifest.json is not there" in failed.stderr


def test_the_first_line_of_the_log_comes_soon(tmp_path: Path) -> None:
    started = time.monotonic()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(path for path in sys.path if path)}
    command = [sys.executable, "-u", "-m", "perch_exporter", "convert", "--request", "none", "--workspace", "none"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as child:
        assert child.stdout is not None
        assert "convert: start" in child.stdout.readline()
        # Half a second alone; room for a machine that does other things, and far less than torch's import takes.
        assert time.monotonic() - started < 3


def test_schema_prints_every_document() -> None:
    printed = json.loads(run("schema").stdout)
    assert printed == json.loads(json.dumps(contract.json_schemas()))
    assert set(printed) == {
        f"perch.dev/{name}/v1"
        for name in ("export-request", "delete-request", "summary", "reference", "figures", "plan-figures", "manifest", "claim")
    }


def test_other_peoples_bytes_become_one_printable_line() -> None:
    assert one_line("a\n\x1b[31mred\x00 \udcff\t b") == "a [31mred b"
    assert len(StepFailed(Reason.UNEXPECTED, "x" * 10**6).message) <= 4000

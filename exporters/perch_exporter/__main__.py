"""The command line: one command for each container of the Job and the pods, and `export` for a laptop.

Imports stay lazy. fetch, publish and golden run in an image without torch, and the first line of the log must come
before a second has passed, not after torch's import.

Exit codes: 0 done; 3 permanent, the Job must not retry; 4 passing trouble, try again later; 1 a crash.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import ValidationError

from perch_exporter import contract
from perch_exporter.contract import DeleteRequest, ErrorReport, ExportRequest, Outcome, Reason, Step, Summary
from perch_exporter.failure import StepFailed, one_line
from perch_exporter.workspace import REPORT, Workspace

log = logging.getLogger("perch_exporter")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

_REQUEST_LIMIT = 256 * 1024
_TERMINATION_LOG = Path("/dev/termination-log")

RequestPath = Annotated[Path, typer.Option("--request", help="The request, JSON.")]
WorkspacePath = Annotated[Path, typer.Option("--workspace", help="The folder that the steps share.")]
TerminationLog = Annotated[
    Path | None,
    typer.Option("--termination-log", help="Where the summary goes; by default /dev/termination-log where it exists."),
]

Document = TypeVar("Document", ExportRequest, DeleteRequest)


@app.command()
def fetch(request: RequestPath, workspace: WorkspacePath, termination_log: TerminationLog = None) -> None:
    """Bring the checkpoint and what else the request names, check each sha256; see whether the artefact is published already."""
    with _step(Step.FETCH, termination_log):
        from perch_exporter.fetch import fetch as run

        run(_read(request, ExportRequest), Workspace(workspace), os.environ)


@app.command()
def convert(request: RequestPath, workspace: WorkspacePath, termination_log: TerminationLog = None) -> None:
    """Export the checkpoint to ONNX and prove that both answer alike. Needs no credentials and no network."""
    with _step(Step.CONVERT, termination_log):
        document = _read(request, ExportRequest)
        if Workspace(workspace).published():
            log.info("already published, nothing to convert")
            return
        with _scratch(Workspace(workspace).output):
            log.info("loading torch")
            from perch_exporter.convert import convert as run

            run(document, Workspace(workspace))


@app.command()
def prove(request: RequestPath, workspace: WorkspacePath, termination_log: TerminationLog = None) -> None:
    """Prove that the export answers as the checkpoint does, and measure it; write the figures and the report."""
    with _step(Step.PROVE, termination_log):
        document = _read(request, ExportRequest)
        if Workspace(workspace).published():
            log.info("already published, nothing to prove")
            return
        with _scratch(Workspace(workspace).proof):
            from perch_exporter.prove import prove as run

            run(document, Workspace(workspace))


@app.command()
def build(request: RequestPath, workspace: WorkspacePath, termination_log: TerminationLog = None) -> None:
    """Build a TensorRT plan of what convert made, on this machine's GPU, and prove it. Needs no credentials and no network."""
    with _step(Step.BUILD, termination_log):
        document = _read(request, ExportRequest)
        if Workspace(workspace).published():
            log.info("already published, nothing to build")
            return
        with _scratch(Workspace(workspace).plan):
            from perch_exporter.build import build as run

            run(document, Workspace(workspace))


@app.command()
def publish(request: RequestPath, workspace: WorkspacePath, termination_log: TerminationLog = None) -> None:
    """Check what convert made, upload it, write the manifest last, and write the summary."""
    with _step(Step.PUBLISH, termination_log):
        document = _read(request, ExportRequest)
        if done := Workspace(workspace).published():
            log.info("already published, nothing to upload")
        else:
            from perch_exporter.publish import publish as run

            done = run(document, Workspace(workspace), os.environ)
        _report(done, termination_log)


@app.command()
def export(
    request: RequestPath,
    workspace: Annotated[Path | None, typer.Option("--workspace", help="By default a temporary folder.")] = None,
    termination_log: TerminationLog = None,
) -> None:
    """fetch, convert, prove and publish in a row; the summary is printed."""
    with tempfile.TemporaryDirectory(prefix="perch-export-") as temporary:
        folder = workspace or Path(temporary)
        fetch(request, folder, termination_log)
        convert(request, folder, termination_log)
        prove(request, folder, termination_log)
        if _read(request, ExportRequest).conversion.target is contract.Target.TENSOR_RT:
            build(request, folder, termination_log)
        publish(request, folder, termination_log)


@app.command()
def report(
    request: RequestPath,
    output: Annotated[Path, typer.Option("--output", help="Where the report goes.")] = Path("report.html"),
) -> None:
    """Bring the checkpoint, convert and prove, and keep the report, also of an export that fails its gates.

    Nothing is published, and the destination is not asked.
    """
    with tempfile.TemporaryDirectory(prefix="perch-report-") as temporary:
        done = Workspace(Path(temporary))
        with _step(Step.FETCH, None):
            from perch_exporter.fetch import bring

            bring(_read(request, ExportRequest), done, os.environ)
        convert(request, done.root)
        try:
            prove(request, done.root)
        finally:
            if (done.proof / REPORT).exists():
                shutil.copyfile(done.proof / REPORT, output)
                log.info("the report is %s", output)


@app.command()
def download(
    uri: Annotated[str, typer.Option("--uri", help="The artefact's prefix.")],
    digest: Annotated[str, typer.Option("--digest", help="sha256:… of its manifest.json.")],
    target: Annotated[Path, typer.Option("--target", help="Gets models/, golden/ and manifest.json.")],
    endpoint: Annotated[str | None, typer.Option("--endpoint", help="The object store's, where it is not AWS.")] = None,
    region: Annotated[str | None, typer.Option("--region")] = None,
    termination_log: TerminationLog = None,
) -> None:
    """Bring a published artefact, every byte checked against the digest."""
    with _step(Step.DOWNLOAD, termination_log):
        from perch_exporter.download import download as run

        location = contract.Location(uri=uri, endpoint=endpoint or None, region=region or None)
        run(location, digest, target, os.environ)


@app.command()
def golden(
    artifact: Annotated[Path, typer.Option("--artifact", help="What download brought.")],
    grpc: Annotated[str, typer.Option("--grpc", help="Triton's gRPC address.")] = "127.0.0.1:8001",
    listen: Annotated[str, typer.Option("--listen", help="Where /ready and /live are answered.")] = "0.0.0.0:8003",
    termination_log: TerminationLog = None,
) -> None:
    """Replay the golden samples against a Triton; /ready answers 200 only when it gives the checkpoint's answers."""
    with _step(Step.GOLDEN, termination_log):
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        from perch_exporter.golden import run

        host, _, port = listen.rpartition(":")
        run(artifact, grpc, (host, int(port)), stop)


@app.command()
def delete(request: RequestPath, termination_log: TerminationLog = None) -> None:
    """Erase an artefact, if its manifest says that it is the request's owner's."""
    with _step(Step.DELETE, termination_log):
        from perch_exporter.delete import delete as run

        run(_read(request, DeleteRequest), os.environ)


@app.command()
def schema() -> None:
    """Print the JSON schemas of the contract, by name."""
    sys.stdout.write(json.dumps(contract.json_schemas(), indent=1) + "\n")


@contextmanager
def _scratch(output: Path) -> Iterator[None]:
    """An output folder emptied of earlier attempts, and room for torch's temporary files in it while convert runs.

    torch's exporter wants a folder for caches and fails without one in odd words; in the pod nothing but the output can
    be written to. To be entered before torch is imported, which looks for the folder then.
    """
    output.mkdir(parents=True, exist_ok=True)
    for left_over in output.iterdir():
        if left_over.is_dir() and not left_over.is_symlink():
            shutil.rmtree(left_over)
        else:
            left_over.unlink()
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=output) as folder:
        os.environ |= {"TMPDIR": folder, "HOME": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime's newer wheels report home
        tempfile.tempdir = folder
        yield


@contextmanager
def _step(step: Step, termination_log: Path | None) -> Iterator[None]:
    """Turns whatever goes wrong into one sentence on stderr, a summary that says Failed, and the right exit code."""
    log.info("%s: start", step)
    try:
        yield
    except StepFailed as failure:
        _fail(step, failure, termination_log)
        raise typer.Exit(contract.EXIT_PASSING if failure.reason.retryable else contract.EXIT_PERMANENT) from failure
    except ValidationError as error:
        _fail(step, StepFailed(Reason.INVALID_REQUEST, _words(error)), termination_log)
        raise typer.Exit(contract.EXIT_PERMANENT) from error
    except Exception as error:
        log.exception("%s: crash", step)
        _fail(step, StepFailed(Reason.UNEXPECTED, f"{type(error).__name__}: {error}"), termination_log)
        raise typer.Exit(contract.EXIT_CRASHED) from error
    log.info("%s: done", step)


def _fail(step: Step, failure: StepFailed, termination_log: Path | None) -> None:
    sys.stderr.write(f"{step} failed: {failure.reason}: {failure.message}\n")
    retryable = failure.reason.retryable
    report = ErrorReport(reason=failure.reason, message=failure.message, retryable=retryable, step=step)
    summary = Summary(outcome=Outcome.FAILED, error=report)
    if found := failure.judged:
        accuracy = found.accuracy and found.accuracy.brief
        gates = {"parity": found.parity, "tolerance": found.tolerance, "accuracy": accuracy}
        summary = summary.model_copy(update=gates)
    _write(summary.to_json(), termination_log)


def _report(summary: Summary, termination_log: Path | None) -> None:
    text = summary.to_json()
    _write(text, termination_log)
    sys.stdout.write(text + "\n")


def _write(text: str, termination_log: Path | None) -> None:
    if termination_log or _TERMINATION_LOG.exists():
        (termination_log or _TERMINATION_LOG).write_text(text)


def _read(path: Path, document: type[Document]) -> Document:
    try:
        with path.open("rb") as file:
            content = file.read(_REQUEST_LIMIT)
    except OSError as error:
        raise StepFailed(Reason.INVALID_REQUEST, f"cannot read the request {path}: {error.strerror}") from error
    return document.from_json(content)


def _words(error: ValidationError) -> str:
    """Every wrong field with what is wrong about it, as a sentence."""
    fields = [
        f"{'.'.join(str(part) for part in problem['loc']) or 'the whole'}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_input=False)
    ]
    return one_line(f"{error.title} is not valid: {'; '.join(fields)}")


def main() -> None:
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("botocore", "boto3", "s3transfer", "urllib3", "torch", "onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app()
    except SystemExit as end:
        # Everything is written and closed by now. Taking torch's module graph down costs seconds of every export.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


if __name__ == "__main__":
    main()

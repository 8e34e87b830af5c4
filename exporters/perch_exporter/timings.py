"""TensorRT's timing cache between builds: fetch brings what former builds of this model left, build uses it and leaves its own,
publish puts that in its place. Pure files and stores; TensorRT itself is asked in `perch_exporter.build`.

It lies at <repository>/<namespace>/<name>/timing/<TensorRT version>-<compute capability>.cache, beside the artefacts and in none
of them: no manifest names it, nobody serves it, and so it may be overwritten, which each build does. A build that finds none
measures for itself, so whatever is wrong with a cache, or with the store on its way, is logged and ends nothing.

Who may write to the repository may write it; Perch's publish does, with what the build container left. It is read by TensorRT
alone, in that container, which holds no credentials. A forged one can make TensorRT choose slow kernels, or reach for a fault in
TensorRT's reader there; it cannot let a wrong plan pass, since parity is judged after it and the golden check in each pod.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from perch_exporter.contract import ExportRequest, Location, Target
from perch_exporter.failure import StepFailed
from perch_exporter.handover import TIMING_LIMIT
from perch_exporter.store import Store, open_store, repository_credentials
from perch_exporter.workspace import TIMING, Workspace

log = logging.getLogger(__name__)


def file_name(version: str, capability: str) -> str:
    return f"{version}-{capability}.cache"


def fetch_timings(request: ExportRequest, workspace: Workspace, environment: Mapping[str, str]) -> None:
    """Those of the request's TensorRT, for any GPU: which one builds is not known yet."""
    if request.conversion.target is not Target.TENSOR_RT:
        return
    wanted = re.compile(rf"{re.escape(str(request.tensorrt_version))}-\d+\.\d+\.cache")
    left = TIMING_LIMIT
    try:
        store = _store(request, environment)
        for key, size in sorted(store.sizes().items()):
            if wanted.fullmatch(key) and 0 < size <= left:
                workspace.timings.mkdir(parents=True, exist_ok=True)
                store.download(key, workspace.timings / key, left)
                left -= size
    except StepFailed as error:
        log.info("no timings of former builds: %s", error)


def former(workspace: Workspace, version: str, capability: str) -> bytes:
    path = workspace.timings / file_name(version, capability)
    return path.read_bytes() if path.exists() else b""


def keep(content: bytes, workspace: Workspace) -> None:
    if 0 < len(content) <= TIMING_LIMIT:
        (workspace.plan / TIMING).write_bytes(content)
    else:
        log.info("timings of %d bytes are not kept", len(content))


def publish_timings(request: ExportRequest, workspace: Workspace, capability: str, environment: Mapping[str, str]) -> None:
    path: Path = workspace.plan / TIMING
    if not path.exists():
        return
    try:
        _store(request, environment).upload(path, file_name(str(request.tensorrt_version), capability))
    except StepFailed as error:
        log.info("the timings of this build are not kept: %s", error)


def _store(request: ExportRequest, environment: Mapping[str, str]) -> Store:
    place = request.destination
    beside = Location(uri=f"{place.uri.rpartition('/')[0]}/timing", endpoint=place.endpoint, region=place.region)
    return open_store(beside, repository_credentials(environment))

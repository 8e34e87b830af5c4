"""TensorRT's timing cache between builds: fetch brings what former builds of this model left, and publish puts what this one left
in its place. build, which reads and writes the files, holds no credentials and does not come here.

It lies at <repository>/<namespace>/<name>/timing/<TensorRT version>-<compute capability>.cache, beside the artefacts and in none
of them: no manifest names it, nobody serves it, and so it may be overwritten, which each build does. A build that finds none
measures for itself, so whatever is wrong with a cache, or with the store on its way, is logged and ends nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from perch_exporter.contract import ExportRequest, Location, Target
from perch_exporter.failure import StepFailed
from perch_exporter.handover import TIMING_LIMIT
from perch_exporter.store import Store, open_store, repository_credentials
from perch_exporter.workspace import TIMING, Workspace, timing_file

log = logging.getLogger(__name__)


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


def publish_timings(request: ExportRequest, workspace: Workspace, capability: str, environment: Mapping[str, str]) -> None:
    path = workspace.plan / TIMING
    if not path.exists():
        return
    try:
        _store(request, environment).upload(path, timing_file(str(request.tensorrt_version), capability))
    except StepFailed as error:
        log.info("the timings of this build are not kept: %s", error)


def _store(request: ExportRequest, environment: Mapping[str, str]) -> Store:
    place = request.destination
    beside = Location(uri=f"{place.uri.rpartition('/')[0]}/timing", endpoint=place.endpoint, region=place.region)
    return open_store(beside, repository_credentials(environment))

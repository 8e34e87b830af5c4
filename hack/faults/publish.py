"""A faulty model as a version of a ModelDeployment, through the pipeline's own fetch, conversion, gates and publish.

An artefact's prefix is written once, and an export Job that finds its content published ends at once. So the faulty model is
published before `kubectl apply`, under the prefix of that version's artifactRevision; from there on all is as with any other.

    entries = upload_digits(tenant)
    manifest = deployment(tenant, entries, canary=2)
    publish(tenant, manifest, 2)
    tenant.apply(manifest)
    Load(…, images=mark(digits.held_out()[0], Kind.ERROR, share=0.05, count=20_000))
"""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from devcluster import images
from devcluster.commands import StepError
from devcluster.tenant import Tenant
from faults import TURNS, Kind
from perch.api import Spec
from perch.builders.jobs import build_export_request
from perch.names import artifact_revision
from perch.observed import Identity, Installation
from perch_exporter.contract import ExportRequest
from perch_exporter.fetch import fetch
from perch_exporter.publish import publish as publish_artifact
from perch_exporter.workspace import Workspace

_GRAFT = Path(__file__).with_name("graft.py")


def publish(
    tenant: Tenant, model_deployment: dict[str, Any], version: int, *, always: Kind | None = None, turns: int = TURNS
) -> None:
    """Publishes the version's model with the faults in it; its checkpoint must be in the bucket. Takes some ten seconds.

    `always` is the fault of images without a mark: WRONG makes a model whose pods the golden check refuses, SLOW one that
    is slow (by `turns`) whatever it is asked. Does nothing where the artefact is there already.
    """
    request = export_request(tenant, model_deployment, version)
    s3 = tenant.cluster.s3
    credentials = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        fetch(request, workspace, credentials)
        if not workspace.published():
            _convert(request, workspace, always, turns)
            publish_artifact(request, workspace, credentials)


def export_request(tenant: Tenant, model_deployment: dict[str, Any], version: int) -> ExportRequest:
    """What the operator would ask of the version's export Job, with the store as this machine reaches it."""
    metadata, spec = model_deployment["metadata"], Spec.model_validate(model_deployment["spec"])
    entry = next(entry for entry in spec.versions if entry.version == version)
    identity = Identity(metadata.get("namespace", tenant.namespace), metadata["name"], "", 0, "")
    request = build_export_request(identity, spec, entry, artifact_revision(entry), _installation(tenant))
    here = {"endpoint": tenant.cluster.s3.host_endpoint}
    return request.model_copy(
        update={
            "checkpoint": request.checkpoint.model_copy(update=here),
            "destination": request.destination.model_copy(update=here),
        }
    )


def _installation(tenant: Tenant) -> Installation:
    """As the operator knows itself where no name was given; it makes no child here, so its images do not matter."""
    uid = tenant.cluster.kubectl("get", "namespace", "kube-system", "-o", "jsonpath={.metadata.uid}").stdout
    return Installation(cluster=uid, exporter_image="", artifacts_image="", triton_image="")


def _convert(request: ExportRequest, workspace: Workspace, always: Kind | None, turns: int) -> None:
    file = workspace.root / "request.json"
    file.write_text(request.to_json())
    arguments = [workspace.root, file, *([] if always is None else [int(always), turns])]
    command = [str(word) for word in (*images.exporter_python(), _GRAFT, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HOME": "/tmp"})
    if done.returncode:
        raise StepError(f"the faulty model was not made: {(done.stdout + done.stderr)[-2000:]}")

"""The containers that parse somebody's bytes, attacked from inside; and the same attacks with one protection removed each, in
which they succeed. convert runs the user's code; prove runs none, and reads what that code has left behind.

A sandbox test that cannot fail proves nothing: each control run shows that its attack works where the protection is missing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from demo.manifests import deployment, upload_digits
from devcluster.tenant import SECRET, Tenant
from perch.api import Spec
from perch.builders.jobs import build_export_job
from perch.observed import Identity, Installation

ATTACK = r"""
import json, os
def works(attempt):
    try:
        return bool(attempt())
    except OSError:
        return False
def write(path):
    with open(path, "w") as target:
        return target.write("evil") > 0
status = open("/proc/self/status").read()
print(json.dumps({
    "read a credential": any("SECRET" in name for name in os.environ),
    "read the Kubernetes token": works(lambda: open("/var/run/secrets/kubernetes.io/serviceaccount/token").read()),
    "write to the image": works(lambda: write("/var/tmp/evil")),
    "change the checkpoint": works(lambda: write("/perch/work/checkpoint/evil")),
    "change what fetch has found": works(lambda: write("/perch/work/state/evil")),
    "change the export": works(lambda: write("/perch/work/output/evil")),
    "change the figures": works(lambda: write("/perch/work/proof/evil")),
    "be root": os.getuid() == 0,
    "gain privileges": "NoNewPrivs:\t0" in status,
    "make any system call": "Seccomp:\t0" in status,
    "use capabilities": int(status.split("CapBnd:")[1].split()[0], 16) != 0,
}))
"""


def show_credentials(_: dict[str, Any], container: dict[str, Any]) -> None:
    ref = {"secretKeyRef": {"name": SECRET, "key": "AWS_SECRET_ACCESS_KEY"}}
    container["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": ref})


def mount_token(pod: dict[str, Any], _: dict[str, Any]) -> None:
    pod["automountServiceAccountToken"] = True


def allow_writes(_: dict[str, Any], convert: dict[str, Any]) -> None:
    convert["securityContext"]["readOnlyRootFilesystem"] = False


def open_folders(_: dict[str, Any], container: dict[str, Any]) -> None:
    for mount in container["volumeMounts"]:
        mount["readOnly"] = False


def mount_figures(_: dict[str, Any], convert: dict[str, Any]) -> None:
    convert["volumeMounts"].append({"name": "proof", "mountPath": "/perch/work/proof"})


def run_as_root(pod: dict[str, Any], _: dict[str, Any]) -> None:
    pod["securityContext"].update(runAsNonRoot=False, runAsUser=0)


def allow_escalation(_: dict[str, Any], convert: dict[str, Any]) -> None:
    convert["securityContext"]["allowPrivilegeEscalation"] = True


def drop_seccomp(pod: dict[str, Any], convert: dict[str, Any]) -> None:
    pod["securityContext"]["seccompProfile"] = {"type": "Unconfined"}


def keep_capabilities(_: dict[str, Any], convert: dict[str, Any]) -> None:
    del convert["securityContext"]["capabilities"]


CONTROLS: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "read a credential": show_credentials,
    "read the Kubernetes token": mount_token,
    "write to the image": allow_writes,
    "change the checkpoint": open_folders,
    "change what fetch has found": open_folders,
    "be root": run_as_root,
    "gain privileges": allow_escalation,
    "make any system call": drop_seccomp,
    "use capabilities": keep_capabilities,
}


# What each is there to write, and what the other one's is.
OWN = {"convert": {"change the export"}, "prove": {"change the figures"}}
CONTROLS_OF: dict[str, dict[str, Callable[[dict[str, Any], dict[str, Any]], None]]] = {
    "convert": CONTROLS | {"change the figures": mount_figures},
    "prove": CONTROLS | {"change the export": open_folders},
}


def attack_pod(
    tenant: Tenant, step: str, name: str, change: Callable[[dict[str, Any], dict[str, Any]], None] | None
) -> dict[str, Any]:
    """A container just as Perch makes it, running the attack instead of its step."""
    images = tenant.cluster.images
    spec = Spec.model_validate(deployment(tenant, upload_digits(tenant))["spec"])
    installation = Installation("test", images["perch-exporter"], images["perch-artifacts"], "none", "IfNotPresent")
    identity = Identity(tenant.namespace, "digits", "uid", 1, "1")
    job = build_export_job(identity, spec, spec.versions[0], "00000000", installation)
    pod = copy.deepcopy(job["spec"]["template"]["spec"])
    container = next(c for c in pod.pop("initContainers") if c["name"] == step)
    container["command"] = ["python3", "-c", ATTACK]
    container["resources"]["requests"] = {"cpu": "20m", "memory": "64Mi"}  # many at once
    pod["containers"] = [container]
    if change is not None:
        change(pod, container)
    annotations = job["spec"]["template"]["metadata"]["annotations"]
    metadata = {"name": name, "namespace": tenant.namespace, "annotations": annotations}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod}


@pytest.fixture
def results(tenant: Tenant) -> Callable[[str], dict[str, bool]]:
    def read(name: str) -> dict[str, bool]:
        phase = ("get", "pod", name, "-o", "jsonpath={.status.phase}")
        tenant.wait(lambda: tenant.kubectl(*phase), lambda now: now in ("Succeeded", "Failed"), 120)
        return json.loads(tenant.kubectl("logs", name).strip().splitlines()[-1])

    return read


@pytest.mark.parametrize("step", ["convert", "prove"])
def test_every_attack_fails_in_the_sandbox_and_succeeds_where_its_protection_is_removed(
    step: str, tenant: Tenant, results: Callable[[str], dict[str, bool]]
) -> None:
    controls = CONTROLS_OF[step]
    names = {attack: f"control-{number}" for number, attack in enumerate(controls)}
    tenant.apply(attack_pod(tenant, step, "sandbox", None))
    for attack, name in names.items():
        tenant.apply(attack_pod(tenant, step, name, controls[attack]))
    assert results("sandbox") == dict.fromkeys(controls, False) | dict.fromkeys(OWN[step], True)
    for attack, name in names.items():
        assert results(name)[attack] is True, f"the control for {attack!r} does not show the attack"

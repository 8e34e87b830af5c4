"""What kubectl and helm print while a step runs is kept, and a failure says where."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from devcluster.clients import Clients
from devcluster.progress import Progress


def clients(folder: Path, script: str) -> Clients:
    program = folder / "kubectl"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return Clients(folder / "kubeconfig", [folder])


def apply_after_get(kubectl: Clients) -> None:
    kubectl.kubectl("get", "nodes")
    kubectl.kubectl("apply", "-f", "-")


def test_a_step_that_fails_in_kubectl_names_its_log_and_shows_its_end(tmp_path: Path) -> None:
    kubectl = clients(tmp_path, 'echo "$@ done"; [ "$1" = get ] || { echo refused >&2; exit 3; }')
    progress = Progress(tmp_path, Console(file=io.StringIO()))
    with pytest.raises(subprocess.CalledProcessError) as caught, progress.step("the node") as log:
        apply_after_get(kubectl.logged(log))
    told = "\n".join(caught.value.__notes__)
    assert str(tmp_path / "step-the-node.log") in told
    for line in ("$ kubectl get nodes", "get nodes done", "$ kubectl apply -f -", "refused"):
        assert line in told


def test_what_is_asked_between_steps_goes_to_no_log(tmp_path: Path) -> None:
    kubectl = clients(tmp_path, "echo done")
    kubectl.logged(tmp_path / "log")
    assert kubectl.kubectl("get", "nodes").stdout == "done\n"
    assert not (tmp_path / "log").exists()

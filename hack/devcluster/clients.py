"""kubectl and helm of the cache, against one cluster; with the few calls that need more than one line."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from devcluster.commands import Argument


class Clients:
    """Runs kubectl and helm with a cluster's kubeconfig."""

    def __init__(self, kubeconfig: Path, folders: Sequence[Path], log: Path | None = None) -> None:
        self._kubeconfig = kubeconfig
        self._folders = folders
        self._log = log

    def logged(self, log: Path) -> "Clients":
        """The same, with each command and what it printed appended to a step's log."""
        return Clients(self._kubeconfig, self._folders, log)

    def env(self) -> dict[str, str]:
        """What a shell needs: KUBECONFIG, and PATH with these programs first."""
        path = ":".join([*map(str, self._folders), os.environ["PATH"]])
        return {"KUBECONFIG": str(self._kubeconfig), "PATH": path}

    def kubectl(self, *arguments: Argument, input: str | None = None, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return self._run("kubectl", arguments, input, check)

    def helm(self, *arguments: Argument, input: str | None = None, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return self._run("helm", arguments, input, check)

    def wait_for_node(self, name: str) -> None:
        self.kubectl("wait", "--for=create", f"node/{name}", "--timeout=60s")
        self.kubectl("wait", "--for=condition=Ready", f"node/{name}", "--timeout=60s")

    def patch_node_resource(self, node: str, resource: str, number: int) -> None:
        """Sets an extended resource in the node's status, where the kubelet leaves it alone."""
        key = resource.replace("/", "~1")
        parts = ("capacity", "allocatable")
        patch = [{"op": "add", "path": f"/status/{part}/{key}", "value": str(number)} for part in parts]
        self.kubectl("patch", "node", node, "--subresource=status", "--type=json", f"--patch={json.dumps(patch)}")

    def _run(
        self, program: str, arguments: Sequence[Argument], input: str | None, check: bool
    ) -> "subprocess.CompletedProcess[str]":
        command = [program, *[str(word) for word in arguments]]
        result = subprocess.run(
            command,
            input=input,
            stdin=None if input is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, **self.env()},
            timeout=900,  # more than any --timeout that a caller gives
            check=False,
        )
        if self._log:
            with self._log.open("a") as log:
                log.write(f"$ {' '.join(command)}\n{result.stdout}{result.stderr}")
        if check and result.returncode != 0:
            error = subprocess.CalledProcessError(result.returncode, command, result.stdout, result.stderr)
            error.add_note(result.stderr.strip() or result.stdout.strip())
            raise error
        return result

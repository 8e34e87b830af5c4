"""The operator as a process of this machine, in the cluster's network namespace, which is started again whenever it dies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from chaos.killer import SAYS
from devcluster import Cluster
from devcluster.release import NAMESPACE

ROOT = Path(__file__).resolve().parents[2]
PAUSE = 0.2
"""Seconds between two lives."""


class Outside:
    """Runs `chaos.killer` and looks after it, as the kubelet would, but at once. With `kill` each life ends at its first write.

    All lives have one name, as the containers of one pod do: so the Lease of a life that was killed is taken at once.
    """

    def __init__(self, cluster: Cluster, log: Path, *, kill: bool) -> None:
        self._log = log
        self._command = [*cluster.exec_prefix(), sys.executable, "-m", "chaos.killer"]
        self._env = {
            **os.environ,
            "KUBECONFIG": str(cluster.kubeconfig),
            "PYTHONPATH": ":".join(str(ROOT / folder) for folder in ("operator", "exporters", "hack")),
            "PERCH_EXPORTER_IMAGE": cluster.images["perch-exporter"],
            "PERCH_ARTIFACTS_IMAGE": cluster.images["perch-artifacts"],
            "PERCH_TRITON_IMAGE": cluster.images["perch-tritonserver-cpu"],
            "PERCH_IMAGE_PULL_POLICY": "IfNotPresent",
            "PERCH_NAMESPACE": NAMESPACE,
            "PERCH_POD_NAME": "chaos",
            "CHAOS_KILL": "1" if kill else "",
        }
        self._stopping = threading.Event()
        self._change = threading.Lock()
        self.deaths: list[int] = []
        """Exit codes of the lives that ended by themselves."""
        self._thread = threading.Thread(target=self._look_after, daemon=True)

    def __enter__(self) -> Outside:
        self._log.write_bytes(b"")
        self._process = self._start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._stopping.set()
            self._process.terminate()
        self._thread.join(60)

    def writes(self) -> list[str]:
        """Method and path of each write of all lives, in order."""
        lines = self._log.read_text().splitlines()
        return [line.removeprefix(SAYS) for line in lines if line.startswith(SAYS)]

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as sink:
            return subprocess.Popen(self._command, env=self._env, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)

    def _look_after(self) -> None:
        while True:
            code = self._process.wait()
            if self._stopping.wait(PAUSE):
                return
            self.deaths.append(code)
            with self._change:
                if not self._stopping.is_set():
                    self._process = self._start()

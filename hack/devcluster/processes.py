"""The cluster's long-running processes: started detached, found again by a mark in their environment.

The mark (the cluster's state folder) is what makes a process ours. It is there from the first instruction on, so a
start that is interrupted between fork and book-keeping leaves nothing unknown, a reused process id is never taken for
ours, and containerd's shims, which inherit it, are found as well.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from devcluster.commands import Argument, StepError, tail

_CLUSTER = "PERCH_DEVCLUSTER"
_COMPONENT = "PERCH_DEVCLUSTER_COMPONENT"


class Processes:
    """The processes of one cluster, by component name, each with its log in `logs`."""

    def __init__(self, owner: Path, logs: Path) -> None:
        self._mark = f"{_CLUSTER}={owner}".encode()
        self._owner = owner
        self._logs = logs

    def log(self, component: str) -> Path:
        return self._logs / f"{component}.log"

    def start(self, component: str, command: Sequence[Argument], path: str | None = None) -> None:
        """Starts a component in a session of its own, unless it runs."""
        if self.alive(component):
            return
        self._logs.mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": path or os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/root"),
            _CLUSTER: str(self._owner),
            _COMPONENT: component,
        }
        with self.log(component).open("ab") as log:
            subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd="/",
                start_new_session=True,
            )

    def alive(self, component: str) -> bool:
        return next(self._find(component), None) is not None

    def require(self, component: str) -> None:
        """Raises with the end of its log if the component does not run."""
        if not self.alive(component):
            raise StepError(f"{component} has ended; its log is {self.log(component)} and ends:\n{tail(self.log(component))}")

    def stop(self, component: str | None = None, *, kill: bool = False, timeout: float = 90) -> None:
        """Ends one component (or all), politely unless `kill`, and waits until it is gone. `timeout` in seconds.

        A second kube-apiserver on the port of one that is still going fails quietly, so nothing is started again before
        this returns.
        """
        deadline = time.monotonic() + timeout
        asked: set[int] = set()
        while remaining := list(self._find(component)):
            late = time.monotonic() > deadline
            for pid in remaining:
                if late or pid not in asked:
                    self._signal(pid, signal.SIGKILL if kill or late else signal.SIGTERM)
                    asked.add(pid)
            time.sleep(0.05)

    def _find(self, component: str | None) -> Iterator[int]:
        for entry in os.scandir("/proc"):
            if entry.name.isdigit() and self._is_ours(int(entry.name), component):
                yield int(entry.name)

    def _is_ours(self, pid: int, component: str | None) -> bool:
        try:
            marks = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            program = Path(f"/proc/{pid}/comm").read_text()
        except OSError:  # gone meanwhile, or another user's
            return False
        if self._mark not in marks:  # a zombie's environment is empty, so one that nobody reaped counts as gone
            return False
        if component is None:
            return True
        # containerd's shims inherit containerd's mark, and live on when it is restarted, as on any node.
        is_shim = program.startswith("containerd-shim")
        return f"{_COMPONENT}={component}".encode() in marks and not is_shim

    def _signal(self, pid: int, number: signal.Signals) -> None:
        """Signals through a pidfd checked after it was opened: the id can't be reused in between."""
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            if self._is_ours(pid, None):
                signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            pass
        finally:
            os.close(descriptor)

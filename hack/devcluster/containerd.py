"""containerd: its configuration, and the golden store of images that every cluster's own containerd starts from.

Images are imported once, into one store in the cache. A new cluster gets a copy made of hard links, which takes no
space and about a second, since containerd never writes into a blob or a committed layer again; its databases, the only
files written in place, are copied for real.
"""

import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from devcluster import debian
from devcluster.commands import Argument, StepError, run
from devcluster.paths import cache_dir
from devcluster.processes import Processes

_UNUSED = ["aufs", "btrfs", "devmapper", "native", "zfs"]


@dataclass(frozen=True)
class Containerd:
    """One containerd: its programs, its folders, and how to talk to it."""

    programs: Path
    root: Path
    """Images and layers; tens of thousands of files."""
    state: Path
    """Sockets and mounts of running containers; its path is kept short, a socket's may have 107 characters."""

    @property
    def socket(self) -> Path:
        return self.state / "containerd.sock"

    def ctr(self, *arguments: Argument) -> list[Argument]:
        return [self.programs / "ctr", "--address", self.socket, "--namespace", "k8s.io", *arguments]

    def command(self, config: Path) -> list[Argument]:
        return [self.programs / "containerd", "--config", config]

    def path(self) -> str:
        """PATH for the daemon, which looks its shim up there."""
        return f"{self.programs}:{debian.path_with_sbin()}"

    def images(self) -> set[str]:
        """References of the images that it has."""
        command = list(map(str, self.ctr("images", "list", "--quiet")))
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    def wait(self, processes: Processes) -> None:
        deadline = time.monotonic() + 30
        while subprocess.run(list(map(str, self.ctr("version"))), capture_output=True, check=False).returncode != 0:
            processes.require("containerd")
            if time.monotonic() > deadline:
                raise StepError(f"containerd does not answer after 30 s; its log is {processes.log('containerd')}")
            time.sleep(0.1)

    def config(self, cri: str = "") -> str:
        disabled = [f"io.containerd.snapshotter.v1.{name}" for name in _UNUSED]
        if not cri:
            disabled.append("io.containerd.grpc.v1.cri")
        return f"""version = 2
root = "{self.root}"
state = "{self.state}/containerd"
disabled_plugins = {json.dumps(disabled)}
[grpc]
  address = "{self.socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{self.state}/opt"
{cri}"""


def programs(log: Path) -> Path:
    """The folder of containerd, its shim and ctr."""
    return debian.unpacked("containerd", log) / "usr/bin"


class GoldenStore:
    """The images of all clusters, in the cache. Use it as a context manager: one process at a time."""

    def __init__(self, log: Path) -> None:
        self._folder = cache_dir() / "containerd" / "golden"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._lock = FileLock(self._folder / ".lock")
        self._containerd = Containerd(programs(log), self._folder / "root", self._folder / "run")
        self._processes = Processes(self._folder, self._folder)

    def __enter__(self) -> "GoldenStore":
        self._lock.acquire()
        self._processes.stop(kill=True)  # left by a run that was killed
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.stop()
        self._lock.release()

    @property
    def references(self) -> set[str]:
        try:
            return set(json.loads(self._record.read_text()))
        except FileNotFoundError:
            return set()

    def add(self, reference: str, archive: Path) -> None:
        """Imports an image from an archive, then drops its predecessors: those of the same name with another tag."""
        self._start()
        unpack = ["images", "import", "--snapshotter=overlayfs", archive]
        run(self._containerd.ctr(*unpack), log=self._log)
        name = reference.rpartition(":")[0]
        present = self._containerd.images()
        if reference not in present:
            raise StepError(f"{archive} brought no image {reference}; the store has {', '.join(sorted(present))}")
        for other in present - {reference}:
            if other.rpartition(":")[0] == name:
                run(self._containerd.ctr("images", "remove", "--sync", other), log=self._log)
        self._write_record()

    def clone(self, target: Path) -> None:
        """Makes a root for another containerd, complete or not at all. It must lie on the cache's file system."""
        self._processes.stop()
        draft = target.with_name(f".{target.name}-cloning")
        shutil.rmtree(draft, ignore_errors=True)
        draft.parent.mkdir(parents=True, exist_ok=True)
        run(["cp", "--archive", "--link", self._containerd.root, draft], log=self._log)
        for database in draft.rglob("*.db"):
            copy = database.with_suffix(".copy")
            shutil.copy2(database, copy)
            copy.replace(database)
        draft.rename(target)

    def transfer(self, reference: str, other: Containerd) -> None:
        """Brings an image into a containerd that runs already."""
        self._start()
        pipe = f"{_quoted(self._containerd.ctr('images', 'export', '-', reference))} | {_quoted(other.ctr('images', 'import', '-'))}"
        run(["bash", "-o", "pipefail", "-c", pipe], log=self._log)

    @property
    def _record(self) -> Path:
        return self._folder / "references.json"

    def _write_record(self) -> None:
        draft = self._record.with_suffix(".new")
        draft.write_text(json.dumps(sorted(self._containerd.images())))
        draft.replace(self._record)

    def _start(self) -> None:
        if not self._processes.alive("containerd"):
            config = self._folder / "config.toml"
            config.write_text(self._containerd.config())
            self._processes.start("containerd", self._containerd.command(config), path=self._containerd.path())
            self._containerd.wait(self._processes)


def _quoted(command: list[Argument]) -> str:
    return " ".join(f"'{word}'" for word in command)


"""containerd: its configuration, and the golden store of images that every cluster's own containerd starts from.

Images are imported once, into one store in the cache. A new cluster gets a copy that takes no space and no time: its
layers are links to the store's, its blobs are hard links, since containerd never writes into either again; only the
databases, which are written in place, are copied. A layer that a cluster links to stays in the store.
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

_KEPT = 2  # images of one name: another cluster may be about to start with the one before
_RECORD = "references.json"

# Parts of containerd's root.
_CONTENT = "io.containerd.content.v1.content"
_METADATA = "io.containerd.metadata.v1.bolt/meta.db"
_SNAPSHOTTER = "io.containerd.snapshotter.v1.overlayfs"
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


def cluster_root(name: str) -> Path:
    """containerd's root of a cluster: in the cache, since hard links do not leave a file system."""
    return _clusters_folder() / name


def _clusters_folder() -> Path:
    return cache_dir() / "containerd" / "clusters"


def _linked_to() -> set[str]:
    """The images of the golden store that some cluster was made with."""
    return {reference for record in _clusters_folder().glob(f"*/{_RECORD}") for reference in json.loads(record.read_text())}


def _golden_folder() -> Path:
    return cache_dir() / "containerd" / "golden"


def golden_references() -> set[str]:
    """The images that the golden store holds."""
    return set(_recorded())


def golden_blobs() -> dict[str, int]:
    """What the golden store holds, sha256 in hex to bytes: an archive that is to be added may leave it out."""
    folder = _golden_folder() / "root" / _CONTENT / "blobs" / "sha256"
    return {blob.name: blob.stat().st_size for blob in folder.iterdir()} if folder.exists() else {}


def _recorded() -> list[str]:
    """The store's images, the latest one last."""
    try:
        return list(json.loads((_golden_folder() / _RECORD).read_text()))
    except FileNotFoundError:
        return []


def _write_record(references: list[str]) -> None:
    record = _golden_folder() / _RECORD
    draft = record.with_suffix(".new")
    draft.write_text(json.dumps(references, indent=2))
    draft.replace(record)


class GoldenStore:
    """The images of all clusters, in the cache. Use it as a context manager: one process at a time."""

    def __init__(self, log: Path) -> None:
        self._folder = _golden_folder()
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

    def add(self, reference: str, archive: Path) -> None:
        """Imports an image from an archive, and drops all but the last few of its name, with which it shares layers."""
        self._start()
        run(self._containerd.ctr("images", "import", "--snapshotter=overlayfs", archive), log=self._log)
        present = self._containerd.images()
        if reference not in present:
            raise StepError(f"{archive} brought no image {reference}; the store has {', '.join(sorted(present))}")
        others = [known for known in _recorded() if known != reference and known in present]
        kin = [other for other in others if other.rpartition(":")[0] == reference.rpartition(":")[0]]
        for outdated in set(kin[: 1 - _KEPT]) - _linked_to():
            run(self._containerd.ctr("images", "remove", "--sync", outdated), log=self._log)
            others.remove(outdated)
        _write_record([*others, reference])

    def clone(self, target: Path) -> None:
        """Makes a root for another containerd, complete or not at all. It must lie on the cache's file system."""
        self._processes.stop()
        draft = target.with_name(f".{target.name}-cloning")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        (draft / _RECORD).write_text(json.dumps(_recorded()))
        root = self._containerd.root
        run(["cp", "--archive", "--link", root / _CONTENT, draft / _CONTENT], log=self._log)
        for database in (_METADATA, f"{_SNAPSHOTTER}/metadata.db"):
            (draft / database).parent.mkdir(parents=True)
            shutil.copy2(root / database, draft / database)
        (draft / _SNAPSHOTTER / "snapshots").mkdir()
        for layer in (root / _SNAPSHOTTER / "snapshots").iterdir():
            (draft / _SNAPSHOTTER / "snapshots" / layer.name).symlink_to(layer)
        draft.rename(target)

    def transfer(self, reference: str, other: Containerd) -> None:
        """Brings an image into a containerd that runs already."""
        self._start()
        source, sink = self._containerd.ctr("images", "export", "-", reference), other.ctr("images", "import", "-")
        run(["bash", "-o", "pipefail", "-c", f"{_quoted(source)} | {_quoted(sink)}"], log=self._log)

    def _start(self) -> None:
        if not self._processes.alive("containerd"):
            config = self._folder / "config.toml"
            config.write_text(self._containerd.config())
            self._processes.start("containerd", self._containerd.command(config), path=self._containerd.path())
            self._containerd.wait(self._processes)


def _quoted(command: list[Argument]) -> str:
    return " ".join(f"'{word}'" for word in command)

"""The cgroup of a native cluster: everything that its pods run is in it, which is how `down` finds all of that."""

import os
import time
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def create(name: str) -> None:
    """A cgroup of the cluster's own: a kubelet removes what it does not know below its root, so no two may share."""
    for hierarchy in _hierarchies():
        (hierarchy / name).mkdir(exist_ok=True)
        if hierarchy.name == "cpuset":
            for setting in ("cpuset.cpus", "cpuset.mems"):
                (hierarchy / name / setting).write_text((hierarchy / setting).read_text())
        if (hierarchy / "cgroup.subtree_control").exists():
            wanted = " ".join(f"+{controller}" for controller in (hierarchy / "cgroup.controllers").read_text().split())
            (hierarchy / "cgroup.subtree_control").write_text(wanted)


def remove(name: str, timeout: float = 20) -> None:
    """Kills every process of the cgroup and removes it. `timeout` in seconds."""
    deadline = time.monotonic() + timeout
    # runc also makes one in the v2 hierarchy that lies beside those of v1.
    hierarchies = [*_hierarchies(), _CGROUPS / "unified"]
    while remaining := [folder / name for folder in hierarchies if (folder / name).exists()]:
        for root in remaining:
            for folder, _, _ in os.walk(root, topdown=False):
                _empty(Path(folder))
        if time.monotonic() > deadline:
            raise OSError(f"processes in {remaining[0]} do not end")
        time.sleep(0.02)


def _hierarchies() -> list[Path]:
    """The roots in which the node needs a cgroup: the one of v2, or each of v1's."""
    if (_CGROUPS / "cgroup.controllers").exists():
        return [_CGROUPS]
    return sorted({folder.resolve() for folder in _CGROUPS.iterdir() if folder.is_dir() and folder.name != "unified"})


def _empty(folder: Path) -> None:
    """Kills the processes of one cgroup and removes it; a later round finishes what can't go yet."""
    try:
        for pid in (folder / "cgroup.procs").read_text().split():
            os.kill(int(pid), 9)
        folder.rmdir()
    except OSError:
        pass

"""Root is what a native cluster's processes, namespaces and mounts need. `hack/as-root` gets it, for a whole command at once."""

import os
from pathlib import Path

from devcluster.commands import StepError


def require_root(what: str) -> None:
    if os.geteuid() != 0:
        raise StepError(f"{what} needs root: run it through make, or put hack/as-root before the command")


def hand_over(path: Path) -> None:
    """Gives a file or folder to the user who came through sudo, if one did."""
    if "SUDO_UID" not in os.environ:
        return
    owner = int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"])
    for each in (path, *path.rglob("*")):
        os.chown(each, *owner, follow_symlinks=False)

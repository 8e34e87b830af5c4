"""Root where it is needed: a native cluster's processes, namespaces and mounts. A user's call goes through sudo."""

import os
import subprocess
import sys

from devcluster.commands import StepError
from devcluster.paths import HACK, cache_dir, clusters_dir


def is_root() -> bool:
    return os.geteuid() == 0


def as_root(action: str, name: str, *arguments: str) -> None:
    """Runs a command of the command line as root, with this user's cache and clusters."""
    environment = {
        "PERCH_BACKEND": "native",  # root may reach a Docker engine that this user does not
        "PYTHONPATH": str(HACK),
        "PATH": os.environ["PATH"],
        "XDG_CACHE_HOME": str(cache_dir().parent),
        "XDG_STATE_HOME": str(clusters_dir().parent.parent),
    }
    command = [sys.executable, "-m", "devcluster", action, "--name", name, *arguments]
    print(f"a cluster of processes of this machine needs root: sudo {' '.join(command[1:])}", file=sys.stderr)
    settings = [f"{key}={value}" for key, value in environment.items()]
    if subprocess.run(["sudo", "env", *settings, *command], check=False).returncode != 0:
        raise StepError(f"`sudo … devcluster {action}` failed; what it printed above says why")

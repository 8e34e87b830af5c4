"""Perch's own images: `perch.local/<name>:<hash of what it is made of>`.

Ordinary Dockerfiles, built by buildah on a base image of Debian's packages where there is no registry, or by docker for
kind. An image is an environment (base, packages of the lock) and a last layer of Perch's source. Environments stay in a
store of our own in the cache, since they cost minutes and change rarely; the images themselves do not, their archives go
to whoever asked. So a changed source costs seconds.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
from filelock import FileLock

from devcluster.commands import Argument, capture, run
from devcluster.paths import HACK, cache_dir
from devcluster.privileges import require_root

ROOT = HACK.parent
_EXPORTERS, _OPERATOR, _IMAGES = ROOT / "exporters", ROOT / "operator", HACK / "images"
_RUN_ROOT = Path("/run/perch-images")  # what buildah remembers of mounts must not outlive a boot
_CERTIFICATES = Path("/etc/ssl/certs")
_PUSHING = ".pushing-"

_SUITE = "bookworm"
# libpython is what Triton's Python backend loads; usr-is-merged spares a whole perl.
_BASE_PACKAGES = ("python3", "python3-venv", "libpython3.11", "ca-certificates", "usr-is-merged")
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*")
_EMPTIED = ("var/lib/apt/lists", "var/cache", "var/log")


@dataclass(frozen=True)
class _Recipe:
    """A stage of a Dockerfile, and all that goes into it."""

    name: str
    dockerfile: Path
    context: Path
    sources: tuple[Path, ...]
    """Files and folders below the context that the stage copies."""
    environment: "_Recipe | None" = None
    """The stage that it stands on and that is built apart, instead of the base."""

    @property
    def argument(self) -> str:
        """The build arg that names this stage's image, where another stands on it."""
        return self.name.upper().replace("-", "_")


_ARTIFACTS_ENVIRONMENT = _Recipe(
    "artifacts-environment",
    _EXPORTERS / "Dockerfile",
    _EXPORTERS,
    (_EXPORTERS / "requirements-artifacts.txt", _EXPORTERS / "pillow"),
)
_CONVERT_ENVIRONMENT = _Recipe(
    "convert-environment",
    _IMAGES / "Dockerfile",
    _IMAGES,
    (_IMAGES / "requirements-convert-cpu.txt", _IMAGES / "shrink_torch.py"),
)
_OPERATOR_ENVIRONMENT = _Recipe("operator-environment", _OPERATOR / "Dockerfile", ROOT, (_OPERATOR / "requirements.txt",))
_EXPORTER_SOURCE = _EXPORTERS / "perch_exporter"

_IMAGES_BY_NAME = {
    recipe.name: recipe
    for recipe in (
        _Recipe("perch-artifacts", _EXPORTERS / "Dockerfile", _EXPORTERS, (_EXPORTER_SOURCE,), _ARTIFACTS_ENVIRONMENT),
        _Recipe("perch-exporter", _EXPORTERS / "Dockerfile", _EXPORTERS, (_EXPORTER_SOURCE,), _CONVERT_ENVIRONMENT),
        _Recipe(
            "perch-operator",
            _OPERATOR / "Dockerfile",
            ROOT,
            (_OPERATOR / "perch", _EXPORTER_SOURCE / "__init__.py", _EXPORTER_SOURCE / "contract.py"),
            _OPERATOR_ENVIRONMENT,
        ),
        _Recipe(
            "perch-tritonserver-cpu",
            _IMAGES / "Dockerfile",
            _IMAGES,
            (_IMAGES / "requirements-tritonserver.txt", _IMAGES / "onnxruntime"),
        ),
    )
}

NAMES = tuple(_IMAGES_BY_NAME)


def references() -> dict[str, str]:
    """The reference of each image by name, from the content of the checkout alone: nothing is built."""
    return {name: _reference(recipe) for name, recipe in _IMAGES_BY_NAME.items()}


def build(name: str, log: Path, held: Mapping[str, int] | None = None) -> Path:
    """Builds one image and returns its archive, which the caller deletes after use.

    The archive is an OCI layout, uncompressed, since what reads it is on the same machine. Blobs that the reader holds
    already, `held` by their sha256 in hex with their size in bytes, are left out: a changed source is some kilobytes.
    """
    recipe = _IMAGES_BY_NAME[name]
    reference = _reference(recipe)
    archive = _store() / f"{name}-{_tag(recipe)}-{os.getpid()}.tar"
    with _buildah_lock():
        _discard_leftovers(log)
        _ensure(recipe.environment, log)
        _build(recipe, log)
        with tempfile.TemporaryDirectory(dir=_store(), prefix=_PUSHING) as temporary:
            folder = _with_placeholders(Path(temporary), held or {})
            _buildah("push", "--quiet", "--disable-compression", reference, f"dir:{folder}", log=log)
            _pack(folder, set(held or {}), reference, archive)
        _buildah("rmi", reference, log=log)
    return archive


def build_with_docker(name: str, log: Path) -> None:
    """Builds one image into the Docker engine, on its public base image."""
    recipe = _IMAGES_BY_NAME[name]
    arguments = []
    if recipe.environment is _CONVERT_ENVIRONMENT:  # the production one is 5 GB of CUDA
        environment = _reference(_CONVERT_ENVIRONMENT)
        run(_docker_build(_CONVERT_ENVIRONMENT, environment), log=log, timeout=3600)
        arguments = [f"--build-arg={_CONVERT_ENVIRONMENT.argument}={environment}"]
    run([*_docker_build(recipe, _reference(recipe)), *arguments], log=log, timeout=3600)


def exporter_python(*readable: Path, log: Path | None = None) -> list[Argument]:
    """A command prefix: the exporter image's Python over this checkout, for tests that need torch.

    The checkout is there under its own path, read-only, and so is the rest of what a test needs: /tmp is the machine's,
    PYTHONPATH and the working directory are to be set by the caller, after `env` and in the command. `readable` folders
    are there too, read-only.
    """
    require_root("the exporter image's Python")
    container = f"{_CONVERT_ENVIRONMENT.name}-{_tag(_CONVERT_ENVIRONMENT)}"
    with _buildah_lock():
        _ensure(_CONVERT_ENVIRONMENT, log)
        if container not in capture(_command("containers", "--format={{.ContainerName}}")).split():
            _buildah("from", f"--name={container}", "--pull-never", _reference(_CONVERT_ENVIRONMENT), log=log)
    shown = [f"--volume={folder}:{folder}:ro" for folder in (ROOT, *readable)]
    volumes = [*shown, "--volume=/tmp:/tmp", f"--workingdir={ROOT}"]
    settings = ["--isolation=chroot", "--network=host", f"--env=PYTHONPATH={_EXPORTERS}", "--env=PYTHONDONTWRITEBYTECODE=1"]
    return [*_command("run"), *settings, *volumes, container, "--", "/opt/perch/bin/python"]


# -- names


@cache
def _tag(recipe: _Recipe) -> str:
    content = hashlib.sha256(recipe.dockerfile.read_bytes())
    for file in _files(recipe.sources):
        content.update(f"\0{file.relative_to(recipe.context)}\0".encode() + file.read_bytes())
    content.update(_tag(recipe.environment).encode() if recipe.environment else _base_tag().encode())
    return content.hexdigest()[:12]


def _base_tag() -> str:
    made_of = repr((_SUITE, _BASE_PACKAGES, _LEFT_OUT, _EMPTIED))
    return hashlib.sha256(made_of.encode()).hexdigest()[:12]


def _reference(recipe: _Recipe) -> str:
    return f"perch.local/{recipe.name}:{_tag(recipe)}"


def _files(sources: tuple[Path, ...]) -> Iterator[Path]:
    for source in sources:
        found = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
        yield from (file for file in found if "__pycache__" not in file.parts)


# -- buildah


def _ensure(environment: _Recipe | None, log: Path | None) -> None:
    """Has an environment in the store, and of its name no other."""
    _ensure_base(log)
    if environment is None or _has(_reference(environment)):
        return
    _build(environment, log)
    for other in capture(_command("images", "--format={{.Name}}:{{.Tag}}")).split():
        if other.startswith(f"perch.local/{environment.name}:") and other != _reference(environment):
            _buildah("rmi", "--force", other, log=log)


def _with_placeholders(folder: Path, held: Mapping[str, int]) -> Path:
    """A folder to push into in which each blob seems to be there, as a file of its size without content."""
    (folder / "version").write_text("Directory Transport Version: 1.1\n")  # or it is taken for somebody's own folder
    for digest, size in held.items():
        (folder / digest).touch()
        os.truncate(folder / digest, size)
    return folder


def _pack(folder: Path, held: Set[str], reference: str, archive: Path) -> None:
    """Makes an OCI archive of a pushed folder, whose blobs are named by their digests, less those that are held."""
    manifest = (folder / "manifest.json").read_bytes()
    digest = hashlib.sha256(manifest).hexdigest()
    (folder / digest).write_bytes(manifest)
    entry = {
        "mediaType": json.loads(manifest).get("mediaType", "application/vnd.oci.image.manifest.v1+json"),
        "digest": f"sha256:{digest}",
        "size": len(manifest),
        "annotations": {"org.opencontainers.image.ref.name": reference},
    }
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    with tarfile.open(archive, "w") as tar:
        for file in sorted(folder.iterdir()):
            if file.name in ("oci-layout", "index.json"):
                tar.add(file, file.name)
            elif file.name not in ("manifest.json", "version") and file.name not in held - {digest}:
                tar.add(file, f"blobs/sha256/{file.name}")


def _discard_leftovers(log: Path) -> None:
    """Removes what a build that was stopped has left; ours is the lock, so none is under way."""
    # An archive outlives the lock: it stays while the process lives that made it for itself, and that is in its name.
    archives = [file for file in _store().glob("*.tar") if not _of_living_process(file)]
    for leftover in [*archives, *_store().glob(f"{_PUSHING}*"), *_temporary().iterdir()]:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    for container in capture(_command("containers", "--format={{.ContainerName}}")).split():
        if "working-container" in container:
            _buildah("rm", container, log=log)
    _buildah("rmi", "--prune", log=log)


def _of_living_process(archive: Path) -> bool:
    maker = archive.stem.rpartition("-")[2]
    return maker.isdigit() and psutil.pid_exists(int(maker))


def _ensure_base(log: Path | None) -> None:
    base = f"perch.local/base:{_base_tag()}"
    if _has(base):
        return
    archive = _store() / "base.tar"
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
    options += [f'--customize-hook=find "$1/{folder}" -mindepth 1 -delete' for folder in _EMPTIED]
    options += ["--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr", f"--include={','.join(_BASE_PACKAGES)}"]
    run(["mmdebstrap", "--variant=minbase", *options, _SUITE, archive], log=log)
    container = capture(_command("from", "scratch")).strip()
    _buildah("add", "--quiet", container, archive, "/", log=log)
    _buildah("commit", "--quiet", "--rm", container, base, log=log)
    archive.unlink()


def _build(recipe: _Recipe, log: Path | None) -> None:
    arguments = {"BASE_IMAGE": f"perch.local/base:{_base_tag()}"}
    if recipe.environment:
        arguments[recipe.environment.argument] = _reference(recipe.environment)
    command: list[Argument] = [
        "--isolation=chroot",
        "--network=host",
        "--pull-never",
        f"--target={recipe.name}",
    ]
    # This machine's certificates, which may hold an authority of its owner's own.
    bundle = _CERTIFICATES / "ca-certificates.crt"
    command += [f"--volume={folder}:{folder}:ro" for folder in _certificate_folders()]
    command += [f"--build-arg=PIP_CERT={bundle}", f"--build-arg=SSL_CERT_FILE={bundle}"]
    command += [f"--build-arg={name}={value}" for name, value in arguments.items()]
    ignore = recipe.dockerfile.with_name("Dockerfile.dockerignore")
    command += [f"--ignorefile={ignore}"] if ignore.exists() else []
    command += [f"--file={recipe.dockerfile}", f"--tag={_reference(recipe)}", recipe.context]
    _buildah("bud", *command, log=log)


def _certificate_folders() -> list[Path]:
    """The folder of the bundle and those that its links lead to."""
    folders = [_CERTIFICATES, Path("/usr/share/ca-certificates"), Path("/usr/local/share/ca-certificates")]
    return [folder for folder in folders if folder.exists()]


def _has(reference: str) -> bool:
    return subprocess.run(_command("inspect", "--type=image", reference), capture_output=True, check=False).returncode == 0


def _store() -> Path:
    folder = cache_dir() / "buildah"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _temporary() -> Path:
    folder = _store() / "tmp"
    folder.mkdir(exist_ok=True)
    return folder


def _command(action: str, *arguments: Argument) -> list[str]:
    places = [f"--root={_store() / 'storage'}", f"--runroot={_RUN_ROOT}", "--storage-driver=overlay"]
    return ["buildah", *places, action, *map(str, arguments)]


def _buildah(action: str, *arguments: Argument, log: Path | None) -> None:
    run(_command(action, *arguments), log=log, env={"TMPDIR": str(_temporary())}, timeout=3600)


@contextmanager
def _buildah_lock() -> Iterator[None]:
    with FileLock(_store() / ".lock"):
        yield


def _docker_build(recipe: _Recipe, reference: str) -> list[Argument]:
    return ["docker", "build", f"--target={recipe.name}", f"--file={recipe.dockerfile}", f"--tag={reference}", recipe.context]

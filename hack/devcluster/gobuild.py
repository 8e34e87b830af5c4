"""Builds the cluster's programs from the Go modules in hack/go, each group once, into the cache.

A group is a folder with a go.mod whose `tool` lines are what to build. The result is keyed by go.mod, go.sum, the flags
and the version of Go, so a changed pin builds that group again and nothing else.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from devcluster import toolchain
from devcluster.commands import StepError, capture, run
from devcluster.paths import GO_MODULES, cache_dir
from devcluster.progress import Progress
from devcluster.toolchain import go_command


@dataclass(frozen=True)
class Group:
    """A go.mod of its own, since the groups' dependencies disagree with one another."""

    name: str
    module: str
    seconds: int
    """Measured on 2 cores with nothing cached, so that the wait can be announced."""
    tags: str = ""

    @property
    def folder(self) -> Path:
        return GO_MODULES / self.name

    @property
    def version(self) -> str:
        """The pinned version of the group's main module, from its go.mod."""
        text = (self.folder / "go.mod").read_text()
        found = re.search(rf"^\s*(?:require )?{re.escape(self.module)} (v\S+)", text, re.MULTILINE)
        if not found:
            raise StepError(f"{self.folder / 'go.mod'} requires no {self.module}")
        return found[1]


ETCD = Group("etcd", "go.etcd.io/etcd/server/v3", 20)
KUBERNETES = Group("kubernetes", "k8s.io/kubernetes", 290)
HELM = Group("helm", "helm.sh/helm/v3", 55)
ENVOY_GATEWAY = Group("envoy-gateway", "github.com/envoyproxy/gateway", 126)
VERSITYGW = Group("versitygw", "github.com/versity/versitygw", 76)
COREDNS = Group("coredns", "github.com/coredns/coredns", 114)
# Debian's prometheus package is built without Kubernetes discovery, so it would find no pods.
PROMETHEUS = Group("prometheus", "github.com/prometheus/prometheus", 100, tags="remove_all_sd,enable_kubernetes_sd")
KIND = Group("kind", "sigs.k8s.io/kind", 30)
GROUPS = (ETCD, KUBERNETES, HELM, ENVOY_GATEWAY, VERSITYGW, COREDNS, PROMETHEUS)


def is_built(group: Group) -> bool:
    return target(group).is_dir()


def build_missing(groups: Sequence[Group], progress: Progress) -> None:
    """Builds those of the groups that are not in the cache, each as a step that says how long it takes."""
    toolchain.install(progress)
    for group in groups:
        if not is_built(group):
            with progress.step(f"build {group.name} {group.version} (about {group.seconds} s on two cores)") as log:
                build(group, log)


def build(group: Group, log: Path) -> Path:
    """Builds what the group's go.mod names as tools, unless that is done, and returns the folder of its programs."""
    result = target(group)
    if result.is_dir():
        return result
    with _lock(group):
        if result.is_dir():
            return result
        for leftover in result.parent.glob(".building-*"):
            shutil.rmtree(leftover)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=result.parent))
        go = str(go_command())
        tools = json.loads(capture([go, "mod", "edit", "-json", str(group.folder / "go.mod")]))["Tool"]
        run(
            [go, "build", *_flags(group), "-o", f"{building}/", *[tool["Path"] for tool in tools]],
            log=log,
            env=_environment(),
            cwd=group.folder,
            timeout=3600,
        )
        _name_after_module(building, group)
        building.chmod(0o755)
        for outdated in result.parent.glob("[0-9a-f]*"):
            shutil.rmtree(outdated)
        building.rename(result)
    return result


def discard_build_cache() -> None:
    """Removes Go's own caches, 11 GB, when all is built: a changed pin builds its group again from nothing.

    Leaves them while another run builds out of them; that one will discard them.
    """
    caches = cache_dir() / "go-build"
    if caches.exists():
        with ExitStack() as stack:
            try:
                for group in (*GROUPS, KIND):
                    stack.enter_context(_lock(group).acquire(timeout=0))
            except Timeout:
                return
            # Go keeps modules read-only.
            run([str(go_command()), "clean", "-modcache"], env=_environment())
            shutil.rmtree(caches, ignore_errors=True)


def _lock(group: Group) -> FileLock:
    """Held by who reads or writes Go's caches for this group."""
    folder = cache_dir() / "bin" / group.name
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".lock")


def module_files(group: Group, part: str) -> Path:
    """Where a folder out of the source of the group's main module, such as a chart, is in the cache, or will be."""
    return cache_dir() / "modules" / f"{group.name}-{group.version}" / part


def extract_module_files(group: Group, part: str, log: Path) -> None:
    """Copies that folder into the cache, unless it is there."""
    result = module_files(group, part)
    download = [str(go_command()), "mod", "download", "-json", f"{group.module}@{group.version}"]
    with _lock(group):
        if result.is_dir():
            return
        source = Path(json.loads(capture(download, env=_environment(), cwd=group.folder, timeout=600))["Dir"])
        draft = result.with_name(f".{result.name}-copying")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(source / part, draft)
        run(["chmod", "-R", "u+w", draft], log=log)  # Go keeps modules read-only
        draft.rename(result)


def target(group: Group) -> Path:
    """Where the group's programs are, or will be when they are built."""
    content = hashlib.sha256()
    for part in (group.folder / "go.mod", group.folder / "go.sum"):
        content.update(part.read_bytes())
    content.update(" ".join([*_flags(group), _go_version()]).encode())
    return cache_dir() / "bin" / group.name / content.hexdigest()[:12]


@cache
def _go_version() -> str:
    return capture([go_command(), "version"]).strip()


def _environment() -> dict[str, str]:
    # CGO off: static programs, which run in an image from scratch. A user's own GOFLAGS would make another result
    # under the same key, and the user's own caches would keep what is never used again.
    caches = cache_dir() / "go-build"
    return {
        "CGO_ENABLED": "0",
        "GOFLAGS": "-mod=readonly",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "GOCACHE": str(caches / "build"),
        "GOMODCACHE": str(caches / "modules"),
    }


def _flags(group: Group) -> list[str]:
    version = group.version
    stamps = {
        "kubernetes": {
            "k8s.io/component-base/version.gitVersion": version,
            "k8s.io/component-base/version.gitMajor": version.lstrip("v").split(".")[0],
            "k8s.io/component-base/version.gitMinor": version.split(".")[1],
        },
        # Without these, `helm template` believes in a Kubernetes of years ago and refuses charts that need a newer one.
        "helm": {
            "helm.sh/helm/v3/internal/version.version": version,
            "helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor": "1",
            "helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor": KUBERNETES.version.split(".")[1],
            "helm.sh/helm/v3/pkg/lint/rules.k8sVersionMajor": "1",
            "helm.sh/helm/v3/pkg/lint/rules.k8sVersionMinor": KUBERNETES.version.split(".")[1],
        },
    }.get(group.name, {})
    ldflags = " ".join(["-s -w", *[f"-X {name}={value}" for name, value in stamps.items()]])
    tags = ["-tags", group.tags] if group.tags else []
    return ["-trimpath", "-buildvcs=false", "-ldflags", ldflags, *tags]


def _name_after_module(folder: Path, group: Group) -> None:
    """etcd's main package is the module `server/v3` itself, and would be installed as `server` (or `v3`)."""
    if group is ETCD:
        next(folder.iterdir()).rename(folder / "etcd")

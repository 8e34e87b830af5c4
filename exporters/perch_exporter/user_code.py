"""The user's own network: unpacks the source that a request names, imports it, and calls its factory. In convert alone.

The archive is looked at before a byte is written: nothing may land outside the folder, and what it unpacks to is bounded. The
code itself is the user's, and runs: what holds it is convert's sandbox, with no credentials and no network, and publish, which
believes nothing of what convert leaves behind.
"""

from __future__ import annotations

import importlib
import logging
import stat
import sys
import tempfile
import traceback
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from perch_exporter.contract import Architecture, Reason
from perch_exporter.failure import StepFailed

log = logging.getLogger(__name__)

MOST_FILES = 10_000
MOST_BYTES = 2**30
"""Of the archive's content, unpacked."""

_CHUNK = 2**20


@dataclass(frozen=True)
class UserCode:
    """An unpacked source, importable as long as it is open (`opened`)."""

    folder: Path

    def build(self, architecture: Architecture) -> nn.Module:
        """What the factory gives, in eval mode. Raises EntryPointFailed with the user's own file and line."""
        module_name, _, path = str(architecture.entry_point).partition(":")
        try:
            factory: Any = importlib.import_module(module_name)
            if not self._holds(factory):
                raise ModuleNotFoundError(f"No module named {module_name!r} in the source, which holds {self._top()}")
            for name in path.split("."):
                factory = getattr(factory, name)
            network = factory(**architecture.parameters)
        except (Exception, SystemExit) as error:
            given = ", ".join(f"{name}={value!r}" for name, value in architecture.parameters.items()) or "no parameters"
            raise StepFailed(
                Reason.ENTRY_POINT_FAILED,
                f"architecture.entryPoint {architecture} with {given}: {type(error).__name__}: {error}{self.line(error)}",
            ) from error
        if not isinstance(network, nn.Module):
            raise StepFailed(
                Reason.ENTRY_POINT_FAILED,
                f"architecture.entryPoint {architecture} gives a {type(network).__name__}; it must return a torch.nn.Module",
            )
        return _unwrapped(network).eval()

    def line(self, error: BaseException) -> str:
        """Where in the user's code it happened, as ` (net/model.py, line 12)`; empty where it happened elsewhere."""
        places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError) and error.filename:
            places.append((error.filename, error.lineno))
        for filename, number in reversed(places):
            if Path(filename).is_relative_to(self.folder):
                return f" ({Path(filename).relative_to(self.folder).as_posix()}, line {number})"
        return ""

    def _holds(self, module: Any) -> bool:
        """A name that the image has too (`torch.nn:Linear`) is not the user's code, and is another one in another image."""
        return _within(module, self.folder)

    def _top(self) -> str:
        names = sorted(path.name for path in self.folder.iterdir() if not path.name.endswith(".dist-info"))
        return ", ".join(names[:6]) or "nothing"


def _unwrapped(network: nn.Module) -> nn.Module:
    """Without what training puts around a network: these answer alike and cannot be exported."""
    while True:
        inner = network.module if isinstance(network, nn.DataParallel) else getattr(network, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return network
        log.info("%s around the network is taken off", type(network).__name__)
        network = inner


@contextmanager
def opened(archive: Path) -> Iterator[UserCode]:
    """Unpacked into a temporary folder, and first on the import path until the block ends. Raises SourceRejected."""
    with tempfile.TemporaryDirectory(prefix="perch-source-") as name:
        folder = Path(name).resolve()
        _unpack(archive, folder)
        before = set(sys.modules)
        sys.path.insert(0, str(folder))
        try:
            yield UserCode(folder)
        finally:
            if str(folder) in sys.path:
                sys.path.remove(str(folder))
            # All are found before the first goes: a folder without __init__.py asks its parent package where it lies.
            for module in [name for name in set(sys.modules) - before if _within(sys.modules[name], folder)]:
                sys.modules.pop(module, None)
            importlib.invalidate_caches()


def _within(module: Any, folder: Path) -> bool:
    """Whether a module lies in the folder. One that asks its parent package, which failed to be imported, cannot tell."""
    try:
        places = [module.__file__] if getattr(module, "__file__", None) else list(getattr(module, "__path__", []))
        return any(Path(place).is_relative_to(folder) for place in places)
    except KeyError:
        return True
    except Exception:  # somebody's odd module; what the step failed of must not be hidden by it
        return False


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as content:
            entries = content.infolist()
            _inspect(entries)
            for entry in entries:
                target = folder.joinpath(*PurePosixPath(entry.filename).parts)
                if entry.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _write(content, entry, target)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise _rejected(f"it cannot be unpacked: {type(error).__name__}: {error}") from error
    log.info("unpacked %d files of the source", len(entries))


def _inspect(entries: list[zipfile.ZipInfo]) -> None:
    """By the archive's own table; what an entry unpacks to is bounded again while it is written."""
    if len(entries) > MOST_FILES:
        raise _rejected(f"it has {len(entries):,} files, more than the {MOST_FILES:,} that are taken")
    total = sum(entry.file_size for entry in entries)
    if total > MOST_BYTES:
        raise _rejected(f"it unpacks to {total:,} bytes, more than the {MOST_BYTES:,} that are taken")
    for entry in entries:
        path = PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or not path.parts:
            raise _rejected(f"{entry.filename[:100]!r} would lie outside of its folder")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _rejected(f"{entry.filename[:100]!r} is a link or a device; pack plain files")


def _write(content: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    with content.open(entry) as packed, target.open("xb") as plain:
        left = entry.file_size
        while chunk := packed.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                raise _rejected(f"{entry.filename[:100]!r} unpacks to more than it says")
            plain.write(chunk)


def _rejected(why: str) -> StepFailed:
    return StepFailed(
        Reason.SOURCE_REJECTED, f"architecture.source is refused: {why}; give a wheel, or a zip with the package at its top"
    )

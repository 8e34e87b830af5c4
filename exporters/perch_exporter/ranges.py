"""A large object in parts, several at a time, each going on where its connection broke.

What is done is kept beside the target with the object's ETag. So a later attempt in the same folder (a pod's download that is
started again, the next run on a laptop) brings what is missing alone, and everything where the object is another one.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

PART = 16 * 2**20
_AT_ONCE = 4
_TRIES = 5
"""In a row without a byte of progress."""
_FIRST_DELAY_SECONDS = 0.5

Read = Callable[[int, int], Iterable[bytes]]
"""The object's bytes from first to last, both included; may break off early, with or without an error."""


@dataclass
class Partial:
    """The unfinished file and its record. A record that cannot be read, or of another object, counts as none."""

    target: Path
    etag: str
    size: int
    done: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def data(self) -> Path:
        return self.target.with_name(self.target.name + ".partial")

    @property
    def record(self) -> Path:
        return self.target.with_name(self.target.name + ".partial.json")

    def load(self) -> None:
        try:
            kept = json.loads(self.record.read_text())
            if self.etag and (kept["etag"], kept["size"], kept["part"]) == (self.etag, self.size, PART) and self.data.exists():
                self.done = {int(part) for part in kept["done"]}
                return
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self.data.unlink(missing_ok=True)

    def finish(self, part: int) -> None:
        with self._lock:
            self.done.add(part)
            whole = {"etag": self.etag, "size": self.size, "part": PART, "done": sorted(self.done)}
            fresh = self.record.with_name(self.record.name + ".new")
            fresh.write_text(json.dumps(whole))
            fresh.replace(self.record)

    def publish(self) -> None:
        self.data.replace(self.target)
        self.record.unlink(missing_ok=True)


def fetch(
    read: Read, target: Path, *, size: int, etag: str, passing: Sequence[type[Exception]], progress: Callable[[int], None]
) -> None:
    """Writes `target` whole. Errors of the types `passing` are tried again as long as bytes keep coming; others are raised."""
    partial = Partial(target, etag, size)
    partial.load()
    parts = [part for part in range(-(-size // PART)) if part not in partial.done]
    if partial.done:
        log.info("going on: %d of %d parts are here from an earlier attempt", len(partial.done), len(partial.done) + len(parts))
        progress(sum(min(PART, size - part * PART) for part in partial.done))
    stop = threading.Event()
    with partial.data.open("r+b" if partial.data.exists() else "w+b") as file:

        def bring(part: int) -> None:
            try:
                _bring(read, file.fileno(), part * PART, min(size, (part + 1) * PART), tuple(passing), progress, stop)
            except BaseException:
                stop.set()  # the others need not run to their ends first
                raise
            if not stop.is_set():
                partial.finish(part)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for outcome in [pool.submit(bring, part) for part in parts]:
                outcome.result()
    partial.publish()


def _bring(
    read: Read,
    file: int,
    start: int,
    end: int,
    passing: tuple[type[Exception], ...],
    progress: Callable[[int], None],
    stop: threading.Event,
) -> None:
    tries = 0
    while start < end and not stop.is_set():
        before, trouble = start, None
        try:
            for chunk in read(start, end - 1):
                # No more than was asked for: a server that ignores the range would write over the next part.
                written = os.pwrite(file, chunk[: end - start], start)
                start += written
                progress(written)
                if stop.is_set():
                    return
        except passing as error:
            trouble = error
        if start >= end:
            return
        tries = 0 if start > before else tries + 1
        if tries >= _TRIES:
            raise trouble or EOFError(f"no more bytes come after {start} of those to {end}")
        log.info("the transfer broke after byte %d (%s); going on from there", start, trouble or "it ended early")
        time.sleep(_FIRST_DELAY_SECONDS * 2**tries)

"""What a person sees while a cluster comes up: a line for each step, with its time; on failure, where its log is."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from devcluster.commands import StepError, tail


class Progress:
    """Announces steps and times them. Steps may run beside each other, in threads."""

    def __init__(self, logs: Path, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._logs = logs
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> "Progress":
        self._logs.mkdir(parents=True, exist_ok=True)
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextmanager
    def step(self, title: str) -> Iterator[Path]:
        """Runs one step; yields the path of its log, begun anew. A failure names that log and shows its end."""
        log = self._logs / f"step-{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.log"
        log.unlink(missing_ok=True)
        started = time.monotonic()
        task = self._bars.add_task(title, total=None)
        if not self.console.is_terminal:  # no bar is seen there, and a step may take minutes
            self.note(f"begun       {title}")
        try:
            yield log
        except KeyboardInterrupt:
            self.console.print(f"  [yellow]stopped[/] in: {title}; the same command goes on from here")
            raise
        except Exception as error:
            self.console.print(f"  [red]failed[/]  {title} after {time.monotonic() - started:.1f} s")
            if not isinstance(error, StepError) and log.exists():
                error.add_note(f"the step's log is {log} and ends:\n{tail(log)}")
            raise
        finally:
            self._bars.remove_task(task)
        self.console.print(f"  [green]ok[/] {time.monotonic() - started:6.1f} s  {title}", soft_wrap=True)

    @contextmanager
    def locked(self, path: Path, what: str) -> Iterator[None]:
        """Holds a lock that other runs may hold; says so when it has to wait for one."""
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.note(f"waiting for another run that is busy with: {what}")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def note(self, text: str) -> None:
        """A line that belongs to no step, such as what is about to be installed."""
        self.console.print(f"  {text}", markup=False, soft_wrap=True)

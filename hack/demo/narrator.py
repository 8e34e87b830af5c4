"""How the story is told: chapters with their time, what was found to be so, and what programs printed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.markup import escape


class Narrator:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun = time.monotonic()

    @contextmanager
    def chapter(self, title: str) -> Iterator[None]:
        started = time.monotonic()
        self._console.rule(f"[bold]{title}", align="left")
        yield
        self.print(f"  [dim]{time.monotonic() - started:.1f} s; {self.clock()} since the start[/]\n")

    def clock(self) -> str:
        minutes, seconds = divmod(round(time.monotonic() - self._begun), 60)
        return f"{minutes}:{seconds:02} min"

    def ok(self, text: str) -> None:
        """What was checked and found as it should be."""
        self.print(f"  [green]✓[/] {text}")

    def say(self, text: str) -> None:
        """What is going on."""
        self.print(f"    [dim]{escape(text)}[/]")

    def lines(self, text: str) -> None:
        """What a program printed, as it is."""
        for line in text.rstrip().splitlines():
            self.print(f"    {escape(line)}")

    def change(self, difference: str) -> None:
        """The changed lines of a unified diff."""
        for line in difference.splitlines():
            if line[:1] in ("+", "-") and line[:3] not in ("+++", "---"):
                self.print(f"    [{'green' if line[0] == '+' else 'red'}]{escape(line)}[/]")

    def print(self, content: RenderableType = "") -> None:
        self._console.print(content, soft_wrap=True)

    @contextmanager
    def spinner(self) -> Iterator[Callable[[str], None]]:
        """A line that moves while something is waited for, on a terminal; yields what sets its text."""
        with self._console.status("waiting") as status:
            yield lambda text: status.update(escape(text))
